"""PPO of ours beside stable-baselines3's in the same cartpole: python -m benchmarks.learning [--seeds 8] [--out FOLDER].

Both have the settings of `cartpole_small`; "ours, as theirs" also takes stable-baselines3's side in what the released code does
otherwise (deviations in docs/deviations.md). Return: of the task's fixed episodes, most likely actions, whoever trained the policy.
Writes learning.json and learning.png, and prints a table: medians over seeds, with quartiles.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triptych_common.plots import PALETTE, figure_png, legend, panels
from triptych_common.storage.files import write_bytes, write_json
from triptych_common.storage.provenance import provenance
from triptych_gpt.tasks import Cohort
from triptych_gpt.tasks.reinforcement import CARTPOLE_SMALL, ReinforcementTask
from triptych_gpt.zoo.sb3_import import policy_of

from benchmarks.suites.gpt_policies import sb3_policy

THEIRS = {"squared_std": False, "bootstrap_timeouts": True, "shuffle": True, "normalise": "minibatch"}
AS_THEIRS = replace(CARTPOLE_SMALL, ppo=replace(CARTPOLE_SMALL.ppo, **THEIRS, adam_eps=1e-5))


def ours(task: ReinforcementTask, seeds: int, every: int) -> Iterator[list[float]]:
    """Returns of all seeds' policies, before training and after every so many iterations."""
    cohort = Cohort(0, 0, range(seeds), shared_batches=False)
    learner, layout = task.learner(cohort, cohort.runs, torch.device("cpu")), task.layout
    for iteration in range(task.ppo.iterations + 1):
        if iteration % every == 0:
            theta = layout.flatten({name: learner.parameters[name].detach() for name in layout.names})
            yield task.returns(theta).tolist()
        if iteration < task.ppo.iterations:
            learner.iterate()


def theirs(task: ReinforcementTask, seed: int, every: int) -> Iterator[float]:
    """The same of one seed's policy."""
    from stable_baselines3.common.callbacks import CallbackList

    model, ppo = sb3_policy(task, "cpu", seed, task.ppo.epochs), task.ppo
    callback = CallbackList([])
    callback.init_callback(model)
    for iteration in range(ppo.iterations + 1):
        if iteration % every == 0:
            yield float(task.returns(policy_of(model.policy.state_dict(), task.layout, "sb3")[None])[0])
        if iteration < ppo.iterations:
            model.collect_rollouts(model.env, callback, model.rollout_buffer, ppo.steps)
            model._update_current_progress_remaining(iteration, ppo.iterations)
            model.train()


def measured(task: ReinforcementTask, as_theirs: ReinforcementTask, seeds: int, every: int) -> dict[str, Any]:
    """Curves [seeds, points] by name, and the seconds that they took."""
    torch.set_num_threads(1)
    curves, seconds = {}, {}
    for name, of in (("ours", task), ("ours, as theirs", as_theirs)):
        began = time.perf_counter()
        curves[name] = np.array(list(ours(of, seeds, every))).T.tolist()
        seconds[name] = time.perf_counter() - began
    began = time.perf_counter()
    curves["stable-baselines3"] = [list(theirs(as_theirs, seed, every)) for seed in range(seeds)]
    seconds["stable-baselines3"] = time.perf_counter() - began
    iterations = list(range(0, task.ppo.iterations + 1, every))
    return {
        "iterations": iterations,
        "returns": curves,
        "seconds": seconds,
        "ppo": asdict(as_theirs.ppo),
        **provenance(),
    }


def bands(curves: list[list[float]]) -> np.ndarray:
    """Quartiles over seeds, [3, points]."""
    return np.quantile(np.array(curves), (0.25, 0.5, 0.75), axis=0)


def table(result: dict[str, Any]) -> list[str]:
    names = list(result["returns"])
    quartiles = [bands(result["returns"][name]) for name in names]
    lines = ["| iteration | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for i, iteration in enumerate(result["iterations"]):
        cells = [f"{q[1, i]:.0f} [{q[0, i]:.0f}, {q[2, i]:.0f}]" for q in quartiles]
        lines.append(f"| {iteration} | " + " | ".join(cells) + " |")
    return lines


def figure(result: dict[str, Any]) -> bytes:
    drawn, (axes,) = panels()
    for color, (name, curves) in zip(PALETTE, result["returns"].items(), strict=False):
        low, median, high = bands(curves)
        axes.plot(result["iterations"], median, color=color, label=f"{name}, {len(curves)} seeds")
        axes.fill_between(result["iterations"], low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="iterations of PPO", ylabel="return")
    legend(axes)
    return figure_png(drawn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    result = measured(CARTPOLE_SMALL, AS_THEIRS, options.seeds, options.every)
    write_json(options.out / "learning.json", result)
    write_bytes(options.out / "learning.png", figure(result))
    print("\n".join(table(result)))
    print({name: round(seconds, 1) for name, seconds in result["seconds"].items()})
