"""Whole models written out of a tower, a connector and a language model, features put into the slots.

For families that Transformers has no class for: the tower and the language model are its classes, the connector a plain
module, and what lies between them three lines. Where each module is, and so the names of a checkpoint, says the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from family_cases import CLIP_MEAN, CLIP_STD, made
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    PretrainedConfig,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

IMAGE = 119


@dataclass(frozen=True)
class Places:
    """Where the modules are (the language model's are the model's own where it is empty)."""

    vision: str
    connector: str
    language: str
    tower: str
    """What the names of the tower's tensors begin with in a checkpoint, in front of ``embeddings`` and ``encoder``."""
    projector: str | None = None
    text: str | None = None
    """The same of connector and language model; None for the place."""


def mlp(width: int, embed: int, depth: int = 2) -> nn.Module:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(width, embed)]
    for _ in range(1, depth):
        layers += [nn.GELU(), nn.Linear(embed, embed)]
    return nn.Sequential(*layers)


def filled(module: nn.Module, seed: int = 3) -> nn.Module:
    """Return a module in which every parameter matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
            )
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return module


@dataclass
class Parts:
    """What a model is made of: Transformers' configurations, and the connector."""

    text: PretrainedConfig
    vision: PretrainedConfig
    connector: nn.Module
    places: Places
    config: Callable[[PretrainedConfig, PretrainedConfig], dict[str, Any]]
    """Makes ``config.json``."""
    layers: Sequence[int] = (-2,)
    """Hidden states whose features are taken, side by side."""
    drops: bool = True
    """Whether the first feature is left out: a class token's, or not."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """Other small files."""
    tower_keys: Mapping[str, Any] = field(default_factory=dict)
    """What the tower's forward pass takes beside pixels."""
    scale: float = 1.0
    """What features are multiplied by."""
    keeps_copy: bool = False
    """Whether a checkpoint has the output layer's weights although they are the embedding's."""
    registered: nn.Module | None = None
    """What of the connector is in the checkpoint; None for all of it."""


class Spliced(nn.Module):
    """A whole model, for one sample at a time."""

    base_model_prefix = ""  # for PEFT, which looks for renamed weights in Transformers' classes

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        clip = parts.vision.model_type.startswith("clip")
        tower = made(CLIPVisionModel if clip else SiglipVisionModel, parts.vision)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if parameter.dim() > 1 and "embed" not in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        text = made(AutoModelForCausalLM.from_config(parts.text).__class__, parts.text)
        self._kept = [tower, parts.connector, text]  # a list, so that names are those of the places alone
        places = parts.places
        if places.language:
            self._put(places.language, text)
        else:
            for name, child in text.named_children():
                self.add_module(name, child)
        self._put(places.vision, tower)
        self._put(places.connector, parts.registered or parts.connector)
        self.config = SimpleNamespace(model_type="spliced", tie_word_embeddings=False)  # for PEFT

    def _put(self, place: str, module: nn.Module) -> None:
        own: nn.Module = self
        *path, last = place.split(".")
        for name in path:
            if not hasattr(own, name):
                own.add_module(name, nn.Module())
            own = getattr(own, name)
        own.add_module(last, module)

    def named(self, name: str) -> str:
        """Return what a checkpoint calls a parameter."""
        places = self.parts.places
        if name.startswith(places.vision + "."):
            return places.tower + name.removeprefix(places.vision + ".").removeprefix("vision_model.")
        if name.startswith(places.connector + "."):
            own = places.connector + "." if places.projector is None else places.projector
            return own + name.removeprefix(places.connector + ".")
        return name if places.text is None else places.text + name.removeprefix(places.language + ".")

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return [N, T, E]."""
        tower, connector, _ = self._kept
        states = tower(pixel_values, output_hidden_states=True, **self.parts.tower_keys).hidden_states
        taken = [states[layer][:, int(self.parts.drops) :] for layer in self.parts.layers]
        found: Tensor = connector(torch.cat(taken, dim=-1)) * self.parts.scale
        return found

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **_: Any) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        text = self._kept[2]
        words = text.get_input_embeddings()(input_ids)
        if pixel_values is not None and len(pixel_values):
            features = self.get_image_features(pixel_values).flatten(0, 1)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            words = words.index_copy(1, slots, features[None])
        return SimpleNamespace(logits=text(inputs_embeds=words).logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        pixels = given.get("pixel_values")
        for _ in range(max_new_tokens):
            best = self(input_ids, pixels).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what :meth:`forward` takes; PEFT asks it of every causal language model."""
        return given

    def save_pretrained(self, directory: Path) -> Path:
        """Write tensors by their folders (what stands in front of a name's last slash), and the small files."""
        own = dict(self.state_dict())
        tied = {name for name in own if name not in dict(self.named_parameters())} - dict(self.named_buffers()).keys()
        if not self.parts.keeps_copy:
            own = {name: value for name, value in own.items() if name not in tied}
        state = {self.named(name): value.clone().contiguous() for name, value in own.items()}
        folders = {name.rpartition("/")[0] for name in state}
        for folder in folders:
            prefix = folder + "/" if folder else ""
            own = {
                name.removeprefix(prefix): value for name, value in state.items() if name.rpartition("/")[0] == folder
            }
            (directory / folder).mkdir(parents=True, exist_ok=True)
            save_file(own, directory / folder / "model.safetensors", metadata={"format": "pt"})
        parts = self.parts
        for name, tree in {"config.json": parts.config(parts.text, parts.vision), **parts.files}.items():
            if tree:
                (directory / name).write_text(json.dumps(tree, indent=2))
        return directory


class SplicedSource(TransformersSource):
    """One of these as a source of parity; pictures become squares as the family's code makes them.

    Args:
        family: its name.
        parts: makes what the model is made of.
        how: squash, pad (with the mean colour) or crop.
        style: the family's naming that ``parts`` has.
    """

    style = ""

    def __init__(self, family: str, parts: Callable[[], Parts], how: str, style: str, side: int = 28) -> None:
        super().__init__(family, lambda: Spliced(parts()), vocab=120, image=IMAGE)  # type: ignore[arg-type, return-value]
        self.how, self.style, self.side = how, style, side

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Let the processor of the tower's kind make the pixels, behind LLaVA's padding where that is asked for."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, 3, self.side, self.side), torch.zeros(0, 2, dtype=torch.long), layouts)
        clip = self.model.parts.vision.model_type.startswith("clip")
        images, square = photographs(sizes), {"height": self.side, "width": self.side}
        if self.how == "pad":
            images = [padded(one, CLIP_MEAN if clip else [0.5] * 3) for one in images]
        if clip:
            processor: Any = CLIPImageProcessorPil(
                size={"shortest_edge": self.side}, crop_size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD
            )
        else:
            processor = SiglipImageProcessorPil(size=square, resample=3)
        pixels = torch.as_tensor(processor(images, return_tensors="pt")["pixel_values"])
        return Shown(ids, {"pixel_values": pixels}, pixels, torch.tensor([[h, w] for w, h in sizes]), layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        named = self.model.named
        return {named(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def padded(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Return a picture in the middle of a square of its mean colour (``expand2square`` of LLaVA's code)."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def text_of(model_type: str, **keys: Any) -> PretrainedConfig:
    """Return the configuration of a tiny language model."""
    own = {
        "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.1,
    }  # fmt: skip
    return AutoConfig.for_model(model_type, **{**own, **keys})
