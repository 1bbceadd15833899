"""Each registered template against strings that the family's published code writes, and its label mask."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megavlm.data.schema import IMAGE_PLACEHOLDER, Turn
from megavlm.data.template import Template
from megavlm.data.templates import find_template, names

# The strings were written by the code that each row names (repository, file, commit), and by nobody here; what is
# trained on follows its trainer. "<image>" is an image; null is what that code has no form for. Those of glm4v
# alone were written out here, by the slots of the row's source; nothing stands behind an image, as GLM's own templates
# have it.
VECTORS = json.loads((Path(__file__).parent / "template_strings.json").read_text(encoding="utf-8"))
ROWS = sorted(VECTORS["templates"])


def conversation(case: dict) -> list[Turn]:
    """Return a case as our records have it: a picture in front of the text is called Picture N."""
    turns = [Turn("system", case["system"])] if case["system"] is not None else []
    for index, text in enumerate(case["turns"]):
        number = 0
        while "<image>\n" in text:
            number += 1
            text = text.replace("<image>\n", f"Picture {number}: {IMAGE_PLACEHOLDER}\n", 1)
        turns.append(Turn(("user", "assistant")[index % 2], text.replace("<image>", IMAGE_PLACEHOLDER)))
    return turns


def with_default(template: Template, turns: list[Turn]) -> list[Turn]:
    if template.default_system and turns[0].role != "system":
        return [Turn("system", template.default_system), *turns]
    return turns


@pytest.mark.parametrize("name", ROWS)
def test_twenty_conversations_as_published(name: str) -> None:
    template = find_template(name)
    seen = 0
    for case, published in zip(VECTORS["conversations"], VECTORS["templates"][name]["conversations"], strict=True):
        turns = with_default(template, [Turn(t.role, template.placed(t.text)) for t in conversation(case)])
        if published is None:
            continue
        begin, end = (mark if template.image[0] == "<|vision_start|>" else "" for mark in template.image)
        slot = template.slot.name if begin else "<image>"
        spans = template.spans(turns)
        shown = [(span.text.replace(IMAGE_PLACEHOLDER, begin + slot + end), span.trained) for span in spans]
        text, trained = published
        assert "".join(one for one, _ in shown) == text, (name, case)
        kept, group = [], ""
        for one, on in [*shown, ("", False)]:
            if on:
                group += one
            elif group:
                kept, group = [*kept, group], ""
        assert kept == trained, (name, case)
        # A prompt is what the training sequence begins with, up to the last answer.
        prompt = "".join(span.text for span in template.spans(turns[:-1], prompt=True)).replace(
            IMAGE_PLACEHOLDER, begin + slot + end
        )
        assert text.startswith(prompt) and not any(
            span.trained for span in template.spans(turns[:-1], prompt=True)[-1:]
        )
        assert text[len(prompt) :].startswith(trained[-1])
        seen += 1
    assert seen >= (
        12  # it has one system turn, and puts every picture in front
        if name == "vicuna_v1_im_end"
        else 14
        if name
        in (
            "zephyr",
            "gemma",
            "gemma3",
            "mgm_gemma",
            "minicpm",
            "minicpm_llama_3",
            "allava",
            "minigpt4",
            "minigpt4_llama_2",
            "minigpt_v2",
            "tinygpt_v",
        )
        else 6
        if "plain" in name
        or name in ("pali3", "paligemma", "hpt_llama_3")
        or name.startswith(("cogvlm", "cogagent", "chameleon"))
        else 19
        if name == "glm4_5v"
        else 20
    )


def test_every_row_is_held_against_its_source() -> None:
    ours = {name for name in names() if name != "qwen_vl"}  # its own test has it written out (test_chat.py)
    assert set(ROWS) == ours
    for row in VECTORS["templates"].values():
        assert len(row["source"].split(" @ ")[1]) == 40
