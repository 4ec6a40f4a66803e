"""``python -m safepool`` is the command line, and nothing else happens here."""

from __future__ import annotations

import sys

from .cli import main

# Workers of a stock pool under "spawn" import the program's main module again.
if __name__ == "__main__":
    sys.exit(main())
