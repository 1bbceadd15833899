"""The server's parts by themselves: stop texts, dropped conversations, arguments."""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learnt import ANSWER, QUESTION, Learnt

from megavlm.cli import main
from megavlm.commands.serve import name_of
from megavlm.data.schema import Turn
from megavlm.inference import choice, generate
from megavlm.inference.checkpoint import add_model_arguments, model_of
from megavlm.inference.prompt import Prompt
from megavlm.inference.sampling import Sampling
from megavlm.inference.server.errors import ApiError
from megavlm.inference.server.stops import StopScanner
from megavlm.inference.server.worker import Job, Worker
from megavlm.inference.session import Asked, NotFiniteError, Piece, session
from megavlm.inference.turns import user_turn
from megavlm.models.build import unwrap


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
        assert said[7][0].finish == "error" and not isinstance(said[7][0].error, ValueError)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            list(model.ask(wrong[-1], max_new_tokens=4, sampling=Sampling()))
        with pytest.raises(ValueError, match="not valid Unicode"):
            list(model.ask(wrong[1], max_new_tokens=4, sampling=Sampling()))


def test_logits_that_are_not_finite_end_an_answer_with_a_line(learnt: Learnt, caplog, capsys, monkeypatch) -> None:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    spoilt = tokenizer.encode("\u03a9")[0]

    def spoil(_: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == spoilt).reshape(*output.shape[:2], 1), float("nan"))

    plain, bad = Asked((Turn("user", "Tell me"),)), Asked((Turn("user", "Tell \u03a9"),))
    with session(recipe, checkpoint, tokenizer) as model:
        alone = list(model.ask(plain, max_new_tokens=5, sampling=Sampling()))
        language = unwrap(model.chunks[0]).language
        hook = language.embedding.word_embeddings.register_forward_hook(spoil)
        said: list[list[Piece]] = [[], [], []]
        for kind in (Sampling(), Sampling(report=1)):
            said = [[], [], []]
            for pieces in model.ask_all([plain, bad, plain], max_new_tokens=5, sampling=kind):
                for i, piece in pieces.items():
                    said[i].append(replace(piece, report=None))
            assert said[0] == said[2] == alone
            assert len(said[1]) == 1 and isinstance(said[1][0].error, NotFiniteError)
        with pytest.raises(NotFiniteError, match="NaN or infinite"):
            list(model.ask(bad, max_new_tokens=5, sampling=Sampling()))
        prompts = [Prompt(model.cut(one, 5)[1], None) for one in (plain, bad)]
        answers = generate.generate(
            model.chunks, prompts, max_new_tokens=5, stop_ids=[tokenizer.ids["<|im_end|>"]],
            vocab_size=tokenizer.vocab_size, pack_length=200,
        )  # fmt: skip
        assert answers[0] and not answers[1]
        assert "1 of 2 answers end early: the model's logits are not finite" in caplog.text
        hook.remove()
    monkeypatch.setattr(choice.Tensor, "isfinite", lambda self: torch.zeros_like(self, dtype=torch.bool))
    assert main(["generate", str(learnt.checkpoint), "--prompt", "a"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("megavlm: error: the model's logits are NaN or infinite")


def test_a_batch_that_fails_is_answered_one_by_one(learnt: Learnt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one process answers: an allocation that is too large, or a bug, is not the neighbours' fault."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    recipe, checkpoint, tokenizer = model_of(parser.parse_args([str(learnt.checkpoint)]))
    with session(recipe, checkpoint, tokenizer) as model:
        ask_all = model.ask_all

        def fails(asked: list[Asked], **more: Any) -> Any:
            if any(one.turns[-1].text == "boom" for one in asked):
                raise RuntimeError("out of memory")
            return ask_all(asked, **more)

        monkeypatch.setattr(model, "ask_all", fails)
        worker = Worker(model, 4, 8, 1.0)

        async def serve() -> list[Piece | ApiError]:
            texts = ("Tell me", "boom", "Tell me")
            jobs = [Job(Asked((Turn("user", text),)), 9, 1, Sampling()) for text in texts]
            worker._serve(jobs)
            return [(await job.pieces.get())[1] for job in jobs]

        first, failed, last = asyncio.run(serve())
        assert isinstance(first, Piece) and first == last and first.finish is not None
        assert isinstance(failed, ApiError) and failed.status == 500


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
        only = Asked((turns[0], Turn("assistant", " ".join(model.control_names)), turns[2]))
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
