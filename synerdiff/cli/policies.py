"""``synerdiff policies``: every policy with its parameters."""

from __future__ import annotations

import inspect
import json
from typing import Any

import typer


def policies(as_json: bool = typer.Option(False, "--json", help="Print JSON instead of text.")) -> None:
    """List every policy with its parameters, defaults, bounds and units."""
    from policies.registry import POLICIES

    described = [_describe(name, policy) for name, policy in POLICIES.items()]
    if as_json:
        typer.echo(json.dumps(described, indent=2))
        return
    for policy in described:
        typer.echo(f"{policy['name']}: {policy['summary']}")
        for parameter in policy["parameters"]:
            default = "derived" if parameter["default"] is None else str(parameter["default"])
            unit = f" {parameter['unit']}" if parameter["unit"] else ""
            typer.echo(f"  {parameter['name']} = {default}{unit}: {parameter['help']} ({parameter['allowed']})")


def _describe(name: str, policy: type[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": (inspect.getdoc(policy) or "").partition("\n\n")[0].replace("\n", " "),
        "parameters": [
            {
                "name": parameter.name,
                "type": parameter.kind.__name__,
                **{name: getattr(parameter, name) for name in ("default", "low", "high", "unit", "choices")},
                "allowed": parameter.allowed,
                "help": parameter.help,
            }
            for parameter in policy.PARAMETERS
        ],
    }
