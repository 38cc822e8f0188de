"""Fitting predictors to a trace with hidden states: a small network per layer, which stands for its attention.

It starts from the best linear map and learns what that leaves, by least squares on the router's logits: they also say
how near the experts were that were not chosen. One layer's guesses from all points are learned together, because they
share what is remembered of earlier tokens. Deterministic on one machine with one number of threads.

This is the only module of prefetch, besides those that touch a model, that needs torch. S windows of W tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .attending import HEADS, MIXED, SIZE, SLOPES, WIDTH, WINDOW, Asker, Reader, sessions, turned
from .fitting import Router, Routers, States
from .history import Floats
from .predictors import LinearMap, Point, Predictor

LEARNED: Final = 1 << 20  # tokens that a layer learns from, repeated ones counted: more of them gain little
PASSES: Final = (4, 20)  # over the trace: at least, at most
_LENGTH: Final = 256  # tokens of a window; the first ones of each see less than they might
_BATCH: Final = 4  # windows of a step, at most
_STEPS: Final = 32  # of a pass, at least: small traces make smaller ones
_RATE: Final = 4e-3  # of Adam, for states of _HIDDEN numbers and narrower ones
_HIDDEN: Final = 160
_DECAY: Final = 0.1
_RIDGE: Final = 1e-3  # added to each feature's mean square, which is about 1


def fit(states: States, layers: Sequence[int], routers: Routers, top_k: int, *, seed: int = 0) -> Predictor:
    """The predictor of `layers`, which are the columns of `states`."""
    maps: dict[tuple[Point, int], LinearMap] = {}
    readers: dict[int, Reader] = {}
    windows = _windows(states.starts)
    for column, layer in enumerate(layers):
        points = [point for point in Point if column >= point.ahead]
        rows = [found for point in points if (found := states.at(point, column)) is not None]
        router = routers[layer]
        targets = router.logits(states.inputs[:, column].astype(np.float32))
        network = _Network(rows, targets, torch.Generator().manual_seed(seed))
        error = _order_error if router.correction is None else _square_error
        _learn(network, rows, targets, windows, error, torch.Generator().manual_seed(seed))
        readers[layer] = network.reader()
        for place, point in enumerate(points):
            maps[point, layer] = network.map(place, router)
    return Predictor(maps, top_k, states.inputs.shape[2], readers)


class _Network(nn.Module):
    """attending.py for windows of many tokens, in a form that can learn. The first of `rows` enters the layer."""

    def __init__(self, rows: Sequence[Floats], targets: Floats, random: torch.Generator) -> None:
        super().__init__()
        hidden, experts, count = rows[0].shape[1], targets.shape[1], len(rows)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=random) / math.sqrt(shape[-2]))

        linear = [_ridge(found, targets) for found in rows]
        self.remembering = drawn(hidden, 2 * WIDTH)
        self.sink = nn.Parameter(torch.zeros(HEADS, SIZE))
        self.query, self.query_offset = drawn(count, hidden, WIDTH), nn.Parameter(torch.zeros(count, WIDTH))
        self.mix, self.mix_offset = drawn(count, WIDTH + hidden, MIXED), nn.Parameter(torch.zeros(count, MIXED))
        self.head = nn.Parameter(torch.zeros(count, MIXED, experts))  # starts as if it did not exist
        self.direct = nn.Parameter(torch.stack([torch.from_numpy(weight) for weight, _ in linear]))
        self.offset = nn.Parameter(torch.stack([torch.from_numpy(offset) for _, offset in linear]))
        ahead = torch.arange(_LENGTH)
        away = ahead[:, None] - ahead
        near = -torch.from_numpy(SLOPES)[:, None, None] * away
        near = near.masked_fill((away <= 0) | (away > WINDOW), -torch.inf)
        self.near = torch.cat((torch.zeros(HEADS, _LENGTH, 1), near), dim=2)[None]  # [1, HEADS, W, 1 + W]
        unit = np.repeat(np.array((1, 0), np.float32), SIZE // 2).reshape(1, 1, SIZE)  # turned: cosines and sines
        self.cosine, self.sine = torch.from_numpy(turned(np.repeat(unit, _LENGTH, axis=1), 0)[0]).chunk(2, dim=1)

    def forward(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Scores [S, W, E] at every point, for the states [S, W, H] there."""
        made = (rows[0] @ self.remembering).reshape(*rows[0].shape[:2], 2, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        sinks = self.sink[None, :, None].expand(len(rows[0]), -1, -1, -1)
        keys = torch.cat((torch.zeros_like(sinks), self._turned(made[0])), dim=2)
        values = torch.cat((sinks, made[1]), dim=2)
        return [self._scores(place, found, keys, values) for place, found in enumerate(rows)]

    def _scores(self, place: int, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = rows @ self.query[place] + self.query_offset[place]
        queries = self._turned(queries.reshape(*rows.shape[:2], HEADS, SIZE).transpose(1, 2))
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self.near)
        mixed = torch.cat((read.transpose(1, 2).flatten(2), rows), dim=2) @ self.mix[place] + self.mix_offset[place]
        return rows @ self.direct[place] + F.silu(mixed) @ self.head[place] + self.offset[place]

    def _turned(self, rows: Tensor) -> Tensor:
        one, other = rows.chunk(2, dim=-1)
        return torch.cat((one * self.cosine - other * self.sine, other * self.cosine + one * self.sine), dim=-1)

    def reader(self) -> Reader:
        """As arrays."""
        return Reader(_array(self.remembering), _array(self.sink))

    def map(self, place: int, router: Router) -> LinearMap:
        """That of one point, as arrays."""
        parts = (self.query, self.query_offset, self.mix, self.mix_offset)
        asker = Asker(*(_array(part[place]) for part in parts))
        weight = _array(torch.cat((self.direct[place], self.head[place])))
        return LinearMap(weight, _array(self.offset[place]), router.correction, asker)


def _learn(
    network: _Network, rows: Sequence[Floats], targets: Floats, windows: NDArray[np.intp],
    error: Callable[[Tensor], Tensor], random: torch.Generator,
) -> None:  # fmt: skip
    """Adam with a warm-up and half a cosine, on the means of the squared errors in units of the logits' variance."""
    passes = min(max(LEARNED // len(targets), PASSES[0]), PASSES[1])
    batch = min(max(len(windows) // _STEPS, 1), _BATCH)
    steps, step = passes * -(-len(windows) // batch), 0
    scale = 1 / (float(targets.var()) + 1e-12)
    peak = _RATE * min(1.0, _HIDDEN / rows[0].shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=_DECAY, betas=(0.9, 0.98))
    for _ in range(passes):
        order = torch.randperm(len(windows), generator=random).numpy()
        for start in range(0, len(order), batch):
            places = windows[order[start : start + batch]]  # [S, W], -1 behind a session's end
            known = torch.from_numpy(places >= 0)
            scores = network([torch.from_numpy(found[places]) for found in rows])
            wanted = torch.from_numpy(targets[places])
            loss = scale * torch.stack([error(found - wanted)[known].mean() for found in scores]).sum()
            optimizer.param_groups[0]["lr"] = peak * _schedule(step / steps)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1


def _order_error(difference: Tensor) -> Tensor:
    """Squares of what matters to the order: not of what all of a token's experts [..., E] have in common."""
    return _square_error(difference - difference.mean(dim=-1, keepdim=True))


def _square_error(difference: Tensor) -> Tensor:
    return difference.square().mean(dim=-1)


def _schedule(progress: float) -> float:
    return min(1.0, progress / 0.05 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * progress) + 0.01)


def _windows(starts: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Numbers of tokens [S, W]: sessions in pieces, filled up with -1."""
    pieces = [(at, min(at + _LENGTH, end)) for begin, end in sessions(starts) for at in range(begin, end, _LENGTH)]
    found = np.full((len(pieces), _LENGTH), -1, dtype=np.intp)
    for number, (begin, end) in enumerate(pieces):
        found[number, : end - begin] = np.arange(begin, end)
    return found


def _ridge(rows: Floats, targets: Floats) -> tuple[Floats, Floats]:
    """Weight [H, E] and offset [E] with the least squared error, deviations from the means being penalised."""
    mean, center = rows.mean(axis=0, dtype=np.float64), targets.mean(axis=0, dtype=np.float64)
    squares = rows.T @ rows / len(rows) - np.outer(mean, mean) + _RIDGE * np.eye(rows.shape[1])
    weight = np.linalg.solve(squares, rows.T @ targets / len(rows) - np.outer(mean, center))
    return weight.astype(np.float32), (center - mean @ weight).astype(np.float32)


def _array(tensor: Tensor) -> Floats:
    found: Floats = np.ascontiguousarray(tensor.detach().numpy())
    return found
