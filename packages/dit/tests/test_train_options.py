"""Training beyond the digits: own images, no classes, fine-tuning, validation, precision, shards; the thesis's presets."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from triptych_common.data import ImageDataset
from triptych_common.parallel import Ranks
from triptych_common.randomness import generator
from triptych_common.storage import checkpoint, foreign
from triptych_common.testing import run_cli, run_torchrun
from triptych_dit import DiT, DiTConfig, load_model
from triptych_dit.interop import export_released
from triptych_dit.interop.training import read_training
from triptych_dit.objective import PixelData, check_same_kind
from triptych_dit.testing import random_model, run_dit
from triptych_dit.train import make_state
from triptych_dit.train_config import TRAIN_PRESETS
from triptych_dit.weights import LatentSpace, save_model

SHAPE = [
    "--model.depth", "2", "--model.hidden-size", "16", "--model.num-heads", "2", "--model.patch-size", "7",
    "--batch-size", "16", "--checkpoint-every", "8", "--log-every", "4", "--warmup-images", "0", "--snapshots",
]  # fmt: skip
TINY = ["--preset", "digits", *SHAPE, "--total-images", "128"]


def train(out: Path, *options: str) -> dict:
    done = run_cli("triptych_dit.cli", "train", *options, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def refused(*options: str, status: int = 1) -> str:
    done = run_dit("train", *options)
    assert done.returncode == status, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes of little pictures of various sizes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = generator(0, "pictures")
    for name in ("apples", "pears"):
        (root / name).mkdir()
        for i in range(6):
            height, width = torch.randint(28, 60, (2,), generator=rng).tolist()
            pixels = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "run"
    train(out, *TINY, "--validation-every", "4", "--validation-images", "64")
    return out


def test_a_run_goes_on_with_the_same_pictures_elsewhere_and_refuses_others(pictures, tmp_path):
    held = tmp_path / "held"
    for part in ("train", "val"):
        shutil.copytree(pictures, held / part)
    copy = shutil.copytree(held, tmp_path / "copy", copy_function=shutil.copyfile)  # with new times
    shape = ("--model.in-channels", "3", "--model.num-classes", "2", "--validation-every", "8", "--device", "cpu")
    options = [*TINY, *shape, "--out", str(tmp_path / "run")]

    def run(data: Path, validation: Path) -> tuple[str, ...]:
        return (*options, "--data", str(data), "--validation-data", str(validation))

    assert run_dit("train", *run(held, held)).returncode == 0
    assert run_dit("train", *run(copy, copy)).returncode == 0
    shutil.copy(copy / "val/pears/1.png", copy / "val/pears/2.png")
    changed = (
        f"{tmp_path / 'run'}: validation_data changed since it began: class pears: 6 pictures, not the same ones; put"
    )
    assert changed in refused(*run(held, copy))
    (copy / "train/apples").rename(copy / "train/quinces")
    (held / "train/apples").rename(held / "train/quinces")
    (held / "val/apples").rename(held / "val/quinces")
    changed = "data changed since it began: class names: was apples, pears; now pears, quinces; put back what was there"
    assert changed in refused(*run(copy, held))
    (held / "train/quinces").rename(held / "train/apples")
    (held / "val/quinces").rename(held / "val/apples")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config.pop("contents").keys() == {"data", "validation_data"}  # which earlier versions did not record
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert run_dit("train", *run(held, held)).returncode == 0


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_validation_is_on_the_same_noise_whatever_the_seed(digits, tmp_path):
    validated = [row for row in rows(digits) if "validation/mse" in row]
    assert [row["step"] for row in validated] == [4, 8]
    again = tmp_path / "again"
    train(again, *TINY, "--validation-every", "8", "--validation-images", "64", "--micro-batch", "5")
    last = [row for row in rows(again) if "validation/mse" in row][-1]
    assert last["validation/mse"] == pytest.approx(validated[-1]["validation/mse"], rel=1e-4)


def test_validation_equals_the_loss_computed_by_hand(digits):
    """Evenly spread timesteps on the held-out digits, with noise that the run's seed does not reach."""
    from triptych_common import data, randomness
    from triptych_dit.objective import VALIDATION_SEED

    trained, held_out, counters = load_model(digits), data.load("mnist5k", "held_out"), range(64)
    items = randomness.shuffled(VALIDATION_SEED, "order", counters, len(held_out))
    noise = randomness.normal(VALIDATION_SEED, "noise", counters, (1, 28, 28))
    t = (randomness.evenly_spread(VALIDATION_SEED, "timestep", counters) * 1000).long()
    labels = torch.where(randomness.uniform(VALIDATION_SEED, "label-drop", counters) < 0.1, 10, held_out.labels[items])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * held_out.scaled(items) + (1 - alpha_bar).sqrt() * noise
    with torch.inference_mode():
        error = (trained.model(x_t.float(), t, labels)[:, :1] - noise).square().mean()
    last = [row for row in rows(digits) if "validation/mse" in row][-1]
    assert last["validation/mse"] == pytest.approx(float(error), rel=1e-4)


def test_validation_is_on_the_same_classes_and_latents():
    def data(*names, **space):
        found = PixelData(
            ImageDataset("mine", "train", torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), 3, names)
        )
        found.facts["autoencoder"] = space and LatentSpace("a", **space).facts()
        return found

    ours = data("cat", "dog", "hen", scale_factor=0.5)
    check_same_kind(ours, data("cat", "dog", "hen", scale_factor=0.5))
    check_same_kind(ours, data("cat", "dog", "hen"))
    with pytest.raises(ValueError, match="mine has the classes hen, cat, dog, mine has cat, dog, hen"):
        check_same_kind(ours, data("hen", "cat", "dog", scale_factor=0.5))
    with pytest.raises(ValueError, match=r"latents of another autoencoder than mine: scale_factor is 0\.5, a has 0\.4"):
        check_same_kind(ours, data("cat", "dog", "hen", scale_factor=0.4))


def test_the_log_holds_throughput_arithmetic_and_memory(digits):
    row = [row for row in rows(digits) if "loss" in row][-1]
    assert row["time/images_per_second"] > 0
    assert row["time/tflops"] > 0
    assert row["memory/peak_bytes"] > 1e7


def test_own_pictures_at_a_rectangle_and_without_classes(pictures, tmp_path):
    size = ["--model.in-channels", "3", "--model.input-size", "28", "21"]
    options = [*TINY, "--data", str(pictures), *size, "--horizontal-flip"]
    train(tmp_path / "two", *options, "--model.num-classes", "2")
    assert load_model(tmp_path / "two").model.config.input_size == (28, 21)
    train(tmp_path / "none", *options, "--model.num-classes", "0")
    assert load_model(tmp_path / "none").model.y_embedder is None


def test_fine_tuning_takes_shape_from_the_file_and_classes_from_the_data(digits, pictures, tmp_path):
    gray = tmp_path / "gray"
    for path in pictures.glob("*/*.png"):
        (gray / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(gray / path.parent.name / path.name)
    result = train(tmp_path / "tuned", "--preset", "digits", "--init-from", str(digits), "--data", str(gray),
                   "--model.input-size", "14", "28", *SHAPE[8:], "--total-images", "32")  # fmt: skip
    model = load_model(Path(result["model"])).model
    assert (model.config.num_classes, model.config.input_size, model.config.hidden_size) == (2, (14, 28), 16)
    fates = json.loads((tmp_path / "tuned" / "init.json").read_text())["tensors"]
    assert fates["pos_embed"] == "computed for 2x4 tokens"
    assert fates["y_embedder.embedding_table.weight"] == "2 classes initialised, null row copied"
    assert fates["blocks.1.mlp.fc1.weight"] == "copied"


def test_fine_tuning_starts_where_the_other_run_ended(digits, tmp_path):
    train(tmp_path / "on", "--preset", "digits", "--init-from", str(digits), *SHAPE[8:], "--total-images", "16")
    tensors, _ = checkpoint.read(tmp_path / "on" / "checkpoints" / "step-00000000.safetensors")
    for name, tensor in load_model(digits).model.state_dict().items():
        assert torch.equal(tensors[f"model.{name}"], tensor)
        assert torch.equal(tensors[f"ema.{name}"], tensor)


def test_fine_tuning_goes_on_predicting_what_the_model_predicts(digits, tmp_path):
    """A model of another prediction is one of another task; a file that does not say is what --predict says."""
    trained = load_model(digits)
    save_model(tmp_path / "sample", trained.model, {**trained.facts, "predict": "sample"})
    start = ["--preset", "digits", "--init-from", str(tmp_path / "sample"), *SHAPE[8:], "--total-images", "16"]
    done = run_dit("train", *start, "--dry-run", "--json")
    assert json.loads(done.stdout.splitlines()[-1])["config"]["predict"] == "sample"
    line = refused(*start, "--predict", "noise", "--out", str(tmp_path / "x"))
    assert "predicts the sample, as its files say; leave --predict noise out" in line
    export_released(trained.model, tmp_path / "facts.pt", {"predict": "sample"})
    foreign.write(tmp_path / "bare.pt", foreign.read(tmp_path / "facts.pt")["ema"])
    for name, options in (("facts.pt", []), ("bare.pt", ["--predict", "sample"])):
        start[3] = str(tmp_path / name)
        done = run_dit("train", *start, "--num-heads", "2", *options, "--dry-run", "--json")
        config = json.loads(done.stdout.splitlines()[-1])["config"]
        assert (config["predict"], config["model"]["num_heads"], config["model"]["hidden_size"]) == ("sample", 2, 16)
    assert "pass num_heads" in refused(*start, "--dry-run")


def test_a_published_training_run_goes_on_where_it_stopped(tmp_path):
    """{model, ema, opt, args} of the released train.py; the next step is that of AdamW's formulas."""
    config = replace(
        TRAIN_PRESETS["digits"], model=DiTConfig((28, 28), 1, 7, 16, 2, 2, num_classes=10), precision="float32"
    )
    theirs = random_model(config.model, dtype=torch.float32, trainable=True)
    theirs.pos_embed.requires_grad_(False)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=rng) if p.requires_grad else None
        optimizer.step()
    average = random_model(config.model, dtype=torch.float32, seed=1)
    content = {"model": {f"module.{name}": x for name, x in theirs.state_dict().items()}, "ema": average.state_dict()}
    args = argparse.Namespace(model="DiT-S/2", num_classes=10)
    torch.save({**content, "opt": optimizer.state_dict(), "args": args}, tmp_path / "0000003.pt")
    config = replace(config, init_from=str(tmp_path / "0000003.pt"), num_heads=2, continue_optimizer=True, adam_beta2=0.999,
                     lr=1e-3, warmup_images=0, lr_schedule="constant", grad_clip=None)  # fmt: skip
    state = make_state(config, Ranks(0, 1, torch.device("cpu")))
    for name, tensor in state.ema.state_dict().items():
        assert torch.equal(tensor, average.state_dict()[name])
    before, moments = dict(theirs.state_dict()), {name: optimizer.state[p] for name, p in theirs.named_parameters()}
    gradients = {name: torch.randn(p.shape, generator=rng) for name, p in theirs.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in before.items()}
    for name, p in state.model.named_parameters():
        assert torch.equal(p, before[name])
        p.grad = gradients.get(name)
    state.optimise()
    for name, gradient in gradients.items():
        m = 0.9 * moments[name]["exp_avg"] + 0.1 * gradient
        v = 0.999 * moments[name]["exp_avg_sq"] + 0.001 * gradient**2
        step = 1e-3 * (m / (1 - 0.9**4)) / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
        torch.testing.assert_close(state.model.state_dict()[name], before[name] - step, rtol=1e-5, atol=1e-6)
    torch.save(content, tmp_path / "0000003.pt")
    with pytest.raises(ValueError, match=r"continue_optimizer: not with .* --parallel fsdp; leave one out"):
        replace(config, parallel="fsdp")
    with pytest.raises(ValueError, match="no training checkpoint of facebookresearch/DiT with `opt`; leave"):
        read_training(tmp_path, DiT(config.model))
    with pytest.raises(ValueError, match=r"0000003.pt: has no state of AdamW as `opt`; leave --continue-optimizer out"):
        make_state(config, Ranks(0, 1, torch.device("cpu")))


def test_fine_tuning_another_shape_is_refused(digits, tmp_path):
    line = refused("--preset", "digits", "--init-from", str(digits), "--model.depth", "3", "--out", str(tmp_path / "x"))
    assert "depth 3 (there 2)" in line


def test_bf16_trains_float32_weights_close_to_float32(tmp_path, digits):
    train(tmp_path / "bf16", *TINY, "--precision", "bf16")
    tensors, _ = checkpoint.read(tmp_path / "bf16" / "checkpoints" / "step-00000008.safetensors")
    assert {value.dtype for name, value in tensors.items() if name.startswith(("model.", "ema."))} == {torch.float32}
    ours, theirs = ([row["loss"] for row in rows(out) if "loss" in row] for out in (tmp_path / "bf16", digits))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours != theirs


def test_shards_on_two_ranks_give_the_weights_of_one(tmp_path):
    options = [*TINY, "--precision", "float64", "--parallel", "fsdp", "--activation-checkpointing", "--micro-batch", "4",
               "--validation-every", "8", "--validation-images", "32"]  # fmt: skip
    train(tmp_path / "one", *options)
    done = run_torchrun(2, "triptych_dit.cli", "train", *options, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = load_model(tmp_path / "one").model.state_dict(), load_model(tmp_path / "two").model.state_dict()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-10)
    (a,), (b,) = ([row for row in rows(tmp_path / out) if "validation/mse" in row] for out in ("one", "two"))
    assert a["validation/mse"] == pytest.approx(b["validation/mse"], rel=1e-9)


def test_presets_of_the_thesis_are_its_settings():
    runs = {name: preset for name, preset in TRAIN_PRESETS.items() if name.startswith("DiT-")}
    assert len(runs) == 12 + 3 + 1
    assert runs["DiT-XL/2"].total_images == 7_000_000 * 256
    assert runs["DiT-XL/2@512"].total_images == 3_000_000 * 256
    assert runs["DiT-B/4"].total_images == runs["DiT-XL/2-in-context"].total_images == 400_000 * 256
    for preset in runs.values():
        assert (preset.lr, preset.lr_schedule, preset.warmup_images, preset.weight_decay) == (1e-4, "constant", 0, 0.0)
        assert (preset.batch_size, preset.grad_clip, preset.horizontal_flip) == (256, None, True)
        assert (preset.timesteps, preset.embedding_init, preset.predict) == ("uniform", "released", "noise")
        assert 0.5 ** (256 / preset.ema_half_life_images) == pytest.approx(0.9999, abs=1e-7)
        assert preset.ema_rampup is None


@pytest.mark.parametrize(("options", "message"), [
    (["--data", "no/such/place"], "no/such/place"),
    (["--validation-every", "4", "--validation-data", "no/such/place"], "no/such/place"),
    (["--init-from", "no/such/model"], "no/such/model"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(options, message, tmp_path):
    assert message in refused(*TINY, *options, "--out", str(tmp_path / "run"))


def test_a_new_class_table_is_for_fine_tuning(tmp_path):
    assert "pass --init-from too" in refused(*TINY, "--new-class-table", "--out", str(tmp_path / "run"), status=2)
