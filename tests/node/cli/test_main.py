"""What is done before any command."""

import subprocess
import sys

import pytest

from moehive.node.cli import share_cores

PROGRAM = """
import os, sys
from moehive.node.cli import main
sys.argv = ["moehive", "--version"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
print("spins", os.environ.get("GOMP_SPINCOUNT"))
"""


def test_threads_are_told_to_share_the_cores_before_torch_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={}, check=True)
    assert done.stdout.endswith("spins 1000\n")


@pytest.mark.parametrize("decided", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_who_has_decided_is_left_alone(decided: dict[str, str]) -> None:
    environment = dict(decided)
    share_cores(environment)
    assert environment == decided
