"""How full a store is, without anybody waiting for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.waiting import until

from moehive.node import disk
from moehive.node.disk import DiskWatch
from moehive.swarm.store.content import ContentStore


async def test_it_is_looked_up_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LOOK_EVERY", 0.001)
    store = ContentStore(tmp_path / "store", 1000)
    watch = DiskWatch(store)
    assert watch.usage is None
    looking = asyncio.create_task(watch.run())
    await until(lambda: watch.usage is not None and watch.usage.used_bytes == 0)
    store.put(b"x" * 100)
    await until(lambda: watch.usage is not None and watch.usage.used_bytes == 100)
    assert watch.usage is not None
    assert watch.usage.budget_bytes == 1000
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking


async def test_what_cannot_be_read_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "LOOK_EVERY", 0.001)
    (tmp_path / "store").write_text("a file in its place")
    store, asked = ContentStore(tmp_path / "store", 1000), []
    monkeypatch.setattr(store, "usage", lambda usage=store.usage: (asked.append(None), usage())[1])
    looking = asyncio.create_task(DiskWatch(store).run())
    await until(lambda: len(asked) > 2)
    assert not looking.done()
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert [record.message for record in caplog.records] == ["cannot tell how full the store is"]
