"""A profile with another contention or another weight of the decode, to ask when a policy wins; and with all times off,
to ask what its own error is worth."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from statistics import fmean

from synerdiff.core import PPM, InputError
from synerdiff.profile.tables import Band, Corun, CorunCells, Profile, Spread


def scaled_profile(base: Profile, contention: float = 1.0, decode: float = 1.0) -> Profile:
    """``base`` with every slowdown's excess over 1 times ``contention``, and every chunk's time times ``decode``.

    Its name says so, and its provenance is ``estimated``: nobody measured it. Factors of 1 return ``base`` itself.
    """
    if contention < 0 or decode <= 0:
        raise InputError(
            f"profile '{base.name}' cannot be scaled by contention {contention:g} and decode {decode:g}; "
            "contention must be at least 0 and decode above 0."
        )
    if contention == 1 and decode == 1:
        return base
    name = base.name
    name += f"+contention{contention:g}" if contention != 1 else ""
    name += f"+decode{decode:g}" if decode != 1 else ""

    def contending(slowdown: Spread) -> Spread:
        return slowdown.each(lambda value: max(1, PPM + round((value - PPM) * contention)))

    def scaled_corun(corun: CorunCells) -> CorunCells:
        return {
            place: {
                rows: Corun(contending(cell.step), contending(cell.chunk), cell.held_out) for rows, cell in of.items()
            }
            for place, of in corun.items()
        }

    def longer(chunk: Spread) -> Spread:
        return chunk.each(lambda value: max(1, round(value * decode)))

    def scaled(own: Profile) -> Profile:
        return replace(
            own,
            name=name,
            provenance="estimated",
            chunks={cut: tuple(map(longer, chunks)) for cut, chunks in own.chunks.items()},
            corun=scaled_corun(own.corun),
            across={pair: scaled_corun(corun) for pair, corun in own.across.items()},
            content_hash=f"{base.content_hash}+{contention!r}+{decode!r}",
        )

    return base.each(scaled)


def all_times_scaled(profile: Profile, factor: float) -> Profile:
    """All times multiplied by a factor; slowdowns are ratios and stay."""
    ppm = round(factor * PPM)

    def scaled(spread: Spread) -> Spread:
        return spread.each(lambda value: max(1, value * ppm // PPM))

    def slower(own: Profile) -> Profile:
        return replace(
            own,
            steps={rows: scaled(spread) for rows, spread in own.steps.items()},
            chunks={name: tuple(map(scaled, spreads)) for name, spreads in own.chunks.items()},
            overheads={name: scaled(spread) if spread.median else spread for name, spread in own.overheads.items()},
            step_launch={rows: scaled(spread) if spread.median else spread for rows, spread in own.step_launch.items()},
            degrees={
                degree: {rows: scaled(one) for rows, one in cells.items()} for degree, cells in own.degrees.items()
            },
            content_hash="",
        )

    return profile.each(slower)


def own_band(profile: Profile) -> Band | None:
    """How far all its times may be off: what its head says, else its own spread; None where it has none.

    The spread of measured times: the geometric means of p10 / median and of p90 / median over steps and whole decodes.
    """
    if profile.head.band is not None:
        return profile.head.band
    cells = [*profile.steps.values(), *profile.chunks["whole"]]
    low = exp(fmean(log(max(1, cell.p10) / cell.median) for cell in cells))
    high = exp(fmean(log(cell.p90 / cell.median) for cell in cells))
    return None if low == high else Band(low=low, high=high, meaning="p10 to p90 of what was measured")
