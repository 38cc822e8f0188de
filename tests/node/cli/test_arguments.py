"""HOST:PORT and multiaddrs."""

import pytest

from moehive.node.cli.arguments import multiaddr


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:4001", "/ip4/0.0.0.0/tcp/4001"),
        ("127.0.0.1:0", "/ip4/127.0.0.1/tcp/0"),
        ("[::1]:65535", "/ip6/::1/tcp/65535"),
        ("[2001:DB8::1]:1", "/ip6/2001:db8::1/tcp/1"),
        ("/ip4/1.2.3.4/tcp/5", "/ip4/1.2.3.4/tcp/5"),
        ("/dns4/example.org/tcp/5", "/dns4/example.org/tcp/5"),
    ],
)
def test_addresses(text, address):
    assert multiaddr(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":", ":4001", "4001", "1.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "1.2.3.4:-1", "1.2.3:4", "::1:4001",
     "[1.2.3.4]:1", "[::1:1", "::1]:1", "1.2.3.4:٣", "example.org:1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"write for example 0\.0\.0\.0:4001"):
        multiaddr(text)


def test_only_an_announced_address_may_be_a_name():
    assert multiaddr("node-1.example.org:4001", names=True) == "/dns/node-1.example.org/tcp/4001"
    with pytest.raises(ValueError, match="not an address"):
        multiaddr("exa mple:1", names=True)
