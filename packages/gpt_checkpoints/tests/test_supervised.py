"""Cohorts train exactly as PyTorch trains their networks one by one; scores are those of a plain loop; recipes are complete."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from triptych_common.randomness import permutation
from triptych_gpt.symmetry.derivation import Residual
from triptych_gpt.tasks import (
    Cohort,
    Items,
    Metric,
    OptimizerSettings,
    Prompts,
    Score,
    SupervisedTask,
    classification,
    cross_entropy,
    momentum_sgd,
    zero_one,
)
from triptych_gpt.tasks.cifar_cnn import FlipAndCrop, SmallConvNet
from triptych_gpt.tasks.networks import Scored, score_networks, train_networks
from triptych_gpt.tasks.optimizers import ELEMENTWISE_OPTIMIZERS
from triptych_gpt.tasks.supervised import candidate_counts, describe, even_slices, recorded_steps

CPU = torch.device("cpu")
Network = Callable[[], nn.Module]


@dataclass(frozen=True)
class Noise:
    """Normal items of three classes."""

    shape: tuple[int, ...]
    items: int = 42  # five batches of eight, and two items left over

    def __call__(self, part: str) -> Items:
        rng = torch.Generator().manual_seed(len(part))
        return Items(torch.randn(self.items, *self.shape, generator=rng), torch.arange(self.items) % 3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def normalised_mlp() -> nn.Module:
    first = [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False, momentum=0.3), nn.Linear(4, 3))


def residual_mlp() -> nn.Module:
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    return nn.Sequential(nn.Linear(6, 5), Residual(body), nn.ReLU(), nn.Linear(5, 3))


def flattened_cnn() -> nn.Module:
    maps = [nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2), nn.MaxPool2d(2, 1), nn.SiLU()]
    return nn.Sequential(*maps, nn.Flatten(), nn.Linear(6, 3))


def residual_cnn() -> nn.Module:
    body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    stem = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)]
    return nn.Sequential(*stem, Residual(body), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def small_conv_net() -> nn.Module:
    return SmallConvNet(channels=(4, 6))()


class Gated(nn.Module):
    """Not a Sequential: two branches, BatchNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.gate, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.values(x)) * self.gate(x).sigmoid())


class Recurrent(nn.Module):
    """vmap has no rule for a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x)[0][:, -1])


class Branching(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return self.out(hidden.relu() if hidden.mean() > 0 else hidden.tanh())


def partly_frozen() -> nn.Module:
    """The first layer is not trained, and a parameter is none of the forward pass."""
    network = mlp()
    network[0].requires_grad_(False)
    network.log_std = nn.Parameter(torch.ones(2))
    return network


NETWORKS: dict[str, tuple[Network, tuple[int, ...], bool]] = {  # shape of an item, whether there is a batched form
    "mlp": (mlp, (6,), True),
    "mlp with batch norm": (normalised_mlp, (6,), True),
    "residual mlp": (residual_mlp, (6,), True),
    "released cnn": (small_conv_net, (3, 32, 32), True),
    "conv, flatten, linear": (flattened_cnn, (2, 7, 7), True),
    "residual cnn with batch norm": (residual_cnn, (2, 5, 5), True),
    "not sequential": (Gated, (6,), False),
    "gru": (Recurrent, (3, 2), False),
    "branching": (Branching, (6,), False),
    "partly frozen": (partly_frozen, (6,), True),
}


def task_of(network: Network = mlp, shape: tuple[int, ...] = (6,), **settings) -> SupervisedTask:
    settings = {"epochs": 4, "batch_size": 8, **settings}
    return SupervisedTask("test", network, Noise(shape), **settings)


def vector(network: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten() for t in network.state_dict().values() if t.is_floating_point()])


def one_by_one(task: SupervisedTask, cohort: Cohort, run: int, kind: type | None = None) -> tuple[Tensor, list[float]]:
    """A run as PyTorch users write it: theta after every step [steps + 1, D], and the loss of every minibatch."""
    network = task.network().double().train()
    start = task.layout.unflatten(task.initial(cohort.seed, [run], cohort.initialiser)[0].double())
    network.load_state_dict(start, strict=False)
    kind = kind or torch.optim.SGD
    optimizer = kind([p for p in network.parameters() if p.requires_grad], **task.optimizer.arguments, foreach=False)
    scheduler = CosineAnnealingLR(optimizer, T_max=task.epochs)
    thetas, losses = [vector(network)], []
    train = task.items["train"].to(CPU, torch.float64)
    for step, (inputs, targets) in enumerate(task.minibatches(train, cohort, range(run, run + 1)), start=1):
        inputs, targets = (inputs, targets) if cohort.shared_batches else (inputs[0], targets[0])
        loss = F.cross_entropy(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % task.steps_per_epoch == 0:
            scheduler.step()
        thetas.append(vector(network))
        losses.append(loss.item())
    return torch.stack(thetas), losses


def train(task: SupervisedTask, cohort: Cohort, at_once: int = 3):
    return task.train_cohort(cohort, CPU, at_once, torch.float64)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("name", NETWORKS)
def test_cohort_equals_training_one_by_one(name, shared):
    """Parameters and running statistics at every recorded step, and the loss of its minibatch."""
    network, shape, batched = NETWORKS[name]
    task = task_of(network, shape, augment=FlipAndCrop() if name == "released cnn" else None)
    cohort = Cohort(seed=5, number=2, runs=range(4, 7), checkpoints=9, shared_batches=shared)
    found = train(task, cohort)
    assert task.stack.batched == batched
    for run, theta, steps, losses in zip(
        cohort.runs, found.theta, found.steps, found.metrics["minibatch_loss"], strict=True
    ):
        expected, of_batches = one_by_one(task, cohort, run)
        assert (theta - expected[steps]).abs().max() < 1e-10
        assert (theta[-1] - theta[0]).abs().max() > 1e-2  # it has been trained
        before = torch.tensor([of_batches[max(0, step - 1)] for step in steps.tolist()], dtype=torch.float64)
        assert (losses - before).abs().max() < 1e-10


@pytest.mark.parametrize("name", ELEMENTWISE_OPTIMIZERS)
def test_every_optimizer_equals_its_plain_form(name):
    decay = {} if name == "Rprop" else {"weight_decay": 0.02}
    settings = OptimizerSettings(name, {"lr": 0.02, **decay})
    task = task_of(optimizer=settings)
    cohort = Cohort(seed=0, number=0, runs=range(2), checkpoints=6)
    found = train(task, cohort)
    for run, theta, steps in zip(cohort.runs, found.theta, found.steps, strict=True):
        expected, _ = one_by_one(task, cohort, run, getattr(torch.optim, name))
        assert (theta - expected[steps]).abs().max() < 1e-10


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_at_once_change_nothing(name, shared):
    network, shape, _ = NETWORKS[name]
    task = task_of(network, shape, epochs=2)
    cohort = Cohort(seed=1, number=0, runs=range(5), checkpoints=4, shared_batches=shared)
    together = train(task, cohort, at_once=5)
    for at_once in (1, 3):
        found = train(task, cohort, at_once)
        assert (found.theta - together.theta).abs().max() < 1e-10
        assert torch.equal(found.steps, together.steps)


def test_independent_runs_do_not_depend_on_their_cohort():
    task = task_of()
    one = train(task, Cohort(seed=3, number=0, runs=range(0, 6), checkpoints=5, shared_batches=False), 6)
    other = train(task, Cohort(seed=3, number=2, runs=range(4, 8), checkpoints=5, shared_batches=False), 2)
    assert torch.equal(one.steps[4:], other.steps[:2])
    assert (one.theta[4:] - other.theta[:2]).abs().max() < 1e-10


def test_a_run_that_diverges_leaves_the_others_alone():
    for name in ("mlp", "residual mlp", "conv, flatten, linear", "residual cnn with batch norm"):
        network, shape, _ = NETWORKS[name]
        task = task_of(network, shape)
        start = task.initial(0, range(3)).double()
        start[1] = float("nan")
        batches = list(task.minibatches(task.items["train"].to(CPU, torch.float64), Cohort(0, 0, range(3)), range(3)))
        record = torch.tensor([[0, 20]])

        def last(theta: Tensor, record=record, task=task, batches=batches) -> Tensor:
            out = torch.empty(len(theta), 2, task.layout.size, dtype=torch.float64)
            rates = [0.1] * len(batches)
            here = record.expand(len(theta), 2)
            train_networks(task.stack, theta, batches, rates, task.loss, task.optimizer, here, out)
            return out[:, 1]

        assert (last(start)[[0, 2]] - last(start[[0, 2]])).abs().max() < 1e-10, name


def test_given_networks_are_left_as_they_were():
    task = task_of(normalised_mlp)
    start = task.initial(0, range(2)).double()
    before = start.clone()
    batches = task.minibatches(task.items["train"].to(CPU, torch.float64), Cohort(0, 0, range(2)), range(2))
    out = torch.empty(2, 2, task.layout.size, dtype=torch.float64)
    record = torch.tensor([[0, 20], [0, 20]])
    train_networks(task.stack, start, batches, [0.1] * 20, task.loss, task.optimizer, record, out)
    assert torch.equal(start, before)
    assert torch.equal(out[:, 0], before)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])
def test_minibatches_reshuffle_every_epoch_and_drop_the_rest(shared):
    task = SupervisedTask("test", mlp, Noise((6,)), epochs=3, batch_size=8)
    items = task.items["train"]
    cohort = Cohort(seed=7, number=1, runs=range(2, 4), shared_batches=shared)
    batches = list(task.minibatches(items, cohort, cohort.runs))
    assert len(batches) == task.steps == 15
    orders = {f"cohort-{cohort.number}"} if shared else {f"run-{run}" for run in cohort.runs}
    for which, order in enumerate(sorted(orders)):
        seen = []
        for step, (inputs, targets) in enumerate(batches):
            inputs, targets = (inputs, targets) if shared else (inputs[which], targets[which])
            rows = (inputs[:, None] == items.inputs).all(-1).nonzero()[:, 1]
            assert torch.equal(targets, items.targets[rows])
            expected = permutation(7, f"batches/{order}", step // 5, 42)[step % 5 * 8 :][:8]
            assert torch.equal(rows, expected)
            seen.append(rows)
        for epoch in range(3):
            assert len(torch.cat(seen[epoch * 5 : epoch * 5 + 5]).unique()) == 40
        assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:10]))


def test_augmentation_is_drawn_afresh_for_every_step_and_order():
    drawn = []

    def note(inputs: Tensor, rng: torch.Generator) -> Tensor:
        drawn.append(torch.rand(4, generator=rng))
        return inputs

    task = task_of(epochs=2, augment=note)
    for _ in task.minibatches(task.items["train"], Cohort(0, 0, range(2), shared_batches=False), range(2)):
        pass
    assert len(torch.stack(drawn).unique(dim=0)) == len(drawn) == 20
    first, drawn[:] = drawn[1], []
    next(task.minibatches(task.items["train"], Cohort(0, 5, range(1, 4), shared_batches=False), range(1, 2)))
    assert torch.equal(drawn[0], first)  # run 1's own, whatever its cohort


def test_learning_rates_are_cosine_by_epoch_or_constant():
    settings = momentum_sgd()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, T_max=25)
    for epoch in range(25):
        assert math.isclose(settings.rate(epoch, 25), optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        optimizer.step()
        scheduler.step()
    constant = replace(settings, schedule="constant")
    assert [constant.rate(epoch, 25) for epoch in (0, 24)] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("LBFGS", {"lr": 1.0}), "optimizer 'LBFGS': expected one of Adadelta"),
        (("SGD", {"momentum": 0.9}), "lr is missing"),
        (("SGD", {"lr": 0.1, "beta": 1}), "unknown 'beta'"),
        (("SGD", {"lr": 0.1, "params": []}), "unknown 'params'"),
        (("SGD", {"lr": -0.1}), "lr -0.1; expected a number above 0"),
        (("SGD", {"lr": "fast"}), "lr 'fast'; expected a number above 0"),
    ],
)
def test_bad_optimizer_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        OptimizerSettings(*arguments)
    assert "\n" not in str(error.value)


def test_arguments_that_contradict_each_other_are_refused_in_one_line():
    nesterov = OptimizerSettings("SGD", {"lr": 0.1, "nesterov": True})
    with pytest.raises(ValueError, match="arguments of SGD: Nesterov momentum requires a momentum"):
        nesterov.make([torch.zeros(1, requires_grad=True)])
    OptimizerSettings("SGD", {"lr": 0.1, "foreach": True}).make([torch.zeros(1, requires_grad=True)])


def test_recorded_steps_are_start_end_and_distinct_between():
    record = recorded_steps(Cohort(seed=0, number=0, runs=range(20), checkpoints=30), steps=100)
    assert (record[:, 0] == 0).all()
    assert (record[:, -1] == 100).all()
    assert (record.diff(dim=1) > 0).all()
    assert len(record.unique(dim=0)) == 20
    again = recorded_steps(Cohort(seed=0, number=3, runs=range(7, 9), checkpoints=30), steps=100)
    assert torch.equal(again, record[7:9])
    assert not torch.equal(recorded_steps(Cohort(1, 0, range(20), 30), 100), record)
    between = recorded_steps(Cohort(0, 0, range(2000), 12), 100)[:, 1:-1].flatten().bincount(minlength=100)[1:]
    assert between.min() > 0.6 * between.double().mean()  # uniform: 202 +- 14
    assert between.max() < 1.4 * between.double().mean()
    assert torch.equal(recorded_steps(Cohort(0, 0, range(1), 101), 100)[0], torch.arange(101))


@pytest.mark.parametrize("checkpoints", [1, 102])
def test_recorded_steps_refuse_impossible_numbers(checkpoints):
    with pytest.raises(ValueError, match=f"checkpoints {checkpoints}: expected 2 to 101"):
        recorded_steps(Cohort(0, 0, range(1), checkpoints), 100)


def scores_one_by_one(task: SupervisedTask, theta: Tensor) -> dict[str, Tensor]:
    network = task.network().to(theta.dtype).eval()
    train, test = (task.scored[part].to(CPU, theta.dtype) for part in ("train", "test"))
    rows = []
    for row in theta:
        network.load_state_dict(task.layout.unflatten(row), strict=False)
        with torch.no_grad():
            on_test, on_train = network(test.inputs), network(train.inputs)
        error = (on_test.argmax(1) != test.targets).double().mean()
        rows.append((F.cross_entropy(on_test, test.targets), error, F.cross_entropy(on_train, train.targets)))
    columns = torch.tensor(rows, dtype=theta.dtype).T
    return dict(zip(("test_loss", "test_error", "train_loss"), columns, strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_equal_a_loop_over_networks(name):
    network, shape, _ = NETWORKS[name]
    task = task_of(network, shape, scored_train_items=10)
    theta = train(task, Cohort(0, 0, range(3), 4)).theta.flatten(0, 1)
    found, expected = task.evaluate(theta), scores_one_by_one(task, theta)
    assert list(found) == [metric.name for metric in task.metrics]
    for metric, values in expected.items():
        assert (found[metric] - values).abs().max() < 1e-10, metric


def test_scores_do_not_depend_on_what_is_scored_at_once():
    for name in ("mlp with batch norm", "residual cnn with batch norm", "not sequential"):
        network, shape, _ = NETWORKS[name]
        task = task_of(network, shape)
        theta, test = task.initial(0, range(5)).double(), task.items["test"].to(CPU, torch.float64)
        part = Scored(test.inputs, test.targets, {"loss": cross_entropy})
        whole = score_networks(task.stack, theta, [part], networks_at_once=5, items_at_once=42)["loss"]
        for networks, items in ((1, 1), (2, 5), (3, 41), (100, 100)):
            found = score_networks(task.stack, theta, [part], networks_at_once=networks, items_at_once=items)
            assert (found["loss"] - whole).abs().max() < 1e-12


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


@pytest.mark.parametrize("layer", [nn.Linear, Normalised, partial(nn.Linear, bias=False)])
def test_inputs_that_never_vary_count_all_the_same(layer):
    """Whatever the scorer leaves out or takes together: constants inside, at the ends, in all of the inputs."""
    for constant in ([], [0, 1], list(range(5, 14)), [0, *range(4, 12), 19], list(range(20))):

        def data(part: str, constant: list[int] = constant) -> Items:
            items = Noise((20,))(part)
            items.inputs[:, constant] = torch.arange(float(len(constant))) - 0.5
            return items

        for network in (nn.Sequential(nn.Sequential(layer(20, 4)), nn.ReLU(), nn.Linear(4, 3)), layer(20, 3)):
            task = SupervisedTask("test", lambda network=network: network, data, epochs=1, scored_train_items=9)
            theta = torch.randn(3, task.layout.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            found, expected = task.evaluate(theta), scores_one_by_one(replace(task), theta)
            assert all((found[name] - values).abs().max() < 1e-10 for name, values in expected.items())


def test_ties_and_dead_networks_are_errors():
    """A network whose scores are equal is wrong everywhere, however argmax breaks ties."""
    outputs = torch.tensor([[[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [float("nan"), 1.0, 0.0], [0.0, float("inf"), 1.0]]])
    assert zero_one(outputs, torch.tensor([0, 0, 0, 1])).tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert zero_one(outputs, torch.tensor([[1, 1, 1, 2]])).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    task = task_of()
    theta = torch.stack([torch.zeros(task.layout.size), torch.full((task.layout.size,), float("nan"))])
    found = task.evaluate(theta)
    assert found["test_error"].tolist() == [1.0, 1.0]
    assert found["test_loss"][0] == pytest.approx(math.log(3))
    assert found["test_loss"][1].isnan()


def test_scoring_stays_within_its_memory(monkeypatch):
    """Of no layer are more than 2^20 numbers made at once, whatever its width."""
    most = 0

    def noting(stack, parameters, inputs, **options):
        nonlocal most
        first = next(iter(parameters.values()))
        most = max(most, len(first) * len(inputs) * first.shape[1])  # the hidden layer is the widest
        return call(stack, parameters, inputs, **options)

    for width in (4, 1000, 20_000):
        most = 0

        def network(width: int = width) -> nn.Module:
            return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

        task = SupervisedTask("test", network, Noise((6,), 3000), epochs=1)
        theta = torch.zeros(300 if width < 1000 else 2, task.layout.size)
        with monkeypatch.context() as patch:
            call = type(task.stack).__call__
            patch.setattr(type(task.stack), "__call__", noting)
            task.evaluate(theta)
        assert 2**18 < most <= 2**20


def test_measuring_speed_proposes_a_number_of_networks():
    for shared in (True, False):
        speed = task_of().measure(CPU, 20, shared)
        assert speed.networks_at_once in (20, 10, 5)
        assert speed.seconds_per_run > 0
        assert speed.seconds_per_score > 0


def test_slices_and_counts():
    assert candidate_counts(100) == [100, 50, 25, 13, 7]
    assert candidate_counts(3) == [3]
    for total, at_most in ((10, 3), (10, 10), (10, 99), (7, 2), (1, 1)):
        slices = even_slices(total, at_most)
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(total))
        assert max(s.stop - s.start for s in slices) <= at_most
        assert len(slices) == math.ceil(total / at_most)


def test_items_that_do_not_fit_are_refused():
    for inputs, targets, message in (
        (torch.zeros(3, 2), torch.zeros(4), "3 inputs and 4 targets: expected as many, at least one"),
        (torch.zeros(0, 2), torch.zeros(0), "0 inputs and 0 targets"),
    ):
        with pytest.raises(ValueError, match=message):
            Items(inputs, targets)


def test_spread_items_are_distinct_and_even():
    items = Items(torch.arange(1000.0)[:, None], torch.arange(1000))
    assert items.spread(10).targets.tolist() == list(range(0, 1000, 100))
    for count in (1, 3, 999, 1000, 5000):
        found = items.spread(count)
        assert len(found.targets.unique()) == min(count, 1000)
        assert torch.equal(found.inputs[:, 0].long(), found.targets)


def test_impossible_tasks_are_refused():
    score = Score(Metric("loss", "lower"), "test", cross_entropy)
    for settings, message in (
        ({"epochs": 0}, "epochs 0: expected at least 1"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"scored_train_items": 0}, "scored_train_items 0: expected at least 1"),
        ({"scores": ()}, "scores missing: expected at least one"),
        ({"scores": (score, score)}, "scores loss, loss: expected at least one, each of another name"),
    ):
        with pytest.raises(ValueError, match=message):
            task_of(**settings)
    with pytest.raises(ValueError, match="batch_size 64: task test has 42 training items; use fewer"):
        _ = task_of(batch_size=64).steps
    with pytest.raises(ValueError, match=r"network Sequential: cannot be run on a batch \[2, 6\] .*Bilinear"):
        _ = task_of(lambda: nn.Sequential(nn.Linear(6, 5), nn.Bilinear(5, 5, 3))).symmetry


TASK_FILE = """
from functools import partial
from torch import nn
import torch
from triptych_gpt.tasks import Items, SupervisedTask

def network(width):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

def points(part):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs[:, 0] > 0).long())

TASK = SupervisedTask("points", partial(network, width=4), points, epochs=3, batch_size=16)
"""


def test_recipe_is_the_same_in_every_process(tmp_path):
    (tmp_path / "points.py").write_text(TASK_FILE)
    script = (
        "import json, sys; from triptych_gpt.tasks import open_task; print(json.dumps(open_task(sys.argv[1]).recipe()))"
    )
    command = [sys.executable, "-c", script, f"{tmp_path / 'points.py'}:TASK"]
    first, second = (
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        for seed in ("1", "2")
    )
    assert first == second
    recipe = json.loads(first)
    assert recipe["optimizer"] == "SGD"
    assert recipe["builder"] == "triptych_gpt_task_points.network(width=4)"


def test_recipe_changes_with_every_setting_that_matters():
    task = task_of(small_conv_net, (3, 32, 32), augment=FlipAndCrop())
    others = [
        replace(task, epochs=5),
        replace(task, batch_size=4),
        replace(task, optimizer=momentum_sgd(lr=0.2)),
        replace(task, optimizer=momentum_sgd(weight_decay=0)),
        replace(task, optimizer=replace(momentum_sgd(), schedule="constant")),
        replace(task, optimizer=OptimizerSettings("AdamW", {"lr": 0.1, "betas": (0.9, 0.99)})),
        replace(task, loss=zero_one),
        replace(task, augment=None),
        replace(task, augment=FlipAndCrop(offsets=9)),
        replace(task, scored_train_items=9),
        replace(task, scores=classification()[:2]),
        replace(task, scores=(Score(Metric("test_loss", "lower"), "test", zero_one),)),
        replace(task, data=Noise((3, 32, 32), 43)),
        replace(task, network=SmallConvNet((4, 7))),
        replace(
            task, network=SmallConvNet((4, 6))
        ),  # the same layers by another builder, which may draw them otherwise
        replace(task, network=partly_frozen_cnn),
    ]
    recipes = [json.dumps(each.recipe(), sort_keys=True) for each in (task, *others)]
    assert len(set(recipes)) == len(recipes)
    assert recipes[0] == json.dumps(replace(task).recipe(), sort_keys=True)


def partly_frozen_cnn() -> nn.Module:
    network = small_conv_net()
    network.conv1.requires_grad_(False)
    return network


def test_recipe_sees_a_changed_pixel_and_a_changed_label():
    changed = []
    for part in ("train", "test"):
        for place in ("inputs", "targets"):

            def data(which: str, part: str = part, place: str = place) -> Items:
                items = Noise((6,))(which)
                if which == part:
                    getattr(items, place)[-1] += 1
                return items

            changed.append(data)
    hashes = {json.dumps(task_of().recipe()["data"] | {"name": ""})}
    hashes |= {json.dumps(replace(task_of(), data=data).recipe()["data"] | {"name": ""}) for data in changed}
    assert len(hashes) == 5


def test_prompts_do_not_change_the_recipe():
    prompted = task_of(scores=classification(Prompts(0.1, 0.2)))
    assert prompted.recipe() == task_of().recipe()


def test_callables_are_described_by_name_and_settings():
    class Plain:
        def __call__(self) -> None: ...

    assert describe(cross_entropy) == "triptych_gpt.tasks.measures.cross_entropy"
    assert describe(FlipAndCrop()) == "FlipAndCrop(padding=4, offsets=8)"
    assert describe(partial(mlp, 3, width=4)).endswith("test_supervised.mlp(3, width=4)")
    assert describe(partial(SmallConvNet, (4, 6))) == "triptych_gpt.tasks.cifar_cnn.SmallConvNet((4, 6))"
    with pytest.raises(ValueError, match="Plain object: its settings are unknown"):
        describe(Plain())
