"""The frame around the commands: help, version, usage errors, places."""

import json
import re
import stat

import pytest

from moehive.protocol.ids import public_key_of

COMMANDS = (
    "demo", "convert", "inspect", "node", "publish", "fetch", "generate", "chat", "serve", "top", "doctor", "id",
    "paths", "store", "trace", "bench",
)  # fmt: skip


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_every_command(moehive, arguments):
    outcome = moehive(*arguments)

    assert outcome.code == 0
    assert all(f"│ {command} " in outcome.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_every_option(moehive, command):
    outcome = moehive(command, "--help")

    assert outcome.code == 0
    for line in outcome.out.splitlines():
        if re.match(r"│ ?\*? {1,2}--", line):  # further right, the text of another option goes on
            _, _, help_text = line.strip("│* ").partition("  ")
            assert help_text.strip(), line


def test_version(moehive):
    from importlib.metadata import version

    assert moehive("--version").out.strip() == version("moehive")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nod",), 'Did you mean "node"?'),
        (("node",), "--model requires"),
        (("convert", "a"), "DESTINATION"),
        (("convert", "a", "b", "c"), "'c'"),
        (("node", "m", "--rma", "1"), "Did you mean --ram?"),
        (("node", "m", "--ram", "4 apples"), "--ram"),
        (("node", "m", "--upload-rate", "fast"), "--upload-rate"),
        (("node", "m", "--upload-rate", "10kB/s"), "at least 64kB/s"),
        (("node", "m", "--upload-slots", "0"), "--upload-slots"),
        (("node", "m", "--bulk-port", "65536"), "--bulk-port"),
        (("node", "m", "--disk", "4G"), "4GiB"),
        (("node", "m", "--threads", "0"), "--threads"),
        (("node", "m", "--threads", "99999"), "would only wait for each other: give 1 to"),
        (("node", "m", "--log-format", "xml"), "console"),
        (("node", "m", "--listen", "localhost"), "0.0.0.0:4001"),
        (("generate", "hello"), "--model"),
        (("generate", "hello", "--model", "m", "--max-tokens", "0"), "--max-tokens"),
        (("generate", "hello", "--model", "m", "--temperature", "-1"), "--temperature"),
        (("generate", "hello", "--model", "m", "--seed", "-1"), "--seed"),
        (("generate", "hello", "--model", "m", "--dtype", "float8"), "bfloat16"),
        (("demo", "--nodes", "0"), "--nodes"),
        (("demo", "--nodes", "9"), "at most 8"),
    ],
)
def test_wrong_usage_is_explained_with_exit_code_2(moehive, arguments, said):
    outcome = moehive(*arguments)

    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.err.startswith("moehive: ")
    assert "Traceback" not in outcome.err


def test_the_peer_id_is_made_once_and_kept_for_its_owner_alone(moehive, home):
    first, second = moehive("id"), moehive("id")

    assert first.code == 0
    assert first.out == second.out
    assert len(public_key_of(first.out.strip())) == 32
    assert stat.S_IMODE((home / "data" / "identity.key").stat().st_mode) == 0o600


def test_the_identity_can_lie_elsewhere(moehive, tmp_path):
    assert moehive("id").out != moehive("id", "--identity", tmp_path / "other.key").out


def test_paths_follow_moehive_home(moehive, home):
    places = json.loads(moehive("paths", "--json").out)

    assert places["identity"] == str(home / "data" / "identity.key")
    assert places["settings"] == str(home / "config" / "config.toml")
    assert all(place in moehive("paths").out for place in places.values())
