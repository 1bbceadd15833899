"""A Hugging Face directory whose language model has weights of 4 bits, in GPTQ's or AWQ's layout.

The rounding is Intel AutoRound's (``auto-round``), through the model's class in Transformers and on samples of the
user's own data, so that the language model sees the pictures' features as it does when it answers. Of what the library
writes only the tensors of the language model's layers are taken; all others, and all small files but ``config.json``,
are the directory's own, byte for byte (of Qwen v1, which Transformers has no class for: ``int4_qwen.py``). Layouts:
AutoGPTQ's (``qweight`` packed along the input, zero points less one, ``g_idx``) and AutoAWQ's GEMM (``qweight`` packed
along the output in its interleaved order), as Transformers, vLLM and SGLang read them.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megavlm.checkpoint import assets
from megavlm.checkpoint.finite import narrowed
from megavlm.checkpoint.hf.calibration import Inputs, by_processor, calibration_samples
from megavlm.checkpoint.hf.int4_qwen import DTYPE as QWEN_DTYPE
from megavlm.checkpoint.hf.int4_qwen import QUANTIZE_CONFIG, QwenDirectory, UnderQwensNames, is_qwen, own_file
from megavlm.checkpoint.hf.int4_qwen import quantization_config as qwen_quantization_config
from megavlm.checkpoint.hf.sink import SHARD_BYTES, Entry, ShardedWriter
from megavlm.checkpoint.hf.transformers_class import complete_processor, first_line, transformers_class
from megavlm.checkpoint.publish import publishing, refuse_existing
from megavlm.checkpoint.readback import ReadBack
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.parallel.device import gpu_count
from megavlm.weights.source import CONFIG, Source, TensorInfo

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


@dataclass(frozen=True)
class _ForLibrary:
    """What the library is given."""

    model: Any
    tokenizer: Any
    processor: Any
    samples: list[Inputs]


def quantise(settings: Int4Settings) -> Int4Export:
    """Write the directory.

    Raises:
        UserError: the directory, the data or the installed libraries do not allow it.
    """
    refuse_existing(settings.out)
    source = Source(settings.hf)
    _check_source(settings, source)
    qwen = QwenDirectory.open(settings.hf, settings.longest) if is_qwen(source) else None
    if qwen is None:
        transformers_class(settings.hf, "int4")
    library = _library()
    opened = _open(settings, source) if qwen is None else _open_qwen(settings, source, qwen)
    blocks, names = _language_layers(opened.model, settings)
    _check_samples(opened.model, opened.samples)
    kept = _kept(opened.model, names)
    settings.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{settings.out.name}.", dir=settings.out.absolute().parent) as folder:
        found = _run(library, opened, blocks, settings, Path(folder))
        del opened
        gc.collect()
        if qwen is not None:
            return _write_qwen(source, found, len(names), settings, qwen)
        config = read_json(settings.hf / CONFIG) | {KEY: quantization_config(settings, blocks, kept)}
        return _write(source, _Written(found, len(names), {CONFIG: config}), settings)


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


def _open(settings: Int4Settings, source: Source) -> _ForLibrary:
    """Load model and processor of the directory, and the samples.

    Raises:
        UserError: the processor cannot be made, or has no chat template, or no sample can be used.
    """
    import transformers  # noqa: PLC0415

    directory = settings.hf
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True, backend="pil"
        )
    except Exception as error:  # of a foreign library, on files of any kind
        raise UserError(f"{directory}: AutoProcessor cannot be made: {first_line(error)}") from None
    if not getattr(processor, "chat_template", None):
        raise UserError(f"{directory}: has no chat template, which writes the samples; add chat_template.jinja")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True, dtype=_dtype(source)
    ).eval()
    complete_processor(processor, model.config)
    # The library would look there for tensors in fp32 and write these in place of those that it scaled (0.16.1).
    model.config._name_or_path = model.name_or_path = ""
    samples = calibration_samples(
        settings.data, settings.images, functools.partial(by_processor, processor=processor), count=settings.samples,
        longest=settings.longest, seed=settings.seed,
    )  # fmt: skip
    return _ForLibrary(model, processor.tokenizer, processor, samples)


def _open_qwen(settings: Int4Settings, source: Source, qwen: QwenDirectory) -> _ForLibrary:
    """Make the samples, then the language model: tower and connector are gone by then.

    Raises:
        UserError: no sample can be used.
    """
    samples = qwen.samples(settings.data, settings.images, settings.samples, settings.seed)
    model = qwen.language_model(_dtype(source))
    model.config._name_or_path = model.name_or_path = ""
    return _ForLibrary(model, qwen.tokenizer, None, samples)


def _dtype(source: Source) -> torch.dtype:
    dtypes = {info.dtype for info in source.tensors.values()}
    return torch.float16 if dtypes == {torch.float16} else torch.bfloat16


def _language_layers(model: Any, settings: Int4Settings) -> tuple[str, list[str]]:
    """Return the path of the language model's layers, and the paths of the linear layers in them.

    Raises:
        UserError: one of them has no whole number of groups, or they are experts, or attend to pictures.
    """
    layers = model.get_decoder().layers
    blocks = next(name for name, module in model.named_modules() if module is layers)
    experts = next((name for name, one in layers.named_parameters() if one.ndim > 2 or ".experts." in name), None)
    if experts is not None:  # would stay as they are, and servers would look for 4 bits
        raise UserError(f"{settings.hf}: {blocks}.{experts}: int4 does not take mixtures of experts")
    crossed = next((name for name, _ in layers.named_modules() if name.endswith("cross_attn")), None)
    if crossed is not None:  # a sample without pictures would give them nothing to look at
        raise UserError(f"{settings.hf}: {blocks}.{crossed}: int4 does not take layers that attend to pictures")
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


def _run(library: Any, opened: _ForLibrary, blocks: str, settings: Int4Settings, folder: Path) -> Source:
    """Let the library quantise, and return what it wrote."""
    gptq = settings.layout == "gptq"
    model, samples = opened.model, opened.samples
    dtype = model.dtype
    # What takes no pictures of its own is a text model to the library, which leaves out shorter samples there.
    length = settings.longest if opened.processor is not None else min(one["input_ids"].shape[1] for one in samples)
    work = library.AutoRound(
        model,
        tokenizer=opened.tokenizer,
        processor=opened.processor,
        bits=_BITS,
        group_size=settings.group_size,
        sym=gptq,
        alg_configs=("auto_round" if settings.iterations else "rtn") if gptq else "awq",
        **({"iters": settings.iterations} if gptq else {}),
        dataset=[{key: _as(value, dtype) for key, value in one.items()} for one in samples],
        nsamples=len(samples),
        seqlen=length,
        batch_size=1,
        to_quant_block_names=blocks,
        device_map=0 if gpu_count() else "cpu",
        enable_torch_compile=False,
        seed=settings.seed,
    )
    work.quantize_and_save(str(folder), format=_FORMATS[settings.layout])
    return Source(next(folder.rglob(CONFIG)).parent)


class _Found(Protocol):
    """What the library wrote, under the names of the directory."""

    tensors: dict[str, TensorInfo]

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Written:
    """What is written in the place of the directory's own."""

    found: _Found
    layers: int
    """Linear layers that the library was to quantise, as the directory counts them."""
    files: Mapping[str, Mapping[str, Any]]
    """JSON files."""
    parts: tuple[str, ...] = _QUANTISED
    """Of a linear layer."""
    without: frozenset[str] = frozenset()
    """Tensors of the directory that are left out."""
    dtype: torch.dtype | None = None
    """Of all floating point; None for the directory's and the library's own."""


def _write_qwen(source: Source, found: Source, layers: int, settings: Int4Settings, qwen: QwenDirectory) -> Int4Export:
    """Write what was quantised as a Qwen2 under Qwen's names, as published."""
    gptq = settings.layout == "gptq"
    config = qwen_quantization_config(settings.layout, _BITS, settings.group_size)
    files = {CONFIG: qwen.config_file(config)} | ({QUANTIZE_CONFIG: own_file(config)} if gptq else {})
    named = UnderQwensNames(found, biases=gptq)
    without = frozenset(name for names in qwen.account.ignored.values() for name in names)
    parts = (*_QUANTISED, "bias") if gptq else _QUANTISED
    return _write(source, _Written(named, named.layers_of(layers), files, parts, without, QWEN_DTYPE), settings)


def _write(source: Source, written: _Written, settings: Int4Settings) -> Int4Export:
    """Put the quantised tensors in the place of the directory's, and publish all with its small files."""
    found = written.found
    stems = {name.removesuffix(".qweight") for name in found.tensors if name.endswith(".qweight")}
    unknown = sorted(stem for stem in stems if f"{stem}.weight" not in source)
    # A bug, of this file or of the library: nothing of it is the user's.
    assert not unknown, f"auto-round quantised what the directory does not have: {unknown[:3]}"
    assert len(stems) == written.layers, f"auto-round quantised {len(stems)} of {written.layers} linear layers"
    inside = {match[0] for stem in stems if (match := re.match(r".*?\.(?=\d+\.)", stem))}
    entries: list[Entry] = []
    origins: dict[str, _Found] = {}

    def take(name: str, shape: tuple[int, ...], dtype: Any, origin: _Found) -> None:
        assert isinstance(dtype, torch.dtype)
        narrow = written.dtype if dtype.is_floating_point and written.dtype is not None else dtype
        origins[name] = origin
        entries.append(Entry(name, shape, narrow))

    for name, info in source.tensors.items():
        if name in written.without:
            continue
        stem, ending = name.rpartition(".")[::2]
        if ending == "weight" and stem in stems:
            for part in (f"{stem}.{part}" for part in written.parts):
                if part in found and part not in source:
                    take(part, found.shape(part), found.get(part).dtype, found)
            continue
        # AWQ scales norms and biases of the layers too.
        scaled = name in found and any(name.startswith(prefix) for prefix in inside)
        take(name, info.shape, info.dtype, found if scaled else source)
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # the larger first: all stay aligned
    size = sum(entry.nbytes for entry in entries)
    with publishing(settings.out, needed_bytes=size) as partial:
        with ReadBack() as read_back:
            writer = ShardedWriter(partial, entries, SHARD_BYTES, read_back)
            try:
                for entry in entries:
                    tensor = origins[entry.name].get(entry.name)
                    writer.put(entry.name, narrowed(tensor, entry.dtype, f"{settings.hf}: {entry.name}"))
                writer.close()
            finally:
                writer.abort()
        assets.copy_files(assets.small_files(settings.hf), partial)
        for name, tree in written.files.items():
            (partial / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
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
