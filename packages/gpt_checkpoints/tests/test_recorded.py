"""The steps after which a run is recorded: uniform, or mostly from its beginning."""

import pytest
import torch
from triptych_gpt.tasks import Cohort
from triptych_gpt.tasks.supervised import recorded_steps

STEPS, RUNS = 400, 500


def cohort(**options):
    return Cohort(3, 0, range(RUNS), **{"checkpoints": 42, **options})


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("checkpoints", [2, 3, 4, 42, STEPS, STEPS + 1])
def test_every_run_has_its_ends_and_no_step_twice(early, checkpoints):
    steps = recorded_steps(cohort(checkpoints=checkpoints, early=early), STEPS)
    assert steps.shape == (RUNS, checkpoints)
    assert (steps[:, 0] == 0).all()
    assert (steps[:, -1] == STEPS).all()
    assert (steps.diff(dim=1) > 0).all()


def test_early_steps_are_half_by_one_over_step_and_half_uniform():
    """Expected counts by step, from drawing without replacement one at a time, beside the fraction found in 500 runs."""
    steps = recorded_steps(cohort(early=True), STEPS)
    found = torch.bincount(steps.flatten(), minlength=STEPS + 1)[1:STEPS].double() / RUNS
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, STEPS, dtype=torch.float64)
    drawn = torch.stack([torch.multinomial(weights, 20, generator=generator) for _ in range(4000)])
    first = torch.bincount(drawn.flatten(), minlength=STEPS - 1).double() / 4000
    expected = first + (1 - first) * 20 / (STEPS - 1 - 20)
    assert (found - expected).abs().max() < 5 * 0.5 / RUNS**0.5
    assert abs(found[:20].sum() - expected[:20].sum()) < 0.5
    uniform = recorded_steps(cohort(), STEPS)
    assert ((steps <= 20).sum(1).double().mean()) > 3 * ((uniform <= 20).sum(1).double().mean())


def test_a_run_is_recorded_alike_in_any_cohort():
    whole = recorded_steps(cohort(early=True), STEPS)
    part = recorded_steps(Cohort(3, 7, range(10, 20), 42, early=True), STEPS)
    assert torch.equal(part, whole[10:20])
