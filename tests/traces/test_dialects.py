"""Foreign traces: every dialect from a small file of its shape; what could be read in two ways gets one sentence."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synerdiff.core import NS_PER_S, InputError, Request
from traces.dialects import Reading, convert_trace, load_trace
from traces.native import Conversion, read_trace, write_trace


def converted(tmp_path: Path, text: str, mapping: str = "", sort: bool = False, name: str = "trace.txt") -> Conversion:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return convert_trace(path, Reading(mapping, sort))


def arrivals_s(conversion: Conversion) -> list[float]:
    return [request.arrival_ns / NS_PER_S for request in conversion.requests]


def test_diffusers_names_bad_rows_late_start_and_duplicates(tmp_path: Path) -> None:
    rows = [
        "timestamp,prompt,num_inference_steps,num_images_per_prompt,guidance_scale,height,width,seed,user",
        '120.5,"a cat, red",20,2,5,512,768,7,ann',
        '120.5,"a cat, red",20,2,5,512,768,7,ann',
        "121.25,a dog,20.0,,,,,-1,bob",
        ",late,20,1,5,512,768,7,x",
        "122,steps,many,1,5,512,768,7,x",
        "122,side,20,1,5,512,,7,x",
        "123,images,20,65,5,512,768,7,x",
        "124,guidance,20,1,-3,512,768,7,x",
    ]
    conversion = converted(tmp_path, "\n".join(rows))
    first, again, second = conversion.requests
    assert first == Request(0, 0, 20, 2, 5.0, 512, 768, seed=7, prompt="a cat, red")
    assert again == replace(first, request_id=1)
    assert second == Request(2, 750_000_000, 20, prompt="a dog")
    assert conversion.rows == 8
    assert sum(conversion.dropped.values()) == 5
    said = "\n".join(conversion.lines())
    for line in (
        "arrival from timestamp (seconds)",
        "columns not read: user",
        "shifted: the first request, at 120.5 s, is now at 0",
        "1 dropped: the arrival is missing (first: line 5)",
        "1 dropped: steps is not a whole number from 1 to 1000 (first: line 6)",
        "1 dropped: height and width go together; one of them is empty (first: line 7)",
        "1 equal another request of their instant, kept",
        "1 have a seed below 0, read as none",
    ):
        assert line in said


def test_openai_sizes_are_width_times_height_and_bodies_lie_within(tmp_path: Path) -> None:
    lines = [
        {"created": 1700000000, "body": {"prompt": "a", "n": 2, "size": "1792x1024", "extra_body": {"steps": 8}}},
        {"created": 1700000003, "body": {"prompt": "b", "size": "auto", "extra_body": {"steps": 4}}},
    ]
    conversion = converted(tmp_path, "\n".join(map(json.dumps, lines)) + "\n{broken\n")
    assert conversion.requests == [
        Request(0, 0, 8, 2, height=1024, width=1792, prompt="a"),
        Request(1, 3 * NS_PER_S, 4, prompt="b"),
    ]
    said = "\n".join(conversion.lines())
    assert "JSON lines" in said
    assert "1 dropped: not a JSON object" in said
    assert "2023-11-14 22:13:20 UTC" in said


def test_what_contradicts_itself_is_dropped_and_not_repaired(tmp_path: Path) -> None:
    lines = [
        '{"timestamp": 1, "steps": 8, "steps": 9}',
        '{"timestamp": 2, "steps": 8, "body": {"size": "512x512", "size": "64x64"}}',
        '{"timestamp": 3, "steps": 8, "size": "512x768", "width": 512, "height": 512}',
        '{"timestamp": 4, "steps": 8, "size": "512x768", "width": 512, "height": 768}',
    ]
    for text in ("\n".join(lines), f"[{', '.join(lines)}]"):
        conversion = converted(tmp_path, text)
        assert conversion.requests == [Request(0, 0, 8, height=768, width=512)]
        said = "\n".join(conversion.lines())
        assert "2 dropped: a name is in it twice" in said
        assert "1 dropped: size is another than height and width" in said


def test_a_small_z_is_a_zone_and_texts_may_be_bytes(tmp_path: Path) -> None:
    small = converted(tmp_path, "timestamp,steps\n2024-05-01T10:00:00z,8\n2024-05-01T12:00:02.5+02:00,8\n")
    assert arrivals_s(small) == [0, 2.5]
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"timestamp": [0.5], "steps": [8], "prompt": [b"a cat"]}), tmp_path / "b.parquet"
    )
    assert convert_trace(tmp_path / "b.parquet").requests == [Request(0, 0, 8, prompt="a cat")]


VLLM_OMNI = [
    "Request(prompt='it\\'s a cat', width=768, height=512, num_inference_steps=20, seed=3, slo_ms=1500.5, timestamp=4)",
    "Request(prompt='b', width=512, height=512, num_inference_steps=30, seed=None, slo_ms=None, timestamp=5000)",
]


def test_vllm_omni_lines_and_json_give_the_same(tmp_path: Path) -> None:
    expected = [
        Request(0, 0, 20, height=512, width=768, slo_ns=1_500_500_000, seed=3, prompt="it's a cat"),
        Request(1, 4996 * NS_PER_S, 30, height=512, width=512, prompt="b"),
    ]
    calls = converted(tmp_path, "\n".join([*VLLM_OMNI, "Request(prompt=open('x'), timestamp=6)"]))
    assert calls.requests == expected
    assert dict(calls.dropped) == {"not a line Request(name=value, ...)": 1}
    entries = [
        {"prompt": "it's a cat", "width": 768, "height": 512, "num_inference_steps": 20, "seed": 3, "slo_ms": 1500.5}
        | {"timestamp": 4},
        {"prompt": "b", "width": 512, "height": 512, "num_inference_steps": 30, "timestamp": 5000},
    ]
    for text in (json.dumps(entries), json.dumps({"requests": entries}), json.dumps(entries, indent=1)):
        assert converted(tmp_path, text).requests == expected


def test_sglang_names(tmp_path: Path) -> None:
    entry = {"prompt": "a", "negative_prompt": "blurry", "size": "640x480", "num_inference_steps": 9, "seed": 1}
    more = {"num_outputs_per_prompt": 3, "guidance_scale": 4.5, "timestamp": 0.5, "lora": {"path": "x"}}
    conversion = converted(tmp_path, json.dumps([entry | more]))
    (request,) = conversion.requests
    assert request == Request(0, 0, 9, 3, 4.5, 480, 640, seed=1, prompt="a", negative_prompt="blurry")
    assert "lora.path" in "\n".join(conversion.lines())


def test_diffusiondb_rows_of_one_post_are_one_request_spread_within_its_minute(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    times = ["2022-08-10 00:01", "2022-08-10 00:01", "2022-08-10 00:00", "2022-08-10 00:01", None]
    frame = pandas.DataFrame(
        {
            "image_name": ["a.png", "b.png", "c.png", "d.png", "e.png"],
            "prompt": ["x", "x", "y", "x", "z"],
            "part_id": 1,
            "seed": [5, 6, 7, 8, 9],
            "step": [50, 50, 20, 50, 50],
            "cfg": [7.0, 7.0, 12.0, 7.0, 7.0],
            "sampler": 8,
            "width": 512,
            "height": 640,
            "user_name": ["u", "u", "u", "v", "u"],
            "timestamp": pandas.to_datetime(times, utc=True),
            "image_nsfw": 0.1,
            "prompt_nsfw": 0.0,
        }
    )
    path = tmp_path / "metadata.parquet"
    frame.to_parquet(path)
    conversion = convert_trace(path, Reading(seed=1))
    first, *rest = conversion.requests
    assert (first.arrival_ns, first.steps, first.guidance_scale, first.prompt) == (0, 20, 12.0, "y")
    assert sorted((request.images, request.seed) for request in rest) == [(1, 8), (2, 5)]
    assert all(0 < request.arrival_ns < 120 * NS_PER_S and request.width == 512 for request in rest)
    assert (conversion.rows, conversion.merged, sum(conversion.dropped.values())) == (5, 1, 1)
    assert conversion.requests == convert_trace(path, Reading(seed=1)).requests
    assert conversion.requests != convert_trace(path, Reading(seed=2)).requests
    assert "no arrivals of a service" in "\n".join(conversion.lines())


@pytest.mark.parametrize(
    ("column", "values", "gap_s", "unit"),
    [
        ("arrival_ms", ("100", "350"), 0.25, "milliseconds"),
        ("timestamp", ("1700000000", "1700000002"), 2, "seconds since 1970"),
        ("timestamp", ("1700000000123", "1700000000124"), 0.001, "milliseconds since 1970"),
        ("ts", ("1700000000000001", "1700000000000003"), 2e-6, "microseconds since 1970"),
        ("ts", ("1700000000000000001", "1700000000000000008"), 7e-9, "nanoseconds since 1970"),
        ("timestamp", ("0", "999"), 999, "seconds"),
        ("timestamp", ("0.5", "5000"), 4999.5, "seconds"),
        ("TIMESTAMP", ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04"), 0.02004, "without a zone"),
        ("created_at", ("2024-03-31T01:59:59.5+01:00", "2024-03-31T01:00:00Z"), 0.5, "with a zone"),
        ("created_at", ("2024-01-01 00:00:00 UTC", "2024-01-01 00:00:01 +0000"), 1, "with a zone"),
    ],
)
def test_units_of_time(tmp_path: Path, column: str, values: tuple[str, str], gap_s: float, unit: str) -> None:
    conversion = converted(tmp_path, f"{column},steps\n{values[0]},20\n{values[1]},20\n")
    assert arrivals_s(conversion) == [0, gap_s]
    assert f"({unit})" in conversion.facts[0] or f"(times {unit})" in conversion.facts[0]


def test_map_names_columns_units_orders_and_values_for_all(tmp_path: Path) -> None:
    text = "t;dims;what\n0;512x768;a\n1500;768x512;b\n"
    conversion = converted(tmp_path, text, "arrival=t:ms,size=dims:HxW,prompt=what,steps=30,guidance_scale=1")
    assert conversion.requests == [
        Request(0, 0, 30, 1, 1.0, 512, 768, prompt="a"),
        Request(1, 1_500_000_000, 30, 1, 1.0, 768, 512, prompt="b"),
    ]
    assert "a table with semicolons" in conversion.facts[0]
    bare = converted(tmp_path, "time_s\tresolution\n0\t512x768\n", "size=WxH,steps=4")
    assert (bare.requests[0].width, bare.requests[0].height) == (512, 768)
    zoned = converted(tmp_path, "at,steps\n2024-01-01 00:00,1\n2024-01-01 00:01,1\n", "arrival=at:+02:00,seed=5")
    assert (arrivals_s(zoned), zoned.requests[1].seed) == ([0, 60], 5)
    assert arrivals_s(converted(tmp_path, "prompt,steps\na,4\nb,4\n", "arrival=0")) == [0, 0]


def test_sort_and_its_count(tmp_path: Path) -> None:
    text = "arrival_ms,steps\n5,3\n1,1\n5,4\n2,2\n"
    with pytest.raises(InputError, match=r"line 3: the request arrives before the one ahead of it; --sort sorts"):
        converted(tmp_path, text)
    conversion = converted(tmp_path, text, sort=True)
    assert [request.steps for request in conversion.requests] == [1, 2, 3, 4]
    assert [request.request_id for request in conversion.requests] == [0, 1, 2, 3]
    assert conversion.noted == {"follow one that arrived later: sorted": 2}


def test_native_files_are_read_strictly_and_never_shifted(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    write_trace(path, [Request(0, 5 * NS_PER_S, 20, prompt="a\nb", negative_prompt='"x", y')])
    for conversion in (load_trace(path), convert_trace(path)):
        assert conversion.requests == read_trace(path)
        assert conversion.requests[0].arrival_ns == 5 * NS_PER_S
    path.write_text("arrival_s,steps,colour\n5,20,red\n")
    with pytest.raises(InputError, match=r"the column 'colour' is unknown; .*trace convert drops and counts"):
        load_trace(path)
    assert convert_trace(path).requests == [Request(0, 5 * NS_PER_S, 20)]
    path.write_text("arrival_s,steps\n5,2\n1,1\n")
    assert [request.steps for request in load_trace(path, Reading(sort=True)).requests] == [1, 2]
    path.write_text("arrival_s,steps\n1700000000.5,20\n1700000001,20\n")
    assert arrivals_s(convert_trace(path)) == [0, 0.5]


@pytest.mark.parametrize(
    ("text", "mapping", "message"),
    [
        ("when,prompt\n0,a\n", "", "none of its columns says when requests arrive; it has when, prompt; name them"),
        ("timestamp,prompt\n0,a\n", "", "how many denoiser steps a request takes; it has timestamp, prompt"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,3,4\n", "", "a trace of a language model has none"),
        ('{"timestamp": 0, "input_length": 6}\n{"timestamp": 1}\n', "", "(JSON lines): none of its columns says how"),
        ("timestamp,steps\n0,1\n5000,1\n", "", "may be seconds or milliseconds; say which, --map arrival=timestamp:s"),
        ("timestamp,steps\n0,1\n1700000000,1\n", "", "may be seconds or milliseconds"),
        ("timestamp,steps\n0,1\n2024-01-01,1\n", "", "line 3: timestamp is '2024-01-01'; some rows give a number"),
        ("ts,steps\n2024-01-01T00:00Z,1\n2024-01-01T00:01,1\n", "", "some times of ts have a zone and some have none"),
        ("time,steps,resolution\n0,1,512x768\n", "", "may be WIDTHxHEIGHT or HEIGHTxWIDTH; say which, --map size="),
        ("time,steps,slo\n0,1,5\n", "", "slo has no unit; say which, for example --map slo=slo:ms"),
        ("time,steps\n0,x\n0,1001\n", "", "no row can be replayed (steps is not a whole number from 1 to 1000: 2)"),
        ("arrival_s;steps\n0,5;20\n", "", "neither a number nor an ISO 8601 time: 1"),
        ("time_s,steps\n0,1\n2000000000,1\n", "", "0 to 1,000,000,000 s are replayed"),
        ("time,time,steps\n0,0,1\n", "", "the column 'time' is given twice"),
        ("time,steps\n0,1\n", "arrival", "FIELD=COLUMN is needed, for example arrival=timestamp:ms"),
        ("time,steps\n0,1\n", "when=time", "there is no field 'when'; fields are arrival, steps, images"),
        ("time,steps\n0,1\n", "steps=n,steps=m", "the field 'steps' is given twice"),
        ("time,steps\n0,1\n", "steps=n", "there is no column 'n' for --map steps; it has time, steps"),
        ("time,steps\n0,1\n", "arrival=time:h", "after the colon s, ms, us, ns or a zone such as +02:00"),
        ("time,steps\n0,1\n", "slo=5:min", "after the colon s, ms, us or ns is needed"),
        ("time,steps\n0,1\n", "arrival=5:UTC", "after the colon s, ms, us or ns is needed"),
        ("time,steps\n0,1\n", "steps=5:ms", "after the colon nothing is needed"),
        ("time,steps\n0,1\n", "size=512x768:hxw", "after the colon WxH or HxW is needed"),
        ("time,steps\n0,1\n", "steps=٢٠", "there is no column '٢٠'"),
        ("time,steps\n٣,1\n", "", "neither a number nor an ISO 8601 time: 1"),
        ("time,steps,size\n0,1,٣x٣\n", "", "size is not two numbers with an x between them: 1"),
        ("time,steps\n2024-01-01,1\n", "arrival=time:ms", "time holds dates, which are not in milliseconds"),
        ("[1, 2]", "", "the JSON holds no list of requests"),
        ('{"a": 1, "b": [', "", "the JSON is cut short or damaged; a list of objects is needed"),
        ("[]", "", "the JSON holds no list of requests"),
        ("[" * 100_000, "", "the JSON is cut short or damaged"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_in_one_sentence(
    tmp_path: Path, text: str, mapping: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        converted(tmp_path, text, mapping)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("arrival_s,steps\n0,20\n".encode("utf-16"), "this file is text in UTF-16; save it as UTF-8"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(200)), "packed with zstd; unpack it first"),
        (b"", "the trace is empty"),
        (b"\x89PNG\r\n\x1a\n\0\xff", "this is not text"),
        (b"PAR1 and no more", "this is not a complete parquet file"),
        (gzip.compress(b"time,steps\n0,1\n")[:-9], "damaged or cut short"),
    ],
)
def test_files_of_another_kind_are_told_by_their_content(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_trace(path)


SHAPES = [
    'timestamp,prompt,num_inference_steps,size,seed,slo_ms\n1.5,a,20,512x768,3,100\n2,"b, c",30,auto,-1,\n',
    '{"created": 1700000000, "size": "512x512", "steps": 4, "n": 1}\n{"created": 1700000001, "steps": 5}',
    "Request(prompt='a', width=512, height=512, num_inference_steps=20, timestamp=1.5)\n",
    '[{"timestamp": "2024-01-01T00:00:00.123456789+02:00", "steps": 20, "cfg": 7}]',
    "prompt,seed,step,cfg,sampler,width,height,user_name,timestamp\nx,1,50,7.0,8,512,512,u,2022-08-10 00:01:00+00:00\n",
]
JUNK = [
    "1e999",
    "\0",
    "9" * 70,
    "-",
    "NaN",
    '"',
    "{",
    "]",
    ",",
    "\n",
    ";",
    "\t",
    "9999-12-31",
    "@nan",
    "\\ud800",
    "1_0",
]
MAPS = [
    "",
    "steps=30",
    "arrival=0",
    "arrival=timestamp:ms",
    "size=WxH",
    "arrival=timestamp:../etc",
    "seed=3,steps=1e99",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_read_or_refused_in_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(SHAPES))
    for _ in range(data.draw(st.integers(0, 3))):
        at, length = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 6))
        text = text[:at] + data.draw(st.sampled_from(JUNK)) + text[at + length :]
    try:
        conversion = converted(tmp_path, text, data.draw(st.sampled_from(MAPS)), data.draw(st.booleans()))
    except InputError:
        return
    target = tmp_path / "out.csv"
    write_trace(target, conversion.requests)
    assert read_trace(target) == conversion.requests


def test_packed_marked_and_spaced_tables(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(b"arrival_s,steps\n0,20\n") + gzip.compress(b"0.5,20\n"))
    assert len(load_trace(path).requests) == 2
    text = '\ufeff" Arrival S ", Num-Inference-Steps\r\n0,20\r\n0.5, 20\r\n\r\n'
    assert arrivals_s(converted(tmp_path, text)) == [0, 0.5]
