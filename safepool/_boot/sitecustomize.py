"""Found first by programs under ``safepool run``: has them patched as soon as they load a process pool.

Any Python may come here, an old one or one that has no safepool: then nothing happens.  What is called sitecustomize
in that interpreter's own right is loaded after this, and takes its name.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
TRIGGERS = ("concurrent.futures.process", "pebble")
OURS = (["-m", "safepool"], ["safepool"])
policy = os.environ.get("SAFEPOOL_POLICY", "")  # now: a program may clear its environment
version, _, home = os.environ.get("SAFEPOOL_HOME", "").partition(":")
program = os.environ.get("SAFEPOOL_PROGRAM")  # the pid of the program itself: those that it starts have others
path = sys.path[:]  # without the program's own modules, which may have the names of others


def _find_the_next_one():
    sys.path[:] = [entry for entry in sys.path if entry != HERE]
    own = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", own)


def _is_for_us():
    """This Python is the one that runs safepool, and this program is another one."""
    if sys.version_info < (3, 11) or version != "%d.%d" % sys.version_info[:2]:
        return False
    program = [os.path.basename(word) for word in sys.orig_argv[1:3]]
    return bool(policy) and program[:2] != OURS[0] and program[:1] != OURS[1]


def _with_our_path(act):
    theirs = sys.path[:]
    sys.path[:] = [entry for entry in path if entry != HERE] + [home]
    try:
        return act()
    finally:
        sys.path[:] = theirs


def _watch_for_pools():
    from safepool._loading import once_loaded

    for name in TRIGGERS:
        once_loaded(name, _arm)


def _arm(module=None):
    if _is_loading_ours():
        sys.meta_path.insert(0, _Later())
        return
    their_path = sys.path[:]
    try:
        _with_our_path(lambda: _arm_now(their_path))
    except Exception:  # whatever it is, it must not come out of an import of the program's
        if sys.stderr is not None:
            sys.excepthook(*sys.exc_info())
            sys.stderr.write("safepool: this program is not hardened\n")


def _arm_now(their_path):
    from safepool.running import arm

    arm(policy, their_path, is_the_program=program == str(os.getpid()))


def _is_loading_ours():
    ours = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "safepool"]
    return any(getattr(module.__spec__, "_initializing", False) for module in ours)


class _Later:
    """The program uses safepool itself, which is just being loaded: at the next import of something else."""

    def find_spec(self, name, path=None, target=None):
        if self in sys.meta_path and not _is_loading_ours():
            try:
                sys.meta_path.remove(self)
            except ValueError:
                return  # another thread was faster
            _arm()


if _is_for_us():
    try:
        _with_our_path(_watch_for_pools)
    except ImportError:
        pass  # safepool has been removed meanwhile
_find_the_next_one()
