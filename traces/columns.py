"""The columns of synerdiff's own trace format: what each may hold, and how a row becomes a request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from synerdiff import files
from synerdiff.core import NS_PER_S, ControlNetUse, InputError, LoraUse, Request, controlnets_from, loras_from

COLUMNS = (
    "arrival_s",
    "steps",
    "images",
    "guidance_scale",
    "height",
    "width",
    "base_model",
    "loras",
    "controlnets",
    "slo_s",
    "seed",
    "prompt",
    "negative_prompt",
)
REQUIRED = COLUMNS[:2]
INTEGER_COLUMNS = ("steps", "images", "height", "width", "seed")
LIST_SEPARATOR = ";"

STEPS = (1, 1000)
IMAGES = (1, 64)
GUIDANCE_SCALE = (0, 100)
SIDE_PIXELS = (8, 16384)
SEED = (0, 2**63 - 1)
MAX_ARRIVAL_S = 1_000_000_000
MAX_SLO_S = 1_000_000_000
PROMPT_CHARACTERS = 20_000

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NS = Decimal(NS_PER_S)
_REMEMBERED_ROWS = 20_000

_Repeating = tuple[
    int,
    int,
    float,
    int | None,
    int | None,
    str,
    tuple[LoraUse, ...],
    tuple[ControlNetUse, ...],
    int | None,
    int | None,
]
Fields = tuple[*_Repeating, str, str]
"""A request's fields after its arrival, in their order."""


class FieldError(Exception):
    """A value that its column does not allow; the reader adds file and line."""


def check_header(where: str, header: Sequence[str]) -> None:
    """Every column known, none twice, the required ones there; else InputError."""
    known = ", ".join(COLUMNS)
    for column in header:
        if column not in COLUMNS:
            raise InputError(f"{where}: the column {column!r} is unknown; a trace has {known}.")
        if list(header).count(column) > 1:
            raise InputError(f"{where}: the column {column!r} is given twice.")
    for column in REQUIRED:
        if column not in header:
            raise InputError(f"{where}: the column {column!r} is missing; a trace has {known}.")


class RowParser:
    """Turns rows under one header into (arrival_ns, fields).

    Rows repeat (most traces know few combinations), so what follows the arrival is parsed once per combination.
    """

    def __init__(self, header: Sequence[str]) -> None:
        self._arrival = list(header).index("arrival_s")
        *self._order, self._prompt, self._negative = [
            header.index(column) if column in header else -1 for column in COLUMNS[1:]
        ]
        self._known: dict[tuple[str, ...], _Repeating] = {}

    def parse(self, cells: Sequence[str]) -> tuple[int, Fields]:
        """Raises FieldError with what is wrong."""
        arrival_ns = nanoseconds(cells[self._arrival], "arrival_s", MAX_ARRIVAL_S)
        rest = tuple([cells[i] if i >= 0 else "" for i in self._order])
        fields = self._known.get(rest)
        if fields is None:
            if len(self._known) >= _REMEMBERED_ROWS:
                self._known.clear()
            fields = self._known[rest] = _repeating(rest)
        prompt = "" if self._prompt < 0 else cells[self._prompt]
        negative = "" if self._negative < 0 else cells[self._negative]
        return arrival_ns, (*fields, *_prompts(prompt, negative))


def parse_fields(texts: Sequence[str]) -> Fields:
    """The texts of all columns but arrival_s, in the order of COLUMNS; an empty one is the default."""
    *rest, prompt, negative_prompt = texts
    return *_repeating(rest), *_prompts(prompt, negative_prompt)


def _prompts(prompt: str, negative_prompt: str) -> tuple[str, str]:
    for text in (prompt, negative_prompt):
        if len(text) > PROMPT_CHARACTERS:
            raise FieldError(f"a prompt has {len(text):,} characters; at most {PROMPT_CHARACTERS:,} are read")
    return prompt, negative_prompt


def _repeating(texts: Sequence[str]) -> _Repeating:
    steps, images, guidance, height, width, base_model, loras, controlnets, slo, seed = texts
    if bool(height.strip()) != bool(width.strip()):
        raise FieldError("height and width go together; one of them is empty")
    try:
        uses = loras_from(_names(loras, "loras")), controlnets_from(_names(controlnets, "controlnets"))
    except InputError as error:
        raise FieldError(str(error)) from None
    return (
        whole_number(steps, "steps", STEPS),
        whole_number(images, "images", IMAGES) if images.strip() else 1,
        number(guidance, "guidance_scale", GUIDANCE_SCALE) if guidance.strip() else 7.5,
        whole_number(height, "height", SIDE_PIXELS) if height.strip() else None,
        whole_number(width, "width", SIDE_PIXELS) if width.strip() else None,
        _name(base_model, "base_model"),
        *uses,
        _slo_ns(slo) if slo.strip() else None,
        whole_number(seed, "seed", SEED) if seed.strip() else None,
    )


def request_of(request_id: int, arrival_ns: int, fields: Fields) -> Request:
    """A request of a line's fields."""
    return Request(request_id, arrival_ns, *fields)


def nanoseconds(text: str, column: str, most_s: int) -> int:
    """Seconds as decimal text to the nearest nanosecond (half to even), without passing through binary fractions."""
    number(text, column, (0, most_s))
    return int((Decimal(text.strip()) * _NS).to_integral_value())


def whole_number(text: str, column: str, allowed: tuple[int, int]) -> int:
    """An integer within bounds, both included."""
    try:
        return files.whole_number(text, *allowed)
    except ValueError as error:
        raise FieldError(f"{column} {error}") from None


def number(text: str, column: str, allowed: tuple[int, int]) -> float:
    """A finite number within bounds, both included."""
    try:
        return files.number(text, *allowed)
    except ValueError as error:
        raise FieldError(f"{column} {error}") from None


def _slo_ns(text: str) -> int:
    value = nanoseconds(text, "slo_s", MAX_SLO_S)
    if value <= 0:
        raise FieldError(f"slo_s is {text.strip()}; more than 0 is needed")
    return value


def _name(text: str, column: str) -> str:
    if _CONTROL.search(text):
        raise FieldError(f"{column} is {text!r}; control characters are not allowed in names")
    return text


def _names(text: str, column: str) -> tuple[str, ...]:
    if not text:
        return ()
    names = tuple(text.split(LIST_SEPARATOR))
    if not all(name.strip() for name in names):
        raise FieldError(f"{column} is {text!r}; names are separated by single semicolons, and none may be empty")
    _name(text, column)
    return names


def texts_of(request: Request) -> list[str]:
    """A request as the texts of COLUMNS; parsing them gives the same request back.

    Raises FieldError when the format cannot hold one of its values.
    """
    texts = [
        seconds_text(request.arrival_ns),
        str(request.steps),
        str(request.images),
        repr(float(request.guidance_scale)),
        "" if request.height is None else str(request.height),
        "" if request.width is None else str(request.width),
        request.base_model,
        _joined(request.loras, "loras"),
        _joined(request.controlnets, "controlnets"),
        "" if request.slo_ns is None else seconds_text(request.slo_ns),
        "" if request.seed is None else str(request.seed),
        request.prompt,
        request.negative_prompt,
    ]
    nanoseconds(texts[0], "arrival_s", MAX_ARRIVAL_S)
    if parse_fields(texts[1:])[6:8] != (request.loras, request.controlnets):
        raise FieldError("a LoRA or ControlNet has a name that reads as a scale or an image")
    return texts


def seconds_text(value_ns: int) -> str:
    """Nanoseconds as the shortest exact decimal number of seconds."""
    sign, value_ns = ("-", -value_ns) if value_ns < 0 else ("", value_ns)
    whole, fraction = divmod(value_ns, NS_PER_S)
    return f"{sign}{whole}.{fraction:09d}".rstrip("0").rstrip(".")


def _joined(uses: Iterable[LoraUse | ControlNetUse], column: str) -> str:
    names = list(map(str, uses))
    for name in names:
        if not name.strip() or LIST_SEPARATOR in name:
            raise FieldError(f"{column} holds {name!r}; a name must not be empty or contain a semicolon")
    return LIST_SEPARATOR.join(names)
