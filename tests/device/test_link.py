"""Messages between two ends of a link, here both in one process: what is sent arrives, and nobody waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synerdiff.device.link import FIRST_BYTES, Link, LinkLost, Op

torch.set_num_threads(1)


def pair(folder: Path, devices: Any = ("cpu", "cpu")) -> Any:
    store = torch.distributed.FileStore(str(folder / "meeting"), -1)  # type: ignore[attr-defined]

    def end(side: Any) -> Any:
        device, other = torch.device(devices[side]), ("the second", "the first")[side]
        return Link(store, "pair", other, side, device, one_machine=True, timeout_s=60.0)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(end, (0, 1)))


@pytest.fixture
def ends(tmp_path: Path) -> Any:
    return pair(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return pair(tmp_path_factory.mktemp("link"))


def same(found: Any, sent: Any) -> Any:
    return found.keys() == sent.keys() and all(
        found[name].dtype == sent[name].dtype and torch.equal(found[name], sent[name]) for name in sent
    )


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
TENSORS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.booleans()), max_size=5
)


@settings(max_examples=50, deadline=None)
@given(described=TENSORS, text=st.text(max_size=50))
def test_fields_and_tensors_arrive_as_they_were(shared: Any, described: Any, text: str) -> None:
    sent = {}
    for number, (dtype, shape, transposed) in enumerate(described):
        tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape).to(dtype)
        sent[str(number)] = tensor.mT if transposed and tensor.dim() > 1 else tensor
    shared[0].send(Op.STEP, {"text": text}, sent)
    message = shared[1].receive(60)
    assert (message.op, message.fields) == (Op.STEP, {"text": text})
    assert same(message.tensors, sent)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in message.tensors.values() if tensor.numel())
    shared[1].send(Op.DONE)
    assert shared[0].receive(60).op is Op.DONE


@pytest.mark.parametrize("size", [FIRST_BYTES - 1000, FIRST_BYTES - 64, FIRST_BYTES, FIRST_BYTES + 1, 5 * FIRST_BYTES])
def test_a_message_of_any_length_arrives(ends: Any, size: Any) -> None:
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    for text in ("", "x" * 10_000):
        ends[0].send(Op.MERGE, {"text": text}, {"data": data})
        data_sent = data.clone()
        data.zero_()  # the sender may go on with its own memory
        message = ends[1].receive(60)
        assert torch.equal(message.tensors["data"], data_sent)
        assert message.fields["text"] == text
        data.copy_(data_sent)


def test_both_ends_may_send_long_messages_before_either_receives(ends: Any) -> None:
    data = {"data": torch.ones(8 * FIRST_BYTES, dtype=torch.uint8)}
    for end in ends:
        for number in range(3):
            end.send(Op.MERGE, {"number": number}, data)
    for end in ends:
        assert [end.receive(60).fields["number"] for _ in range(3)] == [0, 1, 2]


def test_what_the_other_end_has_is_let_go(ends: Any) -> None:
    data = {"data": torch.ones(3 * FIRST_BYTES, dtype=torch.uint8)}
    for _ in range(4):
        ends[0].send(Op.STEP, {}, data)
    assert len(ends[0]._on_the_way) == 4
    for _ in range(3):
        ends[1].receive(60)
    ends[1].send(Op.DONE)
    ends[0].receive(60)
    assert len(ends[0]._on_the_way) == 1


def test_silence_and_a_lost_end_are_said(ends: Any) -> None:
    with pytest.raises(LinkLost, match=r"the second does not answer: no answer for 0\.2 s"):
        ends[0].ask(Op.READ, timeout_s=0.2)
    for use in (lambda: ends[0].send(Op.READ), lambda: ends[0].receive(60)):
        with pytest.raises(LinkLost, match="the second is gone"):
            use()  # type: ignore[no-untyped-call]


def test_who_waits_for_an_end_that_goes_away_is_told(ends: Any) -> None:
    waiting = threading.Event()
    told = []

    def wait() -> None:
        waiting.set()
        with pytest.raises(LinkLost, match="the first is gone") as found:
            ends[1].receive()
        told.append(str(found.value))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait(60)
    ends.pop(0)  # nothing else holds it
    thread.join(60)
    assert len(told) == 1
    assert "Check the logs" not in told[0], "one sentence of gloo's is enough"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a link between GPUs needs two of them")
def test_tensors_cross_between_gpus(tmp_path: Path) -> None:
    first, second = pair(tmp_path, ("cuda:0", "cuda:1"))
    sent = {"noise": torch.randn(4, 4, 128, 128, device="cuda:0"), "times": torch.arange(4, device="cuda:0")}
    expected = {name: tensor.cpu() for name, tensor in sent.items()}
    first.send(Op.STEP, {"number": 1}, sent)
    for tensor in sent.values():
        tensor.zero_()
    message = second.receive(60)
    assert same({name: tensor.cpu() for name, tensor in message.tensors.items()}, expected)
    second.send(Op.DONE, {}, message.tensors)
    assert same({name: tensor.cpu() for name, tensor in first.receive(60).tensors.items()}, expected)
