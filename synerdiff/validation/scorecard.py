"""Predictions against machines that others measured: each study gives scores, one per published number.

Katz against diffusers on an H800: end-to-end latency predicted from published component times alone. Each prediction is
a simulated run of one request on a cluster like the one that the authors used, so that overlap, waiting and queueing
come out of the engine and not of a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from synerdiff.core import InputError
from synerdiff.experiments.h800 import SYSTEMS, h800_adapters, h800_profile
from synerdiff.experiments.layouts import STRATEGIES, Ablation, solo
from synerdiff.experiments.layouts import ablation as ablation
from synerdiff.experiments.page import Page, Part, write_page
from synerdiff.experiments.page import Printed as Printed
from synerdiff.files import read_rows, write_rows
from synerdiff.profile.adapters import write_adapters
from synerdiff.profile.folder import write_profile
from synerdiff.validation.estimator_fit import score_times as score_times
from synerdiff.validation.mlperf import runs_in as runs_in
from synerdiff.validation.mlperf import score_mlperf as score_mlperf

KATZ_FILE = "katz_h800_sdxl.csv"


@lru_cache
def predict(system: str, n_controlnets: int, n_loras: int) -> float:
    """Seconds from a request's arrival to its image: one request alone, one image, 50 guided steps.

    ``system`` is ``diffusers``, on one GPU, or ``katz``, on the GPUs that its authors gave a request: two for the
    halves of the guidance, and two for each ControlNet. Each ControlNet and LoRA is a different one.
    """
    for name, count in (("n_controlnets", n_controlnets), ("n_loras", n_loras)):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 64:
            raise InputError(f"{name} is {count!r}; a whole number from 0 to 64 is needed.")
    if system not in SYSTEMS:
        raise InputError(f"there is no system '{system}'; known are {', '.join(SYSTEMS)}.")
    return solo(system, system, STRATEGIES if system == "katz" else (), n_controlnets, n_loras).latency_s


@dataclass(frozen=True, slots=True)
class PublishedNumber:
    """One published number in seconds, and what was predicted for it."""

    study: str
    case: str
    measure: str
    published_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted_s / self.published_s - 1


def katz_scores(data: Path) -> list[PublishedNumber]:
    """Median and mean over the logged requests of every published combination of diffusers and Katz.

    A prediction is one number, so it is compared with both. InputError without the file in the folder ``data``.
    """
    scores = []
    columns = ("system", "n_controlnet", "n_lora", "n_gpus", "e2e_p50_s", "e2e_mean_s")
    for row in read_rows(data / KATZ_FILE, columns, "table of published latencies"):
        system = row.name("system")
        if system not in SYSTEMS:
            continue
        controlnets, loras = row.integer("n_controlnet", 0, 64), row.integer("n_lora", 0, 64)
        gpus = row.integer("n_gpus", 1, 1024)
        case = f"{system}, {controlnets} C, {loras} L, {gpus} GPU{'s' * (gpus != 1)}"
        for measure, column in (("median", "e2e_p50_s"), ("mean", "e2e_mean_s")):
            published_s = row.number(column, 1e-6, 1e6)
            scores.append(PublishedNumber("katz", case, measure, published_s, predict(system, controlnets, loras)))
    if not scores:
        raise InputError(f"{data / KATZ_FILE}: it has no row of {' or '.join(SYSTEMS)}.")
    return scores


TITLES = {
    "katz": "Katz and diffusers on H800, from component times",
    "times": "Steps, decodes and images beside published times",
    "mlperf": "MLPerf's SDXL server runs, from their exact arrivals",
}
STUDIES = tuple(TITLES)
FIGURES: dict[str, Sequence[str]] = {"katz": (), "times": ("times",), "mlperf": ("mlperf",)}
NOTE = (
    "One request with C ControlNets and L LoRAs, 50 guided steps, SDXL 1024x1024 on\n"
    "H800; seconds. Predicted from component times alone (estimated, not measured by\n"
    "this project): one number, beside median and mean over many requests."
)


def studies(only: Sequence[str]) -> list[str]:
    """The studies that are asked for, or all; InputError for an unknown one."""
    for name in only:
        if name not in STUDIES:
            raise InputError(f"there is no study '{name}'; known are {', '.join(STUDIES)}.")
    return list(dict.fromkeys(only)) or list(STUDIES)


def score_table(scores: Sequence[PublishedNumber]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): a line per case, its measures beside the prediction."""
    measures = dict.fromkeys(score.measure for score in scores)
    headers = ["case", "predicted", *(text for measure in measures for text in (measure, "error"))]
    rows: dict[str, list[str]] = {}
    for score in scores:
        row = rows.setdefault(score.case, [score.case, f"{score.predicted_s:.3f}"])
        row += [f"{score.published_s:.3f}", f"{score.error:+.1%}"]
    return headers, list(rows.values())


def worst_lines(scores: Sequence[PublishedNumber]) -> list[str]:
    """Per measure, the largest error and its case."""
    lines = []
    for measure in dict.fromkeys(score.measure for score in scores):
        worst = max((s for s in scores if s.measure == measure), key=lambda score: abs(score.error))
        lines.append(f"largest error of a {measure}: {worst.error:+.1%} ({worst.case})")
    return lines


def katz_lines(
    scores: Sequence[PublishedNumber], cases: Sequence[Ablation], controlnets: int, loras: int
) -> list[Printed]:
    """What the study says: the answer, every case, and one request taken apart strategy by strategy."""
    lines: list[Printed] = ["No published tables (--data or SYNERDIFF_DATA): predictions only."]
    if scores:
        lines = [f"Katz and diffusers on H800: {'; '.join(worst_lines(scores))}.", NOTE, score_table(scores)]
        lines += worst_lines(scores)
    apart = f"One request with {controlnets} ControlNets and {loras} LoRAs alone, strategy by strategy:"
    return [*lines, apart, strategy_table(cases)]


def strategy_table(cases: Sequence[Ablation]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): what each strategy is worth to one request, against the first case."""
    headers = ["strategies", "GPUs", "latency s", "speed-up", "GPU-s", "of GPU-s"]
    first = cases[0]
    return headers, [
        [
            case.name,
            str(case.gpus),
            f"{case.latency_s:.3f}",
            f"{first.latency_s / case.latency_s:.2f}x",
            f"{case.gpu_seconds:.2f}",
            f"{case.gpu_seconds / first.gpu_seconds:.2f}x",
        ]
        for case in cases
    ]


def publish(out: Path, told: Mapping[str, Sequence[Printed]]) -> Path:
    """The page of the studies that were run; what each told, a sentence that answers it first. Its path."""
    left = [name for name in STUDIES if name not in told]
    page = Page(
        kind="scorecard",
        name=out.name,
        question="How far are predictions from what others measured on machines of theirs?",
        answer=[str(lines[0]) for lines in told.values()],
        parts=[Part(title=TITLES[name], lines=lines[1:], figures=FIGURES[name]) for name, lines in told.items()],
        gaps=[
            "Nothing here was measured by this project: published numbers stand as their authors give them.",
            "What nobody published is not judged: no card, model or precision beyond the tables above.",
            *([f"Studies not run: {', '.join(left)}."] if left else []),
        ],
    )
    return write_page(out, page)


def write(out: Path, scores: Sequence[PublishedNumber], cases: Sequence[Ablation]) -> None:
    """``table.csv`` (a line per published number), ``strategies.csv``, and both estimated H800 profiles."""
    if scores:
        columns = ("study", "case", "measure", "published_s", "predicted_s", "error")
        lines = [[s.study, s.case, s.measure, s.published_s, f"{s.predicted_s:.6g}", f"{s.error:.6g}"] for s in scores]
        write_rows(out / "table.csv", columns, lines)
    named = [[case.name, case.system, case.gpus, f"{case.latency_s:.6g}", f"{case.gpu_seconds:.6g}"] for case in cases]
    write_rows(out / "strategies.csv", ("strategies", "system", "gpus", "latency_s", "gpu_seconds"), named)
    for system in SYSTEMS:
        folder = out / f"h800-sdxl-{system}-estimated"
        folder.mkdir(exist_ok=True)
        write_profile(folder, h800_profile(system))
        write_adapters(folder, h800_adapters(system))
