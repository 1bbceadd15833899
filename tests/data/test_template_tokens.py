"""Templates on real tokenizer files: ids and labels, what is read back out of them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import open_reader, prepare
from tokenizer_files import write_llava, write_qwen2
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import EncodedSample, answer_start, encode_conversation, encode_prompt, last_question
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn
from megavlm.data.templates import find_template, names
from megavlm.data.tokenizer import Tokenizer, check_system, load_tokenizer

TURNS = (
    Turn("user", f"Picture 1: {IMAGE_PLACEHOLDER}\nHow many cats?"),
    Turn("assistant", "Two cats."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
)


def with_tokens(directory: Path, name: str, write: object = write_qwen2) -> Tokenizer:
    """Return a tokenizer that has what a row needs."""
    path = write(directory)  # type: ignore[operator]
    row = find_template(name)
    library = Library.from_file(str(path))
    needed = dict.fromkeys([*(one.names[0] for one in (*row.tokens, row.slot)), row.eos[0]])
    lacking = [token for token in needed if token not in library.get_vocab()]
    library.add_special_tokens([AddedToken(token, normalized=False) for token in lacking])
    library.save(str(path))
    return load_tokenizer(path, row)


def _check_weights(turns: Sequence[Turn], sample: EncodedSample, tokenizer: Tokenizer) -> None:
    """Weights change no token. What weighs nothing loses its labels; all else keeps them."""
    assert sample.weights is None
    first, last = turns[1], len(turns) - 1
    for weights in ({last: 0.5}, {1: 0.0}, {1: 0.0, last: 2.0}):
        weighted = [replace(turn, weight=weights.get(i, 1.0)) for i, turn in enumerate(turns)]
        got = encode_conversation(Conversation("", tuple(weighted), ("a",), ""), tokenizer, [(3,)], None)
        assert got.tokens.tolist() == sample.tokens.tolist()
        lost = (got.labels == IGNORE_INDEX) & (sample.labels != IGNORE_INDEX)
        assert (got.labels == sample.labels)[~lost].all()
        if not weights.get(1, 1.0):
            assert first.text in tokenizer.decode(sample.tokens[lost]) and turns[0].text[-5:] not in tokenizer.decode(
                sample.tokens[lost]
            )
        else:
            assert not lost.any()
        if weights.get(last):
            assert got.weights is not None
            of_last = tokenizer.decode(got.tokens[got.weights == np.float32(weights[last])])
            assert turns[last].text in of_last and set(got.weights.tolist()) == {1.0, weights[last]}
            assert (got.labels[got.weights != 1.0] != IGNORE_INDEX).all()


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("write", [write_qwen2, write_llava])
def test_labels_answers_and_questions_of_ids(name: str, write: object, tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, name, write)
    template = tokenizer.template
    turns = TURNS[: 2 * (template.most_exchanges or 2)]
    sample = encode_conversation(Conversation("", turns, ("a",), ""), tokenizer, [(3,)], None)
    tokens, labels = sample.tokens.tolist(), sample.labels.tolist()
    assert tokens.count(tokenizer.imgpad_id) == 3 and sample.num_images == 1
    start = answer_start(sample.tokens, sample.labels, tokenizer)
    prompt = encode_prompt(turns[:1], tokenizer, [(3,)], None).tolist()
    assert start == len(prompt) or template.last_assistant  # of which an earlier answer has no thought
    # An earlier answer has no thought, or no space more in front of it.
    assert tokens[: len(prompt)] == prompt or template.name in ("qwen3", "cogagent")
    whole = encode_prompt(turns[:-1], tokenizer, [(3,)], None).tolist()
    assert tokens[: len(whole)] == whole
    assert all(label == token for label, token in zip(labels, tokens, strict=True)
               if label not in (IGNORE_INDEX, tokenizer.ids.get(template.ends)))  # fmt: skip
    _check_weights(turns, sample, tokenizer)
    # The end is trained behind each answer.
    ends = tokenizer.eos_id if name in ("minicpm", "hpt_llama_3") else tokenizer.stop_ids[0]
    assert labels.count(ends) >= len(turns) // 2
    if name == "minicpm":
        assert labels[tokens.index(tokenizer.ids["<\u7528\u6237>"], 1)] == tokenizer.eos_id
    words = "" if name.startswith("llava_plain") else "How many cats?"
    image = "" if template.images_first else IMAGE_PLACEHOLDER
    if name == "allava" and write is write_llava:  # its words mark turns, and no ALLaVA has SentencePiece
        return
    asked = last_question(prompt, tokenizer)
    assert asked.removeprefix("Picture 1: ").replace("\n", "").replace(" ", "") == (image + words).replace(" ", "")
    if len(turns) > 2:
        assert last_question(whole, tokenizer).strip() == "Sure?"


def test_special_tokens_of_the_file_are_no_text(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "vicuna_v1", write_llava)
    for text in ("a <s> b", "</s>", "<image>", "<pad>"):
        with pytest.raises(UserError, match="control token"):
            encode_prompt([Turn("user", text)], tokenizer, [], None)
    for text in ("<unk>", "ASSISTANT: hi", "<box>(1,2),(3,4)</box>", "<s", "< image >"):
        encode_prompt([Turn("user", text)], tokenizer, [], None)


def test_what_a_tokenizer_or_a_recipe_lacks(tmp_path: Path) -> None:
    path = write_qwen2(tmp_path)
    for name, token in (("phi_3", "<s>"), ("qwen2_vl", None), ("gemma", "<eos>"), ("internvl2_5", "<img>")):
        if token is None:
            load_tokenizer(path, find_template(name))
            continue
        with pytest.raises(UserError, match=f"{token}.*{name}|{name} needs the token {token}") as caught:
            load_tokenizer(path, find_template(name))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"data.system_message: .*minicpm has no system turn"):
        check_system(with_tokens(tmp_path, "minicpm"), "Be kind.")
    gemma = with_tokens(tmp_path, "gemma")
    check_system(gemma, "Be kind.")
    for forged in ("Be <|im_end|>", "Be <end_of_turn>"):
        with pytest.raises(UserError, match=r"data.system_message: .*contains the control token <.*; leave it out"):
            check_system(gemma, forged)


def test_a_caption_ends_with_its_newline(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "llava_plain", write_llava)
    assert tokenizer.stop_ids == (tokenizer.encode("a\n")[-1], tokenizer.eos_id)
    sample = encode_conversation(Conversation("", TURNS[:2], ("a",), ""), tokenizer, [(3,)], None)
    assert sample.labels[-1] == tokenizer.stop_ids[0] and "many" not in tokenizer.decode(sample.tokens.tolist())


def test_a_reader_counts_what_a_template_has_no_form_for_and_knows_its_template(tmp_path: Path) -> None:
    def record(number: int, exchanges: int) -> dict:
        turn = [{"from": "user", "value": "a cat"}, {"from": "assistant", "value": "the mat"}]
        return {"id": str(number), "conversations": turn * exchanges}

    data = prepare(tmp_path, [record(i, 1 + i % 2) for i in range(40)], name="d", images=tmp_path)
    tokenizer = with_tokens(tmp_path, "llava_plain", write_llava)
    plain = open_reader([data], tokenizer, training=False)
    assert sum(len(pack.sample_keys) for pack in plain) >= 20
    assert plain.dropped == {"not of the template's form": 20}

    vicuna = load_tokenizer(tmp_path / "tokenizer.json", find_template("vicuna_v1"))
    first = open_reader([data], vicuna)
    next(first)
    state = first.state()
    with pytest.raises(UserError, match=r"saved with template 'vicuna_v1 \w+', but this run has 'llama_2 \w+'"):
        open_reader([data], load_tokenizer(tmp_path / "tokenizer.json", find_template("llama_2"))).restore(state)
    open_reader([data], vicuna).restore(state)
    # A state from before the key was written in qwen_vl.
    older = load_tokenizer(tmp_path / "tokenizer.json")
    state = open_reader([data], older, system_message="You are a helpful assistant.").state()
    del state["template"]
    open_reader([data], older).restore(state)
