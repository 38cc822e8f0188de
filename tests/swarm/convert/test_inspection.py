"""Inspection finds whatever is wrong, and says how much cheaper an expert has become."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.raw_checkpoint import write_checkpoint

from moehive.protocol.errors import ManifestError
from moehive.protocol.ids import ModelId
from moehive.protocol.manifest import Manifest
from moehive.swarm.convert import InspectionReport, convert, inspect


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One converted checkpoint. A test that changes it restores it."""
    root = tmp_path_factory.mktemp("inspected")
    convert(write_checkpoint(root / "source", experts=4, layers=2, files=3), root / "converted")
    return root / "converted"


def names(report: InspectionReport) -> list[str]:
    return [fault.file for fault in report.faults]


@given(st.data())
def test_every_flipped_bit_is_found(directory: Path, data: st.DataObject) -> None:
    """In any shard: reported under its name. In the manifest: refused, or reported because its id has changed."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "conversion.json")
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        found = names(inspect(directory))
    except ManifestError:
        found = ["manifest.json"]
    finally:
        path.write_bytes(original)
    assert path.relative_to(directory).as_posix() in found
    assert inspect(directory).ok


@pytest.mark.parametrize("verify", [True, False])
def test_missing_truncated_and_unknown_files_are_all_listed(directory: Path, verify: bool) -> None:
    missing, short = directory / "experts/00000/00001.safetensors", directory / "experts/00001/00003.safetensors"
    stray = directory / "experts/00001/notes.txt"
    originals = {path: path.read_bytes() for path in (missing, short)}
    missing.unlink()
    short.write_bytes(originals[short][:-1])
    stray.write_text("?")
    try:
        faults = {fault.file: fault.reason for fault in inspect(directory, verify=verify).faults}
    finally:
        stray.unlink()
        for path, content in originals.items():
            path.write_bytes(content)
    size = len(originals[short])
    assert faults == {
        "experts/00000/00001.safetensors": "it is missing",
        "experts/00001/00003.safetensors": f"it has {size - 1} bytes, not {size}",
        "experts/00001/notes.txt": "the manifest does not name it",
    }


def test_a_manifest_of_lies_about_tensors_is_found(directory: Path) -> None:
    """Hashes agree, the id agrees with conversion.json: only the file's own header tells."""
    paths = [directory / "manifest.json", directory / "conversion.json"]
    originals = [path.read_bytes() for path in paths]
    document = json.loads(originals[0])
    name = next(name for name, entry in document["tensors"].items() if "experts.0.gate" in name and entry["offset"])
    document["tensors"][name]["offset"] -= 8
    forged = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    report = json.loads(originals[1]) | {"modelId": Manifest.from_bytes(forged).model_id}
    paths[0].write_bytes(forged)
    paths[1].write_text(json.dumps(report))
    try:
        reasons = [fault.reason for fault in inspect(directory).faults]
    finally:
        for path, content in zip(paths, originals, strict=True):
            path.write_bytes(content)
    assert reasons == ["its header does not match the manifest's tensor table"]


def test_another_model_than_the_expected_one_is_a_fault(directory: Path) -> None:
    report = inspect(directory)
    assert inspect(directory, expect=report.model_id).ok
    assert names(inspect(directory, expect=ModelId("0" * 64))) == ["manifest.json"]


def test_a_directory_without_a_manifest_is_no_converted_model(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not finished"):
        inspect(tmp_path)


def test_a_fetched_directory_has_no_conversion_report(directory: Path) -> None:
    path = directory / "conversion.json"
    content = path.read_bytes()
    path.unlink()
    try:
        report = inspect(directory)
    finally:
        path.write_bytes(content)
    assert report.ok
    assert report.to_json()["sourcePerExpert"] is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format":"other"}'])
def test_a_damaged_conversion_report_is_a_fault(directory: Path, content: bytes) -> None:
    path = directory / "conversion.json"
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        assert names(inspect(directory)) == ["conversion.json"]
    finally:
        path.write_bytes(original)


def test_the_report_counts_reads_and_bytes(directory: Path) -> None:
    """Three files in turn: each expert's three tensors lie in three files, and a neighbour's lies between."""
    report = json.loads(json.dumps(inspect(directory).to_json()))
    expert_bytes = 3 * 32 * 16 * 2
    assert report["sourcePerExpert"]["reads"] == report["sourcePerExpert"]["files"] == {"min": 3, "mean": 3.0, "max": 3}
    assert report["sourcePerExpert"]["bytes"] == {"min": expert_bytes, "mean": expert_bytes, "max": expert_bytes}
    assert report["perExpert"]["reads"] == 1
    assert report["perExpert"]["bytes"]["max"] == 4096 + expert_bytes
    assert report["shards"]["expert"] == {"count": 8, "bytes": 8 * (4096 + expert_bytes)}
    assert (report["ok"], report["verified"], report["faults"]) == (True, True, [])
    assert report["modelId"] == inspect(directory, verify=False).model_id


def test_neighbouring_tensors_are_one_read(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "source", files=1), tmp_path / "converted")
    source = inspect(tmp_path / "converted").source
    assert source
    assert (source.reads.min, source.reads.max, source.files.max) == (1, 1, 1)


def test_progress_covers_every_byte(directory: Path) -> None:
    heard: list[tuple[int, int]] = []
    report = inspect(directory, progress=lambda done, total, _: heard.append((done, total)))
    total = sum(shard.size for shard in report.manifest.shards)
    assert heard[-1] == (total, total)
    assert len(heard) == len(report.manifest.shards)
