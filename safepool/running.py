"""``safepool run``: hardens a program that nobody edits, and lets nothing of any program outlive it.

A Python program, and the Python programs that it starts, find in their environment where ``_boot`` is and what policy
they are to have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress

from . import _os, _summary
from .policy import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, NoReturn

    from ._packets import Left

POLICY = "SAFEPOOL_POLICY"
HOME = "SAFEPOOL_HOME"  # for which Python, and where the package is
PACKAGE = os.path.dirname(os.path.abspath(__file__))
BOOT = os.path.join(PACKAGE, "_boot")
TIMED_OUT = 124  # as ``timeout`` has it
SIGNALLED = 128  # as a shell has it
MOST_NAMED = 10


def split(words: Sequence[str], with_value: Iterable[str]) -> tuple[list[str], list[str], bool]:
    """(our own words, the program's, is it a Python program): ours end where the program begins.

    ``with_value``: those of our options that take one.
    """
    with_value = frozenset(with_value)
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            return [*words[:at]], [*words[at + 1 :]], False
        if word in ("-m", "-") or not word.startswith("-"):
            return [*words[:at]], [*words[at:]], True
        at += 2 if word in with_value else 1
    return [*words], [], True


def run(
    program: list[str],
    *,
    is_python: bool,
    policy: Mapping[str, Any],
    time_limit_s: float | None = None,
    grace_s: float = 2.0,
    summary: str | None = None,
    quiet: bool = False,
) -> int:
    """Run it; its exit status, as ``os.waitstatus_to_exitcode`` gives it, or 124 at its time limit.

    ``program``: the words after the interpreter, or a command.  Everything that it has started is ended with it.
    """
    command = [sys.executable, *_interpreter_options(), *program] if is_python else program
    with ExitStack() as stack:
        mask = set()
        if "keeper" in _os.CAPABILITIES:
            from . import _guard

            mask = stack.enter_context(_guard.held_back())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="safepool-run-", ignore_cleanup_errors=True))
        environ = environment(policy, folder)
        if "keeper" in _os.CAPABILITIES:
            status, left, why = _guard.run(
                command, environ, folder, mask=mask, time_limit_s=time_limit_s, grace_s=grace_s
            )
        else:
            status, left, why = _run_plainly(command, environ, time_limit_s, grace_s)
        told = _summary.merged(_read(folder))
    if left:
        _summary.say(f"safepool: the program left processes behind: {_named(left)}")
    if why:
        _summary.say(f"safepool: {why}")
    if told["pools"] and not quiet:
        _summary.say(_summary.words_of(told))
    if summary is not None:
        named = [{"pid": pid, "command": words, "ended": is_ended} for pid, words, is_ended in left]
        try:
            _summary.write({**told, "exit_status": status, "left": named, "stopped": why}, summary)
        except OSError as error:
            _summary.say(f"safepool: the summary cannot be written: {error}")
    return TIMED_OUT if "time limit" in why else status


def _interpreter_options() -> list[str]:
    """Those that this interpreter was started with."""
    found: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    for name, value in sys._xoptions.items():
        option = name if value is True else f"{name}={value}"
        if option not in found:
            found += ["-X", option]
    return found


def check(
    policy: Mapping[str, Any],
    *,
    is_python: bool,
    time_limit_s: float | None,
    grace_s: float | None,
    summary: str | None,
) -> None:
    """Raises ``TypeError`` or ``ValueError`` if no pool can have this policy, or no program these limits."""
    if policy:
        from .patching import Patch

        Patch(dict(policy), summary=False)
    if time_limit_s is not None:
        seconds(time_limit_s, "time-limit")
    if grace_s is not None and seconds(grace_s, "grace", zero=True) is None:
        raise ValueError("grace must be finite: what ignores SIGTERM would never be stopped")
    if is_python and (sys.flags.isolated or sys.flags.ignore_environment or sys.flags.no_site):
        raise ValueError("the interpreter's options -I, -E and -S keep a program from being hardened")
    if summary is not None and not os.path.isdir(os.path.dirname(os.path.abspath(summary))):
        raise ValueError(f"there is no directory for the summary {summary!r}")


def end_by_signal(number: int) -> NoReturn:
    """End this process as the program ended."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the one who died has left its own
    with suppress(OSError, ValueError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(SIGNALLED + number)


def environment(policy: Mapping[str, Any], folder: str) -> dict[str, str]:
    """For a program that is to be hardened, within one that is so already, perhaps: what is set here has precedence."""
    environ = dict(os.environ)
    outer = json.loads(environ.get(POLICY) or "{}")
    told = {
        "policy": {**outer.get("policy", {}), **policy},
        "folder": folder,
    }
    environ[POLICY] = json.dumps(told)
    environ[HOME] = f"{sys.version_info[0]}.{sys.version_info[1]}:{os.path.dirname(PACKAGE)}"
    paths = environ["PYTHONPATH"].split(os.pathsep) if environ.get("PYTHONPATH") else []  # (empty ones mean: here)
    environ["PYTHONPATH"] = os.pathsep.join([BOOT, *(path for path in paths if path != BOOT)])
    return environ


_is_armed = False


def arm(policy: str, path: list[str], *, is_the_program: bool) -> None:
    """In the program: patch it, and have it say at its end what became of its tasks.  Or, now, Pebble is loaded too.

    ``path``: its ``sys.path``; ``is_the_program``: itself, and not one that it has started.
    """
    global _is_armed
    if _is_armed:
        from .patching import stand_in_for_pebble

        stand_in_for_pebble()
        return
    told = json.loads(policy)
    if is_the_program:
        _preload(told["policy"], path)
    from .patching import patch

    _is_armed = True
    patched = patch(summary=False, **told["policy"])
    patched.write_at_exit(os.path.join(told["folder"], f"{os.getpid()}.json"))


def _preload(policy: Mapping[str, Any], path: list[str]) -> None:
    """Begin now, for the program has just loaded a pool: it goes on to import, and that takes it as long."""
    if policy.get("preload") and "keeper" in _os.CAPABILITIES and policy.get("start_method") in (None, "forkserver"):
        from . import _keep

        _keep.prepare(None, tuple(policy["preload"]), path)


def _read(folder: str) -> Iterable[dict[str, Any]]:
    for name in sorted(name for name in os.listdir(folder) if name.endswith(".json")):
        with suppress(OSError, ValueError), open(os.path.join(folder, name), encoding="utf-8") as file:
            yield json.load(file)


def _named(left: list[Left]) -> str:
    more = [f"and {len(left) - MOST_NAMED} more"] if len(left) > MOST_NAMED else []
    ends = {True: "ended", False: "which belongs to another user and goes on"}
    told = [f"{pid} ({words}), {ends[is_ended]}" for pid, words, is_ended in left[:MOST_NAMED]]
    return "; ".join(told + more)


def _run_plainly(
    command: list[str], environ: dict[str, str], time_limit_s: float | None, grace_s: float
) -> tuple[int, list[Left], str]:
    """Where nothing adopts orphans: what the command has started is ended as far as it can be found below it."""
    import psutil

    with subprocess.Popen(command, env=environ) as process:
        try:
            return process.wait(time_limit_s), [], ""
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
            for child in children:
                with suppress(psutil.Error):
                    child.kill()
            process.kill()
            return process.wait(grace_s), [], f"it was stopped at its time limit of {time_limit_s:g} s"
