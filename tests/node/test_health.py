"""Checks of a machine: each finds its trouble, and says what to do."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from moehive.node.health import (
    ENOUGH_FILES,
    check_clock,
    check_daemon,
    check_device_fit,
    check_disk,
    check_fit,
    check_identity,
    check_open_files,
    check_port,
    check_store,
    check_stored_fit,
    check_threads,
    check_versions,
    clock_is_synchronised,
    satisfies,
    usable_cores,
)
from moehive.protocol.errors import TransportError
from moehive.swarm.identity import Identity
from moehive.swarm.policy.budgets import DiskFacts

GIB = 1 << 30


@pytest.mark.parametrize(
    ("found", "wanted", "fits"),
    [
        ("5.23.0", "<6,>=5.8", True),
        ("6.0", "<6,>=5.8", False),
        ("5.7.9", ">=5.8,<6", False),
        ("2.13.0+cpu", ">=2.8", True),
        ("2.8", ">=2.8.0", True),
        ("1.1.12", "==1.1.12", True),
        ("1.1.13", "==1.1.12", False),
        ("1.10", ">=1.9", True),
        ("9", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(found: str, wanted: str, fits: bool) -> None:
    assert satisfies(found, wanted) is fits


def test_every_requirement_that_applies_is_looked_at() -> None:
    requirements = [
        "torch>=2.8", "hivemind>=1.1.12", "gone>=1", 'triton>=3; platform_system == "Linux"',
        "winonly>=1; platform_system == 'Windows'", "pytest>=8; extra == 'dev'",
    ]  # fmt: skip
    versions = {"torch": "2.13.0+cpu", "hivemind": "1.1.2", "triton": "3.9"}
    checks = {check.name: check for check in check_versions(requirements, versions.get)}
    assert {name: check.state for name, check in checks.items()} == {
        "torch": "ok", "hivemind": "wrong", "gone": "wrong", "triton": "ok",
    }  # fmt: skip
    assert checks["hivemind"].advice == "pip install 'hivemind>=1.1.12'"


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_daemon_that_runs_and_ones_that_do_not(tmp_path: Path) -> None:
    def missing() -> Path:
        raise TransportError("hivemind is not installed")

    assert check_daemon(lambda: script(tmp_path / "good", "#!/bin/sh\nexit 0\n")).state == "ok"
    assert check_daemon(lambda: script(tmp_path / "bad", "#!/bin/sh\nexit 126\n")).state == "wrong"
    assert check_daemon(lambda: script(tmp_path / "alien", "\x7fELF nonsense")).state == "wrong"
    assert check_daemon(lambda: tmp_path / "absent").state == "wrong"
    assert check_daemon(missing).found == "hivemind is not installed"


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    assert check_identity(path, Identity.load_or_create).state == "ok"
    assert not path.exists(), "looking makes no key"
    Identity.load_or_create(path)
    assert check_identity(path, Identity.load_or_create).state == "ok"
    path.chmod(0o640)
    shown = check_identity(path, Identity.load_or_create)
    assert (shown.state, shown.advice) == ("wrong", f"chmod 600 {path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "looking changes nothing"
    path.chmod(0o600)
    path.write_bytes(b"no key")
    assert check_identity(path, Identity.load_or_create).state == "wrong"


def test_what_can_be_better_is_a_note_with_advice() -> None:
    notes = [
        check_open_files(256, 1 << 20),
        check_open_files(256, 256),
        check_threads(64, 2.0),
        check_clock(False),
        check_port(20_000, lambda port: False, running=False),
        check_store(3, GIB, [], 2),
        check_fit("mixtral", 256, GIB, 2, 64 * GIB),
    ]
    assert [check.state for check in notes] == ["note"] * len(notes)
    assert all(check.advice for check in notes)


def test_what_is_wrong_has_advice() -> None:
    wrong = [
        check_disk(Path("/store"), DiskFacts(free=100 << 20), writable=True),
        check_disk(Path("/store"), DiskFacts(free=100 * GIB), writable=False),
        check_store(3, GIB, ["demo/manifest.json"], 0),
        check_fit("mixtral", 256, GIB, 2, 4 * GIB),
    ]
    assert [check.state for check in wrong] == ["wrong"] * len(wrong)
    assert all(check.advice for check in wrong)


def test_what_is_well_needs_no_advice() -> None:
    fine = [
        check_open_files(ENOUGH_FILES, ENOUGH_FILES),
        check_threads(2, 2.0),
        check_clock(True),
        check_clock(None),
        check_port(20_000, lambda port: True, running=False),
        check_port(20_000, lambda port: False, running=True),
        check_disk(Path("/store"), DiskFacts(free=100 * GIB), writable=True),
        check_store(0, 0, [], 0),
        check_fit("mixtral", 256, GIB, 2, 256 * GIB),
    ]
    assert [(check.state, check.advice) for check in fine] == [("ok", "")] * len(fine)


def test_the_quota_of_a_control_group_counts(tmp_path: Path) -> None:
    everything = usable_cores(tmp_path)
    assert everything >= 1
    group = tmp_path / "sys/fs/cgroup"
    (group / "cpu").mkdir(parents=True)
    (group / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (group / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores(tmp_path) == everything
    (group / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    assert usable_cores(tmp_path) == 0.5
    (group / "cpu.max").write_text("25000 100000\n")
    assert usable_cores(tmp_path) == 0.25
    (group / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 0.5


def test_the_clock_can_be_asked() -> None:
    assert clock_is_synchronised() in (True, False, None)


def test_a_model_that_fits_as_it_is_stored_is_said_to() -> None:
    said = check_stored_fit("demo", experts=100, stored=25, widened=100, top_k=2, ram=3000)
    assert said is not None
    assert said.found == "all experts of demo fit as they are stored (2.4 KiB)"
    assert check_stored_fit("demo", 100, 25, 100, 2, ram=2999) is None
    assert check_stored_fit("demo", 100, 25, 100, 2, ram=10_000) is None
    assert check_stored_fit("demo", 100, 100, 100, 2, ram=9000) is None


@pytest.mark.parametrize(
    ("vram", "state", "said"), [(499, "note", "too little"), (500, "ok", "5 of 100"), (10**6, "ok", "100 of")]
)
def test_what_of_a_model_fits_a_device(vram: int, state: str, said: str) -> None:
    check = check_device_fit("demo", 100, 100, 2, "vram cuda:0", vram)
    assert check.state == state
    assert said in check.found
