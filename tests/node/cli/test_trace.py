"""`moehive trace`: a recorded generation, and what policies make of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moehive.node.cli import trace as trace_module
from moehive.swarm.trace.files import read_trace

from .conftest import Moehive

PROMPTS = ("ROMEO:\nBut soft", "def main():")


def test_a_generation_is_recorded_and_replayed(
    moehive: Moehive, converted: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--max-tokens", "12", "--seed", "3")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    outcome = moehive("trace", "record", converted, ours, *PROMPTS, *options, "--samples", "5", "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert (facts["model"], facts["sessions"], facts["experts"], facts["topK"]) == ("model", 2, 8, 2)
    assert (facts["samples"], facts["bytes"], facts["layers"]) == (5, ours.stat().st_size, list(range(6)))
    outcome = moehive("trace", "record", checkpoint, theirs, *PROMPTS, *options)
    assert outcome.code == 0, outcome.err
    assert "in 2 sessions, 6 layers of 8 experts, 2 used per token" in outcome.out
    # The converted model computes what the original one does, and so it chooses the same experts.
    assert np.array_equal(read_trace(ours).experts, read_trace(theirs).experts)
    outcome = moehive("trace", "replay", ours, "--resident", "100", "--resident", "50")
    assert outcome.code == 0, outcome.err
    assert "100 % resident: 48 of 48 experts" in outcome.out
    assert [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ")][:7] == [
        "policy", "LRU", "LFU", "moehive", "fitted", "and", "Belady",
    ]  # fmt: skip


def test_a_replay_in_json(moehive: Moehive) -> None:
    demo = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
    outcome = moehive("trace", "replay", demo, "--resident", "100", "--json")
    found = json.loads(outcome.out)
    [scores] = found["scores"]
    assert (scores["residentPercent"], scores["slots"], scores["gapClosed"]) == (100, 48, 0)
    assert scores["gapClosedByFit"] == 0, "there is no gap"
    uses = {name: scores[name]["hits"] + scores[name]["misses"] for name in ("lru", "lfu", "lfru", "fitted", "belady")}
    assert len(set(uses.values())) == 1
    assert all(scores[name]["misses"] == 48 and scores[name]["evictions"] == 0 for name in uses), "each is loaded once"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("record", "nowhere", "out", "a prompt"), 2, "neither a converted directory nor a checkpoint"),
        (("record", "nowhere", "out"), 2, "there is no prompt"),
        (("replay", "missing"), 2, "cannot read missing: No such file"),
        (("fit", "missing", "model", "out"), 2, "cannot read missing: No such file"),
        (("replay", "missing", "--resident", "0"), 2, "--resident"),
        (("replay", "missing", "--empty-resident"), 2, "--empty-resident"),
    ],
)
def test_what_cannot_be_done_is_said(moehive: Moehive, arguments: tuple[str, ...], code: int, said: str) -> None:
    outcome = moehive("trace", *arguments)
    assert outcome.code == code
    assert said in outcome.err


@pytest.mark.parametrize(
    ("file", "code", "said"),
    [
        ("no/such/file", 2, "there is no directory"),
        (".", 2, "it is a directory"),
        ("/proc/file", 1, "cannot write /proc/file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    moehive: Moehive, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, code: int, said: str
) -> None:
    monkeypatch.setattr(trace_module, "load_model", None)  # not called
    demo = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
    output = tmp_path / file
    for arguments in (("record", converted, output, "a prompt"), ("fit", demo, converted, output)):
        outcome = moehive("trace", *arguments)
        assert (outcome.code, said in outcome.err) == (code, True), outcome.err


def test_a_file_that_is_no_trace_is_refused(moehive: Moehive, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"something else")
    outcome = moehive("trace", "replay", tmp_path / "file")
    assert outcome.code == 2
    assert "is not a file that moehive wrote" in outcome.err


def test_a_predictor_is_fitted_and_used(moehive: Moehive, converted: Path, tmp_path: Path) -> None:
    trace, predictor = tmp_path / "trace", tmp_path / "predictor"
    recorded = ("--max-tokens", "120", "--seed", "3", "--samples", "200")
    assert moehive("trace", "record", converted, trace, *PROMPTS, *recorded).code == 0
    outcome = moehive("trace", "fit", trace, converted, predictor, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["recall"]
    assert set(found["untrained"]) == set(found["fitted"]) == {"entry", "before", "earlier"}
    at_k, one_more, two_more = found["untrained"]["before"]
    assert 0.25 < at_k < one_more < two_more <= 1  # 0.25 would be chance
    outcome = moehive("trace", "fit", trace, converted, predictor)
    assert "recall at k" in outcome.out
    generated = ("--max-tokens", "4", "--seed", "3", "--json")
    outputs = [
        moehive("generate", "ROMEO:", "--model", converted, "--prefetch", how, *generated) for how in (predictor, "off")
    ]
    assert [outcome.code for outcome in outputs] == [0, 0], outputs[0].err
    assert json.loads(outputs[0].out)["tokens"] == json.loads(outputs[1].out)["tokens"]


def test_a_trace_without_hidden_states_cannot_be_fitted_to(moehive: Moehive, converted: Path, tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "data" / "demo_routing.safetensors"
    outcome = moehive("trace", "fit", demo, converted, tmp_path / "predictor")
    assert outcome.code == 2
    assert "--samples" in outcome.err
