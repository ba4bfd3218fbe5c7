"""What LoRAs and ControlNets cost on one device: a profile's optional table ``adapters.csv``.

One row per quantity and size: ``name, at, median, p10, p90, n``, all integers. ``at`` is what the quantity is measured
at: bytes of a file, rows of a step, or 1 for a size per row and 0 for a constant. The quantities and their units are in
``QUANTITIES`` and in ``docs/swiftdiffusion.md``. Measured points come back verbatim, sizes between two points are
linear between them, and anything outside raises.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from synerdiff.core import InputError
from synerdiff.files import read_rows, shown, write_rows
from synerdiff.profile.tables import Spread, interpolate

FILE = "adapters.csv"
COLUMNS = ("name", "at", "median", "p10", "p90", "n")
QUANTITIES = {
    "lora_read": ("bytes", "ns", "read a LoRA's file from storage into host memory"),
    "lora_copy": ("bytes", "ns", "copy it from the host to the GPU"),
    "lora_merge": ("bytes", "ns", "put it into the denoiser's weights"),
    "lora_merge_more": ("bytes", "ns", "what putting it in takes longer for each LoRA that the weights hold already"),
    "lora_restore": ("bytes", "ns", "take it out of the weights again"),
    "controlnet_load": ("bytes", "ns", "bring a ControlNet onto a GPU that does not hold it"),
    "controlnet_forward": ("rows", "ns", "one forward of a ControlNet"),
    "controlnet_forward_beside": ("rows", "ns", "the same in a service, beside the encoder of the step that asked"),
    "residual_add": ("rows", "ns", "add one ControlNet's residuals to the skip connections"),
    "denoise_encoder": ("rows", "ns", "the denoiser's encoder and mid block"),
    "denoise_encoder_beside": ("rows", "ns", "the same beside a ControlNet service"),
    "denoise_decoder": ("rows", "ns", "the denoiser's decoder"),
    "denoise_decoder_beside": ("rows", "ns", "the same after the residuals of a ControlNet service have come"),
    "denoise_forward_beside": ("rows", "ns", "encoder and decoder beside another forward of the denoiser, elsewhere"),
    "controlnet_bytes": ("constant", "bytes", "size of a ControlNet"),
    "latent_bytes": ("row", "bytes", "latent and timestep sent to a ControlNet service, per row"),
    "residual_bytes": ("row", "bytes", "residuals that a ControlNet sends back, per row"),
    "prediction_bytes": ("row", "bytes", "prediction that the other half of the guidance sends back, per row"),
    "link_bytes_per_s": ("constant", "bytes/s", "bandwidth between two GPUs, one direction"),
    "link_latency": ("constant", "ns", "start of a transfer between two GPUs"),
}
"""Name -> what ``at`` counts, unit of the values, meaning."""
OPTIONAL = ("lora_merge_more", "residual_add", "link_latency")
"""Taken as 0 when the table lacks them; a ``_beside`` as what it is beside nothing."""
_ZERO = Spread(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Adapters:
    """``tables``: name -> at -> median, p10, p90 and n. ``owner`` is the profile's name, for messages."""

    owner: str
    tables: Mapping[str, Mapping[int, Spread]]

    def spread(self, name: str, at: int) -> Spread:
        """The quantity at that size; InputError names it, the range that is known, and what was asked for."""
        table = self.tables.get(name)
        if table is None:
            if name in OPTIONAL:
                return _ZERO
            raise InputError(
                f"profile '{self.owner}': adapters.csv has no {name} ({QUANTITIES[name][2]}), which this run needs."
            )
        measured = table.get(at)
        if measured is not None:
            return measured
        points = sorted(table)
        if not points[0] <= at <= points[-1]:
            raise InputError(
                f"profile '{self.owner}': adapters.csv knows {name} from {points[0]} to {points[-1]} "
                f"{QUANTITIES[name][0]}; {at} were asked for."
            )
        place = bisect_left(points, at)
        low, high = points[place - 1], points[place]
        ends = zip(table[low][:3], table[high][:3], strict=True)
        return Spread._make([*(interpolate(x, y, at - low, high - low) for x, y in ends), 0])

    def ns(self, name: str, at: int) -> int:
        """The median at that size."""
        return self.spread(name, at).median

    def spread_beside(self, name: str, at: int) -> Spread:
        """The quantity while the other half of a ControlNet call runs; alone when only that is known."""
        beside = f"{name}_beside"
        return self.spread(beside if beside in self.tables else name, at)

    def forward_ns(self, at: int) -> int:
        """Encoder and decoder, one after the other."""
        return self.ns("denoise_encoder", at) + self.ns("denoise_decoder", at)

    def ns_beside(self, name: str, at: int) -> int:
        """Median of `spread_beside`, in ns."""
        return self.spread_beside(name, at).median

    def bytes_of(self, name: str, rows: int) -> int:
        """Bytes of so many rows."""
        return rows * self.spread(name, 1).median

    def constant(self, name: str) -> int:
        """Median of a time that depends on nothing."""
        return self.spread(name, 0).median


def load_adapters(folder: Path, owner: str | None = None) -> Adapters | None:
    """The table of a profile's folder, None when it has none; InputError names file, line and column."""
    path = folder / FILE
    if not path.exists():
        return None
    tables: dict[str, dict[int, Spread]] = {}
    for row in read_rows(path, COLUMNS, "profile table"):
        name = row.text("name")
        if name not in QUANTITIES:
            raise row.error("name", f"is {shown(repr(name))}; known are {', '.join(QUANTITIES)}")
        at, median, p10, p90, n = (row.integer(column) for column in COLUMNS[1:])
        expected = {"constant": 0, "row": 1}.get(QUANTITIES[name][0])
        if at != expected and (expected is not None or at < 1):
            raise row.error("at", f"is {at}; {name} takes {expected if expected is not None else 'at least 1'}")
        if not p10 <= median <= p90:
            raise row.error("median", f"is {median}, outside its own p10-p90 range {p10}-{p90}")
        table = tables.setdefault(name, {})
        if at in table:
            raise row.error(name, f"at {at} is given twice")
        table[at] = Spread(median, p10, p90, n)
    return Adapters(owner or folder.name, tables)


def write_adapters(folder: Path, adapters: Adapters) -> None:
    """Write ``adapters.csv`` into a profile's folder."""
    known = ((name, at, *s) for name in QUANTITIES for at, s in sorted(adapters.tables.get(name, {}).items()))
    write_rows(folder / FILE, COLUMNS, known)
