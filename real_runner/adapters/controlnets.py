"""Where a step's ControlNets run, on the worker's own device before its forward or in services beside its encoder, and
the forward that they steer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from real_runner.account import SERVICE_LOST
from real_runner.adapters.ledger import Clock, Instant, Ledger
from synerdiff.core import InputError, SampleId
from synerdiff.device.link import Link, LinkLost, Message, Op
from synerdiff.diffusion import SHIPPED_CONTROLNETS
from synerdiff.diffusion.denoisers.controlnet import ControlCall, ControlNet, ControlUse, control_calls
from synerdiff.diffusion.denoisers.unet import Residuals, sum_residuals
from synerdiff.diffusion.model import DiffusionModel, SampleState
from synerdiff.diffusion.rows import RowInputs

IMAGES_KEPT = 256
"""Conditioning images that the far end of a link remembers; both ends drop the same ones."""


@dataclass(frozen=True, slots=True, eq=False)
class NumberedUse(ControlUse):
    """A use whose image has a number of its own in this process, by which services remember it."""

    number: int = 0


class Call(NamedTuple):
    """One forward of one ControlNet, the number of each row's image, and the samples that it is for."""

    control: ControlCall
    images: tuple[int, ...]
    samples: tuple[SampleId, ...]


def calls_for(
    states: Sequence[SampleState],
    ids: Sequence[SampleId],
    rows_of_state: Callable[[int], Sequence[int]],
    inputs: RowInputs,
) -> list[Call]:
    """The ControlNet forwards that these rows need."""
    calls = []
    for control in control_calls(states, rows_of_state, inputs):
        number_of: dict[int, int] = {}
        users = []
        for position, state in enumerate(states):
            for use in state.controls:
                if use.name == control.name:
                    assert isinstance(use, NumberedUse)
                    users.append(ids[position])
                    number_of |= dict.fromkeys(rows_of_state(position), use.number)
        calls.append(Call(control, tuple(number_of[row] for row in control.rows), tuple(users)))
    return calls


class ServiceLost(RuntimeError):
    """No service is left that serves a ControlNet, or the one that does refuses; concerns the samples that use it."""


Parts = list[tuple[tuple[int, ...], Residuals]]
"""Rows and their residuals, per call."""


class ControlNetSource(Protocol):
    """``begin`` runs or sends the calls; what it returns waits for their residuals."""

    inline: bool

    def begin(self, calls: Sequence[Call]) -> Callable[[], Parts]: ...


class OwnControlNets:
    """ControlNets of this process, one after the other, before the forward."""

    inline = True

    def __init__(self, nets: dict[str, ControlNet], gpu: int, lane: str, clock: Clock, ledger: Ledger) -> None:
        self.nets = nets
        self.ledger = ledger
        self._gpu, self._lane, self._clock = gpu, lane, clock

    def begin(self, calls: Sequence[Call]) -> Callable[[], Parts]:
        parts: Parts = []
        for call in calls:
            start = self._clock.now()
            parts.append((call.control.rows, self.nets[call.control.name].residuals(call.control)))
            rows = len(call.control.rows)
            self.ledger.add(self._gpu, self._lane, "controlnet", start, self._clock.now(), rows, call.samples)
        return lambda: parts


class ImagesSent:
    """What the far end of a link remembers (`ImageMemory`): an image is sent once, then its number will do."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[int, None] = OrderedDict()

    def missing(self, call: Call) -> dict[str, torch.Tensor]:
        """The images of a call that have to go with it."""
        tensors = {}
        for row, number in enumerate(call.images):
            if number not in self._numbers:
                tensors[f"image {number}"] = call.control.images[row : row + 1]
            self._numbers[number] = None
            self._numbers.move_to_end(number)
        _trim(self._numbers)
        return tensors


class Replica:
    """A service at the other end of a link. ``names``: those that it holds; ``fixed``: and no others."""

    def __init__(self, link: Link, names: Iterable[str], fixed: bool) -> None:
        self.link, self.fixed = link, fixed
        self.names = set(names)
        self.alive = True
        self.waiting = 0
        """Rows that it has been sent in this step and has not answered."""
        self._early: dict[int, Message] = {}
        self._images = ImagesSent()

    def serves(self, name: str) -> bool:
        """Whether it may be asked for that ControlNet."""
        return self.alive and (not self.fixed or name in self.names)

    def send(self, call: Call, number: int) -> None:
        """Raises LinkLost."""
        control = call.control
        fields = {"number": number, "name": control.name, "scales": control.scales}
        fields |= {"images": call.images, "samples": call.samples}
        self.link.send(Op.CONTROL, fields, control.inputs.named() | self._images.missing(call))
        self.waiting += len(control.rows)
        if not self.fixed:
            self.names.add(control.name)

    def receive(self, number: int, rows: int, oldest: int, timeout_s: float) -> Message:
        """The answer to the call of that number; those before ``oldest`` belong to steps that were given up.

        Raises LinkLost.
        """
        while number not in self._early:
            answer = self.link.receive(timeout_s)
            self._early[int(answer.fields["number"])] = answer
        self.waiting -= rows
        answer = self._early.pop(number)
        self._early = {later: answer for later, answer in self._early.items() if later >= oldest}
        return answer


class RemoteControlNets:
    """Services: a call goes to the replica with the fewest rows before it, and to another one when that is lost."""

    inline = False

    def __init__(self, replicas: Sequence[Replica], ledger: Ledger, timeout_s: float) -> None:
        self.replicas = list(replicas)
        self.ledger = ledger
        self._timeout_s = timeout_s
        self._number = 0
        """Of the last call."""
        self._oldest = 1
        """The first call of this step."""

    def begin(self, calls: Sequence[Call]) -> Callable[[], Parts]:
        self._oldest = self._number + 1
        for replica in self.replicas:
            replica.waiting = 0
        sent = [(call, *self._send(call)) for call in calls]
        return lambda: [(call.control.rows, self._receive(call, replica, number)) for call, replica, number in sent]

    def _send(self, call: Call) -> tuple[Replica, int]:
        name = call.control.name
        while True:
            serving = [replica for replica in self.replicas if replica.serves(name)]
            if not serving:
                raise ServiceLost(f"no service is left that serves the ControlNet {name}")
            replica = min(serving, key=lambda r: (r.waiting, name not in r.names))
            self._number += 1
            try:
                replica.send(call, self._number)
                return replica, self._number
            except LinkLost as error:
                self._lose(replica, str(error))

    def _receive(self, call: Call, replica: Replica, number: int) -> Residuals:
        rows = len(call.control.rows)
        while True:
            try:
                if replica.alive:
                    answer = replica.receive(number, rows, self._oldest, self._timeout_s)
                    break
            except LinkLost as error:
                self._lose(replica, str(error))
            replica, number = self._send(call)
        self.ledger.take_in(answer.fields)
        if answer.op is not Op.DONE:
            raise ServiceLost(f"{replica.link.peer}: {answer.fields['reason']}")
        return Residuals.from_named(answer.tensors)

    def _lose(self, replica: Replica, reason: str) -> None:
        replica.alive = False
        self.ledger.fault(SERVICE_LOST, (), reason)


class ImageMemory:
    """The service's end of what `Replica` remembers."""

    def __init__(self) -> None:
        self._images: OrderedDict[int, torch.Tensor] = OrderedDict()

    def batch(self, numbers: Sequence[int], message: Message) -> torch.Tensor:
        """(R, channels, height, width): the images of these numbers, those that came along taken in first."""
        for number in numbers:
            if number not in self._images:
                self._images[number] = message.tensors[f"image {number}"].clone()
            self._images.move_to_end(number)
        batch = torch.cat([self._images[number] for number in numbers])
        _trim(self._images)
        return batch


def _trim(images: OrderedDict[int, Any]) -> None:
    while len(images) > IMAGES_KEPT:
        images.popitem(last=False)


def control_call_in(message: Message, memory: ImageMemory) -> ControlCall:
    """What `Replica.send` sent."""
    fields = message.fields
    inputs = RowInputs.from_named(message.tensors)
    images = memory.batch(fields["images"], message)
    return ControlCall(str(fields["name"]), tuple(range(len(images))), inputs, images, tuple(fields["scales"]))


def controlnet_place(name: str, folder: Path | None) -> Path:
    """The folder of a ControlNet: one of that name in ``folder``, else the one that ships. Raises InputError."""
    if folder is not None and name == Path(name).name and (folder / name).is_dir():
        return folder / name
    if name in SHIPPED_CONTROLNETS:
        return SHIPPED_CONTROLNETS[name]
    where = "give its folder with --controlnets" if folder is None else f"{folder} has no folder of that name"
    raise InputError(f"there is no ControlNet '{name}'; {where} (shipped: {', '.join(SHIPPED_CONTROLNETS)}).")


@torch.inference_mode()
def forward(
    model: DiffusionModel, inputs: RowInputs, calls: Sequence[Call], controlnets: ControlNetSource | None, clock: Clock
) -> tuple[torch.Tensor, Instant]:
    """Predicted noise of all rows, and when the forward began: ControlNets that ran before it on the same device not
    included. Services compute while encoder and mid block run; the decoder waits for them."""
    began = clock.now()
    if not calls:
        return model.denoise(inputs), began
    assert controlnets is not None
    residuals = controlnets.begin(calls)
    if controlnets.inline:
        began = clock.now()
    return model.split(inputs, lambda: sum_residuals(len(inputs.latents), residuals())), began
