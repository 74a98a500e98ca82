"""The task of a zoo, by name and hash, and opening it again: what trains on a zoo also has to score networks."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych_gpt.zoo.zoo import Zoo

if TYPE_CHECKING:
    from triptych_gpt.tasks.task import Task


@dataclass(frozen=True)
class TaskSpec:
    """A task by the arguments of `open_task`, for processes that have not opened it."""

    task: str
    data: str | None = None
    epochs: int | None = None

    def open(self) -> "Task":
        """The task, its networks and data imported."""
        from triptych_gpt.tasks.registry import open_task  # imports every task's networks

        return open_task(self.task, data=self.data, epochs=self.epochs)

    def source(self) -> dict[str, str]:
        """A hash of a user's task file, since its functions are only names in the recipe."""
        path, _, _ = self.task.rpartition(":")
        return {"task_file": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]} if path.endswith(".py") else {}


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """A hash of a recipe. Raises TypeError for one that is not JSON-able."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def recipe_of(zoo: Zoo) -> str:
    """A short hash of the zoo's recipe, which models and results save."""
    return recipe_digest(zoo.facts.get("recipe", {}))[:16]


def task_of(zoo: Zoo, task: str | None = None) -> tuple["Task", TaskSpec]:
    """The zoo's task, and how it was opened.

    task: a name or file.py:NAME instead of the zoo's own, for a file that has moved or a zoo that was imported.
    Raises ValueError for a task of another architecture or recipe than the zoo's.
    """
    known = zoo.facts.get("opened_by") or {"task": zoo.task}
    spec = TaskSpec(**{**known, "task": task or known["task"]})
    with one_line(f"task {spec.task}"):
        opened = spec.open()
        recipe = opened.recipe()
    if opened.layout != zoo.layout:
        sizes = f"networks of {opened.layout.size:,} parameters, the zoo's have {zoo.layout.size:,}"
        raise ValueError(f"task {spec.task}: {sizes}; give the zoo's own with --task")
    collected = zoo.facts.get("recipe", {}).get("recipe")
    if collected is not None and recipe_digest(collected) != recipe_digest(recipe):
        problem = f"another recipe than that of {zoo.path} (its data or settings changed)"
        raise ValueError(f"task {spec.task}: {problem}; give the same with --task, or collect again")
    return opened, spec


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns any exception in a user's functions into an error of one line."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error} (TRIPTYCH_DEBUG=1 shows where)") from error
