"""What an export says after a training: tokens, template, stop ids and pixels as they were trained here.

A checkpoint brings the small files of where it came from along. A training changes what they mean: conversations are
written in the recipe's template, a BOS stands where that has it, pictures are treated as the recipe says. Weights that
nobody trained here keep their files untouched, and so does a training in the checkpoint's own ``chat_template``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.base import RECORD, holds_adapters
from megavlm.checkpoint.hf.template import SAMPLES, chatml, row
from megavlm.checkpoint.paths import read_run
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_native import NativePlan
from megavlm.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, template_of
from megavlm.families.family import Family
from megavlm.families.films import write_films
from megavlm.families.preprocessor import PREPROCESSOR, PROCESSOR, trained_preprocessor
from megavlm.weights.source import CONFIG

Tree = dict[str, Any]
_TOKENIZER, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_GENERATION, _JINJA, _OLD_TEMPLATE = "generation_config.json", "chat_template.jinja", "chat_template.json"
_DECODER = "added_tokens_decoder"
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_CHECKED = "<|im_start|>user\n<img><imgpad></img> The quick brown fox, 0123456789 你好<|im_end|>\n"
_ADDING = ("TemplateProcessing", "RobertaProcessing", "BertProcessing")
"""Post-processors of the tokenizers library that put tokens around a text."""


def was_trained(checkpoint: Path) -> bool:
    """Whether steps were taken here: with a checkpoint's weights, or with the base that its adapters are for."""
    if int(read_run(checkpoint).get("step") or 0) > 0:
        return True
    if not holds_adapters(checkpoint):
        return False
    base = Path(str(read_json(checkpoint / RECORD).get("base")))
    return (base / "run.json").is_file() and was_trained(base)


def write_trained(
    partial: Path, family: Family, model: ModelConfig, template: str, system_message: str | None
) -> list[str]:
    """Bring the small files of an export to what was trained.

    Args:
        partial: the directory, with configuration and tokenizer as they came along.
        family: that is written.
        model: the model.
        template: what its recipe calls the template.
        system_message: that conversations without one were trained with; None for the template's own.

    Returns:
        Lines for the report: which file says what.
    """
    lines = []
    if "vision" in family.parts and family.preprocesses:
        lines += write_pixels(partial, family, model) + write_films(partial, model)
    path = find_tokenizer(partial)
    if "language" not in family.parts or path is None:
        return lines
    tokenizer = load_tokenizer(path, template_of(template, path))
    own = tokenizer.template
    ended = tokenizer.ids[own.stops[0]] if own.stops else tokenizer.eos_id
    named = {tokenizer.ids[name]: spelled for name, spelled in tokenizer.spelled.items()}
    end, image = (named.get(number) or tokenizer.decode([number]) for number in (ended, tokenizer.imgpad_id))
    bare = not own.renders or not own.begin
    lines += _write_tokens(path, tokenizer, bare=bare)
    if own.renders:
        lines.append(f"the chat_template is the checkpoint's own, as trained ({own.name})")
    else:
        system = own.default_system if system_message is None else system_message
        around = tuple(tokenizer.spelled.get(piece, piece) for piece in own.image)
        alone = family.preprocesses and around == family.wraps_pictures
        lines += _write_template(partial, tokenizer, system, slots=family.preprocesses, bare=alone)
    if path.suffix == ".json" and "tokenizer_class" not in _read(partial / _TOKENIZER):
        _change(partial / _TOKENIZER, {"tokenizer_class": "PreTrainedTokenizerFast"}, make=True)
    if bare:
        _change(partial / _TOKENIZER, {"add_bos_token": False, "add_eos_token": False}, make=True)
    if not own.renders:  # whose text may write what is called the end of a document
        _change(partial / _TOKENIZER, {"eos_token": end}, make=True)
        _change(partial / _SPECIAL, {"eos_token": end})
    stop = list(tokenizer.stop_ids)
    generation = _read(partial / _GENERATION)
    generation.pop("_from_model_config", None)
    _write(partial / _GENERATION, generation | {"eos_token_id": stop})
    lines.append(f"{_GENERATION}: generation stops at {end} and the end of a document ({stop})")
    config = _read(partial / CONFIG)
    if config:
        tokens: Tree = {key: tokenizer.imgpad_id for key in ("image_token_index", "image_token_id") if key in config}
        if "eos_token_id" in config:
            tokens["eos_token_id"] = ended
        if "bos_token_id" in config and len(own.begin) == 1 and own.begin[0] in tokenizer.ids:
            tokens["bos_token_id"] = tokenizer.ids[own.begin[0]]
        text = config.get("text_config")
        if isinstance(text, dict):
            ends = {"eos_token_id": ended} if "eos_token_id" in text else {}
            config["text_config"] = _named(family, model) | text | ends
        if config | tokens != _read(partial / CONFIG):
            _write(partial / CONFIG, config | tokens)
    if family.preprocesses and "vision" in family.parts:
        _write_processor(partial, family.processor(model, image))
        names = family.named_tokens(image, lambda token: len(tokenizer.encode(token)) == 1)
        extra = _read(partial / _TOKENIZER).get("extra_special_tokens")
        if names:
            extra = extra if isinstance(extra, dict) else {}
            _change(partial / _TOKENIZER, {"extra_special_tokens": extra | names}, make=True)
    again = load_tokenizer(path, tokenizer.template)
    if again.added or again.encode(_CHECKED) != tokenizer.encode(_CHECKED) or again.ids != tokenizer.ids:
        raise RuntimeError(f"{path}: what was written gives other ids than those of training")
    return lines


def _named(family: Family, model: ModelConfig) -> Tree:
    """Return what servers find the language model's class by; Transformers leaves it out of a nested configuration."""
    own = family.config(model, {"image": 0}).get("text_config") or {}
    return {key: own[key] for key in ("architectures",) if key in own}


def write_pixels(partial: Path, family: Family, model: ModelConfig) -> list[str]:
    """Write how pictures are made pixels."""
    old = _read(partial / PREPROCESSOR) or dict(_read(partial / PROCESSOR).get("image_processor") or {})
    _write(partial / PREPROCESSOR, trained_preprocessor(model, old, family.trained_pictures(model, old)))
    side, image = model.vision.image_size, model.image
    how = {
        "squash": f"squashed to {side} x {side}, {image.resample}, nothing is cut off",
        "crop": f"cut to {side} x {side} from their middle, {image.resample}",
        "anyres": f"squashed, and cut to tiles of {side} x {side}, {image.resample}",
        "anyres_max": f"squashed, and cut to tiles of {side} x {side}, {image.resample}",
        "dynamic_tiles": f"cut to tiles of {side} x {side}, {image.resample}",
        "fit": f"resized to fit {side} x {side}, {image.resample}, and padded with their mean colour",
        "split_tiles": f"cut to tiles of {side} x {side}, and squashed behind them, {image.resample}",
        "pad": f"padded to a square with their mean colour, then {side} x {side}, {image.resample}",
    }
    if isinstance(plan := plan_of(model), NativePlan):
        how["native"] = how["naflex"] = (
            f"of their own proportions, {plan.min_pixels} to {plan.max_pixels} pixels, {image.resample}"
        )
    return [f"{PREPROCESSOR}: pictures are {how.get(image.kind, f'those of the plan {image.kind}')}"]


def _write_tokens(path: Path, tokenizer: Tokenizer, *, bare: bool) -> list[str]:
    """Give the tokens that were appended for training their ids in the tokenizer's own files.

    Args:
        path: the tokenizer's file.
        tokenizer: that was trained with.
        bare: take away what puts a BOS or EOS around text: the template writes its own.
    """
    added = {name: tokenizer.vocab_size - len(tokenizer.added) + i for i, name in enumerate(tokenizer.added)}
    if path.suffix == ".json":
        tree = _read(path)
        entries = {entry["content"]: entry for entry in tree.get("added_tokens") or ()}
        for name, number in added.items():
            entries[name] = {"id": number, "content": name, **_FLAGS}
        post = tree.get("post_processor")
        kept = _without_adding(post) if bare else post
        changed = {"added_tokens": sorted(entries.values(), key=lambda entry: entry["id"]), "post_processor": kept}
        if added or post != kept:
            _write(path, tree | changed, indent=None)
    elif path.suffix == ".model" and added:
        _change(path.parent / _ADDED, added, make=True)
    config = _read(path.parent / _TOKENIZER)
    if added and _DECODER in config:
        decoder = {str(number): {"content": name, **_FLAGS} for name, number in added.items()}
        _write(path.parent / _TOKENIZER, config | {_DECODER: config[_DECODER] | decoder})
    return [f"{path.name}: has {', '.join(added)} now, with the ids of training"] if added else []


def _without_adding(post: Any) -> Any:
    """Return a post-processor without what puts a BOS or EOS around text, which training did not."""
    if isinstance(post, dict) and post.get("type") == "Sequence":
        kept = [one for one in post.get("processors") or () if _without_adding(one) is not None]
        return post | {"processors": kept} if kept else None
    return None if isinstance(post, dict) and post.get("type") in _ADDING else post


def _write_template(partial: Path, tokenizer: Tokenizer, system_message: str, *, slots: bool, bare: bool) -> list[str]:
    """Write the chat template to where old and new versions of Transformers look for it."""
    numbered = "{number}" in tokenizer.template.picture
    text, wrong = (
        chatml(tokenizer, system_message, slots=slots, bare=bare)
        if numbered
        else row(tokenizer, system_message, bare=bare)
    )
    kind = "ChatML" if numbered else tokenizer.template.name
    (partial / _JINJA).write_text(text, encoding="utf-8")
    _change(partial / _TOKENIZER, {"chat_template": text}, make=True)
    _change(partial / _OLD_TEMPLATE, {"chat_template": text})
    processor = _read(partial / PROCESSOR)
    if "chat_template" in processor:
        _write(partial / PROCESSOR, processor | {"chat_template": text})
    proof = f"tried on {len(SAMPLES)} conversations, with the ids of training"
    if wrong:
        proof = (
            f"{wrong} of {len(SAMPLES)} conversations have other ids than in training, as this tokenizer cuts a whole "
            "turn otherwise; take the ids of megavlm.data.chat where that matters"
        )
    return [f"{_JINJA}: {kind}, as trained ({proof})"]


def _write_processor(partial: Path, own: Tree) -> None:
    """Write what the family's processor needs to make slots of an image's token."""
    old = _read(partial / PROCESSOR)
    old.pop("image_processor", None)  # it stands in a file of its own now
    if old or own:
        _write(partial / PROCESSOR, old | own)


def _read(path: Path) -> Tree:
    return read_json(path) if path.is_file() else {}


def _change(path: Path, values: Mapping[str, Any], *, make: bool = False) -> None:
    """Put values into a JSON file, which must be there already unless ``make``."""
    if path.is_file() or make:
        _write(path, _read(path) | dict(values))


def _write(path: Path, tree: Tree, indent: int | None = 2) -> None:
    path.write_text(json.dumps(tree, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
