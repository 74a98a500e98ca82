"""The audit distinguishes copies from new networks, at known distances, and its sentences follow from the numbers."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from triptych_gpt.evaluation.baselines import nearest_in_metric
from triptych_gpt.memorization import (
    HELD_OUT,
    HELD_OUT_FINALS,
    SAMPLES,
    Group,
    audit,
    error_overlap,
    held_out,
    made_of_training,
    predictions,
    verdict,
)
from triptych_gpt.nearest import Nearest
from triptych_gpt.tasks import Cohort, Items, SupervisedTask
from triptych_gpt.zoo.store import CohortData
from triptych_gpt.zoo.zoo import Zoo

SCALE = 2.0
RUNS = {"train": range(40), "test": range(40, 60)}


@dataclass(frozen=True)
class Points:
    def __call__(self, part: str) -> Items:
        inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(len(part)))
        return Items(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long() + (inputs[:, 2] > 1).long())


def mlp():
    return nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))


TASK = SupervisedTask("tiny", mlp, Points(), epochs=6, batch_size=16)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, write_zoo):
    cohorts = []
    for number, (split, runs) in enumerate(RUNS.items()):
        made = TASK.train_cohort(Cohort(3, number, runs, checkpoints=8), torch.device("cpu"), len(runs))
        scores = {k: v.view(len(runs), -1) for k, v in TASK.evaluate(made.theta.flatten(0, 1)).items()}
        cohorts.append(CohortData(runs, made.theta, made.steps, scores, {"split": split}, {}))
    folder = tmp_path_factory.mktemp("zoo")
    write_zoo(folder, TASK.layout, {metric.name: metric.better for metric in TASK.metrics}, *cohorts)
    return Zoo(folder)


@pytest.fixture(scope="module")
def targets(zoo):
    return torch.full((16,), float(zoo.metrics("test_loss")[:, -1].mean()))


def copies_of(zoo, count=16, sigma=0.001):
    """Training finals with their hidden units in another order, and a little noise."""
    theta = zoo.theta(range(count), [7] * count)
    noise = sigma * torch.randn(theta.shape, generator=torch.Generator().manual_seed(0))
    return TASK.symmetry.apply(theta, TASK.symmetry.draw(9, range(count))) + noise


def fresh(count=16):
    """Finals of runs that are in no zoo."""
    return TASK.train_cohort(
        Cohort(3, 7, range(100, 100 + count), checkpoints=2), torch.device("cpu"), count
    ).theta[:, -1]  # fmt: skip


def test_copies_are_called_memorised_and_fresh_networks_are_not(zoo, targets):
    copied = audit(copies_of(zoo), zoo, TASK, "test_loss", targets, SCALE)
    assert copied.memorised
    assert copied.verdict[0].startswith("Memorised: 100% [")
    assert "is smaller than that of held-out finals" in copied.verdict[1]
    assert copied.group(SAMPLES).nearest.run.tolist() == list(range(16))
    assert copied.group(SAMPLES).agreement.mean() > 0.99
    assert copied.group(SAMPLES).error_overlap.mean() > 0.97

    new = audit(fresh(), zoo, TASK, "test_loss", targets, SCALE)
    assert not new.memorised
    assert new.verdict[0].startswith("Copies: 0% [0%")
    assert "smaller than that of held-out finals" not in new.verdict[1].replace("no smaller", "")
    assert new.group(SAMPLES).agreement.mean() < 0.95
    assert all(not line.startswith("Does not beat noised") for line in new.verdict)
    assert any(line.startswith("Does not beat noised") for line in copied.verdict)


def test_every_group_has_its_own_nearest_training_networks(zoo, targets):
    result = audit(fresh(), zoo, TASK, "test_loss", targets, SCALE)
    names = [group.name for group in result.groups]
    assert names == [
        SAMPLES, HELD_OUT_FINALS, HELD_OUT, "noised 0.05", "noised 0.1", "mean of 2", "mean of 4", "retrieval"
    ]  # fmt: skip
    taken = result.group("retrieval")
    assert taken.distance.abs().max() == 0
    assert (taken.agreement == 1).all()
    assert (taken.error_overlap == 1).all()
    recorded = zoo.metrics("test_loss")[nearest_in_metric(zoo, "test_loss", targets)]
    torch.testing.assert_close(taken.metrics["test_loss"], recorded.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.groups[0].norm, fresh().double().square().sum(1).sqrt())
    for group in result.groups:
        assert (group.final_distance >= group.distance - 1e-9).all()
    # noise of sigma in normalised units has length sigma sqrt(D) / scale, all of it off the training set
    expected = 0.1 / SCALE * TASK.layout.size**0.5
    assert result.group("noised 0.1").distance.max() < 1.5 * expected
    assert result.group("noised 0.1").distance.median() > 0.6 * expected
    written = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert written["groups"][0]["median_distance"]["value"] == pytest.approx(
        float(result.groups[0].distance.quantile(0.5))
    )
    assert written["searched"] == "320 checkpoints of 40 training runs"


def test_a_search_of_some_checkpoints_is_reported_and_never_nearer(zoo, targets):
    whole = audit(fresh(4), zoo, TASK, "test_loss", targets[:4], SCALE)
    some = audit(fresh(4), zoo, TASK, "test_loss", targets[:4], SCALE, every=4)
    assert "every 4th" in some.searched
    assert (some.groups[0].distance >= whole.groups[0].distance).all()
    assert torch.equal(some.groups[0].final_distance, whole.groups[0].final_distance)


def test_only_runs_that_the_model_was_trained_on_are_searched(zoo, targets):
    few = np.arange(5, 15)
    known = audit(copies_of(zoo), zoo, TASK, "test_loss", targets, SCALE, rows=few)
    for group in known.groups:
        assert set(group.nearest.run.tolist()) <= set(few.tolist()), group.name
    assert known.searched == "80 checkpoints of 10 training runs"
    copied = torch.tensor([run in few for run in range(16)])
    assert known.group(SAMPLES).distance[copied].max() < 0.05 < known.group(SAMPLES).distance[~copied].min()
    # baselines are made of those runs, too: noise alone parts them from one
    assert known.group("noised 0.05").distance.max() < 1.5 * 0.05 / SCALE * TASK.layout.size**0.5
    assert known.group("retrieval").distance.max() == 0


def test_baselines_come_from_training_runs_of_the_targets_metric(zoo, targets):
    made = made_of_training(zoo, TASK.symmetry, "test_loss", targets, SCALE, 0, zoo.runs_in("train"))
    again = made_of_training(zoo, TASK.symmetry, "test_loss", targets[:5], SCALE, 0, zoo.runs_in("train"))
    assert all(torch.allclose(again[name], made[name][:5]) for name in made)
    # averaged unmatched, networks would be far worse
    scores = {name: TASK.evaluate(theta)["test_loss"].mean() for name, theta in made.items()}
    assert scores["noised 0.05"] < scores["noised 0.1"] + 0.05
    assert scores["mean of 2"] < zoo.metrics("test_loss")[:, 0].mean()
    early = torch.full((6,), float(zoo.metrics("test_loss")[:, 0].mean()))
    first = held_out(zoo, "test_loss", early)
    assert TASK.evaluate(first[HELD_OUT])["test_loss"].sub(early).abs().max() < 0.3
    assert torch.equal(first[HELD_OUT_FINALS], zoo.theta(range(40, 46), [7] * 6))


def test_predictions_are_the_networks_own_and_overlap_is_intersection_over_union():
    theta = TASK.initial(0, range(3))
    found, network = predictions(TASK, theta), mlp()
    for row, expected in zip(theta, found, strict=True):
        network.load_state_dict(TASK.layout.unflatten(row))
        assert torch.equal(network(TASK.items["test"].inputs).argmax(1), expected)
    truth = torch.tensor([0, 0, 0, 0])
    ours = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    theirs = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert error_overlap(ours, theirs, truth).tolist() == pytest.approx([1 / 3, 1.0, 0.0])


def group(name, distance, loss, n=50, copies=0, noise=0.01, norm=10.0):
    """Networks of about this distance and loss, the first few of them copies."""
    rng = torch.Generator().manual_seed(len(name))
    spread = 0.01 * torch.randn(n, generator=rng, dtype=torch.float64)
    far = torch.where(torch.arange(n) < copies, 0.0, distance + spread)
    nearest = Nearest(far, torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long))
    return Group(name, nearest, far, norm + spread, {"loss": loss + spread * noise / 0.01})


def sentences(distance, loss, better="lower", *, held_out=None, **samples):
    references = [group(name, 5.0, 1.0, **(held_out or {})) for name in (HELD_OUT_FINALS, HELD_OUT)]
    groups = (
        group(SAMPLES, distance, loss, **samples), *references, group("noised 0.1", 1.0, 2.0), group("mean of 2", 3.0, 1.0)
    )  # fmt: skip
    memorised, lines = verdict(groups, "loss", better)
    return memorised, lines


@pytest.mark.parametrize(
    ("distance", "loss", "better", "noised", "mean"),
    [
        (4.0, 0.5, "lower", "Beats", "Beats"),
        (2.0, 0.5, "lower", "Beats", "Does not beat"),  # nearer than averages
        (4.0, 1.5, "lower", "Beats", "Does not beat"),  # worse than averages
        (4.0, 1.5, "higher", "Does not beat", "Beats"),
        (1.0, 1.0, "lower", "Undecided against", "Does not beat"),  # as near as noise, but better
        (0.1, 0.1, "lower", "Does not beat", "Does not beat"),
    ],
)
def test_a_baseline_is_beaten_by_novelty_at_no_worse_performance(distance, loss, better, noised, mean):
    _, lines = sentences(distance, loss, better)
    assert lines[3].startswith(f"{noised} noised 0.1: ")
    assert lines[4].startswith(f"{mean} mean of 2: ")
    # real networks, at distance 5.0 and of metric 1.0, are compared in the same way
    assert lines[3].endswith(f"{HELD_OUT}: {'beats' if better == 'lower' else 'does not beat'} it.")


@pytest.mark.parametrize(
    ("loss", "noise", "word", "fit"),
    [
        (0.9, 1.0, "Undecided against", "loss not shown to differ"),  # better by a point estimate alone
        (1.01, 0.01, "Beats", "loss no worse by more than 2%"),
        (1.03, 0.01, "Does not beat", "loss worse"),
        (0.97, 0.01, "Beats", "loss better"),
    ],
)
def test_performance_is_no_worse_only_where_its_interval_says_so(loss, noise, word, fit):
    line = sentences(4.0, loss, noise=noise)[1][4]
    assert line.startswith(f"{word} mean of 2: farther from training networks")
    assert fit in line
    higher = sentences(4.0, 2 - loss, "higher", noise=noise)[1][4]
    assert higher.startswith(f"{word} mean of 2: farther from training networks")


@pytest.mark.parametrize(
    ("n", "copies", "of_held_out", "memorised"),
    [
        (100, 6, 6, False),
        (100, 30, 6, True),
        (100, 6, 0, True),
        (100, 8, 6, False),
        (3, 3, 0, False),
        (50, 50, 50, False),
    ],
)
def test_memorised_is_more_copies_than_real_networks_are(n, copies, of_held_out, memorised):
    found, lines = sentences(5.0, 1.0, n=n, copies=copies, held_out={"n": n, "copies": of_held_out})
    assert found == memorised
    assert lines[0].startswith(f"{'Memorised' if memorised else 'Copies'}: {copies / n:.0%} [")
    assert f"{of_held_out / n:.0%} [" in lines[0]


def test_samples_smaller_than_real_networks_are_called_shrunken():
    _, lines = sentences(4.0, 1.0, norm=7.0)
    assert len([line for line in lines if line.startswith("The samples are shrunken: their median norm, 7, is")]) == 1
    assert not any("shrunken" in line for norm in (10.0, 12.0) for line in sentences(4.0, 1.0, norm=norm)[1])
    written = group(SAMPLES, 1.0, 1.0, norm=7.0).as_dict()["median_norm"]
    assert written["value"] == pytest.approx(7.0, abs=0.01)
    assert written["low"] < written["value"] < written["high"]


def test_the_reference_is_real_networks_that_no_model_saw():
    assert "is no smaller than that of held-out finals" in sentences(5.5, 1.0)[1][1]
    assert "is smaller than that of held-out finals" in sentences(4.5, 1.0)[1][1]
    assert "is not shown to differ from that of held-out finals" in sentences(5.0, 1.0)[1][1]
    assert [sentences(distance, 1.0)[0] for distance in (0.5, 1.5, 5.0)] == [True, False, False]


def test_what_cannot_be_audited_is_one_line(zoo, targets):
    with pytest.raises(ValueError, match=r"scale 0\.0: expected"):
        audit(fresh(4), zoo, TASK, "test_loss", targets[:4], 0.0)
    with pytest.raises(ValueError, match="metric 'accuracy': expected one of test_loss"):
        audit(fresh(4), zoo, TASK, "accuracy", targets[:4], SCALE)
