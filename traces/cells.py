"""What cells of foreign traces say: numbers, whole numbers written as 20.0, times with and without a zone."""

from __future__ import annotations

import re
import zoneinfo
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation

from synerdiff.core import NS_PER_S
from traces.columns import GUIDANCE_SCALE, FieldError

UNITS_NS = {"s": NS_PER_S, "ms": 1_000_000, "us": 1000, "ns": 1}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_FRACTION = re.compile(r"[.,]([0-9]+)")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def zone_of(text: str) -> tzinfo | None:
    """``+02:00``, ``Z``, ``UTC`` or a name such as ``Europe/Berlin``; None for what is no zone."""
    match = re.fullmatch(r"([+-])([0-9]{2}):?([0-9]{2})", text)
    if match and int(match[2]) < 24 and int(match[3]) < 60:
        return timezone((1 if match[1] == "+" else -1) * timedelta(hours=int(match[2]), minutes=int(match[3])))
    if text in ("Z", "UTC"):
        return UTC
    try:
        return zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return None


def decimal_of(text: str) -> Decimal | None:
    """The finite number that a text says exactly; None for anything else."""
    try:
        value = Decimal(text) if len(text) < 60 and text.isascii() and "_" not in text else None
    except InvalidOperation:
        return None
    return value if value is not None and value.is_finite() and abs(value.adjusted()) < 60 else None


def moment_ns(text: str, zone: tzinfo | None) -> tuple[int, bool]:
    """An ISO 8601 time in nanoseconds since 1970, and whether it has a zone; a time without one is in ``zone``."""
    if not text:
        raise FieldError("the arrival is missing")
    plain = re.sub(r"\s+(?=[+-]\d)", "", re.sub(r"\s*(UTC|GMT|z)$", "+00:00", text))
    fraction = _FRACTION.search(plain)
    try:
        moment = datetime.fromisoformat(_FRACTION.sub("", plain, count=1))
    except ValueError:
        raise FieldError("the arrival is neither a number nor an ISO 8601 time") from None
    zoned = moment.tzinfo is not None or zone is not None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone or UTC)
    since = moment - EPOCH
    whole = (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000
    return whole + (int(fraction[1][:9].ljust(9, "0")) if fraction else 0), zoned


def whole_text(name: str, text: str, allowed: tuple[int, int], absent: str | None = None) -> str:
    """A whole number, which may be written as 20.0."""
    if not text and absent is not None:
        return absent
    value = decimal_of(text)
    if value is None or value != value.to_integral_value() or not allowed[0] <= value <= allowed[1]:
        raise FieldError(
            f"{name} is not a whole number from {allowed[0]} to {allowed[1]}" if text else f"{name} is missing"
        )
    return str(int(value))


def guidance_text(text: str) -> str:
    """A guidance scale as text, empty where none is given; FieldError when it is out of bounds."""
    value, (low, high) = decimal_of(text), GUIDANCE_SCALE
    if text and (value is None or not low <= value <= high):
        raise FieldError(f"guidance_scale is not a number from {low} to {high}")
    return f"{value:f}" if value is not None else ""
