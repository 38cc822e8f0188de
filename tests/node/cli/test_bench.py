"""`moehive bench kernels`: what it measures, prints and writes."""

from __future__ import annotations

import json

import pytest
import torch

from moehive.kernels.benchmark import shapes
from moehive.kernels.benchmark.shapes import CLAMPED, MXFP4, LayerShape

TINY = (LayerShape("Tiny", 8, 2, 64, 32), LayerShape("Tiny-OSS", 4, 2, 96, 64, MXFP4, CLAMPED))


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    for shape in TINY:
        monkeypatch.setitem(shapes.SHAPES, shape.name.lower(), shape)


def test_a_table_and_a_file_with_every_size(moehive, tmp_path):
    path = tmp_path / "kernels.json"
    outcome = moehive(
        "bench", "kernels", "--quick", "--device", "cpu", "--threads", 1, "--shape", "tiny", "Tiny-OSS",
        "--batch", 1, 8, "--tokens", 40, "--json", path,
    )  # fmt: skip

    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "GB/s" in lines[0]
    assert lines[1].split()[:3] == ["layer", "weights", "tokens"]
    assert [line.split()[:3] for line in lines[2:]] == [
        [name, kept, tokens] for name, kept in (("Tiny", "bf16"), ("Tiny-OSS", "mxfp4")) for tokens in ("1", "8", "40")
    ]
    written = json.loads(path.read_text())
    assert written["machine"]["bandwidth"] > 0
    for result in written["results"]:
        layer = TINY[result["shape"] == "Tiny-OSS"]
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / result["seconds"])
        assert (
            result["rate"] * result["seconds"] == pytest.approx(6 * 64 * 32 * 2 * result["tokens"]) or layer is TINY[1]
        )
        assert result["of_roofline"] > 0
        assert 0 < result["utilisation"] <= 1
        assert 0 <= result["gini"] < 1
        assert result["peak_bytes"] > result["weight_bytes"] == layer.experts * layer.expert_bytes


def test_another_format_than_the_publishers(moehive, tmp_path):
    path = tmp_path / "kernels.json"
    arguments = ("bench", "kernels", "--quick", "--device", "cpu", "--shape", "tiny", "--batch", 2, "--json", path)
    sizes = {}
    for name in ("fp32", "int8", "int4"):
        assert moehive(*arguments, "--format", name).code == 0
        (result,) = json.loads(path.read_text())["results"]
        assert (result["format"], result["tokens"]) == (name, 2)
        sizes[name] = result["weight_bytes"]

    assert sizes["fp32"] == 4 * sizes["int8"] > 7 * sizes["int4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "llama"), "'llama' is not known"),
        (("--batch", "0"), "--batch"),
        (("--format", "int3"), "--format"),
    ],
)
def test_wrong_usage(moehive, arguments, said):
    outcome = moehive("bench", "kernels", *arguments)

    assert outcome.code == 2
    assert said in outcome.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(moehive):
    outcome = moehive("bench", "kernels", "--device", "cuda")

    assert outcome.code == 2
    assert "--device cpu" in outcome.err
