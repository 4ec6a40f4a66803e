"""A selector that another thread may tell to leave out a descriptor for a while, where the system has that (epoll)."""

from __future__ import annotations

import select
import selectors
from collections.abc import Callable

NOTHING, READING = 0, getattr(select, "EPOLLIN", 0)

if hasattr(selectors, "EpollSelector"):

    class Selector(selectors.EpollSelector):
        """``listen(fd, READING or NOTHING)``: what is told of it, from now on; also while another thread waits.

        One call, in C.  The end of the far side is told in any case.  Raises ``OSError`` and ``ValueError``.
        """

        def __init__(self) -> None:
            super().__init__()
            self.listen: Callable[[int, int], None] = self._selector.modify  # type: ignore[attr-defined]

else:
    Selector = selectors.DefaultSelector  # type: ignore[assignment,misc]
