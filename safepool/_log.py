"""Tells the stdlib's logger, and survives whatever its handlers do: a log is never worth a future."""

from __future__ import annotations

import logging
from contextlib import suppress
from logging import CRITICAL, ERROR

__all__ = ["CRITICAL", "ERROR", "tell"]
NAME = "concurrent.futures"


def tell(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log ``message % args``, with the traceback of ``error``; ``level`` as logging has them.  Raises nothing."""
    with suppress(BaseException):
        logging.getLogger(NAME).log(level, message, *args, exc_info=error)
