"""The server's parts by themselves: stop texts, dropped conversations, arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from learnt import ANSWER, QUESTION, Learnt

from megavlm.cli import main
from megavlm.data.schema import Turn
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.main import name_of
from megavlm.inference.server.stops import StopScanner
from megavlm.inference.session import Asked, session
from megavlm.inference.turns import user_turn


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_texts_are_found_however_a_text_is_cut(size: int) -> None:
    text = "abcab</s>cabcd rest"
    pieces = [text[k : k + size] for k in range(0, len(text), size)]

    def shown(*stops: str) -> tuple[str, bool]:
        scanner = StopScanner(stops)
        said = [scanner.feed(piece, last=k == len(pieces) - 1) for k, piece in enumerate(pieces)]
        return "".join(said), scanner.hit

    assert shown("abcd") == ("abcab</s>c", True)
    assert shown("abcd", "</s>") == ("abcab", True)
    assert shown("rest of") == (text, False) and shown() == (text, False)


def test_each_conversation_has_its_own_sampling_and_length_and_may_be_dropped(learnt: Learnt) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    shown = Asked((user_turn(QUESTION, 1),), (learnt.picture.read_bytes(),))
    plain = Asked((Turn("user", "Tell me a story"),))
    asked, most = [shown, plain, plain, shown], [40, 9, 30, 5]
    kinds = [Sampling(), Sampling(temperature=2.0, seed=3), Sampling(temperature=1.5, top_p=0.9, seed=4), Sampling()]
    with session(recipe, checkpoint, tokenizer) as model:
        alone = []
        for one, new, kind in zip(asked, most, kinds, strict=True):
            alone.append(list(model.ask(one, max_new_tokens=new, sampling=kind)))
        said: list[list] = [[], [], [], []]
        for pieces in model.ask_all(asked, max_new_tokens=most, sampling=kinds):
            for i, piece in pieces.items():
                said[i].append(piece)
        assert said == alone and "".join(piece.text for piece in said[0]) == ANSWER and len(said[3]) == 5
        gone: list[list] = [[], [], [], []]
        for pieces in model.ask_all(
            asked, max_new_tokens=most, sampling=kinds, dropped=lambda: [0, 2] if len(gone[0]) >= 3 else []
        ):
            for i, piece in pieces.items():
                gone[i].append(piece)
        assert gone == [alone[0][:3], alone[1], alone[2][:3], alone[3]]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--batch=0",), "--batch must be at least 1"),
        (("--pixels=99999999",), "--pixels must be at most"),
        (("--temperature=-1",), "temperature: -1.0 must be 0 or more"),
        (("--host=256.0.0.1",), "cannot listen there"),
        (("--port=99999",), "cannot listen there"),
    ],
)
def test_wrong_arguments_cost_a_line(words: tuple[str, ...], reason: str, learnt: Learnt, capsys) -> None:
    assert main(["serve", str(learnt.checkpoint), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and reason in error[0]


@pytest.mark.parametrize("path", ["sft", "sft/checkpoints", "sft/checkpoints/step-00000003", "sft/step-00000003"])
def test_the_model_is_named_after_the_run(path: str, tmp_path: Path) -> None:
    assert name_of(tmp_path / path) == "sft"
