"""Llama 3.2 Vision as Transformers has it (arXiv 2407.21783, section 7): tiles, and layers that attend to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.mlp.tables import LINEAR_PROJECTOR
from megavlm.architectures.decoders.decoder.tables import MLLAMA_LANGUAGE
from megavlm.architectures.towers.tiled_vit.tables import MLLAMA_GLOBAL, MLLAMA_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.llama import no_llama
from megavlm.families.preprocessor import normalisation, processor_files, resampling
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_MORE = 8
"""Rows of the embedding behind those of the output layer, whatever the configuration says."""
_PROCESSORS = ("MllamaImageProcessor", "MllamaImageProcessorFast", "MllamaImageProcessorPil")
# Transformers' MllamaTextConfig and MllamaVisionConfig.
_TEXT: Tree = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}  # fmt: skip
_VISION: Tree = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8,
    "attention_heads": 16, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5, "max_num_tiles": 4,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
}  # fmt: skip


class MllamaFamily(Family):
    """``MllamaForConditionalGeneration``."""

    name = "mllama"
    title = "Llama 3.2 Vision (MllamaForConditionalGeneration)"
    # No place was found where its authors ask for boxes.
    finds = None
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("tiled_vit",), "connector": ("mlp",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar = {
        # As published on the hub.
        "hub": {
            "tower": "vision_model.", "projector": "multi_modal_projector", "model": "language_model.model.",
            "head": "language_model.lm_head.",
        },
        # Names of the modules since Transformers 4.52.
        "modules": {
            "tower": "model.vision_model.", "projector": "model.multi_modal_projector",
            "model": "model.language_model.", "head": "lm_head.",
        },
    }  # fmt: skip
    modules = "modules"
    preprocesses = True
    own_cross = True
    template = "mllama"
    image_plan = "canvas_tiles"

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        text = {**_TEXT, **_told(config, "text_config", where)}
        expect(text, where, model_type="mllama_text_model", dropout=0)
        rows, layers = text["vocab_size"], tuple(text["cross_attention_layers"])
        text["cross_attention_layers"] = layers
        language = llama_language({**text, "model_type": "llama"}, where)
        language |= {"vocab_size": rows + _MORE, "output_vocab_size": rows, "cross_attention_layers": layers}
        vision = _tower({**_VISION, **_told(config, "vision_config", where)}, where)
        pixels, image = normalisation(source, vision["image_size"]), _pictures(source, vision)
        return {"vision": vision | pixels, "connector": {"preset": "linear"}, "language": language, "image": image}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(MLLAMA_VISION, prefix=names["tower"]),
            dataclasses.replace(MLLAMA_GLOBAL, prefix=names["tower"]),
            dataclasses.replace(LINEAR_PROJECTOR, names={"linear": names["projector"]}),
            dataclasses.replace(MLLAMA_LANGUAGE, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        language, vision = model.language, model.vision
        text = llama_config(language)
        for key in ("architectures", "attention_dropout", "head_dim"):
            del text[key]
        text |= {
            "cross_attention_layers": list(language.cross_layers), "dropout": 0.0, "model_type": "mllama_text_model",
            "vocab_size": language.output_rows,
        }  # fmt: skip
        image = tokens.get("image", language.output_rows)
        return {
            "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": image,
            "model_type": self.name,
            "text_config": text,
            "tie_word_embeddings": False,
            "vision_config": {
                "attention_heads": vision.num_attention_heads,
                "hidden_act": "gelu",
                "hidden_size": vision.hidden_size,
                "image_size": vision.image_size,
                "intermediate_layers_indices": list(vision.intermediate_layers),
                "intermediate_size": vision.ffn_hidden_size,
                "max_num_tiles": vision.max_num_tiles,
                "model_type": "mllama_vision_model",
                "norm_eps": vision.layernorm_epsilon,
                "num_channels": 3,
                "num_global_layers": vision.num_global_layers,
                "num_hidden_layers": vision.num_layers,
                "patch_size": vision.patch_size,
                "supported_aspect_ratios": [list(one) for one in vision.ratios],
                "vision_output_dim": vision.feature_size,
            },
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be Mllama's kinds."""
        language = model.language
        if model.connector.preset != "linear":
            return f"the connector is {model.connector.preset}, Llama 3.2 Vision's is linear"
        if model.image.kind != self.image_plan:
            return f"the image plan is {model.image.kind}, Llama 3.2 Vision's is {self.image_plan}"
        if language.vocab_size != language.output_rows + _MORE:
            return (
                f"the embedding has {language.vocab_size} rows and the output layer {language.output_rows}; Llama 3.2"
                f" Vision's has {_MORE} more"
            )
        if language.kv_channels * language.num_attention_heads != language.hidden_size:
            return "heads are not as wide as the model divided by their number, for which its configuration has no key"
        if language.add_qkv_bias or language.qk_layernorm:
            return "the language model is no Llama: that has no bias on QKV, and no norm on queries and keys"
        return no_llama(language)

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of tiles."""
        kind, side = old.get("image_processor_type"), model.vision.image_size
        return {
            "do_pad": True, "image_processor_type": kind if kind in _PROCESSORS else _PROCESSORS[0],
            "max_image_tiles": model.vision.max_num_tiles, "size": {"height": side, "width": side},
        }  # fmt: skip

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class."""
        return {"processor_class": "MllamaProcessor"}

    def templates(self, source: Source) -> tuple[str, ...]:
        """The row of its form: the published ``chat_template`` writes a date into conversations without pictures."""
        return (self.template,)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index``, or its newer name."""
        token = source.config.get("image_token_id", source.config.get("image_token_index", 128256))
        return {"image": token} if isinstance(token, int) else {}


def _told(config: Mapping[str, Any], key: str, where: str) -> Tree:
    """Return a part's configuration without what is null: its class then takes its own."""
    return {name: value for name, value in need(config, key, where).items() if value is not None}


def _tower(visual: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.vision`` of a ``MllamaVisionConfig``.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    expect(visual, where, model_type="mllama_vision_model", hidden_act="gelu", num_channels=3)
    tiles = visual["max_num_tiles"]
    numbers = range(1, tiles + 1)
    known = [[a, b] for a in numbers for b in numbers if a * b <= tiles]
    ratios = visual.get("supported_aspect_ratios")
    if ratios is not None and [list(one) for one in ratios] != known:
        # Its image processor numbers them so, whatever config.json says.
        raise UserError(f"{where}: supported_aspect_ratios is {str(ratios)[:60]}; only {known} is supported")
    taken = tuple(visual["intermediate_layers_indices"])
    width = visual["hidden_size"] * (1 + len(taken))
    expect(visual, where, vision_output_dim=width)
    return {
        "preset": "mllama_vit",
        "image_size": visual["image_size"],
        "patch_size": visual["patch_size"],
        "hidden_size": visual["hidden_size"],
        "num_layers": visual["num_hidden_layers"],
        "num_global_layers": visual["num_global_layers"],
        "num_attention_heads": visual["attention_heads"],
        "ffn_hidden_size": visual["intermediate_size"],
        "layernorm_epsilon": visual["norm_eps"],
        "max_num_tiles": tiles,
        "intermediate_layers": taken,
    }


def _pictures(source: Source, vision: Mapping[str, Any]) -> Tree:
    """Return ``model.image`` as the image processor's file says it, or as its class does without one.

    Raises:
        UserError: pictures are treated in a way that is not done here.
    """
    found: Tree = {"kind": "canvas_tiles", "resample": "bilinear"}
    for path, tree in processor_files(source):
        if not tree:
            continue
        where = str(path)
        expect(tree, where, do_resize=True, do_convert_rgb=True, do_center_crop=False, do_pad=True)
        expect(tree, where, image_processor_type=_PROCESSORS, max_image_tiles=vision["max_num_tiles"])
        found["resample"] = resampling({"resample": 2, **tree}, where)
    return found
