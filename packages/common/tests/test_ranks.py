"""Several ranks: replicas and shards equal one process, resume exactly, and read each other's checkpoints.

torchrun takes seconds to start, so one launch runs many jobs of ranks_driver.py, and the tests compare their results.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triptych_common.parallel import Execution
from triptych_common.storage import checkpoint
from triptych_common.testing import logged

DRIVER = Path(__file__).with_name("ranks_driver.py")
spec = importlib.util.spec_from_file_location("ranks_driver", DRIVER)
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)

ON_TWO = [job for job in driver.JOBS if job not in ("killed", "resumed-on-these", "reshard")]


def launch(ranks: int, out: Path, *jobs: str) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(DRIVER), str(out), *jobs]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> Path:
    """The results of two ranks."""
    out = tmp_path_factory.mktemp("two")
    done = launch(2, out, *ON_TWO)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run on two ranks of which one was killed in the middle of a checkpoint."""
    out = tmp_path_factory.mktemp("killed")
    done = launch(2, out, "killed")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    return out / "killed"


@pytest.fixture(scope="module")
def on_three(on_two, killed) -> Path:
    """The results of two ranks, after three have read them and continued."""
    shutil.copytree(killed, on_two / "killed")
    done = launch(3, on_two, "reshard", "resumed-on-these")
    assert done.returncode == 0, done.stderr
    return on_two


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same run on one process."""
    out = tmp_path_factory.mktemp("alone")
    driver.run(out)
    return out


def last(run: Path) -> Path:
    return checkpoint.steps_in(run / "checkpoints")[-1]


def assert_close(a: Path, b: Path, atol: float) -> None:
    """Weights, average, its predictions, optimiser and counters agree."""
    for path_a, path_b in ((last(a), last(b)), (a / "averaged.safetensors", b / "averaged.safetensors")):
        (tensors_a, state_a), (tensors_b, state_b) = checkpoint.read(path_a), checkpoint.read(path_b)
        assert state_a == state_b
        assert tensors_a.keys() == tensors_b.keys()
        for name, value in tensors_a.items():
            assert value.dtype == tensors_b[name].dtype
            torch.testing.assert_close(
                tensors_b[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(
    "job", ["ddp", "fsdp", "fsdp-parts", "ddp-compiled", "fsdp-compiled", "ddp-to-fsdp", "fsdp-to-ddp"]
)
def test_two_ranks_equal_one_process(on_two, alone, job):
    """With replicas or shards, accumulated, recomputed and compiled, or changed from one to the other half-way."""
    assert_close(on_two / job, alone, 1e-10)
    for row, expected in zip(logged(on_two / job), logged(alone), strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    assert last(on_two / job).is_dir() == (job in ("fsdp", "fsdp-parts", "fsdp-compiled", "ddp-to-fsdp"))


@pytest.mark.parametrize("job", ["ddp", "fsdp", "fsdp-bf16"])
def test_two_ranks_interrupted_end_bit_identical(on_two, job):
    names = [path.stem for path in checkpoint.steps_in(on_two / f"{job}-resumed" / "checkpoints")]
    assert names == ["step-00000004", "step-00000008", "step-00000010-extra"]
    assert_close(on_two / f"{job}-resumed", on_two / job, 0.0)
    for row, expected in zip(logged(on_two / f"{job}-resumed"), logged(on_two / job), strict=True):
        assert row == pytest.approx(expected, rel=1e-12)


def test_a_sharded_checkpoint_holds_each_weight_once_in_safetensors_and_json(on_two):
    folder = last(on_two / "fsdp")
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    index = json.loads((folder / "index.json").read_text())
    chunks = index["tensors"]["optimizer.exp_avg.blocks.1.mlp.fc1.weight"]["chunks"]
    assert sorted(chunk["offsets"] for chunk in chunks) == [[0, 0], [12, 0]]
    assert {chunk["file"] for chunk in chunks} == index["files"].keys()
    for entry in index["tensors"].values():
        assert sum(math.prod(chunk["sizes"]) for chunk in entry["chunks"]) == math.prod(entry["shape"])


def test_bad_batches_are_skipped_and_rolled_back_alike(on_two, tmp_path):
    state = driver.run(tmp_path, spoil=driver.SPOILED)
    assert (state.skipped, state.rollbacks) == (3, 1)
    assert_close(on_two / "ddp-spoiled", tmp_path, 1e-10)
    assert_close(on_two / "fsdp-spoiled", tmp_path, 1e-10)


def test_bfloat16_keeps_float32_weights_and_learns_alike(on_two, alone, tmp_path):
    assert_close(on_two / "fsdp-bf16", on_two / "ddp-bf16", 1e-6)  # shards compute the same as replicas
    driver.run(tmp_path, execution=Execution(precision="bf16"))
    for run in (tmp_path, on_two / "ddp-bf16", on_two / "fsdp-bf16"):
        tensors, _ = checkpoint.read(last(run))
        assert {v.dtype for name, v in tensors.items() if not name.startswith("meter.")} == {torch.float32}
        exact, _ = checkpoint.read(last(alone))
        assert not torch.equal(tensors["model.out.weight"].double(), exact["model.out.weight"])
        for row, expected in zip(logged(run), logged(alone), strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_another_number_of_ranks_reads_exactly_what_was_written(on_three):
    for written in ("fsdp", "ddp"):
        tensors, state = checkpoint.read(last(on_three / written))
        again, state_again = checkpoint.read(checkpoint.step_path(on_three / f"{written}-again", 10, sharded=True))
        assert len(list((on_three / f"{written}-again/step-00000010").glob("rank-*"))) == 3
        assert state == state_again
        assert tensors.keys() == again.keys()
        assert [name for name, value in tensors.items() if not torch.equal(value, again[name])] == []


def test_a_kill_in_the_middle_of_a_shard_loses_nothing_for_one_process_or_three(killed, on_three, alone, tmp_path):
    names = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert names == ["step-00000000", "step-00000004", "step-00000008.partial"]
    assert checkpoint.read(last(killed))[1]["step"] == 4
    driver.run(Path(shutil.copytree(killed, tmp_path / "killed")))
    for run in (tmp_path / "killed", on_three / "killed"):
        assert_close(run, alone, 1e-10)
        assert not list((run / "checkpoints").glob("*.partial"))


def test_a_full_disk_of_one_rank_is_reported_by_all_and_leaves_nothing(on_two):
    for rank in range(2):
        reported = json.loads((on_two / f"full-disk/reported-{rank}.json").read_text())
        assert "step-00000001: cannot be written by rank 1" in reported
        assert "\n" not in reported
    assert not list((on_two / "full-disk").glob("step-00000001*"))
    assert checkpoint.read(on_two / "full-disk/step-00000000")[1]["step"] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "rank-00001.safetensors: checksum differs"),
        ("shorten", "rank-00001.safetensors: checksum differs"),
        ("lose", "rank-00001.safetensors: missing"),
        ("state", "index.json: checksum differs"),
        ("no index", "incomplete, or not one of triptych's checkpoints"),
        ("foreign index", "index.json: "),
    ],
)
def test_a_damaged_shard_is_found_and_the_remedy_named(on_two, tmp_path, damage, message):
    shutil.copytree(on_two / "fsdp/checkpoints", tmp_path / "checkpoints")
    folder = last(tmp_path)
    shard, index = folder / "rank-00001.safetensors", folder / "index.json"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "shorten":
        shard.write_bytes(content[:-8])
    elif damage == "lose":
        shard.unlink()
    elif damage == "state":
        index.write_text(index.read_text().replace('"step": 10', '"step": 11'))
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text("[]")
    with pytest.raises(ValueError, match=rf"{message}.*; delete step-00000010(-extra)? to go on from step-00000008$"):
        checkpoint.read(folder)


def test_pruning_takes_files_and_folders_alike(on_two, tmp_path):
    for step in (1, 5, 7):
        checkpoint.write(checkpoint.step_path(tmp_path, step), {"x": torch.zeros(1)}, {})
    for name in ("step-00000003", "step-00000006", "step-00000008-extra", "step-00000009.partial"):
        shutil.copytree(last(on_two / "fsdp"), tmp_path / name)
    checkpoint.prune(tmp_path, keep=2)
    assert [p.name for p in checkpoint.steps_in(tmp_path)] == [
        "step-00000006", "step-00000007.safetensors", "step-00000008-extra"
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3
