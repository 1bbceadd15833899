"""A checkpoint through Transformers and through the model here: the same pictures and prompts, one after the other.

Each has the memory to itself. Differences of the model (features, logits, answers) are those of equal ids and pixels,
Transformers' where its processor gives them, so that one difference is not counted four times.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.hf.given import check_processor, open_whole
from megavlm.checkpoint.hf.incoming import convert
from megavlm.checkpoint.hf.outgoing import export
from megavlm.checkpoint.hf.transformers_class import transformers_class
from megavlm.checkpoint.paths import resolve
from megavlm.config.errors import UserError
from megavlm.config.schema import Recipe, VisionConfig
from megavlm.data.chat import encode_prompt
from megavlm.data.decoders import make_decoder
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError, FilmLayout, PackedFilmPlan
from megavlm.data.images import lay_out
from megavlm.data.media import Arrangement, ImageLayout, ImagePlan, plan_of
from megavlm.data.positions import own_grids
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.check.pictures import drawn
from megavlm.evaluation.check.theirs import (
    CheckQuestion,
    GivenFilm,
    Theirs,
    close,
    compute,
    ends,
    open_theirs,
    process,
)
from megavlm.evaluation.parity import Sample, features_of_sample, forward_sample
from megavlm.families.films import transformers_films
from megavlm.inference.checkpoint import load_for_inference
from megavlm.inference.generate import generate
from megavlm.inference.loaded import loaded
from megavlm.inference.prompt import Prompt
from megavlm.inference.turns import read_film, read_image, user_turn
from megavlm.models.build import MODULES, unwrap
from megavlm.parallel.device import local_device
from megavlm.parallel.free_memory import free_memory
from megavlm.weights.source import Source

logger = logging.getLogger(__name__)

PROMPTS = ("Describe this picture in one sentence.",)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GIB = 1 << 30
_ROOM = 1.1
"""Memory beside the weights: activations of one short sample at a time."""
_LEVEL, _SHARE = 1.0, 0.999
"""Pixels are equal if this share of them is within so many levels of 255."""


@dataclass
class CheckSettings:
    """What is asked for."""

    hf: Path
    images: Sequence[Path] = ()
    films: Sequence[Path] = ()
    prompts: Sequence[str] = PROMPTS
    tolerance: float = 2e-4
    max_new_tokens: int = 16
    checkpoint: Path | None = None
    """Converted already; None converts into a temporary directory."""
    precision: str = "fp32"


@dataclass
class CheckRow:
    """What differs for one question; None where it could not be compared."""

    name: str
    pixels: tuple[float, float] | None = None
    """Largest difference in levels of 255, and the share of the values within one level."""
    ids: int | None = None
    """Positions of the prompt whose tokens differ."""
    features: float | None = None
    codes: int | None = None
    """Of pictures that are tokens: how many of these differ."""
    logits: float | None = None
    """Largest difference, divided by the largest value where that is above 1."""
    answer: int | None = None
    """First token of the answers that differs, from 1; 0 for none."""
    texts: tuple[str, str] = ("", "")
    """Theirs and ours."""
    reasons: list[str] = field(default_factory=list)
    """What is above the tolerance."""


def check(settings: CheckSettings) -> int:
    """Compare and report; return 0, or 1 where a difference is above the tolerance.

    Raises:
        UserError: the checkpoint is no whole model, Transformers has no class for it, or there is too little memory.
    """
    source = Source(settings.hf)
    given = open_whole(settings.hf, None, -2)
    if {part for one in given for part in one.parts} != set(MODULES):
        raise UserError(f"{settings.hf}: is a {given[0].family.title}; check compares whole models")
    other = given[0].family.read_as
    if other is None:
        branches = given[0].branches
        check_processor(settings.hf, branches.get("image", {"kind": "squash"}), branches["vision"])
        transformers_class(settings.hf, "check")
    dtype = _DTYPES[settings.precision]
    _check_memory(source, dtype, settings)
    torch.backends.cudnn.allow_tf32 = False  # the patches of a tower would have 10 bits of mantissa
    with tempfile.TemporaryDirectory(prefix="megavlm-check-") as folder:
        checkpoint = settings.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "converted"
            home = given[0].family.name if len(given) > 1 else None
            convert(given, checkpoint, seed=0, fresh={}, base=None, verify=False, home=home)
        path = resolve(checkpoint)
        overrides = [f"training.precision={settings.precision}"]
        recipe, _, tokenizer = load_for_inference(path, overrides)
        films, same = _films(settings, recipe)
        if same:
            recipe, _, tokenizer = load_for_inference(path, [*overrides, *same])
        pictures = list(settings.images) or drawn(Path(folder))
        questions, ours = _ask(settings, recipe, tokenizer, pictures, films)
        layout = _in_their_layout(path, Path(folder) / "transformers", other) if other else settings.hf
        theirs = open_theirs(layout, dtype)
        if other is not None:
            theirs.missing.append("the names of the weights: they came to Transformers through an export from here")
        rows = _run(settings, recipe, path, tokenizer, theirs, questions, ours)
        theirs.missing += [f"as published: films were compared with {key}, as Transformers 5 has it" for key in same]
        return _report(settings, theirs, rows, _ends(settings.hf, source, tokenizer))


def _in_their_layout(checkpoint: Path, out: Path, family: str) -> Path:
    """Write a model that Transformers has no class for in the layout of a family that it has one for."""
    export(checkpoint, out, family_name=family, verify=False)
    return out


def _check_memory(source: Source, dtype: torch.dtype, settings: CheckSettings) -> None:
    needed = sum(math.prod(one.shape) for one in source.tensors.values()) * dtype.itemsize * _ROOM
    free = free_memory()
    if needed > free:
        half = " (--dtype bf16 halves it, with a --tolerance of some 0.05)" if dtype is torch.float32 else ""
        raise UserError(
            f"{settings.hf}: needs {needed / _GIB:.1f} GiB of memory in {settings.precision}, and {free / _GIB:.1f} "
            f"GiB are free on {local_device()}{half}; run it on a larger machine"
        )


@dataclass
class _Ours:
    """What the reader here makes of a question."""

    ids: Tensor
    pixels: Tensor
    """[V, 3, H, W] views, or [P, F] patches, normalised."""
    layouts: list[ImageLayout]
    """Of the pictures, or of the film."""
    arrangement: Arrangement | None
    told: dict[str, Tensor]
    """What Transformers' classes are told of pictures, or of a film, beside pixels."""

    def sample(self, question: CheckQuestion) -> Sample:
        """Return what both models are given."""
        assert question.ids is not None
        pixels = question.pixels if question.pixels is not None else self.pixels
        return Sample(question.name, question.ids, pixels, self.layouts, None, {})


def _ask(
    settings: CheckSettings, recipe: Recipe, tokenizer: Tokenizer, pictures: Sequence[Path],
    films: Mapping[Path, GivenFilm],
) -> tuple[list[CheckQuestion], list[_Ours]]:  # fmt: skip
    """Return every prompt with every picture and film, the first one without any; and what is made of them here."""
    prompts = list(settings.prompts)
    asked: list[tuple[str, tuple[Path, ...]]] = [
        (prompt, (path,)) for path in (*pictures, *films) for prompt in prompts
    ]
    questions, ours = [], []
    for number, (prompt, paths) in enumerate([*asked, (prompts[0], ())], 1):
        name = f"{number}: {paths[0].name if paths else 'no picture'}, {prompt[:40]!r}"
        film = films.get(paths[0]) if paths else None
        questions.append(CheckQuestion(name, prompt, () if film else paths, film))
        shown = [film.film] if film else [read_image(path) for path in paths]
        ours.append(_read(prompt, paths, shown, recipe, tokenizer))
    return questions, ours


def _films(settings: CheckSettings, recipe: Recipe) -> tuple[dict[Path, GivenFilm], list[str]]:
    """Return the films, and the keys by which they are as in Transformers where the published code differs.

    Raises:
        UserError: The model reads none, or one is none that can be read.
    """
    model, plan = recipe.model, plan_of(recipe.model)
    if not settings.films:
        return {}, []
    kind: Any = plan.films
    if kind is None:
        raise UserError(f"--video: films of {settings.hf} are not read here (model.video.kind is none)")
    counted = getattr(kind, "num_frames", None) is not None and model.video.fps is None
    asked = {"num_frames": kind.num_frames} if counted else {"fps": kind.fps}
    found = {
        path: GivenFilm(read_film(path), model.video.kind, asked, recipe.data.image_alpha) for path in settings.films
    }
    for path, one in found.items():
        try:
            plan.of(one.film.shape())
        except FilmError as error:
            raise UserError(f"--video {path}: {error}") from None
    return found, transformers_films(model)


def _read(
    prompt: str, paths: Sequence[Path], shown: Sequence[bytes | Film], recipe: Recipe, tokenizer: Tokenizer
) -> _Ours:
    """Return what the reader here makes of a prompt with its pictures, or its film.

    Raises:
        UserError: one of them cannot be read.
    """
    vision, plan = recipe.model.vision, plan_of(recipe.model)
    decoder = make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha)
    films = sum(not isinstance(one, bytes) for one in shown)
    made, arrangement = decoder.decode_prompt(shown, plan)
    if made.failed:
        raise UserError(f"--{'video' if films else 'image'} {paths[made.failed[0]]}: {made.causes[0]}")
    layouts = lay_out(shown, plan)
    runs = [layout.runs for layout in layouts]
    ids = encode_prompt([user_turn(prompt, len(shown) - films, films)], tokenizer, runs, recipe.data.system_message)
    mean, std = _colours(vision)
    pixels = (_by_colour(made.pixels.cpu().float(), vision) / 255.0 - mean) / std
    told = _told(layouts, arrangement, plan)
    return _Ours(torch.from_numpy(ids), pixels.view(made.pixels.shape), layouts, arrangement, told)


def _told(layouts: Sequence[ImageLayout], arrangement: Arrangement | None, plan: ImagePlan) -> dict[str, Tensor]:
    grid = None if arrangement is None or arrangement.grid is None else torch.from_numpy(arrangement.grid)
    films = [layout for layout in layouts if isinstance(layout, FilmLayout)]
    if not films:
        sizes = torch.tensor([[layout.shape.height, layout.shape.width] for layout in layouts])
        return {"image_sizes": sizes, **({} if grid is None else {"image_grid_thw": grid})}
    if grid is None or not isinstance(plan.films, PackedFilmPlan):
        return {}
    # As VideoMetadata.sampled_fps: of the frames before the last one filled its patch.
    rates = [len(plan.films.choose(one.film)) / one.film.frames * one.film.rate for one in films]
    return {"video_grid_thw": grid, "second_per_grid_ts": torch.tensor([plan.films.temporal / one for one in rates])}


def _by_colour(pixels: Tensor, vision: VisionConfig) -> Tensor:
    """Return views [V, 3, H, W] and renderings in a row [N, F] as they are, patches [P, F] as [P, 3, F / 3, 1]."""
    if pixels.dim() == 4 or len(vision.sides) > 1:
        return pixels
    return pixels.view(len(pixels), 3, pixels.size(1) // 3, 1)


def _colours(vision: VisionConfig) -> tuple[Tensor, Tensor]:
    """Return mean and deviation as :func:`_by_colour` wants them: [3, 1, 1], or [F] of renderings in a row."""
    pairs = [tuple(torch.tensor(one) for one in own) for own in vision.colours]
    if len(pairs) == 1:
        return pairs[0][0].view(3, 1, 1), pairs[0][1].view(3, 1, 1)
    rows = [[one.repeat_interleave(side**2) for one in own] for side, own in zip(vision.sides, pairs, strict=True)]
    return torch.cat([mean for mean, _ in rows]), torch.cat([std for _, std in rows])


def _run(
    settings: CheckSettings, recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer, theirs: Theirs,
    questions: Sequence[CheckQuestion], ours: Sequence[_Ours],
) -> list[CheckRow]:  # fmt: skip
    """Run the one, then the other."""
    process(theirs, questions)
    rows = [_before(question, own, recipe) for question, own in zip(questions, ours, strict=True)]
    for question, own in zip(questions, ours, strict=True):
        _settle(question, own, tokenizer)
    compute(theirs, questions, settings.max_new_tokens)
    close(theirs)
    with loaded(recipe, checkpoint, tokenizer) as chunks, _evaluating(chunks):
        samples = [own.sample(question) for question, own in zip(questions, ours, strict=True)]
        for question, row, sample in zip(questions, rows, samples, strict=True):
            _compare(question, row, chunks, recipe, settings, sample)
        prompts = [
            Prompt(
                sample.ids.numpy(),
                sample.pixels.to(local_device()),
                own.arrangement,
                own_grids(recipe.model, own.layouts),
            )
            for sample, own in zip(samples, ours, strict=True)
        ]
        room = max(len(prompt.tokens) for prompt in prompts) + settings.max_new_tokens
        answers = generate(
            chunks, prompts, max_new_tokens=settings.max_new_tokens, stop_ids=[],
            vocab_size=recipe.model.language.vocab_size, pack_length=room,
        )  # fmt: skip
    for question, row, answer in zip(questions, rows, answers, strict=True):
        row.texts = (tokenizer.decode(question.answer), tokenizer.decode(answer))
        _compare_answers(question, row, answer, settings.tolerance)
    return rows


@contextlib.contextmanager
def _evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    for chunk in chunks:
        chunk.eval()
    yield


def _before(question: CheckQuestion, own: _Ours, recipe: Recipe) -> CheckRow:
    """Compare pixels and ids, where Transformers has made some."""
    row = CheckRow(question.name)
    if question.pixels is not None:
        row.pixels = (math.inf, 0.0)
        if question.pixels.shape == own.pixels.shape:
            vision = recipe.model.vision
            apart = (question.pixels.float() - own.pixels).abs()
            levels = _by_colour(apart, vision) * _colours(vision)[1] * 255
            row.pixels = (float(levels.max()), float((levels <= _LEVEL + 1e-3).float().mean()))
        if row.pixels[1] < _SHARE:
            row.reasons.append("pixels")
    if question.ids is not None:
        same = min(len(question.ids), len(own.ids))
        differing = int((question.ids[:same] != own.ids[:same]).sum())
        row.ids = differing + max(len(question.ids), len(own.ids)) - same
        if row.ids:
            row.reasons.append("token ids")
    return row


def _settle(question: CheckQuestion, own: _Ours, tokenizer: Tokenizer) -> None:
    """Let both have the same ids and pixels: Transformers', or ours where it has none or they do not fit the model."""
    if question.pixels is None or question.pixels.shape != own.pixels.shape:
        question.pixels = own.pixels if own.layouts else None
        question.extra = {}
    question.extra = own.told | question.extra
    slots = int((own.ids == tokenizer.imgpad_id).sum())
    if question.ids is None or int((question.ids == tokenizer.imgpad_id).sum()) != slots:
        question.ids = own.ids


def _compare(
    question: CheckQuestion,
    row: CheckRow,
    chunks: Sequence[Any],
    recipe: Recipe,
    settings: CheckSettings,
    sample: Sample,
) -> None:
    """Compare features and logits."""
    assert question.logits is not None
    if question.codes is not None:
        _compare_codes(row, features_of_sample(unwrap(chunks[0]), sample, recipe), question.codes, recipe)
    if question.features is not None:
        row.features = _difference(features_of_sample(unwrap(chunks[0]), sample, recipe), question.features)
        if row.features > settings.tolerance:
            row.reasons.append("image features")
    logits = forward_sample(chunks, sample, recipe)
    if (tokens := recipe.model.language.picture_tokens) is not None:
        # Both take them out of the softmax by the least number, beside which all others would be alike.
        for one in (logits, question.logits):
            one[:, slice(*tokens)].clamp_(min=-1.0)
    row.logits = _difference(logits, question.logits[:, : logits.size(1)])
    if row.logits > settings.tolerance:
        row.reasons.append("logits")


def _compare_codes(row: CheckRow, ours: Tensor, theirs: Tensor, recipe: Recipe) -> None:
    """Compare [T, 1] tokens of pictures, counted from the first of these, with [T] tokens."""
    (first, _), codes = recipe.model.language.picture_tokens or (0, 0), ours.flatten().cpu()
    same = codes.shape == theirs.shape
    row.codes = int((codes + first != theirs).sum()) if same else max(len(codes), len(theirs))
    if row.codes:
        row.reasons.append("tokens of pictures")


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    largest = float((ours.double().cpu() - theirs.double()).abs().max())
    return largest / max(1.0, float(theirs.abs().max())) if math.isfinite(largest) else math.inf


def _compare_answers(question: CheckQuestion, row: CheckRow, answer: Sequence[int], tolerance: float) -> None:
    """Compare greedy answers; where two tokens are as good as each other, rounding chooses."""
    pairs = list(zip(question.answer, answer, strict=False))
    row.answer = next((n for n, (one, other) in enumerate(pairs, 1) if one != other), 0)
    if row.answer == 0 and len(question.answer) != len(answer):
        row.answer = len(pairs) + 1
    assert question.logits is not None
    tie = 2 * tolerance * max(1.0, float(question.logits.abs().max()))
    if row.answer and (row.answer > len(question.margins) or question.margins[row.answer - 1] > tie):
        row.reasons.append("answers")


def _ends(hf: Path, source: Source, tokenizer: Tokenizer) -> str | None:
    """Return what is said of tokens that end an answer there and not here."""
    text = source.config.get("text_config")
    missing = ends(hf, {**source.config, **(text if isinstance(text, dict) else {})}) - set(tokenizer.stop_ids)
    if not missing:
        return None
    return f"answers end there with the ids {sorted(missing)} too, which do not end them here"


def _report(settings: CheckSettings, theirs: Theirs, rows: Sequence[CheckRow], end: str | None) -> int:
    """Say what was found."""
    import transformers  # noqa: PLC0415

    logger.info("Transformers %s, %s, %s", transformers.__version__, theirs.name, settings.precision)
    for row in rows:
        logger.info("%s", row.name)
        logger.info("  %s", _figures(row))
        there, here = (text.replace("\n", " ")[:100] for text in row.texts)
        same = f"{there!r}" if there == here else f"{there!r} there, {here!r} here"
        logger.info("  greedy answers: %s: %s", _equal(row.answer), same)
    for reason in theirs.missing:
        logger.info("not compared: %s", reason)
    if end is not None:
        logger.info("note: %s", end)
    bad = [f"{', '.join(row.reasons)} of {row.name}" for row in rows if row.reasons]
    for line in bad:
        logger.info("differs: %s", line)
    features, logits = (
        max((getattr(row, name) or 0.0 for row in rows), default=0.0) for name in ("features", "logits")
    )
    logger.info(
        "largest differences: image features %.2e, logits %.2e; %s (%g)", features, logits,
        "ABOVE the tolerance, or other pixels, ids or answers" if bad else "all within the tolerance",
        settings.tolerance,
    )  # fmt: skip
    return int(bool(bad))


def _figures(row: CheckRow) -> str:
    pixels = "not compared" if row.pixels is None else (
        f"{row.pixels[0]:.1f} of 255 levels ({row.pixels[1]:.2%} within one)"
    )  # fmt: skip
    ids = "not compared" if row.ids is None else _count(row.ids)
    features = "none" if row.features is None else f"{row.features:.1e}"
    if row.codes is not None:
        return f"pixels {pixels}; token ids {ids}; tokens of pictures {_count(row.codes)}; logits {row.logits:.1e}"
    return f"pixels {pixels}; token ids {ids}; image features {features}; logits {row.logits:.1e}"


def _count(differing: int) -> str:
    return f"{differing} differ" if differing else "equal"


def _equal(first: int | None) -> str:
    return "equal" if not first else f"differ from token {first} on"
