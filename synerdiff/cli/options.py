"""What commands read from their options' texts, and the lines that they print about a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synerdiff.core import PPM, InputError, Mode, SkipBudget

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from policies.base import Parameter
    from synerdiff.core import Request
    from synerdiff.fidelity.floor import FloorChoice
    from synerdiff.profile.tables import Profile

SKIP_MODES = (Mode.REUSE, Mode.CONDITIONAL)


def parameter_values(policy: str, known: Sequence[Parameter], settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a policy's parameters, each in its declared type and within its bounds."""
    by_name = {parameter.name: parameter for parameter in known}
    values: dict[str, Any] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise InputError(f"--set {text}: key=value is needed, for example batch=4.")
        if name not in by_name:
            listing = ", ".join(by_name) or "none"
            raise InputError(f"policy '{policy}' has no parameter '{name}'; it has {listing}.")
        if name in values:
            raise InputError(f"--set {name} is given twice.")
        values[name] = by_name[name].check(policy, _typed(by_name[name].kind, value))
    return values


def _typed(kind: type, text: str) -> Any:
    """The text in that type where it can be; else the text itself, for the parameter to refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def window_of(text: str | None) -> tuple[float, float] | None:
    """``A:B`` in seconds."""
    if text is None:
        return None
    try:
        start_s, end_s = (float(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--window {text}: two numbers of seconds are needed, for example 600:4200.") from None
    if not (0 <= start_s < end_s and math.isfinite(end_s)):
        raise InputError(f"--window {text}: the start must be at least 0 and the end after it.")
    return start_s, end_s


def decode_lanes(text: str) -> tuple[int, ...]:
    """The GPU of each decode lane, ``0,0,1``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) < 64 for part in parts):
        raise InputError(f"--decode-gpus {text}: GPU numbers from 0 to 63 are needed, for example 0 or 0,1.")
    return tuple(int(part) for part in parts)


def skip_budget(fraction: float, warmup_steps: int, longest_run: int, mode: str) -> SkipBudget:
    """The budget with its fraction in parts per million."""
    if not 0 <= fraction <= 1:
        raise InputError(f"--skip-fraction is {fraction:g}; a number from 0 to 1 is needed.")
    for name, value, least in (("warmup", warmup_steps, 0), ("longest-run", longest_run, 1)):
        if value < least:
            raise InputError(f"--skip-{name} is {value}; a whole number of at least {least} is needed.")
    if mode not in SKIP_MODES:
        raise InputError(f"--skip-mode is '{mode}'; allowed are {' and '.join(SKIP_MODES)}.")
    return SkipBudget(round(fraction * PPM), warmup_steps, longest_run, Mode(mode))


def floor_choice(
    min_ssim: float | None,
    table: Path | None,
    given: SkipBudget,
    requests: Iterable[Request],
    profile: Profile,
    profile_folder: Path,
    scheduler: str | None = None,
) -> FloorChoice | None:
    """What ``--min-ssim`` chooses from a fidelity table; None without it. It excludes a budget given by its parts."""
    if min_ssim is None:
        if table is not None:
            raise InputError("--fidelity names the table that --min-ssim looks up; give both or neither.")
        return None
    from synerdiff.fidelity.floor import floor_for_requests

    if given != SkipBudget():
        raise InputError("--min-ssim chooses which steps may be skipped, so it excludes the options --skip-...")
    from synerdiff.diffusion import SCHEDULERS

    solver = None if scheduler is None else SCHEDULERS.get(scheduler, scheduler)
    return floor_for_requests(min_ssim, requests, profile, profile_folder, table, solver)


def summary_lines(summary: dict[str, Any], load: float | None) -> list[str]:
    """The metrics that matter most, one a line."""
    latency = "  ".join(
        f"{name} {_number(summary[f'request_latency_{name}_s'])}" for name in ("mean", "p50", "p90", "p99")
    )
    stages = "  ".join(
        f"{name.replace('_', ' ')} {_number(summary[f'{name}_mean_s'])}"
        for name in ("queue", "denoise", "decode_wait", "decode")
    )
    lost = summary["error_request_count"]
    return [
        f"  requests    {summary['trace_request_count']}, of which {summary['measured_request_count']} measured"
        f" and {lost} unfinished, rejected or failed",
        f"  load        {_number(load)}",
        f"  latency, s  {latency}",
        f"  stages, s   {stages}",
        f"  throughput  {_number(summary['request_throughput'])} requests/s, "
        f"{_number(summary['image_throughput'])} images/s",
        f"  goodput     {_number(summary['goodput'])} requests/s within their SLO "
        f"({_number(100 * summary['good_fraction'])}% of them)",
        f"  skipped     {_number(100 * summary['skip_fraction'])}% of guided steps",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
