"""What ranks do with a small T5: loss and the gradient of every parameter, of packs of samples.

Pictures are rows of features in front of the question's embeddings, as PaLI-3 has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from t5_models import VOCAB, WIDTH, make, save  # noqa: E402
from text_cases import recipe_of, shard  # noqa: E402
from torch import Tensor  # noqa: E402

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.data.spans import TwoWaySpans  # noqa: E402
from megavlm.families.known import FAMILIES  # noqa: E402
from megavlm.families.presets import load_presets  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import run_batches  # noqa: E402
from megavlm.weights.source import Source  # noqa: E402

SLOT, PICTURE, PACK = VOCAB - 1, 4, 64
SAMPLES = ((17, 6), (9, 4), (12, 9))
"""Tokens of the question and of the answer; a pack has room for more."""
LOSS, GRADIENTS = 1e-5, 5e-5


def samples() -> list[tuple[Tensor, Tensor]]:
    """Return questions and answers; the second question begins with a picture."""
    generator = torch.Generator().manual_seed(2)
    found = [
        tuple(torch.randint(2, VOCAB - 1, (length,), generator=generator) for length in lengths) for lengths in SAMPLES
    ]
    return [(question, answer) for question, answer in found]


def features() -> Tensor:
    return torch.randn(PICTURE, WIDTH, generator=torch.Generator().manual_seed(4))


def logits_of(model: Any, question: Tensor, answer: Tensor, picture: Tensor | None) -> Tensor:
    """Return the logits of an answer's tokens."""
    asked = model.shared(question)
    if picture is not None:
        asked = torch.cat([picture, asked])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), answer[:-1]])
    return model(inputs_embeds=asked[None], decoder_input_ids=start[None]).logits[0]


def write_reference(directory: Path, path: Path, gate: str) -> dict[str, Any]:
    """Write a checkpoint and what its model computes, by the canonical names; return its language branch."""
    load_presets()
    model, weights = make(gate), Source(save(directory, gate))
    theirs = {name: weights.get(name) for name in weights.tensors}
    found: dict[str, Tensor] = {}
    logits = [logits_of(model, *sample, None) for sample in samples()]
    tokens = sum(len(answer) for _, answer in samples())
    loss = sum(F.cross_entropy(a, b[1], reduction="sum") for a, b in zip(logits, samples(), strict=True)) / tokens
    loss.backward()
    found |= {"loss": loss.detach().reshape(1), "logits": torch.cat(logits).detach()}
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    picture = features().requires_grad_()
    seen = logits_of(model, *samples()[1], picture)
    (seen * weights_like(seen)).sum().backward()
    found |= {"seen": seen.detach(), "picture": picture.grad}
    branch = FAMILIES["t5"].branches(Source(directory))["language"]
    recipe = recipe_of(branch, {})
    with alone():
        rules = make_rules(FAMILIES["t5"], recipe.model, "", family_slots(FAMILIES["t5"], recipe.model))
    for rule in rules:
        for kind, tensors in (("weight", theirs), ("gradient", gradients)):
            own = [tensors.pop(key) for key in rule.row.theirs]
            for key, value in zip(rule.row.ours, rule.to_ours(own), strict=True):
                assert value.abs().max() > 0, key
                found[f"{kind}.{key}"] = value.detach()
    assert set(theirs) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} and not gradients
    save_file({key: value.contiguous().clone() for key, value in found.items()}, path)
    return dict(branch)


def weights_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(5))


def batch_of(chosen: list[tuple[Tensor, Tensor]], slots: int = 0) -> Batch:
    """Return the pack of samples: question, the decoder's first token, answer. ``slots`` of a picture begin each."""
    ids = [
        torch.cat([torch.full((slots,), SLOT), question, torch.zeros(1, dtype=torch.int64), answer])
        for question, answer in chosen
    ]
    labels = [
        torch.cat([torch.full((len(one) - len(answer),), IGNORE_INDEX), answer])
        for one, (_, answer) in zip(ids, chosen, strict=True)
    ]
    return make_batch(make_pack(ids, PACK, labels=labels, spans=TwoWaySpans("prefix", SLOT)), None, local_device())


def compare_all(branches: dict[str, dict[str, Any]], folder: str, layout: dict[str, Any]) -> list[list[str]]:
    """Compare every gate; return the parameters that this rank has compared."""
    first = recipe_of(next(iter(branches.values())), layout)
    with process_groups(first.parallel, first.training.seed):
        return [
            compare(recipe_of(branch, layout), Source(Path(folder) / f"{gate}.safetensors"))
            for gate, branch in branches.items()
        ]


def compare(recipe: Recipe, wanted: Source) -> list[str]:
    """Compare the loss of a pack and all gradients; where one process has them, logits, and what a picture learns."""
    training = build_training(recipe, SLOT)
    module = training.modules[0]
    parameters = {key: one for key, one in module.named_parameters() if key.startswith("language.")}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(shard(wanted.get(f"weight.{key}"), parameter, key))
    module.language.eval()
    batch = batch_of(samples())
    report = run_batches(training.chunks, [batch], num_sources=1)
    loss, expected = float(report[0, 0] / report[0, 1]), float(wanted.get("loss"))
    assert abs(loss - expected) <= LOSS * expected, (loss, expected)
    scale = max(float(wanted.get(key).abs().max()) for key in wanted.tensors if key.startswith("gradient."))
    for key, parameter in parameters.items():
        off = float((parameter.main_grad - shard(wanted.get(f"gradient.{key}"), parameter, key)).abs().max())
        assert off <= GRADIENTS * scale, (key, off / scale)
    if recipe.parallel.tensor_model_parallel_size == 1:
        with torch.no_grad():
            logits = module(batch.tokens, batch.position_ids, batch.packed_seq_params)[0]
        borders = np.cumsum([0, *(q + 1 + a for q, a in SAMPLES)])
        own = [logits[stop - 1 - a : stop - 1, :VOCAB] for stop, (_, a) in zip(borders[1:], SAMPLES, strict=True)]
        close(torch.cat(own), wanted.get("logits"))
        picture = features().requires_grad_()
        one = batch_of(samples()[1:2], PICTURE)
        seen = module(one.tokens, one.position_ids, one.packed_seq_params, image_features=picture)[0]
        question, answer = SAMPLES[1]
        seen = seen[PICTURE + question : PICTURE + question + answer, :VOCAB]
        close(seen, wanted.get("seen"))
        (grad,) = torch.autograd.grad((seen * weights_like(seen)).sum(), picture)
        close(grad, wanted.get("picture"))
    return sorted(parameters)


def close(found: Tensor, wanted: Tensor) -> None:
    """Hold numbers against the reference's."""
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()
