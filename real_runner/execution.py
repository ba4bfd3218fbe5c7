"""What runs: pieces on their lanes, what became of them, and the records and faults that they leave.

The engine decides when to look; this part submits what the worker says, takes in what has ended, and knows no policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from real_runner.account import FAILED, HUNG, OUT_OF_MEMORY, Dispatch, Fault, LaneHung
from real_runner.hardware import Hardware
from real_runner.pieces import ChunkPiece, Image, Picture, StepPiece, picture_of
from synerdiff.core import NS_PER_S, PPM, LaneView, Mode, Phase, Sample, SampleId, WorkRecord
from synerdiff.device.lanes import Work
from synerdiff.diffusion.decoder import Chunking
from synerdiff.diffusion.model import SampleState
from synerdiff.engine.worker import Step, Worker
from synerdiff.profile.tables import Profile

GPU = 0
MODES = {"g": Mode.GUIDED, "c": Mode.CONDITIONAL, "r": Mode.REUSE}
LOOK_EVERY_NS = 100_000_000
"""How often a wait looks up, to see an interruption or a hung lane."""
WATCHDOG_FACTOR = 100
"""A piece counts as hung after the watchdog's time or so many times its predicted time, whichever is longer."""

MakeStep = Callable[[Sequence[Image], Sequence[Mode], int], StepPiece]
"""Images, their modes and rows of padding -> the piece that steps them."""
OnImage = Callable[[Sample, SampleState, Any], None]
"""Gets each finished image (PIL) with its sample and state."""


class Running:
    """A piece on its lane: the submitted work, what it computes, and since when it has been the lane's first."""

    __slots__ = ("cause_ns", "content", "rows", "since_ns", "work")

    def __init__(
        self, content: StepPiece | ChunkPiece, work: Work[None], cause_ns: int, since_ns: int, rows: int
    ) -> None:
        self.content = content
        self.work = work
        self.cause_ns = cause_ns
        """When what made it possible happened."""
        self.since_ns = since_ns
        self.rows = rows


class Execution:
    """The pieces of one run. Times go in and out in ns since ``zero_ns`` of the monotonic clock."""

    def __init__(
        self,
        worker: Worker,
        hardware: Hardware,
        profile: Profile,
        chunking: Chunking,
        zero_ns: int,
        sample_rows: int,
        watchdog_ns: int,
    ) -> None:
        self.worker, self.hardware, self.profile = worker, hardware, profile
        self.chunking = chunking
        self.zero_ns, self.sample_rows, self.watchdog_ns = zero_ns, sample_rows, watchdog_ns
        self.images: dict[SampleId, Image] = {}
        """Samples that have entered and not left: all tensors that the run keeps."""
        self.step: Running | None = None
        self.next_step: Running | None = None
        """The committed step, queued behind the running one."""
        self.decodes: list[Running | None] = [None] * len(hardware.decode)
        self.copies: list[tuple[Image, int, Work[Picture]]] = []
        """Finished decodes on their way to the host, with the decode's end."""
        self.records: list[WorkRecord] = []
        self.faults: list[Fault] = []
        self.dispatch = Dispatch()
        self.on_image: OnImage | None = None
        self.on_finished: Callable[[Sample], None] | None = None
        """Told of samples whose image has reached the host."""
        self.make_step: MakeStep = self._plain_step
        self.gpu = GPU

    def now_ns(self) -> int:
        """Time since the run began."""
        return time.monotonic_ns() - self.zero_ns

    def works(self) -> list[Work[Any]]:
        """What runs on the worker's lanes."""
        return [running.work for running in (self.step, *self.decodes) if running is not None]

    def predicted_step_end_ns(self) -> int | None:
        """When the running step should end by the profile, beside what runs now; None while no step runs."""
        step, running = self.worker.step, self.step
        if step is None or running is None:
            return None
        ppm, request = PPM, step.samples[0].request
        for lane in self.worker.lanes:
            sample = lane.sample
            if self.decodes[lane.index] is not None and sample is not None:
                chunk = (self.chunking.name, sample.chunks_done, sample.request.size)
                ppm += self.profile.slowdowns_beside(request.size, step.rows, *chunk)[0] - PPM
        profile = self.profile.at(request.size)
        work_ns = profile.step_ns(step.rows) + (0 if step.committed else profile.launch_ns(step.rows))
        return running.since_ns + work_ns * ppm // PPM

    def _plain_step(self, images: Sequence[Image], modes: Sequence[Mode], pad_rows: int) -> StepPiece:
        return StepPiece(self.hardware.at(images[0].sample.request), images, modes, pad_rows)

    # --- starting -----------------------------------------------------------------------------------------------

    def start_step(self, step: Step, cause_ns: int) -> None:
        """Submit a step; one that was committed has been in the lane's queue since it was decided."""
        if self.next_step is None:
            self.step = self._submit(step, cause_ns)
        else:
            self.step, self.next_step = self.next_step, None
            self.step.cause_ns = self.step.since_ns = cause_ns

    def commit_step(self, cause_ns: int) -> None:
        """A step decided early waits in the lane's queue behind the running one."""
        if self.worker.next_step is not None and self.next_step is None:
            self.next_step = self._submit(self.worker.next_step, cause_ns)

    def _submit(self, step: Step, cause_ns: int) -> Running:
        images = [self.images[sample_id] for sample_id in step.ids]
        content = self.make_step(images, [MODES[letter] for letter in step.modes], step.pad_rows)
        work = self.hardware.denoise.submit(content.run)
        return Running(content, work, cause_ns, self.now_ns(), step.rows)

    def start_chunk(self, lane: LaneView, cause_ns: int) -> None:
        sample = lane.sample
        assert sample is not None
        image = self.images[sample.id]
        if not sample.chunks_done:
            self.worker.start_decode(sample, self.now_ns())
        hidden = image.state.latent if image.hidden is None else image.hidden
        model = self.hardware.at(sample.request)
        chunk = self.hardware.chunk_functions(lane.index, self.chunking, model)[sample.chunks_done]
        content = ChunkPiece(image, chunk, hidden, self.hardware.model.device)
        work = self.hardware.decode[lane.index].submit(content.run)
        self.decodes[lane.index] = Running(content, work, cause_ns, self.now_ns(), 0)

    # --- ending -------------------------------------------------------------------------------------------------

    def ended_lanes(self) -> list[LaneView]:
        """Decode lanes whose chunk has ended."""
        return [
            lane
            for lane in self.worker.lanes
            if (running := self.decodes[lane.index]) is not None and running.work.done()
        ]

    def end_step(self) -> int:
        """Account for the step that has ended; returns when it did."""
        running = self.step
        assert running is not None
        content = running.content
        assert isinstance(content, StepPiece)
        start_ns, end_ns = self._times(running)
        content.check()
        step = self.worker.end_step(end_ns)
        self.step = None
        self.dispatch.step_ns.append(start_ns - running.cause_ns)
        self.dispatch.step_queued.append(step.committed)
        if content.forward_began is not None:
            start_ns = min(end_ns, max(start_ns, content.forward_began() - self.zero_ns))
        self.records.append(WorkRecord.step(self.gpu, start_ns, end_ns, step.ids, step.rows, step.modes, step.pad_rows))
        if content.out_of_memory:
            self._lower_max_rows(content, step.rows, end_ns)
        for image in content.images:
            # A sample that is in the committed step already goes along with it, untouched, and fails after that.
            if image.failure and not image.sample.in_step:
                self._fail(image, end_ns)
        return end_ns

    def end_chunk(self, lane: LaneView, go_on: bool = True) -> int:
        """Account for the chunk that has ended on this lane, start the launch's next one; returns when it ended."""
        running, sample = self.decodes[lane.index], lane.sample
        assert running is not None
        assert sample is not None
        content = running.content
        assert isinstance(content, ChunkPiece)
        start_ns, end_ns = self._times(running)
        self.decodes[lane.index] = None
        self.dispatch.chunk_ns.append(start_ns - running.cause_ns)
        self.records.append(
            WorkRecord.decode_chunk(
                lane.gpu, lane.index, start_ns, end_ns, sample.id, sample.chunks_done, lane.exclusive, lane.forced
            )
        )
        if sample.chunks_done == 0:
            self.worker.start_decode(sample, start_ns)
        image = content.image
        if content.out_of_memory:
            self.faults.append(Fault(end_ns, OUT_OF_MEMORY, (sample.name,), content.out_of_memory))
        if image.failure:
            self._fail(image, end_ns)
        elif self.worker.end_chunk(lane, end_ns):
            if go_on:
                self.start_chunk(lane, end_ns)
        elif sample.phase is Phase.DONE:
            self._copy_out(image, end_ns)
        return end_ns

    def _times(self, running: Running) -> tuple[int, int]:
        """Start and end of what has ended; a GPU's clock may run a little ahead of the host's."""
        end_ns = min(running.work.end_ns - self.zero_ns, self.now_ns())
        return min(running.work.start_ns - self.zero_ns, end_ns), end_ns

    def _lower_max_rows(self, content: StepPiece, rows: int, end_ns: int) -> None:
        """From now on at most the rows that fitted when this step was halved, but never less than one sample needs."""
        view = self.worker.view
        view.max_rows = min(view.max_rows, max(self.sample_rows, content.fitted_rows))
        names = tuple(image.sample.name for image in content.images)
        detail = f"a step of {rows} rows; at most {view.max_rows} from now on ({content.out_of_memory})"
        self.faults.append(Fault(end_ns, OUT_OF_MEMORY, names, detail))

    def _fail(self, image: Image, at_ns: int) -> None:
        self.worker.fail(image.sample)
        self.images.pop(image.sample.id, None)
        self.faults.append(Fault(at_ns, FAILED, (image.sample.name,), image.failure))

    # --- results and the end of a run ---------------------------------------------------------------------------

    def _copy_out(self, image: Image, end_ns: int) -> None:
        decoded = image.hidden
        assert decoded is not None
        self.copies.append((image, end_ns, self.hardware.results.submit(lambda: picture_of(decoded))))
        del self.images[image.sample.id]
        image.hidden = None

    def take_copies(self) -> None:
        """Images that have reached the host: only then is a sample finished."""
        while self.copies and self.copies[0][2].done():
            image, decoded_ns, work = self.copies.pop(0)
            sample = image.sample
            sample.finished_ns = max(decoded_ns, work.end_ns - self.zero_ns)
            self.dispatch.copy_ns.append(sample.finished_ns - decoded_ns)
            if self.on_finished is not None:
                self.on_finished(sample)
            picture = work.result()
            if not picture.finite:
                sample.phase = Phase.FAILED
                detail = "its decoded image is not finite"
                self.faults.append(Fault(sample.finished_ns, FAILED, (sample.name,), detail))
            elif self.on_image is not None:
                self.on_image(sample, image.state, picture.image)
            if self.worker.guard is not None:
                self.worker.guard.end(sample)

    def drain(self) -> None:
        """Let what runs end and start nothing new."""
        while True:
            works = self.works() + [work for _, _, work in self.copies]
            if not works:
                return
            self.hardware.device.wait_any(works, time.monotonic_ns() + LOOK_EVERY_NS)
            self.require_alive()
            if self.step is not None and self.step.work.done():
                self.end_step()
                # A committed step is in the lane's queue and cannot be taken back.
                self.worker.start_committed()
                self.step, self.next_step = self.next_step, None
            for lane in self.ended_lanes():
                self.end_chunk(lane, go_on=False)
            self.take_copies()

    def require_alive(self) -> None:
        """Raise LaneHung, once recorded, when a lane's piece has run for far too long."""
        now_ns = self.now_ns()
        lanes = [("denoise", self.step), *((f"decode{i}", running) for i, running in enumerate(self.decodes))]
        for name, running in lanes:
            if running is None or running.work.done():
                continue
            content = running.content
            if isinstance(content, StepPiece):
                what, images = f"a step of {running.rows} rows", content.images
                predicted_ns = self.profile.at(images[0].sample.request.size).step_ns(running.rows)
            else:
                images, chunk = [content.image], content.image.sample.chunks_done
                what = f"chunk {chunk} of a decode"
                predicted_ns = self.profile.at(content.image.sample.request.size).chunk_ns(self.chunking.name, chunk)
            for_ns = now_ns - running.since_ns
            if for_ns > max(self.watchdog_ns, WATCHDOG_FACTOR * predicted_ns):
                names = tuple(image.sample.name for image in images)
                detail = f"lane {name} has been running {what} for {for_ns / NS_PER_S:.1f} s"
                self.faults.append(Fault(now_ns, HUNG, names, detail))
                self.hardware.hung = True
                raise LaneHung(f"{detail} (samples {', '.join(names)}); the run was given up.")
