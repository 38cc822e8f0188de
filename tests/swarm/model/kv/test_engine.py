"""Keys and values of all layers: against `torch.cat`, under any sequence of changes, within any budgets that work."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from moehive.protocol.errors import BudgetTooSmall, ConfigError, DiskFull, StorageError, UnsupportedModel
from moehive.swarm.model.kv.codecs import RawCodec
from moehive.swarm.model.kv.engine import KvEngine
from moehive.swarm.model.kv.options import KvBudgets

LAYERS, TOKENS = 3, 4
CPU = torch.device("cpu")
ROW = 4 * (2 * 3 + 1 * 5)  # bytes of a token of one sequence: 2 heads of 3 keys, 1 head of 5 values, fp32
layers = st.integers(0, LAYERS - 1)


def make(device: int = 1 << 20, host: int = 0, disk: int = 1 << 20, **more: Any) -> KvEngine:
    budgets = KvBudgets(device, host, disk, Path(tempfile.gettempdir()), TOKENS, **more)
    engine = KvEngine(LAYERS, RawCodec(), budgets, CPU)
    engine.workspace.worthwhile = 0.0
    return engine


def tokens(count: int, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 2, count, 3, generator=generator),
        torch.randn(batch, count, 1, 5, generator=generator).transpose(1, 2),  # as attention makes them
    )


class Engine(RuleBasedStateMachine):
    """The accounts refuse to exceed their limits, so that every run also shows that the budgets hold."""

    @initialize(
        spare=st.integers(0, 3000),
        host=st.integers(0, 2000),
        batch=st.integers(1, 3),
        window=st.none() | st.integers(1, 9),
        ahead=st.booleans(),
    )
    def begin(self, spare: int, host: int, batch: int, window: int | None, ahead: bool) -> None:
        blocks = 0 if window is None else LAYERS * -(-window // TOKENS)
        least = (LAYERS + 1 + blocks) * TOKENS * ROW * 3 + 64 * (LAYERS + 3)
        self.engine = make(least + 40 * ROW * 3 + spare, host=host, window=window)
        self.engine.workspace.worthwhile = 0.0 if ahead else float("inf")
        self.batch = [batch] * LAYERS
        self.wanted: list[tuple[Tensor, Tensor]] = [tokens(0, batch)] * LAYERS
        self.seed = 0

    @rule(layer=layers, count=st.integers(1, 11))
    def update(self, layer: int, count: int) -> None:
        if self.wanted[layer][0].shape[2] + count > 40:
            return
        self.seed += 1
        added = tokens(count, self.batch[layer], self.seed)
        found = self.engine.update(layer, *added)
        self.wanted[layer] = tuple(  # type: ignore[assignment]
            torch.cat(parts, 2) for parts in zip(self.wanted[layer], added, strict=True)
        )
        for ours, expected in zip(found, self.wanted[layer], strict=True):
            assert torch.equal(ours, expected)
            assert ours.stride() == expected.contiguous().stride()

    @rule(count=st.integers(1, 3))
    def step(self, count: int) -> None:
        """Every layer in turn, as a model does."""
        for layer in range(LAYERS):
            self.update(layer, count)

    @rule(layer=layers, length=st.integers(0, 40))
    def truncate(self, layer: int, length: int) -> None:
        self.engine.truncate(layer, length)
        self.wanted[layer] = tuple(part[:, :, :length] for part in self.wanted[layer])  # type: ignore[assignment]

    @rule(layer=layers, rows=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def take_rows(self, layer: int, rows: list[int]) -> None:
        if self.wanted[layer][0].shape[2] == 0:
            return
        chosen = torch.tensor([row % self.batch[layer] for row in rows])
        self.engine.take_rows(layer, chosen)
        self.batch[layer] = len(rows)
        self.wanted[layer] = tuple(part[chosen] for part in self.wanted[layer])  # type: ignore[assignment]

    @rule(layer=layers, batch=st.integers(1, 3))
    def reset(self, layer: int, batch: int) -> None:
        self.engine.reset(layer)
        self.batch[layer] = batch
        self.wanted[layer] = tokens(0, batch)

    @invariant()
    def lengths_agree(self) -> None:
        if hasattr(self, "engine"):
            assert [self.engine.length(layer) for layer in range(LAYERS)] == [one[0].shape[2] for one in self.wanted]

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()
            assert (self.engine.device.used, self.engine.host.used, self.engine.disk.used) == (0, 0, 0)


TestEngine = Engine.TestCase
TestEngine.settings = settings(stateful_step_count=25)


def run(engine: KvEngine, steps: int, count: int = 1) -> None:
    for step in range(steps):
        for layer in range(LAYERS):
            engine.update(layer, *tokens(count, seed=step))


def test_with_room_for_two_layers_the_next_one_is_there() -> None:
    engine = make(device=3000, max_tokens=20)
    run(engine, 20)
    times = engine.workspace.times
    assert engine.disk.used > 0
    # The first step has nothing to fetch; in the second the first layer is not expected, in the last nothing follows.
    assert times.expected >= 18 * LAYERS
    assert times.expected + times.unexpected == 19 * LAYERS
    engine.close()


def test_what_was_fetched_of_a_layer_is_not_used_after_its_rows_changed() -> None:
    engine = make(device=6000, max_tokens=20)
    for step in range(6):
        for layer in range(LAYERS):
            found = engine.update(layer, *tokens(1, batch=2, seed=step))
    last = [part.clone() for part in found]  # all layers have the same tokens
    engine.workspace.settle()
    engine.take_rows(0, torch.tensor([1, 0]))
    swapped = engine.update(0, *tokens(1, batch=2, seed=9))
    assert all(torch.equal(part[:, :, :-1], before[[1, 0]]) for part, before in zip(swapped, last, strict=True))
    engine.close()


def test_memory_is_laid_out_anew_now_and_then_and_not_for_every_token() -> None:
    engine, layouts = make(), set()
    for _ in range(120):
        run(engine, 1)
        layouts.add(engine._facts)
    assert len(layouts) < 120 // TOKENS
    engine.close()


def test_nothing_moves_while_the_next_layer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(device=6000)
    moved = []

    def watched(name: str) -> None:
        act = getattr(engine.store, name)

        def check(*arguments: Any) -> Any:
            assert engine.workspace._pending is None
            moved.append(name)
            return act(*arguments)

        monkeypatch.setattr(engine.store, name, check)

    for name in ("follow", "append", "truncate"):
        watched(name)
    run(engine, 30)
    run(engine, 1, count=50)  # the next layer was read for one token more, and what comes does not fit
    engine.truncate(1, 21)
    assert engine.workspace.times.expected > 0
    assert set(moved) == {"follow", "append", "truncate"}
    engine.close()


def test_a_budget_that_stops_working_is_refused_before_anything_changes() -> None:
    engine = make(device=1200)
    with pytest.raises(BudgetTooSmall, match=r"KV cache of \d+ tokens") as caught:
        run(engine, 100)
    assert caught.value.budget == 1200
    length = engine.length(0)
    again = make(device=caught.value.needed)
    run(again, length)
    again.update(0, *tokens(1))
    engine.truncate(0, 4)
    engine.update(0, *tokens(1))  # and goes on after a step back
    for one in (engine, again):
        one.close()


def test_a_length_that_is_known_is_refused_at_the_first_token() -> None:
    with pytest.raises(BudgetTooSmall, match="KV cache of 1000 tokens"):
        run(make(device=1200, max_tokens=1000), 1)
    with pytest.raises(
        DiskFull, match=r"1000 tokens needs .* raise that of .* \(--kv-disk\) to \S+ \((\d+) bytes\)"
    ) as caught:
        run(make(device=50000, disk=10, max_tokens=1000), 1)
    least = int(str(caught.value).split("(")[-1].removesuffix(" bytes)"))
    run(make(device=50000, disk=least, max_tokens=1000), 1)
    with pytest.raises(DiskFull):
        run(make(device=50000, disk=least - 1, max_tokens=1000), 1)


def test_after_an_error_it_has_to_be_reset() -> None:
    engine = make(device=1800, disk=4 * TOKENS * ROW)
    with pytest.raises(DiskFull):
        run(engine, 100)
    with pytest.raises(StorageError, match="reset it"):
        run(engine, 1)
    for layer in range(LAYERS):
        engine.reset(layer)
    run(engine, 3)
    engine.close()


@pytest.mark.parametrize("host", [0, 3 * TOKENS * ROW])
def test_where_beams_find_the_disk_full_a_reset_gives_everything_back(host: int) -> None:
    """While a layer is written again, it is on disk twice."""
    device, disk = 5400, 30 * TOKENS * ROW
    engine = make(device=device, host=host, disk=disk)
    run(engine, 40)
    assert engine.disk.used > disk // 2
    before = descriptors()
    with pytest.raises(DiskFull) as caught:
        engine.take_rows(0, torch.tensor([0, 0]))
    with pytest.raises(StorageError, match="reset it"):
        engine.update(1, *tokens(1))
    for layer in range(LAYERS):
        engine.reset(layer)
    assert engine.disk.used == 0
    run(engine, 40)  # as many as before
    assert descriptors() <= before
    engine.close()
    assert (engine.device.used, engine.host.used, engine.disk.used) == (0, 0, 0)
    del caught  # which until here has everything that was in the frames of the error


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_cannot_be_kept_is_refused() -> None:
    engine = make()
    keys, values = tokens(1)
    with pytest.raises(ConfigError, match=r"torch\.no_grad"):
        engine.update(0, keys.requires_grad_(), values)
    with pytest.raises(UnsupportedModel, match=r"torch\.float32 and values of torch\.bfloat16"):
        engine.update(0, tokens(1)[0], values.bfloat16())
    engine.update(0, *tokens(1))
    with pytest.raises(ConfigError, match=r"batch=1.*not.*batch=2"):
        engine.update(0, *tokens(1, batch=2))
