"""``safepool run``: the program behaves as without it, its pools are hardened, and nothing outlives it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import psutil
import pytest

from safepool import CAPABILITIES, cli
from tests.support import LIMIT_S, until

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="nothing adopts orphans here")

MARK = "SAFEPOOL_TEST_RUN"
GONE_S = 1.5
RUN = [sys.executable, "-m", "safepool", "run"]


class Program:
    """A command under ``safepool run``, and all that comes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        self.started: list[subprocess.Popen[str]] = []

    def script(self, text: str, name: str = "script.py") -> str:
        (self.folder / name).write_text(text)
        return str(self.folder / name)

    def environ(self, **more: str) -> dict[str, str]:
        return {**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), **more}

    def run(self, *words: str, plain: bool = False, **more: str) -> subprocess.CompletedProcess[str]:
        """To its end; ``plain``: without ``safepool run``, by the interpreter."""
        return subprocess.run(
            [*([sys.executable] if plain else RUN), *words],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=self.folder,
            env=self.environ(**more),
            stdin=subprocess.DEVNULL,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*RUN, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=self.folder,
            env=self.environ(),
            **options,
        )
        self.started.append(process)
        return process

    def wait_for(self, name: str) -> str:
        """Until the program has written that file whole: what is in it."""
        path = self.folder / name
        until(lambda: path.exists() and path.read_text().endswith("\n"), f"{name} is written")
        return path.read_text().strip()

    def left(self) -> list[psutil.Process]:
        """All processes that came of it, seen by their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def is_gone(self) -> bool:
        """Soon, and no folder of ours either."""
        end = monotonic() + GONE_S
        while (self.left() or self.folders()) and monotonic() < end:
            sleep(0.02)
        return not self.left() and not self.folders()

    def folders(self) -> list[Path]:
        return list(self.temporary.iterdir())


def exit_status(pid: int) -> int:
    """Of a child, when it has ended."""
    until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "it has ended")
    return os.waitstatus_to_exitcode(os.waitpid(pid, os.WNOHANG)[1])


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    for process in made.started:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait(LIMIT_S)
    for stray in made.left():
        with suppress(psutil.Error):
            stray.kill()


# ---------------------------------------------------------- it behaves as without

POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

class Thing:
    def __init__(self, number):
        self.number = number

def make(number):
    return Thing(number)

def main():
    with ProcessPoolExecutor(2) as pool:
        things = [future.result() for future in as_completed([pool.submit(make, n) for n in range(5)])]
    print(__name__, sys.argv[1:], sorted(thing.number for thing in things), type(things[0]) is Thing)
"""
SAME = {
    "a main guard": POOL + 'if __name__ == "__main__":\n    main()\n',
    "no main guard": POOL + "main()\n",
    "multiprocessing's own pool": """
import multiprocessing
class Thing:
    number = 3
def make(n):
    return Thing()
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print([type(thing) is Thing for thing in pool.map(make, range(4))])
""",
    "it raises": POOL + 'main()\nraise ValueError("no more")\n',
    "it exits with 3": POOL + "main()\nsys.exit(3)\n",
    "it is killed": "import os, sys\nprint('so far', flush=True)\nos.kill(os.getpid(), 9)\n",
    "it is terminated": "import os\nos.kill(os.getpid(), 15)\n",
    "what it is": """
import sys
print(__name__, __file__, __spec__, sys.argv, sys.path[0], [entry for entry in sys.path if "_boot" in entry])
print(sorted(name for name in globals()), sys.flags)
""",
}


@pytest.mark.parametrize("kind", SAME)
def test_a_script_behaves_as_by_the_interpreter(program: Program, kind: str) -> None:
    """Standard output, exit status, ``__main__`` and arguments are the same; and nothing is left."""
    script = program.script(SAME[kind])
    plain = program.run(script, "-x", "--timeout", "5", plain=True)
    ours = program.run(script, "-x", "--timeout", "5")
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    told = [line for line in ours.stderr.splitlines() if not line.startswith("safepool: 5 tasks done, 0 failed")]
    assert told == plain.stderr.splitlines()
    assert program.is_gone()


def test_a_module_behaves_as_by_the_interpreter(program: Program) -> None:
    """``-m``, with the module's own ``__spec__`` and the working directory as the first place to import from."""
    program.script(SAME["no main guard"] + "print(__spec__.name, __file__, sys.path[0])", "package_of_one.py")
    plain = program.run("-m", "package_of_one", "-m", "x", plain=True)
    ours = program.run("-m", "package_of_one", "-m", "x")
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert "package_of_one" in ours.stdout
    missing = program.run("-m", "no_such_module")
    assert (missing.returncode, "No module named no_such_module" in missing.stderr) == (1, True)


def test_it_reads_what_it_is_given(program: Program) -> None:
    """Its standard input is the caller's."""
    done = subprocess.run(
        [*RUN, "--", "tr", "a-z", "A-Z"], input="words\n", capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "WORDS\n", "")


def test_descriptors_are_inherited_and_streams_are_let_go(program: Program) -> None:
    """``3<file``, a jobserver; and whoever reads the program's output sees it close that."""
    script = program.script("import os\nprint(os.read(7, 9))\nos.close(1)\nimport time\ntime.sleep(4)")
    command = f"{' '.join(RUN)} {script} 7</dev/null | (cat; date +%s.%N)"
    began = time()
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S)
    said, ended = done.stdout.splitlines()
    assert said == "b''"
    assert time() - float(ended) > 0.8, f"{began=}"


def test_an_entry_of_its_path_that_means_here_stays(program: Program) -> None:
    """``PYTHONPATH=src:`` is an everyday idiom."""
    (program.folder / "below").mkdir()
    program.script("print('found')", "in_the_root.py")
    script = program.script("import in_the_root", "below/script.py")
    assert program.run(script, PYTHONPATH="/nowhere:").stdout == "found\n"


def test_modules_of_its_own_may_have_any_name(program: Program) -> None:
    """The command line is not made of them."""
    program.script("print('mine')", "argparse.py")
    done = program.run("--timeout", "9", program.script("import argparse\n" + POOL + "main()", "script.py"))
    assert done.stdout.splitlines()[0] == "mine"
    assert "True" in done.stdout
    assert "safepool: 5 tasks done" in done.stderr


def test_it_may_clear_its_environment_and_ask_what_is_there(program: Program) -> None:
    """Its pools are hardened all the same."""
    for before in ("os.environ.clear()", "importlib.util.find_spec('concurrent.futures.process')"):
        text = f"import importlib.util, os, sys\n{before}\n" + POOL + "main()\nprint(ProcessPoolExecutor.__mro__[1])"
        done = program.run(program.script(text))
        assert "SafePoolExecutor" in done.stdout, done.stderr


def test_options_of_the_interpreter_are_the_programs(program: Program) -> None:
    """Those that would keep it from being hardened are refused."""
    script = program.script("import sys; print(sys.flags.optimize, sys._xoptions)")
    command = [sys.executable, "-O", "-X", "int_max_str_digits=4321", *RUN[1:], script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == "1 {'int_max_str_digits': '4321'}\n"


def test_closed_streams_change_no_status(program: Program) -> None:
    """And what is said of the program goes nowhere else."""
    script = program.script("raise SystemExit(4)")
    for closed in (">&-", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{' '.join(RUN)} {script} {closed}"], capture_output=True, text=True, timeout=LIMIT_S
        )
        assert (done.returncode, done.stdout) == (4, "")


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_a_summary_goes_where_it_is_sent(program: Program, kind: str) -> None:
    """A pipe, or a device, is written to and not replaced; a link stays one."""
    path = program.folder / kind
    script = program.script(POOL + "main()")
    if kind == "fifo":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert program.run("--summary", str(path), script).returncode == 0
            assert json.loads(os.read(reader, 9999))["done"] == 5
        finally:
            os.close(reader)
        assert path.is_fifo()
    else:
        path.symlink_to(program.folder / "target")
        assert program.run("--summary", str(path), script).returncode == 0
        assert path.is_symlink()
        assert json.loads((program.folder / "target").read_text())["done"] == 5


def test_a_sitecustomize_of_its_own_is_loaded(program: Program) -> None:
    """Ours comes before it, has it loaded, and leaves it the name."""
    program.script("import sys; sys.stdout.write(f'customized {__file__}\\n')", "sitecustomize.py")  # in one write
    script = program.script(POOL + "import sitecustomize; print(sitecustomize.__file__)\nmain()")
    done = program.run(script, PYTHONPATH=str(program.folder))
    theirs = str(program.folder / "sitecustomize.py")
    # (As under the interpreter alone it is loaded by the process that workers are forked from, too.)
    assert {f"customized {theirs}", theirs} == {*done.stdout.splitlines()[:-1]}
    assert "safepool: 5 tasks done" in done.stderr


# ------------------------------------------------------------------ it is hardened

BAD = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
def work(n):
    if n == 1: os._exit(0)
    if n == 2: time.sleep(600)
    if n == 3: raise ValueError("a bad agent")
    return n
with ProcessPoolExecutor(2) as pool:
    done = 0
    for future in as_completed([pool.submit(work, n) for n in range(8)]):
        try: done += future.result() >= 0
        except Exception: pass
print("done", done)
"""


def test_its_pools_have_the_policy_and_the_summary_tells(program: Program) -> None:
    """A program that would hang, and swallows errors: it ends, and both people and programs are told."""
    script = program.script(BAD)
    done = program.run("--timeout", "0.5", "--retry=1", "--summary", "told.json", script)
    assert (done.returncode, done.stdout) == (0, "done 5\n")
    told = json.loads((program.folder / "told.json").read_text())
    assert (told["done"], told["failed"], told["retried"], told["workers_lost"]) == (5, 3, 3, 2)
    assert (told["exit_status"], told["left"], told["stopped"]) == (0, [], "")
    assert done.stderr.startswith("safepool: 5 tasks done, 3 failed")
    quiet = program.run("--timeout", "0.5", "--quiet", script)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "done 5\n", "")


def test_programs_that_it_starts_are_hardened_too(program: Program) -> None:
    """By their environment; also from a shell, and a policy within a policy has precedence."""
    bad = program.script(BAD, "bad.py")
    inner = f"{sys.executable} -m safepool run --timeout 0.3 {bad}"
    for command in (f"{sys.executable} {bad}; echo so", f"{inner}; echo so"):
        done = program.run("--timeout", "0.6", "--", "sh", "-c", command)
        assert (done.returncode, done.stdout) == (0, "done 5\nso\n")
        assert "ran longer than its timeout of 0.3 s" in done.stderr or "0.6 s" in done.stderr
        assert ("of 0.3 s" in done.stderr) == ("--timeout 0.3" in command)


def test_pebble_is_stood_in_for_whoever_is_loaded_first(program: Program) -> None:
    """Pebble loads what we wait for while it is only half loaded itself."""
    pytest.importorskip("pebble")
    text = """
{}
import os
from pebble import ProcessPool, ProcessExpired
with ProcessPool(2) as pool:
    gone, there = pool.schedule(os._exit, args=(0,)), pool.schedule(abs, args=(-1,))
    try: gone.result()
    except ProcessExpired as error: print("expired", error.exitcode, there.result())
"""
    for before in ("", "from concurrent.futures import ProcessPoolExecutor", "import concurrent.futures.process"):
        done = program.run(program.script(text.format(before)))
        assert (done.returncode, done.stdout) == (0, "expired 0 1\n"), done.stderr
        assert "safepool: 1 tasks done, 1 failed" in done.stderr


def test_workers_are_forked_with_what_is_preloaded(program: Program) -> None:
    """Workers that are replaced again and again do not import the same again and again."""
    text = """
from concurrent.futures import ProcessPoolExecutor
def loaded():
    import sys
    return [name in sys.modules for name in ("wave", "colorsys", "this")]
with ProcessPoolExecutor(1) as pool:
    print(pool.submit(loaded).result())
"""
    script = program.script(text)
    assert program.run(script).stdout == "[False, False, False]\n"
    assert program.run("--preload", "wave,colorsys", script).stdout == "[True, True, False]\n"


def test_what_is_preloaded_is_imported_while_the_program_starts(program: Program) -> None:
    """From when it loads a pool; once; also what lies beside the script; and not by what the program starts."""
    note = "import os\nwith open('log', 'a') as file: print(os.getpid(), file=file)\n"
    program.script(note, "beside.py")
    text = """
import os, subprocess, sys, time
import concurrent.futures.process
end = time.monotonic() + 20
while not os.path.exists("log") and time.monotonic() < end:
    time.sleep(0.01)
subprocess.run([sys.executable, "-c", "from concurrent.futures.process import ProcessPoolExecutor"], check=True)
from concurrent.futures import ProcessPoolExecutor
def who():
    import beside
    return os.getpid()
with ProcessPoolExecutor(1) as pool:
    worker = pool.submit(who).result()
imported = list(map(int, open("log").read().split()))
print(len(imported), os.getpid() in imported, worker in imported)
"""
    done = program.run("--preload", "beside", program.script(text))
    assert (done.returncode, done.stdout) == (0, "1 False False\n"), done.stderr
    assert program.is_gone()


def test_what_is_preloaded_is_what_the_program_would_import(program: Program) -> None:
    """Its path may change after it has loaded a pool: workers have what the path has when they are started."""
    for folder in ("first", "second"):
        (program.folder / folder).mkdir()
        program.script(f"where = {folder!r}", f"{folder}/found.py")
    text = """
import sys
sys.path.insert(0, "first")
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, "second")
def where():
    import sys
    return sys.modules["found"].where
with ProcessPoolExecutor(1) as pool:
    print(pool.submit(where).result())
"""
    done = program.run("--preload", "found", program.script(text))
    assert (done.returncode, done.stdout) == (0, "second\n"), done.stderr


@pytest.mark.parametrize("options", [(), ("--preload", "json")])
def test_a_program_without_pools_has_no_children_but_its_own(program: Program, options: tuple[str, ...]) -> None:
    """It may wait for all that it has; without a preload also if it has only loaded a pool."""
    text = f"""
import os
if not {len(options)}:
    import concurrent.futures.process
if os.fork() == 0:
    os._exit(0)
try:
    while True:
        print(os.wait()[1])
except ChildProcessError:
    print("all")
"""
    done = program.run("--time-limit", "20", *options, program.script(text))
    assert (done.returncode, done.stdout) == (0, "0\nall\n"), done.stderr


def test_a_program_that_uses_safepool_itself_is_hardened_too(program: Program) -> None:
    """Loading safepool loads what we wait for: then it is patched at the next import."""
    text = """
from safepool import SafePoolExecutor
import concurrent.futures, wave
print(concurrent.futures.ProcessPoolExecutor.__mro__[1] is SafePoolExecutor)
"""
    done = program.run(program.script(text))
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_program_without_pools_loads_nothing_of_ours(program: Program) -> None:
    """Whatever is not needed is not paid for."""
    text = "import sys, asyncio, concurrent.futures; print([m for m in sys.modules if m.startswith('safepool')])"
    done = program.run(program.script(text))
    assert (done.stdout, done.stderr) == ("['safepool', 'safepool._loading']\n", "")


# ------------------------------------------------------------- nothing outlives it

LEAVER = """
import os, signal, subprocess, sys, time
def leave(*words, **options):
    return subprocess.Popen(["sleep", "600", *words], **options)
leave(start_new_session=True)
leave(env={})
subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & sleep 600"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
os.wait()
"""
READY = "open('ready', 'w').write(f'{os.getpid()}\\n')\n"


def test_what_a_program_leaves_is_ended_and_named(program: Program) -> None:
    """Daemons, processes without an environment, and those that are deaf to SIGTERM, which take the grace."""
    began = monotonic()
    done = program.run("--grace", "0.5", program.script(LEAVER + "print('bye')"))
    assert monotonic() - began < 8
    assert (done.returncode, done.stdout) == (0, "bye\n")
    assert "the program left processes behind" in done.stderr
    assert "(sleep 600), ended" in done.stderr
    assert program.is_gone()


def test_what_is_left_on_purpose_stays(program: Program) -> None:
    """``leave_running`` is respected here too."""
    text = """
import subprocess, safepool
with safepool.leave_running():
    print(subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""
    done = program.run(program.script(text))
    survivor = psutil.Process(int(done.stdout))
    assert survivor.is_running()
    survivor.kill()
    until(lambda: not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE, "it is gone")


@pytest.mark.parametrize("who", ["run", "guard", "program", "group"])
def test_whoever_is_killed_nothing_is_left(program: Program, who: str) -> None:
    """By SIGKILL: ``safepool run`` itself, its guard, the program, or their whole process group."""
    process = program.start(program.script(LEAVER + READY + "time.sleep(600)"), start_new_session=True)
    pid = int(program.wait_for("ready"))
    guard = next(child for child in psutil.Process(process.pid).children() if child.name() == "safepool-guard")
    assert len(program.left()) >= 6
    if who == "program":
        os.kill(pid, signal.SIGKILL)
    elif who == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        (guard if who == "guard" else process).kill()
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    until(program.is_gone, "all is gone", 6 if who == "program" else GONE_S)


def test_what_is_left_when_both_are_killed_is_found_by_its_tag(program: Program) -> None:
    """In the same moment: ``safepool clean``, or the next program with a pool, ends it."""
    process = program.start(program.script(LEAVER + READY + "time.sleep(600)"))
    pid = int(program.wait_for("ready"))
    guard = next(child for child in psutil.Process(process.pid).children() if child.name() == "safepool-guard")
    known = Path(os.environ["XDG_RUNTIME_DIR"], "safepool")
    named = f"user: {process.pid}\n"
    until(lambda: any(named in file.read_text() for file in known.iterdir()), "the guard has said whose it is")
    process.send_signal(signal.SIGSTOP)
    guard.kill()
    process.kill()
    process.wait(LIMIT_S)
    until(lambda: not psutil.pid_exists(pid), "the program itself ends with its guard")
    clean = [sys.executable, "-m", "safepool", "clean", "--end", "kill"]
    done = subprocess.run(clean, capture_output=True, text=True, timeout=LIMIT_S, env=program.environ())
    assert f"left by process {process.pid}" in done.stdout
    until(lambda: not program.left(), "all is gone", GONE_S)
    for folder in program.folders():
        folder.rmdir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_the_programs(program: Program, number: signal.Signals) -> None:
    """It is passed on, the program decides, and then everything ends; the status is the program's."""
    cleans = f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
    process = program.start(program.script(LEAVER + cleans + READY + "time.sleep(600)"))
    program.wait_for("ready")
    process.send_signal(number)
    assert process.wait(LIMIT_S) == 7
    assert program.is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM])
def test_a_program_that_goes_on_goes_on(program: Program, number: signal.Signals) -> None:
    """A server that reads its settings again, or takes its time to clean up: nobody else decides, however often."""
    text = f"""
import os, signal, time
heard = []
signal.signal({int(number)}, lambda *_: heard.append(1))
{READY}
while len(heard) < 4:
    time.sleep(0.01)
time.sleep(0.5)
os._exit(10 + len(heard))
"""
    process = program.start("--grace", "0.1", program.script(text))
    program.wait_for("ready")
    for _ in range(4):
        process.send_signal(number)
        sleep(0.15)
    assert process.wait(LIMIT_S) == 14
    assert program.is_gone()


def test_what_the_caller_has_it_ignore_is_ignored(program: Program) -> None:
    """``nohup``: neither the program nor ``safepool run`` ends when the terminal hangs up."""
    process = program.start(
        program.script(READY.replace("open", "import os, time\nopen", 1) + "time.sleep(1)\nos._exit(5)"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    program.wait_for("ready")
    process.send_signal(signal.SIGHUP)
    assert process.wait(LIMIT_S) == 5


def test_a_hang_up_of_the_terminal_reaches_the_program(program: Program) -> None:
    """The kernel tells the leader of the session only, and that is ``safepool run`` here."""
    text = "import signal, sys\n" + (
        "signal.signal(signal.SIGHUP, lambda *_: (open('cleaned', 'w').write('up\\n'), sys.exit(0)))\n"
    )
    script = program.script(text + READY.replace("open", "import os, time\nopen", 1) + "time.sleep(600)")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ[MARK] = program.mark
        os.chdir(program.folder)
        os.execv(RUN[0], [*RUN, script])
    program.wait_for("ready")
    os.close(terminal)
    assert program.wait_for("cleaned") == "up"
    assert exit_status(pid) == 0


def test_commands_that_end_at_once_are_seen_to_end(program: Program) -> None:
    """However fast: thirty of them, and none is waited for twice."""
    for _ in range(30):
        assert program.run("--", "true").returncode == 0


def test_ctrl_c_while_it_starts_is_the_programs(program: Program) -> None:
    """It waits until there is a program to get it."""
    for late_ms in range(12):
        process = program.start("--", "sleep", "30", start_new_session=True)
        until(lambda: psutil.Process(process.pid).children(), "the guard is there")
        sleep(late_ms / 1e3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(LIMIT_S) == -signal.SIGINT


@pytest.mark.slow
def test_a_long_grace_ends_in_a_kill_all_the_same(program: Program) -> None:
    """What is deaf to SIGTERM is killed after the grace, and only then given time to be gone."""
    text = "import subprocess\nsubprocess.Popen(['sh', '-c', \"trap '' TERM; sleep 600 & wait; sleep 600\"])"
    began = monotonic()
    assert program.run("--grace", "11", program.script(text)).returncode == 0
    assert 10 < monotonic() - began < 20
    assert program.is_gone()


def test_the_time_limit_is_the_programs_and_not_that_of_what_it_leaves(program: Program) -> None:
    """A program that has ended in time was not stopped; what it left has no more time, then."""
    text = "import subprocess\nsubprocess.Popen(['sh', '-c', \"trap '' TERM; sleep 600 & wait; sleep 600\"])"
    began = monotonic()
    done = program.run("--time-limit", "2", "--grace", "60", program.script(text))
    assert (done.returncode, "time limit" in done.stderr) == (0, False)
    assert monotonic() - began < 15


def test_a_guard_that_somebody_has_stopped_is_replaced(program: Program) -> None:
    """The time limit holds all the same."""
    process = program.start("--time-limit", "1", "--grace", "0.2", "--", "sleep", "60")
    until(lambda: psutil.Process(process.pid).children(), "the guard is there")
    guard = psutil.Process(process.pid).children()[0]
    until(guard.children, "the command runs")
    guard.suspend()
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    assert program.is_gone()


def test_ctrl_c_at_a_terminal_comes_once(program: Program) -> None:
    """The terminal sends it to the program too, so it is not passed on: one press, one ``KeyboardInterrupt``."""
    text = """
import time
for turn in range(2):
    try:
        print("ready", flush=True)
        time.sleep(600 if turn == 0 else 1)
    except KeyboardInterrupt: print("interrupted", turn, flush=True)
"""
    script = program.script(text)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ[MARK] = program.mark
        os.execv(RUN[0], [*RUN, script])
    try:
        seen = b""
        while b"ready" not in seen:
            assert select.select([terminal], [], [], LIMIT_S)[0], seen
            seen += os.read(terminal, 100)
        os.write(terminal, b"\x03")
        with suppress(OSError):  # its end
            while select.select([terminal], [], [], LIMIT_S)[0] and (part := os.read(terminal, 100)):
                seen += part
        assert exit_status(pid) == 0
        assert seen.count(b"interrupted") == 1
    finally:
        os.close(terminal)


def test_the_time_limit_is_for_everything(program: Program) -> None:
    """SIGTERM first; and what the program does about it has the grace."""
    process = program.run("--time-limit", "0.5", "--", "sh", "-c", "trap 'echo cleaned; exit' TERM; sleep 60 & wait")
    assert (process.returncode, process.stdout) == (124, "cleaned\n")
    assert "it was stopped at its time limit of 0.5 s" in process.stderr
    assert program.is_gone()


# ------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "run what?"),
        (["--timeout", "3"], "run what?"),
        (["-m"], "run what?"),
        (["--timeout", "soon", "x.py"], "invalid float value"),
        (["--timeout", "-1", "x.py"], "timeout must be greater than 0"),
        (["--time-limit", "0", "x.py"], "time-limit must be greater than 0"),
        (["--grace", "inf", "x.py"], "grace must be finite"),
        (["--start-method", "telepathy", "x.py"], "telepathy"),
        (["--leftovers", "eat", "x.py"], "leftovers must be"),
        (["--retry", "-3", "x.py"], "retry must be"),
        (["--summary", "/no/such/folder/x", "x.py"], "no directory for the summary"),
        (["--patience", "x.py"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_told_and_nothing_is_run(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, and what was wrong."""
    try:
        status: object = cli.main(["run", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert told in capsys.readouterr().err


def test_what_cannot_be_run_is_told_as_a_shell_does(program: Program) -> None:
    """127: there is no such command; 126: it may not be executed."""
    missing = program.run("--", "no-such-command")
    assert (missing.returncode, missing.stderr) == (
        127,
        "safepool: cannot run 'no-such-command': No such file or directory\n",
    )
    script = program.script("")
    assert program.run("--", script).returncode == 126
