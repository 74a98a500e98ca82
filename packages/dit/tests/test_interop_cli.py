"""`triptych-dit export` as a user types it: there, and back, and elsewhere."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triptych_common.cli import located, main
from triptych_dit import PRESETS, DiT, from_diffusers, load_released
from triptych_dit.cli import COMMANDS
from triptych_dit.export import ExportConfig
from triptych_dit.testing import run_dit
from triptych_dit.weights import load_model, save_model

pytest.importorskip("diffusers")


@pytest.fixture
def run(tmp_path):
    """A finished run's folder."""
    torch.manual_seed(0)
    model = DiT(replace(PRESETS["digits-tiny"], depth=1))
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_model(tmp_path / "run" / "model.safetensors", model, {"predict": "noise", "autoencoder": None})
    return tmp_path / "run"


def export(*options):
    """The command in this process; returns its exit status."""
    return main("triptych-dit", COMMANDS, ["export", *map(str, options)])


def same(a, b):
    return a.config == b.config and all(
        torch.equal(a.state_dict()[name], tensor) for name, tensor in b.state_dict().items()
    )


def test_a_model_travels_to_diffusers_and_the_released_format_and_back(run, tmp_path, capsys):
    model = load_model(run).model
    (tmp_path / "names.json").write_text(json.dumps({"0": "zero, nought", "7": "seven"}))
    out = tmp_path / "diffusers"
    options = ["--checkpoint", run, "--out", out, "--labels-file", tmp_path / "names.json", "--json"]
    done = run_dit("export", *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["written"] == str(out)
    assert any("use_released_timesteps" in note for note in result["notes"])
    assert any("the model generates pixels, which DiTPipeline, made for latents, cannot" in n for n in result["notes"])
    assert not any("from_pretrained(folder, vae=" in note for note in result["notes"])
    assert json.loads((out / "model_index.json").read_text())["id2label"] == {"0": "zero, nought", "7": "seven"}
    assert same(from_diffusers(out), model)

    assert export("--checkpoint", out, "--format", "released", "--out", tmp_path / "released") == 0
    released = tmp_path / "released" / "model.pt"
    assert f"wrote {released}" in capsys.readouterr().out
    assert same(load_released(released, num_heads=2), model)

    assert export("--checkpoint", released, "--num-heads", 2, "--format", "triptych", "--out", tmp_path / "ours") == 0
    back = load_model(tmp_path / "ours")
    assert same(back.model, model)
    assert back.diffusion.predict == "noise"


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
    assert export("--checkpoint", run, "--out", tmp_path / "out", "--vae", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"autoencoder {tmp_path}: no config.json there" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "message"), [
    ({"format": "released", "scheduler": "x"}, "--scheduler is for --format diffusers, not released"),
    ({"format": "triptych", "labels_file": Path("x")}, "--labels-file is for --format diffusers"),
])  # fmt: skip
def test_options_of_another_format_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**options)


@pytest.mark.parametrize("text", ["[1]", "{", '{"zero": "0"}'])
def test_a_labels_file_that_is_none_is_one_line(run, tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ValueError, match="expected a JSON object of labels and names"):
        located(COMMANDS["export"].run)(
            ExportConfig(checkpoint=str(run), out=tmp_path / "out", labels_file=tmp_path / "names.json")
        )


def test_options_a_model_has_no_use_for_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="num_heads has no meaning here, since it is a model file of triptych's own"):
        located(COMMANDS["export"].run)(ExportConfig(checkpoint=str(run), out=tmp_path / "out", num_heads=2))
