"""Model files: a safetensors file with a network's weights, its config, and facts about its training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from triptych_common.cli import echo
from triptych_common.storage import checkpoint
from triptych_common.storage.files import check

Model = TypeVar("Model")


@dataclass(frozen=True)
class ModelFormat:
    """A kind of model file: how it is recognised, its name in a run's folder, and the words of its error messages.

        FORMAT.write(path, model.state_dict(), asdict(config), {"steps": 1000})
        model = FORMAT.read(path, lambda tensors, facts: build_model(facts["config"], tensors))

    kinds: accepted values of the fact "kind". file_name: the file's name in a run's folder.
    expected, mismatch, made, absent: parts of messages, such as "a trained G.pt", "not a G.pt's model file", "triptych-gpt
        train --out FOLDER makes one" and, with {folder} for a folder that lacks the file, "no trained model in {folder}".
    facts: the type that facts, "config" among them, must have, as `storage.files` takes it.
    """

    kinds: tuple[str, ...]
    file_name: str
    expected: str
    mismatch: str
    made: str
    absent: str
    facts: Any = dict[str, Any]

    def write(
        self, path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], facts: Mapping[str, Any], *,
        kind: str | None = None,
    ) -> None:  # fmt: skip
        """Write a model file, atomically; config and facts as JSON can hold them. kind: by default the first of `kinds`."""
        checkpoint.write(path, tensors, self.facts_of(config, facts, kind=kind))

    def facts_of(
        self, config: Mapping[str, Any], facts: Mapping[str, Any], *, kind: str | None = None
    ) -> dict[str, Any]:
        """Everything but the tensors of a model file; a checkpoint with it can be read as one, see `TrainState.describe`."""
        return {**facts, "kind": kind or self.kinds[0], "config": dict(config)}

    def path(self, path: str | Path) -> Path:
        """The path itself, or for a run's folder that of its model file or, before there is one, of its newest checkpoint.

        Raises FileNotFoundError if there is none.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; expected {self.expected} ({self.made})")
        if not path.is_dir() or (path / checkpoint.INDEX).is_file():
            return path
        if (path / self.file_name).is_file():
            return path / self.file_name
        if newest := checkpoint.steps_in(path / "checkpoints")[-1:]:
            return newest[0]
        raise FileNotFoundError(f"{path / self.file_name}: {self.absent.format(folder=path)}")

    def read(
        self, path: str | Path, build: Callable[[dict[str, Tensor], dict[str, Any]], Model], *, part: str = "ema"
    ) -> Model:
        """The result of `build(tensors, facts)` for a model file, the one in a run's folder, or a checkpoint of a run.

        part: of a checkpoint; the average is reported, in one line, to be that of an unfinished run.
        Tensors are on the CPU; facts include "kind" and "config". Raises FileNotFoundError for an absent file, ValueError for
        one that is damaged, of another kind, or that `build` fails on.
        """
        from triptych_common.storage.bounded import Bounded  # training reads no model file

        path = self.path(path)
        try:
            tensors, facts = checkpoint.read(path)
            if "kind" not in facts and "samples_seen" in facts:
                tensors, facts = _part_of(path, tensors, facts, part)
        except ValueError as error:
            raise ValueError(f"{error}; expected {self.expected} ({self.made})") from error
        if facts.get("kind") not in self.kinds:
            other = facts.get("kind", "file of another kind")
            raise ValueError(f"{path}: {self.mismatch} but a {other}; {self.made}")
        check(
            facts,
            self.facts,
            source=str(path),
            remedy=f"another version of triptych made it, or it was altered; {self.made}",
        )
        refuse_non_finite(tensors, str(path))
        try:
            with Bounded(path.stat().st_size):
                return build(tensors, facts)
        except (LookupError, TypeError, RuntimeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"{path}: made by another version of triptych, or its weights do not fit its own config "
                f"({' '.join(str(error).split())[:200]}); make or fetch it again"
            ) from error


def _part_of(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], part: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one part of a training checkpoint, as its model file has them. Raises ValueError without facts."""
    if "models" not in state:
        raise ValueError(
            f"{path}: a checkpoint of an earlier version, which records no facts about its model; repeat the command of "
            "its run, whose next checkpoint will"
        )
    facts = state["models"].get(part) if isinstance(state["models"], dict) else None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: a checkpoint without {part!r}, of another kind")
    step, total = state.get("step"), state.get("total_steps")
    if part.startswith("ema") and isinstance(step, int) and isinstance(total, int) and step < total:
        echo(f"{path}: unfinished: step {step:,} of {total:,}")
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, dict(facts)


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if a weight is NaN or infinite, since whatever a network with it computes is worthless."""
    if (name := non_finite(tensors)) is not None:
        raise ValueError(f"{source}: tensor {name} has values that are not finite; make or fetch the file again")


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if any does."""
    wrong = (name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    return next(wrong, None)
