"""A selector that another thread may tell to leave out a descriptor for a while, where the system has that (epoll)."""

from __future__ import annotations

import select
import selectors

if hasattr(selectors, "EpollSelector"):

    class Selector(selectors.EpollSelector):
        """``pause`` and ``resume`` a descriptor, also while another thread waits.  Both raise ``OSError``."""

        def pause(self, fd: int) -> None:
            """No reading is told of any more; the end of the far side is."""
            self._selector.modify(fd, 0)  # type: ignore[attr-defined]

        def resume(self, fd: int) -> None:
            self._selector.modify(fd, select.EPOLLIN)  # type: ignore[attr-defined]

else:
    Selector = selectors.DefaultSelector  # type: ignore[assignment,misc]
