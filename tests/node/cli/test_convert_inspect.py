"""`moehive convert` and `moehive inspect` as users see them."""

import json
import re
import shutil

import pytest


def test_the_last_line_names_the_model_and_what_it_took(moehive, checkpoint, tmp_path):
    outcome = moehive("convert", checkpoint, tmp_path / "out")

    assert outcome.code == 0
    assert re.fullmatch(r"model [0-9a-f]{64}: \d+ shards, [\d.]+ MiB, [\d.]+ s\n", outcome.out)
    assert outcome.err == ""  # no bar where stderr is not a terminal


def test_converting_twice_is_no_error_and_gives_the_same_model(moehive, checkpoint, tmp_path):
    first = moehive("convert", checkpoint, tmp_path / "out", "--name", "x")
    second = moehive("convert", checkpoint, tmp_path / "out", "--name", "x")

    assert second.code == 0
    assert second.out.split(":")[0] == first.out.split(":")[0]
    assert "nothing to do" in second.err


def test_a_directory_that_holds_something_else_is_refused(moehive, checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    outcome = moehive("convert", checkpoint, tmp_path)

    assert outcome.code == 2
    assert "thesis.tex" in outcome.err
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["thesis.tex"]


def test_a_source_that_is_no_checkpoint_is_refused(moehive, tmp_path):
    (tmp_path / "src").mkdir()

    outcome = moehive("convert", tmp_path / "src", tmp_path / "out")

    assert outcome.code == 2
    assert "config.json" in outcome.err


def test_a_full_disk_is_no_matter_of_a_budget_that_the_command_does_not_have(
    moehive, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("moehive.swarm.convert.converter.Disk.free", lambda *_: 2048)

    outcome = moehive("convert", checkpoint, tmp_path / "out")

    assert outcome.code == 1
    assert "2.0 KiB are free; make room" in outcome.err
    assert "--disk" not in outcome.err


def test_a_dense_model_is_refused(moehive, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "src")
    (tmp_path / "src" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')

    outcome = moehive("convert", tmp_path / "src", tmp_path / "out")

    assert outcome.code == 2
    assert "llama" in outcome.err.lower()


def test_inspect_for_people(moehive, converted):
    outcome = moehive("inspect", converted)

    assert outcome.code == 0
    for fact in ("Qwen3MoeForCausalLM", "to load one expert", "in the source", "every byte is as converted"):
        assert fact in outcome.out


def test_inspect_for_programs(moehive, converted):
    report = json.loads(moehive("inspect", converted, "--json").out)

    assert re.fullmatch("[0-9a-f]{64}", report["modelId"])
    assert report["shards"]["expert"]["count"] == len(report["moeLayers"]) * report["expertsPerLayer"]
    assert report["perExpert"]["reads"] == 1
    assert report["sourcePerExpert"]["reads"]["max"] >= 1
    assert (report["verified"], report["ok"], report["faults"]) == (True, True, [])


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_flipped_byte_is_found_named_and_fails(moehive, converted, tmp_path, form):
    shutil.copytree(converted, tmp_path / "model")
    victim = next((tmp_path / "model").rglob("*expert*.safetensors"), None) or max(
        (tmp_path / "model").rglob("*.safetensors")
    )
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)

    outcome = moehive("inspect", tmp_path / "model", *form)

    assert outcome.code == 1
    assert victim.name in outcome.out
    assert moehive("inspect", tmp_path / "model", "--no-verify", *form).code == 0


def test_inspecting_what_is_no_directory_says_so(moehive, tmp_path):
    (tmp_path / "README.md").touch()
    file, nothing = moehive("inspect", tmp_path / "README.md"), moehive("inspect", tmp_path / "nothing")

    assert (file.code, nothing.code) == (2, 2)
    assert f"{tmp_path / 'README.md'} is no directory" in file.err
    assert "Errno" not in file.err + nothing.err


def test_inspecting_something_else_says_so(moehive, checkpoint):
    outcome = moehive("inspect", checkpoint)

    assert outcome.code == 2
    assert "manifest.json is missing" in outcome.err
