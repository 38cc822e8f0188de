"""An object and who serves it, unless a test brings its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from support.bulk import CHUNKS, FakeShelf, data_of, serving

from moehive.swarm.transfer.tls.server import BulkServer


@pytest.fixture
def shelf() -> FakeShelf:
    return FakeShelf(data_of(CHUNKS))


@pytest.fixture
async def server(shelf: FakeShelf) -> AsyncIterator[BulkServer]:
    async with serving(shelf) as running:
        yield running
