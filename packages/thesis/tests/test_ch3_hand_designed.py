"""Hand-designed optimisers: each network's updates are PyTorch's own, and the test networks choose nothing."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from triptych_common.randomness import permutation
from triptych_gpt.tasks import Items, SupervisedTask
from triptych_thesis.chapter3.hand_designed import OPTIMIZERS, Curve, GridPoint, grid_of, optimise, spaced_steps


@dataclass(frozen=True)
class Noise:
    """Normal items of three classes, four of them left over by batches of eight."""

    def __call__(self, part: str) -> Items:
        rng = torch.Generator().manual_seed(len(part))
        return Items(torch.randn(36, 6, generator=rng), torch.arange(36) % 3)


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


TASK = SupervisedTask("tiny", mlp, Noise(), epochs=3, batch_size=8)  # 12 steps
TEST, VALIDATION = TASK.initial(1, range(3)).double(), TASK.initial(2, range(2)).double()


def by_hand(name, point, theta, steps, seed):
    """Test loss of one network after each of `steps`, trained by a plain loop in float64."""
    kind, fixed = OPTIMIZERS[name]
    network = mlp().double()
    network.load_state_dict(TASK.layout.unflatten(theta))
    optimizer = getattr(torch.optim, kind)(
        network.parameters(), lr=point.learning_rate, weight_decay=point.weight_decay, **fixed
    )
    train, test = TASK.items["train"], TASK.items["test"]
    losses = []
    for step in range(max(steps)):
        epoch, batch = divmod(step, 4)
        rows = permutation(seed, "batches/cohort-0", epoch, 36)[batch * 8 : batch * 8 + 8]
        optimizer.zero_grad()
        F.cross_entropy(network(train.inputs[rows].double()), train.targets[rows]).backward()
        optimizer.step()
        if step + 1 in steps:
            with torch.no_grad():
                losses.append(float(F.cross_entropy(network(test.inputs.double()), test.targets)))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch_optim_network_by_network(name):
    steps = (1, 2, 7, 15)  # beyond the task's own three epochs
    curve = optimise(TASK, name, TEST, VALIDATION, "test_loss", steps, seed=4)
    grid = torch.tensor([[by_hand(name, p, theta, steps, 4) for theta in VALIDATION] for p in curve.grid])
    torch.testing.assert_close(curve.validation, grid.double().mean(1), rtol=1e-5, atol=0)
    for i in range(len(steps)):
        best = grid.double().mean(1)[:, i]
        assert best[curve.chosen[i]] == pytest.approx(best.min().item(), rel=1e-6)
        expected = [by_hand(name, curve.grid[curve.chosen[i]], theta, steps, 4)[i] for theta in TEST]
        torch.testing.assert_close(curve.envelope[i], torch.tensor(expected).double(), rtol=1e-5, atol=0)
    tuned = [by_hand(name, curve.grid[curve.chosen[-1]], theta, steps, 4) for theta in TEST]
    torch.testing.assert_close(curve.tuned, torch.tensor(tuned).double().T, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_update_is_one_step_of_torch_optim_in_float64(name):
    curve = optimise(TASK, name, TEST, VALIDATION, "test_loss", seed=9)
    expected = [by_hand(name, curve.grid[curve.chosen[0]], theta, (1,), 9)[0] for theta in TEST]
    torch.testing.assert_close(curve.tuned[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
    assert torch.equal(curve.tuned, curve.envelope)


def test_the_grid_is_pytorchs_default_rate_tenfold_less_and_more():
    assert grid_of("Momentum")[0] == GridPoint(pytest.approx(1e-4), 0.0)
    rates = {name: sorted({point.learning_rate for point in grid_of(name)}) for name in OPTIMIZERS}
    assert rates["Adam"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert rates["SGD"] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert rates["Adadelta"] == pytest.approx([0.1, 1.0, 10.0])
    assert rates["NAdam"] == pytest.approx([2e-4, 2e-3, 2e-2])
    assert {point.weight_decay for point in grid_of("AdamW")} == {0.0, 5e-5, 5e-4}
    assert all(len(set(grid_of(name))) == 9 for name in OPTIMIZERS)


def test_poisoned_test_networks_change_no_choice():
    steps = (1, 5, 12)
    sound = optimise(TASK, "RMSprop", TEST, VALIDATION, "test_loss", steps)
    for poison in (torch.full_like(TEST, math.nan), TEST * 20):
        poisoned = optimise(TASK, "RMSprop", poison, VALIDATION, "test_loss", steps)
        assert poisoned.chosen == sound.chosen
        assert torch.equal(poisoned.validation, sound.validation)
        assert not torch.equal(poisoned.tuned, sound.tuned)
    # the second would choose otherwise if it were asked
    assert optimise(TASK, "RMSprop", TEST, TEST * 20, "test_loss", steps).chosen != sound.chosen


def test_grid_points_that_diverge_are_not_chosen():
    wild = replace(TASK, loss=lambda outputs, targets: outputs.square().mean(2) * 1e30)
    curve = optimise(wild, "SGD", TEST.float(), VALIDATION.float(), "test_loss", (1, 12))
    finite = curve.validation.isfinite()
    assert not finite.all()
    written = json.dumps(curve.as_dict(), allow_nan=False)
    assert "null" in written
    tame = optimise(replace(TASK, loss=lambda o, t: o.square().mean(2)), "SGD", TEST, VALIDATION, "test_loss", (12,))
    assert tame.validation.isfinite().all()


def curve_of(tuned, envelope, better="lower", steps=(1, 3, 10)):
    def two(means):
        return torch.tensor([[mean - 1.0, mean + 1.0] for mean in means])

    validation = torch.tensor([tuned])
    return Curve("SGD", "m", better, steps, (GridPoint(0.1, 0.0),), (0, 0, 0), two(tuned), two(envelope), validation)


def test_the_step_that_reaches_a_value_is_the_first_scored_one_of_the_mean():
    curve = curve_of([5.0, 4.0, 2.0], [5.0, 3.0, 1.0])
    assert curve.steps_to_reach(4.0) == (3, 1)
    assert curve.steps_to_reach(2.0) == (10, 3)
    assert curve.steps_to_reach(6.0) == (1, 0)
    assert curve.steps_to_reach(0.5) == (None, 10)
    assert curve_of([1.0, 2.0, math.nan], [1.0, 2.0, math.nan], "higher").steps_to_reach(1.5) == (3, 1)
    assert curve_of([math.nan] * 3, [math.nan] * 3).steps_to_reach(1.5) == (None, 10)


def test_errors_over_networks_are_standard_errors():
    written = curve_of([5.0, 4.0, 2.0], [5.0, 3.0, 1.0]).as_dict()
    assert written["tuned"]["mean"] == [5.0, 4.0, 2.0]
    assert written["tuned"]["standard_error"] == pytest.approx([1.0, 1.0, 1.0])  # sd sqrt(2) of two networks
    assert written["tuned"]["learning_rate"] == 0.1


def test_spaced_steps_are_dense_and_end_where_asked():
    steps = spaced_steps(800)
    assert steps[:6] == (1, 2, 3, 4, 5, 6)
    assert steps[-1] == 800
    assert all(b - a <= max(1, 0.15 * a + 0.5) for a, b in pairwise(steps))
    assert spaced_steps(1) == (1,)


def test_what_cannot_be_run_is_one_line():
    with pytest.raises(ValueError, match="optimizer 'LBFGS': expected one of SGD, Momentum"):
        optimise(TASK, "LBFGS", TEST, VALIDATION, "test_loss")
    with pytest.raises(ValueError, match="metric 'loss': task tiny has test_loss"):
        optimise(TASK, "SGD", TEST, VALIDATION, "loss")
    with pytest.raises(ValueError, match=r"steps \(3, 2\): expected ascending"):
        optimise(TASK, "SGD", TEST, VALIDATION, "test_loss", (3, 2))
