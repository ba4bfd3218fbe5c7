"""report.html: what stands in it, that it is one file, and that a browser shows it well."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synerdiff.cli import main
from synerdiff.core import InputError
from synerdiff.experiments import page as pages
from synerdiff.experiments.page import Page, Part, blocks, report_folder, write_page
from synerdiff.figures.load import frontier
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.results.records import read_table
from synerdiff.validation.report import page_of, report_text

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EXPERIMENT = """
name: small
profiles: [digits-cpu, h200-sdxl-estimated]
requests: 40
seeds: [1, 2]
loads: [0.5, 0.8]
skip_budget: {fraction: 0.3}
figures: [tradeoff]
workloads: [{name: poisson, generator: poisson}]
policies:
  - {policy: continuous-serial}
  - {policy: skip-cfg, label: "<b>skip & run</b>"}
  - {policy: continuous-serial, label: fewer steps, steps_scale: 0.8}
"""


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "e.yaml").write_text(EXPERIMENT)
    assert main(["sweep", str(folder / "e.yaml"), "--out", str(folder / "out"), "--jobs", "1"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "t.csv").write_text("arrival_s,steps\n" + "".join(f"{i},8\n" for i in range(40)))
    run = ["--profile", "h200-sdxl-estimated", "--policy", "continuous-parallel", "--out", str(folder / "out")]
    assert main(["simulate", "--trace", str(folder / "t.csv"), *run]) == 0
    assert main(["report", str(folder / "out")]) == 0
    return folder / "out"


def small(**changes: Any) -> Page:
    given = {"kind": "sweep", "name": "n", "question": "Which?", "answer": ["This one."]}
    return Page(**{**given, **changes})


def test_the_page_of_a_sweep_says_what_was_asked_found_and_not_covered(sweep_folder: Path) -> None:
    text = (sweep_folder / "report.html").read_text()
    content = json.loads((sweep_folder / "report.json").read_text())
    assert content["question"].startswith("Which of 3 policies is fastest on digits-cpu and h200-sdxl-estimated")
    assert "the lowest mean latency is that of" in content["answer"][0]
    assert any("images change" in sentence for sentence in content["answer"])
    titles = [part["title"] for part in content["parts"]]
    assert titles == ["The trade-off", "Paired ratios", "Stage times", "All results", "Setting"]
    assert any("estimated from data sheets" in gap for gap in content["gaps"])
    assert any(gap.startswith("Loads tried: 0.5, 0.8.") for gap in content["gaps"])
    assert "&lt;b&gt;skip &amp; run&lt;/b&gt;" in text
    assert "<b>skip" not in text, "names of a user are text, in tables, sentences and figures"
    assert text.count("<svg") == sum(len(part["figures"]) for part in content["parts"]) == 1
    assert text.count('role="img" aria-label="') == text.count("<svg")
    assert "http" not in text.replace('xmlns="http', "").replace('xlink="http', "").replace('http-equiv="', "")
    assert text.count("<h1>") == 1


def test_the_table_of_ratios_is_the_paired_ratio_of_the_runs(sweep_folder: Path) -> None:
    content = json.loads((sweep_folder / "report.json").read_text())
    _, (headers, rows) = next(part["lines"] for part in content["parts"] if part["title"] == "Paired ratios")
    cell = dict(zip(headers, next(row for row in rows if row[1] == "fewer steps" and "digits" in row[0]), strict=True))
    found = float(cell["Mean latency, ratio [95%]"].split()[0])
    table = read_table(sweep_folder / "runs.parquet", {})[0].to_pandas()
    runs = table[(table["profile"] == "digits-cpu") & (table["load"] == 0.8)].set_index(["policy", "seed"])
    latency = runs["request_latency_mean_s"]
    ratios = latency["fewer steps"] / latency["continuous-serial"]
    assert found == pytest.approx(float(ratios.prod() ** (1 / len(ratios))), abs=6e-4)
    assert found < 1


def test_a_page_is_written_again_only_when_its_content_or_a_figure_changed(tmp_path: Path) -> None:
    path = write_page(tmp_path, small(parts=[Part(title="P", figures=["f"])]))
    first = path.stat().st_mtime_ns
    assert "was not drawn" in path.read_text()
    write_page(tmp_path, small(parts=[Part(title="P", figures=["f"])]))
    assert path.stat().st_mtime_ns == first
    (tmp_path / "f.svg").write_text('<?xml version="1.0"?><svg width="1pt" viewBox="0 0 1 1"><title>T</title></svg>')
    write_page(tmp_path, small(parts=[Part(title="P", figures=["f"])]))
    assert '<svg viewBox="0 0 1 1" role="img" aria-label="f"></svg>' in path.read_text()
    report_folder(tmp_path)
    write_page(tmp_path, small(answer=["Another."]))
    assert "Another." in path.read_text()


def test_a_page_that_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match=r"report.html: synerdiff did not write this file"):
        write_page(tmp_path, small())
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"


def test_a_page_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.svg").write_text("<svg>" + " " * 3000 + "</svg>")
    (tmp_path / "f.png").write_bytes(b"\x89PNG" + bytes(100))
    monkeypatch.setattr(pages, "MOST_FIGURE_BYTES", 2000)
    rows = [[str(i)] for i in range(pages.MOST_ROWS + 5)]
    part = Part(title="P", lines=[(["n"], rows)], figures=["f"])
    text = write_page(tmp_path, small(parts=[part])).read_text()
    assert "data:image/png;base64" in text
    assert "5 further rows are left out" in text
    monkeypatch.setattr(pages, "MOST_FIGURES_BYTES", 50)
    text = write_page(tmp_path, small(parts=[part], answer=["Again."])).read_text()
    assert "left out to keep the page small" in text


def test_lines_of_markdown_become_headings_lists_and_tables() -> None:
    found = blocks(["### Title", "", "| a | *b* |", "|---|---|", "| x | 1.5 |", "- one", "- two", "plain **bold**"])
    assert [block["kind"] for block in found] == ["heading", "table", "list", "text"]
    assert found[1]["columns"] == [("a", False), ("b", True)]
    assert found[1]["rows"] == [["x", "1.5"]]
    assert found[2]["items"] == ["one", "two"]
    assert found[3]["text"] == "plain bold"


def test_the_frontier_leaves_out_what_serves_hardly_more() -> None:
    # (3, 9) is worse than (4, 8) in both; (4.02, 12) serves 0.5% more at half as much again.
    assert frontier([(1, 2), (2, 5), (3, 9), (4, 8), (4.02, 12), (0.9, 2)]) == [(1, 2), (2, 5), (4, 8)]
    assert frontier([]) == []


def test_a_run_is_reported_with_what_it_cannot_claim(run_folder: Path) -> None:
    content = json.loads((run_folder / "report.json").read_text())
    assert content["question"] == "How does continuous-parallel serve t.csv on h200-sdxl-estimated?"
    assert content["answer"][0].startswith("34 of 34 measured requests were served, in ")
    assert any(gap.startswith("P99: cannot be claimed from 34 of 34") for gap in content["gaps"])
    assert [part["figures"] for part in content["parts"]] == [[], [], ["timeline", "backlog"]]
    run = ["--profile", "h200-sdxl-estimated", "--policy", "static", "--out", str(run_folder)]
    page = run_folder / "report.html"
    before = page.read_text()
    assert main(["simulate", "--trace", str(run_folder.parent / "t.csv"), *run]) == 0
    assert not page.exists(), "an earlier run's page does not stay beside another run"
    assert main(["report", str(run_folder)]) == 0
    assert "How does static serve" in page.read_text()
    assert page.read_text() != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no finished result of synerdiff in this folder"),
        ("{", "it cannot be read"),
        ('{"kind": 3}', "kind is 3; it must be a valid string"),
    ],
)
def test_what_is_no_result_is_one_sentence(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_page_of_a_validation_holds_its_report_under_the_same_headings() -> None:
    data = json.loads((ROOT / "docs/validation-digits-cpu/validation.json").read_text())
    text = report_text(data)
    page = page_of(data, text, load_profile(find_profile("digits-cpu")))
    assert page.answer[0].startswith("Of 110 checks 79 passed, 31 unclear, 0 failed: stage times within 15%")
    titles = [part.title for part in page.parts]
    assert titles == ["Predicted against measured", *re.findall("^## (.*)$", text, re.MULTILINE), "Setting"]
    assert any(block["kind"] == "table" for block in blocks(page.parts[1].lines))
    assert "31 checks are unclear: their intervals are too wide for the tolerance." in page.gaps


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["sweep", "run"])
def test_a_browser_shows_it_on_phone_and_desktop(
    browser: Any, request: pytest.FixtureRequest, kind: str, scheme: str
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    shown = context.new_page()
    told: list[str] = []
    shown.on("console", lambda message: told.append(message.text))
    shown.on("pageerror", lambda error: told.append(str(error)))
    shown.on("request", lambda one: told.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
    shown.goto((folder / "report.html").as_uri())
    for width in (1280, 390):
        shown.set_viewport_size({"width": width, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}[scheme]
    assert shown.evaluate("[...document.querySelectorAll('svg')].every(one => one.getBoundingClientRect().width > 300)")
    assert told == []
    context.close()


def test_a_table_is_sorted_by_key_and_scripts_of_others_do_not_run(browser: Any, tmp_path: Path) -> None:
    rows = [["b", "10 s"], ["a", "9.5 s"], ["c", "-"], ["d", "1,200 s"]]
    part = Part(title="P", lines=[(["name", "time"], rows)], figures=["f"])
    (tmp_path / "f.svg").write_text("<svg viewBox='0 0 9 9'><script>document.title = 'taken'</script></svg>")
    shown = browser.new_page()
    shown.goto(write_page(tmp_path, small(parts=[part])).as_uri())
    assert shown.title() == "n: Which?"
    button = shown.locator("th button").nth(1)
    button.focus()
    read = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent).join('')"
    orders = []
    for _ in range(2):
        shown.keyboard.press("Enter")
        orders.append((shown.evaluate(read), shown.locator("th").nth(1).get_attribute("aria-sort")))
    assert orders == [("abdc", "ascending"), ("dbac", "descending")]
    shown.close()
