"""Bulk threads run like any other here: tests must not wait for whatever else the machine is doing."""

from __future__ import annotations

import pytest

from moehive.swarm.transfer import background


@pytest.fixture(autouse=True)
def _no_niceness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "NICENESS", 0)
