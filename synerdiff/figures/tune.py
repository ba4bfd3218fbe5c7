"""A search over a policy's parameters: the objective over trials, and the best one on seeds that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.figure import Figure

from synerdiff.figures.style import BLUE, GREY, ORANGE, beside, finish, new_figure, panel_title, plain_log_ticks, styled
from synerdiff.results.intervals import PairedRatio


@styled
def search_figure(
    scores: Sequence[float | None],
    best: int,
    by_seed: Mapping[int, float],
    ratio: PairedRatio,
    objective: str,
    title: str,
    caption: str,
    estimated: bool,
) -> Figure:
    """Left: each trial's score (None: refused) and the best so far. Right: best / default on each judging seed."""
    figure = new_figure(2.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [(number, score) for number, score in enumerate(scores) if score is not None]
    left.plot([n for n, _ in shown], [s for _, s in shown], "o", color=GREY, markersize=3.5)
    left.step(
        [n for n, _ in shown], list(accumulate((s for _, s in shown), min)), where="post", color=BLUE, linewidth=1
    )
    left.axhline(1, color="#222222", linewidth=0.8, zorder=1)
    left.plot(best, scores[best], "*", color=ORANGE, markersize=10)
    beside(left, "best", best, scores[best] or 1, (5, 6), color=ORANGE)
    refused = [number for number, score in enumerate(scores) if score is None]
    if refused:
        left.plot(refused, [0.98] * len(refused), "x", color=GREY, transform=left.get_xaxis_transform())
    plain_log_ticks(left)
    left.set(xlabel="trial", ylabel="score (default = 1)")
    panel_title(left, "search: below 1 is better; line: best so far", estimated)
    seeds = list(by_seed)
    right.plot(range(len(seeds)), [by_seed[seed] for seed in seeds], "o", color=ORANGE)
    right.axhline(1, color="#222222", linewidth=0.8, zorder=1)
    right.axhline(ratio.ratio, color=ORANGE, linewidth=1)
    if ratio.low > 0 and ratio.high < float("inf"):
        right.axhspan(ratio.low, ratio.high, color=ORANGE, alpha=0.15, linewidth=0)
    step = -(-len(seeds) // 12)
    right.set_xticks(range(0, len(seeds), step), [str(seed) for seed in seeds[::step]])
    right.set(xlabel="judging seed", ylabel=f"{objective}, best / default")
    right.margins(x=0.1)
    panel_title(right, "judged; band: 95% of the mean", estimated)
    return finish(figure, title, caption)
