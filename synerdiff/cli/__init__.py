"""The commands, one file each. Modules here import nothing heavy at their top: ``synerdiff --help`` reads them all."""

from synerdiff.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
