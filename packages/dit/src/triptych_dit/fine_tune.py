"""Start a model from the weights of another one, with a new class table or resolution if needed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from triptych_common.cli import echo

from triptych_dit.config import DiTConfig
from triptych_dit.labels import listed, matched
from triptych_dit.model import DiT
from triptych_dit.weights import LatentSpace, TrainedModel

TABLE = "y_embedder.embedding_table.weight"
_MAY_DIFFER = {"input_size", "num_classes", "class_dropout_prob"}


class Fate(NamedTuple):
    """What became of a tensor: whether it is the source's, whole and in its order, and in words."""

    is_copy: bool
    words: str


@torch.no_grad()
def start_from(
    model: DiT, source: DiT, *, new_class_table: bool = False, names: Sequence[str] = (), source_names: Sequence[str] = ()
) -> dict[str, Fate]:  # fmt: skip
    """Copy the weights of `source` into `model`, in place; returns what happened to each tensor, by name.

    Not copied are the position embedding, if the grids differ, and rows of the class table that the source does not have or,
    with `new_class_table`, all but the null row. Rows are those of classes of the same name, or of the same number where one
    side has no names and both have as many classes.
    Raises ValueError, listing both sides, if the models differ in anything else.
    """
    _check_same_shape(model.config, source.config)
    found, became = source.state_dict(), dict[str, Fate]()
    for name, tensor in model.state_dict().items():
        if name == "pos_embed" and model.config.grid != source.config.grid:
            became[name] = Fate(False, f"computed for {model.config.grid[0]}x{model.config.grid[1]} tokens")
        elif name == TABLE:
            rows, how = _shared_classes(model.config, source.config, names, source_names)
            became[name] = _copy_rows(model, source, {} if new_class_table else rows, how, names)
        else:
            tensor.copy_(found[name])
            became[name] = Fate(True, "copied")
    return became


def _copy_rows(model: DiT, source: DiT, rows: Mapping[int, int], how: str, names: Sequence[str]) -> Fate:
    """Copy rows of the class table, and what the source knows without a label."""
    table, theirs = (part.state_dict()[TABLE] for part in (model, source))
    for label, row in rows.items():
        table[label] = theirs[row]
    initialised = [label for label in range(model.config.num_classes) if label not in rows]
    named = [names[label] for label in initialised if label < len(names)] if rows else []
    said = [f"{len(rows)} classes copied {how}"] if rows else []
    if initialised:
        said.append(f"{len(initialised)} classes initialised" + (f" ({listed(named)})" if named else ""))
    if (null := model.config.null_label) is not None:
        if source.config.null_label is not None:
            table[null] = theirs[source.config.null_label]
        said.append(f"null row {'initialised' if source.config.null_label is None else 'copied'}")
    return Fate(torch.equal(table, theirs), ", ".join(said))


def _shared_classes(
    wanted: DiTConfig, found: DiTConfig, names: Sequence[str], source_names: Sequence[str]
) -> tuple[dict[int, int], str]:
    """For each class that the source has too, its number there, and by what it was recognised."""
    same = wanted.num_classes == found.num_classes
    if (
        same and _tell(names) and list(names) == list(source_names)
    ):  # two of which may be the same word, as ImageNet's cranes
        return {label: label for label in range(wanted.num_classes)}, "by name"
    if _tell(names) and _tell(source_names):
        shared = matched(names, source_names).items()
        return {
            ours: there for ours, there in shared if ours < wanted.num_classes and there < found.num_classes
        }, "by name"
    return ({label: label for label in range(wanted.num_classes)} if same else {}), "by number, as names are not known"


def _tell(names: Sequence[str]) -> bool:
    """Whether there are names, rather than the numbers that stand for them in data sets without any."""
    return bool(names) and list(names) != [str(label) for label in range(len(names))]


def check_meaning(source: TrainedModel, facts: Mapping[str, Any], *, new_latents: bool) -> None:
    """Raise ValueError for a model of pixels on latents, of latents on pixels, or on those of another autoencoder.

    facts: of the training data. new_latents: anything goes.
    """
    ours = LatentSpace.of(facts["autoencoder"]) if facts.get("autoencoder") else None
    theirs, remedy = source.space, "--new-latents starts from it all the same"
    if new_latents:
        return
    if theirs is None and not source.of_pixels:
        echo("init_from: the autoencoder of its latents is not known, and taken to be that of the data; --vae names it")
    elif theirs is None or ours is None:
        if theirs is not ours:
            kinds = [f"latents of {space.spec}" if space else "pixels" for space in (theirs, ours)]
            raise ValueError(f"init_from: a model of {kinds[0]}, but the data are {kinds[1]}; {remedy}")
    elif difference := theirs.difference(ours):
        raise ValueError(f"init_from: its latents are not the data's: {difference}; {remedy}")


def by_layer(became: Mapping[str, Fate]) -> dict[str, str]:
    """The same in one line per layer: what happened to its tensors, and how many there are."""
    layers: dict[str, list[str]] = {}
    for name, fate in became.items():
        parts = name.split(".")
        layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(fate.words)
    return {layer: f"{' and '.join(dict.fromkeys(fates))} ({len(fates)} tensors)" for layer, fates in layers.items()}


def _check_same_shape(wanted: DiTConfig, found: DiTConfig) -> None:
    ours, theirs = asdict(wanted), asdict(found)
    different = [name for name in ours if ours[name] != theirs[name] and name not in _MAY_DIFFER]
    if bool(wanted.num_classes) != bool(found.num_classes):
        different.append("num_classes")
    if different:
        listed = ", ".join(f"{name} {ours[name]} (there {theirs[name]})" for name in different)
        raise ValueError(
            f"init_from: the model differs from the one to start from in {listed}; fine-tuning changes only the "
            "resolution and the number of classes: leave out the --model options, or give the file's"
        )
