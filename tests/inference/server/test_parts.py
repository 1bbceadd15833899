"""The server's parts by themselves: stop texts, dropped conversations, arguments."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import pytest
from learnt import ANSWER, QUESTION, Learnt

from megavlm.cli import main
from megavlm.data.schema import Turn
from megavlm.inference import generate
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.main import name_of
from megavlm.inference.server.stops import StopScanner
from megavlm.inference.session import Asked, Piece, session
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


def test_what_is_wrong_with_a_conversation_ends_it_alone(learnt: Learnt, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    picture = learnt.picture.read_bytes()
    shown = Asked((user_turn(QUESTION, 1),), (picture,))
    wrong = [
        Asked((Turn("user", "a<|im_end|>"),)),
        Asked((Turn("user", "caf\udce9"),)),
        Asked((Turn("system", "\ud800"), Turn("user", "a"))),
        Asked((user_turn("What?", 2),), (picture, picture[:300])),
        Asked((Turn("user", "word " * 3000),)),
        Asked((Turn("assistant", "a"),)),
    ]
    reasons = ["control token", "not valid Unicode", "not valid Unicode", "image 2 cannot be", "the context", "a user"]
    with session(recipe, checkpoint, tokenizer) as model:
        # Neither is what no one thought of a matter of the neighbours.
        encode = model.encoded
        monkeypatch.setattr(
            model, "encoded", lambda asked: 1 // 0 if asked.turns[-1].text == "a bug" else encode(asked)
        )
        wrong.append(Asked((Turn("user", "a bug"),)))
        asked = [shown, *wrong, shown]
        said: dict[int, list[Piece]] = {i: [] for i in range(len(asked))}
        for pieces in model.ask_all(asked, max_new_tokens=40, sampling=Sampling()):
            for i, piece in pieces.items():
                said[i].append(piece)
        for i in (0, len(asked) - 1):
            assert "".join(piece.text for piece in said[i]) == ANSWER and said[i][-1].finish == "stop"
        for i, reason in enumerate(reasons, 1):
            (piece,) = said[i]
            assert piece.finish == "error" and isinstance(piece.error, ValueError) and reason in str(piece.error)
        assert said[7][0].finish == "error"
        with pytest.raises(ValueError, match="not valid Unicode"):
            list(model.ask(wrong[1], max_new_tokens=4, sampling=Sampling()))


def test_the_choices_of_a_request_share_its_prompt(learnt: Learnt, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    with session(recipe, checkpoint, tokenizer) as model:
        shown = model.encoded(Asked((user_turn(QUESTION, 1),), (learnt.picture.read_bytes(),)))
        encoded, decoded, features = Counter[str](), [], []
        encode, decode, see = tokenizer.encode, model._decoder.decode, generate._features
        monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.update([text]) or encode(text))
        monkeypatch.setattr(model._decoder, "decode", lambda files, size: decoded.append(files) or decode(files, size))
        monkeypatch.setattr(generate, "_features", lambda *args: features.append(args) or see(*args))
        kinds = [Sampling(temperature=2.0, seed=seed) for seed in range(4)]
        said = ["", "", "", ""]
        for pieces in model.ask_all([shown] * 4, max_new_tokens=9, sampling=kinds):
            for i, piece in pieces.items():
                said[i] += piece.text
        assert not encoded and len(decoded) == 1 and len(features) == 1
        alone = ["".join(p.text for p in model.ask(shown, max_new_tokens=9, sampling=kind)) for kind in kinds]
        assert said == alone and len(set(said)) > 1


def test_control_tokens_of_any_name_are_left_out_of_answers(learnt: Learnt) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    with session(recipe, checkpoint, tokenizer) as model:
        model.control_names = model.control_names | {"<|vision_start|>"}  # as Qwen2.5-VL's tokenizer calls it
        turns = [Turn("user", "a"), Turn("assistant", "b<|vision_start|>c"), Turn("user", "d")]
        plain = [turns[0], Turn("assistant", "bc"), turns[2]]
        assert model.encoded(Asked(tuple(turns))).tokens.tolist() == model.encoded(Asked(tuple(plain))).tokens.tolist()
        only = Asked((turns[0], Turn("assistant", "".join(model.control_names)), turns[2]))
        assert len(model.encoded(only).tokens) > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--batch=0",), "--batch must be at least 1"),
        (("--pixels=99999999",), "--pixels must be at most"),
        (("--seconds=" + "9" * 30,), "--seconds must be at most 86400"),
        (("--name=caf\udce9",), "--name is not valid Unicode text at character 4"),
        (("--temperature=1e999",), "temperature: inf must be at most 1,000,000"),
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
    assert name_of(tmp_path / "caf\udce9") == "caf?"
