"""The rules of adapters, once for both engines: the simulator prices what these say, the runner does it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from synerdiff.core import LoraUse, Phase, Sample
from synerdiff.engine.worker import Worker


class Restore(NamedTuple):
    """Take a LoRA out of the weights."""

    lora: LoraUse


class Wait(NamedTuple):
    """Wait until a LoRA's file is on the GPU."""

    lora: LoraUse


class Merge(NamedTuple):
    """Merge a LoRA into the weights."""

    lora: LoraUse


def plan_weights(
    held: Iterable[LoraUse], wanted: Sequence[LoraUse], ready: Callable[[str], bool], step_index: int, bound: int
) -> list[Restore | Wait | Merge]:
    """What makes the weights those of a step, in order: foreign LoRAs out, then each of its own in.

    ``held``: what the weights hold; ``ready``: whether a file is on the GPU; ``step_index``: the furthest of the
    step's samples. Until ``bound`` steps have been taken a step goes without a LoRA that is not ready (SwiftDiffusion's
    asynchronous loading), from then on it waits. Loading in the step's own turn is a bound of 0.
    """
    held = list(held)
    actions: list[Restore | Wait | Merge] = [Restore(lora) for lora in held if lora not in wanted]
    for lora in wanted:
        if lora in held:
            continue
        if not ready(lora.file):
            if step_index < bound:
                continue
            actions.append(Wait(lora))
        actions.append(Merge(lora))
    return actions


def idle_restores(held: Iterable[LoraUse], worker: Worker) -> list[LoraUse]:
    """What to take out of the weights now: nothing holds the denoise lane and no active sample asks for it."""
    if worker.denoise_held or worker.next_step is not None:
        return []
    wanted = {lora for sample in worker.active.values() for lora in sample.request.loras}
    return [lora for lora in held if lora not in wanted]


class LoraUsers:
    """Samples that need their LoRAs' files, from when they ask until they are denoised; a needed file stays."""

    def __init__(self) -> None:
        self._asking: dict[int, Sample] = {}

    def asking(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those of the samples that ask for their files now: they have LoRAs and have not asked before."""
        new = [sample for sample in samples if sample.request.loras and sample.id not in self._asking]
        self._asking.update((sample.id, sample) for sample in new)
        return new

    def leaving(self) -> list[Sample]:
        """Those that need their files no more."""
        over = [sample for sample in self._asking.values() if sample.phase is not Phase.ACTIVE]
        for sample in over:
            del self._asking[sample.id]
        return over

    def clear(self) -> list[Sample]:
        """All that are left, at the end of a run."""
        left = list(self._asking.values())
        self._asking.clear()
        return left


class Cache:
    """What a worker keeps of the files that it has had: names and sizes, up to ``capacity`` in the same unit.

    A file larger than that is not kept. ``lru``: the name that was used longest ago goes first. ``lfu``: the one used
    least often since it came in; ties go to the one used longest ago. What has left is forgotten, its count too.
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
        """What is in it."""
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
