"""The command line at a tiny size, as a user would run it: interrupted, killed, spoiled, on two ranks."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from triptych_common import testing
from triptych_common.storage import checkpoint
from triptych_common.testing import OFFLINE, logged, run_cli, run_signalled, run_torchrun
from triptych_dit.testing import run_dit

TINY = [
    "--model.depth", "1", "--model.hidden-size", "16", "--model.num-heads", "2", "--model.patch-size", "7",
    "--batch-size", "16", "--total-images", "640", "--checkpoint-every", "8", "--log-every", "5",
    "--warmup-images", "64", "--snapshots", "320",
]  # fmt: skip
STEPS = 40


def train(out: Path, *options: str, **kwargs) -> subprocess.CompletedProcess:
    return run_cli("triptych_dit.cli", "train", "--preset", "digits", *TINY, "--out", str(out), *options, **kwargs)


def run_script(script: str, *options: str) -> subprocess.CompletedProcess:
    """Run the command line with something planted in it."""
    return subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, timeout=300)


fails_with = partial(testing.fails_with, quiet=("training:", "sampling:"))


def files_in(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def assert_same_run(a: Path, b: Path) -> None:
    """Files have the same names; weights, average, optimiser, counters and metrics are bit-identical."""
    assert files_in(a) == files_in(b)
    for name in (f"checkpoints/step-{STEPS:08d}.safetensors", "model.safetensors"):
        (tensors_a, state_a), (tensors_b, state_b) = checkpoint.read(a / name), checkpoint.read(b / name)
        assert state_a == state_b
        assert tensors_a.keys() == tensors_b.keys()
        assert [name for name, value in tensors_a.items() if not torch.equal(value, tensors_b[name])] == []
    assert logged(a) == logged(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    done = train(out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["last"]["step"] == STEPS
    return out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resuming_ends_bit_identical(whole, tmp_path, signum):
    options = ["train", "--preset", "digits", *TINY, "--out", str(tmp_path)]
    stopped = run_signalled(10, signum, "triptych_dit.cli", *options)
    fails_with(stopped, "stopped at step 10 of 40, saved in", 128 + signum)
    assert "repeat the command to go on" in stopped.stderr
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1].name == "step-00000010-extra.safetensors"
    assert train(tmp_path).returncode == 0
    assert_same_run(whole, tmp_path)


KILL_IN_MID_WRITE = """
import os, signal, sys
from triptych_common.storage import checkpoint

real_save, calls = checkpoint.save_file, []

def save_half_and_die(tensors, path, metadata):
    calls.append(path)
    real_save(tensors, path, metadata)
    if len(calls) == 3:  # steps 0 and 8 are whole; 16 stops half-way through its bytes
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = save_half_and_die
from triptych_dit.cli import COMMANDS
from triptych_common.cli import main
sys.exit(main("triptych-dit", COMMANDS, sys.argv[1:]))
"""


def test_sigkill_in_the_middle_of_a_checkpoint_write_loses_nothing(whole, tmp_path):
    killed = run_script(KILL_IN_MID_WRITE, "train", "--preset", "digits", *TINY, "--out", str(tmp_path))
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "checkpoints").glob("*.partial")] == ["step-00000016.safetensors.partial"]
    assert checkpoint.read(checkpoint.steps_in(tmp_path / "checkpoints")[-1])[1]["step"] == 8
    assert logged(tmp_path)[-1]["step"] == 15  # beyond the checkpoint: to be cut back
    assert train(tmp_path).returncode == 0
    assert_same_run(whole, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_repeating_a_finished_run_changes_nothing(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert train(whole).returncode == 0
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_two_ranks_give_the_weights_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, "--precision", "float64").returncode == 0
    options = ["train", "--preset", "digits", *TINY, "--out", str(two), "--precision", "float64"]
    done = run_torchrun(2, "triptych_dit.cli", *options)
    assert done.returncode == 0, done.stderr
    path = f"checkpoints/step-{STEPS:08d}.safetensors"
    tensors, others = checkpoint.read(one / path)[0], checkpoint.read(two / path)[0]
    for name, value in tensors.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-10, msg=name)
    for a, b in zip(logged(one), logged(two), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    parts = tmp_path / "parts"
    options = [
        "train",
        "--preset",
        "digits",
        *TINY,
        "--out",
        str(parts),
        "--precision",
        "float64",
        "--micro-batch",
        "3",
    ]
    assert run_torchrun(2, "triptych_dit.cli", *options).returncode == 0
    for name, value in checkpoint.read(parts / path)[0].items():
        torch.testing.assert_close(value, tensors[name], rtol=0, atol=1e-10, msg=name)


COUNT_REDUCTIONS = """
import sys
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from triptych_common.training import state as train_state

calls, real = [], train_state.distributed

def counted(model, ranks):
    parallel = real(model, ranks)
    parallel.register_comm_hook(None, lambda state, bucket: (calls.append(1), allreduce_hook(None, bucket))[1])
    return parallel

train_state.distributed = counted
from triptych_dit.cli import COMMANDS
from triptych_common.cli import main
status = main("triptych-dit", COMMANDS, sys.argv[1:])
print("REDUCTIONS", len(calls), flush=True)
sys.exit(status)
"""


def test_accumulated_gradients_are_averaged_over_ranks_once_a_step(tmp_path):
    (tmp_path / "count.py").write_text(COUNT_REDUCTIONS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "count.py")]
    reductions = []
    for micro_batch in ("8", "2"):  # one and four parts of a rank's eight samples
        options = ["train", "--preset", "digits", *TINY, "--total-images", "64", "--snapshots", "64",
                   "--out", str(tmp_path / micro_batch), "--micro-batch", micro_batch]  # fmt: skip
        done = subprocess.run([sys.executable, *launch, *options], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        reductions.append([line for line in done.stdout.splitlines() if line.startswith("REDUCTIONS")])
    assert len(reductions[0]) == 2
    assert reductions[0] == reductions[1]


def sample(whole: Path, out: Path, *options: str, ranks: int = 1) -> np.ndarray:
    command = ["sample", "--checkpoint", str(whole), "--out", str(out), "--num-samples", "7",
               "--num-inference-steps", "4", "--guidance-scale", "1.5", *options]  # fmt: skip
    done = run_cli("triptych_dit.cli", *command) if ranks == 1 else run_torchrun(ranks, "triptych_dit.cli", *command)
    assert done.returncode == 0, done.stderr
    with np.load(out / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (7, 28, 28, 1)
        return arrays["arr_0"].astype(int)


def test_a_sample_depends_on_its_index_not_on_batch_or_ranks(whole, tmp_path):
    expected = sample(whole, tmp_path / "whole", "--batch-size", "7")
    assert expected.std() > 1
    for name, options, ranks in (("ones", ["--batch-size", "1"], 1), ("two", ["--batch-size", "2"], 2)):
        got = sample(whole, tmp_path / name, *options, ranks=ranks)
        assert np.abs(got - expected).max() <= 1
    grid = (tmp_path / "whole" / "grid.png").read_bytes()
    assert grid.startswith(b"\x89PNG")


def test_sampling_resumes_from_its_parts_and_refuses_another_request(whole, tmp_path):
    expected = sample(whole, tmp_path / "whole")
    out = tmp_path / "resumed"
    sample(whole, out, "--batch-size", "3")
    (out / "samples.npz").unlink()
    (out / "parts").mkdir()
    (out / "parts" / "00000000-00000002.npz.partial").write_bytes(b"half")
    np.savez(out / "parts" / "00000002-00000004.npz", arr_0=np.full((2, 28, 28, 1), 77, dtype=np.uint8))
    got = sample(whole, out, "--batch-size", "3")
    assert (got[2:4] == 77).all()  # what was there is kept, the rest made
    others = [0, 1, 4, 5, 6]
    assert np.abs(got[others] - expected[others]).max() <= 1
    assert not (out / "parts").exists()
    other = run_cli("triptych_dit.cli", "sample", "--checkpoint", str(whole), "--out", str(out), "--seed", "9")
    assert other.returncode == 1
    assert "holds a run with" in other.stderr


@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_lost_models_and_samples_are_made_again(whole, tmp_path, damage):
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink() if damage == "delete" else path.write_bytes(content)

    run = Path(shutil.copytree(whole, tmp_path / "run"))
    model = checkpoint.content_sha256(run / "model.safetensors")
    spoil(run / "model.safetensors")
    (run / "snapshots/images-000000320.safetensors").unlink()
    done = run_dit("train", "--preset", "digits", *TINY, "--out", run)
    assert f"model: {run}/model.safetensors" in done.stdout
    assert "images-000000320.safetensors: lost; only training from the start" in done.stdout
    assert checkpoint.content_sha256(run / "model.safetensors") == model
    checkpoint.read(run / "model.safetensors")

    out = tmp_path / "samples"
    options = ["--checkpoint", run, "--out", out, "--num-samples", 4, "--num-inference-steps", 2, "--images"]
    assert run_dit("sample", *options).returncode == 0
    before = {path: path.read_bytes() for path in [*out.glob("*.*"), *out.glob("images/*")]}
    for name in ("samples.npz", "grid.png", "images/000002-2.png"):
        spoil(out / name)
    done = run_dit("sample", *options)
    assert done.returncode == 0
    assert (f"{out}/samples.npz: damaged; sampling it again" in done.stdout) == (damage == "flip")
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_part_is_sampled_again(whole, tmp_path):
    options = ["--checkpoint", whole, "--out", tmp_path, "--num-samples", 4, "--num-inference-steps", 2]
    assert run_dit("sample", *options).returncode == 0
    before = (tmp_path / "samples.npz").read_bytes()
    (tmp_path / "samples.npz").unlink()
    (tmp_path / "parts").mkdir()
    np.savez(part := tmp_path / "parts" / "00000002-00000004.npz", arr_0=np.full((2, 28, 28, 1), 77, dtype=np.uint8))
    part.write_bytes(part.read_bytes().replace(bytes([77] * 9), bytes([77] * 8 + [76]), 1))
    done = run_dit("sample", *options)
    assert f"{part}: damaged; sampling it again" in done.stdout
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_a_damaged_checkpoint_is_one_line_and_the_good_one_stays(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    last = checkpoint.steps_in(tmp_path / "run/checkpoints")[-1]
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    fails_with(train(tmp_path / "run"), "truncated or not a safetensors file; delete it to go on from step-")
    tampered = bytearray(content)
    tampered[-1] ^= 1
    last.write_bytes(tampered)
    fails_with(train(tmp_path / "run"), "checksum differs from the recorded one; delete it to go on from step-")
    last.unlink()  # the remedy
    assert train(tmp_path / "run").returncode == 0
    assert_same_run(whole, tmp_path / "run")


def test_a_config_that_does_not_fit_is_refused(whole):
    fails_with(train(whole, "--lr", "0.5"), "(now 0.5); repeat its settings to resume it, or use another --out")
    fails_with(train(whole, "--model.depth", "2"), "model.depth=1 (now 2)")


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    fails_with(train(tmp_path, "--lr", "1e30"), "lower --lr. Went back as far as")
    for path in checkpoint.steps_in(tmp_path / "checkpoints"):
        tensors, _ = checkpoint.read(path)
        assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


FULL_DISK = """
import resource, sys
from triptych_dit.cli import COMMANDS
from triptych_common.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main("triptych-dit", COMMANDS, sys.argv[2:]))
"""


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(whole, tmp_path):
    size = checkpoint.step_path(whole / "checkpoints", STEPS).stat().st_size
    limit = str(size * 2 // 3)  # step 0 holds no optimiser state and fits, step 8 does not
    done = run_script(FULL_DISK, limit, "train", "--preset", "digits", *TINY, "--out", str(tmp_path))
    fails_with(done, "step-00000008.safetensors: cannot be written")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000000.safetensors"]
    assert train(tmp_path).returncode == 0
    assert_same_run(whole, tmp_path)


def test_a_second_process_in_the_run_directory_is_refused(tmp_path):
    from triptych_common.storage.run import RunDirectory

    with RunDirectory(tmp_path, {}):
        fails_with(train(tmp_path, "--overwrite"), "another process is using this run directory")


@pytest.mark.parametrize(("options", "status", "message"), [
    (["train", "--preset", "digits", "--out", "/proc/nowhere"], 1, "cannot be written"),
    (["train", "--preset", "digits", "--data", "cifar"], 1, "data 'cifar': expected mnist5k, mnist, cifar10, a folder"),
    (["train", "--preset", "DiT-XXL/2"], 2, "preset 'DiT-XXL/2': expected one of digits"),
    (["train", "--preset", "digits", "--batch-size", "0"], 2, "batch_size 0: expected a number above 0"),
    (["train", "--preset", "digits", "--ema-rampup", "0"], 2, "ema_rampup 0.0: expected a number above 0"),
    (["train", "--preset", "digits", "--grad-clip", "-1"], 2, "grad_clip -1.0: expected a number above 0"),
    (["train", "--preset", "digits", "--snapshots", "9999999"], 2, "expected counts in 1..288000"),
    (["train", "--preset", "digits", "--model.mlp-ratio", "0.001"], 2, "mlp_ratio 0.001: expected a number above 0"),
    (["train", "--preset", "digits", "--model.patch-size", "5"], 2, "is not a multiple of patch_size 5"),
    (["train", "--preset", "digits", "--model.num-classes", "3"], 1, "labels 0..9, the model num_classes=3"),
    (["train", "--preset", "digits", "--device", "tpu"], 1, "device 'tpu': not available here"),
    (["sample", "--checkpoint", "nowhere"], 1, "nowhere: no such file or folder, and no published model"),
    (["sample", "--checkpoint", "."], 1, "no finished model; train one with"),
    (["evaluate", "--samples", "nowhere.npz"], 1, "nowhere.npz: no such samples file"),
    (["reproduce", "--size", "huge"], 2, "unknown command 'reproduce': expected one of"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(options, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails_with(run_dit(*options), message, status)


def test_an_absent_data_set_offline_names_the_remedy(tmp_path):
    env = {**OFFLINE, "TRIPTYCH_DATA": str(tmp_path)}  # for another process: urllib remembers its proxies
    done = run_cli("triptych_dit.cli", "train", "--data", "mnist", "--out", str(tmp_path / "run"), env=env)
    fails_with(done, "or use mnist5k, which needs no download")


def test_labels_outside_the_classes_are_refused(whole, tmp_path):
    done = run_dit("sample", "--checkpoint", whole, "--labels", 3, 10, "--out", tmp_path)
    fails_with(done, "label 10 is outside 0..9 (num_classes=10)")


def test_dry_run_prints_config_parameters_and_cost(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = json.loads(run_dit("train", "--preset", "digits", "--dry-run", "--json").stdout)
    assert printed["parameters"] > 100_000
    assert printed["gflops_per_forward"] > 0
    assert printed["config"]["model"]["patch_size"] == 4
    assert list(tmp_path.iterdir()) == []


def test_evaluate_scores_a_samples_file(whole, tmp_path):
    from triptych_common.data import load

    held_out = load("mnist5k", "train")
    np.savez(
        tmp_path / "copies.npz", arr_0=held_out.images[:200].permute(0, 2, 3, 1).numpy(), arr_1=held_out.labels[:200]
    )
    done = run_dit("evaluate", "--samples", tmp_path / "copies.npz", "--out", tmp_path / "scores", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["scores"]["near_duplicates"]["value"] == 1.0
    assert printed["scores"]["n"] == 200
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["instruments"] == printed["instruments"]


def test_a_damaged_samples_file_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((20, 28, 28, 1), dtype=np.uint8))
    content = (tmp_path / "x.npz").read_bytes()
    from triptych_dit.sample import read_npz

    for damaged in (content[: len(content) // 2], b"", b"junk"):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not an npz file, or a damaged one"):
            read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    "arrays", [{"x": np.zeros(3)}, {"arr_0": np.zeros((4, 28, 28))}, {"arr_0": np.zeros((2, 2, 2, 1))}]
)
def test_a_file_that_is_no_samples_file_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    fails_with(run_dit("evaluate", "--samples", tmp_path / "x.npz", "--out", tmp_path / "scores"), "arr_0")
