"""One writer in a directory: who gets the lock, who is refused, and who notices that it is gone."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm.config.errors import MachineError
from megavlm.parallel import lock as module
from megavlm.parallel.lock import HeldError, Holder, Lock, LockView, LostError, acquire, held, read_holder
from megavlm.parallel.processes import this_process

QUICK = 0.5
"""Seconds of silence of an unseen holder in these tests; its heartbeat comes six times in it."""


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock.json"


def take(path: Path, timeout: float = QUICK) -> Lock:
    return acquire(path, "train", "output_dir: runs/a", timeout_seconds=timeout)


def holder(**changes: object) -> Holder:
    """A holder that lives, or one that differs from it."""
    process = {name: changes.pop(name) for name in ("host", "boot", "namespace", "pid", "start") if name in changes}
    us = module._us("train", QUICK)
    return dataclasses.replace(us, process=dataclasses.replace(us.process, **process), **changes)  # type: ignore[arg-type]


def seconds(work: Callable[[], Lock], since: float | None = None) -> float:
    start = time.monotonic() if since is None else since
    work().release()
    return time.monotonic() - start


def test_one_at_a_time_and_the_refused_start_names_the_other(path: Path) -> None:
    first = take(path)
    with pytest.raises(HeldError) as refused:
        take(path)
    text = str(refused.value)
    assert text.startswith("output_dir: runs/a is held by megavlm train (on host ") and "\n" not in text
    assert f"process {os.getpid()}, since 20" in text and "choose another directory" in text
    assert read_holder(path) == (first.holder, True)
    first.release()
    first.release()
    assert not list(path.parent.iterdir()) and read_holder(path) is None
    with held(path, "eval", "--out x"):
        assert path.is_file()
    assert not list(path.parent.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from megavlm.parallel.lock import acquire
lock = acquire(Path(sys.argv[1]), "train", "output_dir: x", timeout_seconds=0.5)
print("held", flush=True)
time.sleep(3000)
"""


def hold_elsewhere(path: Path, *before: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_holder_on_this_machine_costs_no_time(path: Path, reaped: bool) -> None:
    process = hold_elsewhere(path)
    with pytest.raises(HeldError, match=f"process {process.pid}"):
        take(path)
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert seconds(lambda: take(path, 300)) < 300
    process.communicate()


@pytest.mark.parametrize(
    "changes", [{"start": 1}, {"pid": 2**22 + 1}, {"pid": 2**70}], ids=["another has its number", "none", "absurd"]
)
def test_a_number_that_is_used_again_is_no_holder(path: Path, changes: dict[str, int]) -> None:
    path.write_bytes(holder(**changes).to_bytes(7))
    assert seconds(lambda: take(path, 300)) < 300


UNSEEN = pytest.mark.parametrize(
    "changes",
    [{"boot": "another"}, {"namespace": 1}, {"host": "b", "boot": "another", "pid": 1}, {"boot": ""}],
    ids=["equal host names", "another container", "another host", "an unknown kernel"],
)


@UNSEEN
def test_an_unseen_holder_that_is_silent_is_waited_for(path: Path, changes: dict[str, object]) -> None:
    path.write_bytes(holder(**changes).to_bytes(7))
    assert seconds(lambda: take(path)) > QUICK


@UNSEEN
def test_an_unseen_holder_that_lives_is_left_alone(path: Path, changes: dict[str, object]) -> None:
    """It is written as its own process does: in place. The clock in it is of no interest."""
    other = holder(**changes, since="1970-01-01 00:00:00")
    path.write_bytes(other.to_bytes(7))
    threading.Timer(QUICK / 3, lambda: path.write_bytes(other.to_bytes(8))).start()
    start = time.monotonic()
    with pytest.raises(HeldError, match=r"since 1970-01-01 00:00:00 UTC\)"):
        take(path, 300)
    assert time.monotonic() - start < 300
    assert [one.name for one in path.parent.iterdir()] == ["lock.json"]


def test_a_short_time_out_does_not_shorten_the_holders_own_heartbeat(path: Path) -> None:
    path.write_bytes(holder(boot="another", beat_seconds=0.4).to_bytes(7))
    assert seconds(lambda: take(path)) > 1.2


def test_an_unseen_holder_that_gives_it_back_meanwhile(path: Path) -> None:
    path.write_bytes(holder(boot="another").to_bytes(7))
    threading.Timer(QUICK / 3, path.unlink).start()
    assert seconds(lambda: take(path, 300)) < 300


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"process": {"pid": "x"}}', b"\xff" * 9, b"[" * 100_000, "pid", "beat"]
)
def test_a_file_that_says_nothing_is_waited_for(path: Path, content: bytes | str) -> None:
    """On a file system without links, a start that dies at once leaves an empty one."""
    odd = {"pid": holder(pid=0), "beat": holder(beat_seconds=float("inf"))}
    path.write_bytes(odd[content].to_bytes(0) if isinstance(content, str) else content)
    assert seconds(lambda: take(path)) > QUICK


SLURM = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a", "MASTER_PORT": "1", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(
    ("before", "after", "returned"),
    [
        (SLURM, {**SLURM, "SLURM_RESTART_COUNT": "1"}, True),
        ({**SLURM, "SLURM_RESTART_COUNT": "1"}, {**SLURM, "SLURM_RESTART_COUNT": "2"}, True),
        (SLURM, SLURM, False),  # two steps of one job
        ({**SLURM, "SLURM_RESTART_COUNT": "2"}, {**SLURM, "SLURM_RESTART_COUNT": "1"}, False),
        (SLURM, {**SLURM, "SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        (SLURM, {**SLURM, "SLURM_CLUSTER_NAME": "d", "SLURM_RESTART_COUNT": "1"}, False),
        ({}, {**SLURM, "SLURM_RESTART_COUNT": "1"}, False),
        (TORCHRUN, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        (TORCHRUN, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1", "MASTER_PORT": "2"}, False),
        ({**SLURM, **TORCHRUN}, {**SLURM, **TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_which_start_is_the_same_job_come_back(before: dict[str, str], after: dict[str, str], returned: bool) -> None:
    one, other = (holder(jobs=module._jobs(environment)) for environment in (before, after))
    assert module._comes_after(other, one) is returned
    assert not (returned and module._comes_after(one, other))


def test_a_job_that_comes_back_on_another_node_need_not_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the other, should it live, the time of some heartbeats to see it."""
    path.write_bytes(holder(boot="another", beat_seconds=0.1, jobs=module._jobs(SLURM)).to_bytes(7))
    for name, value in {**SLURM, "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert 0.2 < seconds(lambda: take(path, 300)) < 300


def test_a_job_that_comes_back_waits_for_its_own_last_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    process = hold_elsewhere(path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    threading.Timer(0.5, process.kill).start()
    threading.Thread(target=process.wait).start()
    assert 0.4 < seconds(lambda: take(path, 300), since=began) < 300


def test_of_many_starts_at_once_one_takes_over(path: Path) -> None:
    path.write_bytes(holder(pid=2**22 + 1).to_bytes(7))
    barrier, got, refused = threading.Barrier(8), [], []

    def start() -> None:
        barrier.wait()
        try:
            got.append(take(path))
        except HeldError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7 and not got[0].lost()
    assert [one.name for one in path.parent.iterdir()] == ["lock.json"]
    got[0].release()


def test_what_killed_starts_left_does_not_stand_in_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = holder(pid=2**22 + 1)
    path.write_bytes(dead.to_bytes(7))
    path.with_name(f"lock.json.{dead.token}.taken").touch()
    path.with_name("lock.json.x.new").write_bytes(dead.to_bytes(0))
    monkeypatch.setattr(module, "_CLAIM_SECONDS", 0.3)
    lock = take(path)
    assert [one.name for one in path.parent.iterdir()] == ["lock.json"]
    lock.release()


def test_a_file_system_without_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    lock = take(path)
    with pytest.raises(HeldError):
        take(path)
    lock.release()
    assert not list(path.parent.iterdir())


def test_an_answer_that_was_lost_on_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends the request again, and hears that the file, its own, is there."""
    link = os.link

    def twice(*words: Path) -> None:
        link(*words)
        link(*words)

    monkeypatch.setattr(os, "link", twice)
    take(path).release()
    assert not list(path.parent.iterdir())


def wait_for(condition: Callable[[], bool], limit: float = 300.0) -> bool:
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def replace(path: Path, other: Holder) -> None:
    beside = path.with_name("other")
    beside.write_bytes(other.to_bytes(0))
    beside.rename(path)


def test_the_heartbeat_goes_on_and_ends_where_another_has_the_lock(path: Path) -> None:
    lock = take(path)
    before = path.read_bytes()
    assert wait_for(lambda: path.read_bytes() != before) and len(path.read_bytes()) == len(before)
    other = holder(host="elsewhere", pid=11)
    replace(path, other)
    assert wait_for(lock.lost)
    time.sleep(2 * lock.beat_seconds)
    assert path.read_bytes() == other.to_bytes(0)  # nothing of ours came into it
    with pytest.raises(LostError, match=r"held by megavlm train \(on host elsewhere, process 11"):
        lock.check()
    lock.release()
    assert path.read_bytes() == other.to_bytes(0)


@pytest.mark.parametrize("how", ["taken", "removed", "unreadable"])
def test_after_a_hang_nothing_is_written_before_a_look(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped has missed its heartbeats when it goes on: the first thing it does may be to write."""
    lock = acquire(path, "train", "x", timeout_seconds=60)  # its thread sleeps for 5 s
    view = LockView(path, lock.token, lock.beat_seconds, 60)
    assert not lock.lost() and not view.lost()
    if how == "taken":
        replace(path, holder())
    elif how == "removed":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    assert not lock.lost()  # a moment ago it was ours, and nobody takes a lock over that fast
    real = module._now()
    monkeypatch.setattr(module, "_now", lambda: real + 61)
    assert lock.lost() and view.lost()
    with pytest.raises(MachineError, match=r"^lost the lock "):
        view.check()
    lock.release()


def test_a_lock_that_is_ours_after_a_hang(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = acquire(path, "train", "x", timeout_seconds=60)
    real = module._now()
    monkeypatch.setattr(module, "_now", lambda: real + 600)
    assert not lock.lost()
    lock.release()
    assert not path.exists()


def test_a_full_disk_costs_heartbeats_not_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    lock = take(path)
    assert wait_for(lambda: "no heartbeat was written" in caplog.text)
    assert not lock.lost()
    lock.release()


def test_a_forked_process_gives_nothing_back(path: Path) -> None:
    lock = take(path)
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.is_file() and not lock.lost()
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces")
@pytest.mark.parametrize("words", [("--uts",), ("--pid", "--fork", "--mount-proc")], ids=["host name", "container"])
def test_real_namespaces(path: Path, words: tuple[str, ...]) -> None:
    """Another host name on this kernel changes nothing; another container's processes cannot be seen."""
    try:
        process = hold_elsewhere(path, "unshare", *words)
    except AssertionError:
        pytest.skip("namespaces are not permitted here")
    found = read_holder(path)
    assert found is not None and found[1] is (True if words == ("--uts",) else None)
    assert (found[0].process.namespace == this_process().namespace) == (words == ("--uts",))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    needed = seconds(lambda: take(path))
    assert words == ("--uts",) or needed > QUICK
