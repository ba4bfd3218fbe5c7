"""Which steps of an image go without guidance, and what they do instead: the rules that a fidelity study judges."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from synerdiff.core import CONDITIONAL, GUIDED, REUSE, Mode

ALL_PARTS, CORE_PARTS = "all", "core"
WARMUP = 3
"""Guided first steps of the rules that have a warm-up: ``SkipBudget``'s default."""


@dataclass(frozen=True, slots=True)
class SkipRule:
    """One way to run ``run_steps`` steps; where nothing is skipped, the reference or an equal-cost baseline."""

    name: str
    run_steps: int
    mode: Mode = GUIDED
    schedule: str = "full"
    warmup_steps: int = 0
    """First steps that stay guided."""
    skipped: frozenset[int] = frozenset()
    threshold: float | None = None
    """Adaptive: from the first step on after which the two x0 predictions were at least this similar, skip always."""
    drawn: bool = False
    """Every image takes its own random half of ``skipped``."""

    @property
    def varies(self) -> bool:
        """Whether the skipped steps differ from image to image."""
        return self.drawn or self.threshold is not None

    @property
    def rows(self) -> int:
        """Denoiser rows per image, where they do not vary."""
        return 2 * self.run_steps - len(self.skipped)

    def own_skips(self, seed: int) -> frozenset[int]:
        """The steps that the image of this seed skips, where no threshold decides."""
        if not self.drawn:
            return self.skipped
        draw = random.Random(seed)
        return frozenset(step for step in sorted(self.skipped) if draw.random() < 0.5)


def full(steps: int) -> SkipRule:
    """All steps guided."""
    return SkipRule(f"full-{steps}", steps)


def spread(steps: int, skips: int, warmup_steps: int = 0, mode: Mode = REUSE) -> SkipRule:
    """Guided steps at equal distances: the warm-up, then round(first + j * (steps - 1 - first) / (guided - 1)).

    "Every 2nd step", "every 3rd guided only" and so on are cases of it. The first and last step are guided.
    """
    guided = list(range(warmup_steps))
    rest, left = steps - warmup_steps, steps - skips - warmup_steps
    if left < 1 or rest < 1:
        raise ValueError(f"{skips} of {steps} steps cannot be skipped after {warmup_steps} guided ones")
    gaps = max(1, left - 1)
    guided += [warmup_steps + (2 * j * (rest - 1) + gaps) // (2 * gaps) for j in range(left)]
    return _fixed("spread", steps, mode, frozenset(range(steps)) - frozenset(guided), warmup_steps)


def last(steps: int, skips: int, mode: Mode) -> SkipRule:
    """The ``skips`` last steps without guidance."""
    return _fixed("last", steps, mode, frozenset(range(steps - skips, steps)), steps - skips)


def first(steps: int, skips: int) -> SkipRule:
    """Without guidance at the start there is no difference to reuse yet: conditional only."""
    return _fixed("first", steps, CONDITIONAL, frozenset(range(skips)), 0)


def calibrated(steps: int, chosen: Collection[int]) -> SkipRule:
    """Steps that a calibration chose; ``reuse``."""
    return _fixed("calibrated", steps, REUSE, frozenset(chosen), min(chosen, default=0))


def adaptive(steps: int, threshold: float, warmup_steps: int = WARMUP) -> SkipRule:
    """Sticky: guidance is dropped for good once the x0 predictions with and without the condition agree."""
    name = f"conditional-adaptive-{threshold:g}"
    return SkipRule(name, steps, CONDITIONAL, "adaptive", warmup_steps, threshold=threshold)


def random_half(rule: SkipRule) -> SkipRule:
    """What a load-triggered policy does with a rule: it skips some of its steps, in our test each with probability
    one half."""
    return replace(rule, name=f"{rule.name}-random-half", schedule="random-half", drawn=True)


def _fixed(schedule: str, steps: int, mode: Mode, skipped: frozenset[int], warmup_steps: int) -> SkipRule:
    # Spread rules start with a guided step anyway, so only a longer warm-up is part of the name.
    suffix = f"-w{warmup_steps}" if schedule == "spread" and warmup_steps else ""
    name = f"{mode}-{schedule}-{len(skipped)}of{steps}{suffix}"
    return SkipRule(name, steps, mode, schedule, warmup_steps, skipped)


def equal_cost_baselines(steps: int, rules: Sequence[SkipRule], extra_shares: Sequence[float] = ()) -> list[SkipRule]:
    """Full guidance in fewer steps at the cost of each rule (rounded down, so that the baseline never costs more),
    and at ``extra_shares`` of the steps."""
    counts = {rule.rows // 2 for rule in rules if not rule.varies}
    counts |= {round(steps * share) for share in extra_shares}
    return [full(count) for count in sorted(counts, reverse=True) if 2 <= count < steps]


def rules_to_judge(steps: int, part: str) -> list[SkipRule]:
    """The rules of a study without the calibrated ones: ``all`` of them, or the ``core`` that settles the ranking."""
    every_other = (steps - 1) // 2
    shares = [round(steps * share) for share in (0.64, 0.8)]
    rules = [spread(steps, every_other), *(spread(steps, skips) for skips in shares)]
    rules.append(last(steps, round(steps * 0.4), CONDITIONAL))
    if part == ALL_PARTS:
        rules += [spread(steps, round(steps * share)) for share in (0.24, 0.72)]
        if shares[0] + WARMUP < steps:
            rules.append(spread(steps, shares[0], warmup_steps=WARMUP))
        rules.append(last(steps, round(steps * 0.4), REUSE))
        rules.append(spread(steps, every_other, mode=CONDITIONAL))
        rules += [last(steps, round(steps * share), CONDITIONAL) for share in (0.2, 0.6, 0.8, 1.0)]
        rules += [first(steps, round(steps * share)) for share in (0.2, 0.4)]
        rules += [adaptive(steps, threshold) for threshold in (0.99, 0.97)]
        rules.append(random_half(spread(steps, shares[0])))
    # Few steps can make two shares the same rule.
    return [rule for rule in dict.fromkeys(rules) if rule.skipped or rule.threshold is not None]


def skips_to_calibrate(rules: Sequence[SkipRule]) -> list[int]:
    """The numbers of skips at which calibrated and spread schedules are compared: those of the spread reuse rules."""
    plain = {len(rule.skipped) for rule in rules if rule.schedule == "spread" and rule.mode is REUSE}
    return sorted(plain)
