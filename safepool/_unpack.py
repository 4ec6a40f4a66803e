"""The worker's half of pickling: calls are unpickled, results and exceptions pickled.

Loads next to nothing, for every worker waits for it: what only some results need is loaded when one comes.
The other half, and what is said there of ``__main__``, is ``_payload``.
"""

from __future__ import annotations

import builtins
import functools
import sys
from _pickle import Pickler, PicklingError  # what pickle gives out under the same names
from _pickle import dumps as _dumps
from _pickle import loads as _loads
from _struct import Struct
from copyreg import dispatch_table
from io import BytesIO
from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

PROTOCOL = 5  # the highest that pickle has
MOST_FUNCTIONS = 512  # that a worker keeps loaded
HEAD = Struct("<BQ")  # flags, length of the pickled arguments; they and the function follow
KEEP, CHUNK = 1, 2
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
NOT_SET = frozenset({"__globals__", "__closure__", "_cloudpickle_submodules"})  # of the state of a function
absent = object()

_functions: dict[bytes, Any] = {}  # loaded, by their pickle


def loads(body: bytes) -> Any:
    return _loads(body)


def dumps_plain(value: Any) -> bytes:
    """Only for what consists of ``PLAIN`` things: half the cost of a pickler that knows more."""
    return _dumps(value, PROTOCOL)


def kept_function(data: bytes) -> Any:
    """A function that carries no state: the same bytes are the same function."""
    fn = _functions.get(data, absent)
    if fn is absent:
        fn = _loads(data)
        if len(_functions) >= MOST_FUNCTIONS:
            _functions.clear()
        _functions[data] = fn
    return fn


def loads_call(body: bytes) -> tuple[Any, Any, dict[str, Any], bool]:
    """What a worker runs: (fn, args, kwargs, is_chunk); for a chunk it is ``fn(*one)`` for each of ``args``.

    Raises whatever unpickling raises.
    """
    flags, length = HEAD.unpack_from(body)
    end = HEAD.size + length
    function = body[end:]
    fn = kept_function(function) if flags & KEEP else _loads(function)
    with memoryview(body) as view:
        rest = _loads(view[HEAD.size : end])
    if flags & CHUNK:
        return fn, rest, {}, True
    args, kwargs = rest
    return fn, args, kwargs, False


def dumps_result(result: Any) -> bytes:
    """Pickle what comes back: home has its own ``__main__``, so by value only if need be."""
    if type(result) in PLAIN:
        return _dumps(result, PROTOCOL)
    try:
        return dumps_by_reference(result)
    except (PicklingError, AttributeError, TypeError) as refusal:
        try:
            return _dumps_unusual_result(result)
        except (ImportError, OSError):  # a task has left its worker unable to load what that needs
            raise refusal from None


def _dumps_unusual_result(result: Any) -> bytes:
    had_reducers = bool(_their_reducers())
    from . import _payload

    if not had_reducers:
        try:
            return dumps_by_reference(result)  # a socket, perhaps
        except (PicklingError, AttributeError, TypeError):
            pass
    return _payload.dumps_home_by_value(result)


class _Pickler(Pickler):
    """The C pickler with multiprocessing's own reducers (connections, sockets, bound methods)."""

    dispatch_table: ClassVar[dict[type, Any]] = {}  # type: ignore[misc]
    made_of: ClassVar[tuple[int, int]] = (-1, -1)


def dumps_by_reference(value: Any) -> bytes:
    _refresh_reducers()
    file = BytesIO()
    _Pickler(file, PROTOCOL).dump(value)
    return file.getvalue()


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
