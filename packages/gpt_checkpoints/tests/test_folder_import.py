"""Folders of checkpoints in everybody's layouts become zoos, with the values they were saved with or one clear line."""

import csv
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from triptych_gpt.cli import run
from triptych_gpt.layout import ParameterLayout
from triptych_gpt.settings import ImportConfig
from triptych_gpt.zoo.importing import import_zoo, preview
from triptych_gpt.zoo.zoo import Zoo

TASK = """
import torch
from torch import nn
from triptych_gpt.tasks import Items, OptimizerSettings, SupervisedTask

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())

def points(part):
    inputs = torch.randn(48, 4, generator=torch.Generator().manual_seed(len(part)))
    return Items(inputs, inputs[:, :3].argmax(1))

OWN = SupervisedTask("own", Net, points, epochs=3, batch_size=16)
"""
LAYOUT = ParameterLayout({"fc1.weight": (6, 4), "fc1.bias": (6,), "fc2.weight": (3, 6), "fc2.bias": (3,)})
STEPS = (0, 20, 100)


def theta_of(number: int, step: int) -> Tensor:
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1000 * number + step)) / 2


def state_of(number: int, step: int) -> dict[str, Tensor]:
    return LAYOUT.state_dict(theta_of(number, step))


def write_pt(folder: Path, number: int, step: int) -> None:
    torch.save(state_of(number, step), folder / f"epoch1_{step}.pt")


def write_wrapped(folder: Path, number: int, step: int) -> None:
    state = {f"module.{name}": x for name, x in state_of(number, step).items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / f"net-{step}.pth")


def write_lightning(folder: Path, number: int, step: int) -> None:
    state = {f"net._orig_mod.{name}": x for name, x in state_of(number, step).items()}
    extra = {"loss.weight": torch.ones(3), "epoch_count": torch.tensor(3)}
    torch.save({"state_dict": {**state, **extra}, "global_step": step}, folder / f"epoch=7-step={step}.ckpt")


def write_safetensors(folder: Path, number: int, step: int) -> None:
    save_file(state_of(number, step), folder / f"{step:06d}.safetensors")


def write_huggingface(folder: Path, number: int, step: int) -> None:
    inner = folder / f"checkpoint-{step}"
    inner.mkdir()
    save_file({f"model.{name}": x for name, x in state_of(number, step).items()}, inner / "model.safetensors")
    torch.save({"step": step}, inner / "optimizer.pt")


def write_nested(folder: Path, number: int, step: int) -> None:
    """Within entries of a script's own, beside an average that the metrics are not of."""
    average = {name: x + 1 for name, x in state_of(number, step).items()}
    trainer = {"epoch": 3, "networks": {"policy": state_of(number, step), "ema": average}}
    torch.save({"trainer": trainer, "path": folder}, folder / f"step_{step}.pt")


def write_bin(folder: Path, number: int, step: int) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    torch.save(state_of(number, step), folder / f"checkpoint-{step}" / "pytorch_model.bin")


def write_sharded(folder: Path, number: int, step: int) -> None:
    inner, names, state = folder / f"checkpoint-{step}", {}, state_of(number, step)
    inner.mkdir()
    for i, name in enumerate(state):
        save_file({name: state[name]}, inner / f"model-{i}.safetensors")
        names[name] = f"model-{i}.safetensors"
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def write_sane(folder: Path, number: int, step: int) -> None:
    (folder / f"checkpoint_{step:06d}").mkdir()
    torch.save(state_of(number, step), folder / f"checkpoint_{step:06d}" / "state.pt")


Write = Callable[[Path, int, int], None]
LAYOUTS: dict[str, Write] = {
    "state dicts": write_pt, "wrapped": write_wrapped, "lightning": write_lightning, "safetensors": write_safetensors,
    "hugging face": write_huggingface, "bin": write_bin, "sharded": write_sharded, "one folder a checkpoint": write_sane,
    "nested": write_nested,
}  # fmt: skip


def loss_of(number: int, step: int) -> float:
    return number + step / 128


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(TASK)
    return f"{tmp_path / 'own.py'}:OWN"


def write_runs(root: Path, write: Write = write_pt, runs: int = 6, steps: tuple[int, ...] = STEPS) -> Path:
    for number in range(runs):
        (root / f"run{number}").mkdir(parents=True)
        for step in steps:
            write(root / f"run{number}", number, step)
    return root


def write_table(path: Path, runs: int = 6, steps: tuple[int, ...] = STEPS, **columns: object) -> Path:
    rows = [{"run": f"run{n}", "step": s, "test_loss": loss_of(n, s), **columns} for n in range(runs) for s in steps]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def check_zoo(zoo: Zoo, number_of: Callable[[str], int] = lambda name: int(name.removeprefix("run"))) -> None:
    names = zoo.index(["name"]).column("name").to_pylist()[:: zoo.checkpoints]
    for row, name in enumerate(names):
        assert zoo.steps[row].tolist() == list(STEPS)
        for place, step in enumerate(STEPS):
            assert torch.equal(zoo.theta([row], [place])[0], theta_of(number_of(name), step))
        expected = [loss_of(number_of(name), step) for step in STEPS]
        torch.testing.assert_close(zoo.metrics("test_loss")[row], torch.tensor(expected))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_number_arrives(name, task, tmp_path):
    folder = write_runs(tmp_path / "runs", LAYOUTS[name])
    table = write_table(tmp_path / "table.csv")
    result = import_zoo(ImportConfig(folder=folder, metrics=table, task=task, out=tmp_path / "zoo"))
    assert result["runs"] == {"train": 4, "validation": 1, "test": 1}
    zoo = Zoo(tmp_path / "zoo")
    assert zoo.verify() == []
    assert zoo.layout == LAYOUT
    assert zoo.better == {"test_loss": "lower"}
    check_zoo(zoo)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_tables_and_patterns(suffix, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(4):
        for step in STEPS:
            torch.save(state_of(number, step), folder / f"run{number}_v2_at{step}.pt")
    table = write_table(tmp_path / f"table{suffix}", runs=4, lr=0.1, note="text")
    config = ImportConfig(
        folder=folder, metrics=table, better=("test_loss=lower",), pattern="{run}_v*_at{step}.pt", out=tmp_path / "zoo"
    )
    assert preview(config)["runs"] == {"train": 2, "validation": 1, "test": 1}
    import_zoo(config)
    check_zoo(Zoo(tmp_path / "zoo"))


def test_rescored_metrics_are_the_tasks_own(task, tmp_path, capsys):
    from triptych_gpt.tasks import open_task

    folder = write_runs(tmp_path / "runs")
    import_zoo(ImportConfig(folder=folder, rescore=True, task=task, out=tmp_path / "zoo"))
    zoo = Zoo(tmp_path / "zoo")
    own = open_task(task)
    theta = zoo.theta([2] * 3, [0, 1, 2])
    for name, values in own.evaluate(theta).items():
        torch.testing.assert_close(zoo.metrics(name)[2], values)


def test_runs_of_other_lengths_are_thinned_or_dropped_and_reported(task, tmp_path, capsys):
    folder = write_runs(tmp_path / "runs", runs=5)
    for step in (5, 10, 50, 200):
        write_pt(folder / "run1", 1, step)
    (folder / "run2" / "epoch1_20.pt").unlink()
    (folder / "run3" / "last.pt").write_bytes(b"")
    table = write_table(tmp_path / "table.csv", steps=(0, 5, 10, 20, 50, 100, 200))
    import_zoo(ImportConfig(folder=folder, metrics=table, task=task, out=tmp_path / "zoo"))
    said = capsys.readouterr().out
    assert "1 runs with more than 3 checkpoints (run1): 3 evenly spaced ones of each" in said
    assert "dropped 1 runs with fewer than 3 checkpoints: run2" in said
    assert "left out 1 (no number in the name): run3/last.pt" in said
    zoo = Zoo(tmp_path / "zoo")
    names = zoo.index(["name"]).column("name").to_pylist()[::3]
    assert sorted(names) == ["run0", "run1", "run3", "run4"]
    assert zoo.steps[names.index("run1")].tolist() == [0, 20, 200]


def test_unsound_runs_are_dropped_with_reasons(task, tmp_path):
    folder = write_runs(tmp_path / "runs", runs=8)
    for name, value in (("run1", 10.5), ("run2", float("nan"))):
        state = {**state_of(0, 20), "fc1.bias": torch.full((6,), value)}
        torch.save(state, folder / name / "epoch1_20.pt")
    table = write_table(tmp_path / "table.csv", runs=8)
    rows = [row for row in csv.DictReader(table.open()) if (row["run"], row["step"]) != ("run3", "20")]
    rows[-1]["test_loss"] = "inf"
    (tmp_path / "table.json").write_text(json.dumps(rows))
    result = import_zoo(ImportConfig(folder=folder, metrics=tmp_path / "table.json", task=task, out=tmp_path / "zoo"))
    assert result["dropped"] == {
        "weights beyond 10": 1, "weights that are not finite": 1, "no test_loss of every checkpoint in the table": 1,
        "metrics that are not finite": 1,
    }  # fmt: skip
    check_zoo(Zoo(tmp_path / "zoo"))


def test_an_interrupted_import_resumes(task, tmp_path, monkeypatch):
    from triptych_gpt.zoo import folder_import

    folder, table = write_runs(tmp_path / "runs"), write_table(tmp_path / "table.csv")
    config = ImportConfig(folder=folder, metrics=table, task=task, cohort_runs=2, out=tmp_path / "zoo")
    read, calls = folder_import.read_state, []

    def failing(path: Path, holds: Collection[str]) -> dict[str, Tensor]:
        calls.append(path)
        if len(calls) > 9:
            raise OSError("no such device")
        return read(path, holds)

    monkeypatch.setattr(folder_import, "read_state", failing)
    with pytest.raises(OSError, match="no such device"):
        import_zoo(config)
    assert len(Zoo(tmp_path / "zoo")) == 2
    monkeypatch.setattr(folder_import, "read_state", read)
    import_zoo(config)
    check_zoo(Zoo(tmp_path / "zoo"))
    table.write_text(table.read_text().replace("0.15625", "0.25"))
    with pytest.raises(ValueError, match="table"):
        import_zoo(config)


def refusal(**options: object) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        import_zoo(ImportConfig(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_one_line(task, tmp_path):
    out, folder, table = tmp_path / "zoo", write_runs(tmp_path / "runs"), write_table(tmp_path / "table.csv")
    wide = nn.ModuleDict({"fc1": nn.Linear(4, 7), "fc2": nn.Linear(7, 3), "fc3": nn.Linear(3, 3)}).state_dict()
    (tmp_path / "wide" / "a").mkdir(parents=True)
    for step in STEPS:
        torch.save(wide, tmp_path / "wide" / "a" / f"{step}.pt")
    said = refusal(folder=tmp_path / "wide", metrics=table, task=task, out=out)
    assert "a network other than task own's: fc1.weight is (7, 4) there, (6, 4) here" in said
    assert "fc1.bias is (7,) there, (6,) here" in said
    assert "and 2 more" in said
    assert "give --rescore, or --metrics TABLE" in refusal(folder=folder, task=task, out=out)
    assert "no metric of its checkpoints is known" in refusal(folder=folder, metrics=table, out=out)
    assert "--rescore needs the task" in refusal(folder=folder, rescore=True, out=out)
    assert "better loss: no such column" in refusal(folder=folder, metrics=table, better=("loss=lower",), out=out)
    assert "of task" in refusal(folder=folder, metrics=table, task=task, better=("test_loss=higher",), out=out)
    assert "expected METRIC=lower" in refusal(folder=folder, metrics=table, better=("test_loss",), out=out)
    assert "no such folder" in refusal(folder=tmp_path / "absent", metrics=table, out=out)
    assert "no checkpoints; expected" in refusal(folder=tmp_path / "runs" / "run0", metrics=table, out=out)
    assert "no run has the 9 checkpoints" in refusal(folder=folder, metrics=table, task=task, checkpoints=9, out=out)
    assert "nothing to import" in refusal(out=out)
    (tmp_path / "bad.csv").write_text("name,loss\na,1\n")
    assert "a table has columns run, step" in refusal(folder=folder, metrics=tmp_path / "bad.csv", task=task, out=out)
    torch.save(state_of(0, 20), folder / "run0" / "other_20.pt")
    assert "step 20 of run run0, as" in refusal(folder=folder, metrics=table, task=task, out=out)
    assert not out.exists()


def test_a_shard_is_repaired_only_from_the_runs_that_it_held(task, tmp_path):
    folder, out = write_runs(tmp_path / "runs"), tmp_path / "zoo"
    options = {
        "folder": folder,
        "metrics": write_table(tmp_path / "table.csv"),
        "task": task,
        "out": out,
        "repair": True,
    }
    import_zoo(ImportConfig(**options))
    whole = {path: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}
    kept = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    next(iter(whole)).unlink()
    for number in range(6):
        torch.save(state_of(number + 1, 20), folder / f"run{number}" / "epoch1_20.pt")
    assert "are not those that were imported; put them back" in refusal(**options)
    for path, content in kept.items():
        path.write_bytes(content)
    import_zoo(ImportConfig(**options))
    assert whole == {path: path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}
    check_zoo(Zoo(out))


def test_names_and_networks_that_no_zoo_can_hold_are_named(task, tmp_path):
    out, options = tmp_path / "zoo", {"task": task, "rescore": True}
    folder = write_runs(tmp_path / "steps")
    (folder / "run2" / "epoch1_100.pt").rename(folder / "run2" / f"epoch1_{1 << 63}.pt")
    assert f"epoch1_{1 << 63}.pt: a step above" in refusal(folder=folder, **options, out=out)
    folder = write_runs(tmp_path / "names")
    (folder / "run2").rename(os.fsdecode(bytes(folder) + b"/run\xff"))
    assert "the name of run b'run\\xff' is not UTF-8" in refusal(folder=folder, **options, out=out)
    folder, table = write_runs(tmp_path / "empty"), write_table(tmp_path / "table.csv")
    for path in folder.glob("*/*.pt"):
        torch.save({"nothing": torch.zeros(0, 3)}, path)
    said = refusal(folder=folder, metrics=table, better=("test_loss=lower",), out=out)
    assert "run0/epoch1_0.pt: nothing: shape (0, 3) has no entries" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            lambda: pa.table({"run": np.zeros(3 << 20, np.int8), "step": np.zeros(3 << 20, np.int8)}),
            "3,145,728 rows in",
        ),
        (lambda: pa.table({"run": ["r" * 300] * 2, "step": [1, 2]}), "a run's name of 300 bytes"),
        (lambda: b"PAR1" + bytes(100) + b"PAR1", "no Parquet file, or a damaged one"),
    ],
)
def test_a_table_takes_no_more_memory_than_it_has_bytes(table, message, task, tmp_path):
    folder, path, content = write_runs(tmp_path / "runs"), tmp_path / "table.parquet", table()
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    assert f"table.parquet: {message}" in refusal(folder=folder, metrics=path, task=task, out=tmp_path / "zoo")


@pytest.mark.parametrize("lost", ["nothing", "a shard", "the manifest"])
def test_runs_replaced_since_they_were_imported_join_no_zoo(lost, task, tmp_path):
    folder, out = write_runs(tmp_path / "runs"), tmp_path / "zoo"
    options = {
        "folder": folder,
        "metrics": write_table(tmp_path / "table.csv"),
        "task": task,
        "out": out,
        "cohort_runs": 2,
    }
    import_zoo(ImportConfig(**options))
    for path in folder.rglob("*.pt"):
        path.write_bytes(path.read_bytes())  # newer, and the same
    import_zoo(ImportConfig(**options))
    for number in range(6):
        torch.save(state_of(number + 1, 20), folder / f"run{number}" / "epoch1_20.pt")
    if lost == "a shard":  # as an interruption leaves it, of which neither manifest nor record tells
        for path in [
            *(out / "shards").glob("runs-00000000-*"),
            *(out / "records").glob("runs-00000000-*"),
            out / "manifest.json",
        ]:
            path.unlink()
    elif lost == "the manifest":
        (out / "manifest.json").unlink()
    whole = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    assert "are not those that were imported; put them back, or use another --out" in refusal(**options)
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == whole


def test_complex_parameters_are_refused(task, tmp_path):
    folder, table = write_runs(tmp_path / "runs"), write_table(tmp_path / "table.csv")
    torch.save({**state_of(0, 0), "phase": torch.zeros(3, dtype=torch.cfloat)}, folder / "run0" / "epoch1_0.pt")
    for options in ({"task": task}, {"better": ("test_loss=lower",)}):
        message = refusal(folder=folder, metrics=table, out=tmp_path / "zoo", **options)
        assert f"{folder / 'run0' / 'epoch1_0.pt'}: phase is torch.complex64, expected real numbers" in message


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.witness}",)


def test_files_run_nothing_and_do_not_hang(task, tmp_path):
    folder, table, witness = write_runs(tmp_path / "runs"), write_table(tmp_path / "table.csv"), tmp_path / "witness"
    os.mkfifo(folder / "run0" / "pipe_7.pt")
    (folder / "run0" / "loop").symlink_to(folder)
    (folder / "run0" / "again_8.pt").symlink_to(folder / "run0" / "epoch1_20.pt")
    import_zoo(ImportConfig(folder=folder, metrics=table, task=task, out=tmp_path / "zoo"))
    check_zoo(Zoo(tmp_path / "zoo"))
    assert len(Zoo(tmp_path / "zoo")) == 6
    torch.save({**state_of(1, 20), "hook": Malicious(witness)}, folder / "run1" / "epoch1_20.pt")
    options = {"folder": folder, "metrics": table, "task": task}
    assert "which may run code" in refusal(**options, out=tmp_path / "other")
    (folder / "run1" / "epoch1_20.pt").write_bytes(b"damaged")
    assert "epoch1_20.pt: truncated" in refusal(**options, out=tmp_path / "other")
    assert not witness.exists()


SMALL = [
    "--total-pairs", "64", "--batch-size", "16", "--width", "32", "--depth", "1", "--num-heads", "2", "--warmup-pairs", "16",
    "--validation-networks", "2", "--validation-inference-steps", "2", "--device", "cpu",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:tokens of up to")
def test_an_imported_zoo_trains_and_is_prompted(task, tmp_path):
    folder, table = write_runs(tmp_path / "runs", runs=20), write_table(tmp_path / "table.csv", runs=20)
    zoo, gpt, out = (str(tmp_path / name) for name in ("zoo", "gpt", "prompted"))
    assert run(["import", "--folder", str(folder), "--metrics", str(table), "--task", task, "--out", zoo]) == 0
    assert run(["train", "--zoo", zoo, "--task", task, *SMALL, "--out", gpt]) == 0
    target = ["--target", "test_loss=1", "--num-inference-steps", "2"]
    assert run(["prompt", "--model", gpt, "--task", task, *target, "--device", "cpu", "--out", out]) == 0


@pytest.mark.filterwarnings("ignore:tokens of up to")
def test_a_zoo_without_a_task_trains_without_scoring(tmp_path, capsys):
    folder, table = write_runs(tmp_path / "runs"), write_table(tmp_path / "table.csv")
    zoo, gpt = str(tmp_path / "zoo"), str(tmp_path / "gpt")
    options = ["--metrics", str(table), "--better", "test_loss=lower", "--out", zoo]
    assert run(["import", "--folder", str(folder), *options]) == 0
    train = ["train", "--zoo", zoo, *SMALL, "--tokenizer", "chunk", "--chunk-size", "16", "--out", gpt]
    assert run(train) == 1
    assert "came without a task" in capsys.readouterr().err
    assert run([*train, "--validation-every", "0"]) == 0
    assert run(["prompt", "--model", gpt, "--target", "test_loss=0.3", "--out", str(tmp_path / "prompted")]) == 1
    assert "pass --task file.py:NAME" in capsys.readouterr().err
