"""The task whose zoo this is, opened again: what trains on a zoo also has to score networks."""

from triptych_gpt.tasks import Task
from triptych_gpt.zoo.cohorts import TaskSpec, one_line, recipe_digest
from triptych_gpt.zoo.zoo import Zoo


def recipe_of(zoo: Zoo) -> str:
    """What the zoo's runs are, as a short hash that models and results remember."""
    return recipe_digest(zoo.facts.get("recipe", {}))[:16]


def task_of(zoo: Zoo, task: str | None = None) -> tuple[Task, TaskSpec]:
    """The zoo's task, and how it was opened.

    task: a name or file.py:NAME in place of what the zoo tells, for a file that has moved or a zoo that was imported.
    Raises ValueError for a task of another architecture, recipe or metrics than the zoo's.
    """
    known = zoo.facts.get("opened_by") or {"task": zoo.task}
    spec = TaskSpec(**{**known, "task": task or known["task"]})
    with one_line(f"task {spec.task}"):
        opened = spec.open()
        recipe = opened.recipe()
    if opened.layout != zoo.layout:
        raise ValueError(
            f"task {spec.task}: networks of {opened.layout.size:,} parameters, the zoo's have {zoo.layout.size:,}; give the "
            "zoo's own with --task"
        )
    collected = zoo.facts.get("recipe", {}).get("recipe")
    if collected is not None and recipe_digest(collected) != recipe_digest(recipe):
        raise ValueError(
            f"task {spec.task}: another recipe than {zoo.path} was collected by (its data or settings changed); give the "
            "same with --task, or collect again"
        )
    return opened, spec
