"""What a measurement was made on: device, software, code. Read only; nothing on the machine is changed."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from synerdiff.core import InputError
from synerdiff.device.lanes import available_cores
from synerdiff.files import install_hint

ROOT = Path(__file__).resolve().parent.parent
MEASURED_CODE = ("profiler/*.py", "synerdiff/device", "synerdiff/diffusion", "synerdiff/profile")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU, as its driver or kernel gives it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


def cpu_name() -> str:
    """The model name of the first core (Linux), else what Python knows."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """Versions of Python, torch, diffusers and, on a GPU build, CUDA: what times may depend on."""
    import diffusers

    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions["diffusers"] = diffusers.__version__
    return versions | ({} if torch.version.cuda is None else {"cuda": str(torch.version.cuda)})


def kernels(denoiser: torch.nn.Module) -> dict[str, Any]:
    """What decides which kernels run, as the levers left it: memory format, attention, and torch's switches."""
    convolutions = [weight for weight in denoiser.parameters() if weight.dim() == 4 and min(weight.shape[1:]) > 1]
    last = sum(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    processors = {type(one).__name__ for one in getattr(denoiser, "attn_processors", {}).values()}
    allowed: Any = torch.backends.cuda
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    sdpa = [kind for kind in kinds if getattr(allowed, f"{kind}_sdp_enabled")()]
    return {
        "memory_format": "channels_last" if convolutions and last == len(convolutions) else "contiguous",
        "attention": {"processors": sorted(processors), "sdpa_allowed": sdpa},
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def host() -> dict[str, Any]:
    """The processor, how much of it is ours, and how busy it was when asked (1-minute load average)."""
    busy = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"processor": cpu_name(), "usable_cores": len(available_cores()), "load_average_at_start": busy}


def code_version() -> str | None:
    """The checkout's commit, with ``+changes`` when the measuring code differs from it.

    Outside a checkout what SYNERDIFF_COMMIT says: a copy that travelled without ``.git``. None without either.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("SYNERDIFF_COMMIT") or None
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *MEASURED_CODE)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


class GpuWatch:
    """Clocks, power, temperature and throttle reasons of one GPU through NVML, read whenever ``look`` is called."""

    def __init__(self, device: torch.device) -> None:
        self._readings: list[dict[str, int]] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            name = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._nvml: Any = pynvml
            self.driver = str(pynvml.nvmlSystemGetDriverVersion())
        except ModuleNotFoundError:
            raise InputError(
                "Profiling a GPU logs its clocks with nvidia-ml-py, which is missing; install it with: "
                f"{install_hint('hardware')}"
            ) from None
        except pynvml.NVMLError as error:
            # Containers may hide NVML; the times are still good, and the profile says that clocks are unknown.
            self._nvml, self.driver = None, f"unknown ({error})"

    def look(self) -> None:
        """Read clocks (MHz), power (mW), temperature and throttle reasons once; a GPU that hides one leaves it out."""
        if self._nvml is None:
            return
        nvml, handle = self._nvml, self._handle
        readings: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_mw": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        }
        reading = {}
        for name, read in readings.items():
            try:
                reading[name] = int(read())
            except nvml.NVMLError:
                continue
        self._readings.append(reading)

    def summary(self) -> dict[str, Any]:
        """Least, median and largest of each reading, and every throttle reason with how often it was read."""
        summary: dict[str, Any] = {"looks": len(self._readings)}
        for name in ("sm_mhz", "memory_mhz", "power_mw", "temperature_c"):
            values = sorted(reading[name] for reading in self._readings if name in reading)
            if values:
                summary[name] = {"least": values[0], "median": values[len(values) // 2], "largest": values[-1]}
        if self._nvml is not None:
            summary["throttled"] = throttle_counts([reading.get("throttle_reasons", 0) for reading in self._readings])
        return summary


THROTTLE_REASONS = {
    0x2: "application clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clock setting",
}
"""Bits of nvmlClocksThrottleReasons (NVML API reference); bit 0x1, an idle GPU, is no reason."""


def throttle_counts(masks: list[int]) -> dict[str, int]:
    """Reason -> in how many of these NVML bit masks it is set; reasons that never occur are left out."""
    counts = {name: sum(bool(mask & bit) for mask in masks) for bit, name in THROTTLE_REASONS.items()}
    return {name: count for name, count in counts.items() if count}
