"""What commonly goes wrong on a machine, as checks that each look at one thing and say what to do about it.

None of them changes anything, waits for a network, or raises for what it finds.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from moehive.protocol.errors import MoehiveError
from moehive.protocol.units import format_size
from moehive.swarm.policy.budgets import DiskFacts, least_ram

PACKAGES = "packages"
State = Literal["ok", "note", "wrong"]  # note: works, and could be better
ENOUGH_FILES = 4096  # sockets of some hundred peers, shards and connections of their downloads
_LITTLE_DISK = 1 << 30
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # more than struct timex has; modes = 0 only asks
_START_TIMEOUT = 10.0  # seconds for a program that prints its help
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*([<>=!~0-9.,\s]*)(;.*)?")
_BOUND = re.compile(r"(>=|<|==)\s*([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, what was found, and what to do where it is not `ok`."""

    name: str
    state: State
    found: str
    advice: str = ""
    kind: str = ""


def check_versions(requirements: Iterable[str], installed: Callable[[str], str | None]) -> list[Check]:
    """The packages of a wheel's requirements, against what is `installed` (None: not)."""
    checks = []
    for text in requirements:
        match = _REQUIREMENT.fullmatch(text)
        if match is None or (match[3] and not _applies(match[3])):
            continue
        name, wanted = match[1], match[2].strip()
        found = installed(name)
        if found is None:
            checks.append(Check(name, "wrong", "not installed", f"pip install '{name}{wanted}'", PACKAGES))
        elif not satisfies(found, wanted):
            checks.append(Check(name, "wrong", f"{found}, needs {wanted}", f"pip install '{name}{wanted}'", PACKAGES))
        else:
            checks.append(Check(name, "ok", found, kind=PACKAGES))
    return checks


def satisfies(found: str, wanted: str) -> bool:
    """Whether version `found` is within bounds such as ">=5.8,<6"; what follows the numbers, as in 2.8+cpu, is left."""
    ours = _numbers(found)
    for sign, bound in _BOUND.findall(wanted):
        theirs = _numbers(bound)
        width = max(len(ours), len(theirs))
        left, right = (numbers + (0,) * (width - len(numbers)) for numbers in (ours, theirs))
        if not {">=": left >= right, "<": left < right, "==": left == right}[sign]:
            return False
    return True


def installed_version(name: str) -> str | None:
    """Of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_daemon(find: Callable[[], Path]) -> Check:
    """The network daemon: there, executable, and of this platform."""
    try:
        binary = find()
    except MoehiveError as error:
        return Check("p2pd", "wrong", str(error), "reinstall hivemind for this platform")
    try:
        started = subprocess.run([str(binary), "-help"], capture_output=True, timeout=_START_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("p2pd", "wrong", f"{binary} does not run: {error}", "reinstall hivemind for this platform")
    if started.returncode not in (0, 2):  # Go's flag package: some versions end with 2 after the help
        return Check("p2pd", "wrong", f"{binary} ended with {started.returncode}", "reinstall hivemind")
    return Check("p2pd", "ok", str(binary))


def check_open_files(soft: int, hard: int) -> Check:
    """The limit of open files and sockets."""
    if soft >= ENOUGH_FILES:
        return Check("open files", "ok", f"{soft} at a time")
    raised = f"ulimit -n {ENOUGH_FILES}" if hard >= ENOUGH_FILES else "raise the hard limit (limits.conf, LimitNOFILE)"
    return Check("open files", "note", f"{soft} at a time: a node with many peers needs more", raised)


def check_identity(path: Path, load: Callable[[Path], object]) -> Check:
    """The key file, where there is one: its form, and that only its owner can read it. Never makes one."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return Check("identity", "ok", f"{path} is made by the first `moehive node`")
    except OSError as error:
        return Check("identity", "wrong", f"{path}: {error.strerror}", "let this user read it, or use --identity")
    if mode & 0o077:
        return Check("identity", "wrong", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}")
    try:
        load(path)
    except MoehiveError as error:
        return Check("identity", "wrong", str(error), "move the file away to get a new identity")
    return Check("identity", "ok", f"{path}, mode {mode:04o}")


def check_port(port: int, is_free: Callable[[int], bool], running: bool) -> Check:
    """A node's own loopback port. `running`: a node uses the identity now, so the port is rightly taken."""
    if is_free(port):
        return Check("port", "ok", f"127.0.0.1:{port} is free")
    if running:
        return Check("port", "ok", f"127.0.0.1:{port} is used by the node that runs")
    return Check(
        "port", "note", f"127.0.0.1:{port} is used by another program", "earlier tickets do not work; use --listen"
    )


def check_disk(path: Path, disk: DiskFacts, writable: bool) -> Check:
    """The place of the store."""
    if not writable:
        return Check("disk", "wrong", f"{path} cannot be written to", "set MOEHIVE_HOME to a place that can")
    if disk.free < _LITTLE_DISK:
        return Check("disk", "wrong", f"{path}: only {format_size(disk.free)} free", "`moehive store prune` makes room")
    return Check("disk", "ok", f"{path}: {format_size(disk.free)} free, {format_size(disk.held)} held")


def check_store(objects: int, size: int, unreadable: Sequence[str], abandoned: int) -> Check:
    """What the store's names and manifests say; hashing all of it is for `moehive store verify`."""
    if unreadable:
        found = f"{len(unreadable)} damaged manifest(s), such as {unreadable[0]}"
        return Check("store", "wrong", found, "`moehive store verify` takes them out of view")
    said = f"{objects} objects, {format_size(size)}" if objects else "empty"
    if abandoned:
        return Check("store", "note", f"{said}; {abandoned} unfinished downloads", "`moehive store prune` removes them")
    return Check("store", "ok", said)


def check_fit(name: str, experts: int, expert_bytes: int, top_k: int, ram: int) -> Check:
    """Whether a model's experts, `expert_bytes` each, fit a RAM budget: all, some, or too few for one token."""
    total, least = experts * expert_bytes, least_ram(expert_bytes, top_k)
    if ram >= total:
        return Check("model", "ok", f"all {experts} experts of {name} ({format_size(total)}) fit into memory")
    if ram < least:
        found = f"{name} needs at least {format_size(least)} for experts in memory, better {format_size(total)}"
        return Check("model", "wrong", found, "free memory, or take a machine with more of it")
    share = f"{ram / total:.0%} of the experts of {name} ({format_size(total)}) fit into memory"
    return Check("model", "note", share, "it runs, and reads the others from disk as they are used")


def check_stored_fit(name: str, experts: int, stored: int, widened: int, top_k: int, ram: int) -> Check | None:
    """Whether experts that do not all fit a RAM budget as they are computed with do so as they are stored.

    Bytes of one expert in each form. None where there is nothing to say: all fit, or not even so.
    """
    total = experts * stored + least_ram(widened, top_k)
    if stored >= widened or ram >= experts * widened or ram < total:
        return None
    return Check("model", "note", f"all experts of {name} fit as they are stored ({format_size(experts * stored)})")


def check_device_fit(name: str, experts: int, slot: int, top_k: int, device: str, vram: int) -> Check:
    """How many of a model's experts, `slot` bytes each, fit a budget in an accelerator's memory."""
    least = min(experts * slot, least_ram(slot, top_k))
    if vram < least:
        found = f"{format_size(vram)} are too little for experts of {name}, which need {format_size(least)}"
        return Check(device, "note", found, "the processor computes them, unless that memory is freed")
    return Check(device, "ok", f"{min(experts, vram // slot)} of {experts} experts of {name} fit")


def check_threads(threads: int, cores: float) -> Check:
    """Threads that torch would start against the processor time that this process gets."""
    if threads > cores + 0.5:
        found = f"torch would use {threads} threads on {cores:g} cores"
        return Check("threads", "note", found, f"--threads {max(1, int(cores))}: more wait for each other")
    return Check("threads", "ok", f"{threads} threads on {cores:g} cores")


def check_clock(synchronised: bool | None) -> Check:
    """Announcements carry times: members' clocks may differ by some minutes, not more."""
    if synchronised is None:
        return Check("clock", "ok", "this system does not say whether its clock is synchronised")
    if synchronised:
        return Check("clock", "ok", "synchronised")
    return Check(
        "clock", "note", "not known to be synchronised", "turn on NTP, unless the host of this machine does it"
    )


# --- reading the machine ----------------------------------------------------------------------------------------------


def clock_is_synchronised() -> bool | None:
    """What the kernel says; None where it cannot be asked."""
    ask = getattr(ctypes.CDLL(None), "adjtimex", None)
    state = -1 if ask is None else ask(ctypes.create_string_buffer(_TIMEX_BYTES))
    return None if state < 0 else state != _TIME_ERROR


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: by its affinity, and by the quota of its control group (version 2, then 1)."""
    cores = float(len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1)
    for file, split in (("cpu.max", True), ("cpu/cpu.cfs_quota_us", False)):
        path = root / "sys/fs/cgroup" / file
        try:
            words = path.read_text().split()
            words = words if split else [*words, path.with_name("cpu.cfs_period_us").read_text().strip()]
        except OSError:
            continue
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            cores = min(cores, int(words[0]) / int(words[1]))
    return cores


def _applies(marker: str) -> bool:
    """Whether a requirement's marker holds here: no extras; and those of the platform that we use."""
    platform = re.search(r"platform_system == [\"'](\w+)[\"']", marker)
    return "extra" not in marker and (platform is None or platform[1] == os.uname().sysname)


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
