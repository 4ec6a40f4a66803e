"""The worker's half of pickling: calls are unpickled, results and exceptions pickled.

Loads next to nothing, for every worker waits for it: what only some results need is loaded when one comes.
The other half, and what is said there of ``__main__``, is ``_payload``.
"""

from __future__ import annotations

import builtins
import functools
import os
import sys
from _pickle import Pickler, PicklingError  # what pickle gives out under the same names
from _pickle import dumps as _dumps
from _pickle import loads as _loads
from _struct import Struct
from copyreg import dispatch_table
from marshal import loads as _unmarshal
from types import FunctionType

from ._parts import BIG_BYTES, Parts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

PROTOCOL = 5  # the highest that pickle has
MOST_FUNCTIONS = 512  # that a worker keeps loaded
HEAD = Struct("<BIQ")  # flags, number of the function, length of the pickled arguments; they and the function follow
# A call of the function for each of them; its begin is told; each is its one argument; they are marshalled; the
# function is among them; they are big, and come here all the same.
CHUNK, TOLD, ONE, MARSHALLED, WHOLE, INLINED = 1, 2, 4, 8, 16, 32
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
#: Of these no value is so big that it were better pickled.
SMALL = frozenset({int, float, bool, type(None)})
NOT_SET = frozenset({"__globals__", "__closure__", "_cloudpickle_submodules"})  # of the state of a function
absent = object()

_functions: dict[bytes, Any] = {}  # those within arguments, loaded, by their pickle
_sent: dict[int, bytes] = {}  # functions by number, as they came
_loaded: dict[int, Any] = {}  # those that were called


def loads(body: bytes) -> Any:
    return _loads(body)


def dumps_plain(value: Any) -> bytes:
    """Only for what consists of ``PLAIN`` things: half the cost of a pickler that knows more."""
    return _dumps(value, PROTOCOL)


def are_small(values: Any) -> bool:
    """All of them ``SMALL``?"""
    try:
        return SMALL.issuperset(map(type, values))
    except Exception:  # a class that cannot be hashed
        return False


def kept_function(data: bytes) -> Any:
    """A function that carries no state: the same bytes are the same function."""
    fn = _functions.get(data, absent)
    if fn is absent:
        fn = _loads(data)
        if len(_functions) >= MOST_FUNCTIONS:
            _functions.clear()
        _functions[data] = fn
    return fn


def is_known(known: set[int], number: int) -> bool:
    """At home: has the worker that was sent ``known`` this function still?  It has from now on."""
    if number in known:
        return True
    if len(known) >= MOST_FUNCTIONS:
        known.clear()
    known.add(number)
    return False


def keep_function(number: int, data: bytes) -> None:
    """A function that carries no state, for all calls that name its number; ``is_known`` counts with it at home."""
    if len(_sent) >= MOST_FUNCTIONS:
        _sent.clear()
        _loaded.clear()
    _sent[number] = data


def function_of(number: int) -> Any:
    """Raises whatever unpickling raises, for each call of it again."""
    fn = _loaded.get(number, absent)
    if fn is absent:
        fn = _loaded[number] = _loads(_sent[number])
    return fn


def is_told(body: bytes) -> bool:
    """Does whoever sent this call want to know when it begins?"""
    return bool(body[0] & TOLD)


def message_in(body: bytes) -> bytes:
    """Of a call whose arguments came another way: what tells of them."""
    return body[HEAD.size : HEAD.size + HEAD.unpack_from(body)[2]]


def loads_call(call: bytes | tuple[bytes, Any]) -> tuple[Any, Any, dict[str, Any], int]:
    """What a worker runs: (fn, args, kwargs, flags); for a ``CHUNK`` it is a call for each of ``args``.


    ``call``: what was sent; with it, if that came another way, what holds the arguments, which is closed here.
    Raises whatever unpickling raises.
    """
    body, held = call if isinstance(call, tuple) else (call, None)
    flags, number, length = HEAD.unpack_from(body)
    end = HEAD.size + length
    if flags & INLINED:
        from ._bulk import Inlined

        held = Inlined.of(memoryview(body)[HEAD.size : end])
    try:
        fn = function_of(number) if number else None if flags & WHOLE else _loads(body[end:])
        if held is not None:
            rest = held.load()
        else:
            with memoryview(body) as view:
                rest = (_unmarshal if flags & MARSHALLED else _loads)(view[HEAD.size : end])
    finally:
        if held is not None:
            held.close()
    if flags & WHOLE:
        fn, rest = rest
    if flags & CHUNK:
        return fn, rest, {}, flags
    args, kwargs = rest
    return fn, args, kwargs, flags


def dumps_result(result: Any) -> bytes:
    """Pickle what comes back: home has its own ``__main__``, so by value only if need be."""
    if type(result) in PLAIN:
        return _dumps(result, PROTOCOL)
    return _pickled_result(result, offers=False).joined()


def dumps_big_result(result: Any) -> bytes | Parts:
    """The same; parts, if it is big."""
    kind = type(result)
    if kind in PLAIN:
        if (kind is not bytes and kind is not str) or len(result) < BIG_BYTES:
            return _dumps(result, PROTOCOL)
        parts = Parts()
        Pickler(parts, PROTOCOL).dump(result)
    else:
        parts = _pickled_result(result, offers=True)
    return parts[0] if len(parts) == 1 and not parts.buffers else parts.settled()


def _pickled_result(result: Any, *, offers: bool) -> Parts:
    try:
        return pickled_by_reference(result, offers=offers)
    except (PicklingError, AttributeError, TypeError) as refusal:
        try:
            return _unusual_result(result, offers=offers)
        except (ImportError, OSError):  # a task has left its worker unable to load what that needs
            raise refusal from None


def _unusual_result(result: Any, *, offers: bool) -> Parts:
    from . import _payload

    if not _their_reducers():
        try:
            __import__("multiprocessing.reduction")
            return pickled_by_reference(result, offers=offers)  # a socket, perhaps
        except (PicklingError, AttributeError, TypeError, ImportError, OSError):
            pass
    return _payload.pickled_home_by_value(result, offers=offers)


class TaskUnreadable(Exception):
    """That of ``errors``, which it is when it comes home; loading that here would take longer than most tasks."""

    __module__ = f"{__package__}.errors"

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_unreadable, (str(self), os.getpid())


def _task_unreadable(why: str, pid: int) -> BaseException:
    from .errors import TaskUnreadable

    return TaskUnreadable(why, pid=pid)


class _Pickler(Pickler):
    """The C pickler with multiprocessing's own reducers (connections, sockets, bound methods)."""

    dispatch_table: ClassVar[dict[type, Any]] = {}  # type: ignore[misc]
    made_of: ClassVar[tuple[int, int]] = (-1, -1)


def dumps_by_reference(value: Any) -> bytes:
    return pickled_by_reference(value, offers=False).joined()


def pickled_by_reference(value: Any, *, offers: bool) -> Parts:
    """``offers``: what is big may stay where it is."""
    _refresh_reducers()
    parts = Parts()
    _Pickler(parts, PROTOCOL, buffer_callback=parts.offer if offers else None).dump(value)
    return parts


def _refresh_reducers() -> None:
    """A plain dict of both tables, made anew when one has grown: a ``ChainMap`` doubles the cost of a call."""
    theirs = _their_reducers()
    if _Pickler.made_of != (len(theirs), len(dispatch_table)):
        _Pickler.dispatch_table = {**dispatch_table, **theirs}
        _Pickler.made_of = (len(theirs), len(dispatch_table))


def _their_reducers() -> dict[type, Any]:
    """Nobody has anything that needs them before they are there, but for sockets."""
    pickler = getattr(sys.modules.get("multiprocessing.reduction"), "ForkingPickler", None)
    return getattr(pickler, "_extra_reducers", {})


# -------------------------------------------------------------------- __main__

# Which version of each global this worker was given last.
_given: dict[str, int] = {}
# In a forked worker: what it found in ``__main__``.  The same class must not be there twice, once by
# inheritance and once by value; but what an initializer has assigned since is the worker's own.
_inherited: dict[str, Any] = {}


def inherit_main() -> None:
    """In a forked worker: note what ``__main__`` holds before anything of the worker's runs."""
    _inherited.update(main())


def own_main() -> None:
    """In a new worker: an empty ``__main__`` for the user's names, instead of the bootstrap's."""
    sys.modules["__main__"] = type(sys)("__main__")


def main() -> dict[str, Any]:
    return sys.modules["__main__"].__dict__


class Unsent:
    """Stands in a worker for a global of the script that could not be sent; whatever is done with it says so."""

    def __init__(self, name: str, why: str) -> None:
        self.__dict__.update(_name=name, _why=why)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"the global {self._name!r} of __main__ cannot be sent to a worker ({self._why}); "
            "give it to the workers as initargs of an initializer, or make it there"
        )

    def __getattr__(self, attribute: str) -> Any:
        if attribute[:2] == "__":
            raise AttributeError(attribute)
        return self._refuse()

    def __reduce__(self) -> Any:
        return Unsent, (self._name, self._why)

    __call__ = __enter__ = __exit__ = __iter__ = __next__ = __len__ = __getitem__ = __setitem__ = __bool__ = _refuse


def cached(parameters: dict[str, Any], fn: Any) -> Any:
    return functools.lru_cache(**parameters)(fn)


# What cloudpickle does in a worker for most functions of a script, without its being loaded: that takes longer than
# all else that the first result of a program waits for.


def module(name: str) -> Any:
    __import__(name)
    return sys.modules[name]


def function_of_main(code: Any, namespace: dict[str, Any]) -> Any:
    namespace.setdefault("__builtins__", builtins)
    return FunctionType(code, namespace)


def set_function_of_main(fn: Any, state: Any) -> None:
    """But only globals that were rebound at home are assigned."""
    _set_globals_of_main(state)
    attributes, slots = state
    if slots["__closure__"] is not None:
        from cloudpickle.cloudpickle import _function_setstate

        _function_setstate(fn, state)
        return
    fn.__dict__.update(attributes)
    for name, value in slots.items():
        if name not in NOT_SET:
            setattr(fn, name, value)


def _set_globals_of_main(state: Any) -> None:
    here = main()
    for name, (version, value) in state[1]["__globals__"].items():
        # Not what is older than what it has: a task may be pickled before another one and run after it.
        known = _given.get(name)
        if isinstance(value, Unsent):
            here.setdefault(name, value)  # a forked worker has the real one, and an initializer may have made one
            continue
        is_theirs = isinstance(here.get(name, value), Unsent) or name not in here
        is_theirs = is_theirs or here[name] is _inherited.get(name, absent)
        if (known is None and is_theirs) or (known is not None and version > known):
            here[name] = value
        _given[name] = version if known is None else max(known, version)
    state[1]["__globals__"] = {}
