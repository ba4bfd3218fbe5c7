"""Random traces, profiles and budgets for property tests, and a policy that does any legal thing."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from synerdiff.core import CONDITIONAL, REUSE, ChunkLaunch, Decision, Request, SkipBudget, View, WorkerInfo
from synerdiff.profile.tables import Profile
from tests.builders import make_profile


class Whim:
    """Does any legal thing, at random but reproducibly; what it sees goes into the draw, so differing views show."""

    NAME = "whim"

    def __init__(self, seed: int, chunking: str) -> None:
        self.seed, self.chunking = seed, chunking
        self.asked: list[int] = []

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        self.chunk_count = profile.chunk_count(self.chunking)
        self.asked = []

    def decide(self, view: View) -> Decision:
        self.asked.append(view.now_ns)
        seen = (
            self.seed,
            view.now_ns,
            view.closed,
            view.denoise_free,
            tuple(view.running),
            tuple((s.id, s.step_index, s.skips_left) for s in view.active),
            tuple(s.id for s in view.waiting),
            tuple((s.id, s.chunks_done, s.launched) for s in view.decoding),
            tuple((lane.free, lane.chunks_left) for lane in view.decode_lanes),
            tuple(s.id for s in (*view.arrived, *view.step_done, *view.chunk_done)),
            tuple((s.id, reason) for s, reason in view.gone),
        )
        draw = random.Random(repr(seen))
        waiting = list(view.waiting)
        admit = [s for s in waiting if draw.random() < 0.6]
        reject = [s for s in waiting if s not in admit and draw.random() < 0.05]
        chunks, exclusive = [], False
        lanes = [lane.index for lane in view.decode_lanes if lane.free]
        for sample in view.decoding:
            if lanes and not sample.launched and draw.random() < 0.7:
                count = draw.randint(1, self.chunk_count - sample.chunks_done)
                alone = view.denoise_free and not exclusive and draw.random() < 0.4
                exclusive = exclusive or alone
                lane = lanes.pop(draw.randrange(len(lanes)))
                chunks.append(ChunkLaunch(sample.id, count, lane, alone, forced=draw.random() < 0.1))
        step, rows, pads, key = [], 0, 0, None
        if view.denoise_free and not exclusive and draw.random() < 0.9:
            pads = draw.randint(0, 1)
            rows = pads
            for sample in [*view.active, *admit]:
                mode = draw.choice(sample.allowed_modes)
                need = 2 if mode == "guided" else 1
                same = key in (None, sample.batch_key)
                if same and rows + need <= view.max_rows and draw.random() < 0.8:
                    step.append((sample.id, mode))
                    rows += need
                    key = sample.batch_key
        wake = None if draw.random() < 0.5 else view.now_ns + draw.randint(1, 400)
        if not step and not chunks:
            pads, wake = 0, view.now_ns + draw.randint(1, 400)
        return Decision(
            tuple(s.id for s in admit),
            tuple(s.id for s in reject),
            tuple(step),
            pads if step else 0,
            tuple(chunks),
            wake,
        )


times = st.integers(1, 300)
ppm = st.integers(700_000, 3_000_000)


@st.composite
def profiles(draw: Any, host: tuple[int, ...] = (0,)) -> Profile:
    """``host``: what the overhead sample_host may be; the runner's is its own."""
    rows = sorted(draw(st.sets(st.integers(2, 12), min_size=1, max_size=3)) | {1, 12})
    chunk_times = draw(st.lists(times, min_size=1, max_size=4))
    ends = {rows[0]: (draw(ppm), draw(ppm)), rows[-1]: (draw(ppm), draw(ppm))}
    names = ("step_dispatch", "chunk_dispatch", "decision_lead", "text_encode", "result_copy")
    overheads = {name: draw(st.sampled_from((0, 0, 1, 7, 60))) for name in names}
    overheads["sample_host"] = draw(st.sampled_from(host))
    launches = {r: draw(st.sampled_from((0, 4, 90))) for r in rows} if draw(st.booleans()) else None
    return make_profile(
        {r: draw(times) for r in rows},
        {"whole": [draw(times)], "cut": chunk_times},
        ends,
        overheads=overheads,
        launches=launches,
        eager=draw(st.booleans()),
    )


@st.composite
def traces(draw: Any) -> Any:
    arrival, requests = 0, []
    for number in range(draw(st.integers(1, 9))):
        arrival += draw(st.sampled_from((0, 0, 1, 5, 60, 400)))
        requests.append(
            Request(
                number,
                arrival,
                steps=draw(st.integers(1, 5)),
                images=draw(st.sampled_from((1, 1, 2, 3))),
                guidance_scale=draw(st.sampled_from((7.5, 7.5, 1.0))),
                base_model=draw(st.sampled_from(("", "", "", "b"))),
            )
        )
    return requests


budgets = st.builds(
    SkipBudget,
    fraction_ppm=st.sampled_from((0, 300_000, 700_000)),
    warmup_steps=st.integers(0, 2),
    longest_run=st.integers(1, 3),
    mode=st.sampled_from((CONDITIONAL, REUSE)),
)
