"""`conversion.json`: how the source laid out its experts, for comparison with one read of one file after conversion.

It is written next to the manifest and is no part of the model id. It carries the model id, which is how `inspect`
notices that a manifest was changed. It names no path and no time: the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ModelId, is_hash
from moehive.protocol.json_reader import Reader
from moehive.protocol.manifest import REPORT_NAME

from .layout import ConversionPlan, merge_spans

_FORMAT, _VERSION = "moehive-conversion", 1


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, mean and largest of one number per expert."""

    min: int
    mean: float
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Self:
        """The spread of at least one value."""
        return cls(min(values), round(sum(values) / len(values), 3), max(values))

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {"min": self.min, "mean": self.mean, "max": self.max}


@dataclass(frozen=True, slots=True)
class SourceLayout:
    """What loading one expert from the source checkpoint takes."""

    reads: Spread  # contiguous ranges of bytes
    files: Spread  # files they lie in
    bytes: Spread

    @classmethod
    def of(cls, plan: ConversionPlan) -> Self:
        """From the spans that make up each expert's shard."""
        experts = [file.spans() for file in plan.files if file.expert_key is not None]
        return cls(
            reads=Spread.of([len(merge_spans(spans)) for spans in experts]),
            files=Spread.of([len({span.file for span in spans}) for spans in experts]),
            bytes=Spread.of([sum(span.size for span in spans) for spans in experts]),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON names of conversion.json."""
        return {"reads": self.reads.to_json(), "files": self.files.to_json(), "bytes": self.bytes.to_json()}


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The content of conversion.json."""

    model_id: ModelId
    source: SourceLayout
    notes: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The file's content."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "modelId": self.model_id,
            "sourcePerExpert": self.source.to_json(),
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`. Raises ManifestError."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{REPORT_NAME} is not JSON: {error}") from error
        notes = document.pop("notes", None) if isinstance(document, dict) else None
        reader = Reader(document, REPORT_NAME)
        if (reader.text("format"), reader.integer("version")) != (_FORMAT, _VERSION):
            raise ManifestError(f"{REPORT_NAME} is not of a version that this build reads")
        model_id, source = reader.text("modelId"), _read_layout(reader.child("sourcePerExpert"))
        reader.done()
        if not is_hash(model_id) or not _is_texts(notes):
            raise ManifestError(f"{REPORT_NAME}: modelId or notes are malformed")
        return cls(ModelId(model_id), source, tuple(notes or ()))


def _read_layout(reader: Reader) -> SourceLayout:
    spreads = [_read_spread(reader.child(key)) for key in ("reads", "files", "bytes")]
    reader.done()
    return SourceLayout(*spreads)


def _read_spread(reader: Reader) -> Spread:
    spread = Spread(reader.integer("min"), reader.optional_number("mean") or 0.0, reader.integer("max"))
    reader.done()
    return spread


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
