"""``synerdiff trace``: the four commands from end to end."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer.main

from synerdiff.cli.main import main
from synerdiff.cli.trace import trace_app
from synerdiff.core import ControlNetUse, InputError, LoraUse
from tests.traces.test_gentd26 import folder_of
from traces.native import read_trace


def trace(*arguments: str | Path) -> None:
    typer.main.get_command(trace_app)([str(argument) for argument in arguments], "trace", standalone_mode=False)


def test_generate_then_describe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "burst.csv"
    trace("generate", "mmpp", "--requests", "400", "--rate", "2", "--mix", "unguided-4", "--seed", "7", "--out", path)
    assert "400 requests" in capsys.readouterr().out
    assert len(read_trace(path)) == 400
    trace("describe", path, "--out", tmp_path / "pictures")
    out = capsys.readouterr().out
    for expected in ("burst.csv", "400", "4: 100.0%", "guided 0.0%", "index of dispersion", "10 s", "LoRAs", "none"):
        assert expected in out
    assert {picture.name for picture in (tmp_path / "pictures").glob("*.*g")} == {"trace.png", "trace.svg"}


def test_convert_gentd26_prints_what_it_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "requests.csv"
    trace("convert", folder_of(tmp_path), target, "--format", "gentd26")
    out = capsys.readouterr().out
    for line in ("7 rows", "1 dropped: image-to-image", "1 dropped: steps or images missing", "4 requests"):
        assert line in out
    assert "1 exact duplicates kept" in out
    assert read_trace(target)[2].loras == (LoraUse("L0001", 0.8), LoraUse("L0000"))


def test_convert_katz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "katz.json", tmp_path / "katz.csv"
    entry = {"timestamp": 10, "ip": "x", "scene_id": "A", "base_model_id": "m", "controlnets": ["c"], "loras": [None]}
    source.write_text(json.dumps([entry, entry | {"timestamp": 12.5, "scene_id": "B"}]))
    trace("convert", source, target, "--format", "katz", "--steps", "8", "--checkpoints", "keep")
    (first, second) = read_trace(target)
    assert (first.steps, first.base_model, first.controlnets, second.arrival_ns) == (
        8,
        "m",
        (ControlNetUse("c"),),
        2_500_000_000,
    )
    assert "2 nulls among loras left out" in capsys.readouterr().out


def test_a_mix_of_shapes_is_drawn_by_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix, path = tmp_path / "mix.json", tmp_path / "t.csv"
    shapes = [
        {"width": 512, "height": 768, "num_inference_steps": 20, "weight": 0.15},
        {"width": 1536, "height": 1536, "num_inference_steps": 35, "weight": 0.85, "slo_ms": 2000},
    ]
    mix.write_text(json.dumps(shapes))
    trace("generate", "poisson", "--requests", "2000", "--rate", "2", "--mix-file", mix, "--seed", "3", "--out", path)
    requests = read_trace(path)
    small = [request for request in requests if request.width == 512]
    assert {(r.height, r.width, r.steps, r.slo_ns) for r in requests} == {
        (768, 512, 20, None),
        (1536, 1536, 35, 2 * 10**9),
    }
    assert len(small) / 2000 == pytest.approx(0.15, abs=0.03)
    trace("generate", "poisson", "--requests", "2000", "--rate", "2", "--seed", "3", "--out", path)
    assert [request.arrival_ns for request in read_trace(path)] == [request.arrival_ns for request in requests]
    mix.write_text('[{"width": 512, "height": 512, "weight": 1}]')
    with pytest.raises(InputError, match="no entry says how many steps; give them with --steps"):
        trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--out", path)
    trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--steps", "9", "--out", path)
    assert {request.steps for request in read_trace(path)} == {9}
    mix.write_text('[{"steps": 5, "weight": "much"}]')
    with pytest.raises(InputError, match="entry 1: weight is not a number"):
        trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--out", path)
    mix.write_text('[{"steps": 5, "weight": 0}]')
    with pytest.raises(InputError, match=r"shapes\[0\].weight is 0.0; "):
        trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--out", path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            '{"steps": 5, "weight": 1, "weight": 5}, {"steps": 9}',
            "1 of its entries cannot be read: a name is in it twice",
        ),
        ('{"steps": 5}, "x"', "1 of its entries cannot be read: not a JSON object"),
        ('{"steps": 5, "weight": 1, "ratio": 2}', "weight and ratio both say how often"),
        ('{"steps": 5, "loras": "a"}', "a shape has no loras"),
    ],
)
def test_no_part_of_a_mix_is_left_unread(tmp_path: Path, entries: str, message: str) -> None:
    mix, path = tmp_path / "mix.json", tmp_path / "t.csv"
    mix.write_text(f"[{entries}]")
    with pytest.raises(InputError, match=message):
        trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--out", path)
    mix.write_text('[{"steps": 5}]')
    with pytest.raises(InputError, match="its entries say how many steps, which excludes --steps"):
        trace("generate", "poisson", "--requests", "2", "--mix-file", mix, "--steps", "9", "--out", path)


def test_seeds_of_mlperf_runs_are_taken(tmp_path: Path) -> None:
    """That of the H100 run of round 4.1 is beyond 2^63."""
    rate = ("--rate", "16.2", "--duration", "1")
    assert (
        main(["trace", "generate", "mlperf", "--seed", "14962580496156340209", *rate, "--out", str(tmp_path / "t.csv")])
        == 0
    )
    assert main(["trace", "generate", "mlperf", "--seed", str(2**64), *rate, "--out", str(tmp_path / "u.csv")]) == 2


def test_convert_and_describe_a_foreign_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "log.csv", tmp_path / "trace.csv"
    source.write_text("t,prompt\n5000,a\n4000,b\n")
    trace("convert", source, target, "--map", "arrival=t:ms,steps=8", "--sort")
    out = capsys.readouterr().out
    for line in ("2 rows", "arrival from t (milliseconds)", "1 follow one that arrived later: sorted", "2 requests"):
        assert line in out
    assert [(request.arrival_ns, request.prompt) for request in read_trace(target)] == [(0, "b"), (10**9, "a")]
    trace("describe", source, "--map", "arrival=t:ms,steps=8", "--sort")
    assert "8: 100.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "a", "b.csv", "--format", "katz", "--map", "steps=3"), "--map belongs to --format auto"),
        (("convert", "a", "b.csv", "--steps", "3"), "--steps belongs to --format katz; give --map steps=3 instead"),
        (("convert", "a", "b.csv", "--checkpoints", "keep"), "--checkpoints belongs to --format gentd26 and katz"),
        (("describe", "missing.csv"), "missing.csv: there is no such trace"),
        (("generate", "poisson", "--out", "x.csv"), "give either requests or duration_s"),
        (("generate", "poisson", "--requests", "3", "--out", "x.txt"), "ends in .csv"),
        (("convert", "a", "b.csv", "--format", "azure"), "--format is 'azure'; allowed are auto and gentd26 and katz"),
        (("convert", "a", "b.csv", "--format", "gentd26", "--steps", "3"), "--steps belongs to --format katz"),
        (("convert", "a", "b.csv", "--format", "katz", "--all-types"), "--all-types belongs to --format gentd26"),
        (("convert", "a", "b.csv", "--format", "katz", "--service", "C"), "--service is 'C'; allowed are A and B"),
        (("convert", "a", "b.csv", "--format", "katz", "--adapters", "all"), "adapters is 'all'; allowed are keep"),
        (("fetch", "azure"), "'azure' is not a trace that can be fetched; known is gentd26"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        trace(*arguments)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_command_loads_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys, synerdiff.cli.trace, traces.native; "
        "print(sorted({'numpy', 'pandas', 'pyarrow', 'matplotlib', 'rich.progress'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The published files, unpacked as they are published, on a server on this machine."""
    folder = os.environ.get("SYNERDIFF_DATA")
    if not folder:
        pytest.skip("SYNERDIFF_DATA names no folder with GenTD26")
    original, served = Path(folder) / "gentd26-original", tmp_path / "served"
    served.mkdir()
    shutil.copy(original / "data_trace_processed.tar.gz", served)
    packed = original / "lora_request_trace.csv.gz"
    (served / "lora_request_trace.csv").write_bytes(gzip.decompress(packed.read_bytes()))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_fetch_convert_describe_the_real_trace(tmp_path: Path, mirror: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = tmp_path / "fetched", tmp_path / "gentd26.csv"
    trace("fetch", "gentd26", "--out", folder, "--base-url", mirror)
    out = capsys.readouterr().out
    assert out.count("fetched, SHA-256 as published") == 2
    assert "Please cite: Yanying Lin" in out
    trace("convert", folder, target, "--format", "gentd26")
    assert "26,823 rows" in capsys.readouterr().out
    trace("describe", target)
    assert "24,413" in capsys.readouterr().out
