"""Answers prompts at one layout from given weights; writes the token ids. Run under torchrun.

Arguments: JSON file with ``parallel``, ``weights`` (a checkpoint, made here if it does not exist), ``out``, and
``language`` for keys of the language model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from generate_prompts import VOCABULARY, prompts  # noqa: E402
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.inference.generate import generate  # noqa: E402
from megavlm.inference.sampling import Sampling  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "small_cache": {"cached_positions": 100},
    "sampled": {"sampling": Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=4)},
}


def main() -> None:
    """Generate and write."""
    job = json.loads(Path(sys.argv[1]).read_text())
    # Larger weights than usual: the answers differ between prompts, and the best token is clear.
    wide = {"init_method_std": 0.2}
    recipe = tiny_recipe()
    model = wide_model(recipe, wide)
    model["language"] |= job["language"]
    recipe = tiny_recipe(parallel=job["parallel"], model=model)
    with process_groups(recipe.parallel, 3):
        chunks = build_model(recipe, IMAGE_TOKEN)
        weights = Path(job["weights"])
        modules = [unwrap(chunk) for chunk in chunks]
        if not weights.exists():
            checkpoint.save_weights(weights.parent, modules)
        checkpoint.load(weights, modules=modules)
        answers = generate(
            chunks,
            prompts(),
            max_new_tokens=6,
            stop_ids=[VOCABULARY - 1],
            vocab_size=VOCABULARY,
            pack_length=SEQUENCE_LENGTH,
        )
        again = {}
        for name, options in VARIANTS.items():
            again[name] = generate(
                chunks, prompts(), max_new_tokens=6, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY,
                pack_length=SEQUENCE_LENGTH, **options,
            )  # fmt: skip
        gathered: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, answers)
        assert all(part == answers for part in gathered), "ranks disagree"
        if dist.get_rank() == 0:
            result = {"answers": answers, **again}
            if dist.get_world_size() == 1:
                result["naive"] = [naive(chunks[0], prompt) for prompt in prompts()]
            Path(job["out"]).write_text(json.dumps(result))


def wide_model(recipe, wide):
    """The recipe's model branch with larger initial weights."""
    from megavlm.config.help import to_tree

    tree = to_tree(recipe)["model"]
    weights = ("vision", "connector", "language")
    return {name: {**branch, **wide} if name in weights else branch for name, branch in tree.items()}


@torch.no_grad()
def naive(chunk, prompt) -> list[int]:
    """Greedy decoding of one prompt in the plainest way: one pack per token, images encoded each time."""
    from megavlm.inference.generate import pack_prompts

    chunk.eval()
    for _ in range(6):
        batch = pack_prompts([prompt], len(prompt))
        logits = chunk(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            packed_seq_params=batch.packed_seq_params,
            images=prompt.images,
        )
        token = int(logits[0, -1, :VOCABULARY].argmax())
        if token == VOCABULARY - 1:
            break
        prompt.answer.append(token)
    return prompt.answer


if __name__ == "__main__":
    main()
