"""Start a model from the weights of another one, with a new class table or resolution if needed."""

from dataclasses import asdict, replace

import torch

from triptych_dit.config import DiTConfig
from triptych_dit.model import DiT

TABLE = "y_embedder.embedding_table.weight"
_MAY_DIFFER = {"input_size", "num_classes", "class_dropout_prob"}


def fitted_config(source: DiTConfig, *, input_size: tuple[int, int], num_classes: int) -> DiTConfig:
    """The source's shape at another resolution and number of classes; an unconditional source stays so."""
    return replace(source, input_size=input_size, num_classes=num_classes if source.num_classes else 0)


@torch.no_grad()
def start_from(model: DiT, source: DiT, *, new_class_table: bool = False) -> dict[str, str]:
    """Copy the weights of `source` into `model`, in place; returns what happened to each tensor, by name.

    Not copied are the position embedding, if the grids differ, and the class table, if the number of classes differs or
    `new_class_table` is set, except for its null row.
    Raises ValueError, listing both sides, if the models differ in anything else.
    """
    _check_same_shape(model.config, source.config)
    found, became = source.state_dict(), {}
    for name, tensor in model.state_dict().items():
        if name == "pos_embed" and model.config.grid != source.config.grid:
            became[name] = f"computed for {model.config.grid[0]}x{model.config.grid[1]} tokens"
        elif name == TABLE and (new_class_table or model.config.num_classes != source.config.num_classes):
            became[name] = f"{model.config.num_classes} classes initialised"
            if model.config.null_label is not None and source.config.null_label is not None:
                # What the source knows without a label is the same for other classes.
                tensor[model.config.null_label] = found[name][source.config.null_label]
                became[name] += ", null row copied"
        elif name == TABLE and tensor.shape != found[name].shape:  # one of the two has no null row
            rows = min(len(tensor), len(found[name]))
            tensor[:rows] = found[name][:rows]
            became[name] = f"{rows} classes copied" + (", null row initialised" if rows < len(tensor) else "")
        else:
            tensor.copy_(found[name])
            became[name] = "copied"
    return became


def by_layer(became: dict[str, str]) -> dict[str, str]:
    """The same in one line per layer: what happened to its tensors, and how many there are."""
    layers: dict[str, list[str]] = {}
    for name, fate in became.items():
        parts = name.split(".")
        layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), []).append(fate)
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
