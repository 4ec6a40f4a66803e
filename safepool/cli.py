"""The command line: words become a call of the module that does it, and its outcome an exit status.

0: done; 1: it did not succeed; 2: wrong usage; 130: interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command, ``argv`` or that of the process; its exit status.

    Raises ``SystemExit`` for wrong usage and for ``--help``.
    """
    chosen = _parser().parse_args(argv)
    try:
        status: int = chosen.run(chosen)
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
    for add in (_add_demo, _add_clean):
        add(subcommands)
    return parser


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
