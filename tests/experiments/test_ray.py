"""The Ray backend on a cluster of two local nodes: the same bytes as on one machine, whatever happens to workers."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synerdiff import cli
from synerdiff.config.experiment import load_experiment
from synerdiff.core import InputError
from synerdiff.experiments import parcel
from synerdiff.experiments.backends import make_backend, task_size
from synerdiff.experiments.grid import Grid
from synerdiff.experiments.sweep import compute
from synerdiff.profile.folder import write_profile
from tests.builders import affine_profile

POLICY = """
import os, signal
from pathlib import Path
from ray_helper import BATCH
HERE = Path(__file__).parent
class Mine:
    DATA_FILES = ["ray_data.txt"]
    chunking = "whole"
    def __init__(self, batch: int = BATCH):
        from policies.continuous import ContinuousSerial
        self.inner = ContinuousSerial(batch=batch)
    def reset(self, worker, profile):
        mark = Path((HERE / "ray_data.txt").read_text())
        if HERE.name.startswith("synerdiff-policy-") and mark.is_file():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        self.inner.reset(worker, profile)
    def decide(self, view):
        return self.inner.decide(view)
"""
SWEEP = """
name: far
profiles: [p]
requests: 30
seeds: [1, 2]
loads: [0.5, 0.8]
workloads:
  - {name: w, generator: poisson, parameters: {mix: fixed, steps: 4}}
  - {name: t, trace: t.csv}
policies: [{policy: "ray_policy:Mine", label: mine, batch: 4}, {policy: dynamic, batch: 4}]
figures: []
"""


def _world(folder: Path) -> Path:
    write_profile(folder / "p", affine_profile())
    (folder / "t.csv").write_text("arrival_s,steps\n" + "".join(f"{0.1 * i:.1f},3\n" for i in range(30)))
    (folder / "ray_policy.py").write_text(POLICY)
    (folder / "ray_helper.py").write_text("BATCH = 2\n")
    (folder / "ray_data.txt").write_text(str(folder / "kill-one"))
    (folder / "e.yaml").write_text(SWEEP)
    return folder


@pytest.fixture(autouse=True)
def _fresh_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test imports and appends to the path is gone after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("ray_policy", "ray_helper"):
        sys.modules.pop(name, None)


def _kept(folder: Path) -> dict[str, bytes]:
    files = [*(folder / "runs").glob("*.parquet"), folder / "runs.parquet", folder / "requests.parquet"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster of two nodes with one place each."""
    pytest.importorskip("ray", reason="ray is not installed")
    import ray

    cluster = _two_nodes()
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def _two_nodes(attempts: int = 3) -> Any:
    """Ray gives a node 30 s to start; a busy machine may take longer."""
    from ray.cluster_utils import Cluster

    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
    except Exception as error:
        if "timed out" not in str(error):
            raise
        if attempts == 1:
            pytest.skip("Ray gives a node 30 s to start, and three times this machine was too busy for that")
        return _two_nodes(attempts - 1)
    return cluster


def test_a_cluster_gives_the_same_bytes_though_a_worker_is_killed(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = _world(tmp_path)
    monkeypatch.chdir(world)
    assert cli.main(["sweep", "e.yaml", "--jobs", "1", "--out", "here"]) == 0
    (world / "kill-one").touch()
    far = ["sweep", "e.yaml", "--backend", "ray", "--address", address, "--out", "far"]
    assert cli.main(far) == 0
    assert not (world / "kill-one").exists(), "a worker was killed"
    assert "12 runs, 12 computed now" in capsys.readouterr().out
    assert _kept(world / "far") == _kept(world / "here")
    lost = sorted((world / "far" / "runs").glob("*.parquet"))[:3]
    for path in lost:
        path.unlink()
    assert cli.main(far) == 0
    assert "12 runs, 3 computed now and 9 found" in capsys.readouterr().out
    assert _kept(world / "far") == _kept(world / "here")

    def refuse(number: int) -> int:
        """Nested, so that it travels by value: a node need not have these tests."""
        if number == 3:
            raise InputError("no 3")
        return number

    def fail(number: int) -> int:
        raise ZeroDivisionError

    backend = make_backend("ray", None)
    with pytest.raises(InputError, match=r"^no 3$"):
        list(backend.run_unordered(refuse, range(4)))
    with pytest.raises(InputError, match=r"^The Ray cluster gave up \(.*ZeroDivisionError.*what was finished is kept"):
        list(backend.run_unordered(fail, range(2)))


def test_a_parcel_needs_no_file_of_the_machine_that_packed_it(tmp_path: Path) -> None:
    world = _world(tmp_path / "world")
    runs = Grid(load_experiment(world / "e.yaml"), world, world / "out").runs({})
    own = [run for run in runs if run.label == "mine" and run.source.number == 0]
    packed = parcel.packed(own)
    assert {Path(name).name for name in packed[0].files} == {"ray_policy.py", "ray_helper.py", "ray_data.txt"}
    assert packed[0].run.spec.source is packed[1].run.spec.source
    here = [compute(run) for run in own]
    files = [(world / "out" / "runs" / f"{key}.parquet").read_bytes() for key, _ in here]
    (tmp_path / "parcels").write_bytes(pickle.dumps(packed))
    shutil.rmtree(world)
    code = (
        "import pickle, sys; from pathlib import Path; from synerdiff.experiments import parcel;"
        "from synerdiff.experiments.sweep import compute;"
        "found = [parcel.computed(p, compute) for p in pickle.loads(Path(sys.argv[1]).read_bytes())];"
        "Path(sys.argv[2]).write_bytes(pickle.dumps(found))"
    )
    arguments = [str(tmp_path / "parcels"), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[2], check=True)
    found: list[Any] = pickle.loads((tmp_path / "found").read_bytes())
    assert found == [(key, row, content) for (key, row), content in zip(here, files, strict=True)]


def test_a_node_with_another_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = _world(tmp_path)
    run = Grid(load_experiment(world / "e.yaml"), world, world / "out").runs({})[-1]
    (packed,) = parcel.packed([run])
    monkeypatch.setattr(parcel, "library_versions", lambda: {**packed.versions, "numpy": "0.1"})
    with pytest.raises(InputError, match=r"has numpy 0\.1, and this machine .*; results would differ"):
        parcel.computed(packed, compute)


def test_tasks_take_two_seconds_of_work_and_fewer_items_towards_the_end() -> None:
    assert task_size(left=1000, places=2, item_s=0.1) == 20
    assert task_size(left=1000, places=2, item_s=2.0) == 1
    assert task_size(left=40, places=2, item_s=0.01) == 10
    assert task_size(left=3, places=2, item_s=0.01) == 1
    assert task_size(left=10_000, places=64, item_s=0.02) == 78


def test_addresses_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _world(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", "e.yaml", "--address", "auto"]) == 2
    said = "--address is that of a Ray cluster; the backend is loky, so give --backend ray too.\n"
    assert capsys.readouterr().err == said
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address, why in (
        (f"127.0.0.1:{port}", f"--address 127.0.0.1:{port}: no Ray cluster answers there (Connection refused).\n"),
        ("nonsense", "--address is nonsense; HOST:PORT or auto is needed.\n"),
        ("a:b", "--address is a:b; HOST:PORT or auto is needed.\n"),
    ):
        assert cli.main(["sweep", "e.yaml", "--backend", "ray", "--address", address]) == 2
        assert capsys.readouterr().err == why
    assert not (tmp_path / "results").exists()
