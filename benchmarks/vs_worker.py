"""One of the two systems of ``vs_transformers`` in a process of its own: trains when it is told to.

Arguments: ``megavlm`` or ``transformers``, whose shape (:data:`SYSTEMS`), the folder with the mixes (for ``qwen2_5_vl``
the number of samples), the pack length, the number of threads. It reads jobs from standard input, one JSON object a
line ({"mix", "batching", "steps"}), and answers each with one line.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mixes import IMAGE_SIZE, IMAGE_TOKEN, PAD_TOKEN, VOCABULARY, Sample, load

from megavlm.data.batch import IGNORE_INDEX

VISION = {"hidden_size": 192, "layers": 4, "heads": 4, "ffn": 768, "patch": 8}
LANGUAGE = {"hidden_size": 256, "layers": 6, "heads": 8, "ffn": 704}
LEARNING_RATE, CLIP = 1e-4, 1.0


@dataclass
class Work:
    """What some steps did."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Processor time of this process: what a step costs, whoever else uses the machine."""
    supervised: int = 0
    tokens: int = 0
    """Tokens that are not padding."""
    processed: int = 0
    images: int = 0
    loss: float = 0.0

    def add(self, other: Work) -> None:
        """Count ``other`` as well; its loss replaces this one's."""
        for name in ("seconds", "cpu_seconds", "supervised", "tokens", "processed", "images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.loss = other.loss


class System(ABC):
    """A model in training, and how samples become its batches."""

    def __init__(self, pack_length: int) -> None:
        self.pack_length = pack_length
        self.parameters = 0

    @abstractmethod
    def batches(self, samples: list[Sample], batching: str) -> list[tuple[Any, Work]]:
        """Return batches that are ready for :meth:`step`, and what each holds."""

    def ready(self, batch: Any) -> Any:
        """Return what :meth:`step` takes; this is not timed."""
        return batch

    @abstractmethod
    def step(self, batch: Any) -> float:
        """Train on one batch; return the loss."""

    def told(self) -> dict[str, Any]:
        """Return what else is to be said of it."""
        return {}


def _count(samples: list[Sample], processed: int) -> Work:
    return Work(
        supervised=sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples),
        tokens=sum(map(len, samples)),
        processed=processed,
        images=sum(len(sample.pixels) for sample in samples),
    )


class Transformers(System):
    """CLIP's tower, LLaVA's two-layer connector and Qwen2 from Transformers, with torch's AdamW."""

    def __init__(self, pack_length: int) -> None:
        super().__init__(pack_length)
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.vision = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=VISION["hidden_size"],
                intermediate_size=VISION["ffn"],
                num_hidden_layers=VISION["layers"],
                num_attention_heads=VISION["heads"],
                image_size=IMAGE_SIZE,
                patch_size=VISION["patch"],
                hidden_act="gelu",
                attn_implementation="sdpa",
            )
        )
        hidden = LANGUAGE["hidden_size"]
        self.connector = torch.nn.Sequential(
            torch.nn.Linear(VISION["hidden_size"], hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)
        )
        self.language = self.language_model()
        self.model = torch.nn.ModuleList([self.vision, self.connector, self.language]).train()
        # The fused form is the faster one on a CPU, and what Transformers' Trainer takes by default.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def language_model(self) -> Any:
        """Return the language model."""
        from transformers import Qwen2Config, Qwen2ForCausalLM

        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=LANGUAGE["hidden_size"],
                intermediate_size=LANGUAGE["ffn"],
                num_hidden_layers=LANGUAGE["layers"],
                num_attention_heads=LANGUAGE["heads"],
                num_key_value_heads=LANGUAGE["heads"],
                tie_word_embeddings=False,
                use_cache=False,
                attn_implementation="sdpa",
            )
        )

    def batches(self, samples: list[Sample], batching: str) -> list[tuple[Any, Work]]:
        """Random batches of as many samples as make one pack on average; or LLaVA's grouping by length."""
        rng = np.random.default_rng(0)
        size = max(1, round(self.pack_length / np.mean([len(sample) for sample in samples])))
        order = rng.permutation(len(samples)).tolist()
        if batching == "grouped":
            # As Transformers' LengthGroupedSampler: random blocks of 50 batches, each sorted by length.
            blocks = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
            order = [i for block in blocks for i in sorted(block, key=lambda i: -len(samples[i]))]
        chunks = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        rng.shuffle(chunks)
        return [self._collate([samples[i] for i in chunk]) for chunk in chunks]

    def _collate(self, samples: list[Sample]) -> tuple[Any, Work]:
        shape = (len(samples), max(map(len, samples)))
        tokens = torch.full(shape, PAD_TOKEN)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for row, sample in enumerate(samples):
            tokens[row, : len(sample)] = torch.from_numpy(sample.tokens)
            labels[row, : len(sample)] = torch.from_numpy(sample.labels)
            mask[row, : len(sample)] = 1
        # Normalised in advance, as a processor of Transformers does it; megavlm does it within the step.
        pixels = torch.from_numpy(np.concatenate([sample.pixels for sample in samples])).float() / 127.5 - 1
        return (tokens, labels, mask, pixels), _count(samples, tokens.numel())

    def step(self, batch: Any) -> float:
        """Forward, backward, clip, update."""
        tokens, labels, mask, pixels = batch
        embeddings = self.language.get_input_embeddings()(tokens)
        if len(pixels):
            features = self.connector(self.vision(pixel_values=pixels).last_hidden_state[:, 1:])
            slots = (tokens == IMAGE_TOKEN).unsqueeze(-1).expand_as(embeddings)
            embeddings = embeddings.masked_scatter(slots, features)
        loss = self.language(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Megavlm(System):
    """megavlm's own model, optimizer and step, on packs of the carry-over packer."""

    language: ClassVar[dict[str, Any]] = {"preset": "tiny_qwen"}
    """What the language model has beside its sizes."""
    vision: ClassVar[dict[str, Any]] = {}
    """What the tower has beside those."""
    connector = "mlp2x_gelu"

    def __init__(self, pack_length: int) -> None:
        super().__init__(pack_length)
        from pydantic import TypeAdapter

        from megavlm.config.schema import Recipe
        from megavlm.data.spans import spans_of
        from megavlm.families.presets import expand_presets
        from megavlm.training.build import build_training

        language = {
            "hidden_size": LANGUAGE["hidden_size"],
            "num_layers": LANGUAGE["layers"],
            "ffn_hidden_size": LANGUAGE["ffn"],
            "num_attention_heads": LANGUAGE["heads"],
            "num_query_groups": LANGUAGE["heads"],
            "kv_channels": LANGUAGE["hidden_size"] // LANGUAGE["heads"],
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            **self.language,
        }
        vision = {
            "preset": "tiny_vit",
            "image_size": IMAGE_SIZE,
            "patch_size": VISION["patch"],
            "hidden_size": VISION["hidden_size"],
            "num_layers": VISION["layers"],
            "num_attention_heads": VISION["heads"],
            "ffn_hidden_size": VISION["ffn"],
            "positional_grid": IMAGE_SIZE // VISION["patch"],
            **self.vision,
        }
        tree = {
            "output_dir": "unused",
            "model": {"vision": vision, "connector": {"preset": self.connector}, "language": language},
            "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": pack_length},
            "optimizer": {"lr": LEARNING_RATE, "clip_grad": CLIP, "weight_decay": 0.1, "schedule": "constant"},
            "training": {"train_steps": 1000, "global_batch_size": 1, "precision": "fp32"},
        }
        recipe = TypeAdapter(Recipe).validate_python(expand_presets(tree))
        self.training, self.spans = build_training(recipe, IMAGE_TOKEN), spans_of(recipe.model, IMAGE_TOKEN)
        self.parameters = sum(p.numel() for chunk in self.training.modules for p in chunk.parameters())

    def batches(self, samples: list[Sample], batching: str) -> list[tuple[Any, Work]]:
        """Packs made by the packer and buffer of megavlm's reader, from the samples in random order."""
        from megavlm.data.chat import EncodedSample
        from megavlm.data.packing import CarryOverPacker, PackableSample

        assert batching == "packed"
        packer: CarryOverPacker[PackableSample] = CarryOverPacker(self.pack_length, buffer_size=256)
        packs = []
        for i in np.random.default_rng(0).permutation(len(samples)).tolist():
            sample = samples[i]
            encoded = EncodedSample(sample.tokens, sample.labels, len(sample.pixels))
            packs.append(packer.add(PackableSample(encoded, (b"",) * len(sample.pixels), str(i), 0)))
        # The last buffer never empties in training, where data go on; what is left in it here is not used.
        return [self._batch(pack, samples) for pack in packs if pack]

    def _batch(self, chosen: list[Any], samples: list[Sample]) -> tuple[Any, Work]:
        from megavlm.data.device_batch import make_batch
        from megavlm.data.packing import build_pack

        members = [samples[int(sample.key)] for sample in chosen]
        pixels = torch.from_numpy(np.concatenate([sample.pixels for sample in members]))
        pack = build_pack(chosen, self.pack_length, PAD_TOKEN, spans=self.spans)
        work = _count(members, self.pack_length)
        assert work.supervised == pack.supervised_tokens
        return make_batch(pack, pixels, torch.device("cpu")), work

    def step(self, batch: Any) -> float:
        """Take megavlm's training step."""
        from megavlm.training.step import train_step

        self.training.scheduler.step(1)
        return train_step(self.training.chunks, self.training.optimizer, [batch], num_sources=1).loss


SYSTEMS = {
    "llava": ("vs_worker:Transformers", "vs_worker:Megavlm"),
    "phi": ("vs_kinds:PhiTransformers", "vs_kinds:PhiMegavlm"),
    "paligemma": ("vs_kinds:PrefixTransformers", "vs_kinds:PrefixMegavlm"),
    "qwen2_5_vl": ("vs_native:NativeTransformers", "vs_native:NativeMegavlm"),
    "qwen3_moe": ("moe_worker:GroupedTransformers", "moe_worker:MoeMegavlm"),
    "qwen3_moe_eager": ("moe_worker:EagerTransformers", "moe_worker:MoeMegavlm"),
}
"""Both systems of each shape, as "module:class"."""


@contextlib.contextmanager
def _system(name: str, shape: str, pack_length: int) -> Iterator[System]:
    module, _, kind = SYSTEMS[shape][name == "megavlm"].partition(":")
    if name == "transformers":
        yield getattr(importlib.import_module(module), kind)(pack_length)
        return
    from megavlm.parallel.device import prepare_device

    prepare_device()
    from megavlm.config.schema import ParallelConfig
    from megavlm.parallel.state import process_groups

    with process_groups(ParallelConfig(), 1):
        yield getattr(importlib.import_module(module), kind)(pack_length)


def _samples(shape: str, folder: str, mix: str) -> list[Any]:
    if shape == "qwen2_5_vl":
        from vs_native import make

        return make(int(folder))
    return load(Path(folder) / f"{mix}.npz")


def main() -> None:
    """Answer jobs until standard input ends."""
    name, shape, folder, pack_length, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may write where the answers go
    sys.modules["vs_worker"] = sys.modules["__main__"]  # other modules' systems are kinds of these
    with _system(name, shape, int(pack_length)) as system:
        ready: dict[tuple[str, str], Iterator[tuple[Any, Work]]] = {}
        for line in sys.stdin:
            job = json.loads(line)
            key = job["mix"], job["batching"]
            if key not in ready:
                samples = _samples(shape, folder, job["mix"])
                ready[key] = itertools.cycle(system.batches(samples, job["batching"]))
            total = Work()
            for _ in range(job["steps"]):
                batch, work = next(ready[key])
                batch = system.ready(batch)
                start, cpu_start = time.perf_counter(), time.process_time()
                work.loss = system.step(batch)
                work.seconds = time.perf_counter() - start
                work.cpu_seconds = time.process_time() - cpu_start
                total.add(work)
            said = {**asdict(total), "parameters": system.parameters, **system.told()}
            print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    main()
