"""Experiment files: what is read, and one plain sentence for everything that is not allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from synerdiff.config.experiment import Experiment, load_experiment
from synerdiff.core import CONDITIONAL, InputError

BASE = {
    "name": "x",
    "profiles": "[h200-sdxl-estimated]",
    "workloads": "[{name: w, generator: poisson}]",
    "policies": "[{policy: static}]",
}


def written(folder: Path, **fields: str) -> Path:
    path = folder / "e.yaml"
    path.write_text("".join(f"{name}: {text}\n" for name, text in {**BASE, **fields}.items()))
    return path


def test_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path))
    assert experiment.seeds == (1, 2, 3)
    assert experiment.requests == 1000
    assert experiment.skip_budget.budget.fraction_ppm == 0
    assert experiment.slo is None
    assert experiment.policies[0].name == "static"
    assert not experiment.policies[0].searched


def test_everything_stated(tmp_path: Path) -> None:
    experiment = load_experiment(
        written(
            tmp_path,
            workloads="[{name: a, trace: t.csv, windows: [{start_s: 0, end_s: 9.5}], backlog: true, batch_from: b},"
            " {name: b, generator: mmpp, parameters: {burst_s: 5}, loads: [0.4], seeds: [7], requests: 20}]",
            policies="[{policy: my:Rule, label: mine, parameters: {x: 1}, batch: [2, 4]}, {policy: s, batch: best}]",
            skip_budget="{fraction: 0.25, warmup_steps: 2, longest_run: 4, mode: conditional}",
            slo="{seconds: 8}",
            decode_gpus="[0, 1]",
            jobs="2",
            figures="[stages]",
        )
    )
    assert experiment.workloads[0].windows[0].end_s == 9.5
    assert experiment.policies[0].name == "mine"
    assert experiment.policies[0].batch == (2, 4)
    assert all(entry.searched for entry in experiment.policies)
    budget = experiment.skip_budget.budget
    assert (budget.fraction_ppm, budget.warmup_steps, budget.longest_run, budget.mode) == (250_000, 2, 4, CONDITIONAL)
    assert experiment.slo is not None
    assert experiment.slo.seconds == 8


def test_models_are_frozen(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        experiment.requests = 5


def test_the_shipped_experiments_are_valid() -> None:
    root = Path(__file__).resolve().parents[2]
    assert load_experiment(root / "experiments.yaml").name == "default"
    assert load_experiment(root / "experiments" / "gentd26.yaml").name == "gentd26"
    assert load_experiment(root / "experiments" / "fidelity.yaml").name == "fidelity"
    names = ("ablation", "adapters", "headline", "headline-trace", "regimes", "regimes-check")
    assert [load_experiment(root / "experiments" / f"{name}.yaml").name for name in names] == list(names)


KNOWN = ", ".join(Experiment.model_fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sedes": "[1]"}, f"there is no field 'sedes'; known are {KNOWN}."),
        ({"loads": "[0]"}, "loads[0] is 0; it must be greater than or equal to 0.000001."),
        ({"loads": "[-0.5]"}, "loads[0] is -0.5; it must be greater than or equal to 0.000001."),
        ({"loads": "[.nan]"}, "loads[0] is nan; it must be a finite number."),
        ({"loads": "[.inf]"}, "loads[0] is inf; it must be a finite number."),
        ({"loads": "[]"}, "loads is empty; at least one entry is needed."),
        ({"loads": "['0.5']"}, "loads[0] is '0.5'; it must be a valid number."),
        ({"loads": "[0.5, 0.5]"}, "two loads are both '0.5'."),
        ({"seeds": "[-1]"}, "seeds[0] is -1; it must be greater than or equal to 0."),
        ({"seeds": "[1.5]"}, "seeds[0] is 1.5; it must be a valid integer."),
        ({"seeds": "[true]"}, "seeds[0] is True; it must be a valid integer."),
        ({"requests": "many"}, "requests is 'many'; it must be a valid integer."),
        ({"jobs": "0"}, "jobs is 0; it must be greater than or equal to 1."),
        ({"name": "'../x'"}, "name is '../x'; it must match pattern"),
        ({"profiles": "[]"}, "profiles is empty or missing; at least one is needed."),
        ({"slo": "{}"}, "slo: exactly one of solo_multiple and seconds is needed."),
        ({"slo": "{seconds: 1, solo_multiple: 2}"}, "slo: exactly one of solo_multiple and seconds is needed."),
        ({"slo": "3"}, "slo: named fields are needed: solo_multiple, seconds."),
        ({"skip_budget": "{fraction: 2}"}, "skip_budget.fraction is 2; it must be less than or equal to 1."),
        ({"skip_budget": "{mode: drop}"}, "skip_budget.mode is 'drop'; it must be 'reuse' or 'conditional'."),
        ({"skip_budget": "{longest_run: 0}"}, "skip_budget.longest_run is 0; it must be greater than or equal to 1."),
        ({"baselines": "other"}, "baselines: 'other' is none of static."),
        ({"figures": "[pie]"}, "figures[0] is 'pie'; it must be 'latency-load', "),
        ({"batch_search": "{batches: [0]}"}, "batch_search.batches[0] is 0; it must be greater than or equal to 1."),
        ({"dispersion": "1"}, "dispersion is 1; it must be a valid boolean."),
        (
            {"policies": "[static]"},
            "policies[0]: named fields are needed: policy, label, parameters, batch, steps_scale, skip, skip_budget, f",
        ),
        ({"policies": "[{polic: s}]"}, "policies[0]: there is no field 'polic'; known are policy, label, parameters, "),
        ({"policies": "[{label: s}]"}, "policies[0].policy is missing."),
        ({"policies": "[{policy: 3}]"}, "policies[0].policy is 3; it must be a valid string."),
        (
            {"policies": "[{policy: s, batch: 0}]"},
            "policies[0].batch: 0 is not a batch size; allowed are a size of 1 to",
        ),
        (
            {"policies": "[{policy: s, batch: big}]"},
            "policies[0].batch: 'big' is not a batch size; allowed are a size of 1",
        ),
        (
            {"policies": "[{policy: s, batch: [2, x]}]"},
            "policies[0].batch: [2, 'x'] is not a batch size; allowed are a size of",
        ),
        ({"policies": "[{policy: s, batch: []}]"}, "policies[0].batch: it is an empty list; allowed are a size of 1"),
        ({"policies": "[{policy: s, batch: 4, parameters: {batch: 3}}]"}, "policies[0]: batch is given twice: beside"),
        ({"policies": "[{policy: s}, {policy: s}]"}, "two policies (give labels) are both 's'."),
        ({"workloads": "[{name: a}]"}, "workloads[0]: exactly one of generator and trace is needed."),
        ({"workloads": "[{name: a, generator: g, trace: t}]"}, "workloads[0]: exactly one of generator and trace"),
        ({"workloads": "[{name: 'a b', trace: t}]"}, "workloads[0].name is 'a b'; it must match pattern"),
        ({"workloads": "[{name: a, trace: t, seeds: [1]}]"}, "workloads[0]: seeds belong to a generator; a trace"),
        ({"workloads": "[{name: a, trace: t, format: csv}]"}, "workloads[0].format is 'csv'; it must be 'auto' or "),
        (
            {"workloads": "[{name: a, generator: g, windows: [{start_s: 1, end_s: 2}]}]"},
            "workloads[0]: windows belong to a trace; a generator takes requests and seeds.",
        ),
        (
            {"workloads": "[{name: a, trace: t, windows: [{start_s: 5, end_s: 3}]}]"},
            "workloads[0].windows[0]: end_s is 3; it must lie after start_s, 5.",
        ),
        ({"workloads": "[{name: a, trace: t, windows: [[1, 2]]}]"}, "workloads[0].windows[0]: named fields are needed"),
        (
            {"workloads": "[{name: a, trace: t, batch_from: b}, {name: c, trace: t}]"},
            "workload 'a': batch_from is 'b'; allowed are c.",
        ),
    ],
)
def test_what_is_not_allowed_is_one_sentence(tmp_path: Path, fields: dict[str, str], sentence: str) -> None:
    path = written(tmp_path, **fields)
    with pytest.raises(InputError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {sentence}")
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a sweep file holds named fields at its top level; found nothing"),
        ("- a\n- b\n", "found a list"),
        ("name: x\nname: y\n", "line 2: the key 'name' is given twice"),
        ("name: [x\n", "this is not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "line 1: !!python/object/apply:os.system is not"),
        ("\x00\x01", "this is not valid YAML"),
        ("1: x\n", "field names are text; found 1"),
    ],
)
def test_yaml_junk_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_experiment(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such sweep file"):
        load_experiment(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="this is a folder"):
        load_experiment(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="this is not text"):
        load_experiment(tmp_path / "b.yaml")


def test_every_field_and_column_is_documented() -> None:
    from synerdiff.config import experiment as config
    from synerdiff.experiments.store import ROOT
    from synerdiff.results import records

    text = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")
    sections = [config.Experiment, config.Workload, config.PolicyEntry, config.BatchSearch, config.SkipBudgetSection]
    names = {name for section in [*sections, config.Slo, config.Window, config.Fleet] for name in section.model_fields}  # type: ignore[attr-defined]
    names |= {*records.REQUEST_COLUMNS, *records.WORK_COLUMNS, *config.FIGURES}
    assert {name for name in names if f"`{name}`" not in text and f"`{name}:" not in text} == set()
