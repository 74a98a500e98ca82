"""Hugging Face data sets, from the hub or from disk, as a source of images (extra: hub)."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from typing_extensions import TypedDict

from triptych_common.cli import echo
from triptych_common.data.decoding import UnreadableImage, decode, read_image
from triptych_common.data.source import ImageSource, choose_split
from triptych_common.extras import import_extra
from triptych_common.storage.files import FileName, open_ended, read_json

Dataset = Any  # datasets.Dataset: the library takes seconds to import, so that happens where it is used


class HubImages(ImageSource):
    """Images of a Hugging Face data set: a name on the hub, a folder that `save_to_disk` wrote, or one of Parquet files.

    image_column, label_column: "auto" chooses the only column of images, and the only one of class labels if there is one.
        A named label column may also hold integers or strings.
    Raises ValueError for missing columns or splits, OSError if nothing can be loaded, ImportError without the library.
    """

    lossy = False

    def __init__(
        self, name: str | Path, split: str = "train", image_column: str = "auto", label_column: str = "auto", *,
        config: str | None = None, unconditional: bool = False,
    ) -> None:  # fmt: skip
        self.name = str(name)
        table = _load(self.name, config, split)
        from datasets import features

        self._column: str = _column(table, self.name, "image", image_column, features.Image) or ""  # or raises
        self._rows = _undecoded(table, self._column, self.name)
        label = None if unconditional else _column(table, self.name, "label", label_column, features.ClassLabel)
        if label:
            self.labels, self.class_names = _labels(table, label, self.name)
        else:
            self.labels, self.class_names = torch.zeros(len(table), dtype=torch.long), (Path(self.name).name,)
        self.num_classes = len(self.class_names)
        if not label and not unconditional:
            echo(f"{self.name}: no column of class labels, read as one class (label_column names another)")

    def image(self, index: int) -> Image.Image:
        where, row = self.locate(index), self._rows[index][self._column] or {}
        content, path = row.get("bytes"), row.get("path")
        if content is None and path is None:
            raise UnreadableImage(where, "the row has no image")
        # A data set that was never saved may refer to files on this machine instead of holding their content.
        if content is None:
            return read_image(Path(str(path)))
        return decode(content, f"{where} ({path})" if path else where)

    def locate(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        """A hash of class names, labels and each image's file name and size, which are read without the image data."""
        import pyarrow.compute as pc

        digest = hashlib.sha256("\0".join(self.class_names).encode() + self.labels.numpy().tobytes())
        for rows in self._rows.with_format("arrow").iter(batch_size=4096):
            images = rows[self._column]
            sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
            for size, path in zip(sizes, pc.struct_field(images, "path").to_pylist(), strict=True):
                if size is None and path is not None:
                    size = Path(path).stat().st_size
                digest.update(f"\n{Path(path or '').name}\0{size}".encode())
        return f"names-and-sizes:{digest.hexdigest()}"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load(name: str, config: str | None, split: str) -> Dataset:
    datasets = import_extra("datasets", "Hugging Face data sets need a package: pip install 'triptych-common[hub]'")
    try:
        if saved := is_saved_dataset(Path(name)):
            _check_states(Path(name))
        loaded = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config)
        for part in (loaded.values() if isinstance(loaded, dict) else [loaded]) if saved else ():
            part.data.validate(full=True)  # a wrong offset in a file that is mapped would end the process
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # for a missing config, or a damaged file
        raise ValueError(f"Hugging Face data set {name}: {_one_line(error)}") from error
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"Hugging Face data set {name}: {_one_line(error)}; check its name and the network, "
            "or give a folder that save_to_disk wrote"
        ) from error
    parts = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    return parts[choose_split(split, list(parts), name)]


def _check_states(folder: Path) -> None:
    """Raise ValueError where a saved data set names files that are not beside its state.json."""
    for path in sorted(folder.rglob("state.json")):
        state = read_json(path, _State, remedy="save it again")
        for entry in state["_data_files"]:
            if not (path.parent / entry["filename"]).is_file():
                raise ValueError(f"{path}: names {entry['filename']}, which is no file beside it")


class _DataFile(TypedDict):
    filename: FileName


@open_ended
class _State(TypedDict):
    _data_files: list[_DataFile]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _column(table: Dataset, name: str, kind: str, wanted: str, feature_type: type) -> str | None:
    """The requested column, or with "auto" the only one of a type; None if there is no column of labels."""
    columns = ", ".join(f"{column} ({_kind(feature)})" for column, feature in table.features.items())
    if wanted != "auto":
        if wanted not in table.features:
            raise ValueError(f"{name}: {kind}_column {wanted!r}: expected one of {columns}")
        return wanted
    found = [column for column, feature in table.features.items() if isinstance(feature, feature_type)]
    if len(found) > 1 or (kind == "image" and not found):
        raise ValueError(f"{name}: {len(found) or 'no'} {kind} columns, name one with {kind}_column: {columns}")
    return found[0] if found else None


def _kind(feature: Any) -> str:
    return feature.dtype if type(feature).__name__ == "Value" else type(feature).__name__


def _undecoded(table: Dataset, column: str, name: str) -> Dataset:
    """The column of images as {"bytes", "path"} rows, since the library would not decode them as `decode` does."""
    from datasets import Image as ImageFeature

    kind = _kind(table.features[column])
    try:
        if "string" not in kind:  # strings would be taken for paths
            return table.with_format(None).select_columns([column]).cast_column(column, ImageFeature(decode=False))
    except (TypeError, ValueError, NotImplementedError):  # pyarrow's errors derive from these
        pass
    raise ValueError(f"{name}: column {column!r} holds {kind}, not images")


def _labels(table: Dataset, column: str, name: str) -> tuple[Int[Tensor, " items"], tuple[str, ...]]:
    """Labels and class names; values that are not of type ClassLabel are numbered in sorted order."""
    from datasets import ClassLabel

    feature = table.features[column]
    values = table.with_format("arrow").select_columns([column])[:][column].to_pylist()
    if not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"{name}: label_column {column!r}: expected an integer or a string in every row")
    if isinstance(feature, ClassLabel):
        if min(values, default=0) < 0:
            raise ValueError(
                f"{name}: label_column {column!r} has {values.count(-1):,} unlabelled rows; pick another split"
            )
        return torch.tensor(values), tuple(feature.names)
    classes = sorted(set(values))
    label_of = {value: label for label, value in enumerate(classes)}
    return torch.tensor([label_of[value] for value in values]), tuple(str(value) for value in classes)
