"""``python -m safepool`` is the command line, and nothing else happens here."""

from __future__ import annotations

import sys

# Workers of a stock pool under "spawn" import the program's main module again.
if __name__ == "__main__":
    # Python looks first in the working directory, where modules of the user's may have the names of others.
    sys.path.append(sys.path.pop(0))
    from .cli import main

    sys.exit(main())
