"""The report in a real browser: nothing fails, nothing is fetched, everything can be read on a phone."""

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from site_checks import CHECKS, DESK, Addresses, broken_links, broken_markdown_links, inspect, pages_of

from docs.pages import cells_below
from mmflow_utils.params import ROOT, Params
from mmflow_utils.results.frames import manifest, save_frame
from workflow.graph import SUBJECT, names, opens_with

pytestmark = pytest.mark.browser

NOTEBOOKS = ("00_tour", "02_flow_to_last", "14_compare_models")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALARM = "<script>window.alarm = true</script>"
DOC = """\
# Linked

[the tour](../notebooks/00_tour.ipynb), [`mini.yaml`](../params/mini.yaml), [below](#a-table),
[other](other.md#far-down)

## A table

| name | what |
|---|---|
| `window` | layers |
"""


def put_executed(name: str, folder: Path, **injected) -> None:
    """Put a committed notebook where its run would have, as papermill leaves it."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if injected:
        notebook.metadata["papermill"] = {"end_time": "2026-02-03T04:05:06.789+00:00"}
        (at,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        source = "\n".join(f"{key} = {value!r}" for key, value in injected.items())
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(at + 1, cell)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def build(*arguments):
    """Build a site as `make report` does."""
    command = [sys.executable, "-m", "docs.build", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    outputs, docs = folder / "outputs", folder / "docs"
    for name in NOTEBOOKS:
        put_executed(name, outputs / "mini")
    put_executed("02_flow_to_last", outputs / "planted", model="planted", window=2, prompt=ALARM)
    made = manifest(Params(), fields=["dtype"], max_check_diff=2e-6)
    save_frame(pd.DataFrame({"layer": [0]}), outputs / "mini" / "flow_to_last.parquet", made)
    (outputs / "mini" / "effects.csv").write_text("model,mean\nmini,1.0\n")
    (outputs / "mini" / "03_image_to_question.failed.ipynb").write_text("{}")
    docs.mkdir()
    for file in (ROOT / "docs").glob("*.md"):
        shutil.copy(file, docs)
    (docs / "linked.md").write_text(DOC)
    (docs / "other.md").write_text("# Other\n\n## Far down\n\nText.\n")
    built = build("--outputs", outputs, "--docs", docs, "--no-committed")
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return outputs / "site"


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip(f"no browser on the path: install one of {', '.join(BROWSERS)}")
    with sync.sync_playwright() as playwright:
        # Without a sandbox, since root, as in a container, may not have one; the pages are our own.
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync.Error as error:
            pytest.skip(f"{path} can't be started here: {error.message.splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    with browser.new_page(viewport=DESK) as opened:
        yield opened


@pytest.fixture(scope="module")
def inspected(site, browser):
    return inspect(browser, pages_of(site))


@pytest.mark.parametrize("check", CHECKS)
def test_every_page_passes(inspected, check):
    assert inspected[check] == []


def test_a_page_with_every_fault_fails_every_check(tmp_path, browser):
    bad = tmp_path / "bad.html"
    bad.write_text(
        """<!doctype html><style>:root { color-scheme: light dark }
        @media (prefers-color-scheme: dark) { body { background: #000 } p { color: #666 } }
        @media (prefers-color-scheme: light) { body { background: #fff } p { color: #777 } }</style>
        <p>faint</p><p style="color: #000; opacity: 0.4">seen through</p>
        <img src="no.png" alt="no.png"><svg role="img"></svg><div style="width: 500px">wide</div>
        <script src="http://other.example/x.js"></script><script>console.error("broken")</script>"""
    )
    wrong = inspect(browser, [bad])
    assert [check for check in CHECKS if not wrong[check]] == []
    assert [said.split()[1] for said in wrong["contrast, light"]] == ["4.48", "2.85"]
    good = tmp_path / "good.html"
    good.write_text("<!doctype html><p style='color: #767676; background: #fff'>4.54</p>")
    assert not any(inspect(browser, [good]).values())


def test_every_link_of_the_site_leads_somewhere(site, tmp_path):
    assert broken_links(site) == []
    (tmp_path / "a.html").write_text('<p id="here"><a href="#here"></a><a href="a.html#gone"></a><a href="b.html"></a>')
    assert broken_links(tmp_path) == ["a.html -> a.html#gone", "a.html -> b.html"]


def test_every_relative_link_of_the_markdown_files_leads_somewhere(tmp_path):
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {file.name for file in files}
    assert [link for file in files for link in broken_markdown_links(file)] == []
    bad = tmp_path / "bad.md"
    bad.write_text("# A `b`, c\n[ok](#a-b-c) [gone](#a-b) [no](no.md)\n```\n[code](code.md)\n```\n")
    assert broken_markdown_links(bad) == ["bad.md -> #a-b", "bad.md -> no.md"]


def main_figure(name: str) -> bytes:
    """Take the first picture that follows a notebook's heading Figure."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    start = next(n for n, cell in enumerate(cells) if re.search(r"^## Figure", cell.source, flags=re.M))
    outputs = [output.data for cell in cells[start:] for output in cell.get("outputs", []) if "data" in output]
    return base64.b64decode(next(data["image/png"] for data in outputs if "image/png" in data))


def shown_picture(image) -> bytes:
    return Path(unquote(urlsplit(image.evaluate("image => image.src")).path)).read_bytes()


def test_the_start_page_shows_the_main_figures_and_leads_on(site, page):
    page.goto((site / "index.html").as_uri())
    assert "Where, in a vision-language model," in page.inner_text("article")
    figures = page.locator("figure").all()
    assert len(figures) == 2
    for figure, name in zip(figures, ("02_flow_to_last", "14_compare_models"), strict=True):
        assert shown_picture(figure.locator("img")) == main_figure(name)
        assert figure.locator("a:has(img)").get_attribute("href") == f"mini/{name}.html"
        title = figure.locator("figcaption a.internal").inner_text()
        said = figure.locator("figcaption").inner_text().removeprefix(f"{title}: ").replace("→", "->").split("\n")
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        printed = " ".join("".join(o.get("text", "") for o in next(cells_below(notebook, "Findings")).outputs).split())
        sentence, *items = [line for line in said if line]
        assert sentence in printed and items
        assert all(f"- {item}" in printed or re.fullmatch(r"and \d+ more", item) for item in items)
    for name in NOTEBOOKS:
        thumbnail = page.locator(f".nbsphinx-gallery a[href='mini/{name}.html'] img")
        assert shown_picture(thumbnail) == main_figure(name)
    assert "03_image_to_question" in page.inner_text(".warning")
    assert page.locator("section#for-reference a[href='docs/linked.html']").count() == 1
    assert page.locator("section#planted a[href='planted/02_flow_to_last.html']").count() == 1
    assert "Not run for planted: 12_factual_tasks, since all its tasks offer options" in page.inner_text("#planted")
    said = page.inner_text("article").split("Not run for mini: ")[1:]
    assert [text.split(",")[0] for text in said] == ["91_train_llava"]  # mini was trained from nothing
    assert "What is found about mini, planted is no finding about the paper’s models" in page.inner_text("article")
    assert page.locator("section#the-models-side-by-side a[href='mini/14_compare_models.html']").count() == 1


def test_below_each_figure_its_data_can_be_had(site):
    # 02 shows a sample's picture first, of which nothing was measured.
    for name, file, before in (("02_flow_to_last", "flow_to_last.parquet", 1), ("14_compare_models", "effects.csv", 0)):
        html = (site / "mini" / f"{name}.html").read_text(encoding="utf-8")
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        drawn = [
            cell for cell in notebook.cells if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
        ]
        assert html.count("Download the frame") == len(drawn) - before > 1
        assert html.index("Download the frame") > html.index("<h2>Figure" if before else "<h1>")
        links = [target for target in Addresses(html).targets if target.endswith(file)]
        assert len(links) == len(drawn) - before and (site / "mini" / unquote(links[0])).is_file()
    assert "Download the frame" not in (site / "mini" / "00_tour.html").read_text(encoding="utf-8")


def test_each_page_has_its_own_title_and_says_what_made_it(site, page):
    titles = set()
    for file in sorted(site.glob("*/[0-9]*.html")):
        page.goto(file.as_uri())
        titles.add(page.title())
        assert page.inner_text("h1").removesuffix("#").endswith(f" — {file.parent.name}")
        assert page.title().startswith(page.inner_text("h1").removesuffix("#"))
    assert len(titles) == len(NOTEBOOKS) + 1
    page.goto((site / "mini" / "02_flow_to_last.html").as_uri())
    assert page.inner_text(".mmflow-run p") == "Model mini · default parameters"
    folded = page.locator(".mmflow-run details table")
    assert not folded.is_visible()
    page.click(".mmflow-run summary")
    expected = (
        "Results: flow_to_last",
        "largest difference to the plain way 2.0e-06",
        "auto, float32",
        "torch 2",
    )
    text = " ".join(folded.inner_text().split())
    assert [part for part in expected if part not in text] == []


def test_what_a_run_set_is_shown_and_never_becomes_markup(site, page):
    page.goto((site / "planted" / "02_flow_to_last.html").as_uri())
    said = page.inner_text(".mmflow-run p")
    assert said.startswith("Model planted · ran on 03 February 2026 at 04:05 UTC · other than the notebook's")
    assert said.endswith("model, window, prompt")
    page.click(".mmflow-run summary")
    assert ALARM in page.inner_text(".mmflow-run details")
    assert page.evaluate("window.alarm") is None


def test_the_explorer_has_its_static_view(site, page):
    page.goto((site / "mini" / "00_tour.html").as_uri())
    view = page.locator("section#Explore .nboutput img")
    assert view.evaluate("image => image.complete && image.naturalWidth > 300")
    assert view.is_visible()
    # No package that pip can pin brings the scripts that show a widget's state, so none is left here.
    assert "vnd.jupyter.widget" not in page.content()


def test_the_dark_can_be_switched_on(site, page):
    page.emulate_media(color_scheme="light")
    page.goto((site / "index.html").as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click(".theme-switch-button")
    page.click(".theme-change-button[data-mode=dark]")
    assert page.get_attribute("html", "data-theme") == "dark"
    assert page.evaluate(ground) != light
    page.goto((site / "mini" / "00_tour.html").as_uri())
    assert page.get_attribute("html", "data-theme") == "dark"


def test_the_search_finds_words_and_only_those(site, page):
    page.goto((site / "search.html?").as_uri().replace("%3F", "?q=renormalizes"))
    page.wait_for_selector("#search-results li a")
    found = {
        link.get_attribute("href").split("?")[0].split("#")[0] for link in page.locator("#search-results li a").all()
    }
    assert {"mini/00_tour.html", "mini/02_flow_to_last.html"} <= found
    assert "mini/14_compare_models.html" not in found
    page.goto((site / "search.html?").as_uri().replace("%3F", "?q=unheardof"))
    page.get_by_text("did not match any documents").wait_for()


def test_pages_of_docs_lead_to_pages_of_the_site(site):
    linked = Addresses((site / "docs" / "linked.html").read_text(encoding="utf-8"))
    assert {"../mini/00_tour.html", "other.html#far-down", "#a-table"} <= set(linked.targets)
    assert not [target for target in linked.targets if "mini.yaml" in target]


@pytest.mark.slow
def test_what_comes_with_the_project_is_shown_first_and_said_to(tmp_path):
    put_executed("02_flow_to_last", tmp_path / "mini", model="mini")
    built = build("--outputs", tmp_path, "--docs", tmp_path / "none")
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    start = (tmp_path / "site" / "index.html").read_text("utf-8")
    shown = re.findall(r'<figure.*?href="([\w./-]+)"', start, re.S)
    first = ("02_flow_to_last", "03_image_to_question", "14_compare_models", "17_activation_patching")
    assert shown == [f"{SUBJECT}/{name}.html" for name in first] + ["mini/02_flow_to_last.html"]
    assert "These pages come with the project" in start
    for name in (name for name in names() if opens_with(name) == SUBJECT):
        page = (tmp_path / "site" / SUBJECT / f"{name}.html").read_text("utf-8")
        assert "as it comes with the project" in page
    page = (tmp_path / "site" / SUBJECT / "17_activation_patching.html").read_text("utf-8")
    assert "Download the frame" in page and "Results: patching" in page
    assert (tmp_path / "site" / SUBJECT / "patching.parquet").is_file()
