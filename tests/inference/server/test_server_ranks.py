"""Two processes serve as one; silence is no error, and the end of one ends the other."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from launch import ROOT
from learnt import ANSWER, Learnt
from serving import Served, serving, started
from test_api import asking

sys.path.insert(0, str(ROOT / "benchmarks"))
from soak_serve import soak

TIMEOUT_S = 9


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=600)


def answer(served: Served) -> str | None:
    messages = asking(served.picture)
    said = client_of(served).chat.completions.create(model="tiny", messages=messages, max_tokens=60)
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
        # Log probabilities are made on the last stage alone.
        (choice,) = client.chat.completions.create(
            model="tiny", messages=asking(two.picture), logprobs=True, top_logprobs=2
        ).choices
        assert choice.logprobs and choice.logprobs.content
        assert "".join(entry.token for entry in choice.logprobs.content) == ANSWER
        assert all(entry.top_logprobs[0].token == entry.token for entry in choice.logprobs.content)
        # Longer than a rank waits for another one: rank 0 lets the others know that it is there.
        time.sleep(1.3 * TIMEOUT_S)
        assert answer(two) == ANSWER


POISON = "\u03a9\u03a8\u03a9"


def survives_any_request(two: Served) -> None:
    """300 mutated requests, and one whose logits are NaN beside good ones: each costs itself alone."""
    report = soak(two.url, two.picture.read_bytes(), 300, seed=12, clients=6)
    assert not report.faults, "\n".join(report.faults[:5])
    assert report.statuses.total() == 300 and report.statuses["200"] > 50 and report.statuses["400"] > 150
    client = client_of(two)

    def ask(text: str) -> str | None:
        said = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], max_tokens=20, temperature=1.0, seed=3
        )
        return said.choices[0].message.content

    alone = ask("Tell me a story")
    with ThreadPoolExecutor(6) as pool:
        good = [pool.submit(ask, "Tell me a story") for _ in range(2)]
        bad = pool.submit(ask, f"Tell me {POISON}")
        good += [pool.submit(ask, "Tell me a story") for _ in range(3)]
    with pytest.raises(openai.InternalServerError, match="logits are NaN or infinite"):
        bad.result()
    assert [one.result() for one in good] == [alone] * 5
    assert answer(two) == ANSWER
    assert "Traceback" not in two.log.read_text()


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.reliability)])
def test_only_the_end_of_a_process_ends_two(killed: int, learnt: Learnt, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("parallel.tensor_model_parallel_size=2", "--new-tokens=8", "--seconds=5", "--allow-remote-images")
    hooks = {"POISON": POISON}
    with started(learnt.checkpoint, learnt.picture, log, *words, ranks=2, torchrun=True, hooks=hooks) as two:
        if killed:
            survives_any_request(two)
        assert two.process.poll() is None
        ranks = {int(one.environ()["RANK"]): one for one in psutil.Process(two.process.pid).children()}
        assert sorted(ranks) == [0, 1]
        ranks[killed].send_signal(signal.SIGKILL)
        assert two.process.wait(300) != 0
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
            _, alive = psutil.wait_procs(ranks, 300)
            assert not alive and "stopped after 0 answers" in two.log.read_text()
        finally:
            for one in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
