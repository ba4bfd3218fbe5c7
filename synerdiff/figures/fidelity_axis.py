"""One axis for SSIM in every figure: logarithmic in 1 - SSIM and reversed, so that further on is closer to full."""

from __future__ import annotations

from matplotlib.axes import Axes

LEAST_ERROR = 1e-4
SSIM_NOTE = f"SSIM against full guidance, same seeds; 1 is drawn at {1 - LEAST_ERROR:g}."
_TICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def ssim_error(ssim: float) -> float:
    """Where an SSIM stands on the axis: its distance from 1, at least ``LEAST_ERROR``."""
    return max(1 - ssim, LEAST_ERROR)


def ssim_on_x(axis: Axes) -> None:
    """Call it once the data are drawn."""
    axis.set_xscale("log")
    ticks, far, near = _range(axis.get_xlim())
    # Labels of neighbouring ticks would run into each other.
    axis.set_xticks(ticks, _labels(ticks), rotation=60)
    axis.set_xlim(far, near)
    axis.minorticks_off()
    axis.set_xlabel("SSIM against full guidance")


def ssim_on_y(axis: Axes) -> None:
    """Call it once the data are drawn."""
    axis.set_yscale("log")
    ticks, far, near = _range(axis.get_ylim())
    axis.set_yticks(ticks, _labels(ticks))
    axis.set_ylim(far, near)
    axis.minorticks_off()


def _range(limits: tuple[float, float]) -> tuple[list[float], float, float]:
    """(ticks within the limits, largest error, least error) of an axis; at least a factor of 2 is shown."""
    near, far = min(limits), max(limits)
    near, far = max(near, 0.7 * LEAST_ERROR), max(far, 1.4 * near, 1.4 * LEAST_ERROR)
    return [tick for tick in _TICKS if near <= tick <= far], far, near


def _labels(ticks: list[float]) -> list[str]:
    return [f"{1 - tick:.4g}" for tick in ticks]
