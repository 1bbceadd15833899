"""Chameleon as Transformers has it (arXiv 2405.09818): pictures are tokens of the vocabulary.

A frozen VQ-GAN makes a code of each square of pixels, and the code a token. ``ChameleonForConditionalGeneration`` takes
these tokens out of the logits, always: so it is here (``model.language.image_tokens``). Its names of image tokens,
``IMGIMG``, the code in letters (A for 0) and ``Z``, stand in ``vocabulary_map`` of ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.codes.tables import NO_CONNECTOR
from megavlm.architectures.decoders.decoder.tables import CHAMELEON_LANGUAGE
from megavlm.architectures.towers.vq_gan.tables import POST, chameleon_vq_gan
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect, flag, need
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.preprocessor import processor_files, resampling
from megavlm.families.text_kinds import ANY, TextKind, odd_heads, shape, shape_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_CLASS = "ChameleonForConditionalGeneration"
_IMAGE, _CODE, _END = "<image>", "IMGIMG", "Z"
_RESCALE = 0.0078
# Transformers' ChameleonConfig and ChameleonVQVAEConfig.
_TEXT: Tree = {
    "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}  # fmt: skip
_TOWER: Tree = {
    "embed_dim": 256, "num_embeddings": 8192, "latent_channels": 256, "resolution": 512, "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2,
}  # fmt: skip
_PROCESSORS = ("ChameleonImageProcessor", "ChameleonImageProcessorFast", "ChameleonImageProcessorPil")


def _read(config: Mapping[str, Any], where: str) -> Tree:
    expect(config, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    behind = flag(config, "swin_norm", where, default=False)
    own = {"pre_layernorms": not behind, "post_layernorms": behind}
    return {**shape(config, where, "llama"), **own, "image_tokens": _image_tokens(config, where)[0]}


def _write(language: LanguageConfig) -> Tree:
    return {
        **shape_config(language, "chameleon", _CLASS),
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "swin_norm": not language.pre_layernorms,
    }


def _narrow(language: LanguageConfig) -> str | None:
    if language.pre_layernorms == language.post_layernorms:
        return "its norms stand in front of attention and MLP and behind them, Chameleon's on one side"
    if not language.image_tokens:
        return "no tokens are those of pictures (model.language.image_tokens)"
    return odd_heads(language)


CHAMELEON_TEXT = TextKind(
    model_type="chameleon", title="Chameleon", table=CHAMELEON_LANGUAGE, read=_read, write=_write,
    fixed={"head_layernorm": True, "pre_layernorms": ANY, "post_layernorms": ANY, "image_tokens": ANY},
    narrow=_narrow, templates=("chameleon",), in_transformers=False,  # as a half of another model
)  # fmt: skip


class ChameleonFamily(Family):
    """``ChameleonForConditionalGeneration``."""

    name = "chameleon"
    title = "Chameleon (ChameleonForConditionalGeneration)"
    # No place was found where its authors ask for boxes.
    finds = None
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vq_gan",), "connector": ("codes",), "language": ("decoder",),
    }  # fmt: skip
    preprocesses = own_norms = own_tokens = True
    template = "chameleon"
    image_plan = "crop"

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        where = config_file(source)
        config = {**_TEXT, **{key: value for key, value in source.config.items() if value is not None}}
        vision = _tower(need(config, "vq_config", where), where)
        first, stop = (language := CHAMELEON_TEXT.branch(config, where))["image_tokens"]
        if stop - first != vision["num_codes"]:
            raise UserError(
                f"{where}: vocabulary_map has {stop - first} image tokens, and vq_config {vision['num_codes']} codes"
                " (num_embeddings); correct one"
            )
        if order := _image_tokens(config, where)[1]:
            vision["code_order"] = order
        image = {"kind": "crop", "resample": _filter(source, vision["image_size"])}
        return {"vision": vision, "connector": {"preset": "codes"}, "language": language, "image": image}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables."""
        vision = model.vision
        tower = chameleon_vq_gan(len(vision.width_multipliers), vision.blocks_per_level)
        return [tower, NO_CONNECTOR, CHAMELEON_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration; of the vocabulary the tokens of pictures alone."""
        vision, (first, stop) = model.vision, model.language.image_tokens
        places = vision.code_order or range(stop - first)
        names = {_name(number): first + place for number, place in enumerate(places)}
        return {
            **CHAMELEON_TEXT.write(model.language),
            "vocabulary_map": {**names, _IMAGE: tokens.get("image", stop)},
            "vq_config": {
                "attn_resolutions": None,
                "attn_type": "vanilla",
                "base_channels": vision.base_width,
                "channel_multiplier": list(vision.width_multipliers),
                "double_latent": False,
                "dropout": 0.0,
                "embed_dim": vision.code_width,
                "in_channels": 3,
                "latent_channels": vision.latent_width,
                "model_type": "chameleon_vqgan",
                "num_embeddings": vision.num_codes,
                "num_res_blocks": vision.blocks_per_level,
                "resolution": vision.image_size,
            },
        }

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the first layer of a decoder that nobody has published here."""
        vision, name = model.vision, f"model.vqmodel.{POST}"
        return {
            f"{name}.weight": ((vision.latent_width, vision.code_width, 1, 1), 0.0),
            f"{name}.bias": ((vision.latent_width,), 0.0),
        }

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and the codes of a picture."""
        return {
            "image_seq_length": model.tokens_per_view, "image_token": image_token,
            "processor_class": "ChameleonProcessor",
        }  # fmt: skip

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of its squares, whose pixels are multiplied by its own number."""
        kind, side = old.get("image_processor_type"), model.vision.image_size
        return {
            "crop_size": {"height": side, "width": side}, "do_center_crop": True, "image_mean": [1.0] * 3,
            "image_processor_type": kind if kind in _PROCESSORS else _PROCESSORS[0], "image_std": [1.0] * 3,
            "rescale_factor": _RESCALE, "size": {"shortest_edge": side},
        }  # fmt: skip

    def refuses(self, model: ModelConfig) -> str | None:
        """Language model and image plan must be Chameleon's kinds."""
        image = model.image
        if image.kind != self.image_plan or image.short_side not in (None, model.vision.image_size):
            return f"pictures are made by {image.kind}, Chameleon's are cut out (crop) where they are resized to"
        if any(abs(one - 1 / (255 * _RESCALE)) > 1e-6 for one in (*model.vision.image_mean, *model.vision.image_std)):
            return "pixels are normalised otherwise (model.vision.image_mean, image_std)"
        return CHAMELEON_TEXT.refuses(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """It is published without a chat template."""
        return (self.template,)

    def tokens(self, source: Source) -> dict[str, int]:
        """The placeholder of its processor."""
        token = (source.config.get("vocabulary_map") or {}).get(_IMAGE)
        return {"image": token} if isinstance(token, int) else {}


def _name(code: int) -> str:
    """Return what the vocabulary calls a code."""
    return _CODE + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + _END


def _image_tokens(config: Mapping[str, Any], where: str) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return the first token of pictures and the one behind the last, and which of them each code is.

    The latter is empty where they follow each other as their codes do. Transformers' class
    (``ChameleonImageVocabularyMapping``) goes by the names as well, in any order.

    Raises:
        UserError: they are no run of tokens, or a code has none.
    """
    names = need(config, "vocabulary_map", where)
    if not isinstance(names, Mapping):
        raise UserError(f"{where}: vocabulary_map is {str(names)[:40]!r}; it must be an object")
    found = {name: token for name, token in names.items() if name.startswith(_CODE)}
    if not found:
        raise UserError(f"{where}: vocabulary_map has no image tokens ({_name(0)}, ..); restore the file")
    tokens = [found.get(_name(code)) for code in range(len(found))]
    missing = next((code for code, token in enumerate(tokens) if type(token) is not int), None)
    if missing is not None:
        raise UserError(
            f"{where}: vocabulary_map gives {_name(missing)}, code {missing} of pictures, the token {tokens[missing]};"
            f" the {len(found)} image tokens must be those of as many codes, each a number"
        )
    known: list[int] = [token for token in tokens if token is not None]
    first, stop = min(known), min(known) + len(known)
    if sorted(known) != list(range(first, stop)):
        raise UserError(
            f"{where}: vocabulary_map gives its {len(known)} image tokens numbers from {first} to {max(known)}; they"
            " must be a run of tokens, in any order, with no other between them and none twice"
        )
    order = tuple(token - first for token in known)
    return (first, stop), (() if order == tuple(range(len(order))) else order)


def _tower(visual: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.vision`` of ``vq_config``.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    own = {**_TOWER, **{key: value for key, value in visual.items() if value is not None}}
    expect(own, where, model_type="chameleon_vqgan", in_channels=3, double_latent=False, attn_type="vanilla", dropout=0)
    if own.get("attn_resolutions"):
        raise UserError(
            f"{where}: attn_resolutions is {str(own['attn_resolutions'])[:40]}; attention between the blocks of a level"
            " is not built here"
        )
    return {
        "preset": "chameleon_vq_gan",
        "image_size": own["resolution"],
        "base_width": own["base_channels"],
        "width_multipliers": tuple(own["channel_multiplier"]),
        "blocks_per_level": own["num_res_blocks"],
        "latent_width": own["latent_channels"],
        "code_width": own["embed_dim"],
        "num_codes": own["num_embeddings"],
    }


def _filter(source: Source, side: int) -> str:
    """Return the filter of the image processor's file, or that of its class without one.

    Raises:
        UserError: pictures are treated in a way that is not done here.
    """
    found = "lanczos"
    for path, tree in processor_files(source):
        if not tree:
            continue
        where = str(path)
        expect(tree, where, do_resize=True, do_convert_rgb=True, do_center_crop=True, do_rescale=True)
        expect(tree, where, do_normalize=True, rescale_factor=_RESCALE, image_processor_type=_PROCESSORS)
        for key in ("image_mean", "image_std"):
            expect({key: tree.get(key, [1.0] * 3)}, where, **{key: ([1.0] * 3, 1.0)})
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        for key, wanted in sizes.items():
            if tree.get(key, wanted) != wanted:
                raise UserError(
                    f"{where}: {key} is {tree[key]}, but config.json's pictures have {side} pixels (vq_config,"
                    " resolution); correct one"
                )
        found = resampling({"resample": 1, **tree}, where)
    return found
