"""Tiny MiniCPM-Vs, written out: Transformers has no class for these versions.

The definitions are those of ``modeling_minicpmv.py`` and ``resampler.py`` beside the published weights (copies with
their history: github.com/HwwwwwwwH/MiniCPM-V-2 @ 84ce9b0, github.com/theonlyengine/VQA_Model @ 4520826, of
MiniCPM-Llama3-V 2.5), each slice by itself (``batch_vision_input: false``), of Transformers' Idefics2 and Llama, of
timm 0.9.10 (``vision_transformer.py``, ``layers/pos_embed.py``) and of the MiniCPM of :mod:`text_reference`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from family_cases import made
from PIL import Image
from reducer_reference import Resampler
from safetensors.torch import save_file
from text_reference import MiniCPM, randomised
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from whole import Shown
from whole_source import photographs

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

IMAGE, VOCAB, EMBED, PATCH, SIDE, MOST = 119, 120, 256, 7, 28, 9
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": EMBED, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def cut(width: int, height: int, most: int = MOST, side: int = SIDE, patch: int = PATCH) -> tuple[Any, Any, Any]:
    """Return the size of the overview, columns and rows of slices, and the size of a slice (None for none).

    As ``slice_image`` beside the published weights has it.
    """

    def whole(length: float, unit: int) -> int:
        return max(round(length / unit) * unit, unit)

    def fitted(wide: float, tall: float) -> tuple[int, int]:
        ratio = wide / tall
        tall = int(side / math.sqrt(ratio))
        return whole(int(tall * ratio), patch), whole(tall, patch)

    count = min(math.ceil(width * height / (side * side)), most)
    if count <= 1:
        return fitted(width, height), None, None
    grids = [
        (columns, number // columns)
        for number in (count - 1, count, count + 1)
        if 1 < number <= most
        for columns in range(1, number + 1)
        if number % columns == 0
    ]
    columns, rows = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))
    return fitted(width, height), (columns, rows), fitted(whole(width, columns) / columns, whole(height, rows) / rows)


def slices(picture: Image.Image) -> list[Image.Image]:
    """Return the views of a picture, as the published code resizes and crops it."""
    overview, grid, size = cut(*picture.size)
    found = [picture.resize(overview, Image.Resampling.BICUBIC)]
    if grid is not None:
        (columns, rows), (wide, tall) = grid, size
        large = picture.resize((columns * wide, rows * tall), Image.Resampling.BICUBIC)
        found += [
            large.crop((x * wide, y * tall, (x + 1) * wide, (y + 1) * tall))
            for y in range(rows)
            for x in range(columns)
        ]
    return found


class SquareResampler(Resampler):
    """1.0's: keys see the queries' table, resized as ``get_abs_pos`` does it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, Q, E] of [N, P, W]; the queries' positions and those of the patches are one table."""
        assert self.pos_embed is not None
        sides = [math.isqrt(n) for n in (len(self.pos_embed), x.size(1))]
        table = self.pos_embed.view(1, sides[0], sides[0], -1).permute(0, 3, 1, 2)
        positions = F.interpolate(table, (sides[1], sides[1]), mode="bicubic", align_corners=False)
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        query = (self.ln_q(self.query) + self.pos_embed).unsqueeze(1).repeat(1, x.size(1), 1)
        out = self.attn(query, x + positions.flatten(2).permute(2, 0, 1), x)[0].permute(1, 0, 2)
        return self.ln_post(out) @ self.proj


class Timm(nn.Module):
    """timm's SigLIP: blocks, a norm behind them, a table that is resized to each picture."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 16, inner: int = 80, side: int = 3) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width, eps=1e-6),
                    "attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}),
                    "norm2": nn.LayerNorm(width, eps=1e-6),
                    "mlp": nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)}),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [1, P, W] of [1, 3, H, W]."""
        x = self.patch_embed["proj"](pixels)
        table = self.pos_embed.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        x = x + F.interpolate(table, x.shape[2:], mode="bicubic", antialias=True, align_corners=False)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            qkv = block["attn"]["qkv"](block["norm1"](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
            x = x + block["attn"]["proj"](attended)
            x = x + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        normed: Tensor = self.norm(x)
        return normed


class _MiniCPMV(nn.Module):
    """``llm``, ``vpm`` and ``resampler``, for one sample at a time."""

    settings: dict[str, Any]
    processor: dict[str, Any]
    resampler_class: type[Resampler] = Resampler
    sliced = True

    def __init__(self, llm: nn.Module, vpm: nn.Module, width: int, queries: int, *, positions: bool) -> None:
        super().__init__()
        self.llm, self.vpm = llm, vpm
        self.resampler = self.resampler_class(width, EMBED, 128, queries, positions)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for name, parameter in [*self.resampler.named_parameters(), *self.vpm.named_parameters()]:
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 1:
                    parameter.copy_(noise * 0.1 + float("weight" in name))
                else:
                    parameter.copy_(noise * (0.5 if "pos" in name or "query" in name else 0.1))
        # As transformers.PreTrainedModel has it, for PEFT.
        self.config = SimpleNamespace(model_type="minicpmv", tie_word_embeddings=False)

    def encoded(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Return [1, P, W] of one slice's patches [P, 3, p, p]."""
        raise NotImplementedError

    def words(self, ids: Tensor) -> Tensor:
        """Return [S, E]."""
        raise NotImplementedError

    def behind(self, words: Tensor) -> Tensor:
        """Return [S, V]."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: Tensor, sizes: Tensor) -> Tensor:
        """Return [T, E] of the patches [P, F] of slices of these rows and columns."""
        counts = [rows * columns for rows, columns in sizes.tolist()]
        found = []
        for patches, (rows, columns) in zip(pixel_values.split(counts), sizes.tolist(), strict=True):
            self.resampler.sizes = [(rows, columns)]
            found.append(self.resampler(self.encoded(patches.view(-1, 3, PATCH, PATCH), rows, columns))[0])
        return torch.cat(found)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, sizes: Tensor | None = None, **_: Tensor
    ) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        words = self.words(input_ids[0])
        if pixel_values is not None and len(pixel_values):
            assert sizes is not None
            features = self.get_image_features(pixel_values, sizes)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            words = words.index_copy(0, slots, features)
        return SimpleNamespace(logits=self.behind(words)[None])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        shown = {key: given[key] for key in ("pixel_values", "sizes") if key in given}
        for _ in range(max_new_tokens):
            best = self(input_ids, **shown).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what :meth:`forward` takes; PEFT asks it of every causal language model."""
        return given

    def save_pretrained(self, directory: Path) -> None:
        """Write it with the keys and names of the hub."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.settings, indent=2))
        if self.processor:
            (directory / "preprocessor_config.json").write_text(json.dumps(self.processor, indent=2))
        (directory / "modeling_minicpmv.py").write_text("raise SystemExit('remote code must not run')\n")
        state = {name: value.contiguous() for name, value in self.state_dict().items() if "inv_freq" not in name}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _files(queries: int, **more: Any) -> dict[str, Any]:
    """``preprocessor_config.json``."""
    code = {"AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor"}
    return {
        "image_processor_type": "MiniCPMVImageProcessor", "auto_map": code, "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": MOST, "scale_resolution": SIDE, "patch_size": PATCH, "image_feature_size": queries,
        "im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>",
        "unk": "<unk>", "norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, **more,
    }  # fmt: skip


_AUTO = {
    "AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV",
    "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
}  # fmt: skip


class MiniCPMLlama3V25(_MiniCPMV):
    """MiniCPM-Llama3-V 2.5."""

    def __init__(self, *, heads: int = 4, inner: int = 80, width: int = 48, dropped: bool = False) -> None:
        text = {key: value for key, value in TEXT.items() if key != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": TEXT["rope_theta"]}
        vision = {
            "hidden_size": width, "image_size": 6 * PATCH, "intermediate_size": inner, "model_type": "idefics2",
            "num_attention_heads": heads, "num_hidden_layers": 3, "patch_size": PATCH,
        }  # fmt: skip
        own = Idefics2VisionConfig(**{key: value for key, value in vision.items() if key != "model_type"})
        own._attn_implementation = "eager"
        vpm = Idefics2VisionTransformer(own)
        llm = made(LlamaForCausalLM, LlamaConfig(**text, rope_parameters=rope))
        super().__init__(llm, vpm, width, 6, positions=False)
        self.settings = {
            **TEXT, "architectures": ["MiniCPMV"], "auto_map": _AUTO, "attention_bias": False,
            "attention_dropout": 0.0, "batch_vision_input": True, "bos_token_id": 1, "drop_vision_last_layer": dropped,
            "eos_token_id": 2, "hidden_act": "silu", "image_size": SIDE, "mm_use_im_start_end": True,
            "model_type": "minicpmv", "patch_size": PATCH, "pretraining_tp": 1, "query_num": 6, "rope_scaling": None,
            "slice_config": {
                "max_slice_nums": MOST, "patch_size": PATCH, "model_type": "minicpmv", "scale_resolution": SIDE,
            },
            "slice_mode": True, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False,
            "version": "2.5", "vision_config": {**vision, "num_hidden_layers": 3 + int(dropped)},
        }  # fmt: skip
        self.processor = _files(6, version=2.5)

    def encoded(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """Patches side by side, as ``reshape_by_patch`` lays them: the tower is not told of rows and columns."""
        line = patches.permute(1, 2, 0, 3).flatten(2)[None]
        found: Tensor = self.vpm(line).last_hidden_state
        return found

    def words(self, ids: Tensor) -> Tensor:
        """Return Llama's embeddings."""
        found: Tensor = self.llm.model.embed_tokens(ids)
        return found

    def behind(self, words: Tensor) -> Tensor:
        """Run Llama."""
        found: Tensor = self.llm(inputs_embeds=words[None]).logits[0]
        return found


class MiniCPMV2(_MiniCPMV):
    """MiniCPM-V 2.0."""

    def __init__(self, *, tied: bool = False) -> None:
        text = {**TEXT, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12, "tie_word_embeddings": tied}
        llm = randomised(MiniCPM(text))
        with torch.no_grad():  # so that features count beside words that are multiplied
            llm.model.embed_tokens.weight.mul_(0.2)
        super().__init__(llm, Timm(), 64, 4, positions=True)
        self.settings = {
            **text, "architectures": ["MiniCPMV"], "auto_map": _AUTO, "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 1, "drop_vision_last_layer": True, "eos_token_id": 2,
            "hidden_act": "silu", "image_size": SIDE, "max_slice_nums": MOST, "mm_use_im_start_end": True,
            "model_type": "minicpmv", "patch_size": PATCH, "pretraining_tp": 1, "query_num": 4, "rope_scaling": None,
            "scale_resolution": SIDE, "slice_mode": True, "torch_dtype": "float32", "use_cache": True,
            "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        }  # fmt: skip
        self.processor = _files(4)

    def encoded(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """The slice as a picture."""
        picture = patches.view(rows, columns, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
        found: Tensor = self.vpm(picture.reshape(1, 3, rows * PATCH, columns * PATCH))
        return found

    def words(self, ids: Tensor) -> Tensor:
        """Return MiniCPM's embeddings, multiplied; features are not."""
        found: Tensor = self.llm.words(ids)
        return found

    def behind(self, words: Tensor) -> Tensor:
        """Run MiniCPM."""
        found: Tensor = self.llm.behind(words)
        return found


class MiniCPMV1(MiniCPMV2):
    """MiniCPM-V 1.0: pictures are squashed."""

    resampler_class = SquareResampler
    sliced = False

    def __init__(self) -> None:
        super().__init__()
        for key in ("max_slice_nums", "scale_resolution", "slice_mode"):
            del self.settings[key]
        self.processor = {}


class SlicedSource:
    """One of these models, for :mod:`whole_source`."""

    style = ""
    image = IMAGE

    def __init__(self, make: Callable[[], _MiniCPMV]) -> None:
        self._make = make
        self._model: _MiniCPMV | None = None

    @property
    def model(self) -> _MiniCPMV:
        """The model, made when it is asked for."""
        if self._model is None:
            self._model = self._make().requires_grad_()  # positions of queries too, which are not trained
        return self._model

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Cut pictures as the published code does, and write its marks around slices."""
        plan, generator = plan_of(model), torch.Generator().manual_seed(words + len(sizes))
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        pictures = photographs(sizes) if sizes else []
        views = [view for picture in pictures for view in slices(picture)]
        if not self.model.sliced:
            views = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in pictures]

        def some() -> list[int]:
            return torch.randint(0, IMAGE - 2, (words,), generator=generator).tolist()

        pieces = some()
        for layout in layouts:
            for run in layout.runs:
                pieces += [IMAGE] * run if isinstance(run, int) else [IMAGE - 1]
            pieces += some()
        tiles = [(torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255 - 0.5) / 0.5 for view in views]
        patches = [F.unfold(one[None], PATCH, stride=PATCH)[0].T for one in tiles]
        pixels = torch.cat(patches) if patches else torch.zeros(0, 3 * PATCH * PATCH)
        grid = torch.tensor([[view.height // PATCH, view.width // PATCH] for view in views], dtype=torch.long)
        given = {"pixel_values": pixels, "sizes": grid} if sizes else {}
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        if not self.model.sliced:
            pixels = torch.stack(tiles) if tiles else torch.zeros(0, 3, SIDE, SIDE)
        return Shown(torch.tensor(pieces), given, pixels, heights, layouts)

    def features(self, sample: Shown) -> Tensor:
        """Encode."""
        with torch.no_grad():
            return self.model.get_image_features(**sample.given)

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once."""
        found: Tensor = self.model(input_ids=sample.ids[None], **sample.given).logits[0]
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def answer(self, sample: Shown, tokens: int) -> list[int]:
        """Generate greedily."""
        whole = self.model.generate(sample.ids[None], max_new_tokens=tokens, **sample.given)
        return list(whole[0, len(sample.ids) :].tolist())


def _saved(make: Callable[[], _MiniCPMV]) -> Callable[[Path], Path]:
    def save(directory: Path) -> Path:
        make().save_pretrained(directory)
        return directory

    return save


MINICPM_V: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "minicpm_v": ("minicpm_v", _saved(MiniCPMV1)),
    "minicpm_v_2": ("minicpm_v_2", _saved(MiniCPMV2)),
    "minicpm_llama3_v_2_5": ("minicpm_llama3_v_2_5", _saved(MiniCPMLlama3V25)),
    "minicpm_llama3_v_2_5_dropped": ("minicpm_llama3_v_2_5", _saved(lambda: MiniCPMLlama3V25(dropped=True))),
}
"""What makes a checkpoint, by name, and its family."""
