"""Tests marked `interpreted` run under Triton's interpreter, in a process of their own: support/interpreted.py."""

import pytest
from support.interpreted import InterpretedTests, ReportWriter, is_interpreter


def pytest_configure(config: pytest.Config) -> None:
    """In the child reports go to the parent; the parent forwards; by hand with TRITON_INTERPRET=1 tests just run."""
    if not is_interpreter():
        config.pluginmanager.register(InterpretedTests(config))
    elif (writer := ReportWriter.from_environment(config)) is not None:
        config.pluginmanager.register(writer)
