"""The only module that pickles: calls and set-ups on their way out, results and exceptions on their way back.

What lives in ``__main__`` travels by value, so workers need no ``__main__`` of the user's, and no main
guard is asked for.  In a worker all of it shares one ``__main__`` namespace, as it does at home:

* what a worker's initializer, or an earlier task, assigned to a global stays, and other functions see it;
* a global that the user rebinds later (a notebook cell run again) is rebound in the workers too.

Forked workers have the script as it was: what they hold unchanged goes by reference.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import io
import itertools
import os
import pickle
import struct
import sys
import threading
import types
import weakref
from collections import ChainMap
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NamedTuple

PROTOCOL = pickle.HIGHEST_PROTOCOL
MOST_FUNCTIONS = 512  # that a worker keeps loaded
_HEAD = struct.Struct("<BQ")  # flags, length of the pickled arguments; they and the function follow
_KEEP, _CHUNK = 1, 2
_MAIN = b"main__"  # of "__main__", and of "__mp_main__", as multiprocessing calls it in its children
_MAINS = ("__main__", "__mp_main__")
_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
_absent = object()


class Task(NamedTuple):
    """What a worker runs: ``fn(*args, **kwargs)``, or for a chunk ``fn(*one)`` for each of ``args``."""

    fn: Any
    args: Any
    kwargs: dict[str, Any]
    is_chunk: bool


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
        data = pickle.dumps((args, kwargs), PROTOCOL)  # half the cost of a pickler that knows more
    else:
        data = dumps(args if chunk else (args, kwargs))
    return Payload(function, _HEAD.pack(_KEEP * keep + _CHUNK * chunk, len(data)) + data)


def loads_call(body: bytes) -> Task:
    """In the worker.  Raises whatever unpickling raises."""
    flags, length = _HEAD.unpack_from(body)
    end = _HEAD.size + length
    function = body[end:]
    fn = _functions.get(function, _absent)
    if fn is _absent:
        fn = pickle.loads(function)
        if flags & _KEEP:
            if len(_functions) >= MOST_FUNCTIONS:
                _functions.clear()
            _functions[function] = fn
    with memoryview(body) as view:
        rest = pickle.loads(view[_HEAD.size : end])
    if flags & _CHUNK:
        return Task(fn, rest, {}, True)
    args, kwargs = rest
    return Task(fn, args, kwargs, False)


def dumps(value: Any) -> bytes:
    """Pickle what goes to a worker; by reference where it can be imported there, else by value."""
    try:
        data = _dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _dumps_by_value(value, shared_main=True)
    # The module of everything pickled by reference is named in the bytes.  A false alarm (the name
    # as data) costs time, nothing else.
    return _dumps_by_value(value, shared_main=True) if _MAIN in data else data


def dumps_result(result: Any) -> bytes:
    """Pickle what comes back: home has its own ``__main__``, so by value only if need be."""
    if type(result) in _PLAIN:
        return pickle.dumps(result, PROTOCOL)
    try:
        return _dumps(result)
    except (pickle.PicklingError, AttributeError, TypeError) as refusal:
        try:
            return _dumps_by_value(result, shared_main=False)
        except (ImportError, OSError):  # a task has left its worker unable to load what that needs
            raise refusal from None


def _are_plain(values: Any) -> bool:
    for value in values:  # noqa: SIM110  (a generator costs more than what is saved)
        if type(value) not in _PLAIN:
            return False
    return True


def loads(body: bytes) -> Any:
    return pickle.loads(body)


def inherit_main() -> None:
    """In a forked worker: note what ``__main__`` holds before anything of the worker's runs."""
    _inherited.update(_main())


def own_main() -> None:
    """In a new worker: an empty ``__main__`` for the user's names, instead of the bootstrap's."""
    sys.modules["__main__"] = types.ModuleType("__main__")


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
        found = main.get(root, _absent)
        if found is _absent or found is not self._main.get(root, _absent):
            return False
        for name in path:
            found = getattr(found, name, _absent)
        # What was sent by value once may have been rebound in the workers: it goes on so.
        return found is thing and all(
            main.get(name, _absent) is self._main.get(name, _absent) and name not in _tracked
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
            known = self._names[thing] = _dumps(thing), names
        return known


_here = threading.local()  # ``held``: by the workers for which something is being pickled


class _Sent(NamedTuple):
    """A pickled function, good for as long as what it was made of is the same."""

    data: bytes
    made_of: tuple[Any, ...]
    names: tuple[str, ...]  # in ``__main__``, and there or not
    values: tuple[Any, ...]


_functions: dict[bytes, Any] = {}  # in a worker: loaded, by their pickle
_sent: weakref.WeakKeyDictionary[Any, _Sent] = weakref.WeakKeyDictionary()


def _dumps_function(fn: Any) -> tuple[bytes, bool]:
    """The pickle of ``fn``, and whether a worker may keep what it loads: not if it carries state."""
    if type(fn) is types.BuiltinFunctionType:
        if fn.__self__ is not None and type(fn.__self__) is not types.ModuleType:
            return dumps(fn), False
        made_of: tuple[Any, ...] = ()
    elif type(fn) is types.FunctionType and fn.__closure__ is None and not fn.__dict__ and _is_findable(fn):
        made_of = (fn.__code__, fn.__defaults__, fn.__kwdefaults__)
    else:
        return dumps(fn), False
    known = _sent.get(fn)
    if known is not None and known.made_of == made_of and (not known.names or _is_current(known)):
        return known.data, True
    names = _names_in_main(fn)
    if names is None:
        return dumps(fn), False
    main = _main()
    sent = _Sent(dumps(fn), made_of, tuple(names), tuple(main.get(name, _absent) for name in names))
    _sent[fn] = sent
    return sent.data, True


def _is_findable(fn: types.FunctionType) -> bool:
    """By reference, or in ``__main__``, whose globals are looked at: not a lambda of another module."""
    return "<" not in fn.__qualname__ or fn.__globals__ is _main()


def _is_current(sent: _Sent) -> bool:
    main = _main()
    return all(main.get(name, _absent) is value for name, value in zip(sent.names, sent.values))


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
            value = main.get(name, _absent)
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


def _main() -> dict[str, Any]:
    return sys.modules["__main__"].__dict__


# ------------------------------------------------------------------- picklers


class _Pickler(pickle.Pickler):
    """The C pickler with multiprocessing's own reducers (connections, sockets, bound methods)."""

    dispatch_table: ClassVar[dict[type, Any]] = {}  # type: ignore[misc]
    made_of: ClassVar[tuple[int, int]] = (0, 0)


def _refresh_reducers() -> None:
    """A plain dict of both tables, made anew when one has grown: a ``ChainMap`` doubles the cost of a call."""
    ours, more = ForkingPickler._extra_reducers, copyreg.dispatch_table  # type: ignore[attr-defined]
    if _Pickler.made_of != (len(ours), len(more)):
        _Pickler.dispatch_table = {**more, **ours}
        _Pickler.made_of = (len(ours), len(more))


def _dumps(value: Any) -> bytes:
    _refresh_reducers()
    file = io.BytesIO()
    _Pickler(file, PROTOCOL).dump(value)
    return file.getvalue()


def dumps_by_value(value: Any) -> bytes:
    """Pickle what goes to a worker in one go: what is handed to a process at its start is noted at every pickling."""
    return _dumps_by_value(value, shared_main=True)


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
            """The same, but functions of ``__main__`` keep sharing its namespace at the far end."""

            def reducer_override(self, obj: Any) -> Any:
                if type(obj) is _LruCache and obj.__module__ in _MAINS:
                    return _cached, (obj.cache_parameters(), obj.__wrapped__)
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
                return make, (code, _TheirMain(), *more), (state, slots), None, None, _set_function_of_main

        _by_value_classes[:] = ByValueHome, ByValue
    return _by_value_classes[shared_main]


_by_value_classes: list[Any] = []


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
# In a worker: which version of each global it was given last.
_given: dict[str, int] = {}
# In a forked worker: what it found in ``__main__``.  The same class must not be there twice, once by
# inheritance and once by value; but what an initializer has assigned since is the worker's own.
_inherited: dict[str, Any] = {}


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


def _cached(parameters: dict[str, Any], fn: Any) -> Any:
    return functools.lru_cache(**parameters)(fn)


def _set_function_of_main(fn: Any, state: Any) -> None:
    """In the worker: what cloudpickle does, but only globals that were rebound at home are assigned."""
    from cloudpickle.cloudpickle import _function_setstate

    main = _main()
    for name, (version, value) in state[1]["__globals__"].items():
        # Not what is older than what it has: a task may be pickled before another one and run after it.
        known = _given.get(name)
        if isinstance(value, Unsent):
            main.setdefault(name, value)  # a forked worker has the real one, and an initializer may have made one
            continue
        is_theirs = isinstance(main.get(name, value), Unsent) or name not in main
        is_theirs = is_theirs or main[name] is _inherited.get(name, _absent)
        if (known is None and is_theirs) or (known is not None and version > known):
            main[name] = value
        _given[name] = version if known is None else max(known, version)
    state[1]["__globals__"] = {}
    _function_setstate(fn, state)


def _let_go_in_child() -> None:
    # Another thread may have held it at the fork.
    global _tracking
    _tracking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
