"""Studies run as people run them, and a headless Chromium that looks at their reports as people do."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from triptych_common.testing import OFFLINE, run_cli

ROOT = Path(__file__).parents[3]
WIDE, NARROW = {"width": 1200, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="session")
def reproduce() -> Callable[..., CompletedProcess]:
    """A chapter at size smoke, in a process of its own, without the network."""

    def run(chapter: int, out: Path, *options: object) -> CompletedProcess:
        words = ["--size", "smoke", "--out", out, "--claims", ROOT / "claims.toml", *options]
        done = run_cli("triptych_thesis.cli", "reproduce", f"ch{chapter}", *map(str, words), env=OFFLINE, timeout=900)
        assert done.returncode == 0, done.stderr
        home = out / "cartpole" if "cartpole" in options else out
        assert f"wrote {home / 'report.html'} (size smoke)" in done.stdout
        return done

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Playwright's Chromium, or the system's; tests that need it are skipped where there is none."""
    reason = "playwright is not installed; pip install -r requirements.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as started:
        places = (
            started.chromium.executable_path,
            *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
        )
        found = next((place for place in places if place and Path(place).exists()), None)
        if found is None:
            pytest.skip("no Chromium here; apt-get install chromium, or playwright install chromium")
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def check_page(browser: Any) -> Callable[[Path], None]:
    """A check of a report's page: it fits, its first screen holds what it should, links jump, details open."""

    def check(path: Path) -> None:
        for viewport in (WIDE, NARROW):
            page = browser.new_page(viewport=viewport)
            page.goto(path.absolute().as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            pictures = page.locator("img").evaluate_all(
                "all => all.map(each => each.complete && each.naturalWidth > 0)"
            )
            assert pictures
            assert all(pictures)
            if viewport is WIDE:
                _check_first_screen(page)
            for link in page.locator("nav a").all():
                link.click()
                target = page.locator(f"[id='{link.get_attribute('href')[1:]}']").bounding_box()
                assert -1 <= target["y"] < viewport["height"]
                page.evaluate("scrollTo(0, 0)")
            for folded in page.locator("details").all():
                inside = folded.locator(":scope > :not(summary)").first
                assert not inside.is_visible()
                folded.locator("summary").click()
                assert inside.is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            page.close()

    return check


def _check_first_screen(page: Any) -> None:
    """The sentence, the first picture whole, and the first rows of the verdicts."""
    shown = [page.locator(".headline"), page.locator("img").first, *page.locator("#verdicts tbody").all()[:2]]
    assert len(shown) >= 3
    for each in shown:
        box = each.bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= WIDE["height"]
