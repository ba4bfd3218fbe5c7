"""From a floor on image fidelity to a skip budget, and from a run's records to its fidelity, both by the table alone.

What the table did not measure is an error, never a guess. One assumption remains and is measured in
``docs/fidelity.md``: an image that skips only some of a rule's steps is at least as close to full guidance as one that
skips them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from synerdiff.core import CONDITIONAL, GUIDED, MODE_LETTER, NO_SKIPS, PPM, REUSE, InputError, Mode, Request, SkipBudget
from synerdiff.fidelity.table import FidelityTable, Score, find_fidelity, read_fidelity
from synerdiff.profile.tables import Profile

SKIP_MODES = (REUSE, CONDITIONAL)
Kind = tuple[int, float]
"""(steps, guidance scale) of a request."""


class UnreachedFloor(InputError):
    """No rule of the table reaches the floor."""


@dataclass(frozen=True, slots=True)
class FloorChoice:
    """The budget for a floor and, per step count, the row it came from, and fewer steps where these are cheaper."""

    budget: SkipBudget
    rules: dict[int, Score]
    """By step count; the row of the lowest SSIM when several guidance scales share the count."""
    fewer_steps: dict[int, Score]
    """By step count: full guidance in fewer steps that reaches the floor with fewer rows than the rule."""

    def lines(self) -> list[str]:
        """What was chosen, for people."""
        texts = []
        for steps, row in sorted(self.rules.items()):
            text = f"{steps} steps: {row.rule}, {row.rows_share:.0%} of the rows, SSIM {row.ssim:.3f} (n = {row.n})"
            if steps in self.fewer_steps:
                baseline = self.fewer_steps[steps]
                text += f"; {baseline.run_steps} steps with full guidance would do with {baseline.rows_share:.0%}"
            texts.append(text)
        return texts


def floor_for_requests(
    min_ssim: float,
    requests: Iterable[Request],
    profile: Profile,
    profile_folder: Path,
    table: Path | None = None,
    solver: str | None = None,
) -> FloorChoice:
    """``budget_from_floor`` for what a trace asks for on a profile, by the table given or found (``find_fidelity``)."""
    if profile.others:
        raise InputError(
            f"--min-ssim: a fidelity table is of one resolution, and the requests ask for several of profile "
            f"'{profile.name}'; give --skip-fraction, or a trace of one."
        )
    model = profile.head.model
    judged = read_fidelity(find_fidelity(table, profile_folder, model))
    kinds = {(request.steps, request.guidance_scale) for request in requests}
    return budget_from_floor(judged, min_ssim, kinds, model, profile.head.size, solver)


def budget_from_floor(
    table: FidelityTable,
    min_ssim: float,
    kinds: Collection[Kind],
    model: str,
    resolution: object,
    solver: str | None = None,
) -> FloorChoice:
    """The cheapest skipping that keeps the mean SSIM at ``min_ssim`` or above, for every kind of request served.

    A rule reaches the floor when the lower bound of its 95% interval does, at each guidance scale that is asked for;
    per step count the rule of fewest rows is taken (ties: higher SSIM). A sample has one skip mode, so the mode with
    the fewer rows in all wins. The budget names the rule's steps (``eligible_steps``): a policy can skip fewer of
    them, never others. Unguided kinds (guidance scale <= 1) need nothing. ``solver``: class name of the scheduler
    that will run, by default the model's own.

    Raises InputError for a floor out of range, a table of another model or resolution, a step count or guidance scale
    that it does not cover, and (UnreachedFloor) a floor that no rule reaches.
    """
    if not 0 < min_ssim < 1:
        raise InputError(f"the fidelity floor is {min_ssim:g}; an SSIM above 0 and below 1 is needed.")
    require_same_images(table, model, resolution)
    if solver is not None and solver != table.solver:
        # Everything below sees only the rows of the solver that runs.
        table = replace(table, head={**table.head, "solver": solver})
    guided = [(steps, scale) for steps, scale in kinds if scale > 1]
    scales = {steps: {scale for own, scale in guided if own == steps} for steps, _ in guided}
    if not scales:
        return FloorChoice(NO_SKIPS, {}, {})
    per_mode: dict[Mode, dict[int, Score]] = {mode: {} for mode in SKIP_MODES}
    for steps, wanted in sorted(scales.items()):
        _require_covered(table, steps, wanted)
        for mode, rules in per_mode.items():
            if (cheapest := _cheapest(table, steps, wanted, min_ssim, mode)) is not None:
                rules[steps] = cheapest
    complete = {mode: rules for mode, rules in per_mode.items() if len(rules) == len(scales)}
    if not complete:
        raise _no_rule(table, scales, min_ssim)
    # min() keeps the first of equals: reuse before conditional.
    mode = min(complete, key=lambda mode: sum(row.rows for row in complete[mode].values()))
    rules = complete[mode]
    cheaper = {steps: _fewer_steps(table, row, scales[steps], min_ssim) for steps, row in rules.items()}
    return FloorChoice(_budget(mode, rules), rules, {steps: row for steps, row in cheaper.items() if row is not None})


def require_same_images(table: FidelityTable, model: str, resolution: object) -> None:
    """InputError for a table of another model or resolution: its SSIM says nothing about these images."""
    if table.model != model:
        raise InputError(f"{table.path}: this fidelity table is of model '{table.model}'; the profile is of '{model}'.")
    if _sides(table.resolution) != _sides(resolution):
        raise InputError(
            f"{table.path}: this fidelity table is for {_sides(table.resolution)} pixels; the profile is for "
            f"{_sides(resolution)}."
        )


def image_ssim(table: FidelityTable, modes: str, guidance_scale: float, steps: int | None = None) -> float:
    """The SSIM that the table vouches for, of an image that took its steps in these modes (letters g, c, r).

    An image that skipped the steps of a rule, or some of them, has at least that rule's mean SSIM: the best rule that
    covers them counts. ``steps``: the step count that images are compared with, by default their own; an image of
    fewer steps and full guidance is looked up among the equal-cost baselines. 1 for an image that skipped nothing.

    Raises InputError when the table has no such rule.
    """
    reference = len(modes) if steps is None else steps
    if guidance_scale <= 1 and len(modes) == reference:
        return 1.0
    skipped = {index for index, letter in enumerate(modes) if letter != MODE_LETTER[GUIDED]}
    if not skipped and len(modes) == reference:
        return 1.0
    letters = {letter for letter in modes if letter != MODE_LETTER[GUIDED]}
    covering = [
        row.ssim
        for row in _rows(table, reference, guidance_scale)
        if row.run_steps == len(modes)
        and row.skipped_steps is not None
        and skipped <= set(row.skipped_steps)
        and (not skipped or letters == {MODE_LETTER[row.mode]})
    ]
    if not covering:
        what = f"skipping steps {', '.join(map(str, sorted(skipped)))} ({modes})" if skipped else "full guidance"
        raise InputError(
            f"{table.path}: the table has no rule that covers {what} in {len(modes)} steps against {reference} at "
            f"guidance scale {guidance_scale:g}."
        )
    return max(covering)


def run_ssim(table: FidelityTable, requests: Iterable[tuple[str, float, int]]) -> float:
    """The mean of ``image_ssim`` over a run's images, given by request as (modes, guidance scale, steps compared with).

    Of a table of requests: ``zip(frame["modes"], frame["guidance_scale"], frame["steps"])``, or the steps that were
    asked for where the run took fewer; images of one request are separated by ``;``. Requests that took no step
    (rejected) count no image. Raises InputError for a run without images.
    """
    kinds = [(modes, scale, steps) for joined, scale, steps in requests for modes in joined.split(";") if modes]
    if not kinds:
        raise InputError("the run has no images that took a step, so it has no fidelity.")
    known = {kind: image_ssim(table, *kind) for kind in dict.fromkeys(kinds)}
    return sum(known[kind] for kind in kinds) / len(kinds)


def _rows(table: FidelityTable, steps: int, guidance_scale: float) -> list[Score]:
    return [
        row
        for row in table.rows
        if row.solver == table.solver and row.steps == steps and abs(row.guidance_scale - guidance_scale) < 1e-6
    ]


def _require_covered(table: FidelityTable, steps: int, scales: Collection[float]) -> None:
    covered = sorted({(row.steps, row.guidance_scale) for row in table.rows if row.solver == table.solver})
    listing = "; ".join(
        f"{count} steps at guidance {' and '.join(f'{scale:g}' for _, scale in of_count)}"
        for count, of_count in groupby(covered, itemgetter(0))
    )
    for scale in sorted(scales):
        if not _rows(table, steps, scale):
            raise InputError(
                f"{table.path}: the table does not cover {steps} steps at guidance scale {scale:g} with "
                f"{table.solver}; it has {listing or 'nothing with that solver'}."
            )


def _common(table: FidelityTable, steps: int, scales: Collection[float]) -> list[list[Score]]:
    """Rows of one and the same rule, one per guidance scale, for every rule that all of the scales have."""
    groups: dict[object, list[Score]] = {}
    for scale in sorted(scales):
        for row in _rows(table, steps, scale):
            groups.setdefault((row.mode, row.run_steps, row.skipped_steps), []).append(row)
    return [rows for rows in groups.values() if len({row.guidance_scale for row in rows}) == len(scales)]


def _lowest(rows: Sequence[Score]) -> Score:
    return min(rows, key=lambda row: row.ssim_low)


def _cheapest(table: FidelityTable, steps: int, scales: Collection[float], min_ssim: float, mode: Mode) -> Score | None:
    lowest = [_lowest(rows) for rows in _common(table, steps, scales) if rows[0].mode == mode and rows[0].skipped_steps]
    fitting = [row for row in lowest if row.ssim_low >= min_ssim]
    return min(fitting, key=lambda row: (row.rows, -row.ssim), default=None)


def _fewer_steps(table: FidelityTable, rule: Score, scales: Collection[float], min_ssim: float) -> Score | None:
    fitting = [
        rows[0]
        for rows in _common(table, rule.steps, scales)
        if rows[0].mode == GUIDED and rows[0].rows < rule.rows and _lowest(rows).ssim_low >= min_ssim
    ]
    return min(fitting, key=lambda row: row.rows, default=None)


def _budget(mode: Mode, rules: dict[int, Score]) -> SkipBudget:
    eligible = {steps: frozenset(row.skipped_steps or ()) for steps, row in rules.items()}
    # The least fraction whose rounded-down share still admits every eligible step.
    fraction_ppm = max(-(-len(skips) * PPM // steps) for steps, skips in eligible.items())
    warmup_steps = min(min(skips) for skips in eligible.values())
    # Steps in a row have the same distance to their place among the skipped ones.
    runs = [Counter(step - place for place, step in enumerate(sorted(skips))) for skips in eligible.values()]
    return SkipBudget(fraction_ppm, warmup_steps, max(max(run.values()) for run in runs), mode, eligible)


def _no_rule(table: FidelityTable, scales: dict[int, set[float]], min_ssim: float) -> UnreachedFloor:
    for steps, wanted in sorted(scales.items()):
        if any(_cheapest(table, steps, wanted, min_ssim, mode) for mode in SKIP_MODES):
            continue
        common = [
            rows for rows in _common(table, steps, wanted) if rows[0].mode in SKIP_MODES and rows[0].skipped_steps
        ]
        best = max((_lowest(rows).ssim_low for rows in common), default=None)
        reached = "the table has no rule for all of its guidance scales"
        reached = reached if best is None else f"the best reaches {best:.4f}"
        return UnreachedFloor(
            f"{table.path}: no rule for {steps} steps reaches an SSIM of {min_ssim:g} (lower bound of its mean); "
            f"{reached}."
        )
    return UnreachedFloor(
        f"{table.path}: no single skip mode reaches an SSIM of {min_ssim:g} at every step count asked for."
    )


def _sides(resolution: object) -> str:
    if resolution is None:
        return "unknown"
    return "x".join(map(str, resolution)) if isinstance(resolution, list | tuple) else f"{resolution}x{resolution}"
