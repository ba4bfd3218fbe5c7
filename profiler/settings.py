"""What to measure: the options of ``synerdiff profile``, checked, and the points that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

from synerdiff.core import InputError
from synerdiff.diffusion import DTYPES
from synerdiff.diffusion.execution import ModelExecution, choose_execution
from synerdiff.files import plain_digits, shown, sides_of

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
QUICK_ROWS = (1, 2, 4, 8, 16)
CORUN_ROWS = (1, 2, 4, 8, 16, 32)
QUICK_CORUN_ROWS = (1, 2, 8, 16)
CHUNKS = (4, 8)
QUICK_CHUNKS = (4,)
MOST_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """``rows``: the row buckets, rising. ``resolution``: (height, width) in pixels; None is the model's own.
    ``execution``: None is the device's own. ``others``: further resolutions; ``across``: pairs of a step of one and a
    chunk of another are measured too.
    """

    model: str
    device: str
    rows: tuple[int, ...]
    dtype: str | None = None
    resolution: tuple[int, int] | None = None
    quick: bool = False
    execution: ModelExecution | None = None
    others: tuple[tuple[int, int], ...] = ()
    across: bool = False

    @property
    def corun_rows(self) -> tuple[int, ...]:
        """Buckets at which co-run slowdowns are measured for every chunk: the least and the largest always."""
        wanted = QUICK_CORUN_ROWS if self.quick else CORUN_ROWS
        return tuple(rows for rows in self.rows if rows in wanted or rows in (self.rows[0], self.rows[-1]))

    @property
    def held_out_step_rows(self) -> tuple[int, ...]:
        """Rows that are padded to a bucket, three at most, spread over the range: the lookup's error is stated."""
        padded = [rows for rows in range(1, self.rows[-1]) if rows not in self.rows]
        middle = [rows for rows in (5, 10, 20) if rows in padded]
        return tuple(middle or padded[len(padded) // 2 : len(padded) // 2 + 1])

    @property
    def chunk_counts(self) -> tuple[int, ...]:
        """Counts of chunks for which a decode is cut."""
        return QUICK_CHUNKS if self.quick else CHUNKS


def make_settings(
    model: str,
    device: str,
    dtype: str | None = None,
    resolution: str | None = None,
    rows: str | None = None,
    quick: bool = False,
    execution: str | None = None,
    levers: str | None = None,
    across: bool = False,
) -> Settings:
    """Check the options' texts. Raises InputError, one sentence, for what is not allowed."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype is '{dtype}'; allowed are {', '.join(DTYPES)}.")
    chosen = _rows(rows) if rows is not None else QUICK_ROWS if quick else ROWS
    sizes = [] if resolution is None else [_sides(part.strip()) for part in resolution.split(",")]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--resolution {resolution}: a resolution is given twice.")
    if across and len(sizes) < 2:
        raise InputError("--across measures pairs of two resolutions; give several, --resolution 512x512,1024x1024.")
    how = choose_execution(execution, levers, device.startswith("cuda"))
    own = how if execution or levers is not None else None
    return Settings(model, device, chosen, dtype, sizes[0] if sizes else None, quick, own, tuple(sizes[1:]), across)


def _rows(text: str) -> tuple[int, ...]:
    buckets = [rows for part in text.split(",") if (rows := plain_digits(part.strip(), 1, MOST_ROWS))]
    if len(buckets) <= text.count(","):
        raise InputError(f"--rows {shown(text)}: whole numbers from 1 to {MOST_ROWS} are needed, for example 1,2,4,8.")
    if sorted(set(buckets)) != buckets:
        raise InputError(f"--rows {text}: the numbers must rise without repeats.")
    return tuple(buckets)


def _sides(text: str) -> tuple[int, int]:
    sides = sides_of(text.lower() if "x" in text.lower() else f"{text}x{text}", 1, 8192)
    if sides is None:
        raise InputError(f"--resolution {shown(text)}: pixels are needed, one side (512) or HEIGHTxWIDTH (512x768).")
    return sides


def command_line(settings: Settings, out: str) -> str:
    """The command that measures this."""
    words = ["synerdiff profile", f"--model {settings.model}", f"--device {settings.device}"]
    if settings.dtype is not None:
        words.append(f"--dtype {settings.dtype}")
    if settings.resolution is not None:
        sizes = (settings.resolution, *settings.others)
        words.append("--resolution " + ",".join("{}x{}".format(*size) for size in sizes))
    if settings.rows != (QUICK_ROWS if settings.quick else ROWS):
        words.append(f"--rows {','.join(map(str, settings.rows))}")
    if settings.across:
        words.append("--across")
    if settings.quick:
        words.append("--quick")
    if settings.execution is not None:
        words += settings.execution.options
    return " ".join([*words, f"--out {out}"])
