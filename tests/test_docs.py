"""What the README promises exists, and what is generated is up to date."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from triptych_common.cli import located
from triptych_common.testing import random_inception_weights
from triptych_dit.cli import COMMANDS as DIT_COMMANDS
from triptych_dit.testing import run_dit
from triptych_gangealing.cli import COMMANDS as GANGEALING_COMMANDS
from triptych_gpt.cli import COMMANDS as GPT_COMMANDS
from triptych_thesis.chapter2.experiments.gallery import THESIS
from triptych_thesis.cli import CHAPTERS
from triptych_thesis.cli import COMMANDS as THESIS_COMMANDS
from triptych_thesis.study.claims import Claim, claims_page, load_claims

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "triptych-dit": DIT_COMMANDS, "triptych-gpt": GPT_COMMANDS, "triptych-gangealing": GANGEALING_COMMANDS,
    "triptych": THESIS_COMMANDS, "triptych reproduce": CHAPTERS,
}  # fmt: skip
PROGRAM = r"(?<![\w-])(triptych(?:-(?:dit|gpt|gangealing)| reproduce)?) ([a-z][\w-]*)"
PAGES = [ROOT / "README.md", *sorted((ROOT / "packages").glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]


def code_of(page: Path) -> str:
    text = page.read_text()
    return "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_exist(page):
    code = code_of(page)
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][\w-]*)", code):
        assert target in targets, f"{page.name}: make {target}"
    for program, command in re.findall(PROGRAM, code):
        assert command in COMMANDS[program], f"{page.name}: {program} {command}"
    for module in re.findall(r"python -m ([\w.]+)", code):
        assert subprocess.run([sys.executable, "-c", f"import importlib.util as u, sys; sys.exit(not u.find_spec('{module}'))"],
                              cwd=ROOT).returncode == 0, module  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_named_are_options(page):
    code = code_of(page)
    for program, command, options in re.findall(PROGRAM + r"((?: +[^\n#`]+)?)", code):
        flags = re.findall(r"--([a-z][\w.-]*)", options)
        if not flags:
            continue
        config = located(COMMANDS[program][command].config)
        known = {f.replace("_", "-") for f in config.__dataclass_fields__} | {"preset", "help"}
        known |= {f"no-{flag}" for flag in known}
        assert {flag.split(".")[0] for flag in flags} <= known, f"{page.name}: {program} {command}{options}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_examples_run(page):
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr


def test_the_tutorial_on_own_pictures_runs_as_it_stands(tmp_path, monkeypatch):
    """On twelve pictures, with a smaller network and fewer images, which are all that is changed."""
    for i in range(12):
        path = tmp_path / "photos" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 13, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    weights = random_inception_weights(tmp_path / "inception.pth")
    tiny = ("--model.hidden-size", 16, "--model.depth", 1, "--batch-size", 8, "--checkpoint-every", 1)
    smaller = {"train": tiny, "sample": ("--num-samples", 6, "--num-inference-steps", 2),
               "evaluate": ("--inception", weights, "--repeats", 0), "export": ()}  # fmt: skip
    block = re.search(r"```\n(.*?)```", (ROOT / "docs/own-pictures.md").read_text(), re.DOTALL)[1]
    said = []
    for line in block.splitlines():
        program, command, *words = shlex.split(line)
        assert program == "triptych-dit"
        words = [{"20000": "16", "40000": "32"}.get(word, word) for word in words]
        done = run_dit(command, *words, *smaller[command], "--device", "cpu")
        assert done.returncode == 0, f"{line}: {done.stderr}"
        said.append(done.stdout)
    assert len(said) == 5
    assert "--model.num-classes 3, --model.input-size 12 12, --model.in-channels 3" in said[0]
    assert (tmp_path / "runs/photos/diffusers/transformer/config.json").exists()
    assert "total_images is 32 now, was 16" in said[4]


def test_the_generated_ledger_page_is_up_to_date():
    assert (ROOT / "docs/claims.md").read_text() == claims_page(load_claims(ROOT / "claims.toml"))


def test_the_ledger_lists_every_figure_and_table():
    claims = load_claims(ROOT / "claims.toml")
    ids = set(claims)
    assert {f"dit.fig-2.{i}" for i in range(1, 16)} | {f"dit.table-2.{i}" for i in range(1, 4)} <= ids
    assert {f"gpt.fig-3.{i}" for i in range(1, 10)} <= ids
    assert {f"gangealing.fig-4.{i}" for i in range(1, 8)} | {f"gangealing.table-4.{i}" for i in range(1, 4)} <= ids


def test_the_thesis_numbers_of_the_report_are_those_of_the_ledger():
    published = load_claims(ROOT / "claims.toml")["dit.table-2.2"].published
    unguided = re.search(r"XL/2 (\S+);", published)[1].split("/")
    guided = re.search(r"scale 1\.50 (\S+)\.", published)[1].split("/")
    columns = {"frechet": 0, "precision": 3, "recall": 4}
    assert {metric: (unguided[i], guided[i]) for metric, i in columns.items()} == THESIS


def test_a_verdict_needs_its_evidence(tmp_path):
    row = tomllib.loads((ROOT / "claims.toml").read_text())["claim"][0]
    with pytest.raises(ValueError, match="without size and command"):
        Claim(**{**row, "verdict": "confirmed", "size": "", "command": ""})
    with pytest.raises(ValueError, match="expected one of confirmed"):
        Claim(**{**row, "verdict": "yes"})
    yes = (ROOT / "claims.toml").read_text().replace('verdict = "not run"', 'verdict = "yes"', 1)
    (tmp_path / "c.toml").write_text(yes)
    with pytest.raises(ValueError, match=r"c\.toml: claim \S+: verdict 'yes', expected one of confirmed"):
        load_claims(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('[[claim]]\nid = "x"\n')
    with pytest.raises(ValueError, match="keys differ"):
        load_claims(tmp_path / "c.toml")


def test_no_tracked_file_is_large_or_names_a_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.exists():
            assert path.stat().st_size < 5_000_000, name
            if not name.endswith((".safetensors", ".png")):
                text = path.read_text()
                assert str(ROOT) not in text, name
                assert not re.search(r"/(home|root|Users)/\w", text), name
