"""The stepper of steps that are plans: adapters, and guidance on two GPUs.

Policies see nothing of it: a step starts when they decide it and ends when its last segment does.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.pieces import without_limit
from simulator.step_plan import Plan, Segment, StepPlanner
from synerdiff.core import PPM, Sample, WorkRecord
from synerdiff.engine.adapters import LoraUsers, idle_restores
from synerdiff.engine.rounds import NEVER
from synerdiff.engine.worker import Step, Worker


class PlannedStepper:
    """Steps as a planner says; ``records`` gets what they do besides their forward."""

    def __init__(self, planner: StepPlanner, worker: Worker, records: list[WorkRecord]) -> None:
        self.planner, self._worker, self._records = planner, worker, records
        self.due_ns = NEVER
        self.rows_on: dict[int, int] = {}
        self._plan = Plan()
        self._end_ns = self._since_ns = NEVER
        """When the last segment ends, known once only that is left, and since when."""
        self._lora_users = LoraUsers()
        self._ended = False
        """A step has ended since the files of its finished samples were last given back."""

    def start(self, step: Step, now_ns: int) -> None:
        self._release_loras()
        self._ask_for_loras(step.samples, now_ns)
        self._plan = self.planner.plan(step, now_ns)
        self._plan.start(now_ns)
        self._look()

    def advance(self, now_ns: int) -> int:
        step = self._worker.step
        assert step is not None
        for segment in self._plan.advance(now_ns):
            if segment.kind in ("merge", "restore", "controlnet", "load"):
                self._record(segment, step)
        self._look()
        return self._end(step) if self._plan.left == 0 else -1

    def _end(self, step: Step) -> int:
        """Account for a step that has ended; when its forward began."""
        planner = self.planner
        forwards = [segment for segment in self._plan.segments if segment.kind in ("step", "encoder", "decoder")]
        half = [segment for segment in forwards if segment.gpu != planner.gpu]
        if half:
            start_ns, end_ns = half[0].start_ns, half[-1].end_ns
            self._records.append(
                WorkRecord.other(half[0].gpu, "guidance", "half", start_ns, end_ns, step.ids, half[0].rows)
            )
        self._plan = Plan()
        self.due_ns = self._end_ns = NEVER
        self._ended = True
        return min(segment.start_ns for segment in forwards if segment.gpu == planner.gpu)

    def early_ns(self, lead_ns: int) -> int:
        return max(self._since_ns, self._end_ns - lead_ns) if self._end_ns < NEVER else NEVER

    def retime(self, slower: Mapping[int, int], now_ns: int) -> None:
        self._release_loras()
        if self.planner.asynchronous:
            self._ask_for_loras(list(self._worker.active.values()), now_ns)
        if self.planner.weights and now_ns >= self._worker.held_until_ns:
            self._restore_while_idle(now_ns)
        plan = self._plan
        if not plan.left:
            return
        for segment in plan.running:
            if segment.piece is None:
                continue
            ppm = PPM + slower.get(segment.gpu, 0)
            if ppm <= 0:
                raise without_limit(ppm, self.planner.profile, segment.rows)
            segment.retime(ppm, now_ns)
        self.due_ns = plan.next_ns()
        if plan.left == 1:
            last = plan.running[0]
            self._end_ns = last.end_ns
            self._since_ns = last.start_ns if last.piece is None else last.piece.since_ns

    def _release_loras(self) -> None:
        if self._ended:
            self._ended = False
            for sample in self._lora_users.leaving():
                self.planner.loader.release(sample.request.loras)

    def _look(self) -> None:
        self.rows_on = {segment.gpu: segment.rows for segment in self._plan.running if segment.piece is not None}

    def _ask_for_loras(self, samples: list[Sample], now_ns: int) -> None:
        planner = self.planner
        for sample in self._lora_users.asking(samples):
            planner.loader.need(sample.request.loras, now_ns, planner.files_in_weights)
            if planner.asynchronous:
                for lora in sample.request.loras:
                    planner.loader.fetch(lora.file, sample.id, now_ns)

    def _record(self, segment: Segment, step: Step) -> None:
        """Merges, restores, loads and ControlNets that run on the worker's own GPUs."""
        start_ns, end_ns = segment.start_ns, segment.end_ns
        if segment.kind in ("merge", "restore"):
            self._record_on_both(segment.kind, start_ns, end_ns, step.ids)
            return
        lane = "loader" if segment.kind == "load" else "denoise" if segment.gpu == self.planner.gpu else "guidance"
        self._records.append(
            WorkRecord.other(segment.gpu, lane, segment.kind, start_ns, end_ns, step.ids, segment.rows)
        )

    def _record_on_both(self, kind: str, start_ns: int, end_ns: int, samples: tuple[int, ...] = ()) -> None:
        """What changes weights does so for both halves of the guidance."""
        self._records.append(WorkRecord.other(self.planner.gpu, "denoise", kind, start_ns, end_ns, samples))
        guidance_gpu = self.planner.guidance_gpu
        if guidance_gpu is not None:
            self._records.append(WorkRecord.other(guidance_gpu, "guidance", kind, start_ns, end_ns, samples))

    def _restore_while_idle(self, now_ns: int) -> None:
        planner = self.planner
        leaving = idle_restores(planner.weights, self._worker)
        if not leaving:
            return
        start_ns = max(now_ns, planner.restored_ns)
        planner.restored_ns = start_ns + sum(planner.restore_ns(lora) for lora in leaving)
        planner.weights = [lora for lora in planner.weights if lora not in leaving]
        self._record_on_both("restore", start_ns, planner.restored_ns)
