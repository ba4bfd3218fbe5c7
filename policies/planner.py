"""The three-dimensional dynamic program that plans which chunk runs beside which step, with or without guidance.

State f[j][i][k]: least time elapsed after j steps, with i chunks done and k of the steps skipped. In each step the next
m >= 0 chunks run beside it, and either all samples that may skip guidance at that step do, or none.

- Chunks that fit, sum(progress) <= T: the step takes T + sum(lost). One chunk that does not fit is priced as one step
  of its wall time (never less than T), though the next step may begin meanwhile. ``decode_costs`` has these terms.
- T is that of the batch's own rows; they stay the same over the horizon, less one per skipping sample.
- Feasible: j * T_full + credit >= theta * f after every step j, exact in integers.
- Least objective: end of the last planned chunk + penalty * k.

Times are ns, theta is ppm. A plan that has more chunks done in no more time with no more skips dominates; that and a
bound on the time that the missing chunks take at least keep a plan to a fraction of a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from policies.decode_costs import DecodeCosts
from synerdiff.core import PPM

Action = tuple[int, bool]
"""(chunks beside this step, whether eligible samples skip guidance in it)."""


class DecodePlan(NamedTuple):
    """A feasible plan: its actions until the last chunk, and what it costs."""

    actions: tuple[Action, ...]
    objective_ns: int
    elapsed_ns: int
    skips: int


_Node: TypeAlias = "tuple[int, int, _Node | None, Action]"
"""A reached state: time elapsed, skips, the state before, the action from there. Plain tuples: thousands are built."""

_Move = tuple[int, int, int]
"""(chunks done after it, duration of the step, end of its last chunk counted from its begin)."""


class Planner:
    """Plans for one chunking on one profile. ``horizon``: most steps that a plan spans."""

    def __init__(self, costs: DecodeCosts, horizon: int, penalty_ns: int) -> None:
        self._costs = costs
        self._horizon = horizon
        self._penalty_ns = penalty_ns
        self._moves: dict[tuple[int, int, int], list[list[_Move]]] = {}
        self._at_once: dict[tuple[int, int, int], int] = {}

    def at_once_ns(self, rows: int, first: int, images: int) -> int:
        """How long a fully guided step with all pending chunks beside it takes, -1 when another plan may be better.

        It is the best plan, when feasible, if the chunks fit and no number of skipping samples shortens them by more
        than the penalty: this spares most plans.
        """
        key = (rows, first, images)
        end_ns = self._at_once.get(key)
        if end_ns is None:
            end_ns = self._at_once[key] = self._find_at_once(rows, first, images)
        return end_ns

    def _find_at_once(self, rows: int, first: int, images: int) -> int:
        chunks = self._chunks(first, images)
        position, duration_ns, end_ns = self._moves_of(rows, first, images)[0][0]
        if position < len(chunks):
            return -1
        for fewer in range((rows + 1) // 2, rows):
            wall = self._costs.beside(fewer).wall
            if sum([wall[chunk] for chunk in chunks]) + self._penalty_ns < end_ns:
                return -1
        return duration_ns

    def _chunks(self, first: int, images: int) -> list[int]:
        return [*range(first, self._costs.count), *(list(range(self._costs.count)) * (images - 1))]

    def plan(
        self,
        rows: int,
        eligible: Sequence[int],
        first: int,
        images: int,
        theta_ppm: int,
        credit_ns: int,
        skips: int,
    ) -> DecodePlan | None:
        """The best plan, None when none is feasible within the horizon.

        ``rows``: of the batch with full guidance. ``eligible``: samples that may skip, per step of the horizon.
        ``first``: next chunk of the first pending image; ``images``: pending images, planned one after the other.
        ``skips``: most steps that may be skipped.
        """
        step_ns = self._costs.step_ns(rows)
        full = self._moves_of(rows, first, images)
        total = len(full)
        skipping = [self._skipping(rows, count, step_ns, first, images) for count in eligible[: self._horizon]]
        least_ns = self._least_left([full, *(moves for moves in skipping if moves is not None)])
        penalty_ns = self._penalty_ns
        best: tuple[int, int, int] | None = None
        best_node: _Node | None = None
        bound_ns = 1 << 62
        layer: list[tuple[int, _Node]] = [(0, (0, 0, None, (0, False)))]
        for j in range(self._horizon):
            limit_ns = ((j + 1) * step_ns + credit_ns) * PPM // theta_ppm
            moves_now = skipping[j] if j < len(skipping) else None
            reached: dict[tuple[int, int], _Node] = {}
            for done, node in layer:
                elapsed_ns, spent = node[0], node[1]
                for skip, moves in ((False, full), (True, moves_now)):
                    if moves is None or (skip and spent >= skips):
                        continue
                    after = spent + skip
                    for position, duration_ns, end_ns in moves[done]:
                        then_ns = elapsed_ns + duration_ns
                        if then_ns > limit_ns:
                            continue
                        if position == total:
                            outcome = (elapsed_ns + end_ns + penalty_ns * after, after, then_ns)
                            if best is None or outcome < best:
                                best, bound_ns = outcome, outcome[0]
                                best_node = (then_ns, after, node, (position - done, skip))
                            continue
                        if then_ns + least_ns[position] + penalty_ns * after >= bound_ns:
                            continue
                        key = (position, after)
                        other = reached.get(key)
                        if other is None or then_ns < other[0]:
                            reached[key] = (then_ns, after, node, (position - done, skip))
            layer = _undominated(reached)
            if not layer:
                break
        if best is None or best_node is None:
            return None
        return DecodePlan(_actions(best_node), best[0], best[2], best[1])

    def _skipping(self, rows: int, count: int, step_ns: int, first: int, images: int) -> list[list[_Move]] | None:
        """Moves of a step in which ``count`` samples skip; None when that makes the step no shorter."""
        if not count or self._costs.step_ns(rows - count) >= step_ns:
            return None
        return self._moves_of(rows - count, first, images)

    def _moves_of(self, rows: int, first: int, images: int) -> list[list[_Move]]:
        """For each number of chunks done: what one step of these rows can do, most chunks first."""
        key = (rows, first, images)
        moves = self._moves.get(key)
        if moves is None:
            moves = self._moves[key] = self._find_moves(rows, first, images)
        return moves

    def _find_moves(self, rows: int, first: int, images: int) -> list[list[_Move]]:
        costs = self._costs
        step_ns = costs.step_ns(rows)
        wall, progress, lost = costs.beside(rows)
        chunks = self._chunks(first, images)
        table = []
        for done in range(len(chunks)):
            moves: list[_Move] = [(done, step_ns, 0)]
            progress_ns = lost_ns = wall_ns = 0
            for position in range(done, len(chunks)):
                chunk = chunks[position]
                progress_ns += progress[chunk]
                lost_ns += lost[chunk]
                wall_ns += wall[chunk]
                if progress_ns > step_ns:
                    if position == done:
                        moves.append((done + 1, max(step_ns, wall_ns), wall_ns))
                    break
                moves.append((position + 1, step_ns + lost_ns, wall_ns))
            table.append(moves[::-1])
        return table

    @staticmethod
    def _least_left(tables: Sequence[list[list[_Move]]]) -> list[int]:
        """For each number of chunks done: the least time until the end of the last one."""
        total = len(tables[0])
        least = [0] * (total + 1)
        for done in range(total - 1, -1, -1):
            single = min(move[2] for table in tables for move in table[done] if move[0] == done + 1)
            least[done] = least[done + 1] + single
        return least


def _undominated(reached: dict[tuple[int, int], _Node]) -> list[tuple[int, _Node]]:
    """States that no other one beats or equals in chunks done, time and skips; most chunks first, then fewest skips."""
    layer: list[tuple[int, _Node]] = []
    least: list[tuple[int, int]] = []
    for done, skips in sorted(reached, key=lambda key: (-key[0], key[1])):
        node = reached[done, skips]
        elapsed_ns = node[0]
        for other_ns, other_skips in least:
            if other_ns <= elapsed_ns and other_skips <= skips:
                break
        else:
            layer.append((done, node))
            least.append((elapsed_ns, skips))
    return layer


def _actions(node: _Node) -> tuple[Action, ...]:
    actions = []
    at: _Node | None = node
    while at is not None and at[2] is not None:
        actions.append(at[3])
        at = at[2]
    return tuple(reversed(actions))
