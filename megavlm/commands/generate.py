"""``megavlm generate``: one prompt, with its pictures and films, and one answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.inference.checkpoint import add_model_arguments, add_sampling_arguments, model_of, sampling_of
from megavlm.inference.turns import in_their_order, read_film, read_image, system_turns, user_turn, write_any_text

_LONGEST = 256
_CODES = (".npy", ".json")
_DRAWN = (".png", ".jpg", ".jpeg", ".webp")
INTERMIXED = True
"""Overrides may stand between the options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Answer one prompt. Under torchrun, TP x PP processes share the model "
        "(parallel.tensor_model_parallel_size=2 ...)."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", required=True, help="the user's text; <img> marks where a picture stands, else first"
    )
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a film, or a folder of its frames; <video> marks where it stands, else first; may be given several times",
    )
    parser.add_argument("--system", help="system message (default: the recipe's)")
    parser.add_argument(
        "--boxes", type=Path, metavar="OUT.png", help="draw the boxes of the answer on the first picture"
    )
    parser.add_argument(
        "--image-tokens", type=Path, metavar="OUT",
        help="of a model whose pictures are tokens (Chameleon): answer with a picture; write its codes (.npy, .json)",
    )  # fmt: skip
    add_sampling_arguments(parser, _LONGEST)


def run(args: argparse.Namespace) -> int:
    """Answer and print.

    Raises:
        MissingFileError: checkpoint, image or film are missing.
        UserError: the prompt does not fit its pictures or the context, or an image or film is broken.
    """
    sampling = sampling_of(args)
    _check_boxes(args)
    _check_picture(args)
    recipe, checkpoint, tokenizer = model_of(args)
    images = tuple(read_image(path) for path in args.image)
    films = tuple(read_film(path) for path in args.video)
    turns = (*system_turns(args.system), user_turn(args.prompt, len(images), len(films)))
    write_any_text(sys.stdout)
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    import torch.distributed as dist  # noqa: PLC0415

    from megavlm.inference.boxes import box_space, draw_boxes, family_of  # noqa: PLC0415
    from megavlm.inference.session import Asked, session  # noqa: PLC0415 - imports Megatron-Core

    asked = Asked(turns, in_their_order(turns, images, films))
    if args.image_tokens is not None:
        from megavlm.inference.codes import answer_picture, check_says_pictures  # noqa: PLC0415

        check_says_pictures(recipe, tokenizer)
        with session(recipe, checkpoint, tokenizer, args.context) as model:
            codes = answer_picture(model, asked, sampling)
            if dist.get_rank() == 0:
                _write_codes(args.image_tokens, codes.tolist())
        return 0
    answer = ""
    with session(recipe, checkpoint, tokenizer, args.context) as model:
        first = dist.get_rank() == 0
        for piece in model.answer(asked, max_new_tokens=args.max_new_tokens, sampling=sampling):
            answer += piece.text
            if first:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
        if not first:
            return 0
    sys.stdout.write("\n")
    if args.boxes is not None:
        space = box_space(family_of(checkpoint), recipe.model)
        picture = draw_boxes(images[0], answer, space) if images else None
        if picture is None:
            sys.stderr.write(f"megavlm: the answer has no box to draw, so {args.boxes} was not written\n")
        else:
            args.boxes.parent.mkdir(parents=True, exist_ok=True)
            picture.save(args.boxes)
    return 0


def _check_boxes(args: argparse.Namespace) -> None:
    """Refuse boxes that could not be drawn once the answer is there."""
    if args.boxes is None:
        return
    if args.boxes.suffix.lower() not in _DRAWN:
        raise UserError(f"--boxes {args.boxes}: must end with one of {', '.join(_DRAWN)}; name another file")
    if not args.image:
        raise UserError("--boxes: boxes are drawn on the first --image, and none is given; add it, or leave this out")


def _check_picture(args: argparse.Namespace) -> None:
    """Refuse what does not go with a picture as the answer."""
    if args.image_tokens is None:
        return
    if args.image_tokens.suffix not in _CODES:
        raise UserError(f"--image-tokens {args.image_tokens}: must end with {' or '.join(_CODES)}; name another file")
    if args.boxes is not None:
        raise UserError("--boxes: a picture has no boxes in its text; leave --boxes or --image-tokens out")
    if args.max_new_tokens != _LONGEST:
        raise UserError("--max-new-tokens: a picture has as many tokens as the model gives it; leave it out")


def _write_codes(path: Path, codes: list[int]) -> None:
    """Write the codes of a picture: the encoder's, from 0."""
    import numpy as np  # noqa: PLC0415 - slow to import

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.asarray(codes, np.int32))
    else:
        path.write_text(json.dumps({"codes": codes}) + "\n", encoding="utf-8")
