"""``python -m synerdiff.cli``: the command without its script."""

import sys

from synerdiff.cli import main

sys.exit(main())
