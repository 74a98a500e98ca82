"""The task of a zoo, by name and hash, and opening it again: what trains on a zoo also has to score networks."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from triptych_common.cli import echo
from triptych_common.storage.files import check, read_bytes

from triptych_gpt.zoo.store import ShardRecord
from triptych_gpt.zoo.zoo import Zoo

if TYPE_CHECKING:
    from triptych_gpt.tasks.task import Task


NO_TASK = "none"
"""The task of a zoo of checkpoints that came without one: its networks are known by their parameters alone."""


@dataclass(frozen=True)
class TaskSpec:
    """A task by the arguments of `open_task`, for processes that have not opened it."""

    task: str
    data: str | None = None
    epochs: int | None = None
    iterations: int | None = None

    def open(self) -> "Task":
        """The task, its networks and data imported."""
        from triptych_gpt.tasks.registry import open_task  # imports every task's networks

        return open_task(self.task, data=self.data, epochs=self.epochs, iterations=self.iterations)

    @classmethod
    def recorded(cls, content: Any, where: str, task: str | None = None) -> "TaskSpec":
        """The task that a zoo or a model file names.

        content: its record of the task. where: what holds it, for errors. task: a name or file.py:NAME from the user instead;
            without one, only registered tasks are opened, since opening a file runs it.
        Raises ValueError for a record of another kind.
        """
        kind = TaskSpec if task is not None else _RecordedSpec
        spec = check(content, kind, source=f"{where}: task", remedy="make it again, or pass --task")
        return spec if task is None else replace(spec, task=task)

    def source(self) -> dict[str, str]:
        """A hash of a user's task file, since its functions are only names in the recipe."""
        path, _, _ = self.task.rpartition(":")
        return {"task_file": hashlib.sha256(read_bytes(Path(path))).hexdigest()[:16]} if path.endswith(".py") else {}


@dataclass(frozen=True)
class _RecordedSpec(TaskSpec):
    """A task that only a file names."""

    def open(self) -> "Task":
        from triptych_gpt.tasks.registry import TASKS

        if self.task not in TASKS:
            problem = f"none of {', '.join(TASKS)}, and a task of your own is run only where you name it"
            raise ValueError(f"task {self.task[:100]!r}: {problem}; pass --task file.py:NAME")
        task: Any = super().open()
        return replace(task, data=_OnDisk(task.data, self.task)) if hasattr(task, "data") else task


class _OnDisk:
    """Data of a task that only a file names: read from disk, but never downloaded."""

    def __init__(self, data: Callable[[str], Any], task: str) -> None:
        self.data, self.task = data, task

    def __call__(self, part: str) -> Any:
        from triptych_common.data.files import only_on_disk

        with only_on_disk(f"--task {self.task} fetches it"):
            return self.data(part)

    def __repr__(self) -> str:  # the recipe is that of the data
        from triptych_gpt.tasks.supervised import describe

        return describe(self.data)


def json_digest(content: Mapping[str, Any]) -> str:
    """A hash of a recipe or a result. Raises TypeError for one that is not JSON-able."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def recipe_of(zoo: Zoo) -> str:
    """A short hash of the zoo's recipe, which models and results save."""
    return json_digest(zoo.facts.get("recipe", {}))[:16]


def contents_of(shards: Sequence[ShardRecord]) -> str:
    """A short hash of the bytes of these shards."""
    files = [file.xxh3_128 for record in shards for file in record.files().values()]
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]


def task_of(zoo: Zoo, task: str | None = None) -> tuple["Task", TaskSpec]:
    """The zoo's task, and how it was opened.

    task: a name or file.py:NAME instead of the zoo's own, for a file that has moved or a zoo that was imported.
    Raises ValueError for a task of another architecture or recipe than the zoo's.
    """
    spec = TaskSpec.recorded(zoo.facts.get("opened_by") or {"task": zoo.task}, str(zoo.path), task)
    if spec.task == NO_TASK:
        from triptych_gpt.tasks.unknown import UnknownTask

        return UnknownTask(zoo.layout, zoo.better), spec
    report_changes(spec, zoo.facts.get("recipe", {}), str(zoo.path))
    with one_line(f"task {spec.task}"):
        opened = spec.open()
    if opened.layout != zoo.layout:
        sizes = f"networks of {opened.layout.size:,} parameters, the zoo's have {zoo.layout.size:,}"
        raise ValueError(f"task {spec.task}: {sizes}; give the zoo's own with --task")
    with one_line(f"task {spec.task}"):
        recipe = opened.recipe()  # reads its data
    collected = zoo.facts.get("recipe", {}).get("recipe")
    if collected is not None and json_digest(collected) != json_digest(recipe):
        problem = f"another recipe than that of {zoo.path} (its data or settings changed)"
        raise ValueError(f"task {spec.task}: {problem}; give the same with --task, or collect again")
    return opened, spec


def report_changes(spec: TaskSpec, recorded: Mapping[str, Any], where: str) -> None:
    """Say so if a user's task file is not the one whose hash a zoo or a model recorded; it may still be the same task."""
    before, now = recorded.get("task_file"), spec.source().get("task_file")
    if before is not None and now is not None and before != now:
        echo(f"task {spec.task}: the file has changed since {where} was made (hash {before}, now {now})")


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns any exception in a user's functions into an error of one line."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error} (TRIPTYCH_DEBUG=1 shows where)") from error
