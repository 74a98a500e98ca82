"""Pairs of checkpoints in random order, from a zoo and from the same checkpoints as LMDB environments of the released layout.

One process each, everything in the page cache; mapped pages count as memory of either. Networks are of mnist_mlp's size, and
their parameters such that bfloat16 holds them exactly, so that every job must give the same pairs. LMDB is read as the released
code does, one transaction a pair and a tensor a value, which are then stacked; and, "into out", as well as it can be.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from triptych_common import randomness
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.tasks import TASKS
from triptych_gpt.zoo.pairs import SAMPLINGS, Pairs
from triptych_gpt.zoo.store import CohortData, Manifest, shard_name, write_shard
from triptych_gpt.zoo.zoo import Zoo

from benchmarks.runner import Job

RUNS, COHORT_RUNS, CHECKPOINTS, BATCH = 100, 50, 50, 1024
METRICS = ("test_loss", "test_error")
LAYOUT = TASKS["mnist_mlp"].layout


def cohort_data(seed: int, runs: range, layout: ParameterLayout, checkpoints: int) -> CohortData:
    """Random checkpoints of some runs."""
    theta = randomness.normal(seed, "theta", runs, (checkpoints, layout.size)).bfloat16().float()
    steps = torch.arange(checkpoints).expand(len(runs), -1)
    metrics = {name: randomness.normal(seed, name, runs, (checkpoints,)) for name in METRICS}
    return CohortData(runs, theta, steps, metrics, {"split": "train"}, {})


def write_zoo(folder: Path, seed: int, dtype: str) -> None:
    facts = {"task": "random", "layout": LAYOUT.to_json(), "checkpoints": CHECKPOINTS, "dtype": dtype}
    manifest = Manifest.create(folder, {**facts, "metrics": dict.fromkeys(METRICS, "lower")})
    for first in range(0, RUNS, COHORT_RUNS):
        runs = range(first, first + COHORT_RUNS)
        manifest.commit(write_shard(folder, shard_name(runs), cohort_data(seed, runs, LAYOUT, CHECKPOINTS), dtype))


def write_environments(folder: Path, data: CohortData, sizes: Sequence[int]) -> None:
    """One LMDB environment a run: theta as raw float32 under RUN/epEEE_itIIIII.pt, the metrics in runs.json."""
    import lmdb

    for run, theta, *metrics in zip(data.runs, data.theta, *data.metrics.values(), strict=True):
        path, listed = folder / f"{run:05d}", {}
        path.mkdir()
        with lmdb.open(str(path), map_size=1 << 30) as environment, environment.begin(write=True) as transaction:
            for checkpoint, values in enumerate(theta):
                key = key_of(run, checkpoint)
                transaction.put(key.encode(), values.numpy().tobytes())
                transaction.put(f"{key}_arch".encode(), np.array(sizes, dtype=np.float32).tobytes())
                listed[key] = {name: m[checkpoint].item() for name, m in zip(METRICS, metrics, strict=True)}
        (path / "runs.json").write_text(json.dumps({"checkpoints": listed}))


def write_lmdb(folder: Path, seed: int) -> None:
    sizes = [span.stop - span.start for span in LAYOUT.spans.values()]
    for first in range(0, RUNS, COHORT_RUNS):
        write_environments(folder, cohort_data(seed, range(first, first + COHORT_RUNS), LAYOUT, CHECKPOINTS), sizes)


def key_of(run: int, checkpoint: int) -> str:
    return f"{run:05d}/ep000_it{checkpoint:05d}.pt"


@dataclass(eq=False)
class Stored:
    """A temporary folder, and what is open in it."""

    folder: TemporaryDirectory
    opened: Any


_stored: WeakValueDictionary[Any, Stored] = WeakValueDictionary()


def stored(write: Callable[..., None], read: Callable[[Path], Any], *arguments: Any) -> Stored:
    """What `write` writes and `read` opens: once for all who hold it at a time, and gone with the last of them."""
    key = (write, *arguments)
    found = _stored.get(key)
    if found is None:
        folder = TemporaryDirectory()
        write(Path(folder.name), *arguments)
        found = _stored[key] = Stored(folder, read(Path(folder.name)))
    return found


class Environments:
    """A folder of LMDB environments, all of them open, which a process may do once."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        paths = sorted(folder.iterdir())
        options = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
        self.of_run = [lmdb.open(str(path), **options) for path in paths]
        self.metrics = [json.loads((path / "runs.json").read_text())["checkpoints"] for path in paths]


class LmdbPairs:
    """What `Pairs` draws, from LMDB."""

    def __init__(self, environments: Environments, sampling: str, seed: int) -> None:
        self.environments, self.metrics = environments.of_run, environments.metrics
        self.sampling, self.seed = SAMPLINGS[sampling], seed

    def _drawn(self, counters: range) -> list[tuple[int, str, str]]:
        """Run and keys of each pair."""
        drawn = self.sampling(self.seed, counters, len(self.environments), CHECKPOINTS)
        rows = zip(*(part.tolist() for part in drawn), strict=True)
        return [(run, key_of(run, start), key_of(run, target)) for run, start, target in rows]

    def _metrics(self, drawn: list[tuple[int, str, str]]) -> Tensor:
        found = [self.metrics[run][key][name] for run, *keys in drawn for key in keys for name in METRICS]
        return torch.tensor(found).view(len(drawn), 2, len(METRICS))

    def draw(self, counters: range) -> tuple[Tensor, Tensor, Tensor]:
        """theta, theta_star and both metrics, as the released code reads them."""
        drawn, pairs = self._drawn(counters), []
        for run, *keys in drawn:
            with self.environments[run].begin(write=False) as transaction:
                values = [bytearray(transaction.get(key.encode())) for key in keys]
            pairs.append([torch.frombuffer(value, dtype=torch.float32) for value in values])
        theta, theta_star = (torch.stack(side) for side in zip(*pairs, strict=True))
        return theta, theta_star, self._metrics(drawn)

    def draw_into(self, counters: range, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The same without a copy but that into `out`."""
        drawn, arrays = self._drawn(counters), [side.numpy() for side in out]
        for row, (run, *keys) in enumerate(drawn):
            with self.environments[run].begin(write=False, buffers=True) as transaction:
                for key, array in zip(keys, arrays, strict=True):
                    array[row] = np.frombuffer(transaction.get(key.encode()), dtype=np.float32)
        return *out, self._metrics(drawn)


def from_lmdb(sampling: str, *, into: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare batches from LMDB; what is timed returns the theta of its first."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        held = stored(write_lmdb, Environments, seed)
        source = LmdbPairs(held.opened, sampling, seed)
        return _batches(partial(source.draw_into, out=_out()) if into else source.draw, held)

    return prepare


def from_zoo(sampling: str, dtype: str, *, into: bool) -> Callable[[int], Callable[[], Tensor]]:
    """Prepare batches from a zoo."""

    def prepare(seed: int) -> Callable[[], Tensor]:
        held = stored(write_zoo, Zoo, seed, dtype)
        source = Pairs(held.opened, sampling=sampling, seed=seed)
        return _batches(partial(source.draw, out=_out()) if into else source.draw, held)

    return prepare


def _out() -> tuple[Tensor, Tensor]:
    return torch.empty(BATCH, LAYOUT.size), torch.empty(BATCH, LAYOUT.size)


def _batches(draw: Callable[[range], Any], held: Stored) -> Callable[[], Tensor]:
    firsts = iter(range(0, 1 << 40, BATCH))

    def once(_held: Stored = held) -> Tensor:  # which lives as long as this function
        first = next(firsts)
        batch = draw(range(first, first + BATCH))
        return torch.stack(batch[:2]) if first == 0 else batch[0]  # the first is compared, and not timed

    return once


def jobs() -> Sequence[Job]:
    skip = None if find_spec("lmdb") else "no lmdb here: pip install 'triptych-gpt[lmdb]'"
    listed = []
    for sampling in SAMPLINGS:
        released, best = f"{sampling}: LMDB", f"{sampling}: LMDB, into out"
        listed += [
            Job(released, from_lmdb(sampling, into=False), BATCH, "pairs", skip=skip),
            Job(best, from_lmdb(sampling, into=True), BATCH, "pairs", (released,), released, skip=skip),
        ]
        for dtype in ("float32", "bfloat16"):
            for into in (False, True):
                name = f"{sampling}: {dtype}{', into out' if into else ''}"
                listed.append(
                    Job(name, from_zoo(sampling, dtype, into=into), BATCH, "pairs", (released, best), released)
                )
    return listed
