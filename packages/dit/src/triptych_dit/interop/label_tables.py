"""Label tables as diffusers has them: its last row is the null label's, but its `DiTPipeline` asks for row 1000 as null,
whatever the number of classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from triptych_dit.config import DiTConfig

NULL_ROW = 1000  # what DiTPipeline takes for "no class"


class LabelTable(NamedTuple):
    """Our label table, and what its rows are."""

    rows: Float[
        Tensor, "labels width"
    ]  # classes, then the null label where there is one; equal rows where unconditional
    num_classes: int
    has_null: bool


def padded_table(config: DiTConfig, table: Float[Tensor, "labels width"] | None) -> Float[Tensor, "rows width"]:
    """The table with the null row both where diffusers keeps it, last, and where its pipeline looks for it.

    Fewer than 1000 classes: rows up to 1000 repeat the null row. More: class 1000 gives way, its row is second to last.
    No null label: the table as it is, so that guidance on up to 1000 classes finds no row rather than a wrong one.
    Unconditional: zeros, so that every label and every guidance scale gives the same image.
    """
    n = config.num_classes
    if table is None:
        return torch.zeros(NULL_ROW + 1, config.hidden_size)
    if config.null_label is None:
        return table
    null = table[n:]
    if n <= NULL_ROW:
        return torch.cat([table[:n], null.expand(NULL_ROW + 1 - n, -1)])
    return torch.cat([table[:NULL_ROW], null, table[NULL_ROW + 1 : n], table[NULL_ROW : NULL_ROW + 1], null])


def pipeline_label(label: int, config: DiTConfig) -> int:
    """The label by which the padded table knows a class."""
    return config.num_classes if label == NULL_ROW and config.null_label is not None else label


def unpadded_table(table: Float[Tensor, "rows width"], num_classes: int | None = None) -> LabelTable:
    """Undo `padded_table`, by the repeated rows alone.

    num_classes: by default what the rows say; a table without a null label cannot say that, and has to be told.
    Raises ValueError where the rows contradict num_classes.
    """
    rows = len(table)
    null = (table == table[-1]).all(dim=1)
    if rows > NULL_ROW + 2 and bool(null[NULL_ROW]):
        found = rows - 2
        kept = torch.cat([table[:NULL_ROW], table[found : found + 1], table[NULL_ROW + 1 : found], table[-1:]])
    else:
        found = rows - int(null.flip(0).cumprod(0).sum())  # where the last run of equal rows begins
        kept = table[: found + 1]
    if num_classes is None or num_classes == found:
        return LabelTable(kept, found, has_null=True)
    if num_classes == rows and num_classes:
        return LabelTable(table, rows, has_null=False)
    raise ValueError(
        f"num_classes {num_classes}: the label table has {rows} rows, which fits {found} with a null label or {rows} without"
    )


def check_names(id2label: Mapping[int | str, Any] | None, config: DiTConfig) -> dict[str, str]:
    """Names of classes by the label that the pipeline takes, as model_index.json has them.

    Raises ValueError for what names no class.
    """
    names: dict[str, str] = {}
    for key, name in (id2label or {}).items():
        label = int(key) if str(key).isdecimal() else -1
        if not 0 <= label < config.num_classes or not isinstance(name, str):
            raise ValueError(f"id2label {key!r}: {name!r}: expected labels 0..{config.num_classes - 1} and their names")
        names[str(pipeline_label(label, config))] = name
    return names
