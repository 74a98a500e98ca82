"""Model files: a safetensors file with a network's weights, its config, and facts about its training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

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
        checkpoint.write(path, tensors, {**facts, "kind": kind or self.kinds[0], "config": dict(config)})

    def path(self, path: str | Path) -> Path:
        """The path itself, or that of the model file in a run's folder. Raises FileNotFoundError if there is none."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; expected {self.expected} ({self.made})")
        if path.is_dir() and not (path / self.file_name).is_file():
            raise FileNotFoundError(f"{path / self.file_name}: {self.absent.format(folder=path)}")
        return path / self.file_name if path.is_dir() else path

    def read(self, path: str | Path, build: Callable[[dict[str, Tensor], dict[str, Any]], Model]) -> Model:
        """The result of `build(tensors, facts)` for a model file, or the one in a run's folder.

        Tensors are on the CPU; facts include "kind" and "config". Raises FileNotFoundError for an absent file, ValueError for
        one that is damaged, of another kind, or that `build` fails on.
        """
        from triptych_common.storage.bounded import Bounded  # training reads no model file

        path = self.path(path)
        try:
            tensors, facts = checkpoint.read(path)
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


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if a weight is NaN or infinite, since whatever a network with it computes is worthless."""
    if (name := non_finite(tensors)) is not None:
        raise ValueError(f"{source}: tensor {name} has values that are not finite; make or fetch the file again")


def non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if any does."""
    wrong = (name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    return next(wrong, None)
