"""Every figure on small frames: what is drawn, what is said, and what is written."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from profiler.estimate import estimate_profile
from synerdiff.core import InputError
from synerdiff.figures.adapters import strategy_map, strategy_steps
from synerdiff.figures.comparison import best_policy_map, compare_at, gain_map, paired_ratios, verdict
from synerdiff.figures.lanes import lane_chart, step_label, where_the_time_goes
from synerdiff.figures.load import (
    against_concurrency,
    backlog_over_time,
    latency_against_load,
    latency_by_size,
    panel_rows,
    saturated,
    throughput_against_load,
    throughput_against_p99,
)
from synerdiff.figures.profile import profile_picture
from synerdiff.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    PAGE_IN,
    POLICY_STYLES,
    finish,
    marked_panels,
    new_figure,
    policy_styles,
    save,
)
from synerdiff.profile.tables import Spread

S = 1_000_000_000


def run(policy: str, load: float, seed: int, **changes: object) -> dict[str, Any]:
    row = {
        "profile": "gpu-a", "estimated": True, "policy": policy, "load": load, "seed": seed,
        "request_latency_mean_s": 2.0 * seed, "request_latency_p99_s": 5.0 * seed, "request_throughput": load,
        "image_throughput": 2 * load, "goodput": load / 2, "offered_request_rate": load, "offered_image_rate": 2 * load,
        "skip_fraction": 0.0, "queue_mean_s": 0.5, "denoise_mean_s": 1.0, "decode_wait_mean_s": 0.25,
        "decode_mean_s": 0.25,
    }  # fmt: skip
    return row | changes


@pytest.fixture
def runs() -> pd.DataFrame:
    rows = [run(p, x, s) for p in ("load-skip", "static") for x in (0.5, 1.0) for s in (1, 2)]
    rows += [run("static", 0.5, s, profile="gpu-b") for s in (1, 2)]
    return pd.DataFrame(rows)


@pytest.fixture
def work() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gpu": 0,
            "lane": ["denoise", "decode0", "denoise", "denoise"],
            "kind": ["step", "chunk", "step", "step"],
            "start_ns": [0, 1 * S, 2 * S, 8 * S],
            "end_ns": [1 * S, 2 * S, 3 * S, 9 * S],
            "rows": [4, 0, 5, 6],
            "pad_rows": [0, 0, 2, 0],
            "sample_ids": ["0.0;1.0", "0.0", "1.0", "2.0"],
            "modes": ["gg", "", "cr", "g"],
            "chunk": [-1, 3, -1, -1],
            "exclusive": [False, True, False, False],
            "forced": [False, True, False, False],
        }
    )


@pytest.fixture
def requests() -> pd.DataFrame:
    return pd.DataFrame({"arrival_s": [0.0, 1.0], "finished_s": [5.0, 3.0], "status": "done"})


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def gains(**changes: object) -> pd.DataFrame:
    """Twelve cells on two profiles, of which only one rests on an estimate; every third is a tie."""
    rows = [
        {"profile": profile, "workload": "poisson", "decode_share": 1, "decode_gpus": "0", "contention": contention,
         "measure": measure, "load": load, "policy": "auto", "gain": 1.2, "low": 1.1 if contention < 2 else 0.9,
         "high": 1.3, "estimated": profile == "gpu-a"}
        for profile in ("gpu-a", "gpu-b") for contention in (0.5, 1, 2) for measure, load in (("mean", 0.8),
        ("saturation", None))
    ]  # fmt: skip
    return pd.DataFrame([row | changes for row in rows])


@pytest.mark.parametrize("estimated", [True, False])
def test_the_mark_stands_on_the_panels_that_rest_on_an_estimate(
    estimated: bool, runs: pd.DataFrame, work: pd.DataFrame, requests: pd.DataFrame, tmp_path: Path
) -> None:
    """Of two profiles one is measured: its panels bear no mark."""
    runs["estimated"] = estimated & (runs["profile"] == "gpu-a")
    both = pd.concat([runs, runs[runs["profile"] == "gpu-a"].assign(profile="gpu-b", estimated=False)])
    profile = estimate_profile("h200", "sdxl")
    profile = profile if estimated else replace(profile, provenance="measured", name="mine")
    note = "Said by the caller."
    table = gains() if estimated else gains(estimated=False)
    figures = {
        "latency": (latency_against_load(runs, baseline="static", caption=note), 2),
        "comparison": (compare_at(both[both["load"] == 0.5], baseline="static", caption=note), 3),
        "gains": (gain_map(table, policy="auto", title="Gains", caption=note), 1),
        "best": (best_policy_map(table, [("saturation", None), ("mean", 0.8)], title="Best", caption=note), 2),
        "throughput": (throughput_against_load(runs, caption=note), 2),
        "trade-off": (throughput_against_p99(runs, caption=note), 1),
        "stages": (where_the_time_goes(runs, (0.5, 1.0), caption=note), 2),
        "lanes.v2": (lane_chart({"static": work}, (0, 4), estimated=estimated, caption=note), 1),
        "backlog": (backlog_over_time({"static": requests}, estimated=estimated, caption=note), 1),
        "profile": (profile_picture(profile, caption=note), 5),
    }
    for name, (figure, marked) in figures.items():
        assert marked_panels(figure) == (marked if estimated else 0), name
        assert ("rest on an estimated profile" in words(figure).replace("\n", " ")) is estimated, name
        assert note in words(figure).replace("\n", " "), name
        assert figure.get_size_inches()[0] == PAGE_IN
        if estimated:
            png, pdf, svg = save(figure, tmp_path / "new", name)
            assert pdf.name == f"{name}.pdf"
            assert pdf.read_bytes().startswith(b"%PDF")
            assert png.read_bytes().startswith(b"\x89PNG")
            drawn = svg.read_text()
            assert drawn.count(note) == 1, "the caption is metadata, and not drawn"
            assert "<g id=" not in drawn
    assert len(list(tmp_path.glob("new/*"))) == (30 if estimated else 0)


def test_strategies_rest_on_published_times_and_say_so() -> None:
    cases = [{"name": f"case {i}", "gpus": i, "latency_s": 4 / i, "gpu_seconds": 4.0} for i in (1, 2, 3, 4)]
    assert marked_panels(strategy_steps(cases)) == 2
    places = list(product(("inline", "service"), (4, 8), (0.0, 0.5), (0.3, 0.0)))
    ratios = [dict(zip(("strategies", "gpus", "lora_share", "load"), place, strict=True)) for place in places]
    figure = strategy_map([row | {"speedup": 1.5} for row in ratios], "inline", "")
    assert marked_panels(figure) == 2, "the baseline has no panel; two numbers of GPUs"
    assert sum(text.get_text() == "+50%" for axis in figure.axes for text in axis.texts) == 8
    some = [
        row | {"speedup": 1.5} for row in ratios if row["load"] and (row["strategies"], row["gpus"]) != ("service", 8)
    ]
    figure = strategy_map(some, "inline", "")
    assert sum(text.get_text() == "+50%" for axis in figure.axes for text in axis.texts) == 2, (
        "what was not run is blank"
    )
    assert all(text.get_text() != "all\nat once" for text in figure.axes[0].get_xticklabels())


def test_the_same_data_gives_the_same_bytes(requests: pd.DataFrame, tmp_path: Path) -> None:
    first = save(backlog_over_time({"auto": requests}, estimated=False), tmp_path / "a", "f")
    second = save(backlog_over_time({"auto": requests}, estimated=False), tmp_path / "b", "f")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_an_svg_keeps_its_numbers_and_shortens_its_lengths(tmp_path: Path) -> None:
    figure = new_figure(2)
    figure.subplots().text(0.1, 0.1, "0.12345")
    (path,) = save(finish(figure, "A title", "A caption"), tmp_path, "f", ("svg",))
    drawn = path.read_text()
    assert drawn.count("0.12345") == 1
    assert not re.search(r'="[^"]*\d\.\d{3}', drawn)
    assert "<dc:title>A title</dc:title>" in drawn


def test_a_folder_that_cannot_be_written_is_one_sentence(requests: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(backlog_over_time({"auto": requests}, estimated=False), tmp_path / "file", "f")


def test_drawing_leaves_the_callers_settings_alone(requests: pd.DataFrame) -> None:
    before = dict(matplotlib.rcParams)
    backlog_over_time({"auto": requests}, estimated=False)
    assert dict(matplotlib.rcParams) == before


def test_policies_differ_in_colour_and_marker() -> None:
    styles = list(policy_styles([*POLICY_STYLES, "mine", "other"]).values())
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == len(styles)


def test_styles_are_in_a_fixed_order_and_do_not_depend_on_what_else_is_drawn() -> None:
    styles = policy_styles(["mine", "auto", "static"])
    assert list(styles) == ["static", "auto", "mine"]
    assert styles["auto"] == POLICY_STYLES["auto"]


def test_one_policy_alone_is_drawn_without_anything_to_compare_with(runs: pd.DataFrame) -> None:
    figure = latency_against_load(runs[runs["policy"] == "static"], baseline="static")
    assert [len(axis.lines) > 1 for axis in figure.axes[:2]] == [True, False]


def test_latency_curves_are_geometric_means_with_hollow_saturated_points(runs: pd.DataFrame) -> None:
    figure = latency_against_load(runs, baseline="static")
    mean, _, lone, _ = figure.axes
    assert mean.get_yscale() == "log"
    curve = mean.lines[0]
    assert list(curve.get_xdata()) == [0.5, 1.0]  # type: ignore[arg-type]
    assert list(curve.get_ydata()) == pytest.approx([2 * sqrt(2)] * 2)  # type: ignore[arg-type]
    below, above = mean.lines[1], mean.lines[2]
    assert below.get_markerfacecolor() == POLICY_STYLES["static"].color
    assert above.get_markerfacecolor() == "white"
    assert lone.get_title(loc="left") == "gpu-b"


def test_saturation_is_load_one_or_a_shortfall(runs: pd.DataFrame) -> None:
    runs = pd.DataFrame([run("auto", 0.5, 1), run("auto", 0.9, 1, request_throughput=0.8), run("auto", 1.0, 1)])
    assert saturated(runs).tolist() == [False, True, True]


def test_a_closed_loop_is_drawn_up_to_each_policys_limit(runs: pd.DataFrame) -> None:
    closed = pd.concat([runs.assign(max_concurrency=most, image_throughput=most / 8) for most in (1.0, 8.0)])
    limit = runs.assign(max_concurrency=float("nan"), saturation_throughput=1.5)
    figure = against_concurrency(pd.concat([closed, limit]).assign(workload="w"))
    first = figure.axes[0]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["1", "8"]
    lines = [np.asarray(line.get_ydata(), float).tolist() for line in first.get_lines()]
    assert [0.125, 1.0] in lines
    assert [1.5, 1.5] in lines


def test_latency_by_size_is_paired_by_seed(runs: pd.DataFrame) -> None:
    sizes = [("64x64", 4096, 1.0), ("128x64", 8192, 3.0)]
    parts = [
        runs.assign(size=name, pixels=pixels, request_latency_mean_s=runs["request_latency_mean_s"] * factor)
        for name, pixels, factor in sizes
    ]
    frame = pd.concat(parts)
    frame.loc[frame["policy"] == "load-skip", "request_latency_mean_s"] *= 0.5
    frame = frame[(frame["profile"] == "gpu-a") & (frame["load"] == 0.5)]
    figure = latency_by_size(frame, baseline="static")
    level, change = figure.axes[:2]
    assert [tick.get_text() for tick in level.get_xticklabels()] == ["64x64", "128x64"]
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in change.get_lines()]
    assert [0.5, 0.5] in [[round(value, 9) for value in line] for line in drawn]


def test_workloads_have_panels_of_their_own(runs: pd.DataFrame) -> None:
    runs["workload"] = ["poisson", "bursts"] * (len(runs) // 2)
    assert [label for label, _ in panel_rows(runs)] == [
        "gpu-a, poisson", "gpu-a, bursts", "gpu-b, poisson", "gpu-b, bursts",
    ]  # fmt: skip


def test_the_evidence_is_paired_by_seed(runs: pd.DataFrame) -> None:
    """Seeds differ by a factor of 2 and the policies by 0.8 in each: the interval is a point at 0.8."""
    runs.loc[runs["policy"] == "load-skip", "request_latency_mean_s"] *= 0.8
    ratios = paired_ratios(runs, "static", "request_latency_mean_s")
    assert ratios["policy"].tolist() == ["load-skip", "load-skip"]
    assert ratios[["ratio", "low", "high"]].to_numpy() == pytest.approx(0.8)
    change = latency_against_load(runs, baseline="static").axes[1]
    assert [list(line.get_ydata()) for line in change.lines[:2]] == [pytest.approx([0.8, 0.8]), pytest.approx([0.8])]  # type: ignore[arg-type]


def test_only_seeds_that_both_ran_are_paired(runs: pd.DataFrame) -> None:
    runs.loc[(runs["policy"] == "load-skip") & (runs["seed"] == 2), "goodput"] = 0.0
    ratios = paired_ratios(runs, "static", "goodput")
    assert ratios["n"].tolist() == [1, 1]
    assert ratios["high"].tolist() == [float("inf")] * 2


def test_a_map_is_centred_on_one_and_draws_ties_as_ties() -> None:
    """Its colours do not follow the worst loss."""
    figure = gain_map(gains(), policy="auto", title="Gains")
    image = figure.axes[0].images[0]
    assert image.norm.vmin == -image.norm.vmax  # type: ignore[operator]
    worse = gain_map(gains(gain=0.01, low=0.009, high=0.02), policy="auto", title="Gains")
    assert worse.axes[0].images[0].norm.vmax == image.norm.vmax
    assert [patch.get_x() for patch in figure.axes[0].patches] == [1.5, 1.5], "contention 2, both rows"  # type: ignore[attr-defined]
    assert all(patch.get_hatch() for patch in figure.axes[0].patches)


def test_a_picture_has_at_most_sixty_numbers() -> None:
    many = pd.concat([gains(workload=f"w{i}") for i in range(6)])
    for figure in (
        gain_map(many, policy="auto", title="Gains"),
        best_policy_map(many, [("saturation", None), ("mean", 0.8)], title="Best"),
    ):
        assert sum(text.get_text() == "+20%" for axis in figure.axes for text in axis.texts) == 0
    few = gain_map(gains(), policy="auto", title="Gains")
    assert sum(text.get_text() == "+20%" for axis in few.axes for text in axis.texts) == 12


def test_ratios_within_half_a_percent_are_a_tie() -> None:
    assert verdict(1.001, 1.0005, 1.002, larger=False) == GREY
    assert verdict(1.004, 1.002, 1.007, larger=False) == ORANGE
    assert verdict(1.02, 1.01, 1.03, larger=True) == BLUE


def test_a_ratio_that_is_not_told_apart_is_grey(runs: pd.DataFrame) -> None:
    runs.loc[(runs["policy"] == "load-skip") & (runs["seed"] == 1), "request_latency_mean_s"] *= 1.5
    figure = compare_at(runs[runs["load"] == 0.5], baseline="static")
    assert figure.axes[0].lines[0].get_color() == GREY


def test_skip_fractions_stand_beside_latencies(runs: pd.DataFrame) -> None:
    assert "Guidance is never skipped." in words(latency_against_load(runs, baseline="static")).replace("\n", " ")
    runs.loc[runs["policy"] == "load-skip", "skip_fraction"] = [0.0, 0.0, 0.25, 0.25]
    assert "load-skip 0%-25%" in words(latency_against_load(runs, baseline="static")).replace("\n", " ")
    assert "25% skipped" in words(where_the_time_goes(runs, (1.0,)))


def test_stage_bars_add_up(runs: pd.DataFrame) -> None:
    figure = where_the_time_goes(runs, (0.5,))
    widths = [patch.get_width() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert widths == [0.5, 1.0, 0.25, 0.25] * 2
    assert "2 s" in words(figure)
    assert "not run" in words(figure), "gpu-b has no load-skip"


def test_lane_chart_draws_what_overlaps_the_window(work: pd.DataFrame) -> None:
    figure = lane_chart({"static": work}, (0, 4), estimated=False)
    axis = figure.axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [(0, 1), (1, 1), (2, 1)]  # type: ignore[attr-defined]
    assert axis.patches[1].get_hatch()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["GPU 0 denoise", "GPU 0 decode0"]
    for said in ("3", "5\n+2p\n1c\n1r", "exclusive", "forced"):
        assert said in words(figure)


def test_step_labels() -> None:
    assert step_label(8, 0, "gggg") == "8"
    assert step_label(9, 2, "ggrrr") == "9\n+2p\n3r"


def test_backlog_draws_every_policy(requests: pd.DataFrame) -> None:
    figure = backlog_over_time({"static": requests, "auto": requests.iloc[:1]}, estimated=False)
    first, second = figure.axes[1].lines
    assert list(first.get_ydata()) == [1, 2, 1, 0]  # type: ignore[arg-type]
    assert list(second.get_ydata()) == [1, 0]  # type: ignore[arg-type]
    assert "Peaks: static 2, auto 1." in words(figure)


def test_the_backlog_counts_the_traces_own_time(requests: pd.DataFrame) -> None:
    """Replayed a thousand times as fast, 5 s are 5,000 s of the trace."""
    figure = backlog_over_time({"static": requests}, estimated=False, time_scale=0.001)
    assert figure.axes[1].get_xlabel() == "time of the trace (min)"
    assert figure.axes[1].get_xlim()[1] == pytest.approx(5000 / 60)
    assert "Replayed 1,000 times as fast as the trace." in words(figure).replace("\n", " ")


def test_a_profiles_times_stand_at_their_own_points() -> None:
    profile = estimate_profile("h200", "sdxl")
    axis = profile_picture(profile).axes[0]
    for label in axis.texts:
        if isinstance(label, Annotation):
            row, value = label.xy
            assert label.get_text() == f"{value:.3g}"
            assert profile.steps[int(row)].median / 1e6 == pytest.approx(value)
            assert label.get_horizontalalignment() == "right"


def test_profile_picture_shows_held_out_points_and_gaps() -> None:
    profile = estimate_profile("h200", "sd15")
    del profile.corun[("whole", 0)][32]  # type: ignore[attr-defined]
    profile.held_out_steps = {5: Spread(15_000_000, 15_000_000, 15_000_000, 9)}
    figure = profile_picture(profile)
    steps, _, s_u, s_v, gain = figure.axes[:5]
    assert list(steps.lines[-1].get_ydata()) == [15.0]  # type: ignore[arg-type]
    assert "held out" in words(figure)
    shown = gain.images[0].get_array()
    assert shown.shape == (6, 13)  # type: ignore[union-attr]
    assert bool(shown.mask[5, 0])  # type: ignore[union-attr]
    step, chunk = profile.slowdown_ppm(1, "whole", 0)
    assert 2 ** float(shown[0, 0]) == pytest.approx(1e6 / step + 1e6 / chunk)  # type: ignore[index]
    assert 2 ** float(s_u.images[0].get_array()[0, 0]) == pytest.approx(step / 1e6)  # type: ignore[index]
    assert 2 ** float(s_v.images[0].get_array()[0, 0]) == pytest.approx(chunk / 1e6)  # type: ignore[index]


def test_profile_without_co_run_times() -> None:
    profile = replace(estimate_profile("h200", "sd15"), corun={})
    assert "no co-run slowdowns" in words(profile_picture(profile))
