"""Programs of other people's that make process pools of their own: each prints what it found, and knows nothing of us.

``python client_programs.py NAME FOLDER``, by the Python of an environment that has them.  The same under
``safepool run``.  Two need a word, for they take no pool of the standard library's: ``--ours``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

WORKERS = 2
FILES = 6
SOURCE = """
import os,sys
class  Thing{n} :
    def method ( self,a,b = {{'k':{n},}} ) :
        unused=a
        if a==None : return  [ x for x in range( {n} ) if x%2 == 0 ]
        return b [ 'k' ]+{n}*  len( "text" )
"""


def work(number: float) -> float:
    """A few milliseconds."""
    total = 0.0
    for n in range(20_000):
        total += math.sin(number + n)
    return total


def sources(folder: Path, count: int) -> list[str]:
    """Untidy modules, long enough to be worth a process."""
    paths = []
    for n in range(count):
        path = folder / f"module{n}.py"
        path.write_text("".join(SOURCE.format(n=n * 100 + part) for part in range(40)))
        paths.append(str(path))
    return paths


def run_black(folder: Path, scale: int) -> Any:
    os.environ["BLACK_CACHE_DIR"] = str(folder)
    paths = sources(folder, FILES * scale)
    sys.argv = ["black", "--quiet", "--workers", str(WORKERS), *paths]
    import black

    try:
        black.patched_main()
    except SystemExit as error:
        status = error.code
    return status, [Path(path).read_text() for path in paths]


def run_pylint(folder: Path, scale: int) -> Any:
    import io

    from pylint.lint import Run
    from pylint.reporters.text import TextReporter

    out = io.StringIO()
    run = Run(
        ["-j", str(WORKERS), "--persistent=n", *sources(folder, 4 * scale)], reporter=TextReporter(out), exit=False
    )
    return run.linter.msg_status, sorted(line for line in out.getvalue().splitlines() if ": " in line)


def run_dask(folder: Path, scale: int) -> Any:
    import dask

    parts = [dask.delayed(work)(n) for n in range(30 * scale)]
    total = dask.delayed(sum)(parts)
    found = dask.compute(total, *parts[:3], scheduler="processes", num_workers=WORKERS)
    with ProcessPoolExecutor(WORKERS) as pool:
        return found, dask.compute(total, scheduler=pool)


def run_tqdm(folder: Path, scale: int) -> Any:
    from tqdm.contrib.concurrent import process_map

    return process_map(work, range(60 * scale), max_workers=WORKERS, chunksize=2, file=open(os.devnull, "w"))


def _valley(x: Any) -> float:
    return work(0.0) * 0 + float(sum(100.0 * (x[1:] - x[:-1] ** 2.0) ** 2.0 + (1 - x[:-1]) ** 2.0))


def run_scipy(folder: Path, scale: int) -> Any:
    from scipy.optimize import differential_evolution

    with ProcessPoolExecutor(WORKERS) as pool:
        options = {"seed": 1, "maxiter": 4 * scale, "popsize": 5, "updating": "deferred", "polish": False}
        options |= {"tol": 0, "atol": -1}  # all generations, however near it is
        found = differential_evolution(_valley, [(-2, 2)] * 3, workers=pool.map, **options)
    return found.x.tolist(), found.nfev


def _likelihood(x: Any) -> float:
    return work(0.0) * 0 - 0.5 * float(x @ x)


def run_emcee(folder: Path, scale: int) -> Any:
    import emcee
    import numpy

    numpy.random.seed(3)
    start = numpy.random.randn(8, 3)
    with ProcessPoolExecutor(WORKERS) as pool:
        sampler = emcee.EnsembleSampler(8, 3, _likelihood, pool=pool)
        sampler.run_mcmc(start, 20 * scale)
    return sampler.get_chain()[-1].tolist()


def run_adaptive(folder: Path, scale: int) -> Any:
    import adaptive

    learner = adaptive.SequenceLearner(work, sequence=list(range(60 * scale)))
    adaptive.BlockingRunner(learner, goal=lambda found: found.done(), executor=ProcessPoolExecutor(WORKERS))
    return [learner.data[index] for index in sorted(learner.data)]


def run_sklearn(folder: Path, scale: int, backend: str = "loky") -> Any:
    import joblib
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score

    features, classes = make_classification(600, random_state=1)
    with joblib.parallel_config(backend=backend, n_jobs=WORKERS):
        return cross_val_score(RandomForestClassifier(30 * scale, random_state=2), features, classes, cv=6).tolist()


def run_asyncio(folder: Path, scale: int) -> Any:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(WORKERS) as pool:
            return await asyncio.gather(*(loop.run_in_executor(pool, partial(work, n)) for n in range(60 * scale)))

    return asyncio.run(main())


def run_stock(folder: Path, scale: int) -> Any:
    with ProcessPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, range(60 * scale), chunksize=5)), [pool.submit(work, n).result() for n in range(10)]


PROGRAMS = {
    "black": run_black,
    "pylint": run_pylint,
    "dask": run_dask,
    "tqdm": run_tqdm,
    "scipy": run_scipy,
    "emcee": run_emcee,
    "adaptive": run_adaptive,
    "sklearn": run_sklearn,
    "asyncio": run_asyncio,
    "map": run_stock,
}
#: With this scale each takes twenty or thirty seconds, where real runs take minutes or hours.
LONG = {
    "black": 20,
    "pylint": 40,
    "dask": 280,
    "tqdm": 400,
    "scipy": 250,
    "emcee": 110,
    "adaptive": 300,
    "sklearn": 80,
    "asyncio": 400,
    "map": 400,
}
#: What their workers need and take long to import: a user would have it preloaded.
PRELOAD = {name: name for name in ("black", "pylint", "dask", "emcee", "adaptive")} | {"scipy": "scipy.optimize"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PROGRAMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=int, default=1, help="so many times the work")
    parser.add_argument(
        "--ours", action="store_true", help="what joblib is told, for it asks for no pool of the stdlib's"
    )
    options = parser.parse_args()
    program: Any = PROGRAMS[options.name]
    if options.ours and options.name == "sklearn":
        import safepool

        safepool.register_joblib()
        program = partial(program, backend="safepool")
    print(json.dumps(program(options.folder, options.scale)))


if __name__ == "__main__":
    main()
