"""A campaign of damaged files through every door: `python tests/fuzz.py --cases 129000` (make fuzz CASES=129000).

No file may run anything, take five seconds of the processor or a gigabyte, or end in anything but its content or one line
that names it. A case is a door, a seed and a number, so that a campaign is the same everywhere; it resumes where it was stopped.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS, BYTES, PATIENCE = 5, 1 << 30, 30  # of the processor, of memory, and on the clock, that a file may take
TESTS = Path(__file__).parent


def beside(name: str) -> Any:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass
class Row:
    """What came of a door's cases."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    slowest: float = 0.0
    peak: int = 0
    faults: list[str] = field(default_factory=list)


def one(door: Any, folder: Path, path: Path, seed: str, others: list[Path]) -> str:
    """A case: "refused", "accepted", or what is wrong."""
    doors = beside("doors")
    restore = doors.damage(door, folder, path, random.Random(seed), others)
    try:
        return "accepted" if doors.complaint(door, folder, path) is None else "refused"
    except beside("hostile").Hung:
        return "hung"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        restore()


def work(name: str, start: int, stop: int, seed: int, root: Path) -> None:
    """The cases start .. stop-1 of a door, a line of JSON each. Ends with the process if a file ends it."""
    from triptych_common.testing import peak_bytes

    doors, hostile = beside("doors"), beside("hostile")
    door, folder = doors.DOORS[name], root / name.replace(" ", "-")
    out = os.fdopen(os.dup(1), "w")
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        others = seeds(root)
        path = others[name][0]
        for _ in range(2):
            assert doors.complaint(door, folder, path) is None
        watch = hostile.Watch([str(root), "/dev/null", "/dev/shm", tempfile.gettempdir()], [str(root)])
        signal.signal(signal.SIGPROF, hostile.give_up)
        pieces = [each for files in others.values() for each in files[1:]]
        for number in range(start, stop):
            outcome, started = "", time.process_time()
            watch.events = []

            def case(seed: str = f"{seed}/{name}/{number}") -> None:
                nonlocal outcome
                watch.on = True
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                outcome = one(door, folder, path, seed, pieces)
                signal.setitimer(signal.ITIMER_PROF, 0)
                watch.on = False

            grown, seconds = peak_bytes(case), time.process_time() - started
            if watch.events or grown > BYTES:
                outcome = f"{watch.events[:2]} {grown / 1e6:,.0f} MB"
            out.write(json.dumps([number, outcome, round(seconds, 4), grown]) + "\n")
            out.flush()


def seeds(root: Path) -> dict[str, list[Path]]:
    """For each door what `make` returned, then all its files; made once."""
    doors = beside("doors")
    for name, door in doors.DOORS.items():
        folder = root / name.replace(" ", "-")
        if not (folder / ".made").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            made = door.make(folder)
            (folder / ".made").write_text(str(made.relative_to(folder)))
    folders = {name: root / name.replace(" ", "-") for name in doors.DOORS}
    return {
        name: [folder / (folder / ".made").read_text(), *doors.files_in(folder)] for name, folder in folders.items()
    }


def shares(cases: int) -> dict[str, int]:
    """Cases of each door, which make up `cases`."""
    weights = {name: door.share for name, door in beside("doors").DOORS.items()}
    counts = {name: int(cases * share / sum(weights.values())) for name, share in weights.items()}
    counts[next(iter(counts))] += cases - sum(counts.values())
    return counts


def campaign(cases: int, seed: int, state: Path) -> dict[str, Row]:
    """Run what is left of a campaign; its counts are kept in the file `state`."""
    rows = {name: Row(**row) for name, row in json.loads(state.read_text()).items()} if state.exists() else {}
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        env |= {"HF_HOME": f"{root}/.hf", "HF_DATASETS_CACHE": f"{root}/.hf/datasets", "TRIPTYCH_DATA": f"{root}/.data"}
        for name, wanted in shares(cases).items():
            row = rows.setdefault(name, Row())
            while row.cases < wanted:
                _part(name, row, min(wanted, row.cases + 10_000), seed, root, env)
                state.parent.mkdir(parents=True, exist_ok=True)
                state.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}))
                print(f"{name}: {row.cases:,} of {wanted:,}, {len(row.faults)} faults", flush=True)
    return rows


def _part(name: str, row: Row, stop: int, seed: int, root: str, env: dict[str, str]) -> None:
    """Some cases of a door, in a process of their own; the case in which it ends or hangs is a fault."""
    words = [
        sys.executable,
        __file__,
        "--door",
        name,
        "--from",
        str(row.cases),
        "--to",
        str(stop),
        "--seed",
        str(seed),
        "--root",
        root,
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as worker:
        assert worker.stdout is not None
        patience = 120  # to import, and to make the files
        while row.cases < stop:
            ready, _, _ = select.select([worker.stdout], [], [], patience)
            line = worker.stdout.readline() if ready else b""
            if not line:
                worker.kill()
                errors = worker.stderr.read().decode()[-300:] if worker.stderr else ""
                row.faults.append(f"{seed}/{name}/{row.cases}: ended or hung, status {worker.wait()} {errors}")
                row.cases += 1
                shutil.rmtree(Path(root) / name.replace(" ", "-"))  # the damaged file is still there
                return
            number, outcome, seconds, grown = json.loads(line)
            row.cases, row.slowest, row.peak = number + 1, max(row.slowest, seconds), max(row.peak, grown)
            row.refused += outcome == "refused"
            row.accepted += outcome == "accepted"
            if outcome not in ("refused", "accepted"):
                row.faults.append(f"{seed}/{name}/{number}: {outcome}")
            patience = PATIENCE


def table(rows: dict[str, Row]) -> str:
    """In Markdown, with totals."""
    lines = ["| door | cases | refused | accepted | faults | slowest | peak memory |", "|---|---|---|---|---|---|---|"]
    total = Row(*(sum(getattr(row, name) for row in rows.values()) for name in ("cases", "refused", "accepted")))
    total.slowest, total.peak = (max(getattr(row, name) for row in rows.values()) for name in ("slowest", "peak"))
    total.faults = [fault for row in rows.values() for fault in row.faults]
    for name, row in [*rows.items(), ("all", total)]:
        counts = f"{row.cases:,} | {row.refused:,} | {row.accepted:,} | {len(row.faults)}"
        lines.append(f"| {name} | {counts} | {row.slowest:.2f} s | {row.peak / 1e6:,.0f} MB |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("door", "from", "to", "root"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    if options["door"]:
        work(options["door"], int(options["from"]), int(options["to"]), options["seed"], Path(options["root"]))
        return 0
    rows = campaign(options["cases"], options["seed"], TESTS.parent / "runs" / "fuzz" / f"{options['seed']}.json")
    print(table(rows))
    faults = [fault for row in rows.values() for fault in row.faults]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
