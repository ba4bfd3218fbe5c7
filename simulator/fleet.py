"""The workers' common clock, and who gets which request: from a router at its arrival, or from a shared queue."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate

import simpy

from policies.routers import Router, WorkerState, declared_cost
from policies.shared_queue import SharedQueue
from simulator.stage_pools import StagePools
from simulator.step_plan import StepPlanner
from simulator.worker_run import PROGRESS_EVERY, WorkerRun
from synerdiff.core import InputError, Request, Sample
from synerdiff.engine.rounds import NEVER
from synerdiff.engine.samples import ClosedLoop


class FleetClock:
    """Within one instant (contract): ends by worker index, then routing in trace order, then each worker that is to be
    asked, by index."""

    def __init__(
        self,
        loop: ClosedLoop,
        samples: Sequence[Sample],
        runs: list[WorkerRun],
        planners: Mapping[int, StepPlanner],
        router: Router | SharedQueue,
        on_progress: Callable[[int], None] | None,
        stages: StagePools | None = None,
    ) -> None:
        self.stages = stages
        self.encoding = stages is not None and stages.encoders is not None
        """Prompts are encoded before a worker is chosen."""
        self.entries_differ = self.encoding or len({run.profile.overhead_ns("text_encode") for run in runs}) > 1
        """When a sample enters depends on its worker."""
        self.loop, self.samples, self.runs, self.planners = loop, samples, runs, planners
        self.on_progress = on_progress
        requests = loop.requests
        self.worker_of = [-1] * len(requests)
        self.first_sample = [0, *accumulate(request.images for request in requests)]
        self.position = {request.request_id: number for number, request in enumerate(requests)}
        self.states = [WorkerState(index, run.profile) for index, run in enumerate(runs)]
        self.steps_given = [0] * len(runs)
        """Per worker: denoising steps of the samples that it was given."""
        self.cost_left = [0] * len(runs)
        """Per worker: declared cost of its samples that have not ended."""
        self.due_ns = [NEVER] * len(runs)
        """When something can next happen at each worker; it changes only by a round or a new sample."""
        self.due_heap: list[tuple[int, int]] = []
        """(instant, worker) of all that are due; an entry that is no longer true is dropped when it comes up."""
        self.changed: set[int] = set()
        """Workers whose state is not what the router last saw."""
        self.ended_of = [0] * len(runs)
        """Samples that have ended, by worker, as of the last round."""
        self.idle_since_ns: list[int | None] = [0] * len(runs)
        """Since when all that a worker was given has ended and its host is done with it; None while it has not."""
        self.router = self.queue = None
        if isinstance(router, SharedQueue):
            self.queue = router
        else:
            self.router = router
            router.reset(len(runs))
        self.saw_closed = [False] * len(runs)
        """Whether each worker's last decision was taken knowing that no sample can enter waiting any more."""
        for index, run in enumerate(runs):
            run.open = True
            run.worker.on_end = partial(self.sample_ended, index)
            if stages is not None and stages.decoders is not None:
                run.worker.hand_over = stages.decode
            run.in_groups = self.queue is not None and self.queue.slots is None

    def run(self, environment: simpy.Environment) -> Generator[simpy.Event, None, None]:
        """Sleep until something happens anywhere, and take it all."""
        now_ns = reported = ended = 0
        stuck = False
        while True:
            self.loop.now_ns = now_ns
            causes = {index: self.runs[index].take_ends(now_ns) for index in self.take_due(now_ns)}
            self.changed.update(causes)
            if self.queue is None:
                self.push(now_ns, causes)
            else:
                self.note_idle(causes, now_ns)
                self.pull(self.queue, now_ns, causes, stuck)
            if stuck:
                causes |= dict.fromkeys(self.waiting(), now_ns)
            for index in sorted(causes):
                run = self.runs[index]
                cause_ns = run.rounds.take_arrivals(now_ns, causes[index])
                if run.asks(cause_ns, now_ns) and (run.open or run.worker.ended < len(run.arrivals)):
                    closed = run.closed or (run.entered == len(run.arrivals) and self.stuck(now_ns))
                    self.saw_closed[index] = closed
                    run.rounds.decide(now_ns, now_ns, closed)
                run.retime(now_ns)
                self.set_due(index, run.next_ns())
                ended += run.worker.ended - self.ended_of[index]
                self.ended_of[index] = run.worker.ended
            self.changed.update(causes)
            self.note_idle(causes, now_ns)
            if ended == len(self.samples):
                return
            if self.on_progress is not None and ended >= reported + PROGRESS_EVERY:
                reported = ended
                self.on_progress(ended)
            stuck = self.stuck(now_ns) and (bool(self.waiting()) or self.held_back)
            next_ns = now_ns if stuck else self.next_ns(now_ns)
            if next_ns > now_ns:
                yield environment.timeout(next_ns - now_ns)
                now_ns = next_ns

    def set_due(self, index: int, at_ns: int) -> None:
        """From now on something can next happen at that worker at that instant."""
        if at_ns != self.due_ns[index]:
            self.due_ns[index] = at_ns
            if at_ns != NEVER:
                heappush(self.due_heap, (at_ns, index))

    def take_due(self, now_ns: int) -> list[int]:
        """The workers that are due by now, by index; they are due again when they are told so."""
        heap, due = self.due_heap, list[int]()
        while heap and heap[0][0] <= now_ns:
            at_ns, index = heappop(heap)
            if self.due_ns[index] == at_ns:
                self.due_ns[index] = NEVER
                due.append(index)
        return sorted(due)

    def next_ns(self, now_ns: int) -> int:
        """The earliest instant at which something happens anywhere; a stalled worker is refused."""
        heap = self.due_heap
        while heap and self.due_ns[heap[0][1]] != heap[0][0]:
            heappop(heap)
        due_ns = min(heap[0][0] if heap else NEVER, self.loop.due_ns)
        if self.stages is not None:
            due_ns = min(due_ns, self.stages.due_ns)
        if self.queue is not None:
            due_ns = min(due_ns, self.queue.due_ns)
            if self.queue.ready and self.taker(now_ns) is not None:
                return now_ns  # a decision has rejected all that its worker was given
        if due_ns == NEVER:
            next(run for run in self.runs if run.worker.ended < len(run.arrivals)).worker.refuse_stall(now_ns)
        return max(now_ns, due_ns)

    # --- a closed loop --------------------------------------------------------------------------------------------

    def stuck(self, now_ns: int) -> bool:
        """Whether a closed loop's places are all taken and nothing runs or is due on any worker."""
        if not self.loop.stuck(now_ns) or (self.stages is not None and self.stages.due_ns != NEVER):
            return False
        return not any(run.running or (run.arrivals and run.arrivals[-1].entered_ns > now_ns) for run in self.runs)

    def waiting(self) -> list[int]:
        """Workers that hold samples back for more to come, and do not know that none can."""
        return [i for i, run in enumerate(self.runs) if run.worker.waiting and not self.saw_closed[i]]

    @property
    def held_back(self) -> bool:
        """The shared queue holds a group back for more to come."""
        return self.queue is not None and not self.queue.empty and not self.queue.ready

    # --- what arrives, and stages apart -----------------------------------------------------------------------------

    def arrived(self, now_ns: int) -> list[Request]:
        """Requests for which a worker is chosen now: those that arrive, or whose prompts have been encoded."""
        sent = self.loop.send(now_ns)
        if self.stages is None or not self.encoding:
            return [request for request, _ in sent]
        for request, samples in sent:
            self.stages.encode(request, samples, now_ns)
        return self.stages.encoded(now_ns)

    @property
    def arriving(self) -> bool:
        """Whether a worker has yet to be chosen for some request."""
        return self.loop.unsent or (self.stages is not None and self.stages.due_ns != NEVER)

    def enter(self, run: WorkerRun, request: Request, samples: Sequence[Sample], now_ns: int) -> None:
        """Set when the samples enter: after encoding on the worker, or after their way to it, where none overtakes."""
        way_ns = run.profile.overhead_ns("text_encode")
        if self.stages is not None and self.encoding:
            way_ns = self.stages.embedding_ns(request)
        entered_ns = max(now_ns + way_ns, run.arrivals[-1].entered_ns if run.arrivals else 0)
        for sample in samples:
            sample.entered_ns = entered_ns

    def sample_ended(self, index: int, sample: Sample) -> None:
        """A worker has done (or rejected) a sample."""
        self.cost_left[index] -= declared_cost(sample.request)
        self.loop.ended(sample)

    # --- a router -------------------------------------------------------------------------------------------------

    def push(self, now_ns: int, causes: dict[int, int]) -> None:
        """Give what has arrived to workers, in trace order; ``causes`` gets the workers that this concerns now."""
        if self.loop.due_ns > now_ns and (self.stages is None or self.stages.due_ns > now_ns):
            return
        for request in self.arrived(now_ns):
            self.give(self.routed(request), request, now_ns, causes)
        if not self.arriving:
            self.end_arrivals(now_ns, causes)

    def routed(self, request: Request) -> int:
        """The worker that the router chooses."""
        assert self.router is not None
        for index in self.changed:
            state, run = self.states[index], self.runs[index]
            state.samples = len(run.arrivals) - run.worker.ended
            state.steps_left = self.steps_given[index] - run.worker.steps_settled
            state.cost_left = self.cost_left[index]
        self.changed.clear()
        if request.loras:
            for index, planner in self.planners.items():
                self.states[index].loras = planner.loader.known | planner.files_in_weights
        index = self.router.route(request, self.states)
        if type(index) is not int or not 0 <= index < len(self.runs):
            raise InputError(
                f"the router sent request {request.request_id} to worker {index!r}; there are workers 0 to "
                f"{len(self.runs) - 1}."
            )
        return index

    def give(self, index: int, request: Request, now_ns: int, causes: dict[int, int]) -> None:
        """The request's samples are that worker's from now on."""
        run, position = self.runs[index], self.position[request.request_id]
        self.worker_of[position] = index
        self.steps_given[index] += request.steps * request.images
        self.cost_left[index] += declared_cost(request) * request.images
        self.idle_since_ns[index] = None
        self.changed.add(index)
        samples = self.samples[self.first_sample[position] : self.first_sample[position + 1]]
        if self.entries_differ or self.queue is not None:
            self.enter(run, request, samples, now_ns)
        run.arrivals += samples
        self.set_due(index, run.next_ns())
        if self.due_ns[index] <= now_ns:
            causes.setdefault(index, -1)

    def end_arrivals(self, now_ns: int, causes: dict[int, int]) -> None:
        """No worker will be given any more. A policy that holds samples back for more to come is asked, now that it
        sees ``closed``."""
        for index, run in enumerate(self.runs):
            run.open = False
            if run.worker.waiting and run.closed and not run.in_groups and not run.worker.denoise_held:
                causes[index] = max(causes.get(index, -1), now_ns)

    # --- a shared queue -------------------------------------------------------------------------------------------

    def pull(self, queue: SharedQueue, now_ns: int, causes: dict[int, int], stuck: bool) -> None:
        """Let what has arrived join the queue, then workers take what is complete; ``stuck``: no more can arrive."""
        for request in self.arrived(now_ns):
            queue.arrive(request, now_ns)
        queue.close(now_ns, stuck or not self.arriving)
        while queue.ready and (index := self.taker(now_ns)) is not None:
            for request in queue.take():
                self.give(index, request, now_ns, causes)
        if queue.empty and not self.arriving and self.runs[0].open:
            self.end_arrivals(now_ns, causes)

    def taker(self, now_ns: int) -> int | None:
        """The worker that takes next: idle longest, then the lower index; with slots, then those that are not idle."""
        assert self.queue is not None
        slots, best, best_since_ns = self.queue.slots, None, NEVER
        for index, (run, since_ns) in enumerate(zip(self.runs, self.idle_since_ns, strict=True)):
            if since_ns is None or since_ns > now_ns:
                if slots is None or len(run.arrivals) - run.worker.ended >= slots:
                    continue
                since_ns = NEVER - 1
            if since_ns < best_since_ns:
                best, best_since_ns = index, since_ns
        return best

    def note_idle(self, indices: Mapping[int, int], now_ns: int) -> None:
        """Whether these workers are idle now, or will be when their host is done."""
        for index in indices:
            run = self.runs[index]
            if self.idle_since_ns[index] is None and run.worker.ended == len(run.arrivals):
                self.idle_since_ns[index] = max(now_ns, run.worker.held_until_ns)
