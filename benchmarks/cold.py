"""One cold start: a fresh interpreter imports a pool, opens it and has its first result; prints milliseconds."""

from __future__ import annotations

import sys
from time import perf_counter


def main() -> None:
    began = perf_counter()
    from benchmarks.pools import LIMIT_S, open_pool  # which imports what each pool needs anyhow

    pool = open_pool(sys.argv[1], workers=2)
    pool.submit(int).result(LIMIT_S)
    print((perf_counter() - began) * 1e3)
    pool.shutdown()


if __name__ == "__main__":
    main()
