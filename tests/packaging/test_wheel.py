"""The wheel installs moehive.* with everything in it, and no other top-level name."""

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


def test_the_only_top_level_names_are_ours(built):
    version = importlib.metadata.version("moehive")

    assert {name.partition("/")[0] for name in built.wheel_names} == {"moehive", f"moehive-{version}.dist-info"}


def test_every_file_of_the_four_folders_is_in_the_wheel_and_no_other(built, source_files):
    """The wheel is built from the sdist, so an sdist without our packages fails here too."""
    packaged = {name.removeprefix("moehive/") for name in built.wheel_names if name.startswith("moehive/")}

    assert packaged == source_files


@pytest.mark.parametrize("folder", ["swarm", "node", "kernels", "protocol"])
def test_every_package_says_that_it_is_typed(built, folder):
    assert f"moehive/{folder}/py.typed" in built.wheel_names


def test_the_demo_model_is_in_the_wheel(built):
    model = {Path(name).name for name in built.wheel_names if name.startswith("moehive/node/demo/model/")}

    assert {"config.json", "tokenizer.json"} <= model
    assert any(name.endswith(".safetensors") for name in model)


def test_the_dashboard_is_in_the_wheel(built):
    dashboard = {Path(name).name for name in built.wheel_names if name.startswith("moehive/node/http/dashboard/")}

    assert dashboard == {"index.html", "dashboard.css", "dashboard.js"}


def test_namespaces_have_no_init(built):
    """`moehive` is shared by four folders; a `kernels/__init__.py` would hide Hugging Face's package in a checkout."""
    assert not {"moehive/__init__.py", "moehive/kernels/__init__.py"} & built.wheel_names


def test_the_command_is_declared(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert "moehive = moehive.node.cli:main" in wheel.read(entry_points).decode()


def test_the_wheel_works_without_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import moehive.protocol, moehive.node.cli.app; "
        "print(moehive.protocol.__file__, moehive.node.cli.__file__, sep='\\n')"
    )

    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in done.stdout.splitlines())


def test_the_installed_version_is_the_one_in_pyproject(checkout):
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]

    assert importlib.metadata.version("moehive") == project["version"]
