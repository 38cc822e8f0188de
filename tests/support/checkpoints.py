"""Checkpoints of every family in the forms that parity tests compare, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

from support import families

from moehive.protocol.ids import ExpertKey


@dataclass
class Checkpoints:
    """Directories by family: `source` as on the hub, `reference` for plain transformers in fp32, `converted` ours.

    The family "demo" is the bundled model.
    """

    root: Path
    _made: dict[tuple[str, str], Path] = field(default_factory=dict)

    def source(self, family: str) -> Path:
        """As published."""
        if family == "demo":
            from moehive.node import demo

            return Path(demo.__file__).parent / "model"
        return self._once(family, "source", lambda path: families.save_checkpoint(family, path))

    def converted(self, family: str) -> Path:
        """What `moehive convert` makes of it."""
        from moehive.swarm.convert import convert

        return self._once(family, "converted", lambda path: convert(self.source(family), path))

    def some(self, family: str, path: Path, keep: Callable[[ExpertKey], bool]) -> Path:
        """A copy of it at `path` with only some of the experts."""
        from moehive.swarm.store.directory import ConvertedDirectory

        copytree(self.converted(family), path)
        for key, shard in ConvertedDirectory(path).manifest.experts.items():
            if not keep(key):
                (path / shard.file).unlink()
        return path

    def reference(self, family: str) -> Path:
        """What plain transformers can load, with the same values."""
        if family == "deepseek_v3_fp8":  # transformers 5.23 takes the wrong block size for ragged weights
            return self._once(family, "twin", lambda path: _plain_twin(self.source(family), path))
        if family in families.INT4:
            return self._once(family, "twin", lambda path: families.save_int4_twin(self.source(family), path))
        if family == "kimi_k2":  # else transformers would run the checkpoint's own code
            return self._once(family, "native", lambda path: _native_kimi(self.source(family), path))
        return self.source(family)

    def _once(self, family: str, kind: str, make: Callable[[Path], object]) -> Path:
        path = self._made.get((family, kind))
        if path is None:
            path = self._made[family, kind] = self.root / family / kind
            path.parent.mkdir(exist_ok=True)
            make(path)
        return path


def _native_kimi(source: Path, path: Path) -> None:
    copytree(source, path)
    families.edit_config(path, model_type="deepseek_v3", auto_map=None)


def _plain_twin(source: Path, path: Path) -> None:
    """An FP8 checkpoint in what its conversion computes with: experts exactly, in fp32; the dense part in bf16."""
    tensors = families.load_tensors(source)
    scales = {key: tensors.pop(f"{key}_scale_inv") for key in list(tensors) if f"{key}_scale_inv" in tensors}
    for key, scale in scales.items():
        exact = tensors[key].float() * families.spread_scale(scale, tensors[key].shape)
        tensors[key] = exact if ".experts." in key else exact.bfloat16()
    copytree(source, path)
    families.write_tensors(path, tensors)
    families.edit_config(path, quantization_config=None)
