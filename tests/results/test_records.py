"""Records on disk: exact columns and values, the same bytes every time, and errors that say what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet
import pytest

from policies.registry import build_policy
from simulator import simulate
from synerdiff.core import ControlNetUse, LoraUse, InputError, Request, RequestRecord, WorkRecord
from synerdiff.results.records import (
    REQUEST_COLUMNS,
    WORK_COLUMNS,
    read_requests,
    read_table,
    read_work,
    requests_table,
    work_table,
    write_table,
)
from tests.builders import MS, affine_profile

LORAS = (LoraUse("L1"), LoraUse("L2", 0.8))
REQUEST = Request(3, 1_500_000_001, 30, 2, 7.5, 512, 512, "M1", LORAS, (ControlNetUse("C1"),), slo_ns=2_000_000_000, seed=9)
DONE = RequestRecord(REQUEST, 1_600_000_000, 1_700_000_000, 1_800_000_000, 2_000_000_001, "done", 3, ("ggr", "gcg"))
LOST = RequestRecord(Request(4, 5, 1), -1, -1, -1, -1, "rejected", 0, ("",))


def test_requests_hold_the_contract_columns_in_seconds(tmp_path: Path) -> None:
    write_table(tmp_path / "requests.parquet", requests_table([DONE, LOST]))
    frame = read_requests(tmp_path)
    assert list(frame.columns) == [
        *("request_id", "arrival_s", "admitted_s", "denoised_s", "decode_started_s", "finished_s"),
        *("request_latency_s", "status", "images", "steps", "skipped_steps", "guidance_scale", "height", "width"),
        *("base_model", "loras", "controlnets", "slo_s", "seed", "modes", "worker"),
        *("steps_run", "intended_arrival_s"),
    ]
    done, lost = frame.to_dict("records")
    assert done == {
        "request_id": 3,
        "arrival_s": 1_500_000_001 / 1e9,
        "admitted_s": 1.6,
        "denoised_s": 1.7,
        "decode_started_s": 1.8,
        "finished_s": 2_000_000_001 / 1e9,
        "request_latency_s": 0.5,
        "status": "done",
        "images": 2,
        "steps": 30,
        "skipped_steps": 3,
        "guidance_scale": 7.5,
        "height": 512,
        "width": 512,
        "base_model": "M1",
        "loras": "L1;L2@0.8",
        "controlnets": "C1",
        "slo_s": 2.0,
        "seed": 9,
        "modes": "ggr;gcg",
        "worker": 0,
        "steps_run": 30,
        "intended_arrival_s": 1.500000001,
    }
    assert lost["status"] == "rejected"
    for column in ("admitted_s", "denoised_s", "decode_started_s", "finished_s", "request_latency_s", "slo_s", "seed"):
        assert lost[column] != lost[column], f"{column} must be empty"


def test_work_names_samples_by_request_and_image(tmp_path: Path) -> None:
    step = WorkRecord(0, "denoise", "step", 0, 10, 5, 1, (0, 2), "gr", -1, False, False)
    chunk = WorkRecord(1, "decode0", "chunk", 10, 25, 0, 0, (2,), "", 3, True, True)
    write_table(tmp_path / "work.parquet", work_table([step, chunk], ["7.0", "7.1", "8.0"]))
    frame = read_work(tmp_path / "work.parquet")
    assert list(frame.columns) == list(WORK_COLUMNS)
    assert frame.to_dict("records") == [
        dict(zip(WORK_COLUMNS, (0, "denoise", "step", 0, 10, 5, 1, "7.0;8.0", "gr", -1, False, False), strict=True)),
        dict(zip(WORK_COLUMNS, (1, "decode0", "chunk", 10, 25, 0, 0, "8.0", "", 3, True, True), strict=True)),
    ]


def test_no_records_give_empty_tables() -> None:
    assert requests_table([]).num_rows == 0
    assert requests_table([]).column_names == list(REQUEST_COLUMNS)
    assert work_table([], []).column_names == list(WORK_COLUMNS)


def test_a_simulated_run_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    requests = [Request(i, i * 40 * MS, 3, images=1 + i % 3) for i in range(20)]
    result = simulate(requests, build_policy("continuous-parallel", {"batch": 4}), affine_profile())
    write_table(tmp_path / "requests.parquet", requests_table(result.requests))
    write_table(tmp_path / "work.parquet", work_table(result.work, result.sample_names))
    frame, work = read_requests(tmp_path), read_work(tmp_path)
    assert [round(value * 1e9) for value in frame["finished_s"]] == [r.finished_ns for r in result.requests]
    assert frame["modes"].tolist() == [";".join(["ggg"] * request.images) for request in requests]
    assert work["start_ns"].tolist() == [record.start_ns for record in result.work]
    spelled = [";".join(result.sample_names[s] for s in record.samples) for record in result.work]
    assert work["sample_ids"].tolist() == spelled


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, requests_table([DONE, LOST] * 500), {"key": "k", "mean": 1.5})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_table(tmp_path / "a", REQUEST_COLUMNS)[1] == {"key": "k", "mean": 1.5}


def test_twenty_thousand_requests_stay_small(tmp_path: Path) -> None:
    write_table(tmp_path / "requests.parquet", requests_table([DONE] * 20_000))
    steps = [
        WorkRecord(0, "denoise", "step", i * 10, i * 10 + 9, 16, 0, (i // 30,), "g", -1, False, False)
        for i in range(75_000)
    ]
    write_table(tmp_path / "work.parquet", work_table(steps, [f"{i}.0" for i in range(2_500)]))
    assert os.path.getsize(tmp_path / "requests.parquet") < 200_000
    assert os.path.getsize(tmp_path / "work.parquet") < 1_500_000
    assert pyarrow.parquet.read_metadata(tmp_path / "work.parquet").num_rows == 75_000


def _whole(path: Path) -> bytes:
    write_table(path, requests_table([DONE] * 100))
    return path.read_bytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.parquet: there is no such file of records\."):
        read_requests(tmp_path / "none.parquet")


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -200])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "requests.parquet"
    path.write_bytes(_whole(path)[:keep])
    with pytest.raises(InputError, match=r"requests\.parquet: this is not a complete parquet file"):
        read_requests(tmp_path)


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    content = bytearray(_whole(path))
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"requests\.parquet: "):
        read_requests(tmp_path)


def test_text_under_a_parquet_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "requests.parquet").write_text("arrival_s,steps\n0,1\n")
    with pytest.raises(InputError, match="this is not a complete parquet file"):
        read_requests(tmp_path)


def test_a_foreign_table_is_told_by_its_columns(tmp_path: Path) -> None:
    write_table(tmp_path / "work.parquet", requests_table([DONE]))
    with pytest.raises(InputError, match="the column gpu is missing, so these are not records of a run"):
        read_work(tmp_path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    table = requests_table([DONE])
    place = table.column_names.index("steps")
    write_table(tmp_path / "requests.parquet", table.set_column(place, "steps", pyarrow.array(["many"])))
    with pytest.raises(InputError, match="the column steps holds string; int64 is needed"):
        read_requests(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/requests\.parquet: cannot be written"):
        write_table(tmp_path / "file" / "requests.parquet", requests_table([DONE]))
