"""Waiting for many descriptors at once; where there is epoll, another thread may have one left out for a while."""

from __future__ import annotations

import select
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class HasFileno(Protocol):
        def fileno(self) -> int: ...


READ, WRITE = 1, 2  # as ``selectors`` has them
NOTHING, READING = 0, getattr(select, "EPOLLIN", 0)
MOST_READY = 64  # that one call tells of

if hasattr(select, "epoll"):
    _EVENTS = {READ: select.EPOLLIN, WRITE: select.EPOLLOUT}

    class Selector:
        """The little that we need of those of ``selectors``, at a third of the cost.

        ``listen(fd, READING or NOTHING)``: what is told of it, from now on; also while another thread waits.  One
        call, in C.  The end of the far side is told in any case.  Raises ``OSError`` and ``ValueError``.
        """

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._data: dict[int, Any] = {}
            self.listen: Callable[[int, int], None] = self._epoll.modify

        def register(self, file: int | HasFileno, events: int, data: Any) -> None:
            """``events``: ``READ`` or ``WRITE``.  Raises ``KeyError`` if it is registered, ``OSError``."""
            fd = file if isinstance(file, int) else file.fileno()
            if fd in self._data:
                raise KeyError(f"descriptor {fd} is registered already")
            self._epoll.register(fd, _EVENTS[events])
            self._data[fd] = data

        def unregister(self, file: int | HasFileno) -> None:
            fd = file if isinstance(file, int) else file.fileno()
            del self._data[fd]
            with suppress(OSError):  # a task, or the program, has closed it
                self._epoll.unregister(fd)

        def ready(self, timeout: float | None) -> list[Any]:
            """The data of those that are, after at most so many seconds."""
            data = self._data
            return [data[fd] for fd, _ in self._epoll.poll(timeout, MOST_READY) if fd in data]

        def close(self) -> None:
            self._epoll.close()

else:
    import selectors

    class Selector(selectors.DefaultSelector):  # type: ignore[no-redef]
        """The same, but for ``listen``."""

        def ready(self, timeout: float | None) -> list[Any]:
            return [key.data for key, _ in self.select(timeout)]
