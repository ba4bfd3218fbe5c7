"""The JSON schema of the files that people write: shipped files pass, what the reader refuses by type does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from synerdiff import cli

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "experiments.yaml", *sorted((ROOT / "experiments").glob("*.yaml"))]


def kind_of(file: Path) -> str:
    if file.stem in ("capacity", "production", "stages"):
        return "capacity"
    return file.stem if file.stem in ("cluster", "tune") else "experiment"


def schema(kind: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert cli.main(["schema", kind]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(document)
    return document


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_files_pass_their_schema(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = jsonschema.Draft202012Validator(schema(kind_of(file), capsys))
    assert [error.message for error in own.iter_errors(yaml.safe_load(file.read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"load": 0.5}, "load"),
        ({"loads": "high"}, "loads"),
        ({"seeds": [-1]}, "seeds"),
        ({"policies": []}, "policies"),
        ({"policies": [{"policy": "auto", "batches": 3}]}, "batches"),
        ({"figures": ["pie"]}, "figures"),
    ],
)
def test_what_the_reader_refuses_the_schema_refuses(
    change: dict[str, Any], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = yaml.safe_load((ROOT / "experiments.yaml").read_text(encoding="utf-8")) | change
    with pytest.raises(jsonschema.ValidationError) as refused:
        jsonschema.validate(own, schema("experiment", capsys))
    assert where in str(refused.value) + refused.value.json_path


def test_forms_that_a_file_may_use_instead(capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load((ROOT / "experiments.yaml").read_text(encoding="utf-8"))
    forms = {"loads": 0.5, "seeds": 3, "saturation": True, "decode_gpus": [0, 1], "policies": ["tuned/policy.yaml"]}
    jsonschema.validate(own | forms, schema("experiment", capsys))
    assert cli.main(["schema", "trace"]) == 2
    assert capsys.readouterr().err == (
        "there is no kind of file 'trace'; known are experiment, capacity, tune, cluster, policy.\n"
    )
