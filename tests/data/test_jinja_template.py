# ruff: noqa: E501 - templates are long lines
"""``model.template: checkpoint``: Transformers' ids, a label mask, and texts that mean no good."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import write_llava, write_qwen2
from transformers import PreTrainedTokenizerFast

from megavlm.config.errors import UserError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import encode_conversation, encode_prompt, last_question
from megavlm.data.jinja_sandbox import render
from megavlm.data.jinja_template import CheckpointTemplate
from megavlm.data.schema import FILM_PLACEHOLDER, IMAGE_PLACEHOLDER, Conversation, Turn
from megavlm.data.template import Template, TemplateError
from megavlm.data.tokenizer import Tokenizer, load_tokenizer, template_of

# A dozen texts of different construction, each with what it shows of the mask: "answer" and what ends it.
TEXTS: dict[str, tuple[str, str, str]] = {
    "loop over string contents": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "", "<|im_end|>",
    ),
    "whitespace control, tests and a default system": (
        "{%- if messages[0]['role'] != 'system' -%}\n    {{- 'Be kind. ' -}}\n{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "    {%- if message.role == 'system' -%}\n        {{- message.content ~ ' ' -}}\n"
        "    {%- elif message.role == 'user' -%}\n        {{- 'USER: ' ~ message.content ~ ' ' -}}\n"
        "    {%- elif message.role == 'assistant' -%}\n        {{- 'ASSISTANT: ' ~ message.content ~ eos_token -}}\n"
        "    {%- endif -%}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n    {{- 'ASSISTANT:' -}}\n{%- endif -%}",
        " ", "<|endoftext|>",
    ),
    "parts, in their order": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "", "<|im_end|>",
    ),
    "images first, by filters": (
        "{% for message in messages %}{{ message['role'].upper() }}:\n{% for c in message['content'] | "
        "selectattr('type', 'equalto', 'image') %}{{ '<|image_pad|>\n' }}{% endfor %}{% for c in message['content'] | "
        "selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}", "", "<|im_end|>",
    ),
    "string or parts, by a macro": (
        "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}"
        "{% if 'image' in c or c.type == 'image' %}<|image_pad|>{% elif 'text' in c %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ show(m.content) }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "", "<|im_end|>",
    ),
    "system inside the first question": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content }} [/INST]{% else %} {{ m.content }} <|endoftext|>{% endif %}{% endfor %}", " ", " <|endoftext|>",
    ),
    "namespace, slices and trimmed texts": (
        "{% set ns = namespace(count=0) %}{% for m in messages[::-1] %}{% if m.role == 'user' %}"
        "{% set ns.count = ns.count + 1 %}{% endif %}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt and ns.count > 0 %}<|im_start|>assistant\n{% endif %}", "", "<|im_end|>",
    ),
    "generation markers": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "", "<|im_end|>",
    ),
    "generation markers around what prefixes cannot tell": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% if loop.last %}<think>\n\n"
        "</think>\n\n{% endif %}{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "", "<|im_end|>",
    ),
    "break and continue": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% if loop.index > 90 %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "", "<|im_end|>",
    ),
    "json and string methods": (
        "{% for m in messages %}<|im_start|>{{ m.role.strip().lower() }} {{ {'n': loop.index} | tojson }}\n"
        "{{ m['content'].replace('zzz', '') }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant {{ {'n': messages | length + 1} | tojson }}\n{% endif %}", "", "<|im_end|>",
    ),
    "named, with a token that begins": (
        "{{ bos_token }}{%- for m in messages -%}<|im_start|>{{ m.role }}{{- '\n' -}}{{- m.content -}}<|im_end|>"
        "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant{{- '\n' -}}{%- endif -%}", "", "<|im_end|>",
    ),
}  # fmt: skip
PARTS = ("parts, in their order", "images first, by filters", "string or parts, by a macro")
WORDS = [
    "how",
    "many",
    "red",
    "cats",
    "sit",
    "on",
    "the",
    "mat?",
    "Two.",
    "你好",
    "café",
    "<b>bold</b>",
    "{{",
    "x",
    "}}",
    "3<4",
    "USER:",
    "It's",
]


def laid(directory: Path, text: Any, write: Any = write_qwen2, **settings: Any) -> Path:
    """Write a tokenizer with a chat template beside it."""
    directory.mkdir(exist_ok=True)
    path = write(directory)
    config = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": text} | config))
    return path


def loaded(path: Path, name: str = "checkpoint") -> Tokenizer:
    return load_tokenizer(path, template_of(name, path))


def conversations(rng: random.Random, images: bool) -> list[Turn]:
    def said() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 9)))

    turns = [Turn("system", said())] if rng.random() < 0.4 else []
    for _ in range(rng.randrange(1, 4)):
        shown = rng.randrange(3) if images and rng.random() < 0.6 else 0
        places = "".join(f"Picture {k + 1}: {IMAGE_PLACEHOLDER}\n" for k in range(shown))
        middle = f"{said()} {IMAGE_PLACEHOLDER} {said()}" if images and rng.random() < 0.3 else said()
        turns += [Turn("user", places + middle), Turn("assistant", said() + rng.choice(["", "\nand more"]))]
    return turns


def as_messages(turns: list[Turn], parts: bool) -> list[dict]:
    """Return turns as Transformers takes them, written anew here."""
    found = []
    for turn in turns:
        content: Any = []
        for k, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            content += [{"type": "image"}] if k else []
            if k and turn.text.startswith("Picture 1") and text.startswith("\n"):
                text = text[1:]
            text = text.removesuffix(f"Picture {k + 1}: ")
            content += [{"type": "text", "text": text}] if text else []
        content = content if parts else turn.text
        if not parts:
            for k in range(1, 9):
                content = content.replace(f"Picture {k}: {IMAGE_PLACEHOLDER}", "<|image_pad|>")
            content = content.replace(IMAGE_PLACEHOLDER, "<|image_pad|>")
        found.append({"role": turn.role, "content": content})
    return found


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_transformers_and_the_mask_is_the_answers(name: str, tmp_path: Path) -> None:
    text, lead, end = TEXTS[name]
    path = laid(tmp_path, text if "named" not in name else [{"name": "default", "template": text},
                                                            {"name": "tool_use", "template": "no"}])  # fmt: skip
    ours = loaded(path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token="<|endoftext|>", bos_token="<|endoftext|>", chat_template=text
    )
    ours.template.check_training()
    rng = random.Random(name)
    for index in range(100):
        turns = conversations(rng, images=index % 2 == 0)
        count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
        messages = as_messages(turns, name in PARTS)
        whole = Conversation("", tuple(turns), (), "")
        sample = encode_conversation(whole, ours, [(1,)] * count, None)
        wanted = theirs.apply_chat_template(messages, return_dict=False)
        prompt = encode_prompt(turns[:-1], ours, [(1,)] * count, None).tolist()
        assert prompt == list(
            theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ), turns
        assert sample.tokens.tolist() == list(wanted), (turns, ours.decode(sample.tokens.tolist()))
        kept, run = [], []
        for token, label in zip([*sample.tokens, -1], [*sample.labels, IGNORE_INDEX], strict=True):
            if label != IGNORE_INDEX:
                assert label == token
                run.append(int(token))
            elif run:
                kept, run = [*kept, ours.decode(run)], []
        assert kept == [lead + turn.text + end for turn in turns if turn.role == "assistant"], turns
        left = [
            replace(one, weight=0.5 if one is turns[-1] else 0.0) if one.role == "assistant" else one for one in turns
        ]
        weighted = encode_conversation(Conversation("", tuple(left), (), ""), ours, [(1,)] * count, None)
        assert weighted.tokens.tolist() == sample.tokens.tolist() and weighted.weights is not None
        assert ours.decode(weighted.tokens[weighted.labels != IGNORE_INDEX].tolist()) == kept[-1]
        assert (weighted.weights[weighted.labels != IGNORE_INDEX] == 0.5).all()
    assert ours.stop_ids[0] in ours.encode(end.strip())
    question = last_question(encode_prompt([Turn("user", "a b?")], ours, [], None).tolist(), ours)
    assert question == "a b?"


def test_a_processor_puts_its_bos_and_stops_come_from_the_files(tmp_path: Path) -> None:
    """As Transformers' LLaVA processor: it encodes with what its tokenizer puts in front."""
    text = TEXTS["whitespace control, tests and a default system"][0]
    path = laid(tmp_path, None, write_llava, eos_token="</s>", bos_token={"content": "<s>", "lstrip": False})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    ours = loaded(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>", bos_token="<s>", chat_template=text)
    turns = [Turn("user", f"Picture 1: {IMAGE_PLACEHOLDER}\nhow many?")]
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "<image>\nhow many?"}], tokenize=False, add_generation_prompt=True
    )
    assert encode_prompt(turns, ours, [(1,)], None).tolist() == theirs(prompt).input_ids
    assert theirs(prompt).input_ids[0] == 1 and ours.stop_ids == (2, 17)
    assert last_question(encode_prompt(turns, ours, [(5,)], None).tolist(), ours) == f"{IMAGE_PLACEHOLDER}\nhow many?"


def test_a_token_across_the_masks_border_stays_transformers(tmp_path: Path) -> None:
    """A space that ends the prompt is one token with the answer's first word; it is trained on."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} {% else %}A: {{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    path = laid(tmp_path, text)
    ours = loaded(path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=text)
    turns = (Turn("user", "how many cats"), Turn("assistant", "the cat"))
    sample = encode_conversation(Conversation("", turns, (), ""), ours, [], None)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert sample.tokens.tolist() == list(theirs.apply_chat_template(messages, return_dict=False))
    assert ours.decode([i for i in sample.labels if i != IGNORE_INDEX]) == " the cat<|im_end|>"


BAD = {
    "endless loop": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless output": "{% for a in range(9000) %}{{ 'a' * 9000 }}{% endfor %}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "doubling": "{% set x = 'aaaaaaaaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "doubled lists": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "a padded format": "{{ '{:10000000000}'.format(1) }}",
    "a padded sign": "{{ '%10000000000d' % 1 }}",
    "a joined text": "{{ range(60000) | list | join('a' * 60000) }}",
    "replacing": "{% set x = 'a' * 4000 %}{{ x | replace('a', x) | replace('a', x) }}",
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "classes by a filter": "{{ messages | attr('__class__') }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "a namespace's class": "{{ namespace(__class__=1) }}",
    "changing the conversation": "{{ messages.append(1) }}",
    "files": "{% include '/etc/passwd' %}",
    "an unknown function": "{{ open('/etc/passwd').read() }}",
    "half a character": "{% for m in messages %}{{ '\\ud800' + m.content }}{% endfor %}",
    "a formatted attribute": "{{ '{0.__class__}'.format(messages) }}",
}


@pytest.mark.parametrize("name", BAD)
def test_texts_that_mean_no_good_are_one_line(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        template_of("checkpoint", laid(tmp_path, BAD[name]))
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message and time.monotonic() - began < 300
    assert "root:" not in message


def test_a_template_whose_mask_is_not_exact_answers_and_is_not_trained(tmp_path: Path) -> None:
    head = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    cases = [
        (head + "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}" + prompt,
         "written otherwise when more follows"),
        (head + "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}go on{% endif %}",
         "is not how it goes on"),
        (head + "{% if m.role == 'user' %}{{ m.content }}{% else %}{{ m.content | upper }}{% endif %}<|im_end|>"
         "{% endfor %}" + prompt, "text of answer 1 is changed"),
        (head + "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}" + prompt, "marks"),
    ]  # fmt: skip
    for text, reason in cases:
        tokenizer = loaded(laid(tmp_path, text))
        assert "hi" in tokenizer.decode(encode_prompt([Turn("user", "hi")], tokenizer, [], None))
        with pytest.raises(UserError, match=reason) as caught:
            tokenizer.template.check_training()
        assert "name the registered template" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    path = laid(tmp_path, TEXTS["loop over string contents"][0])
    with pytest.raises(UserError, match="no chat template 'rag', only default; write checkpoint:default"):
        template_of("checkpoint:rag", path)
    for content, reason in [
        ({}, "has none"), ({"chat_template": 3}, "must be a text"), ({"chat_template": [{"name": 1}]}, "must be a text"),
        ({"chat_template": "{% for m in messages %}"}, "syntax error, line 1"), ({"chat_template": "{{"}, "syntax error"),
        ({"chat_template": "a" * 2_000_000}, "damaged"), ({"chat_template": "no words"}, "what a user says"),
        ({"chat_template": "{{ raise_exception('not today') }}"}, "not today"),
    ]:  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=reason) as caught:
            template_of("checkpoint", path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        template_of("checkpoint", path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="not valid UTF-8"):
        template_of("checkpoint", path)


def test_texts_cannot_forge_control_tokens_or_images(tmp_path: Path) -> None:
    tokenizer = loaded(laid(tmp_path, TEXTS["images first, by filters"][0]))
    for text in ("a <|im_end|>", "a <|image_pad|>", "<|vision_start|>", "<|endoftext|>"):
        with pytest.raises(UserError, match="control token"):
            encode_prompt([Turn("user", text)], tokenizer, [], None)
    # The template puts the two halves together again.
    with pytest.raises(UserError, match="control token"):
        encode_prompt([Turn("user", f"<|im_{IMAGE_PLACEHOLDER}end|>")], tokenizer, [(1,)], None)
    with pytest.raises(UserError, match=r"shows 1 image\(s\), 2 are given"):
        encode_prompt([Turn("user", f"a {IMAGE_PLACEHOLDER}")], tokenizer, [(1,), (1,)], None)
    drops = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}{% if loop.first %}<|image_pad|>" \
            "{% endif %}{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"  # fmt: skip
    tokenizer = loaded(laid(tmp_path, drops))
    with pytest.raises(TemplateError, match=r"shows 1 image\(s\), the conversation 2"):
        encode_prompt([Turn("user", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}?")], tokenizer, [(1,)] * 2, None)


def test_scopes_and_numbers_of_steps_are_those_of_transformers() -> None:
    """What is set in a generation block stays there, and a long conversation is no endless one."""
    text = "{% set a = 1 %}{% generation %}{% set a = 2 %}{% endgeneration %}{{ a }}"
    assert render(text, {}, "x").endswith("1")
    long = [{"role": "user", "content": "word " * 200}] * 400
    assert len(render("{% for m in messages %}{{ m.content | trim }}{% endfor %}", {"messages": long}, "x")) == 399_600


def test_a_template_is_the_same_one_in_every_process_and_place(tmp_path: Path) -> None:
    """A run that is started again compares fingerprints; three roles whose content is parts were in a set's order."""
    text = TEXTS["string or parts, by a macro"][0]
    paths = [laid(tmp_path / name, text) for name in ("a", "b")]
    own, moved = (template_of("checkpoint", path) for path in paths)
    assert isinstance(own, CheckpointTemplate) and len(own.parts) == 3
    script = (
        "import sys; from pathlib import Path; from megavlm.data.jinja_template import checkpoint_template as of\n"
        "one = of(Path(sys.argv[1])); print(one.fingerprint, *sorted(one.former_fingerprints), repr(one.parts), sep='|')"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script, str(paths[0])], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, text=True,
        ).stdout.strip().split("|")
        for seed in ("1", "5")
    ]  # fmt: skip
    assert said[0][-1] != said[1][-1], "take other seeds, of which sets differ"
    assert said[0][:-1] == said[1][:-1] == [own.fingerprint, *sorted(own.former_fingerprints)]
    assert len(own.former_fingerprints) == 6 and own.fingerprint == moved.fingerprint
    # What versions wrote before: the digest of every field as Python shows it; they had none of films.
    assert Template._digest(own, {"film": None}) in own.former_fingerprints
    other = template_of("checkpoint", laid(tmp_path / "c", text.replace("assistant", "model")))
    assert other.fingerprint != own.fingerprint


_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("kind", ["parts", "words"])
def test_a_film_stands_where_it_is_shown_with_its_plans_own_marks(kind: str, tmp_path: Path) -> None:
    """What the text writes around a film gives way to the plan's markup; a picture's marks stay the text's."""
    text = _PARTS if kind == "parts" else TEXTS["loop over string contents"][0]
    tokenizer = loaded(laid(tmp_path, text))
    turns = [Turn("user", f"A {FILM_PLACEHOLDER}Video 2: {FILM_PLACEHOLDER}\nwhat?"), Turn("assistant", "Two.")]
    runs = [("<0.5 s>", 3, "<|vision_end|>"), (2,)]
    found = encode_conversation(Conversation("", tuple(turns), (), ""), tokenizer, runs, "")
    slot = tokenizer.spelled[tokenizer.template.slot.name]
    between = "" if kind == "parts" else "\n"
    whole = (
        f"<|im_start|>user\nA <0.5 s>{slot}<|vision_end|>{slot}{between}what?<|im_end|>\n"
        "<|im_start|>assistant\nTwo.<|im_end|>\n"
    )
    lengths = iter((3, 2))
    ids = [one for i in tokenizer.encode(whole) for one in ([i] * next(lengths) if i == tokenizer.imgpad_id else [i])]
    assert found.tokens.tolist() == ids
    assert "Two" in tokenizer.decode(found.labels[found.labels != IGNORE_INDEX].tolist())
    with pytest.raises(UserError, match=r"shows 2 image\(s\) and film\(s\), 1 are given"):
        encode_conversation(Conversation("", tuple(turns), (), ""), tokenizer, runs[:1], "")


def test_a_text_that_knows_no_films_refuses_them(tmp_path: Path) -> None:
    parts = "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    tokenizer = loaded(
        laid(tmp_path, _PARTS.replace(parts, "").replace("{% else %}{{ part", "{% elif part['text'] %}{{ part"))
    )
    turns = (Turn("user", f"{FILM_PLACEHOLDER}What?"), Turn("assistant", "Two."))
    with pytest.raises(TemplateError, match=r"shows 0 film\(s\), the conversation 1"):
        encode_conversation(Conversation("", turns, (), ""), tokenizer, [(2,)], "")
