"""GenTD26: its original files, the joined table, and what is dropped."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from synerdiff.core import InputError, Request, loras_from
from tools.fit_gentd26 import fit
from traces.gentd26 import read_gentd26
from traces.gentd26_parameters import PARAMETER_FILE

REQUEST_HEADER = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,num_lora\n"
)
WIDE_HEADER = (
    "predict_type,exec_time_seconds,style_type,prompt_length,negative_prompt_length,num_images_per_prompt,"
    "num_inference_steps,checkpoint_model_version_id,lora_args\n"
)
REQUESTS = [
    "2024-11-15 23:59:58,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,1.0,30.0,M0,0\n",
    "2024-11-15 23:59:58,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,1.0,30.0,M0,0\n",
    "2024-11-16 00:00:08,IMG_2_IMG,SUCCEED,9.0,G1,5.0,,4.0,40.0,M1,1\n",
    "2024-11-16 00:00:08,TXT_2_IMG,FAILED,7.0,G1,5.0,,8.0,40.0,M1,2\n",
    "2024-11-16 00:00:09,TXT_2_IMG,PENDING,0.0,G2,,,,,,0\n",
    "2024-11-16 00:00:09,INPAINTING,SUCCEED,3.0,G2,5.0,,1.0,20.0,M0,0\n",
    "2024-11-16 00:00:10,TXT_2_IMG,SUCCEED,4.0,G2,5.0,,1.0,20.0,M0,1\n",
]
WIDE = [
    "t,1.0,,1.0,,1.0,30.0,m,\"[{'modelVersionId': 'bbb', 'scale': 1.0}]\"\n",  # rows of an earlier time
    "t,1.0,,1.0,,1.0,30.0,m,\"[{'modelVersionId': 'bbb', 'scale': 1.0}]\"\n",
    "t,32.0,,63.0,26.0,1.0,30.0,m,[]\n",
    "t,32.0,,63.0,26.0,1.0,30.0,m,[]\n",
    "t,9.0,,5.0,,4.0,40.0,m,\"[{'modelVersionId': 'ccc', 'scale': 0.5}]\"\n",
    "t,7.0,,5.0,,8.0,40.0,m,\"[{'modelVersionId': 'aaa', 'scale': 0.8}, {'modelVersionId': 'bbb', 'scale': 1.0}]\"\n",
    "t,0.0,,,,,,,[]\n",
    "t,3.0,,5.0,,1.0,20.0,m,[]\n",
    "t,4.0,,5.0,,1.0,20.0,m,\"[{'modelVersionId': 'aaa', 'scale': 0.0}]\"\n",
]


def folder_of(tmp_path: Path, requests: list[str] = REQUESTS, wide: list[str] | None = WIDE) -> Path:
    (tmp_path / "lora_request_trace.csv").write_text(REQUEST_HEADER + "".join(requests))
    if wide is not None:
        with tarfile.open(tmp_path / "data_trace_processed.tar.gz", "w:gz") as archive:
            for name, content in (
                ("._data_trace_processed.csv", b"\0\5\x16\7Mac OS X\xff\xfe"),
                ("data_trace_processed.csv", (WIDE_HEADER + "".join(wide)).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return tmp_path


def test_original_files_become_requests_with_loras(tmp_path: Path) -> None:
    conversion = read_gentd26(folder_of(tmp_path))
    assert conversion.requests == [
        Request(0, 0, 30, 1),
        Request(1, 0, 30, 1),
        Request(2, 10_000_000_000, 40, 8, loras=loras_from(("L0001@0.8", "L0000"))),
        Request(3, 12_000_000_000, 20, 1, loras=loras_from(("L0001@0",))),
    ]
    assert conversion.rows == 7
    assert conversion.dropped == {"image-to-image": 1, "steps or images missing": 1, "inpainting": 1}
    assert conversion.noted == {"exact duplicates kept": 1, "kept although failed": 1}


def test_options_keep_types_and_checkpoints_and_drop_loras(tmp_path: Path) -> None:
    conversion = read_gentd26(folder_of(tmp_path, wide=None), checkpoints="keep", adapters="drop", all_types=True)
    assert [request.base_model for request in conversion.requests] == ["M0", "M0", "M1", "M1", "M0", "M0"]
    assert all(request.loras == () for request in conversion.requests)
    assert conversion.dropped == {"steps or images missing": 1}
    assert conversion.noted["stripped of their LoRAs"] == 3
    assert conversion.noted["image-to-image replayed as text-to-image"] == 1


def test_plain_and_gzipped_tables_do_as_well_as_the_archive(tmp_path: Path) -> None:
    expected = read_gentd26(folder_of(tmp_path))
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "lora_request_trace.csv.gz").write_bytes(gzip.compress((REQUEST_HEADER + "".join(REQUESTS)).encode()))
    (tmp_path / "data_trace_processed.csv").write_text(WIDE_HEADER + "".join(WIDE))
    assert read_gentd26(tmp_path) == expected
    assert read_gentd26(tmp_path / "lora_request_trace.csv.gz") == expected


def test_what_is_wrong_with_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds neither lora_request_trace\.csv nor"):
        read_gentd26(tmp_path)
    folder_of(tmp_path, wide=None)
    with pytest.raises(InputError, match="put it there or leave the LoRAs out with --adapters drop"):
        read_gentd26(tmp_path)
    folder_of(tmp_path, wide=WIDE[4:])
    with pytest.raises(InputError, match="it has 5 rows, fewer than the 7 of"):
        read_gentd26(tmp_path)
    folder_of(tmp_path, wide=[*WIDE[:-1], WIDE[-1].replace("4.0,", "5.0,", 1)])
    with pytest.raises(InputError, match=r"line 10: this is not the request of .* line 8"):
        read_gentd26(tmp_path)
    folder_of(tmp_path, wide=[*WIDE[:-1], WIDE[-1].replace("[{", "[(")])
    with pytest.raises(InputError, match="line 10: lora_args is not a list"):
        read_gentd26(tmp_path)
    archive = tmp_path / "data_trace_processed.tar.gz"
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(InputError, match="damaged or cut short"):
        read_gentd26(tmp_path)
    with tarfile.open(archive, "w:gz"):
        pass
    with pytest.raises(InputError, match=r"the archive does not hold data_trace_processed\.csv"):
        read_gentd26(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("40.0,M1,2", "40.5,M1,2", "line 5: num_inference_steps is '40.5'; a whole number is needed"),
        ("40.0,M1,2", "5000.0,M1,2", "line 5: num_inference_steps is 5000; allowed are 1 to 1000"),
        ("8.0,40.0", "x,40.0", "line 5: num_images_per_prompt is 'x'; a number"),
        ("2024-11-16 00:00:10", "yesterday", "line 8: gmt_create is 'yesterday'; a time like"),
        ("2024-11-16 00:00:10", "2024-11-15 00:00:10", "line 8: the request arrives before the one ahead"),
        ("INPAINTING", "VIDEO", "line 7: predict_type is 'VIDEO'; known are TXT_2_IMG, IMG_2_IMG, INPAINTING"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = folder_of(tmp_path, ["".join(REQUESTS).replace(old, new)], wide=None)
    with pytest.raises(InputError) as caught:
        read_gentd26(folder, adapters="drop")
    assert message in str(caught.value)


def test_foreign_files_and_options_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="the column 'predict_type' is missing, so this is not a GenTD26 trace"):
        read_gentd26(path)
    path.write_text(REQUEST_HEADER)
    with pytest.raises(InputError, match="of 0 rows none can be replayed"):
        read_gentd26(path, adapters="drop")
    with pytest.raises(InputError, match="checkpoints is 'all'; allowed are one and keep"):
        read_gentd26(path, checkpoints="all")


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("SYNERDIFF_DATA")
    if not folder:
        pytest.skip("SYNERDIFF_DATA names no folder with GenTD26")
    return Path(folder)


def test_the_published_files_and_the_joined_table_agree(data: Path) -> None:
    original = read_gentd26(data / "gentd26-original")
    joined = read_gentd26(data / "gentd26_requests.csv.gz")
    assert original.requests == joined.requests
    assert original.rows == joined.rows == 26_823
    assert original.dropped == {"image-to-image": 2199, "inpainting": 186, "steps or images missing": 25}
    assert len(original.requests) == 26_823 - 2199 - 186 - 25
    assert (
        original.noted
        == joined.noted
        == {
            "kept although failed": 351,
            "kept although processing": 2,
            "exact duplicates kept": 19,
        }
    )
    assert original.requests[0].arrival_ns == 0
    assert {request.guidance_scale for request in original.requests} == {7.5}


def test_the_shipped_parameters_are_what_the_fit_gives(data: Path) -> None:
    from synerdiff.files import read_yaml

    assert fit(data / "gentd26-original") == read_yaml(PARAMETER_FILE, "parameter file")
