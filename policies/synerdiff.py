"""SynerDiff: chunks planned beside steps so that decodes end early while steps keep a share of their speed.

The plan is the dynamic program of ``planner``; ``synerdiff`` keeps the threshold theta fixed, ``synerdiff-feedback``
moves it with the queue (``feedback``).

At every step boundary the first two pending decodes are planned, and the first step of the plan is carried out.
Throughput is accounted for in a credit: credit + T_full - theta * elapsed after every step, clamped to
+-4 * (1 - theta) * T_full. When no plan is feasible, for two images nor for one, a debt that an idle step cannot repay
is repaid first; else the rest of the first decode is launched at once, beside or exclusively, whichever costs less, and
so is one that has waited ``max_decode_wait_s``. Such launches are marked as forced, and steps beside them do not count
in the credit. While no step comes, chunks are launched one by one, so that a new step meets one of them at most. With
several resolutions two images are planned together only where they have the same.
"""

from __future__ import annotations

from typing import ClassVar

from policies.base import BATCH, Parameter
from policies.continuous import ContinuousPolicy
from policies.decode_costs import CHUNKING, DecodeCosts, chosen_chunking
from policies.feedback import ThetaController
from policies.planner import Action, Planner
from policies.step_batch import StepModes, skipping_step
from synerdiff.core import NOTHING, NS_PER_S, PPM, REUSE, ChunkLaunch, Decision, Sample, SampleId, View, WorkerInfo
from synerdiff.profile.tables import Profile

Launches = tuple[ChunkLaunch, ...]
CREDIT_STEPS = 4
THETA_GRID_PPM = 5_000
CREDIT_GRID_BITS = 7
"""Credits are rounded down to T_full / 2^7."""
MEMO_SIZE = 100_000
_FIELD_BITS = 16
_FIELD = (1 << _FIELD_BITS) - 1

HORIZON = Parameter("horizon", int, 8, 1, 64, "steps", "most steps that a plan spans")
SKIP_PENALTY = Parameter("skip_penalty_s", float, 0.02, 0.0, 60.0, "s", "decode delay that a skipped step must save")
MAX_DECODE_WAIT = Parameter("max_decode_wait_s", float, 1.0, 0.0, 3600.0, "s", "a decode is forced after this wait")


class SynerDiff(ContinuousPolicy):
    """Plans chunks and skipped guidance beside steps, so that decodes end early and steps keep a share theta of speed.

    A three-dimensional dynamic program (steps, chunks, skips), replanned at every step boundary.
    """

    NAME: ClassVar[str] = "synerdiff"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        BATCH,
        CHUNKING,
        Parameter("theta", float, 0.9, 0.5, 1.0, "", "share of full speed that steps keep"),
        HORIZON,
        SKIP_PENALTY,
        MAX_DECODE_WAIT,
    )

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.chunking = chosen_chunking(self.parameters["chunking"], profile)
        super().reset(worker, profile)
        self.costs_of = DecodeCosts.by_size(profile, self.chunking)
        self.plans: dict[DecodeCosts, tuple[Planner, dict[tuple[int, ...], Action]]] = {}
        self.horizon: int = self.parameters["horizon"]
        self.take_costs(DecodeCosts(profile, self.chunking))
        self.max_wait_ns = round(self.parameters["max_decode_wait_s"] * NS_PER_S)
        self.lead_ns = profile.overhead_ns("decision_lead")
        self.home_lanes = [i for i, gpu in enumerate(worker.decode_gpus) if gpu == worker.denoise_gpu][:1]
        self.other_lanes = [i for i, gpu in enumerate(worker.decode_gpus) if gpu != worker.denoise_gpu]
        self.theta_ppm = self.first_theta_ppm()
        self.credit_ns = 0
        self.step_since_ns = -1
        """When the running step began, -1 when it does not count in the credit."""
        self.step_full_ns = 0
        self.owed: tuple[Sample, int] | None = None
        """A second image's chunks of the plan, launched when the first one's end."""
        self.patterns: dict[tuple[int, int, int, bool], int] = {}

    def take_costs(self, costs: DecodeCosts) -> None:
        """Plan with these costs from now on, and with what was planned with them before."""
        self.costs = costs
        if costs not in self.plans:
            penalty_ns = round(self.parameters["skip_penalty_s"] * NS_PER_S)
            self.plans[costs] = (Planner(costs, self.horizon, penalty_ns), {})
        self.planner, self.actions = self.plans[costs]

    def first_theta_ppm(self) -> int:
        """The threshold at reset."""
        theta: float = self.parameters["theta"]
        return round(theta * PPM)

    def decide(self, view: View) -> Decision:
        if not view.denoise_free:
            if self.owed is None and not self.other_lanes:
                return NOTHING
            return Decision(chunks=self.launch_elsewhere(view) or self.launch_owed(view))
        self.owed = None
        now_ns = view.now_ns
        members = self.members
        if view.step_done:
            self.account(now_ns)
        members.refresh(view)
        step = members.step
        if step:
            if self.limits:
                self.take_costs(self.costs_of(members.members[0], members.members[0]))
            self.adjust(view)
        launches: Launches = ()
        forced = False
        if view.decoding:
            elsewhere = self.launch_elsewhere(view) if self.other_lanes else ()
            step, launches = self.place(view, {launch.sample for launch in elsewhere})
            if launches and launches[0].exclusive:
                return Decision(chunks=elsewhere + launches)
            forced = launches[0].forced if launches else self.forced_runs(view)
            launches = elsewhere + launches
        if step:
            early = self.lead_ns and view.step_done
            self.step_since_ns = -1 if forced else now_ns + (self.lead_ns if early else 0)
            self.step_full_ns = self.costs.step_ns(members.rows)
        return Decision(members.admit, (), step, 0, launches)

    def adjust(self, view: View) -> None:
        """Move theta, for policies that do."""

    def account(self, now_ns: int) -> None:
        """A step has ended (or, with a decision lead, will at now + lead): settle the credit."""
        if self.step_since_ns < 0:
            return
        full_ns = self.step_full_ns
        elapsed_ns = now_ns + self.lead_ns - self.step_since_ns
        most_ns = CREDIT_STEPS * (PPM - self.theta_ppm) * full_ns // PPM
        credit_ns = self.credit_ns + full_ns - self.theta_ppm * elapsed_ns // PPM
        self.credit_ns = -most_ns if credit_ns < -most_ns else most_ns if credit_ns > most_ns else credit_ns
        self.step_since_ns = -1

    def forced_runs(self, view: View) -> bool:
        """Whether a launch that the starvation guard made runs on the step's GPU."""
        lanes = [view.decode_lanes[i] for i in self.home_lanes]
        return any(lane.forced and not lane.free for lane in lanes)

    def launch_elsewhere(self, view: View) -> Launches:
        """Lanes on other GPUs contend with nothing: they take whole decodes as soon as they are free."""
        lanes = [i for i in self.other_lanes if view.decode_lanes[i].free]
        ready = (sample for sample in view.decoding if not sample.launched)
        left = self.costs.count
        return tuple([ChunkLaunch(s.id, left - s.chunks_done, lane) for lane, s in zip(lanes, ready, strict=False)])

    def launch_owed(self, view: View) -> Launches:
        """The rest of the plan's chunks for the running step, once the lane is free."""
        if self.owed is None or not self.home_lanes or not view.decode_lanes[self.home_lanes[0]].free:
            return ()
        sample, chunks = self.owed
        self.owed = None
        if sample.launched or sample not in view.decoding:
            return ()
        return (ChunkLaunch(sample.id, chunks, self.home_lanes[0]),)

    def place(self, view: View, taken: set[SampleId]) -> tuple[StepModes, Launches]:
        """The coming step and what runs beside it; an exclusive launch excludes the step.

        ``taken``: samples that other lanes decode from now on.
        """
        members = self.members
        first: Sample | None = None
        second: Sample | None = None
        if self.home_lanes and view.decode_lanes[self.home_lanes[0]].free:
            for sample in view.decoding:
                if not sample.launched and sample.id not in taken:
                    if first is not None:
                        second = sample
                        break
                    first = sample
        if first is None:
            return members.step, ()
        lane = self.home_lanes[0]
        done = first.chunks_done
        if not members.step:
            return (), (ChunkLaunch(first.id, 1, lane),)
        rows = members.rows
        if self.limits:
            self.take_costs(self.costs_of(members.members[0], first))
            second = second if second is None or second.request.size == first.request.size else None
        left = self.costs.count - done
        waited_long = 0 <= first.denoised_ns <= view.now_ns - self.max_wait_ns
        chunks, skip = (-1, False) if waited_long else self.action(rows, done, 1 if second is None else 2)
        if chunks < 0:
            indebted = self.credit_ns * PPM < -(PPM - self.theta_ppm) * self.costs.step_ns(rows)
            if indebted and not waited_long:
                return members.step, ()
            exclusive = not self.costs.overlap_pays(rows, done)
            return members.step, (ChunkLaunch(first.id, left, lane, exclusive, forced=True),)
        step = skipping_step(members.members)[0] if skip else members.step
        if not chunks:
            return step, ()
        if chunks > left and second is not None:
            self.owed = (second, chunks - left)
            chunks = left
        return step, (ChunkLaunch(first.id, chunks, lane),)

    # --- the plan, remembered -----------------------------------------------------------------------------------

    def action(self, rows: int, first: int, images: int) -> Action:
        """The first action of the best plan, (-1, False) when none is feasible.

        Theta is rounded up and the credit down to a grid, so that no plan gains by the rounding.
        """
        theta_ppm = min(PPM, -(-self.theta_ppm // THETA_GRID_PPM) * THETA_GRID_PPM)
        step_ns = self.costs.step_ns(rows)
        grid_ns = (step_ns >> CREDIT_GRID_BITS) + 1
        credit_ns = self.credit_ns // grid_ns * grid_ns
        at_once_ns = self.planner.at_once_ns(rows, first, images)
        if at_once_ns >= 0 and (step_ns + credit_ns) * PPM >= theta_ppm * at_once_ns:
            return self.costs.count * images - first, False
        packed, skips = self.eligibility()
        key = (rows, packed, first, images, theta_ppm, credit_ns, skips)
        action = self.actions.get(key)
        if action is None:
            if len(self.actions) >= MEMO_SIZE:
                self.actions.clear()
            eligible = [packed >> _FIELD_BITS * j & _FIELD for j in range(self.horizon)] if packed else []
            plan = self.planner.plan(rows, eligible, first, images, theta_ppm, credit_ns, skips)
            if plan is None and images > 1:
                plan = self.planner.plan(rows, eligible, first, 1, theta_ppm, credit_ns, skips)
            action = self.actions[key] = (-1, False) if plan is None else plan.actions[0]
        return action

    def eligibility(self) -> tuple[int, int]:
        """How many members may skip at each step of the horizon (16 bits each), and the least budget left of those."""
        packed, least = 0, self.horizon
        patterns = self.patterns
        for sample in self.members.members:
            left = sample.skips_left
            if left:
                key = (sample.steps, sample.step_index, sample.skip_run, sample.had_guided_step)
                pattern = patterns.get(key)
                if pattern is None:
                    pattern = patterns[key] = self.pattern(sample)
                if pattern:
                    packed += pattern
                    if left < least:
                        least = left
        return packed, least if packed else 0

    def pattern(self, sample: Sample) -> int:
        """The steps of the horizon that the sample may skip, one field each, as if it skipped all of them.

        So the longest run is kept whichever of them a plan really skips.
        """
        packed, run, guided = 0, sample.skip_run, sample.had_guided_step
        for j in range(min(self.horizon, sample.steps_left)):
            allowed = sample.may_skip_at(sample.step_index + j, 1, run)
            if allowed and (guided or sample.budget.mode is not REUSE):
                packed |= 1 << _FIELD_BITS * j
                run += 1
            else:
                run, guided = 0, True
        return packed


class SynerDiffFeedback(SynerDiff):
    """SynerDiff with a threshold theta that follows the queue: up while many wait, down while few do.

    Never above what decodes can sustain, N * tau / (N * tau + sum(lost)) with tau = T / batch; beyond, they starve.
    """

    NAME = "synerdiff-feedback"
    PARAMETERS = (
        BATCH,
        CHUNKING,
        Parameter("theta_low", float, 0.75, 0.5, 1.0, "", "least share of full speed that steps keep"),
        Parameter("theta_high", float, 0.97, 0.5, 1.0, "", "largest share of full speed that steps keep"),
        Parameter("kp", float, 0.05, 0.0, 1.0, "", "theta per batch of waiting samples beyond the target"),
        Parameter("ki", float, 0.05, 0.0, 1.0, "", "the same, added at every step"),
        HORIZON,
        SKIP_PENALTY,
        MAX_DECODE_WAIT,
        Parameter(
            "trail", int, 0, 0, 10_000_000, "steps", "how many points of the controller's path are kept", tuned=False
        ),
    )

    def first_theta_ppm(self) -> int:
        low, high, kp, ki = (round(self.parameters[name] * PPM) for name in ("theta_low", "theta_high", "kp", "ki"))
        self.controller = ThetaController(min(low, high), high, kp, ki)
        self.limit_version, self.limit_ppm = -1, PPM
        self.trail_size: int = self.parameters["trail"]
        self.trail: list[tuple[int, int, int]] = []
        """(now_ns, theta_ppm, waiting) at every step, as many as the parameter ``trail`` says."""
        return self.controller.theta_ppm

    def adjust(self, view: View) -> None:
        waiting = len(view.waiting)
        if self.limit_version != self.members.version:
            self.limit_version = self.members.version
            self.limit_ppm = self.sustainable_ppm()
        self.theta_ppm = self.controller.update(waiting, self.batch, self.limit_ppm)
        if len(self.trail) < self.trail_size:
            self.trail.append((view.now_ns, self.theta_ppm, waiting))

    def sustainable_ppm(self) -> int:
        """The largest theta at which decodes keep up with the coming step's batch, rounded down to the theta grid."""
        members = self.members
        count = len(members.members)
        denoise_ns = members.steps_sum * self.costs.step_ns(members.rows)
        lost_ns = count * count * sum(self.costs.beside(members.rows).lost) if self.home_lanes else 0
        limit_ppm = denoise_ns * PPM // (denoise_ns + lost_ns)
        return max(1, limit_ppm // THETA_GRID_PPM) * THETA_GRID_PPM
