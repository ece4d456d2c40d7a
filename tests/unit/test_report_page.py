"""The report's page in a real browser: headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt install chromium")

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'darktrt[dev]'")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The page, opened; ``page.complaints`` are errors of the console, and requests to anything but the file itself."""
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    complaints: list[str] = []
    address = (report / "index.html").as_uri()
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda sent: complaints.append(sent.url) if sent.url != address else None)
    opened.goto(address)
    assert not [text for text in complaints if not text.startswith("data:")]
    yield opened
    assert not [text for text in complaints if not text.startswith("data:")]
    opened.close()


def column(page: Page, table: str, number: int) -> list[str]:
    """What the cells of a column show, top to bottom."""
    texts: list[str] = page.locator(f"#{table} tbody tr > :nth-child({number})").all_inner_texts()
    return [text.strip() for text in texts]


def test_charts_and_images_are_there(page: Page, report: Path) -> None:
    values = json.loads((report / "report.json").read_text())
    sizes: list[list[float]] = page.eval_on_selector_all(
        "svg", "all => all.map(e => { const box = e.getBoundingClientRect(); return [box.width, box.height] })"
    )
    assert len(sizes) == 4 + len(values["calibration"]["tensors"]) > 6
    assert all(width > 150 and height > 80 for width, height in sizes)
    images: list[list[float]] = page.eval_on_selector_all(
        "img", "all => all.map(e => [e.naturalWidth, e.getBoundingClientRect().width])"
    )
    assert len(images) == 9 and all(natural > 100 and shown > 100 for natural, shown in images)
    text = page.inner_text("body")
    for name in ("PyTorch", "ONNX as INT8", "INT8 engine", "NVIDIA H200", "0.250 ms"):
        assert name in text
    assert "cfg line" in page.inner_text("#errors") and page.locator("svg text").count() > 40


def test_tables_sort(page: Page) -> None:
    """By number, the largest first, and back; by name."""
    before = column(page, "variants-table", 3)
    assert len(before) == 5
    heading = page.locator("#variants-table thead th").nth(2)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, "variants-table", 3) == sorted(before, key=float, reverse=True)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, "variants-table", 3) == sorted(before, key=float)
    page.locator("#variants-table thead th").first.get_by_role("button").click()
    names = column(page, "variants-table", 1)
    assert names == sorted(names, key=str.lower) and heading.get_attribute("aria-sort") is None


def test_unknown_values_sort_last(page: Page) -> None:
    """Small objects: NaN where none is labelled; latencies: one is known."""
    button = page.locator("#variants-table thead th").nth(10).get_by_role("button")
    for _ in range(2):
        button.click()
        assert column(page, "variants-table", 11) == ["0.250 ms", *["not measured"] * 4]


def test_classes_with_the_largest_drop_come_first(page: Page) -> None:
    last = page.locator("#classes-table thead th").count()
    drops = [float(text.replace("\N{MINUS SIGN}", "-").replace("±", "")) for text in column(page, "classes-table", last)]
    assert drops == sorted(drops) and drops[0] < 0


def test_it_fits_the_screen(page: Page) -> None:
    """Nothing overflows to the right: wide parts scroll; letters are large enough to read."""
    width: Any = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    small: list[str] = page.eval_on_selector_all(
        "p, td, th, li, dd, dt, figcaption, h1, h2, h3, span",
        "all => all.filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.innerText)",
    )
    assert not small
    cut: list[str] = page.eval_on_selector_all(
        "section, .card, .notes",
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id + e.className + e.innerText.slice(0, 40))",
    )
    assert not cut


def test_all_convolutions_unfold(page: Page) -> None:
    table = page.locator("#sensitivity-table")
    assert not table.is_visible()
    page.locator("summary").click()
    assert table.is_visible() and table.locator("tbody tr").count() > 8
