"""MiniGPT-4 and MiniGPT-v2 as their authors' code reads them: a language model, and files of ``torch.save`` beside it.

github.com/Vision-CAIR/MiniGPT-4 @ d94738a7, ``minigpt4/models/{eva_vit,base_model,minigpt4,minigpt_v2}.py``. In one
directory::

    llm/                                Vicuna or Llama-2-chat in Transformers' form, with its tokenizer
    eva_vit_g.pth                       EVA01-g; the last of its layers is left out
    blip2_pretrained_flant5xxl.pth      of MiniGPT-4 on Vicuna: BLIP-2's Q-Former, and the norm behind the tower
    any other .pth                      what was trained: llama_proj, and MiniGPT-v2's adapters

Shapes are those of the tensors; what the code has fixed (heads, epsilons, which layers look at pictures) is fixed here.
What no file has is made as that code makes it: the norm of ones and zeros that MiniGPT-v2 never trains, and
``llama_proj`` before the first stage.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_reducer.tables import MINIGPT_PROJECTION
from megavlm.architectures.connectors.q_former.tables import LAVIS_Q_FORMER
from megavlm.architectures.towers.vit.tables import EVA01_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.data.box_words import MINIGPT_V2_BOXES
from megavlm.families.common import expect
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.text import no_half, text_branch, text_config, text_table
from megavlm.families.towers import CLIP_MEAN, CLIP_STD
from megavlm.weights.kinds import EVA_TOWER, LANGUAGE, PROJECTION, Q_FORMER
from megavlm.weights.rules import Aside, Table
from megavlm.weights.source import Source

_HEAD, _QUERY_HEAD = 88, 64
"""Width of a head of the tower, and of the Q-Former's BERT."""
_LAYERS = 39
"""Layers of the tower that are run, of 40."""
_EPSILON = 1e-5
"""Of the norm behind the tower (``ln_vision``)."""
_PATCHES = 4
"""That become one token of MiniGPT-v2."""
_PROJ = f"{PROJECTION}/llama_proj."
ADAPTERS_ASIDE = (
    Aside(r"{minigpt}llama_model\..*\.rotary_emb\.inv_freq", "fixed rotary tables"),
    Aside(
        r"{minigpt}llama_model\..*\.lora_[AB]\.(default\.)?weight",
        "adapters of the language model: convert the file with --adapter, and this checkpoint as its --base",
    ),
    Aside(r"{minigpt}Qformer\.bert\.embeddings\.position_ids", "position number buffer"),
)


class MiniGPT4Family(Family):
    """MiniGPT-4 on Vicuna: BLIP-2's Q-Former and one linear layer."""

    name = "minigpt4"
    title = "MiniGPT-4 on Vicuna in its authors' files (blip2_*.pth, llama_proj)"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("q_former",), "language": ("decoder",),
    }  # fmt: skip
    text_folder = LANGUAGE
    pickles: ClassVar[Mapping[str, tuple[str, str | None]]] = {
        EVA_TOWER: ("eva_vit_g.pth", None),
        Q_FORMER: ("blip2_pretrained_flant5xxl.pth", "model"),
        PROJECTION: ("checkpoint.pth", "model"),
    }
    image_plan = "squash"
    slotless = own_epsilon = True
    class_feature = True
    norm: ClassVar[str] = f"{Q_FORMER}/ln_vision"
    """Where the norm behind the tower lies."""

    def detect(self, source: Source) -> bool:
        """By its files."""
        return EVA_TOWER in source.pieces and (Q_FORMER in source.pieces) == self.class_feature

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        text = source.pieces[LANGUAGE]
        where = config_file(text)
        expect(text.config, where, model_type="llama")
        language = text_branch(source, text.config, f"{LANGUAGE}/lm_head.", where)
        vision = self._vision(source)
        connector = self._connector(source, vision, language)
        return {"vision": vision, "connector": connector, "language": language}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        connector = self._table()
        named = dataclasses.replace(
            connector,
            names={"projection": f"{PROJECTION}/", "minigpt": f"{PROJECTION}/"},
            aside=(*connector.aside, *ADAPTERS_ASIDE),
        )
        return [
            dataclasses.replace(EVA01_VISION, prefix=f"{EVA_TOWER}/", names={"norm": self.norm}),
            named,
            text_table(model.language, model=f"{LANGUAGE}/model.", head=f"{LANGUAGE}/lm_head."),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the language model's configuration: the others have none."""
        return text_config(model.language)

    def settings(self, model: ModelConfig) -> Tree:
        """Return what its code's own file of settings says of the model."""
        return {"model": {"arch": "minigpt4", "image_size": model.vision.image_size, "model_type": "pretrain_vicuna0"}}

    def templates(self, source: Source) -> tuple[str, ...]:
        """Return that of its stage 2."""
        return ("minigpt4",)

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be the code's."""
        if model.image.kind != "squash":
            return f"the image plan is {model.image.kind}, MiniGPT squashes pictures"
        reason = no_eva01(model.vision) or self._no_connector(model) or no_half(model.language)
        if reason is None and (kind := text_config(model.language)["model_type"]) != "llama":
            reason = f"the language model is a {kind}, MiniGPT's are Llamas"
        return reason

    def _table(self) -> Table:
        """Return the connector's table."""
        return dataclasses.replace(LAVIS_Q_FORMER, prefix=f"{Q_FORMER}/")

    def _vision(self, source: Source) -> Tree:
        """Return ``model.vision``."""
        vision = eva01_tower(source, f"{EVA_TOWER}/")
        size = told_of(source).get("image_size")
        if type(size) is int:
            vision["image_size"] = size
        return {**vision, "post_layernorm_epsilon": _EPSILON, "class_feature": self.class_feature}

    def _connector(self, source: Source, vision: Mapping[str, Any], language: Mapping[str, Any]) -> Tree:
        """Return ``model.connector``."""
        queries, width = source.shape(f"{Q_FORMER}/query_tokens")[-2:]
        pattern = re.compile(rf"{Q_FORMER}/Qformer\.bert\.encoder\.layer\.(\d+)\.")
        numbers = [int(found[1]) for name in source.tensors if (found := pattern.match(name))]
        inside = source.shape(f"{Q_FORMER}/Qformer.bert.encoder.layer.0.intermediate_query.dense.weight")[0]
        _complete_projection(source, width, language["hidden_size"])
        return {
            "preset": "q_former",
            "num_queries": queries,
            "hidden_size": width,
            "num_layers": 1 + max(numbers),
            "num_attention_heads": width // _QUERY_HEAD,
            "ffn_hidden_size": inside,
        }

    def _no_connector(self, model: ModelConfig) -> str | None:
        """Return why a connector is not the code's, or None."""
        connector: Any = model.connector
        if connector.hidden_size != _QUERY_HEAD * connector.num_attention_heads:
            return f"the Q-Former's heads are not {_QUERY_HEAD} wide (model.connector.num_attention_heads)"
        if (connector.cross_attention_frequency, connector.layernorm_epsilon) != (2, 1e-12):
            return "the Q-Former is not BLIP-2's: every second layer looks at pictures, and epsilon is 1e-12"
        return None


class MiniGPTv2Family(MiniGPT4Family):
    """MiniGPT-v2, and MiniGPT-4 on Llama 2: four patches of a row become one token."""

    name = "minigpt_v2"
    title = "MiniGPT-v2, and MiniGPT-4 on Llama 2, in their authors' files"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("patch_reducer",), "language": ("decoder",),
    }  # fmt: skip
    class_feature = False
    norm = f"{PROJECTION}/ln_vision"
    finds = MINIGPT_V2_BOXES.asks

    def settings(self, model: ModelConfig) -> Tree:
        """Return what its code's own file of settings says of the model."""
        own = ("minigpt_v2", "pretrain") if stretched(model.vision) else ("minigpt4", "pretrain_llama2")
        return {"model": {"arch": own[0], "image_size": model.vision.image_size, "model_type": own[1]}}

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the system."""
        return ("minigpt_v2",) if _is_v2(source) else ("minigpt4_llama_2",)

    def _table(self) -> Table:
        return dataclasses.replace(MINIGPT_PROJECTION, prefix=f"{PROJECTION}/")

    def _vision(self, source: Source) -> Tree:
        """Return ``model.vision``: MiniGPT-v2 stretches the tower's table to twice its sides."""
        vision = super()._vision(source)
        if _is_v2(source) and "image_size" not in told_of(source):
            vision["image_size"] *= 2
        for kind, value in (("weight", 1.0), ("bias", 0.0)):
            if f"{self.norm}.{kind}" not in source:
                why = f"{'ones' if value else 'zeros'}, as the code that reads such files has it"
                source.make(f"{self.norm}.{kind}", (vision["hidden_size"],), why, methodcaller("fill_", value))
        return vision

    def _connector(self, source: Source, vision: Mapping[str, Any], language: Mapping[str, Any]) -> Tree:
        width = vision["hidden_size"]
        _complete_projection(source, _PATCHES * width, language["hidden_size"])
        seen = source.shape(_PROJ + "weight")[1]
        if seen != _PATCHES * width:
            raise UserError(
                f"{source.path}: {_PROJ}weight takes {seen} numbers, and {_PATCHES} patches of its tower are "
                f"{_PATCHES * width}; MiniGPT-4's on Vicuna goes with blip2_pretrained_flant5xxl.pth"
            )
        return {"preset": "concat_row", "patches": _PATCHES}

    def _no_connector(self, model: ModelConfig) -> str | None:
        connector: Any = model.connector
        if (connector.merge, connector.depth, connector.normalization) != ("row", 1, None):
            return "the connector is not MiniGPT's: patches of a row side by side, and one linear layer"
        if connector.patches != _PATCHES:
            return f"a token is of {connector.patches} patches (model.connector.patches), in MiniGPT of {_PATCHES}"
        return None if connector.add_bias_linear else "the connector has no bias (model.connector.add_bias_linear)"


def eva01_tower(source: Source, prefix: str) -> Tree:
    """Return the recipe's ``model.vision`` of EVA01's tensors, as BLIP-2 takes it (``create_eva_vit_g`` of LAVIS).

    Raises:
        UserError: its table is no square.
    """
    rows, width = source.shape(prefix + "pos_embed")[-2:]
    grid, patch = math.isqrt(rows - 1), source.shape(prefix + "patch_embed.proj.weight")[-1]
    if grid**2 + 1 != rows:
        raise UserError(f"{source.path}: {prefix}pos_embed has {rows} rows, which are no square grid and a class token")
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
    count = 1 + max(int(found[1]) for name in source.tensors if (found := pattern.match(name)))
    return {
        "preset": "eva01_vit",
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": min(count, _LAYERS),
        "num_attention_heads": width // _HEAD,
        "ffn_hidden_size": source.shape(prefix + "blocks.0.mlp.fc1.weight")[0],
        "positional_grid": grid,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def no_eva01(vision: VisionConfig) -> str | None:
    """Return why a tower is not MiniGPT's EVA01, or None."""
    parts = (vision.class_token, vision.conv_bias, vision.post_layernorm, vision.add_qkv_bias)
    others = (
        vision.pre_layernorm, vision.qk_norm, vision.layer_scale, vision.gated_mlp, vision.mlp_norm, vision.key_bias,
        vision.attention_norm, vision.register_tokens, vision.rotary_base, vision.positional_antialias,
        vision.feature_layers, vision.deepstack_layers, vision.s2_scales,
    )  # fmt: skip
    numbers = (vision.normalization, vision.activation, vision.layernorm_epsilon, vision.post_layernorm_epsilon)
    if not all(parts) or any(others) or numbers != ("LayerNorm", "gelu", 1e-6, _EPSILON):
        return "the vision tower is not EVA01 as BLIP-2's own code has it, with a norm behind it of epsilon 1e-5"
    if vision.hidden_size != _HEAD * vision.num_attention_heads:
        return f"its heads are {vision.hidden_size // vision.num_attention_heads} wide; EVA01's have {_HEAD}"
    if vision.num_layers > _LAYERS:
        return f"the tower has {vision.num_layers} layers, of which its code takes {_LAYERS}"
    return None


def told_of(source: Source) -> Mapping[str, Any]:
    """Return the settings of the model that the trainer put beside the weights; empty where there are none."""
    piece = source.pieces.get(PROJECTION)
    told = piece.settings.get("model") if piece is not None else None
    return told if isinstance(told, Mapping) else {}


def _is_v2(source: Source) -> bool:
    """Whether it is MiniGPT-v2: it is said, or there are adapters, which MiniGPT-4 has not."""
    told = told_of(source).get("arch")
    return told == "minigpt_v2" or any(".lora_A." in name for name in source.tensors)


def stretched(vision: VisionConfig) -> bool:
    """Whether pictures have more patches than the tower's table has places."""
    return bool(vision.image_size != vision.positional_grid * vision.patch_size)


def _complete_projection(source: Source, width: int, embed: int) -> None:
    """Begin ``llama_proj`` where it is not there, as torch begins a linear layer."""
    bound, why = width**-0.5, "as torch begins a linear layer, for stage 1"
    if _PROJ + "weight" in source or PROJECTION in source.pieces:
        return
    source.make(_PROJ + "weight", (embed, width), why, methodcaller("uniform_", -bound, bound))
    source.make(_PROJ + "bias", (embed,), why, methodcaller("uniform_", -bound, bound))
