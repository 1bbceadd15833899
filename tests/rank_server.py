"""The process that ``ranks`` forks from: it has imported torch, Megatron-Core and megavlm, and has one thread.

Three kinds of processes, each the parent of the next:

* the server (:func:`main`), one for each pytest: waits for cases, and forks a supervisor for each;
* a supervisor, one for each case: forks its ranks, keeps the store where they meet, enforces the time-out, and ends
  when nothing of the case is left. It adopts what a dying rank leaves behind (``PR_SET_CHILD_SUBREAPER``);
* the ranks.

The supervisor and the test talk over a socket of their own. Where that closes, or the server is gone, because pytest
was killed or no longer wants the case, all of the case is killed. Nothing here may start a thread before it forks. The
process has no ``__main__`` file, so what ``multiprocessing`` spawns in a rank imports nothing of it.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import pkgutil
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

POLL = 0.02
"""Seconds between two looks at what is about to end."""
LOOK = 0.25
"""Seconds after which a case is looked at, where none of its ranks has ended."""
LAST_WORDS = 3.0
"""Seconds that a rank has to write where it hangs."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# What commands and workers import inside their functions, once and for all ranks; of transformers what all its models
# import, for which a rank needs 1.5 s. These models, and what serves HTTP, are left to those few that need them.
MODULES = (
    "numpy", "PIL.Image", "simplejpeg", "safetensors.torch", "sentencepiece", "psutil", "pytest", "tqdm",
    "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "torch.distributed.checkpoint", "torch.profiler",
    "megavlm.cli", "megavlm.config.help", "megavlm.config.lora", "megavlm.training.loop",
    "megavlm.training.recorder", "megavlm.parallel.engine", "megavlm.commands.convert", "megavlm.commands.prepare",
    "megavlm.models.vlm", "megavlm.architectures.connectors.resampler.build",
    "megavlm.architectures.connectors.mlp.build", "megavlm.architectures.decoders.decoder.build",
    "megavlm.architectures.towers.vit.build", "megavlm.checkpoint.distributed", "megavlm.commands.eval",
    "megavlm.commands.generate", "megavlm.commands.chat", "megavlm.inference.session", "megavlm.commands.train",
    "transformers.modeling_utils",
)  # fmt: skip
ROOMS = ("megavlm.architectures", "megavlm.families")
"""All of these too: a recipe asks for the keys of every architecture, and making their classes took a rank two seconds.
Nothing is registered by that, so that a rank still finds the packages that its own environment has."""


@dataclass(frozen=True)
class Case:
    """What is to be run.

    Args:
        kind: "function", "script" or "megavlm".
        target: "module:function", or the script's file; empty for megavlm.
        arguments: the words of the command line; for a function its pickled ``(args, kwargs)``.
        world: processes; 0: one, that is not told that it is a rank.
        directory: where results are written.
        timeout: seconds.
        grace: seconds that the other ranks have after one has failed.
        environment: all of it.
        path: ``sys.path``.
        cwd: the working directory.
        stdin: a file, or None.
        stdout: the file that all ranks append to.
        stderr: the same, or the same file.
    """

    kind: str
    target: str
    arguments: Any
    world: int
    directory: str
    timeout: float
    grace: float
    environment: dict[str, str]
    path: list[str]
    cwd: str
    stdin: str | None
    stdout: str
    stderr: str


@dataclass
class Outcome:
    """How the ranks ended."""

    codes: dict[int, int] = field(default_factory=dict)
    """Exit codes by rank, negative for signals as in ``subprocess``, in the order in which they ended."""
    killed: list[int] = field(default_factory=list)
    """Ranks that we ended: after a time-out, or as another one had failed."""
    timed_out: bool = False
    outlived: list[str] = field(default_factory=list)
    """Command lines of what was left when all ranks had ended."""
    processor_seconds: float = 0.0
    """What the ranks and their children used."""


def main(descriptor: int) -> None:
    """Serve the cases that come through the socket ``descriptor``."""
    control, parent = socket.socket(fileno=descriptor), os.getppid()
    preload()
    # Only now, so that whoever waits knows that the imports went well.
    control.sendall(b"+")
    signal.signal(signal.SIGCHLD, _reap)
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        one.atexit = False  # no fork need take down what is this process's: torch's libraries, hundreds of them
    gc.collect()
    gc.freeze()  # the children need not copy the pages of what is never freed
    while os.getppid() == parent:
        if not select.select([control], [], [], 0.5)[0]:
            continue
        word, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread was started in the process that forks"
        if os.fork() == 0:
            control.close()
            _supervise(Connection(descriptors[0]))
        os.close(descriptors[0])


def preload() -> None:
    """Import what all cases need.

    Raises:
        ImportError: a module of ours is broken; the tests that fork are lost until it is not.
        RuntimeError: an import has begun to use the GPU, or registered presets.
    """
    from megavlm.parallel.device import prepare_device

    prepare_device()
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            if name.startswith("megavlm."):
                raise  # of others some are optional, and what needs them says so
    for room in ROOMS:
        for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            importlib.import_module(module.name)
    if sys.modules["megavlm.config.architecture"].MODELS.names():
        raise RuntimeError("an import has registered presets, also those of packages that a rank may not have")
    if sys.modules["torch"].cuda.is_initialized():
        raise RuntimeError("an import has begun to use the GPU, which no fork can use then")


def _reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _supervise(connection: Connection) -> NoReturn:
    """Run one case, answer with its :class:`Outcome`, and leave nothing behind."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server, case, abandoned = os.getppid(), None, False
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        case = connection.recv()
        listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        pids = {_fork(case, rank, listening, connection): rank for rank in range(case.world or 1)}
        # Threads may be started from here on: the ranks are forked.
        store = _store(listening) if case.world else None
        connection.send(("started", {rank: pid for pid, rank in pids.items()}))
        outcome = _watch(case, pids, connection, lambda: os.getppid() == server and not _closed(connection))
        del store
        connection.send(("ended", outcome))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
        abandoned = True
    except BaseException:
        try:
            connection.send(("broken", traceback.format_exc()))
        except OSError:
            pass
    finally:
        _kill_the_rest()
        if abandoned and case is not None:
            shutil.rmtree(case.directory, ignore_errors=True)
        os._exit(0)


def _store(listening: socket.socket) -> Any:
    """Serve the ranks' store on ``listening``, as torchrun's agent does."""
    from torch.distributed import TCPStore

    port = listening.getsockname()[1]
    return TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )  # fmt: skip


def _closed(connection: Connection) -> bool:
    """Whether the other side is gone; it never says a second thing."""
    return connection.poll(0)


def _watch(case: Case, pids: dict[int, int], connection: Connection, wanted: Callable[[], bool]) -> Outcome:
    """Wait for the ranks; end those that are late, or left alone by one that failed."""
    outcome, running = Outcome(), dict(pids)
    deadline = time.monotonic() + case.timeout
    ends = {os.pidfd_open(pid): pid for pid in pids}
    while running:
        for pid, code in _ended():
            rank = running.pop(pid, None)
            if rank is None:
                continue  # left behind by a rank, and adopted
            outcome.codes[rank] = code
            if code and len([one for one in outcome.codes.values() if one]) == 1:
                deadline = min(deadline, time.monotonic() + case.grace * _crowd())
        if not wanted():
            raise EOFError
        if running and time.monotonic() > deadline:
            outcome.killed = sorted(running.values())
            outcome.timed_out = not any(outcome.codes.values())
            _end(running, outcome, say_where=outcome.timed_out)
        if running:
            open_ends = [one for one, pid in ends.items() if pid in running]
            select.select([connection, *open_ends], [], [], min(LOOK, max(0.0, deadline - time.monotonic())))
    for one in ends:
        os.close(one)
    outcome.outlived = _outlived()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    outcome.processor_seconds = used.ru_utime + used.ru_stime
    return outcome


def _crowd() -> float:
    """Return how many want each core: as many times longer takes what needs one, such as to see that a rank is gone."""
    return min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def _ended() -> Iterator[tuple[int, int]]:
    """Yield the id and the exit code of each child that ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def _end(running: dict[int, int], outcome: Outcome, *, say_where: bool) -> None:
    """Kill ``running``, at once or after each has written the stacks of its threads to stderr."""
    signals = [signal.SIGABRT, signal.SIGKILL] if say_where else [signal.SIGKILL]
    for number in signals:
        for pid in running:
            os.kill(pid, signal.SIGCONT)  # a stopped rank is to write, too
            os.kill(pid, number)
        until = time.monotonic() + LAST_WORDS * _crowd()
        while running and (time.monotonic() < until or number == signal.SIGKILL):
            for pid, code in _ended():
                if pid in running:
                    outcome.codes[running.pop(pid)] = code
            time.sleep(POLL / 2)


def _outlived() -> list[str]:
    """Return the command lines of what the ranks left running, after a moment in which they may end."""
    import psutil

    until = time.monotonic() + 1.0 * _crowd()
    while True:
        list(_ended())
        left = []
        for one in psutil.Process().children(recursive=True):
            try:
                left.append(" ".join(one.cmdline()) or one.name())
            except psutil.Error:
                pass
        if not left or time.monotonic() > until:
            return left
        time.sleep(POLL)


def _kill_the_rest() -> None:
    """Kill every descendant, until there is none."""
    import psutil

    while True:
        for one in psutil.Process().children(recursive=True):
            try:
                one.kill()
            except psutil.Error:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(POLL / 2)


def _fork(case: Case, rank: int, listening: socket.socket, connection: Connection) -> int:
    supervisor, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)
        port = listening.getsockname()[1]
        listening.close()
        connection.close()
        _settle(case, rank, port)
        code = _run(case, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _settle(case: Case, rank: int, port: int) -> None:
    """Give this process what a fresh one would have: its environment, files, signals, and luck of its own."""
    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    files = [
        os.open(case.stdin or os.devnull, os.O_RDONLY),
        os.open(case.stdout, flags),
        os.open(case.stderr, flags),
    ]
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(case.environment)
    if case.world:
        os.environ.update(_as_torchrun(rank, case.world, port))
    os.chdir(case.cwd)
    sys.path[:] = case.path
    importlib.invalidate_caches()
    sys.modules["numpy"].random.seed()  # Python's own does so by itself; torch's begins alike in every process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()


def _as_torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a rank of one node."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank), "ROLE_NAME": "default",
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_WORLD_SIZE": "1",
        "ROLE_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _run(case: Case, rank: int) -> int:
    """Do the work; return the exit code."""
    if case.kind == "function":
        return _call(case, rank)
    words = list(case.arguments)
    try:
        if case.kind == "script":
            sys.argv = [case.target, *words]
            sys.path.insert(0, str(Path(case.target).parent))
            runpy.run_path(case.target, run_name="__main__")
            return 0
        sys.argv = ["megavlm", *words]
        return importlib.import_module("megavlm.cli").main(words)
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1


def _call(case: Case, rank: int) -> int:
    """Call the function; write what it returned, or the traceback."""
    good, value = False, b""
    try:
        module, name = case.target.split(":")
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        args, kwargs = pickle.loads(case.arguments)
        value = pickle.dumps(function(*args, **kwargs))
        good = True
    except BaseException:
        value = pickle.dumps(traceback.format_exc())
    file = Path(case.directory) / f"result-{rank}"
    file.with_suffix(".part").write_bytes(pickle.dumps((good, value)))
    file.with_suffix(".part").rename(file)
    return 0 if good else 1


def _leave(code: int) -> NoReturn:
    """End as the interpreter does, but for the long way through all of its objects."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 1
    os._exit(code & 0xFF)
