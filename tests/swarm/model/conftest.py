"""Tiny checkpoints of every family and their conversions, each made once per session."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

import pytest
import torch
from support import families
from transformers.utils import logging

from moehive.swarm.convert import convert


@dataclass
class Checkpoints:
    """Directories by family: `source` as on the hub, `reference` what plain transformers loads, `converted` ours."""

    root: Path
    _made: dict[tuple[str, str], Path] = field(default_factory=dict)

    def source(self, family: str) -> Path:
        return self._once(family, "source", lambda path: families.save_checkpoint(family, path))

    def converted(self, family: str) -> Path:
        return self._once(family, "converted", lambda path: convert(self.source(family), path))

    def reference(self, family: str) -> Path:
        if family == "deepseek_v3_fp8":  # transformers 5.23 takes the wrong block size for ragged weights
            return self._once(family, "twin", lambda path: families.save_bf16_twin(self.source(family), path))
        if family in families.INT4:
            return self._once(family, "twin", lambda path: families.save_int4_twin(self.source(family), path))
        if family == "kimi_k2":  # else transformers would run the checkpoint's own code
            return self._once(family, "native", lambda path: _native_kimi(self.source(family), path))
        return self.source(family)

    def _once(self, family: str, kind: str, make: object) -> Path:
        path = self._made.get((family, kind))
        if path is None:
            path = self._made[family, kind] = self.root / family / kind
            path.parent.mkdir(exist_ok=True)
            make(path)  # type: ignore[operator]
        return path


def _native_kimi(source: Path, path: Path) -> None:
    copytree(source, path)
    families.edit_config(path, model_type="deepseek_v3", auto_map=None)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def converted(checkpoints: Checkpoints) -> Path:
    """A converted Qwen3-MoE directory: read only."""
    return checkpoints.converted("qwen3_moe")


@pytest.fixture
def own_copy(converted: Path, tmp_path: Path) -> Path:
    """The same directory to be damaged."""
    return Path(copytree(converted, tmp_path / "copy"))


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    """Token ids [2, 24]."""
    return torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(7))
