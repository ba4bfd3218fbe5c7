"""Structure-aware fuzzing of every reader: a valid file with one thing changed.

Whatever is changed, the reader gives a value or an InputError of one sentence that names the file; what it gives is
written and read again as the same value. Seeds are fixed, so that every run tries the same files.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from synerdiff.config.cluster import load_cluster
from synerdiff.config.experiment import load_experiment
from synerdiff.core import InputError
from synerdiff.diffusion import MODELS
from synerdiff.fidelity.table import read_fidelity, write_fidelity
from synerdiff.files import read_yaml, write_yaml
from synerdiff.profile.adapters import load_adapters, write_adapters
from synerdiff.profile.folder import SHIPPED, load_profile, write_profile
from traces.native import read_trace, write_trace

EXAMPLES = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
PROFILE = SHIPPED / "digits-cpu"
EXPERIMENT = """name: fuzz
profiles: [digits-cpu]
workloads:
  - {name: w, generator: gamma, parameters: {cv: 2.0}, loads: [0.5, 0.8], seeds: [1, 2]}
  - {name: t, trace: t.csv, windows: [{start_s: 0, end_s: 10}], backlog: true}
policies:
  - {policy: static, parameters: {max_wait_s: 0.5}, batch: [2, 4], label: s}
  - {policy: dynamic, batch: 4, steps_scale: 0.7, skip: false}
loads: [0.5]
seeds: [1]
requests: 30
slo: {solo_multiple: 3}
skip_budget: {fraction: 0.3, warmup_steps: 2, longest_run: 1, mode: reuse}
batch_search: {batches: [1, 2], loads: [0.6], seed: 3, requests: 50}
contention: [0.5, 1.0]
decode_share: [1.0]
decode_gpus: [[0], [0, 1]]
figures: [latency-load]
"""
CLUSTER = """workers:
  - {denoise_gpu: 0, decode_gpus: [0, 0], guidance_gpu: 4, controlnet_slots: 2}
  - {denoise_gpu: 1, decode_gpus: [1], guidance_gpu: 5}
strategies: {controlnets: service, loras: asynchronous, lora_bound_steps: 5, guidance: two-gpus}
controlnet_services:
  - {gpu: 2, controlnets: [canny, depth]}
  - {gpu: 3, slots: 2}
link: {gb_per_s: 50.0, latency_us: 10.0}
loras: {mib: 100.0, sizes_mib: {a: 20.0}, loaders: 2, storage_gb_per_s: 1.5, host_cache_mib: 1000.0, cache: lfu}
"""
TRACE = """arrival_s,steps,images,guidance_scale,height,width,base_model,loras,controlnets,slo_s,seed
0,4,1,7.5,32,32,m,a;b@0.5,canny@0.7=x.png,3,1
0.5,20,2,1,,,,,,,
0.5,30,1,4.25,,,m,c,depth,0.25,9223372036854775807
"""
ADAPTERS = """name,at,median,p10,p90,n
lora_read,1000,50,40,60,9
lora_read,2000,90,80,95,9
lora_merge,1000,5,5,5,3
latent_bytes,1,512,512,512,1
link_latency,0,9,8,10,4
"""
WORDS = [
    "", " ", "0", "-0", "-1", "1", "2", "1.0", "0.5", "1e3", "1e-320", "1e400", "nan", ".nan", "inf", ".inf", "1_0",
    "010",
    "1:20", "0x10", "\u0663", "\uff11", "true", "null", "~", "no", "yes", "2026-02-31", "9" * 30, "9" * 5000,
    "x" * 140_000,
    "[]", "{}", "[1]", "{a: 1}", "[[1]]", "*a", "&a x", "<<", "!!int x", "!!python/name:os", "'", '"', "#", "- 1",
    "a\tb",
    "\x00", "\x07", "\x85", "\u2028", "\ud800", "\ufeff", "a\nb", "a;b", ";", "a@1_0", "=", "@", "..", "/", "guided",
    "varies",
]  # fmt: skip


def words() -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(WORDS),
        st.integers(-(10**20), 10**20).map(str),
        st.floats().map(repr),
        st.text(max_size=8),
    )


@st.composite
def changed_table(draw: st.DrawFn, text: str) -> str:
    """One cell, row, column or character of a CSV table changed; half of the cells past the third row."""
    rows = list(csv.reader(io.StringIO(text)))
    late = draw(st.booleans())
    row = draw(st.integers(min(3, len(rows) - 1) if late else 0, len(rows) - 1))
    column = draw(st.integers(0, len(rows[row]) - 1))
    how = draw(
        st.sampled_from(["cell", "cell", "cell", "cell", "drop", "double", "cut", "more", "column", "swap", "raw"])
    )
    if how == "cell":
        rows[row][column] = draw(words())
    elif how == "drop":
        del rows[row]
    elif how == "double":
        rows.insert(draw(st.integers(1, len(rows))), list(rows[row]))
    elif how == "cut":
        del rows[row][column]
    elif how == "more":
        rows[row].insert(column, draw(words()))
    elif how == "column":
        rows = [[*cells, cells[column]] if column < len(cells) else cells for cells in rows]
    elif how == "swap":
        other = draw(st.integers(0, len(rows) - 1))
        rows[row], rows[other] = rows[other], rows[row]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    whole = out.getvalue()
    return spoiled(draw, whole) if how == "raw" else whole


def spoiled(draw: st.DrawFn, text: str) -> str:
    """A word put somewhere into the text, or in place of a part of it."""
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(words()) + text[at + draw(st.integers(0, 12)) :]


@st.composite
def changed_yaml(draw: st.DrawFn, text: str) -> str:
    """One value, line or character changed; half of the changes past the first third."""
    values = list(re.finditer(r"(?<=[:\[,] )[^\[\]{},\n]+|(?<=\[)[^\[\]{},\n]+", text))
    late = draw(st.booleans())
    how = draw(st.sampled_from(["value", "value", "value", "key", "line", "double", "raw"]))
    if how == "value":
        value = draw(st.sampled_from(values[len(values) // 3 :] if late else values))
        return text[: value.start()] + draw(words())[:6000] + text[value.end() :]
    if how == "key":
        key = draw(st.sampled_from(list(re.finditer(r"[a-z_]+(?=:)", text))))
        return text[: key.start()] + draw(words()) + text[key.end() :]
    if how == "raw":
        return spoiled(draw, text)
    lines = text.splitlines(keepends=True)
    at = draw(st.integers(len(lines) // 3 if late else 0, len(lines) - 1))
    if how == "line":
        del lines[at]
    else:
        lines.insert(draw(st.integers(0, len(lines))), lines[at])
    return "".join(lines)


def bytes_of(text: str) -> bytes:
    """Surrogates make bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogatepass")


@contextmanager
def world() -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield Path(folder)


def same_again(read: Callable[[Path], Any], write: Callable[[Path, Any], object], place: Path, what: str) -> bool:
    """The file is refused in one sentence that names it, or what it holds comes back from what is written of it.

    Returns whether it was read.
    """
    try:
        value = read(place)
    except InputError as error:
        said = str(error)
        assert what in said
        assert "\n" not in said
        assert len(said) < 1000
        return False
    with world() as folder:
        again = folder / place.name
        write(again, value)
        assert read(again) == value
    return True


def test_experiment_files() -> None:
    outcomes: set[bool] = set()

    @EXAMPLES
    @given(changed_yaml(EXPERIMENT))
    def check(text: str) -> None:
        with world() as folder:
            (folder / "e.yaml").write_bytes(bytes_of(text))
            outcomes.add(
                same_again(
                    load_experiment,
                    lambda path, value: write_yaml(path, value.model_dump(mode="json", exclude_unset=True)),
                    folder / "e.yaml",
                    "e.yaml",
                )
            )

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"


def test_cluster_files() -> None:
    outcomes: set[bool] = set()

    @EXAMPLES
    @given(changed_yaml(CLUSTER))
    def check(text: str) -> None:
        with world() as folder:
            (folder / "c.yaml").write_bytes(bytes_of(text))
            outcomes.add(
                same_again(
                    load_cluster,
                    lambda path, value: write_yaml(path, value.model_dump(mode="json", exclude_unset=True)),
                    folder / "c.yaml",
                    "c.yaml",
                )
            )

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"


def test_traces() -> None:
    outcomes: set[bool] = set()

    @EXAMPLES
    @given(changed_table(TRACE))
    def check(text: str) -> None:
        with world() as folder:
            (folder / "t.csv").write_bytes(bytes_of(text))
            outcomes.add(same_again(read_trace, write_trace, folder / "t.csv", "t.csv"))

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"


@cache
def profile_texts() -> dict[str, str]:
    """A small profile: the shipped one with two of its chunkings and without notes."""
    texts = {}
    for name in ("steps.csv", "chunks.csv", "corun.csv", "overheads.csv"):
        head, *lines = text_of(PROFILE / name).splitlines(keepends=True)
        kept = [line for line in lines if name in ("steps.csv", "overheads.csv") or line.startswith(("whole,", "c4,"))]
        texts[name] = head + "".join(kept)
    fields_of_head = read_yaml(PROFILE / "profile.yaml", "profile")
    fields = (
        "schema_version",
        "name",
        "provenance",
        "row_buckets",
        "device",
        "model",
        "weights",
        "resolution",
        "dtype",
    )
    with world() as folder:
        write_yaml(
            folder / "p.yaml",
            {name: fields_of_head[name] for name in fields if name in fields_of_head} | {"clocks": {"mhz": [1, 2]}},
        )
        texts["profile.yaml"] = text_of(folder / "p.yaml")
    return texts


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def comparable(profile: Any) -> Any:
    """Everything but the hash of its files, in which quotes and order count."""
    return {
        name: getattr(profile, name)
        for name in profile.__dataclass_fields__
        if name != "content_hash" and name[0] != "_"
    }


@pytest.mark.parametrize("name", ["profile.yaml", "steps.csv", "chunks.csv", "corun.csv", "overheads.csv"])
def test_profiles(name: str) -> None:
    change = changed_yaml if name.endswith("yaml") else changed_table

    outcomes: set[bool] = set()

    @EXAMPLES
    @given(change(profile_texts()[name]))
    def check(text: str) -> None:
        with world() as folder:
            (folder / "p").mkdir()
            for other, whole in profile_texts().items():
                (folder / "p" / other).write_bytes(bytes_of(text if other == name else whole))
            outcomes.add(
                same_again(
                    lambda path: comparable(load_profile(path)),
                    lambda path, value: write_profile(path, load_profile(folder / "p")),
                    folder / "p",
                    str(folder / "p"),
                )
            )

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"


def rewrite_adapters(path: Path, value: Any) -> None:
    path.mkdir()
    write_adapters(path, value)


def test_adapter_tables() -> None:
    outcomes: set[bool] = set()

    @EXAMPLES
    @given(changed_table(ADAPTERS))
    def check(text: str) -> None:
        with world() as folder:
            (folder / "p").mkdir()
            (folder / "p" / "adapters.csv").write_bytes(bytes_of(text))
            outcomes.add(same_again(load_adapters, rewrite_adapters, folder / "p", "adapters.csv"))

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"


@pytest.mark.parametrize("name", ["fidelity.yaml", "fidelity.csv"])
def test_fidelity_tables(name: str) -> None:
    shipped = MODELS / "digits"
    lines = text_of(shipped / "fidelity.csv").splitlines(keepends=True)
    texts = {"fidelity.yaml": text_of(shipped / "fidelity.yaml"), "fidelity.csv": "".join(lines[:14])}
    change = changed_yaml if name.endswith("yaml") else changed_table

    outcomes: set[bool] = set()

    @EXAMPLES
    @given(change(texts[name]))
    def check(text: str) -> None:
        with world() as folder:
            place = folder / "f"
            place.mkdir()
            for other, whole in texts.items():
                (place / other).write_bytes(bytes_of(text if other == name else whole))
            outcomes.add(
                same_again(
                    lambda path: (read_fidelity(path).head, sorted(map(repr, read_fidelity(path).rows))),
                    lambda path, value: write_fidelity(
                        path, {k: v for k, v in value[0].items() if k != "schema_version"}, read_fidelity(place).rows
                    ),
                    place,
                    str(place),
                )
            )

    check()
    assert outcomes == {True, False}, "some changes are harmless, others are not"
