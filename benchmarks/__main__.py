"""`python -m benchmarks`: run suites, one JSON file each; `python -m benchmarks compare A.json B.json`: what changed."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from triptych_common.storage.files import write_json

from benchmarks.compare import compare, read_result, regressed, report


@dataclass(frozen=True)
class Run:
    """Run benchmark suites."""

    suites: tuple[str, ...] = ()
    """which suites; none named: all"""
    out: Path = Path("benchmarks/results")
    """folder for the JSON files"""
    warmup: int = 3
    """untimed calls of each job"""
    repeats: int = 20
    """timed calls of each job; long ones take fewer"""
    seed: int = 0
    """seed of weights and data"""
    memory: bool = True
    """measure each job's memory too, in a process of its own"""


@dataclass(frozen=True)
class Compare:
    """Compare two results of a suite; exit status 1 where something got slower, or fails."""

    a: tyro.conf.Positional[Path]
    """the JSON file from before"""
    b: tyro.conf.Positional[Path]
    """the JSON file from after"""
    tolerance: float = 0.05
    """slower by less is no regression"""


def run(options: Run) -> int:
    from benchmarks.memory import peak_memory
    from benchmarks.runner import Plan, run_suite, table
    from benchmarks.suites import SUITES  # takes seconds to import

    if unknown := set(options.suites) - SUITES.keys():
        return _fail(f"suite {min(unknown)!r}: expected some of {', '.join(SUITES)}")
    plan = Plan(options.warmup, options.repeats, options.seed)
    suites = {name: SUITES[name]() for name in options.suites or SUITES}
    memory = {  # first, while this process is small
        name: {job.name: peak_memory(job, plan.seed) for job in jobs} if options.memory else {}
        for name, jobs in suites.items()
    }
    status = 0
    for name, jobs in suites.items():
        result = run_suite(name, jobs, plan, memory[name])
        path = options.out / f"{name}.json"
        write_json(path, result)
        hardware = ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
        print(f"{name} ({hardware}; torch {result['versions']['torch']})\n{table(result)}\nwrote {path}\n", flush=True)
        status = status or bool(result["failed"])
    return int(status)


def compare_files(options: Compare) -> int:
    a, b = read_result(options.a), read_result(options.b)
    changes = compare(a, b, options.tolerance)
    print(report(a, b, changes))
    return int(regressed(b, changes))


def main(argv: Sequence[str]) -> int:
    try:
        if argv[:1] == ["compare"]:
            return compare_files(tyro.cli(Compare, prog="python -m benchmarks compare", args=argv[1:]))
        words = argv[1:] if argv[:1] == ["run"] else argv
        return run(tyro.cli(Run, prog="python -m benchmarks [run | compare A B]", args=words))
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
