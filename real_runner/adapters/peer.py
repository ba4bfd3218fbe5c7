"""The worker's view of the guidance peer: a second process that runs the unconditional rows with the same LoRAs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

import torch

from real_runner.account import SERVICE_LOST
from real_runner.adapters.controlnets import Call, ImagesSent
from real_runner.adapters.ledger import Ledger
from synerdiff.core import SampleId
from synerdiff.device.link import Link, LinkLost, Message, Op
from synerdiff.diffusion.lora import LoraFile, LoraLayer
from synerdiff.diffusion.rows import RowInputs


class PeerLost(RuntimeError):
    """The peer is gone; the worker does both halves from then on."""


class GuidancePeer:
    """Only the denoise lane calls it. What is lost is lost: ``alive`` never becomes true again."""

    def __init__(self, link: Link, ledger: Ledger, timeout_s: float) -> None:
        self.alive = True
        self.ledger = ledger
        self._link, self._timeout_s = link, timeout_s
        self._images = ImagesSent()

    # --- weights ------------------------------------------------------------------------------------------------

    def merge(self, lora: LoraFile, scale: float, samples: tuple[SampleId, ...]) -> None:
        self._tell(Op.MERGE, {"scale": scale, "samples": samples, **lora_fields(lora)}, lora_tensors(lora))

    def restore(self, keep: Collection[str], samples: tuple[SampleId, ...]) -> None:
        self._tell(Op.RESTORE, {"keep": list(keep), "samples": samples}, {})

    def followed(self) -> None:
        """Wait until it has done what it was last told. A peer whose weights may differ is given up."""
        if self.alive:
            try:
                answer = self._answer()
            except PeerLost:
                return
            if answer.op is not Op.DONE:
                self._give_up(f"{self._link.peer} gave up: {answer.fields['reason']}")

    def _tell(self, op: Op, fields: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        if self.alive:
            try:
                self._link.send(op, fields, tensors)
            except LinkLost as error:
                self._give_up(str(error))

    # --- steps --------------------------------------------------------------------------------------------------

    def begin(self, inputs: RowInputs, calls: Sequence[Call], samples: Sequence[SampleId]) -> None:
        """Send the unconditional rows. Raises PeerLost."""
        tensors = inputs.named()
        described = []
        for call in calls:
            control = call.control
            described.append([control.name, control.rows, call.images, control.scales, call.samples])
            tensors |= self._images.missing(call)
        try:
            self._link.send(Op.STEP, {"calls": described, "samples": list(samples)}, tensors)
        except LinkLost as error:
            self._give_up(str(error))
            raise PeerLost(str(error)) from None

    def predicted(self) -> torch.Tensor:
        """(R, C, h, w): the predicted noise of the rows that were sent.

        Raises PeerLost, and RuntimeError for what went wrong with these samples alone.
        """
        answer = self._answer()
        if answer.op is not Op.DONE:
            raise RuntimeError(str(answer.fields["reason"]))
        return answer.tensors["noise"]

    def drop(self) -> None:
        """Take in the answer to a step that was given up."""
        with suppress(PeerLost):
            self._answer()

    def _answer(self) -> Message:
        try:
            answer = self._link.receive(self._timeout_s)
        except LinkLost as error:
            self._give_up(str(error))
            raise PeerLost(str(error)) from None
        self.ledger.take_in(answer.fields)
        return answer

    def _give_up(self, reason: str) -> None:
        self.alive = False
        self.ledger.fault(SERVICE_LOST, (), f"{reason}; the worker computes both halves from now on")


def lora_fields(lora: LoraFile) -> dict[str, object]:
    """What `lora_in` needs besides the tensors."""
    return {
        "file": lora.name,
        "size_bytes": lora.size_bytes,
        "layers": [[name, layer.scaling] for name, layer in lora.layers.items()],
    }


def lora_tensors(lora: LoraFile) -> dict[str, torch.Tensor]:
    """What is sent beside `lora_fields`: the factors of every layer, by its number."""
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(lora.layers.values()):
        tensors |= {f"{number} down": layer.down, f"{number} up": layer.up}
    return tensors


def lora_in(message: Message) -> LoraFile:
    """A LoRA from the fields and tensors of a message."""
    fields, tensors = message.fields, message.tensors
    layers = {
        str(name): LoraLayer(tensors[f"{number} down"], tensors[f"{number} up"], float(scaling))
        for number, (name, scaling) in enumerate(fields["layers"])
    }
    return LoraFile(str(fields["file"]), int(fields["size_bytes"]), layers)
