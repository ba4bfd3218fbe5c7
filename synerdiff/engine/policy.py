"""The one wrapper around every call of a policy, in both engines.

Whatever a policy raises, exits with or returns of a wrong type becomes one ContractError that names policy, hook and
time, with the user's own frames and no others. An InputError (a parameter that does not fit the profile, say) passes.

A user's policy is given copies of worker and profile, so what it writes to them changes no engine's results and no
later run's; that it has written is an error all the same, for its author would take it for an effect.
"""

from __future__ import annotations

import sysconfig
import traceback
from dataclasses import fields, replace
from pathlib import Path

from policies.base import Policy
from synerdiff.core import NS_PER_S, ContractError, Decision, InputError, View, WorkerInfo
from synerdiff.engine.worker import short
from synerdiff.files import shown
from synerdiff.profile.tables import Profile

_ROOT = Path(__file__).resolve().parent.parent.parent
_FOREIGN = tuple(
    str(folder)
    for folder in (
        *(_ROOT / package for package in ("synerdiff", "policies", "simulator", "real_runner")),
        *(Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")),
    )
)
"""Folders whose frames are not the user's."""
_MOST_FRAMES = 6


class PolicyCalls:
    """A policy as engines call it. ``chunking`` is known, and fixed, after `reset`."""

    __slots__ = ("_lent", "_policy", "chunking", "foreign", "name")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.name = str(getattr(policy, "NAME", "") or type(policy).__name__)
        self.chunking = "whole"
        self.foreign = not _ours(policy)
        """A user's policy, not one of ours."""
        self._lent: tuple[tuple[str, object, object], ...] = ()
        """What such a policy was given at reset: its name in a sentence, the copy, the original."""

    def reset(self, worker: WorkerInfo, profile: Profile) -> None:
        """Raises ContractError, and InputError as the policy does."""
        given = (replace(worker), profile.lent()) if self.foreign else (worker, profile)
        self._lent = (("worker", given[0], worker), ("profile", given[1], profile)) if self.foreign else ()
        try:
            self._policy.reset(*given)
            chunking = getattr(self._policy, "chunking", "whole")
        except InputError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise ContractError(f"policy '{self.name}': {_failure('reset', error)}.") from None
        if type(chunking) is not str or chunking not in profile.chunks:
            raise ContractError(
                f"policy '{self.name}': after reset its chunking is {short(chunking)}; profile '{profile.name}' has "
                f"{', '.join(profile.chunks)}."
            )
        self.chunking = chunking
        if (written := self._written()) is not None:
            raise ContractError(f"policy '{self.name}': reset wrote {written}, which it may only read.")

    def decide(self, view: View) -> Decision:
        """Raises ContractError; what the fields hold is checked when the decision is applied."""
        try:
            decision = self._policy.decide(view)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.error(view.now_ns, _failure("decide", error)) from None
        if type(decision) is not Decision:
            raise self.error(view.now_ns, f"decide returned {short(decision)}; a Decision is needed")
        return decision

    def require_unwritten(self, now_ns: int) -> None:
        """ContractError when decisions have written to what reset was given; called before records are made."""
        if (written := self._written()) is not None:
            raise self.error(now_ns, f"decide wrote {written}, which it may only read")

    def _written(self) -> str | None:
        for name, copy, original in self._lent:
            try:
                if copy == original:
                    continue
                compared = [one.name for one in fields(original) if one.compare]  # type: ignore[arg-type]
                field = next(name for name in compared if getattr(copy, name) != getattr(original, name))
            except Exception as error:  # what was written may raise when it is compared
                return f"something ({type(error).__name__}) to its {name}"
            return f"{field} of its {name}"
        return None

    def unreadable(self, now_ns: int, error: Exception) -> ContractError:
        """The error that an element of a decision is not what it must be."""
        return self.error(now_ns, f"its decision cannot be read ({error})")

    def error(self, now_ns: int, reason: str) -> ContractError:
        """The error that the policy broke the contract at that time."""
        return ContractError(f"policy '{self.name}' at {now_ns / NS_PER_S:.9f} s: {reason}.")


def _ours(policy: object) -> bool:
    """Whether the policy is one of ours, and what it wraps too."""
    own = type(policy).__module__.startswith(("policies.", "synerdiff."))
    return own and (not hasattr(policy, "inner") or _ours(policy.inner))


def _failure(hook: str, error: BaseException) -> str:
    """What a hook raised and where, as part of a sentence."""
    # The first frame is the wrapper's own.
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if not frame.filename.startswith(_FOREIGN)] or frames
    named = [f"{frame.name} in {Path(frame.filename).name}, line {frame.lineno}" for frame in own]
    places = ", ".join(named if len(named) <= _MOST_FRAMES else [*named[: _MOST_FRAMES - 1], "...", named[-1]])
    try:
        text = str(error).strip().splitlines()
    except Exception:  # the user's own class may raise here too
        text = []
    said = f"{type(error).__name__}{f' ({shown(text[0], 200)})' if text else ''}"
    return f"{hook} raised {said}{f' [{places}]' if places else ''}"
