"""What a captured function does around its graph, with stand-ins for CUDA: a replay runs the function again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from synerdiff.diffusion import stages
from synerdiff.diffusion.checkpoint import load_model
from synerdiff.diffusion.decoder import Chunking
from synerdiff.diffusion.stages import capture_chunks, capture_denoiser

torch.set_num_threads(1)
STREAM = SimpleNamespace(device="cpu", wait_stream=lambda other: None, synchronize=lambda: None)


class Replaying(stages.CapturedFunction[Any]):
    """Replays into the output that the capture made, as a graph does."""

    def __init__(self, function: Any, examples: Any, stream: Any, pool: Any, chained: bool = False) -> None:
        super().__init__(function, examples, stream, pool, chained)
        self._graph.replay = lambda: self.output.copy_(function(*self._inputs))  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[Any]:
        yield

    monkeypatch.setattr(stages, "CapturedFunction", Replaying)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: STREAM)


def test_captured_chunks_are_called_outside_inference_mode_and_keep_their_results() -> None:
    model = load_model("digits")
    cut = Chunking("c3", (4, 9))
    chunks = capture_chunks(model, cut, STREAM, pool=())  # type: ignore[arg-type]
    assert not torch.is_inference_mode_enabled()
    latents = [model.start(seed, 2).latent for seed in (1, 2)]
    hidden = list(latents)
    for chunk in chunks:
        hidden = [chunk(one) for one in hidden]
    for latent, image in zip(latents, hidden, strict=True):
        assert torch.equal(image, model.decode(latent)), "another decode that runs in between overwrites nothing"


def test_a_decode_that_is_not_interrupted_copies_nothing_between_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("digits")
    chunks = capture_chunks(model, Chunking("c3", (4, 9)), STREAM, pool=())  # type: ignore[arg-type]
    given: list[bool] = []
    call = stages.CapturedFunction.__call__

    def watched(self: Any, hidden: Any) -> Any:
        given.append(hidden is self._inputs[0])
        return call(self, hidden)

    monkeypatch.setattr(stages.CapturedFunction, "__call__", watched)
    one, other = (model.start(seed, 2).latent for seed in (1, 2))
    hidden = one
    for chunk in chunks:
        hidden = chunk(hidden)
    assert given == [False, True, True]
    assert torch.equal(hidden, model.decode(one))
    given.clear()
    first = chunks[0](one)
    late = chunks[0](other)
    image = chunks[2](chunks[1](first))
    assert torch.equal(image, model.decode(one))
    assert torch.equal(chunks[2](chunks[1](late)), model.decode(other)), "its buffer held the other's by then"
    assert given == [False, False, False, True, False, True]


def test_captured_steps_equal_eager_ones() -> None:
    eager, captured = load_model("digits"), load_model("digits")
    capture_denoiser(captured, (2, 4, 8), STREAM, pool=())  # type: ignore[arg-type]
    assert captured.row_buckets == (2, 4, 8)
    ends = []
    for model in (eager, captured):
        states = [model.start(seed, 3, 4.0) for seed in (1, 2, 3)]
        while not states[0].done:
            model.step(states)
        ends.append(states)
    for one, other in zip(*ends, strict=True):
        assert float((one.latent - other.latent).abs().max()) < 1e-5


def test_a_scheduler_with_a_history_keeps_it_while_the_graph_replays() -> None:
    """In float32 an unguided step's outputs are the graph's own buffer, which PNDM would find overwritten."""
    ends = []
    for captured in (False, True):
        model = load_model("digits", scheduler="PNDMScheduler")
        if captured:
            capture_denoiser(model, (1,), STREAM, pool=())  # type: ignore[arg-type]
        state = model.start(1, 6, 1.0)
        while not state.done:
            model.step([state])
        ends.append(state.latent)
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
