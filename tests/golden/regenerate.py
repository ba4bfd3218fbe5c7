"""``python -m tests.golden.regenerate TABLE ...`` pins the named tables anew; without names it refuses."""

from __future__ import annotations

import sys

from tests.golden.pins import differences, known_values, pinned, write
from tests.golden.tables import TABLES


def main(names: list[str]) -> int:
    if not names or not set(names) <= TABLES.keys():
        print(f"Name the tables whose values are meant to change: {', '.join(TABLES)}.", file=sys.stderr)
        return 2
    now = {name: pinned(TABLES[name]()) for name in names}
    for name in names:
        for line in differences(name, now[name]) if name in known_values() else [f"{name}: new"]:
            print(line)
    write(now)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
