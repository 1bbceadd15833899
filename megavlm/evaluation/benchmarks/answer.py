"""The distributed part of a benchmark: a checkpoint answers its questions at this job's layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.config.schema import Recipe
from megavlm.data.decode import ImageDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.media import Arrangement, ImagePlan, plan_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.benchmarks.predictions import PartWriter, Row, write_identity
from megavlm.evaluation.benchmarks.questions import Question
from megavlm.evaluation.benchmarks.spec import LETTERS, StoredFilm, shown_data, shown_name
from megavlm.inference.answer_text import answer_text
from megavlm.inference.generate import generate
from megavlm.inference.loaded import loaded
from megavlm.inference.option_losses import option_losses
from megavlm.inference.prompt import Prompt
from megavlm.parallel.faults import at_step, fault
from megavlm.parallel.lock import LockView
from megavlm.parallel.state import agreed, is_first_stage, is_reader, replicas_share_experts

logger = logging.getLogger(__name__)


def answer_questions(
    recipe: Recipe,
    checkpoint: Path,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    done: Mapping[str, Row],
    folder: Path,
    identity: Mapping[str, Any],
    max_new_tokens: int,
    at_once: int,
    begin: Callable[[], LockView],
) -> dict[str, Row] | None:
    """Answer the questions that have no prediction yet; data-parallel replicas share them out.

    Replicas that share a layer's experts all answer all of them, and the first writes.

    Args:
        recipe: of the checkpoint, at this job's layout.
        checkpoint: its directory.
        tokenizer: its tokenizer.
        questions: all of them, the same on every rank.
        done: predictions of an earlier job; what the job's first rank has read counts.
        folder: where the parts are written; it should be the same directory on all nodes.
        identity: what these predictions are of; ``run`` names it.
        max_new_tokens: longest generated answer.
        at_once: questions of a round and replica; their predictions are on disk after each round.
        begin: called once the ranks have met; returns the lock of the folder.

    Returns:
        Predictions by question on the first rank, None on the others.
    """
    run = str(identity["run"])
    locks: list[LockView] = []
    with loaded(recipe, checkpoint, tokenizer, lambda: locks.append(begin())) as chunks:
        (lock,) = locks
        known: list[Any] = [sorted(done)]
        dist.broadcast_object_list(known, src=0)
        before = set(known[0])
        todo = [one for one in questions if one.item.id not in before]
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        gathered: list[Any] = [None] * size
        writes = is_reader() and not (replicas_share_experts() and rank)
        if replicas_share_experts():
            rank, size = 0, 1
        mine = todo[rank::size]
        rounds = -(-len(todo) // (size * at_once))
        logger.info("%d questions, %d answered before", len(questions), len(questions) - len(todo))
        found: list[Row] = []
        with agreed("opening the predictions"):
            if dist.get_rank() == 0:
                write_identity(folder, run, identity)
            writer = PartWriter(folder, rank, run) if writes else None
        decoder = make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha) if is_first_stage() else None
        for index in range(rounds):
            some = mine[index * at_once : (index + 1) * at_once]
            at_step(index + 1)
            rows = _round(chunks, recipe, tokenizer, some, decoder, max_new_tokens)
            fault("evaluation.round")
            with agreed("writing predictions"):
                lock.check()
                if writer is not None:
                    writer.append(rows)
            found += rows
            logger.info("%d of %d answered", min(len(todo), (index + 1) * at_once * size), len(todo))
        if writer is not None:
            writer.close()
        dist.all_gather_object(gathered, found, group=mpu.get_data_parallel_group())
        if dist.get_rank() != 0:
            return None
        fresh = {row["id"]: {"run": run, **row} for part in gathered[:size] for row in part}
        return {**fresh, **done}


def _round(
    chunks: Sequence[Any],
    recipe: Recipe,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    decoder: ImageDecoder | None,
    max_new_tokens: int,
) -> list[Row]:
    """Answer some questions; a collective over the replica. Broken pictures are known on its first stage only."""
    asked = [one for one in questions if not one.problem]
    prompts = [Prompt(one.tokens, grids=one.grids) for one in asked]
    problems = {one.item.id: one.problem for one in questions if one.problem}
    with agreed("reading images"):
        if decoder is not None:
            for one, prompt in zip(asked, prompts, strict=True):
                prompt.images, prompt.arrangement, cause = _decode(decoder, one, plan_of(recipe.model))
                if cause:
                    problems[one.item.id] = cause
    predictions: dict[str, tuple[str, list[float]]] = {}
    closed = [i for i, one in enumerate(asked) if one.options]
    if closed:
        losses = option_losses(
            chunks,
            [prompts[i] for i in closed],
            [asked[i].options for i in closed],
            vocab_size=recipe.model.language.vocab_size,
            pack_length=recipe.data.sequence_length,
        )
        for i, values in zip(closed, losses, strict=True):
            predictions[asked[i].item.id] = (LETTERS[values.index(min(values))], values)
    free = [i for i, one in enumerate(asked) if not one.options]
    if free:
        answers = generate(
            chunks,
            [prompts[i] for i in free],
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
            pack_length=recipe.data.sequence_length,
        )
        for i, ids in zip(free, answers, strict=True):
            text = answer_text([token for token in ids if token not in tokenizer.control_ids], tokenizer)
            predictions[asked[i].item.id] = (text.strip(), [])
    return [_row(one, problems.get(one.item.id, ""), *predictions.get(one.item.id, ("", []))) for one in questions]


def _row(question: Question, problem: str, prediction: str, losses: list[float]) -> Row:
    """A line of the predictions; what a broken picture was answered with does not count."""
    if problem:
        return {"id": question.item.id, "prediction": "", "problem": problem}
    row: Row = {"id": question.item.id, "prediction": prediction}
    return {**row, "losses": [round(loss, 6) for loss in losses]} if losses else row


def _decode(decoder: ImageDecoder, question: Question, plan: ImagePlan) -> tuple[torch.Tensor, Arrangement | None, str]:
    """Views of what a question shows, gray where it is broken, where their features go, and why it is broken."""
    pictures = question.item.pictures
    decoded, arrangement = decoder.decode_prompt([shown_data(one) for one in pictures], plan)
    problem = ""
    if decoded.failed:
        broken = pictures[decoded.failed[0]]
        what = "film" if isinstance(broken, StoredFilm) else "picture"
        problem = f"broken {what} {shown_name(broken)}: {decoded.causes[0]}"
    return decoded.pixels, arrangement, problem
