"""What Transformers makes of pictures and prompts: pixels, token ids, image features, logits, greedy answers."""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.hf.transformers_class import complete_processor, first_line
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.data.films.film import Film
from megavlm.data.films.read import frames_of
from megavlm.data.image_colours import Alpha
from megavlm.data.images import decode_with_pil
from megavlm.families.films import film_has_token, films_apart
from megavlm.parallel.device import local_device

logger = logging.getLogger(__name__)

HIGH = "high_res_pixel_values"
"""What processors and classes of two towers call the larger rendering."""
_MOST_FRAMES_BYTES = 2 << 30
"""Of a film's frames at once."""


@dataclass
class CheckQuestion:
    """A prompt with its picture or film, and what Transformers made of both; on the CPU."""

    name: str
    prompt: str
    images: tuple[Path, ...]
    film: GivenFilm | None = None
    """In the place of pictures."""
    ids: Tensor | None = None
    """[S] int64, with the slots of the pictures; None where its processor or template is not at hand."""
    pixels: Tensor | None = None
    """[V, 3, H, W] normalised views, [P, F] patches, or [N, F] renderings in a row; None as well."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What else the processor tells the model of its pictures, or of its film."""
    features: Tensor | None = None
    """[N * Q, E]; None where pictures are tokens."""
    codes: Tensor | None = None
    """[N * Q] int64 tokens of pictures, where they are such."""
    logits: Tensor | None = None
    """[S, V]."""
    answer: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """Of each answered token: by how much its logit is above the next best."""


@dataclass(frozen=True)
class GivenFilm:
    """A film, and what Transformers' classes are told of it."""

    film: Film
    kind: str
    """``model.video.kind``."""
    asked: dict[str, float]
    """``fps`` or ``num_frames``: what a processor samples by that has neither of its own."""
    alpha: Alpha = "white"


@dataclass
class Theirs:
    """The model and its processor, opened without running code of the checkpoint."""

    model: Any
    processor: Any
    name: str
    """Of the model's class."""
    missing: list[str]
    """What cannot be compared, and why."""


def open_theirs(directory: Path, dtype: torch.dtype) -> Theirs:
    """Load model and processor."""
    import transformers  # noqa: PLC0415

    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True, dtype=dtype, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    missing = []
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        missing.append(f"{len(names)} tensors that Transformers does not find in the checkpoint ({names[0]}, ..)")
    processor: Any = None
    try:
        processor = _processor(directory)
        complete_processor(processor, model.config)
        if not getattr(processor, "chat_template", None):  # of older files, in tokenizer_config.json alone
            processor.chat_template = getattr(processor.tokenizer, "chat_template", None)
    except Exception as error:  # of a foreign library, on files of any kind: said, and the rest is compared
        missing.append(f"pixels and token ids: AutoProcessor cannot be made ({first_line(error)})")
    return Theirs(model.eval().to(local_device()), processor, type(model).__name__, missing)


def _processor(directory: Path) -> Any:
    """Return the checkpoint's processor, which opens pictures by PIL; its films, where it takes any, by torchvision."""
    import transformers  # noqa: PLC0415

    safe = {"trust_remote_code": False, "local_files_only": True}
    if not transformers.utils.is_torchvision_available():
        return transformers.AutoProcessor.from_pretrained(directory, backend="pil", **safe)
    processor = transformers.AutoProcessor.from_pretrained(directory, **safe)  # no film processor has another backend
    if getattr(processor, "image_processor", None) is not None:
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil", **safe)
    return processor


def process(theirs: Theirs, questions: Sequence[CheckQuestion]) -> None:
    """Let the processor make pixels and token ids of the questions, as far as the checkpoint has what that takes."""
    if theirs.processor is None:
        return
    templated = bool(getattr(theirs.processor, "chat_template", None))
    try:
        for question in questions:
            if question.film is None:
                _process_one(theirs.processor, question, templated=templated)
    except Exception as error:  # of a foreign library, on files of any kind: said, and the rest is compared
        theirs.missing.append(f"pixels and token ids: {type(theirs.processor).__name__}: {first_line(error)}")
        for question in questions:
            question.pixels = question.ids = None
        return
    for question in questions:
        try:
            if question.film is not None:
                _process_film(theirs, question, question.film, templated=templated)
        except Exception as error:  # as above
            theirs.missing.append(f"frames, pixels and token ids of {question.name}: {first_line(error)}")
            question.pixels = question.ids = None
    if not templated:
        theirs.missing.append("token ids: the checkpoint has no chat template; ours are taken for both")


def _process_one(processor: Any, question: CheckQuestion, *, templated: bool) -> None:
    # Opened as everywhere here (upright, on white): what is compared is what becomes of the picture then.
    images = [decode_with_pil(path.read_bytes()) for path in question.images]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.prompt}]
    if templated:
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = "".join(f"{processor.image_token}\n" for _ in images) + question.prompt
    # A template writes what begins a text itself, where it wants it.
    twice = {"add_special_tokens": False} if templated and _begins(processor, text) else {}
    made = processor(text=text, images=images or None, return_tensors="pt", **twice)
    if images:
        pixels = made["pixel_values"]
        if HIGH in made:  # renderings for two towers, in one row as they are here
            pixels = torch.cat([pixels.flatten(1), made[HIGH].flatten(1)], dim=1)
        # Of pictures that keep sizes of their own: flat patches.
        question.pixels = pixels if pixels.dim() == 2 else pixels.flatten(0, -4)
        question.extra = {key: made[key] for key in ("image_sizes", "image_grid_thw") if key in made}
    if templated:
        question.ids = made["input_ids"][0].long()


def _process_film(theirs: Theirs, question: CheckQuestion, given: GivenFilm, *, templated: bool) -> None:
    """Let the processor sample, resize and write a film, whose frames are decoded here.

    Raises:
        UserError: All frames would take too much memory; the processor wants them at once.
    """
    import numpy as np  # noqa: PLC0415

    processor = theirs.processor
    shape = given.film.shape()
    size = shape.frames * shape.width * shape.height * 3
    if size > _MOST_FRAMES_BYTES:
        raise UserError(f"all its frames are {size >> 20} MiB, which its processor wants at once; give a shorter film")
    frames = np.stack([one.permute(1, 2, 0).numpy() for one in frames_of(given.film, range(shape.frames), given.alpha)])
    told = {
        "total_num_frames": shape.frames, "fps": shape.rate, "duration": shape.seconds, "width": shape.width,
        "height": shape.height,
    }  # fmt: skip
    content = [{"type": "video"}, {"type": "text", "text": question.prompt}]
    if templated:
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{processor.video_token}\n{question.prompt}"
    twice = {"add_special_tokens": False} if templated and _begins(processor, text) else {}
    own = processor.video_processor
    asked = {} if any(getattr(own, key, None) is not None for key in ("fps", "num_frames")) else given.asked
    made = processor(
        text=text, videos=[frames], video_metadata=[told], do_sample_frames=True, return_tensors="pt", **asked, **twice
    )
    pixels = made["pixel_values_videos"] if "pixel_values_videos" in made else made["pixel_values"]
    question.pixels = pixels if pixels.dim() == 2 else pixels.flatten(0, -4)
    question.extra = {
        key: torch.as_tensor(made[key]) for key in ("video_grid_thw", "second_per_grid_ts") if key in made
    }
    if templated:
        ids, config = made["input_ids"][0].long(), theirs.model.config
        if film_has_token(given.kind):  # here one token stands for slots of both
            ids = torch.where(ids == config.video_token_id, config.image_token_id, ids)
        question.ids = ids


def _begins(processor: Any, text: str) -> bool:
    begin: str = getattr(processor.tokenizer, "bos_token", None) or ""
    return begin != "" and text.startswith(begin)


@torch.no_grad()
def compute(theirs: Theirs, questions: Sequence[CheckQuestion], max_new_tokens: int) -> None:
    """Compute features, logits and greedy answers of questions that have ids and pixels."""
    device = local_device()
    for question in questions:
        assert question.ids is not None
        inputs = {"input_ids": question.ids[None].to(device)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if question.film is not None:
            film = _film_inputs(theirs.model, question, question.film)
            question.features = _film_features(theirs.model, film)
            taken = inspect.signature(theirs.model.forward).parameters
            inputs |= {key: value for key, value in film.items() if key in taken}
        elif question.pixels is not None:
            inputs["pixel_values"] = question.pixels.to(device, theirs.model.dtype)
            # Sizes of pictures, which those models ask for whose pictures are cut to tiles by them.
            encode = _encoder(theirs.model)
            taken = inspect.signature(encode).parameters
            if "pixel_attention_mask" in taken:  # classes that are told which tiles are whose take those of each sample
                inputs["pixel_values"] = inputs["pixel_values"][None]
            extra = {key: value.to(device) for key, value in question.extra.items() if key in taken}
            if HIGH in taken:
                side = theirs.model.config.vision_config.image_size
                inputs["pixel_values"], extra[HIGH] = _renderings(inputs["pixel_values"], side)
            inputs |= extra
            if hasattr(theirs.model, "get_image_tokens"):
                question.codes = theirs.model.get_image_tokens(inputs["pixel_values"]).flatten().long().cpu()
            else:
                question.features = _flat(encode(pixel_values=inputs["pixel_values"], **extra))
        taken = inspect.signature(theirs.model.forward).parameters
        if question.film is None and "mm_token_type_ids" in taken:  # which slots are a picture's
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == theirs.model.config.image_token_id).int()
        inputs |= _token_types(theirs.model, inputs["input_ids"])
        question.logits = theirs.model(**inputs).logits[0].float().cpu()
        made = theirs.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        question.answer = made.sequences[0, len(question.ids) :].tolist()
        best = [score[0].float().topk(2).values for score in made.scores]
        question.margins = [float(two[0] - two[1]) for two in best]


def _renderings(pixels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the smaller pictures [N, 3, side, side], and the larger ones, of both in a row."""
    low, high = pixels[:, : 3 * side**2], pixels[:, 3 * side**2 :]
    larger = math.isqrt(high.size(1) // 3)
    return low.unflatten(1, (3, side, side)), high.unflatten(1, (3, larger, larger))


def _encoder(model: Any) -> Any:
    """Return what makes image features: of some classes the model without its head alone has it."""
    return getattr(model, "get_image_features", None) or model.model.get_image_features


def _film_inputs(model: Any, question: CheckQuestion, given: GivenFilm) -> dict[str, Tensor]:
    """Return what the class may be told of a film, with the token and the type that it has at a film's slots."""
    assert question.pixels is not None and question.ids is not None
    device = local_device()
    pixels = question.pixels.to(device, model.dtype)
    if not films_apart(given.kind):
        return {"pixel_values": pixels}
    more = {key: value.to(device) for key, value in question.extra.items()}
    slots = question.ids == model.config.image_token_id
    own = model.config.video_token_id if film_has_token(given.kind) else model.config.image_token_id
    more["input_ids"] = torch.where(slots, own, question.ids)[None].to(device)
    more["mm_token_type_ids"] = 2 * slots.int()[None].to(device)
    return {"pixel_values_videos": pixels if pixels.dim() == 2 else pixels[None], **more}


def _film_features(model: Any, film: Mapping[str, Tensor]) -> Tensor:
    """Return [T, E] of a film's slots."""
    ask = model.get_video_features if "pixel_values_videos" in film else model.get_image_features
    taken = inspect.signature(ask).parameters
    return _flat(ask(**{key: value for key, value in film.items() if key in taken}))


def _token_types(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return what classes are told whose prompts are all prefix (0), or whose pictures' slots (1) see each other.

    Their processors say it with the ids, which may be ours here.
    """
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        return {}
    prefix = getattr(model.config.get_text_config(), "use_bidirectional_attention", None)  # PaliGemma's sets it
    return {"token_type_ids": torch.zeros_like(ids) if prefix else (ids == model.config.image_token_id).long()}


def _flat(found: Any) -> Tensor:
    """Return [N * Q, E] of what ``get_image_features`` of any class and version gives."""
    if not isinstance(found, Tensor | list | tuple):
        found = found.pooler_output
    pieces = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([piece.flatten(0, -2) for piece in pieces]).float().cpu()


def close(theirs: Theirs) -> None:
    """Give the memory of the model back."""
    theirs.model = None
    gc.collect()


def ends(directory: Path, config: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer, by the checkpoint's generation_config.json, or its configuration."""
    path = directory / "generation_config.json"
    tree = read_json(path) if path.is_file() else dict(config)
    found = tree.get("eos_token_id")
    return {found} if isinstance(found, int) else set(found or ())
