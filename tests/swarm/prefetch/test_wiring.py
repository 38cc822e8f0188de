"""Prefetch in a running model: the same tokens, within the budget, whatever goes wrong with a guess."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Checkpoints
from support.waiting import until
from torch import Tensor

from moehive.protocol.errors import StorageError, TraceError
from moehive.protocol.ids import ExpertKey
from moehive.swarm import open_local
from moehive.swarm.model.backend import LocalExperts
from moehive.swarm.model.loader import ExpertLoader, StoredExpert
from moehive.swarm.model.tier import WeightsTier
from moehive.swarm.prefetch.control import Mode, State
from moehive.swarm.prefetch.plan import Plan
from moehive.swarm.prefetch.predictors import Point
from moehive.swarm.prefetch.wiring import ModelPrefetch, TierShelf
from moehive.swarm.store.directory import ConvertedDirectory
from moehive.swarm.tiers.policy import Uses

PROMPT = torch.tensor([[5, 17, 300, 42]])
EVERYTHING = Plan(dict.fromkeys(Point, 0.0))


@pytest.fixture(scope="module")
def converted(checkpoints: Checkpoints) -> Path:
    return checkpoints.converted("demo")


def opened(converted: Path, share: float, **options: Any) -> tuple[Any, LocalExperts]:
    """The demo model with memory for a share of its experts."""
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    budget = int(share * loader.total_room(torch.bfloat16))
    backend = LocalExperts(loader, WeightsTier(loader, budget))
    return open_local(converted, backend=backend, **options)[0], backend


def generate(model: Any, tokens: int = 24) -> Tensor:
    mask = torch.ones_like(PROMPT)
    found: Tensor = model.generate(PROMPT, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return found


def always(prefetch: ModelPrefetch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load everything that is guessed, whether it pays or not."""
    prefetch.prefetcher.state = State(Mode.ON, 1 << 20, 1, plain=1.0)
    monkeypatch.setattr("moehive.swarm.prefetch.prefetcher.make_plan", lambda *_: EVERYTHING)
    monkeypatch.setattr("moehive.swarm.prefetch.prefetcher.choose", lambda chances, *_: len(chances))
    prefetch.prefetcher.plan = EVERYTHING


def watcher(backend: LocalExperts) -> ModelPrefetch:
    found = backend.watcher
    assert isinstance(found, ModelPrefetch)
    return found


def test_guesses_change_no_token_and_keep_the_budget(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generate(open_local(converted, prefetch=False)[0])
    model, backend = opened(converted, 0.5)
    always(watcher(backend), monkeypatch)
    assert torch.equal(generate(model), wanted)
    found = watcher(backend).prefetcher.usefulness
    assert found.loads > 0
    assert found.failed_guesses == 0
    assert found.points[Point.BEFORE].recall_at_k > 0.4  # 0.25 would be chance
    stats = backend.tier.stats
    assert stats.resident_bytes + stats.reserved_bytes <= stats.budget_bytes
    assert stats.speculation.used > 0
    backend.tier.close()


def test_left_to_itself_it_changes_no_token_either(converted: Path) -> None:
    wanted = generate(open_local(converted, prefetch=False)[0])
    model, backend = opened(converted, 0.5)
    assert torch.equal(generate(model), wanted)
    assert watcher(backend).prefetcher.usefulness.points[Point.ENTRY].guesses > 0
    watcher(backend).close()
    assert backend.watcher is None
    assert torch.equal(generate(model), wanted)
    backend.tier.close()


def test_where_all_experts_fit_there_is_nothing_to_do(converted: Path) -> None:
    assert opened(converted, 1.0)[1].watcher is None
    assert opened(converted, 0.5, prefetch=False)[1].watcher is None


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_predictor_that_cannot_be_read_is_said_so_whether_it_is_needed_or_not(converted: Path, share: float) -> None:
    with pytest.raises(TraceError, match="cannot read no/predictor"):
        opened(converted, share, prefetch="no/predictor")


def test_a_load_on_a_guess_that_fails_is_no_error_of_who_waits_for_it(converted: Path) -> None:
    directory = ConvertedDirectory(converted)
    loader = ExpertLoader(directory.manifest, directory)
    key, asked = (ExpertKey(0, 0), torch.bfloat16), 0

    def read(expert: ExpertKey) -> StoredExpert:
        nonlocal asked
        asked += 1
        if asked == 1:
            asyncio.run(until(lambda: tier._flights[key].users))
            raise StorageError("a fault that passes")
        return loader.read(expert)

    tier = WeightsTier(loader, loader.total_room(torch.bfloat16) // 2, read=read)
    assert TierShelf(tier, torch.bfloat16).prefetch(0, [(0, 0.99)], most=1) == 1
    with tier.lease(key) as weights:
        assert weights.nbytes > 0
    assert asked == 2
    assert tier.stats.failed_loads == 1
    tier.close()


def test_a_shelf_tells_what_became_of_a_guess(converted: Path) -> None:
    _, backend = opened(converted, 0.5, prefetch=False)
    shelf = TierShelf(backend.tier, torch.bfloat16)
    assert list(shelf.absent(2, [1, 3])) == [True, True]
    assert shelf.prefetch(2, [(1, 0.9), (3, 0.8)], most=1) == 1
    key = (ExpertKey(2, 1), torch.bfloat16)
    backend.tier.note(Uses(2, {key: 1}))
    with backend.tier.lease(key) as weights:
        assert weights.nbytes > 0
    (fate,) = shelf.outcomes()
    assert fate.used
    assert fate.size > 0
    assert shelf.load_seconds > 0
    assert list(shelf.absent(2, [1, 3])) == [False, True]
    backend.tier.close()
