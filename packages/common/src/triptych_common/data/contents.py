"""What identifies images, wherever they lie: class names, numbers, and hashes of what is known of each image."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

from typing_extensions import TypedDict

from triptych_common.fields import Ge

if TYPE_CHECKING:
    from triptych_common.data.datasets import ImageDataset
    from triptych_common.data.source import ImageSource


class Class(TypedDict):
    """The images of one class, in their order."""

    name: str
    images: Annotated[int, Ge(0)]
    sha256: str


class Contents(TypedDict):
    """A data set: its classes, and a hash of the labels in the order of images."""

    classes: list[Class]
    order: str


def contents_of(dataset: "ImageDataset") -> Contents:
    """The contents of a data set in memory, by its pixels."""
    return summary(dataset, (pixels.data for pixels in dataset.images.contiguous().numpy()))


def summary(source: "ImageSource", parts: Iterable[bytes | memoryview]) -> Contents:
    """The contents of a source, with the bytes that identify each image."""
    # A single class has no name: often it is that of the folder, which may move.
    names = source.class_names if source.num_classes > 1 else ("",)
    labels, hashes = source.labels.long(), [hashlib.sha256() for _ in names]
    for part, label in zip(parts, labels.tolist(), strict=True):
        hashes[label].update(part)
    counts = labels.bincount(minlength=len(names)).tolist()
    rows = zip(names, counts, hashes, strict=True)
    classes = [Class(name=name, images=count, sha256=each.hexdigest()[:16]) for name, count, each in rows]
    return {"classes": classes, "order": hashlib.sha256(labels.numpy().data).hexdigest()[:16]}


def changes(before: Contents, now: Contents) -> str:
    """In what two data sets differ, in words; empty if they are equal."""
    was, are = ([each["name"] for each in side["classes"]] for side in (before, now))
    if was != are:
        return f"class names: was {_some(was) or 'one class'}; now {_some(are) or 'one class'}"
    pairs = [(old, new) for old, new in zip(before["classes"], now["classes"], strict=True) if old != new]
    if not pairs:
        return "" if before["order"] == now["order"] else "the order of classes among the pictures"
    found = [
        f"{_named(old)}{old['images']:,} pictures, now {new['images']:,}"
        if old["images"] != new["images"]
        else f"{_named(old)}{new['images']:,} pictures, not the same ones"
        for old, new in pairs
    ]
    return _some(found, "; ", 2)


def _named(each: Mapping[str, object]) -> str:
    return f"class {each['name']}: " if each["name"] else ""


def _some(words: list[str], between: str = ", ", most: int = 10) -> str:
    """The first few of a list, and how many there are more."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return between.join(words[:most]) + more
