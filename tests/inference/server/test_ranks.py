"""Two processes serve as one; silence is no error, and the end of one ends the other."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import openai
import psutil
import pytest
from learnt import ANSWER, Learnt
from serving import Served, serving, started
from test_api import asking

TIMEOUT_S = 6


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def answer(served: Served) -> str | None:
    said = client_of(served).chat.completions.create(model="tiny", messages=asking(served.picture))
    return said.choices[0].message.content


def test_two_pipeline_stages_serve_as_one(learnt: Learnt, tmp_path: Path) -> None:
    words = ("parallel.pipeline_model_parallel_size=2", f"parallel.distributed_timeout_minutes={TIMEOUT_S / 60}")
    with serving(learnt.checkpoint, learnt.picture, tmp_path / "log", *words, ranks=2) as two:
        client = client_of(two)
        with client.chat.completions.create(model="tiny", messages=asking(two.picture), stream=True) as stream:
            next(iter(stream))  # and leaves
        with pytest.raises(openai.BadRequestError, match="image 1"):
            client.chat.completions.create(model="tiny", messages=asking(b"broken"))
        assert answer(two) == ANSWER
        # Longer than a rank waits for another one: rank 0 lets the others know that it is there.
        time.sleep(1.3 * TIMEOUT_S)
        assert answer(two) == ANSWER


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.reliability)])
def test_a_process_that_dies_ends_the_server_with_a_line(killed: int, learnt: Learnt, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("parallel.tensor_model_parallel_size=2",)
    with started(learnt.checkpoint, learnt.picture, log, *words, ranks=2, torchrun=True) as two:
        assert answer(two) == ANSWER
        ranks = {int(one.environ()["RANK"]): one for one in psutil.Process(two.process.pid).children()}
        assert sorted(ranks) == [0, 1]
        ranks[killed].send_signal(signal.SIGKILL)
        assert two.process.wait(40) != 0
        assert not ranks[1 - killed].is_running()
        said = log.read_text()
        assert said.count("another process of this job is gone, and with it a part of the model: the server ends") == 1
        assert "[rank" not in said  # no traceback of a rank
        assert said.count(" loaded ") == 1


@pytest.mark.reliability
def test_no_process_outlives_torchrun(learnt: Learnt, tmp_path: Path) -> None:
    words = ("parallel.tensor_model_parallel_size=2",)
    with started(learnt.checkpoint, learnt.picture, tmp_path / "log", *words, ranks=2, torchrun=True) as two:
        ranks = psutil.Process(two.process.pid).children()
        try:
            assert len(ranks) == 2
            two.process.kill()
            _, alive = psutil.wait_procs(ranks, 20)
            assert not alive and "stopped after 0 answers" in two.log.read_text()
        finally:
            for one in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
