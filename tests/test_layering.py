"""Dependencies point one way and without circles, every package declares exactly what it imports, and help loads no torch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from triptych_common.cli import CommonOptions, located

ROOT = Path(__file__).parent.parent
PACKAGES = {path.name: path for path in sorted((ROOT / "packages").iterdir()) if path.is_dir()}
MODULES = {name: f"triptych_{name}" for name in PACKAGES} | {"gpt_checkpoints": "triptych_gpt"}
LIBRARIES = [name for name in PACKAGES if name != "thesis"]
DISTRIBUTIONS = {  # import name -> distribution, where they differ
    "PIL": "pillow", "triptych_common": "triptych-common", "torch_fidelity": "torch-fidelity", "sklearn": "scikit-learn",
    "stable_baselines3": "stable-baselines3",
    "triptych_dit": "triptych-dit", "triptych_gpt": "triptych-gpt", "triptych_gangealing": "triptych-gangealing",
}  # fmt: skip
FILES_BEHIND_TRAINING = {"triptych_dit.train": 26, "triptych_gpt.train": 35, "triptych_gangealing.train": 31}
PROGRAMS = ["triptych_dit.cli", "triptych_gpt.cli", "triptych_gangealing.cli", "triptych_thesis.cli"]


def imports_of(folder: Path, *, when_run: bool = False) -> dict[str, set[str]]:
    """Top-level names that the files of a folder import anywhere, and where; `when_run`: but those for type checkers."""
    imported: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in statements(tree.body, functions=True) if when_run else ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                assert node.module is not None
                names = [node.module]
            for name in names:
                imported.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_extra":
                name = ast.literal_eval(node.args[0])
                imported.setdefault(name.split(".")[0], set()).add(str(path.relative_to(ROOT)))
    return imported


def declared(project: dict) -> set[str]:
    requirements = list(project["dependencies"])
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {re.split(r"[<>=\[~!; ]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("name", PACKAGES)
def test_libraries_import_common_and_never_each_other_or_what_stands_above(name):
    imports = imports_of(PACKAGES[name] / "src")
    allowed = set(MODULES.values()) if name == "thesis" else {MODULES[name], "triptych_common"}
    forbidden = {*MODULES.values(), "benchmarks", "examples", "tests"} - allowed
    assert {module: where for module, where in imports.items() if module in forbidden} == {}


def test_the_check_above_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text("def f():\n    from triptych_dit.model import DiT\n")
    assert "triptych_dit" in imports_of(tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_knows_neither_thesis_nor_the_numbers_of_its_figures(name):
    ours = re.compile(r"triptych[_-]thesis|\b(fig|table)-\d+\.\d+")
    mentions = {
        str(path.relative_to(ROOT)): ours.search(path.read_text()).group()
        for path in (PACKAGES[name] / "src").rglob("*.py*")
        if path.suffix in (".py", ".pyi") and ours.search(path.read_text())
    }
    assert mentions == {}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_import_is_declared_and_every_declaration_used(name):
    project = tomllib.loads((PACKAGES[name] / "pyproject.toml").read_text())["project"]
    imports = imports_of(PACKAGES[name] / "src", when_run=True)
    third_party = {
        DISTRIBUTIONS.get(module, module)
        for module in imports
        if module not in sys.stdlib_module_names and module != MODULES[name]
    }
    used_through_torch = {"tensorboard"}  # torch.utils.tensorboard
    used_by_annotations = {"beartype"}  # checks what jaxtyping annotates, under pytest
    used_as_data = {"lpips"}  # its weights of VGG's channels
    from_its_makers_alone = {"isaacgym"}  # in no registry
    assert third_party - declared(project) - from_its_makers_alone == set()
    assert declared(project) - third_party - used_through_torch - used_by_annotations - used_as_data == set()


def test_what_every_user_of_one_library_must_install():
    project = tomllib.loads((PACKAGES["common"] / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    light = {
        "annotated-types",
        "filelock",
        "jaxtyping",
        "lazy_loader",
        "numpy",
        "pillow",
        "pydantic",
        "rich",
        "safetensors",
        "typing_extensions",
        "tyro",
    }
    assert required <= light | {"torch"}


def test_setup_installs_every_package_by_path():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    editable = {re.sub(r"\[.*", "", line.removeprefix("-e ")) for line in lines if line.startswith("-e ")}
    assert editable == {f"packages/{name}" for name in PACKAGES} | {"."}
    assert not any("://" in line or line.startswith(("--", "-i", "-f")) for line in lines)


def test_modules_have_the_names_of_their_subjects():
    for path in (ROOT / "packages").rglob("src/**/*.py"):
        assert path.name not in ("utils.py", "helpers.py")


# --- circles


def sources() -> dict[str, Path]:
    """Every module of every package, by name."""
    names = {}
    for package in PACKAGES.values():
        for path in sorted((package / "src").rglob("*.py")):
            parts = path.relative_to(package / "src").with_suffix("").parts
            names[".".join(parts).removesuffix(".__init__")] = path
    return names


def statements(body: list[ast.stmt], *, functions: bool) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; with `functions`, also those that run when it is used."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, functions=functions)
        elif isinstance(node, ast.FunctionDef) and not functions:
            continue
        else:
            yield node
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []), functions=functions)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, functions=functions)


def exports(path: Path) -> dict[str, str]:
    """Where a package's lazily imported names lie, by its stub."""
    stub = path.with_suffix(".pyi")
    if path.name != "__init__.py" or not stub.exists():
        return {}
    lines = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(line.module) for line in lines for alias in line.names}


def graph(modules: dict[str, Path], *, functions: bool) -> dict[str, set[str]]:
    """Which modules each module imports: names that a package exports lazily count as imports of where they lie."""
    lazy = {name: exports(path) for name, path in modules.items()}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set()
        for node in statements(ast.parse(path.read_text()).body, functions=functions):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    home = lazy.get(str(node.module), {}).get(alias.name)
                    imported.add(f"{node.module}.{home}" if home else f"{node.module}.{alias.name}")
                    imported.add(str(node.module))
        edges[name] = {other for other in imported if other in modules and other != name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other: strongly connected components of more than one.  [Tarjan 1972]"""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                result.append(sorted(component))

    for name in edges:
        if name not in order:
            visit(name)
    return result


@pytest.mark.parametrize("functions", [False, True])
def test_no_modules_import_each_other(functions):
    assert circles(graph(sources(), functions=functions)) == []


def test_circles_are_noticed(tmp_path):
    for name, text in {
        "a": "import b",
        "b": "def f():\n    from c import x",
        "c": "try:\n    import a\nfinally: pass",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    modules = {name: tmp_path / f"{name}.py" for name in "abc"}
    assert circles(graph(modules, functions=False)) == []
    assert circles(graph(modules, functions=True)) == [["a", "b", "c"]]


# --- what is loaded


def loaded(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("module", "most"), FILES_BEHIND_TRAINING.items())
def test_training_reads_few_files(module, most):
    """How many of our files one has to know to follow a training loop: those it imports, and the packages they lie in."""
    files = loaded(f"import sys, {module}\nprint(*sorted(m for m in sys.modules if m.startswith('triptych_')))")
    assert len(files) <= most, f"{len(files)} files: {' '.join(files)}"


HELP = """
import contextlib, importlib, io, sys
program = importlib.import_module("{module}")
chapters = [f"reproduce {name}" for name in getattr(program, "CHAPTERS", ())]
for command in ["", *program.COMMANDS, *chapters]:
    sys.argv = ["program", *command.split(), "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        program.run()
    assert "usage" in printed.getvalue().lower(), command
    if "torch" in sys.modules:
        print(command or "program")
        break
"""


@pytest.mark.parametrize("module", PROGRAMS)
def test_help_loads_no_torch(module):
    assert loaded(HELP.replace("{module}", module)) == [], "the first command whose --help loads torch"


@pytest.mark.parametrize("module", PROGRAMS)
def test_what_a_command_names_exists(module):
    program = import_module(module)
    for command in {**program.COMMANDS, **getattr(program, "CHAPTERS", {})}.values():
        assert issubclass(located(command.config), CommonOptions)
        assert all(map(callable, map(located, (command.run, command.start, command.preview)))), command.summary
        assert all(isinstance(row, located(command.config)) for row in located(command.presets).values())


@pytest.mark.parametrize("module", [*MODULES.values(), *(f"{MODULES[name]}.cli" for name in LIBRARIES)])
def test_importing_a_package_loads_no_torch(module):
    assert loaded(f"import sys, {module}\nprint(*[m for m in ('torch', 'numpy') if m in sys.modules])") == []
