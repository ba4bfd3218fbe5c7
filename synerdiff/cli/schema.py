"""``synerdiff schema``: the JSON schema of a file that people write."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    kind: Annotated[str, typer.Argument(help="experiment, capacity, tune, cluster or policy.")] = "experiment",
) -> None:
    """Print the JSON schema of an experiment file, for editors that complete and check YAML."""
    from synerdiff.config.kinds import schema_of

    typer.echo(json.dumps(schema_of(kind), indent=2))
