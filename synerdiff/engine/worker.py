"""What one worker holds, and the policy contract: the part of an engine that knows no clock.

Both engines drive this class, so that a decision means the same in both. It moves samples through their phases,
checks every decision, and says what to start now and what only when the running step really ends. When things happen
is the engine's business.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from operator import attrgetter, is_
from types import NoneType
from typing import NoReturn

from synerdiff.core import (
    CONDITIONAL,
    GUIDED,
    MODE_LETTER,
    NOTHING,
    NS_PER_S,
    ChunkLaunch,
    ContractError,
    Decision,
    LaneView,
    Mode,
    Phase,
    Sample,
    SampleId,
    View,
)
from synerdiff.engine.guard import Guard, lane_state

IDLE_DECISIONS = 10_000
"""So many decisions in a row that bring nothing forward are an error (contract, rule 24)."""
ACTIVE, DECODING, WAITING = Phase.ACTIVE, Phase.DECODING, Phase.WAITING


def short(value: object) -> str:
    """A value as a message shows it; only its type where that would be long."""
    plain = value is None or type(value) in (int, float, bool, str)
    text = repr(value) if plain else ""
    return text if plain and len(text) <= 40 else f"a {type(value).__name__}"


class Step:
    """One denoiser step over a batch of samples."""

    __slots__ = ("committed", "freed", "ids", "modes", "pad_rows", "rows", "samples", "shown_done")

    def __init__(self, samples: list[Sample], ids: tuple[SampleId, ...], modes: str, rows: int, pad_rows: int) -> None:
        self.samples = samples
        self.ids = ids
        self.modes = modes
        self.rows = rows
        self.pad_rows = pad_rows
        self.committed = False
        """It was decided while another step ran, so it does not start on an idle lane."""
        self.shown_done = False
        """The view shows it as done already, because the next decision closes early."""
        self.freed: list[Sample] = []
        """Samples for which this was the last step."""


_containers = attrgetter("waiting", "active", "decoding", "decode_lanes", "arrived", "step_done", "chunk_done", "gone")


class Worker:
    """Samples, lanes and the view of one worker.

    ``samples`` are the run's, by SampleId (those of other workers too); ``chunk_count`` is that of the policy's
    chunking. Times go in and out in ns.
    """

    def __init__(
        self,
        samples: list[Sample],
        policy_name: str,
        chunk_count: int,
        max_rows: int,
        decode_gpus: tuple[int, ...],
        result_copy_ns: int = 0,
        sample_host_ns: int = 0,
        guarded: bool = True,
    ) -> None:
        self.samples = samples
        self.policy_name = policy_name
        self.chunk_count = chunk_count
        self.result_copy_ns, self.sample_host_ns = result_copy_ns, sample_host_ns
        self.held_until_ns = 0
        """Until then the host is busy with samples that have ended, and no lane starts anything (contract, rule 19)."""
        self.waiting: OrderedDict[SampleId, Sample] = OrderedDict()
        self.active: dict[SampleId, Sample] = {}
        self.decoding: OrderedDict[SampleId, Sample] = OrderedDict()
        self.lanes = [LaneView(index, gpu) for index, gpu in enumerate(decode_gpus)]
        self.step: Step | None = None
        """The step that runs."""
        self.next_step: Step | None = None
        """The step that starts when the running one really ends."""
        self.exclusive_lane: LaneView | None = None
        """The decode lane whose launch holds (or has reserved) the denoise lane."""
        self.wake_ns: int | None = None
        self.ended = 0
        """Samples that are done, rejected or failed."""
        self.max_rows_of: Mapping[tuple[int, int], int] = {}
        """Rows that a step may have at each resolution, where there are several."""
        self.on_end: Callable[[Sample], None] | None = None
        """Told of each of them, as it ends."""
        self.hand_over: Callable[[Sample, int], None] | None = None
        """Takes each sample at the end of its last step, and says when it is finished: decoders are elsewhere."""
        self.steps_settled = 0
        """Denoising steps that its samples have taken, and those that rejected ones will not take."""
        self.guard = Guard(self.lanes) if guarded else None
        """Of a user's policy: ours are known to write nothing, and to answer in the right types."""
        self._max_rows = max_rows
        self._running: tuple[SampleId, ...] = ()
        self._denoise_free = True
        self._closed = False
        self._idle_decisions = 0
        """Decisions in a row that started, admitted, rejected and ended nothing."""
        self._last_step: tuple[tuple[tuple[SampleId, Mode], ...], Step] | None = None
        """The last decided step and what it is, while no mode was a skip and no member has left."""
        self._arrived: list[Sample] = []
        self._step_done: list[Sample] = []
        self._chunk_done: list[Sample] = []
        self._gone: list[tuple[Sample, str]] = []
        view = View()
        view.now_ns = 0
        view.waiting = self.waiting.values()
        view.active = self.active.values()
        view.decoding = self.decoding.values()
        view.decode_lanes = tuple(self.lanes)
        view.running = ()
        view.denoise_free = True
        view.max_rows = max_rows
        view.closed = False
        view.arrived, view.step_done = self._arrived, self._step_done
        view.chunk_done, view.gone = self._chunk_done, self._gone
        self.view = view
        self._shown = _containers(view)

    # --- what happens -------------------------------------------------------------------------------------------

    def enter(self, sample: Sample) -> None:
        """A sample joins waiting."""
        sample.phase = WAITING
        if self.guard is not None:
            self.guard.news += 1
            self.guard.enter(sample)
        self.waiting[sample.id] = sample
        self._arrived.append(sample)

    def show_step_done(self) -> None:
        """Count the running step as done: at its end, or earlier when the next decision closes early."""
        step = self.step
        assert step is not None
        step.shown_done = True
        for sample, letter in zip(step.samples, step.modes, strict=True):
            sample.in_step = False
            if letter == "g":
                sample.had_guided_step = True
                sample.skip_run = 0
            elif sample.guided:
                self._spend_skip(sample)
            sample.step_index = done = sample.step_index + 1
            if done >= sample.steps:
                sample.phase = DECODING
                del self.active[sample.id]
                if self.hand_over is None:
                    self.decoding[sample.id] = sample
                step.freed.append(sample)
                self._last_step = None
        self._step_done.extend(step.samples)
        guard = self.guard
        if guard is not None:
            count = len(step.samples)
            guard.steps += count
            guard.news += count

    def _spend_skip(self, sample: Sample) -> None:
        if self.guard is not None:
            self.guard.skips += 1
            self.guard.skipped_at.setdefault(sample.id, []).append(sample.step_index)
        sample.skips_spent += 1
        sample.skips_left -= 1
        sample.skip_run += 1
        if sample.skipped_at is None:
            sample.skipped_at = []
        sample.skipped_at.append(sample.step_index)

    def end_step(self, now_ns: int) -> Step:
        """The running step really ends; returns it. What was committed may start."""
        step = self.step
        assert step is not None
        if not step.shown_done:
            self.show_step_done()
        self.steps_settled += len(step.samples)
        guard = self.guard
        for sample in step.freed:
            sample.denoised_ns = now_ns
            if guard is not None:
                guard.denoised_ns[sample.id] = now_ns
        if guard is not None and guard.steps > guard.steps_given:
            self.require_unwritten(now_ns)
        if self.hand_over is not None:
            for sample in step.freed:
                self.hand_over(sample, now_ns)
                sample.chunks_done = self.chunk_count
                if guard is not None:
                    guard.chunks += self.chunk_count
                    guard.decode_started_ns[sample.id] = sample.decode_started_ns
                self._end(sample, Phase.DONE)
        self.step = None
        return step

    def start_committed(self) -> list[LaneView]:
        """After ``end_step``: the committed step becomes the running one; returns the lanes whose launch starts."""
        self.step, self.next_step = self.next_step, None
        starting = [lane for lane in self.lanes if lane.sample is not None and not lane.started]
        for lane in starting:
            lane.started = True
            self._note(lane)
        return starting

    def start_decode(self, sample: Sample, at_ns: int) -> None:
        """A sample's first chunk starts."""
        if self.guard is not None:
            known = self.guard.decode_started_ns
            if known.get(sample.id, -1) != sample.decode_started_ns:
                self._refuse_written(at_ns, f"decode_started_ns of sample {sample.name}")
            known[sample.id] = at_ns
        sample.decode_started_ns = at_ns

    def end_chunk(self, lane: LaneView, now_ns: int) -> bool:
        """The lane's running chunk ends. True when the next chunk of the same launch follows by itself."""
        sample = lane.sample
        guard = self.guard
        if guard is not None:
            guard.chunks += 1
            guard.news += 1
            if lane_state(lane) != guard.lanes[lane.index] or guard.chunks > self.chunk_count * len(guard.entered):
                self.require_unwritten(now_ns)
        assert sample is not None
        sample.chunks_done += 1
        lane.chunks_left -= 1
        self._chunk_done.append(sample)
        if lane.chunks_left:
            self._note(lane)
            return True
        if lane is self.exclusive_lane:
            self.exclusive_lane = None
        lane.sample = None
        self._note(lane)
        sample.launched = False
        if sample.chunks_done == self.chunk_count:
            if self.sample_host_ns:
                now_ns = self.held_until_ns = max(now_ns, self.held_until_ns) + self.sample_host_ns
            sample.finished_ns = now_ns + self.result_copy_ns
            del self.decoding[sample.id]
            self._end(sample, Phase.DONE)
        return False

    def fail(self, sample: Sample) -> None:
        """A sample fails alone, and a decode lane that it holds is free again. It must be in no step."""
        for lane in self.lanes:
            if lane.sample is sample:
                lane.sample = None
                lane.chunks_left = 0
                self._note(lane)
                sample.launched = False
                if lane is self.exclusive_lane:
                    self.exclusive_lane = None
        for place in (self.waiting, self.active, self.decoding):
            place.pop(sample.id, None)
        self._last_step = None
        self._end(sample, Phase.FAILED)

    def _end(self, sample: Sample, phase: Phase) -> None:
        sample.phase = phase
        if self.guard is not None:
            self.guard.news += 1
            self.guard.end(sample)
        self.ended += 1
        self._gone.append((sample, str(phase)))
        if self.on_end is not None:
            self.on_end(sample)

    # --- deciding -----------------------------------------------------------------------------------------------

    @property
    def denoise_held(self) -> bool:
        """A step runs, or an exclusive launch holds the lane: arrivals alone do not ask the policy."""
        return self.step is not None or self.exclusive_lane is not None

    def look(self, now_ns: int, closed: bool) -> View:
        """The view as of now."""
        view = self.view
        step = self.step
        shown = self.next_step if step is None or step.shown_done else step
        view.now_ns = now_ns
        view.closed = self._closed = closed
        view.running = self._running = () if shown is None else shown.ids
        view.denoise_free = self._denoise_free = shown is None and self.exclusive_lane is None
        return view

    def require_unwritten(self, now_ns: int) -> None:
        """ContractError when the policy has written to a sample or a lane; called before records are made."""
        guard = self.guard
        if guard is None:
            return
        try:
            what = guard.anything(self.samples, self.lanes, self.chunk_count)
            if what is None and not all(map(is_, _containers(self.view), self._shown)):
                what = "its view"
        except Exception as error:
            what = f"a sample, a lane or its view ({type(error).__name__})"
        if what is not None:
            self._refuse_written(now_ns, what)

    def restore(self) -> None:
        """Samples and lanes as they were, where a user's policy may have written to them: it is asked no more."""
        if self.guard is not None:
            self.guard.restore(self.samples, self.lanes)

    def _refuse_written(self, now_ns: int, what: str) -> NoReturn:
        self.restore()
        self._refuse(now_ns, f"it wrote {what}, which it may only read")

    def _note(self, lane: LaneView) -> None:
        """What the lane runs has changed."""
        if self.guard is not None:
            self.guard.lanes[lane.index] = lane_state(lane)

    def apply(self, decision: Decision, now_ns: int) -> tuple[Step | None, list[LaneView]]:
        """Check a decision and carry it out.

        Returns the step that starts now (it is then ``self.step``), and the lanes whose launch starts now. The rest
        is committed: it starts with ``start_committed`` when the running step really ends. Raises ContractError.
        """
        guard = self.guard
        if guard is not None:
            self._require_sound(decision, guard, now_ns)
        admit, reject, batch, pad_rows, chunks, wake_ns = decision
        if batch or chunks or admit or reject:
            self._idle_decisions = 0
        else:
            self._count_idle(now_ns)
        # What has happened since the last decision has been seen.
        self._arrived.clear()
        self._step_done.clear()
        self._chunk_done.clear()
        self._gone.clear()
        if decision is NOTHING:
            self.wake_ns = None
            return None, []
        early = self.step is not None
        for sample_id in admit:
            sample = self._sample(sample_id, self.waiting, WAITING, "admitted", now_ns)
            del self.waiting[sample_id]
            sample.phase = ACTIVE
            sample.admitted_ns = now_ns
            if guard is not None:
                guard.admitted_ns[sample_id] = now_ns
            self.active[sample_id] = sample
        for sample_id in reject:
            sample = self._sample(sample_id, self.waiting, WAITING, "rejected", now_ns)
            del self.waiting[sample_id]
            self.steps_settled += sample.steps_left
            self._end(sample, Phase.REJECTED)
        starts: Step | None = None
        if batch:
            step = self._make_step(batch, pad_rows, now_ns)
            if early:
                step.committed = True
                self.next_step = step
            else:
                self.step = starts = step
        elif pad_rows:
            self._refuse(now_ns, f"pad_rows is {pad_rows} without a step")
        starting: list[LaneView] = []
        for launch in chunks:
            lane = self._launch(launch, now_ns)
            if lane.started:
                starting.append(lane)
        if wake_ns is not None and wake_ns <= now_ns:
            self._refuse(now_ns, f"wake_at_ns is {wake_ns}, which is not after now ({now_ns})")
        self.wake_ns = wake_ns
        return starts, starting

    def _require_sound(self, decision: Decision, guard: Guard, now_ns: int) -> None:
        """The view is as it was shown, and the fields of the decision have their types."""
        view = self.view
        if (
            view.now_ns != now_ns
            or view.running is not self._running
            or view.denoise_free is not self._denoise_free
            or view.closed is not self._closed
            or view.max_rows > self._max_rows
            or guard.news != len(self._arrived) + len(self._step_done) + len(self._chunk_done) + len(self._gone)
        ):
            self._refuse_written(now_ns, "to the view")
        guard.news = 0
        admit, reject, batch, pad_rows, chunks, wake_ns = decision
        tuples = type(admit) is tuple and type(reject) is tuple and type(batch) is tuple and type(chunks) is tuple
        if tuples and type(pad_rows) is int and (wake_ns is None or type(wake_ns) is int):
            return
        whole = {"pad_rows": (int,), "wake_at_ns": (int, NoneType)}
        for name, value in zip(Decision._fields, decision, strict=True):
            if type(value) not in whole.get(name, (tuple,)):
                needed = "whole number" if name in whole else "tuple"
                self._refuse(now_ns, f"{name} is {short(value)}; a {needed} is needed")

    def _count_idle(self, now_ns: int) -> None:
        if self._step_done or self._chunk_done or self._gone:
            self._idle_decisions = 0
        self._idle_decisions += 1
        if self._idle_decisions >= IDLE_DECISIONS:
            self._refuse(now_ns, f"{IDLE_DECISIONS} decisions in a row started, admitted, rejected and ended nothing")

    def _make_step(self, batch: tuple[tuple[SampleId, Mode], ...], pad_rows: int, now_ns: int) -> Step:
        if not self._denoise_free:
            self._refuse(now_ns, "a step was decided while the denoise lane is busy or held")
        # The same members take most steps: what is known of them holds while they are the same.
        if self._last_step is not None and self._last_step[0] is batch and not pad_rows:
            known = self._last_step[1]
            if known.rows <= self.view.max_rows:
                for member in known.samples:
                    member.in_step = True
                if known is self.step:
                    return Step(known.samples, known.ids, known.modes, known.rows, 0)
                known.committed = known.shown_done = False
                return known
        samples: list[Sample] = []
        letters = ""
        key = None
        skips = False
        rows = pad_rows
        if rows < 0:
            self._refuse(now_ns, f"pad_rows is {rows}")
        active = self.active
        for sample_id, mode in batch:
            sample = active.get(sample_id)
            if sample is None or sample.id is not sample_id:
                sample = self._sample(sample_id, active, ACTIVE, "stepped", now_ns)
            if sample.in_step:
                self._refuse(now_ns, f"sample {sample.name} is in the step twice")
            if key is None:
                key = sample.batch_key
            elif sample.batch_key is not key and sample.batch_key != key:
                self._refuse(now_ns, f"sample {sample.name} has batch key {sample.batch_key}, the step has {key}")
            if mode is GUIDED and sample.guided:
                rows += 2
                letters += "g"
            else:
                rows += self._rows_of(sample, mode, now_ns)
                letters += MODE_LETTER[mode]
                skips = skips or sample.guided
            sample.in_step = True
            samples.append(sample)
        most = self.view.max_rows
        if self.max_rows_of:
            size = samples[0].request.size
            most = most if size is None else min(most, self.max_rows_of.get(size, most))
        if rows > most:
            self._refuse(now_ns, f"the step has {rows} rows; at most {most} are possible")
        step = Step(samples, tuple([s.id for s in samples]), letters, rows, pad_rows)
        self._last_step = None if skips or pad_rows else (batch, step)
        return step

    def _rows_of(self, sample: Sample, mode: Mode, now_ns: int) -> int:
        """Rows that the sample takes in this mode, once the mode is found to be allowed."""
        if mode == GUIDED and sample.guided:
            return 2
        if not sample.guided:
            if mode != CONDITIONAL:
                self._refuse(now_ns, f"sample {sample.name} is unguided and takes only conditional steps, not {mode}")
        elif mode is None or mode != sample.skip_mode:
            allowed = ", ".join(sample.allowed_modes)
            self._refuse(now_ns, f"mode {mode} is not allowed for sample {sample.name} now; allowed: {allowed}")
        return 1

    def _launch(self, launch: ChunkLaunch, now_ns: int) -> LaneView:
        guard = self.guard
        if guard is not None and (
            type(launch) is not ChunkLaunch or [*map(type, launch[1:])] != [int, int, bool, bool]
        ):
            self._refuse(now_ns, f"{launch!r} is no ChunkLaunch of a sample, two whole numbers and two truth values")
        sample = self._sample(launch.sample, self.decoding, DECODING, "decoded", now_ns)
        if not 0 <= launch.lane < len(self.lanes):
            self._refuse(now_ns, f"there is no decode lane {launch.lane}; lanes count from 0 to {len(self.lanes) - 1}")
        lane = self.lanes[launch.lane]
        if guard is not None and lane_state(lane) != guard.lanes[launch.lane]:
            self._refuse_written(now_ns, f"decode lane {launch.lane}")
        if lane.sample is not None:
            self._refuse(now_ns, f"decode lane {launch.lane} is busy with sample {lane.sample.name}")
        if sample.launched:
            self._refuse(now_ns, f"sample {sample.name} is being decoded on another lane")
        left = self.chunk_count - sample.chunks_done
        if not 1 <= launch.chunks <= left:
            self._refuse(now_ns, f"{launch.chunks} chunks of sample {sample.name} were launched; {left} are left")
        if launch.exclusive:
            busy = self.next_step is not None or self.exclusive_lane is not None
            if busy or (self.step is not None and not self.step.shown_done):
                self._refuse(now_ns, "an exclusive launch needs the denoise lane idle")
            self.exclusive_lane = lane
        lane.sample = sample
        lane.chunks_left = launch.chunks
        lane.exclusive = launch.exclusive
        lane.forced = launch.forced
        # While the running step is shown as done before it is, what depends on its end waits for that.
        lane.started = self.step is None or not (launch.exclusive or sample.denoised_ns < 0)
        self._note(lane)
        sample.launched = True
        return lane

    def _sample(
        self, sample_id: SampleId, place: dict[SampleId, Sample], phase: Phase, verb: str, now_ns: int
    ) -> Sample:
        """The sample of that id in one of this worker's places."""
        sample = place.get(sample_id) if type(sample_id) is int else None
        if sample is None:
            if type(sample_id) is not int or not 0 <= sample_id < len(self.samples):
                self._refuse(now_ns, f"sample id {sample_id!r} is unknown")
            other = self.samples[sample_id]
            where = f"{other.phase}, not {phase}" if other.phase is not phase else "another worker's"
            self._refuse(now_ns, f"sample {other.name} cannot be {verb}: it is {where}")
        return sample

    def _refuse(self, now_ns: int, reason: str) -> NoReturn:
        raise ContractError(f"policy '{self.policy_name}' at {now_ns / NS_PER_S:.9f} s: {reason}.")

    def refuse_stall(self, now_ns: int) -> NoReturn:
        """The policy launched nothing while nothing runs, nothing can arrive and no wake is set."""
        self._refuse(
            now_ns,
            f"it launched nothing while nothing runs, nothing can arrive and no wake is set; {len(self.waiting)} "
            f"samples wait, {len(self.active)} are active, {len(self.decoding)} await their decode",
        )
