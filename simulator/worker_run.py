"""One worker under simulation: what happens on its lanes, when its policy is asked, and who slows whom.

Between events every running piece progresses at 1/slowdown. A worker tells the earliest instant at which something
can happen to it (``next_ns``), and takes everything of that instant together in one ``turn``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import simpy

from policies.base import Policy
from simulator.pieces import Piece, Times
from synerdiff.core import PPM, InputError, LaneView, Sample, WorkRecord
from synerdiff.engine.worker import Step, Worker
from synerdiff.profile.tables import Profile

PROGRESS_EVERY = 500
DENOISE_GPU = 0


class WorkerRun:
    """One worker, its policy, and the pieces that run on its lanes.

    ``samples`` are those that the worker will serve, by entry; while ``open`` more may be appended.
    """

    def __init__(
        self,
        samples: list[Sample],
        policy: Policy,
        profile: Profile,
        decode_gpus: tuple[int, ...],
        dispersion_seed: int | None,
        on_progress: Callable[[int], None] | None = None,
        gpu: int = DENOISE_GPU,
    ) -> None:
        self.gpu = gpu
        self.policy = policy
        self.profile = profile
        self.chunking = getattr(policy, "chunking", "whole")
        self.lead_ns = profile.overhead_ns("decision_lead")
        self.times = Times(profile, self.chunking, dispersion_seed)
        self.worker = Worker(
            samples,
            getattr(policy, "NAME", "") or type(policy).__name__,
            profile.chunk_count(self.chunking),
            profile.max_rows,
            decode_gpus,
            profile.overhead_ns("result_copy"),
        )
        self.samples = samples
        self.entered = 0
        """Samples that have entered waiting; the rest have yet to arrive."""
        self.open = False
        """More samples may be given to this worker."""
        self.step_piece: Piece | None = None
        self.chunk_pieces: list[Piece | None] = [None] * len(decode_gpus)
        self.decisions = 0
        self.steps_given_up = 0
        """Sample-steps that rejected samples will not take."""
        self.step_records: list[WorkRecord] = []
        self.chunk_records: list[WorkRecord] = []
        self.on_progress = on_progress
        self.reported = 0

    def run(self, environment: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """The life of the worker: sleep until something happens, take it all, decide, go on."""
        worker = self.worker
        total = len(self.samples)
        now_ns = 0
        while worker.ended < total:
            due_ns = self.next_ns()
            if due_ns < 0:
                worker.refuse_stall(now_ns)
            if due_ns > now_ns:
                yield environment.timeout(due_ns - now_ns)
                now_ns = due_ns
            if self.happen(now_ns) and worker.ended < total:
                self.decide(now_ns)
            self.retime(now_ns)
            if self.on_progress is not None and worker.ended >= self.reported + PROGRESS_EVERY:
                self.reported = worker.ended
                self.on_progress(worker.ended)

    def turn(self, now_ns: int) -> None:
        """One round of ``run``, for a clock that drives many workers."""
        if self.happen(now_ns) and (self.open or self.worker.ended < len(self.samples)):
            self.decide(now_ns)
        self.retime(now_ns)

    def next_ns(self) -> int:
        """The earliest instant at which something happens, -1 when nothing ever will."""
        worker = self.worker
        due_ns = -1
        piece = self.step_piece
        if piece is not None:
            due_ns = piece.end_ns
            if self.lead_ns and not worker.step.shown_done:  # type: ignore[union-attr]  # a piece has a step
                due_ns = self.early_ns(piece)
        elif worker.exclusive_lane is None and self.entered < len(self.samples):
            due_ns = self.samples[self.entered].entered_ns
        for piece in self.chunk_pieces:
            if piece is not None and (piece.end_ns < due_ns or due_ns < 0):
                due_ns = piece.end_ns
        wake_ns = worker.wake_ns
        if wake_ns is not None and (wake_ns < due_ns or due_ns < 0):
            due_ns = wake_ns
        return due_ns

    def early_ns(self, piece: Piece) -> int:
        """When the decision that follows the running step closes."""
        return max(piece.since_ns, piece.end_ns - self.lead_ns)

    def happen(self, now_ns: int) -> bool:
        """Everything of this instant, in the contract's order; True when the policy is to be asked."""
        worker = self.worker
        ask = False
        piece = self.step_piece
        step_ended = piece is not None and piece.end_ns == now_ns
        if step_ended:
            self.end_step(piece, now_ns)  # type: ignore[arg-type]  # a step ended, so there is its piece
            ask = worker.next_step is None and worker.exclusive_lane is None
        for lane in worker.lanes:
            chunk_piece = self.chunk_pieces[lane.index]
            if chunk_piece is not None and chunk_piece.end_ns == now_ns:
                self.end_chunk(lane, chunk_piece, now_ns)
                ask = True
        if step_ended and self.lead_ns:
            starting = worker.start_committed()
            if worker.step is not None:
                self.start_step(worker.step, now_ns)
            for lane in starting:
                self.start_chunk(lane, now_ns)
        if self.take_arrivals(now_ns) and not worker.denoise_held:
            ask = True
        if worker.wake_ns is not None and worker.wake_ns <= now_ns:
            worker.wake_ns = None
            ask = True
        if self.lead_ns:
            step, piece = worker.step, self.step_piece
            timed = piece is not None and piece.end_ns >= 0 and step is not None and not step.shown_done
            if timed and self.early_ns(piece) <= now_ns:  # type: ignore[arg-type]  # timed: there is a piece
                worker.show_step_done()
                ask = True
        return ask

    def take_arrivals(self, now_ns: int) -> bool:
        entered, samples = self.entered, self.samples
        total = len(samples)
        if entered == total or samples[entered].entered_ns > now_ns:
            return False
        while entered < total and samples[entered].entered_ns <= now_ns:
            self.worker.enter(samples[entered])
            entered += 1
        self.entered = entered
        return True

    def decide(self, now_ns: int) -> None:
        """Ask the policy once and start what it wants now."""
        worker = self.worker
        self.decisions += 1
        decision = self.policy.decide(worker.look(now_ns, self.entered == len(self.samples) and not self.open))
        step_starts, starting = worker.apply(decision, now_ns)
        if decision.reject:
            self.steps_given_up += sum([self.samples[sample_id].steps_left for sample_id in decision.reject])
        if step_starts:
            assert worker.step is not None
            self.start_step(worker.step, now_ns)
        for lane in starting:
            self.start_chunk(lane, now_ns)

    def start_step(self, step: Step, now_ns: int) -> None:
        self.step_piece = Piece(self.times.step_ns(step.rows), now_ns)

    def start_chunk(self, lane: LaneView, now_ns: int) -> None:
        sample = lane.sample
        assert sample is not None
        if sample.decode_started_ns < 0:
            sample.decode_started_ns = now_ns
        self.chunk_pieces[lane.index] = Piece(self.times.chunk_ns(sample.chunks_done), now_ns)

    def end_step(self, piece: Piece, now_ns: int) -> None:
        step = self.worker.end_step(now_ns)
        self.step_piece = None
        self.step_records.append(
            WorkRecord.step(self.gpu, piece.start_ns, now_ns, step.ids, step.rows, step.modes, step.pad_rows)
        )

    def end_chunk(self, lane: LaneView, piece: Piece, now_ns: int) -> None:
        sample = lane.sample
        assert sample is not None
        self.chunk_records.append(
            WorkRecord.decode_chunk(
                lane.gpu, lane.index, piece.start_ns, now_ns, sample.id, sample.chunks_done, lane.exclusive, lane.forced
            )
        )
        self.chunk_pieces[lane.index] = None
        if self.worker.end_chunk(lane, now_ns):
            self.start_chunk(lane, now_ns)

    def retime(self, now_ns: int) -> None:
        """Look up the slowdowns of what runs together now; a piece whose slowdown is unchanged is left alone."""
        step_piece, step = self.step_piece, self.worker.step
        step_ppm = PPM
        for lane, piece in zip(self.worker.lanes, self.chunk_pieces, strict=True):
            if piece is None:
                continue
            ppm = PPM
            if step is not None and lane.gpu == self.gpu:
                assert lane.sample is not None
                slowed = self.profile.slowdown_ppm(step.rows, self.chunking, lane.sample.chunks_done)
                step_ppm += slowed[0] - PPM
                ppm = slowed[1]
            if ppm != piece.ppm:
                piece.retime(ppm, now_ns)
        if step_piece is not None and step_ppm != step_piece.ppm:
            if step_ppm <= 0:
                raise without_limit(step_ppm, self.profile, step.rows if step else 0)
            step_piece.retime(step_ppm, now_ns)


def without_limit(step_ppm: int, profile: Profile, rows: int) -> InputError:
    """The error that the chunks beside a step add up to a speed-up without limit."""
    return InputError(
        f"profile '{profile.name}': the chunks beside a step of {rows} rows speed it up without limit "
        f"(sum of slowdowns {step_ppm} ppm)."
    )
