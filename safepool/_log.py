"""Tells the stdlib's logger, and survives whatever its handlers do: a log is never worth a future."""

from __future__ import annotations

WARNING, ERROR, CRITICAL = 30, 40, 50  # as logging has them, which a worker loads only when it has to
NAME = "concurrent.futures"


def tell(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log ``message % args``, with the traceback of ``error``; ``level`` as logging has them.  Raises nothing."""
    try:
        import logging

        logging.getLogger(NAME).log(level, message, *args, exc_info=error)
    except BaseException:
        pass
