"""Grounding in the notations of families: RefCOCO is asked in their words, scored, and drawn where the boxes are."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_files import COUNT, MAKERS
from PIL import Image
from run_data import RunData
from tokenizer_files import write_llava

from megavlm import cli
from megavlm.checkpoint.assets import write_record
from megavlm.config.errors import UserError
from megavlm.data.box_space import BoxSpace
from megavlm.data.plans_native import NativePlan
from megavlm.data.plans_single import PadPlan
from megavlm.data.schema import Turn
from megavlm.data.templates import find_template
from megavlm.evaluation.benchmarks import BENCHMARKS
from megavlm.evaluation.benchmarks.own_words import as_taught
from megavlm.evaluation.benchmarks.readers import reader_of
from megavlm.evaluation.benchmarks.spec import NOT_ASKED, Item, render
from megavlm.evaluation.metrics import score
from megavlm.evaluation.own import check_metrics, scores_of
from megavlm.evaluation.records import HeldOutRecord
from megavlm.inference.boxes import box_space, family_of, own_question

# The file's box is (2, 3.5, 20, 30) in pictures of 40 x 32 pixels. The words are written once more, from
# eval_scripts/eval_ref.py and RefCOCOEvalData of Vision-CAIR/MiniGPT-4, and caption2box of THUDM/CogVLM.
FORMS = {
    "qwen_vl": ("<ref>left square</ref><box>", "(49,109),(500,937)</box>", "(500,109),(950,937)</box>"),
    "minigpt_v2": (
        "[refer] give me the location of left square", "{<5><10><50><93>}", "{<50><10><95><93>}",
    ),
    "cogvlm_base": (
        "Where is left square? answer in [[x0,y0,x1,y1]] format.", "It is at [[050,109,500,937]]",
        "[[500,109,950,937]]",
    ),
}  # fmt: skip


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]


def drawn(page: str, colour: str) -> tuple[float, float, float, float]:
    """Where the first picture of a report has a solid box, as parts of its sides: ``right`` is green."""
    data = re.findall(r'class="card ' + colour + r'".*?src="data:image/jpeg;base64,([^"]+)"', page, re.S)[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    strong = pixels[..., 1] - pixels[..., 0] if colour == "right" else pixels[..., 0] - pixels[..., 1]
    down, across = np.nonzero((strong > 70) & (pixels[..., 2] < 110))
    height, width = pixels.shape[:2]
    return across.min() / width, down.min() / height, across.max() / width, down.max() / height


@pytest.mark.parametrize("template", FORMS)
def test_refcoco_is_asked_scored_and_drawn(template: str, random_checkpoint: Path, tmp_path: Path) -> None:
    asked, right, wrong = FORMS[template]
    data = MAKERS["refcoco"](tmp_path / "data")
    for number in range(COUNT):  # so that nothing but boxes is coloured
        Image.new("RGB", (40, 32), (128, 128, 128)).save(
            tmp_path / "data" / "train2014" / f"COCO_train2014_{number:012d}.jpg"
        )
    tokenizer = [] if template == "qwen_vl" else [f"data.tokenizer={write_llava(tmp_path)}"]
    words = ["eval", str(random_checkpoint), f"model.template={template}", *tokenizer, "--benchmark=refcoco", *data]
    words += [f"--out={tmp_path / 'out'}", "--panel-samples=2", "--max-new-tokens=4"]
    assert cli.main(words) == 0
    found = rows(tmp_path / "out")
    identity = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert identity["prompt"] == ("plain" if template == "qwen_vl" else "chat") and not any(
        "problem" in one for one in found
    )
    for said, points, colour, place in (
        (right, 100.0, "right", (2 / 40, 3.5 / 32, 20 / 40, 30 / 32)),
        (wrong, 0.0, "wrong", (20 / 40, 3.5 / 32, 38 / 40, 30 / 32)),
        ("I see no square.", 0.0, None, None),
    ):
        lines = [json.dumps({**one, "prediction": said}) + "\n" for one in found]
        (tmp_path / "out" / "predictions.jsonl").write_text("".join(lines), "utf-8")
        assert cli.main(words) == 0  # all are answered: it scores them
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
        assert scores == {"iou50": points}
        assert [one["score"] for one in rows(tmp_path / "out")] == [points / 100] * COUNT
        page = (tmp_path / "out" / "report.html").read_text("utf-8")
        assert asked in re.sub(r"&lt;", "<", re.sub(r"&gt;", ">", page))
        if colour is not None and place is not None:
            assert drawn(page, colour) == pytest.approx(place, abs=0.02)


@pytest.mark.parametrize(
    ("family", "template", "asked"),
    [
        (None, "qwen_vl", None), ("qwen_vl", "qwen_vl", None), (None, "vicuna_v1", None), (None, "checkpoint", None),
        # What the template was taught wins: a model may have been trained on in another one.
        ("llava", "qwen_vl", None), ("llava", "minigpt_v2", "[refer] give me the location of {thing}"),
        ("llava", "vicuna_v1", "Please provide the bounding box coordinate of the region this sentence describes: "
                               "{thing}"),
        ("internvl", "checkpoint", "Please provide the bounding box coordinate of the region this sentence describes: "
                                   "<ref>{thing}</ref>"),
        ("mllama", "mllama", None),
        (None, "cogagent", "Where is {thing}? answer in [[x0,y0,x1,y1]] format."),
        ("tinygpt_v", "tinygpt_v", "[refer] give me the location of {thing}"),
    ],
)  # fmt: skip
def test_who_is_asked_in_which_words(
    family: str | None, template: str, asked: str | None, run_data: RunData, tmp_path: Path
) -> None:
    if family is not None:
        write_record(tmp_path, {"family": family})
    recipe = run_data.recipe(tmp_path, f"model.template={template}")
    found = own_question(family_of(tmp_path), recipe.model)
    assert found == asked
    benchmark = as_taught(BENCHMARKS["refcoco"], found, box_space(family_of(tmp_path), recipe.model))
    item = Item("1", "the {cat}", (Path("a"),), box=(0, 0, 1, 1), size=(2, 2))
    if asked is None:
        assert render(benchmark, item) == "<img></img><ref>the {cat}</ref><box>" and not benchmark.chat
    else:
        assert render(benchmark, item) == "Picture 1: <img></img>\n" + asked.replace("{thing}", "the {cat}")
        assert benchmark.chat and benchmark.max_new_tokens == 100
    if template == "minigpt_v2":  # prepare_texts of minigpt4/common/eval_utils.py, behind its template's "[INST] "
        assert find_template(template).placed(render(benchmark, item)) == (
            "<img></img> [refer] give me the location of the {cat}"
        )
    assert as_taught(BENCHMARKS["vqav2"], found, box_space(None, recipe.model)) is BENCHMARKS["vqav2"]


PIXELS, PLANE = (
    BoxSpace(NativePlan(56, 4, min_pixels=28 * 28, max_pixels=56 * 28), pixels=True),
    BoxSpace(PadPlan(56, 4), plane=True),
)


@pytest.mark.parametrize(
    ("space", "right", "wrong"),
    [
        # A picture of 200 x 100 is seen as 56 x 28 pixels, or in the middle of a square, from a quarter of its height.
        (PIXELS, '[{"bbox_2d": [14, 7, 42, 21], "label": "it"}]', '[{"bbox_2d": [250, 250, 750, 750], "label": "it"}]'),
        (PLANE, "[0.25, 0.375, 0.75, 0.625]", "[0.25, 0.25, 0.75, 0.4]"),
        (PLANE, "<box>(250,250),(750,750)</box>", "[0.1, 0.0, 0.5, 0.2]"),
    ],
)
def test_numbers_count_what_the_model_sees(space: BoxSpace, right: str, wrong: str, tmp_path: Path) -> None:
    item = Item("1", "it", (tmp_path / "a.png",), box=(50.0, 25.0, 150.0, 75.0), size=(200, 100))
    metric = as_taught(BENCHMARKS["refcoco"], "Where is {thing}?", space).metric
    assert metric([item] * 3, [right, wrong, NOT_ASKED]).each == [1.0, 0.0, 0.0]
    # A picture that was made smaller, to other proportions too, is seen as its file has it.
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    small = '[{"bbox_2d": [7, 7, 21, 21]}]' if space is PIXELS else "[0.25, 0.25, 0.75, 0.75]"
    assert metric([item] * 2, [small, right]).each == [1.0, float("<box>" in right)]
    # Records: the size is that of their picture, and the answer in thousandths of it, or in the model's own.
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    for answer in ("<box>(250,250),(750,750)</box>", right):
        one = HeldOutRecord("r", "t", (Turn("user", "<img></img>it?"),), (answer,), [], [tmp_path / "a.png"], "iou")
        check_metrics([one], ["exact"], space)
        assert scores_of([one] * 2, ["exact"], [right, wrong], space).each == [1.0, 0.0]
        read = reader_of(Item("r", "", (tmp_path / "a.png",)), space)
        told = {"task": "t", "answers": [answer], "choices": []}
        assert score([told] * 2, [right, wrong], [read] * 2)["box_iou50"] == 0.5
    # A picture that is no picture has no size: the question is not asked, and nothing fails as it is scored.
    (tmp_path / "a.png").write_bytes(b"?")
    assert scores_of([replace(one, answers=("<box>(0,0),(9,9)</box>",))], ["exact"], [NOT_ASKED], space).each == [0.0]


@pytest.mark.parametrize("name", ["minigpt_v2", "cogvlm_base"])
def test_held_out_records_in_each_notation(name: str) -> None:
    _, right, wrong = FORMS[name]
    for answer in (right, "<box>(50,109),(500,937)</box>"):
        one = HeldOutRecord("r", "t", (Turn("user", "<img></img>it?"),), (answer,), [], [], "iou")
        check_metrics([one], ["exact"])
        found = scores_of([one] * 3, ["exact"], [right, wrong, "no"])
        assert found.each == [1.0, 0.0, 0.0] and found.values["iou50"] == pytest.approx(100 / 3)
    with pytest.raises(UserError, match="record r: metric iou needs a box in each answer"):
        check_metrics([replace(one, answers=("a cat",))], ["exact"])


@pytest.mark.parametrize("benchmark", ["pope", "seed"])
def test_packs_are_filled_up_with_no_slot(benchmark: str, random_checkpoint: Path, tmp_path: Path) -> None:
    """CogVLM's slots are ``<unk>``, whose id is 0: answers, and losses of options, of packs of several lengths."""
    words = ["eval", str(random_checkpoint), "model.template=cogvlm_vqa", f"data.tokenizer={write_llava(tmp_path)}"]
    words += [
        f"--benchmark={benchmark}",
        "--chat",
        "--max-new-tokens=2",
        "--panel-samples=0",
        f"--out={tmp_path / 'o'}",
    ]
    assert cli.main([*words, *MAKERS[benchmark](tmp_path / "data")]) == 0
    assert not any("problem" in one for one in rows(tmp_path / "o"))
