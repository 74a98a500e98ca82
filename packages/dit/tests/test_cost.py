"""What --dry-run says a run costs, against what autograd keeps and what a step really takes."""

import json
from dataclasses import replace

import pytest
import torch
from triptych_common.parallel import Ranks
from triptych_common.testing import fails_with
from triptych_dit import PRESETS, DiTConfig, cost
from triptych_dit.cost import activation_bytes, available_bytes, step_bytes, within_memory
from triptych_dit.model import DiT
from triptych_dit.testing import run_dit
from triptych_dit.train_config import TRAIN_PRESETS

ALONE = Ranks(0, 1, torch.device("cpu"))


def kept_bytes(model: DiT, config: DiTConfig, images: int) -> int:
    """Bytes that autograd saves of a forward pass, besides the weights, each storage once."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # or another tensor might take its place
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    x, zeros = torch.zeros(images, config.in_channels, *config.input_size), torch.zeros(images, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x, zeros, zeros)
    return sum(storages.values())


@pytest.mark.parametrize("config", [PRESETS["digits"], replace(PRESETS["DiT-S/4"], depth=3)], ids=["digits", "S/4"])
def test_activations_are_what_autograd_keeps(config):
    model = DiT(config)
    an_image = (kept_bytes(model, config, 3) - kept_bytes(model, config, 1)) / 2
    assert activation_bytes(config) == pytest.approx(an_image, rel=0.05)


def test_a_batch_that_does_not_fit_is_refused_with_the_part_that_does(monkeypatch):
    config = replace(TRAIN_PRESETS["DiT-S/2"], batch_size=256)
    monkeypatch.setattr(cost, "available_bytes", lambda device: 8e9)
    with pytest.raises(
        ValueError, match=r"batch_size 256: a step takes about 29.8 GB, this machine has 8.0; pass"
    ) as error:
        within_memory(config, ALONE)
    part = int(str(error.value).split("--micro-batch ")[1].split(",")[0])
    assert step_bytes(replace(config, micro_batch=part), 1) < 8e9 < step_bytes(replace(config, micro_batch=4 * part), 1)
    within_memory(replace(config, micro_batch=part), ALONE)
    with pytest.raises(ValueError, match="choose a smaller model"):
        within_memory(TRAIN_PRESETS["DiT-XL/2"], ALONE)


def test_train_refuses_it_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_bytes", lambda device: 3e7)
    fails_with(
        run_dit("train", "--device", "cpu", "--out", tmp_path / "run"), "this machine has 0.0; pass --micro-batch"
    )
    assert not (tmp_path / "run").exists()


def test_dry_run_opens_the_data_and_estimates_memory_and_time():
    done = run_dit("train", "--preset", "digits-smoke", "--dry-run", "--json", "--device", "cpu")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["data"] == {"examples": 4000, "shape": [1, 28, 28], "classes": 10}
    assert result["estimate"]["images_per_second"] > 10
    assert 0 < result["estimate"]["gigabytes_of_a_step"] < result["estimate"]["gigabytes_there"]
    assert available_bytes(ALONE.device) > 1e9
    absent = run_dit("train", "--preset", "DiT-S/8", "--dry-run", "--json", "--device", "cpu", "--micro-batch", 1)
    assert json.loads(absent.stdout.splitlines()[-1])["data"] == "latents/imagenet-256: not there yet"


def test_dry_run_plans_for_a_larger_machine_too(monkeypatch):
    monkeypatch.setattr(cost, "available_bytes", lambda device: 8e9)
    done = run_dit("train", "--preset", "DiT-XL/2", "--dry-run", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "choose a smaller model" in json.loads(done.stdout.splitlines()[-1])["estimate"]["refused"]
