"""The checks of the project, on every interpreter it supports: ``nox``, or ``nox -s tests-3.12``."""

from __future__ import annotations

import nox

PYTHONS = ["3.11", "3.12", "3.13"]
nox.options.sessions = ["lint", "tests"]


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install(".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The default suite."""
    session.install(".[test]")
    session.run("pytest", "-n", "2", "--dist", "worksteal", *session.posargs)


@nox.session(python=PYTHONS)
def slow(session: nox.Session) -> None:
    """A minute of chaos for each start method, and the long grids."""
    session.install(".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session(python="3.12")
def client(session: nox.Session) -> None:
    """Real programs in environments of their own: negmas and scml tournaments, old and new, and ten others."""
    session.install(".[test]")
    # Each of its tests takes minutes: no stack dumps on the way.
    session.run("pytest", "-m", "client", "-o", "faulthandler_timeout=0", "tests/clients", *session.posargs)


@nox.session(python="3.11")
def bench(session: nox.Session) -> None:
    """The quick benchmark: ratios to the stock pool beside those of the baseline."""
    session.install(".[bench]")
    session.run("python", "-m", "benchmarks.quick", *session.posargs)
