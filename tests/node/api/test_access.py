"""Who may ask."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from moehive.node.api.access import Access, host_of

KEY = "a-key-of-enough-letters"


def refusal(access: Access, path: str = "/v1/models", **headers: str) -> int | None:
    error = access.refusal(path, Headers(headers))
    return None if error is None else error.status


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:8080", "localhost"),
        ("127.0.0.1:8080", "127.0.0.1"),
        ("[::1]:8080", "[::1]"),
        ("[::1]", "[::1]"),
        ("", ""),
        ("localhost:8080@evil.example", ""),
        ("::1", ""),
        ("localhost:", ""),
    ],
)
def test_the_name_in_a_host_header(header, name):
    assert host_of(header) == name


def test_only_the_names_of_this_machine():
    access = Access(hosts=frozenset({"localhost", "127.0.0.1"}))

    assert refusal(access, host="localhost:8080") is None
    assert refusal(access, host="rebound.example:8080") == 403
    assert refusal(access) == 403
    assert refusal(access, "/health/live", host="rebound.example") == 403


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer é"]
)
def test_a_wrong_key_is_refused(given):
    assert refusal(Access(KEY), authorization=given) == 401


def test_the_key_opens_and_health_needs_none():
    assert refusal(Access(KEY), authorization=f"Bearer {KEY}") is None
    assert refusal(Access(KEY), authorization=f"bearer  {KEY}") is None
    assert refusal(Access(KEY)) == 401
    assert [refusal(Access(KEY), path) for path in ("/health", "/health/ready", "/healthy", "/metrics")] == [
        None, None, 401, 401,
    ]  # fmt: skip
    assert refusal(Access(), authorization="Bearer whatever") is None, "clients send something where nothing is asked"


def test_the_key_is_not_shown():
    assert KEY not in repr(Access(KEY))
