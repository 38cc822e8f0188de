"""Between tensors and the wire: the request for some experts on some rows, and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moehive.kernels.routing import Assignment
from moehive.protocol import limits
from moehive.protocol.ids import ModelId
from moehive.protocol.manifest import ITEM_SIZE
from moehive.protocol.messages import RunExperts

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INDEX_BYTES = 4 + 4  # token index and the widest weight, per row


@dataclass(frozen=True, slots=True, eq=False)
class LayerInput:
    """One call of a layer's experts: the arguments of transformers' experts interface, on the CPU, contiguous."""

    layer: int
    hidden: Tensor  # [T, H]
    top_k_weights: Tensor  # [T, K]
    form: str  # "sum" or "rows", see messages.RunExperts

    @property
    def row_bytes(self) -> int:
        """Bytes of one row there and back, at most."""
        return 2 * self.hidden.shape[1] * self.hidden.element_size() + _INDEX_BYTES

    @property
    def max_rows(self) -> int:
        """Rows of one request such that neither it nor its answer exceeds the payload limit."""
        row = self.hidden.shape[1] * self.hidden.element_size() + _INDEX_BYTES
        return max(limits.MAX_PAYLOAD_BYTES // row, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one request asked for and what came back: [T', H] for `sum`, [R, H] for `rows`."""

    assignments: tuple[Assignment, ...]
    tokens: Tensor | None  # [T'] which tokens the answer's rows are (sum); None: all, in order
    output: Tensor


def sample(call: LayerInput, part: Part, count: int) -> tuple[LayerInput, Part]:
    """A copy of a few tokens of a call, the first `count` that `part` answers, and of what `part` says about them."""
    chosen = torch.unique(torch.cat([assignment.token for assignment in part.assignments]))[:count]  # [S] ascending
    small = LayerInput(call.layer, call.hidden[chosen], call.top_k_weights[chosen], call.form)  # [S, H], [S, K]
    kept = [torch.isin(assignment.token, chosen) for assignment in part.assignments]
    assignments = tuple(
        Assignment(expert, torch.searchsorted(chosen, token[keep]), position[keep])
        for (expert, token, position), keep in zip(part.assignments, kept, strict=True)
        if keep.any()
    )
    if call.form == "rows":
        return small, Part(assignments, None, part.output[torch.cat(kept)])
    answered = chosen if part.tokens is None else torch.searchsorted(part.tokens, chosen)
    return small, Part(assignments, None, part.output[answered])


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRequest:
    """One request, ready to send."""

    message: RunExperts
    payload: tuple[memoryview, ...]
    assignments: tuple[Assignment, ...]
    tokens: Tensor | None  # [T'] as in Part

    def read_answer(self, payload: bytearray) -> Part:
        """The answer's tensor; the caller has checked the payload's size."""
        output = torch.frombuffer(payload, dtype=DTYPES[self.message.dtype])
        return Part(self.assignments, self.tokens, output.view(self.message.answer_rows, self.message.hidden))


def build_request(model: ModelId, call: LayerInput, part: Sequence[Assignment], deadline: float) -> ExpertRequest:
    """The request for these rows of these experts; hidden states of tokens that none of them needs are not sent."""
    hidden, tokens, payload = _payload_of_token(call, part) if call.hidden.shape[0] == 1 else _payload(call, part)
    message = RunExperts(
        model=model,
        layer=call.layer,
        tokens=hidden.shape[0],
        hidden=hidden.shape[1],
        dtype=DTYPE_NAMES[hidden.dtype],
        weights_dtype=DTYPE_NAMES[call.top_k_weights.dtype],
        form=call.form,
        experts=tuple(assignment.expert for assignment in part),
        counts=tuple(assignment.token.shape[0] for assignment in part),
        deadline=deadline,
    )
    return ExpertRequest(message, payload, tuple(part), tokens)


def _payload(call: LayerInput, part: Sequence[Assignment]) -> tuple[Tensor, Tensor | None, tuple[memoryview, ...]]:
    """The rows that are sent [T', H], which tokens they are (None: all, in order), and the payload."""
    token = torch.cat([assignment.token for assignment in part])  # [R]
    position = torch.cat([assignment.position for assignment in part])  # [R]
    weights = (tensor_bytes(call.top_k_weights[token, position]),) if call.form == "sum" else ()  # [R]
    tokens, index = torch.unique(token, return_inverse=True)  # [T'], [R]
    everything = tokens.shape[0] == call.hidden.shape[0]
    hidden = call.hidden if everything else call.hidden.index_select(0, tokens)  # [T', H]
    payload = (tensor_bytes(hidden), tensor_bytes(index.to(torch.int32)), *weights)
    return hidden, None if everything else tokens, payload


def _payload_of_token(call: LayerInput, part: Sequence[Assignment]) -> tuple[Tensor, None, tuple[memoryview, ...]]:
    """`_payload` for one token: in decoding, weights push the code out of the caches, so each operation counts."""
    hidden, positions = tensor_bytes(call.hidden), [p for assignment in part for p in assignment.position.tolist()]
    index = memoryview(bytes(4 * len(positions)))  # [R] int32, all the one
    if call.form != "sum":
        return call.hidden, None, (hidden, index)
    all_weights, size = tensor_bytes(call.top_k_weights), call.top_k_weights.element_size()  # [K]
    weights = b"".join(all_weights[position * size : (position + 1) * size] for position in positions)  # [R]
    return call.hidden, None, (hidden, index, memoryview(weights))


def split_rows(assignments: Iterable[Assignment], max_rows: int) -> Iterator[list[Assignment]]:
    """Group assignments into requests of at most `max_rows` rows; an expert with more rows is cut.

    Cutting changes how many rows one GEMM sees, so bit-equality with transformers holds up to `max_rows` rows of one
    expert (thousands).
    """
    group: list[Assignment] = []
    rows = 0
    for assignment in _cut(assignments, max_rows):
        count = assignment.token.shape[0]
        if group and (rows + count > max_rows or group[-1].expert == assignment.expert):
            yield group
            group, rows = [], 0
        group.append(assignment)
        rows += count
    if group:
        yield group


def _cut(assignments: Iterable[Assignment], max_rows: int) -> Iterator[Assignment]:
    for assignment in assignments:
        expert, token, position = assignment
        if token.shape[0] <= max_rows:  # nearly always: eight slices take longer than all else here
            yield assignment
            continue
        for start in range(0, token.shape[0], max_rows):
            stop = start + max_rows
            yield Assignment(expert, token[start:stop], position[start:stop])


def parse_request(message: RunExperts, payload: bytearray) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [T, H], token index [R] int64 and weights [R] (sum form) of a request that `RunExperts.check` accepted.

    Raises ValueError for a token index outside the request.
    """
    hidden_bytes = message.tokens * message.hidden * ITEM_SIZE[message.dtype]
    flat = torch.frombuffer(payload, dtype=DTYPES[message.dtype], count=message.tokens * message.hidden)
    token = _parse_tokens(message, payload, hidden_bytes)
    weights = None
    if message.form == "sum":
        offset = hidden_bytes + 4 * message.rows
        weights = torch.frombuffer(payload, dtype=DTYPES[message.weights_dtype], count=message.rows, offset=offset)
    return flat.view(message.tokens, message.hidden), token, weights


def _parse_tokens(message: RunExperts, payload: bytearray, offset: int) -> Tensor:
    if message.tokens == 1 and not any(memoryview(payload)[offset : offset + 4 * message.rows]):
        return _only_token(message.rows)  # decoding: without the operations below
    token = torch.frombuffer(payload, dtype=torch.int32, count=message.rows, offset=offset).to(torch.int64)
    low, high = token.aminmax()
    if low < 0 or high >= message.tokens:
        raise ValueError(f"token index {int(low)} to {int(high)} in a request of {message.tokens} tokens")
    return token


@lru_cache(maxsize=64)
def _only_token(rows: int) -> Tensor:
    """The token index [R] of a request for one token; shared, nobody writes to it."""
    return torch.zeros(rows, dtype=torch.int64)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's memory as bytes; without a copy where it is contiguous."""
    assert tensor.device.type == "cpu", tensor.device
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
