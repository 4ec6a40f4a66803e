"""Puts any exception into words, whatever its own methods do, and whatever can still be imported."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MEMBERS = "\n  +-+-"  # from here on a traceback tells those of a group


def exact(text: str) -> str:
    """The same characters in a ``str`` of the interpreter's own: a subclass may do anything when it is formatted."""
    return "".join(("", text))


def words_of(error: BaseException) -> str:
    """Type and message of any exception, whatever its own ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return f"{type(error).__name__} (it cannot be shown)"


def traceback_of(error: BaseException) -> str:
    """What the interpreter would print of it, as far as the methods of the error, and the imports, let it."""
    try:
        import traceback

        return "".join(traceback.format_exception(error))
    except BaseException:
        return "".join(["Traceback (most recent call last):\n", *_places(error), words_of(error), "\n"])


def _places(error: BaseException) -> Iterable[str]:
    try:
        import traceback

        return traceback.format_tb(error.__traceback__)
    except BaseException:  # a task has left its worker unable to open a file
        return _places_without_source(error)


def _places_without_source(error: BaseException) -> Iterable[str]:
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        yield f'  File "{code.co_filename}", line {at.tb_lineno}, in {code.co_name}\n'
        at = at.tb_next


def safe_repr(error: BaseException | None) -> str:
    try:
        return exact(repr(error))
    except BaseException:
        return f"{type(error).__name__} (it cannot be shown)"


def last_line(traceback: bytes) -> str:
    """Of one that a worker sent: the type and the message of the error, or its first line; "" of none."""
    text = traceback.decode(errors="replace").partition(MEMBERS)[0]
    lines = [line.removeprefix("  | ") for line in text.splitlines()]
    frames = [at for at, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return next((line for line in after if line[:1] not in ("", " ")), "")
