"""Chooses by profile and load: who is admitted first, how decodes are cut and placed, when steps wait, who skips."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from policies.base import BATCH, Parameter
from policies.continuous import ContinuousPolicy
from policies.decode_costs import DecodeCosts
from policies.step_batch import Order, OrderedBatch, StepModes
from policies.turns import TURN_PARAMETERS, TurnBatch
from synerdiff.core import PPM, ChunkLaunch, Decision, Mode, Sample, SampleId, View, WorkerInfo
from synerdiff.profile.tables import Profile, Size

Launches = tuple[ChunkLaunch, ...]
PairCosts = tuple[DecodeCosts, dict[int, tuple[int, int]], dict[tuple[int, int], int]]
"""Costs of decodes beside steps, and what is kept of them: `Auto.placing` and `Auto.skips`."""


class Auto(ContinuousPolicy):
    """Small requests first within reason, decodes where they cost least, steps held back for them, skips that pay.

    - A request is admitted as if it had arrived later by ``size_weight`` times the time that it takes at full batches,
      so that a small one overtakes a large one that arrived shortly before it. At 0 it is first in first out.
    - The decode is cut so that it costs the denoise lane least at full batches.
    - As soon as a lane is free the next decode starts, where all samples together wait least: beside when
      sum(c * s_v) - sum(c) <= n * (sum(c) - sum(delta)), n samples waiting or active (with a long queue this is
      sum(delta) <= sum(c)); else exclusively at the next step boundary. Lanes on other GPUs are always used.
    - When decodes beside steps take longer than the steps that feed them, a step waits while ``decode_queue`` more
      decodes do than fit beside the steps until the next sample is denoised, so that these run at full speed.
    - While ``skip_queue`` samples wait, as many samples skip guidance as shorten the step most per skip: with row
      buckets that is a certain number, and any other wastes budget. Those with most skips left per step go first.
    """

    NAME: ClassVar[str] = "auto"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        BATCH,
        Parameter("size_weight", float, 2.0, 0.0, 1000.0, "service times", "how far a small request goes first"),
        Parameter("skip_queue", int, 0, 0, 1_000_000, "samples", "skip guidance while at least so many wait"),
        Parameter(
            "decode_queue",
            int,
            3,
            1,
            1_000_000,
            "samples",
            "waiting decodes, beyond what fits beside, that hold a step",
        ),
        *TURN_PARAMETERS,
    )

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        super().reset(worker, profile)
        self.denoise_gpu = worker.denoise_gpu
        self.home = [gpu == worker.denoise_gpu for gpu in worker.decode_gpus]
        rows = min(self.batch * worker.sample_rows, profile.max_rows)
        self.chunking = "whole"
        if any(self.home):
            self.chunking = min(profile.chunkings, key=lambda name: self._least_cost_ns(profile, name, rows))
        self.costs = DecodeCosts(profile, self.chunking)
        self.sample_rows = worker.sample_rows
        weight = self.parameters["size_weight"]
        self.delay_per_step_ns = round(weight * self.costs.step_ns(rows) / self.batch)
        self.profile = profile
        self.pairs: dict[tuple[Size, Size], PairCosts] = {}
        self.running_size: Size | None = None
        self.delays_ns: dict[Size, int] = {}
        for size, one in profile.sizes.items():
            most = self.limits[size][0]
            costs = DecodeCosts(profile, self.chunking, (size, size))
            self.delays_ns[size] = round(weight * costs.step_ns(min(most * worker.sample_rows, one.max_rows)) / most)
        self.ordered = OrderedBatch(self.batch, self.place, self.limits)
        self.members = self.ordered if self.turns is None else self.turns
        self.running_rows = 0
        self.skips_now = False
        self.placing: dict[int, tuple[int, int]] = {}
        self.skips: dict[tuple[int, int], int] = {}
        self.bound_version = -1
        self.decodes_bind = False

    @staticmethod
    def _least_cost_ns(profile: Profile, chunking: str, rows: int) -> tuple[int, int]:
        """Cost of a decode for the denoise lane, each chunk where it costs least; ties to fewer chunks."""
        costs = DecodeCosts(profile, chunking)
        lost = costs.beside(rows).lost
        return sum(min(pair) for pair in zip(lost, costs.solo, strict=True)), costs.count

    def place(self, sample: Sample, _now_ns: int) -> tuple[int]:
        """When the request would have arrived, were it admitted first in first out."""
        request = sample.request
        delay_ns = self.delay_per_step_ns
        if self.delays_ns and request.size is not None:
            delay_ns = self.delays_ns[request.size]
        return (request.arrival_ns + delay_ns * request.steps * request.images,)

    def turn_to(self, step_size: Size | None, view: View) -> None:
        """With several resolutions: costs of the next decode beside steps of that one (by default its own)."""
        if not self.limits:
            return
        ready = next((sample.request.size for sample in view.decoding if not sample.launched), None)
        step = step_size or ready or next(iter(self.limits))
        self.take_costs((step, ready or step))

    def take_costs(self, sizes: tuple[Size, Size]) -> None:
        """Take the costs of a pair of resolutions, those of (step, decode), for what follows."""
        if sizes not in self.pairs:
            self.pairs[sizes] = (DecodeCosts(self.profile, self.chunking, sizes), {}, {})
        self.costs, self.placing, self.skips = self.pairs[sizes]

    def taking_turns(self, worker: WorkerInfo, profile: Profile, order: Order | None = None) -> TurnBatch:
        """As its base, in the order of its own placing."""
        return super().taking_turns(worker, profile, self.place)

    def rows_of(self, members: Sequence[Sample], rows: int) -> int:
        if not self.skips_now or not members:
            return rows
        size = members[0].request.size
        if self.limits and size is not None:
            self.take_costs((size, size))
        return rows - len(self.skipping(members, rows))

    def decide(self, view: View) -> Decision:
        turns = self.turns
        self.skips_now = len(view.waiting) >= self.parameters["skip_queue"]
        if turns is None:
            self.ordered.arrive(view)
        else:
            turns.hear(view)
        if not view.denoise_free:
            rows = self.running_rows if view.running else 0
            self.turn_to(self.running_size, view)
            return Decision(chunks=self.beside(view, rows) if view.decoding else ())
        members = self.members
        members.refresh(view)
        step, rows = members.step, members.rows
        step_size = members.members[0].request.size if members.members else None
        self.turn_to(step_size, view)
        if rows and self.skips_now:
            step, rows = self.with_skips(rows)
        launches: Launches = ()
        if view.decoding:
            launches = self.beside(view, rows or self.sample_rows)
            if any(self.home):
                held, alone = self.hold(view, rows, launches)
                if held:
                    return Decision(chunks=launches + alone)
        self.running_rows, self.running_size = rows, step_size
        if turns is not None and step:
            turns.launched()
        return Decision(members.admit, (), step, 0, launches)

    def beside(self, view: View, rows: int) -> Launches:
        """Decodes for free lanes that may run beside a step of these rows (0: beside an exclusive launch)."""
        ready = (sample for sample in view.decoding if not sample.launched)
        launches: list[ChunkLaunch] = []
        lanes = [lane for lane in view.decode_lanes if lane.free]
        lanes.sort(key=lambda lane: self.home[lane.index])
        for lane in lanes:
            if self.home[lane.index] and not self.waits_less_beside(view, rows):
                break
            sample = next(ready, None)
            if sample is None:
                break
            launches.append(ChunkLaunch(sample.id, self.costs.count - sample.chunks_done, lane.index))
        return tuple(launches)

    def waits_less_beside(self, view: View, rows: int) -> bool:
        """Whether all samples together wait less when the next decode runs beside steps of these rows."""
        if not rows:
            return True
        costs_ns = self.placing.get(rows)
        if costs_ns is None:
            beside, alone_ns = self.costs.beside(rows), sum(self.costs.solo)
            costs_ns = self.placing[rows] = (sum(beside.wall) - alone_ns, alone_ns - sum(beside.lost))
        longer_ns, spared_ns = costs_ns
        others = max(1, len(view.active) + len(view.waiting))
        return longer_ns <= others * spared_ns

    def hold(self, view: View, rows: int, launches: Launches) -> tuple[bool, Launches]:
        """Whether no step of these rows is to start now (0: there is none), and the exclusive launch, if any."""
        taken = {launch.sample for launch in launches}
        waiting = [sample for sample in view.decoding if not sample.launched and sample.id not in taken]
        used = {launch.lane for launch in launches}
        free = [lane for lane in view.decode_lanes if lane.free and self.home[lane.index] and lane.index not in used]
        if waiting and free:
            # A free lane and a waiting decode are left only where overlap does not pay.
            sample = waiting[0]
            return True, (ChunkLaunch(sample.id, self.costs.count - sample.chunks_done, free[0].index, True),)
        busy = any(self.home[lane.index] and (not lane.free or lane.index in used) for lane in view.decode_lanes)
        if not rows or not busy or len(waiting) < self.parameters["decode_queue"] or not self.bound():
            return False, ()
        # No decode comes before the next member ends, so what fits beside the steps until then keeps the lane busy.
        steps_ns = min([sample.steps_left for sample in self.members.members]) * self.costs.step_ns(rows)
        fitting = steps_ns // max(1, sum(self.costs.beside(rows).progress))
        return len(waiting) >= self.parameters["decode_queue"] + fitting, ()

    def bound(self) -> bool:
        """Whether a decode beside full steps takes longer than the steps that feed it."""
        members = self.members
        if self.bound_version != members.version:
            self.bound_version = members.version
            count = len(members.members)
            beside = self.costs.beside(members.rows)
            feeding = Fraction(members.steps_sum * self.costs.step_ns(members.rows), count * count) + sum(beside.lost)
            self.decodes_bind = sum(beside.wall) > feeding * sum(self.home)
        return self.decodes_bind

    # --- skipping -----------------------------------------------------------------------------------------------

    def with_skips(self, rows: int) -> tuple[StepModes, int]:
        """The step in which the best number of members skip guidance, and its rows."""
        members = self.members.members
        skipping = self.skipping(members, rows)
        if not skipping:
            return self.members.step, rows
        step = [(s.id, skipping[s.id]) if s.id in skipping else s.full for s in members]
        return tuple(step), rows - len(skipping)

    def skipping(self, members: Sequence[Sample], rows: int) -> dict[SampleId, Mode]:
        """Which of the members of a step of so many rows skip guidance, and how."""
        able: list[tuple[int, int, Sample, Mode]] = []
        for place, sample in enumerate(members):
            if sample.skips_left:
                mode = sample.skip_mode
                if mode is not None:
                    able.append((-sample.skips_left * PPM // sample.steps_left, place, sample, mode))
        count = self.best_skips(rows, len(able)) if able else 0
        if not count:
            return {}
        able.sort()
        return {sample.id: mode for _, _, sample, mode in able[:count]}

    def best_skips(self, rows: int, able: int) -> int:
        """How many of the samples that may skip do: most time saved per skip, ties to more skips; 0 when none saves."""
        count = self.skips.get((rows, able))
        if count is None:
            full_ns = self.costs.step_ns(rows)
            saved = [
                (Fraction(full_ns - self.costs.step_ns(rows - count), count), count) for count in range(1, able + 1)
            ]
            best = max(saved)
            count = self.skips[rows, able] = best[1] if best[0] > 0 else 0
        return count
