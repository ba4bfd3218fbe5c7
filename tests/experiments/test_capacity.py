"""Capacity: the search, the verdict, agreement with a dense grid and with theory, and what a user sees."""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from heapq import heapreplace
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from profiler.estimate import estimate_profile
from profiler.memory import card_bytes, needed_bytes
from synerdiff import cli
from synerdiff.config.capacity import Question, Target, target_of
from synerdiff.config.experiment import PolicyEntry
from synerdiff.core import InputError
from synerdiff.experiments.backends import LokyBackend
from synerdiff.experiments.capacity import (
    Answer,
    Ask,
    Inquiry,
    Level,
    Verdict,
    by_size,
    fewest,
    highest,
    request_table,
    verdict_of,
)
from synerdiff.experiments.capacity_fleets import cheaper_mixes, divided, division
from synerdiff.experiments.capacity_report import publish, refusal
from synerdiff.experiments.sources import Source, arrivals
from synerdiff.experiments.sweep import compute
from synerdiff.profile.folder import combined, write_profile
from synerdiff.profile.tables import Band, Head
from synerdiff.schema import validated
from tests.builders import affine_profile, make_profile

MS = 1_000_000
P99 = Target(0.99, 1.0)
GOODPUT = Target(None, 0.9)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a small profile ``p``."""
    write_profile(tmp_path / "p", affine_profile())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def question(**changes: Any) -> Question:
    workload = {"name": "w", "generator": "poisson", "parameters": {"mix": "fixed", "steps": 4, "rate_per_s": 25.0}}
    fields = {
        "profiles": ["p"],
        "workload": workload,
        "policies": [{"policy": "continuous-serial", "batch": 4}],
        "slo": "p99=300ms",
        "gpus": "1..8",
        "seeds": [1, 2, 3, 4, 5, 6],
        "requests": 80,
    }
    return validated(Question, fields | changes, "test")


def solved(own: Question, world: Path, out: str = "out") -> tuple[Inquiry, Answer]:
    study = Inquiry(own, world, world / out)
    return study, study.solve(LokyBackend(1))[0]


def test_a_trace_of_several_resolutions_is_counted_at_each(world: Path) -> None:
    small = replace(affine_profile(), head=Head(model="sdxl", resolutions=((512, 512),)))
    large = replace(affine_profile(30, 8, 90), head=Head(model="sdxl", resolutions=((1024, 1024),)))
    write_profile(world / "both", combined([small, large], "both"))
    rows = [f"{i * 0.04},4,{side},{side}" for i, side in enumerate([512, 1024] * 40)]
    (world / "t.csv").write_text("\n".join(["arrival_s,steps,height,width", *rows]) + "\n")
    workload = {"name": "w", "trace": "t.csv"}
    own = question(profiles=["both"], workload=workload, slo="p99=1500ms", seeds=[1])
    study, answer = solved(own, world)
    entry = study.entries[0]
    # Decodes of 30 and 90 ms keep their lane longer than steps of 32 rows do theirs, 8 rows an image:
    # 40 * 8 * (10 + 2 * 32) / 32 + 40 * 8 * (30 + 8 * 32) / 32 = 3600 ms.
    assert study.bound("both", entry) == pytest.approx((40 * 0.030 + 40 * 0.090) / (80 * 0.04))
    assert answer.best is not None


Search = Generator[Ask, Verdict, tuple[Verdict | None, Verdict | None]]


def played(search: Search, keeps: Any, sure: bool = True) -> tuple[Verdict | None, Verdict | None, list[Ask]]:
    """The search against a world in which ``keeps(ask)`` says what holds."""
    asked = []
    ask = next(search)
    while True:
        asked.append(ask)
        assert len(asked) < 200
        yes = keeps(ask)
        verdict = Verdict(ask.level, 1.0, 1.0, 1.0, 3, yes, yes, sure or not ask.few, ask.judging)
        try:
            ask = search.send(verdict)
        except StopIteration as end:
            return *end.value, asked


def _at_least(least: int, ask: Ask) -> bool:
    return ask.level.gpus >= least


@pytest.mark.parametrize("judges", [False, True])
@pytest.mark.parametrize("start", [1, 4, 13, 40])
def test_the_search_finds_the_fewest_whatever_it_starts_from(start: int, judges: bool) -> None:
    for least in range(2, 22):
        best, beyond, asked = played(fewest(2, 20, start, judges), partial(_at_least, least))
        if least > 20:
            assert best is None
            assert beyond is not None
            assert beyond.level.gpus == 20
            continue
        assert best is not None
        assert best.level.gpus == least
        assert best.judging == judges
        assert (beyond is None) == (least == 2)
        if beyond is not None:
            assert beyond.level.gpus == least - 1
            assert beyond.judging == judges
        assert len({ask.level for ask in asked}) <= 11


def test_a_fleet_that_the_judging_replicates_refuse_grows() -> None:
    best, beyond, _ = played(fewest(1, 9, 1, True), lambda ask: ask.level.gpus >= (6 if ask.judging else 4))
    assert best is not None
    assert best.level.gpus == 6
    assert beyond is not None
    assert beyond.level.gpus == 5
    assert not beyond.keeps
    best, beyond, _ = played(fewest(1, 9, 1, True), lambda ask: not ask.judging and ask.level.gpus >= 4)
    assert best is None
    assert beyond is not None
    assert beyond.level.gpus == 9


def test_more_replicates_are_asked_only_where_few_do_not_tell() -> None:
    _, _, asked = played(fewest(1, 4, 2, False), lambda ask: ask.level.gpus >= 2)
    assert all(ask.few for ask in asked)
    _, _, asked = played(fewest(1, 4, 2, False), lambda ask: ask.level.gpus >= 2, sure=False)
    assert [(ask.level.gpus, ask.few) for ask in asked] == [(2, True), (2, False), (1, True), (1, False)]


@pytest.mark.parametrize("most", [0.05, 3.0, 9.0, 200.0])
def test_the_highest_rate_is_within_its_tolerance(most: float) -> None:
    limit = 0.05 if most > 10 else most * 0.7
    limit = max(limit, most * 0.002)
    best, beyond, _ = played(highest(4, most, 0.02, True), lambda ask: (ask.level.rate_per_s or 0) <= limit)
    assert best is not None
    assert beyond is not None
    assert best.level.rate_per_s is not None
    assert beyond.level.rate_per_s is not None
    assert best.level.rate_per_s <= limit < beyond.level.rate_per_s <= 1.021 * best.level.rate_per_s
    none, _, _ = played(highest(4, most, 0.02, True), lambda ask: False)
    assert none is None


# The verdict


def table(latencies: list[float], limit: float = 1.0, done: int | None = None) -> pd.DataFrame:
    count = len(latencies)
    status = ["done"] * count if done is None else ["done"] * done + ["rejected"] * (count - done)
    return pd.DataFrame(
        {
            "request_id": range(count),
            "arrival_s": [float(i) for i in range(count)],
            "request_latency_s": latencies,
            "status": status,
            "slo_s": [limit] * count,
            "images": [1] * count,
            "steps": [4] * count,
        }
    )


def test_over_replicates_the_whole_t_interval_must_lie_inside() -> None:
    level = Level(2, None)
    close = verdict_of(P99, level, [table([value] * 20) for value in (0.90, 0.91, 0.92)], 0.5)
    assert close.keeps
    assert close.sure
    assert close.replicates == 3
    assert close.value == pytest.approx((0.90 * 0.91 * 0.92) ** (1 / 3))
    wide = verdict_of(P99, level, [table([value] * 20) for value in (0.5, 0.7, 0.99)], 0.5)
    assert wide.value < 1
    assert wide.high is not None
    assert wide.high > 1
    assert not wide.keeps
    assert not wide.sure
    over = verdict_of(P99, level, [table([value] * 20) for value in (1.50, 1.51, 1.52)], 0.5)
    assert not over.keeps
    assert over.sure


def test_goodput_is_the_share_within_the_limit_and_what_is_not_done_is_not() -> None:
    # Of 20 requests the first 2 and the last 1 are not measured.
    latencies = [9.0, 9.0] + [0.5] * 16 + [2.0] + [9.0]
    verdict = verdict_of(GOODPUT, Level(1, None), [table(latencies)] * 2, 0.5)
    assert verdict.value == pytest.approx(16 / 17)
    assert verdict.keeps
    lost = verdict_of(GOODPUT, Level(1, None), [table([0.5] * 20, done=15)] * 2, 0.5)
    assert lost.value == pytest.approx(13 / 17)
    assert not lost.keeps
    assert verdict_of(P99, Level(1, None), [table([0.5] * 20, done=15)] * 2, 0.5).value == inf


def test_one_trace_gets_an_interval_from_its_blocks_when_it_is_long_enough() -> None:
    short = verdict_of(P99, Level(1, None), [table([0.5] * 100)], 0.5)
    assert (short.low, short.high, short.keeps) == (None, None, True)
    assert short.needed == 592  # as the mean of a run at load 0.5
    latencies = [0.2 + 0.001 * (i % 97) for i in range(2000)]
    level = verdict_of(P99, Level(1, None), [table(latencies)], 0.5)
    assert level.low is not None
    assert level.high is not None
    assert level.low <= level.value <= level.high < 0.3
    assert level.keeps
    share = verdict_of(GOODPUT, Level(1, None), [table(latencies, limit=0.29)], 0.5)
    assert share.value == pytest.approx(91 / 97, abs=0.01)
    assert share.keeps
    assert verdict_of(P99, Level(1, None), [table([0.5] * 100)], 1.2).needed is None


def test_requests_are_grouped_by_size() -> None:
    frame = table([0.1] * 10 + [0.2] * 10)
    frame["steps"] = [4] * 10 + [8] * 10
    assert [(low, high, count) for low, high, count, *_ in by_size([frame])] == [(4, 4, 8), (8, 8, 9)]
    frame["steps"] = range(20)
    sizes = by_size([frame], most=3)
    assert len(sizes) == 3
    assert sum(count for _, _, count, *_ in sizes) == 17
    assert [low for low, *_ in sizes] == sorted(low for low, *_ in sizes)


@pytest.mark.parametrize("text", ["p99=0s", "p99=10", "p100=1s", "goodput=0", "goodput=101%", "latency=3s", ""])
def test_an_slo_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="p99=10s"):
        target_of(text)


def test_an_slo_is_a_percentile_or_a_share() -> None:
    assert target_of(" P99.9 = 500ms ") == Target(0.999, 0.5)
    assert target_of("goodput=99%") == Target(None, 0.99)


# Whole questions


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slo": "p99=180ms"},
        {"slo": "goodput=0.97"},
        {"slo": "p99=1100ms", "policies": [{"policy": "static", "batch": 2}]},
    ],
)
def test_it_agrees_with_a_dense_grid(world: Path, changes: dict[str, Any]) -> None:
    study, answer = solved(question(seeds=[1, 2, 3], **changes), world)
    assert answer.best is not None
    least = answer.best.level.gpus
    assert least >= answer.bound
    for gpus in range(1, least + 1):
        ask = Ask(Level(gpus, None), judging=False, few=False)
        runs = study.runs("p", study.entries[0], ask)
        for run in runs:
            compute(run)
        dense = study.verdict("p", ask, runs)
        assert dense.keeps == (gpus == least)
    assert dense == answer.best


def test_the_queue_of_several_servers_is_that_of_an_independent_simulation(world: Path) -> None:
    """M/D/c: batch 1, one step, no decode to speak of; the same arrivals, first come first served by c servers."""
    service_ms = 100
    profile = make_profile({1: service_ms * MS - 1, 2: service_ms * MS - 1}, {"whole": [1]})
    write_profile(world / "fixed", profile)
    workload = {"name": "w", "generator": "poisson", "parameters": {"mix": "fixed", "steps": 1, "rate_per_s": 25.0}}
    own = question(
        profiles=["fixed"],
        workload=workload,
        policies=[{"policy": "continuous-serial", "batch": 1}],
        router={"kind": "shared-queue", "slots": 1},
        seeds=[1, 2, 3, 4],
        slo="p99=250ms",
        requests=800,
    )
    study, answer = solved(own, world)
    assert answer.bound == pytest.approx(2.5, rel=0.1)

    def p99_s(source: Source, servers: int) -> float:
        free_ns = [0] * servers
        latencies = []
        for request in arrivals(source).requests:
            end_ns = max(request.arrival_ns, free_ns[0]) + service_ms * MS
            heapreplace(free_ns, end_ns)
            latencies.append((end_ns - request.arrival_ns) / 1e9)
        count = len(latencies)
        kept = sorted(latencies[count // 10 : count - count // 20])
        place = 0.99 * (len(kept) - 1)
        return kept[int(place)] + (kept[int(place) + 1] - kept[int(place)]) * (place - int(place))

    def mean(servers: int) -> float:
        product = 1.0
        for source in study.judging:
            product *= p99_s(source, servers)
        return float(product ** (1 / len(study.judging)))

    assert answer.best is not None
    assert answer.beyond is not None
    servers = answer.best.level.gpus
    assert answer.best.value == pytest.approx(mean(servers), abs=1e-6)
    assert answer.beyond.value == pytest.approx(mean(servers - 1), abs=1e-6)
    assert mean(servers) <= 0.25 < mean(servers - 1)


def test_finished_runs_are_found_again(world: Path) -> None:
    first, answer = solved(question(), world)
    again, same = solved(question(), world)
    assert first.results.computed > 0
    assert again.results.computed == 0
    assert (same.best, same.beyond) == (answer.best, answer.beyond)


def test_the_command_answers_first_and_leaves_with_1_when_nothing_keeps_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["trace", "generate", "poisson", "--requests", "100", "--rate", "25", "--mix", "fixed", "--out", "t.csv"])
    capsys.readouterr()
    ask = ["capacity", "--trace", "t.csv", "--profile", "p", "--policy", "static,auto", "--jobs", "1", "--price", "p=2"]
    assert cli.main([*ask, "--slo", "p99=2s", "--gpus", "1..8", "--out", "o"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " test with " in lines[0]
    assert "P99 at" in lines[0]
    assert "SLO 2 s" in lines[0]
    assert lines[0].endswith("$ per 1,000 images.")
    assert any("One trace" in line for line in lines)
    assert any("images x steps" in line for line in lines)
    stored = json.loads((world / "o" / "capacity.json").read_text())
    assert stored["answer"][0] == lines[0]
    assert {entry["policy"] for entry in stored["answers"]} == {"static", "auto"}
    assert (world / "o" / "figures" / "capacity.png").stat().st_size > 10_000
    assert cli.main([*ask, "--slo", "p99=1ms", "--gpus", "2", "--out", "none"]) == 1
    assert "2 GPUs do not keep P99 at 0.001 s" in capsys.readouterr().out
    (world / "f.csv").write_text((world / "t.csv").read_text().replace("arrival_s,steps", "when,steps"))
    ask = ["capacity", "--trace", "f.csv", "--profile", "p", "--policy", "static", "--jobs", "1", "--slo", "p99=1ms"]
    assert cli.main([*ask, "--map", "arrival=when:s", "--gpus", "1", "--out", "foreign"]) == 1
    assert "read as CSV: arrival from when (seconds), steps from steps" in capsys.readouterr().out


def test_the_highest_rate_of_a_fleet(world: Path) -> None:
    _, answer = solved(question(find="rate", gpus=2, rate_within=0.1), world)
    assert answer.best is not None
    assert answer.beyond is not None
    low, high = answer.best.level.rate_per_s, answer.beyond.level.rate_per_s
    assert low is not None
    assert high is not None
    assert low < high <= 1.11 * low
    assert low <= answer.bound
    assert not answer.beyond.keeps or not answer.beyond.judging


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slo", "p99=1s", "--profile", "p"], "--trace is missing"),
        (["--slo", "fast", "--profile", "p", "--trace", "t.csv"], "'fast' is no SLO"),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--gpus", "4..2"], "gpus is '4..2'"),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--gpus", "1..4", "--find", "rate"], "one number"),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--price", "a100=1"], "prices: 'a100' is none of"),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--price", "p=-1"], "a price above 0"),
        (
            ["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--price", "p=1,p=2"],
            "price of 'p' is given twice",
        ),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--slo-seconds", "3"], "slo_seconds is the limit"),
        (["--slo", "p99=1s", "--profile", "p", "--trace", "t.csv", "--router", "random"], "router"),
        (["q.yaml", "--slo", "p99=1s"], "holds the whole question"),
    ],
)
def test_bad_questions_are_one_sentence(
    world: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (world / "t.csv").write_text("arrival_s,steps\n0,4\n1,4\n")
    assert cli.main(["capacity", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_batches_become_lines_of_their_own_and_prices_go_by_the_first_words(world: Path) -> None:
    study = Inquiry(question(policies=[{"policy": "static", "batch": "best"}]), world, world / "o")
    assert [entry.name for entry in study.entries] == [f"static, batch {size}" for size in (1, 2, 4, 8, 16)]
    own = question(profiles=["h200-sdxl-estimated"], prices={"h200": 3, "h200-sdxl": 4.0})
    assert own.price("h200-sdxl-estimated") == 4
    assert PolicyEntry(policy="static").name == "static"


# --- memory, stages apart, mixed fleets -------------------------------------------------------------------------------


def test_a_card_whose_memory_is_too_small_is_refused_in_a_sentence(world: Path) -> None:
    write_profile(world / "small", estimate_profile("rtx3070", "sdxl", precision="fp16"))
    with pytest.raises(InputError, match=r"needs at least 9\.6 GB for steps of 16 rows.*RTX 3070 8 GB, has 8"):
        solved(question(profiles=["small"], policies=[{"policy": "static", "batch": 8}]), world)
    weights, one = needed_bytes(estimate_profile("h100", "sdxl"), 2) or (0, 0)
    assert weights == pytest.approx(2 * (2.567e9 + 0.0496e9 + 0.77e9), rel=0.05), (
        "UNet, decoder and encoders at 16 bits"
    )
    more = needed_bytes(estimate_profile("h100", "sdxl"), 4)
    assert more is not None
    assert one < more[1] < 2 * one, "the decode counts once"
    assert (card_bytes("h200"), card_bytes("mine"), needed_bytes(affine_profile(), 2)) == (141 * 10**9, None, None)


def test_gpus_are_divided_so_that_the_busiest_stage_is_least_busy() -> None:
    seconds = {"encode": 1.0, "denoise": 70.0, "decode": 29.0}
    assert divided(10, {"denoise": 70.0, "decode": 30.0}) == {"denoise": 7, "decode": 3}
    assert division(2, "together", seconds) == {"denoise": 2}
    assert division(10, "decode", seconds) == {"denoise": 7, "decode": 3}
    assert division(10, "both", seconds) == {"denoise": 6, "encode": 1, "decode": 3}
    assert division(2, "both", seconds) is None
    source = random.Random(1)
    for _ in range(50):
        own = {name: source.uniform(0.1, 9) for name in "abc"}
        counts = divided(9, own) or {}
        least = min(
            max(own["a"] / a, own["b"] / b, own["c"] / (9 - a - b)) for a in range(1, 8) for b in range(1, 9 - a)
        )
        assert max(own[name] / counts[name] for name in own) == pytest.approx(least)


def test_a_mix_is_the_cheapest_that_keeps_the_slo() -> None:
    """Cards that do 3 and 1 of 10: every mix is tried that costs less, and none other."""
    for prices in ((2.5, 1.0), (3.2, 1.0), (2.0, 1.0), (10.0, 1.0)):
        best = min(4 * prices[0], 10 * prices[1])
        search = cheaper_mixes((4, 10), prices, best)
        asked = []
        try:
            pair = next(search)
            while True:
                asked.append(pair)
                pair = search.send(3 * pair[0] + pair[1] >= 10)
        except StopIteration as end:
            found = end.value
        cost = {(a, b): a * prices[0] + b * prices[1] for a in range(1, 4) for b in range(1, 10) if 3 * a + b >= 10}
        cheaper = {pair: value for pair, value in cost.items() if value < best - 1e-9}
        assert (found is None) == (not cheaper)
        assert found is None or cost[found] == min(cheaper.values())
        assert all(a * prices[0] + b * prices[1] < best for a, b in asked)


def test_stages_apart_and_two_cards_are_answered_beside_the_rest(world: Path) -> None:
    fast, slow = affine_profile(decode_ms=60), replace(affine_profile(base_ms=25, decode_ms=90), name="q")
    write_profile(world / "p", fast)
    write_profile(world / "q", slow)
    asked = question(
        profiles=["p", "q"], gpus="1..12", slo="p99=400ms", seeds=[1, 2, 3], prices={"p": 2.5, "q": 1.0}, mixed=True,
        stages=["together", "decode"], link={"gb_per_s": 25}, requests=60,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"stages.latent_bytes is missing, and the model '' of profile 'test'"):
        solved(asked, world)
    sdxl = Head(model="sdxl", resolutions=((1024, 1024),))
    write_profile(world / "p", replace(fast, head=sdxl))
    write_profile(world / "q", replace(slow, head=sdxl))
    study = Inquiry(asked, world, world / "again")
    answers = study.solve(LokyBackend(1))
    by_name = {(answer.name, answer.entry.name): answer for answer in answers if answer.kinds is None}
    assert [entry.name for entry in study.entries] == ["continuous-serial", "continuous-serial, decoders apart"]
    apart = by_name["p", "continuous-serial, decoders apart"]
    assert apart.best is not None
    assert apart.counts is not None
    assert sum(apart.counts.values()) == apart.best.level.gpus
    own = apart.run
    assert own is not None
    assert own.spec.cluster is not None
    assert own.spec.cluster.stages is not None
    for answer in answers:
        if answer.kinds is not None:
            alone = [a.cost for a in by_name.values() if a.entry.name == answer.entry.name and a.cost is not None]
            assert answer.best is not None
            assert answer.best.keeps
            assert answer.cost is not None
            assert answer.cost < min(alone)
    text = [part for part in publish(study, answers) if isinstance(part, str)]
    assert any(line.startswith("Decoders apart, test: ") and " together" in line for line in text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": "decode"}, "stages apart need link.gb_per_s"),
        ({"stages": "vae"}, r"stages\[0\] is 'vae'"),
        ({"mixed": True}, "it needs prices of two profiles"),
        ({"stages": "both", "link": {"gb_per_s": 25}, "gpus": 2}, "needs at least 3"),
    ],
)
def test_what_no_fleet_is(world: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solved(question(**changes), world)


def test_the_answer_says_what_it_would_be_if_the_profile_were_off(world: Path) -> None:
    for times, same in ((Band(low=0.8, high=1.25, meaning="guessed"), False), (Band(low=1, high=1), True)):
        write_profile(world / "p", replace(affine_profile(), head=Head(band=times)))
        study, answer = solved(question(seeds=[1, 2, 3]), world, f"out{same}")
        assert answer.run is not None
        first = float(request_table(answer.run)["request_latency_s"].iloc[8:-4].quantile(0.99))
        found = study.band(answer)
        assert found is not None
        assert found[1] == pytest.approx((first, first)) if same else found[1][0] < 0.9 * first < first < found[1][1]
        text = [part for part in publish(study, [answer]) if isinstance(part, str)]
        assert same or any("0.8 to 1.25 times those of test (guessed), P99 would be" in line for line in text)
    write_profile(world / "p", affine_profile())
    study, answer = solved(question(seeds=[1, 2, 3]), world, "none")
    assert study.band(answer) is None


@pytest.mark.parametrize(
    ("interval", "sure", "few", "one"),
    [
        ((15.5, 22.9), False, "are not shown to", "is not shown to"),
        ((22.0, 28.0), True, "do not", "does not"),
        ((None, None), False, "do not", "does not"),
    ],
)
def test_a_fleet_is_refused_only_where_its_whole_interval_is_outside(
    interval: tuple[float | None, float | None], sure: bool, few: str, one: str
) -> None:
    verdict = Verdict(Level(12, None), 18.8, *interval, 5, holds=True, keeps=False, sure=sure)
    assert (refusal(12, verdict), refusal(1, verdict)) == (few, one)


def test_an_interval_without_an_upper_end_is_explained(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["trace", "generate", "poisson", "--requests", "200", "--rate", "1", "--mix", "gentd26", "--out", "t.csv"])
    capsys.readouterr()
    ask = ["capacity", "--trace", "t.csv", "--profile", "p", "--policy", "static", "--jobs", "1", "--gpus", "2"]
    assert cli.main([*ask, "--slo", "p99=60s", "--out", "o"]) == 1
    text = capsys.readouterr().out
    assert "2 GPUs are not shown to keep P99 at 60 s" in text
    assert "too few requests lie beyond P99; a longer trace or a lower percentile" in text
    assert cli.main([*ask, "--slo", "p50=60s", "--out", "p50"]) == 0
    assert "without an upper end" not in capsys.readouterr().out
