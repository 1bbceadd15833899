"""``megavlm upcycle``: a checkpoint's MLPs become experts."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from megavlm.config.errors import UserError

logger = logging.getLogger(__name__)

INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Write a checkpoint with experts of one without: each begins as the MLP that stands in its layer, and routers\n"
        "begin anew. Train it with checkpoint.load=OUT and the same keys (docs/experts.md)."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="a step-... directory, or a run's output_dir")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=1, help="of the routers' first weights (default 1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="keys of the new model, such as model.language.num_moe_experts=4 model.language.moe_layer_freq=2",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint.

    Raises:
        UserError: as :func:`megavlm.checkpoint.upcycle.upcycle`.
    """
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - before the first of Megatron-Core

    prepare_device()
    from megavlm.checkpoint.hf.shapes import alone  # noqa: PLC0415
    from megavlm.checkpoint.paths import resolve  # noqa: PLC0415
    from megavlm.checkpoint.upcycle import upcycle  # noqa: PLC0415

    wrong = [word for word in args.overrides if "=" not in word]
    if wrong:
        raise UserError(f"{wrong[0]!r} is no key=value")
    with alone(args.seed):
        size = upcycle(resolve(args.checkpoint), args.out, args.overrides, args.seed)
    logger.info("wrote %s (%.2f GiB); train it with checkpoint.load=%s", args.out, size / 2**30, args.out)
    return 0
