"""The command line: words become a call of the module that does it, and its outcome an exit status.

0: done; 1: it did not succeed; 2: wrong usage; 130: interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

FAILED = 1
WRONG = 2
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command, ``argv`` or that of the process; its exit status.

    Raises ``SystemExit`` for wrong usage and for ``--help``.
    """
    chosen = _parse(sys.argv[1:] if argv is None else argv)
    try:
        status: int = chosen.run(chosen)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _let_go_of_stdout()
        return FAILED
    return status


def _let_go_of_stdout() -> None:
    # The interpreter flushes stdout once more at its end, and would complain about the pipe then.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safepool", description="A process pool that cannot hang.")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_demo, _add_run, _add_clean):
        add(subcommands)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if argv[:1] != ["run"]:
        return parser.parse_args(argv)
    from .running import split

    # What follows the program is the program's, whatever it looks like.
    ours, program, is_python = split(argv[1:], RUN_VALUES)
    chosen = parser.parse_args(["run", *ours])
    if not program or program == ["-m"]:
        parser.error("run what? safepool run [options] SCRIPT [args], or -m MODULE [args], or -- COMMAND [args]")
    chosen.program, chosen.is_python = program, is_python
    return chosen


# ---------------------------------------------------------------- subcommands
#
# One function for each: it declares the words, and sets ``run`` to what takes the parsed options and
# returns the exit status.  What does the work is imported only when it is asked for.


def _add_demo(subcommands: Any) -> None:
    what = "show, live and in under a minute, a stock pool that hangs beside ours on the same work"
    subcommands.add_parser("demo", help=what, description=what).set_defaults(run=_run_demo)


def _run_demo(_: argparse.Namespace) -> int:
    from .demo import run

    return 0 if run(sys.stdout) else FAILED


#: The options of ``run`` that take a value, and what they say.
RUN_VALUES = {
    "--timeout": "seconds for one task, from its real start",
    "--deadline": "seconds for one task, from its submission",
    "--stall-timeout": "seconds without progress after which what runs in a pool is stopped",
    "--retry": "how often a failed task is tried again",
    "--start-method": "fork, spawn or forkserver, whatever the program asks for",
    "--preload": "modules, separated by commas: imported once, from when the program loads a pool; workers have them",
    "--leftovers": "kill (default), report or leave what tasks leave behind",
    "--time-limit": "seconds for the whole program; then SIGTERM, and SIGKILL after the grace; exit status 124",
    "--grace": "seconds from SIGTERM to SIGKILL (default: 2)",
    "--summary": "a file for the summary, as JSON",
}
NUMBERS = ("--timeout", "--deadline", "--stall-timeout", "--time-limit", "--grace")


def _add_run(subcommands: Any) -> None:
    what = "run a program with every pool in it hardened, and let nothing that it starts outlive it"
    parser = subcommands.add_parser(
        "run",
        help=what,
        description=f"{what}.",
        usage="safepool run [options] (SCRIPT | -m MODULE | -- COMMAND) [args ...]",
        epilog="Python programs that it starts are hardened too. The exit status is the program's.",
    )
    for option, told in RUN_VALUES.items():
        kind = float if option in NUMBERS else int if option == "--retry" else str
        parser.add_argument(option, type=kind, help=told)
    parser.add_argument("--quiet", action="store_true", help="no summary on stderr")
    parser.set_defaults(run=_run_program)


def _run_program(chosen: argparse.Namespace) -> int:
    from . import running

    names = ("timeout", "deadline", "stall_timeout", "retry", "start_method", "leftovers")
    policy = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    if chosen.preload is not None:
        policy["preload"] = chosen.preload.split(",")
    try:
        running.check(
            policy,
            is_python=chosen.is_python,
            time_limit_s=chosen.time_limit,
            grace_s=chosen.grace,
            summary=chosen.summary,
        )
    except (TypeError, ValueError) as error:
        print(f"safepool run: {error}", file=sys.stderr)
        return WRONG
    status = running.run(
        chosen.program,
        is_python=chosen.is_python,
        policy=policy,
        time_limit_s=chosen.time_limit,
        grace_s=2.0 if chosen.grace is None else chosen.grace,
        summary=chosen.summary,
        quiet=chosen.quiet,
    )
    if status < 0:
        running.end_by_signal(-status)
    return status


def _add_clean(subcommands: Any) -> None:
    what = "list what programs that were killed together with their keepers have left running, and end it"
    parser = subcommands.add_parser("clean", help=what, description=f"{what}. Without --end it only lists.")
    levels = ("ask", "terminate", "kill")
    parser.add_argument(
        "--end", choices=levels, help="ask before each family; send SIGTERM and wait two seconds; send SIGKILL"
    )
    parser.set_defaults(run=_run_clean)


def _run_clean(chosen: argparse.Namespace) -> int:
    from ._os import CAPABILITIES

    if "keeper" not in CAPABILITIES:
        print("pools have no keeper on this system, so nothing can be told to be theirs")
        return FAILED
    from ._cleaning import clean

    return 0 if clean(chosen.end, sys.stdout) else FAILED
