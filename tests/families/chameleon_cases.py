"""What ranks do for :mod:`test_chameleon_codes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.checkpoint.distributed import load
from megavlm.config.load import load_recipe
from megavlm.data.schema import Turn
from megavlm.data.tokenizer import tokenizer_of
from megavlm.evaluation.parity import Sample, forward_sample
from megavlm.families.presets import expand_presets
from megavlm.inference.codes import answer_picture
from megavlm.inference.sampling import Sampling
from megavlm.inference.session import Asked, Session
from megavlm.models.build import build_model, unwrap
from megavlm.models.codes import saying_pictures
from megavlm.parallel import pipeline
from megavlm.parallel.state import is_last_stage, process_groups


def said(recipe: str, checkpoint: str, words: list[str]) -> dict[str, Any]:
    """Answer with a picture, and choose the same tokens again from whole forward passes, without a cache.

    Returns:
        The codes, those of the whole passes (on the last stage), and the largest text logit beside a picture's.
    """
    tree = load_recipe(Path(recipe), words, expand_presets)
    tokenizer = tokenizer_of(tree)
    with process_groups(tree.parallel, 1):
        chunks = build_model(tree, tokenizer.imgpad_id)
        load(Path(checkpoint), modules=[unwrap(chunk) for chunk in chunks])
        model = Session(tree, tokenizer, chunks, 512)
        asked = model.encoded(Asked((Turn("user", "draw a cat"),)))
        codes = answer_picture(model, asked, Sampling())
        drawn = answer_picture(model, asked, Sampling(temperature=1.0, seed=3))
        first, stop = tree.model.language.picture_tokens or (0, 0)
        assert asked.tokens is not None
        prompt = [*asked.tokens.tolist(), tokenizer.ids["<racm3:break>"]]
        ids = torch.tensor(prompt + [int(one) + first for one in codes])
        sample = Sample("s0", ids, torch.zeros(0, 3, 1, 1), [], None, {})
        logits = {}
        for says in (True, False):
            with pipeline.evaluating(chunks), torch.no_grad(), saying_pictures(chunks, says):
                logits[says] = forward_sample(chunks, sample, tree)
        found: dict[str, Any] = {"codes": codes.tolist(), "drawn": drawn.tolist(), "rank": dist.get_rank()}
        if is_last_stage():
            found["whole"] = _chosen(logits[True], len(prompt), first, stop)
            found["masked"] = float(logits[False][:, first:stop].max())
            found["others"] = bool(torch.equal(logits[True][:, :first], logits[False][:, :first]))
    return found


def _chosen(logits_SV: Tensor, prompt: int, first: int, stop: int) -> list[int]:
    return [int(one) for one in logits_SV[prompt - 1 : -1, first:stop].argmax(-1)]
