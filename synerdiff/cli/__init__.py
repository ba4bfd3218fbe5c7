"""The commands, one file each. Modules here import nothing heavy at their top: ``synerdiff --help`` reads them all."""
