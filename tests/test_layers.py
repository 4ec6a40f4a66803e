"""The house stands as it is drawn: imports point downwards, the core is pure, every file says its law."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "safepool"
FILES = sorted(PACKAGE.rglob("*.py"))

#: From the ground up.  A module may import from floors below its own only.
FLOORS = [
    {"_shapes", "_words", "_tags", "_loading", "_parts"},
    {"errors", "policy", "_tables", "_timers", "_wire", "_unpack", "_os", "_log", "_packets", "_stacks"},
    {"_blocks"},
    {"_bulk"},
    {"_summary", "_payload", "_families", "_isolation", "_leftovers", "_registry", "leaving"},
    {"_batches"},
    {"_events", "_retry", "_worker", "_contexts", "_side", "_held_up", "_sweeping"},
    {"_newborn"},
    {"_zygote", "_keep"},
    {"_zygotes"},
    {"_keeper"},
    {"_records", "_launch", "_loans"},
    {"_seats", "_link"},
    {"_core"},
    {"future", "testing", "_evidence", "_together"},
    {"_call", "_stream", "waiting"},
    {"_pending"},
    {"_links"},
    {"_watchdog"},
    {"_tally", "telling"},
    {"executor"},
    {"_pebble", "_incident", "_cleaning", "joblib_backend"},
    {"patching"},
    {"running", "_guard"},
    {"_boot"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
PURE = ["_core", "_seats", "_events", "_tables", "_timers", "_records", "policy"]
IMPURE = {
    "os", "time", "threading", "random", "pickle", "socket", "select", "selectors", "signal", "psutil",
    "multiprocessing", "subprocess", "cloudpickle", "loky", "asyncio",
}  # fmt: skip


def _module(path: Path) -> str:
    return path.parent.name if path.parent != PACKAGE else path.stem


def _imports(path: Path, *, at_start_only: bool) -> set[str]:
    """The names of the modules that a file imports; ours begin with a dot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    nodes = _at_start(tree.body) if at_start_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and (node.level > 1 or path.parent == PACKAGE):  # not within a package
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f".{name}" for name in names}
    return found


def _at_start(body: list[ast.stmt]) -> list[ast.stmt]:
    """What runs when the module is imported: not what is for type checkers only."""
    return [node for node in body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]


def test_every_module_has_its_floor() -> None:
    """The list of floors names every module of the package, and no other."""
    assert set().union(*FLOORS) == {_module(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_imports_point_downwards(path: Path) -> None:
    """A module imports only from floors below its own."""
    floor = next(n for n, modules in enumerate(FLOORS) if _module(path) in modules)
    below = set().union(*FLOORS[:floor])
    ours = {name[1:] for name in _imports(path, at_start_only=True) if name.startswith(".")}
    assert ours <= below, f"{_module(path)} imports {ours - below}, which is not below it"


@pytest.mark.parametrize("name", PURE)
def test_the_core_is_pure(name: str) -> None:
    """Neither the core nor what it stands on knows of clocks, threads, randomness, pickling or the system."""
    assert not _imports(PACKAGE / f"{name}.py", at_start_only=False) & IMPURE


@pytest.mark.parametrize("path", [p for p in FILES if _module(p) not in ("_payload", "_unpack", "_bulk")], ids=_module)
def test_nobody_else_pickles(path: Path) -> None:
    """What is pickled, and how, is decided in one place at home and in one in a worker; big data in one for both."""
    assert not _imports(path, at_start_only=False) & {"pickle", "_pickle", "cloudpickle"}


@pytest.mark.parametrize("path", [p for p in FILES if _module(p) != "_os"], ids=_module)
def test_nobody_else_asks_for_the_platform(path: Path) -> None:
    """Differences between systems are told by ``CAPABILITIES``; two limits of Windows are the stdlib's own."""
    allowed = {"executor": 2}.get(_module(path), 0)
    assert path.read_text(encoding="utf-8").count("sys.platform") <= allowed


@pytest.mark.parametrize("path", FILES, ids=_module)
def test_the_first_line_is_the_law(path: Path) -> None:
    """The first line of every file says, in a sentence, what it is for."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert told
    assert told.splitlines()[0].endswith((".", ":"))


def test_importing_safepool_loads_next_to_nothing(tmp_path: Path) -> None:
    """``import safepool`` leaves everything heavy for the first use of a name."""
    import subprocess

    code = "import sys, safepool; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.split())
    heavy = {"loky", "psutil", "tenacity", "cloudpickle", "multiprocessing", "concurrent.futures", "logging", "asyncio"}
    assert not loaded & heavy


def test_a_worker_starts_with_next_to_nothing(tmp_path: Path) -> None:
    """The first result of a program waits for these imports: what only some tasks need is not among them."""
    import subprocess

    code = "import sys; before = {*sys.modules}; import safepool._worker; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          cwd=PACKAGE.parent)  # fmt: skip
    loaded = set(done.stdout.split())
    heavy = {
        "typing", "pickle", "socket", "struct", "signal", "enum", "re", "threading", "traceback", "linecache",
        "logging", "contextlib", "dataclasses", "inspect", "weakref", "select", "multiprocessing", "concurrent",
        "cloudpickle", "safepool.errors", "safepool._payload",
    }  # fmt: skip
    assert not loaded & heavy
