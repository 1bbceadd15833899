"""Templates come in with a checkpoint, and go out with it: what is trained is what Transformers then writes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_trained_assets import CROP, VICUNA, convert, made, trained
from tokenizer_files import write_llava, write_qwen2
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from megavlm.checkpoint.hf.row_template import row_template
from megavlm.config import yaml12
from megavlm.data.chat import encode_conversation, encode_prompt
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn
from megavlm.data.template import TemplateError
from megavlm.data.templates import find_template, names
from megavlm.data.tokenizer import find_tokenizer, load_tokenizer
from megavlm.inference.checkpoint import load_for_inference

# LLaVA's roles in a text of our own, and the parts that its processor gives.
LLAVA = (
    "{%- for m in messages -%}{%- if m.role == 'system' -%}{{- m.content[0].text + ' ' -}}{%- else -%}"
    "{{- m.role | upper + ': ' -}}{%- for c in m.content if c.type == 'image' -%}"
    "{{- '<image>\n' -}}{%- endfor -%}{%- for c in m.content if c.type == 'text' -%}{{- c.text -}}{%- endfor -%}"
    "{{- ' ' if m.role == 'user' else eos_token -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
WORDS = ["how", "many", "red", "cats", "sit", "on", "the", "mat", "Two.", "你好", "café", "<b>"]
ROWS = [name for name in names() if name != "qwen_vl"]  # its Jinja text: test_trained_assets.py


def said(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 7)))


def turns_and_messages(rng: random.Random, system: bool, most: int) -> tuple[list[Turn], list[dict[str, Any]]]:
    """Return a conversation as records have it, and as Transformers takes it."""
    turns, messages = [], []
    if system and rng.random() < 0.5:
        text = said(rng)
        turns, messages = [Turn("system", text)], [{"role": "system", "content": text}]
    for _ in range(rng.randrange(1, most + 1)):
        shown, question, answer = rng.randrange(3), said(rng), said(rng)
        places = "".join(f"Picture {k + 1}: {IMAGE_PLACEHOLDER}\n" for k in range(shown))
        turns += [Turn("user", places + question), Turn("assistant", answer)]
        parts = [*[{"type": "image"}] * shown, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return turns, messages


@pytest.mark.parametrize("name", ROWS)
def test_a_row_in_jinja_gives_transformers_the_ids_of_training(name: str, tmp_path: Path) -> None:
    row = find_template(name)
    system, most = bool(row.system or row.user_with_system), row.most_exchanges or 3
    for write in (write_qwen2, write_llava):
        path = write(tmp_path)
        library = Library.from_file(str(path))
        needed = dict.fromkeys([*(one.names[0] for one in (*row.tokens, row.slot)), row.eos[0]])
        lacking = [token for token in needed if token not in library.get_vocab()]
        library.add_special_tokens([AddedToken(token, normalized=False) for token in lacking])
        library.save(str(path))
        tokenizer = load_tokenizer(path, row)
        theirs = PreTrainedTokenizerFast(
            tokenizer_file=str(path), chat_template=row_template(tokenizer, row.default_system)
        )
        rng = random.Random(name)
        for _ in range(25):
            turns, messages = turns_and_messages(rng, system, most)
            runs = [(1,)] * sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
            ids = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            # Encoded in pieces, a space in front of an answer stands by itself; in one text it is part of it. None of
            # these rows is trained with a tokenizer that puts one in front of every piece.
            cut = name in ("minigpt4", "minigpt4_llama_2", "tinygpt_v")  # a space of its own in front of an answer
            apart, questions = (not row.joined or cut) and name != "minicpm", sum(turn.role == "user" for turn in turns)
            if not apart or (questions == 1 and write is write_qwen2):
                assert encode_prompt(turns[:-1], tokenizer, runs, None).tolist() == list(ids), turns
            ids = theirs.apply_chat_template(messages, return_dict=False)
            whole = encode_conversation(Conversation("", tuple(turns), (), ""), tokenizer, runs, None)
            if not apart and (name != "minicpm" or write is write_qwen2):  # where a space would be put before an answer
                assert whole.tokens.tolist() == list(ids), turns


@pytest.mark.parametrize(
    ("kind", "own", "expected", "note"),
    [
        ("llava", None, "vicuna_v1", ""),
        ("llava", LLAVA, "checkpoint", ""),
        ("llava", VICUNA, "vicuna_v1", "cannot be trained on"),
        ("llava", "{% for m in messages %}", "vicuna_v1", "syntax error, line 1"),
        ("llava", "{{ ().__class__.__mro__ }}", "vicuna_v1", "is refused: access to attribute"),
        (
            "qwen2",
            None,
            "qwen_vl",
            "no token that ends a document, which would be one of </s> (model.template: vicuna_v1)",
        ),
    ],
)
def test_a_llava_brings_its_template(
    kind: str, own: str | None, expected: str, note: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hf = made(tmp_path, kind)
    settings = json.loads((hf / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (hf / "chat_template.jinja").unlink()
    if own is not None:
        (hf / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = trained(tmp_path, template=None)
    assert yaml12.parse((checkpoint / "recipe.yaml").read_text())["model"]["template"] == expected
    assert note in caplog.text
    recipe, _, tokenizer = load_for_inference(checkpoint, [])
    assert tokenizer.template.name == expected and recipe.data.system_message is None
    if expected == "qwen_vl":
        return
    turns = [Turn("system", "Be kind."), Turn("user", f"Picture 1: {IMAGE_PLACEHOLDER}\nHow many cats?")]
    ids = encode_prompt(turns, tokenizer, [(16,)], recipe.data.system_message).tolist()
    text = "<s>Be kind. USER: " + "<image>" * 16 + "\nHow many cats? ASSISTANT:"
    assert ids == Library.from_file(str(hf / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert tokenizer.stop_ids == (2,)

    # What goes out is what was trained.
    convert("megatron-to-hf", "--megatron", checkpoint, "--out", tmp_path / "home")
    home = tmp_path / "home"
    assert json.loads((home / "generation_config.json").read_text())["eos_token_id"] == [2]
    processor = AutoProcessor.from_pretrained(home)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many cats?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 90, 3), np.uint8))
    if expected == "checkpoint":
        assert (home / "chat_template.json").read_bytes() == (hf / "chat_template.json").read_bytes()
        assert not (home / "chat_template.jinja").exists()
    assert processor(text=text, images=[image], return_tensors="pt").input_ids[0].tolist() == ids
    again = load_tokenizer(find_tokenizer(home), tokenizer.template)  # type: ignore[arg-type]
    assert not again.added and encode_prompt(turns, again, [(16,)], None).tolist() == ids
    assert AutoTokenizer.from_pretrained(home).eos_token == "</s>" and CROP


def test_a_template_that_holds_one_exchange_says_so() -> None:
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    with pytest.raises(TemplateError, match="llava_plain holds 1 question and answer, the conversation has 2"):
        find_template("llava_plain").spans(turns)
    with pytest.raises(TemplateError, match="minicpm has no system turn; leave it out"):
        find_template("minicpm").spans([Turn("system", "s"), *turns])
