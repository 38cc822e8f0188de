"""What a conversion will write: plain data, computed from headers alone, the same on every run.

Paths of the source are names relative to its directory. Offsets and sizes are bytes from the start of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import ITEM_SIZE, ModelFacts, Quantization, ShardType, TensorEntry
from moehive.protocol.safetensors_header import TensorSpec, build_header

MTP_GROUP = "mtp"


@dataclass(frozen=True, slots=True)
class Span:
    """A range of bytes of one source file."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class BlockScale:
    """Where the fp32 scales [ceil(R/rows), ceil(C/columns)] of an fp8 weight [R, C] lie."""

    span: Span
    block: tuple[int, int]  # rows, columns


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Where the tensors of a 4-bit weight lie. A spec's name is the tensor's kind, such as `qweight`."""

    quantization: Quantization
    parts: tuple[tuple[TensorSpec, Span], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of an output file: the source's bytes as they are, or a quantised weight, widened as `widening` says.

    `span` is of the bytes, or of the quantised values.
    """

    spec: TensorSpec
    span: Span
    widening: BlockScale | PackedWeight | None = None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One output file: a safetensors file of `pieces`, or an asset: `content`, or a copy of the file `original`."""

    file: str
    type: ShardType
    size: int
    pieces: tuple[Piece, ...] = ()
    expert_key: ExpertKey | None = None
    group: str | None = None
    content: bytes | None = None
    original: Span | None = None

    def head(self) -> bytes:
        """What stands before the bytes of the source: a safetensors header, or an asset's content."""
        if self.pieces:
            return build_header([piece.spec for piece in self.pieces])
        return self.content or b""

    def spans(self) -> tuple[Span, ...]:
        """The source bytes that are copied unchanged, in the order in which they follow the head."""
        return (
            (self.original,) if self.original else tuple(piece.span for piece in self.pieces if piece.widening is None)
        )

    def tensor_entries(self, shard: int) -> dict[str, TensorEntry]:
        """The manifest's tensor table of this file as shard number `shard`."""
        entries: dict[str, TensorEntry] = {}
        offset = len(self.head())
        for piece in self.pieces:
            spec = piece.spec
            entries[spec.name] = TensorEntry(shard, offset, spec.size, spec.shape, spec.dtype)
            offset += spec.size
        return entries


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that a conversion writes, in the order of the manifest."""

    model: ModelFacts
    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...] = ()  # what a user should know; goes to conversion.json

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(file.size for file in self.files)


def tensor_file(
    file: str,
    kind: ShardType,
    pieces: Sequence[Piece],
    *,
    expert_key: ExpertKey | None = None,
    group: str | None = None,
) -> PlannedFile:
    """A safetensors file of these pieces, in this order unless an odd size would misalign a later tensor.

    Readers view a tensor in place, which needs its offset to be a multiple of its item size.
    """
    offset, aligned = 0, True
    for piece in pieces:
        aligned &= offset % ITEM_SIZE[piece.spec.dtype] == 0
        offset += piece.spec.size
    ordered = tuple(pieces if aligned else sorted(pieces, key=lambda piece: -ITEM_SIZE[piece.spec.dtype]))
    size = len(build_header([piece.spec for piece in ordered])) + offset
    return PlannedFile(file, kind, size, ordered, expert_key=expert_key, group=group)


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Spans in file order, touching ones joined: the reads that fetch them."""
    out: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.file, span.offset)):
        last = out[-1] if out else None
        if last and last.file == span.file and last.offset + last.size == span.offset:
            out[-1] = Span(last.file, last.offset, last.size + span.size)
        else:
            out.append(span)
    return out


def weight_map(files: Iterable[PlannedFile]) -> Mapping[str, str]:
    """Tensor name -> file: what `model.safetensors.index.json` tells transformers."""
    return {piece.spec.name: file.file for file in files for piece in file.pieces}
