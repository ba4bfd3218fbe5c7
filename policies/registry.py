"""The policies by name, and how a user's own is found."""

from __future__ import annotations

import importlib
import inspect
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from policies.auto import Auto
from policies.base import Parameter, Policy, checked_parameters
from policies.batches import Dynamic, Static
from policies.continuous import Chunked, ContinuousParallel, ContinuousSerial, SkipCfg
from policies.edf import Edf
from policies.load_skip import LoadSkip
from policies.synerdiff import SynerDiff, SynerDiffFeedback
from synerdiff.core import InputError

POLICIES: dict[str, type[Any]] = {
    policy.NAME: policy
    for policy in (
        Static,
        Dynamic,
        ContinuousSerial,
        ContinuousParallel,
        Chunked,
        SkipCfg,
        SynerDiff,
        SynerDiffFeedback,
        LoadSkip,
        Edf,
        Auto,
    )
}


def policy_class(name: str, base_folder: Path | None = None) -> type[Any]:
    """The class behind a registered name or ``module:Class``.

    ``base_folder`` (where the YAML file lies, else the working folder) is appended to the import path, never put first.
    """
    if ":" not in name:
        if name not in POLICIES:
            raise InputError(
                f"there is no policy '{name}'; known are {', '.join(POLICIES)}, or module:Class of your own."
            )
        return POLICIES[name]
    module_name, _, class_name = name.partition(":")
    folder = str((base_folder or Path()).resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = f"it exits with {error}" if isinstance(error, SystemExit) else error
        raise InputError(f"policy '{name}': the module {module_name} cannot be imported ({what}).") from None
    named = getattr(module, class_name, None)
    if not inspect.isclass(named):
        raise InputError(f"policy '{name}': the module {module_name} has no class {class_name}.")
    for method in ("reset", "decide"):
        if not callable(getattr(named, method, None)):
            raise InputError(f"policy '{name}': the class {class_name} has no method {method}, so it is not a policy.")
    return named


def policy_parameters(name: str, base_folder: Path | None = None) -> tuple[Parameter, ...]:
    """The declared parameters of a policy; those of an undeclared class are its keyword arguments with a default."""
    policy = policy_class(name, base_folder)
    declared = getattr(policy, "PARAMETERS", None)
    if declared is not None:
        if not (isinstance(declared, tuple | list) and all(isinstance(entry, Parameter) for entry in declared)):
            raise InputError(f"policy '{name}': its PARAMETERS are {declared!r}; a tuple of Parameter is needed.")
        return tuple(declared)
    kinds = (bool, int, float, str)
    arguments = inspect.signature(policy).parameters.values()
    return tuple([Parameter(a.name, type(a.default), a.default) for a in arguments if type(a.default) in kinds])


def build_policy(name: str, parameters: dict[str, Any] | None = None, base_folder: Path | None = None) -> Policy:
    """A fresh policy object. Unknown names and parameters, wrong types and values are InputErrors."""
    kind = policy_class(name, base_folder)
    given = parameters or {}
    checked_parameters(name, policy_parameters(name, base_folder), given)
    try:
        policy: Policy = kind(**deepcopy(given))
        if not isinstance(getattr(policy, "chunking", None), str):
            policy.chunking = "whole"
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        what = f"it exits with {error}" if isinstance(error, SystemExit) else error
        raise InputError(f"policy '{name}' cannot be built with {given or 'no parameters'} ({what}).") from None
    return policy
