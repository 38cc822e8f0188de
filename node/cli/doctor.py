"""`moehive doctor`: what this machine has, how much of it would be used and why, and what commonly goes wrong."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moehive.protocol.units import format_size
from moehive.swarm.paths import Paths

from .arguments import Flag
from .errors import FAILED
from .output import facts, say, say_json

if TYPE_CHECKING:
    from moehive.node.health import Check
    from moehive.swarm.policy.budgets import Budget, DiskFacts, MemoryFacts

_NAMED = ("torch", "triton", "transformers", "hivemind")  # of the packages, where all is well
_SIGNS = {"ok": "ok", "note": "note", "wrong": "WRONG"}


def doctor(model: Path | None = None, /, *, json: Flag = False) -> int | None:
    """Check this machine: memory, accelerators and disk, what would be used of them and why, and common mistakes.

    Exit code 1 if something is wrong. Nothing is changed, and no peer is asked.

    Parameters
    ----------
    model:
        A directory that `moehive convert` wrote: also say whether it fits.
    json:
        Print one JSON object instead.
    """
    from moehive.swarm.memory import detect_devices, detect_disk, detect_memory
    from moehive.swarm.policy.budgets import plan_budgets

    from .node import check_converted

    if model is not None:
        check_converted(model)
    paths = Paths.of(os.environ)
    memory, disk = detect_memory(devices=detect_devices()), detect_disk(paths.store)
    budgets = plan_budgets(memory, disk)
    checks = [*_checks(paths, disk), *([] if model is None else _fit(model, budgets))]
    if json:
        say_json(_as_json(memory, disk, budgets, checks), indent=2)
    else:
        say(describe(memory, disk, budgets, checks))
    return FAILED if any(check.state == "wrong" for check in checks) else None


# --- what it prints -------------------------------------------------------------------------------------------------


def describe(memory: MemoryFacts, disk: DiskFacts, budgets: Sequence[Budget], checks: Sequence[Check]) -> str:
    """For people."""
    chosen = [(one.tier, f"{format_size(one.bytes)}: {one.reason}") for one in budgets]
    parts: list[tuple[str, Sequence[tuple[str, object]]]] = [
        ("found", list(_found(memory, disk))),
        ("chosen where no option says more", chosen),
        ("checked", [(check.name, f"{_SIGNS[check.state]:<5}  {check.found}") for check in _shortened(checks)]),
        ("to do", [(check.name, check.advice) for check in checks if check.advice]),
    ]
    return "\n".join(f"{title}\n{facts(lines)}" for title, lines in parts if lines)


def _shortened(checks: Sequence[Check]) -> Iterator[Check]:
    """One line for all the packages that are as they should be."""
    from moehive.node.health import PACKAGES, Check

    good = {check.name: check.found for check in checks if check.kind == PACKAGES and check.state == "ok"}
    named = ", ".join(f"{name} {good[name]}" for name in _NAMED if name in good)
    yield Check(PACKAGES, "ok", f"{len(good)} as required, such as {named}")
    yield from (check for check in checks if check.kind != PACKAGES or check.state != "ok")


def _found(memory: MemoryFacts, disk: DiskFacts) -> Iterator[tuple[str, object]]:
    yield "memory", f"{format_size(memory.total)}, {format_size(memory.available)} available"
    if memory.limit is None:
        yield "control group", "no limit"
    else:
        used = f"{format_size(memory.limit_used)} used"
        yield "control group", f"{memory.limit_group}: {format_size(memory.limit)}, {used}"
    for device in memory.devices:
        kind = "shares the machine's memory" if device.unified else f"{format_size(device.free)} free"
        yield "accelerator", f"{device.name}: {format_size(device.total)}, {kind}"
    if not memory.devices:
        yield "accelerator", "none that torch can use"
    yield "disk", f"{format_size(disk.free)} free, {format_size(disk.held)} in the store"


def _as_json(
    memory: MemoryFacts, disk: DiskFacts, budgets: Sequence[Budget], checks: Sequence[Check]
) -> dict[str, Any]:
    return {
        "ok": all(check.state != "wrong" for check in checks),
        "memory": {
            "totalBytes": memory.total,
            "availableBytes": memory.available,
            "limitBytes": memory.limit,
            "limitUsedBytes": memory.limit_used,
            "limitGroup": memory.limit_group,
            "farBytes": memory.far,
            "roomBytes": memory.room,
        },
        "devices": [
            {"name": one.name, "totalBytes": one.total, "freeBytes": one.free, "unified": one.unified}
            for one in memory.devices
        ],
        "disk": {"freeBytes": disk.free, "heldBytes": disk.held},
        "budgets": [asdict(budget) for budget in budgets],
        "checks": [asdict(check) for check in checks],
    }


# --- the checks -----------------------------------------------------------------------------------------------------


def _checks(paths: Paths, disk: DiskFacts) -> Iterator[Check]:
    import torch

    from moehive.node import health
    from moehive.swarm.transport.daemon import daemon_binary

    yield from health.check_versions(requires("moehive") or (), health.installed_version)
    yield health.check_daemon(daemon_binary)
    yield health.check_threads(torch.get_num_threads(), health.usable_cores())
    yield health.check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield health.check_clock(health.clock_is_synchronised())
    yield from _identity_checks(paths)
    yield health.check_disk(paths.store, disk, _is_writable(paths.store))
    if paths.store.exists():
        yield _store_check(paths.store)


def _identity_checks(paths: Paths) -> Iterator[Check]:
    from moehive.node.health import check_identity, check_port
    from moehive.node.own_port import is_free, own_port
    from moehive.swarm.identity import Identity

    check = check_identity(paths.identity, Identity.load_or_create)
    yield check
    if check.state == "ok" and paths.identity.exists():
        port = own_port(Identity.load_or_create(paths.identity))
        yield check_port(port, is_free, running=_is_locked(paths.identity))


def _store_check(store: Path) -> Check:
    from moehive.node.health import Check, check_store
    from moehive.protocol.errors import StorageError

    from .store import catalogue_of

    try:
        catalogue = catalogue_of(store)
    except StorageError as error:
        return Check("store", "wrong", str(error), "let this user read it, or set MOEHIVE_HOME")
    names = [catalogue.name_of(key) for key in catalogue.unreadable]
    return check_store(len(catalogue.objects), sum(catalogue.objects.values()), names, len(catalogue.partials))


def _fit(model: Path, budgets: Sequence[Budget]) -> Iterator[Check]:
    """Whether a model's experts fit the RAM budget, and those of accelerators: all, some, or too few to run."""
    from moehive.node.health import check_device_fit, check_fit, check_stored_fit
    from moehive.swarm.dispatch.request import DTYPES
    from moehive.swarm.model.device import slot_layout
    from moehive.swarm.model.loader import ExpertLoader
    from moehive.swarm.store.directory import ConvertedDirectory

    directory = ConvertedDirectory(model)
    manifest = directory.manifest
    loader, dtype = ExpertLoader(manifest, directory), DTYPES[manifest.model.dtype]
    name, experts, top_k = manifest.model.name, len(manifest.experts), manifest.model.top_k
    ram = next(budget.bytes for budget in budgets if budget.tier == "ram")
    yield check_fit(name, experts, loader.nbytes(dtype), top_k, ram)
    stored = max(loader.stored_size(key) for key in manifest.experts)
    if (check := check_stored_fit(name, experts, stored, loader.widened_room(dtype), top_k, ram)) is not None:
        yield check
    for budget in budgets:
        if budget.tier.startswith("vram cuda") and budget.bytes:
            slot = slot_layout(loader, dtype, kernels=True).nbytes
            yield check_device_fit(name, experts, slot, top_k, budget.tier, budget.bytes)


def _is_writable(path: Path) -> bool:
    existing = next(one for one in (path, *path.absolute().parents) if one.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _is_locked(identity: Path) -> bool:
    """Whether a node runs with this identity."""
    with identity.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
