"""joblib's words on our pool: ``joblib.parallel_config(backend="safepool", timeout=60, ...)``.

As with joblib's own pool workers are kept from one ``Parallel`` to the next, until other options are asked for, and
may use so many threads each that together they use the processors once.  Arrays are sent, not mapped into memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from joblib import cpu_count, register_parallel_backend
from joblib._parallel_backends import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from .executor import SafePoolExecutor
from .future import SafeFuture

NAME = "safepool"


def register_joblib() -> None:
    """Have joblib know the backend ``"safepool"``; its options are those of ``SafePoolExecutor``.

    Raises ``ImportError`` if joblib is not installed.
    """
    register_parallel_backend(NAME, Backend)


def _begin(environ: dict[str, str], initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    """In a worker: its threads are limited, and tasks may use the backend themselves."""
    os.environ.update(environ)
    register_joblib()
    if initializer is not None:
        initializer(*initargs)


class Backend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """What joblib asks of a backend."""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    _kept: tuple[dict[str, Any], SafePoolExecutor] | None = None  # of all backends of this process

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Have a pool; joblib's own options, of how to send arrays and when to let workers go, have no meaning here."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        asked = {"max_workers": n_jobs, "environ": self._prepare_worker_env(n_jobs=n_jobs), **self.backend_kwargs}
        kept = Backend._kept
        if kept is None or kept[0] != asked or kept[1]._broken or kept[1]._watchdog.is_fork():
            # (Another ``Parallel`` may still use the last one, which ends when nobody does.)
            options = dict(asked)
            given = options.pop("environ"), options.pop("initializer", None), tuple(options.pop("initargs", ()))
            kept = Backend._kept = asked, SafePoolExecutor(initializer=_begin, initargs=given, **options)
        self._workers: SafePoolExecutor | None = kept[1]
        self._futures: WeakSet[SafeFuture] = WeakSet()
        return n_jobs

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """None: one; negative: all processors but so many, plus one.  Raises ``ValueError`` for 0."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(1, cpu_count() + 1 + n_jobs)

    def submit(self, func: Any, callback: Any = None) -> SafeFuture:
        assert self._workers is not None
        future = self._workers.submit(func)
        self._futures.add(future)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: SafeFuture) -> Any:
        return future.result()

    def terminate(self) -> None:
        """The end of a ``Parallel``: its workers are kept."""
        self._workers = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A task has failed: the others of this ``Parallel`` are of no use any more."""
        for future in tuple(self._futures):
            future.kill()
        self._workers = None
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)
