"""What a kept cache serves: pure rules, and with real models the tokens of a fresh one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import Checkpoints
from transformers.utils import logging

from moehive.node.text.generation import Generated, continue_tokens
from moehive.node.text.prompts import encode_chat, encode_text
from moehive.node.text.reuse import KeptPrefix, reusable
from moehive.node.text.sampling import Sampling
from moehive.swarm import open_local

GREEDY = Sampling(12, 0, temperature=0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    logging.disable_progress_bar()
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(
    ("cached", "wanted", "croppable", "rigid"),
    [
        ("", "abc", 0, 0),
        ("abc", "abcd", 3, 3),
        ("abc", "abc", 2, 0),  # the last token is computed: the next one follows from it
        ("abc", "abxy", 2, 0),
        ("abc", "xabc", 0, 0),
        ("abcdef", "abc", 2, 0),
        ("a", "a", 0, 0),
    ],
)
def test_how_much_of_a_prompt_is_there(cached: str, wanted: str, croppable: int, rigid: int) -> None:
    tokens = [ord(letter) for letter in cached], [ord(letter) for letter in wanted]

    assert reusable(*tokens, croppable=True) == croppable
    assert reusable(*tokens, croppable=False) == rigid


class Turns:
    """A conversation of two turns with one model, the second of which may reuse the first."""

    def __init__(self, directory: Path) -> None:
        self.model, tokenizer = open_local(directory, dtype=torch.float32)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.kept = KeptPrefix()

    def say(self, prompt: list[int], kept: KeptPrefix | None) -> Generated:
        return continue_tokens(self.model, self.tokenizer, prompt, GREEDY, lambda _: None, kept=kept)

    def prompt(self, *texts: str) -> list[int]:
        roles = ("user", "assistant")
        return encode_chat(
            self.tokenizer, [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], otherwise=""
        )


# Full attention; a window of 16 tokens, which both turns leave behind; one with linear attention; compressed keys.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_the_next_turn_has_the_tokens_of_a_fresh_model(checkpoints: Checkpoints, family: str) -> None:
    turns = Turns(checkpoints.converted(family))
    first = turns.say(turns.prompt("What light is this?"), turns.kept)
    # As the template would put it, with the very tokens of the answer, whose text could be encoded otherwise.
    second = [*turns.prompt("What light is this?"), *first.tokens, *encode_text(turns.tokenizer, "\nuser: And that?\n")]

    again = turns.say(second, turns.kept)

    assert first.reused_tokens == 0
    assert again.reused_tokens == first.prompt_tokens + len(first.tokens) - 1
    assert again.tokens == turns.say(second, None).tokens


@pytest.mark.parametrize(("family", "reused"), [("qwen3_moe", True), ("gpt_oss", False), ("qwen3_next", False)])
def test_another_turn_reuses_its_beginning_where_a_cache_can_be_cut(
    checkpoints: Checkpoints, family: str, reused: bool
) -> None:
    turns = Turns(checkpoints.converted(family))
    turns.say(turns.prompt("What light is this?"), turns.kept)
    other = turns.prompt("What light is that over there?")

    again = turns.say(other, turns.kept)

    assert again.reused_tokens == (len("user: What light is th") if reused else 0)
    assert again.tokens == turns.say(other, None).tokens


def test_what_failed_leaves_nothing_behind(checkpoints: Checkpoints) -> None:
    turns = Turns(checkpoints.converted("qwen3_moe"))
    prompt = turns.prompt("What light is this?")
    turns.say(prompt, turns.kept)

    def fail(text: str) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        continue_tokens(turns.model, turns.tokenizer, prompt, GREEDY, fail, kept=turns.kept)
    assert turns.say(prompt, turns.kept).reused_tokens == 0
