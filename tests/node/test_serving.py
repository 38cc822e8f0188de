"""A node at work, without its network: what it does when its own disk fails it."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree

import pytest
import torch
from support.swarm_fakes import SECRET, identity

from moehive.node.serving import Serving
from moehive.node.settings import NodeSettings
from moehive.protocol.errors import CorruptShard
from moehive.protocol.ids import ExpertKey
from moehive.swarm.announcer import Announcer
from moehive.swarm.member import Member
from moehive.swarm.store.base import NotHeld
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.transport.memory import MemoryNetwork, MemoryTransport

KEY = ExpertKey(0, 1)


@pytest.mark.parametrize(("damage", "error"), [("deleted", NotHeld), ("changed", CorruptShard)])
async def test_an_expert_whose_file_fails_is_no_longer_held(
    mixtral: ConvertedDirectory, tmp_path: Path, damage: str, error: type[Exception]
) -> None:
    copytree(mixtral.root, tmp_path / "model")
    source, us = ConvertedDirectory(tmp_path / "model"), identity(2)
    transport = MemoryTransport(MemoryNetwork(), us)
    announcer = Announcer(transport, us, SECRET, source.model_id)
    settings = NodeSettings(str(source.root), tmp_path, ram=1 << 20)
    serving = Serving(settings, Member(transport, SECRET), source.manifest, source, announcer)
    shard = source.manifest.experts[KEY]
    serving.holdings.verify([shard])
    file = source.root / shard.file
    file.chmod(0o600)
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(bytes(shard.size))
    with pytest.raises(error), serving._lease(*KEY, torch.float32):
        pass
    assert not serving.holdings.holds(*KEY)
