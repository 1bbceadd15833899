"""``megavlm generate``: one prompt, with its pictures and films, and one answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megavlm.inference.checkpoint import add_model_arguments, add_sampling_arguments, model_of, sampling_of
from megavlm.inference.turns import in_their_order, read_film, read_image, system_turns, user_turn, write_any_text

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
    add_sampling_arguments(parser, 256)


def run(args: argparse.Namespace) -> int:
    """Answer and print.

    Raises:
        MissingFileError: checkpoint, image or film are missing.
        UserError: the prompt does not fit its pictures or the context, or an image or film is broken.
    """
    sampling = sampling_of(args)
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
