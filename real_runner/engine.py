"""The hardware engine: decide, execute, account, against the real clock.

It drives the same ``Worker`` in the same rounds as the simulator. Everything that has happened since the last round is
taken together in the contract's order, the policy is asked once, and what it wants is submitted to lanes. Times in
records are those of the lanes on the monotonic clock, counted from the start of the trace.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.base import Policy
from real_runner.adapters.serving import Serving
from real_runner.dispatch import Dispatch
from real_runner.execution import GPU, LOOK_EVERY_NS, Execution, OnImage
from real_runner.faults import FAILED, STOPPED, Fault
from real_runner.hardware import Hardware, chunking_of
from real_runner.intake import Entry, Intake, no_controls
from real_runner.pieces import Image
from synerdiff.core import NO_SKIPS, NS_PER_S, InputError, Request, RunResult, Sample, SkipBudget, WorkerInfo
from synerdiff.diffusion.decoder import Chunking
from synerdiff.engine.samples import make_samples, request_records, sorted_work
from synerdiff.engine.worker import Worker
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
    stop: threading.Event | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_image: OnImage | None = None,
    watchdog_s: float = WATCHDOG_S,
    serving: Serving | None = None,
) -> RealRun:
    """Replay requests (by arrival) through a policy on open hardware; ``serving`` is needed for LoRAs and ControlNets.

    ``stop`` ends the run early: what runs is finished, the rest is unfinished. ``on_progress`` is told how many samples
    have ended; ``on_image`` gets every finished image. Raises InputError for what model or profile cannot serve; an
    error after the start is in the result. What has never run on this hardware is warmed up first.
    """
    require_served(requests, hardware, serving)
    gpu = GPU if serving is None else serving.gpu
    samples = make_samples(requests, profile, budget)
    sample_rows = max((sample.full_rows for sample in samples), default=1)
    policy.reset(WorkerInfo(profile.max_rows, gpu, (gpu,) * len(hardware.decode), sample_rows), profile)
    cut = chunking_of(profile, getattr(policy, "chunking", "whole"))
    hardware.warm_up(profile.row_buckets or tuple(profile.steps), cut)
    if serving is not None:
        serving.begin()
    run = _Run(requests, samples, policy, profile, hardware, cut, sample_rows, round(watchdog_s * NS_PER_S), serving)
    run.execution.on_image = on_image
    error: Exception | None = None
    try:
        run.run(stop or threading.Event(), on_progress)
    except Exception as found:  # what was finished until then is not lost
        error = found
    finally:
        run.cancel.set()
    if error is not None and not hardware.hung:
        run.execution.drain()
    execution = run.execution
    if serving is not None:
        if not hardware.hung:
            serving.finish()
        execution.records += serving.parts.ledger.records(execution.zero_ns)
        execution.faults += serving.parts.ledger.faults_since(execution.zero_ns)
    return RealRun(
        RunResult(
            requests=request_records(requests, samples),
            work=sorted_work(execution.records),
            sample_names=[sample.name for sample in samples],
            end_ns=execution.now_ns(),
            decisions=len(execution.dispatch.decide_ns),
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
    """One run: who has arrived, when the policy is asked, and what is then started."""

    def __init__(
        self,
        requests: Sequence[Request],
        samples: list[Sample],
        policy: Policy,
        profile: Profile,
        hardware: Hardware,
        cut: Chunking,
        sample_rows: int,
        watchdog_ns: int,
        serving: Serving | None,
    ) -> None:
        self.policy, self.samples, self.device, self.serving = policy, samples, hardware.device, serving
        # When a step with adapters ends cannot be told from the profile's times of plain steps.
        self.lead_ns = profile.overhead_ns("decision_lead") if serving is None else 0
        chunks = [hardware.chunk_functions(lane, cut) for lane in range(len(hardware.decode))]
        name = getattr(policy, "NAME", "") or type(policy).__name__
        gpu = GPU if serving is None else serving.gpu
        self.worker = Worker(samples, name, len(cut), profile.max_rows, (gpu,) * len(hardware.decode))
        self.samples_of: dict[int, list[Sample]] = {request.request_id: [] for request in requests}
        for sample in samples:
            self.samples_of[sample.request.request_id].append(sample)
        self.entered = 0
        """Samples that have entered waiting or failed on the way; the rest have yet to arrive."""
        zero_ns = time.monotonic_ns() + HEAD_START_NS
        self.execution = Execution(self.worker, hardware, profile, cut.name, chunks, zero_ns, sample_rows, watchdog_ns)
        self.execution.gpu = gpu
        if serving is not None:
            self.execution.make_step = serving.step_piece
        self.cancel = threading.Event()
        controls_of = no_controls if serving is None else serving.controls_of
        self.intake = Intake(hardware.intake, hardware.model, requests, zero_ns, self.cancel, controls_of)

    def run(self, stop: threading.Event, on_progress: Callable[[int], None] | None) -> None:
        """Round after round until all samples have ended, or ``stop``."""
        worker, execution, total = self.worker, self.execution, len(self.samples)
        reported = 0
        while worker.ended < total and not stop.is_set():
            works = execution.works()
            head = self.intake.head
            if head is not None and not worker.denoise_held:
                works.append(head)
            if not works and worker.wake_ns is None:
                worker.refuse_stall(execution.now_ns())
            self.device.wait_any(works, execution.zero_ns + self.due_ns())
            execution.require_alive()
            cause_ns = self.happen()
            if cause_ns >= 0 and worker.ended < total:
                self.decide(cause_ns)
            if on_progress is not None and worker.ended > reported:
                reported = worker.ended
                on_progress(reported)
        if worker.ended < total:
            left = f"{total - worker.ended} of {total} samples had not ended"
            execution.faults.append(Fault(execution.now_ns(), STOPPED, (), left))
            self.cancel.set()
        execution.drain()

    def due_ns(self) -> int:
        """When to look again although nothing has ended."""
        due_ns = self.execution.now_ns() + LOOK_EVERY_NS
        for instant_ns in (self.worker.wake_ns, self.early_ns()):
            if instant_ns is not None:
                due_ns = min(due_ns, instant_ns)
        return due_ns

    def early_ns(self) -> int | None:
        """When the decision that follows the running step closes; None without a lead or once it has."""
        step = self.worker.step
        if not self.lead_ns or step is None or step.shown_done:
            return None
        end_ns = self.execution.predicted_step_end_ns()
        return None if end_ns is None else end_ns - self.lead_ns

    def happen(self) -> int:
        """Everything since the last round, in the contract's order.

        Returns when the latest of what the policy is to be asked about happened, -1 when it is not to be asked.
        """
        worker, execution = self.worker, self.execution
        step_ended = execution.step is not None and execution.step.work.done()
        ended_lanes = execution.ended_lanes()
        entries = self.intake.ready()
        now_ns = execution.now_ns()
        cause_ns = -1
        if step_ended:
            end_ns = execution.end_step(now_ns)
            if worker.next_step is None and worker.exclusive_lane is None:
                cause_ns = end_ns
        for lane in ended_lanes:
            cause_ns = max(cause_ns, execution.end_chunk(lane, now_ns))
        if step_ended and self.lead_ns:
            execution.start_committed(end_ns)
        entered_ns = self.enter(entries, now_ns)
        if entered_ns >= 0 and not worker.denoise_held:
            cause_ns = max(cause_ns, entered_ns)
        if worker.wake_ns is not None and worker.wake_ns <= now_ns:
            cause_ns = max(cause_ns, worker.wake_ns)
            worker.wake_ns = None
        # A step that has only just started is shown as done in a round of its own.
        early_ns = None if step_ended else self.early_ns()
        if early_ns is not None and early_ns <= now_ns:
            worker.show_step_done()
            cause_ns = max(cause_ns, early_ns, 0)
        execution.take_copies()
        return cause_ns

    def enter(self, entries: Sequence[Entry], now_ns: int) -> int:
        """Requests join waiting; returns when the last of them did, -1 without any."""
        execution, latest_ns = self.execution, -1
        for entry in entries:
            samples = self.samples_of[entry.request.request_id]
            self.entered += len(samples)
            latest_ns = min(entry.entered_ns - execution.zero_ns, now_ns)
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

    def decide(self, cause_ns: int) -> None:
        """Ask the policy once and start what it wants now."""
        worker, execution = self.worker, self.execution
        now_ns = execution.now_ns()
        decision = self.policy.decide(worker.look(now_ns, self.entered == len(self.samples)))
        step_starts, starting = worker.apply(decision, now_ns)
        execution.dispatch.decide_ns.append(execution.now_ns() - now_ns)
        if self.serving is not None:
            self.serving.follow(worker)
        committed = worker.next_step is not None and execution.next_step is None
        if step_starts or committed:
            execution.start_step(cause_ns)
        for lane in starting:
            execution.start_chunk(lane, cause_ns)
        for sample_id in decision.reject:
            del execution.images[sample_id]
