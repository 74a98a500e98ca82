"""Units of work of a study, each a file that is made once, on as many processes as there are cores."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triptych_common.cli import say
from triptych_common.errors import Interrupted
from triptych_common.parallel import ranks
from triptych_common.progress import Progress

from triptych_dit.sample import SampleConfig, sample
from triptych_dit.samples_file import write_npz
from triptych_dit.study.adm import AdmScorer
from triptych_dit.study.scoring import StudyScorer
from triptych_dit.train import train
from triptych_dit.train_config import TrainConfig
from triptych_dit.weights import FILE_NAME


@dataclass(frozen=True)
class Training:
    """A run to be trained; `cost` in any unit, for the order and the progress bar."""

    title: str
    config: TrainConfig
    unet: bool
    cost: float

    @property
    def done(self) -> bool:
        return (self.config.out / FILE_NAME).exists()

    def __call__(self) -> None:
        if self.unet:
            from triptych_dit.study.unet import train_unet

            train_unet(self.config)
        else:
            train(self.config)


@dataclass(frozen=True)
class Sampling:
    """Samples to be drawn and scored."""

    title: str
    config: SampleConfig
    unet: bool
    scorer: StudyScorer | AdmScorer
    cost: float

    @property
    def done(self) -> bool:
        return (self.config.out / "scores.json").exists() and (self.config.out / "samples.npz").exists()

    def __call__(self) -> None:
        if self.unet:
            _sample_unet(self.config)
        else:
            sample(self.config)
        self.scorer(self.config.out / "samples.npz")


def _sample_unet(config: SampleConfig) -> None:
    from triptych_dit.study.unet import load_unet, sample_unet

    path = config.out / "samples.npz"
    if path.exists():
        return
    trained = load_unet(Path(config.checkpoint))
    labels = torch.arange(config.num_samples) % (trained.model.config.num_embeddings - 1)
    with ranks(config.device) as among:
        trained.model.to(among.device)
        batches = (
            sample_unet(trained, part, config, seed=config.seed, first_index=config.batch_size * i, vae=config.vae)
            for i, part in enumerate(labels.split(config.batch_size))
        )
        write_npz(path, batches, config.num_samples, labels)


def on_gpu(device: str) -> bool:
    return device != "cpu" and (device != "auto" or torch.cuda.is_available())


def default_workers(device: str) -> int:
    """A process a core on a CPU, where small networks gain little from threads; one on a GPU."""
    if on_gpu(device):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8))


def run_all(what: str, units: Sequence[Training | Sampling], workers: int, *, one_thread: bool) -> None:
    """Do what is not done yet, costly units first, each on one thread where `one_thread`: results do not depend on `workers`.

    Raises what a unit raises, MemoryError where a process dies; other units are then stopped, and save what they have.
    """
    missing = sorted((unit for unit in units if not unit.done), key=lambda unit: -unit.cost)
    if not missing:
        return
    say(f"{what}: {len(missing)} of {len(units)} to do")
    several = workers > 1 and len(missing) > 1
    finished = _in_processes(missing, workers) if several else _here(missing, one_thread)
    with Progress(what, len(missing), "done", enabled=several) as progress:
        progress.at(0)
        for unit in finished:
            say(f"  {what}: {unit.title}")
            progress.advance()


def _here(units: Sequence[Any], one_thread: bool) -> Iterator[Any]:
    threads = torch.get_num_threads()
    if one_thread:
        torch.set_num_threads(1)
    try:
        for unit in units:
            unit()
            yield unit
    finally:
        torch.set_num_threads(threads)


def _in_processes(units: Sequence[Any], workers: int) -> Iterator[Any]:
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(units)), mp_context=multiprocessing.get_context("spawn"), initializer=_start
    )
    try:
        pending = {pool.submit(_in_worker, unit): unit for unit in units}
        for future in as_completed(pending):
            future.result()
            yield pending[future]
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()  # in training: save and stop
        if isinstance(error, BrokenProcessPool):
            raise MemoryError("a worker process died, most likely for want of memory; use --workers 1") from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """Make a process a worker: one thread, deaf to Ctrl-C, which the parent hears, and no life beyond its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _in_worker(unit: Callable[[], None]) -> None:
    """Without the bars and lines that every single run would print."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            unit()
        except Interrupted:
            os._exit(1)  # the parent is stopping: take no other unit
