"""The command line: a table of commands, and what every one of them does with an error.

Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted. An error is one plain sentence on standard error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
import typer.core
import typer.main

from synerdiff import __version__
from synerdiff.core import ContractError, InputError
from synerdiff.files import install_hint

COMMANDS = {
    "profile": "synerdiff.cli.profile:profile",
    "estimate": "synerdiff.cli.estimate:estimate",
    "trace": "synerdiff.cli.trace:trace_app",
    "policies": "synerdiff.cli.policies:policies",
    "simulate": "synerdiff.cli.simulate:simulate",
    "run": "synerdiff.cli.run:run",
    "validate": "synerdiff.cli.validate:validate",
    "sweep": "synerdiff.cli.sweep:sweep",
    "contest": "synerdiff.cli.contest:contest",
    "fidelity": "synerdiff.cli.fidelity:fidelity",
    "adapter-fidelity": "synerdiff.cli.adapter_fidelity:adapter_fidelity",
    "katz": "synerdiff.cli.katz:katz",
    "swift": "synerdiff.cli.swift:swift",
}
"""Command -> the function, or the typer app, that does it. Its module is imported when it is needed."""

EXTRAS = {
    "torch": "hardware",
    "diffusers": "hardware",
    "transformers": "hardware",
    "peft": "hardware",
    "safetensors": "hardware",
    "PIL": "hardware",
    "pynvml": "hardware",
    "sklearn": "hardware",
    "torchmetrics": "hardware",
    "ray": "cluster",
    "optuna": "tune",
}
"""Library -> the extra that installs it."""

PACKAGES = ("profiler", "simulator", "policies", "real_runner", "traces")
"""Our top-level packages with generic names; another distribution's package may shadow one."""

_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(typer.core.TyperGroup):
    """Finds a command in the table when it is asked for, so that one command never imports another's module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name.startswith("-"):
            return None
        if cmd_name not in COMMANDS:
            raise InputError(f"there is no command '{cmd_name}'; the commands are {', '.join(COMMANDS)}.")
        module, name = COMMANDS[cmd_name].split(":")
        found = getattr(importlib.import_module(module), name)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(**_PLAIN)
            single.command(cmd_name)(found)
            found = single
        found.rich_markup_mode = None
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(cls=_Commands, **_PLAIN)


@app.callback(invoke_without_command=True)
def synerdiff(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version and leave.")
) -> None:
    """Profile a GPU once, replay arrival traces through scheduling policies, and check the prediction on hardware."""
    if version:
        typer.echo(f"synerdiff {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        _require_own_packages()
        code = app(args=arguments, prog_name="synerdiff", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer turns an interrupt into this code, and says nothing
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error), 2)
    except ContractError as error:
        return _fail(str(error), 1)
    except _USAGE_ERROR as error:
        return _fail(error.format_message(), 2)
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        extra = EXTRAS[library]
        return _fail(f"this needs the library {library}; install it with: {install_hint(extra)}", 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", 130)
    except BrokenPipeError:
        # The reader left (``| head``). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _require_own_packages() -> None:
    """Packages with generic names can be shadowed by another distribution: say which, instead of failing oddly.

    Looks for the line ``SYNERDIFF = True`` in their source, because importing them would load what they need.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise InputError(f"the package '{name}' of synerdiff is missing; install synerdiff again.")
        place = spec.origin or next(iter(spec.submodule_search_locations or []), "an unknown place")
        source = Path(place).read_text(encoding="utf-8", errors="replace") if Path(place).is_file() else ""
        if "\nSYNERDIFF = True\n" not in source:
            raise InputError(
                f"the package '{name}' at {place} is not synerdiff's; install synerdiff in an environment of its own."
            )


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code
