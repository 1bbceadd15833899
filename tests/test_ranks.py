"""The fork server that tests use: results of all ranks, failures told, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import rank_cases
import ranks
from ranks import RanksFailed

ROOT = Path(__file__).resolve().parent.parent


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def until(condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_every_rank_answers_and_they_meet() -> None:
    got = ranks.run("rank_cases:summed", 3, world=4, times=2)
    assert [(rank, world) for rank, world, _ in got] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [int(tensor) for _, _, tensor in got] == [72] * 4  # 4 * (3 + 4 + 5 + 6)
    assert int(ranks.run(rank_cases.summed, 3, times=1)[0][2]) == 3


def test_a_case_finds_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = ranks.run("rank_cases:world_as_seen", world=2)
    monkeypatch.setenv("MARK", "mine")
    second = ranks.run("rank_cases:world_as_seen", env={"OTHER": "1"})
    for seen in (*first, *second):
        assert seen["changed"] == "no" and seen["cwd"] == str(tmp_path) and seen["threads"] == 1
        assert seen["torch"] == first[0]["torch"]  # torch's generator begins alike everywhere
        assert seen["open"] <= 5  # stdin, stdout, stderr, and the directory that is listed
    assert [seen["mark"] for seen in (*first, *second)] == [None, None, "mine"]
    for kind in ("numpy", "random"):
        assert len({seen[kind] for seen in (*first, *second)}) == 3


def test_what_a_rank_raises_is_told() -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run("rank_cases:raising", 1, world=2)
    error = failed.value
    assert "ValueError: the seventh seal" in error.tracebacks[1] and not error.timed_out
    text = str(error)
    assert "in raising" in text and "rank 0 was here" in text and "rank 1 was here" in text
    with pytest.raises(RanksFailed, match=r"ModuleNotFoundError.*no_such_module"):
        ranks.run("no_such_module:nothing")
    with pytest.raises(RanksFailed, match=r"cannot pickle"):
        ranks.run("rank_cases:unpicklable")


@pytest.mark.parametrize(("how", "said"), [("SIGKILL", "ended by SIGKILL"), ("SIGSEGV", "Segmentation"), (3, "code 3")])
def test_a_rank_that_dies_ends_the_others(how: str | int, said: str) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run("rank_cases:ending", 1, how, world=3, grace=0.2)
    text = str(failed.value)
    assert said in text and "rank 0: killed by us" in text and "rank 2: killed by us" in text
    assert not failed.value.timed_out


def test_a_rank_that_hangs_says_where_and_leaves_nothing(tmp_path: Path) -> None:
    for limit in (8, 30, 120):  # on a busy machine both need longer to get as far
        with pytest.raises(RanksFailed) as failed:
            ranks.run("rank_cases:hanging_with_helpers", str(tmp_path), world=2, timeout=limit)
        if {file.name for file in tmp_path.iterdir()} == {"0", "1"} and "a_place_to_be_found" in failed.value.output:
            break
    assert failed.value.timed_out and "time-out" in str(failed.value)
    assert "a_place_to_be_found" in failed.value.output  # of each rank that was quick enough to say so
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 6 and alive(pids) == []


def test_what_outlives_its_rank_is_told_and_killed(tmp_path: Path) -> None:
    pid = ranks.run("rank_cases:leaving_one_behind")[0]
    assert alive([pid]) == []
    (tmp_path / "leaving.py").write_text("import rank_cases; print(rank_cases.leaving_one_behind())")
    done = ranks.script(tmp_path / "leaving.py")
    assert done.outlived == ["sleep 300"] and alive([int(done.stdout)]) == []


def test_nothing_is_left_when_pytest_is_killed(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    program = f"import ranks; ranks.run('rank_cases:hanging_with_helpers', {str(tmp_path / 'pids')!r}, world=2)"
    (tmp_path / "files").mkdir()
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TMPDIR": str(tmp_path / "files")}
    process = subprocess.Popen([sys.executable, "-c", program], env=env)
    # Its server imports for ten seconds of a processor, which a busy machine takes minutes to give.
    until(lambda: len([file for file in (tmp_path / "pids").iterdir() if not file.suffix]) == 2)
    pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    pids += [int(pid) for file in (tmp_path / "pids").iterdir() for pid in file.read_text().split()]
    assert len(set(pids)) >= 8  # server, supervisor, and of each rank itself and two helpers
    process.kill()
    process.wait()
    until(lambda: not alive(pids))
    until(lambda: not list(tmp_path.glob("files/rank*")))


def test_a_server_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of its own: what other tests still have running is that of the one that all share.
    monkeypatch.setattr(ranks, "_the_server", ranks._Server())
    ranks._server().process.kill()
    ranks._server().process.wait()
    assert int(ranks.run("rank_cases:summed", 1, times=1)[0][2]) == 1
    ranks._server().close()


def test_a_script_runs_as_under_torchrun() -> None:
    done = ranks.script(Path(__file__).with_name("rank_cases.py"), "word", world=2)
    # Ranks write into one pipe: a line may come between another one and its end.
    said = [f"script word on rank {rank} of 2" for rank in (0, 1)]
    assert all(done.stdout.count(one) == 1 for one in said)
    assert done.stdout.count("\n") == 2 and len(done.stdout) == sum(len(one) + 1 for one in said)


def test_megavlm_runs_as_it_would_by_itself() -> None:
    done = ranks.megavlm(["train", "quickstart", "data.sequence_length=1", "--print-config"], check=False)
    assert (done.code, done.codes, done.stdout, done.outlived) == (2, [2], "", [])
    assert done.stderr.startswith("megavlm: error: ")
    done = ranks.megavlm(["train", "quickstart", "training.global_batch_size=0"], 2, check=False)
    assert (done.code, done.codes) == (2, [2, 2]) and done.output.count("megavlm: error: ") == 1
    with pytest.raises(RanksFailed, match=r"megavlm train nothing(.|\n)*exit code 2(.|\n)*megavlm: error: "):
        ranks.megavlm(["train", "nothing"])
    done = ranks.megavlm(["train", "quickstart", "--print-config"], env={"WORLD_SIZE": "nine"}, check=False)
    assert "'nine' is not a number" in done.stderr


def test_a_job_in_the_background_takes_signals(tmp_path: Path) -> None:
    with ranks.start(["chat", "nowhere"], log=tmp_path / "log", apart=False) as job:
        assert job.wait(check=False, seconds=60).code == 2
    assert "megavlm: error: nowhere" in (tmp_path / "log").read_text()
    case = ("function", "rank_cases:a_place_to_be_found", ranks.pickle.dumps(((), {})), 2, 60.0, None)
    with ranks._start(*case, grace=0.2) as job:
        assert not job.poll() and len(alive([*job.pids.values()])) == 2
        with pytest.raises(TimeoutError, match="a_place_to_be_found"):
            job.wait(seconds=0.1)
        job.signal(signal.SIGTERM, 1)
        done = job.wait(check=False)
    assert done.code == -signal.SIGTERM and done.codes == [-signal.SIGKILL, -signal.SIGTERM]
    with ranks._start(*case, grace=0.2) as job:
        pids = [*job.pids.values()]
    assert alive(pids) == []  # leaving the context kills it
