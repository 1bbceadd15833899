"""One job of ``gpu_check``: how long a save keeps training waiting, against copying its bytes to the host."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any


def save(job: dict[str, Any]) -> dict[str, Any]:
    """Save a model with its optimizer: synchronously, and three times asynchronously; copy the same bytes, pinned."""
    from gpu_job import SIZES, make_batches
    from pydantic import TypeAdapter

    from megavlm.parallel.device import has_cuda, prepare_device, synchronize

    prepare_device()
    import torch

    from megavlm.checkpoint.saver import Saver, State
    from megavlm.config.schema import Recipe
    from megavlm.families.presets import expand_presets
    from megavlm.parallel.state import process_groups
    from megavlm.training.build import build_training
    from megavlm.training.step import train_step

    model = dict(SIZES["small"]["model"])
    if not job.get("small"):
        model["language"] = {
            "num_layers": 2, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32,
            "num_query_groups": 32, "kv_channels": 128, "vocab_size": 8192,
        }  # fmt: skip
    tree = {
        "output_dir": "unused",
        "model": model,
        "optimizer": {"lr": 1e-4},
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": 256},
        "training": {"train_steps": 10, "global_batch_size": 2, "precision": "bf16"},
    }
    recipe = TypeAdapter(Recipe).validate_python(expand_presets(tree))
    with process_groups(recipe.parallel, 1), tempfile.TemporaryDirectory() as folder:
        training = build_training(recipe, recipe.model.language.vocab_size - 1)
        (batches,) = make_batches(recipe, {"size": "small"}, recipe.model.language.vocab_size - 1, steps=1)
        training.scheduler.step(1)
        train_step(training.chunks, training.optimizer, batches, num_sources=1)
        tensors = [p for module in training.modules for p in module.parameters()]
        trained = sum(p.numel() for p in tensors if p.requires_grad)
        size = sum(p.nbytes for p in tensors) + 12 * trained

        def one_save(number: int, *, asynchronous: bool) -> float:
            state = State(
                modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler,
                reader={}, run={"step": number}, recipe_yaml="",
            )  # fmt: skip
            saver.asynchronous = asynchronous
            synchronize()
            saver.save(state)
            stalled = saver.stalled_seconds
            saver.finish()
            return stalled

        saver = Saver(Path(folder), keep=1)
        synchronous = one_save(1, asynchronous=False)
        stalls = [one_save(number, asynchronous=True) for number in (2, 3, 4)]
    result: dict[str, Any] = {"gib": size / 2**30, "synchronous_s": synchronous, "asynchronous_s": stalls}
    if has_cuda():
        device = torch.empty(size // 4, dtype=torch.float32, device="cuda")
        host = torch.empty(size // 4, dtype=torch.float32, pin_memory=True)
        host.copy_(device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        host.copy_(device, non_blocking=True)
        torch.cuda.synchronize()
        result["copy_s"] = time.perf_counter() - start
    return result
