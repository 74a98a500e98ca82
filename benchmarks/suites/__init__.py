"""Suites by name; each is a function that returns its jobs."""

from collections.abc import Callable, Sequence

from benchmarks.runner import Job
from benchmarks.suites import dit_digits

SUITES: dict[str, Callable[[], Sequence[Job]]] = {"dit_digits": dit_digits.jobs}
