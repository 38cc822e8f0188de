"""The harness itself: marked tests have the interpreter, others do not, a killed child is survived, canaries sing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.canaries import Canaries
from support.interpreted import is_interpreter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def shifted_copy(source, destination, size, shift, BLOCK: tl.constexpr):
    """destination[i + shift] = source[i]: right for shift 0, beside the buffer for all others."""
    index = tl.arange(0, BLOCK)
    tl.store(destination + index + shift, tl.load(source + index, mask=index < size), mask=index < size)


@pytest.mark.skipif(is_interpreter(), reason="started by hand with TRITON_INTERPRET=1")
def test_others_have_no_interpreter() -> None:
    assert type(shifted_copy).__name__ == "JITFunction"


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8])
def test_marked_tests_interpret(dtype: torch.dtype) -> None:
    source = torch.arange(11).to(dtype)
    with Canaries() as guard:
        found = guard.empty((11,), dtype)
        shifted_copy[(1,)](guard(source), found, 11, 0, 16)
    assert torch.equal(found, source)


@pytest.mark.interpreted
@pytest.mark.parametrize("shift", [-1, 1])
def test_a_write_beside_a_buffer_is_seen(shift: int) -> None:
    with pytest.raises(AssertionError, match="guarded tensor 1: written outside its bounds"), Canaries() as guard:
        shifted_copy[(1,)](guard(torch.ones(11)), guard.empty((11,), torch.float32), 11, shift, 16)


_SUITE = """
import ctypes, pytest
pytestmark = pytest.mark.interpreted
def test_passes(): pass
def test_kills(): ctypes.string_at(0)
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("for a reason")
"""


def test_a_killed_interpreter_fails_its_test_only(tmp_path: Path) -> None:
    tests = Path(__file__).parents[2]
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {tests}\nmarkers = interpreted\n")
    (tmp_path / "conftest.py").write_bytes((tests / "conftest.py").read_bytes())
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "test_suite.py").write_text(_SUITE)
    for name in ("test_after.py", "inner/test_before.py"):  # these run in the parent
        (tmp_path / name).write_text("def test_plain(): pass")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += ["inner/test_before.py", "inner/test_suite.py", "test_after.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    for line in (
        "2 failed, 3 passed, 1 skipped",
        "PASSED inner/test_suite.py::test_passes",
        "FAILED inner/test_suite.py::test_fails - assert 1 == 2",
        "FAILED inner/test_suite.py::test_kills - the interpreter's process ended with -11",
    ):
        assert line in ended.stdout
