"""Tiny Bunnies, Imps, Miphas, LLaVA-Phis and ALLaVAs, written out: Transformers has no class for them.

Each is a text class of Transformers (of MiniCPM ``text_reference``), a tower of it, and two linear layers, put together
as the public code does: ``prepare_inputs_labels_for_multimodal`` of BAAI-DCAI/Bunny ``bunny/model/bunny_arch.py`` @
08273acb puts features in the place of the image token, as do MILVLG/imp, zhuyiche/llava-phi and ALLaVA's; S2 is
``bunny/util/s2wrapper/core.py``. Two multiply features as their embeddings: Bunny on MiniCPM (``bunny_minicpm.py``),
and Mipha on Gemma (``GemmaModel`` of Transformers 4.38.2, which its pyproject.toml pins).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from eva02_reference import Eva02
from family_cases import _TEXT, _VISION, CLIP_MEAN, made
from PIL import Image
from safetensors.torch import save_file
from text_reference import MiniCPM, randomised
from tokenizer_files import write_qwen2
from torch import Tensor, nn
from tower_models import eva02_author, eva02_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    StableLmConfig,
    StableLmForCausalLM,
)
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.public_towers import TOWERS

IMAGE, ROWS = 119, 448
"""The id of an image's slots; rows for all tokens of a tokenizer."""


class LlavaLike(nn.Module):
    """The whole model, for one sample at a time, with the names of the public checkpoints.

    Args:
        text: its language model.
        tower: CLIP or SigLIP.
        config: what ``config.json`` has beside the language model's keys, of the widths of both.
        nested: tower and projector are described in ``vision_config`` (LLaVA-Phi, Mipha).
        scale: what features are multiplied by.
        scales: sides of S2.
        layer: whose output is taken.
        renamed: keys of the language model that the system calls otherwise.
    """

    base_model_prefix = ""  # for PEFT, which looks for renamed weights in Transformers' classes

    def __init__(
        self, text: Any, tower: Any, config: dict[str, Any], *, nested: bool = False, scale: float = 1.0,
        scales: Sequence[int] = (), layer: int = -2, renamed: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.text, self.told, self.nested, self.scale = [text], config, nested, scale  # a list: its parts are below
        self.scales, self.layer, self.renamed = tuple(scales), layer, renamed or {}
        settings = text.settings if isinstance(text, MiniCPM) else text.config.to_dict()
        self.settings, width, embed = settings, tower.config.hidden_size, settings["hidden_size"]
        generator = torch.Generator().manual_seed(4)
        first, second = nn.Linear(width * max(1, len(scales)), embed), nn.Linear(embed, embed)
        with torch.no_grad():
            for parameter in (*first.parameters(), *second.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.model = text.model
        self.model.vision_tower = tower if nested else nn.ModuleDict({"vision_tower": tower})
        self.model.mm_projector = nn.Sequential(first, nn.GELU(), second)
        if hasattr(text, "lm_head"):
            self.lm_head = text.lm_head
        self.tower = [tower]
        self.config = SimpleNamespace(model_type=config["model_type"], tie_word_embeddings=False)  # which PEFT asks for

    def _encode(self, pixels: Tensor) -> Tensor:
        tower = self.tower[0]
        hidden = tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        return hidden[:, 1:] if tower.config.model_type.startswith("clip") else hidden

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Return [N, P, E], as they come to the first layer."""
        return self._projected(pixel_values) * self.scale

    def _projected(self, pixel_values: Tensor) -> Tensor:
        """Return [N, P, E]; with S2 of the maps of all sizes of a picture, each averaged to the first one's."""
        if not self.scales:
            features = self._encode(pixel_values)
        else:
            tile, maps = self.scales[0], []
            for side in self.scales:
                larger = F.interpolate(pixel_values.float(), size=(side, side), mode="bicubic")
                k = side // tile
                tiles = [
                    self._encode(larger[:, :, tile * r : tile * (r + 1), tile * c : tile * (c + 1)])
                    for r in range(k)
                    for c in range(k)
                ]
                grid = int(tiles[0].size(1) ** 0.5)
                squares = [one.transpose(1, 2).unflatten(2, (grid, grid)) for one in tiles]
                rows = [torch.cat(squares[k * r : k * (r + 1)], -1) for r in range(k)]
                maps.append(F.interpolate(torch.cat(rows, -2), size=(grid, grid), mode="area"))
            features = torch.cat(maps, 1).flatten(2).transpose(1, 2)
        projected: Tensor = self.model.mm_projector(features)
        return projected

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **_: Any) -> Any:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        if pixel_values is None or not len(pixel_values):
            return self.text[0](input_ids)
        # MiniCPM's embeddings are multiplied behind the place where the hook puts them in.
        behind = isinstance(self.text[0], MiniCPM)
        features = (self._projected if behind else self.get_image_features)(pixel_values).flatten(0, 1)

        def put(module: nn.Module, args: Any, words: Tensor) -> Tensor:
            flat = words if words.dim() == 3 else words[None]
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            return flat.index_copy(1, slots, features[None]).view_as(words)

        handle = self.model.embed_tokens.register_forward_hook(put)
        try:
            return self.text[0](input_ids)
        finally:
            handle.remove()

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        for _ in range(max_new_tokens):
            best = self(input_ids, given.get("pixel_values")).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what :meth:`forward` takes; PEFT asks it of every causal language model."""
        return given

    def published(self, name: str) -> str:
        """Return what the public checkpoints call a parameter: towers lost a level in Transformers 5."""
        prefix = "model.vision_tower." if self.nested else "model.vision_tower.vision_tower."
        own = name.removeprefix(prefix)
        if isinstance(self.tower[0], _EvaTower):
            return prefix + eva02_author(own) if own != name else name
        return name if own == name else f"{prefix}vision_model.{own.removeprefix('vision_model.')}"

    def save_pretrained(self, directory: Path) -> None:
        """Write it with the keys and names of the hub."""
        directory.mkdir(parents=True, exist_ok=True)
        state = {self.published(name): value.detach().clone() for name, value in self.named_parameters()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self._config(), indent=2))
        if not self.nested and not isinstance(self.tower[0], _EvaTower):
            (directory / "vision_config.json").write_text(json.dumps(self.tower[0].config.to_dict(), indent=2))

    def _config(self) -> dict[str, Any]:
        text = {key: value for key, value in self.settings.items() if key not in ("transformers_version", "dtype")}
        rope = text.pop("rope_parameters", None)
        if rope is not None:  # as it was in the Transformers of the time
            text |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
            if "partial_rotary_factor" in rope:
                text["partial_rotary_factor"] = rope["partial_rotary_factor"]
        text = {self.renamed.get(key, key): value for key, value in text.items()}
        tower, width = self.tower[0].config, self.model.mm_projector[0].in_features
        mm = {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": width}
        if not self.nested:
            eva = isinstance(self.tower[0], _EvaTower)
            name = "/models/EVA02_CLIP_L_336_psz14_s6B.pt" if eva else "tiny-siglip"
            return {**text, "mm_vision_tower": name, **mm, **self.told}
        system = self.told["model_type"].partition("_")[0]
        kind = "mipha_vision_model" if system == "mipha" else "llava_phi_clip_vision_model"
        own = {
            **tower.to_dict(), "model_type": kind, "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": self.layer,
        }  # fmt: skip
        if system == "mipha":
            own["vision_model_name_or_path"] = f"tiny/{tower.model_type.partition('_')[0]}"
        projector = {**mm, "hidden_size": text["hidden_size"],
                     "model_type": "mipha_projector" if system == "mipha" else "llava_phi_projector"}  # fmt: skip
        return {**text, **self.told, "vision_config": {"vision_tower": own, "mm_projector": projector}}


class LikeSource(TransformersSource):
    """A written-out model; pictures are squares of the side that its tower takes."""

    def __init__(self, family: str, make: Callable[[], LlavaLike]) -> None:
        super().__init__(family, make, vocab=IMAGE + 1, image=IMAGE)

    @property
    def style(self) -> str:
        """Bunny's EVA02 has names of its own."""
        return "eva" if isinstance(self.model.tower[0], _EvaTower) else super().style

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Pad with the mean colour as ``expand2square`` does, or leave it to the tower's processor."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, 3, plan.side, plan.side), heights, layouts)
        side = {"height": plan.side, "width": plan.side}
        if model.vision.class_token:
            processor: Any = CLIPImageProcessor(size={"shortest_edge": plan.side}, crop_size=side)
        else:
            processor = SiglipImageProcessor(size=side)
        pictures = photographs(sizes)
        if model.image.kind == "pad":
            pictures = [_padded(one, CLIP_MEAN if model.vision.class_token else [0.5] * 3) for one in pictures]
        pixels = torch.as_tensor(processor(pictures, return_tensors="pt")["pixel_values"])
        return Shown(ids, {"pixel_values": pixels}, pixels, heights, layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are, by the names of the checkpoint."""
        named: Any = self.model.named_parameters()
        return {self.model.published(name): p.grad for name, p in named if p.grad is not None}


def _padded(picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    side, (width, height) = max(picture.size), picture.size
    square = Image.new("RGB", (side, side), tuple(int(one * 255) for one in mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def _siglip(**keys: Any) -> Any:
    return made(SiglipVisionModel, SiglipVisionConfig(**{**_VISION, **keys}, vision_use_head=False))


def _clip(**keys: Any) -> Any:
    return made(CLIPVisionModel, CLIPVisionConfig(**{**_VISION, **keys}))


def phi_text(*, bias: bool, **keys: Any) -> Any:
    """Phi-2: rotary positions on 0.4 of a head; Bunny and ALLaVA build the output layer without a bias."""
    own = {**_TEXT, "num_key_value_heads": None, "hidden_size": 80, "partial_rotary_factor": 0.4, "resid_pdrop": 0.1}
    text = made(PhiForCausalLM, PhiConfig(**{**own, **keys}))
    if not bias:
        text.lm_head.bias = None
    return text


def _plain(kind: str, wide: dict[str, Any] | None = None) -> Any:
    # A token of padding would have no gradient, wherever it stands.
    ids, text = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}, {**_TEXT, **(wide or {})}
    if kind == "phi3":
        return made(Phi3ForCausalLM, Phi3Config(**text, **ids, sliding_window=2047))
    if kind == "stablelm":
        return made(StableLmForCausalLM, StableLmConfig(**text, **ids, use_qkv_bias=True))
    if kind == "qwen2":
        return made(Qwen2ForCausalLM, Qwen2Config(**{**text, "num_key_value_heads": 4}, **ids))
    if kind == "gemma":
        return made(GemmaForCausalLM, GemmaConfig(**{**text, "num_key_value_heads": 1}, **ids, head_dim=32))
    if kind == "llama":
        return made(LlamaForCausalLM, LlamaConfig(**text, **ids, rms_norm_eps=1e-5))
    plain = {**text, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "num_key_value_heads": 4}
    own = {"rope_scaling": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "tie_word_embeddings": True}
    return randomised(MiniCPM({**plain, **own}))


EPOCH = {"layer_norm_eps": "norm_eps", "partial_rotary_factor": "rope_pct"}
_LEARNT = {"freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False, "tokenizer_model_max_length": 2048,
           "tokenizer_padding_side": "right", "use_mm_proj": True}  # fmt: skip


class _EvaTower(nn.Module):
    """``Eva2LargePlusEncoder``: all blocks but the last, without the class token."""

    def __init__(self, model: Eva02) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(hidden_size=model.cls_token.size(-1), model_type="eva")

    def forward(self, pixels: Tensor, **_: Any) -> Any:
        x = self.model(pixels, len(self.model.blocks) - 1)[:, 1:]
        return SimpleNamespace(hidden_states=[x, None])  # which of them is asked for, whatever is told


def bunny(
    kind: str, model_type: str, architecture: str, *, s2: bool = False, wide: Any = None, eva: bool = False,
    **vision: Any,
) -> LlavaLike:  # fmt: skip
    """One of Bunny's combinations on SigLIP, or EVA02; with S2 at 28 and 56 pixels."""
    keys = {
        **_LEARNT, "model_type": model_type, "architectures": [architecture], "image_aspect_ratio": "pad",
        "mm_projector_lr": 2e-05, "unfreeze_vision_tower": False, "use_s2": s2,
        **({"s2_scales": "28,56"} if s2 else {}),
    }  # fmt: skip
    text = phi_text(bias=False, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    tower = _EvaTower(eva02_model()) if eva else _siglip(**vision)
    return LlavaLike(
        text, tower, keys, scales=(28, 56) if s2 else (), renamed=EPOCH if kind == "stablelm" else {},
        scale=12.0 if kind == "minicpm" else 1.0,
    )  # fmt: skip


def imp(kind: str, model_type: str, architecture: str, wide: Any = None) -> LlavaLike:
    """Imp: SigLIP without its last layer and what stands behind, and Phi-2 with the bias of its output layer."""
    keys = {
        **_LEARNT, "model_type": model_type, "architectures": [architecture], "image_aspect_ratio": "square",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_lr": 2e-05,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    }  # fmt: skip
    if kind == "phi":
        keys |= {"image_token": "<image>", "image_token_index": IMAGE}
    tower = _siglip()
    del tower.encoder.layers[-1:]
    tower.post_layernorm = nn.Identity()
    text = phi_text(bias=True, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    one = LlavaLike(text, tower, keys, layer=-1)
    one.told["mm_vision_select_layer"] = -2
    return one


def mipha(kind: str, model_type: str, architecture: str, wide: Any = None) -> LlavaLike:
    """Mipha: SigLIP as ``vision_config`` describes it."""
    keys = {
        "model_type": model_type, "architectures": [architecture], "image_aspect_ratio": "pad",
        "freeze_vision_tower": False, "tune_mm_mlp_adapter": True, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "mm_projector_lr": None, "tokenizer_model_max_length": 2048,
    }  # fmt: skip
    text = phi_text(bias=True, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    return LlavaLike(text, _siglip(), keys, nested=True, scale=_TEXT["hidden_size"] ** 0.5 if kind == "gemma" else 1.0)


def llava_phi(wide: Any = None) -> LlavaLike:
    """LLaVA-Phi: CLIP."""
    keys = {
        "model_type": "llava_phi", "architectures": ["LlavaPhiForCausalLM"], "image_aspect_ratio": "pad",
        "freeze_vision_tower": False, "tune_mm_mlp_adapter": True, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }  # fmt: skip
    return LlavaLike(phi_text(bias=True, **(wide or {})), _clip(), keys, nested=True)


def allava(
    kind: str = "phi", model_type: str = "llava_phi", architecture: str = "LlavaPhiForCausalLM", wide: Any = None
) -> LlavaLike:
    """ALLaVA: CLIP, and no bias in the output layer."""
    keys = {
        **_LEARNT, "model_type": model_type, "architectures": [architecture], "image_aspect_ratio": "pad",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }  # fmt: skip
    text = phi_text(bias=False, **(wide or {})) if kind == "phi" else _plain(kind, wide)
    return LlavaLike(text, _clip(), keys, renamed=EPOCH if kind == "stablelm" else {})


_MAKES: dict[str, tuple[str, Callable[[], LlavaLike]]] = {
    "bunny_phi": ("bunny", partial(bunny, "phi", "bunny-phi", "BunnyPhiForCausalLM")),
    "bunny_phi3": ("bunny", partial(bunny, "phi3", "bunny-phi3", "BunnyPhi3ForCausalLM")),
    "bunny_stablelm": ("bunny", partial(bunny, "stablelm", "bunny-stablelm", "BunnyStableLMForCausalLM")),
    "bunny_qwen2": ("bunny", partial(bunny, "qwen2", "bunny-qwen2", "BunnyQwen2ForCausalLM")),
    "bunny_minicpm": ("bunny", partial(bunny, "minicpm", "bunny-minicpm", "BunnyMiniCPMForCausalLM")),
    "bunny_llama": ("bunny", partial(bunny, "llama", "bunny-llama", "BunnyLlamaForCausalLM")),
    "bunny_phi3_s2": ("bunny", partial(bunny, "phi3", "bunny-phi3", "BunnyPhi3ForCausalLM", s2=True)),
    "bunny_phi_eva": ("bunny", partial(bunny, "phi", "bunny-phi", "BunnyPhiForCausalLM", eva=True)),
    "imp": ("imp", partial(imp, "phi", "imp", "ImpForCausalLM")),
    "imp_phi3": ("imp", partial(imp, "phi3", "imp_phi3", "ImpPhi3ForCausalLM")),
    "imp_qwen2": ("imp", partial(imp, "qwen2", "imp_qwen2", "ImpQwen2ForCausalLM")),
    "mipha_phi": ("mipha", partial(mipha, "phi", "mipha_phi", "MiphaPhiForCausalLM")),
    "mipha_gemma": ("mipha", partial(mipha, "gemma", "mipha_gemma", "MiphaGemmaForCausalLM")),
    "llava_phi": ("llava_phi", llava_phi),
    "allava": ("allava", allava),
    "allava_stablelm": ("allava", partial(allava, "stablelm", "llava_stablelm_1_6b", "LlavaStableLM_1_6bForCausalLM")),
}


def sources(family: str) -> dict[str, LikeSource]:
    """Return what a family's combinations are held against, by name."""
    return {name: LikeSource(family, make) for name, (its, make) in _MAKES.items() if its == family}


def _saved(make: Callable[[], LlavaLike], directory: Path) -> Path:
    make().save_pretrained(directory)
    return directory


LLAVA_LIKE: dict[str, tuple[str, Callable[[Path], Path]]] = {
    name: (family, partial(_saved, make)) for name, (family, make) in _MAKES.items()
}
"""What makes a checkpoint, by name, and its family."""


def like_answers(name: str, directory: Path) -> Path:
    """Write one with a tokenizer that has the tokens of its template; Qwen2's stands in for Phi's."""
    maker: Any = _MAKES[name][1]
    maker(wide={"vocab_size": ROWS}).save_pretrained(directory)
    write_qwen2(directory)
    return directory


_CLASSES: dict[str, tuple[Any, Any]] = {
    "phi": (PhiConfig, PhiForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM),
    "stablelm": (StableLmConfig, StableLmForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM),
}  # fmt: skip


def like_of(family: str, model: ModelConfig) -> tuple[nn.Module, list[nn.Module]]:
    """Return a preset's model in the shape of its public checkpoint, and what of it is not built here.

    Text class and tower are those of Transformers, from the configuration that a conversion writes.
    """
    tree = FAMILIES[family].config(model, {})
    known: Any = FAMILIES[family]
    kind = next(one.kind for one in known.languages if tree["model_type"] in one.model_types)
    back = {theirs: ours for ours, theirs in EPOCH.items()}
    own = {back.get(key, key): value for key, value in tree.items() if key not in ("vision_config", "model_type")}
    if kind == "minicpm":
        text: Any = MiniCPM(own)
    else:
        settings, of_kind = _CLASSES[kind]
        text = of_kind(settings(**own))
        if kind == "phi" and family in ("bunny", "allava"):
            text.lm_head.bias = None
    if not model.vision.key_bias:  # EVA02, of which the last block and the norm behind it stand idle
        eva = _EvaTower(Eva02(1024, 24, 16, 2730, 14, 24))
        return LlavaLike(text, eva, {"model_type": kind}), [eva.model.blocks[-1], eva.model.norm]
    clip = bool(model.vision.class_token)
    shape = TOWERS["openai/clip-vit-large-patch14-336" if clip else "google/siglip-so400m-patch14-384"]
    keys = {key: value for key, value in shape.items() if key != "model_type"}
    tower: Any = CLIPVisionModel(CLIPVisionConfig(**keys)) if clip else SiglipVisionModel(SiglipVisionConfig(**keys))
    one = LlavaLike(text, tower, {"model_type": kind}, scales=model.vision.s2_scales or ())
    head = [tower.head] if hasattr(tower, "head") else []
    return one, [tower.post_layernorm, *tower.encoder.layers[model.vision.num_layers :], *head]
