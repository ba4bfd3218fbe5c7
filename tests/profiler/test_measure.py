"""Whole measurements of small points: complete tables, resuming, cuts, messages. Times are not judged."""

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from profiler import bench
from profiler import measure as measuring
from profiler.assemble import findings
from profiler.measure import measure_profile
from profiler.partial import Partial
from profiler.sampling import Rule, spread_of
from profiler.settings import CORUN_ROWS, ROWS, make_settings
from profiler.timing import Unsettled, measure_corun
from synerdiff.cli import main
from synerdiff.core import GUIDED, InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import Chunking
from synerdiff.profile.folder import find_profile, load_profile
from synerdiff.profile.tables import OVERHEADS

FEW = Rule(least=3, most=3, width=1.0, cap_s=2.0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", FEW)


def settings(rows: str = "1,4,8", **other: Any) -> Any:
    return make_settings("digits", "cpu", rows=rows, quick=True, **other)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("profiles") / "small"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK", FEW)
        profile = measure_profile(settings(), folder, lambda *point: seen.append(point))
    return folder, profile, seen


def test_tables_are_complete_and_read_back(measured: Any) -> None:
    folder, profile, seen = measured
    assert profile.provenance == "measured"
    assert profile.row_buckets == tuple(profile.steps) == (1, 4, 8)
    assert set(profile.held_out_steps) == {5}
    assert {name: profile.chunk_count(name) for name in profile.chunkings} == {"whole": 1, "c4": 4}
    assert set(profile.overheads) == set(OVERHEADS)
    assert profile.overhead_ns("decision_lead") == 0
    assert set(profile.step_launch) == {1, 4, 8}
    assert all(spread.median >= 0 for spread in profile.step_launch.values())
    for name in profile.chunkings:
        for chunk in range(profile.chunk_count(name)):
            cells = profile.corun[name, chunk]
            assert {rows for rows, cell in cells.items() if not cell.held_out} == {1, 8}
            assert all(cell.step.n >= 3 and cell.chunk.n >= 3 for cell in cells.values())
            for rows in (1, 2, 5, 8):
                assert all(ppm > 0 for ppm in profile.slowdown_ppm(rows, name, chunk))
    held_out = [key for key, cells in profile.corun.items() if cells.get(4) is not None and cells[4].held_out]
    assert len(held_out) == 2, "the longest chunk of each chunking"
    assert not (folder / "partial.json").exists()
    done, total, _ = seen[-1]
    assert done == total
    assert load_profile(folder).content_hash == profile.content_hash


def test_several_resolutions_are_measured_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("profiler.settings.QUICK_CHUNKS", ())
    monkeypatch.setattr("profiler.timing.warm_up_all", lambda *_: None)
    out, small, large = tmp_path / "p", (32, 32), (48, 32)
    command = ["profile", "--model", "digits", "--resolution", "32x32,48x32", "--across", "--rows", "2", "--quick"]
    assert main([*command, "--out", str(out)]) == 0
    profile = load_profile(out)
    assert list(profile.sizes) == [small, large]
    for one in profile.sizes.values():
        assert (tuple(one.steps), one.row_buckets, set(one.held_out_steps)) == ((2,), (2,), {1})
        assert set(one.corun["whole", 0]) == {2}
    assert set(profile.across) == {(small, large), (large, small)}
    for cells in profile.across.values():
        assert set(cells["whole", 0]) == {2}
    assert profile.slowdowns_beside(large, 2, "whole", 0, small)[2] == 0, "as measured"
    assert profile.head.notes["across_error"]["step_slowdown"]["cells"] == 2
    assert set(profile.head.notes["findings"]) == {"48x32"}
    assert {path.name for path in out.glob("*.png")} == {"profile.png", "profile-48x32.png"}
    text, said = capsys.readouterr()
    assert "minutes for" in said
    assert "at 48x32" in text
    assert "pairs across resolutions by solo time, had they not been measured: step slowdown" in text


def test_provenance_says_what_was_measured_and_how_well(measured: Any) -> None:
    _, profile, _ = measured
    head, info = profile.head, profile.head.notes
    assert (head.model, head.size, head.dtype, info["quick"]) == ("digits", (32, 32), "float32", True)
    assert head.weights == "trained"
    assert info["torch"] == torch.__version__
    assert info["command"].startswith("synerdiff profile --model digits --device cpu --rows 1,4,8 --quick --out ")
    assert info["measured_for_s"] > 0
    for name in ("processor", "usable_cores", "diffusers", "sampling", "lanes"):
        assert name in info
    assert head.device
    assert head.date
    assert head.commit
    error = info["held_out_error"]
    assert {name: error[name]["cells"] for name in error} == {"step_time": 1, "step_slowdown": 2, "chunk_slowdown": 2}
    lookup = profile.step_ns(5) / profile.held_out_steps[5].median
    assert error["step_time"]["worst"] == pytest.approx(abs(lookup - 1), abs=1e-4)
    assert set(info["overlap"]) == {"whole", "c4"}
    assert set(info["kappa"]["c4"]) == {1, 8}
    assert info["unguided_step"]["rows"] == 8
    assert (head.execution, head.levers) == ("eager", ())
    assert info["memory_format"] == "contiguous"
    assert info["cudnn_benchmark"] is False
    assert info["attention"]["sdpa_allowed"]
    assert "missing" not in info


def test_cuts_make_the_longest_chunk_as_short_as_the_measured_atoms_allow(measured: Any) -> None:
    _, profile, _ = measured
    times = list(profile.head.notes["atoms_ns"].values())

    def longest(cuts: Any) -> Any:
        return max(sum(times[a:b]) for a, b in pairwise((0, *cuts, len(times))))

    best = min(longest(cuts) for cuts in combinations(range(1, len(times)), 3))
    assert longest(profile.head.cuts["c4"]) == best
    assert profile.head.cuts["whole"] == ()


def test_the_step_that_is_measured_is_the_models_own_step() -> None:
    from profiler.bench import SAMPLE_STEPS, TimedStep

    model = load_model("digits")
    model.row_buckets = (4, 8)
    seen = []
    denoise = model.denoise
    model.denoise = lambda inputs: seen.append(inputs.latents.shape[0]) or denoise(inputs)  # type: ignore[func-returns-value]
    piece = TimedStep(model, 5)
    assert piece.again()() == 8, "5 rows are padded to the bucket"
    states = piece._states
    assert [state.default_mode for state in states].count(GUIDED) == 2
    assert len(states) == 3
    for _ in range(SAMPLE_STEPS):
        piece.again()()
    assert seen == [8] * (SAMPLE_STEPS + 1)
    assert piece._states is not states, "finished samples are replaced"


class Stop(Exception):
    pass


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine may need many tries until a step and a chunk run beside each other.
    monkeypatch.setattr(bench, "QUICK", Rule(least=3, most=3, width=1.0, cap_s=20.0))
    folder = tmp_path / "p"

    def stop_at(point: Any) -> Any:
        def stop(*progress: Any) -> None:
            if progress[0] == point:
                raise Stop

        return stop

    with pytest.raises(Stop):
        measure_profile(settings("1,2"), folder, stop_at(2))
    kept = json.loads((folder / "partial.json").read_text())
    assert not kept["tables"]["corun"]
    assert len(kept["tables"]["solo"]["step 1"][0]) == 2
    assert not (folder / "profile.yaml").exists()

    with pytest.raises(InputError, match=r"an interrupted measurement with rows 1, 2; now it is 1, 4"):
        measure_profile(settings("1,4"), folder)
    with pytest.raises(InputError, match="with dtype not given; now it is bfloat16"):
        measure_profile(settings("1,2", dtype="bfloat16"), folder)

    with pytest.raises(Stop):
        measure_profile(settings("1,2"), folder, stop_at(4))
    later = json.loads((folder / "partial.json").read_text())
    assert len(later["tables"]["corun"]) == 2
    assert later["tables"]["solo"] == kept["tables"]["solo"]
    assert later["spent_s"] > kept["spent_s"]

    saved = []
    monkeypatch.setattr(Partial, "remove", lambda partial: saved.append(partial.tables))
    profile = measure_profile(settings("1,2"), folder)
    tables = saved[0]
    for rows in (1, 2):
        samples = tables["solo"][f"step {rows}"][0]
        assert samples[:2] == kept["tables"]["solo"][f"step {rows}"][0]
        assert profile.steps[rows] == spread_of(samples)
    for key, (step, chunk) in later["tables"]["corun"].items():
        both = tables["corun"][key]
        assert (both[0][: len(step)], both[1][: len(chunk)]) == (step, chunk)
        assert len(both[0]) > len(step), "every pair is visited twice"
        name, index, rows = key.split()
        assert profile.corun[name, int(index)][int(rows)].chunk.median == spread_of(both[1]).median
    (folder / "partial.json").unlink()
    with pytest.raises(InputError, match="already holds a profile"):
        measure_profile(settings("1,2"), folder)


def test_a_measurement_that_runs_out_of_time_is_a_profile_of_what_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK", Rule(least=3, most=6, width=1.0, cap_s=2.0))
    folder = tmp_path / "p"
    asked = []
    one = measure_corun

    def out_of_time_after(most: int) -> None:
        def measure(*arguments: Any) -> Any:
            asked.append(1)
            return one(*arguments)

        def block_s(session: Any, cell: Any) -> float:
            return 0.0 if len(asked) < most else 1e9

        asked.clear()
        monkeypatch.setattr("profiler.timing.measure_corun", measure)
        monkeypatch.setattr(measuring._Session, "_block_s", block_s)

    lines: list[str] = []
    out_of_time_after(0)
    with pytest.raises(InputError, match=r"60 minutes did not suffice for a profile; what was measured is kept"):
        measure_profile(settings("1,2,8"), folder, minutes=60, say=lines.append)
    assert re.fullmatch(r"about \d+\.\d minutes for \d+ rounds of solo times and 30 visits of pairs", lines[0])
    kept = json.loads((folder / "partial.json").read_text())
    assert len(kept["tables"]["solo"]["step 1"][0]) >= FEW.least, "solo times come first"

    out_of_time_after(2)
    profile = measure_profile(settings("1,2,8"), folder, minutes=60)
    assert profile.row_buckets == (2, 8), "one row is padded to two"
    assert set(profile.steps) == {1, 2, 8}
    assert profile.chunkings == ("whole",)
    assert list(profile.head.cuts) == ["whole"]
    assert load_profile(folder).slowdown_ppm(1, "whole", 0) == profile.slowdown_ppm(2, "whole", 0)
    missing = profile.head.notes["missing"]
    assert missing["chunkings_left_out"] == ["c4"]
    assert missing["pairs_visited_less_than_twice"] == 2
    assert len(missing["not_measured"]) == 13

    out_of_time_after(1000)
    profile = measure_profile(settings("1,2,8"), folder)
    assert profile.chunkings == ("whole", "c4")
    assert profile.row_buckets == (1, 2, 8)
    assert "missing" not in profile.head.notes
    assert not (folder / "partial.json").exists()


def test_a_pair_that_cannot_be_settled_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = measure_corun

    def unsettled(bench: Any, step: Any, *rest: Any) -> Any:
        guidance = step.__self__._guidance
        if len(guidance) == 1 and guidance[0] > 1:
            raise Unsettled("the machine is too busy")
        return one(bench, step, *rest)

    monkeypatch.setattr("profiler.timing.measure_corun", unsettled)
    folder = tmp_path / "p"
    assert main(["profile", "--model", "digits", "--rows", "1,2,3", "--quick", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "minutes for" in printed.err
    assert "5 pairs not settled; the same command goes on from there" in printed.out
    profile = load_profile(folder)
    assert profile.head.notes["missing"]["not_settled"]["whole 0 2"] == "the machine is too busy"
    assert profile.chunkings == ("whole", "c4")
    low, high = (profile.slowdown_ppm(rows, "whole", 0)[0] for rows in (1, 3))
    assert min(low, high) <= profile.slowdown_ppm(2, "whole", 0)[0] <= max(low, high), "between its neighbours"


def test_a_machine_too_busy_for_any_pair_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsettled(*_: Any) -> Any:
        raise Unsettled("the machine is too busy")

    monkeypatch.setattr("profiler.timing.measure_corun", unsettled)
    with pytest.raises(InputError, match="no pair of a step and a whole decode could be settled; what was measured is"):
        measure_profile(settings("1"), tmp_path / "p")


def test_the_command_measures_reports_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "p"
    assert main(["profile", "--model", "digits", "--rows", "1,2", "--quick", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "step, ms by rows" in printed.out
    assert "kappa" in printed.out
    assert "1/s_u + 1/s_v" in printed.out
    assert "profile.png" in printed.out
    assert (folder / "profile.png").stat().st_size > 10_000
    assert (folder / "profile.pdf").exists()
    assert load_profile(folder).head.notes["command"].endswith(f"--out {folder}")


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("profiler.timing.measure_corun", stop)
    folder = tmp_path / "p"
    assert main(["profile", "--model", "digits", "--rows", "1", "--quick", "--out", str(folder)]) == 130
    assert "what was measured is kept; the same command goes on from there" in capsys.readouterr().err
    assert json.loads((folder / "partial.json").read_text())["tables"]["solo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "digits", "--device", "tpu"], "There is no device tpu; use cpu, cuda or cuda:N."),
        (["--model", "digits", "--device", "meta"], "There is no support for device meta"),
        (["--model", "nothing"], "There is no model nothing"),
        (["--model", "digits", "--rows", "0"], "--rows 0: whole numbers from 1 to 1024"),
        (["--model", "digits", "--dtype", "int8"], "--dtype is 'int8'"),
        (["--model", "digits", "--resolution", "33"], "multiples of 8 pixels up to 16384, not 33x33"),
    ],
)
def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["profile", *options, "--out", str(tmp_path / "p")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--model", "digits", "--device", "cuda", "--out", str(tmp_path / "p")]) == 2
    assert "no usable CUDA GPU" in capsys.readouterr().err


def test_a_folder_with_other_things_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["profile", "--model", "digits", "--out", str(tmp_path)]) == 2
    assert "holds thesis.txt, which 'profile' did not write" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_profile_that_ships_is_complete_and_was_measured_by_the_command_that_it_names() -> None:
    profile = load_profile(find_profile("digits-cpu"))
    assert not profile.estimated
    command = "synerdiff profile --model digits --device cpu --out profiler/profiles/digits-cpu"
    assert profile.head.notes["command"] == command
    assert profile.row_buckets == ROWS
    assert {name: profile.chunk_count(name) for name in profile.chunkings} == {"whole": 1, "c4": 4, "c8": 8}
    for name, cuts in profile.head.cuts.items():
        assert len(Chunking(name, tuple(cuts))) == profile.chunk_count(name)
    assert all(spread.n >= 10 for spread in profile.steps.values())
    again = json.loads(json.dumps(findings(profile, CORUN_ROWS)["held_out_error"]))
    assert again == profile.head.notes["held_out_error"], "what it states follows from its tables"
    for rows in ROWS:
        assert all(ppm > 0 for ppm in profile.slowdown_ppm(rows, "c8", 7))


def test_a_profile_says_which_kernels_were_replaced_and_others_do_not_go_on_with_it(tmp_path: Path) -> None:
    asked = {"execution": "eager", "levers": "qkv,channels-last,group-norm"}
    with pytest.raises(InputError, match=r"0\.001 minutes did not suffice"):
        measure_profile(settings("1,2", **asked), tmp_path / "p", minutes=0.001)
    with pytest.raises(
        InputError, match=r"with execution eager \(channels-last, group-norm, qkv\); now it is not given"
    ):
        measure_profile(settings("1,2"), tmp_path / "p")
    profile = measure_profile(settings("1,2", **asked), tmp_path / "p")
    assert (profile.head.execution, profile.head.levers) == ("eager", ("channels-last", "group-norm", "qkv"))
    info = profile.head.notes
    assert info["command"].startswith(
        "synerdiff profile --model digits --device cpu --rows 1,2 --quick --execution eager "
        "--levers channels-last,group-norm,qkv --out "
    )
    assert info["memory_format"] == "channels_last"
    assert info["attention"]["processors"] == ["FusedAttnProcessor2_0"]
    assert load_profile(tmp_path / "p").head == profile.head


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_is_measured_with_its_clocks(tmp_path: Path) -> None:
    profile = measure_profile(make_settings("digits", "cuda", rows="1,2,4", quick=True), tmp_path / "p")
    assert profile.head.execution == "graphs"
    assert profile.head.clocks["looks"] > 0
    assert profile.overhead_ns("decision_lead") > 0
    assert {name: profile.chunk_count(name) for name in profile.chunkings} == {"whole": 1, "c4": 4}
