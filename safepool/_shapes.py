"""Named tuples and frozen classes as ``typing`` and ``dataclasses`` make them, without what importing those costs.

That is 15 ms of every program's start.  Type checkers see the real things.
"""

from __future__ import annotations

from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform

    T = TypeVar("T")
else:

    class _NamedTupleMaker(type):
        def __new__(cls, name, bases, body):
            fields = body.get("__annotations__", ())
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body.pop("__module__"))  # noqa: PYI024
            for key, value in body.items():
                setattr(made, key, value)
            return made

    NamedTuple = type.__new__(_NamedTupleMaker, "NamedTuple", (), {})

    def dataclass_transform(**_):
        return lambda decorator: decorator


__all__ = ["NamedTuple", "frozen", "later", "replace"]
_LATER: Any = object()


def later(*, init: Literal[False]) -> Any:
    """In a frozen class: a field that ``__post_init__`` sets; it is neither shown nor compared."""
    return _LATER


@dataclass_transform(frozen_default=True, field_specifiers=(later,))
def frozen(cls: type[T]) -> type[T]:
    """As ``dataclass(frozen=True, slots=True)``: fields from annotations, defaults, and a ``__post_init__``."""
    body = dict(vars(cls))
    fields: tuple[str, ...] = tuple(body["__annotations__"])
    defaults = {field: body.pop(field) for field in fields if field in body}
    asked = tuple(field for field in fields if defaults.get(field) is not _LATER)
    for key in ("__dict__", "__weakref__"):
        body.pop(key, None)
    init = _init_of(asked, defaults, "__post_init__" in body)
    init.__annotations__ = {field: body["__annotations__"][field] for field in asked} | {"return": None}
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    body |= {"__qualname__": cls.__qualname__, "__slots__": fields, "__match_args__": asked, "__init__": init}
    made: Any = type(cls.__name__, (_Frozen,), body)
    return made  # type: ignore[no-any-return]


def _init_of(fields: tuple[str, ...], defaults: dict[str, Any], is_checked: bool) -> Any:
    parameters = [f"{field}=defaults['{field}']" if field in defaults else field for field in fields]
    lines = [f"def __init__(self, {', '.join(parameters)}):"]
    lines += [f" set(self, '{field}', {field})" for field in fields]
    lines += [" self.__post_init__()"] if is_checked else []
    names: dict[str, Any] = {"defaults": defaults, "set": object.__setattr__}
    exec("\n".join(lines), names)
    return names["__init__"]


def replace(value: T, /, **changes: Any) -> T:
    """A frozen value with some fields changed."""
    return type(value)(**{field: getattr(value, field) for field in value.__match_args__} | changes)  # type: ignore[attr-defined]


class _Frozen:
    """What all frozen classes do alike."""

    __slots__: tuple[str, ...] = ()
    __match_args__: tuple[str, ...] = ()
    __replace__ = replace

    def __setattr__(self, name: str, value: Any) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        told = ", ".join(f"{field}={getattr(self, field)!r}" for field in self.__match_args__)
        return f"{type(self).__qualname__}({told})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in self.__match_args__)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, field) for field in self.__match_args__))

    def __getstate__(self) -> list[Any]:
        return [getattr(self, field) for field in self.__slots__]

    def __setstate__(self, state: list[Any]) -> None:
        for field, value in zip(self.__slots__, state):
            object.__setattr__(self, field, value)
