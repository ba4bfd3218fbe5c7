"""Decodes where they cost least, guidance skipped while the queue is long."""

from __future__ import annotations

from collections.abc import Iterable

from policies.base import BATCH, Parameter
from policies.continuous import ContinuousPolicy
from policies.decode_costs import DecodeCosts
from policies.step_batch import skipping_step
from synerdiff.core import NOTHING, ChunkLaunch, Decision, Sample, View, WorkerInfo
from synerdiff.profile.tables import Profile

Launches = tuple[ChunkLaunch, ...]
WHOLE = Parameter("chunking", str, "whole", help="how a decode is cut: a chunking of the profile")
SKIP_QUEUE = Parameter("skip_queue", int, 8, 0, 1_000_000, "samples", "skip guidance while at least so many wait")


class CheapestPlacement(ContinuousPolicy):
    """What policies share that run each decode, at step boundaries, beside or exclusively by what it costs."""

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        super().reset(worker, profile)
        self.costs_of = DecodeCosts.by_size(profile, self.chunking)
        self.denoise_gpu = worker.denoise_gpu

    def place(self, view: View, decoding: Iterable[Sample], rows: int) -> Launches:
        """All remaining chunks of the first decodes, one per free lane, lanes on other GPUs first.

        Beside a step of ``rows`` rows (0: no step comes) when sum(delta) <= sum(c), which on another GPU is always
        so; else exclusively. An exclusive launch is the last of the answer and excludes the step.
        """
        member = next(iter(self.members.members), None)
        free = [lane for lane in view.decode_lanes if lane.free]
        free.sort(key=lambda lane: lane.gpu == self.denoise_gpu)
        launches: list[ChunkLaunch] = []
        for sample in decoding:
            if sample.launched:
                continue
            if len(launches) == len(free):
                break
            lane, costs = free[len(launches)], self.costs_of(member, sample)
            first = sample.chunks_done
            contends = rows > 0 and lane.gpu == self.denoise_gpu
            exclusive = contends and not costs.overlap_pays(rows, first)
            launches.append(ChunkLaunch(sample.id, costs.count - first, lane.index, exclusive))
            if exclusive:
                break
        return tuple(launches)


class LoadSkip(CheapestPlacement):
    """Runs a decode beside the coming step when that costs less than holding it, and skips while the queue is long.

    At step boundaries, with the rows of the coming step: all remaining chunks beside when sum(delta) <= sum(c), else
    exclusively. Every sample that may skip guidance does so while at least ``skip_queue`` samples wait.
    """

    NAME = "load-skip"
    PARAMETERS = (BATCH, SKIP_QUEUE, WHOLE)

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.chunking = self.parameters["chunking"]
        super().reset(worker, profile)
        self.skip_queue = self.parameters["skip_queue"]

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            return NOTHING
        members = self.members
        members.refresh(view)
        step, rows = members.step, members.rows
        if len(view.waiting) >= self.skip_queue:
            step, rows = skipping_step(members.members)
        launches: Launches = ()
        if view.decoding:
            launches = self.place(view, view.decoding, rows)
            if launches and launches[-1].exclusive:
                return Decision(chunks=launches)
        return Decision(admit=members.admit, step=step, chunks=launches)
