"""Builds the project once per session, as a release does, and offers the archives to the tests."""

import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FOLDERS = ("swarm", "node", "kernels", "protocol")


@dataclass(frozen=True)
class Built:
    """What `python -m build` made: the archives, and the names of the files in them."""

    wheel: Path
    sdist: Path
    wheel_names: frozenset[str]
    sdist_names: frozenset[str]  # below the archive's single top folder


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def source_files() -> frozenset[str]:
    """Every file of the four folders, relative to the checkout, without byte code."""
    found = (path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*") if path.is_file())
    return frozenset(path.relative_to(CHECKOUT).as_posix() for path in found if path.suffix != ".pyc")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, built from this checkout with its .editable links, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    # without isolation: hatchling comes with the dev extra, and nothing is downloaded
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        wheel_names = frozenset(archive.namelist())
    with tarfile.open(sdist) as archive:
        sdist_names = frozenset(member.name.partition("/")[2] for member in archive if member.isfile())
    return Built(wheel, sdist, wheel_names, sdist_names)
