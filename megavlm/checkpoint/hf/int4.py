"""A Hugging Face directory whose language model has weights of 4 bits, in GPTQ's or AWQ's layout.

The rounding is Intel AutoRound's (``auto-round``), through the model's class in Transformers and on samples of the
user's own data, so that the language model sees the pictures' features as it does when it answers. Of what the library
writes only the tensors of the language model's layers are taken; all others, and all small files but ``config.json``,
are the directory's own, byte for byte. Layouts: AutoGPTQ's (``qweight`` packed along the input, zero points less one,
``g_idx``) and AutoAWQ's GEMM (``qweight`` packed along the output in its interleaved order), as Transformers, vLLM and
SGLang read them.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.checkpoint import assets
from megavlm.checkpoint.hf.calibration import Inputs, calibration_samples
from megavlm.checkpoint.hf.sink import SHARD_BYTES, Entry, ShardedWriter
from megavlm.checkpoint.hf.transformers_class import complete_processor, first_line, transformers_class
from megavlm.checkpoint.publish import publishing, refuse_existing
from megavlm.checkpoint.readback import ReadBack
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.parallel.device import gpu_count
from megavlm.weights.source import CONFIG, Source

logger = logging.getLogger(__name__)

LAYOUTS = ("gptq", "awq")
_BITS = 4
_PACKED = 8
"""Weights of a 32-bit number."""
_FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}
_QUANTISED = ("qweight", "qzeros", "scales", "g_idx")
KEY = "quantization_config"


@dataclass(frozen=True)
class Int4Settings:
    """What an Int4 export is asked for."""

    hf: Path
    out: Path
    layout: str
    """One of :data:`LAYOUTS`."""
    data: Path
    images: Path | None = None
    samples: int = 128
    longest: int = 2048
    """Tokens of a sample."""
    iterations: int = 200
    """Of AutoRound's search of roundings, for each layer (``gptq``); 0 rounds to the nearest."""
    group_size: int = 128
    seed: int = 42


@dataclass(frozen=True)
class Int4Export:
    """What an Int4 export did."""

    layers: int
    """Linear layers of 4 bits."""
    tensors: int
    before: int
    after: int
    """Bytes of all tensors."""

    def lines(self) -> list[str]:
        """Return the report for people."""
        return [
            f"{self.layers} linear layers of the language model have 4 bits",
            f"{self.tensors} tensors, {self.after / 2**30:.2f} GiB instead of {self.before / 2**30:.2f}: read back",
        ]


def quantise(settings: Int4Settings) -> Int4Export:
    """Write the directory.

    Raises:
        UserError: the directory, the data or the installed libraries do not allow it.
    """
    refuse_existing(settings.out)
    source = Source(settings.hf)
    _check_source(settings, source)
    transformers_class(settings.hf, "int4")
    library = _library()
    model, processor = _open(settings.hf, source)
    blocks, names = _language_layers(model, settings)
    samples = calibration_samples(
        settings.data, settings.images, processor, count=settings.samples, longest=settings.longest, seed=settings.seed
    )
    _check_samples(model, samples)
    kept = _kept(model, names)
    settings.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{settings.out.name}.", dir=settings.out.absolute().parent) as folder:
        found = _run(library, model, processor, samples, blocks, settings, Path(folder))
        del model
        gc.collect()
        return _write(source, found, len(names), blocks, kept, settings)


def _check_source(settings: Int4Settings, source: Source) -> None:
    if KEY in source.config:
        method = source.config[KEY].get("quant_method") if isinstance(source.config[KEY], dict) else source.config[KEY]
        raise UserError(f"{settings.hf / CONFIG}: {KEY} says {method}; int4 takes weights that are not quantised")
    other = next((name for name, info in source.tensors.items() if not isinstance(info.dtype, torch.dtype)), None)
    if other is not None:
        raise UserError(
            f"{settings.hf}: {other} is {source.tensors[other].dtype}; int4 takes weights in floating point"
        )


def _library() -> Any:
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")  # its log is of its own files and settings; progress stays
    try:
        import auto_round  # noqa: PLC0415 - optional
    except ImportError:
        raise UserError("convert int4 needs auto-round: pip install 'megavlm[int4]'") from None
    return auto_round


def _open(directory: Path, source: Source) -> tuple[Any, Any]:
    """Load model and processor of the directory.

    Raises:
        UserError: the processor cannot be made, or has no chat template.
    """
    import transformers  # noqa: PLC0415

    try:
        processor = transformers.AutoProcessor.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True, backend="pil"
        )
    except Exception as error:  # of a foreign library, on files of any kind
        raise UserError(f"{directory}: AutoProcessor cannot be made: {first_line(error)}") from None
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{directory}: has no chat template, which writes the samples; add chat_template.jinja")
    dtypes = {info.dtype for info in source.tensors.values()}
    dtype = torch.float16 if dtypes == {torch.float16} else torch.bfloat16
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True, dtype=dtype
    ).eval()
    complete_processor(processor, model.config)
    # The library would look there for tensors in fp32 and write these in place of those that it scaled (0.16.1).
    model.config._name_or_path = model.name_or_path = ""
    return model, processor


def _language_layers(model: Any, settings: Int4Settings) -> tuple[str, list[str]]:
    """Return the path of the language model's layers, and the paths of the linear layers in them.

    Raises:
        UserError: one of them has no whole number of groups, or they are a mixture of experts.
    """
    layers = model.get_decoder().layers
    blocks = next(name for name, module in model.named_modules() if module is layers)
    experts = next((name for name, one in layers.named_parameters() if one.ndim > 2 or ".experts." in name), None)
    if experts is not None:  # would stay as they are, and servers would look for 4 bits
        raise UserError(f"{settings.hf}: {blocks}.{experts}: int4 does not take mixtures of experts")
    names = []
    for name, module in layers.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module.in_features % settings.group_size or module.out_features % _PACKED:
            raise UserError(
                f"--group-size {settings.group_size}: {blocks}.{name} maps {module.in_features} to "
                f"{module.out_features}; the first must be a multiple of it, the second of {_PACKED}"
            )
        names.append(f"{blocks}.{name}")
    return blocks, names


class _Reached(Exception):  # noqa: N818 - no error
    """The language model has been reached."""


@torch.no_grad()
def _check_samples(model: Any, samples: Sequence[Inputs]) -> None:
    """Take every sample as far as the language model: the library would go on without those that fail."""

    def reached(*_: Any) -> None:
        raise _Reached

    handle = model.get_decoder().layers[0].register_forward_pre_hook(reached)
    try:
        for one in samples:
            try:
                model(**{key: _as(value, model.dtype) for key, value in one.items()})
            except _Reached:
                pass
    finally:
        handle.remove()


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _kept(model: Any, quantised: Sequence[str]) -> list[str]:
    """Return the largest modules that have linear layers, none of which is quantised, such as the tower's."""

    def walk(prefix: str, module: nn.Module) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in quantised:
                continue
            if any(one.startswith(f"{path}.") for one in quantised):
                yield from walk(f"{path}.", child)
            elif any(isinstance(one, nn.Linear) for one in child.modules()):
                yield path

    return list(walk("", model))


def _run(
    library: Any, model: Any, processor: Any, samples: Sequence[Inputs], blocks: str, settings: Int4Settings,
    folder: Path,
) -> Source:  # fmt: skip
    """Let the library quantise, and return what it wrote."""
    gptq = settings.layout == "gptq"
    dtype = model.dtype
    work = library.AutoRound(
        model,
        tokenizer=processor.tokenizer,
        processor=processor,
        bits=_BITS,
        group_size=settings.group_size,
        sym=gptq,
        alg_configs=("auto_round" if settings.iterations else "rtn") if gptq else "awq",
        **({"iters": settings.iterations} if gptq else {}),
        dataset=[{key: _as(value, dtype) for key, value in one.items()} for one in samples],
        nsamples=len(samples),
        seqlen=settings.longest,
        batch_size=1,
        to_quant_block_names=blocks,
        device_map=0 if gpu_count() else "cpu",
        enable_torch_compile=False,
        seed=settings.seed,
    )
    work.quantize_and_save(str(folder), format=_FORMATS[settings.layout])
    return Source(next(folder.rglob(CONFIG)).parent)


def _write(
    source: Source, found: Source, layers: int, blocks: str, kept: Sequence[str], settings: Int4Settings
) -> Int4Export:
    """Put the quantised tensors in the place of the directory's, and publish all with its small files."""
    stems = {name.removesuffix(".qweight") for name in found.tensors if name.endswith(".qweight")}
    unknown = sorted(stem for stem in stems if f"{stem}.weight" not in source)
    # A bug, of this file or of the library: nothing of it is the user's.
    assert not unknown, f"auto-round quantised what the directory does not have: {unknown[:3]}"
    assert len(stems) == layers, f"auto-round quantised {len(stems)} of {layers} linear layers"
    inside = {stem[: stem.index(".layers.") + len(".layers.")] for stem in stems}
    entries: list[Entry] = []
    origins: dict[str, Source] = {}
    for name, info in source.tensors.items():
        stem, ending = name.rpartition(".")[::2]
        if ending == "weight" and stem in stems:
            for part in (f"{stem}.{part}" for part in _QUANTISED):
                if part in found:
                    origins[part] = found
                    entries.append(Entry(part, found.shape(part), found.get(part).dtype))
            continue
        # AWQ scales norms and biases of the layers too.
        scaled = name in found and any(name.startswith(prefix) for prefix in inside)
        origins[name] = found if scaled else source
        assert isinstance(info.dtype, torch.dtype)
        entries.append(Entry(name, info.shape, info.dtype))
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # the larger first: all stay aligned
    size = sum(entry.nbytes for entry in entries)
    with publishing(settings.out, needed_bytes=size) as partial:
        with ReadBack() as read_back:
            writer = ShardedWriter(partial, entries, SHARD_BYTES, read_back)
            try:
                for entry in entries:
                    writer.put(entry.name, origins[entry.name].get(entry.name).to(entry.dtype))
                writer.close()
            finally:
                writer.abort()
        assets.copy_files(assets.small_files(settings.hf), partial)
        config = read_json(settings.hf / CONFIG) | {KEY: quantization_config(settings, blocks, kept)}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Int4Export(len(stems), len(entries), source.size_bytes(), size)


def quantization_config(settings: Int4Settings, blocks: str, kept: Sequence[str]) -> dict[str, Any]:
    """Return what ``config.json`` says of the weights, in the keys of the layout.

    Args:
        settings: of the export.
        blocks: path of the language model's layers in Transformers' class.
        kept: modules with linear layers that are not quantised, by their paths there; servers leave out the first name.
    """
    tree: dict[str, Any] = {"quant_method": settings.layout, "bits": _BITS, "group_size": settings.group_size}
    if settings.layout == "awq":
        names = dict.fromkeys([*kept, *(path.rpartition(".")[2] for path in kept)])
        return tree | {"zero_point": True, "version": "gemm", "modules_to_not_convert": list(names)}
    return tree | {
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "block_name_to_quantize": blocks,
        "dynamic": {rf"-:.*\b{path.rpartition('.')[2]}\b.*": {} for path in kept},
    }
