"""diffusers schedulers by short name or class name."""

from __future__ import annotations

import logging
from typing import Any

from synerdiff.core import InputError

SCHEDULERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpm++2m": "DPMSolverMultistepScheduler"}


def make_scheduler(class_name: str, config: Any) -> Any:
    """A diffusers scheduler by class name. Raises InputError when diffusers has none of that name."""
    import diffusers

    scheduler_class = getattr(diffusers, class_name, None)
    if not class_name.endswith("Scheduler") or not hasattr(scheduler_class, "from_config"):
        raise InputError(f"There is no scheduler {class_name}; use {', '.join(SCHEDULERS)} or a diffusers class name.")
    # Options of another scheduler's configuration that this one does not know are no news to the user.
    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return scheduler_class.from_config(config)  # type: ignore[union-attr]
    finally:
        logger.setLevel(level)
