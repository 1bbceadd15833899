"""How families write boxes and ask for them, as data: what records are prepared in, and grounding questions asked in.

What is read is any notation (:mod:`megavlm.data.box_notations`); a chat template names the one that its models were
taught (``Template.boxes``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megavlm.config.errors import UserError
from megavlm.data.box_notations import Place


@dataclass(frozen=True, kw_only=True)
class BoxNotation:
    """A notation: how a box is written, and what is asked of it."""

    name: str
    """As templates and ``megavlm prepare --boxes`` call it."""
    form: str
    """Of a box: ``{x1}``, ``{y1}`` (its upper left corner), ``{x2}``, ``{y2}``."""
    whole: int
    """What counts as the whole side."""
    most: int
    """The largest number that is written."""
    asks: str
    """A question that is answered with the box of ``{thing}``."""
    names: str
    """A question about what is in ``{box}``."""
    named: str = "{thing}"
    """The answer to that."""
    marks: str = r"(?!)"
    """A regular expression of what would mean a box or a task in a phrase; Qwen-VL's tags are refused everywhere."""

    def write(self, sides: Place) -> str:
        """Return a box (left, top, right, bottom, as parts of the picture) in this notation, cut at its edges."""
        return self.write_pixels(sides, (1, 1))

    def write_pixels(self, box: Place, size: tuple[float, float]) -> str:
        """Return a box (left, top, right, bottom) in pixels of a picture of ``size`` (width, height) likewise.

        Numbers are rounded down, as MiniGPT-v2's data does.
        """
        x1, y1, x2, y2 = (
            math.floor(min(float(self.most), max(0.0, value * self.whole / side)))
            for value, side in zip(box, (*size, *size), strict=True)
        )
        return self.form.format(x1=x1, y1=y1, x2=x2, y2=y2)


QWEN_VL_BOXES = BoxNotation(
    name="qwen_vl",
    form="<box>({x1},{y1}),({x2},{y2})</box>",
    whole=1000,
    most=999,
    # The two forms of its pre-training (arXiv 2308.12966).
    asks="<ref>{thing}</ref>",
    names="<ref>This</ref>{box}",
    named="is {thing}",
)
MINIGPT_V2_BOXES = BoxNotation(
    name="minigpt_v2",
    form="{{<{x1}><{y1}><{x2}><{y2}>}}",
    whole=100,
    most=100,
    # Of github.com/Vision-CAIR/MiniGPT-4 @ d94738a7: the question of eval_scripts/eval_ref.py (RefCOCOEvalData in
    # minigpt4/datasets/datasets/coco_caption.py), which the data has too; InvReferCOCODataset in coco_dataset.py.
    asks="[refer] give me the location of {thing}",
    names="[identify] what object is in this location {box}",
    # A box, its tags, and the six tasks of its prompts (arXiv 2310.09478).
    marks=r"\{\s*<\s*\d{1,3}\s*>|</?p>|<delim>|\[(?:refer|identify|grounding|detection|caption|vqa)\]",
)
COGVLM_BOXES = BoxNotation(
    name="cogvlm",
    form="[[{x1:03d},{y1:03d},{x2:03d},{y2:03d}]]",
    whole=1000,
    most=999,
    # Of github.com/THUDM/CogVLM @ f7283b2c: caption2box and box2caption in utils/utils/template.py, from which its
    # README has users take any; how its RefCOCO figures were asked is not published.
    asks="Where is {thing}? answer in [[x0,y0,x1,y1]] format.",
    names="Can you give me a description of the region {box} in image?",
    marks=r"\[\[\s*\d{3},",
)

NOTATIONS: Mapping[str, BoxNotation] = {one.name: one for one in (QWEN_VL_BOXES, MINIGPT_V2_BOXES, COGVLM_BOXES)}
"""By name."""


def find_notation(name: str, where: str) -> BoxNotation:
    """Return a notation; ``where`` is the option that names it.

    Raises:
        UserError: there is none of that name.
    """
    if name not in NOTATIONS:
        raise UserError(f"{where} {name}: no such notation of boxes; there are {', '.join(NOTATIONS)}")
    return NOTATIONS[name]
