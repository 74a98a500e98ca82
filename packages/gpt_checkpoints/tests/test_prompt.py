"""Prompting: a user's network in, networks with the printed metrics out; sampling, model files and released models."""

import json
import os
import pickle
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from triptych_common import data, randomness, testing
from triptych_common.storage import checkpoint
from triptych_common.testing import run_cli, run_here
from triptych_gpt import Gpt, GptConfig, SamplerSettings, TrainedGpt, cli, convert, interop, load, open_task, prompt
from triptych_gpt.interop import export_released
from triptych_gpt.model import write_model
from triptych_gpt.prompting import OutsideTrainedRange, UpdatesRejected, theta_of

pytestmark = pytest.mark.filterwarnings("ignore:tokens of up to")
FEW = ["--num-inference-steps", "3"]
QUIET = ("denoising:", "warning: tokens of")  # lines that are expected besides

command = partial(run_here, cli.run)
fails_with = partial(testing.fails_with, quiet=QUIET)


@pytest.fixture(scope="module")
def model(place) -> Path:
    return place / "gpt"


@pytest.fixture(scope="module")
def gpt(model) -> TrainedGpt:
    return load(model)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A user's network, saved as users do."""
    path = tmp_path_factory.mktemp("network") / "net.pt"
    torch.save(perceptron(5).state_dict(), path)
    return path


def perceptron(seed: int = 0) -> nn.Sequential:
    """The task's architecture, written out here."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = {"fc1": nn.Linear(196, 10), "relu": nn.ReLU(), "fc2": nn.Linear(10, 10)}
        return nn.Sequential(OrderedDict(layers))


def scores_by_hand(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss and error of a state dict on the task's test digits, by modules and in float64."""
    network = perceptron()
    network.load_state_dict(state)
    network.double()
    digits = data.load("mnist5k", "held_out")
    pixels = digits.images.double().view(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    with torch.no_grad():
        logits = network(((pixels - 0.1307) / 0.3081).flatten(1))
    return {
        "test_loss": float(F.cross_entropy(logits, digits.labels)),
        "test_error": float((logits.argmax(1) != digits.labels).double().mean()),
    }


# --- the command


def test_a_network_goes_in_and_networks_that_achieve_the_prompt_come_out(model, tmp_path):
    """The command itself, in a process of its own."""
    torch.save(perceptron(5).state_dict(), tmp_path / "net.pt")
    words = ["prompt", "--checkpoint", "net.pt", "--target", "test_loss=0.3", "--model", str(model), "--samples", "2",
             "--recursive", "2", "--out", "new", "--json", *FEW]  # fmt: skip
    done = run_cli("triptych_gpt.cli", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["metric"], result["asked"]) == ("test_loss", 0.3)
    assert result["start"] == pytest.approx(scores_by_hand(torch.load(tmp_path / "net.pt"))["test_loss"], rel=1e-5)
    assert [Path(one["file"]).name for one in result["networks"]] == ["net-000.safetensors", "net-001.safetensors"]
    low, high = load(model).trained_range
    outside = f"warning: target test_loss=0.3: outside {low:.4g}..{high:.4g}, the range of the training checkpoints"
    assert any(line.startswith(outside) for line in done.stderr.splitlines())
    for one in result["networks"]:
        tensors, facts = checkpoint.read(tmp_path / one["file"])
        by_hand = scores_by_hand(tensors)
        for name, value in by_hand.items():
            assert one["achieved"][name] == pytest.approx(value, rel=1e-5)
        assert len(one["path"]) == 3
        assert one["path"][0] == result["start"]
        assert one["path"][-1] == one["achieved"]["test_loss"]
        assert facts["achieved"] == one["achieved"]
        line = next(line for line in done.stderr.splitlines() if Path(one["file"]).name in line)
        assert f"test_loss {one['path'][1]:.4g} -> {one['path'][2]:.4g}" in line
    assert result["networks"][0]["path"][1] != result["networks"][1]["path"][1]  # each from noise of its own
    written = json.loads((tmp_path / "new" / "prompt.json").read_text())
    assert written.items() >= result.items()
    assert written["commit"]


def test_inside_the_range_there_is_no_warning_and_the_first_update_is_a_single_one(model, gpt, network, tmp_path):
    asked = sum(gpt.trained_range) / 2
    words = [
        "prompt",
        "--checkpoint",
        network,
        "--target",
        f"test_loss={asked}",
        "--model",
        model / "model.safetensors",
    ]
    done = command(*words, *FEW, "--out", tmp_path / "one", "--json")
    twice = command(*words, *FEW, "--out", tmp_path / "two", "--json", "--recursive", "2")
    assert (done.returncode, twice.returncode) == (0, 0)
    assert "warning" not in done.stderr
    assert json.loads(done.stdout)["networks"][0]["path"] == json.loads(twice.stdout)["networks"][0]["path"][:2]
    by_hand = gpt.sample(
        theta_of(network, gpt.task.layout)[None], torch.tensor([json.loads(done.stdout)["start"]]), torch.tensor([asked]),
        settings=SamplerSettings(num_inference_steps=3), indices=[0],
    )  # fmt: skip
    tensors, _ = checkpoint.read(tmp_path / "one" / "net-000.safetensors")
    assert torch.equal(gpt.task.layout.flatten(tensors), by_hand[0])


def test_pickles_are_written_for_torch_load(model, network, tmp_path):
    words = ["prompt", "--checkpoint", network, "--target", "test_loss=2", "--model", model, *FEW, "--out", tmp_path]
    done = command(*words, "--pickle", "--json")
    assert done.returncode == 0, done.stderr
    achieved = json.loads(done.stdout)["networks"][0]["achieved"]
    state = torch.load(tmp_path / "net-000.pt", weights_only=True)
    assert scores_by_hand(state)["test_loss"] == pytest.approx(achieved["test_loss"], rel=1e-5)
    again = command(*[tmp_path / "net-000.pt" if word == network else word for word in words], "--json")
    assert json.loads(again.stdout)["start"] == pytest.approx(
        achieved["test_loss"], rel=1e-6
    )  # what it writes it reads


def test_without_a_checkpoint_a_random_network_is_prompted(model, gpt, tmp_path):
    words = ["prompt", "--target", "test_loss=2", "--model", model, *FEW, "--out", tmp_path, "--json", "--seed", "3"]
    done = command(*words, "--initialiser", "xavier_normal")
    assert done.returncode == 0, done.stderr
    start = gpt.task.evaluate(gpt.task.initial(3, [0], "xavier_normal"))["test_loss"]
    assert json.loads(done.stdout)["start"] == pytest.approx(float(start))
    fails_with(command(*words, "--initialiser", "zeros"), "initialiser 'zeros': expected one of default, ", 1)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    torch.save({"fc1.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "bare.pt"):
        words = ["prompt", "--checkpoint", tmp_path / name, "--target", "test_loss=2", "--model", model]
        fails_with(command(*words, "--out", tmp_path / "new"), f"{name}: ")
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "new").exists()


def spoiled(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = {**perceptron().state_dict(), **{name.replace("_", "."): value for name, value in changes.items()}}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(("state", "message"), [
    (spoiled(fc1_weight=torch.zeros(12, 196), fc1_bias=torch.zeros(12)),
     "net.pt: fc1.weight: shape (12, 196) in the state dict, the layout expects (10, 196)"),
    (spoiled(fc2_bias=None), "net.pt: fc2.bias: absent from the state dict"),
    (spoiled(fc3_bias=torch.zeros(2)), "net.pt: fc3.bias: not in the layout"),
    (spoiled(fc1_bias=torch.tensor([0.0] * 9 + [torch.nan])), "net.pt: fc1.bias: 1 of 10 entries are not finite"),
    ({name: torch.stack([value] * 2) for name, value in spoiled().items()}, "several networks stacked"),
    (spoiled(fc1_weight=torch.zeros(10, 196, dtype=torch.complex64)), "net.pt: fc1.weight: entries are complex64; give"),
    (spoiled(fc1_weight=torch.zeros(10, 196, dtype=torch.int64)), "net.pt: fc1.weight: entries are int64; give"),
    (spoiled(fc1_bias=torch.full((10,), 1e300, dtype=torch.float64)), "net.pt: fc1.bias: 10 of 10 entries are not finite"),
    ({name: value * 1e30 for name, value in spoiled().items()}, "test_loss is not finite, though its weights are"),
    ({"state_dict": spoiled(fc2_bias=None)}, "net.pt: fc2.bias: absent from the state dict"),
    ({"first": spoiled(), "raw": spoiled()}, "net.pt: holds several networks (first, raw); save the one"),
    ({"state_dict": {"layers": 3}}, "net.pt: not a state dict"),
    ([1, 2], "net.pt: holds a list, expected a state dict"),
    ({}, "net.pt: not a state dict"),
])  # fmt: skip
def test_a_network_that_does_not_fit_is_one_clear_line(model, tmp_path, state, message):
    torch.save(state, tmp_path / "net.pt")
    words = ["prompt", "--checkpoint", tmp_path / "net.pt", "--target", "test_loss=2", "--model", model]
    fails_with(command(*words, "--out", tmp_path / "new"), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("wrapped", "entry"), [
    ({"state_dict": perceptron(5).state_dict(), "epoch": 3}, "state_dict"),
    ({"ema": perceptron(6).state_dict(), "model": perceptron(5).state_dict(), "step": torch.tensor(3)}, "model"),
    ({"weights": perceptron(5).state_dict(), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, "weights"),
    ({"state_dict": {f"net._orig_mod.{k}": v for k, v in perceptron(5).state_dict().items()}, "rng": torch.get_rng_state(),
      "hyper_parameters": {"out": Path("runs/a")}, "best": np.float64(0.1)}, "state_dict.net"),
])  # fmt: skip
def test_a_state_dict_among_other_things_is_found(gpt, tmp_path, wrapped, entry):
    torch.save(wrapped, tmp_path / "net.pt")
    with pytest.warns(UserWarning, match=f"net.pt: the network is its entry '{entry}'"):
        theta = theta_of(tmp_path / "net.pt", gpt.task.layout)
    assert torch.equal(theta, gpt.task.layout.flatten(perceptron(5).state_dict()))


@pytest.mark.parametrize(("options", "status", "message"), [
    (["--target", "test_error=0.1"], 1, "this model was trained for test_loss; ask for test_loss=VALUE"),
    (["--target", "test_loss=nan"], 1, "target test_loss=nan: expected a finite number"),
    (["--target", "test_loss"], 2, "target 'test_loss': expected METRIC=VALUE"),
    (["--target", "test_loss=good"], 2, "target 'test_loss=good': expected METRIC=VALUE"),
    ([], 1, "no target: give the metric to achieve, such as --target test_loss=0.3"),
    (["--target", "test_loss=2", "--model", "nowhere"], 1, "nowhere: no such file or folder; expected a trained G.pt"),
    (["--target", "test_loss=2", "--model", "/nope"], 1, "triptych-gpt train --out FOLDER makes model.safetensors"),
    (["--target", "test_loss=2", "--model", "."], 1, "no trained model; make one with triptych-gpt train"),
    (["--target", "test_loss=2", "--model", "net.safetensors"], 1, "checkpoints; expected a trained G.pt (triptych-gpt"),
    (["--target", "test_loss=2", "--model", "other.safetensors"], 1, "not a G.pt's model file but a state dict; triptych-gpt"),
    (["--target", "test_loss=2", "--checkpoint", "nowhere.pt"], 1, "nowhere.pt: no such file; expected one network's"),
    (["--target", "test_loss=2", "--checkpoint", "/tmp"], 1, "/tmp: a folder; expected one network's state dict"),
    (["--target", "test_loss=2", "--checkpoint", "/tmp"], 1, "and triptych-gpt export one of a zoo's"),
    (["--target", "test_loss=2", "--initialiser", "default"], 2, "initialiser 'default': draws a random network, but"),
    (["--target", "test_loss=2", "--sampler", "magic"], 2, "magic"),
    (["--target", "test_loss=2", "--num-inference-steps", "1001"], 2, "num_inference_steps 1001: expected 1..1000"),
    (["--target", "test_loss=2", "--samples", "0"], 2, "samples 0: expected at least 1"),
    (["--target", "test_loss=2", "--recursive", "0"], 2, "recursive 0: expected at least 1"),
    (["--target", "test_loss=2", "--device", "tpu"], 1, "device 'tpu': not available here"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(model, network, tmp_path, monkeypatch, options, status, message):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file(perceptron().state_dict(), tmp_path / "net.safetensors")
    checkpoint.write(tmp_path / "other.safetensors", perceptron().state_dict(), {"kind": "state dict"})
    defaults = {"--model": model, "--checkpoint": network}
    extra = [word for name, value in defaults.items() if name not in options for word in (name, value)]
    fails_with(command("prompt", *extra, *FEW, *options), message, status)
    assert not (tmp_path / "runs").exists()


def test_a_full_folder_and_a_damaged_model_are_one_line(model, network, tmp_path):
    content = (model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    words = ["prompt", "--checkpoint", network, "--target", "test_loss=2", *FEW]
    fails_with(command(*words, "--model", tmp_path), "truncated or not a safetensors file")
    fails_with(command(*words, "--model", model, "--out", "/proc/nowhere"), "cannot be written")


# --- the Python API


def test_public_names_are_what_they_say_whichever_module_was_imported_first():
    import triptych_gpt.prompting
    import triptych_gpt.symmetry.derivation

    for name in triptych_gpt.__all__:
        assert not isinstance(getattr(triptych_gpt, name), ModuleType), name
    assert triptych_gpt.prompt is prompt


def test_three_lines_of_python_do_it(model):
    answer = prompt(load(model), perceptron(5), test_loss=2.0)[0]
    assert scores_by_hand(answer.state_dict)["test_loss"] == pytest.approx(answer.achieved["test_loss"], rel=1e-5)
    assert answer.path[-1] == answer.achieved["test_loss"]


def test_sample_zero_is_the_same_whatever_else_is_made(gpt, network):
    few = SamplerSettings(num_inference_steps=3)
    alone = prompt(gpt, network, settings=few, test_loss=2.0)[0]
    several = prompt(gpt, network, settings=few, samples=5, test_loss=2.0)
    parts = prompt(gpt, network, settings=SamplerSettings("ddpm", 3, networks_at_once=2), samples=5, test_loss=2.0)
    torch.testing.assert_close(several[0].theta, alone.theta, rtol=0, atol=1e-5)
    for one, other in zip(several, parts, strict=True):
        torch.testing.assert_close(one.theta, other.theta, rtol=0, atol=1e-5)
    assert (several[1].theta - alone.theta).norm() > 1e-2


def test_a_prompt_outside_the_trained_range_warns_and_goes_on(gpt, network):
    few = SamplerSettings(num_inference_steps=1)
    with pytest.warns(OutsideTrainedRange, match=re.escape(f"outside {gpt.trained_range[0]:.4g}..")):
        assert len(prompt(gpt, network, settings=few, test_loss=gpt.trained_range[0] - 0.01)) == 1
    with pytest.raises(ValueError, match="target nothing: this model was trained for test_loss"):
        prompt(gpt, network)
    with pytest.raises(ValueError, match="target test_loss, test_error"):
        prompt(gpt, network, test_loss=2.0, test_error=0.1)


class Diverging(TrainedGpt):
    """Shrinks networks to 0.9 of them, but for two updates: one to NaN, one to what scores nothing finite."""

    def sample(self, theta, metric, target, *, indices, **settings):
        out = 0.9 * theta
        for row, index in enumerate(indices):
            if divmod(index, 1 << 20) == (0, 1):
                out[row, 7] = torch.nan
            if divmod(index, 1 << 20) == (1, 0):
                out[row] *= 1e30
        return out


def test_updates_that_are_not_finite_are_rejected_and_the_network_stays_as_it_was(gpt):
    diverging = Diverging(gpt.model, gpt.scale, gpt.metric, gpt.better, (0.0, 10.0), gpt.spec, {})
    with pytest.warns(UpdatesRejected, match="^2 of 9 updates gave networks that are not finite"):
        answers = prompt(diverging, perceptron(5), recursive=3, samples=3, test_loss=2.0)
    theta = theta_of(perceptron(5), gpt.task.layout)
    assert [answer.rejected for answer in answers] == [1, 1, 0]
    for answer, powers in zip(answers, ([0, 1, 1, 2], [0, 0, 1, 2], [0, 1, 2, 3]), strict=True):
        torch.testing.assert_close(answer.theta, theta * 0.9 ** powers[-1])
        expected = gpt.task.evaluate(torch.stack([theta * 0.9**power for power in powers]))["test_loss"]
        assert answer.path == pytest.approx(expected.tolist(), rel=1e-5)
        assert answer.achieved["test_loss"] == answer.path[-1]


def facts_of(gpt: TrainedGpt, **changes: object) -> dict[str, object]:
    task = {"task": "mnist_mlp_14", "data": None, "epochs": None}
    return {
        "scale": gpt.scale,
        "metric": "test_loss",
        "better": "lower",
        "trained_range": [0, 9],
        "task": task,
    } | changes


def test_networks_that_are_not_finite_are_never_written(gpt, network, tmp_path):
    tensors = {
        name: value * 0 + 3e38 for name, value in gpt.model.state_dict().items()
    }  # finite, unlike what they give
    write_model(tmp_path / "model.safetensors", gpt.model.config, tensors, facts_of(gpt))
    words = ["prompt", "--checkpoint", network, "--target", "test_loss=2", "--model", tmp_path, *FEW]
    done = command(*words, "--recursive", "2", "--samples", "2", "--out", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("warning: 4")] == [
        "warning: 4 of 4 updates gave networks that are not finite, or score nothing finite, and were rejected: each network "
        "stays as it was before"
    ]
    for one in json.loads(done.stdout)["networks"]:
        tensors, _ = checkpoint.read(Path(one["file"]))
        assert torch.equal(theta_of(tensors, gpt.task.layout), theta_of(network, gpt.task.layout))
        assert one["rejected"] == 2


def test_a_missing_task_must_be_given(gpt, network, tmp_path):
    spec = {"task": "walker", "data": None, "epochs": None}
    write_model(tmp_path / "model.safetensors", gpt.model.config, gpt.model.state_dict(), facts_of(gpt, task=spec))
    assert load(tmp_path).spec.task == "walker"
    for start in ([], ["--checkpoint", network]):
        words = ["prompt", *start, "--target", "test_loss=2", "--model", tmp_path, "--out", tmp_path / "new", *FEW]
        fails_with(command(*words), "a task of your own is run only where you name it; pass --task file.py:NAME")
        assert not (tmp_path / "new").exists()


# --- the sampler


class Stub(Gpt):
    """A model that predicts a known function of what it is given."""

    predict = None

    def forward(self, noised, t, theta, metric, target):
        return self.predict(noised, t, theta, metric, target)


def stubbed(gpt: TrainedGpt, predict) -> TrainedGpt:
    model = Stub(gpt.model.config).double()
    model.predict = predict
    return TrainedGpt(model, gpt.scale, gpt.metric, gpt.better, None, gpt.spec, {})


def networks(gpt: TrainedGpt, n: int = 3) -> torch.Tensor:
    return torch.randn(n, gpt.model.config.symmetry.layout.size, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
@pytest.mark.parametrize("steps", [1, 4])
def test_an_untrained_model_returns_its_input(gpt, sampler, steps):
    config = gpt.model.config
    identity = TrainedGpt(Gpt(config).double(), gpt.scale, gpt.metric, gpt.better, None, gpt.spec, {})
    theta, scalars = networks(gpt), torch.ones(3)
    found = identity.sample(theta, scalars, scalars, settings=SamplerSettings(sampler, steps))
    torch.testing.assert_close(found, theta, rtol=0, atol=1e-5 if sampler == "unipc" else 1e-9)  # float32 there


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_update_of_one_step_sees_the_samples_own_noise_and_the_last_timestep(gpt, sampler):
    seen = []

    def predict(noised, t, theta, metric, target):
        seen.append(t)
        return theta + 0.25 * noised + (target - 2 * metric)[:, None]

    theta, metric, target = networks(gpt), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3])
    settings = SamplerSettings(sampler, 1, networks_at_once=2)
    found = stubbed(gpt, predict).sample(theta, metric, target, settings=settings, seed=9, indices=[40, 7, 8])
    noise = randomness.normal(9, "sample", [40, 7, 8], (theta.shape[1],)).double()
    expected = theta + (0.25 * noise + (target - 2 * metric)[:, None].double()) / gpt.scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.cat(seen).unique().numel() == 1


def test_ancestral_sampling_is_the_textbooks(gpt):
    """Four of a thousand linear steps, each posterior written out from alpha_bar."""
    theta, scalars = networks(gpt, 2), torch.ones(2)
    found = stubbed(gpt, lambda noised, t, theta, metric, target: theta + 0.25 * noised).sample(
        theta, scalars, scalars, settings=SamplerSettings("ddpm", 4), seed=3
    )
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    sources = [randomness.generator(3, "sample", i) for i in range(2)]

    def drawn() -> torch.Tensor:
        return torch.stack([torch.empty(theta.shape[1]).normal_(generator=source) for source in sources]).double()

    steps = stubbed(gpt, None).diffusion.respaced(4).schedule.timesteps.tolist()
    assert len(steps) == 4
    x = drawn()
    for place in reversed(range(4)):
        now, before = alpha_bar[steps[place]], alpha_bar[steps[place - 1]] if place else torch.tensor(1.0).double()
        beta = 1 - now / before
        clean = gpt.scale * theta + 0.25 * x
        mean = (before.sqrt() * beta * clean + (now / before).sqrt() * (1 - before) * x) / (1 - now)
        x = mean + (beta.sqrt() * drawn() if place else 0)
    torch.testing.assert_close(found, x / gpt.scale, rtol=0, atol=1e-6)


def test_updates_of_a_batch_are_independent(gpt):
    """Of a trained model in float64: batches and company change nothing."""
    exact = TrainedGpt(load_double(gpt), gpt.scale, gpt.metric, gpt.better, None, gpt.spec, {})
    theta, metric, target = networks(gpt, 5), torch.linspace(0.5, 2, 5), torch.linspace(0.1, 1, 5)
    settings = SamplerSettings("ddpm", 3)
    together = exact.sample(theta, metric, target, settings=settings, indices=[9, 8, 7, 6, 5])
    for i in range(5):
        alone = exact.sample(theta[i : i + 1], metric[i : i + 1], target[i : i + 1], settings=settings, indices=[9 - i])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-10)
    parts = exact.sample(theta, metric, target, settings=SamplerSettings("ddpm", 3, 2), indices=[9, 8, 7, 6, 5])
    torch.testing.assert_close(parts, together, rtol=0, atol=1e-10)
    other = exact.sample(theta, metric, target, settings=settings, seed=1, indices=[9, 8, 7, 6, 5])
    assert (other - together).abs().max() > 1e-3


def load_double(gpt: TrainedGpt) -> Gpt:
    model = Gpt(gpt.model.config)
    model.load_state_dict(gpt.model.state_dict())
    return model.double()


def test_a_model_file_keeps_everything(gpt, tmp_path):
    facts = {"scale": 2.5, "metric": "test_error", "better": "lower", "trained_range": None,
             "task": {"task": "mnist_mlp_14", "data": None, "epochs": None}}  # fmt: skip
    write_model(tmp_path / "model.safetensors", gpt.model.config, gpt.model.state_dict(), facts)
    again = load(tmp_path)
    assert (again.scale, again.metric, again.trained_range) == (2.5, "test_error", None)
    for name, value in gpt.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    del facts["scale"]
    write_model(tmp_path / "model.safetensors", gpt.model.config, gpt.model.state_dict(), facts)
    with pytest.raises(ValueError, match="another version of triptych made it"):
        load(tmp_path)


# --- released models


def test_a_released_model_becomes_a_model_file(tmp_path, monkeypatch):
    task = open_task("mnist_mlp_14")  # of which no G.pt was released
    config = GptConfig(task.symmetry, "chunk", 100, 16, 1, 2, scalars="raw")
    for table in (convert.PRESETS, interop.PRESETS):
        monkeypatch.setitem(table, "tiny_loss", config)
    for table in (convert.RELEASED, interop.RELEASED):
        monkeypatch.setitem(table, "tiny_loss", interop.RELEASED["mnist_loss"]._replace(task="mnist_mlp_14"))
    made = Gpt(config)
    for number, parameter in enumerate(made.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    torch.save({"G_ema": export_released(made)}, tmp_path / "best.pt")
    done = command(
        "convert",
        "--checkpoint",
        tmp_path / "best.pt",
        "--released",
        "tiny_loss",
        "--out",
        tmp_path / "model",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    again = load(json.loads(done.stdout)["model"])
    for name, value in made.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert again.scale == interop.RELEASED["mnist_loss"].scale
    assert again.trained_range is None
    with pytest.warns(OutsideTrainedRange, match="the range that the model was trained on is not known"):
        answer = prompt(again, perceptron(), settings=SamplerSettings(num_inference_steps=2), test_loss=0.5)[0]
    assert scores_by_hand(answer.state_dict)["test_loss"] == pytest.approx(answer.achieved["test_loss"], rel=1e-5)


@pytest.mark.parametrize(("options", "status", "message"), [
    ([], 1, "no checkpoint: give the released file, --checkpoint best.pt"),
    (["--checkpoint", "nowhere.pt"], 1, "nowhere.pt: no such file"),
    (["--checkpoint", "net.pt"], 1, "net.pt: not a checkpoint of wpeebles/G.pt"),
    (["--checkpoint", "net.pt", "--released", "imagenet"], 2, "released 'imagenet': expected one of mnist_loss, "),
])  # fmt: skip
def test_another_file_than_a_released_model_is_one_clear_line(tmp_path, monkeypatch, options, status, message):
    monkeypatch.chdir(tmp_path)
    torch.save(perceptron().state_dict(), tmp_path / "net.pt")
    fails_with(command("convert", *options), message, status)
    assert not (tmp_path / "runs").exists()
