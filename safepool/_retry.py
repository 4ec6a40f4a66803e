"""Asks tenacity whether and when to try again; never sleeps.

Runs on a thread of its own (``_side``): predicates and waits are the user's code, and randomness
(jitter) must not be in the core.  The core learns the answer as an event.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tenacity

from .policy import Retry

LONGEST_S = 365 * 86400.0  # a wait of "for ever" is a year


class Verdict(NamedTuple):
    """Another attempt after ``delay_s`` seconds, or (None) no more; ``error`` then replaces the outcome."""

    delay_s: float | None
    error: BaseException | None = None


class Judge:
    """The retry policy of one task: tenacity's own objects, driven one outcome at a time."""

    def __init__(self, policy: Retry | tenacity.Retrying, began: float) -> None:
        self._retrying = _as_retrying(policy) if isinstance(policy, Retry) else policy.copy()
        self._state = tenacity.RetryCallState(self._retrying, None, (), {})
        self._state.start_time = began

    def after_error(self, error: BaseException, cause: str, now: float) -> Verdict:
        """The attempt ended with ``error``; ``cause`` is "error", "timeout" or "death"."""
        return self._ask(error, None, cause, now)

    def after_result(self, result: Any, now: float) -> Verdict:
        """The attempt returned; only a tenacity predicate on results can want another one."""
        return self._ask(None, result, "result", now)

    def _ask(self, error: BaseException | None, result: Any, cause: str, now: float) -> Verdict:
        outcome = tenacity.Future(self._state.attempt_number)
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)
        self._state.outcome, self._state.outcome_timestamp = outcome, now
        self._state.kwargs = {"cause": cause}
        # Its statistics belong to one thread, and ours may have been replaced since the last attempt.
        if "idle_for" not in self._retrying.statistics:
            self._retrying.begin()
        try:
            do = self._retrying.iter(self._state)
        except BaseException as raised:
            # The task's own error, or RetryError around it: the outcome stands as it is.
            stands = raised is error or (error is not None and isinstance(raised, tenacity.RetryError))
            return Verdict(None, None if stands else raised)
        if not isinstance(do, tenacity.DoSleep):
            return Verdict(None)
        self._state.prepare_for_next_attempt()
        return Verdict(min(max(0.0, float(do)), LONGEST_S))


def _as_retrying(policy: Retry) -> tenacity.Retrying:
    wait = policy.wait if callable(policy.wait) else tenacity.wait_fixed(policy.wait)
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(policy.attempts),
        wait=wait,
        retry=lambda state: _is_worth_it(policy, state),
        reraise=True,
    )


def _is_worth_it(policy: Retry, state: tenacity.RetryCallState) -> bool:
    cause = state.kwargs["cause"]
    if cause not in policy.on:
        return False
    if cause != "error":
        return True
    assert state.outcome is not None
    error = state.outcome.exception()
    if isinstance(policy.errors, (type, tuple)):
        return isinstance(error, policy.errors)
    return bool(policy.errors(error))  # type: ignore[arg-type]
