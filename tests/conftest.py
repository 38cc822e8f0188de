"""What holds for every test: one thread, no model hub, nothing of the user's home, bounded Hypothesis runs, Ctrl-C."""

import atexit
import os
import shutil
import signal
import tempfile

# Libraries read these once, at import, so they are set before anything is imported. Processes of tests inherit them.
_HOME = tempfile.mkdtemp(prefix="moehive-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "HOME": _HOME,
    "MOEHIVE_HOME": f"{_HOME}/moehive",
    "XDG_CACHE_HOME": f"{_HOME}/.cache",
    "XDG_CONFIG_HOME": f"{_HOME}/.config",
    "XDG_DATA_HOME": f"{_HOME}/.local/share",
    "XDG_STATE_HOME": f"{_HOME}/.local/state",
    "HF_HOME": f"{_HOME}/huggingface",
    "HF_HUB_OFFLINE": "1",
    # Tests run node processes beside each other, and threads of each for every core would only contend. One thread also
    # fixes the order of sums, which bit-for-bit comparisons between processes need.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# A script that starts the tests in the background has them, and all of their processes, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

for _name in ("HF_HUB_CACHE", "HF_TOKEN", "TRANSFORMERS_CACHE", "TRITON_CACHE_DIR"):  # they would win over the above
    os.environ.pop(_name, None)

from hypothesis import settings  # noqa: E402  after the environment

# No deadline: a first call may import or compile. A change is judged by the same examples every time: what fails
# after it is its fault. New counterexamples are looked for with HYPOTHESIS_PROFILE=thorough, and kept as @example.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

import pytest  # noqa: E402
from support.interpreted import InterpretedTests, ReportWriter, is_interpreter  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Tests marked `interpreted` run under Triton's interpreter, in a process of their own.

    In that child reports go to the parent; the parent forwards; by hand with TRITON_INTERPRET=1 tests just run.
    """
    if not is_interpreter():
        config.pluginmanager.register(InterpretedTests(config))
    elif (writer := ReportWriter.from_environment(config)) is not None:
        config.pluginmanager.register(writer)
