"""The named tasks, and opening a task by its name or from a user's file."""

import importlib.util
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from triptych_gpt.tasks.cifar_cnn import CIFAR_CNN
from triptych_gpt.tasks.mnist_mlp import MNIST_MLP, MNIST_MLP_14
from triptych_gpt.tasks.reinforcement.task import CARTPOLE, CARTPOLE_SMALL, ReinforcementTask
from triptych_gpt.tasks.supervised import SupervisedTask
from triptych_gpt.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (MNIST_MLP, MNIST_MLP_14, CIFAR_CNN, CARTPOLE, CARTPOLE_SMALL)}


def open_task(spec: str, *, data: str | None = None, epochs: int | None = None, iterations: int | None = None) -> Task:
    """A registered task by name, or `file.py:NAME`: a Task, or a function without arguments that returns one.

    data, epochs, iterations: replace the task's own; supervised tasks have the first two, policies the third. Opening
    a file runs it. Raises ValueError for what cannot be found or is no task, FileNotFoundError for an absent file.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        task = _from_file(Path(path), name)
    elif spec in TASKS:
        task = TASKS[spec]
    else:
        raise ValueError(f"task {spec!r}: expected one of {', '.join(TASKS)}, or file.py:NAME")
    if data is not None:
        if not (isinstance(task, SupervisedTask) and is_dataclass(task.data) and hasattr(task.data, "name")):
            raise ValueError(f"data {data!r}: task {task.name} has data of its own; leave out --data")
        source: Any = task.data
        task = replace(task, data=replace(source, name=data))
    if epochs is not None:
        if not isinstance(task, SupervisedTask):
            raise ValueError(f"epochs {epochs}: task {task.name} is not supervised; leave out --epochs")
        task = replace(task, epochs=epochs)
    if iterations is not None:
        if not isinstance(task, ReinforcementTask):
            raise ValueError(f"iterations {iterations}: task {task.name} has no policies; leave out --iterations")
        task = replace(task, ppo=replace(task.ppo, iterations=iterations))
    return task


def _from_file(path: Path, name: str) -> Task:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a task of your own is given as file.py:NAME")
    module_name = f"triptych_gpt_task_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None  # a file ending in .py has one
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses look up their module
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours, as a script can
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"{path}: cannot be run ({_line(error)})") from error
    task = getattr(module, name, None)
    if task is None:
        raise ValueError(f"{path}: has no {name}; expected the name of a Task in it")
    if isinstance(task, type) or (callable(task) and not isinstance(task, Task)):
        try:
            task = task()
        except Exception as error:
            raise ValueError(f"{path}: {name}() fails ({_line(error)})") from error
    if not isinstance(task, Task):
        parts = ("name", *(part for part in vars(Task) if not part.startswith("_")))
        missing = [part for part in parts if not hasattr(task, part)]
        raise ValueError(f"{path}: {name} is a {type(task).__name__}, no Task (it lacks {', '.join(missing)})")
    return task


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
