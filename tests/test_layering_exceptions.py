"""What keeps a rule by now leaves its list of exceptions in ``test_layering.py``; this file goes with the last one."""

from __future__ import annotations

import tests.test_layering as rules


def test_what_keeps_a_rule_is_no_exception_any_more() -> None:
    late = {name for name, tree in rules.TREES.items() if rules.late_imports(name, tree)}
    commands = {name for name, tree in rules.TREES.items() if rules.most_imports(tree) > 1}
    assert late >= rules.LATE
    assert commands >= rules.COMMANDS
    assert rules.classes_twice(rules.TREES).keys() >= rules.TWICE
    assert rules.circles(rules.TREES) >= rules.CIRCLES
