"""How the next token is chosen from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megavlm.inference.sampling import NO_TOKEN, Sampling

_GREEDY_BELOW = 1e-5
"""Temperatures from which on the best token is taken, as vLLM does: a float32 holds the reciprocal of no tiny one."""
_LEAST_PENALTY = 1e-200
"""Smaller penalties choose the same tokens, and a float64 holds any logit divided by this one."""


def choose(
    logits_KV: Tensor,
    sampling: Sampling | Sequence[Sampling],
    seen: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Choose a token for each of K answers.

    Whatever the logits and the (checked) sampling of one row are, nothing is raised and no other row changes: one rank
    that stopped here would leave the others waiting.

    Args:
        logits_KV: [K, V] logits; equal on all tensor-parallel ranks.
        sampling: how, for all or for each.
        seen: tokens of prompt and answer so far, for each; looked at only with a repetition penalty.
        generators: of each answer.

    Returns:
        [K] int64 on the logits' device; :data:`NO_TOKEN` where there is no choice.
    """
    if not isinstance(sampling, Sampling):
        # Seeds are in the generators.
        kinds = {replace(one, seed=0, report=None) for one in sampling}
        if len(kinds) > 1:
            rows = [slice(k, k + 1) for k in range(len(sampling))]
            each = [choose(logits_KV[row], sampling[row.start], seen[row], generators[row]) for row in rows]
            return torch.cat(each)
        sampling = kinds.pop() if kinds else Sampling()
    scores = logits_KV.float()
    if sampling.only is not None:
        first, stop = sampling.only
        inside = torch.full_like(scores, float("-inf"))
        inside[:, first:stop] = scores[:, first:stop]
        scores = inside
    if sampling.repetition_penalty != 1.0:
        scores = scores.double()
        penalty = max(sampling.repetition_penalty, _LEAST_PENALTY)
        for row, tokens in zip(scores, seen, strict=True):
            known = sorted({token for token in tokens if 0 <= token < row.numel()})
            index = torch.tensor(known, dtype=torch.int64, device=row.device)
            values = row[index]
            row[index] = torch.where(values > 0, values / penalty, values * penalty)
    best = scores.amax(-1, keepdim=True)  # NaN where one is
    sound = best.isfinite()
    if sampling.temperature < _GREEDY_BELOW or not generators:
        chosen = scores.argmax(-1)
    else:
        # From the best downwards: what cannot be held becomes minus infinity and is never drawn.
        scores = torch.where(sound, scores - best, 0).float()
        kept = filtered(scores / sampling.temperature, sampling.top_k, sampling.top_p)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(kept.softmax(-1).cpu(), generators, strict=True)
        ]
        chosen = torch.cat(drawn).to(scores.device)
    return torch.where(sound[:, 0], chosen, NO_TOKEN)


def filtered(logits_KV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the logits with those that may not be chosen at minus infinity; the best one always may."""
    if 0 < top_k < logits_KV.size(-1):
        lowest = logits_KV.topk(top_k, dim=-1).values[..., -1:]
        logits_KV = logits_KV.masked_fill(logits_KV < lowest, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits_KV.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = before >= top_p
        beyond[..., 0] = False
        dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
        logits_KV = logits_KV.masked_fill(dropped, float("-inf"))
    return logits_KV


def log_probabilities(logits_KV: Tensor, chosen_K: Tensor, most: int) -> Tensor:
    """Return what was chosen, its log probability, and the ``most`` best tokens with theirs.

    Args:
        logits_KV: [K, V] logits.
        chosen_K: [K] int64 tokens, or :data:`NO_TOKEN`.
        most: B; at most V.

    Returns:
        [K, 2 + 2B] float64, which holds token ids exactly: chosen, its log probability, B ids, B log probabilities.
    """
    logs = logits_KV.float().log_softmax(-1)
    own = logs.gather(-1, chosen_K.clamp(min=0)[:, None])
    best = logs.topk(min(most, logs.size(-1)), dim=-1)
    return torch.cat([part.double() for part in (chosen_K[:, None], own, best.indices, best.values)], dim=-1)
