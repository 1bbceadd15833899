"""The panel: held-out questions with the model's answers, drawn for TensorBoard every N steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.box_notations import FoundBox, find_boxes
from megavlm.data.box_space import BoxSpace, on_first_view
from megavlm.data.chat import answer_start, last_question
from megavlm.data.films.plan import FilmShape
from megavlm.data.media import (
    Arrangement,
    ImagePlan,
    ImageShape,
    PackedPlan,
    arrange,
    layouts_of,
    pixels_of,
    plan_of,
)
from megavlm.data.patches import pictures_of
from megavlm.data.positions import own_grids
from megavlm.data.read_pack import ReadPack, image_starts
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.metrics import box_hit, exact_match
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.families.family import Family
from megavlm.inference.answer_text import answer_text
from megavlm.inference.boxes import box_space
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.parallel.device import local_device
from megavlm.parallel.state import (
    data_group,
    is_first_stage,
    is_logging_rank,
    replica_group,
    replicas_share_experts,
    stage_group,
)

_SMALLEST_PICTURE = 224


@dataclass
class HeldOutQuestion:
    """The first exchange of a held-out sample."""

    prompt: NDArray[np.int64]
    """[T] tokens up to the answer."""
    expected: NDArray[np.int64]
    """[A] tokens of the answer."""
    pixels: Tensor | None
    """[V, 3, H, W] uint8 views of the prompt's images, or [P, F] patches; None on ranks that do not read."""
    shapes: list[ImageShape | FilmShape]
    """What the image plan asks of each of these images and films."""


def find_questions(
    packs: Sequence[ReadPack], tokenizer: Tokenizer, plan: ImagePlan, room: int, count: int
) -> list[HeldOutQuestion]:
    """Return the first ``count`` questions of ``packs`` whose prompt has at most ``room`` tokens."""
    questions: list[HeldOutQuestion] = []
    for item in packs:
        pack = item.pack
        starts = image_starts(pack, plan, tokenizer.imgpad_id)
        rows = _views(pack.image_shapes, plan)
        views = np.cumsum([0, *([1] * len(starts) if rows is None else rows)])
        bounds = pack.cu_seqlens.tolist()
        for start, end, source in zip(bounds, bounds[1:], pack.segment_sources.tolist(), strict=False):
            if source < 0:
                continue
            tokens = pack.tokens[start:end]
            answer = answer_start(tokens, pack.labels[start:end], tokenizer)
            if answer is not None and answer <= room and len(questions) < count:
                prompt = tokens[:answer]
                first, last = np.searchsorted(starts, [start, start + answer])
                stop = np.flatnonzero(np.isin(tokens[answer:], tokenizer.stop_ids))
                expected = tokens[answer : answer + (int(stop[0]) if len(stop) else 0)]
                pixels, shapes = item.pixels[views[first] : views[last]], pack.image_shapes[first:last]
                questions.append(HeldOutQuestion(prompt, expected, pixels, shapes))
    return questions


def answer_panel(
    chunks: Sequence[Any], packs: Sequence[ReadPack] | None, recipe: Recipe, tokenizer: Tokenizer,
    family: Family | None = None,
) -> Tensor | None:  # fmt: skip
    """Answer held-out questions and draw them; a collective as :func:`answer_held_out`.

    Args:
        chunks: the model chunks of this rank.
        packs: on the job's first rank, held-out packs.
        recipe: the run.
        tokenizer: its tokenizer.
        family: whose checkpoint the run came from, which says what boxes count; None where it is not known.

    Returns:
        [H, W, 3] uint8 on the job's first rank; None on the others, and where no question fits.
    """
    questions, answers = answer_held_out(chunks, packs, recipe, tokenizer)
    if not is_logging_rank() or not questions:
        return None
    codes, pairs = recipe.model.language.picture_tokens, zip(questions, answers, strict=True)
    space = box_space(family, recipe.model)
    items = [panel_item(question, answer, tokenizer, space, codes) for question, answer in pairs]
    return torch.from_numpy(np.array(draw_panel(items)))


def answer_held_out(
    chunks: Sequence[Any], packs: Sequence[ReadPack] | None, recipe: Recipe, tokenizer: Tokenizer
) -> tuple[list[HeldOutQuestion], list[list[int]]]:
    """Answer held-out questions; a collective over the ranks of the first replica, or of all that share experts.

    Context-parallel ranks all do the same here, and replicas that share experts: prompts and answers are not cut.

    Args:
        chunks: the model chunks of this rank.
        packs: on the job's first rank, held-out packs.
        recipe: the run.
        tokenizer: its tokenizer.

    Returns:
        The questions, with pixels on the first stage, and token ids of their answers, on all these ranks.
    """
    settings = recipe.logging
    room = recipe.data.sequence_length - settings.panel_max_new_tokens
    questions: list[HeldOutQuestion] = []
    plan = plan_of(recipe.model)
    if packs is not None:
        questions = find_questions(packs, tokenizer, plan, room, settings.panel_samples)
    questions = _share(questions, plan)
    prompts = [_prompt(question, plan, recipe.model) for question in questions]
    answers = generate(
        chunks,
        prompts,
        max_new_tokens=settings.panel_max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
        pack_length=recipe.data.sequence_length,
    )
    return questions, answers


def _views(shapes: Sequence[ImageShape | FilmShape], plan: ImagePlan) -> list[int] | None:
    """Return how many rows of the pixels each image and film has; None for one each."""
    layouts = layouts_of(plan, shapes)
    return None if layouts is None else [pixels_of(plan, layout)[0] for layout in layouts]


def _prompt(question: HeldOutQuestion, plan: ImagePlan, model: ModelConfig) -> Prompt:
    grids = own_grids(model, [plan.of(shape) for shape in question.shapes])
    return Prompt(question.prompt, question.pixels, _arrangement(question, plan), grids)


def _arrangement(question: HeldOutQuestion, plan: ImagePlan) -> Arrangement | None:
    layouts = layouts_of(plan, question.shapes)
    return None if layouts is None else arrange(plan, layouts)


def _share(questions: list[HeldOutQuestion], plan: ImagePlan) -> list[HeldOutQuestion]:
    """Hand the first rank's questions to its replica, and to all that share experts; pixels to the first stage only."""
    # Through the replica, and from there to those ranks of the others that have the same place in theirs.
    others = (data_group(),) if replicas_share_experts() else ()
    box: list[Any] = [[(question.prompt, question.expected, question.shapes) for question in questions]]
    for group in (replica_group(), *others):
        dist.broadcast_object_list(box, dist.get_process_group_ranks(group)[0], group=group)
    if not is_first_stage():
        return [HeldOutQuestion(prompt, expected, None, shapes) for prompt, expected, shapes in box[0]]
    rows = [(len(shapes), _views(shapes, plan)) for _, _, shapes in box[0]]
    counts = [number if views is None else sum(views) for number, views in rows]
    pixels = torch.zeros(sum(counts), *plan.row, dtype=torch.uint8)
    if questions:
        pixels = torch.cat([question.pixels for question in questions if question.pixels is not None])
    pixels = pixels.to(local_device())
    for group in (stage_group(), *others) if len(pixels) else ():
        dist.broadcast(pixels, dist.get_process_group_ranks(group)[0], group=group)
    parts = pixels.split(counts)
    return [
        HeldOutQuestion(prompt, expected, part, shapes)
        for (prompt, expected, shapes), part in zip(box[0], parts, strict=True)
    ]


def panel_item(
    question: HeldOutQuestion, answer: Sequence[int], tokenizer: Tokenizer, space: BoxSpace,
    codes: tuple[int, int] | None = None,
) -> PanelItem:  # fmt: skip
    """Return what a card shows: the last user turn, both answers, and the pictures as the model sees them.

    Boxes are drawn where they lie in the first view; whether they overlap is told in the whole picture.

    Args:
        question: what was asked.
        answer: token ids of what the model said.
        tokenizer: the run's.
        space: what boxes count, with the image plan.
        codes: first id, and that behind the last, of tokens that are pictures already; None for none.
    """
    assert question.pixels is not None
    plan, shown = space.plan, iter(question.pixels)
    if isinstance(plan, PackedPlan):
        grids = [grid for shape in question.shapes for grid in plan.of(shape).grids]
        shown = iter(pictures_of(question.pixels, grids, plan))
    pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in shown]
    words = [one for one in question.prompt.tolist() if codes is None or not codes[0] <= one < codes[1]]
    expected, predicted = answer_text([int(i) for i in question.expected], tokenizer), answer_text(answer, tokenizer)
    # A film's frames are no plane: its boxes are parts of a frame.
    first = question.shapes[0] if question.shapes and not isinstance(question.shapes[0], FilmShape) else None
    layout = None if first is None else plan.of(first)

    def read(text: str) -> list[FoundBox]:
        return find_boxes(text) if layout is None else space.find(text, layout)

    def drawn(text: str) -> list[FoundBox]:
        found = read(text)
        if layout is None:
            return found
        placed = [(one.name, on_first_view(one.sides, plan, layout)) for one in found]
        return [FoundBox(name, sides) for name, sides in placed if sides is not None]

    return PanelItem(
        question=last_question(words, tokenizer),
        expected=expected,
        predicted=predicted,
        images=[picture.resize([max(side, _SMALLEST_PICTURE) for side in picture.size]) for picture in pictures],
        correct=box_hit(predicted, expected, read=read) if read(expected) else exact_match(predicted, expected),
        boxes=drawn,
    )
