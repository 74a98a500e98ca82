"""Classes by number and by name."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 5  # names in a message


def by_name(names: Sequence[str]) -> dict[str, int]:
    """The label of each name and synonym, in lower case. A class's synonyms are separated by commas; where two classes share
    one, as ImageNet's cranes do, it is the first one's.
    """
    labels: dict[str, int] = {}
    for synonyms in ([_plain(name) for name in names], *_columns(names)):
        for label, name in enumerate(synonyms):
            if name:
                labels.setdefault(name, label)
    return labels


def resolved(words: Iterable[int | str], num_classes: int, names: Sequence[str]) -> tuple[int, ...]:
    """The labels that numbers and names stand for. Raises ValueError for a name that no class has, with the nearest ones."""
    known, labels = by_name(names), []
    for word in words:
        if isinstance(word, int) or word.lstrip("-").isdecimal():
            labels.append(int(word))
        elif _plain(word) in known:
            labels.append(known[_plain(word)])
        elif not names:
            raise ValueError(f"label {word!r}: the model has no names of classes; pass numbers, 0..{num_classes - 1}")
        else:
            near = difflib.get_close_matches(_plain(word), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its classes are {listed(names)}"
            raise ValueError(f"label {word!r}: no class of the model has this name; {hint}")
    check(labels, num_classes, names)
    return tuple(labels)


def check(labels: Iterable[int], num_classes: int, names: Sequence[str]) -> None:
    """Raise ValueError for a label that the model does not have, or that its data never had."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label} is outside 0..{num_classes - 1} (num_classes={num_classes})")
        if names and label >= len(names):
            raise ValueError(
                f"label {label}: the model's data had {len(names)} classes, {listed(names)}; it is untrained"
            )


def matched(ours: Sequence[str], theirs: Sequence[str]) -> dict[int, int]:
    """For each of our classes that the other side has too, by name or by a synonym, the label there."""
    whole, synonyms = {_plain(name): label for label, name in enumerate(theirs)}, by_name(theirs)
    found: dict[int, int] = {}
    for label, name in enumerate(ours):
        known = [whole.get(_plain(name)), *(synonyms.get(_plain(synonym)) for synonym in name.split(","))]
        if there := [number for number in known if number is not None]:
            found[label] = there[0]
    return found


def listed(names: Sequence[str]) -> str:
    """The first of a list of names."""
    more = f" and {len(names) - SHOWN:,} others" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def of_id2label(id2label: Mapping[str, str], labels: Iterable[int]) -> list[str]:
    """Names in the order of labels, out of diffusers' mapping; a class that it does not name has its number."""
    return [id2label.get(str(row), str(label)) for label, row in enumerate(labels)]


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _columns(names: Sequence[str]) -> list[list[str]]:
    """All first synonyms, then all second ones, and so on: a class's first name counts more than another's later ones."""
    rows = [[_plain(synonym) for synonym in name.split(",")] for name in names]
    return [[row[i] if i < len(row) else "" for row in rows] for i in range(max(map(len, rows), default=0))]
