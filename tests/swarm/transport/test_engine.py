"""hivemind and py-libp2p in one process, in either order, leaving its logging alone. Each test is a fresh process."""

import subprocess
import sys

LOAD = "from moehive.swarm.transport.engine import import_hivemind, import_libp2p\n"
USE_BOTH = """
from hivemind.p2p import P2P
from libp2p.crypto.ed25519 import create_new_key_pair
create_new_key_pair()
print("both")
"""


def run(script: str) -> str:
    """What `script` printed, stderr included."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout


def test_both_in_one_process() -> None:
    """py-libp2p first; the other order is in the next test."""
    assert run(LOAD + "import_libp2p(); import_hivemind()" + USE_BOTH) == "both\n"


def test_hivemind_imported_by_somebody_else() -> None:
    script = """
import hivemind
assert import_hivemind() is hivemind
try:
    import_libp2p()
except Exception as error:
    print(type(error).__name__, error)
"""
    assert run(LOAD + script).startswith("TransportError hivemind was imported before moehive")


def test_logging_and_torch_are_left_alone() -> None:
    script = """
import logging, torch.multiprocessing
before = torch.multiprocessing.get_sharing_strategy()
import_hivemind(); import_libp2p()
assert torch.multiprocessing.get_sharing_strategy() == before
assert logging.getLevelName(logging.WARNING) == "WARNING"
for name in ("hivemind", "libp2p"):
    logging.getLogger(f"{name}.x").info("nobody sees this")
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
for name in ("hivemind", "libp2p"):
    logging.getLogger(f"{name}.x").info("nobody sees this")
    logging.getLogger(f"{name}.x").warning("once")
"""
    assert run(LOAD + script + USE_BOTH) == "WARNING hivemind.x once\nWARNING libp2p.x once\nboth\n"


def test_it_can_be_imported_where_warnings_are_errors() -> None:
    script = """
import warnings
warnings.simplefilter("error")
import_hivemind()
try:
    warnings.warn("as before", DeprecationWarning)
except DeprecationWarning as error:
    print(error)
"""
    assert run(LOAD + script) == "as before\n"


def test_our_modules_import_neither() -> None:
    script = """
import sys
import moehive.swarm.identity, moehive.swarm.transport.hivemind, moehive.swarm.transport.memory
print([name for name in ("hivemind", "libp2p", "torch") if name in sys.modules])
"""
    assert run(script) == "[]\n"
