"""`moehive generate` from a local directory, and what it refuses at once."""

from __future__ import annotations

import io
import json
import re

import pytest

from moehive.protocol.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "ab" * 32), "add --join TICKET"),
        (("--model", "nothing-here"), "neither a converted directory nor a model id"),
        (("--model", "ab" * 32, "--join", "moehive1"), "join ticket"),
        (("--model", "ab" * 32, "--draft", "nothing-here"), "neither 'lookup'"),
        (("--model", "ab" * 32, "--join", "moehive1", "--prefetch", "a"), "read from disk: leave it out with --join"),
        (("--model", "nothing-here", "--prefetch", "none"), "--prefetch none is neither auto, off nor a file"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(moehive, arguments, said):
    outcome = moehive("generate", "hello", *arguments)

    assert outcome.code == 2
    assert said in outcome.err


def test_text_on_stdout_and_the_summary_on_stderr(moehive, converted):
    outcome = moehive("generate", "ROMEO:", "--model", converted, "--max-tokens", 8, "--temperature", 0)

    assert outcome.code == 0
    assert outcome.out.strip()
    assert outcome.out.endswith("\n")
    assert "8 tokens in" in outcome.err


def test_one_token_is_one_token(moehive, converted):
    outcome = moehive(
        "generate", "ROMEO:", "--model", converted, "--max-tokens", 1, "--temperature", 0, "--kv", "spill"
    )

    assert outcome.err.startswith("1 token in")


def test_json_holds_the_same_text_and_a_seed_repeats_it(moehive, converted, monkeypatch):
    arguments = ("--model", converted, "--max-tokens", 8, "--seed", 5)
    streamed = moehive("generate", "ROMEO:", *arguments, "--quiet")
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:"))
    said = json.loads(moehive("generate", *arguments, "--json").out)

    assert streamed.err == ""
    assert said["text"] == streamed.out.removesuffix("\n")
    assert (len(said["tokens"]), said["seed"], said["swarm"]) == (8, 5, None)
    assert said["seconds"] >= said["firstTokenSeconds"] > 0


def test_a_small_memory_for_experts_changes_no_token_and_is_told(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 12, "--temperature", 0)
    enough, tight = (json.loads(moehive(*arguments, "--ram", ram, "--json").out) for ram in ("64MiB", "2MiB"))

    assert tight["tokens"] == enough["tokens"]
    ram, disk = tight["experts"]["tiers"]
    assert (ram["tier"], disk["tier"]) == ("ram", "disk")
    assert ram["residentBytes"] <= ram["budgetBytes"] == 2 << 20
    assert ram["misses"] == disk["hits"] == sum(layer["misses"] for layer in tight["experts"]["layers"])
    assert ram["misses"] > enough["experts"]["tiers"][0]["misses"]
    assert disk["latency"]["count"] == disk["hits"]
    assert 0 < tight["experts"]["layerCallsWithoutMiss"] < tight["experts"]["layerCalls"]
    text = moehive(*arguments, "--ram", "2MiB").err
    assert "found them in memory" in text
    assert "came from disk" in text
    assert "most misses: layer" in text


def test_what_prefetch_was_worth_is_told_where_there_was_any(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 40, "--temperature", 0, "--ram", "2MiB")
    told = json.loads(moehive(*arguments, "--json").out)["prefetch"]
    points = {point["guessed"]: point for point in told["points"]}
    assert set(points) == {"entry", "before", "earlier"}
    for point in points.values():
        assert point["guesses"] > 0
        assert 0.4 < point["recallAtK"] <= 1, "its routers guess far better than by chance, which is a quarter"
        assert 0 < point["precision"] <= 1
    assert told["usedBytes"] + told["wastedBytes"] >= 0 <= told["hiddenSeconds"]
    assert "  at before: recall at k " in moehive(*arguments).err
    assert json.loads(moehive(*arguments, "--prefetch", "off", "--json").out)["prefetch"] is None
    assert "prefetch" not in moehive(*arguments, "--prefetch", "off").err


def test_too_little_memory_for_a_token_is_refused_with_the_least_that_works(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 2)
    outcome = moehive(*arguments, "--ram", "1000")
    found = re.search(r"at least (\S+) \((\d+) bytes\)", outcome.err)

    assert outcome.code == 1
    assert found is not None
    assert moehive(*arguments, "--ram", found[1]).code == 0
    assert moehive(*arguments, "--ram", found[2]).code == 0
    assert moehive(*arguments, "--ram", int(found[2]) - 1).code == 1


@pytest.mark.parametrize("draft", ["lookup", "the model itself"])
def test_drafts_change_no_token(moehive, converted, draft):
    """In float32: in bfloat16 two tokens may be equally likely, and four rows at once round otherwise than one."""
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 12, "--temperature", 0, "--json")
    arguments += ("--dtype", "float32")
    drafted = moehive(*arguments, "--draft", converted if draft != "lookup" else draft, "--draft-tokens", 3)

    assert json.loads(drafted.out)["tokens"] == json.loads(moehive(*arguments).out)["tokens"]


def test_a_draft_of_another_vocabulary_is_refused(moehive, converted, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "draft")
    outcome = moehive("generate", "ROMEO:", "--model", converted, "--draft", tmp_path / "draft")

    assert outcome.code == 2
    assert "vocabulary of 64 tokens" in outcome.err


def test_what_cannot_be_generated_from_is_refused(moehive, converted):
    arguments = ("--model", converted, "--max-tokens", 1)

    empty = moehive("generate", "", *arguments)
    assert "the prompt is empty" in empty.err
    assert empty.out == "", "no blank line"
    assert "no chat template: leave --chat out" in moehive("generate", "x", *arguments, "--chat").err
    assert moehive("generate", "x", *arguments, "--temperature", 0, "--top-k", 3).code == 2
    assert moehive("generate", "x", *arguments, "--temperature", 0, "--top-p", 0.5).code == 2
    assert moehive("generate", "x", *arguments, "--top-p", 1.5).code == 2
    assert "at least one character" in moehive("generate", "x", *arguments, "--stop", "").err


def test_a_text_to_stop_at_is_the_last_of_what_is_made(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 24, "--temperature", 0, "--json")
    whole = json.loads(moehive(*arguments).out)["text"]
    word = next(word for word in whole.split() if len(word) > 3)
    stopped = json.loads(moehive(*arguments, "--stop", "not in it at all", "--stop", word).out)["text"]

    assert stopped == whole[: whole.index(word) + len(word)]


def test_drafts_end_at_the_same_text(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 24, "--temperature", 0, "--json")
    arguments += ("--dtype", "float32")
    whole = json.loads(moehive(*arguments).out)["text"]
    word = next(word for word in whole.split() if len(word) > 3)
    drafted = json.loads(moehive(*arguments, "--draft", "lookup", "--stop", word).out)["text"]

    assert drafted == whole[: whole.index(word) + len(word)]


def test_hardly_any_probability_leaves_only_the_likeliest_token(moehive, converted):
    arguments = ("generate", "ROMEO:", "--model", converted, "--max-tokens", 8, "--dtype", "float32", "--json")
    likeliest, chosen = (
        json.loads(moehive(*arguments, *how).out)["tokens"]
        for how in (("--temperature", 0), ("--temperature", 5, "--top-p", 1e-6, "--top-k", 100))
    )

    assert chosen == likeliest


def test_what_the_options_for_sampling_mean():
    from moehive.swarm.text.sampling import Sampling

    assert Sampling(5, 0).arguments() == {"max_new_tokens": 5}
    assert Sampling(5, 0, temperature=0).arguments()["do_sample"] is False
    assert Sampling(5, 0, temperature=0.5).arguments() == {"max_new_tokens": 5, "do_sample": True, "temperature": 0.5}
    assert Sampling(5, 0, top_k=3).arguments() == {"max_new_tokens": 5, "do_sample": True, "top_k": 3}
    assert Sampling(5, 0, top_p=0.9).arguments() == {"max_new_tokens": 5, "do_sample": True, "top_p": 0.9}
    with pytest.raises(ConfigError, match="top-k means nothing"):
        Sampling(5, 0, temperature=0, top_k=3).arguments()


def test_the_summary_names_every_peer_with_its_share():
    from moehive.node.cli.generate import peer_table
    from moehive.protocol.ids import PeerId
    from moehive.swarm.dispatch.stats import DispatchStats
    from moehive.swarm.policy.speed import Speed

    stats = DispatchStats()
    for name, rows_done, seconds in (("a", 30, 0.002), ("b", 90, 0.004)):
        peer = stats.of(PeerId(name))
        peer.rows, peer.speed = rows_done, Speed(answers=1, network=seconds)

    rows = [line.split() for line in peer_table(stats).splitlines()[1:]]

    assert rows == [["a", "30", "25", "%", "2.0", "ms", "0"], ["b", "90", "75", "%", "4.0", "ms", "0"]]
