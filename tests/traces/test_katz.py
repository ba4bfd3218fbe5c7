"""The trace that was published with Katz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces.katz
from synerdiff.core import InputError, Request, controlnets_from, loras_from
from traces.katz import read_katz


def entry(timestamp: Any, **fields: Any) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "ip": "host1",
        "scene_id": "A",
        "base_model_id": None,
        "controlnets": [],
        "loras": None,
    } | fields


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "katz.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_entries_become_sorted_requests(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        [
            entry(1700000010.5, loras=["l1", None, "l2"], base_model_id="m1"),
            entry(1700000000, controlnets=["c1"], scene_id="B"),
            entry(1700000000, controlnets=None, loras=[None], base_model_id=7),
        ],
    )
    conversion = read_katz(path, checkpoints="keep")
    assert conversion.requests == [
        Request(0, 0, 50, controlnets=controlnets_from(("c1",))),
        Request(1, 0, 50, base_model="7"),
        Request(2, 10_500_000_000, 50, base_model="m1", loras=loras_from(("l1", "l2"))),
    ]
    assert (conversion.rows, conversion.dropped) == (3, {})
    assert conversion.noted == {
        "nulls among loras left out": 2,
        "without a base model": 1,
        "sorted by timestamp, the file was not": 3,
    }


def test_options(tmp_path: Path) -> None:
    path = written(tmp_path, [entry(5, loras=["l"], base_model_id="m"), entry(9, scene_id="B")])
    conversion = read_katz(path, service="A", steps=4, images=2, guidance_scale=1.0, adapters="drop")
    assert conversion.requests == [Request(0, 0, 4, 2, 1.0)]
    assert conversion.dropped == {"of the other service": 1}
    assert conversion.noted == {"stripped of their LoRAs and ControlNets": 1}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1700000000, 1700000001.25),
        (1700000000000, 1700000001250),
        ("2024-01-01 00:00:00", "2024-01-01T00:00:01.250"),
        ("2024-01-01T00:00:00+00:00", "2024-01-01T08:00:01.250+08:00"),
    ],
)
def test_timestamps_may_be_seconds_milliseconds_or_iso(tmp_path: Path, first: Any, second: Any) -> None:
    requests = read_katz(written(tmp_path, [entry(first), entry(second)])).requests
    assert [request.arrival_ns for request in requests] == [0, 1_250_000_000]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.text(max_size=20).filter(lambda t: t.strip() and not set(";@") & set(t)), max_size=3, unique=True),
        min_size=1,
    ),
    st.integers(1, 200),
    st.sampled_from([None, 2]),
)
def test_it_does_not_matter_where_reads_cut_the_text(
    tmp_path: Path, loras: list[list[str]], characters: int, indent: int | None
) -> None:
    path = written(tmp_path, json.dumps([entry(i, loras=names) for i, names in enumerate(loras)], indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces.katz, "_CHARACTERS_PER_READ", characters)
        requests = read_katz(path).requests
    assert [request.loras for request in requests] == [loras_from(names) for names in loras]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is a JSON list of objects; this file does not start with one"),
        ('{"a": 1}', "is a JSON list of objects; this file does not start with one"),
        ("[]", "the trace holds no requests"),
        ("[1]", "entry 1: a int where an object is needed"),
        ("[{}]", "entry 1: the field 'timestamp' is missing"),
        (json.dumps([entry(1), entry(2)])[:-5], "entry 2: the JSON is cut short or damaged there"),
        (json.dumps([entry(1), entry(2)])[:-1], "entry 3: the JSON is cut short or damaged there"),
        (json.dumps([entry(1), entry(2)]).replace("}, {", "} {"), "entry 2: the JSON is cut short or damaged there"),
        (json.dumps([entry(1)])[:-1] + ",]", "entry 2: the JSON is cut short or damaged there"),
        (json.dumps([entry(1)]) + "x", "something follows the JSON list"),
        ("[" * 100_000, "entry 1: the JSON is cut short or damaged there"),
        ("[" + "9" * 10_000 + "]", "entry 1: the JSON is cut short or damaged there"),
        ([entry(True)], "entry 1: timestamp is True; a number or an ISO 8601 time is needed"),
        ([entry("noon")], "entry 1: timestamp is 'noon'"),
        ([entry(-1.5)], "entry 1: timestamp is -1.5; a number"),
        (json.dumps([entry("X")]).replace('"X"', "1e999999999"), "entry 1: timestamp is 1E+999999999"),
        ([entry(-1)], "entry 1: timestamp is -1"),
        (json.dumps([entry(float("nan"))]), "entry 1: timestamp is nan"),
        ([entry(0), entry(2e9)], "lie more than 1000000000 s apart"),
        ([entry(1, scene_id="C")], "entry 1: scene_id is 'C'; allowed are A and B"),
        ([entry(1, loras="l1")], "entry 1: loras is a str; a list or null is needed"),
        ([entry(1, controlnets=["a;b"])], "entry 1: controlnets holds 'a;b'; an id without semicolons"),
        ([entry(1, loras=["l@x"])], "entry 1: a request asks for the LoRA 'l@x'; after the @ a number is needed"),
        ([entry(1, base_model_id=[])], "entry 1: base_model_id holds []"),
    ],
)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_katz(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_files_and_options_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such Katz trace"):
        read_katz(tmp_path / "missing.json")
    with pytest.raises(InputError, match="this is a folder"):
        read_katz(tmp_path)
    (tmp_path / "junk.json").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="this is not text"):
        read_katz(tmp_path / "junk.json")
    path = written(tmp_path, [entry(1)])
    with pytest.raises(InputError, match="steps is 0; allowed are 1 to 1000"):
        read_katz(path, steps=0)
    with pytest.raises(InputError, match="guidance_scale is 'nan'"):
        read_katz(path, guidance_scale=float("nan"))
    with pytest.raises(InputError, match="no requests of service B"):
        read_katz(path, service="B")
