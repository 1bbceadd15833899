"""``megavlm convert``: checkpoints in and out."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.checkpoint.base import base_for
from megavlm.checkpoint.hf.inspect import describe
from megavlm.checkpoint.paths import resolve
from megavlm.config.architecture import CONNECTORS
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.load import read_recipe
from megavlm.families.presets import expand_presets, load_presets

logger = logging.getLogger(__name__)

_GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    add_incoming(actions.add_parser("hf-to-megatron", help="Hugging Face weights to a checkpoint for training"))
    add_outgoing(actions.add_parser("megatron-to-hf", help="a checkpoint to a Hugging Face directory"))
    add_merge(actions.add_parser("merge", help="adapters and their base to a checkpoint of whole weights"))
    add_inspect(
        actions.add_parser("inspect", help="list what a checkpoint of either kind holds (data: megavlm inspect)")
    )
    add_verify(actions.add_parser("verify", help="hold a checkpoint against reference logits"))
    add_check(actions.add_parser("check", help="hold a model against Transformers' of the same checkpoint"))
    add_int4(actions.add_parser("int4", help="a Hugging Face directory with a language model of 4 bits (GPTQ, AWQ)"))


def run(args: argparse.Namespace) -> int:
    """Run the action that was chosen."""
    status: int = args.run(args)
    return status


def add_incoming(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``hf_to_megatron``."""
    parser.description = (
        "Convert Hugging Face weights to a Megatron distributed checkpoint that trains at any TP x PP. "
        "Give one directory with --hf, or compose a model from --language, --vision and --connector."
    )
    parser.add_argument(
        "--hf",
        type=Path,
        metavar="DIR",
        help="a whole checkpoint (or a language model, or a tower, alone); of a LLaVA"
        " in its authors' layout that has no tower in it, with --vision",
    )
    parser.add_argument(
        "--language", type=Path, metavar="DIR", help="compose: checkpoint to take the language model from"
    )
    parser.add_argument("--vision", type=Path, metavar="DIR", help="compose: checkpoint to take the vision tower from")
    parser.add_argument(
        "--connector",
        type=Path,
        metavar="PATH",
        help="compose: checkpoint, or mm_projector.bin, to take the connector from",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoint to write; must not exist yet"
    )
    parser.add_argument(
        "--connector-preset",
        metavar="NAME",
        help="compose without --connector: kind of the fresh connector (default: resampler for Qwen-VL's tower,"
        " mlp2x_gelu for others)",
    )
    parser.add_argument(
        "--vision-feature-layer",
        metavar="LAYER",
        help="of a CLIP or SigLIP tower that comes alone: an index of Transformers' hidden_states, several with commas"
        " between them (=-2,-5; features side by side), or last_hidden_state (default -2, as LLaVA)",
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="recipe whose data, optimizer and other branches the checkpoint's"
        " recipe takes, and whose model and training.seed make the parts that are missing"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="seed of fresh parts (default: the recipe's, or 1234)")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="instead of weights: adapters as PEFT saves them, for --base; or a"
        " file of MiniGPT-v2's trainer with some"
    )  # fmt: skip
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="with --adapter: checkpoint (or run) of the weights that it is for"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    parser.set_defaults(run=run_incoming)


def add_outgoing(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``megatron_to_hf``."""
    parser.description = (
        "Write a checkpoint, saved at any layout, as a Hugging Face directory with sharded safetensors."
    )
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint, or a run's output_dir")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; must not exist yet")
    parser.add_argument("--family", metavar="NAME", help="family to write (default: that of the weights)")
    parser.add_argument(
        "--names", metavar="NAME", help="how tensors are called, of the family's ways (default: as the weights came; a"
        " LLaVA by Transformers 5 has names that servers do not read: hub)"
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("keep", "fp32", "bf16", "fp16"), default="keep", help="number type (default keep)"
    )
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="largest file, in 10^9 bytes (default 5)"
    )
    parser.add_argument("--no-verify", action="store_true", help="compare with no manifest, read nothing back")
    words = "write the adapters alone, in PEFT's format (default: whole weights, with the adapters merged in)"
    parser.add_argument("--adapter", action="store_true", help=words)
    words = "with --adapter: what PEFT's base_model_name_or_path is to say"
    parser.add_argument("--base-name", default="", metavar="NAME", help=words)
    words = "with --adapter: experts' are for one tensor of all, as Transformers 5 has it (default: if published so)"
    parser.add_argument("--stacked-experts", action="store_true", help=words)
    _add_base(parser)
    parser.set_defaults(run=run_outgoing)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="of adapters: checkpoint (or run) of the weights that they are for, if"
        " it has been moved"
    )  # fmt: skip


def _check_base(path: Path, base: Path | None) -> None:
    """Check that the base of adapters is there, before torch is loaded.

    Raises:
        UserError: it is not, or ``--base`` was given for whole weights.
    """
    if base_for(path, base) is None and base is not None:
        raise UserError(f"--base: {path} holds whole weights, no adapters; leave it out")


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``merge``."""
    parser.description = "Write the weights of a run with adapters whole, as a checkpoint that trains at any TP x PP."
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint, or a run's output_dir")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoint to write; must not exist yet"
    )
    _add_base(parser)
    parser.set_defaults(run=run_merge)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.description = (
        "List what a checkpoint holds: a Megatron checkpoint, a run's output_dir, or Hugging Face weights."
    )
    parser.add_argument("path", type=Path, metavar="DIR", help="checkpoint, run, directory or weight file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--all", action="store_true", help="every tensor; else layers are shown together")
    parser.set_defaults(run=run_inspect)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``verify``."""
    parser.description = (
        "Run the inputs of a reference file through a checkpoint and print the largest differences from the "
        "reference's logits, image features and losses. Exit code 1 above the tolerance. Works under torchrun, at any "
        "layout."
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="keys of the checkpoint's recipe to change, such as"
        " parallel.tensor_model_parallel_size=2"
    )  # fmt: skip
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkpoint, or a run's output_dir")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="safetensors with sN.input_ids, sN.pixel_values"
        " (normalised), sN.labels, sN.logits, sN.image_features, sN.loss for N = 0, 1, ...; all but input_ids optional"
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=2e-4, help="largest absolute difference (default 2e-4)")
    parser.set_defaults(run=run_verify)


def add_check(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``check``."""
    parser.description = (
        "Run the same pictures and prompts through Transformers and through the model here, one after the other, and "
        "print the largest differences of pixels, token ids, image features, logits and greedy answers. Exit code 1 "
        "above the tolerance. The first thing to do with a checkpoint that is new here. Takes the memory of the "
        "weights in --dtype, and as much room in the directory of temporary files (TMPDIR) as the checkpoint has."
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="a whole checkpoint, as published")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="pictures (default: two that are drawn)"
    )
    parser.add_argument(
        "--video", type=Path, nargs="+", default=[], metavar="FILE", help="films, or folders of frames, beside pictures"
    )
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="asked of each of these, the first one also without"
    )
    parser.add_argument(
        "--tolerance", type=float, default=2e-4, help="largest difference of features and logits, as a share of the"
        " largest value where that is above 1 (default 2e-4)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="converted from it already (default: converts it for the check)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="longest answer (default 16)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both models (default fp32)")
    parser.set_defaults(run=run_check)


def add_int4(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``int4``."""
    parser.description = (
        "Write a Hugging Face directory again, with the language model's linear layers in 4 bits: the layout of GPTQ "
        "or of AWQ, as Transformers, vLLM and SGLang read it. Tower, connector, embedding and output layer stay. "
        "Qwen v1's (Qwen-VL, Belle-VL, CodeFuse-VLM) are written as Qwen-VL-Chat-Int4 is published. Roundings are "
        "searched on samples of your data, pictures included; a GPU is used if there is one. Needs pip install "
        "'megavlm[int4]'."
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="directory to quantise, as exported")
    parser.add_argument("--layout", choices=("gptq", "awq"), required=True, help="of the 4-bit weights")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="data to calibrate on: prepared, or what prepare reads"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="that image paths of plain data start from")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write; must not exist yet")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="samples to calibrate on (default 128)")
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="samples of more tokens are left out (default 2048)"
    )
    parser.add_argument(
        "--iterations", type=int, metavar="N", help="with --layout gptq: steps of the search in each layer (default"
        " 200; 0 rounds to the nearest)"
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="weights that share a scale (default 128)"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the choice of samples and of the search (default 42)")
    parser.set_defaults(run=run_int4)


def run_int4(args: argparse.Namespace) -> int:
    """Write a directory with a language model of 4 bits.

    Raises:
        UserError: the arguments, the directory or the data are wrong.
    """
    for name, least in (("samples", 1), ("max_length", 1), ("group_size", 8)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.iterations is not None and args.layout != "gptq":
        raise UserError("--iterations: goes with --layout gptq; AWQ searches scales, in a fixed number of steps")
    if args.iterations is not None and args.iterations < 0:
        raise UserError(f"--iterations must be at least 0, not {args.iterations}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("int4 runs as one process, not under torchrun")
    _prepare()
    from megavlm.checkpoint.hf.int4 import Int4Settings, quantise  # noqa: PLC0415

    steps = 200 if args.iterations is None else args.iterations
    settings = Int4Settings(
        args.hf, args.out, args.layout, args.data, args.images, args.samples, args.max_length, steps, args.group_size,
        args.seed,
    )  # fmt: skip
    for line in quantise(settings).lines():
        logger.info("%s", line)
    logger.info("wrote %s", args.out)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Hold a model against Transformers'; exit code 1 above the tolerance.

    Raises:
        UserError: the arguments are wrong.
    """
    if not 0 <= args.tolerance < 1:
        raise UserError(f"--tolerance must be from 0 to below 1, not {args.tolerance:g}")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("check runs as one process, not under torchrun; several processes: megavlm convert verify")
    for flag, paths in (("image", args.image), ("video", args.video)):
        missing = next((one for one in paths if not (one.is_file() or (flag == "video" and one.is_dir()))), None)
        if missing is not None:
            raise UserError(f"--{flag} {missing}: no such file")
    _prepare()
    from megavlm.evaluation.check.run import PROMPTS, CheckSettings, check  # noqa: PLC0415

    prompts = args.prompt or PROMPTS
    shown = args.image, args.video, prompts
    return check(CheckSettings(args.hf, *shown, args.tolerance, args.max_new_tokens, args.checkpoint, args.dtype))


def run_incoming(args: argparse.Namespace) -> int:
    """Convert to a Megatron checkpoint.

    Raises:
        UserError: the arguments or the sources are wrong.
    """
    compose = [name for name in ("language", "vision", "connector") if getattr(args, name) is not None]
    apart = args.hf is not None and compose == ["vision"]  # a LLaVA whose tower is not in its checkpoint
    if args.adapter is not None or args.base is not None:
        return _run_adapter(args, compose)
    if (args.hf is None) == (not compose) and not apart:
        raise UserError("give either --hf DIR, or --language DIR and --vision DIR to compose a model")
    if args.hf is not None and args.connector_preset is not None:
        raise UserError("--connector-preset: goes with a fresh connector, when composing, not with --hf")
    if compose and not apart and not {"language", "vision"} & set(compose):
        raise UserError("--connector alone makes no model; give --language and --vision too")
    base = _base_recipe(args.recipe)
    _prepare()
    # Megatron-Core may be imported from here on.
    from megavlm.checkpoint.hf.given import SourceOfParts, open_directory  # noqa: PLC0415
    from megavlm.checkpoint.hf.incoming import convert  # noqa: PLC0415
    from megavlm.families.composing import check_stage_1  # noqa: PLC0415

    layer = _feature_layer(args.vision_feature_layer)
    fresh: dict[str, Any] = {}
    home = None
    if args.hf is not None:
        given, home = open_directory(args.hf, args.vision, -2 if layer is None else layer)
    else:
        given = [SourceOfParts.open(getattr(args, name), [name], -2 if layer is None else layer) for name in compose]
        check_stage_1(given)
        fresh = _fresh(args, given, base)
    seed = args.seed if args.seed is not None else ((base or {}).get("training") or {}).get("seed", 1234)
    report = convert(given, args.out, seed=seed, fresh=fresh, base=base, verify=not args.no_verify, home=home)
    for line in report.lines():
        logger.info("%s", line)
    logger.info("wrote %s", args.out)
    if (args.out / "recipe.yaml").is_file():
        logger.info("train it with: megavlm train %s data.train.0.path=DATA output_dir=RUN", args.out / "recipe.yaml")
    else:
        logger.info("this is a part of a model; to train, compose a whole one with --language and --vision")
    return 0


def _run_adapter(args: argparse.Namespace, compose: Sequence[str]) -> int:
    """Convert PEFT's adapters.

    Raises:
        UserError: the arguments or the adapters are wrong.
    """
    if args.adapter is None or args.base is None:
        raise UserError("--adapter DIR and --base DIR go together: the adapters, and the weights that they are for")
    if args.hf is not None or compose or args.recipe is not None:
        raise UserError("--adapter: goes with --base and --out alone; the weights are those of --base")
    base = resolve(args.base)
    _prepare()
    from megavlm.checkpoint.hf.peft import import_adapter  # noqa: PLC0415

    logger.info("read %d tensors", import_adapter(args.adapter, base, args.out))
    logger.info("wrote %s; its base stays where it is: %s", args.out, base)
    return 0


def run_merge(args: argparse.Namespace) -> int:
    """Write whole weights.

    Raises:
        UserError: the checkpoint has no adapters, or their base is gone.
    """
    path = resolve(args.megatron)
    _check_base(path, args.base)
    _prepare()
    from megavlm.checkpoint.hf.shapes import alone  # noqa: PLC0415
    from megavlm.checkpoint.merged import merge  # noqa: PLC0415

    with alone():
        written = merge(path, args.out, args.base)
    logger.info("wrote %s, %.2f GiB", args.out, written / _GIB)
    return 0


def _prepare() -> None:
    """Get ready for Megatron-Core; what is wrong with the arguments has been said before torch is imported."""
    # Large pages: filling a new tensor with small ones costs more than what is copied into it. Read on the first use.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415

    prepare_device()
    from megavlm.parallel.cpu_layer import return_freed_memory  # noqa: PLC0415

    return_freed_memory()


def _feature_layer(text: str | None) -> int | str | list[int] | None:
    if text is None or text == "last_hidden_state":
        return text
    try:
        numbers = [int(one) for one in text.split(",")]
    except ValueError:
        raise UserError(
            f"--vision-feature-layer: {text[:60]!r} is neither a number nor several with commas between them, nor "
            "last_hidden_state"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _base_recipe(recipe: str | None) -> dict[str, Any] | None:
    if recipe is None:
        return None
    try:
        return expand_presets(read_recipe(recipe))
    except UserError as error:
        raise RecipeError(str(error)) from None


def _fresh(args: argparse.Namespace, given: Sequence[Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """Return the branches of the parts that no source gives.

    Raises:
        UserError: a part is missing and nothing says what it should be.
    """
    there = {part for one in given for part in one.parts}
    model = (base or {}).get("model") or {}
    fresh: dict[str, Any] = {}
    for part in ("vision", "language"):
        if part not in there:
            if part not in model:
                raise UserError(
                    f"--{part} is missing; give it, or a --recipe whose model.{part} says what to initialise"
                )
            fresh[part] = dict(model[part])
    if "connector" in there:
        if args.connector_preset is not None:
            raise UserError("--connector-preset: goes with a fresh connector, not with --connector")
        return fresh
    if args.connector_preset is None and "connector" in model:
        fresh["connector"] = dict(model["connector"])
        return fresh
    branches = {part: one.branches[part] for one in given for part in one.parts} | fresh
    from megavlm.families.composing import fresh_connector  # noqa: PLC0415 - torch

    fresh["connector"] = fresh_connector(branches, args.connector_preset)
    load_presets()
    try:
        CONNECTORS.find(fresh["connector"]["preset"])
    except UserError as error:
        raise UserError(f"--connector-preset: {error}") from None
    return fresh


def run_outgoing(args: argparse.Namespace) -> int:
    """Write a Hugging Face directory.

    Raises:
        UserError: the checkpoint is wrong, or no family holds it.
    """
    if args.max_shard_size <= 0:
        raise UserError(f"--max-shard-size must be above 0, not {args.max_shard_size:g}")
    path = resolve(args.megatron)
    for name in ("base_name", "stacked_experts"):
        if getattr(args, name) and not args.adapter:
            raise UserError(f"--{name.replace('_', '-')}: goes with --adapter")
    if args.names is not None and args.adapter:
        raise UserError("--names: PEFT's adapters have the names of Transformers' modules; leave it out, or --adapter")
    if not args.adapter:
        _check_base(path, args.base)
    elif args.base is not None:
        raise UserError("--base: adapters are written without their base; leave it out, or --adapter")
    _prepare()
    if args.adapter:
        from megavlm.checkpoint.hf.peft import export_adapter  # noqa: PLC0415

        own = {"family_name": args.family, "base_name": args.base_name, "stacked": args.stacked_experts}
        logger.info("wrote %s: %d tensors", args.out, export_adapter(path, args.out, **own))
        return 0
    from megavlm.checkpoint.hf.outgoing import DTYPES, export  # noqa: PLC0415

    shard_bytes = int(args.max_shard_size * 1e9)
    result = export(
        path, args.out, family_name=args.family, dtype=DTYPES[args.dtype], shard_bytes=shard_bytes,
        verify=not args.no_verify, base=args.base, names=args.names,
    )  # fmt: skip
    for line in result.lines():
        logger.info("%s", line)
    logger.info("wrote %s", args.out)
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    print(describe(args.path, as_json=args.json, every=args.all))  # noqa: T201 - what was asked for
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Hold a checkpoint against a reference; exit code 1 above the tolerance."""
    _prepare()
    from megavlm.evaluation.parity import verify  # noqa: PLC0415

    return verify(args.megatron, args.reference, args.set, args.tolerance)
