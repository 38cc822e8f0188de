"""Ctrl-C wherever CPython lets a signal's handler run."""

import dis
import sys
from collections.abc import Callable, Collection
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import Any

# After these the evaluation loop looks for signals (CPython, Python/bytecodes.c, CHECK_EVAL_BREAKER).
_CHECKS = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "RESUME", "JUMP_BACKWARD")


class InterruptAt:
    """Raises KeyboardInterrupt in this thread at the `count`-th place where a signal could, in some source files.

    It is suppressed. `where` says where that was; empty where fewer places were run.
    """

    def __init__(self, count: int, files: Collection[str]) -> None:
        self._left = count
        self._files = files
        self.where = ""

    def __enter__(self) -> "InterruptAt":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        sys.settrace(self._before)
        return kind is KeyboardInterrupt

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_lasti in _places(frame.f_code):
            self._left -= 1
            if self._left == 0:
                self.where = f"{frame.f_code.co_qualname}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace


@cache
def _places(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions that follow a look for signals, where the same handlers wait for an error of both.

    Where they do not, as at the end of a `with`, a signal's error belongs to the instruction before.
    """
    bytecode = dis.Bytecode(code)
    found: set[int] = set()
    before: dis.Instruction | None = None
    for instruction in bytecode:
        if before is not None and before.opname in _CHECKS:
            targets = {_handler(bytecode, where.offset) for where in (before, instruction)}
            found |= {instruction.offset} if len(targets) == 1 else set()
        before = instruction
    return frozenset(found)


def _handler(bytecode: Any, offset: int) -> int | None:
    """Where an error at `offset` continues; None: in the caller."""
    entries = (entry for entry in bytecode.exception_entries if entry.start <= offset < entry.end)
    return next((entry.target for entry in entries), None)
