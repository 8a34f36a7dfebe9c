"""The report in a real browser: every plot has its data, nothing is asked of the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigdet import report
from tests.browser import CHROMIUM, Browser
from tests.fake_runs import write_run

pytestmark = pytest.mark.usefixtures("in_process")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PLOTTED = """figures.map(figure => {
  const plot = document.getElementById("plot-" + figure.key);
  return [figure.key, plot.data.map(trace => (trace.x || []).length), plot.clientWidth,
          plot.querySelectorAll(".scatterlayer .trace, .barlayer .trace, .heatmaplayer .hm")
            .length];
})"""
"""Of each figure: its key, points of each trace, width in pixels, and traces that were drawn."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    name = "odd <name> & @TITLE@"
    runs = [
        write_run(folder / "fast-s0", [0.1, 0.2, 0.25, 0.28, 0.30], pictures=3),
        write_run(folder / "fast-s1", [0.1, 0.2, 0.25, 0.28, 0.32], "seed=1"),
        write_run(folder / name, [0.05, 0.1, 0.15], "phases.finetune.lr=0.01"),
    ]
    assert report.main([*map(str, runs), "--out", str(folder / "out")]) == 0
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_every_plot_has_its_data(page: Path, browser: Browser, width: int, dark: bool):
    browser.open(page, width, dark)
    plots = {key: (points, size, drawn) for key, points, size, drawn in browser.run(PLOTTED)}
    assert list(plots)[:2] == ["ap-bbox", "ap-segm"]
    for key in ("bbox-iou", "bbox-size", "bbox-errors", "bbox-calibration", "bbox-classes",
                "bbox-confusion", "segm-iou", "loss-total", "loss-box_delta", "lr", "grad_norm",
                "images_per_second", "time-data", "memory_gib", "gpu-hours"):  # fmt: skip
        assert key in plots
    for key, (points, size, drawn) in plots.items():
        assert points, key
        assert min(points) > 0, key
        assert drawn == len(points), key
        assert 200 < size <= width, key
    assert plots["ap-bbox"][0] == [10, 5, 3]  # band and line of two seeds, line of the other run
    # The page itself is no wider than the window; tables scroll in their own boxes.
    assert browser.run("document.documentElement.scrollWidth") <= width
    shade = browser.run("getComputedStyle(document.body).backgroundColor")
    assert shade == ("rgb(20, 23, 27)" if dark else "rgb(246, 247, 249)")
    assert browser.problems == []
    assert set(browser.requests) == {page.resolve().as_uri()}


@needs_browser
def test_axes_runs_and_pictures_are_chosen(page: Path, browser: Browser):
    browser.open(page, 1280, dark=False)
    assert browser.run('document.getElementById("plot-ap-bbox").data[1].x.at(-1)') == 50
    browser.run("""(() => { const select = document.getElementById("choice-ap-bbox");
        select.value = "images"; select.dispatchEvent(new Event("change")); })()""")
    assert browser.run('document.getElementById("plot-ap-bbox").data[1].x.at(-1)') == 200
    legend = 'document.querySelectorAll("#legend button")'
    assert browser.run(f"[...{legend}].map(button => button.textContent)") == [
        "fast",
        "odd <name> & @TITLE@",
    ]
    browser.run(f"{legend}[1].click()")
    assert browser.run('plot = document.getElementById("plot-lr"), plot.data[2].visible') is False
    text = 'document.getElementById("picture-text").textContent'
    image = 'document.getElementById("found")'
    assert browser.run(text) == (
        "1 of 3: finetune, one of the worst: image 0, 3 found, 2 missed, 1 wrong"
    )
    browser.run('document.getElementById("before").click()')
    assert browser.run(text).startswith("3 of 3")
    assert browser.run(f"{image}.decode().then(() => {image}.naturalWidth)") == 800
    narrow = browser.run(f"{image}.clientWidth")
    browser.run(f"{image}.click()")
    assert browser.run(f"{image}.clientWidth") > 1.9 * narrow
    assert browser.problems == []


def test_the_markdown_has_the_tables(page: Path):
    text = (page.parent / "report.md").read_text()
    assert "| fast | 2 | 31.0 +- 1.4 | 15.5 +- 0.7 |" in text
    assert "fast reaches odd <name> & @TITLE@'s 15.0 box AP at 0.67 of its GPU-hours." in text
    for heading in (
        "Differences",
        "Cost at equal AP",
        "Cost of each phase",
        "Options that differ",
        "Environment",
    ):
        assert f"\n## {heading}\n" in text


def test_mistakes_are_one_message(tmp_path: Path, page: Path):
    run = page.parent.parent / "fast-s0"
    with pytest.raises(ValueError, match=r"is a file\. Give a folder"):
        report.main([str(run), "--out", str(page)])
    broken = write_run(tmp_path / "broken", [0.1], pictures=1)
    (broken / "pictures/finetune-0.jpg").unlink()
    with pytest.raises(ValueError, match=r"finetune\.json: not a list of existing pictures"):
        report.main([str(broken), "--out", str(tmp_path / "out")])
    (broken / "evaluation/pretrain-10.json").write_text("{")
    with pytest.raises(ValueError, match=r"pretrain-10\.json: not readable as JSON"):
        report.main([str(broken), "--out", str(tmp_path / "out")])


def test_a_run_without_evaluation_has_its_curves(tmp_path: Path):
    run = write_run(tmp_path / "young", [0.1])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    values = json.loads(lines[0]) | {"loss/total": float("nan")}
    (run / "metrics.jsonl").write_text(json.dumps(values) + "\n")
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    html = (tmp_path / "out/report.html").read_text()
    assert 'id="plot-lr"' in html
    assert 'id="plot-loss-total"' not in html  # it was never a number
    assert "| young | 0 |" in (tmp_path / "out/report.md").read_text()
