"""The sdist holds what a wheel, a reader and a tester need.

Guards a trap that exits with code 0: hatchling follows the links in .editable, takes the real folders for already seen,
and packs no package at all.
"""

import pytest


def test_every_file_of_the_four_folders_is_in_the_sdist(built, source_files):
    assert source_files <= built.sdist_names
    assert "protocol/__init__.py" in source_files  # the comparison above is not one of nothing with nothing


@pytest.mark.parametrize(
    "name",
    [
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"),
        *("scripts/Containerfile", "scripts/grafana.json", "scripts/moehive-node.service", "docs/operation.md"),
        *("scripts/hatch_build.py", "scripts/test", "scripts/quickstart", "tests/conftest.py"),
    ],
)
def test_the_sdist_can_be_built_read_and_tested(built, name):
    assert name in built.sdist_names


def test_links_of_the_editable_install_stay_at_home(built):
    assert not [name for name in built.sdist_names if name.startswith((".editable", ".venv"))]
