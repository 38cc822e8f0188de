"""`moehive chat`: turn after turn, with a model that has a chat template and one that has none."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import Checkpoints

from moehive.node.cli import chat as module
from moehive.protocol.errors import ConfigError


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints")).converted("qwen3_moe")


@pytest.fixture
def chat(moehive, talker, monkeypatch):
    """The answers to lines of stdin."""

    def say(text: str, *arguments: object) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        how = ("--model", talker, "--dtype", "float32", "--temperature", 0)
        return moehive("chat", *how, *(arguments or ("--max-tokens", 6)))

    return say


def test_each_line_is_a_turn_that_the_model_sees_with_those_before(chat, moehive, talker):
    one, again, two = chat("hello\n"), chat("hello\n/reset\n\nhello\n"), chat("hello\nhello\n")
    arguments = ("--model", talker, "--dtype", "float32", "--temperature", 0, "--max-tokens", 6)
    generated = moehive("generate", "hello", *arguments, "--chat", "--quiet")

    assert one.code == 0
    assert one.err == ""
    assert one.out == generated.out
    assert again.out == one.out * 2, "/reset begins anew"
    assert two.out.startswith(one.out)
    assert two.out != again.out, "the second turn has another prompt"


def test_the_system_message_comes_first(chat):
    assert chat("hello\n", "--system", "Be brief.", "--max-tokens", 6).out != chat("hello\n").out


def test_commands(chat):
    outcome = chat("/help\n/exit\nhello\n")

    assert outcome.out == ""
    assert "there is no /help: /reset begins anew, /exit leaves" in outcome.err


def test_a_conversation_that_has_become_too_long_is_told(chat):
    outcome = chat("x" * 600 + "\n")

    assert outcome.code == 2
    assert "longer than the model's context of 512 tokens: /reset begins anew" in outcome.err


def test_an_answer_ends_where_the_context_does(chat):
    prompt = "x" * (512 - len("user: \n") - 3)
    within, beyond = chat(f"{prompt}\n", "--max-tokens", 3), chat(f"{prompt}\n", "--seed", 1)

    assert (within.code, beyond.out) == (0, within.out)


def test_a_model_without_a_chat_template_is_refused_with_advice(moehive, converted):
    outcome = moehive("chat", "--model", converted)

    assert outcome.code == 2
    assert "no chat template: continue texts with it instead, by `moehive generate`" in outcome.err


# --- interrupts -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Interrupted:
    """A conversation whose answer is interrupted with Ctrl-C a number of times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.halts: list[bool] = []

    def answer(self, text: str, write: Any, halted: Any) -> None:
        write("first ")
        for _ in range(self.times):
            os.kill(os.getpid(), signal.SIGINT)
            self.halts.append(halted())
        write("last")


def test_ctrl_c_ends_the_answer_and_not_the_program(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    before = signal.getsignal(signal.SIGINT)
    conversation: Any = Interrupted(1)
    module._turn(conversation, "hello")

    assert conversation.halts == [True]
    assert capsys.readouterr().out == "first last\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_forgets_the_turn(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    conversation: Any = Interrupted(2)
    module._turn(conversation, "hello")

    said = capsys.readouterr()
    assert said.out == "first \n"
    assert "this turn is forgotten" in said.err


def test_where_lines_are_not_typed_ctrl_c_ends_the_program(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    conversation: Any = Interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        module.talk(conversation)

    assert capsys.readouterr().out == "first \n", "and begins no other turn"


def test_on_a_terminal_ctrl_c_drops_the_line_and_ctrl_d_leaves(capsys, monkeypatch):
    keys: Any = iter([KeyboardInterrupt, "hello", EOFError])
    said: list[str] = []

    class Conversation:
        def answer(self, text: str, write: Any, halted: Any) -> None:
            said.append(text)
            raise ConfigError("too long")

    def typed(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, str):
            return key
        raise key

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    conversation: Any = Conversation()
    module.talk(conversation)

    assert said == ["hello"]
    err = capsys.readouterr().err
    assert "Ctrl-D leaves" in err
    assert "moehive: too long" in err, "a mistake ends no conversation"
