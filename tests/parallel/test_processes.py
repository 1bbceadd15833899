"""Processes that are told apart, and children that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavlm.parallel.processes import is_running, this_process

CHILD = """
import os, signal, sys, threading, time
from megavlm.parallel.processes import children_end_with_us, end_with_parent

def child(parent):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})  # as a reader's
    if "watch" in sys.argv:
        end_with_parent(parent)
    if "busy" in sys.argv:
        sum(range(10**12))  # gives no other thread a turn for long
    while True:
        time.sleep(1)

def fork():
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        child(parent)
    print(pid, flush=True)

if "hook" in sys.argv:
    children_end_with_us()
    children_end_with_us()
if "thread" in sys.argv:
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
else:
    fork()
print("ready", flush=True)
time.sleep(3000)
"""


def start(*words: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    parent = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "ready\n"
    time.sleep(0.5)
    return parent, child


def is_gone(process: psutil.Process, limit: float) -> bool:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("words", [("watch",), ("watch", "busy"), ("watch", "thread"), ("hook",)], ids=" ".join)
def test_a_child_ends_with_its_parent_and_not_before(words: tuple[str, ...]) -> None:
    """Also where a thread forked it that has ended since: the kernel's signal would then come too early."""
    parent, child = start(*words)
    try:
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        parent.kill()
        parent.wait()
        assert is_gone(child, 300)
    finally:
        parent.kill()
        if child.is_running():
            child.kill()


def test_the_hook_leaves_children_of_other_threads_alone() -> None:
    parent, child = start("hook", "thread")
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    parent.kill()
    child.kill()


def test_who_lives(tmp_path: Path) -> None:
    us = this_process()
    assert us.pid == os.getpid() and us.boot and us.namespace and us.start and is_running(us) is True
    # A name with brackets and blanks, which /proc shows as it is.
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    other = subprocess.Popen([program, "60"])
    time.sleep(0.1)
    stat = Path(f"/proc/{other.pid}/stat").read_text()
    assert "a) S 1 (b" in stat
    process = type(us)(us.host, us.boot, us.namespace, other.pid, int(stat.rpartition(")")[2].split()[19]))
    assert is_running(process) is True
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert is_running(process) is False
