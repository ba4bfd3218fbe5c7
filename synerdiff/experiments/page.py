"""report.html: one self-contained page of a result. A command leaves its content as ``report.json`` beside the data and
the figures; the page is made of these and of one template, and made again only when one of them changed.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from synerdiff import __version__
from synerdiff.core import InputError
from synerdiff.figures.lanes import lane_chart
from synerdiff.figures.load import backlog_over_time
from synerdiff.figures.style import save
from synerdiff.files import MARK, atomic
from synerdiff.profile.tables import Profile
from synerdiff.results.folder import state, summary_lines
from synerdiff.results.metrics import STAGES
from synerdiff.results.records import read_requests, read_table
from synerdiff.schema import Section, validated

if TYPE_CHECKING:
    import pandas

PAGE, CONTENT = "report.html", "report.json"
TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_FIGURE_BYTES, MOST_FIGURES_BYTES = 700_000, 4_000_000
"""A larger SVG is shown as its PNG; what does not fit into the page any more is named."""
MOST_ROWS = 400
"""Of a table."""
_SHOWN_GPUS = 4

Printed = str | tuple[Sequence[str], Sequence[Sequence[str]]]
"""A line, or a table: its headers and rows."""
_NUMERIC = re.compile(r"[-+]?[\d.]|(-|none)?$")
_KNOWN = {
    "measured": "was measured on its device",
    "imported": "holds times that others published",
    "estimated": "is estimated from data sheets, not measured",
}


class Part(Section):
    """A section of a page: lines of Markdown and tables, and figures by name."""

    title: str
    lines: Sequence[Any] = ()
    figures: Sequence[str] = ()
    folded: bool = False
    """Its lines are shown on demand, and in print."""


class Page(Section):
    """What a page says."""

    kind: str
    """The command."""
    name: str
    question: str
    answer: Sequence[str]
    """The first sentence answers the question."""
    numbers: Sequence[Sequence[str]] = ()
    """(what, value) of the few that matter most."""
    setting: str = ""
    """In a line: what it rests on."""
    parts: Sequence[Part] = ()
    gaps: Sequence[str] = ()
    """What was not covered."""
    versions: dict[str, str] = {"synerdiff": __version__}


def provenance(profile: Profile) -> str:
    """Where a profile's times come from, as a sentence."""
    how = _KNOWN.get(profile.provenance, f"is {profile.provenance}")
    guessed = ", with estimated slowdowns" if profile.provenance == "imported" and profile.corun else ""
    return f"Profile {profile.name} {how}{guessed}."


def profile_table(profiles: Iterable[Profile]) -> Printed:
    """A row per profile: what was timed, and how."""
    headers = (
        "profile",
        "provenance",
        "device",
        "model",
        "resolutions",
        "dtype",
        "execution",
        "source, date",
        "content",
    )
    rows = []
    for profile in profiles:
        head = profile.head
        source = ", ".join(text for text in (head.source, head.date) if text)
        values = (head.device, head.model, head.pixels, head.dtype, head.execution, source)
        rows.append([profile.name, profile.provenance, *(text or "-" for text in values), profile.content_hash[:12]])
    return headers, rows


def write_page(folder: Path, page: Page) -> Path:
    """Write ``report.json`` and ``report.html``, where they are not what they would become; the page's path.

    InputError when they cannot be written, or when a page lies there that synerdiff did not make.
    """
    content = json.dumps(page.model_dump(mode="json"), indent=1) + "\n"
    figures = [figure for part in page.parts for name in part.figures if (figure := _file_of(folder, name))]
    digest = hashlib.sha256(content.encode())
    for made_of in (TEMPLATE, Path(__file__), *figures):
        digest.update(made_of.read_bytes())
    mark = f'<meta name="generator" content="synerdiff {digest.hexdigest()}">'
    path = folder / PAGE
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            start = file.read(2000)
        if mark in start:
            return path
        if '<meta name="generator" content="synerdiff ' not in start:
            raise InputError(f"{path}: synerdiff did not write this file, so it is not replaced; move it away.")
    text = _rendered(folder, page, mark)
    for name, written in ((CONTENT, content), (PAGE, text)):
        with atomic(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8")
    return path


def report_folder(folder: Path) -> Path:
    """Write the page of whatever result lies in the folder; its path. InputError where there is none."""
    if (folder / "summary.json").is_file() and (folder / "requests.parquet").is_file():
        return write_page(folder, run_page(folder))
    if (folder / CONTENT).is_file():
        try:
            content = json.loads((folder / CONTENT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / CONTENT}: it cannot be read ({error}).") from None
        return write_page(folder, validated(Page, content, str(folder / CONTENT)))
    mark = folder / MARK
    kind = mark.read_text(encoding="utf-8", errors="replace").strip()[:200] if mark.is_file() else ""
    figures = sorted({path.stem for place in (folder, folder / "figures") for path in place.glob("*.png")})
    if not kind or not figures:
        raise InputError(f"{folder}: there is no finished result of synerdiff in this folder, so nothing to report.")
    answer = [f"{len(figures)} figures. Their data lie beside them in {folder.name}."]
    question = f"What did '{kind}' find?"
    parts = [Part(title="Figures", figures=tuple(figures))]
    return write_page(
        folder, Page(kind=kind.split()[0], name=folder.name, question=question, answer=answer, parts=parts)
    )


# One run


def run_page(folder: Path) -> Page:
    """The page of a run, simulated or on hardware; draws its timeline and its backlog."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        run, lines = summary["run"], summary_lines(summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'summary.json'}: this is no run's summary ({error}).") from None
    requests, work = read_requests(folder), read_table(folder / "work.parquet", {})[0].to_pandas()
    figures = _draw_run(folder, run, requests, work)
    mark = folder / MARK
    kind = mark.read_text(encoding="utf-8").strip() if mark.is_file() else "run"
    where = f"on {run['profile']}" + (f", {len(run['cluster']['workers'])} workers" if "cluster" in run else "")
    mean, median, p99 = (summary[f"request_latency_{name}_s"] for name in ("mean", "p50", "p99"))
    answer = f"{summary['request_count']:,} of {summary['measured_request_count']:,} measured requests were served"
    answer += "." if mean is None else f", in {mean:.4g} s on average, half of them within {median:.4g} s."
    answer += f" {summary['good_fraction'] or 0:.1%} kept their SLO ({run['slo']})."
    if run["policy_load"] is not None:
        answer += f" The run is {state(run['policy_load'], summary)}."
    numbers = [
        ("mean latency", _seconds(mean)),
        ("P99" if summary["p99_claimable"] else "P99, not claimable", _seconds(p99)),
        ("requests/s", f"{summary['request_throughput'] or 0:.3g}"),
        ("within SLO", f"{summary['good_fraction'] or 0:.1%}"),
        ("guidance skipped", f"{summary['skip_fraction'] or 0:.1%}"),
    ]
    stages = [
        [stage.replace("_", " "), *(_seconds(summary[f"{stage}_{name}_s"]) for name in ("mean", "p99"))]
        for stage in STAGES
    ]
    gaps = [
        f"{text[2:6].strip()}: {text[14:]}." for text in lines if text[14:].startswith(("no interval", "cannot be"))
    ]
    if run.get("provenance") == "estimated":
        gaps.append(f"The times of {run['profile']} are estimated from data sheets, not measured; seconds are as good.")
    if summary["error_request_count"]:
        gaps.append(f"{summary['error_request_count']:,} requests were not served; latencies are of the others.")
    gaps += [
        "One run at one load: another seed, trace or load gives other numbers.",
        "What the images look like is not part of this page; synerdiff fidelity measures what skipping costs.",
    ]
    return Page(
        kind=kind,
        name=folder.name,
        question=f"How does {run['policy']} serve {run['trace'] or 'these requests'} {where}?",
        answer=[answer],
        numbers=numbers,
        parts=(
            Part(
                title="Setting and result",
                lines=[(("what", "value"), [[text[2:14].strip(), text[14:]] for text in lines])],
            ),
            Part(title="Stage times", lines=[(("stage", "mean", "P99"), stages)]),
            Part(title="Timelines", figures=figures),
        ),
        gaps=gaps,
    )


def _draw_run(folder: Path, run: dict[str, Any], requests: pandas.DataFrame, work: pandas.DataFrame) -> list[str]:
    estimated, drawn = run.get("provenance") == "estimated", []
    some = work[work["gpu"] < _SHOWN_GPUS]
    if (some["kind"] == "step").any():
        caption = f"{run['policy']} on {run['profile']}, about 20 steps from the middle of the run."
        caption += f" The first {_SHOWN_GPUS} GPUs." if len(some) < len(work) else ""
        figure = lane_chart({run["policy"]: some}, estimated=estimated, caption=caption)
        save(figure, folder / "figures", "timeline", ("png", "svg"))
        drawn.append("timeline")
    if (requests["status"] == "done").any() and run.get("max_concurrency") is None and run.get("time_scale"):
        scale = float(run["time_scale"])
        figure = backlog_over_time({run["policy"]: requests}, estimated=estimated, time_scale=scale)
        save(figure, folder / "figures", "backlog", ("png", "svg"))
        drawn.append("backlog")
    return drawn


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} s"


# From content to HTML


def _rendered(folder: Path, page: Page, mark: str) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = TEMPLATE.read_text(encoding="utf-8")
    script = source.split("<script>")[1].split("</script>")[0]
    # The page's own script and no other runs, and nothing is loaded from anywhere.
    allowed = f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
    room, parts = MOST_FIGURES_BYTES, []
    for part in page.parts:
        figures = []
        for name in part.figures:
            figure = _figure(folder, name, room)
            figures.append(figure)
            room -= len(figure["svg"]) + len(figure["png"])
        parts.append({"title": part.title, "folded": part.folded, "blocks": blocks(part.lines), "figures": figures})
    return environment.from_string(source).render(page=page, parts=parts, mark=mark, allowed=allowed)


def blocks(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """Lines of Markdown (headings, lists, tables, paragraphs) and tables, as what the template shows."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if not isinstance(line, str):
            found.append(_table(*line))
        elif line.startswith("|"):
            cells = [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
            if found and found[-1]["kind"] == "lines":
                found[-1]["rows"].append(cells)
            else:
                found.append({"kind": "lines", "rows": [cells]})
        elif line.startswith("#"):
            found.append({"kind": "heading", "text": line.lstrip("# ")})
        elif line.startswith("- ") and found and found[-1]["kind"] == "list":
            found[-1]["items"].append(line[2:])
        elif line.strip():
            kind = "list" if line.startswith("- ") else "text"
            found.append({"kind": kind, "text": line.strip().replace("**", ""), "items": [line[2:]]})
    return [_table(b["rows"][0], b["rows"][2:]) if b["kind"] == "lines" else b for b in found]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    right = [all(_NUMERIC.match(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return {
        "kind": "table",
        "columns": [*zip(headers, right or [False] * len(headers), strict=True)],
        "rows": [[str(cell) for cell in row] for row in rows[:MOST_ROWS]],
        "left_out": max(0, len(rows) - MOST_ROWS),
    }


def _file_of(folder: Path, name: str) -> Path | None:
    """The figure's SVG where it is not too large, else its PNG; None when neither is there."""
    for place in (folder / "figures", folder):
        svg, png = place / f"{name}.svg", place / f"{name}.png"
        if svg.is_file() and (svg.stat().st_size <= MOST_FIGURE_BYTES or not png.is_file()):
            return svg
        if png.is_file():
            return png
    return None


def _figure(folder: Path, name: str, room: int) -> dict[str, str]:
    """Title and caption, and the SVG, or the PNG in base64; neither where it is missing or does not fit."""
    shown = {"title": name, "caption": "", "svg": "", "png": ""}
    path = _file_of(folder, name)
    if path is None or path.stat().st_size * 4 / 3 > room:
        why = "was not drawn" if path is None else f"is left out to keep the page small: it lies in {path.name}"
        return {**shown, "title": f"Figure {name} {why}."}
    if path.suffix == ".png":
        caption = f"A picture ({path.name}), for its data have many points."
        return {**shown, "caption": caption, "png": base64.b64encode(path.read_bytes()).decode()}
    text = path.read_text(encoding="utf-8")
    for key, kind in (("title", "title"), ("caption", "description")):
        if words := re.search(f"<dc:{kind}>(.*?)</dc:{kind}>", text, re.DOTALL):
            shown[key] = html.unescape(words.group(1))
    body = re.sub(r"<(metadata|title)>.*?</\1>", "", text[text.index("<svg") :], count=2, flags=re.DOTALL)
    opening, _, rest = body.partition(">")
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return {**shown, "svg": f'{opening} role="img" aria-label="{html.escape(shown["title"])}">{rest}'}
