"""What people look at: pictures, pages, progress."""

import io
import json
import re
import sys
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from triptych_common.images import figure_png, from_uint8, image_grid, png_bytes, to_uint8
from triptych_common.progress import Progress, Stopwatch
from triptych_common.testing import assert_self_contained
from triptych_thesis.study.old_report import Report, publish


def test_to_uint8_is_the_released_rule():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 64, 128, 191, 255, 255]  # 127.5 x + 128, clamped, truncated
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1).long(), levels)  # 8-bit data survive scaling and back


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


def test_report_escapes_text_and_embeds_pictures(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    report = Report("a < b", "sub", ["1 & 2"])
    report.heading("<script>")
    report.text("x > y")
    report.code("make it > log")
    report.table(("a", "b"), [("<i>", 1)], "caption")
    report.figures((figure_png(figure), 'a "quoted" caption'))
    report.write(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page
    assert "<i>" not in page
    for text in ("a &lt; b", "1 &amp; 2", "&lt;i&gt;", "x &gt; y", "data:image/png;base64,iVBOR"):
        assert text in page


def test_links_of_a_published_report_lead_where_its_own_do(tmp_path):
    out, folder = tmp_path / "runs", tmp_path / "runs/small size"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples/a b.png").write_bytes(b"x")
    (folder / "results.json").write_text("{}")
    report = Report("title", "sub", [])
    report.links("all <samples>", [("first", {"picture": "samples/a b.png"})])
    report.write(folder / "report.html")
    publish(folder, out, "small")
    for page in (folder / "report.html", out / "report.html"):
        assert_self_contained(page.read_text(), pictures=0)
        (link,) = re.findall(r'href="([^"]*)"', page.read_text())
        assert (page.parent / unquote(link)).read_bytes() == b"x"
    for path in ("/etc/passwd", "../up", "https://example.org"):
        with pytest.raises(ValueError, match="expected a path below the page's folder"):
            report.links("", [("", {"": path})])


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


def test_a_stopwatch_adds_up_what_is_resumed_and_forgets_what_is_done_afresh(tmp_path, monkeypatch):
    path, now = tmp_path / "seconds.json", [0.0]
    monkeypatch.setattr("triptych_common.progress.time.perf_counter", lambda: now[0])

    def spend(clock: Stopwatch, seconds: float, stage: str, **options: bool) -> None:
        with clock(stage, **options):
            now[0] += seconds

    for _ in range(2):
        spend(Stopwatch(path), 3.0, "training")
        spend(Stopwatch(path), 2.0, "drawing", afresh=True)
    assert json.loads(path.read_text()) == {"training": 6.0, "drawing": 2.0}
    done = Stopwatch(path, finished=True)
    spend(done, 5.0, "training")
    spend(done, 4.0, "more")
    assert done.seconds == json.loads(path.read_text()) == {"training": 6.0, "drawing": 2.0, "more": 4.0}


@pytest.mark.parametrize("content", ['{"training": ', "[1.0]", '{"training": null}'])
def test_a_damaged_stopwatch_is_named(tmp_path, content):
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(ValueError, match=r"seconds.json: damaged, expected JSON; delete it"):
        Stopwatch(tmp_path / "seconds.json")


def test_a_stopwatch_counts_a_stage_that_is_interrupted(tmp_path):
    clock = Stopwatch(tmp_path / "seconds.json")
    with pytest.raises(KeyboardInterrupt), clock("training"):
        raise KeyboardInterrupt
    assert clock.seconds["training"] >= 0
