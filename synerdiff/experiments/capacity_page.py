"""What the page of a capacity question says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from synerdiff.config.capacity import Question
from synerdiff.experiments.page import Page, Part, Printed, profile_table, provenance
from synerdiff.profile.tables import Profile


def capacity_page(
    question: Question,
    document: Mapping[str, Any],
    tables: Sequence[Printed],
    profiles: Iterable[Profile],
    versions: dict[str, str],
    figure: str,
) -> Page:
    """``document``: the content of capacity.json; ``tables``: what is printed after the answer's sentences."""
    target, (low, high) = question.target, question.fleet_sizes
    bound = target.text(target.bound)
    keep = f"{target.name} at {bound}" if target.quantile is not None else f"a {target.name} of {bound}"
    asked = "How many GPUs keep" if question.find == "gpus" else f"At which rate do {high} GPUs keep"
    answers, known = document["answers"], list({profile.name: profile for profile in profiles}.values())
    tried = [
        [
            " + ".join(f"{n} {kind}" for kind, n in answer["kinds"].items())
            if answer.get("kinds")
            else answer["profile"],
            answer["policy"],
            str(one["gpus"]),
            "-" if one["rate_per_s"] is None else f"{one['rate_per_s']:g}",
            "-" if one["value"] is None else target.text(one["value"]),
            "-" if None in (one["low"], one["high"]) else f"{target.text(one['low'])} to {target.text(one['high'])}",
            str(one["replicates"]),
            "kept" if one["keeps"] else "not shown" if one["low"] is not None and not one["sure"] else "not kept",
        ]
        for answer in answers
        for one in sorted(answer["tried"], key=lambda one: (one["gpus"], one["rate_per_s"] or 0))
    ]
    withheld = any(one["low"] is None for answer in answers for one in answer["tried"])
    headers = ["profile", "policy", "GPUs", "requests/s", target.name, "95% interval", "runs", f"SLO {bound}"]
    return Page(
        kind="capacity",
        name=question.name,
        question=f"{asked} {keep} on {question.workload.name}?",
        answer=document["answer"],
        setting=" ".join(document["rests_on"][:1]),
        parts=[
            Part(title="Against the SLO", figures=[figure], lines=tables),
            Part(title="Every level that was tried", lines=[(headers, tried)], folded=True),
            Part(title="Setting", lines=[profile_table(known), *document["rests_on"]]),
        ],
        gaps=[
            *(provenance(profile) for profile in known if profile.provenance != "measured"),
            f"Fleets of one size for the whole trace, of {low} to {high} GPUs; {len(tried)} levels were tried, and "
            "more GPUs are taken never to harm.",
            *(
                ["Levels without an interval: the trace is too short for one, and the value decides."]
                if withheld
                else []
            ),
            "What the images look like is not part of this page.",
        ],
        versions=versions,
    )
