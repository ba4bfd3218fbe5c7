"""The contract once more, as one plain loop over lists: slow, without SimPy and without the worker class.

It serves only as a second opinion. It trusts decisions (no checks) and shares with the real engine the vocabulary and
the profile, nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from synerdiff.core import MODE_LETTER, NO_SKIPS, PPM, LaneView, Phase, Sample, SkipBudget, View, WorkerInfo
from synerdiff.profile.tables import Profile


def reference_slowdowns(
    profile: Profile, step_size: Any, chunk_size: Any, rows: int, chunking: str, chunk: int
) -> tuple[int, int]:
    """Rule by rule: as measured for the pair, else by solo time beside steps of the chunk's own resolution."""
    tables, bucket = profile.sizes, profile.sizes[step_size].bucket(rows)

    def line(points: dict[int, tuple[int, int]], x: int) -> tuple[int, int]:
        below = max(key for key in points if key <= x)
        above = min(key for key in points if key >= x)
        if below == above:
            return points[below]
        part = [
            (2 * (b - a) * (x - below) + above - below) // (2 * (above - below)) + a
            for a, b in zip(points[below], points[above], strict=True)
        ]
        return part[0], part[1]

    own = {r: c for r, c in tables[chunk_size].corun[chunking, chunk].items() if not c.held_out}
    cells = own
    if step_size != chunk_size:
        pair = profile.across.get((step_size, chunk_size), {}).get((chunking, chunk), {})
        cells = {r: c for r, c in pair.items() if not c.held_out}
    if cells and min(cells) <= bucket <= max(cells):
        return line({r: (c.step.median, c.chunk.median) for r, c in cells.items()}, bucket)
    times = {tables[chunk_size].steps[r].median: (own[r].step.median, own[r].chunk.median) for r in sorted(own)[::-1]}
    steps = {r: (spread.median, 0) for r, spread in tables[step_size].steps.items()}
    return line(times, min(max(line(steps, bucket)[0], min(times)), max(times)))


def reference_simulate(
    requests: Any,
    policy: Any,
    profile: Profile,
    decode_gpus: Any = (0,),
    budget: SkipBudget = NO_SKIPS,
    most: int | None = None,
) -> Any:
    """(work tuples, {sample name: (admitted, denoised, decode started, finished, modes)}, instants asked).

    With ``most`` requests at a time (a closed loop) a fourth part: when each request was sent.
    """
    encode, lead = profile.overhead_ns("text_encode"), profile.overhead_ns("decision_lead")
    images = [(request, image) for request in requests for image in range(request.images)]
    todo = [Sample(n, request, image, request.arrival_ns + encode, budget) for n, (request, image) in enumerate(images)]
    by_id = list(todo)
    unsent = [] if most is None else list(requests)
    todo = todo if most is None else []
    sent_at: dict[int, int] = {}

    def in_system(at: int) -> int:
        left = set()
        for sample in by_id:
            ended = sample.phase in (Phase.DONE, Phase.REJECTED)
            if sample.request.request_id in sent_at and not (ended and gone_at[sample.id] <= at):
                left.add(sample.request.request_id)
        return len(left)

    def send_until(at: int) -> None:
        """Send whatever could be sent by then, each at its own instant."""
        while unsent:
            instants = sorted({max(unsent[0].arrival_ns, t) for t in (0, *gone_at.values(), *sent_at.values())})
            last = max(sent_at.values(), default=0)
            when = [t for t in instants if last <= t <= at and in_system(t) < (most or 0)]
            if not when:
                return
            request = unsent.pop(0)
            sent_at[request.request_id] = when[0]
            for sample in by_id:
                if sample.request is request:
                    sample.entered_ns = when[0] + encode
                    sample.request = replace(request, arrival_ns=when[0], intended_ns=request.arrival_ns)
                    if request.slo_ns is not None:
                        sample.deadline_ns = when[0] + request.slo_ns
                    todo.append(sample)

    gone_at: dict[int, int] = {}
    policy.reset(WorkerInfo(profile.most_rows, 0, decode_gpus, max(2 if s.guided else 1 for s in by_id)), profile)
    chunking, count = policy.chunking, profile.chunk_count(policy.chunking)
    waiting: list[Sample] = []
    active: list[Sample] = []
    decoding: list[Sample] = []
    work: list[Any] = []
    asked: list[int] = []
    lanes = [LaneView(k, gpu) for k, gpu in enumerate(decode_gpus)]
    run = SimpleNamespace(step=None, committed=None, wake=None, ended=0, hold=0, late_step=None, late_ask=False)
    late_lanes: list[Any] = []
    chunk_of = [None] * len(lanes)  # the running piece of each lane
    seen: dict[str, list[Any]] = {"arrived": [], "step_done": [], "chunk_done": [], "gone": []}

    def face(sample: Sample) -> Profile:
        return profile.at(sample.request.size)

    def slowdowns(step: Any, chunk: Any) -> tuple[int, int]:
        if not profile.others:
            return profile.slowdown_ppm(step.rows, chunking, chunk.chunk)
        sizes = (step.batch[0][0].request.size, chunk.sample.request.size)
        return reference_slowdowns(profile, *sizes, step.rows, chunking, chunk.chunk)

    def piece(solo: Any, now: Any, **facts: Any) -> Any:
        return SimpleNamespace(left=solo, since=now, start=now, ppm=None, end=None, shown=False, **facts)

    def begin_step(batch: Any, pads: Any, now: Any, idle: bool) -> Any:
        if now < run.hold:  # it holds the lane, and starts when the host lets it
            run.late_step = (batch, pads, idle)
            return SimpleNamespace(batch=batch, pads=pads, rows=0, end=None, shown=False)
        rows = pads + sum(2 if mode == "guided" else 1 for _, mode in batch)
        own = face(batch[0][0])
        launch = own.launch_ns(rows) if idle else 0
        work = own.step_ns(rows) + launch + profile.overhead_ns("step_dispatch")
        return piece(work, now, batch=batch, pads=pads, rows=rows)

    def begin_chunk(lane: Any, now: Any) -> None:
        if now < run.hold:
            late_lanes.append(lane)
            return
        sample = lane.sample
        if sample.decode_started_ns < 0:
            sample.decode_started_ns = now
        solo = face(sample).chunk_ns(chunking, sample.chunks_done) + profile.overhead_ns("chunk_dispatch")
        chunk_of[lane.index] = piece(solo, now, sample=sample, chunk=sample.chunks_done)

    def show(step: Any) -> None:
        step.shown, step.freed = True, []
        for sample, mode in step.batch:
            sample.in_step = False
            if sample.guided and mode == "guided":
                sample.had_guided_step, sample.skip_run = True, 0
            elif sample.guided:
                sample.skipped_at = (sample.skipped_at or []) + [sample.step_index]
                sample.skips_spent, sample.skips_left = sample.skips_spent + 1, sample.skips_left - 1
                sample.skip_run += 1
            sample.step_index += 1
            if sample.step_index == sample.steps:
                sample.phase = Phase.DECODING
                active.remove(sample)
                decoding.append(sample)
                step.freed.append(sample)
        seen["step_done"].extend(sample for sample, _ in step.batch)

    def holder() -> Any:
        return next((lane for lane in lanes if lane.sample is not None and lane.exclusive), None)

    now = 0
    while run.ended < len(by_id):
        ask = False
        if run.step is not None and run.step.end == now:  # 1. the step
            step, run.step = run.step, None
            if not step.shown:
                show(step)
            for sample in step.freed:
                sample.denoised_ns = now
            modes = "".join(MODE_LETTER[mode] for _, mode in step.batch)
            ids = tuple(sample.id for sample, _ in step.batch)
            work.append((0, "denoise", "step", step.start, now, step.rows, step.pads, ids, modes, -1, False, False))
            ask = run.committed is None and holder() is None
            ended_step = True
        else:
            ended_step = False
        for lane in lanes:  # 2. the chunks
            done = chunk_of[lane.index]
            if done is None or done.end != now:
                continue
            sample = done.sample
            name = f"decode{lane.index}"
            facts = ((sample.id,), "", done.chunk, lane.exclusive, lane.forced)
            work.append((lane.gpu, name, "chunk", done.start, now, 0, 0, *facts))
            sample.chunks_done += 1
            lane.chunks_left -= 1
            seen["chunk_done"].append(sample)
            chunk_of[lane.index] = None
            ask = True
            if lane.chunks_left:
                begin_chunk(lane, now)
                continue
            lane.sample, sample.launched = None, False
            if sample.chunks_done == count:
                run.hold = max(run.hold, now) + profile.overhead_ns("sample_host")
                sample.phase, sample.finished_ns = Phase.DONE, run.hold + profile.overhead_ns("result_copy")
                gone_at[sample.id] = sample.finished_ns
                decoding.remove(sample)
                seen["gone"].append((sample, "done"))
                run.ended += 1
        if ended_step:  # 3. what was committed
            if run.committed is not None:
                run.step, run.committed = begin_step(run.committed[0], run.committed[1], now, False), None
            for lane in lanes:
                if lane.sample is not None and not lane.started:
                    lane.started = True
                    begin_chunk(lane, now)
        if now >= run.hold:  # and what the host held back
            if run.late_step is not None:
                run.step, run.late_step = begin_step(run.late_step[0], run.late_step[1], now, run.late_step[2]), None
            for lane in [late_lanes.pop(0) for _ in range(len(late_lanes))]:
                begin_chunk(lane, now)
        send_until(now)
        while todo and todo[0].entered_ns <= now:  # 4. arrivals
            sample = todo.pop(0)
            sample.phase = Phase.WAITING
            waiting.append(sample)
            seen["arrived"].append(sample)
            ask = ask or (run.step is None and holder() is None)
        if run.wake is not None and run.wake <= now:  # 5. the wake
            run.wake, ask = None, True
        step = run.step
        due = lead and step is not None and not step.shown and step.end is not None  # 6. the early decision
        if due and max(step.since, step.end - lead) <= now:
            show(step)
            ask = True
        if now < run.hold:
            run.late_ask, ask = run.late_ask or ask, False
        else:
            ask, run.late_ask = ask or run.late_ask, False
        if ask and run.ended < len(by_id):
            asked.append(now)
            view = View()
            idle = run.step is None and all(chunk is None for chunk in chunk_of)
            for_good = most is not None and in_system(max((now, *gone_at.values()))) == most
            view.closed = not todo and (not unsent or (idle and for_good))
            view.now_ns, view.max_rows = now, profile.most_rows
            view.waiting, view.active, view.decoding, view.decode_lanes = waiting, active, decoding, lanes
            coming = run.committed[0] if run.committed else ()
            view.running = tuple(s.id for s, _ in (step.batch if step is not None and not step.shown else coming))
            view.denoise_free = not view.running and holder() is None
            for name, events in seen.items():
                setattr(view, name, tuple(events))
                events.clear()
            decision = policy.decide(view)
            for sample_id in decision.admit:
                sample = by_id[sample_id]
                waiting.remove(sample)
                active.append(sample)
                sample.phase, sample.admitted_ns = Phase.ACTIVE, now
            for sample_id in decision.reject:
                sample = by_id[sample_id]
                waiting.remove(sample)
                sample.phase = Phase.REJECTED
                gone_at[sample.id] = now
                seen["gone"].append((sample, "rejected"))
                run.ended += 1
            if decision.step:
                batch = [(by_id[i], mode) for i, mode in decision.step]
                for sample, _ in batch:
                    sample.in_step = True
                if step is None:
                    run.step = begin_step(batch, decision.pad_rows, now, True)
                else:
                    run.committed = (batch, decision.pad_rows)
            for launch in decision.chunks:
                lane, sample = lanes[launch.lane], by_id[launch.sample]
                lane.sample, lane.chunks_left, sample.launched = sample, launch.chunks, True
                lane.exclusive, lane.forced = launch.exclusive, launch.forced
                lane.started = step is None or not (launch.exclusive or sample.denoised_ns < 0)
                if lane.started:
                    begin_chunk(lane, now)
            run.wake = decision.wake_at_ns
        wanted = []  # 7. slowdowns, once
        step_ppm = PPM
        for lane, chunk in zip(lanes, chunk_of, strict=True):
            if chunk is None:
                continue
            chunk_ppm = PPM
            if run.step is not None and run.late_step is None and lane.gpu == 0:
                s_u, chunk_ppm = slowdowns(run.step, chunk)
                step_ppm += s_u - PPM
            wanted.append((chunk, chunk_ppm))
        if run.step is not None and run.late_step is None:
            wanted.append((run.step, step_ppm))
        for running, ppm in wanted:
            if running.ppm == ppm:
                continue
            if running.ppm is not None:
                running.left -= (now - running.since) * PPM // running.ppm
            running.since, running.ppm = now, ppm
            running.end = now + (running.left * ppm + PPM - 1) // PPM
        ends = [running.end for running, _ in wanted] + ([run.wake] if run.wake is not None else [])
        if run.late_ask or run.late_step is not None or late_lanes:
            ends.append(run.hold)
        if lead and run.step is not None and run.step.end is not None and not run.step.shown:
            ends.append(max(run.step.since, run.step.end - lead))
        if todo and run.step is None and holder() is None:
            ends.append(todo[0].entered_ns)
        if unsent and run.step is None and holder() is None:
            places = [max(unsent[0].arrival_ns, t) for t in (now, *gone_at.values()) if t >= now]
            ends += [t for t in places if in_system(t) < (most or 0)]
        if run.ended < len(by_id):
            now = max(now, min(ends))
    work.sort(key=lambda w: (w[3], w[2] != "step", w[1], w[4]))
    stages = {
        s.name: (s.admitted_ns, s.denoised_ns, s.decode_started_ns, s.finished_ns, s.modes, str(s.phase)) for s in by_id
    }
    return (work, stages, asked) if most is None else (work, stages, asked, sent_at)
