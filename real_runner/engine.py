"""The hardware engine: decide, execute, account, against the real clock.

It drives the same ``Worker`` in the same ``Rounds`` as the simulator: what has happened since the last look is taken
together, the policy is asked once, and what it wants is submitted to lanes. Times in records are those of the lanes on
the monotonic clock, counted from the start of the trace.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.base import Policy
from real_runner.account import FAILED, LOST, STOPPED, Dispatch, Fault, LaneHung
from real_runner.adapters.serving import Serving
from real_runner.execution import GPU, LOOK_EVERY_NS, Execution, OnImage
from real_runner.hardware import Hardware, chunking_of
from real_runner.intake import Intake, no_controls
from real_runner.pieces import Image
from synerdiff.core import (
    NO_SKIPS,
    NS_PER_S,
    ContractError,
    Decision,
    InputError,
    LaneView,
    Phase,
    Request,
    RunResult,
    Sample,
    SkipBudget,
    WorkerInfo,
)
from synerdiff.device.lanes import LaneLost
from synerdiff.diffusion.decoder import Chunking
from synerdiff.engine.policy import PolicyCalls
from synerdiff.engine.rounds import NEVER, Rounds
from synerdiff.engine.samples import ClosedLoop, make_samples, request_records, sorted_work
from synerdiff.engine.worker import Step, Worker
from synerdiff.profile.tables import Profile

HEAD_START_NS = 20_000_000
"""Between opening the sender and the trace's 0, so that the first arrival is not late."""
WATCHDOG_S = 60.0


@dataclass(frozen=True, slots=True)
class RealRun:
    """Records as the simulator's, and what only hardware has."""

    result: RunResult
    faults: list[Fault]
    dispatch: Dispatch
    max_rows: int
    """Rows that a step might have at the end: lowered when memory ran out."""
    error: Exception | None
    """What ended the run early: a broken contract or a hung lane. The records hold what was finished until then."""


def run_real(
    requests: Sequence[Request],
    policy: Policy,
    profile: Profile,
    hardware: Hardware,
    *,
    budget: SkipBudget = NO_SKIPS,
    max_concurrency: int | None = None,
    stop: threading.Event | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_image: OnImage | None = None,
    watchdog_s: float = WATCHDOG_S,
    serving: Serving | None = None,
) -> RealRun:
    """Replay requests (by arrival) through a policy on open hardware; ``serving`` is needed for LoRAs and ControlNets.

    ``max_concurrency``: at most so many requests are in the system at a time (a closed loop). ``stop`` ends the run
    early: what runs is finished, the rest is unfinished. ``on_progress`` is told how many samples have ended;
    ``on_image`` gets every finished image. Raises InputError for what model or profile cannot serve; an error after the
    start is in the result. What has never run on this hardware is warmed up first.
    """
    require_served(requests, hardware, serving)
    gpu = GPU if serving is None else serving.gpu
    samples = make_samples(requests, profile, budget)
    sample_rows = max((sample.full_rows for sample in samples), default=1)
    calls = PolicyCalls(policy)
    calls.reset(WorkerInfo(profile.most_rows, gpu, (gpu,) * len(hardware.decode), sample_rows), profile)
    cut = chunking_of(profile, calls.chunking)
    for model, own in {hardware.at(request): profile.at(request.size) for request in requests}.items():
        hardware.warm_up(own.row_buckets or tuple(own.steps), cut, model)
    if serving is not None:
        serving.begin()
    loop = ClosedLoop(requests, samples, max_concurrency, 0)
    run = _Run(
        loop,
        samples,
        calls,
        profile,
        hardware,
        cut,
        sample_rows,
        round(watchdog_s * NS_PER_S),
        serving,
        max_concurrency,
    )
    run.execution.on_image = on_image
    error: Exception | None = None
    try:
        run.run(stop or threading.Event(), on_progress)
    except LaneLost as lost:
        error = run.lost(lost)
    except Exception as raised:  # what was finished until then is not lost
        error = raised
    finally:
        run.cancel.set()
    if not hardware.hung and not isinstance(error, InputError | ContractError | LaneLost):
        try:
            run.rounds.require_unwritten(run.execution.now_ns())
        except ContractError as written:
            error = written
    if error is not None and not hardware.hung:
        run.worker.restore()
        try:
            run.execution.drain()
        except LaneLost as lost:
            error = run.lost(lost)
    execution = run.execution
    if serving is not None:
        if not hardware.hung:
            serving.finish()
        execution.records += serving.parts.ledger.records(execution.zero_ns)
        execution.faults += serving.parts.ledger.faults_since(execution.zero_ns)
    return RealRun(
        RunResult(
            requests=request_records(loop.requests, samples),
            work=sorted_work(execution.records),
            sample_names=[sample.name for sample in samples],
            end_ns=execution.now_ns(),
            decisions=run.rounds.decisions,
        ),
        execution.faults,
        execution.dispatch,
        run.worker.view.max_rows,
        error,
    )


def require_served(requests: Sequence[Request], hardware: Hardware, serving: Serving | None) -> None:
    """InputError for what cannot be served: adapters without their folders, several models, steps of several calls."""
    models = {request.base_model for request in requests}
    if len(models) > 1:
        raise InputError(f"the trace asks for {len(models)} base models; a run has one model loaded.")
    if serving is not None:
        serving.require(requests)
    else:
        for request in requests:
            if request.loras or request.controlnets:
                raise InputError(
                    f"request {request.request_id} asks for LoRAs or ControlNets; say where they are with --loras, "
                    "--controlnets and --controlnet-images."
                )
    for steps in sorted({request.steps for request in requests}):
        calls = hardware.model.denoiser_calls(steps)
        if calls != steps:
            raise InputError(
                f"the scheduler of {hardware.model.name} makes {calls} denoiser calls for {steps} steps; a trace's "
                "steps are denoiser calls, so choose another scheduler, for example ddim."
            )


class _Run:
    """One run: who has arrived, when the engine looks, and what the policy's decisions start."""

    def __init__(
        self,
        loop: ClosedLoop,
        samples: list[Sample],
        policy: PolicyCalls,
        profile: Profile,
        hardware: Hardware,
        cut: Chunking,
        sample_rows: int,
        watchdog_ns: int,
        serving: Serving | None,
        max_concurrency: int | None,
    ) -> None:
        self.loop, self.max_concurrency = loop, max_concurrency
        self.samples, self.device, self.serving = samples, hardware.device, serving
        gpu = GPU if serving is None else serving.gpu
        self.worker = Worker(
            samples, policy.name, len(cut), profile.most_rows, (gpu,) * len(hardware.decode), guarded=policy.foreign
        )
        self.worker.max_rows_of = {size: one.max_rows for size, one in profile.sizes.items()}
        # When a step with adapters ends cannot be told from the profile's times of plain steps.
        lead_ns = profile.overhead_ns("decision_lead") if serving is None else 0
        self.rounds = Rounds(self.worker, policy, self, lead_ns)
        self.rounds.on_decision = self.decided
        self.worker.on_end = self.ended
        self.entered = 0
        """Samples that have entered waiting or failed on the way; the rest have yet to arrive."""
        zero_ns = time.monotonic_ns() + HEAD_START_NS
        self.execution = Execution(self.worker, hardware, profile, cut, zero_ns, sample_rows, watchdog_ns)
        self.execution.gpu = gpu
        self.execution.on_finished = self.finished
        if serving is not None:
            self.execution.make_step = serving.step_piece
        self.cancel = threading.Event()
        controls_of = no_controls if serving is None else serving.controls_of
        self.intake = Intake(
            hardware.intake, hardware.at, loop.requests, zero_ns, self.cancel, controls_of, max_concurrency
        )

    def run(self, stop: threading.Event, on_progress: Callable[[int], None] | None) -> None:
        """Round after round until all samples have ended, or ``stop``."""
        worker, execution, total = self.worker, self.execution, len(self.samples)
        reported = 0
        while worker.ended < total and not stop.is_set():
            works = execution.works()
            head = self.intake.head
            if head is not None and not worker.denoise_held and not self.stuck:
                works.append(head)
            if not works and worker.wake_ns is None:
                worker.refuse_stall(execution.now_ns())
            if self.max_concurrency is not None:  # a copy that ends frees a place
                works += [work for _, _, work in execution.copies]
            self.device.wait_any(works, execution.zero_ns + self.due_ns())
            execution.require_alive()
            cause_ns = self.rounds.take(execution.now_ns())
            execution.take_copies()
            if cause_ns >= 0 and worker.ended < total:
                self.rounds.decide(execution.now_ns(), cause_ns, self.entered == total or self.stuck)
            if on_progress is not None and worker.ended > reported:
                reported = worker.ended
                on_progress(reported)
        if worker.ended < total:
            left = f"{total - worker.ended} of {total} samples had not ended"
            execution.faults.append(Fault(execution.now_ns(), STOPPED, (), left))
            self.cancel.set()
        execution.drain()

    def lost(self, lane: LaneLost) -> LaneHung:
        """A lane does not come back: nothing is waited for any more, and its error ends the run."""
        execution = self.execution
        execution.hardware.hung = True
        execution.faults.append(Fault(execution.now_ns(), LOST, (), str(lane)))
        return LaneHung(f"{lane}; the run was given up, and what was finished until then is written.")

    @property
    def stuck(self) -> bool:
        """Whether a closed loop's places are all taken and nothing runs: nothing can arrive."""
        if self.max_concurrency is None or self.execution.works():
            return False
        live = {image.sample.request.request_id for image in self.execution.images.values()}
        return len(live) == self.max_concurrency

    def ended(self, sample: Sample) -> None:
        """A sample has ended; one that is done keeps its place until its image has reached the host."""
        if sample.phase is not Phase.DONE:
            self.leave(sample, self.execution.now_ns())

    def finished(self, sample: Sample) -> None:
        self.leave(sample, sample.finished_ns)

    def leave(self, sample: Sample, at_ns: int) -> None:
        free_ns = self.loop.freed_ns(sample, at_ns)
        if free_ns >= 0:
            self.intake.free(free_ns)

    def due_ns(self) -> int:
        """When to look again although nothing has ended."""
        due_ns = min(self.execution.now_ns() + LOOK_EVERY_NS, self.rounds.early_ns())
        return due_ns if self.worker.wake_ns is None else min(due_ns, self.worker.wake_ns)

    def decided(self, decision: Decision, now_ns: int, cause_ns: int) -> None:
        """What follows a decision before its pieces start."""
        execution = self.execution
        execution.dispatch.decide_ns.append(execution.now_ns() - now_ns)
        if self.serving is not None:
            self.serving.follow(self.worker)
        execution.commit_step(cause_ns)
        for sample_id in decision.reject:
            del execution.images[sample_id]

    # --- lanes, as `Rounds` asks for them -----------------------------------------------------------------------

    def end_step(self, now_ns: int) -> int:
        step = self.execution.step
        return self.execution.end_step() if step is not None and step.work.done() else -1

    def end_chunks(self, now_ns: int) -> int:
        return max([self.execution.end_chunk(lane) for lane in self.execution.ended_lanes()], default=-1)

    def early_ns(self) -> int:
        end_ns = self.execution.predicted_step_end_ns()
        return NEVER if end_ns is None else end_ns - self.rounds.lead_ns

    def start_step(self, step: Step, cause_ns: int) -> None:
        self.execution.start_step(step, cause_ns)

    def start_chunk(self, lane: LaneView, cause_ns: int) -> None:
        self.execution.start_chunk(lane, cause_ns)

    def enter(self, now_ns: int) -> int:
        execution, latest_ns = self.execution, -1
        for entry in self.intake.ready():
            _, samples = self.loop.send_next(entry.sent_ns)
            self.entered += len(samples)
            latest_ns = min(entry.entered_ns - execution.zero_ns, execution.now_ns())
            if entry.failure:
                names = tuple(sample.name for sample in samples)
                execution.faults.append(Fault(latest_ns, FAILED, names, entry.failure))
                for sample in samples:
                    self.worker.fail(sample)
                continue
            execution.dispatch.lag_ns.append(entry.lag_ns)
            execution.dispatch.prepare_ns.append(entry.prepare_ns)
            for sample, state in zip(samples, entry.states, strict=True):
                sample.entered_ns = latest_ns
                execution.images[sample.id] = Image(sample, state)
                self.worker.enter(sample)
        return latest_ns
