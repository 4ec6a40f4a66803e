"""safepool: the process pool that Python programs can trust.

``from safepool import SafePoolExecutor as ProcessPoolExecutor``

Names are loaded when they are first used, so that ``import safepool`` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # and not typing's: that import would cost more than all of this
if TYPE_CHECKING:
    from typing import Any

    from ._os import CAPABILITIES as CAPABILITIES
    from .errors import Attempt as Attempt
    from .errors import PoisonTask as PoisonTask
    from .errors import PoolBroken as PoolBroken
    from .errors import PoolTerminated as PoolTerminated
    from .errors import ResultUnreadable as ResultUnreadable
    from .errors import Stalled as Stalled
    from .errors import TaskTimeout as TaskTimeout
    from .errors import TaskUnreadable as TaskUnreadable
    from .errors import Unfinished as Unfinished
    from .errors import WorkerDied as WorkerDied
    from .errors import WorkerStartError as WorkerStartError
    from .executor import SafePoolExecutor as SafePoolExecutor
    from .future import SafeFuture as SafeFuture
    from .joblib_backend import register_joblib as register_joblib
    from .leaving import Leftover as Leftover
    from .leaving import leave_running as leave_running
    from .patching import patch as patch
    from .policy import Retry as Retry
    from .telling import PoolEvent as PoolEvent
    from .waiting import as_completed as as_completed
    from .waiting import wait as wait

_PLACES = {
    "CAPABILITIES": "_os",
    "Attempt": "errors",
    "Leftover": "leaving",
    "PoisonTask": "errors",
    "PoolBroken": "errors",
    "PoolEvent": "telling",
    "PoolTerminated": "errors",
    "ResultUnreadable": "errors",
    "Retry": "policy",
    "SafeFuture": "future",
    "SafePoolExecutor": "executor",
    "Stalled": "errors",
    "TaskTimeout": "errors",
    "TaskUnreadable": "errors",
    "Unfinished": "errors",
    "WorkerDied": "errors",
    "WorkerStartError": "errors",
    "as_completed": "waiting",
    "leave_running": "leaving",
    "patch": "patching",
    "register_joblib": "joblib_backend",
    "wait": "waiting",
}

__all__ = [*_PLACES, "__version__"]  # noqa: PLE0604  (a list of str, computed)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("safepool")
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'safepool' has no attribute {name!r}")
    value = globals()[name] = getattr(__import__(f"{__name__}.{place}", fromlist=[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
