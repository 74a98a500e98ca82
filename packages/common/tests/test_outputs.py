"""Output for people: images, pages, progress."""

import io
import sys

import pytest
import torch
from PIL import Image
from triptych_common.images import from_uint8, image_grid, png_bytes, to_uint8
from triptych_common.progress import Progress


def test_to_uint8_is_the_released_rule():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 64, 128, 191, 255, 255]  # 127.5 x + 128, clamped, truncated
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1).long(), levels)  # 8-bit data survive the round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_uint8_is_to_uint8_undone(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    values = from_uint8(levels, dtype)
    assert (values.dtype, values[0], values[255]) == (dtype, -1, 1)
    assert values.tolist() == pytest.approx([(2 * n - 255) / 255 for n in range(256)], abs=torch.finfo(dtype).eps)
    assert torch.equal(to_uint8(values), levels)


def test_grid_puts_images_in_reading_order():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3)
    grid = image_grid(images, columns=2, padding=1, background=9)
    assert tuple(grid.shape) == (1, 3 * 3 + 1, 2 * 4 + 1)
    assert [int(grid[0, 1 + 3 * row, 1 + 4 * column]) for row in range(3) for column in range(2)] == [1, 2, 3, 4, 5, 9]
    assert int((grid != 9).sum()) == 5 * 6


def test_png_holds_pixels_and_provenance():
    image = torch.arange(6, dtype=torch.uint8).view(1, 2, 3) * 40
    picture = Image.open(io.BytesIO(png_bytes(image, scale=2, text={"command": "make it", "seed": "0"})))
    assert picture.size == (6, 4)
    assert picture.text == {"command": "make it", "seed": "0"}
    assert [picture.getpixel((2 * x, 2 * y)) for y in range(2) for x in range(3)] == image.flatten().tolist()
    assert Image.open(io.BytesIO(png_bytes(image.expand(3, 2, 3)))).mode == "RGB"


def test_progress_without_a_terminal_prints_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "PLAIN_INTERVAL", 0.0)
    with Progress("training", 100, "img") as progress:
        progress.at(40)  # a resumed run starts here
        progress.advance(10)
        progress.at(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 40/100 img, 0 img/s"
    assert lines[1].startswith("training: 50/100 img")
    assert "s left" in lines[1]
    assert lines[-1].startswith("training: 100/100 img")
    assert "left" not in lines[-1]


def test_progress_on_a_terminal_and_disabled(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for enabled in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("FORCE_COLOR", "1")
        with Progress("sampling", 10, "img", enabled=enabled) as progress:
            for _ in range(10):
                progress.advance()
        assert ("sampling" in terminal.getvalue()) == enabled


def test_what_a_terminal_acts_on_is_no_part_of_progress(capsys):
    with Progress("verifying \x1b[2J[/red]", 2, "files") as progress:
        progress.advance()
        progress.advance()
    assert capsys.readouterr().err.startswith("verifying \\x1b[2J[/red]: 2/2 files")


def test_brackets_in_progress_on_a_terminal_are_text(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", shown)
    with Progress("verifying [/red]", 2, "files", note=lambda: "[/blue]") as progress:
        progress.advance(2)
    assert "verifying [/red]" in shown.getvalue()
    assert "[/blue]" in shown.getvalue()
