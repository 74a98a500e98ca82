"""Verdicts on chapter 3's claims, from made-up results: confirmed, refuted, undecided."""

import copy

import pytest
from triptych_thesis.chapter3.experiments import (
    initialisers,
    landscape,
    neighbours,
    one_update,
    optimisation,
    prompt_sweep,
    scaling,
)
from triptych_thesis.study.verdicts import CONFIRMED, NOT_RUN, REFUTED, UNDECIDED, VERDICTS


def only(verdicts, claim: str) -> str:
    """The verdict on the one claim, which has evidence."""
    (verdict,) = verdicts
    assert verdict.claim == claim
    assert verdict.verdict in VERDICTS
    assert verdict.evidence
    return verdict.verdict


def texts(verdicts) -> str:
    return " ".join(each.line for verdict in verdicts for each in verdict.evidence)


# --- Figure 3.3


def method(name: str, kind: str, mean: float, *, non_finite: int = 0) -> dict:
    return {
        "name": name,
        "kind": kind,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
        "networks": 5,
        "non_finite": non_finite,
    }


def one_step(model: float, adam: float, *, metric: str = "test_loss", better: str = "lower", **options) -> dict:
    methods = [method("G.pt", "model", model, **options), method("retrieval", "baseline", 0.3), method("identity", "baseline", 2.3),
               method("mean of finals", "baseline", 2.1)]  # fmt: skip
    optimisers = [method("Adam", "optimiser", adam), method("SGD", "optimiser", 2.0)]
    data = {"metric": metric, "better": better, "start": 2.3, "trained_best": 0.3, "methods": methods + optimisers}
    return {"networks": 5, "asked": metric, "prompt": 0.0, "figures": {metric: data}}


@pytest.mark.parametrize(("result", "verdict"), [
    (one_step(0.5, 1.8), CONFIRMED),
    (one_step(1.9, 1.5), REFUTED),
    (one_step(1.7, 1.8), UNDECIDED),
    (one_step(0.5, 1.8, non_finite=1), UNDECIDED),
    (one_step(3.0, 2.5, metric="return", better="higher"), CONFIRMED),
    (one_step(0.5, 1.8, metric="return", better="higher"), REFUTED),
])  # fmt: skip
def test_one_update_must_be_better_than_every_optimisers_step(result, verdict):
    assert only(one_update.verdicts(result), "gpt.fig-3.3") == verdict


def test_one_update_is_judged_by_test_metrics_beside_what_could_fake_them():
    result = one_step(0.5, 1.8)
    result["figures"]["train_loss"] = one_step(1.9, 1.5, metric="train_loss")["figures"]["train_loss"]
    assert only(one_update.verdicts(result), "gpt.fig-3.3") == CONFIRMED
    for needed in ("1.800 [1.700, 1.900] of one step of Adam", "of retrieval", "of identity", "of mean of finals"):
        assert needed in texts(one_update.verdicts(result))
    result["figures"]["test_error"] = one_step(1.9, 1.5, metric="test_error")["figures"]["test_error"]
    assert only(one_update.verdicts(result), "gpt.fig-3.3") == REFUTED
    unsupervised = one_step(0.5, 1.8)
    data = unsupervised["figures"]["test_loss"]
    data["methods"] = [each for each in data["methods"] if each["kind"] != "optimiser"]
    assert only(one_update.verdicts(unsupervised), "gpt.fig-3.3") == NOT_RUN


# --- Figure 3.4


def curves(sgd: list[float], adam: list[float], steps: list[int], *, level: float | None = 0.5) -> dict:
    """Curves whose intervals are about 0.03 wide to either side; the update's, 0.05."""

    def curve(name: str, means: list[float]) -> dict:
        caught = next(
            (step for step, mean in zip(steps, means, strict=True) if level is not None and mean <= level), None
        )
        envelope = {"mean": means, "standard_error": [0.01] * len(means)}
        return {"optimizer": name, "networks": 5, "steps": steps, "envelope": envelope, "caught_up": caught}

    one = {
        "mean": level,
        "low": level and level - 0.05,
        "high": level and level + 0.05,
        "non_finite": 0 if level else 5,
    }
    return {"metric": "test_loss", "better": "lower", "start": 2.3, "one_step": one, "trained_best": 0.2, "budget": steps[-1],
            "curves": [curve("SGD", sgd), curve("Momentum", adam), curve("Adam", adam)]}  # fmt: skip


LONG = [1, 10, 100, 900, 2000, 9000]


@pytest.mark.parametrize(("result", "verdict"), [
    (curves([2.2, 2.0, 1.8, 0.9, 0.5, 0.2], [2.2, 2.0, 1.5, 0.8, 0.4, 0.3], LONG), CONFIRMED),
    (curves([2.2, 2.0, 1.8, 0.9, 0.5, 0.2], [2.2, 1.0, 0.3, 0.3, 0.3, 0.3], LONG), REFUTED),
    (curves([2.2, 2.0, 1.8, 0.9, 0.8, 0.7], [2.2, 2.0, 1.5, 0.8, 0.4, 0.3], LONG), UNDECIDED),  # SGD never gets there
    (curves([2.2, 2.0, 1.8, 0.52, 0.5, 0.2], [2.2, 2.0, 1.5, 0.8, 0.4, 0.3], LONG), UNDECIDED),  # level at 900?
    (curves([2.2, 1.0, 0.7], [2.2, 0.5, 0.3], [1, 100, 700]), UNDECIDED),  # too short for thousands
    (curves([2.2, 1.0, 0.7], [0.3, 0.3, 0.3], [1, 100, 700]), REFUTED),  # not even later than one step
    (curves([2.2] * 6, [2.2] * 6, LONG, level=None), UNDECIDED),
])  # fmt: skip
def test_optimisers_must_need_thousands_of_steps_and_end_better(result, verdict):
    assert only(optimisation.verdicts(result), "gpt.fig-3.4") == verdict


def test_the_wait_is_reported_for_every_optimiser():
    result = curves([2.2, 1.0, 0.7], [2.2, 0.5, 0.3], [1, 100, 700])
    (verdict,) = optimisation.verdicts(result)
    assert verdict.evidence[0].ours == "more than 700 and 100"
    assert verdict.evidence[0].thesis == "thousands"
    assert "100 of Momentum" in verdict.evidence[0].line
    assert "the identity" in texts([verdict])
    assert "retrieval" in texts([verdict])
    assert "700 steps are too few" in verdict.why
    assert only(optimisation.verdicts({**result, "curves": []}), "gpt.fig-3.4") == NOT_RUN


# --- Figure 3.5


def sweep(r2: float, gains: list[float]) -> dict:
    """R^2 with an interval of 0.1 to either side; gains of what is asked beyond the best, network by network."""
    prompts = [0.0, 0.2, 0.4, 1.0, 2.0]  # the best training checkpoint has 0.3
    own = {
        "metric": "test_loss", "better": "lower", "trained_best": {"test_loss": 0.3}, "prompts": [prompts] * len(gains),
        "achieved": {"test_loss": [[0.45 - 0.4 * gain, 0.45, 0.45, 1.0, 2.0] for gain in gains]},
    }  # fmt: skip

    def alignment(value: float) -> dict:
        estimate = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {"metric": "test_loss", "networks": len(gains), "r2": estimate, "r2_reachable": estimate}

    named = {"G.pt": r2, "retrieval": 0.96, "mean of finals": -1.9, "mean of matched finals": -0.3, "identity": -2.7}
    return {"sweeps": {"G.pt": own}, "alignment": {name: alignment(value) for name, value in named.items()}}


@pytest.mark.parametrize(("result", "verdict"), [
    (sweep(0.93, [0.0, 0.1, -0.1]), CONFIRMED),
    (sweep(-2.7, [0.0, 0.1, -0.1]), REFUTED),
    (sweep(0.05, [0.0, 0.1, -0.1]), UNDECIDED),
    (sweep(0.93, [0.9, 1.0, 0.95]), REFUTED),
    (sweep(0.93, [0.0, 1.0, 0.4]), UNDECIDED),
])  # fmt: skip
def test_prompts_must_be_followed_and_gain_little_beyond_the_best(result, verdict):
    verdicts = prompt_sweep.verdicts(result)
    assert only(verdicts, "gpt.fig-3.5") == verdict
    for needed in (
        "0.960 [0.860, 1.060] of retrieval",
        "of identity",
        "of mean of finals",
        "of mean of matched finals",
    ):
        assert needed in texts(verdicts)


def test_gains_are_shares_of_what_was_asked_beyond_the_last_reachable_prompt():
    own = sweep(0.9, [0.25, 0.5])["sweeps"]["G.pt"]
    assert prompt_sweep.beyond_best(own) == pytest.approx([0.25, 0.5])
    own["achieved"]["test_loss"][0][0] = None
    assert prompt_sweep.beyond_best(own) == pytest.approx([0.5])
    assert prompt_sweep.beyond_best({**own, "trained_best": {"test_loss": -1.0}}) == []
    assert prompt_sweep.beyond_best({**own, "trained_best": {}}) == []
    higher = {
        "metric": "return", "better": "higher", "trained_best": {"return": 300.0}, "prompts": [[500.0, 400.0, 200.0, 0.0]],
        "achieved": {"return": [[260.0, 240.0, 200.0, 10.0]]},
    }  # fmt: skip
    assert prompt_sweep.beyond_best(higher) == pytest.approx([0.2])
    result = sweep(0.93, [0.0, 0.1])
    result["sweeps"]["G.pt"]["trained_best"] = {}
    assert only(prompt_sweep.verdicts(result), "gpt.fig-3.5") == UNDECIDED


# --- Figure 3.6


def recursion(first: float, last: float, *, known: float = 0.1, updates: int = 10) -> dict:
    """Test errors of four networks of one foreign initialiser after one and after all updates."""

    def curve(one: float, end: float) -> dict:
        spread = (-0.01, 0.0, 0.01, 0.0)
        rows = [[0.9, *[one + s] * (updates - 1), end + s] if updates > 1 else [0.9, one + s] for s in spread]
        return {"metrics": {"test_loss": rows, "test_error": rows}, "mean": [0.0] * (updates + 1)}

    curves = {"default": curve(known, known), "kaiming_normal": curve(first, last)}
    return {"metric": "test_loss", "better": "lower", "known": "default", "curves": curves}


@pytest.mark.parametrize(("result", "verdict"), [
    (recursion(0.4, 0.13), CONFIRMED),
    (recursion(0.4, 0.5), REFUTED),
    (recursion(0.05, 0.03), REFUTED),
    (recursion(0.105, 0.05), UNDECIDED),
    (recursion(0.4, 0.4), UNDECIDED),
    (recursion(0.4, 0.4, updates=1), UNDECIDED),
])  # fmt: skip
def test_foreign_initialisers_must_do_worse_at_first_and_better_in_the_end(result, verdict):
    verdicts = initialisers.verdicts(result)
    assert only(verdicts, "gpt.fig-3.6") == verdict
    assert "before any (the identity)" in texts(verdicts)
    assert "from the zoo's own" in texts(verdicts)


def test_the_tenth_update_decides_and_missing_networks_are_left_out():
    result = recursion(0.4, 0.6, updates=12)  # worse again at the twelfth
    for row in result["curves"]["kaiming_normal"]["metrics"]["test_error"]:
        row[10] = 0.13
    assert only(initialisers.verdicts(result), "gpt.fig-3.6") == CONFIRMED
    result["curves"]["kaiming_normal"]["metrics"]["test_error"][0][1] = None
    assert only(initialisers.verdicts(result), "gpt.fig-3.6") == CONFIRMED
    alone = {**result, "curves": {"default": result["curves"]["default"]}}
    (verdict,) = initialisers.verdicts(alone)
    assert verdict.verdict == UNDECIDED


# --- Figure 3.7


def scaled(size: list[float], data: list[tuple[int, float]]) -> dict:
    def point(x: float, r2: float) -> dict:
        return {"x": x, "r2": r2, "low": r2 - 0.05, "high": r2 + 0.05}

    panels = {"parameters of G.pt": [point(10**i, r2) for i, r2 in enumerate(size, start=4)],
              "training runs": [point(*pair) for pair in data]}  # fmt: skip
    return {"panels": [{"label": label, "points": points, "train": points} for label, points in panels.items()]}


FLAT = [(500, 0.1), (5000, 0.6), (25_000, 0.9), (45_000, 0.92)]


@pytest.mark.parametrize(("result", "verdict"), [
    (scaled([0.1, 0.5, 0.9], FLAT), CONFIRMED),
    (scaled([0.1, 0.9, 0.5], FLAT), REFUTED),  # the largest is worse than a smaller one
    (scaled([0.1, 0.5, 0.9], [(500, 0.6), (5000, 0.1), (25_000, 0.2)]), REFUTED),
    (scaled([0.1, 0.5, 0.9], [*FLAT[:3], (45_000, 1.2)]), REFUTED),  # still rising
    (scaled([0.1, 0.5, 0.9], FLAT[:2]), UNDECIDED),  # nothing that could flatten
    (scaled([0.10, 0.12, 0.15], FLAT), UNDECIDED),
])  # fmt: skip
def test_alignment_must_rise_with_size_and_data_and_flatten(result, verdict):
    verdicts = scaling.verdicts(result)
    assert only(verdicts, "gpt.fig-3.7") == verdict
    assert "of the identity" in texts(verdicts)
    assert "on its training runs" in texts(verdicts)
    assert bool(verdicts[0].why) == (len(result["panels"][1]["points"]) < 4)


# --- Figure 3.8


def land(ridge: float, *, samples: int = 2) -> dict:
    """Samples to the left and right of a ridge of this height, at metric 0.1; the start has 1.1."""
    side = 11
    axis = [-1 + 0.2 * i for i in range(side)]
    values = [[0.1 + ridge * (abs(x) < 0.15) for x in axis] for _ in axis]
    places = [[-0.6, 0.0], [0.6, 0.0]][:samples]
    return {"better": "lower", "start_metric": 1.1, "x": axis, "y": axis, "values": values, "samples": places,
            "projected_metric": [0.1] * samples, "accurate": [True] * samples}  # fmt: skip


def around(lands: list[dict], noise: float, starts: float, *, raw: float = 5.0) -> dict:
    spreads = {"noise": {"raw": 1.0, "matched": noise}, "starts": {"raw": raw, "matched": starts},
               "before": {"raw": 4.0, "matched": 3.0}}  # fmt: skip
    return {"landscapes": lands, "diversity": spreads}


@pytest.mark.parametrize(("result", "verdict"), [
    (around([land(0.5), land(0.5)], 1.0, 4.0), CONFIRMED),
    (around([land(0.05), land(0.0)], 1.0, 4.0), REFUTED),
    (around([land(0.5), land(0.0)], 1.0, 4.0), UNDECIDED),
    (around([land(0.5), land(0.5, samples=1)], 1.0, 4.0), UNDECIDED),
    (around([land(0.5), land(0.5)], 4.0, 1.0, raw=0.5), REFUTED),
    (around([land(0.5), land(0.5)], 4.0, 1.0), UNDECIDED),  # raw and matched distances disagree
])  # fmt: skip
def test_samples_must_fall_into_regions_and_starts_vary_them_most(result, verdict):
    verdicts = landscape.verdicts(result)
    assert only(verdicts, "gpt.fig-3.8") == verdict
    assert "the identity" in texts(verdicts)


def test_regions_are_parted_by_rises_and_hold_only_samples_that_improved_and_lie_in_the_plane():
    assert landscape.regions(land(0.5)) == [[0], [1]]
    assert landscape.regions(land(0.05)) == [[0, 1]]
    assert landscape.regions({**land(0.5), "accurate": [True, False]}) == [[0]]
    assert landscape.regions({**land(0.5), "projected_metric": [0.1, 1.2]}) == [[0]]
    higher = copy.deepcopy(land(0.5))
    higher |= {"better": "higher", "start_metric": -1.1, "projected_metric": [-0.1, -0.1]}
    higher["values"] = [[-value for value in row] for row in higher["values"]]
    assert landscape.regions(higher) == [[0], [1]]


# --- Figure 3.9


def scores(shares: list[float | None], *, margin: float = 0.1) -> dict:
    """Scores by prompt, the best first; the stricter kinds score nothing."""

    def of(shares: list[float | None]) -> list[dict]:
        rows = []
        for i, share in enumerate(shares):
            for matched, near in neighbours.KINDS:
                value = share if (matched, near) == (False, False) else 0.0
                score = None if value is None else {"value": value, "low": value - margin, "high": value + margin}
                rows.append({"target": float(i), "matched": matched, "near_prompt": near, "score": score})
        return rows

    n = len(shares)
    return {
        "metric": "test_loss",
        "scores": {"G.pt": of(shares), "identity": of([1.0] * n), "retrieval": of([0.0] * n)},
    }


@pytest.mark.parametrize(("result", "verdict"), [
    (scores([1.0, 1.0, 1.0, 1.0, 1.0]), CONFIRMED),
    (scores([0.2, 0.5, 1.0, 1.0, 1.0]), CONFIRMED),  # drops at the smallest prompts only
    (scores([1.0, 0.2, 1.0, 1.0, 1.0]), REFUTED),  # fails where a better network was asked for and found
    (scores([0.2, 0.2, 0.2, 1.0, 1.0]), REFUTED),
    (scores([0.5, 0.5, 0.5, 1.0, 1.0]), UNDECIDED),
    (scores([None, None, None, 1.0, 1.0]), UNDECIDED),
])  # fmt: skip
def test_samples_must_lie_nearest_to_their_own_run_but_at_the_smallest_prompts(result, verdict):
    verdicts = neighbours.verdicts(result)
    assert only(verdicts, "gpt.fig-3.9") == verdict
    assert "5 of identity, 0 of retrieval" in texts(verdicts)
    assert "near the prompt, units matched: 0% [-10%, 10%]" in texts(verdicts)
