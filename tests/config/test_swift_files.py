"""adapters.csv and cluster files: what is read, and every way in which they can be wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from synerdiff.config.cluster import load_cluster
from synerdiff.core import InputError
from synerdiff.profile.adapters import COLUMNS, QUANTITIES, Adapters, load_adapters, write_adapters
from synerdiff.profile.tables import Spread
from tests.swift_builders import LORA, toy_adapters

HEADER = ",".join(COLUMNS) + "\n"


def written(folder: Path, text: str) -> Path:
    (folder / "adapters.csv").write_text(text)
    return folder


def test_a_profile_may_have_no_adapters(tmp_path: Path) -> None:
    assert load_adapters(tmp_path) is None


def test_adapters_come_back_as_they_were_written(tmp_path: Path) -> None:
    write_adapters(tmp_path, toy_adapters())
    assert load_adapters(tmp_path, "test") == toy_adapters()


def test_measured_points_are_verbatim_and_sizes_between_are_linear() -> None:
    adapters = Adapters("p", {"lora_read": {100: Spread(10, 8, 14, 5), 300: Spread(31, 20, 40, 5)}})
    assert adapters.spread("lora_read", 100) == Spread(10, 8, 14, 5)
    assert adapters.spread("lora_read", 200) == Spread(21, 14, 27, 0)
    with pytest.raises(
        InputError, match=r"'p': adapters\.csv knows lora_read from 100 to 300 bytes; 301 were asked for"
    ):
        adapters.ns("lora_read", 301)
    with pytest.raises(
        InputError, match=r"'p': adapters\.csv has no lora_merge \(put it into the denoiser's weights\)"
    ):
        adapters.ns("lora_merge", 100)
    assert adapters.ns("lora_merge_more", 100) == adapters.ns("residual_add", 2) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,at,median,p10,p90\n", "the column n is missing; a profile table has name, at, median, p10, p90, n"),
        (HEADER + "lora_read,1,2\n", "line 2: the row has 3 cells and the header has 6"),
        (HEADER + "lora_speed,1,2,2,2,1\n", "line 2: name is 'lora_speed'; known are lora_read, lora_copy"),
        (HEADER + "lora_read,1,x,2,2,1\n", "line 2: median is 'x'; a whole number of at least 0 is needed"),
        (HEADER + "lora_read,0,2,2,2,1\n", "line 2: at is 0; lora_read takes at least 1"),
        (HEADER + "latent_bytes,2,2,2,2,1\n", "line 2: at is 2; latent_bytes takes 1"),
        (HEADER + "link_latency,2,2,2,2,1\n", "line 2: at is 2; link_latency takes 0"),
        (HEADER + "lora_read,1,2,3,4,1\n", "line 2: median is 2, outside its own p10-p90 range 3-4"),
        (HEADER + "lora_read,1,2,2,2,1\n\nlora_read,1,2,2,2,1\n", "line 4: lora_read at 1 is given twice"),
    ],
)
def test_a_damaged_table_names_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_adapters(written(tmp_path, text))


def test_every_quantity_is_documented() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "swiftdiffusion.md").read_text(encoding="utf-8")
    for name in QUANTITIES:
        assert f"`{name}`" in text, name


FULL = """
workers:
  - {denoise_gpu: 0, decode_gpus: [0, 1], guidance_gpu: 1}
  - {denoise_gpu: 2, guidance_gpu: 3, controlnet_slots: 4}
controlnet_services:
  - {gpu: 4, controlnets: [canny, depth]}
  - {gpu: 5, slots: 3}
strategies: {controlnets: service, loras: asynchronous, lora_bound_steps: 10, guidance: two-gpus}
link: {gb_per_s: 100, latency_us: 20}
loras: {mib: 380, sizes_mib: {big: 435}, loaders: 2, host_cache_mib: 8000, device_cache_mib: 800, cache: lfu}
"""


def test_a_cluster_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(FULL)
    cluster = load_cluster(path)
    assert cluster.gpus == {0, 1, 2, 3, 4, 5}
    assert cluster.workers[0].lanes == (0, 1)
    assert cluster.workers[1].lanes == (2,)
    assert cluster.loras.bytes_of("big") == 435 << 20
    assert cluster.loras.bytes_of("other") == 380 << 20
    assert LORA == 400 << 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workers: []\n", "workers is empty; at least one entry is needed"),
        ("strategies: {}\n", "workers is missing"),
        (
            "workers: [{denoise_gpu: 0, gpus: 2}]\n",
            "workers[0]: there is no field 'gpus'; known are profile, speed, sample_host_s, denoise_gpu",
        ),
        ("workers: [3]\n", "workers[0]: named fields are needed: profile, speed"),
        ("workers: [{denoise_gpu: -1}]\n", "workers[0].denoise_gpu is -1; it must be greater than or equal to 0"),
        ("workers: [{denoise_gpu: 0}, {denoise_gpu: 0}]\n", "GPU 0 belongs to workers[0] and to workers[1]"),
        (
            "workers: [{denoise_gpu: 0}]\ncontrolnet_services: [{gpu: 0, slots: 1}]\n",
            "GPU 0 belongs to workers[0] and to controlnet_services[0]; every GPU has one owner",
        ),
        ("workers: [{denoise_gpu: 0, guidance_gpu: 0}]\n", "workers[0]: guidance_gpu and denoise_gpu are both 0"),
        (
            "workers: [{denoise_gpu: 0}]\nstrategies: {guidance: two-gpus}\n",
            "workers[0] has no guidance_gpu, which guidance on two GPUs needs",
        ),
        (
            "workers: [{denoise_gpu: 0}]\nstrategies: {controlnets: service}\n",
            "controlnets are a service, and controlnet_services is empty",
        ),
        (
            "workers: [{denoise_gpu: 0}]\nstrategies: {loras: lazy}\n",
            "strategies.loras is 'lazy'; it must be 'synchronous' or 'asynchronous'",
        ),
        (
            "workers: [{denoise_gpu: 0}]\ncontrolnet_services: [{gpu: 1}]\n",
            "controlnet_services[0]: name the controlnets that it holds, or give slots",
        ),
        (
            "workers: [{denoise_gpu: 0}]\ncontrolnet_services: [{gpu: 1, slots: 1, controlnets: [a, b]}]\n",
            "2 controlnets do not fit 1 slots",
        ),
    ],
)
def test_a_wrong_cluster_file_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as found:
        load_cluster(path)
    assert str(found.value).startswith(str(path))
