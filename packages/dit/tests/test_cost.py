"""What --dry-run says a run costs, against what autograd keeps and what a step really takes."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from triptych_common import cost
from triptych_common.cost import Memory, available_bytes
from triptych_common.parallel import Ranks
from triptych_common.testing import fails_with
from triptych_dit import PRESETS
from triptych_dit import cost as dit_cost
from triptych_dit.cost import activation_bytes, encoding_bytes, sampling_bytes, step_cost
from triptych_dit.model import DiT
from triptych_dit.testing import random_vae, run_dit
from triptych_dit.train_config import TRAIN_PRESETS
from triptych_dit.weights import save_model

ALONE = Ranks(0, 1, torch.device("cpu"))


def kept_bytes(network: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """What autograd keeps of a forward pass, besides the parameters: each storage once."""
    storages = {p.untyped_storage().data_ptr(): 0 for p in network.parameters()}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # or another tensor might take its place
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(*inputs)
    return sum(storages.values())


@pytest.mark.parametrize("config", [PRESETS["digits"], replace(PRESETS["DiT-S/4"], depth=3)], ids=["digits", "S/4"])
def test_activations_are_what_autograd_keeps(config):
    model = DiT(config)
    one, three = (
        kept_bytes(model, torch.zeros(n, config.in_channels, *config.input_size), zeros, zeros)
        for n, zeros in ((n, torch.zeros(n, dtype=torch.long)) for n in (1, 3))
    )
    an_image = (three - one) / 2
    assert activation_bytes(config) == pytest.approx(an_image, rel=0.05)


def test_a_batch_that_does_not_fit_is_refused_with_the_part_that_does(monkeypatch):
    config = replace(TRAIN_PRESETS["DiT-S/2"], batch_size=256)
    monkeypatch.setattr(cost, "available_bytes", lambda device: 8e9)
    with pytest.raises(
        ValueError, match=r"batch_size 256: a step takes about 29.8 GB, this machine has 8.0; pass"
    ) as error:
        step_cost(config, ALONE).check(config, ALONE)
    part = int(str(error.value).split("--micro-batch ")[1].split(",")[0])
    assert step_cost(config, ALONE).step_bytes(part) < 8e9 < step_cost(config, ALONE).step_bytes(4 * part)
    step_cost(config, ALONE).check(replace(config, micro_batch=part), ALONE)
    with pytest.raises(ValueError, match="choose a smaller model"):
        step_cost(TRAIN_PRESETS["DiT-XL/2"], ALONE).check(TRAIN_PRESETS["DiT-XL/2"], ALONE)


def test_train_refuses_it_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "available_bytes", lambda device: 3e7)
    fails_with(
        run_dit("train", "--device", "cpu", "--out", tmp_path / "run"), "this machine has 0.0; pass --micro-batch"
    )
    assert not (tmp_path / "run").exists()


def an_image(forward: Callable[[int], object]) -> float:
    """Bytes that one more image takes."""
    most = []
    for images in (2, 4):
        with torch.inference_mode(), Memory() as memory:
            forward(images)
        most.append(max(memory.history))
    return (most[1] - most[0]) / 2


def test_sampling_and_encoding_take_what_is_computed():
    config = replace(PRESETS["DiT-S/4"], depth=2)
    model = DiT(config).eval()

    def network(n: int) -> torch.Tensor:
        zeros = torch.zeros(n, dtype=torch.long)
        return model(torch.zeros(n, 4, 32, 32), zeros, zeros)

    found = sampling_bytes(config, 3) - sampling_bytes(config, 2)
    assert found == pytest.approx(an_image(network), rel=0.1)
    vae = random_vae((16, 32, 64), latent_channels=4, layers_per_block=2)
    found = encoding_bytes(16, 32 * 32, 1)
    assert found == pytest.approx(an_image(lambda n: vae.encode(torch.zeros(n, 3, 32, 32))), rel=0.05)


def test_sample_and_encode_refuse_a_batch_that_does_not_fit(tmp_path, monkeypatch):
    save_model(tmp_path / "model.safetensors", DiT(PRESETS["digits-tiny"]), {"predict": "noise"})
    random_vae((16, 32), latent_channels=4, in_channels=1, out_channels=1).save_pretrained(tmp_path / "vae")
    sampled = (
        "sample",
        "--checkpoint",
        tmp_path / "model.safetensors",
        "--device",
        "cpu",
        "--out",
        tmp_path / "samples",
    )
    encoded = ("encode", "--no-flips", "--vae", tmp_path / "vae", "--image-size", 28, "--workers", 0, "--device", "cpu")
    encoded = (*encoded, "--out", tmp_path / "cache")
    monkeypatch.setattr(dit_cost, "available_bytes", lambda device: 2e6)
    for words, what in ((sampled, "100 images at once: sampling"), (encoded, "64 images at once: encoding")):
        refused = run_dit(*words)
        fails_with(refused, f"{what} takes about 0.0 GB, this machine has 0.0; pass --batch-size ")
        assert not words[-1].exists()
    part = refused.stderr.split("--batch-size ")[1].split(",")[0]
    assert run_dit(*encoded, "--batch-size", part).returncode == 0


def test_autoencoder_says_what_it_costs_and_refuses_what_does_not_fit(tmp_path, monkeypatch):
    words = ("autoencoder", "--preset", "digits-smoke", "--device", "cpu", "--json", "--out", tmp_path / "run")
    found = json.loads(run_dit(*words, "--dry-run").stdout.splitlines()[-1])
    assert found["data"] == {"examples": 4000, "shape": [1, 28, 28]}
    assert found["estimate"]["images_per_second"] > 10
    assert 0 < found["estimate"]["gigabytes_of_a_step"] < found["estimate"]["gigabytes_there"]
    monkeypatch.setattr(cost, "available_bytes", lambda device: 1e7)
    fails_with(
        run_dit(*words),
        "batch_size 16: a step takes about 0.0 GB, this machine has 0.0; pass --micro-batch 4",
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
