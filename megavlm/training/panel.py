"""The panel: held-out questions with the model's answers, drawn for TensorBoard every N steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megavlm.config.schema import ModelConfig, Recipe
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
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.inference.answer_text import answer_text
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage, is_reader, replica_group, stage_group

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
    chunks: Sequence[Any], packs: Sequence[ReadPack] | None, recipe: Recipe, tokenizer: Tokenizer
) -> Tensor | None:
    """Answer held-out questions and draw them; a collective over the ranks of one data-parallel replica.

    Context-parallel ranks all do the same here: prompts and answers are not cut.

    Args:
        chunks: the model chunks of this rank.
        packs: on the reader rank, held-out packs.
        recipe: the run.
        tokenizer: its tokenizer.

    Returns:
        [H, W, 3] uint8 on the reader rank; None on the others, and where no question fits.
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
    if not is_reader() or not questions:
        return None
    codes, pairs = recipe.model.language.picture_tokens, zip(questions, answers, strict=True)
    items = [_item(question, answer, tokenizer, plan, codes) for question, answer in pairs]
    return torch.from_numpy(np.array(draw_panel(items)))


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
    """Hand the reader's questions to the ranks of its replica; pixels to the first stage only."""
    group = replica_group()
    box: list[Any] = [[(question.prompt, question.expected, question.shapes) for question in questions]]
    dist.broadcast_object_list(box, dist.get_process_group_ranks(group)[0], group=group)
    if not is_first_stage():
        return [HeldOutQuestion(prompt, expected, None, shapes) for prompt, expected, shapes in box[0]]
    rows = [(len(shapes), _views(shapes, plan)) for _, _, shapes in box[0]]
    counts = [number if views is None else sum(views) for number, views in rows]
    pixels = torch.zeros(sum(counts), *plan.row, dtype=torch.uint8)
    if questions:
        pixels = torch.cat([question.pixels for question in questions if question.pixels is not None])
    pixels = pixels.to(local_device())
    if len(pixels):
        dist.broadcast(pixels, dist.get_process_group_ranks(stage_group())[0], group=stage_group())
    parts = pixels.split(counts)
    return [
        HeldOutQuestion(prompt, expected, part, shapes)
        for (prompt, expected, shapes), part in zip(box[0], parts, strict=True)
    ]


def _item(
    question: HeldOutQuestion, answer: Sequence[int], tokenizer: Tokenizer, plan: ImagePlan,
    codes: tuple[int, int] | None,
) -> PanelItem:  # fmt: skip
    """What a card shows: the last user turn, both answers, and the pictures, but those that are ``codes`` already."""
    assert question.pixels is not None
    shown: Iterable[Tensor] = question.pixels
    if isinstance(plan, PackedPlan):
        grids = [grid for shape in question.shapes for grid in plan.of(shape).grids]
        shown = pictures_of(question.pixels, grids, plan)
    pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in shown]
    words = [one for one in question.prompt.tolist() if codes is None or not codes[0] <= one < codes[1]]
    return PanelItem(
        question=last_question(words, tokenizer),
        expected=answer_text([int(i) for i in question.expected], tokenizer),
        predicted=answer_text(answer, tokenizer),
        images=[picture.resize([max(side, _SMALLEST_PICTURE) for side in picture.size]) for picture in pictures],
    )
