"""Exact chunks of a decode, and the choice of cuts."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synerdiff.core import InputError
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import WHOLE, Chunking, choose_cuts

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine

ATOMS = {"digits": 13, "tiny-sd": 20, "tiny-sdxl": 20}


@pytest.fixture(scope="module", params=sorted(ATOMS))
def model(request: Any) -> Any:
    return load_model(request.param)


def run(chunks: Any, latent: Any) -> Any:
    for chunk in chunks:
        latent = chunk(latent)
    return latent


@torch.inference_mode()
def reference(model: Any, latent: Any) -> Any:
    return model.vae.decode((latent / model.vae.config.scaling_factor).to(model.vae.dtype)).sample


def groupings(atoms: Any) -> Iterator[Any]:
    yield ()
    yield tuple(range(1, atoms))
    yield from ((cut,) for cut in range(1, atoms))
    draw = random.Random(7)
    for _ in range(30):
        yield tuple(sorted(draw.sample(range(1, atoms), draw.randint(2, atoms - 1))))


def test_every_grouping_equals_the_whole_decode_bit_for_bit(model: Any) -> None:
    latent = model.start(3, 5).latent
    expected = reference(model, latent)
    atoms = len(model.decoder.atoms)
    assert atoms == ATOMS[model.name]
    assert expected.isfinite().all()
    assert float(expected.std()) > 0.01
    for cuts in groupings(atoms):
        chunks = model.chunks(Chunking("some", cuts))
        assert len(chunks) == len(cuts) + 1
        assert torch.equal(run(chunks, latent), expected), cuts
    assert torch.equal(model.decode(latent), expected)


def test_leaving_out_an_atom_is_noticed() -> None:
    model = load_model("tiny-sd")
    latent = model.start(3, 5).latent
    for skipped in (2, 5, 18):
        atoms = [atom for index, atom in enumerate(model.decoder.atoms) if index != skipped]
        hidden = latent
        try:
            with torch.inference_mode():
                for atom in atoms:
                    hidden = atom.run(hidden)
        except RuntimeError:
            continue
        assert not torch.equal(hidden, reference(model, latent))


def test_chunks_are_exact_in_bfloat16_too() -> None:
    model = load_model("tiny-sdxl", dtype=torch.bfloat16)
    latent = model.start(3, 5).latent
    assert latent.dtype is torch.float32
    image = run(model.chunks(Chunking("atoms", tuple(range(1, 20)))), latent)
    assert image.dtype is torch.bfloat16
    assert torch.equal(image, reference(model, latent))


def test_two_decodes_may_interleave_on_the_same_chunks() -> None:
    model = load_model("tiny-sd")
    first, second = (model.start(seed, 5).latent for seed in (1, 2))
    chunks = model.chunks(Chunking("c3", (5, 12)))
    a, b = chunks[0](first), chunks[0](second)
    b, a = chunks[1](b), chunks[1](a)
    assert torch.equal(chunks[2](a), reference(model, first))
    assert torch.equal(chunks[2](b), reference(model, second))


@pytest.mark.parametrize("cuts", [(0,), (3, 3), (5, 4), (-1,)])
def test_cuts_must_rise(cuts: Any) -> None:
    with pytest.raises(InputError, match="must rise strictly"):
        Chunking("bad", cuts)


def test_cuts_beyond_the_last_atom_are_refused() -> None:
    with pytest.raises(InputError, match="cuts at atom 13, but the decoder has only 13"):
        Chunking("bad", (13,)).ranges(13)
    assert Chunking("fits", (12,)).ranges(13) == (range(12), range(12, 13))


def test_choosing_cuts_by_hand_checked_example() -> None:
    times = [1, 1, 1, 5, 1, 1, 2]
    assert choose_cuts(times, 1) is WHOLE
    chosen = choose_cuts(times, 3)
    assert chosen.name == "c3"
    assert [sum(times[i] for i in part) for part in chosen.ranges(7)] == [3, 5, 4]
    assert choose_cuts(times, 7).cuts == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("chunks", [0, 4])
def test_impossible_chunk_counts_are_refused(chunks: int) -> None:
    with pytest.raises(InputError, match="1 to 3 chunks"):
        choose_cuts([1, 2, 3], chunks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.data())
def test_no_other_cutting_has_a_smaller_largest_chunk(times: Any, data: Any) -> None:
    count = data.draw(st.integers(1, len(times)))

    def largest(cuts: Any) -> Any:
        return max(sum(times[i] for i in part) for part in Chunking("x", cuts).ranges(len(times)))

    best = min(largest(cuts) for cuts in itertools.combinations(range(1, len(times)), count - 1))
    assert largest(choose_cuts(times, count).cuts) == best
