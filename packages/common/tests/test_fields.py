"""Constraints and marks of fields, and the settings that training loops share."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import tyro
from triptych_common.fields import FREE, Checked, Ge, Gt, Interval, OneOf, identity
from triptych_common.training.settings import AdamWSettings, LoopSettings, TransformerSettings


@dataclass(frozen=True)
class Settings(Checked):
    """Settings with one field of each kind."""

    rate: Annotated[float, Gt(0)] = 1.0
    """how fast"""
    clip: Annotated[float | None, Gt(0)] = None
    count: Annotated[int | None, Ge(1), FREE] = None
    decay: Annotated[float, Ge(0)] = 0.0
    share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    steps: Annotated[int, Interval(ge=1, le=1000)] = 1
    beta: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    every: Annotated[int, Ge(0, "a number of steps, or 0 for none")] = 0
    indices: Annotated[tuple[int, ...], Ge(0, "numbers from 0")] = ()
    counts: Annotated[tuple[int, ...], Interval(ge=1, le=9)] = ()
    format: Annotated[str, OneOf(("mp4", "gif"))] = "mp4"
    precision: Literal["float32", "bf16"] = "float32"
    free: str = ""


@pytest.mark.parametrize(("values", "message"), [
    ({"rate": 0}, "rate 0: expected a number above 0"),
    ({"rate": math.nan}, "rate nan: expected a number above 0"),
    ({"rate": None}, None),  # not a number, and not allowed: TypeError
    ({"clip": 0.0}, "clip 0.0: expected a number above 0, or None for none"),
    ({"count": 0}, "count 0: expected at least 1"),
    ({"decay": -0.5}, "decay -0.5: expected a number of at least 0"),
    ({"share": 1.5}, "share 1.5: expected a number in 0..1"),
    ({"steps": 1001}, "steps 1001: expected 1..1000"),
    ({"beta": 1.0}, "beta 1.0: expected at least 0 and below 1"),
    ({"every": -1}, "every -1: expected a number of steps, or 0 for none"),
    ({"indices": (0, -1)}, r"indices \(0, -1\): expected numbers from 0"),
    ({"counts": (1, 10)}, r"counts \(1, 10\): expected numbers of 1..9"),
    ({"format": "git"}, "format 'git': expected one of mp4, gif; did you mean 'gif'?"),
    ({"precision": "fp16"}, "precision 'fp16': expected one of float32, bf16"),
])  # fmt: skip
def test_an_error_names_field_value_and_expectation(values, message):
    settings = Settings()
    for name, value in values.items():
        object.__setattr__(settings, name, value)  # bypasses the type checks of the test run
    with pytest.raises(ValueError if message else TypeError, match=message and f"^{message}".replace("?", r"\?")):
        settings.__post_init__()


def test_what_is_within_its_bounds_passes():
    Settings(rate=1e-9, clip=None, count=1, decay=0.0, share=1.0, steps=1000, beta=0.0, indices=(0, 3), format="gif")


@dataclass(frozen=True)
class Narrower(Settings):
    """Declares fields again."""

    rate: float = 2.0
    count: int | None = 3
    precision: Literal["float32", "bf16", "fp16"] = "fp16"


def test_a_field_declared_again_keeps_constraints_and_marks():
    with pytest.raises(ValueError, match=r"rate 0\.0: expected a number above 0"):
        Narrower(rate=0.0)
    assert "count" not in identity(Narrower())
    assert identity(Narrower())["precision"] == "fp16"  # the choices declared last count


def test_a_command_line_takes_constraints_and_keeps_help_texts(capsys):
    assert tyro.cli(Narrower, args=["--count", "5", "--clip", "None"]).count == 5
    with pytest.raises(SystemExit):
        tyro.cli(Narrower, args=["--help"])
    assert "how fast (default: 2.0)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tyro.cli(Narrower, args=["--rate", "-1"])
    assert "rate -1.0: expected a number above 0" in capsys.readouterr().err


@dataclass(frozen=True)
class Mixin:
    """Has its own check and does not derive from `Checked`."""

    odd: int = 1

    def __post_init__(self) -> None:
        if self.odd % 2 == 0:
            raise ValueError(f"odd {self.odd}")


@dataclass(frozen=True)
class Combined(Settings, Mixin):
    """Derives from both."""


def test_checks_of_every_base_are_made():
    with pytest.raises(ValueError, match="odd 2"):
        Combined(odd=2)


@dataclass(frozen=True)
class PairLoop(TransformerSettings):
    """A loop that counts pairs."""

    unit: ClassVar[str] = "pairs"

    out: Path = Path("runs/pairs")
    total_pairs: Annotated[int, Gt(0)] = 100
    warmup_pairs: int = 20
    ema_half_life_pairs: Annotated[int, Gt(0)] = 50
    batch_size: int = 10


def test_what_changes_no_result_is_left_out_of_the_identity():
    changed = PairLoop(
        out=Path("elsewhere"), device="cpu", json=True, dry_run=True, micro_batch=1, tensorboard=True, parallel="fsdp",
        activation_checkpointing=True, compile_blocks=True, log_every=3, checkpoint_every=7,
    )  # fmt: skip
    assert changed.identity() == PairLoop().identity()
    decides = (
        "seed",
        "batch_size",
        "lr",
        "adam_beta2",
        "grad_clip",
        "ema_rampup",
        "precision",
    )
    assert set(decides) | {"total_pairs", "warmup_pairs", "ema_half_life_pairs", "weight_decay"} == set(
        changed.identity()
    )


@pytest.mark.parametrize(("cls", "values", "message"), [
    (PairLoop, {"warmup_pairs": 101}, r"warmup_pairs 101: expected 0\.\.100 \(total_pairs\)"),
    (PairLoop, {"warmup_pairs": -1}, "warmup_pairs -1: expected 0"),
    (PairLoop, {"micro_batch": 0}, "micro_batch 0: expected at least 1"),
    (PairLoop, {"grad_clip": 0.0}, "grad_clip 0.0: expected a number above 0, or None for none"),
    (PairLoop, {"batch_size": 0}, "batch_size 0: expected a number above 0"),
    (PairLoop, {"checkpoint_every": 0}, "checkpoint_every 0: expected a number above 0"),
])  # fmt: skip
def test_loops_share_their_checks(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_a_loop_has_a_length_a_warmup_and_options_for_its_state():
    loop = PairLoop(lr=1.0, precision="tf32", parallel="fsdp")
    assert loop.resolved()["steps"] == 10
    assert loop.resolved()["config"]["out"] == "runs/pairs"
    assert [loop.learning_rate(seen) for seen in (0, 10, 50)] == [0.5, 1.0, 1.0]
    options = loop.state_options()
    assert options["ema_half_life"] == 50
    assert (options["execution"].parallel, options["execution"].precision) == ("fsdp", "float32")


def test_every_loop_is_a_command(capsys):
    assert issubclass(AdamWSettings, LoopSettings)
    assert tyro.cli(PairLoop, args=["--micro-batch", "4", "--precision", "bf16"]).micro_batch == 4
