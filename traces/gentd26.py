"""Turns GenTD26 into requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from synerdiff.core import NS_PER_S, InputError, Request
from synerdiff.files import Progress
from traces.columns import IMAGES, STEPS, FieldError, whole_number
from traces.conversion import Conversion, check_options
from traces.gentd26_files import Gentd26Row, gentd26_rows

TEXT_TO_IMAGE = "TXT_2_IMG"
SKIPPED_TYPES = {"IMG_2_IMG": "image-to-image", "INPAINTING": "inpainting"}


def read_gentd26(
    path: Path,
    *,
    checkpoints: str = "one",
    adapters: str = "keep",
    all_types: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """The requests of GenTD26's own files, or of the table that joins them (see ``gentd26_rows``).

    Dropped and counted: image-to-image and inpainting rows (unless ``all_types``), and rows without parameters.
    Kept: failed, pending and processing rows, because what arrived was load, and exact duplicates (requests have no
    id, and those of the real file belong to one client that sends several equal requests at a time). Arrivals count
    from the file's first row, dropped or not, and keep its resolution of 1 s, ties in its order. ``checkpoints``
    "one" leaves base_model empty; ``adapters`` "drop" leaves the LoRAs out. guidance_scale is absent there: 7.5.
    """
    check_options(checkpoints, adapters)
    requests: list[Request] = []
    dropped: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    rows = 0
    last_s = 0
    seen_at_instant: set[tuple[str, ...]] = set()
    for row in gentd26_rows(path, adapters == "keep", progress):
        rows += 1
        if row.arrival_s < last_s:
            raise InputError(f"{row.where}: the request arrives before the one ahead of it; the trace is sorted.")
        if row.arrival_s > last_s:
            seen_at_instant.clear()
        last_s = row.arrival_s
        reason = _reason_to_drop(row, all_types)
        if reason is not None:
            dropped[reason] += 1
            continue
        _note(noted, row, seen_at_instant)
        requests.append(
            Request(
                request_id=len(requests),
                arrival_ns=row.arrival_s * NS_PER_S,
                steps=_within(row, row.steps, "num_inference_steps", STEPS),
                images=_within(row, row.images, "num_images_per_prompt", IMAGES),
                base_model=row.checkpoint if checkpoints == "keep" else "",
                loras=row.loras,
            )
        )
    if not requests:
        raise InputError(f"{path}: of {rows} rows none can be replayed.")
    return Conversion(requests, rows, dict(dropped), dict(noted))


def _reason_to_drop(row: Gentd26Row, all_types: bool) -> str | None:
    if row.predict_type != TEXT_TO_IMAGE and row.predict_type not in SKIPPED_TYPES:
        known = ", ".join((TEXT_TO_IMAGE, *SKIPPED_TYPES))
        raise InputError(f"{row.where}: predict_type is {row.predict_type!r}; known are {known}.")
    if row.predict_type in SKIPPED_TYPES and not all_types:
        return SKIPPED_TYPES[row.predict_type]
    if row.steps is None or row.images is None:
        return "steps or images missing"
    return None


def _note(noted: Counter[str], row: Gentd26Row, seen_at_instant: set[tuple[str, ...]]) -> None:
    if row.status != "SUCCEED":
        noted[f"kept although {row.status.lower()}"] += 1
    if row.cells in seen_at_instant:
        noted["exact duplicates kept"] += 1
    seen_at_instant.add(row.cells)
    if row.predict_type in SKIPPED_TYPES:
        noted[f"{SKIPPED_TYPES[row.predict_type]} replayed as text-to-image"] += 1
    if row.lora_count and not row.loras:
        noted["stripped of their LoRAs"] += 1


def _within(row: Gentd26Row, value: int | None, column: str, allowed: tuple[int, int]) -> int:
    try:
        return whole_number(str(value), column, allowed)
    except FieldError as error:
        raise InputError(f"{row.where}: {error}.") from None
