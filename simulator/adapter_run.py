"""A worker whose steps are plans of segments: LoRAs, ControlNets, and guidance on two GPUs.

Policies see nothing of it: a step starts when they decide it and ends when its last segment does.
"""

from __future__ import annotations

from policies.base import Policy
from simulator.loading import Loader
from simulator.pieces import Draws, Piece
from simulator.segments import NEVER, Plan, Segment
from simulator.services import ControlNetServices
from simulator.step_plan import StepPlanner
from simulator.worker_run import WorkerRun, without_limit
from synerdiff.config.cluster import Cluster, WorkerEntry
from synerdiff.core import PPM, Sample, WorkRecord
from synerdiff.engine.worker import Step
from synerdiff.profile.adapters import Adapters
from synerdiff.profile.tables import Profile


class AdapterRun(WorkerRun):
    """One worker of a cluster. ``weights`` lists the adapters that its denoiser's weights hold, as merged."""

    def __init__(
        self,
        policy: Policy,
        profile: Profile,
        cluster: Cluster,
        entry: WorkerEntry,
        adapters: Adapters,
        services: ControlNetServices,
        dispersion_seed: int | None,
    ) -> None:
        super().__init__([], policy, profile, entry.lanes, dispersion_seed, gpu=entry.denoise_gpu)
        draws = Draws(None if dispersion_seed is None else dispersion_seed + 1)
        self.loader = Loader(cluster.loras, adapters, draws, entry.denoise_gpu)
        self.planner = StepPlanner(profile, cluster, entry, adapters, services, self.times, draws, self.loader)
        self.asynchronous = cluster.strategies.loras == "asynchronous"
        self.guidance_gpu = entry.guidance_gpu if cluster.strategies.guidance == "two-gpus" else None
        self.plan: Plan | None = None
        self.asking: set[int] = set()
        """Samples for which the loader has been asked and which still denoise."""

    # --- steps --------------------------------------------------------------------------------------------------

    def start_step(self, step: Step, now_ns: int) -> None:
        self.ask_for_loras(step.samples, now_ns)
        self.plan = self.planner.plan(step, now_ns)
        self.plan.start(now_ns)
        # The engine's own rules see one piece, whose end is unknown until only the last segment is left.
        self.step_piece = Piece(0, now_ns)
        self.step_piece.end_ns = NEVER

    def ask_for_loras(self, samples: list[Sample], now_ns: int) -> None:
        for sample in samples:
            if sample.request.loras and sample.id not in self.asking:
                self.asking.add(sample.id)
                self.loader.need(sample.request.loras, now_ns, self.planner.files_in_weights)
                if self.asynchronous:
                    for lora in sample.request.loras:
                        self.loader.fetch(lora.file, sample.id, now_ns)

    def decide(self, now_ns: int) -> None:
        super().decide(now_ns)
        if self.asynchronous:
            self.ask_for_loras(list(self.worker.active.values()), now_ns)

    def next_ns(self) -> int:
        due_ns = super().next_ns()
        return due_ns if self.plan is None else min(due_ns, self.plan.next_ns())

    def happen(self, now_ns: int) -> bool:
        plan, step_piece = self.plan, self.step_piece
        if plan is not None and step_piece is not None and plan.next_ns() <= now_ns:
            for segment in plan.advance(now_ns):
                self.record(segment)
            if plan.left == 0:
                step_piece.end_ns = now_ns
        return super().happen(now_ns)

    def end_step(self, piece: Piece, now_ns: int) -> None:
        plan, step = self.plan, self.worker.step
        assert plan is not None
        assert step is not None
        self.plan = None
        forwards = [segment for segment in plan.segments if segment.kind in ("step", "encoder", "decoder")]
        piece.start_ns = min(segment.start_ns for segment in forwards if segment.gpu == self.gpu)
        half = [segment for segment in forwards if segment.gpu != self.gpu]
        if half:
            self.step_records.append(
                WorkRecord.other(
                    half[0].gpu, "guidance", "half", half[0].start_ns, half[-1].end_ns, step.ids, half[0].rows
                )
            )
        super().end_step(piece, now_ns)
        for sample in step.freed:
            if sample.id in self.asking:
                self.asking.remove(sample.id)
                self.loader.release(sample.request.loras)

    def record(self, segment: Segment) -> None:
        """Merges, restores and ControlNets that run on the worker's own GPUs."""
        if segment.kind not in ("merge", "restore", "controlnet", "load"):
            return
        step = self.worker.step
        assert step is not None
        gpus = [segment.gpu]
        if segment.kind in ("merge", "restore") and self.guidance_gpu is not None:
            gpus.append(self.guidance_gpu)
        for gpu in gpus:
            lane = "loader" if segment.kind == "load" else "denoise" if gpu == self.gpu else "guidance"
            self.step_records.append(
                WorkRecord.other(gpu, lane, segment.kind, segment.start_ns, segment.end_ns, step.ids, segment.rows)
            )

    # --- contention ---------------------------------------------------------------------------------------------

    def retime(self, now_ns: int) -> None:
        if self.planner.weights:
            self.restore_while_idle(now_ns)
        plan = self.plan
        if plan is None:
            super().retime(now_ns)
            return
        computing = {segment.gpu: segment for segment in plan.running if segment.piece is not None}
        slowed = dict.fromkeys(computing, PPM)
        for lane, piece in zip(self.worker.lanes, self.chunk_pieces, strict=True):
            if piece is None:
                continue
            ppm = PPM
            beside = computing.get(lane.gpu)
            if beside is not None and beside.rows:
                assert lane.sample is not None
                step_ppm, ppm = self.profile.slowdown_ppm(beside.rows, self.chunking, lane.sample.chunks_done)
                slowed[lane.gpu] += step_ppm - PPM
            if ppm != piece.ppm:
                piece.retime(ppm, now_ns)
        for gpu, segment in computing.items():
            if slowed[gpu] <= 0:
                raise without_limit(slowed[gpu], self.profile, segment.rows)
            segment.retime(slowed[gpu], now_ns)
        step_piece = self.step_piece
        assert step_piece is not None
        if plan.left == 1:
            last = plan.running[0]
            step_piece.end_ns = last.end_ns
            step_piece.since_ns = last.start_ns if last.piece is None else last.piece.since_ns

    def restore_while_idle(self, now_ns: int) -> None:
        """Once the denoise lane has nothing to do, take out of the weights what no active sample asks for."""
        worker, planner = self.worker, self.planner
        if worker.denoise_held or worker.next_step is not None:
            return
        wanted = {lora for sample in worker.active.values() for lora in sample.request.loras}
        leaving = [lora for lora in planner.weights if lora not in wanted]
        if not leaving:
            return
        start_ns = max(now_ns, planner.restored_ns)
        planner.restored_ns = start_ns + sum(planner.restore_ns(lora) for lora in leaving)
        planner.weights = [lora for lora in planner.weights if lora in wanted]
        gpus = {self.gpu: "denoise"} | ({self.guidance_gpu: "guidance"} if self.guidance_gpu is not None else {})
        for gpu, lane in gpus.items():
            self.step_records.append(WorkRecord.other(gpu, lane, "restore", start_ns, planner.restored_ns))
