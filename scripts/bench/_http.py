"""A file over plain HTTP in one stream, as aiohttp serves and fetches it: nothing encrypted, nothing verified."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

CHUNK = 1 << 20
INSTALLED = find_spec("aiohttp") is not None
MISSING = "HTTP: aiohttp is not installed (pip install aiohttp), so there is no line for it"


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[int]:
    """Serve a file on loopback; the port, 0 where aiohttp is not installed."""
    if not INSTALLED:
        yield 0
        return
    from aiohttp import web

    app = web.Application()
    app.router.add_get("/", lambda request: _file(path))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def _file(path: Path):  # type: ignore[no-untyped-def]  # aiohttp is optional
    from aiohttp import web

    return web.FileResponse(path)


async def download(port: int, target: Path | None) -> None:
    """Fetch it, into a file that is durable afterwards, or (None) to nowhere."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as response:
        if target is None:
            async for _ in response.content.iter_chunked(CHUNK):
                pass
            return
        with target.open("wb") as file:
            async for data in response.content.iter_chunked(CHUNK):
                await asyncio.to_thread(file.write, data)
            file.flush()
            await asyncio.to_thread(os.fdatasync, file.fileno())
    target.unlink()
