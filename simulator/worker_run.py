"""One worker under simulation: what its lanes run, when something happens to them, and who slows whom.

Between events every running piece progresses at 1/slowdown. A worker tells the earliest instant at which something
can happen to it (``next_ns``); the order of what happens then is `synerdiff.engine.rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

import simpy

from policies.base import Policy
from simulator.pieces import Piece, PlainStepper, Stepper, Times
from synerdiff.core import PPM, LaneView, Sample, WorkerInfo, WorkRecord
from synerdiff.engine.policy import PolicyCalls
from synerdiff.engine.rounds import NEVER, Rounds
from synerdiff.engine.samples import ClosedLoop
from synerdiff.engine.worker import Step, Worker
from synerdiff.profile.tables import Profile

PROGRESS_EVERY = 500
ALONE: Mapping[int, int] = {}
"""Nothing slows a step."""


class WorkerRun:
    """One worker, its policy, and the pieces that run on its lanes.

    ``samples`` are the run's, by id; ``arrivals`` those that this worker will serve, by entry; while ``open`` more may
    be appended.
    """

    def __init__(
        self,
        policy: Policy,
        profile: Profile,
        info: WorkerInfo,
        samples: list[Sample],
        arrivals: list[Sample],
        dispersion_seed: int | None,
    ) -> None:
        calls = PolicyCalls(policy)
        calls.reset(info, profile)
        self.gpu = info.denoise_gpu
        self.profile = profile
        self.chunking = calls.chunking
        self.times = Times(profile, self.chunking, dispersion_seed)
        self.worker = Worker(
            samples,
            calls.name,
            profile.chunk_count(self.chunking),
            profile.most_rows,
            info.decode_gpus,
            profile.overhead_ns("result_copy"),
            profile.overhead_ns("sample_host"),
            calls.foreign,
        )
        self.worker.max_rows_of = {size: one.max_rows for size, one in profile.sizes.items()}
        self.rounds = Rounds(self.worker, calls, self, profile.overhead_ns("decision_lead"))
        self.arrivals = arrivals
        self.entered = 0
        """Samples that have entered waiting; the rest have yet to arrive."""
        self.open = False
        """More samples may be given to this worker."""
        self.in_groups = False
        """It is given groups from a shared queue, and each closes its view until the next comes."""
        self.stepper: Stepper = PlainStepper(self.times, profile, self.gpu)
        self.chunk_pieces: list[Piece | None] = [None] * len(info.decode_gpus)
        self.chunks_running = 0
        self.chunk_due_ns = NEVER
        """The earliest end of a running chunk, as last timed."""
        self.slower: dict[int, int] = {}
        """GPU -> ppm that the chunks there add to a step's own 1, as last looked up."""
        self.records: list[WorkRecord] = []
        self.by_solo_time = self.clamped = 0
        """Look-ups of slowdowns for a pair of resolutions that was not measured; those beyond the range that was."""
        self.late_step: Step | None = None
        self.late_lanes: list[LaneView] = []
        """What starts when the host no longer holds the lanes."""
        self.late_question = False
        """The policy is to be asked then."""

    def run(
        self,
        environment: simpy.Environment,
        on_progress: Callable[[int], None] | None,
        closed_loop: ClosedLoop | None = None,
    ) -> Generator[simpy.Event, None, None]:
        """The life of a lone worker: sleep until something happens, take it all, decide, go on.

        In a closed loop its arrivals are those that have been sent.
        """
        if closed_loop is not None:
            yield from self._run_closed_loop(environment, on_progress, closed_loop)
            return
        worker, rounds, retime = self.worker, self.rounds, self.retime
        total, holds = len(self.arrivals), worker.sample_host_ns > 0
        take_ends = self.take_ends if holds else rounds.take_ends
        now_ns = reported = 0
        while worker.ended < total:
            due_ns = self.next_ns()
            if due_ns == NEVER:
                worker.refuse_stall(now_ns)
            if due_ns > now_ns:
                yield environment.timeout(due_ns - now_ns)
                now_ns = due_ns
            cause_ns = rounds.take_arrivals(now_ns, take_ends(now_ns))
            asks = self.asks(cause_ns, now_ns) if holds else cause_ns >= 0
            if asks and worker.ended < total:
                rounds.decide(now_ns, now_ns, self.entered == total)
            retime(now_ns)
            if on_progress is not None and worker.ended >= reported + PROGRESS_EVERY:
                reported = worker.ended
                on_progress(reported)

    def _run_closed_loop(
        self, environment: simpy.Environment, on_progress: Callable[[int], None] | None, closed_loop: ClosedLoop
    ) -> Generator[simpy.Event, None, None]:
        worker, rounds, total = self.worker, self.rounds, len(self.worker.samples)
        worker.on_end = closed_loop.ended
        now_ns = reported = 0
        while worker.ended < total:
            due_ns = self.next_ns()
            if not worker.denoise_held:
                due_ns = min(due_ns, closed_loop.due_ns)
            if due_ns == NEVER:
                worker.refuse_stall(now_ns)
            if due_ns > now_ns:
                yield environment.timeout(due_ns - now_ns)
                now_ns = due_ns
            cause_ns = self.take_ends(now_ns)
            for _, samples in closed_loop.send(now_ns):
                self.arrivals += samples
            if self.asks(rounds.take_arrivals(now_ns, cause_ns), now_ns) and worker.ended < total:
                self.open = closed_loop.unsent and not (closed_loop.stuck(now_ns) and not self.running)
                rounds.decide(now_ns, now_ns, self.closed)
            self.retime(now_ns)
            if on_progress is not None and worker.ended >= reported + PROGRESS_EVERY:
                reported = worker.ended
                on_progress(reported)

    @property
    def running(self) -> bool:
        """A step or a chunk runs or will by itself, or the policy will be asked when the host frees the lanes."""
        worker = self.worker
        return worker.step is not None or self.late_question or any(lane.sample is not None for lane in worker.lanes)

    @property
    def closed(self) -> bool:
        """No sample can enter waiting any more, or none of the group that the worker was given."""
        return self.entered == len(self.arrivals) and (self.in_groups or not self.open)

    def take_ends(self, now_ns: int) -> int:
        """`Rounds.take_ends`, then what the host has held back until now starts."""
        cause_ns = self.rounds.take_ends(now_ns)
        if (self.late_step is not None or self.late_lanes) and now_ns >= self.worker.held_until_ns:
            step, self.late_step = self.late_step, None
            lanes, self.late_lanes = self.late_lanes, []
            if step is not None:
                self.start_step(step, now_ns)
            for lane in lanes:
                self.start_chunk(lane, now_ns)
        return cause_ns

    def asks(self, cause_ns: int, now_ns: int) -> bool:
        """Whether the policy is to be asked now: not while the host holds the lanes, and once it does no more."""
        if now_ns < self.worker.held_until_ns:
            self.late_question |= cause_ns >= 0
            return False
        late, self.late_question = self.late_question, False
        return late or cause_ns >= 0

    def next_ns(self) -> int:
        """The earliest instant at which something happens, NEVER when nothing ever will."""
        worker = self.worker
        step = worker.step
        due_ns = self.chunk_due_ns
        if step is not None:
            if self.stepper.due_ns < due_ns:
                due_ns = self.stepper.due_ns
            if self.rounds.lead_ns:
                due_ns = min(due_ns, self.rounds.early_ns())
        elif worker.exclusive_lane is None and self.entered < len(self.arrivals):
            due_ns = min(due_ns, self.arrivals[self.entered].entered_ns)
        wake_ns = worker.wake_ns
        if wake_ns is not None and wake_ns < due_ns:
            due_ns = wake_ns
        if not worker.sample_host_ns or worker.held_until_ns >= due_ns:
            return due_ns
        return worker.held_until_ns if self.late_question or self.late_lanes or self.late_step is not None else due_ns

    def retime(self, now_ns: int) -> None:
        """Look up the slowdowns of what runs together now; a piece whose slowdown is unchanged is left alone."""
        stepper = self.stepper
        if not self.chunks_running:
            stepper.retime(ALONE, now_ns)
            return
        slower = self.slower
        slower.clear()
        chunk_due_ns = NEVER
        for lane, piece in zip(self.worker.lanes, self.chunk_pieces, strict=True):
            if piece is None:
                continue
            ppm = PPM
            rows = stepper.rows_on.get(lane.gpu, 0)
            if rows:
                assert lane.sample is not None
                if self.profile.others:
                    step_ppm, ppm = self._slowdowns_beside(rows, lane.sample)
                else:
                    step_ppm, ppm = self.profile.slowdown_ppm(rows, self.chunking, lane.sample.chunks_done)
                slower[lane.gpu] = slower.get(lane.gpu, 0) + step_ppm - PPM
            if ppm != piece.ppm:
                piece.retime(ppm, now_ns)
            if piece.end_ns < chunk_due_ns:
                chunk_due_ns = piece.end_ns
        self.chunk_due_ns = chunk_due_ns
        stepper.retime(slower, now_ns)

    def _slowdowns_beside(self, rows: int, sample: Sample) -> tuple[int, int]:
        """Of the running step and of the sample's chunk, each at its own resolution."""
        step = self.worker.step
        assert step is not None
        step_ppm, ppm, how = self.profile.slowdowns_beside(
            step.samples[0].request.size, rows, self.chunking, sample.chunks_done, sample.request.size
        )
        self.by_solo_time += how > 0
        self.clamped += how > 1
        return step_ppm, ppm

    # --- lanes, as `Rounds` asks for them -----------------------------------------------------------------------

    def end_step(self, now_ns: int) -> int:
        stepper = self.stepper
        if stepper.due_ns > now_ns:
            return -1
        start_ns = stepper.advance(now_ns)
        if start_ns < 0:
            return -1
        step = self.worker.end_step(now_ns)
        self.records.append(WorkRecord.step(self.gpu, start_ns, now_ns, step.ids, step.rows, step.modes, step.pad_rows))
        return now_ns

    def end_chunks(self, now_ns: int) -> int:
        if self.chunk_due_ns > now_ns:
            return -1
        ended_ns = -1
        for lane, piece in zip(self.worker.lanes, self.chunk_pieces, strict=True):
            if piece is None or piece.end_ns > now_ns:
                continue
            ended_ns = now_ns
            sample = lane.sample
            assert sample is not None
            self.records.append(
                WorkRecord.decode_chunk(
                    lane.gpu, lane.index, piece.start_ns, now_ns, sample.id, sample.chunks_done, lane.exclusive,
                    lane.forced,
                )
            )  # fmt: skip
            self.chunk_pieces[lane.index] = None
            self.chunks_running -= 1
            if self.worker.end_chunk(lane, now_ns):
                self.start_chunk(lane, now_ns)
        self.chunk_due_ns = NEVER
        return ended_ns

    def enter(self, now_ns: int) -> int:
        entered, arrivals = self.entered, self.arrivals
        total = len(arrivals)
        if entered == total or arrivals[entered].entered_ns > now_ns:
            return -1
        while entered < total and arrivals[entered].entered_ns <= now_ns:
            self.worker.enter(arrivals[entered])
            entered += 1
        self.entered = entered
        return now_ns

    def early_ns(self) -> int:
        return self.stepper.early_ns(self.rounds.lead_ns)

    def start_step(self, step: Step, cause_ns: int) -> None:
        if cause_ns < self.worker.held_until_ns:
            self.late_step = step
            return
        self.stepper.start(step, cause_ns)

    def start_chunk(self, lane: LaneView, cause_ns: int) -> None:
        if cause_ns < self.worker.held_until_ns:
            self.late_lanes.append(lane)
            return
        sample = lane.sample
        assert sample is not None
        if not sample.chunks_done:
            self.worker.start_decode(sample, cause_ns)
        self.chunks_running += 1
        times = self.times.of(sample.request) if self.times.others else self.times
        self.chunk_pieces[lane.index] = Piece(times.chunk_ns(sample.chunks_done), cause_ns)
