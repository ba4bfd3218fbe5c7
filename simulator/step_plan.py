"""What one step consists of, by strategy: segments with dependencies on one GPU or on many.

A plain step is one segment. With adapters or guidance on two GPUs it is several: weights made ready before it, its
encoder and decoder around a ControlNet's residuals, its halves and what brings them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simulator.adapters import ControlNetServices, Loader, link_of, transfer_ns
from simulator.pieces import Draws, Piece, Times
from synerdiff.config.cluster import Cluster, WorkerEntry
from synerdiff.core import LoraUse
from synerdiff.engine.adapters import Cache, Restore, Wait, plan_weights
from synerdiff.engine.rounds import NEVER
from synerdiff.engine.worker import Step
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile

Begin = Callable[[int], int]
"""The instant at which something starts -> the instant at which it ends."""


class Segment:
    """One piece of a step.

    With ``work_ns`` it runs on ``gpu`` as a step of ``rows`` rows does: decode chunks beside it slow it down (not when
    rows is 0). With ``begin`` it ends when that says so, given the instant at which it starts: a transfer, a call, a
    wait. It starts when all that it comes after have ended.
    """

    __slots__ = ("after", "begin", "end_ns", "gpu", "kind", "piece", "rows", "start_ns", "waits", "work_ns")

    def __init__(
        self,
        kind: str,
        *,
        gpu: int = -1,
        rows: int = 0,
        work_ns: int = 0,
        begin: Callable[[int], int] | None = None,
    ) -> None:
        self.kind = kind
        self.gpu = gpu
        self.rows = rows
        self.work_ns = work_ns
        self.begin = begin
        self.waits = 0
        self.after: list[Segment] = []
        self.piece: Piece | None = None
        self.start_ns = -1
        self.end_ns = NEVER

    def start(self, now_ns: int) -> None:
        self.start_ns = now_ns
        if self.begin is not None:
            self.end_ns = self.begin(now_ns)
        else:
            self.piece = Piece(self.work_ns, now_ns)

    def retime(self, ppm: int, now_ns: int) -> None:
        piece = self.piece
        if piece is not None and piece.ppm != ppm:
            piece.retime(ppm, now_ns)
            self.end_ns = piece.end_ns


class Plan:
    """The segments of one step, and which of them run."""

    __slots__ = ("left", "running", "segments")

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.running: list[Segment] = []
        self.left = 0
        """Segments that have not ended."""

    def add(self, segment: Segment, *before: Segment | None) -> Segment:
        """Add a segment that starts when those before it (None: nothing) have ended."""
        self.segments.append(segment)
        self.left += 1
        for other in before:
            if other is not None:
                other.after.append(segment)
                segment.waits += 1
        return segment

    def start(self, now_ns: int) -> None:
        for segment in self.segments:
            if segment.waits == 0:
                segment.start(now_ns)
                self.running.append(segment)

    def advance(self, now_ns: int) -> list[Segment]:
        """End what ends now and start what that frees, in the order in which segments were added; those that ended."""
        ended: list[Segment] = []
        position = 0
        while position < len(self.running):
            segment = self.running[position]
            if segment.end_ns > now_ns:
                position += 1
                continue
            del self.running[position]
            self.left -= 1
            ended.append(segment)
            for follower in segment.after:
                follower.waits -= 1
                if follower.waits == 0:
                    follower.start(now_ns)
                    self.running.append(follower)
            position = 0
        return ended

    def next_ns(self) -> int:
        due_ns = NEVER
        for segment in self.running:
            if segment.end_ns < due_ns:
                due_ns = segment.end_ns
        return due_ns


class StepPlanner:
    """Plans the steps of one worker, and keeps what its weights hold.

    ``weights``: LoRAs in the weights when the planned step has begun, in the order in which they
    were merged. ``restored_ns``: until then adapters are being taken out and no step may run.
    """

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        entry: WorkerEntry,
        adapters: Adapters,
        services: ControlNetServices,
        times: Times,
        draws: Draws,
        loader: Loader,
    ) -> None:
        self.profile = profile
        self.adapters = adapters
        self.services = services
        self.times = times
        self.draws = draws
        self.loader = loader
        self.gpu = entry.denoise_gpu
        strategies = cluster.strategies
        self.guidance_gpu = entry.guidance_gpu if strategies.guidance == "two-gpus" else None
        self.as_service = strategies.controlnets == "service"
        self.asynchronous = strategies.loras == "asynchronous"
        self.bound_steps = strategies.lora_bound_steps if self.asynchronous else 0
        self.slots = None if entry.controlnet_slots is None else Cache(entry.controlnet_slots)
        self.controlnet_loads = 0
        self.weights: list[LoraUse] = []
        self.restored_ns = 0
        self.dispatch_ns = profile.overhead_ns("step_dispatch")
        self.link_latency_ns = 0
        self.link_bytes_per_s = 0
        self.incoming_free_ns: dict[int, int] = {}
        """GPU -> when its incoming link is free: residuals of several ControlNets come one after the other."""
        if self.as_service or self.guidance_gpu is not None:
            self.link_bytes_per_s, self.link_latency_ns = link_of(cluster.link, adapters)

    @property
    def files_in_weights(self) -> set[str]:
        """Files of the LoRAs that are merged into the weights."""
        return {lora.file for lora in self.weights}

    def plan(self, step: Step, now_ns: int) -> Plan:
        """The segments of a step that starts now."""
        plan = Plan()
        ready = self._weights_ready(plan, step, now_ns)
        if self.slots is not None and not self.as_service:
            ready = self._controlnets_loaded(plan, step, self.slots, ready)
        if self.guidance_gpu is None:
            self._forward(plan, step, self.gpu, step.rows, _controlnet_rows(step, 2, 1), ready)
            return plan
        second = sum(letter == "g" for letter in step.modes)
        first_rows = len(step.samples) + (step.pad_rows + 1) // 2
        both = second > 0
        self._forward(plan, step, self.gpu, first_rows, _controlnet_rows(step, 1, 1), ready, both)
        if both:
            rows = second + step.pad_rows // 2
            sent = plan.add(Segment("scatter", begin=self._transfer("latent_bytes", rows)), ready)
            last = self._forward(plan, step, self.guidance_gpu, rows, _controlnet_rows(step, 1, 0), sent, both)
            plan.add(Segment("gather", begin=self._transfer("prediction_bytes", rows)), last)
        return plan

    # --- LoRAs --------------------------------------------------------------------------------------------------

    def restore_ns(self, lora: LoraUse) -> int:
        """Time to take a LoRA out of the weights."""
        size = self.loader.storage.bytes_of(lora.file)
        return self.profile.sped(self.draws.draw(self.adapters.spread("lora_restore", size)))

    def _merge_ns(self, lora: LoraUse) -> int:
        size = self.loader.storage.bytes_of(lora.file)
        more_ns = len(self.weights) * self.adapters.ns("lora_merge_more", size)
        return self.profile.sped(self.draws.draw(self.adapters.spread("lora_merge", size)) + more_ns)

    def _weights_ready(self, plan: Plan, step: Step, now_ns: int) -> Segment | None:
        """The segments that make the weights those of the step; the last one."""
        last: Segment | None = None
        if self.restored_ns > now_ns:
            last = plan.add(Segment("wait", begin=_until(self.restored_ns)))
        furthest = max(sample.step_index for sample in step.samples)
        wanted = step.samples[0].request.loras
        for action in plan_weights(
            self.weights, wanted, lambda file: self.loader.ready(file, now_ns), furthest, self.bound_steps
        ):
            lora = action.lora
            if isinstance(action, Restore):
                last = plan.add(Segment("restore", gpu=self.gpu, work_ns=self.restore_ns(lora)), last)
                self.weights.remove(lora)
            elif isinstance(action, Wait):
                # Without a loader the next file is not read before this one is merged.
                last = plan.add(Segment("wait", begin=self._fetch(lora.file, step)), last)
            else:
                last = plan.add(Segment("merge", gpu=self.gpu, work_ns=self._merge_ns(lora)), last)
                self.weights.append(lora)
        return last

    def _fetch(self, file: str, step: Step) -> Begin:
        return lambda now_ns: max(now_ns, self.loader.fetch(file, step.samples[0].id, now_ns))

    # --- ControlNets and the forward ----------------------------------------------------------------------------

    def _controlnets_loaded(self, plan: Plan, step: Step, slots: Cache, before: Segment | None) -> Segment | None:
        """Bring ControlNets onto the worker's own GPU that it does not hold; the denoise lane waits."""
        last = before
        for name in _controlnet_rows(step, 1, 1):
            if not slots.use(name):
                slots.put(name)
                self.controlnet_loads += 1
                load_ns = self.adapters.ns("controlnet_load", self.adapters.constant("controlnet_bytes"))
                last = plan.add(Segment("load", gpu=self.gpu, begin=_later(load_ns)), last)
        return last

    def _forward(
        self,
        plan: Plan,
        step: Step,
        gpu: int,
        rows: int,
        controlnets: Mapping[str, int],
        before: Segment | None,
        beside: bool = False,
    ) -> Segment:
        """The denoiser's forward of ``rows`` rows on one GPU; its last segment. ``controlnets``: name -> rows.

        ``beside``: the other half of the guidance runs at the same time.
        """
        if controlnets and self.as_service:
            return self._forward_with_services(plan, step, gpu, rows, controlnets, before)
        last = before
        for its_rows in controlnets.values():
            work_ns = self.draws.draw(self.adapters.spread("controlnet_forward", its_rows))
            work_ns += self.adapters.ns("residual_add", its_rows)
            last = plan.add(Segment("controlnet", gpu=gpu, rows=its_rows, work_ns=self.profile.sped(work_ns)), last)
        work_ns = self.times.of(step.samples[0].request).forward_ns(rows)
        if beside and "denoise_forward_beside" in self.adapters.tables:
            bucket, step_ns = self.profile.bucket(rows), self.times.step_spread(rows).median
            rest_ns = max(0, step_ns - self.adapters.forward_ns(bucket))
            work_ns = (self.adapters.ns("denoise_forward_beside", bucket) + rest_ns) * work_ns // step_ns
        work_ns = self.profile.sped(work_ns) + self._begin_ns(step, rows)
        return plan.add(Segment("step", gpu=gpu, rows=rows, work_ns=work_ns), last)

    def _begin_ns(self, step: Step, rows: int) -> int:
        """Dispatch of a forward of ``rows`` rows, and its launch unless the step was committed beside another."""
        profile = self.profile.at(step.samples[0].request.size)
        return self.dispatch_ns + (0 if step.committed else profile.launch_ns(rows))

    def _forward_with_services(
        self, plan: Plan, step: Step, gpu: int, rows: int, controlnets: Mapping[str, int], before: Segment | None
    ) -> Segment:
        """Encoder and mid block beside the ControlNet services; the decoder waits for all residuals.

        What a step takes beyond encoder and decoder comes with the decoder: its rows are assembled, guided and
        stepped. A step that was drawn longer or shorter has both halves longer or shorter.
        """
        adapters = self.adapters
        bucket = self.profile.bucket(rows)
        drawn_ns, step_ns = self.times.forward_ns(rows), self.times.step_spread(rows).median
        rest_ns = max(0, step_ns - adapters.forward_ns(bucket))
        encoder_ns = self.profile.sped(adapters.ns_beside("denoise_encoder", bucket) * drawn_ns // step_ns)
        decoder_ns = (adapters.ns_beside("denoise_decoder", bucket) + rest_ns) * drawn_ns // step_ns
        encoder_ns += self._begin_ns(step, rows)
        encoder = plan.add(Segment("encoder", gpu=gpu, rows=rows, work_ns=encoder_ns), before)
        arrivals = []
        for name, its_rows in controlnets.items():
            decoder_ns += adapters.ns("residual_add", its_rows)
            sent = plan.add(Segment("send", begin=self._transfer("latent_bytes", its_rows)), before)
            called = plan.add(Segment("call", begin=self._call(name, its_rows, step)), sent)
            arrivals.append(plan.add(Segment("receive", begin=self._receive(gpu, its_rows)), called))
        return plan.add(
            Segment("decoder", gpu=gpu, rows=rows, work_ns=self.profile.sped(decoder_ns)), encoder, *arrivals
        )

    def _call(self, name: str, rows: int, step: Step) -> Begin:
        users = tuple([s.id for s in step.samples if any(use.name == name for use in s.request.controlnets)])
        return lambda now_ns: self.services.call(name, rows, users, now_ns)

    def _transfer(self, quantity: str, rows: int) -> Begin:
        size = self.adapters.bytes_of(quantity, rows)
        return _later(transfer_ns(size, self.link_bytes_per_s, self.link_latency_ns))

    def _receive(self, gpu: int, rows: int) -> Begin:
        time_ns = transfer_ns(
            self.adapters.bytes_of("residual_bytes", rows), self.link_bytes_per_s, self.link_latency_ns
        )

        def begin(now_ns: int) -> int:
            end_ns = max(now_ns, self.incoming_free_ns.get(gpu, 0)) + time_ns
            self.incoming_free_ns[gpu] = end_ns
            return end_ns

        return begin


def _later(time_ns: int) -> Begin:
    return lambda now_ns: now_ns + time_ns


def _until(instant_ns: int) -> Begin:
    return lambda now_ns: max(now_ns, instant_ns)


def _controlnet_rows(step: Step, guided_rows: int, other_rows: int) -> dict[str, int]:
    """ControlNet -> rows of the step's samples that use it, in the order in which they come."""
    rows_of: dict[str, int] = {}
    for sample, letter in zip(step.samples, step.modes, strict=True):
        rows = guided_rows if letter == "g" else other_rows
        if rows:
            for use in sample.request.controlnets:
                rows_of[use.name] = rows_of.get(use.name, 0) + rows
    return rows_of
