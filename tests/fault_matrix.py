"""Every command under every fault: does a repeated command end in the same files, and is what it says one line?

`python tests/fault_matrix.py` runs trials and prints a table of outcomes; repeated, it goes on where it stopped. A trial puts the
inputs and the output folder of a command under a fault, then repeats the command without the fault and compares all files with
those of undisturbed runs. What two undisturbed runs do not agree on, such as times, is not compared.

Commands run in processes forked from one that has imported everything, so that faults fall into their work, not into imports;
every fifth trial runs in a fresh interpreter, imports included.
"""

import argparse
import atexit
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

PROGRAMS = {
    "triptych-dit": "triptych_dit.cli",
    "triptych-gpt": "triptych_gpt.cli",
    "triptych-gangealing": "triptych_gangealing.cli",
    "triptych": "triptych_thesis.cli",
}
COMMANDS = {  # name -> command line; inputs are under in/, outputs under out/
    "dit train": """triptych-dit train --data in/cache --preset digits --model.input-size 8 8 --model.in-channels 4
        --model.num-classes 2 --model.patch-size 2 --model.depth 1 --model.hidden-size 32 --model.num-heads 2 --batch-size 16
        --total-images 640 --warmup-images 64 --snapshots 320 --checkpoint-every 8 --log-every 5""",
    "dit autoencoder": """triptych-dit autoencoder --block-out-channels 8 8 --norm-num-groups 4 --total-images 640
        --batch-size 16 --warmup-images 64 --checkpoint-every 8 --log-every 5""",
    "dit encode": """triptych-dit encode --source in/pictures --vae in/autoencoder --image-size 16 --shard-size 16
        --batch-size 8 --workers 1""",
    "dit sample": """triptych-dit sample --checkpoint in/dit --vae in/autoencoder --num-samples 48 --batch-size 8
        --num-inference-steps 20""",
    "study": "triptych reproduce ch2 --size smoke-pixels --only samplers --workers 1",
    "gpt collect, pool": """triptych-gpt collect --task in/task.py:X --runs 16 --cohort-runs 2 --checkpoints 6 --split-every 4
        --networks-at-once 2 --workers 2""",
    "gpt collect, Ray": """triptych-gpt collect --task in/task.py:X --runs 16 --cohort-runs 2 --checkpoints 6 --split-every 4
        --networks-at-once 2 --workers 2 --engine ray""",
    "gpt train": """triptych-gpt train --zoo in/zoo --task in/task.py:X --width 16 --depth 1 --num-heads 2 --batch-size 32
        --total-pairs 2560 --warmup-pairs 32 --checkpoint-every 10 --log-every 5 --validation-every 40 --validation-networks 2
        --validation-inference-steps 3""",
    "gpt evaluate": """triptych-gpt evaluate --model in/gpt --zoo in/zoo --task in/task.py:X --networks 2 --prompts 3
        --num-inference-steps 3 --sampler-steps 2""",
    "train-gan": """triptych-gangealing train-gan --data in/pictures8 --preset smoke --resolution 8 --channel-base 64
        --channel-max 8 --z-dim 8 --batch-size 8 --total-images 160 --checkpoint-every 4 --log-every 3 --snapshot-every 48
        --scores none""",
    "gangealing train": """triptych-gangealing train --generator in/generator.safetensors
        --distance simclr:in/encoder.safetensors --preset smoke --input-size 16 --flow-size 4 --components 3 --pca-samples 60
        --cutoff 4 --batch-size 4 --total-images 48 --checkpoint-every 2 --log-every 2 --snapshot-every 16 --psi-images 16
        --constant-images 16 --restart-images 8 --init-images 12 --classifier-images 16 --ema-half-life-images 8""",
    "align": "triptych-gangealing align --aligner in/aligner --images in/pictures",
}
INPUTS = {  # what each needs of the folder of inputs
    "dit train": ["cache"], "dit encode": ["pictures", "autoencoder"], "dit sample": ["dit", "autoencoder", "cache"],
    "gpt collect, pool": ["task.py"], "gpt collect, Ray": ["task.py"], "gpt train": ["zoo", "task.py"],
    "gpt evaluate": ["gpt", "zoo", "task.py"], "train-gan": ["pictures8"],
    "gangealing train": ["generator.safetensors", "encoder.safetensors"], "align": ["aligner", "pictures"],
}  # fmt: skip
TASK = """
import time
import torch
from torch import nn
from triptych_gpt.tasks import Items, SupervisedTask

def points(part):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, (inputs[:, 0] > 0).long())

def slowly(inputs, rng):
    time.sleep(0.01)  # so that a cohort takes long enough to be interrupted
    return inputs

X = SupervisedTask(
    name="own", network=lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), data=points, epochs=3, batch_size=16,
    augment=slowly,
)
"""


# --- processes


@dataclass
class Ended:
    """How a command ended. status: as the shell has it, or minus the signal. peak: virtual memory, bytes."""

    status: int
    output: str
    errors: str
    seconds: float
    peak: int = 0


class Running:
    """A command in a process group of its own, its output in files."""

    def __init__(self, words: list[str], folder: Path, *, fresh: bool = False, memory: int | None = None) -> None:
        self.folder, self.start = folder, time.monotonic()
        self.logs = Path(tempfile.mkdtemp(prefix="logs-", dir=folder.parent))
        for name in ("stdout", "stderr"):
            (self.logs / name).touch()
        self.pid = os.fork()
        if self.pid == 0:
            self._child(words, fresh, memory)

    def _child(self, words: list[str], fresh: bool, memory: int | None) -> None:
        status = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.logs / name, os.O_WRONLY), number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            if fresh:
                os.execv(sys.executable, [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]])
            import_module("triptych_common.interrupts").install()
            try:
                status = import_module(PROGRAMS[words[0]]).run(words[1:])
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            (self.logs / "peak").write_text(_peak())
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def poll(self) -> bool:
        """Whether it still runs."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait_for_handlers(self, limit: float = 30.0) -> None:
        """Wait until a fresh interpreter handles SIGTERM: before the program's first line nobody can say anything."""
        caught, until = 0, time.monotonic() + limit
        while not caught & 1 << signal.SIGTERM - 1 and self.poll() and time.monotonic() < until:
            status = Path(f"/proc/{self.pid}/status").read_text()
            caught = int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16)  # type: ignore[index]
            time.sleep(0.001)

    def send(self, *signals: int, pause: float = 0.0) -> None:
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                # A terminal sends SIGINT to the whole group; a scheduler sends SIGTERM to the process.
                (os.killpg if number == signal.SIGINT else os.kill)(self.pid, number)
            time.sleep(pause)

    def wait(self, limit: float = 300.0) -> Ended:
        while self.poll():
            if time.monotonic() - self.start > limit:
                self._end_group()
                break
            time.sleep(0.01)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.start
        time.sleep(0.05)
        self._end_group()  # workers that outlive a killed parent would write into the next trial
        peak = self.logs / "peak"
        ended = Ended(
            os.waitstatus_to_exitcode(status), *((self.logs / name).read_text(errors="replace") for name in ("stdout", "stderr")),
            seconds, int(peak.read_text() or 0) if peak.exists() else 0,
        )  # fmt: skip
        shutil.rmtree(self.logs)
        return ended

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def _peak() -> str:
    status = Path("/proc/self/status").read_text()
    return str(int(re.search(r"VmPeak:\s+(\d+)", status)[1]) * 1024)


def _virtual_now() -> int:
    return int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


# --- files


BY_PRODUCT = re.compile(
    r"/(checkpoints|snapshots|samples|previews|digits32)/"
)  # never read again by a run that is finished
UNSTABLE = re.compile(r"#.*(commit|seconds|time|command|crc32)")  # of JSON fields; two runs may happen to agree on them
IGNORED = re.compile(r"(^|/)(\.lock|\.triptych\.lock|\.verified\.json|\.metrics\.crc32|tensorboard/.*|logs/.*)$")


def contents(folder: Path) -> dict[str, Any]:
    """Path -> bytes of a file, or the leaves of a JSON file as path#leaf -> value."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or IGNORED.search(name):
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            try:
                lines = (
                    [json.loads(content)] if path.suffix == ".json" else [json.loads(x) for x in content.splitlines()]
                )
                found |= dict(leaves(lines, f"{name}#"))
                continue
            except ValueError:
                pass
        found[name] = content
    return found


def leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, f"{prefix}.{key}")
    elif isinstance(tree, list):
        yield f"{prefix}.length", len(tree)
        for i, child in enumerate(tree):
            yield from leaves(child, f"{prefix}.{i}")
    else:
        yield prefix, tree


def field(leaf: str) -> str:
    """A leaf's name with the numbers of list items left out, since every row has its times."""
    return re.sub(r"\.\d+(?=\.|$)", "", leaf)


@dataclass
class Reference:
    """The files of undisturbed runs. agreed: what both have equal. varying: fields and files that differ."""

    agreed: dict[str, Any]
    varying: set[str]
    seconds: float
    growth: int  # of virtual memory
    bytes: int  # of the output folder

    def differences(self, found: Mapping[str, Any]) -> list[str]:
        names = {name for name in self.agreed.keys() | found.keys() if field(name) not in self.varying}
        names = {name for name in names if not UNSTABLE.search(name)}
        missing = object()
        return sorted(name for name in names if self.agreed.get(name, missing) != found.get(name, missing))


# --- trials


@dataclass
class Trial:
    command: str
    fault: str
    number: int
    outcome: str  # identical, refused, or what went wrong
    note: str = ""


UGLY = re.compile(
    r"Traceback|terminate called|Fatal Python|core dumped|\*\*\* SIG|Aborted|Stack trace|Segmentation|std::|leaked"
)
GOOD = ("identical", "refused", "told", "unused", "not applicable")


class Bench:
    """Runs trials of one command in folders below `root`."""

    def __init__(self, name: str, inputs: Path, root: Path, seed: int) -> None:
        self.name, self.inputs, self.root, self.seed = name, inputs, root, seed
        self.words = [*COMMANDS[name].split(), "--out", "out/run"]

    def place(self, label: str) -> Path:
        """A new folder with the command's inputs."""
        place = self.root / f"{self.name}-{label}".replace(" ", "-").replace(",", "")
        shutil.rmtree(place, ignore_errors=True)
        (place / "in").mkdir(parents=True)
        for name in INPUTS.get(self.name, ()):
            source = self.inputs / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, place / "in" / name)
        return place

    def run(self, place: Path, **options: Any) -> Ended:
        return Running(self.words, place, **options).wait()

    def start(self, place: Path, **options: Any) -> Running:
        return Running(self.words, place, **options)

    def reference(self) -> Reference:
        runs, base = [], _virtual_now()
        for label in ("whole", "whole-again"):
            place = self.place(label)
            ended = self.run(place)
            assert ended.status == 0, f"{self.name}: {ended.errors}"
            runs.append((contents(place / "out/run"), ended))
        # Repeated on what is finished already: what it changes then, such as the time of the last command, is no promise either.
        assert self.run(place).status == 0
        repeated = contents(place / "out/run")
        (first, ended), (second, _) = runs
        size = sum(path.stat().st_blocks * 512 for path in (place / "out").rglob("*"))
        varying = {
            field(name)
            for name in first.keys() | second.keys() | repeated.keys()
            if not first.get(name) == second.get(name) == repeated.get(name)
        }
        return Reference(first, varying, ended.seconds, max(0, ended.peak - base), size)

    def trial(self, fault: str, number: int, reference: Reference) -> Trial:
        rng = random.Random(f"{self.seed}/{self.name}/{fault}/{number}")
        place = self.place(f"{fault}-{number}".replace("/", "-"))
        result = Trial(self.name, fault, number, "")
        mounted = fault in ("disk full", "read-only")
        (place / "out").mkdir()
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", place / "out"], check=True)
        try:
            FAULTS[fault](self, place, rng, reference, result)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", place / "out"], check=True)
            if result.outcome in GOOD:
                shutil.rmtree(place, ignore_errors=True)
        return result

    # what follows judges

    def clean(self, ended: Ended, result: Trial, statuses: tuple[int, ...] | None = None) -> bool:
        """Whether a command ended decently; otherwise the trial's outcome says why not."""
        if UGLY.search(ended.errors) and ended.status != -signal.SIGKILL:  # workers complain about a killed parent
            result.outcome, result.note = "traceback", ended.errors[-1500:]
        elif statuses is not None and ended.status not in statuses:
            result.outcome, result.note = "wrong status", f"{ended.status}: {ended.errors[-500:]}"
        elif ended.status not in (0, -signal.SIGKILL) and not lines_of_error(ended):
            result.outcome, result.note = "no word", f"status {ended.status}: {ended.errors[-500:]}"
        return not result.outcome

    def repeated(
        self, place: Path, reference: Reference, result: Trial, restore: Callable[[], object] | None = None,
        harmed: Path | None = None,
    ) -> None:  # fmt: skip
        """Repeat the command: the same files, or one line that refuses, after which `restore` must lead to the same files.

        harmed: a file whose damage the command may tell of instead.
        """
        ended = self.run(place)
        if not self.clean(ended, result):
            return
        if ended.status != 0:
            said = lines_of_error(ended)
            if len(said) != 1:
                result.outcome, result.note = "more than one line", ended.errors[-800:]
                return
            if restore is None:
                result.outcome, result.note = "lost", said[0]
                return
            restore()
            again = self.run(place)
            if again.status != 0 or reference.differences(contents(place / "out/run")):
                result.outcome, result.note = "lost", f"{said[0]} | restored: {again.errors[-300:]}"
            else:
                result.outcome, result.note = "refused", said[0]
            return
        wrong = reference.differences(contents(place / "out/run"))
        if (
            harmed is not None
            and BY_PRODUCT.search(str(harmed))
            and wrong == [os.path.relpath(harmed, place / "out/run")]
        ):
            result.outcome = "unused"
            return
        if wrong:
            said = ended.output + ended.errors
            told = harmed is not None and (harmed.name in said or "left out 1 image" in said)
            result.outcome = "told" if told else "silent damage"
            result.note = f"{wrong[:6]}; said {said[-300:]}"
        else:
            result.outcome = "identical"


def lines_of_error(ended: Ended) -> list[str]:
    """The lines on stderr that are not about progress. OpenBLAS ends a process by itself, with a line of its own."""
    starts = ("error:", "stopped", "interrupted", "OpenBLAS error: Memory allocation")
    return [line for line in ended.errors.splitlines() if line.startswith(starts)]


def _interrupt(*signals: int, pause: float = 0.0) -> Callable[..., None]:
    def fault(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
        fresh, span = result.number % 5 == 4, reference.seconds
        for _ in range(6):
            shutil.rmtree(place / "out/run", ignore_errors=True)
            running = bench.start(place, fresh=fresh)
            if fresh:
                running.wait_for_handlers()
            time.sleep(rng.uniform(0, span + 2 * fresh))
            alive = running.poll()
            running.send(*signals, pause=rng.uniform(0, pause))
            ended = running.wait()
            if alive and ended.status != 0:
                break
            span *= 0.7  # it had finished: earlier next time
        else:
            result.outcome, result.note = "not applicable", "always finished before"
            return
        number = signals[0]
        allowed = (-number,) if number == signal.SIGKILL else (128 + number, -number)
        if bench.clean(ended, result, allowed):
            bench.repeated(place, reference, result)

    return fault


def _disk_full(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
    room = int(rng.uniform(0.05, 0.95) * reference.bytes)
    subprocess.run(["mount", "-o", f"remount,size={max(4096, room)}", place / "out"], check=True)
    ended = bench.run(place)
    if not bench.clean(ended, result, (0, 1)):
        return
    subprocess.run(["mount", "-o", "remount,size=1g", place / "out"], check=True)
    bench.repeated(place, reference, result)


def _partly(bench: Bench, place: Path, rng: random.Random, reference: Reference) -> None:
    """A run that was killed at a random moment, or is whole in one of three cases."""
    running = bench.start(place)
    if rng.random() < 2 / 3:
        time.sleep(rng.uniform(0.2, 1.0) * reference.seconds)
        running.send(signal.SIGKILL)
    running.wait()


def _read_only(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
    _partly(bench, place, rng, reference)
    subprocess.run(["mount", "-o", "remount,ro", place / "out"], check=True)
    ended = bench.run(place)
    subprocess.run(["mount", "-o", "remount,rw", place / "out"], check=True)
    if bench.clean(ended, result, (0, 1)):
        bench.repeated(place, reference, result)


def _damage(harm: Callable[[Path, random.Random], None]) -> Callable[..., None]:
    def fault(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
        files = _files(place / "in", pictures=harm is not _remove) if result.number % 2 else []
        if not files:  # then of the outputs
            _partly(bench, place, rng, reference)
            files = _files(place / "out")
        if not files:
            result.outcome, result.note = "not applicable", "no file yet"
            return
        path = rng.choice(files)
        before = path.read_bytes()
        harm(path, rng)
        result.note = str(path.relative_to(place))
        bench.repeated(place, reference, result, lambda: path.write_bytes(before), path)
        if result.outcome != "identical":
            result.note = f"{path.relative_to(place)}: {result.note}"

    return fault


def _files(folder: Path, *, pictures: bool = True) -> list[Path]:
    """Files that hold something, without code; also without folders of pictures, since nobody knows which there should be."""
    files = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size and path.suffix != ".py"
    ]
    return [path for path in files if pictures or not path.parent.parent.name.startswith("pictures")]


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _two(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
    first = bench.start(place)
    time.sleep(rng.uniform(0, 0.9) * reference.seconds)
    second = bench.start(place)
    ended = second.wait()
    if not (bench.clean(first.wait(), result, (0, 1)) and bench.clean(ended, result, (0, 1))):
        return
    bench.repeated(place, reference, result)


def _memory(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
    limit = _virtual_now() + int(rng.uniform(0.05, 0.95) * reference.growth)
    ended = bench.run(place, memory=limit)
    if bench.clean(ended, result, (0, 1)):
        bench.repeated(place, reference, result)


def _not_a_number(where: str) -> Callable[..., None]:
    def fault(bench: Bench, place: Path, rng: random.Random, reference: Reference, result: Trial) -> None:
        wanted = DATA if where == "data" else WEIGHTS
        if bench.name not in wanted:
            result.outcome, result.note = "not applicable", f"its {where} cannot hold NaN"
            return
        make_nan(place / "in" / wanted[bench.name], rng)
        ended = bench.run(place)
        if bench.clean(ended, result, (1,)):
            result.outcome, result.note = "refused", " ".join(lines_of_error(ended))

    return fault


WEIGHTS = {
    "dit encode": "autoencoder/vae/diffusion_pytorch_model.safetensors", "dit sample": "dit/model.safetensors",
    "gpt evaluate": "gpt/model.safetensors", "gangealing train": "generator.safetensors", "align": "aligner/aligner.safetensors",
}  # fmt: skip
DATA = {"dit train": "cache", "gpt train": "zoo", "gpt evaluate": "zoo"}
FAULTS: dict[str, Callable[..., None]] = {
    "SIGTERM": _interrupt(signal.SIGTERM),
    "SIGINT twice": _interrupt(signal.SIGINT, signal.SIGINT, pause=0.3),
    "SIGKILL": _interrupt(signal.SIGKILL),
    "disk full": _disk_full,
    "read-only": _read_only,
    "flipped byte": _damage(_flip),
    "missing file": _damage(_remove),
    "two processes": _two,
    "memory limit": _memory,
    "NaN in weights": _not_a_number("weights"),
    "NaN in data": _not_a_number("data"),
}
ONCE = ("NaN in weights", "NaN in data")  # nothing random about them but the place


def make_nan(path: Path, rng: random.Random) -> None:
    """Put a NaN into a file of weights, or into a shard whose checksums agree with it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    if path.is_file():
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        floats = [name for name, value in tensors.items() if value.is_floating_point() and value.numel()]
        tensors[rng.choice(floats)].view(-1)[0] = float("nan")
        save_file(tensors, path, metadata)
    elif (path / "shards").is_dir():
        _nan_in_zoo(path)
    else:
        from triptych_common.storage import checkpoint
        from triptych_dit.autoencoder import cache as latents

        shard = latents.shard_path(path, 0)
        tensors, state = checkpoint.read(shard)
        tensors["moments"].view(-1)[0] = float("nan")
        checkpoint.write(shard, tensors, state)
        manifest = json.loads((path / latents.MANIFEST).read_text())
        with safe_open(shard, framework="pt") as file:
            manifest["shards"][0]["sha256"] = file.metadata()["sha256"]
        (path / latents.MANIFEST).write_text(json.dumps(manifest))


def _nan_in_zoo(path: Path) -> None:
    """Write the zoo again with a NaN in every run, since a trial may use any."""
    from triptych_gpt.zoo import store

    manifest = store.Manifest.read(path)
    from safetensors.torch import load_file

    for record in manifest.shards:
        file = path / store.SHARDS / (record.name + store.THETA)
        theta = load_file(file)["theta"].clone()
        theta[:, :, 0] = float("nan")
        import dataclasses

        written = store._write(file, store._theta_file(theta, "float32"))
        manifest.commit(dataclasses.replace(record, theta=written), replace=True)


# --- inputs


def prepare(root: Path, commands: list[str]) -> None:
    """Make the inputs of commands in `root/in`, by other commands where they are outputs."""
    for name in dict.fromkeys(name for command in commands for name in INPUTS.get(command, ())):
        path = root / "in" / name
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        if name in MADE_BY:
            maker = MADE_BY[name]
            prepare(root, [maker])
            making = path.with_name(f".{name}")
            ended = Running([*COMMANDS[maker].split(), "--out", f"in/.{name}"], root).wait()
            assert ended.status == 0, f"{maker}: {ended.errors}"
            making.rename(path)
        else:
            MAKERS[name](path)


def _pictures(path: Path, size: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(64):
        (path / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "ab"[i % 2] / f"{i:02d}.png")


def _generator(path: Path) -> None:
    import torch
    from triptych_gangealing.stylegan2.config import GeneratorConfig
    from triptych_gangealing.stylegan2.generator import Generator
    from triptych_gangealing.stylegan2.weights import write_network

    torch.manual_seed(3)
    generator = Generator(GeneratorConfig(16, channel_base=64, channel_max=8, z_dim=6, w_dim=6, mapping_layers=2))
    with torch.no_grad():
        for name, value in generator.named_parameters():
            if name.endswith("noise_strength"):
                value.fill_(0.1)
    write_network(path, generator, {})


def _encoder(path: Path) -> None:
    from triptych_gangealing.encoders.perceptual import Encoder, EncoderConfig, write_encoder

    write_encoder(path, Encoder(EncoderConfig((4, 6))), {})


MADE_BY = {
    "autoencoder": "dit autoencoder", "cache": "dit encode", "dit": "dit train", "zoo": "gpt collect, pool", "gpt": "gpt train",
    "aligner": "gangealing train",
}  # fmt: skip
MAKERS: dict[str, Callable[[Path], object]] = {
    "task.py": lambda path: path.write_text(TASK), "pictures": partial(_pictures, size=16), "pictures8": partial(_pictures, size=8),
    "generator.safetensors": _generator, "encoder.safetensors": _encoder,
}  # fmt: skip


# --- the matrix


def work(jobs: list[tuple[str, str, int]], root: Path, seed: int) -> Iterator[Trial]:
    """Trials of one command, whose reference is made first."""
    bench = Bench(jobs[0][0], root / "in", root / "trials", seed)
    reference = bench.reference()
    for _, fault, number in jobs:
        yield bench.trial(fault, number, reference)


def run(root: Path, commands: list[str], faults: list[str], trials: int, seed: int) -> list[Trial]:
    """The trials of a matrix, those that are done already read from `root/results.jsonl`."""
    results = root / "results.jsonl"
    done = [Trial(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    have = {(trial.command, trial.fault, trial.number) for trial in done}
    for command in commands:
        wanted = [(command, fault, n) for fault in faults for n in range(1 if fault in ONCE else trials)]
        if jobs := [job for job in wanted if job not in have]:
            print(f"{command}: {len(jobs)} trials", file=sys.stderr, flush=True)
            for trial in work(jobs, root, seed):
                done.append(trial)
                with results.open("a") as file:
                    file.write(json.dumps(asdict(trial)) + "\n")
                if trial.outcome not in GOOD:
                    print(f"{trial.command}, {trial.fault} {trial.number}: {trial.outcome}: {trial.note}", flush=True)
    return done


def table(trials: list[Trial]) -> str:
    """Markdown: a row for each command, a column for each fault, outcomes counted."""
    short = {**{good: good for good in GOOD}, "identical": "same", "not applicable": "-"}
    rows = ["| command | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for command in [name for name in COMMANDS if any(trial.command == name for trial in trials)]:
        cells = []
        for fault in FAULTS:
            outcomes = Counter(t.outcome for t in trials if (t.command, t.fault) == (command, fault))
            cells.append(
                ", ".join(f"{n} {short.get(what, f'**{what}**')}" for what, n in outcomes.most_common()).replace(
                    "1 -", "-"
                )
            )
        rows.append(f"| {command} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--commands", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--faults", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    subprocess.run(["umount", "/mnt"], check=True)
    root = options.out.resolve()
    root.mkdir(parents=True, exist_ok=True)
    for module in PRELOADED:
        import_module(module)
    import_module("diffusers").AutoencoderKL  # noqa: B018 - imported on access
    prepare(root, options.commands)
    trials = run(root, options.commands, options.faults, options.trials, options.seed)
    (root / "table.md").write_text(table(trials))
    print(table(trials))
    return int(any(trial.outcome not in GOOD for trial in trials))


PRELOADED = [
    *PROGRAMS.values(),
    "triptych_dit.train", "triptych_dit.autoencoder.train", "triptych_dit.autoencoder.encode",
    "triptych_dit.sample", "triptych_gpt.zoo.collect", "triptych_gpt.train", "triptych_gpt.evaluate", "triptych_gangealing.train",
    "triptych_gangealing.stylegan2.train", "triptych_gangealing.folders", "triptych_thesis.study.runner", "diffusers",
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
