"""Makes an exception of a failure: what happened, to which task, in which process, what can be done."""

from __future__ import annotations

from concurrent.futures import CancelledError

from ._events import STALL, Failure
from .errors import (
    PoisonTask,
    PoolBroken,
    PoolTerminated,
    TaskTimeout,
    WorkerDied,
    WorkerStartError,
    how_it_ended,
)
from .policy import TaskOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .future import SafeFuture


def error_of(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    """The exception that tells ``failure``; ``pid`` is that of the worker it names, if it names one."""
    error = _MAKERS[failure.kind](failure, future, options, pid)
    if future.stacks and failure.worker is not None:
        error.add_note(f"What worker process {pid} was doing when it was stopped:\n{future.stacks}")
    return error


def _died(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    why = f" (it was killed: {failure.reason})" if failure.reason else ""
    return WorkerDied(
        f"worker process {pid} died while it ran {future}: {how_it_ended(failure.exitcode)}{why}{_memory(failure)}; "
        "the other tasks are not affected (retry= runs such a task again)",
        pid=pid,
        exitcode=failure.exitcode,
        task=str(future),
        peak_bytes=failure.peak_bytes,
    )


def _memory(failure: Failure) -> str:
    return "" if failure.peak_bytes is None else f", with a peak memory of {failure.peak_bytes / 1e6:.0f} MB"


def _poison(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    return PoisonTask(
        f"{future} took down {failure.deaths} workers, the last one being process {pid}: "
        f"{how_it_ended(failure.exitcode)}; it is not run again (Retry(deaths=) sets how many it may)",
        pid=pid,
        exitcode=failure.exitcode,
        task=str(future),
        deaths=failure.deaths,
    )


def _timeout(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    if failure.reason == STALL:
        return TaskTimeout(
            f"{future} was stopped because nothing in the pool had moved for {failure.seconds:g} s, which is its "
            f"stall_timeout; worker process {pid} was killed and replaced",
            limit="stall_timeout",
            seconds=failure.seconds,
            task=str(future),
            pid=pid,
        )
    return TaskTimeout(
        f"{future} ran longer than its timeout of {failure.seconds:g} s in worker process {pid}, "
        "which was killed and replaced",
        limit="timeout",
        seconds=failure.seconds,
        task=str(future),
        pid=pid,
    )


def _deadline(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    limit = options.deadline or 0.0
    where = "it had not begun" if pid is None else f"its worker process {pid} was stopped"
    return TaskTimeout(
        f"{future} was not done {limit:g} s after it was submitted, which is its deadline; {where}",
        limit="deadline",
        seconds=limit,
        task=str(future),
        pid=pid,
    )


def _terminated(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    return PoolTerminated(
        f"the workers were ended by terminate_workers() or kill_workers(); {future} was at process {pid}",
        task=str(future),
        pid=pid,
    )


def _broken(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    if failure.worker is not None:
        return PoolBroken(
            f"the pool is broken: {failure.reason} (process {pid}: {how_it_ended(failure.exitcode)}); "
            f"{future} was not finished",
            reason=failure.reason,
            task=str(future),
            pid=pid,
        )
    return WorkerStartError(
        f"the pool is broken, {future} cannot be run: {failure.reason}", reason=failure.reason, task=str(future)
    )


def _cancelled(failure: Failure, future: SafeFuture, options: TaskOptions, pid: int | None) -> BaseException:
    return CancelledError()


_MAKERS = {
    "death": _died,
    "poison": _poison,
    "timeout": _timeout,
    "deadline": _deadline,
    "terminated": _terminated,
    "broken": _broken,
    "cancelled": _cancelled,
}
