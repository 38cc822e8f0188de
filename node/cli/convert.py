"""`moehive convert`: a Hugging Face checkpoint to one shard per expert."""

from __future__ import annotations

import time
from pathlib import Path

from moehive.protocol.units import format_size

from .output import note, progress_bar, say


def convert(source: Path, destination: Path, /, *, name: str | None = None) -> None:
    """Convert a Hugging Face checkpoint to one file per expert.

    Bytes keep the dtype they have. A conversion that was interrupted is continued by the same command. The last line
    names the model id, under which a swarm knows this exact model.

    Parameters
    ----------
    source:
        Directory of the checkpoint: config.json, safetensors files, tokenizer.
    destination:
        Directory to write, new or left by an interrupted conversion of the same checkpoint.
    name:
        Name of the model for people, and part of what the model id stands for: the same checkpoint under another name
        is another model. The default is the name of the source directory.
    """
    from moehive.swarm.convert import Converter

    started = time.monotonic()
    with progress_bar(f"converting {source.name}") as move:
        outcome = Converter(source, destination, name=name, progress=lambda done, total, _: move(done, total)).run()
    manifest, seconds = outcome.manifest, time.monotonic() - started
    for remark in outcome.notes:
        note(f"note: {remark}")
    if not outcome.written:
        note(f"{destination} was complete already: nothing to do")
    size = format_size(sum(shard.size for shard in manifest.shards))
    say(f"model {manifest.model_id}: {len(manifest.shards)} shards, {size}, {seconds:.1f} s")
