"""Found first by programs under ``safepool run``: has them patched as soon as they load a process pool.

Any Python may come here, an old one or one that has no safepool: then nothing happens.  What is called sitecustomize
in that interpreter's own right is loaded after this, and takes its name.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TRIGGERS = ("concurrent.futures.process", "pebble")


def _find_the_next_one():
    sys.path[:] = [path for path in sys.path if path != HERE]
    own = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ImportError:
        pass
    sys.modules.setdefault("sitecustomize", own)


def _is_for_us():
    """This Python is the one that runs safepool, and this program is another one."""
    words = os.environ.get("SAFEPOOL_POLICY", "")
    if sys.version_info < (3, 11) or '"python": [%d, %d]' % sys.version_info[:2] not in words:
        return False
    program = sys.orig_argv[1:]
    return "safepool" not in [os.path.basename(word) for word in program[:1]] and ["-m", "safepool"] not in [
        program[at : at + 2] for at in range(len(program))
    ]


def _watch_for_pools():
    import json

    path = sys.path[:]
    sys.path.append(json.loads(os.environ["SAFEPOOL_POLICY"])["home"])
    try:
        from safepool._loading import once_loaded
    finally:
        sys.path[:] = path
    for name in TRIGGERS:
        once_loaded(name, _arm)


def _arm(module=None):
    # (The package is loaded, and knows where the rest of it is.)
    if _is_loading_ours():
        sys.meta_path.insert(0, _Later())
        return
    from safepool.running import arm

    arm()


def _is_loading_ours():
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "safepool"]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)


class _Later:
    """The program uses safepool itself, which is just being loaded: at the next import of something else."""

    def find_spec(self, name, path=None, target=None):
        if not _is_loading_ours():
            sys.meta_path.remove(self)
            _arm()


if _is_for_us():
    try:
        _watch_for_pools()
    except ImportError:
        pass  # safepool has been removed meanwhile
_find_the_next_one()
