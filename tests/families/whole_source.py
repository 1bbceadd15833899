"""Sources of parity: Transformers' classes, and the plain Qwen-VL; and what they compute, written to a file."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import qwen_reference
import torch
import torch.nn.functional as F
from PIL import Image
from qwen_reference import Sizes
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, PreTrainedModel
from whole import Shown, Source

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.media import ImageLayout, plan_of
from megavlm.families.known import FAMILIES

ANSWER = 6
"""Tokens of an answer."""


def photographs(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Return pictures of noise on a slope, so that no two places are alike."""
    rng = np.random.default_rng(len(sizes) + sizes[0][0])
    found = []
    for width, height in sizes:
        slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
        found.append(Image.fromarray((slope + rng.integers(0, 70, (height, width, 3))).astype(np.uint8)))
    return found


def with_slots(layouts: list[ImageLayout], image: int, vocab: int, words: int) -> Tensor:
    """Return [S] ids: words, with the slots of the pictures in between."""
    generator = torch.Generator().manual_seed(words + len(layouts))

    def some(count: int) -> Tensor:
        ids = torch.randint(0, vocab, (count,), generator=generator)
        return torch.where(ids >= image - 2, ids.remainder(max(1, image - 2)), ids)

    pieces = [some(words)]
    for layout in layouts:
        pieces += [torch.full((layout.tokens,), image), some(words)]
    return torch.cat(pieces)


class TransformersSource:
    """A class of Transformers with tiny random weights.

    Args:
        family: its name.
        make: makes the model; its ``save_pretrained`` may write the processor's file too.
        files: ``preprocessor_config.json`` where that does not.
        style: naming of the modules.
        vocab: rows of the embedding.
    """

    def __init__(
        self, family: str, make: Callable[[], PreTrainedModel], *, files: Mapping[str, Any] | None = None,
        vocab: int = 120, image: int = 119,
    ) -> None:  # fmt: skip
        self.family, self._make, self.files, self.vocab, self.image = family, make, files, vocab, image

    @functools.cached_property
    def style(self) -> str:
        """As the modules are called."""
        family = FAMILIES[self.family]
        return str(family.modules or next(iter(family.styles)))

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model, made when it is asked for."""
        return self._make()

    @functools.cached_property
    def _folder(self) -> dict[str, Any]:
        return dict(self.files or {})

    def save(self, directory: Path) -> None:
        """Write weights, config.json, preprocessor_config.json."""
        self.model.save_pretrained(directory)
        path = directory / "preprocessor_config.json"
        if self.files is not None:
            path.write_text(json.dumps(self.files))
        self.processor = AutoImageProcessor.from_pretrained(directory, backend="pil")

    def loaded(self, directory: Path) -> PreTrainedModel:
        """Return the model of a directory as its class reads it, in fp32."""
        return AutoModelForImageTextToText.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Let Transformers' processor make the pixels."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        if not sizes:
            none = torch.zeros(0, *plan.row)
            return Shown(ids, {}, none, torch.zeros(0, 2, dtype=torch.long), layouts)
        images: Any = photographs(sizes)
        several = len(sizes) > 1 and self.family == "llava_onevision"  # pictures of one conversation, seen otherwise
        made = self.processor([images] if several else images, return_tensors="pt")
        taken = {"pixel_values", "high_res_pixel_values", "image_sizes", *(("batch_num_images",) if several else ())}
        given = {key: torch.as_tensor(made[key]) for key in taken if key in made}
        pixels = given["pixel_values"]
        if pixels.dim() == 5:  # padded to the most views of a picture
            pixels = torch.cat([one[: len(own.views)] for one, own in zip(pixels, layouts, strict=True)])
        if "high_res_pixel_values" in given:  # for a second tower: in one row, as the model here takes both
            pixels = torch.cat([pixels.flatten(1), given["high_res_pixel_values"].flatten(1)], dim=1)
        assert pixels.shape[1:] == plan.row and len(pixels) == sum(plan.pixels_of(own)[0] for own in layouts)
        return Shown(ids, given, pixels, torch.tensor([[h, w] for w, h in sizes]), layouts)

    def features(self, sample: Shown) -> Tensor:
        """Return what ``get_image_features`` gives."""
        encode = getattr(self.model, "get_image_features", None) or self.model.model.get_image_features
        taken = inspect.signature(encode).parameters
        found: Any = encode(**{k: v for k, v in sample.given.items() if k in taken})
        found = found if isinstance(found, Tensor | list | tuple) else found.pooler_output
        pieces = [found] if isinstance(found, Tensor) else list(found)
        return torch.cat([piece.flatten(0, -2) for piece in pieces]).detach()

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once."""
        ids = sample.ids[None]
        found: Tensor = self.model(input_ids=ids, **sample.given, attention_mask=torch.ones_like(ids)).logits[0]
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Generate greedily, with Transformers' cache."""
        ids = sample.ids[None]
        whole = self.model.generate(
            input_ids=ids, **sample.given, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return list(whole[0, ids.size(1) :].tolist())


class NativeSource(TransformersSource):
    """A class of pictures in their own resolution (Qwen2-VL and its like), with positions of several axes."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Let Transformers' processor make patches; a picture stands between the tokens for that."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        plain = with_slots(layouts, self.image, 100, words)
        pieces, inside = [], False
        for one in plain.tolist():
            if (one == self.image) != inside:
                pieces.append(self.image - 2 if inside else self.image - 3)
                inside = not inside
            pieces.append(one)
        ids = torch.tensor(pieces)
        kinds = {"mm_token_type_ids": (ids == self.image).int()[None]}
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        if not sizes:
            return Shown(ids, kinds, torch.zeros(0, self.row), heights, layouts)
        made = self.processor(photographs(sizes), return_tensors="pt")
        given = {key: torch.as_tensor(made[key]) for key in ("pixel_values", "image_grid_thw")}
        return Shown(ids, {**given, **kinds}, given["pixel_values"], heights, layouts)

    @property
    def row(self) -> int:
        """Numbers of a patch."""
        vision = self.model.config.vision_config
        return int(3 * vision.temporal_patch_size * vision.patch_size**2)


def experts_apart(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the published names, each expert by itself, of a class that holds those of a layer in one.

    As conversion_mapping.py of Transformers 5.23 has it (``qwen2_moe``).
    """
    found = dict[str, Tensor]()
    for name, tensor in stacked.items():
        head, mark, kind = name.partition(".mlp.experts.")
        if not mark:
            found[name] = tensor
            continue
        for expert, one in enumerate(tensor):
            both = kind == "gate_up_proj"
            names, values = (("gate_proj", "up_proj"), one.chunk(2)) if both else ((kind,), (one,))
            parts = zip(names, values, strict=True)
            found |= {f"{head}{mark}{expert}.{part}.weight": value for part, value in parts}
    return found


class ExpertsSource(TransformersSource):
    """Its class holds the experts of a layer in one tensor; published files do not."""

    def gradients(self) -> dict[str, Tensor]:
        """Return them by the published names."""
        return experts_apart(super().gradients())


class PlainQwenSource:
    """Qwen-VL in plain torch (``qwen_reference.py``), under the names of the family.

    Args:
        sizes: its shape.
        seed: of its weights, as ``write`` has them.
        write: writes the checkpoint.
        rename: what Qwen-VL's tensors are called in the family.
    """

    style, described = "", "a plain reference, written out in tests/models/qwen_reference.py"

    def __init__(
        self, sizes: Sizes, seed: int, write: Callable[[Path], Path], rename: Callable[[str], str] = lambda name: name
    ) -> None:
        self.sizes, self.seed, self._write, self._rename, self.image = sizes, seed, write, rename, sizes.image_token

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """Weights by Qwen-VL's names."""
        state = qwen_reference.random_state(self.sizes, self.seed)
        return {name: value.requires_grad_() for name, value in state.items()}

    def save(self, directory: Path) -> None:
        """Write it."""
        self._write(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Squash pictures as visual.py of Qwen-VL does: bicubic, to the tower's square, CLIP's mean and deviation."""
        plan, side = plan_of(model), self.sizes.image
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.sizes.vocab, words)
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (model.vision.image_mean, model.vision.image_std))
        pixels = torch.zeros(0, 3, side, side)
        if sizes:
            squares = [one.resize((side, side), Image.Resampling.BICUBIC) for one in photographs(sizes)]
            views = [torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in squares]
            pixels = torch.stack([(one - mean) / std for one in views])
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        return Shown(ids, {"pixels": pixels}, pixels, heights, layouts)

    def features(self, sample: Shown) -> Tensor:
        """Encode."""
        with torch.no_grad():
            return qwen_reference.encode(self.state, self.sizes, sample.views).flatten(0, 1)

    def logits(self, sample: Shown) -> Tensor:
        """Encode, and run the language model."""
        features = qwen_reference.encode(self.state, self.sizes, sample.views)
        answered = int((sample.ids == self.image).sum()) - features.size(0) * self.sizes.queries
        if answered:  # an answer may have the token of a slot, which then is a word like any other
            word = self.state["transformer.wte.weight"][self.image].expand(1, answered, -1)
            features = torch.cat([features.flatten(0, 1)[None], word], 1)
        return qwen_reference.logits(self.state, self.sizes, sample.ids, features)

    def gradients(self) -> dict[str, Tensor]:
        """Return them by the family's names."""
        return {self._rename(name): value.grad for name, value in self.state.items() if value.grad is not None}

    @torch.no_grad()
    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Choose the best token, and begin anew."""
        ids, found = sample.ids, list[int]()
        for _ in range(tokens):
            longer = Shown(ids, sample.given, sample.views, sample.sizes, sample.layouts)
            found.append(int(self.logits(longer)[-1].argmax()))
            ids = torch.cat([ids, torch.tensor(found[-1:])])
        return found


def asked(side: int) -> list[tuple[list[tuple[int, int]], int]]:
    """Return the pictures and words of the samples: one wide picture, none, and two of other sizes."""
    wide, tall, flat = (2 * side + 5, side + 12), (side - 3, 3 * side - 4), (side + 30, side + 2)
    return [([wide], 5), ([], 9), ([tall, flat], 4)]


def write_reference(source: Source, family: str, recipe: Recipe, path: Path) -> None:
    """Write what the source computes of three samples, its answers, and the gradients of their mean loss.

    The gradients are by canonical names: of every parameter, or an assertion.
    """
    model = recipe.model
    stored: dict[str, Tensor] = {"image_token": torch.tensor(source.image)}
    total, count = torch.zeros(()), 0
    for number, (sizes, words) in enumerate(asked(28)):
        sample = source.shown(model, sizes, words)
        labels = torch.where(sample.ids == source.image, -100, sample.ids)
        labels[: getattr(source, "unlabelled", lambda _: 2)(sample)] = -100
        logits = source.logits(sample)
        loss = F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum")
        supervised = int((labels[1:] != -100).sum())
        total, count = total + loss, count + supervised
        own = {
            "input_ids": sample.ids[None], "pixel_values": sample.views, "image_sizes": sample.sizes,
            "labels": labels[None], "logits": logits.detach()[None], "loss": (loss.detach() / supervised).reshape(1),
            "answer": torch.tensor(source.answer(sample, ANSWER)),
        }  # fmt: skip
        if sizes:
            own["image_features"] = source.features(sample)
        stored |= {f"s{number}.{key}": value for key, value in own.items()}
    (total / count).backward()
    stored["mean_loss"] = (total.detach() / count).reshape(1)
    stored |= _canonical(source, family, model)
    save_file({key: value.contiguous().clone() for key, value in stored.items()}, path)


def _canonical(source: Source, family_name: str, model: ModelConfig) -> dict[str, Tensor]:
    """Return gradients by our names, and the largest of each part; those of ``unused`` parameters are zero."""
    family, theirs, found = FAMILIES[family_name], source.gradients(), dict[str, Tensor]()
    with alone():
        rules = make_rules(family, model, source.style, family_slots(family, model))
    for rule in rules:
        if rule.row.ours[0].endswith(".expert_bias"):  # which learns no gradient
            continue
        own = [theirs.pop(name) for name in rule.row.theirs]
        for key, gradient in zip(rule.row.ours, rule.to_ours(own), strict=True):
            assert bool(gradient.any()) != (key in getattr(source, "unused", ())), key
            found["gradient." + key] = gradient
    assert not theirs, sorted(theirs)
    for part in ("vision", "connector", "language"):
        own = (float(value.abs().max()) for key, value in found.items() if key.startswith(f"gradient.{part}."))
        found["largest." + part] = torch.tensor(max(own, default=0.0))
    return found
