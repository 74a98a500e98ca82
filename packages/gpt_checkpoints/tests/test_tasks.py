"""Registered tasks follow the published recipe; users' own are opened, or refused in one line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from triptych_common.data import files, load
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.symmetry.spec import Axis, PermutationSpec, check_invariance, forward_of
from triptych_gpt.tasks import (
    TASKS,
    Cohort,
    Items,
    Metric,
    Prompts,
    Speed,
    SupervisedTask,
    Task,
    Trajectories,
    open_task,
)
from triptych_gpt.tasks.cifar_cnn import FlipAndCrop, Pictures
from triptych_gpt.tasks.mnist_mlp import Digits
from triptych_gpt.zoo.source import TaskSpec, task_of
from triptych_gpt.zoo.store import Manifest
from triptych_gpt.zoo.zoo import Zoo

CPU = torch.device("cpu")
SHAPES = {"mnist_mlp": (784,), "mnist_mlp_14": (196,), "cifar_cnn": (3, 32, 32)}


def fake(name: str) -> SupervisedTask:
    """A registered task with random items of its shape, 300 of them."""

    def data(part: str) -> Items:
        rng = torch.Generator().manual_seed(len(part))
        return Items(torch.randn(300, *SHAPES[name], generator=rng), torch.arange(300) % 10)

    return replace(TASKS[name], data=data)


SIZES = {"mnist_mlp": 7960, "mnist_mlp_14": 2080, "cifar_cnn": 5370, "cartpole": 1250, "cartpole_small": 1250}


def test_parameter_counts():
    assert {name: task.layout.size for name, task in TASKS.items()} == SIZES


def test_networks_are_the_published_ones():
    shapes = {name: dict(task.layout.shapes) for name, task in TASKS.items()}
    assert shapes["mnist_mlp"] == {
        "fc1.weight": (10, 784), "fc1.bias": (10,), "fc2.weight": (10, 10), "fc2.bias": (10,)}  # fmt: skip
    assert shapes["cifar_cnn"] == {
        "conv1.weight": (16, 3, 3, 3), "conv2.weight": (32, 16, 3, 3), "fc.weight": (10, 32), "fc.bias": (10,)}  # fmt: skip
    layers = TASKS["cifar_cnn"].network()
    assert [type(layer) for layer in layers] == [
        nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]  # fmt: skip
    assert layers.relu2(layers.conv2(layers.relu1(layers.conv1(torch.zeros(1, 3, 32, 32))))).shape == (1, 32, 16, 16)
    assert [type(layer) for layer in TASKS["mnist_mlp"].network()] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(("name", "epochs"), [("mnist_mlp", 25), ("mnist_mlp_14", 25), ("cifar_cnn", 50)])
def test_recipes_are_the_published_ones(name, epochs):
    task = TASKS[name]
    assert (task.epochs, task.batch_size) == (epochs, 128)
    assert task.settings() == {
        "optimizer": "SGD", "schedule": "cosine", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}  # fmt: skip
    rates = [task.optimizer.rate(epoch, task.epochs) for epoch in range(epochs)]
    assert rates == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * epoch / epochs)) for epoch in range(epochs)], rel=1e-12
    )
    assert [(metric.name, metric.better) for metric in task.metrics] == [
        ("test_loss", "lower"), ("test_error", "lower"), ("train_loss", "lower")]  # fmt: skip
    assert task.augment == (FlipAndCrop(padding=4, offsets=8) if name == "cifar_cnn" else None)
    assert fake(name).steps_per_epoch == 2  # of 300 items, the last 44 dropped
    assert fake(name).steps == 2 * epochs


def test_prompts_are_the_published_ones():
    prompts = {name: {m.name: m.prompts for m in task.metrics} for name, task in TASKS.items()}
    assert prompts["mnist_mlp"]["test_loss"] == Prompts(best=0.0, recursive=0.0, worst=0.9)
    assert prompts["mnist_mlp"]["test_error"] == Prompts(best=0.05, recursive=0.05, worst=0.9)
    assert prompts["cifar_cnn"]["test_loss"] == Prompts(best=1.2, recursive=1.4, worst=1.0)
    assert prompts["cifar_cnn"]["test_error"] == Prompts(best=0.35, recursive=0.45, worst=1.0)


@pytest.mark.parametrize("initialiser", TASKS["mnist_mlp"].initialisers)
@pytest.mark.parametrize("name", SHAPES)
def test_hidden_permutation_preserves_function(name, initialiser):
    """Any draw of the symmetry spec leaves outputs unchanged (float64, 1e-12), and moves every hidden unit's weights."""
    task = TASKS[name]
    theta = task.initial(0, range(5), initialiser)
    inputs = torch.randn(6, *SHAPES[name], generator=torch.Generator().manual_seed(0))
    assert check_invariance(forward_of(task.network()), task.symmetry, theta, inputs) < 1e-12
    assert task.symmetry.groups == ({"conv1": 16, "conv2": 32} if name == "cifar_cnn" else {"fc1": 10})
    moved = task.symmetry.apply(theta, task.symmetry.draw(0, range(5)))
    assert ((moved != theta).sum(1) > 0.5 * task.layout.size).all()


def test_digits_are_normalised_by_the_published_constants():
    raw = load("mnist5k", "held_out")
    pixels = raw.images.double() / 255
    items = Digits("mnist5k")("test")
    assert items.inputs.shape == (len(raw.images), 784)
    assert (items.inputs - ((pixels - 0.1307) / 0.3081).flatten(1)).abs().max() < 1e-5
    assert torch.equal(items.targets, raw.labels)
    small = Digits("mnist5k", side=14)("test").inputs
    averages = sum(pixels[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    assert (small - ((averages - 0.1307) / 0.3081).flatten(1)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="side 10: expected a divisor of 28"):
        Digits(side=10)


def test_pictures_are_normalised_by_the_published_constants(monkeypatch):
    raw = replace(
        load("mnist5k"),
        images=torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8),
        labels=torch.arange(20) % 10,
    )
    before = raw.images.clone()
    monkeypatch.setattr("triptych_common.data.load", lambda name, split: raw)
    items = Pictures()("train")
    for channel, (mean, std) in enumerate(zip((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), strict=True)):
        expected = (before[:, channel].double() - mean) / std
        assert (items.inputs[:, channel] - expected).abs().max() < 1e-5
    assert torch.equal(raw.images, before)


def test_data_of_another_kind_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"data 'mnist5k': images of \(1, 28, 28\); expected cifar10"):
        Pictures("mnist5k")("train")
    wide = replace(load("mnist5k"), images=torch.zeros(4, 3, 32, 32, dtype=torch.uint8), labels=torch.zeros(4).long())
    monkeypatch.setattr("triptych_common.data.load", lambda name, split: wide)
    with pytest.raises(ValueError, match=r"data 'cifar10': images of \(3, 32, 32\); expected digits"):
        Digits("cifar10")("train")


@pytest.mark.parametrize("offsets", [8, 9])
def test_flip_and_crop_equals_flipping_padding_and_cutting(offsets):
    """By what it draws: a mirror, then an offset from the top and one from the left of the padded image."""
    images = torch.randn(200, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    found = FlipAndCrop(padding=4, offsets=offsets)(images, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    mirrored = torch.rand(200, generator=rng) < 0.5
    tops, lefts = torch.randint(offsets, (2, 200), generator=rng)
    for image, seen, flip, top, left in zip(images, found, mirrored, tops.tolist(), lefts.tolist(), strict=True):
        padded = torch.zeros(3, 20, 18)
        padded[:, 4:16, 4:14] = image.flip(2) if flip else image
        assert torch.equal(seen, padded[:, top : top + 12, left : left + 10])
    assert sorted(set(tops.tolist())) == sorted(set(lefts.tolist())) == list(range(offsets))
    assert 70 < mirrored.sum() < 130
    assert len(torch.stack([tops, lefts]).unique(dim=1).T) > 50  # drawn apart


@pytest.mark.parametrize(("padding", "offsets"), [(4, 0), (4, 10), (-1, 1)])
def test_impossible_offsets_are_refused(padding, offsets):
    with pytest.raises(ValueError, match=f"offsets {offsets}: with padding {padding} expected 1 to"):
        FlipAndCrop(padding, offsets)


OWN = """
import torch
from torch import nn
from triptych_gpt.tasks import Items, SupervisedTask

def points(part):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs[:, 0] > 0).long())

def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

TASK = SupervisedTask("points", network, points, epochs=3, batch_size=16)
LATER = SupervisedTask("later", network, lambda part: 1 / 0, epochs=3)

def make():
    return TASK

def fails():
    raise RuntimeError("no data\\nat all")

class Half:
    name = "half"
    steps = 3

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_open_task_by_name_and_from_a_file(own):
    assert open_task("mnist_mlp") is TASKS["mnist_mlp"]
    assert open_task(f"{own}:TASK").name == "points"
    assert open_task(f"{own}:make").name == "points"
    assert open_task(f"{own}:LATER").name == "later"  # its data are not touched


def test_open_task_with_other_data_and_epochs(own):
    task = open_task("mnist_mlp", data="mnist5k", epochs=2)
    assert task.data == Digits("mnist5k")
    assert task.epochs == 2
    assert task.network is TASKS["mnist_mlp"].network
    assert TASKS["mnist_mlp"].data == Digits("mnist")
    assert open_task("mnist_mlp_14", data="mnist").data == Digits("mnist", side=14)
    assert open_task(f"{own}:TASK", epochs=7).epochs == 7


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "resnet",
            {},
            "task 'resnet': expected one of mnist_mlp, mnist_mlp_14, cifar_cnn, cartpole, cartpole_small, or file.py:NAME",
        ),
        ("{own}", {}, "expected one of mnist_mlp"),
        ("{own}:NONE", {}, "own.py: has no NONE; expected the name of a Task in it"),
        ("{own}:NUMBER", {}, "own.py: NUMBER is a int, no Task .it lacks name, layout, symmetry"),
        ("{own}:network", {}, "own.py: network is a Sequential, no Task .it lacks name, layout"),
        ("{own}:Half", {}, "own.py: Half is a Half, no Task .it lacks layout, symmetry, metrics"),
        ("{own}:fails", {}, r"own.py: fails\(\) fails .RuntimeError: no data at all"),
        ("{own}:points", {}, r"own.py: points\(\) fails .TypeError"),
        ("mnist_mlp", {"epochs": 0}, "epochs 0: expected at least 1"),
        ("{own}:TASK", {"data": "mnist5k"}, "data 'mnist5k': task points has data of its own; leave out --data"),
    ],
)
def test_tasks_that_cannot_be_opened_are_refused(own, spec, options, message):
    with pytest.raises(ValueError, match=message) as error:
        open_task(spec.format(own=own), **options)
    assert "\n" not in str(error.value)


def test_open_task_from_files_that_do_not_run(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"absent\.py: no such file; a task of your own is given as file\.py:NAME"
    ):
        open_task(f"{tmp_path / 'absent.py'}:TASK")
    for content, message in (
        ("1 / 0", "cannot be run .ZeroDivisionError: division by zero"),
        ("import absent_module", "cannot be run .ModuleNotFoundError: No module named 'absent_module'"),
        ("def f(:", "cannot be run .SyntaxError"),
        ("raise ValueError('two\\nlines')", "cannot be run .ValueError: two lines"),
    ):
        path = tmp_path / "broken.py"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            open_task(f"{path}:TASK")
        assert "\n" not in str(error.value)


class Bandit:
    """Random search for the arm of the highest pay: a task that is not supervised, with two hidden units to permute."""

    name = "bandit"
    layout = ParameterLayout({"hidden": (2,), "out": (2,), "bias": (1,)})
    symmetry = PermutationSpec(layout, {"hidden": (Axis("unit"),), "out": (Axis("unit"),), "bias": (None,)})
    metrics = (Metric("pay", "higher", Prompts(1.0, 1.0)),)
    initialisers = ("default",)
    steps = 10

    def recipe(self) -> dict:
        return {"search": "random", **self.settings()}

    def settings(self) -> dict:
        return {"spread": 0.3}

    def initial(self, seed, runs, initialiser="default") -> Tensor:
        rows = [torch.randn(5, generator=torch.Generator().manual_seed(1000 * seed + run)) for run in runs]
        return torch.stack(rows)

    def evaluate(self, theta: Tensor) -> dict[str, Tensor]:
        arm = (theta[:, :2].tanh() * theta[:, 2:4]).sum(1) + theta[:, 4]
        return {"pay": (-(arm - 1).square()).exp()}

    def train_cohort(self, cohort: Cohort, device: torch.device, networks_at_once: int) -> Trajectories:
        best = self.initial(cohort.seed, cohort.runs, cohort.initialiser)
        steps = torch.linspace(0, self.steps, cohort.checkpoints).round().long()
        rng = torch.Generator().manual_seed(cohort.seed)
        states = [best]
        for _ in range(self.steps):
            tried = best + 0.3 * torch.randn(best.shape, generator=rng)
            better = self.evaluate(tried)["pay"] > self.evaluate(best)["pay"]
            best = torch.where(better[:, None], tried, best)
            states.append(best)
        theta = torch.stack(states, 1)[:, steps]
        return Trajectories(theta, steps.expand(len(cohort.runs), -1))

    def measure(self, device: torch.device, cohort_runs: int, shared_batches: bool = True) -> Speed:
        return Speed(cohort_runs, 1e-3, 1e-6)


def test_a_task_need_not_be_supervised():
    task = Bandit()
    assert isinstance(task, Task)
    found = task.train_cohort(Cohort(0, 0, range(4), checkpoints=5), CPU, 4)
    pay = task.evaluate(found.theta.flatten(0, 1))["pay"].view(4, 5)
    assert (pay.diff(dim=1) >= 0).all()
    assert (pay[:, -1] > pay[:, 0]).all()

    def forward(theta: Tensor, inputs: None) -> Tensor:
        return task.evaluate(theta[None])["pay"]

    assert check_invariance(forward, task.symmetry, task.initial(0, range(9)), None) < 1e-12
    json.dumps(task.recipe())


def test_a_class_is_made_into_the_task_it_describes(tmp_path):
    """Even one whose attributes are all there before it is called."""
    facts = ("layout", "symmetry", "metrics", "initialisers", "steps")
    methods = ("recipe", "settings", "initial", "train_cohort", "evaluate", "measure")
    body = ["name = 'bandit'", *(f"{fact} = None" for fact in facts), *(f"def {m}(self): ..." for m in methods)]
    path = tmp_path / "bandits.py"
    path.write_text("\n    ".join(["class Bandit:", *body]))
    spec = f"{path}:Bandit"
    assert not isinstance(open_task(spec), type)
    assert open_task("cartpole_small", iterations=7).steps == 7
    with pytest.raises(ValueError, match="iterations 7: task mnist_mlp has no policies; leave out --iterations"):
        open_task("mnist_mlp", iterations=7)
    with pytest.raises(ValueError, match="iterations 0: expected at least 1"):
        open_task("cartpole_small", iterations=0)
    with pytest.raises(ValueError, match="epochs 3: task bandit is not supervised; leave out --epochs"):
        open_task(spec, epochs=3)
    with pytest.raises(ValueError, match="data 'mnist': task bandit has data of its own; leave out --data"):
        open_task(spec, data="mnist")


def test_data_that_only_a_file_names_are_not_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(url, path):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(files, "download", download)
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path))
    for content in ({"task": "mnist_mlp_14", "data": "mnist"}, {"task": "mnist_mlp"}, {"task": "cifar_cnn"}):
        task = TaskSpec.recorded(content, "zoo").open()
        remedy = f"nothing is fetched because a file names it; --task {content['task']} fetches it"
        with pytest.raises(FileNotFoundError, match=remedy):
            task.recipe()
        assert asked == []
        with pytest.raises(FileNotFoundError, match="cannot be fetched"):
            TaskSpec.recorded(content, "zoo", content["task"]).open().recipe()
        assert asked
        asked.clear()
    recorded = TaskSpec.recorded({"task": "mnist_mlp_14"}, "zoo").open()
    assert recorded.recipe() == TASKS["mnist_mlp_14"].recipe()


def test_a_zoos_networks_are_compared_before_its_data_are_read(tmp_path, monkeypatch):
    facts = {
        "task": "mnist_mlp",
        "layout": [["w", [3]]],
        "checkpoints": 2,
        "dtype": "float32",
        "metrics": {"loss": "lower"},
    }
    Manifest.create(tmp_path / "zoo", facts)
    monkeypatch.setenv("TRIPTYCH_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="networks of 7,960 parameters, the zoo's have 3"):
        task_of(Zoo(tmp_path / "zoo"))
