"""A worker that serves LoRAs and ControlNets: what the engine asks of it, and what a step does besides its forward.

Strategies and their rules are those of the simulator (``docs/swiftdiffusion.md``). Weights change on the denoise lane
alone; prompts and images are prepared in the intake; files come from loaders.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from real_runner.account import one_line
from real_runner.adapters.controlnets import ControlNetSource, NumberedUse, calls_for, controlnet_place, forward
from real_runner.adapters.ledger import Clock, Instant, Ledger
from real_runner.adapters.loras import LoraStore, OwnReader, Weights
from real_runner.adapters.peer import GuidancePeer, PeerLost
from real_runner.adapters.processes import Processes
from real_runner.hardware import Hardware
from real_runner.intake import seed_of
from real_runner.pieces import Image, StepPiece
from synerdiff.config.cluster import Cluster
from synerdiff.core import ControlNetUse, InputError, Mode, Request, Sample
from synerdiff.device.lanes import Work
from synerdiff.diffusion.controlnet import read_control_image
from synerdiff.diffusion.denoisers.controlnet import ControlUse
from synerdiff.diffusion.lora import UnservedLora
from synerdiff.diffusion.merging import MergedWeights
from synerdiff.diffusion.model import DiffusionModel, PreparedStep
from synerdiff.diffusion.rows import RowInputs, bucket_of, select_rows
from synerdiff.engine.adapters import LoraUsers, Restore, Wait, idle_restores, plan_weights
from synerdiff.engine.worker import Worker


@dataclass(frozen=True, slots=True)
class Folders:
    """Where adapters come from: nothing outside these folders is read. A ControlNet that ships needs no folder."""

    loras: Path | None = None
    controlnets: Path | None = None
    images: Path | None = None


@dataclass(slots=True)
class Parts:
    """What a worker has for its adapters, by strategy."""

    weights: Weights
    loras: LoraStore | None
    controlnets: ControlNetSource | None
    served: frozenset[str] | None
    """ControlNets that services serve; None: any that there is."""
    peer: GuidancePeer | None
    ledger: Ledger
    clock: Clock
    processes: Processes | None = None
    """The processes beside the worker."""


def require_files(requests: Sequence[Request], folders: Folders, model: DiffusionModel) -> None:
    """Read every LoRA and conditioning picture that requests ask for once: before a run, not in it.

    InputError names the first request whose adapters cannot be had or do not fit the model. Where that holds for all
    of them none is raised: the run records each as failed, and nothing is served. So it does with LoRAs of kinds that
    are not merged here.
    """
    weights = MergedWeights(model.unet)
    known: dict[object, InputError | None] = {}

    def lora(file: str) -> None:
        if folders.loras is not None:
            weights.check(OwnReader(folders.loras).read(file))

    def picture(name: str, image: str, size: tuple[int, int] | None) -> None:
        if folders.images is not None:
            channels = image_channels(controlnet_place(name, folders.controlnets))
            read_control_image(image, folders.images, channels, model if size is None else model.at(size))

    def fault(read: Callable[..., None], *asked: object) -> InputError | None:
        if (read, asked) not in known:
            known[read, asked] = None
            try:
                read(*asked)
            except UnservedLora:
                pass
            except InputError as error:
                known[read, asked] = error
        return known[read, asked]

    def faults_of(request: Request) -> list[InputError]:
        tried = [fault(lora, one.file) for one in request.loras]
        tried += [fault(picture, use.name, picture_for(request, use), request.size) for use in request.controlnets]
        return [error for error in tried if error is not None]

    faults = [(request.request_id, found[0]) for request in requests if (found := faults_of(request))]
    if 0 < len(faults) < len(requests):
        raise InputError(f"request {faults[0][0]}: {faults[0][1]}") from None


def picture_for(request: Request, use: ControlNetUse) -> str:
    """The file of the conditioning picture."""
    return use.image or f"{seed_of(request)}.png"


class Serving:
    """One worker's adapters, for one run after another."""

    def __init__(self, hardware: Hardware, cluster: Cluster, folders: Folders, parts: Parts, timeout_s: float) -> None:
        self.hardware, self.folders, self.parts, self.timeout_s = hardware, folders, parts, timeout_s
        self.gpu = cluster.workers[0].denoise_gpu
        strategies = cluster.strategies
        self.asynchronous = strategies.loras == "asynchronous"
        self.bound_steps = strategies.lora_bound_steps if self.asynchronous else 0
        self._lora_users = LoraUsers()
        self._restoring: Work[None] | None = None
        self._numbers = count()
        """Of conditioning images."""

    # --- before and after a run ---------------------------------------------------------------------------------

    def require(self, requests: Sequence[Request]) -> None:
        """InputError for what can be served in no case; a file that turns out to be broken fails its request alone."""
        for request in requests:
            if request.loras and self.parts.loras is None:
                raise InputError(f"request {request.request_id} asks for LoRAs; give their folder with --loras.")
            if request.controlnets and self.folders.images is None:
                raise InputError(
                    f"request {request.request_id} asks for ControlNets; give the folder of their conditioning images "
                    "with --controlnet-images."
                )
        served = self.parts.served
        for name in sorted({use.name for request in requests for use in request.controlnets}):
            if served is not None and name not in served:
                known = ", ".join(sorted(served)) or "none"
                raise InputError(
                    f"no ControlNet service serves '{name}', which a request asks for; they serve {known}."
                )
            controlnet_place(name, self.folders.controlnets)

    def begin(self) -> None:
        """A run begins: what the records hold is its own."""
        self.parts.ledger.clear()
        self._lora_users.clear()

    def finish(self) -> None:
        """A run has ended and its lanes are idle: the weights become the originals again."""
        if self._restoring is not None:
            self._restoring.result()
            self._restoring = None
        self._release(self._lora_users.clear())
        if self.parts.weights.held:
            self.hardware.denoise.submit(lambda: self.parts.weights.restore(self.parts.weights.held)).result()

    def close(self) -> None:
        if self.parts.loras is not None:
            self.parts.loras.close()
        if self.parts.processes is not None:
            self.parts.processes.close()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- requests -----------------------------------------------------------------------------------------------

    def controls_of(self, request: Request) -> tuple[ControlUse, ...]:
        """The request's ControlNets with their images, for all of its samples; called in the intake."""
        uses = []
        for use in request.controlnets:
            assert self.folders.images is not None
            place = controlnet_place(use.name, self.folders.controlnets)
            tensor = read_control_image(
                picture_for(request, use), self.folders.images, image_channels(place), self.hardware.at(request)
            )
            # Strides as a message would give it: convolutions may round differently for other strides.
            plain = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
            uses.append(NumberedUse(use.name, plain, use.scale, next(self._numbers)))
        return tuple(uses)

    def follow(self, worker: Worker) -> None:
        """After each decision: ask for the LoRAs of admitted samples, and restore weights that nobody needs."""
        store = self.parts.loras
        if store is None:
            return
        self._release(self._lora_users.leaving())
        for sample in self._lora_users.asking(worker.active.values()):
            files = [use.file for use in sample.request.loras]
            store.need(files, sample.id)
            if self.asynchronous:
                for file in files:
                    store.fetch(file)
        if self._restoring is not None and not self._restoring.done():
            return
        weights = self.parts.weights
        leaving = idle_restores(weights.held, worker)
        if leaving:
            self._restoring = self.hardware.denoise.submit(lambda: weights.restore(leaving))

    def _release(self, samples: list[Sample]) -> None:
        for sample in samples:
            assert self.parts.loras is not None
            self.parts.loras.release([use.file for use in sample.request.loras])

    # --- steps, on the denoise lane -----------------------------------------------------------------------------

    def step_piece(self, images: Sequence[Image], modes: Sequence[Mode], pad_rows: int) -> StepPiece:
        """The work of a step of these images."""
        return AdaptedStep(self, images, modes, pad_rows)

    def make_weights_ready(self, images: Sequence[Image]) -> None:
        """Do what `plan_weights` says for a step of these images.

        All samples of a step ask for the same. A LoRA that cannot be had fails them.
        """
        weights, store = self.parts.weights, self.parts.loras
        wanted = images[0].sample.request.loras
        ids = tuple(image.sample.id for image in images)
        furthest = max(image.state.step_index for image in images)
        actions = plan_weights(
            weights.held, wanted, lambda file: store is not None and store.ready(file), furthest, self.bound_steps
        )
        leaving = [action.lora for action in actions if isinstance(action, Restore)]
        if leaving:
            weights.restore(leaving, ids)
        for action in actions[len(leaving) :]:
            assert store is not None
            (file, scale), failure = action.lora, ""
            loading = store.fetch(file) if self.asynchronous else store.load_now(file)
            if isinstance(action, Wait):
                loading.ended.wait(self.timeout_s)
            elif loading.lora is not None:
                try:
                    weights.merge(loading.lora, scale, ids)
                except InputError as error:
                    failure = str(error)
            else:
                late = f"its LoRA {file}.safetensors has not been loaded after {self.timeout_s:g} s"
                failure = loading.failure or late
            if failure:
                for image in images:
                    image.failure = failure
                return

    def denoised(
        self, model: DiffusionModel, step: PreparedStep, ids: Sequence[int], pad_rows: int
    ) -> tuple[torch.Tensor, Instant]:
        """Predicted noise of a step's rows (conditional ones, then unconditional ones), and when the forward began."""
        parts = self.parts
        peer = parts.peer
        if peer is None or not peer.alive:
            calls = calls_for(step.states, ids, step.rows_of_state, step.inputs)
            return forward(model, step.inputs, calls, parts.controlnets, parts.clock)
        count, guided = len(step.states), step.guided
        first = _rows(step.inputs, range(count), (pad_rows + 1) // 2, model.row_buckets)
        own_calls = calls_for(step.states, ids, _own_row, first)
        if not guided:
            return forward(model, first, own_calls, parts.controlnets, parts.clock)
        second = _rows(step.inputs, range(count, count + guided), pad_rows // 2, model.row_buckets)
        other_calls = calls_for(step.states[:guided], ids[:guided], _own_row, second)
        try:
            peer.begin(second, other_calls, ids[:guided])
        except PeerLost:
            return self.denoised(model, step, ids, pad_rows)
        try:
            noise, began = forward(model, first, own_calls, parts.controlnets, parts.clock)
        except Exception:
            peer.drop()
            raise
        try:
            predicted = peer.predicted()
        except PeerLost:
            predicted, _ = forward(model, second, other_calls, parts.controlnets, parts.clock)
        return torch.cat([noise[:count], predicted[:guided]]), began


class AdaptedStep(StepPiece):
    """A step that makes its weights ready first, and whose forward ControlNets steer."""

    def __init__(self, serving: Serving, images: Sequence[Image], modes: Sequence[Mode], pad_rows: int) -> None:
        super().__init__(serving.hardware.at(images[0].sample.request), images, modes, pad_rows)
        self._serving = serving

    def run(self) -> None:
        """On the lane."""
        live = [image for image in self.images if not image.failure]
        try:
            if live:
                self._serving.make_weights_ready(live)
        except Exception as error:  # out of memory, say: the weights are the originals again, these samples fail
            for image in live:
                image.failure = one_line(error.with_traceback(None))
        super().run()

    def advance(self, batch: list[tuple[Image, Mode]], pad_rows: int) -> None:
        model = self.model
        step = model.prepare([image.state for image, _ in batch], [mode for _, mode in batch], pad_rows)
        id_of = {id(image.state): image.sample.id for image, _ in batch}
        ids = [id_of[id(state)] for state in step.states]
        outputs, began = self._serving.denoised(model, step, ids, pad_rows)
        if self.forward_began is None:
            self.forward_began = began
        model.finish(step, outputs)


def _own_row(position: int) -> tuple[int, ...]:
    return (position,)


def _rows(inputs: RowInputs, rows: range, pad_rows: int, buckets: Sequence[int] | None) -> RowInputs:
    """These rows, and the last of them again up to the bucket of their number and ``pad_rows``."""
    total = bucket_of(len(rows) + pad_rows, buckets)
    return select_rows(inputs, [*rows, *[rows[-1]] * (total - len(rows))])


class KnownChannels(NamedTuple):
    """What a picture is read for: a ControlNet that may run in another process."""

    channels: int


def image_channels(controlnet: Path) -> KnownChannels:
    """Channels of the images that a ControlNet reads, by its configuration."""
    try:
        return KnownChannels(
            int(json.loads((controlnet / "config.json").read_text(encoding="utf-8"))["conditioning_channels"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{controlnet}: its config.json does not say how many conditioning_channels it reads."
        ) from None
