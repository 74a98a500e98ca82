"""Dependencies point one way, and every package declares exactly what it imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {path.name: path for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()}
MODULES = {name: f"triptych_{name}" for name in PACKAGES} | {"gpt_checkpoints": "triptych_gpt"}
DISTRIBUTIONS = {  # import name -> distribution, where they differ
    "PIL": "pillow", "triptych_common": "triptych-common", "tensorboard": "tensorboard",
    "torch_fidelity": "torch-fidelity", "sklearn": "scikit-learn",
}  # fmt: skip


def imports_of(folder: Path) -> dict[str, set[str]]:
    """Top-level names that the files of a folder import anywhere, and where."""
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return found


def declared(project: dict) -> set[str]:
    requirements = list(project["dependencies"])
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {re.split(r"[<>=\[~!; ]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_common_and_never_each_other_or_what_stands_above(name):
    imports = imports_of(PACKAGES[name] / "src")
    allowed = {MODULES[name], "triptych_common"} if name != "common" else {"triptych_common"}
    forbidden = ({*MODULES.values(), "triptych_gpt", "triptych_gangealing", "benchmarks", "tests"}) - allowed
    assert {module: where for module, where in imports.items() if module in forbidden} == {}


def test_the_check_above_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text("def f():\n    from triptych_dit.model import DiT\n")
    assert "triptych_dit" in imports_of(tmp_path)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_import_is_declared_and_every_declaration_used(name):
    project = tomllib.loads((PACKAGES[name] / "pyproject.toml").read_text())["project"]
    imports = imports_of(PACKAGES[name] / "src")
    third_party = {
        DISTRIBUTIONS.get(module, module)
        for module in imports
        if module not in sys.stdlib_module_names and module != MODULES[name]
    }
    used_through_torch = {"tensorboard"}  # torch.utils.tensorboard
    used_by_annotations = {"beartype"}  # checks what jaxtyping annotates, under pytest
    used_as_data = {"lpips"}  # its weights of VGG's channels
    assert third_party - declared(project) == set()
    assert declared(project) - third_party - used_through_torch - used_by_annotations - used_as_data == set()


def test_setup_installs_every_package_by_path():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    editable = {re.sub(r"\[.*", "", line.removeprefix("-e ")) for line in lines if line.startswith("-e ")}
    assert editable == {f"packages/{name}" for name in PACKAGES} | {"."}
    assert not any("://" in line or line.startswith(("--", "-i", "-f")) for line in lines)


def test_modules_stay_readable():
    for path in (ROOT / "packages").rglob("src/**/*.py"):
        assert len(path.read_text().splitlines()) <= 320, f"{path}: split it along the design"
        assert path.name not in ("utils.py", "helpers.py")
