"""The page of `labelloop report` in a browser: all there, nothing fetched, nothing wrong, on a phone and in the dark, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from cli import report_page
from cli.report import read_report
from labelloop.model_config import ModelConfigs
from labelloop.records import ProblemTypeName
from tests import examples
from tests.browser import chromium
from tests.deployed import deployed

SECTIONS = ["Learning curve", "What the champion takes for what", "Calibration", "Queue", "Label savings", "Acceptance"]
SECTIONS += ["Turnaround of the last training", "What it costs on AWS"]
PHONE = 400  # CSS pixels
# Whether anything reaches beyond the window: what is wide has to scroll in a container of its own.
OVERFLOWS = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"
# The least contrast (WCAG) between text and what is behind it, of all elements with text of their own outside of figures.
CONTRAST = """() => {
  const channel = (value) => { const c = value / 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (element) => {
    for (let it = element; it; it = it.parentElement) {
      const colour = parse(getComputedStyle(it).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const ratios = [...document.querySelectorAll('main *')].filter((it) => !it.closest('svg') && own(it)).map((it) => {
    const [a, b] = [light(parse(getComputedStyle(it).color)), light(behind(it))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  return Math.min(...ratios);
}"""


@dataclass
class Browsed:
    """A page in a browser, what it asked for, and what it complained of."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    executable = chromium.find()
    assert executable, "there is no Chromium; run: make browser"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def browsing(chrome: Browser, file: Path, *, width: int = 1200, dark: bool = False) -> Iterator[Browsed]:
    page = chrome.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    browsed = Browsed(page)
    page.on("request", lambda request: browsed.requests.append(request.url))
    page.on("console", lambda message: browsed.complaints.append(message.text))
    page.on("pageerror", lambda error: browsed.complaints.append(str(error)))
    page.goto(file.as_uri())
    yield browsed
    page.close()


@pytest.fixture(scope="module")
def pages(aws: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a model of each problem type, and of one without a version."""
    root = tmp_path_factory.mktemp("reports")
    kinds: dict[str, ProblemTypeName] = {
        "classification": "classification", "multilabel": "multilabel", "detection": "detection", "nothing": "classification",
    }  # fmt: skip
    return {name: _written(root / name, kind, trained=name != "nothing") for name, kind in kinds.items()}


def _written(folder: Path, kind: ProblemTypeName, *, trained: bool) -> Path:
    classes = ["cat", "a class with a long name that has to go somewhere", *(f"class {number}" for number in range(10))]
    model = examples.make_model_folder(folder / "models", "own", kind, classes)
    with pytest.MonkeyPatch.context() as patch, deployed(model, patch) as stage:
        stage.annotate(60, kept=0.7, version=2 if trained else None)
        if trained:
            stage.train(100, 0.8)
            stage.train(400, 0.95)
            stage.train(800, 0.5)
            stage.label_studio.predicted = 1000
        found = read_report(stage.deployment, ModelConfigs(folder / "models"), model)
    file = folder / "report.html"
    report_page.write(found, file)
    return file


@pytest.mark.parametrize("name", ["classification", "multilabel", "detection", "nothing"])
@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_there_and_can_be_read(chrome: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    with browsing(chrome, pages[name], dark=dark) as browsed:
        headings = browsed.page.locator("section h2")
        texts = [text for text in headings.all_inner_texts() if text != "Now"]
        assert [text.startswith(title) for text, title in zip(texts, SECTIONS, strict=True)] == [True] * len(SECTIONS)
        assert all(heading.is_visible() for heading in headings.all())
        figures = browsed.page.locator("svg").all()
        assert len(figures) == {"classification": 3, "multilabel": 2, "detection": 2, "nothing": 0}[name]
        for figure in figures:
            box = figure.bounding_box()
            assert box is not None
            assert min(box["width"], box["height"]) > 200
        assert not browsed.page.evaluate(OVERFLOWS)
        assert browsed.page.evaluate(CONTRAST) >= 4.5
        assert browsed.requests == [pages[name].as_uri()]
        assert browsed.complaints == []


@pytest.mark.parametrize("name", ["classification", "multilabel", "detection", "nothing"])
def test_on_a_phone_what_is_wide_scrolls_in_its_own_container(chrome: Browser, pages: dict[str, Path], name: str) -> None:
    with browsing(chrome, pages[name], width=PHONE) as browsed:
        assert not browsed.page.evaluate(OVERFLOWS)
        sizes = browsed.page.evaluate("() => [...document.querySelectorAll('main *')].filter(it => !it.closest('svg'))"
                                      ".map(it => parseFloat(getComputedStyle(it).fontSize))")  # fmt: skip
        assert min(sizes) >= 12
        wide = [its for its in browsed.page.locator(".wide").all() if its.evaluate("it => it.scrollWidth > it.clientWidth")]
        if name == "nothing":
            return
        curve = wide[0]
        assert curve.locator("svg").count() == 1
        curve.evaluate("it => it.scrollTo(10000, 0)")
        assert curve.evaluate("it => it.scrollLeft") > 0
        box = curve.locator("svg").bounding_box()
        assert box is not None
        assert box["width"] > 500  # not shrunk until nobody can read it


def test_the_sections_are_reached_by_the_links_at_the_top(chrome: Browser, pages: dict[str, Path]) -> None:
    with browsing(chrome, pages["classification"]) as browsed:
        for link in browsed.page.locator("nav a").all():
            link.click()
            target = (link.get_attribute("href") or "#").removeprefix("#")
            assert browsed.page.locator(f"section#{target}").is_visible()
        assert browsed.page.evaluate("scrollY") > 500
        assert browsed.complaints == []
