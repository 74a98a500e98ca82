"""Each package builds a wheel that installs and imports from a folder of wheels, in an environment without editables."""

import json
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = {
    "triptych-common": ROOT / "packages/common",
    "triptych-dit": ROOT / "packages/dit",
    "triptych-gpt": ROOT / "packages/gpt_checkpoints",
    "triptych-gangealing": ROOT / "packages/gangealing",
    "triptych-thesis": ROOT / "packages/thesis",
    "triptych": ROOT,
}
SMOKE = {
    "triptych-common": "from triptych_common.metrics import load_instrument; print(load_instrument('mnist_features').sha256)",
    "triptych-dit": "from triptych_dit import DiT, PRESETS; print(sum(p.numel() for p in DiT(PRESETS['digits']).parameters()))",
    "triptych-gpt": "from triptych_gpt.tasks import TASKS; print(TASKS['cifar_cnn'].layout.size)",
    "triptych-gangealing": "from triptych_gangealing import load_generator; print(load_generator('digits32-3').num_ws)",
    "triptych-thesis": "from triptych_thesis.chapter2.sizes import SIZES; print(*SIZES)",
    "triptych": "import triptych_dit.cli, triptych_gpt.cli, triptych_gangealing.cli, triptych_common; print('ok')",
}
SCRIPTS = {  # commands, and a word of their help
    "triptych-common": {},
    "triptych-dit": {"triptych-dit": "sample"},
    "triptych-gpt": {"triptych-gpt": "collect"},
    "triptych-gangealing": {"triptych-gangealing": "generate"},
    "triptych-thesis": {"triptych": "reproduce"},
    "triptych": {
        "triptych": "reproduce",
        "triptych-dit": "sample",
        "triptych-gpt": "collect",
        "triptych-gangealing": "generate",
    },
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for source in PROJECTS.values():
        options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    return folder


@pytest.fixture(scope="module")
def third_party(tmp_path_factory) -> Path:
    """This environment's site-packages without our own editables, as symbolic links.

    A whole new environment would mean downloading torch again.
    """
    folder = tmp_path_factory.mktemp("third-party")
    for entry in Path(site.getsitepackages()[0]).iterdir():
        ours = "triptych" in entry.name or entry.name.startswith(("__editable__", "_editable", "_triptych"))
        if not ours and not entry.name.startswith(("pip", "__pycache__", "distutils-precedence")):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.mark.parametrize("name", PROJECTS)
def test_wheel_installs_and_imports_alone(name, wheels, third_party, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    # Python 3.11's own, old setuptools would hide the one that torch asks for.
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools"], check=True)
    where = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    (Path(where.stdout.strip()) / "third-party.pth").write_text(f"{third_party}\n")
    command = [python, "-m", "pip", "install", "--no-index", "--find-links", wheels, "--quiet", name]
    installed = subprocess.run(command, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    done = subprocess.run([python, "-c", SMOKE[name]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    location = "import triptych_common; print(triptych_common.__file__)"
    origin = subprocess.run([python, "-c", location], capture_output=True, text=True, cwd=tmp_path).stdout
    assert str(tmp_path) in origin  # the wheel's, not the checkout's
    assert json.loads(subprocess.run(
        [python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"], capture_output=True, text=True
    ).stdout)  # fmt: skip
    for script, word in SCRIPTS[name].items():
        done = subprocess.run([tmp_path / "env/bin" / script, "--help"], capture_output=True, text=True)
        assert word in done.stdout


def test_wheels_hold_code_weights_and_licence_metadata_only(wheels):
    for path in wheels.glob("*.whl"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            metadata = next(n for n in names if n.endswith("METADATA"))
            text = archive.read(metadata).decode()
        assert "License-Expression: MIT" in text
        assert "Requires-Python: >=3.11" in text
        assert not [n for n in names if "test_" in n or n.startswith("tests/")]
        if path.name.startswith("triptych_common"):
            assert "triptych_common/metrics/weights/mnist_features.safetensors" in names
        if path.name.startswith("triptych-"):
            assert all("dist-info" in n for n in names)
