"""Cobra (arXiv 2403.14520): DINOv2 and SigLIP side by side, an MLP of three layers, and a Mamba.

github.com/h-zhao1997/cobra @ 97f91e13. In one directory::

    config.json                        its run; ``model`` says which towers, projector and language model
    checkpoints/latest-checkpoint.pt   what was trained: projector and language model
    dino_featurizer/                   timm's vit_large_patch14_reg4_dinov2.lvd142m
    siglip_featurizer/                 timm's vit_so400m_patch14_siglip_384

Its code takes the towers from timm, frozen, and they are not published with it: their folders are put beside. Shapes
are those of the tensors; what the code has fixed (width of heads, epsilons) is fixed here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from megavlm.architectures.connectors.mlp.tables import SEQUENTIAL_PROJECTOR
from megavlm.architectures.decoders.mamba.tables import MAMBA_LANGUAGE
from megavlm.architectures.pair_tables import high_table, low_table
from megavlm.architectures.towers.vit.tables import TIMM_DINOV2_VISION, TIMM_VISION
from megavlm.architectures.towers.vit_vit.config import ViTViTConfig
from megavlm.architectures.towers.vit_vit.presets import KINDS
from megavlm.config.errors import UserError
from megavlm.config.fields import Meaning, meaning_of
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect
from megavlm.families.family import Family, Tree, config_file
from megavlm.weights.kinds import COBRA_FILE, DINO, SIGLIP, TRAINED
from megavlm.weights.rules import Aside, Table
from megavlm.weights.source import Source

_TEXT = f"{TRAINED}/llm_backbone.llm."
_PROJECTOR = f"{TRAINED}/projector.projector."
_HEADS = {"low": 64, "high": 72}
"""Width of a head of DINOv2-L, and of SigLIP-SO400M."""
_TOWERS = re.compile(r"dinosiglip-vit-so-([1-9][0-9]*)px")
_EPSILON = 1e-5
"""Of Mamba's norms in its code (``norm_epsilon``)."""
_NORM = Aside(r"{tower}norm\.(weight|bias)", "norm behind layers that are not used", carried=True)
_SIZES = {"image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size"}
_SIZES |= {"positional_grid"}


class CobraFamily(Family):
    """``CobraVLM`` of both towers and the fused MLP."""

    name = "cobra"
    title = "Cobra in its authors' file, timm's towers beside it"
    # Its data has LLaVA-1.5's questions for boxes; no place was found where its authors ask so.
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit_vit",), "connector": ("mlp",), "language": ("mamba",),
    }  # fmt: skip
    template = "zephyr"
    image_plan = "squash_pair"
    pickles: ClassVar[Mapping[str, tuple[str, str | None]]] = {TRAINED: (COBRA_FILE, "model")}
    slotless = own_rotary = nested_pickles = expands = own_positions = True

    def detect(self, source: Source) -> bool:
        """By its folders and file."""
        return {DINO, SIGLIP, TRAINED} <= source.pieces.keys()

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures.

        Raises:
            UserError: it is another of its code's models, or its pieces do not go together.
        """
        told, where = source.config.get("model"), config_file(source)
        if not isinstance(told, Mapping):
            raise UserError(f"{where}: has no 'model', which says the towers, the projector and the language model")
        # Another language model was trained in another template (MambaPromptBuilder), which is not here.
        expect(told, where, image_resize_strategy="resize-naive", llm_backbone_id="mamba-2.8b-zephyr")
        kind, towers = str(told.get("arch_specifier")), str(told.get("vision_backbone_id"))
        if not kind.endswith("fused-gelu-mlp"):
            raise UserError(
                f"{where}: arch_specifier is {kind[:40]!r}; fused-gelu-mlp is supported, and neither its code's other "
                "projectors nor one tower alone"
            )
        if (size := _TOWERS.fullmatch(towers)) is None:
            raise UserError(f"{where}: vision_backbone_id is {towers[:60]!r}; dinosiglip-vit-so-384px is supported")
        vision = {"preset": "dinov2_siglip", **_tower(source, DINO, "low", int(size[1]))}
        vision |= {f"high_{key}": value for key, value in _tower(source, SIGLIP, "high", int(size[1])).items()}
        language = _language(source)
        wide, width = source.shape(_PROJECTOR + "0.weight")
        both = vision["hidden_size"] + vision["high_hidden_size"]
        if width != both or wide % both:
            raise UserError(
                f"{source.path}: {_PROJECTOR}0.weight is {wide} x {width}, and the features of both towers are {both} "
                f"wide; put those that it was trained with into {DINO} and {SIGLIP}"
            )
        return {
            "vision": vision,
            "connector": {"preset": "mlp3x_gelu", "input_expansion": wide // both},
            "language": language,
            "image": {"kind": "squash_pair", "resample": "bicubic"},
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of both towers, the projector and the language model."""
        siglip = dataclasses.replace(TIMM_VISION, aside=(*TIMM_VISION.aside, _NORM), names={"tower": f"{SIGLIP}/"})
        return [
            low_table(dataclasses.replace(TIMM_DINOV2_VISION, names={"tower": f"{DINO}/"})),
            high_table(siglip, model.vision.high),
            dataclasses.replace(SEQUENTIAL_PROJECTOR, prefix=_PROJECTOR),
            dataclasses.replace(
                MAMBA_LANGUAGE,
                names={"model": f"{_TEXT}backbone.", "head": f"{_TEXT}lm_head.", "embedding": "embedding"},
            ),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return what its code reads of ``config.json`` to load a model."""
        return {
            "model": {
                "arch_specifier": "no-align+fused-gelu-mlp",
                "image_resize_strategy": "resize-naive",
                "llm_backbone_id": "mamba-2.8b-zephyr",
                "llm_max_length": 2048,
                "model_id": "cobra+3b",
                "vision_backbone_id": f"dinosiglip-vit-so-{model.vision.image_size}px",
            }
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Towers, projector, language model and image plan must be the code's."""
        vision, connector, language, image = model.vision, model.connector, model.language, model.image
        if (image.kind, image.resample) != ("squash_pair", "bicubic"):
            return f"pictures are made by {image.kind} ({image.resample}), those of Cobra by squash_pair (bicubic)"
        for key, value in _fixed().items():
            there = getattr(vision, key)
            if (tuple(there) if isinstance(there, list) else there) != value:
                return f"the towers have {key} {there!r}, Cobra's have {value!r}"
        for which, tower, fixed in (("first", vision.low, "low"), ("second", vision.high, "high")):
            if tower.hidden_size != _HEADS[fixed] * tower.num_attention_heads:
                return f"the {which} tower's heads are not {_HEADS[fixed]} wide, as those of Cobra's"
        if vision.image_size != vision.high_image_size:
            return "the towers do not see squares of one size, each made of the picture, as Cobra's do (model.vision)"
        if (connector.depth, connector.drop_first_feature) != (3, False) or connector.input_expansion is None:
            return "the connector is not Cobra's: three layers, the first of which gives a multiple of the features"
        if language.norm_epsilon != _EPSILON or not language.tie_word_embeddings:
            return f"the language model's norms have another epsilon than {_EPSILON}, or its output layer is its own"
        return None

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Its code has its templates in Python files, chosen by the name of the language model."""
        if template == self.template:
            return []
        return [f"model.template: {template} was trained, but Cobra's own code speaks {self.template}"]


def _fixed() -> Tree:
    """Return what Cobra's towers have one value for: all keys but sizes, and those of a run."""
    sizes = {*_SIZES, *(f"high_{key}" for key in _SIZES)}
    keys = ViTViTConfig.__pydantic_fields__
    kept = (Meaning.RUN, Meaning.NAMES)
    wanted = [key for key in keys if key not in ("preset", *sizes) and meaning_of(ViTViTConfig, key) not in kept]
    return {key: KINDS["dinov2_siglip"].get(key, keys[key].default) for key in wanted}


def _tower(source: Source, piece: str, which: str, size: int) -> Tree:
    """Return the sizes of a tower, as one that stands alone has them: the layer before the last gives the features.

    Raises:
        UserError: its table of positions is no square, or it has one layer.
    """
    top = f"{piece}/"
    rows, width = source.shape(top + "pos_embed")[-2:]
    grid = math.isqrt(rows)
    if grid**2 != rows:
        raise UserError(f"{source.path}: {top}pos_embed has {rows} rows, which are no square grid of patches")
    pattern = re.compile(re.escape(top) + r"blocks\.(\d+)\.")
    count = 1 + max((int(found[1]) for name in source.tensors if (found := pattern.match(name))), default=-1)
    if count < 2:
        raise UserError(f"{source.path}: {top[:-1]} has {count} layers, and the one before the last is taken")
    tree: Tree = {
        "image_size": size,
        "patch_size": source.shape(top + "patch_embed.proj.weight")[-1],
        "hidden_size": width,
        "num_layers": count - 1,
        "num_attention_heads": width // _HEADS[which],
        "ffn_hidden_size": source.shape(top + "blocks.0.mlp.fc1.weight")[0],
        "positional_grid": grid,
    }
    assert tree.keys() == _SIZES
    return tree


def _language(source: Source) -> Tree:
    """Return ``model.language``."""
    top = f"{_TEXT}backbone."
    pattern = re.compile(re.escape(top) + r"layers\.(\d+)\.")
    numbers = [int(found[1]) for name in source.tensors if (found := pattern.match(name))]
    first = f"{top}layers.0.mixer."
    rows, width = source.shape(top + "embedding.weight")
    inner, states = source.shape(first + "A_log")
    return {
        "preset": "mamba",
        "num_layers": 1 + max(numbers),
        "hidden_size": width,
        "intermediate_size": inner,
        "state_size": states,
        "conv_kernel": source.shape(first + "conv1d.weight")[-1],
        "time_step_rank": source.shape(first + "dt_proj.weight")[1],
        "vocab_size": rows,
        "norm_epsilon": _EPSILON,
        "tie_word_embeddings": True,
    }
