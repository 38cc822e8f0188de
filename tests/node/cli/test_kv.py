"""`moehive generate --kv`: the same text, where it was kept, and what an approximate cache changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moehive.node.cli.kv import kv_lines
from moehive.node.text.generation import _own_cache
from moehive.swarm.model.kv.fidelity import LogitError
from moehive.swarm.model.kv.options import KvOptions
from moehive.swarm.model.kv.stats import KvStats

ARGUMENTS = ("--max-tokens", 140, "--temperature", 0, "--json")
STATS = KvStats(
    mode="spill", tokens=1000, block_tokens=128, layers=6, kept_layers=0, full_bytes=1536000, budget=1 << 20,
    memory_bytes=0, memory_peak=1 << 19, host_bytes=0, host_peak=0, disk_bytes=0, disk_peak=3 << 20, spilled_blocks=1,
    written_bytes=1, reloaded_bytes=10 << 20, reload_seconds=2.0, wait_seconds=0.5, expected=1, unexpected=1,
)  # fmt: skip


def test_spilled_keys_and_values_give_the_same_text(moehive, converted, home):
    plain, spilled, window = (
        json.loads(moehive("generate", "ROMEO:", "--model", converted, *ARGUMENTS, *more).out)
        for more in (
            (),
            ("--kv", "spill", "--kv-budget", "280KiB"),
            ("--kv", "window", "--kv-window", 64, "--kv-budget", "1MiB"),
        )
    )

    assert plain["kv"] is None
    assert spilled["tokens"] == window["tokens"] == plain["tokens"]
    assert 0 < spilled["kv"]["memoryPeakBytes"] <= 280 << 10
    assert window["kv"]["diskPeakBytes"] > 0
    assert window["kv"]["tokens"] == len(plain["tokens"]) + plain["promptTokens"] - 1
    assert list((home / "cache" / "kv").iterdir()) == []


def test_an_approximate_cache_says_what_it_changed(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 120, "--temperature", 0, "--kv", "int8")
    outcome = moehive(*arguments, "--kv-budget", "300KiB")

    assert outcome.code == 0
    assert "KV cache (int8): " in outcome.err
    assert "approximate: logits differ by up to" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kv-budget", "1MiB"), "a full KV cache has no budget"),
        (("--kv", "spill", "--kv-window", 5), "mode window only"),
        (("--kv", "some"), "--kv"),
    ],
)
def test_options_that_contradict_themselves_are_refused_before_loading(moehive, converted, arguments, said):
    outcome = moehive("generate", "x", "--model", converted, *arguments)

    assert outcome.code == 2
    assert said in outcome.err


def test_a_budget_that_is_too_small_is_refused_with_one_that_works(moehive, converted):
    arguments = ("generate", "x", "--model", converted, "--max-tokens", 4, "--kv", "spill", "--kv-budget")
    outcome = moehive(*arguments, "10KiB")

    assert outcome.code == 1
    least = outcome.err.split("raise it to at least ")[1].split()[0]
    assert "--kv-budget" in outcome.err
    assert moehive(*arguments, least).code == 0


def test_long_prompts_are_read_in_chunks():
    arguments: dict[str, int] = {"max_new_tokens": 3}
    assert _own_cache(None, KvOptions(prefill_chunk=5), 5, arguments) is None
    assert arguments == {"max_new_tokens": 3}
    assert _own_cache(None, KvOptions(prefill_chunk=5), 6, arguments) is None
    assert arguments == {"max_new_tokens": 3, "prefill_chunk_size": 5}


def test_what_the_summary_says():
    assert kv_lines(STATS, None) == [
        "KV cache (spill): 1,000 tokens in 6 layers, 1.5 MiB in full; at most 512.0 KiB in memory, 3.0 MiB on disk",
        "  read back 10.0 MiB at 5.0 MiB/s; waited for 0.50 s of 2.00 s",
    ]
    assert len(kv_lines(replace(STATS, reloaded_bytes=0), None)) == 1
    assert "nothing to spill" in kv_lines(replace(STATS, layers=0), None)[0]
    error = LogitError(tokens=512, positions=256, largest=1.5, relative=0.0125, kl=0.001, agreement=0.996)
    assert kv_lines(STATS, error)[-1] == (
        "  approximate: logits differ by up to 1.5 (1.25% of their spread), 99.6% have the same likeliest token; "
        "measured on 256 tokens"
    )
    assert "too few to be rounded" in kv_lines(STATS, replace(error, positions=0))[-1]
