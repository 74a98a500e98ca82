"""`python -m benchmarks`: run suites, write one JSON file each."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from triptych_common.run import write_json

from benchmarks.runner import Plan, run_suite, table
from benchmarks.suites import SUITES


@dataclass(frozen=True)
class Options:
    """Run benchmark suites."""

    suites: tuple[str, ...] = tuple(SUITES)
    """which suites"""
    out: Path = Path("benchmarks/results")
    """folder for the JSON files"""
    warmup: int = 3
    """untimed calls of each job"""
    repeats: int = 20
    """timed calls of each job"""
    seed: int = 0
    """seed of weights and data"""


def main(options: Options) -> int:
    if unknown := set(options.suites) - SUITES.keys():
        print(f"error: suite {min(unknown)!r}: expected some of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    status = 0
    for name in options.suites:
        result = run_suite(name, SUITES[name](), Plan(options.warmup, options.repeats, options.seed))
        path = options.out / f"{name}.json"
        write_json(path, result)
        hardware = ", ".join(f"{key} {value}" for key, value in result["hardware"].items())
        print(f"{name} ({hardware}; torch {result['versions']['torch']})\n{table(result)}\nwrote {path}")
        status = status or bool(result["failed"])
    return int(status)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
