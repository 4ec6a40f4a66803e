"""Has something done to a module as soon as it is loaded, by whomever."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_acts: dict[str, Callable[[Any], None]] = {}
_asked: set[str] = set()  # their specs are just being found


class _Watch:
    """A finder that lets the others find, and has ``_acts`` carried out."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        _act_on_what_is_loaded()
        if name not in _acts or name in _asked:
            return None
        from importlib.util import find_spec

        _asked.add(name)
        try:
            spec = find_spec(name)
        finally:
            _asked.discard(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_act(module: Any) -> None:
                load(module)
                _act(name, module)

            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec


_watch = _Watch()


def _act(name: str, module: Any) -> None:
    act = _acts.pop(name, None)  # not before: somebody may only have asked where the module is
    if act is not None:
        act(module)


def _act_on_what_is_loaded() -> None:
    """Another thread was loading it when somebody wished to act."""
    for name in tuple(_acts):
        module = sys.modules.get(name)
        if module is not None and not _is_half_loaded(module):
            _act(name, module)


def _is_half_loaded(module: Any) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def once_loaded(name: str, act: Callable[[Any], None]) -> None:
    """``act(module)``: now, if it is loaded.  While it acts, the package that it is in may not know it yet."""
    module = sys.modules.get(name)
    if module is not None and not _is_half_loaded(module):
        act(module)
        return
    _acts[name] = act
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)


def forget(name: str) -> None:
    """Whatever was to be done then."""
    _acts.pop(name, None)
    if not _acts and _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
