"""The commands info, verify and export, as a user types them."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from triptych_common.cli import Command, main
from triptych_common.storage import checkpoint
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.zoo.inspect import ExportConfig, InfoConfig, VerifyConfig, export, info, verify
from triptych_gpt.zoo.store import CohortData, Manifest

COMMANDS = {
    "info": Command("", InfoConfig, info, writes="nothing"),
    "verify": Command("", VerifyConfig, verify, writes="nothing"),
    "export": Command("", ExportConfig, export, writes="file"),
}
CHECKPOINTS = 5


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


LAYOUT = ParameterLayout.of(network())


def cohort(runs: range, split: str, dropped: dict[int, str]) -> CohortData:
    kept = torch.tensor([run for run in runs if run not in dropped])
    loss = kept.view(-1, 1) + torch.tensor([9.0, 5.0, 2.0, 1.0, 3.0])
    metrics = {"loss": loss, "return": 100 * kept.view(-1, 1) - loss}
    steps = torch.arange(CHECKPOINTS).expand(len(kept), -1) * 10
    return CohortData(kept.tolist(), theta_of(kept), steps, metrics, {"split": split}, dropped)


@pytest.fixture
def zoo(tmp_path, write_zoo):
    """Runs 0..5 in two shards, 2 dropped; losses fall but for the last checkpoint, returns rise."""
    cohorts = cohort(range(4), "train", {2: "|theta| > 10"}), cohort(range(4, 6), "test", {})
    return write_zoo(tmp_path / "zoo", LAYOUT, {"loss": "lower", "return": "higher"}, *cohorts).folder


def theta_of(runs):
    number = runs.view(-1, 1) * 10.0 + torch.arange(CHECKPOINTS)
    return number.unsqueeze(-1) + torch.arange(LAYOUT.size) / 64


def run(capsys, *words):
    status = main("triptych-gpt", COMMANDS, [str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_info_counts_and_quantiles(zoo, capsys):
    status, out, err = run(capsys, "info", "--zoo", zoo, "--json")
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert result["runs"] == {"test": 2, "train": 3}
    assert result["dropped"] == {"|theta| > 10": 1}
    assert (result["checkpoints"], result["parameters"], result["shards"]) == (25, LAYOUT.size, 2)
    assert result["bytes"] == sum(path.stat().st_size for path in (zoo / "shards").iterdir())
    assert result["bytes_per_checkpoint"] == result["bytes"] / 25
    kept = np.array([0, 1, 3, 4, 5])
    for moment, offset in (("initial", 9), ("final", 3), ("best", 1)):
        expected = np.quantile(kept + offset, result["quantiles"])
        assert result["metrics"]["loss"][moment] == pytest.approx(expected)
        assert result["metrics"]["return"][moment] == pytest.approx(
            np.quantile(99 * kept - offset, result["quantiles"])
        )
    assert "3 train" in err
    assert "|theta| > 10: 1" in err


def test_info_of_an_empty_zoo(tmp_path, capsys):
    facts = {
        "task": "tiny",
        "layout": LAYOUT.to_json(),
        "checkpoints": 2,
        "dtype": "float32",
        "metrics": {"loss": "lower"},
    }
    Manifest.create(tmp_path, facts)
    status, out, _ = run(capsys, "info", "--zoo", tmp_path)
    assert status == 0
    assert "none yet" in out


def test_verify_lists_all_damage_and_fails_with_one_line(zoo, capsys):
    assert run(capsys, "verify", "--zoo", zoo)[0] == 0
    damaged = [zoo / "shards" / f"runs-00000000-00000003.{suffix}" for suffix in ("safetensors", "parquet")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    (zoo / "shards" / "runs-00000004-00000005.parquet").unlink()
    status, out, err = run(capsys, "verify", "--zoo", zoo)
    assert status == 1
    assert len([line for line in out.splitlines() if "contents differ" in line]) == 2
    assert "runs-00000004-00000005.parquet: missing" in out
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        f"error: {zoo}: 2 of 2 shards damaged; run triptych-gpt collect tiny --repair --out {zoo}"
    ]


@pytest.mark.parametrize(
    ("which", "place"), [("-1", 4), ("0", 0), ("-5", 0), ("3", 3), ("best:loss", 3), ("best:return", 3)]
)
def test_an_exported_checkpoint_loads_strictly(zoo, tmp_path, capsys, which, place):
    out = tmp_path / "net.safetensors"
    status, _, err = run(capsys, "export", "--zoo", zoo, "--run", 3, "--checkpoint", which, "--out", out)
    assert status == 0, err
    loaded = network()
    loaded.load_state_dict(load_file(out), strict=True)
    assert torch.equal(LAYOUT.flatten(loaded.state_dict()), theta_of(torch.tensor([3]))[0, place])
    _, state = checkpoint.read(out)
    loss = 3 + [9.0, 5.0, 2.0, 1.0, 3.0][place]
    metrics = {"loss": loss, "return": 300 - loss}
    printed = {"task": "tiny", "run": 3, "split": "train", "checkpoint": place, "step": 10 * place, "metrics": metrics}
    assert state == {"kind": "state dict", **printed}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_torch_file_loads_without_unpickling_anything_else(zoo, tmp_path, capsys, suffix):
    out = tmp_path / f"net{suffix}"
    assert run(capsys, "export", "--zoo", zoo, "--run", 5, "--out", out)[0] == 0
    loaded = network()
    loaded.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert torch.equal(LAYOUT.flatten(loaded.state_dict()), theta_of(torch.tensor([5]))[0, -1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "6"], "run 6: not in {zoo}, which holds runs 0..5, 5 of them"),
        (["--run", "-1"], "run -1: not in {zoo}, which holds runs 0..5, 5 of them"),
        (["--run", "2"], "run 2: dropped when {zoo} was made (|theta| > 10); choose another"),
        (["--checkpoint", "5"], "checkpoint '5': expected 0..4, -5..-1 from the end, or best:loss, best:return"),
        (["--checkpoint", "-6"], "checkpoint '-6': expected 0..4"),
        (["--checkpoint", "last"], "checkpoint 'last': expected 0..4"),
        (["--checkpoint", "best:error"], "metric 'error': expected one of loss, return"),
    ],
)
def test_wrong_requests_are_one_line(zoo, tmp_path, capsys, options, message):
    out = tmp_path / "net.safetensors"
    status, _, err = run(capsys, "export", "--zoo", zoo, "--out", out, *options)
    assert status == 1
    assert err.count("\n") == 1
    assert err.startswith("error: " + message.format(zoo=zoo))
    assert not out.exists()


def test_a_file_of_unknown_kind_is_refused_as_an_option(zoo, capsys):
    with pytest.raises(SystemExit):
        run(capsys, "export", "--zoo", zoo, "--out", "net.zip")
    err = capsys.readouterr().err
    assert "out net.zip: expected a file ending in .safetensors, .pt or .pth" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_without_a_zoo_every_command_is_one_line(tmp_path, capsys, command):
    status, _, err = run(capsys, command, "--zoo", tmp_path)
    assert status == 1
    assert err == (
        f"error: {tmp_path}: no zoo (it holds no manifest.json); make one with triptych-gpt collect --out {tmp_path}\n"
    )
