"""Import of policies that stable-baselines3 saved: a run is a folder of checkpoints NAME_STEPS_steps.zip.

Of each archive only `policy.pth` is read, as tensors and nothing else; the rest of it, pickled objects among them, is not opened.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from triptych_common.storage import foreign
from triptych_common.storage.pickle_machine import largest

from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import ImportConfig
from triptych_gpt.tasks.reinforcement.policies import LOG_STD
from triptych_gpt.tasks.task import Task
from triptych_gpt.zoo.folder_import import spec_of
from triptych_gpt.zoo.lmdb_import import Found, import_runs, refuse_unreadable_names
from triptych_gpt.zoo.source import one_line
from triptych_gpt.zoo.store import CohortData, unsound

_STEPS = re.compile(r".*?(\d{1,15})(?:_steps)?\.zip")
_POLICY = re.compile(r"mlp_extractor\.policy_net\.\d+\.(weight|bias)|action_net\.(weight|bias)")


def preview_sb3(config: ImportConfig) -> dict[str, Any]:
    """What --dry-run prints."""
    assert config.sb3 is not None
    return {"config": asdict(config), "runs": len(find_runs(config.sb3))}


def import_sb3(config: ImportConfig) -> dict[str, Any]:
    """Write the zoo, or the rest of it; returns counts. Every checkpoint is scored by the task.

    Raises ValueError for a damaged archive or policies of another network, FileNotFoundError for an absent folder.
    """
    assert config.sb3 is not None
    runs, spec = find_runs(config.sb3), spec_of(config)
    if spec is None:
        raise ValueError(
            f"sb3 {config.sb3}: pass --task with the task that scores the policies, a name or file.py:NAME"
        )
    task = spec.open()
    better: dict[str, str] = {metric.name: metric.better for metric in task.metrics}
    checkpoints = config.checkpoints or Counter(len(checkpoints_of(folder)) for _, folder in runs).most_common(1)[0][0]

    def read(split: str, cohort: range) -> CohortData:
        return _read_cohort(task, cohort, runs, split, checkpoints)

    test = max(1, len(runs) // 10) if config.num_test_runs is None else config.num_test_runs
    found = Found(config.sb3, runs, 0, "stable-baselines3", checkpoints, test)
    facts = {"task": task.name, "metrics": better, "opened_by": asdict(spec)}
    return import_runs(config, found, task.layout, facts, read)


def find_runs(folder: Path) -> list[tuple[str, Path]]:
    """Name and folder of each run, by name. Raises FileNotFoundError for an absent folder, ValueError for one without runs."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the one that holds a folder for each run")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    runs = [(path.name, path) for path in found if any(file.is_file() for file in path.glob("*.zip"))]
    if not runs:
        raise ValueError(f"{folder}: no runs; expected a folder for each, with checkpoints NAME_STEPS_steps.zip")
    refuse_unreadable_names(folder, [name for name, _ in runs])
    return runs


def _read_cohort(
    task: Task, cohort: range, runs: Sequence[tuple[str, Path]], split: str, checkpoints: int
) -> CohortData:
    kept: dict[int, tuple[list[int], Tensor]] = {}
    dropped: dict[int, str] = {}
    for run in cohort:
        files = checkpoints_of(runs[run][1])
        if len(files) != checkpoints:
            dropped[run] = f"{len(files)} checkpoints"
            continue
        theta = torch.stack([read_policy(path, task.layout) for path in files.values()])
        problem = unsound(theta)
        if problem is None:
            kept[run] = list(files), theta
        else:
            dropped[run] = problem
    thetas = [theta for _, theta in kept.values()]
    theta = torch.stack(thetas) if thetas else torch.empty(0, checkpoints, task.layout.size)
    with one_line(f"task {task.name}"):
        scores = task.evaluate(theta.flatten(0, 1)) if thetas else {m.name: theta[..., 0] for m in task.metrics}
        metrics = {name: values.float().view(theta.shape[:2]) for name, values in scores.items()}
    return CohortData(
        runs=list(kept),
        theta=theta,
        steps=torch.tensor([steps for steps, _ in kept.values()], dtype=torch.long).view(theta.shape[:2]),
        metrics=metrics,
        settings={"split": split, "origin": "stable-baselines3", "name": np.array([runs[run][0] for run in kept])},
        dropped=dropped,
    )


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The archives of a run by their steps, ascending. Raises ValueError for a name without a number, or a number twice."""
    found: dict[int, Path] = {}
    for path in sorted(path for path in folder.glob("*.zip") if path.is_file()):
        match = _STEPS.fullmatch(path.name)
        if match is None or int(match[1]) in found:
            problem = "no number of steps in its name" if match is None else f"{match[1]} steps, as another one"
            raise ValueError(f"{path}: {problem}; expected NAME_STEPS_steps.zip")
        found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_policy(path: Path, layout: ParameterLayout) -> Float[Tensor, " D"]:
    """The policy in an archive as theta. Raises ValueError for a damaged one, or another network."""
    return policy_of(_state_dict(path), layout, str(path))


def policy_of(state: Mapping[str, Tensor], layout: ParameterLayout, where: str) -> Float[Tensor, " D"]:
    """The policy in the state dict of theirs as theta. Raises ValueError for another network."""
    theirs = {name: value for name, value in state.items() if name == LOG_STD or _POLICY.fullmatch(name)}
    if other := [f"{name} is {value.dtype}" for name, value in theirs.items() if not value.is_floating_point()]:
        raise ValueError(f"{where}: {other[0]}, expected floating-point numbers; choose the --task that fits")
    # Both list layers from input to output; only their names differ.
    shapes = {name: tuple(value.shape) for name, value in theirs.items()}
    if list(shapes.values()) != list(layout.shapes.values()):
        given, expected = list(shapes.values()), list(layout.shapes.values())
        raise ValueError(f"{where}: a policy of shapes {given}, the task's has {expected}; choose the --task that fits")
    return torch.cat([value.detach().float().flatten() for value in theirs.values()])


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    again, most = "save it again with stable-baselines3's save()", largest(path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo("policy.pth").file_size
            content = archive.read("policy.pth") if size <= most else None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path}: damaged, or not an archive of stable-baselines3 ({error}); {again}") from error
    if content is None:
        raise ValueError(f"{path}: policy.pth of {size:,} bytes, expected at most {most:,} of such a file; {again}")
    state = foreign.read(path / "policy.pth", content)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(f"{path}: policy.pth is no state dict; {again}")
    return state
