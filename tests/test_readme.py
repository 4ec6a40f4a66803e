"""Every example in README runs, by itself and as a script, and prints what its comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def _promised(code: str) -> list[str]:
    return re.findall(r"print\(.*\)  # (.*)", code)


def test_there_are_examples() -> None:
    """README has examples, and each of them prints something that can be checked."""
    assert len(EXAMPLES) >= 4
    assert all(_promised(code) for code in EXAMPLES)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.strip().splitlines()[-1].strip()[:40])
def test_the_example_prints_what_it_says(code: str, tmp_path: Path) -> None:
    """The example, saved as a script without a main guard, prints the promised lines; on stderr only a summary."""
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    summary = r"safepool: \d+ tasks done, 0 failed.*\n" if "patch(" in code else ""
    assert done.returncode == 0
    assert re.fullmatch(summary, done.stderr), done.stderr
    assert done.stdout.splitlines() == _promised(code)
