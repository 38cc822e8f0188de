"""Everything public in `moehive.kernels.nn` has an example, and every example runs as it stands."""

import doctest
import inspect

import pytest

from moehive.kernels import nn

RECORDS = {"Balance", "Gating", "LayerReport"}  # what calls take and return, shown in the examples of those


def examples(name: str) -> list[doctest.DocTest]:
    subject = getattr(nn, name) if name else nn
    module = inspect.getmodule(subject)
    found = doctest.DocTestFinder(recurse=False).find(subject, name or "nn", module=module, globs=vars(module).copy())
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", ["", *sorted(set(nn.__all__) - RECORDS)])
def test_the_example_runs(name: str) -> None:
    found = examples(name)
    assert found, f"{name} has no example"
    for test in found:
        runner = doctest.DebugRunner()  # raises at the first that fails
        runner.run(test)
