"""Adapters to and from PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are ``base_model.model.`` + the module's name in Transformers + ``.lora_A.weight`` [rank, in] or ``.lora_B.weight``
[out, rank] (PEFT's documentation, "PEFT checkpoint format"); modules that learn whole are there under their own names.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from megavlm.architectures.adapters import adapter_of
from megavlm.checkpoint import assets, manifest
from megavlm.checkpoint.base import RECORD, holds_adapters, record
from megavlm.checkpoint.finite import check_finite
from megavlm.checkpoint.hf.outgoing import PLANS, choose_family, model_branches
from megavlm.checkpoint.hf.peft_config import MERGE, Settings, read_settings
from megavlm.checkpoint.hf.peft_experts import apart, is_wrapped, modern, modern_rules, stack, stacks_experts, unstack
from megavlm.checkpoint.hf.peft_minigpt import lost_beside, read_minigpt
from megavlm.checkpoint.hf.shapes import Rule, alone, make_rules
from megavlm.checkpoint.merged import recipe_branches
from megavlm.checkpoint.optimizer_state import STATE
from megavlm.checkpoint.paths import read_tree
from megavlm.checkpoint.publish import publishing
from megavlm.checkpoint.slots import Slot, find_slots
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite, write_checkpoint
from megavlm.config import yaml12
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.lora import known_targets, linear_of
from megavlm.config.schema import LoraConfig, ModelConfig
from megavlm.families.family import Family
from megavlm.layers.lora import LORA, Adapter
from megavlm.weights.kinds import what_is
from megavlm.weights.pickles import load_weights

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
"""PEFT's file of weights before 0.6."""
_KEPT = (".bin", ".pt", ".pth", ".safetensors")
"""Ends of files of weights; LLaVA's trainer puts what it trained beside the adapters into non_lora_trainables.bin."""
_STATE = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?|random_states(_\d+)?)\.(bin|pt|pth)")
"""What Transformers' trainer keeps of itself."""
_XTUNER = ("visual_encoder_adapter", "projector")
"""Folders that xtuner writes beside the one of a language model's adapters."""
_PREFIX = "base_model.model."
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = {"train_embeddings": "language.embedding.word_embeddings.weight", "train_head": "language.output_layer.weight"}


@dataclass(frozen=True)
class _Layer:
    """A linear layer with the rule that names it in Transformers."""

    rule: Rule
    linear: str
    ours: str
    """Name of the layer here."""

    @property
    def theirs(self) -> list[str]:
        """Names of Transformers' modules."""
        return [name.removesuffix(".weight") for name in self.rule.row.theirs]


def _layers(rules: list[Rule]) -> Iterator[_Layer]:
    for rule in itertools.chain.from_iterable(map(apart, rules)):
        name, *more = rule.row.ours
        linear = linear_of(name)
        if linear is not None and name.startswith("language.decoder.") and not more:
            yield _Layer(rule, linear, name.removesuffix(".weight"))


def _family(model: ModelConfig, checkpoint: Path, family_name: str | None) -> Family:
    record = assets.read_record(checkpoint)
    parts = tuple(part for part in model_branches(checkpoint, record) if part not in PLANS)
    return choose_family(
        family_name or record.get("family") or record.get("home"), model, parts, asked=family_name is not None
    )


def _rules(family: Family, model: ModelConfig, style: str) -> list[Rule]:
    """Return the language model's rules in one naming; of one in a folder of its own, the names inside."""
    # A naming may be that of another tower (Bunny's on EVA02).
    rules = make_rules(family, model, style, find_slots(model, ["language"]), ["language"])
    inside = [tuple(name.removeprefix(f"{family.text_folder}/") for name in rule.row.theirs) for rule in rules]
    return [replace(rule, row=replace(rule.row, theirs=names)) for rule, names in zip(rules, inside, strict=True)]


def _namings(model: ModelConfig, checkpoint: Path) -> list[list[Rule]]:
    """Return the language model's rules in every naming that an adapter may have, that of today's modules first.

    Transformers has renamed the modules (of LLaVA in 4.52), and PEFT wrote the names of its day.
    """
    family = _family(model, checkpoint, None)
    styles = dict.fromkeys([family.modules or next(iter(family.styles)), *family.styles])
    found = [_rules(family, model, style) for style in styles]
    return [*found, *map(modern_rules, found)]


def export_adapter(
    checkpoint: Path, out: Path, *, family_name: str | None = None, base_name: str = "", stacked: bool = False
) -> int:
    """Write the adapters of a checkpoint as PEFT does.

    Args:
        checkpoint: one that holds adapters.
        out: directory to write; it must not exist, or be empty.
        family_name: family whose names are written; None for the one that the weights came from.
        base_name: directory or name of the base on Hugging Face's side, which PEFT keeps for its users.
        stacked: those of experts are for one tensor of all experts, as Transformers 5 has it (``target_parameters``);
            they are anyway, where the family's naming has such a tensor.

    Returns:
        The number of tensors.

    Raises:
        UserError: the checkpoint has no adapters, or what learned beside them has no place in PEFT's format.
    """
    if not holds_adapters(checkpoint):
        raise UserError(f"{checkpoint}: has no adapters; export it without --adapter")
    model, lora = recipe_branches(checkpoint)
    reader = CheckpointReader(checkpoint)
    other = sorted(key.split(".")[0] for key in reader.tensors() if key.startswith(("vision.", "connector.")))
    if other:
        raise UserError(
            f"{checkpoint}: the {other[0]} learned beside the adapters, which an adapter cannot hold; export whole "
            "weights, without --adapter"
        )
    if lora.train_norms:
        raise UserError(
            f"{checkpoint}: weights of norms learned beside the adapters, which an adapter cannot hold; export whole "
            "weights, without --adapter"
        )
    if lora.train_head and model.language.tie_word_embeddings:
        raise UserError(
            f"{checkpoint}: the tied embedding learned beside the adapters; export whole weights, without --adapter"
        )
    tensors: dict[str, Tensor] = {}
    whole: list[str] = []
    taken: set[str] = set()
    with alone():
        slots = find_slots(model, ["language"], lora)
        family = _family(model, checkpoint, family_name)
        rules = _rules(family, model, family.modules or next(iter(family.styles)))
        for layer in _layers(rules):
            adapter = adapter_of(layer.linear, model.language, lora)
            if adapter is not None:
                taken |= {f"{layer.ours}.{name}" for name in LORA}
                a, b = (reader.read(slots[f"{layer.ours}.{name}"]) for name in LORA)
                for name, low, up in _to_theirs(layer, adapter, a, b):
                    tensors[f"{_PREFIX}{name}.lora_A.weight"] = low.clone()
                    tensors[f"{_PREFIX}{name}.lora_B.weight"] = up.clone()
        for key, ours in _WHOLE.items():
            if getattr(lora, key):
                theirs = next(rule.row.theirs[0] for rule in rules if rule.row.ours == (ours,))
                taken.add(ours)
                tensors[_PREFIX + theirs] = reader.read(slots[ours]).clone()
                whole.append(theirs.removesuffix(".weight").rpartition(".")[2])
        _check_all(checkpoint, reader, slots, taken)
    stacks = stacked or stacks_experts(rules)
    tensors, own = _experts(checkpoint, tensors, lora, asked=stacked) if stacks else (tensors, {})
    config = {**_config(lora, tensors, whole, base_name), **own}
    for name, value in tensors.items():
        check_finite(value, f"{checkpoint}: {name}")
    with publishing(out, needed_bytes=sum(t.nbytes for t in tensors.values())) as partial:
        # save_file makes a file that nobody else may read.
        written = save({k: t.contiguous() for k, t in tensors.items()}, metadata={"format": "pt"})
        (partial / WEIGHTS).write_bytes(written)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return len(tensors)


def _check_all(checkpoint: Path, reader: CheckpointReader, slots: Mapping[str, Slot], taken: Set[str]) -> None:
    """Refuse a checkpoint of which something would not be written, whatever it is.

    Raises:
        UserError: naming the first such parameter.
    """
    there = reader.tensors()
    left = [name for name, slot in slots.items() if slot.key in there and name not in taken]
    known = {slot.key for slot in slots.values()}
    left += sorted(key for key in there if key not in known and not key.startswith(STATE))  # nor the optimizer's
    if left:
        raise UserError(
            f"{checkpoint}: {left[0]} learned, for which the family has no place in PEFT's format; export whole "
            "weights, without --adapter"
        )


def _experts(
    checkpoint: Path, tensors: Mapping[str, Tensor], lora: LoraConfig, *, asked: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors with the adapters of experts stacked, and what the configuration says of them."""
    found = stack({modern(key): value for key, value in tensors.items()})
    if not found.parameters:
        if asked:
            raise UserError(
                f"--stacked-experts: {checkpoint} has no adapters of experts that Transformers 5 holds in one tensor;"
                " leave it out"
            )
        return found.tensors, {}
    if lora.dropout:
        logger.warning(
            "%s says lora_dropout 0, not the recipe's %g: PEFT takes none beside adapters of experts in one tensor",
            CONFIG, lora.dropout,
        )  # fmt: skip
    own: dict[str, Any] = {"lora_dropout": 0.0, "target_parameters": list(found.parameters)}
    if found.fused:
        key = re.escape("experts.gate_up_proj")
        own |= {"rank_pattern": {key: 2 * lora.rank}, "alpha_pattern": {key: 2 * lora.alpha}}  # type: ignore[operator]
    return found.tensors, own


def _config(lora: LoraConfig, tensors: Mapping[str, Tensor], whole: list[str], base_name: str) -> dict[str, Any]:
    """Return ``adapter_config.json``, but what is said of experts in one tensor."""
    ends = [key for key in tensors if key.endswith(".lora_A.weight") and not is_wrapped(key)]
    targets = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in ends]
    return {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": base_name, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout, "modules_to_save": whole or None, "peft_type": "LORA", "r": lora.rank,
        "rank_pattern": {}, "target_modules": _pattern(targets) if targets else [], "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip


def _to_theirs(layer: _Layer, adapter: Adapter, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, A and B of each of Transformers' modules that has an adapter."""
    names = layer.theirs
    if len(adapter.sizes) == 1:  # one adapter over all of them: each has its A
        yield from ((name, a, up) for name, up in zip(names, layer.rule.to_theirs([b]), strict=True))
        return
    if len(names) != len(adapter.sizes):
        raise UserError(
            f"--family: its {names[0]} is one layer, and lora.targets gave its parts adapters of their own; take the "
            "family that the weights came from"
        )
    rows = sum(shape[0] for shape in layer.rule.shapes)
    present = [name for name, there in zip(names, adapter.present, strict=True) if there]
    for name, low, up in zip(present, a.split(adapter.rank), adapter.split_b(b, rows), strict=True):
        yield name, low, up.flatten(0, 1)


def _pattern(names: list[str]) -> str:
    """Return a regular expression over whole names: ends alone would also mean layers of the tower.

    Of experts it is for any number, and for none: Transformers 5 holds those of a layer together, in a module that it
    calls as it likes, and PEFT asks by a name without a number whether they are meant.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        head, tail = re.split(r"\.\d+\.", name, maxsplit=1)
        expert = re.fullmatch(r".+\.experts\.\d+\.(.+)", tail)
        tail = re.escape(tail) if expert is None else rf"[^.]+\.experts\.(?:\d+\.)?{re.escape(expert[1])}"
        tails = found.setdefault(re.escape(head), [])
        if tail not in tails:
            tails.append(tail)
    return "|".join(rf"{head}\.\d+\.(?:{'|'.join(tails)})" for head, tails in found.items())


def import_adapter(directory: Path, base: Path, out: Path) -> int:
    """Write PEFT's adapters as a checkpoint that trains on, answers and merges.

    Args:
        directory: with PEFT's two files; or a file that MiniGPT-v2's trainer wrote.
        base: the checkpoint of the weights that they are for.
        out: directory to write; it must not exist, or be empty.

    Returns:
        The number of tensors that were read.

    Raises:
        UserError: it is an adapter of another kind, or for another model.
    """
    where, settings, tensors, beside = _read(directory)
    model, trained = recipe_branches(base)
    if holds_adapters(base) or trained.rank is not None:
        raise UserError(f"{base}: holds adapters itself; name the checkpoint of whole weights")
    with alone():
        lost = next(lost_beside(where, beside, base, model, _family(model, base, None)), None) if beside else None
        if lost is not None:
            raise UserError(lost)
        left = {key.removeprefix(_PREFIX): value for key, value in tensors.items()}
        left = unstack(where, settings, left, getattr(model.language, "num_moe_experts", None))
        rules = _named(where, left, _namings(model, base))
        lora, made = _plan(where, settings, left, model, rules)
        slots = find_slots(model, ["language"], lora)
        pieces = []
        for name, value in made.items():
            slot = slots[name]
            if tuple(value.shape) != slot.shape:
                raise UserError(
                    f"{where}: gives {name} the shape {list(value.shape)}, the model's is {list(slot.shape)}"
                )
            pieces.append(ParameterToWrite(slot, value.dtype, lambda value=value: value))  # type: ignore[misc]
        with publishing(out, needed_bytes=sum(value.nbytes for value in made.values())) as partial:
            write_checkpoint(partial, pieces, lambda _: None)
            _write_rest(base, partial, lora)
    return len(tensors)


def _read(directory: Path) -> tuple[Path, Settings, dict[str, Tensor], dict[str, Any]]:
    """Return the file of an adapter's weights, what it computes, what it holds, and what was trained beside it.

    Raises:
        UserError: it is no adapter, or one of another kind.
    """
    if directory.is_file():
        if (directory.parent / CONFIG).is_file():
            raise UserError(f"{directory}: is a file of an adapter of PEFT; give its directory, {directory.parent}")
        settings, found, beside = read_minigpt(directory)
        return directory, settings, _finite(directory, found), beside
    if not (directory / CONFIG).is_file():
        there = what_is(directory)
        raise UserError(
            f"{directory}: has no {CONFIG}, so it is no adapter of PEFT{f'; it is {there}' if there else ''}"
        )
    settings = read_settings(read_json(directory / CONFIG), directory / CONFIG)
    for path in sorted(directory.iterdir()):
        if path.suffix in _KEPT and path.name not in (WEIGHTS, _PICKLE) and not _STATE.fullmatch(path.name):
            raise UserError(
                f"{path}: holds what was trained beside the adapters, or a base, which would be lost; merge both into "
                "their base where they were made, and convert that, or move it elsewhere if it is the base as it was"
            )
    for name in _XTUNER if directory.name == "llm_adapter" else ():
        if (directory.parent / name).is_dir():
            raise UserError(
                f"{directory.parent / name}: xtuner trained it together with {directory.name}, and adapters of the"
                " language model cannot hold it; make a base of it, and of both base models, with megavlm convert"
                " hf-to-megatron, and move it elsewhere"
            )
    where, tensors = _read_tensors(directory)
    return where, settings, tensors, {}


def _read_tensors(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the file of an adapter's weights and what it holds.

    Raises:
        UserError: there is none, or it is damaged, or holds what are no finite numbers.
    """
    where = directory / WEIGHTS
    if not where.is_file() and (directory / _PICKLE).is_file():
        where = directory / _PICKLE
        tensors = load_weights(where)
    else:
        try:
            tensors = load_file(where)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{where}: cannot be read: {error}") from None
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{where}: holds no tensors by name")
    return where, _finite(where, tensors)


def _finite(where: Path, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors whose numbers are finite.

    Raises:
        UserError: one is none, or of another type.
    """
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.dtype not in _TYPES:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{where}: {name} is of type {kind}; only floating point is converted")
        check_finite(value, f"{where}: {name}")
    return tensors


def _named(where: Path, left: Mapping[str, Tensor], namings: Sequence[list[Rule]]) -> list[Rule]:
    """Return the rules in the naming that an adapter's tensors have, ``left`` by the modules' names.

    Raises:
        UserError: it is in none of the namings.
    """
    found = [sum(f"{n}.lora_A.weight" in left for layer in _layers(rules) for n in layer.theirs) for rules in namings]
    if not any(found):
        examples = ", ".join(dict.fromkeys(next(_layers(rules)).theirs[0] for rules in namings))
        raise UserError(
            f"{where}: its {min(left)} is of no layer of this base's language model, whose layers are called "
            f"{examples}, .."
        )
    return namings[found.index(max(found))]


def _plan(
    where: Path, settings: Settings, left: dict[str, Tensor], model: ModelConfig, rules: list[Rule]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the recipe's branch, and the parameters by canonical name; ``left`` is emptied."""
    layers = list(_layers(rules))
    given = {n for layer in layers for n in layer.theirs if f"{n}.lora_A.weight" in left}
    whole = {key: next((r for r in rules if r.row.ours == (ours,)), None) for key, ours in _WHOLE.items()}
    trains = {key: rule is not None and rule.row.theirs[0] in left for key, rule in whole.items()}
    targets = tuple(
        t.path
        for t in known_targets(model.language)
        if any(layer.linear == t.linear and layer.theirs[_index(t.part, layer)] in given for layer in layers)
    )
    if trains["train_embeddings"] and model.language.tie_word_embeddings:
        raise UserError(
            f"{where}: has the embedding, which this base ties to the output layer and PEFT trains apart; {MERGE}"
        )
    lora = LoraConfig(
        rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout,
        targets=targets,
        train_embeddings=trains["train_embeddings"], train_head=trains["train_head"],
    )  # fmt: skip
    made: dict[str, Tensor] = {}
    for layer in layers:
        adapter = adapter_of(layer.linear, model.language, lora)
        if adapter is None:
            continue
        names = layer.theirs if len(adapter.sizes) == 1 else [
            name for name, there in zip(layer.theirs, adapter.present, strict=True) if there
        ]  # fmt: skip
        _check_shapes(where, layer, names, left, settings.rank)
        try:
            lows, ups = ([left.pop(f"{name}.lora_{kind}.weight") for name in names] for kind in "AB")
        except KeyError as error:
            raise UserError(f"{where}: has no {error.args[0]}, though other layers have; all must have") from None
        made[f"{layer.ours}.lora_a"] = torch.cat(lows)
        if len(adapter.sizes) == 1:
            made[f"{layer.ours}.lora_b"] = layer.rule.to_ours(ups)[0]
        else:
            groups = adapter.groups(sum(shape[0] for shape in layer.rule.shapes))
            made[f"{layer.ours}.lora_b"] = adapter.join_b([up.unflatten(0, (groups, -1)) for up in ups])
    for key, rule in whole.items():
        if trains[key]:
            assert rule is not None
            made[_WHOLE[key]] = left.pop(rule.row.theirs[0])
    if left:
        raise UserError(f"{where}: has {sorted(left)[0]}, which no layer with adapters of this base is called")
    return lora, made


def _check_shapes(where: Path, layer: _Layer, names: Sequence[str], left: Mapping[str, Tensor], rank: int) -> None:
    """Check A [rank, in] and B [out, rank] of a layer, as far as they are there."""
    for name, (rows, columns) in zip(layer.theirs, layer.rule.shapes, strict=True):
        for kind, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            value = left.get(f"{name}.lora_{kind}.weight") if name in names else None
            if value is not None and tuple(value.shape) != shape:
                got = f"{name}.lora_{kind}.weight has the shape {list(value.shape)}"
                raise UserError(f"{where}: {got}, the model's is {list(shape)}")


def _index(part: int, layer: _Layer) -> int:
    return part if len(layer.theirs) > 1 else 0


def _write_rest(base: Path, partial: Path, lora: LoraConfig) -> None:
    """Write what a checkpoint has beside tensors: the base's recipe with the adapters, and the small files."""
    tree = read_tree(base)
    tree["lora"] = {
        "rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "targets": list(lora.targets),
        "train_embeddings": lora.train_embeddings, "train_head": lora.train_head,
        "train_norms": lora.train_norms, "quantize": None,
    }  # fmt: skip
    tree["checkpoint"] = {**(tree.get("checkpoint") or {}), "load": str(base.absolute())}
    modules = tree.get("modules") or {}
    tree["modules"] = {
        **modules,
        "vision": {**(modules.get("vision") or {}), "freeze": True},
        "connector": {**(modules.get("connector") or {}), "freeze": True},
        "language": {**(modules.get("language") or {}), "freeze": False},
    }
    assets.inherit(base, None, partial)
    (partial / "recipe.yaml").write_text(yaml12.dump(tree), encoding="utf-8")
    (partial / "run.json").write_text(json.dumps({"step": 0}), encoding="utf-8")
    (partial / RECORD).write_text(record(base, partial), encoding="utf-8")
    manifest.write_manifest(partial, {})
