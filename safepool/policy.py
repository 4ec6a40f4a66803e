"""What a user may ask for: frozen, validated once, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ._shapes import frozen, replace
from ._words import exact

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal

    import tenacity
    from tenacity.wait import wait_base

    Cause = Literal["error", "timeout", "death"]
    OnWorkerDeath = Literal["heal", "break"]
    OnLeftovers = Literal["kill", "report", "leave"]
    Isolation = Literal["namespace"] | None

CAUSES: tuple[Cause, ...] = ("error", "timeout", "death")
MAX_WINDOWS_WORKERS = 61


@frozen
class Retry:
    """When a failed task is worth another attempt.

    * ``attempts``: how often a task may run in all, the first time included.
    * ``on``: which causes count: ``"error"`` (the task raised), ``"timeout"``, ``"death"`` (its worker died).
    * ``errors``: exception classes, or a function of the exception, that make an ``"error"`` worth it.
    * ``deaths``: how many workers one task may take down; then it fails as ``PoisonTask``.
    * ``wait``: seconds between attempts, or a tenacity ``wait_*`` object.

    Raises ``TypeError`` or ``ValueError`` when it is made with something else.
    """

    attempts: int = 3
    on: tuple[Cause, ...] = CAUSES
    errors: type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool] = Exception
    deaths: int = 3
    wait: float | wait_base = 0.0

    def __post_init__(self) -> None:
        whole(self.attempts, "attempts", least=1)
        whole(self.deaths, "deaths", least=1)
        if isinstance(self.on, str) or not set(self.on) <= set(CAUSES):
            raise ValueError(f"on must be a tuple of {', '.join(map(repr, CAUSES))}; got {self.on!r}")
        classes = self.errors if isinstance(self.errors, tuple) else (self.errors,)
        if any(isinstance(e, type) and not issubclass(e, BaseException) for e in classes) or not (
            callable(self.errors) or all(isinstance(e, type) for e in classes)
        ):
            raise TypeError(f"errors must be exception classes or a function of the exception; got {self.errors!r}")
        if not callable(self.wait) and seconds(self.wait, "wait", zero=True) is None:
            raise ValueError("wait must be a finite number of seconds")


@frozen
class TaskOptions:
    """What one task may ask for.  Seconds are monotonic; ``None`` is "no limit".

    ``timeout`` bounds one attempt, from the moment its worker acknowledged the start; ``deadline``
    bounds everything from ``submit`` to the answer, all attempts and the queue included.
    """

    timeout: float | None = None
    deadline: float | None = None
    retry: Retry | tenacity.Retrying | None = None
    name: str | None = None

    def but(self, **changes: Any) -> TaskOptions:
        """The same options with some changed; every value is validated here.

        Raises ``TypeError`` for an unknown option or a value of the wrong type, ``ValueError`` for a
        value out of range.
        """
        for key, value in changes.items():
            if key not in TaskOptions.__match_args__:
                known = ", ".join(TaskOptions.__match_args__)
                raise TypeError(f"unknown option {key!r}; a task may have: {known}")
            if key in ("timeout", "deadline") and value is not None:
                changes[key] = seconds(value, key)
            elif key == "retry":
                changes[key] = as_retry(value)
            elif key == "name" and value is not None:
                if not isinstance(value, str):
                    raise TypeError(f"name must be a str or None; got {value!r}")
                changes[key] = exact(value)
        return replace(self, **changes)


@frozen
class PoolPolicy:
    """What the core needs to know about the pool.

    ``take_back``: unbegun tasks can be taken back; ``initializer``: its name, for messages; ``grace``: seconds from
    SIGTERM to SIGKILL for a worker whose task is stopped, 0 for SIGKILL at once; ``stall_timeout``: seconds without
    progress after which what runs is stopped.
    """

    max_workers: int
    max_tasks_per_child: int | None = None
    on_worker_death: OnWorkerDeath = "heal"
    start_all: bool = False
    take_back: bool = True
    initializer: str | None = None
    grace: float = 0.0
    stall_timeout: float | None = None

    def __post_init__(self) -> None:
        whole(self.max_workers, "max_workers", least=1)
        if self.max_tasks_per_child is not None:
            whole(self.max_tasks_per_child, "max_tasks_per_child", least=1)
        if self.on_worker_death not in ("heal", "break"):
            raise ValueError(f'on_worker_death must be "heal" or "break"; got {self.on_worker_death!r}')


@frozen
class LaunchPolicy:
    """How workers are started, and what becomes of what their tasks leave behind."""

    leftovers: OnLeftovers = "kill"
    isolation: Isolation = None
    preload: tuple[str, ...] | None = None
    stacks: bool = False

    def __post_init__(self) -> None:
        if self.leftovers not in ("kill", "report", "leave"):
            raise ValueError(f'leftovers must be "kill", "report" or "leave"; got {self.leftovers!r}')
        if self.isolation not in (None, "namespace"):
            raise ValueError(f'isolation must be "namespace" or None; got {self.isolation!r}')
        if not isinstance(self.stacks, bool):
            raise TypeError(f"stacks must be True or False; got {self.stacks!r}")


def as_preload(value: Any) -> tuple[str, ...] | None:
    """Names of modules, each once."""
    if value is None:
        return None
    names: list[Any] = [None] if isinstance(value, str) or not isinstance(value, Iterable) else [*dict.fromkeys(value)]
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"preload must be a sequence of module names; got {value!r}")
    return tuple(names)


def as_retry(value: Any) -> Retry | tenacity.Retrying | None:
    """``None``, a number of further attempts, a ``Retry`` or a tenacity ``Retrying``, as a policy."""
    if value is None or isinstance(value, Retry):
        return value
    if isinstance(value, bool):
        raise TypeError(f"retry must be a number of further attempts, a Retry or a tenacity.Retrying; got {value!r}")
    if isinstance(value, int):
        return Retry(attempts=1 + whole(value, "retry", least=0)) if value else None
    import tenacity

    if isinstance(value, tenacity.AsyncRetrying) or not isinstance(value, tenacity.Retrying):
        raise TypeError(f"retry must be a number of further attempts, a Retry or a tenacity.Retrying; got {value!r}")
    return value


def seconds(value: Any, name: str, *, zero: bool = False) -> float | None:
    """A length of time in seconds; infinity is "no limit".  Raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number of seconds; got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number of seconds; got {value!r}") from None
    if isinstance(value, str) or math.isnan(number):
        raise TypeError(f"{name} must be a number of seconds; got {value!r}")
    if number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} must be greater than 0; got {value!r}")
    return None if math.isinf(number) else number


def whole(value: Any, name: str, *, least: int) -> int:
    """A whole number of at least ``least``.  Raises ``TypeError`` or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}; got {value!r}")
    return value
