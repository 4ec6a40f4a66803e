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
import io
import itertools
import marshal
import os
import pickle
import sys
import threading
import types
import weakref
from collections import ChainMap
from multiprocessing.reduction import ForkingPickler

from . import _unpack
from ._shapes import NamedTuple
from ._unpack import (
    CHUNK,
    HEAD,
    KEEP,
    PLAIN,
    PROTOCOL,
    Unsent,
    absent,
    dumps_by_reference,
    dumps_plain,
    dumps_result,
    loads,
)
from ._unpack import main as _main

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar

__all__ = ["Held", "Payload", "dumps", "dumps_by_value", "dumps_call", "dumps_result", "loads"]
_MAIN = b"main__"  # of "__main__", and of "__mp_main__", as multiprocessing calls it in its children
_MAINS = ("__main__", "__mp_main__")


class Payload(NamedTuple):
    """A pickled call: ``function`` is shared by all calls of it, so that a queue of them stays small."""

    function: bytes
    data: bytes

    def size_bytes(self) -> int:
        return len(self.function) + len(self.data)


SPENT = Payload(b"", b"")


def dumps_call(fn: Any, args: Any, kwargs: dict[str, Any], *, chunk: bool = False, held: Held | None = None) -> Payload:
    """Pickle a call; ``held`` is what its workers have of the script.  Raises whatever pickling raises."""
    if held is None:
        return _dumps_call(_dumps_function(fn), args, kwargs, chunk)
    _here.held = held
    try:
        if getattr(fn, "__module__", None) not in _MAINS:
            function = _dumps_function(fn)
        elif held.has(fn):
            function = held.dumps(fn), True
        else:
            function = dumps(fn), False  # not to be mixed with what pools without such workers send
        return _dumps_call(function, args, kwargs, chunk)
    finally:
        _here.held = None


def _dumps_call(pickled: tuple[bytes, bool], args: Any, kwargs: dict[str, Any], chunk: bool) -> Payload:
    function, keep = pickled
    if not kwargs and not chunk and _are_plain(args):
        data = dumps_plain((args, kwargs))
    else:
        data = dumps(args if chunk else (args, kwargs))
    return Payload(function, HEAD.pack(KEEP * keep + CHUNK * chunk, len(data)) + data)


def dumps(value: Any) -> bytes:
    """Pickle what goes to a worker; by reference where it can be imported there, else by value."""
    try:
        data = dumps_by_reference(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _dumps_by_value(value, shared_main=True)
    # The module of everything pickled by reference is named in the bytes.  A false alarm (the name
    # as data) costs time, nothing else.
    return _dumps_by_value(value, shared_main=True) if _MAIN in data else data


def _are_plain(values: Any) -> bool:
    for value in values:  # noqa: SIM110  (a generator costs more than what is saved)
        if type(value) not in PLAIN:
            return False
    return True


# ------------------------------------------------------------------ functions


class Held:
    """What ``__main__`` held when a pool's first workers were forked: all of them have it, and are told its name only.

    So whatever cannot be pickled may be a global of the script, as with the stock pool, and big ones cost nothing.
    """

    def __init__(self) -> None:
        self._main = dict(_main())
        self._names: weakref.WeakKeyDictionary[Any, tuple[bytes, set[str]]] = weakref.WeakKeyDictionary()

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

    def dumps(self, thing: Any) -> bytes:
        return self._look(thing)[0]

    def _look(self, thing: Any) -> tuple[bytes, set[str]]:
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
            known = self._names[thing] = dumps_by_reference(thing), names
        return known


#: ``held``: by the workers for which something is being pickled; ``function``: which is being pickled to be kept.
_here = threading.local()


class _Sent(NamedTuple):
    """A pickled function, good for as long as what it was made of is the same."""

    data: bytes
    made_of: tuple[Any, ...]
    names: tuple[str, ...]  # in ``__main__``, and there or not
    values: tuple[Any, ...]


_sent: weakref.WeakKeyDictionary[Any, _Sent] = weakref.WeakKeyDictionary()


def _dumps_function(fn: Any) -> tuple[bytes, bool]:
    """The pickle of ``fn``, and whether a worker may keep what it loads: not if it carries state."""
    kept = _dumps_kept(fn)
    if kept is not None:
        return kept, True
    return _dumps_alone(fn) if type(fn) is types.FunctionType else dumps(fn), False


def _dumps_kept(fn: Any) -> bytes | None:
    """None: it carries state, or may change unseen."""
    if type(fn) is types.BuiltinFunctionType:
        if fn.__self__ is not None and type(fn.__self__) is not types.ModuleType:
            return None
        made_of: tuple[Any, ...] = ()
    elif type(fn) is types.FunctionType and fn.__closure__ is None and not fn.__dict__ and _is_findable(fn):
        made_of = (fn.__code__, fn.__defaults__, fn.__kwdefaults__)
    else:
        return None
    known = _sent.get(fn)
    if known is not None and known.made_of == made_of and (not known.names or _is_current(known)):
        return known.data
    names = _names_in_main(fn)
    if names is None:
        return None
    main = _main()
    sent = _Sent(_dumps_alone(fn), made_of, tuple(names), tuple(main.get(name, absent) for name in names))
    _sent[fn] = sent
    return sent.data


def _dumps_alone(fn: Any) -> bytes:
    """With all that it uses in it: functions within functions are not kept one by one, for they may use each other."""
    _here.function = fn
    try:
        return dumps(fn)
    finally:
        _here.function = None


def _is_of_a_function() -> bool:
    """Is what is being pickled a part of a function that is kept, or of what workers have that were forked?"""
    return getattr(_here, "function", None) is not None or getattr(_here, "held", None) is not None


def _is_findable(fn: types.FunctionType) -> bool:
    """By reference, or in ``__main__``, whose globals are looked at: not a lambda of another module."""
    return "<" not in fn.__qualname__ or fn.__globals__ is _main()


def _is_current(sent: _Sent) -> bool:
    main = _main()
    return all(main.get(name, absent) is value for name, value in zip(sent.names, sent.values))


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
    return _dumps_by_value(value, shared_main=True)


def dumps_home_by_value(value: Any) -> bytes:
    """Pickle a result that cannot be pickled by reference."""
    return _dumps_by_value(value, shared_main=False)


def _dumps_by_value(value: Any, *, shared_main: bool) -> bytes:
    try:
        return _pickled(value, shared_main)
    except Exception:
        if not shared_main or getattr(_careful, "tried", None) is not None:
            raise
        # Perhaps it is only a global of the script that cannot be sent, and the call does not even touch it.
        _careful.tried = set()
        try:
            return _pickled(value, shared_main)
        except Exception:
            pass
        finally:
            _careful.tried = None
        raise


def _pickled(value: Any, shared_main: bool) -> bytes:
    file = io.BytesIO()
    _by_value_pickler(shared_main)(file, PROTOCOL).dump(value)
    return file.getvalue()


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
                        return _unpack.kept_function, (kept,)
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
        _pickled(value, True)
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
