"""When a generation ends, and what it has said by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Checkpoints
from transformers.utils import logging

from moehive.node.text.generation import continue_tokens
from moehive.node.text.prompts import encode_chat, encode_text
from moehive.node.text.reuse import KeptPrefix
from moehive.node.text.sampling import Sampling
from moehive.protocol.errors import ConfigError
from moehive.swarm import open_local


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    logging.disable_progress_bar()
    directory: Path = Checkpoints(tmp_path_factory.mktemp("checkpoints")).converted("demo")
    return open_local(directory, dtype=torch.float32)


def say(loaded: tuple[Any, Any], text: str = "ROMEO:", **arguments: Any):
    model, tokenizer = loaded
    wishes = {"max_tokens": 24, "seed": 0, "temperature": 0.0} | arguments.pop("wishes", {})
    write = arguments.pop("write", lambda _: None)
    return continue_tokens(model, tokenizer, encode_text(tokenizer, text), Sampling(**wishes), write, **arguments)


def test_the_pieces_are_the_text_and_the_text_is_the_tokens(loaded):
    pieces: list[str] = []
    made = say(loaded, write=pieces.append)

    assert made.text == "".join(pieces) == loaded[1].decode(made.tokens)
    assert len(pieces) > 12, "a piece for each token, mostly"
    assert (made.finish, len(made.tokens)) == ("length", 24)


def test_a_text_to_stop_at_is_no_part_of_the_answer_where_that_is_asked(loaded):
    whole = say(loaded).text
    stop = whole[9:14]
    pieces: list[str] = []
    made = say(loaded, wishes={"stop": (stop,), "with_stop": False}, write=pieces.append)

    assert made.text == "".join(pieces) == whole[: whole.index(stop)]
    assert made.finish == "stop"
    assert len(made.tokens) < 24


def test_the_models_own_end_is_a_stop_that_is_not_said(loaded, monkeypatch):
    third = say(loaded).tokens[2]
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", [1023, third])
    made = say(loaded)

    assert (made.finish, made.tokens[-1], len(made.tokens)) == ("stop", third, 3)


def test_it_can_be_halted_after_any_token(loaded):
    pieces: list[str] = []
    made = say(loaded, write=pieces.append, halted=lambda: len(pieces) == 5)

    assert (made.finish, len(made.tokens), made.text) == ("halted", 5, "".join(pieces))


def test_it_can_be_halted_while_the_prompt_is_read(loaded):
    asked: list[bool] = []

    def halted() -> bool:
        asked.append(len(asked) == 3)
        return asked[-1]

    made = say(loaded, halted=halted)

    assert (made.finish, made.tokens, made.text, len(asked)) == ("halted", (), "", 4), "before the fourth layer"
    asked.clear()
    again = say(loaded, halted=lambda: bool(asked.append(False)))
    assert again.tokens == say(loaded).tokens
    assert len(asked) == 6 + 24, "at each layer for the prompt, then at each token"


def test_of_a_prompt_that_was_not_read_to_its_end_nothing_is_kept(loaded):
    kept = KeptPrefix()
    first = say(loaded, kept=kept)
    layers = iter([False] * 8 + [True])
    assert say(loaded, kept=kept, wishes={"max_tokens": 1}, halted=lambda: next(layers)).reused_tokens == 1
    assert say(loaded, "ROMEO: What", kept=kept, halted=lambda: next(layers)).finish == "halted"
    again = say(loaded, kept=kept)

    assert (again.reused_tokens, again.tokens) == (0, first.tokens)


def test_a_seed_repeats_a_choice(loaded):
    first, again, other = (say(loaded, wishes={"temperature": 1.5, "seed": seed}).tokens for seed in (-3, -3, 4))

    assert first == again != other


def test_a_model_that_would_write_several_texts_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded[0].generation_config, "num_beams", 4)
    with pytest.raises(ConfigError, match="num_beams"):
        say(loaded)


def test_texts_to_stop_at_of_the_model_itself_count_too(loaded, monkeypatch):
    stop = say(loaded).text[9:14]
    monkeypatch.setattr(loaded[0].generation_config, "stop_strings", [stop])
    made = say(loaded)

    assert made.finish == "stop"
    assert stop in made.text


def test_prompts_that_cannot_be_continued(loaded):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        say(loaded, "")
    with pytest.raises(ConfigError, match="no chat template: be silent"):
        encode_chat(loaded[1], [{"role": "user", "content": "hello"}], otherwise="be silent")
    loaded[1].chat_template = "{{ raise_exception('Roles must alternate') }}"
    try:
        with pytest.raises(ConfigError, match="refuses these messages: Roles must alternate"):
            encode_chat(loaded[1], [{"role": "user", "content": "hello"}], otherwise="be silent")
    finally:
        loaded[1].chat_template = None
