"""Has something done to a module as soon as it is loaded, by whomever."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_acts: dict[str, Callable[[Any], None]] = {}


class _Watch:
    """A finder that lets the others find, and has ``_acts`` carried out."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        act = _acts.pop(name, None)
        if act is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_act(module: Any) -> None:
                load(module)
                act(module)

            spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec


_watch = _Watch()


def once_loaded(name: str, act: Callable[[Any], None]) -> None:
    """``act(module)``: now, if it is loaded.  While it acts, the package that it is in does not know it yet."""
    if name in sys.modules:
        act(sys.modules[name])
        return
    _acts[name] = act
    if _watch not in sys.meta_path:
        sys.meta_path.insert(0, _watch)


def forget(name: str) -> None:
    """Whatever was to be done then."""
    _acts.pop(name, None)
    if not _acts and _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
