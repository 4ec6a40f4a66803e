"""Pickles calls and set-ups on their way out; ``_unpack`` is the worker's half, and nobody else pickles.

What lives in ``__main__`` travels by value, so workers need no ``__main__`` of the user's, and no main
guard is asked for.  In a worker all of it shares one ``__main__`` namespace, as it does at home:

* what a worker's initializer, or an earlier task, assigned to a global stays, and other functions see it;
* a global that the user rebinds later (a notebook cell run again) is rebound in the workers too.

Forked workers have the script as it was: what they hold unchanged goes by reference.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import marshal
import os
import pickle
import sys
import threading
import types
import weakref
from collections import ChainMap

from . import _unpack
from ._parts import Parts
from ._shapes import NamedTuple
from ._unpack import (
    HEAD,
    INLINED,
    MARSHALLED,
    ONE,
    PLAIN,
    PROTOCOL,
    TOLD,
    WHOLE,
    Unsent,
    absent,
    are_small,
    dumps_by_reference,
    dumps_plain,
    dumps_result,
    loads,
    pickled_by_reference,
)
from ._unpack import main as _main

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, ClassVar

    from ._bulk import Cargo, Store

__all__ = ["Function", "Held", "Payload", "dumps", "dumps_by_value", "dumps_call", "dumps_result", "loads"]
_MAIN = b"main__"  # of "__main__", and of "__mp_main__", as multiprocessing calls it in its children
_MAINS = ("__main__", "__mp_main__")


class Function:
    """A pickled function that carries no state: it is sent to a worker once, and calls name its number.

    Good for as long as what it was made of is the same: its own parts, and the globals of the script that it uses.
    """

    __slots__ = ("_held", "_made_of", "_names", "_values", "data", "number")

    def __init__(
        self, data: bytes, made_of: tuple[Any, ...] | None, names: Iterable[str] = (), held: Held | None = None
    ) -> None:
        """``made_of``: None if it can be imported, so that its name is all that was pickled."""
        main = _main()
        self.data = data
        self.number = next(_numbers)
        self._made_of = made_of
        self._names = tuple(names)
        self._values = tuple(main.get(name, absent) for name in self._names)
        self._held = held

    def is_current(self, fn: Any) -> bool:
        if self._held is not None:
            return self._held.has(fn)
        if self._made_of is None:
            return True
        if self._made_of != (fn.__code__, fn.__defaults__, fn.__kwdefaults__):
            return False
        main = _main()
        for name, value in zip(self._names, self._values):  # noqa: SIM110  (a generator costs more than what is saved)
            if main.get(name, absent) is not value:
                return False
        return True


_numbers = itertools.count(1)


class Payload(NamedTuple):
    """A pickled call: of a function that is sent by itself, or of the one in ``code``.

    If it is big, its arguments are in ``cargo``, and (with neither of those two) the function before them.
    """

    function: Function | None
    code: bytes
    data: bytes
    flags: int
    cargo: Cargo | None = None

    def size_bytes(self) -> int:
        size = len(self.code) + len(self.data)
        return size if self.cargo is None else size + self.cargo.size_bytes()

    def parts(self, *, told: bool, message: bytes | None = None) -> list[bytes | bytearray]:
        """What ``loads_call`` takes, once it is joined; ``told``: the begin of the call is to be told.

        ``message``: what ``cargo`` lent, if its block is sent, too.
        """
        number = 0 if self.function is None else self.function.number
        flags = self.flags | TOLD * told
        if self.cargo is None:
            return [HEAD.pack(flags, number, len(self.data)), self.data, self.code]
        if message is not None:
            return [HEAD.pack(flags, number, len(message)), message, self.code]
        head, data = self.cargo.inline()
        return [HEAD.pack(flags | INLINED, number, len(head) + len(data)), head, data, self.code]


SMALL_BYTES = 256


def are_plain(values: tuple[Any, ...]) -> bool:
    """Do these travel as they are, with many others?  Immutable values of no great size."""
    try:
        for value in values:
            kind = type(value)
            if kind not in PLAIN or ((kind is str or kind is bytes) and len(value) > SMALL_BYTES):
                return False
    except Exception:  # a class that cannot be hashed
        return False
    return True


def are_all_plain(calls: list[Any], *, has_one: bool) -> bool:
    """The same of many; quick to say yes where nothing has a size."""
    if are_small(calls if has_one else itertools.chain.from_iterable(calls)):
        return True
    return all(map(are_plain, zip(calls) if has_one else calls))


def dumps_call(
    fn: Any,
    args: Any,
    kwargs: dict[str, Any],
    *,
    chunk: int = 0,
    held: Held | None = None,
    store: Callable[[], Store] | None = None,
) -> Payload:
    """Pickle a call; ``held`` is what its workers have of the script; ``store``: where what is big in it may go.

    ``chunk``: ``CHUNK``, perhaps with ``ONE``, if ``args`` are those of many calls.
    Raises whatever pickling raises.
    """
    _here.held = held
    offers = store is not None
    try:
        function = function_of(fn, held)
        code = b"" if function is not None else _pickled_code(fn, held, offers).settled()
        if type(code) is bytes:
            if chunk and are_all_plain(args, has_one=bool(chunk & ONE)):
                return Payload(function, code, marshal.dumps(args), chunk | MARSHALLED)
            if not chunk and not kwargs and are_plain(args):
                return Payload(function, code, dumps_plain((args, kwargs)), 0)
        rest = args if chunk else (args, kwargs)
        if type(code) is bytes:
            parts = pickled(rest, offers)
        else:  # all in one: what is big is nowhere but in its place so far
            parts, code, chunk = pickled((fn, rest), offers), b"", chunk | WHOLE
        data = parts[0] if len(parts) == 1 and not parts.buffers else parts.settled()
        if type(data) is bytes or store is None:
            return Payload(function, code, parts.joined(), chunk)
        from . import _bulk

        return Payload(function, code, b"", chunk, _bulk.pack(parts, store()))
    finally:
        _here.held = None


def function_of(fn: Any, held: Held | None) -> Function | None:
    """What calls of ``fn`` may name; None: it carries state, or may change unseen, and goes with each call."""
    if held is None or getattr(fn, "__module__", None) not in _MAINS:
        return _dumps_kept(fn)
    return held.function_of(fn) if held.has(fn) else None  # not to be mixed with what other pools send


def _pickled_code(fn: Any, held: Held | None, offers: bool) -> Parts:
    if held is not None or type(fn) is not types.FunctionType:
        return pickled(fn, offers)
    return _pickled_alone(fn, offers)


def dumps(value: Any) -> bytes:
    """Pickle what goes to a worker; by reference where it can be imported there, else by value."""
    return pickled(value, offers=False).joined()


def pickled(value: Any, offers: bool) -> Parts:
    """The same; ``offers``: what is big may stay where it is."""
    try:
        parts = pickled_by_reference(value, offers=offers)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _pickled_by_value(value, shared_main=True, offers=offers)
    # The module of everything pickled by reference is named in the bytes.  A false alarm (the name
    # as data) costs time, nothing else.
    return _pickled_by_value(value, shared_main=True, offers=offers) if parts.names(_MAIN) else parts


# ------------------------------------------------------------------ functions


class Held:
    """What ``__main__`` held when a pool's first workers were forked: all of them have it, and are told its name only.

    So whatever cannot be pickled may be a global of the script, as with the stock pool, and big ones cost nothing.
    """

    def __init__(self) -> None:
        self._main = dict(_main())
        self._names: weakref.WeakKeyDictionary[Any, tuple[Function, set[str]]] = weakref.WeakKeyDictionary()

    def has(self, thing: Any) -> bool:
        """Is this function or class of the script in the workers, with all the globals that it uses?"""
        if not isinstance(thing, (type, types.FunctionType)) or thing.__module__ not in _MAINS:
            return False
        root, *path = thing.__qualname__.split(".")
        main = _main()
        found = main.get(root, absent)
        if found is absent or found is not self._main.get(root, absent):
            return False
        for name in path:
            found = getattr(found, name, absent)
        # What was sent by value once may have been rebound in the workers: it goes on so.
        return found is thing and all(
            main.get(name, absent) is self._main.get(name, absent) and name not in _tracked
            for name in self._look(thing)[1]
        )

    def function_of(self, thing: Any) -> Function:
        return self._look(thing)[0]

    def _look(self, thing: Any) -> tuple[Function, set[str]]:
        """By reference, and the globals that it uses, itself or through functions."""
        known = self._names.get(thing)
        if known is None:
            names: set[str] = set()
            todo = [thing]
            while todo:
                function = todo.pop()
                if type(function) is types.FunctionType and function.__globals__ is _main():
                    more = _names_in_code(function.__code__) - names
                    names |= more
                    todo += [self._main.get(name) for name in more]
            known = self._names[thing] = Function(dumps_by_reference(thing), None, held=self), names
        return known


#: ``held``: by the workers for which something is being pickled; ``function``: which is being pickled to be kept.
_here = threading.local()


_sent: weakref.WeakKeyDictionary[Any, Function] = weakref.WeakKeyDictionary()


def _dumps_kept(fn: Any) -> Function | None:
    """None: it carries state, or may change unseen."""
    if type(fn) is types.BuiltinFunctionType:
        if fn.__self__ is not None and type(fn.__self__) is not types.ModuleType:
            return None
    elif type(fn) is not types.FunctionType or fn.__closure__ is not None or fn.__dict__ or not _is_findable(fn):
        return None
    known = _sent.get(fn)
    if known is not None and known.is_current(fn):
        return known
    names = _names_in_main(fn)
    if names is None:
        return None
    made_of = None
    if type(fn) is types.FunctionType and not _can_be_imported(fn):
        made_of = (fn.__code__, fn.__defaults__, fn.__kwdefaults__)
    function = _sent[fn] = Function(_pickled_alone(fn).joined(), made_of, names)
    return function


def _can_be_imported(fn: types.FunctionType) -> bool:
    if fn.__module__ in _MAINS:
        return False
    found: Any = sys.modules.get(fn.__module__)
    for name in fn.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is fn


def _pickled_alone(fn: Any, offers: bool = False) -> Parts:
    """With all that it uses in it: functions within functions are not kept one by one, for they may use each other."""
    _here.function = fn
    try:
        return pickled(fn, offers)
    finally:
        _here.function = None


def _is_of_a_function() -> bool:
    """Is what is being pickled a part of a function that is kept, or of what workers have that were forked?"""
    return getattr(_here, "function", None) is not None or getattr(_here, "held", None) is not None


def _is_findable(fn: types.FunctionType) -> bool:
    """By reference, or in ``__main__``, whose globals are looked at: not a lambda of another module."""
    return "<" not in fn.__qualname__ or fn.__globals__ is _main()


def _names_in_main(fn: Any) -> dict[str, None] | None:
    """The globals of ``__main__`` that ``fn`` uses, itself or through the functions it uses.

    None: they lead to something that cannot be looked through (a class, a closure, functions in a
    container), so that it could change unseen.
    """
    main, todo = _main(), [fn]
    names: dict[str, None] = {}
    while todo:
        function = todo.pop()
        if type(function) is not types.FunctionType or function.__globals__ is not main:
            continue
        for name in _names_in_code(function.__code__):
            if name in names or hasattr(builtins, name):
                continue
            value = main.get(name, absent)
            if not _can_be_looked_through(value):
                return None
            names[name] = None
            todo.append(value)
    return names


def _can_be_looked_through(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        inside = value.values() if isinstance(value, dict) else value
        return not any(map(callable, itertools.islice(inside, 1000)))
    if getattr(value, "__module__", None) not in _MAINS:
        return True
    return type(value) is types.FunctionType and value.__closure__ is None and not value.__dict__


def _names_in_code(code: types.CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names_in_code, inner))


# ------------------------------------------------------------------- picklers


def dumps_by_value(value: Any) -> bytes:
    """Pickle what goes to a worker in one go: what is handed to a process at its start is noted at every pickling."""
    return _pickled_by_value(value, shared_main=True, offers=False).joined()


def pickled_home_by_value(value: Any, *, offers: bool) -> Parts:
    """Pickle a result that cannot be pickled by reference."""
    return _pickled_by_value(value, shared_main=False, offers=offers)


def _pickled_by_value(value: Any, *, shared_main: bool, offers: bool) -> Parts:
    try:
        return _pickled(value, shared_main, offers)
    except Exception:
        if not shared_main or getattr(_careful, "tried", None) is not None:
            raise
        # Perhaps it is only a global of the script that cannot be sent, and the call does not even touch it.
        _careful.tried = set()
        try:
            return _pickled(value, shared_main, offers)
        except Exception:
            pass
        finally:
            _careful.tried = None
        raise


def _pickled(value: Any, shared_main: bool, offers: bool) -> Parts:
    parts = Parts()
    _by_value_pickler(shared_main)(parts, PROTOCOL, parts.offer if offers else None).dump(value)
    return parts


def _by_value_pickler(shared_main: bool) -> Any:
    import cloudpickle  # loky's own pickler, installed with it

    if not _by_value_classes:
        if "__mp_main__" in sys.modules:
            # In a child of multiprocessing's the script goes by this name, which no worker has.
            cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])

        class ByValueHome(cloudpickle.Pickler):  # type: ignore[misc]
            """cloudpickle, and multiprocessing's own reducers: connections, shared memory."""

            # On the class: the C pickler looks when it is made.
            dispatch_table: ClassVar[Any] = ChainMap(_their_reducers(), cloudpickle.Pickler.dispatch_table)

            def reducer_override(self, obj: Any) -> Any:
                held = getattr(_here, "held", None)
                if held is not None and held.has(obj):
                    return NotImplemented  # by reference
                reduced = super().reducer_override(obj)
                if isinstance(obj, type) and "__slots__" in vars(obj) and isinstance(reduced, tuple):
                    return _with_slots(obj, reduced)
                return reduced

        class ByValue(ByValueHome):
            """The same, but functions of ``__main__`` keep sharing its namespace at the far end.

            And what they are made of is named so that the worker need not load cloudpickle for it.
            """

            dispatch_table: ClassVar[Any] = ChainMap(
                {types.CodeType: _reduce_code, types.ModuleType: _reduce_module}, ByValueHome.dispatch_table
            )

            def reducer_override(self, obj: Any) -> Any:
                if type(obj) is _LruCache and obj.__module__ in _MAINS:
                    return _unpack.cached, (obj.cache_parameters(), obj.__wrapped__)
                if type(obj) is types.FunctionType and obj.__module__ in _MAINS and not _is_of_a_function():
                    kept = _dumps_kept(obj)
                    if kept is not None:
                        return _unpack.kept_function, (kept.data,)
                return super().reducer_override(obj)

            def _dynamic_function_reduce(self, func: Any) -> Any:
                reduced = super()._dynamic_function_reduce(func)
                if func.__globals__ is not _main():
                    return reduced
                make, (code, _, *more), (state, slots), *_ = reduced
                package = _main().get("__package__")  # for imports relative to it, within the function
                if package:
                    slots["__globals__"]["__package__"] = package
                slots["__globals__"] = _versioned(slots["__globals__"])
                made: tuple[Any, ...] = (make, (code, _TheirMain(), *more))
                if func.__closure__ is None:
                    made = (_unpack.function_of_main, (code, _TheirMain()))
                return *made, (state, slots), None, None, _unpack.set_function_of_main

        _by_value_classes[:] = ByValueHome, ByValue
    return _by_value_classes[shared_main]


_by_value_classes: list[Any] = []
PLAIN_MARSHAL = 2  # the last version without references: the same code has the same bytes each time


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    try:
        data = marshal.dumps(code, PLAIN_MARSHAL)
    except ValueError:
        data = marshal.dumps(code)  # a slice among its constants, say, on Python 3.14
    return marshal.loads, (data,)  # workers are the same interpreter


def _reduce_module(module: types.ModuleType) -> tuple[Any, ...]:
    from cloudpickle import cloudpickle

    reduced: tuple[Any, ...] = cloudpickle._module_reduce(module)
    return (_unpack.module, *reduced[1:]) if reduced[0] is cloudpickle.subimport else reduced


def _with_slots(cls: type, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """cloudpickle sets ``__slots__`` when the class exists, and then they are no slots: here they come first."""
    from cloudpickle import cloudpickle

    if reduced[0] is not cloudpickle._make_skeleton_class:
        return reduced
    make, (meta, name, bases, kwargs, *more), (state, slot_state), *rest = reduced
    slots: Any = cls.__dict__["__slots__"]
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    private = f"_{cls.__name__.lstrip('_')}"
    made = {f"{private}{slot}" if slot[:2] == "__" and slot[-2:] != "__" else slot for slot in slots}
    state = {key: value for key, value in state.items() if key != "__slots__" and key not in made}
    return make, (meta, name, bases, {**kwargs, "__slots__": slots}, *more), (state, slot_state), *rest


def _their_reducers() -> dict[type, Any]:
    try:
        from multiprocessing.reduction import ForkingPickler  # (a worker that loads this module seldom needs that)
    except (ImportError, OSError):  # a task has left its worker unable to load it: then it has nothing to reduce
        return {}
    reducers: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    return reducers


class _TheirMain:
    """Pickles as the namespace of ``__main__`` at the far end."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _main, ()


# At home: the value of each global that was ever sent, and how often the user had rebound it by then.
_tracked: dict[str, tuple[Any, int]] = {}
_tracking = threading.RLock()
_rebound = itertools.count(1)


def _versioned(values: dict[str, Any]) -> dict[str, tuple[int, Any]]:
    with _tracking:
        for name, value in values.items():
            known = _tracked.get(name)
            if known is None or known[0] is not value:
                _tracked[name] = (value, 0 if known is None else next(_rebound))
        versions = {name: _tracked[name][1] for name in values}
    # Not under the lock: a global is tried by pickling it, and a method of the user's may do anything.
    return {name: (versions[name], _sendable(name, _fresh(value))) for name, value in values.items()}


_careful = threading.local()  # ``tried``: globals that are being tried by pickling them, when something failed before


def _sendable(name: str, value: Any) -> Any:
    """``value``, or in its place an explanation why it did not travel."""
    tried = getattr(_careful, "tried", None)
    if tried is None or id(value) in tried or isinstance(value, types.FunctionType):
        return value
    tried.add(id(value))
    try:
        _pickled(value, True, False)
    except Exception as error:
        return Unsent(name, f"{type(error).__name__}: {error}")
    return value


def _fresh(value: Any) -> Any:
    """Locks among the globals: a worker has its own, as it has under "spawn" and "fork"."""
    if type(value) in _LOCKS:
        return _Fresh("Lock" if type(value) is _LOCKS[0] else "RLock")
    return value


class _Fresh(NamedTuple):
    """Pickles as a new lock."""

    kind: str

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr(threading, self.kind), ()


_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_LruCache = type(functools.lru_cache(abs))


def _let_go_in_child() -> None:
    # Another thread may have held it at the fork.
    global _tracking
    _tracking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
