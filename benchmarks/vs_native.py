"""Both systems of ``vs_transformers`` with Qwen2.5-VL's shape, on pictures that keep sizes of their own.

Widths are those of Qwen2.5-VL-7B divided by 14, in tower and language model alike, with 4 layers of each (7B: 32
and 28), the last of the tower's on whole pictures. Pictures have the proportions of real ones (``native_balance.py``),
within 256 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from native_balance import PICTURES
from numpy.typing import NDArray
from vs_worker import CLIP, LEARNING_RATE, Megavlm, Transformers, Work, _count

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.media import ImageShape, plan_of

VOCABULARY, IMAGE, PAD = 4096, 4095, 0
VISION_START, VISION_END, VIDEO = 4094, 4093, 4092
TEXTS = 4000
PATCH, MERGE, WINDOW, BUDGET = 14, 2, 112, 256 * 784
TOWER = {"hidden_size": 96, "layers": 4, "heads": 4, "ffn": 256, "full": [3]}
LANGUAGE = {"hidden_size": 256, "layers": 4, "heads": 4, "groups": 1, "ffn": 1352}
DESCRIPTION = (
    "random tokens, log-normal text (median 150, sigma 0.8, cut at 1024); 90 % of the samples have one to three "
    "pictures of real sizes, each side up to a fifth longer or shorter, within 256 tokens"
)


@dataclass(frozen=True)
class NativeSample:
    """One conversation."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each picture."""
    grids: NDArray[np.int64]
    """[N, 3]"""
    seed: int

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def pixels(self) -> tuple[tuple[int, int], ...]:
        """What is counted as its pictures."""
        return self.sizes

    def patches(self) -> NDArray[np.uint8]:
        """[P, F] of all pictures: noise, the same at every call."""
        count = int(self.grids.prod(1).sum())
        return np.random.default_rng(self.seed).integers(0, 256, (count, 3 * 2 * PATCH**2), dtype=np.uint8)


def recipe_of(pack_length: int) -> Any:
    """Return the run."""
    from pydantic import TypeAdapter

    from megavlm.config.schema import Recipe
    from megavlm.families.presets import expand_presets

    model = {
        "vision": {
            "preset": "qwen2_5_vl_vit", "patch_size": PATCH, "window_size": WINDOW, "hidden_size": TOWER["hidden_size"],
            "num_layers": TOWER["layers"], "num_attention_heads": TOWER["heads"], "ffn_hidden_size": TOWER["ffn"],
            "full_attention_layers": TOWER["full"],
        },
        "connector": {"preset": "patch_merger", "normalization": "RMSNorm"},
        "language": {
            "preset": "qwen2", "hidden_size": LANGUAGE["hidden_size"], "num_layers": LANGUAGE["layers"],
            "ffn_hidden_size": LANGUAGE["ffn"], "num_attention_heads": LANGUAGE["heads"],
            "num_query_groups": LANGUAGE["groups"], "vocab_size": VOCABULARY, "max_position_embeddings": 32768,
            "kv_channels": LANGUAGE["hidden_size"] // LANGUAGE["heads"], "rotary_sections": [8, 12, 12],
            "rotary_base": 1000000, "tie_word_embeddings": False, "add_qkv_bias": True,
        },
        "image": {"kind": "native", "max_pixels": BUDGET},
    }  # fmt: skip
    tree = {
        "output_dir": "unused",
        "model": model,
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": pack_length},
        "optimizer": {"lr": LEARNING_RATE, "clip_grad": CLIP, "weight_decay": 0.1, "schedule": "constant"},
        "training": {"train_steps": 1000, "global_batch_size": 1, "precision": "fp32"},
    }
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def make(count: int, seed: int = 1) -> list[NativeSample]:
    """Return samples."""
    rng, plan = np.random.default_rng(seed), plan_of(recipe_of(2048).model)
    shares = np.array([share for share, *_ in PICTURES]) / sum(share for share, *_ in PICTURES)
    found = []
    for index in range(count):
        sizes = []
        for _ in range(0 if rng.random() > 0.9 else int(rng.choice([1, 2, 3], p=[0.7, 0.2, 0.1]))):
            _, width, height = PICTURES[rng.choice(len(PICTURES), p=shares)]
            sizes.append((int(width * rng.uniform(0.8, 1.2)), int(height * rng.uniform(0.8, 1.2))))
        layouts = [plan.plan(*size, images=len(sizes)) for size in sizes]
        text = int(np.clip(rng.lognormal(np.log(150), 0.8), 8, 1024))
        shown = [part for one in layouts for part in ([VISION_START], np.full(one.tokens, IMAGE), [VISION_END])]
        tokens = np.concatenate([*shown, rng.integers(1, TEXTS, text)]).astype(np.int64)
        labels = np.where(np.arange(len(tokens)) < len(tokens) - 0.6 * text, IGNORE_INDEX, tokens)
        grids = np.array([one.patches for one in layouts], np.int64).reshape(-1, 3)
        found.append(NativeSample(tokens, labels, tuple(sizes), grids, 1000 * seed + index))
    return found


class NativeTransformers(Transformers):
    """Qwen2.5-VL from Transformers, with torch's AdamW, on padded batches."""

    def __init__(self, pack_length: int) -> None:
        self.pack_length = pack_length
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        text = {
            "vocab_size": VOCABULARY, "hidden_size": LANGUAGE["hidden_size"], "intermediate_size": LANGUAGE["ffn"],
            "num_hidden_layers": LANGUAGE["layers"], "num_attention_heads": LANGUAGE["heads"],
            "num_key_value_heads": LANGUAGE["groups"], "max_position_embeddings": 32768, "use_cache": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
        }  # fmt: skip
        vision = {
            "depth": TOWER["layers"], "num_heads": TOWER["heads"], "patch_size": PATCH, "spatial_merge_size": MERGE,
            "temporal_patch_size": 2, "hidden_size": TOWER["hidden_size"], "intermediate_size": TOWER["ffn"],
            "out_hidden_size": LANGUAGE["hidden_size"], "window_size": WINDOW, "fullatt_block_indexes": TOWER["full"],
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=IMAGE,
            video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.model: Any = Qwen2_5_VLForConditionalGeneration(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def _collate(self, samples: list[Any]) -> tuple[Any, Work]:
        shape = (len(samples), max(map(len, samples)))
        tokens, labels = torch.full(shape, PAD), torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample)] = torch.from_numpy(sample.tokens)
            labels[row, : len(sample)] = torch.from_numpy(sample.labels)
            mask[row, : len(sample)] = 1
        return (tokens, labels, mask, samples), _count(samples, tokens.numel())

    def ready(self, batch: Any) -> Any:
        """Return the batch with its pixels, normalised in advance as a processor does; not timed."""
        tokens, labels, mask, samples = batch
        shown = [sample for sample in samples if len(sample.grids)]
        more = {}
        if shown:
            more["pixel_values"] = (
                torch.from_numpy(np.concatenate([one.patches() for one in shown])).float() / 127.5 - 1
            )
            more["image_grid_thw"] = torch.from_numpy(np.concatenate([one.grids for one in shown]))
        kinds = (tokens == IMAGE).int()
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "mm_token_type_ids": kinds, **more}

    def step(self, batch: Any) -> float:
        """Forward, backward, clip, update."""
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


class NativeMegavlm(Megavlm):
    """megavlm's own model, optimizer and step, on packs that are weighed by the tower's cost."""

    def __init__(self, pack_length: int) -> None:
        from megavlm.training.build import build_training

        self.pack_length, self.recipe = pack_length, recipe_of(pack_length)
        self.training = build_training(self.recipe, IMAGE)
        self.parameters = sum(p.numel() for chunk in self.training.modules for p in chunk.parameters())

    def batches(self, samples: list[Any], batching: str) -> list[tuple[Any, Work]]:
        """Packs made by the packer and buffer of megavlm's reader, from the samples in random order."""
        from megavlm.data.chat import EncodedSample
        from megavlm.data.packing import CarryOverPacker, PackableSample
        from megavlm.planning.weighing import weigher_of

        assert batching == "packed"
        plan, weigh = plan_of(self.recipe.model), weigher_of(self.recipe)
        assert weigh is not None
        packer: CarryOverPacker[PackableSample] = CarryOverPacker(self.pack_length, 256, lambda sample: sample.views)
        packs = []
        for i in np.random.default_rng(0).permutation(len(samples)).tolist():
            sample = samples[i]
            shapes = tuple(ImageShape(*size, len(sample.sizes)) for size in sample.sizes)
            encoded = EncodedSample(sample.tokens, sample.labels, len(sample.sizes))
            views = weigh([plan.plan(*shape) for shape in shapes])
            images = (b"",) * len(sample.sizes)
            packs.append(packer.add(PackableSample(encoded, images, str(i), 0, shapes=shapes, views=views)))
        return [self._batch(pack, samples) for pack in packs if pack]

    def _batch(self, chosen: list[Any], samples: list[Any]) -> tuple[Any, Work]:
        members = [samples[int(sample.key)] for sample in chosen]
        return (chosen, members), _count(members, self.pack_length)

    def ready(self, batch: Any) -> Any:
        """Return the batch with its pixels; not timed."""
        from megavlm.data.device_batch import make_batch
        from megavlm.data.media import arrange
        from megavlm.data.packing import build_pack
        from megavlm.data.positions import positions_of

        (chosen, members), plan = batch, plan_of(self.recipe.model)
        pack = build_pack(chosen, self.pack_length, PAD, plan, positions_of(self.recipe.model, IMAGE))
        pixels = torch.from_numpy(np.concatenate([one.patches() for one in members]))
        layouts = [plan.plan(*shape) for shape in pack.image_shapes]
        return make_batch(pack, pixels, torch.device("cpu"), arrange(plan, layouts) if layouts else None)
