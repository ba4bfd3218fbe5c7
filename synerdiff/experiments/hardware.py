"""The hardware as an engine of ``experiments.run``: it serves the run that the simulator predicts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiler.machine import device_name, kernels, software
from real_runner.account import LaneHung
from real_runner.adapters.beside import serve_under_torchrun
from real_runner.adapters.serving import Folders, require_files
from real_runner.adapters.start import open_serving
from real_runner.engine import RealRun, run_real
from real_runner.hardware import Hardware, open_hardware
from real_runner.pictures import PictureFolder
from synerdiff.config.cluster import Cluster, cluster_of
from synerdiff.core import NS_PER_S, InputError
from synerdiff.diffusion.execution import other_execution
from synerdiff.experiments.run import OnProgress, Prepared, Served
from synerdiff.profile.tables import Profile


@dataclass
class HardwareEngine:
    """Opens a model on a device and serves a prepared run with it, all lanes on one GPU; leaving it closes them."""

    device: str
    model: str | None = None
    """None: the profile's."""
    dtype: str | None = None
    scheduler: str | None = None
    loras: Path | None = None
    controlnets: Path | None = None
    controlnet_images: Path | None = None
    """Folders of what requests ask for."""
    images: Path | None = None
    """Folder for the images."""
    watchdog_s: float = 60.0
    execution: str | None = None
    """None: the profile's, or the device's own."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends the run early."""
    error: Exception | None = None
    """What ended the last run early: a broken contract or a hung lane."""
    opened: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> HardwareEngine:
        return self

    def __exit__(self, *raised: Any) -> None:
        self.opened.close()

    @property
    def hung(self) -> bool:
        """A lane does not come back."""
        return isinstance(self.error, LaneHung)

    def require(self, prepared: Prepared) -> str:
        """The model; InputError for what one machine with one GPU cannot run."""
        if set(prepared.spec.decode_gpus) != {0}:
            gpus = ",".join(str(gpu) for gpu in prepared.spec.decode_gpus)
            raise InputError(f"--decode-gpus {gpus}: a run uses one GPU, so every decode lane is on GPU 0.")
        model = self.model or prepared.profile.head.model
        if not model:
            name = prepared.profile.name
            raise InputError(f"profile '{name}' does not say for which model it was made; give --model.")
        return model

    def __call__(self, prepared: Prepared, on_progress: OnProgress | None = None, /) -> Served:
        model = self.require(prepared)
        spec, requests, layout = prepared.spec, prepared.served, _layout(prepared)
        worker = layout.workers[0]
        folders = Folders(self.loras, self.controlnets, self.controlnet_images)
        device = f"cuda:{worker.denoise_gpu}" if self.device == "cuda" else self.device
        hardware = self.opened.enter_context(
            open_hardware(
                model,
                device,
                prepared.profile,
                decode_lanes=len(worker.lanes),
                dtype=self.dtype,
                scheduler=self.scheduler,
                check=lambda opened: require_files(requests, folders, opened),
                execution=self.execution,
            )
        )
        serving = None
        if spec.cluster is not None or any(request.loras or request.controlnets for request in requests):
            timeout_s = min(30.0, self.watchdog_s / 4)
            serving = self.opened.enter_context(open_serving(hardware, layout, requests, folders, timeout_s))
        on_image: Callable[..., Any] | None = None
        if self.images is not None:
            shared = {"software": "synerdiff", "model": model, "policy": spec.policy}
            shared |= {"scheduler": hardware.model.solver.scheduler_name, "weights": hardware.model.weights}
            on_image = self.opened.enter_context(PictureFolder(self.images, shared)).put
        run = run_real(
            requests,
            prepared.policy(),
            prepared.profile,
            hardware,
            budget=prepared.budget,
            max_concurrency=spec.max_concurrency,
            stop=self.stop,
            on_progress=on_progress,
            on_image=on_image,
            watchdog_s=self.watchdog_s,
            serving=serving,
        )
        self.error = run.error
        facts = {"decode_gpus": list(worker.lanes), **_facts(hardware, run, prepared.profile)}
        facts["cluster"] = None if serving is None else layout.model_dump(mode="json")
        return Served(run.result, None, facts)


def served_another_rank() -> bool:
    """Whether this process is another than the first under torchrun; it then has done its part."""
    if int(os.environ.get("RANK", "0")) and "TORCHELASTIC_RUN_ID" in os.environ:
        serve_under_torchrun()
        return True
    return False


def _layout(prepared: Prepared) -> Cluster:
    """The cluster's one worker; without a cluster a worker that does everything itself."""
    cluster = prepared.spec.cluster
    if cluster is not None:
        if cluster.stages is not None or cluster.profiles or any(worker.degree > 1 for worker in cluster.workers):
            raise InputError(
                "stages apart, profiles and degrees of a cluster are simulated only; run takes none of them."
            )
        return cluster
    return cluster_of({"workers": [{"denoise_gpu": 0, "decode_gpus": list(prepared.spec.decode_gpus)}]})


def _facts(hardware: Hardware, run: RealRun, profile: Profile) -> dict[str, Any]:
    """What only a run on hardware has, for the summary."""
    model = hardware.model
    return {
        "model": model.name,
        "weights": model.weights,
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": model.solver.scheduler_name,
        "software": software(),
        "execution": model.execution.kind,
        "levers": list(model.execution.levers),
        "not_as_measured": other_execution(profile, model.execution, model.device.type == "cuda"),
        "decision_lead_s": profile.overhead_ns("decision_lead") / NS_PER_S,
        **kernels(model.unet),
        "warm_up_s": hardware.warm_up_ns / NS_PER_S,
        "max_rows_at_end": run.max_rows,
        "dispatch": run.dispatch.summary(),
        "faults": [
            {"time_s": f.time_ns / NS_PER_S, "kind": f.kind, "samples": list(f.samples), "detail": f.detail}
            for f in run.faults
        ],
    }


def hardware_lines(run: Mapping[str, Any]) -> list[str]:
    """Dispatch, the sender and what went wrong, of the ``run`` part of a summary, for people."""

    def spread(name: str) -> str:
        values = run["dispatch"][name]
        if not values["count"]:
            return "-"
        return "  ".join(f"{key} {values[key + '_s'] * 1e3:.3g}" for key in ("p50", "p90", "p99", "max"))

    lines = [
        f"  lanes idle between pieces, ms: step  {spread('step_dispatch')}",
        f"                                chunk  {spread('chunk_dispatch')}",
        f"  deciding, ms                         {spread('decide')}",
        f"  sender behind its schedule, ms       {spread('sender_lag')}",
        f"  warm-up     {run['warm_up_s']:.3g} s, not part of any number",
        f"  weights     {run['weights']}",
    ]
    if run["decision_lead_s"]:
        lines.append(f"  lead        {run['decision_lead_s'] * 1e3:.3g} ms, of which deciding takes the above")
    if run["levers"] or run["execution"] == "compiled":
        lines.append(f"  execution   {run['execution']} ({', '.join(run['levers'])})")
    if run["not_as_measured"]:
        lines.append(f"  execution   {run['not_as_measured']}")
    faults = run["faults"]
    for fault in faults[:5]:
        who = f" ({', '.join(fault['samples'])})" if fault["samples"] else ""
        lines.append(f"  fault       {fault['time_s']:.3f} s: {fault['kind']}{who}: {fault['detail']}")
    if len(faults) > 5:
        lines.append(f"  fault       and {len(faults) - 5} more in summary.json")
    return lines
