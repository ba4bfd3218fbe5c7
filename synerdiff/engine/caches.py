"""What a worker keeps of the files it has seen: least recently used, or least frequently used, goes first."""

from __future__ import annotations

from collections import OrderedDict


class Cache:
    """Names and their sizes, up to ``capacity`` in the same unit; a file larger than that is not kept.

    ``lru``: the name that was used longest ago goes first. ``lfu``: the one used least often since it came in; ties
    go to the one used longest ago. What has left is forgotten, its count too.
    """

    __slots__ = ("_sizes", "_uses", "capacity", "free", "rule")

    def __init__(self, capacity: int, rule: str = "lru") -> None:
        self.capacity = self.free = capacity
        self.rule = rule
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._uses: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    @property
    def names(self) -> set[str]:
        return set(self._sizes)

    def use(self, name: str) -> bool:
        """Whether it is there; if so this counts as a use."""
        if name not in self._sizes:
            return False
        self._sizes.move_to_end(name)
        self._uses[name] += 1
        return True

    def put(self, name: str, size: int = 1) -> None:
        """Take in a name that is not there (its first use), in place of as many as it needs."""
        if size > self.capacity:
            return
        while self.free < size:
            victim = next(iter(self._sizes)) if self.rule == "lru" else min(self._sizes, key=self._uses.__getitem__)
            self.free += self._sizes.pop(victim)
            del self._uses[victim]
        self.free -= size
        self._sizes[name] = size
        self._uses[name] = 1
