"""How the next token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megavlm.config.errors import UserError

NO_TOKEN = -1
"""What is chosen where the logits allow no choice: one is NaN or infinite, or none is above minus infinity."""

_GREEDY_BELOW = 1e-5
"""Temperatures from which on the best token is taken, as vLLM does: a float32 holds the reciprocal of no tiny one."""
_LEAST_PENALTY = 1e-200
"""Smaller penalties choose the same tokens, and a float64 holds any logit divided by this one."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the best token, and so does what is below 1e-5.
        top_k: choose among the best k tokens; 0 for all.
        top_p: choose among the fewest best tokens whose probabilities reach this sum; 1 for all, 0 for the best alone.
        repetition_penalty: logits of tokens that the prompt or the answer has are divided by this where they are
            positive and multiplied where they are negative (CTRL, arXiv 1909.05858); 1 for none.
        seed: of the draws; prompt i draws from seed + i, whatever is answered beside it and at whatever layout.
        report: with each token come its log probability and those of so many best tokens; None for neither. They are
            the model's own, before all of the above.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    report: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("temperature", self.temperature <= 1e6, "at most 1,000,000"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite"),
        )
        for name, good, rule in rules:
            if not good:
                raise UserError(f"{name}: {getattr(self, name)} must be {rule}")

    def generator(self, index: int) -> torch.Generator:
        """Return the source of random numbers of prompt ``index``."""
        return torch.Generator().manual_seed((self.seed + index) % 2**63)


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
