"""What a capacity question's answers look like: the sentence first, then tables, the figure, and what all rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf
from pathlib import Path
from typing import Any

from synerdiff.config.capacity import Question, load_question
from synerdiff.experiments.backends import make_backend
from synerdiff.experiments.capacity import FEW, Answer, Ask, Inquiry, Verdict, best_of, by_size, limits_s, request_table
from synerdiff.experiments.capacity_fleets import APART, TITLES, stage_seconds
from synerdiff.experiments.capacity_page import capacity_page
from synerdiff.experiments.emit import Choice, check_engine, emit
from synerdiff.experiments.page import Printed, provenance, write_page
from synerdiff.experiments.sources import arrivals
from synerdiff.experiments.store import versions
from synerdiff.experiments.sweep import MANIFEST, write_manifest
from synerdiff.figures.capacity import capacity_figure
from synerdiff.figures.style import save
from synerdiff.files import claim_folder, write_json
from synerdiff.profile.capacity import mix_of
from synerdiff.schema import validated

ANSWERS = "capacity.json"
FIGURE = "capacity"


def open_capacity(
    file: Path | None,
    fields: dict[str, Any],
    out: Path | None,
    jobs: int | None,
    backend: str,
    address: str | None,
    engine: str | None,
) -> Callable[[Callable[[int], None]], tuple[list[Printed], bool]]:
    """What answers a question (a file, or the fields of one), telling how many runs are done: what is to be printed,
    and whether anything keeps the SLO. InputError before any work for what does not fit."""
    question = validated(Question, fields, "capacity") if file is None else load_question(file)
    runner = make_backend(backend, question.jobs if jobs is None else jobs, address)
    folder = Path("results") / question.name if out is None else out
    study = Inquiry(question, Path() if file is None else file.parent, folder)
    check_engine(engine, [device.profile for device in study.grid.devices.values()])
    claim_folder(folder, f"capacity {question.name}")

    def run(on_progress: Callable[[int], None]) -> tuple[list[Printed], bool]:
        answers = study.solve(runner, on_progress)
        return publish(study, answers, engine), any(answer.best is not None for answer in answers)

    return run


def publish(study: Inquiry, answers: Sequence[Answer], engine: str | None = None) -> list[Printed]:
    """Write the answers, the figure and an engine's rules; what is to be printed, the answer first."""
    question, folder = study.question, study.folder
    parts: list[Printed] = [*sentences(question, answers), *_apart(study, answers), "", _table(question, answers)]
    chosen = winner(question, answers)
    if chosen is not None and chosen.best is not None and chosen.kinds is None:
        ask = Ask(chosen.best.level, chosen.best.judging, few=chosen.best.replicates <= FEW)
        sizes = by_size([request_table(run) for run in study.runs(chosen.name, chosen.entry, ask)])
        parts += ["", f"By size of request, {_who(chosen)}:", _size_table(sizes)]
    rests_on = [*_rests_on(study, answers), *([] if chosen is None else _band(study, chosen))]
    parts += ["", *rests_on]
    title = sentences(question, answers)[0]
    figure = capacity_figure(_points(question, answers), question.target, question.find, title, _setting(study))
    save(figure, folder / "figures", FIGURE)
    document: dict[str, Any] = {
        "question": question.model_dump(mode="json"),
        "answer": [*sentences(question, answers), *_apart(study, answers)],
        "answers": [_plain(question, answer) for answer in answers],
        "rests_on": rests_on,
    }
    write_json(folder / ANSWERS, document)
    write_manifest(folder, {"experiment": question.name, "complete": True})
    choices = [] if engine is None or chosen is None else _choices(study, chosen)
    known = [device.profile.name for device in study.grid.devices.values()]
    emitted = [] if engine is None else emit(engine, choices, folder, known)
    rules = "".join(f", {path.name}" for path in emitted) or ("" if engine is None else f"; no rules for {engine}")
    profiles = [answer.profile for answer in answers]
    tables = parts[len(document["answer"]) : len(parts) - len(document["rests_on"])]
    page = write_page(folder, capacity_page(question, document, tables, profiles, versions(), FIGURE))
    counts = f"{study.results.computed} runs computed now and {study.results.reused} found"
    return [*parts, f"{page}: the page; {ANSWERS}, figures/{FIGURE}.png, {MANIFEST}{rules}; {counts}"]


def _choices(study: Inquiry, answer: Answer) -> list[Choice]:
    """The batch of the fleet that is the answer, for each kind of card in it."""
    question, entry = study.question, answer.entry
    batch = entry.batch if isinstance(entry.batch, int) else entry.parameters.get("batch")
    basis = {"policy": entry.policy, "slo": question.slo, "answer": _sentence(question, answer)}
    rows = mix_of(study.requests(answer.name)).sample_rows
    return [Choice(study.grid.devices[kind].profile, batch, rows, basis) for kind in answer.kinds or [answer.name]]


# The sentence


def winner(question: Question, answers: Sequence[Answer]) -> Answer | None:
    """The one with the fewest GPUs (or the highest rate); ties by cost, then by the metric."""

    def rank(answer: Answer) -> tuple[float, float, float]:
        best = answer.best
        assert best is not None
        size = best.level.gpus if question.find == "gpus" else -(best.level.rate_per_s or 0)
        better = best.value if question.target.quantile is not None else -best.value
        return size, inf if answer.cost is None else answer.cost, better

    return best_of(answers, rank)


def sentences(question: Question, answers: Sequence[Answer]) -> list[str]:
    """The answer, and where prices make another one the cheapest, that one too."""
    target, (low, high) = question.target, question.fleet_sizes
    first = winner(question, answers)
    if first is None or first.best is None:
        tried = [(answer, answer.beyond) for answer in answers if answer.beyond is not None]
        sign = 1 if target.quantile is not None else -1
        nearest, beyond = min(tried, key=lambda own: sign * own[1].value)
        size = f"Up to {high}" if low < high else f"{high}"
        keep = f"keep {target.name} at {target.text(target.bound)}"
        has = f"{_who(nearest, beyond)} {'have' if beyond.level.gpus > 1 else 'has'} {_value(question, beyond)}"
        return [f"{size} GPUs {refusal(high, beyond)} {keep}, whatever the profile and policy: {has}."]
    lines = [_sentence(question, first)]
    cheapest = best_of(answers, lambda answer: inf if answer.cost is None else answer.cost)
    if cheapest is not None and cheapest.cost is not None and cheapest.cost < (first.cost or inf):
        lines.append(f"The cheapest: {_sentence(question, cheapest)}")
    return lines


def _sentence(question: Question, answer: Answer) -> str:
    best, beyond, target = answer.best, answer.beyond, question.target
    assert best is not None
    one = best.level.gpus == 1
    text = f"{_who(answer)} {'keeps' if one else 'keep'} {target.name} at {_value(question, best)}"
    text += f" (SLO {target.text(target.bound)})"
    if beyond is not None and question.find == "gpus":
        fewer = beyond.level.gpus
        verb = ("also does there" if fewer == 1 else "also do there") if beyond.keeps else refusal(fewer, beyond)
        text += f"; {fewer} {verb}: {_value(question, beyond)}"
    elif beyond is not None:
        text += f"; at {beyond.level.rate_per_s:g} requests/s it is {_value(question, beyond)}"
    if answer.cost is not None:
        text += f"; {answer.cost:.2f} $ per 1,000 images"
    return text + "."


def refusal(gpus: int, verdict: Verdict) -> str:
    """``do not``, or where the interval holds the bound ``are not shown to``."""
    if verdict.low is not None and not verdict.sure:
        return "is not shown to" if gpus == 1 else "are not shown to"
    return "does not" if gpus == 1 else "do not"


def _who(answer: Answer, verdict: Verdict | None = None) -> str:
    verdict = verdict or answer.best
    assert verdict is not None
    rate = "" if verdict.level.rate_per_s is None else f" at {verdict.level.rate_per_s:g} requests/s"
    fleet = f"{verdict.level.gpus} {answer.profile.name}" if answer.kinds is None else _kinds(answer)
    counts = answer.counts if verdict is answer.best and answer.counts is not None else {}
    stages = f" ({', '.join(f'{count} {stage}' for stage, count in counts.items())})" if counts else ""
    return f"{fleet} with {answer.entry.name}{stages}{rate}"


def _kinds(answer: Answer) -> str:
    """The cards of a fleet of several."""
    return " + ".join(f"{count} {name}" for name, count in (answer.kinds or {}).items())


def _apart(study: Inquiry, answers: Sequence[Answer]) -> list[str]:
    """Whether moving a stage to GPUs of its own pays: its fleet beside the one that does everything together."""
    lines = []
    together = {(a.name, a.entry.name): a for a in answers if study.layouts[a.entry.name] == "together"}
    for answer in answers:
        layout = study.layouts[answer.entry.name]
        base = together.get((answer.name, answer.entry.name.removesuffix(f", {TITLES[layout]}")))
        if layout == "together" or base is None:
            continue
        if answer.best is None or base.best is None:
            kept = "only so is the SLO kept" if answer.best else "the SLO is kept only together" if base.best else ""
            what = f"{kept or 'the SLO is not kept, and not together either'}, within the GPUs looked at"
        else:
            more = answer.best.level.gpus - base.best.level.gpus
            what = "pays" if more < 0 else "makes no difference in GPUs" if not more else "does not pay"
            what += f": {_who(answer)} against {base.best.level.gpus} together"
        lines.append(f"{TITLES[layout][0].upper()}{TITLES[layout][1:]}, {answer.profile.name}: {what}.")
        if "encode" in APART[layout]:
            batch = study.batch_of(answer.name, answer.entry)
            seconds = stage_seconds(study.requests(answer.name), answer.profile, batch)
            share = seconds["encode"] / sum(seconds.values())
            lines.append(
                f"Encoding is {share:.1%} of the GPU work of {answer.profile.name}: at most that is gained "
                "where workers no longer encode, and is not in these numbers: together, encoding holds no lane."
            )
    return list(dict.fromkeys(lines))


def _value(question: Question, verdict: Verdict) -> str:
    text = question.target.text(verdict.value)
    if verdict.low is None or verdict.high is None or inf in (verdict.value, verdict.low):
        return text
    unit = "%" if question.target.quantile is None else ""
    low, high = (f"{100 * x:.2f}" if unit else f"{x:.3g}" for x in (verdict.low, verdict.high))
    return f"{text} [{low}{unit}, {'-' if verdict.high == inf else high}{unit}]"


# Tables


def _table(question: Question, answers: Sequence[Answer]) -> Printed:
    target, by_rate = question.target, question.find == "rate"
    headers = ["profile", "policy", *(["GPUs", "requests/s"] if by_rate else ["GPUs"]), f"{target.name} [95%]"]
    headers += ["next higher rate" if by_rate else "one fewer", "at most" if by_rate else "at least"]
    priced = any(answer.cost is not None for answer in answers)
    rows = []
    for answer in answers:
        best = answer.best
        row = [answer.profile.name if answer.kinds is None else _kinds(answer), answer.entry.name]
        if by_rate:
            rate = "none" if best is None else f"{best.level.rate_per_s:g}"
            row += [str(question.fleet_sizes[0]), rate]
        else:
            row += ["none" if best is None else str(best.level.gpus)]
        row += ["-" if best is None else _value(question, best)]
        row += ["-" if answer.beyond is None else _value(question, answer.beyond)]
        row += [f"{answer.bound:.3g}" if by_rate else str(max(1, ceil(answer.bound)))]
        rows.append([*row, *(["-" if answer.cost is None else f"{answer.cost:.2f}"] if priced else [])])
    return [*headers, *(["$/1,000 images"] if priced else [])], rows


def _size_table(sizes: Sequence[tuple[int, int, int, float, float, float]]) -> Printed:
    rows = [
        [f"{low}" if low == high else f"{low} to {high}", str(count), f"{mean:.3g}", f"{p99:.3g}", f"{good:.2%}"]
        for low, high, count, mean, p99, good in sizes
    ]
    return ["images x steps", "requests", "mean s", "P99 s", "within its limit"], rows


# What it rests on


def _setting(study: Inquiry) -> str:
    own, question = study.sources, study.question
    what = own[0].name if len(own) == 1 else f"{own[0].name}, {len(own)} replicates"
    count = len(study.requests(question.profiles[0]))
    return f"{what}: {count:,} requests, {study.rate_per_s:.3g} a second; router {question.router.kind}."


def _rests_on(study: Inquiry, answers: Sequence[Answer]) -> list[str]:
    question, target = study.question, study.question.target
    lines = [f"Workload: {_setting(study)}", *arrivals(study.sources[0]).read_as]
    if target.quantile is None:
        first = limits_s(study.requests(question.profiles[0]))
        where = (
            "as --slo-seconds says" if question.slo_seconds is not None else "3 times the latency alone on its profile"
        )
        lines.append(f"A request is good within its own limit, else {where}: {first[0]:.3g} to {first[1]:.3g} s.")
    if study.judging:
        lines.append(
            f"Chosen on {len(study.choosing)} replicates, judged on {len(study.judging)} others; intervals are 95% t."
        )
    elif len(study.sources) > 1:
        lines.append(
            f"Chosen and judged on the same {len(study.sources)} replicates; four or more would keep them apart."
        )
    else:
        shown = [verdict for answer in answers for verdict in (answer.best, answer.beyond) if verdict is not None]
        needed = max((verdict.needed or 0 for verdict in shown), default=0)
        short = (
            f" It has too few for an interval: at this load {needed:,} measured requests are needed." if needed else ""
        )
        lines.append(f"One trace: intervals come from its blocks, and nothing is judged on other requests.{short}")
        if any(verdict.low is not None and verdict.value < inf == verdict.high for verdict in shown):
            lines.append(
                f"An interval without an upper end: too few requests lie beyond {target.name}; a longer trace or a "
                "lower percentile gives it one."
            )
    for profile in {answer.profile.name: answer.profile for answer in answers}.values():
        lines.append(provenance(profile))
    free = [n for n in question.profiles if study.grid.devices[n].adapters is None]
    asking = sum(bool(r.loras or r.controlnets) for r in study.requests(question.profiles[0]))
    if asking and free:
        lines.append(
            f"{asking} requests ask for LoRAs or ControlNets, which cost nothing here but batches of their own: no "
            f"adapters.csv of {', '.join(free)} says more."
        )
    lines.append("'at least' is the work divided by the profile's best speed: no policy needs fewer GPUs than that.")
    return lines


def _band(study: Inquiry, answer: Answer) -> list[str]:
    """What the answer's metric would be if its profile's times were off."""
    found = study.band(answer)
    if found is None:
        return []
    band, ends = found
    low, high = (study.question.target.text(end) for end in ends)
    return [
        f"If all times were {band.low:g} to {band.high:g} times those of {answer.profile.name} ({band.meaning}), "
        f"{study.question.target.name} would be {low} to {high} on the first replicate."
    ]


def _points(question: Question, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Every level that was tried, as judged last."""
    rows = []
    for answer in (answer for answer in answers if answer.kinds is None):
        last = {verdict.level: verdict for verdict in answer.tried}
        for level in sorted(last, key=lambda level: (level.gpus, level.rate_per_s or 0)):
            verdict = last[level]
            rows.append(
                {
                    "profile": answer.profile.name,
                    "estimated": answer.profile.estimated,
                    "policy": answer.entry.name,
                    **level._asdict(),
                    **{name: getattr(verdict, name) for name in ("value", "low", "high", "keeps")},
                    "answer": answer.best is not None and level == answer.best.level,
                }
            )
    return rows


def _plain(question: Question, answer: Answer) -> dict[str, Any]:
    """An answer in values that JSON holds."""

    def numbers(verdict: Verdict | None) -> dict[str, Any] | None:
        if verdict is None:
            return None
        known = {name: getattr(verdict, name) for name in ("value", "low", "high")}
        finite = {name: None if value in (None, inf, -inf) else value for name, value in known.items()}
        more = {name: getattr(verdict, name) for name in ("replicates", "keeps", "sure", "judging")}
        return {**verdict.level._asdict(), **finite, **more}

    return {
        "profile": answer.profile.name,
        "provenance": answer.profile.provenance,
        "policy": answer.entry.name,
        "kinds": answer.kinds,
        "stages": answer.counts,
        "best": numbers(answer.best),
        "beyond": numbers(answer.beyond),
        "bound": answer.bound,
        "cost_per_1000_images": answer.cost,
        "tried": [numbers(verdict) for verdict in answer.tried],
    }
