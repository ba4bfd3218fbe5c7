"""A profile with another contention or another weight of the decode, to ask when a policy wins."""

from __future__ import annotations

from dataclasses import replace

from synerdiff.core import PPM, InputError
from synerdiff.profile.tables import Corun, CorunCells, Profile, Spread


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

    def scaled_corun(corun: CorunCells) -> CorunCells:
        return {
            place: {
                rows: Corun(_contending(cell.step, contention), _contending(cell.chunk, contention), cell.held_out)
                for rows, cell in cells.items()
            }
            for place, cells in corun.items()
        }

    def scaled(own: Profile) -> Profile:
        return replace(
            own,
            name=name,
            provenance="estimated",
            chunks={cut: tuple(_times(spread, decode) for spread in spreads) for cut, spreads in own.chunks.items()},
            corun=scaled_corun(own.corun),
            across={pair: scaled_corun(corun) for pair, corun in own.across.items()},
            content_hash=f"{base.content_hash}+{contention!r}+{decode!r}",
        )

    return base.each(scaled)


def _times(spread: Spread, factor: float) -> Spread:
    median, p10, p90 = (max(1, round(value * factor)) for value in (spread.median, spread.p10, spread.p90))
    return Spread(median, p10, p90, spread.n)


def _contending(spread: Spread, factor: float) -> Spread:
    values = (PPM + round((value - PPM) * factor) for value in (spread.median, spread.p10, spread.p90))
    median, p10, p90 = (max(1, value) for value in values)
    return Spread(median, p10, p90, spread.n)
