"""Every figure on small frames: what is drawn, what is said, and what is written."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from profiler.estimate import estimate_profile
from synerdiff.core import InputError
from synerdiff.figures.backlog import backlog_over_time
from synerdiff.figures.lane_chart import lane_chart, step_label
from synerdiff.figures.load_curves import (
    latency_against_load,
    panel_rows,
    saturated,
    throughput_against_load,
    throughput_against_p99,
)
from synerdiff.figures.profile_picture import profile_picture
from synerdiff.figures.stage_bars import where_the_time_goes
from synerdiff.figures.style import ESTIMATED, POLICY_STYLES, policy_styles, save
from synerdiff.profile.tables import Spread

S = 1_000_000_000


def run(policy: str, load: float, seed: int, **changes: object) -> dict:
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


@pytest.mark.parametrize("estimated", [True, False])
def test_every_figure_is_written_and_says_when_its_profile_is_estimated(
    estimated: bool, runs: pd.DataFrame, work: pd.DataFrame, requests: pd.DataFrame, tmp_path: Path
) -> None:
    runs["estimated"] = estimated
    profile = estimate_profile("h200", "sdxl")
    profile = profile if estimated else replace(profile, provenance="measured", name="mine")
    note = "Said by the caller."
    figures = {
        "latency": latency_against_load(runs, caption=note),
        "throughput": throughput_against_load(runs, caption=note),
        "trade-off": throughput_against_p99(runs, caption=note),
        "stages": where_the_time_goes(runs, (0.5, 1.0), caption=note),
        "lanes.v2": lane_chart(work, 0, 4, estimated=estimated, caption=note),
        "backlog": backlog_over_time({"static": requests}, estimated=estimated, caption=note),
        "profile": profile_picture(profile, caption=note),
    }
    for name, figure in figures.items():
        assert (ESTIMATED in words(figure)) is estimated, name
        assert ("(estimated)" in words(figure)) is (
            estimated and name in ("latency", "throughput", "trade-off", "stages")
        )
        assert note in words(figure).replace("\n", " "), name
        if estimated:
            svg, png = save(figure, tmp_path / "new", name)
            assert svg.name == f"{name}.svg"
            assert b"</svg>" in svg.read_bytes()
            assert png.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("new/*"))) == (14 if estimated else 0)


def test_the_same_data_gives_the_same_bytes(requests: pd.DataFrame, tmp_path: Path) -> None:
    first = save(backlog_over_time({"auto": requests}, estimated=False), tmp_path / "a", "f")
    second = save(backlog_over_time({"auto": requests}, estimated=False), tmp_path / "b", "f")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


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
    found = policy_styles(["mine", "auto", "static"])
    assert list(found) == ["static", "auto", "mine"]
    assert found["auto"] == POLICY_STYLES["auto"]


def test_latency_curves_are_geometric_means_with_hollow_saturated_points(runs: pd.DataFrame) -> None:
    figure = latency_against_load(runs)
    mean, p99, lone, _ = figure.axes
    assert mean.get_yscale() == "log"
    curve = mean.lines[0]
    assert list(curve.get_xdata()) == [0.5, 1.0]
    assert list(curve.get_ydata()) == pytest.approx([2 * sqrt(2)] * 2)
    assert list(p99.lines[0].get_ydata()) == pytest.approx([5 * sqrt(2)] * 2)
    below, above = mean.lines[1], mean.lines[2]
    assert below.get_markerfacecolor() == POLICY_STYLES["static"].color
    assert above.get_markerfacecolor() == "white"
    assert lone.get_title(loc="left") == "gpu-b (estimated)"


def test_saturation_is_load_one_or_a_shortfall(runs: pd.DataFrame) -> None:
    runs = pd.DataFrame([run("auto", 0.5, 1), run("auto", 0.9, 1, request_throughput=0.8), run("auto", 1.0, 1)])
    assert saturated(runs).tolist() == [False, True, True]


def test_workloads_have_panels_of_their_own(runs: pd.DataFrame) -> None:
    runs["workload"] = ["poisson", "bursts"] * (len(runs) // 2)
    assert [label for label, _ in panel_rows(runs)] == [
        "gpu-a, poisson (estimated)", "gpu-a, bursts (estimated)", "gpu-b, poisson (estimated)",
        "gpu-b, bursts (estimated)",
    ]  # fmt: skip


def test_skip_fractions_stand_beside_latencies(runs: pd.DataFrame) -> None:
    assert "Guidance is never skipped." in words(latency_against_load(runs)).replace("\n", " ")
    runs.loc[runs["policy"] == "load-skip", "skip_fraction"] = [0.0, 0.0, 0.25, 0.25]
    assert "load-skip 0%-25%" in words(latency_against_load(runs)).replace("\n", " ")
    assert "25% skipped" in words(where_the_time_goes(runs, (1.0,)))


def test_stage_bars_add_up(runs: pd.DataFrame) -> None:
    figure = where_the_time_goes(runs, (0.5,))
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [0.5, 1.0, 0.25, 0.25] * 2
    assert "2 s" in words(figure)
    assert "not run" in words(figure), "gpu-b has no load-skip"


def test_lane_chart_draws_what_overlaps_the_window(work: pd.DataFrame) -> None:
    figure = lane_chart(work, 0, 4, estimated=False)
    axis = figure.axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [(0, 1), (1, 1), (2, 1)]
    assert axis.patches[1].get_hatch()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["GPU 0 denoise", "GPU 0 decode0"]
    for said in ("0.0\n#3", "5\n+2p\n1c\n1r", "exclusive", "forced"):
        assert said in words(figure)


def test_step_labels() -> None:
    assert step_label(8, 0, "gggg") == "8"
    assert step_label(9, 2, "ggrrr") == "9\n+2p\n3r"


def test_backlog_draws_every_policy(requests: pd.DataFrame) -> None:
    figure = backlog_over_time({"static": requests, "auto": requests.iloc[:1]}, estimated=False)
    first, second = figure.axes[1].lines
    assert list(first.get_ydata()) == [1, 2, 1, 0]
    assert list(second.get_ydata()) == [1, 0]
    assert "Peaks: static 2, auto 1." in words(figure)


def test_profile_picture_shows_held_out_points_and_gaps() -> None:
    profile = estimate_profile("h200", "sd15")
    del profile.corun[("whole", 0)][32]  # type: ignore[attr-defined]
    profile.held_out_steps = {5: Spread(15_000_000, 15_000_000, 15_000_000, 9)}
    figure = profile_picture(profile)
    steps, _, s_u, s_v, gain = figure.axes
    assert list(steps.lines[-1].get_ydata()) == [15.0]
    assert "held out" in words(figure)
    shown = gain.images[0].get_array()
    assert shown.shape == (6, 13)
    assert bool(shown.mask[5, 0])
    step, chunk = profile.slowdown_ppm(1, "whole", 0)
    assert float(shown[0, 0]) == pytest.approx(1e6 / step + 1e6 / chunk)
    assert float(s_u.images[0].get_array()[0, 0]) == pytest.approx(step / 1e6)
    assert float(s_v.images[0].get_array()[0, 0]) == pytest.approx(chunk / 1e6)


def test_profile_without_co_run_times() -> None:
    profile = replace(estimate_profile("h200", "sd15"), corun={})
    assert "no co-run slowdowns" in words(profile_picture(profile))
