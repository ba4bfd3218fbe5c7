"""The command line: a table of commands, and what every one of them does with an error.

Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted. An error is one plain sentence on standard error.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import typer
import typer.core
import typer.main

from synerdiff import __version__
from synerdiff.core import ContractError, InputError
from synerdiff.files import MOST, PACKAGES, install_hint, number, shown, whole_number

GROUPS = {
    "Simulate": ("simulate", "sweep", "capacity", "tune", "compare", "schema", "report"),
    "Inputs": ("profile", "estimate", "trace", "policies"),
    "Hardware": ("run", "validate"),
    "Studies": ("fidelity", "scorecard"),
}
"""Group -> commands: ``synerdiff.cli.NAME`` has the function NAME, or the typer app NAME_app."""
COMMANDS = [name for group in GROUPS.values() for name in group]
EXAMPLES = {
    "Simulate": "synerdiff simulate --profile digits-cpu --trace t.csv --policy synerdiff --out out",
    "Inputs": "synerdiff trace generate poisson --requests 200 --rate 2 --out t.csv",
    "Hardware": "synerdiff run --profile digits-cpu --trace t.csv --policy synerdiff --out real",
    "Studies": "synerdiff fidelity --model digits --out fidelity",
}

_OF_HARDWARE = "torch diffusers transformers peft safetensors PIL pynvml sklearn torchmetrics"
EXTRAS = {**dict.fromkeys(_OF_HARDWARE.split(), "hardware"), "ray": "cluster", "optuna": "tune"}
"""Library -> the extra that installs it."""

DEBUG = "--debug"
_MOST_SEED = 2**64 - 1
"""The largest whole number that any option takes: a seed of MLPerf's LoadGen. Most take far less."""

_PLAIN: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "add_completion": False}
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Commands(typer.core.TyperGroup):
    """Finds a command in the table when it is asked for, so that one command never imports another's module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return COMMANDS

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name.startswith("-"):
            return None
        if cmd_name not in COMMANDS:
            raise InputError(f"there is no command '{cmd_name}'; the commands are {', '.join(COMMANDS)}.")
        module = importlib.import_module(f"synerdiff.cli.{cmd_name}")
        target = getattr(module, f"{cmd_name}_app", None) or getattr(module, cmd_name)
        if not isinstance(target, typer.Typer):
            single = typer.Typer(**_PLAIN)
            single.command(cmd_name)(target)
            target = single
        target.rich_markup_mode = None
        command = typer.main.get_command(target)
        command.name = cmd_name
        _read_numbers_plainly(command)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command with its whole first sentence, in groups; a line that is too long goes on below."""
        for group, commands in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name, _first_sentence(self.get_command(ctx, name).help)) for name in commands])
                formatter.write(f"  $ {EXAMPLES[group]}\n")


def _read_numbers_plainly(command: Any) -> None:
    """Numbers of every option are read as those of files are: no 1_0, no other digits, always one kind of sentence."""
    for below in getattr(command, "commands", {}).values():
        _read_numbers_plainly(below)
    for parameter in command.params:
        kinds = {parameter.type_descriptor.annotation, *get_args(parameter.type_descriptor.annotation)}
        read: Any = _whole_number if int in kinds else number if float in kinds else None
        if read is not None:
            parameter.process_value = _checked(parameter.opts[0], read, parameter.process_value)


def _whole_number(text: str) -> int:
    most = _MOST_SEED if text.strip().lstrip("+-").isdigit() else MOST  # what is no number is told no bounds
    return whole_number(text, -most, most)


def _checked(option: str, read: Callable[[str], object], then: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def process(context: Any, value: Any) -> Any:
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and text.lstrip("+-") not in ("nan", "inf"):  # whose bounds refuse these
                try:
                    read(text)
                except ValueError as error:
                    raise InputError(f"{option} {error}.") from None
        return then(context, value)

    return process


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


app = typer.Typer(cls=_Commands, **_PLAIN)


@app.callback(invoke_without_command=True)
def synerdiff(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and leave."),
    debug: bool = typer.Option(False, DEBUG, help="Show where an unexpected error arose."),
) -> None:
    """Profile a GPU once, replay arrival traces through scheduling policies, and check the prediction on hardware."""
    if version:
        typer.echo(f"synerdiff {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; whatever goes wrong is one sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = given[:1] == [DEBUG]
    try:
        _require_own_packages()
        code = app(args=given, prog_name="synerdiff", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if code == 130:  # typer turns an interrupt into this code, and says nothing
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", 130)
    except BrokenPipeError:  # the reader left (``| head``)
        _drop_output()
        return 0
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # typer's own way
            _drop_output()
            return 0
        if debug:
            traceback.print_exc()
        return _fail(*_told(error))


def _told(error: BaseException) -> tuple[str, int]:
    """An error as a sentence, and the exit code."""
    match error:
        case InputError():
            return str(error), 2
        case ContractError():
            return str(error), 1
        case _ if isinstance(error, _USAGE_ERROR):
            return f"{error.format_message().rstrip('.')}.", 2
        case ModuleNotFoundError() if (library := (error.name or "").partition(".")[0]) in EXTRAS:
            return f"this needs the library {library}; install it with: {install_hint(EXTRAS[library])}", 2
        case OSError() if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
            _drop_output()
            return f"the output cannot be written ({error.strerror}).", 2
        case OSError() if error.filename is not None:
            return f"{shown(error.filename)}: {error.strerror or error}.", 2
    problem = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"synerdiff met an error that it does not expect ({problem}); synerdiff {DEBUG} COMMAND shows where.", 1


def _drop_output() -> None:
    """Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    if sys.stderr is not None:
        print(" ".join(message.split()), file=sys.stderr)
    return code
