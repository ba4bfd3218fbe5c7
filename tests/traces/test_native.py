"""The trace format: exact round trips, and one sentence for everything that is wrong with a file."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request, controlnets_from, loras_from
from traces.columns import COLUMNS, MAX_ARRIVAL_S
from traces.native import read_trace, write_trace
from traces.scaling import cut_window, rate_per_s, scale_to_rate, scaled, time_scale_for_rate

SLOW_DISK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

names = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=";"), min_size=1, max_size=12).filter(
    lambda text: text.strip() != ""
)
sides = st.integers(8, 16384)
prompts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
plain_names = names.filter(lambda text: not set("@=") & set(text))
scales = st.just(1.0) | st.floats(-3, 3)
lora_uses = st.builds(LoraUse, plain_names, scales)
controlnet_uses = st.builds(ControlNetUse, plain_names, scales, st.just("") | names)


@st.composite
def traces(draw: st.DrawFn) -> list[Request]:
    arrivals = sorted(draw(st.lists(st.integers(0, MAX_ARRIVAL_S * 10**9), min_size=1, max_size=8)))
    return [
        Request(
            request_id=index,
            arrival_ns=arrival_ns,
            steps=draw(st.integers(1, 1000)),
            images=draw(st.integers(1, 64)),
            guidance_scale=draw(st.floats(0, 100)),
            base_model=draw(st.just("") | names),
            loras=tuple(draw(st.lists(lora_uses, max_size=3, unique_by=lambda use: use.file))),
            controlnets=tuple(draw(st.lists(controlnet_uses, max_size=2, unique_by=lambda use: use.name))),
            slo_ns=draw(st.none() | st.integers(1, 10**15)),
            seed=draw(st.none() | st.integers(0, 2**63 - 1)),
            height=height,
            width=width,
            prompt=draw(prompts),
            negative_prompt=draw(prompts),
        )
        for index, arrival_ns in enumerate(arrivals)
        for height, width in [draw(st.just((None, None)) | st.tuples(sides, sides))]
    ]


@SLOW_DISK
@given(traces())
def test_writing_and_reading_gives_the_same_requests(tmp_path: Path, requests: list[Request]) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, requests)
    assert read_trace(path) == requests


def written(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_only_arrival_and_steps_are_needed(tmp_path: Path) -> None:
    path = written(tmp_path, "steps,arrival_s\n30,0\n4,1.5\n4,1.5\n")
    assert read_trace(path) == [Request(0, 0, 30), Request(1, 1_500_000_000, 4), Request(2, 1_500_000_000, 4)]


def test_every_column_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path, ",".join(COLUMNS) + '\n0.25,20,4,5,512,768,sdxl,style7@0.8;ink,canny,2.5,42,"a cat, red",blurry\n'
    )
    assert read_trace(path) == [
        Request(
            request_id=0,
            arrival_ns=250_000_000,
            steps=20,
            images=4,
            guidance_scale=5.0,
            height=512,
            width=768,
            base_model="sdxl",
            loras=loras_from(("style7@0.8", "ink")),
            controlnets=controlnets_from(("canny",)),
            slo_ns=2_500_000_000,
            seed=42,
            prompt="a cat, red",
            negative_prompt="blurry",
        )
    ]


def test_arrivals_are_exact_to_the_nanosecond_over_a_year(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,steps\n31536000.123456789,1\n31536000.1234567895,1\n")
    assert [request.arrival_ns for request in read_trace(path)] == [31536000123456789, 31536000123456790]


def test_time_scale_follows_the_formula(tmp_path: Path) -> None:
    arrivals = [4704.0, 4756.25, 1989367.0]
    path = written(tmp_path, "arrival_s,steps\n" + "".join(f"{arrival!r},1\n" for arrival in arrivals))
    for scale in (0.0371, 0.5, 3.3):
        found = [request.arrival_ns for request in scaled(read_trace(path), scale)]
        assert found == [round(arrival * scale * 10**9) for arrival in arrivals]


def test_a_window_is_half_open_shifted_and_in_seconds_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,steps\n0,1\n10,2\n15.5,3\n20,4\n")
    found = scaled(cut_window(tuple(read_trace(path)), (10, 20), "here"), 2.0)
    assert found == [Request(0, 0, 2), Request(1, 11_000_000_000, 3)]


def test_gzip_and_parquet_hold_the_same_columns(tmp_path: Path) -> None:
    import pandas as pd

    text = "arrival_s,steps,height,width,loras,seed\n0,30,512,512,a;b@0.5,7\n0.1,20,,,,\n"
    plain = written(tmp_path, text)
    packed = tmp_path / "trace.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    table = tmp_path / "trace.parquet"
    pd.read_csv(plain).to_parquet(table)
    assert read_trace(packed) == read_trace(plain) == read_trace(table)
    assert read_trace(plain)[0].loras == (LoraUse("a"), LoraUse("b", 0.5))


def test_a_scale_of_one_is_no_scale(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,steps,loras,controlnets\n0,1,x@1;y@0.50,c@1.0=a.png\n1,1,x;y@.5,c=a.png\n")
    first, second = read_trace(path)
    assert (first.batch_key, first.controlnets) == (second.batch_key, second.controlnets)
    write_trace(path, [first])
    assert path.read_text().splitlines()[1] == "0,1,1,7.5,x;y@0.5,c=a.png"


def test_columns_that_nobody_uses_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, [Request(0, 1_500_000_000, 30)])
    assert path.read_text() == "arrival_s,steps,images,guidance_scale\n1.5,30,1,7.5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the trace is empty"),
        ("arrival_s,steps\n", "holds no requests"),
        ("arrival_s,images\n0,1\n", "line 1: the column 'steps' is missing"),
        (
            "arrival_s,steps,stepz\n0,1,1\n",
            "line 1: the column 'stepz' is unknown; a trace has arrival_s, steps, images",
        ),
        ("arrival_s,steps,steps\n0,1,1\n", "line 1: the column 'steps' is given twice"),
        ("arrival_s,steps\n0,1\n5,1\n4,1\n", "line 4: arrival_s is 4, before the previous request's 5"),
        ("arrival_s,steps\n-1,1\n", "line 2: arrival_s is -1; allowed are 0 to 1000000000"),
        ("arrival_s,steps\nnan,1\n", "line 2: arrival_s is 'nan'; a number from 0"),
        ("arrival_s,steps\ninf,1\n", "line 2: arrival_s is 'inf'; a number from 0"),
        ("arrival_s,steps\n1e400,1\n", "line 2: arrival_s is 1e400; a finite number from 0"),
        ("arrival_s,steps\n,1\n", "line 2: arrival_s is ''; a number"),
        ("arrival_s,steps\n0,0\n", "line 2: steps is 0; allowed are 1 to 1000"),
        ("arrival_s,steps\n0,1001\n", "line 2: steps is 1001; allowed are 1 to 1000"),
        ("arrival_s,steps\n0,\n", "line 2: steps is ''; a whole number"),
        ("arrival_s,steps\n0,30.5\n", "line 2: steps is '30.5'; a whole number"),
        ("arrival_s,steps\n0," + "9" * 5000 + "\n", "a whole number from 1 to 1000 is needed"),
        ("arrival_s,steps,images\n0,1,0\n", "line 2: images is 0; allowed are 1 to 64"),
        ("arrival_s,steps,images\n0,1,65\n", "line 2: images is 65; allowed are 1 to 64"),
        ("arrival_s,steps,guidance_scale\n0,1,-1\n", "line 2: guidance_scale is -1; allowed are 0 to 100"),
        ("arrival_s,steps,guidance_scale\n0,1,1_0\n", "line 2: guidance_scale is '1_0'; a number"),
        ("arrival_s,steps,height\n0,1,512\n", "line 2: height and width go together"),
        ("arrival_s,steps,height,width\n0,1,0,512\n", "line 2: height is 0; allowed are 8 to 16384"),
        ("arrival_s,steps,slo_s\n0,1,0\n", "line 2: slo_s is 0; more than 0 is needed"),
        ("arrival_s,steps,seed\n0,1,-1\n", "line 2: seed is -1; allowed are 0"),
        ("arrival_s,steps,loras\n0,1,a;;b\n", "line 2: loras is 'a;;b'; names are separated"),
        ("arrival_s,steps,base_model\n0,1,a\tb\n", "control characters are not allowed"),
        ("arrival_s,steps\n0,1,2\n", "line 2: the row has 3 cells and the header has 2"),
        ('arrival_s,steps\n0,"1\n', "this is not a CSV row"),
        ("arrival_s,steps\n0,\0\n", "line 2: this is not text"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    junk = tmp_path / "junk.csv"
    junk.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(InputError, match="this is not text, so it cannot be a trace"):
        read_trace(junk)
    with pytest.raises(InputError, match="there is no such trace"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="there is no such trace"):
        read_trace(tmp_path / "missing.parquet")
    with pytest.raises(InputError, match="this is a folder; a trace is needed"):
        read_trace(tmp_path)
    cut_short = tmp_path / "cut.csv.gz"
    cut_short.write_bytes(gzip.compress(b"arrival_s,steps\n" + b"0,1\n" * 5000)[:40])
    with pytest.raises(InputError, match="damaged or cut short"):
        read_trace(cut_short)


def test_foreign_and_truncated_parquet(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "trace.parquet"
    pd.DataFrame({"arrival_s": [0.0, 1.0], "steps": [30, 30]}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a complete parquet file"):
        read_trace(path)
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match="not a complete parquet file"):
        read_trace(path)
    pd.DataFrame({"city": ["Rome"]}).to_parquet(path)
    with pytest.raises(InputError, match="the column 'city' is unknown"):
        read_trace(path)
    pd.DataFrame({"arrival_s": [0.0, 2.0, 1.0], "steps": [30, 30, 30]}).to_parquet(path)
    with pytest.raises(InputError, match="row 3: arrival_s is 1, before"):
        read_trace(path)
    pd.DataFrame({"arrival_s": [0.0], "steps": [30], "loras": [["a"]]}).to_parquet(path)
    with pytest.raises(InputError, match="row 1: loras holds a list; text or a number is needed"):
        read_trace(path)


def test_bad_windows_and_scales() -> None:
    requests = (Request(0, 0, 1), Request(1, 10 * NS_PER_S, 2))
    assert cut_window(requests, None, "here") is requests
    with pytest.raises(InputError, match=r"^here: no request arrives in the window 2:5 s; the last .* at 10 s"):
        cut_window(requests, (2, 5), "here")
    for window in ((5, 5), (-1, 5), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(InputError, match="give 0 <= start < end"):
            cut_window(requests, window, "here")
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="a finite number above 0"):
            scaled(requests, scale)
    with pytest.raises(InputError, match="longer than 292 years"):
        scaled(requests, 1e9)


def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    write_trace(path, [Request(0, 0, 30)])
    before = path.read_bytes()
    for requests, message in (
        ([], "without requests"),
        ([Request(0, 5, 1), Request(1, 4, 1)], "request 1 arrives before"),
        ([Request(0, 0, 1, loras=loras_from(("a;b",)))], "must not be empty or contain a semicolon"),
        ([Request(0, 0, 1, loras=(LoraUse("a@2"),))], "a name that reads as a scale or an image"),
        ([Request(0, 0, 1, base_model="a\nb")], "control characters"),
        ([Request(0, 0, 0)], "steps is 0"),
        ([Request(0, -1, 1)], "request 0 arrives before"),
    ):
        with pytest.raises(InputError, match=message):
            write_trace(path, requests)
    with pytest.raises(InputError, match=r"ends in \.csv"):
        write_trace(tmp_path / "trace.parquet", [Request(0, 0, 1)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_scaling_to_a_rate_gives_that_rate() -> None:
    requests = [Request(index, index**2 * 10**9, 30) for index in range(50)]
    assert rate_per_s(requests) == pytest.approx(1 / 49)
    assert time_scale_for_rate(requests, 7.0) == pytest.approx(1 / 343)
    faster = scale_to_rate(requests, 7.0)
    assert rate_per_s(faster) == pytest.approx(7.0, rel=1e-6)
    with pytest.raises(InputError, match="needs two requests at different times"):
        rate_per_s(requests[:1])
    with pytest.raises(InputError, match="a finite number above 0"):
        scale_to_rate(requests, 0)
