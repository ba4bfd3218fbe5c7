"""The fidelity of a sweep's runs, where the experiment asks for a floor on it: the third axis of its trade-off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from synerdiff.config.experiment import Experiment
from synerdiff.experiments.grid_run import Run
from synerdiff.experiments.one_run import fewer_steps
from synerdiff.experiments.sources import Source, arrivals
from synerdiff.fidelity.floor import image_ssim, require_same_images, run_ssim
from synerdiff.fidelity.table import FidelityTable, find_fidelity, read_fidelity
from synerdiff.profile.tables import Profile
from synerdiff.results.records import REQUEST_COLUMNS, read_table


def tables_of(
    experiment: Experiment, profiles: Mapping[str, tuple[Path, Profile]], base: Path
) -> dict[str, FidelityTable]:
    """Profile -> its fidelity table; empty for an experiment without a floor. InputError where there is none."""
    section = experiment.skip_budget
    if section.min_ssim is None:
        return {}
    given = None if section.fidelity is None else base / section.fidelity
    found = {}
    for name, (folder, profile) in profiles.items():
        model = profile.head.model
        found[name] = read_fidelity(find_fidelity(given, folder, model))
        require_same_images(found[name], model, profile.head.size)
    return found


def require_covered(table: FidelityTable, experiment: Experiment, sources: Mapping[str, Sequence[Source]]) -> None:
    """InputError when some policy runs fewer steps than the table compares with those that are asked for."""
    for scale in {entry.steps_scale for entry in experiment.policies if entry.steps_scale < 1}:
        for replicates in sources.values():
            for source in replicates:
                for steps, guidance in {(r.steps, r.guidance_scale) for r in arrivals(source).requests}:
                    image_ssim(table, "g" * fewer_steps(steps, scale), guidance, steps)


def ssim_of(run: Run, table: FidelityTable) -> float:
    """The mean SSIM of a finished run's images against full guidance in the steps that were asked for."""
    frame = read_table(run.path, REQUEST_COLUMNS)[0].select(["request_id", "modes", "guidance_scale"])
    asked = {request.request_id: request.steps for request in arrivals(run.source).requests}

    def images() -> Iterator[tuple[str, float, int]]:
        for row in frame.to_pylist():
            yield row["modes"], row["guidance_scale"], asked[row["request_id"]]

    return run_ssim(table, images())
