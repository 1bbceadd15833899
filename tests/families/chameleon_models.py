"""Tiny Chameleons: by Transformers, with the processor's file that published ones have."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from family_cases import _TEXT, made
from torch import Tensor
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedModel
from whole import Shown
from whole_source import TransformersSource

SIDE, LEVELS, BLOCKS, CODES, FIRST, IMAGE, WORDS = 16, 3, 2, 40, 120, 119, 119
VQ: dict[str, Any] = {
    "embed_dim": 24, "num_embeddings": CODES, "latent_channels": 16, "resolution": SIDE, "base_channels": 32,
    "channel_multiplier": [1, 1, 2], "num_res_blocks": BLOCKS,
}  # fmt: skip


def names_of(first: int, mixed: bool = False) -> dict[str, int]:
    """Return the tokens of codes by their names; ``mixed`` so that they do not follow each other as their codes do."""
    places = torch.randperm(CODES, generator=torch.Generator().manual_seed(8)).tolist() if mixed else range(CODES)
    return {
        "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z": first + place
        for code, place in enumerate(places)
    }


NAMES = names_of(FIRST)
FILES: dict[str, Any] = {
    "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [1.0] * 3, "image_processor_type": "ChameleonImageProcessor",
    "image_std": [1.0] * 3, "resample": 1, "rescale_factor": 0.0078, "size": {"shortest_edge": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as facebook/chameleon-7b has it, for 16 pixels."""


def chameleon(behind: bool = False, first: int = FIRST, image: int = IMAGE, mixed: bool = False) -> PreTrainedModel:
    """Return a model whose pictures have many codes, and whose norms are no ones and zeros.

    Args:
        behind: as the 34B has it: norms behind branches, and keys that queries share.
        first: token of code 0.
        image: token of a slot.
        mixed: tokens of codes are in another order than the codes.
    """
    own = {"vocab_size": first + CODES + 4, "num_key_value_heads": 2 if behind else 4}
    config = ChameleonConfig(
        **{**_TEXT, **own}, swin_norm=behind, vq_config=VQ,
        vocabulary_map={"<image>": image, **names_of(first, mixed)}, attn_implementation="eager",
    )  # fmt: skip
    model = made(ChameleonForConditionalGeneration, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "vqmodel" in name and "embedding" not in name:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
            elif "_norm." in name:
                one = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(one + 0.3 * torch.randn(parameter.shape, generator=generator))
        vqmodel = model.model.vqmodel
        pictures = torch.rand(6, 3, SIDE, SIDE, generator=generator) * 2 - 1
        latents = vqmodel.quant_conv(vqmodel.encoder(pictures)).permute(0, 2, 3, 1).flatten(0, 2)
        some = torch.randperm(len(latents), generator=generator)[:CODES]
        vqmodel.quantize.embedding.weight.copy_(latents[some])
    return model


class ChameleonSource(TransformersSource):
    """A class whose pictures are tokens: its features are their codes, and its tower has no gradients."""

    def __init__(self, **more: Any) -> None:
        super().__init__("chameleon", functools.partial(chameleon, **more), files=FILES, vocab=WORDS, image=IMAGE)

    @property
    def unused(self) -> set[str]:
        """Return our names of what learns nothing."""
        table = self._tower()
        return {"vision." + name for one in table for name in one.ours}

    def _tower(self) -> Any:
        from megavlm.architectures.towers.vq_gan.tables import chameleon_vq_gan

        return chameleon_vq_gan(LEVELS, BLOCKS).rest

    def features(self, sample: Shown) -> Tensor:
        """Return the codes [T, 1]."""
        with torch.no_grad():
            tokens = self.model.model.get_image_tokens(sample.given["pixel_values"])
        return (tokens.flatten()[:, None] - FIRST).float()

    def gradients(self) -> dict[str, Tensor]:
        """Return them; of the tower zeros, but for the layer of a decoder that is nowhere."""
        named = self.model.named_parameters()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in named
            if "post_quant_conv" not in name
        }


def save(directory: Path, behind: bool = False, mixed: bool = False) -> Path:
    """Write it with its processor's file."""
    chameleon(behind, mixed=mixed).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(FILES))
    return directory


CHAMELEON = {
    "chameleon": ("chameleon", save), "chameleon_behind": ("chameleon", functools.partial(save, behind=True)),
    "chameleon_mixed": ("chameleon", functools.partial(save, mixed=True)),
}  # fmt: skip
"""Checkpoints: family, and what writes them."""
