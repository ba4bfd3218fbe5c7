"""The one base of validated sections: what a file or a head may hold is declared once, beside each field.

A section is frozen and strict (no text is taken for a number), an unknown field is an error that lists the known ones,
and whatever is wrong becomes one sentence: where, the field's path, what was found, what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator

from synerdiff.core import InputError
from synerdiff.files import shown

_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)

Listed = Annotated[tuple[_T, ...], Strict(False)]
"""A field that a YAML list fills; a frozen section holds it as a tuple."""

_BRANCH = re.compile(r"constrained-|(literal|tuple|list|dict|nullable|lax-or-strict|function-\w+)\[")
"""What pydantic adds to a place for each branch of a field that may be one of several types."""


class Also:
    """In the JSON schema of a field: another form that a file may use, made of the schema of the form that is kept."""

    def __init__(self, form: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.form = form

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        own: dict[str, Any] = handler(core)
        return {"anyOf": [own, self.form(own)]}


class Section(BaseModel):
    """Named fields, frozen once checked."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise ValueError(f"named fields are needed: {', '.join(cls.model_fields)}")
        for key in data:
            if key not in cls.model_fields:
                raise ValueError(f"there is no field '{shown(key)}'; known are {', '.join(cls.model_fields)}")
        return data


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a file that holds this section. Rules between fields are not in it."""
    own = model.model_json_schema()
    for part in (own, *own.get("$defs", {}).values()):
        if "properties" in part:
            part["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **own}


def validated(model: type[_Model], data: Any, where: str) -> _Model:
    """``data`` as that section; InputError is one sentence that starts with ``where`` (a file, or what it is)."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: {sentence(error)}.") from None


def sentence(error: ValidationError) -> str:
    """The first problem, without a full stop: the field's path, what was found, what is allowed."""
    first = error.errors()[0]
    place = field_path([part for part in first["loc"] if not (isinstance(part, str) and _BRANCH.match(part))])
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{place}: {message}" if place else message
    if first["type"] == "too_short" and first["ctx"]["actual_length"] == 0:
        return f"{place} is empty; at least one entry is needed"
    message = first["msg"]
    for theirs, ours in (("Input should be", "must be"), ("String should", "must"), ("valid tuple", "list")):
        message = message.replace(theirs, ours)
    return f"{place} is {shown(repr(first['input']))}; it {message[0].lower()}{message[1:]}"


def field_path(place: list[int | str]) -> str:
    """``workloads[0].seeds[2]``"""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
