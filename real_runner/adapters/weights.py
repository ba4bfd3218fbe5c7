"""The LoRAs that the weights of a step hold: merged into the worker's denoiser and into its peer's, and restored."""

from __future__ import annotations

from collections.abc import Collection

from real_runner.adapters.peer import GuidancePeer
from real_runner.adapters.spans import Clock, Instant, Ledger
from synerdiff.core import LoraUse, SampleId
from synerdiff.diffusion.lora import LoraFile
from synerdiff.diffusion.merging import MergedWeights


class Weights:
    """Only the denoise lane calls it, between two forwards."""

    def __init__(
        self, merged: MergedWeights, gpu: int, clock: Clock, ledger: Ledger, second: GuidancePeer | None
    ) -> None:
        self.ledger = ledger
        self._merged, self._gpu, self._clock, self._second = merged, gpu, clock, second

    @property
    def held(self) -> list[LoraUse]:
        """The LoRAs that are merged, in that order."""
        return [LoraUse(file, scale) for file, scale in self._merged.held.items()]

    def merge(self, lora: LoraFile, scale: float, samples: tuple[SampleId, ...]) -> None:
        """Raises InputError, before any change, for a file that does not fit the model."""
        self._merged.check(lora)
        start = self._clock.now()
        if self._second is not None:
            self._second.merge(lora, scale, samples)
        self._merged.merge(lora, scale)
        self._ended("merge", start, samples)

    def restore(self, leaving: Collection[LoraUse], samples: tuple[SampleId, ...] = ()) -> None:
        """Take these out of the weights."""
        keep = [lora.file for lora in self.held if lora not in leaving]
        start = self._clock.now()
        if self._second is not None:
            self._second.restore(keep, samples)
        self._merged.restore(keep)
        self._ended("restore", start, samples)

    def _ended(self, kind: str, start: Instant, samples: tuple[SampleId, ...]) -> None:
        self.ledger.add(self._gpu, "denoise", kind, start, self._clock.now(), samples=samples)
        if self._second is not None:
            self._second.followed()
