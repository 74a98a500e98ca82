"""Every command over every kind of hostile file: nothing runs, is imported, asked of a host, written elsewhere, or left hanging."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from triptych_dit.testing import random_vae
from triptych_gangealing.aligner import Aligner, write_aligner
from triptych_gangealing.config import SpatialTransformerConfig
from triptych_gangealing.modes import Directions, Mode
from triptych_gangealing.spatial_transformer import SpatialTransformer
from triptych_gpt import cli as gpt_cli

DRIVER = Path(__file__).with_name("hostile.py")
_spec = importlib.util.spec_from_file_location("hostile", DRIVER)
hostile = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hostile)
SECONDS, BYTES = 5, 1 << 30  # that a hostile file may take
OWN_TASK = """
import torch
from torch import nn
from triptych_gpt.tasks import Items, SupervisedTask

def points(part):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    return Items(inputs, (inputs[:, 0] > 0).long())

X = SupervisedTask(
    name="own", network=lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), data=points, epochs=1, batch_size=16
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of hostile files, beside an aligner, a zoo and pictures that are in order."""
    root = tmp_path_factory.mktemp("hostile")
    for folder, files in {"weights": hostile.WEIGHTS, "pictures": hostile.PICTURES}.items():
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_bytes(content())
    for name, content in hostile.POLICIES.items():
        (root / "policies" / name / "run").mkdir(parents=True)
        for steps in (4, 8):
            (root / "policies" / name / "run" / f"model_{steps}_steps.zip").write_bytes(content())
    for kind in ("pipe", "zero"):
        (root / "policies" / kind / "run").mkdir(parents=True)
        _replace(root / "policies" / kind / "run" / "model_8_steps.zip", kind)
    os.mkfifo(root / "pictures" / "pipe.png")
    (root / "pictures" / "zero.png").symlink_to("/dev/zero")
    for suffix in (".pt", ".safetensors"):
        os.mkfifo(root / "weights" / f"pipe{suffix}")
        (root / "weights" / f"zero{suffix}").symlink_to("/dev/zero")
    (root / "pictures" / "again").symlink_to(root / "pictures")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "pictures" / "good.png")
    (root / "album").mkdir()
    Image.new("RGB", (256, 256)).save(root / "album" / "a.png")
    (root / "samples.npz").write_bytes(hostile.pickled_npz())
    np.savez(root / "good.npz", np.zeros((4, 8, 8, 3), np.uint8))
    _aligner(root / "aligner")
    random_vae().save_pretrained(root / "vae")
    _gpt(root)
    _folders(root)
    return root


def _folders(root: Path) -> None:
    """Folders with pipes and devices in place of files, data sets with a script, and results of a study."""
    for kind in ("pipe", "zero"):
        place = root / "folders" / kind
        zoo = shutil.copytree(root / "zoo", place / "zoo")
        for path in sorted((zoo / "shards").iterdir()):
            _replace(path, kind)
        shutil.copytree(root / "zoo", place / "zoo of no manifest")
        _replace(place / "zoo of no manifest" / "manifest.json", kind)
        for name in ("config.json", "manifest.json", "model_index.json", "state.json", "dataset_dict.json"):
            (place / name).mkdir()
            _replace(place / name / name, kind)
    for number, path in enumerate(sorted((root / "weights").iterdir())):
        for suffix in (path.suffix, ".zip"):
            run = root / f"runs{suffix}" / str(number) / "run"
            run.mkdir(parents=True)
            for step in range(2):
                (run / f"{step}_steps{suffix}").symlink_to(path)
    (root / "script").mkdir()
    (root / "script" / "script.py").write_text(hostile.EVIL_MODULE)
    Image.new("RGB", (8, 8)).save(root / "script" / "a.png")
    (root / "script and table").mkdir()
    (root / "script and table" / "script and table.py").write_text(hostile.EVIL_MODULE)
    (root / "script and table" / "train.parquet").write_bytes(b"PAR1")
    (root / "saved").mkdir()
    state = {"_data_files": [{"filename": "../../zero"}], "_split": "train"}
    (root / "saved" / "state.json").write_text(json.dumps(state))
    (root / "saved" / "dataset_info.json").write_text("{}")
    row = {"verdict": "\x1b[2J", "evidence": "__import__('os')", "size": "laptop"}
    (root / "results").mkdir()
    (root / "results" / "rows.json").write_text(json.dumps({"claims": {"x": row}, "chapter": 2, "size": "laptop"}))
    (root / "results" / "deep.json").write_bytes(hostile.deep_json())
    for kind in ("pipe", "zero"):
        _replace(root / "results" / f"{kind}.json", kind)


def _replace(path: Path, kind: str) -> None:
    """Put a pipe or a device in place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def _aligner(folder: Path) -> None:
    config = SpatialTransformerConfig(input_size=16, channel_max=8, flow_size=4, flow_upsampling=4)
    mode = Mode(Directions(*map(np_tensor, (np.zeros(4), np.eye(4)[:1], np.ones(1)))), 1)
    facts = {"padding": "border", "iterations": 1, "flips": False, "generator": "none"}
    write_aligner(folder / "aligner.safetensors", Aligner(SpatialTransformer(config), mode).eval(), facts)


def np_tensor(values: np.ndarray):
    import torch

    return torch.from_numpy(values.astype(np.float32))


def _gpt(root: Path) -> None:
    """A zoo and a model of a task of one's own, whose file is then replaced by a hostile one."""
    task = root / "code" / "own.py"
    task.parent.mkdir()
    task.write_text(OWN_TASK)
    small = "--width 16 --depth 1 --num-heads 2 --batch-size 32 --total-pairs 64 --warmup-pairs 32 --validation-every 0"
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        words = (
            f"collect {task}:X --runs 8 --cohort-runs 4 --checkpoints 3 --split-every 4 --engine here --out {root}/zoo"
        )
        assert gpt_cli.run(words.split()) == 0
        assert gpt_cli.run(f"train --zoo {root}/zoo --task {task}:X --out {root}/gpt {small}".split()) == 0
    task.write_text(hostile.EVIL_MODULE)


def doors(root: Path) -> list[list[str]]:
    """Command lines, each with a hostile file where a file is expected."""
    out, commands, vae = str(root / "out"), [], ["--vae", root / "vae"]
    for path in sorted((root / "weights").iterdir()):
        commands += [
            ["triptych-dit", "sample", "--checkpoint", path, "--num-samples", "1"],
            ["triptych-dit", "walk", "--checkpoint", path],
            ["triptych-dit", "export", "--checkpoint", path],
            ["triptych-dit", "train", "--init-from", path],
            ["triptych-dit", "evaluate", "--samples", path],
            ["triptych-dit", "evaluate", root / "good.npz", root / "good.npz", "--inception", path],
            ["triptych-dit", "export", "--checkpoint", path, "--labels-file", path],
            ["triptych-dit", "encode", "--source", root / "album", "--vae", path],
            ["triptych-gpt", "prompt", "--model", path, "--checkpoint", path, "--target", "test_loss=0.3"],
            ["triptych-gpt", "prompt", "--model", root / "gpt", "--checkpoint", path, "--target", "test_loss=0.3"],
            ["triptych-gpt", "convert", "--checkpoint", path],
            ["triptych-gpt", "import", "--lmdb", path],
            ["triptych-gpt", "import", "--folder", path],
            ["triptych-gangealing", "generate", "--generator", path],
            ["triptych-gangealing", "train", "--generator", path],
            ["triptych-gangealing", "train-gan", "--init-from", path],
            ["triptych-gangealing", "convert", "--checkpoint", path],
            ["triptych-gangealing", "align", "--aligner", path, "--images", root / "pictures"],
            ["triptych-gangealing", "propagate", "--aligner", root / "aligner", "--images", root / "pictures", "--points", path],
            ["triptych-gangealing", "propagate", "--aligner", root / "aligner", "--images", root / "pictures", "--edit", path],
        ]  # fmt: skip
    for path in sorted((root / "policies").iterdir()):
        commands.append(["triptych-gpt", "import", "--sb3", path, "--task", "cartpole_small", "--num-test-runs", "0"])
    for path in sorted((root / "pictures").iterdir()):
        commands.append(
            ["triptych-gangealing", "correspond", "--aligner", root / "aligner", "--source", path, "--target", path]
        )
    commands += [
        ["triptych-gangealing", "align", "--aligner", root / "aligner", "--images", root / "pictures"],
        ["triptych-gangealing", "train-gan", "--data", root / "pictures", "--dry-run"],
        [
            "triptych-dit",
            "encode",
            "--source",
            root / "pictures",
            *vae,
            "--image-size",
            "16",
            "--workers",
            "0",
            "--unconditional",
        ],
        ["triptych-dit", "train", "--data", root / "pictures", "--dry-run"],
        ["triptych-dit", "evaluate", root / "samples.npz", root / "samples.npz"],
        ["triptych-gpt", "prompt", "--model", root / "gpt", "--target", "test_loss=0.3"],
        ["triptych-gpt", "train", "--zoo", root / "zoo", "--dry-run"],
        ["triptych-gpt", "train", "--zoo", root / "zoo"],
        ["triptych-gpt", "evaluate", "--model", root / "gpt", "--zoo", root / "zoo"],
        ["triptych-gpt", "audit", "--model", root / "gpt", "--zoo", root / "zoo"],
        ["triptych-gpt", "info", "--zoo", root / "zoo"],
        ["triptych-gpt", "verify", "--zoo", root / "zoo"],
        ["triptych-gpt", "export", "--zoo", root / "zoo"],
    ]
    for place in (root / "folders" / kind for kind in ("pipe", "zero")):
        for zoo in (place / "zoo", place / "zoo of no manifest"):
            commands += [
                *(["triptych-gpt", command, "--zoo", zoo] for command in ("train", "info", "verify", "export")),
                ["triptych-gpt", "evaluate", "--model", root / "gpt", "--zoo", zoo],
                ["triptych", "figures", "--model", root / "gpt", "--zoo", zoo],
            ]  # fmt: skip
        for name in ("config.json", "manifest.json", "model_index.json", "state.json", "dataset_dict.json"):
            commands += [
                ["triptych-dit", "sample", "--checkpoint", place / name],
                ["triptych-dit", "train", "--data", place / name],
                ["triptych-dit", "train", "--init-from", place / name],
                ["triptych-dit", "encode", "--source", root / "album", "--vae", place / name],
                ["triptych-gangealing", "align", "--aligner", place / name, "--images", root / "album"],
            ]
    for folder in sorted(root.glob("runs*/*")):
        policies = ["--sb3", folder, "--task", "cartpole_small"]
        anything = ["--folder", folder, "--metrics", root / "results" / "rows.json"]
        commands.append(["triptych-gpt", "import", *(policies if folder.parent.suffix == ".zip" else anything)])
    for data in (root / "script", root / "script and table", root / "saved"):
        short = ["--total-images", "8", "--batch-size", "8", "--preview-images", "0"]  # one of them holds a picture
        commands += [["triptych-dit", "train", "--data", text, *short] for text in (f"hub:{data}", data)]
    for path in sorted((root / "results").iterdir()):
        commands.append(
            ["triptych", "claims", path, "--ledger", root / "claims.toml", "--page", root / "out" / "page.md"]
        )
    for path in sorted((root / "weights").iterdir()):
        commands += [
            ["triptych", "figures", "--model", path, "--zoo", root / "zoo"],
            ["triptych", "score-alignment", "--aligner", path],
            ["triptych", "score-clusters", "--aligner", path],
            ["triptych-gpt", "collect", path],
            ["triptych-gpt", "collect", f"{path}:X"],
        ]
    commands += [["triptych-gpt", "collect", "mnist_mlp_14", "--repair"]]
    return [[*map(str, words), *where(words, f"{out}/{i}")] for i, words in enumerate(commands)]


def where(words: list, out: str) -> list[str]:
    """The option of where to write, for commands that have it."""
    suffix = ".safetensors" if words[:2] == ["triptych-gpt", "export"] else ""
    return [] if words[1] == "claims" else ["--out", out + suffix]


def digest(root: Path) -> str:
    """Of all regular files below a folder, their names included."""
    files = sorted(
        path for path in root.rglob("*") if path.is_file() and not path.is_symlink() and "out" not in path.parts
    )
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


def test_no_file_runs_writes_asks_or_hangs(place):
    canary = place.parent / "canary"
    job = {
        "programs": {
            "triptych-dit": "triptych_dit.cli",
            "triptych-gpt": "triptych_gpt.cli",
            "triptych-gangealing": "triptych_gangealing.cli",
            "triptych": "triptych_thesis.cli",
        },
        "allowed": [str(place / "out"), "/dev/null", "/dev/shm"],
        "forbidden": [str(place)],
        "warm": ["diffusers", "datasets", "lmdb", "pyarrow.parquet", "matplotlib.pyplot", "scipy.stats", "av"],
        "patience": 4 * SECONDS,
        "commands": doors(place),
    }
    (place / "out").mkdir()
    (place.parent / "job.json").write_text(json.dumps(job))
    before = digest(place)
    env = os.environ | {
        hostile.CANARY: str(canary),
        "HF_HUB_OFFLINE": "0",
        "TRIPTYCH_DATA": str(place / "out" / "data"),
    }
    words = [sys.executable, str(DRIVER), str(place.parent / "job.json")]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=600)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(job["commands"]), done.stderr[-2000:]
    assert not canary.exists(), "hostile code ran"
    wrong = [fault for row in rows if (fault := fault_of(row))]
    assert not wrong, "\n".join(wrong)
    for path in (place / "out").rglob("*"):
        if path.is_file():
            path.unlink()
    assert digest(place) == before, "a file that was read has changed"


def fault_of(row: dict) -> str | None:
    """What is wrong with a command's end: it must do what it can, or stop with one line."""
    what = " ".join(row["words"]).encode("unicode_escape").decode()
    if row["events"]:
        return f"{what}: {row['events'][:3]}"
    if not isinstance(row["status"], int):
        return f"{what}: {row['status']}"
    if row["seconds"] > SECONDS or row["bytes"] > BYTES:
        return f"{what}: {row['seconds']:.1f} s, {row['bytes'] / 1e6:,.0f} MB"
    printed = row["out"] + row["err"]
    if "Traceback" in printed or not printed.replace("\n", "").isprintable():
        return f"{what}: printed {printed[-500:]!r}"
    weights = [Path(word).name for word in row["words"] if "/weights/" in word]
    if weights and weights[0].encode("unicode_escape").decode() not in printed:
        return f"{what}: stopped before it came to the file, {printed[-300:]!r}"
    if row["err"].rstrip().endswith("--help)"):
        return f"{what}: no command line, {row['err'][-300:]!r}"
    if row["status"] and len([line for line in row["err"].splitlines() if line.startswith("error: ")]) != 1:
        return f"{what}: status {row['status']}, {row['err'][-300:]!r}"
    return None
