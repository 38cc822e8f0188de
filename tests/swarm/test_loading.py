"""One expert's tensors from a converted directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import load_tensors, save_checkpoint

import moehive.swarm
from moehive.protocol.errors import ConfigError, CorruptShard, ManifestError
from moehive.protocol.ids import ExpertKey
from moehive.protocol.manifest import MANIFEST_NAME, Manifest
from moehive.swarm.convert import convert


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and conversion of an FP8 checkpoint: two dtypes in one expert."""
    root = tmp_path_factory.mktemp("loading")
    source = save_checkpoint("deepseek_v3_fp8", root / "source")
    convert(source, root / "converted")
    return source, root / "converted"


def test_an_expert_has_the_tensors_of_the_source(directories: tuple[Path, Path]) -> None:
    source, converted = directories
    found = moehive.swarm.load_expert(converted, 2, 5)
    prefix = "model.layers.2.mlp.experts.5."
    wanted = {name: tensor for name, tensor in load_tensors(source).items() if name.startswith(prefix)}
    assert set(found) == set(wanted)
    assert len(wanted) == 6
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_converts_plain_weights_only(tmp_path: Path, directories: tuple[Path, Path]) -> None:
    convert(save_checkpoint("mixtral", tmp_path / "source"), tmp_path / "converted")
    stored = moehive.swarm.load_expert(tmp_path / "converted", 0, 0)
    single = moehive.swarm.load_expert(str(tmp_path / "converted"), 0, 0, dtype=torch.float32)
    assert {name: tensor.float().tolist() for name, tensor in stored.items()} == {
        name: tensor.tolist() for name, tensor in single.items()
    }
    with pytest.raises(ConfigError, match="are stored as fp8-block; leave dtype out"):
        moehive.swarm.load_expert(directories[1], 2, 5, dtype=torch.float32)


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (2, 8), (-1, 0)])
def test_an_expert_that_the_model_lacks(directories: tuple[Path, Path], layer: int, expert: int) -> None:
    with pytest.raises(ConfigError, match=f"no expert {expert} in layer {layer}"):
        moehive.swarm.load_expert(directories[1], layer, expert)


def test_a_corrupt_expert_is_not_handed_out(directories: tuple[Path, Path]) -> None:
    _, converted = directories
    entry = Manifest.from_bytes((converted / MANIFEST_NAME).read_bytes()).experts[ExpertKey(1, 1)]
    path = converted / entry.file
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(CorruptShard, match=entry.file):
        moehive.swarm.load_expert(converted, 1, 1)
    path.write_bytes(intact)


def test_a_source_checkpoint_is_not_a_converted_directory(directories: tuple[Path, Path]) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json does not exist"):
        moehive.swarm.load_expert(directories[0], 1, 1)


def test_the_package_names_what_it_exports() -> None:
    assert set(moehive.swarm.__all__) <= set(dir(moehive.swarm))
    assert all(callable(getattr(moehive.swarm, name)) for name in moehive.swarm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_experts'"):
        moehive.swarm.load_experts  # type: ignore[attr-defined]  # noqa: B018
