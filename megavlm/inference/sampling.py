"""How the next token is chosen from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    Attributes:
        temperature: divides the logits; 0 takes the best token.
        top_k: choose among the best k tokens; 0 for all.
        top_p: choose among the fewest best tokens whose probabilities reach this sum; 1 for all.
        repetition_penalty: logits of tokens that the prompt or the answer has are divided by this where they are
            positive and multiplied where they are negative (CTRL, arXiv 1909.05858); 1 for none.
        seed: of the draws; prompt i draws from seed + i, whatever is answered beside it and at whatever layout.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, good, rule in rules:
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)} must be {rule}")

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

    Args:
        logits_KV: [K, V] logits; equal on all tensor-parallel ranks.
        sampling: how, for all or for each.
        seen: tokens of prompt and answer so far, for each; looked at only with a repetition penalty.
        generators: of each answer.

    Returns:
        [K] int64 on the logits' device.
    """
    if not isinstance(sampling, Sampling):
        # Seeds are in the generators.
        kinds = {replace(one, seed=0) for one in sampling}
        if len(kinds) > 1:
            rows = [slice(k, k + 1) for k in range(len(sampling))]
            each = [choose(logits_KV[row], sampling[row.start], seen[row], generators[row]) for row in rows]
            return torch.cat(each)
        sampling = kinds.pop() if kinds else Sampling()
    logits = logits_KV.float()
    if sampling.repetition_penalty != 1.0:
        logits = logits.clone()
        for row, tokens in zip(logits, seen, strict=True):
            index = torch.tensor(sorted({token for token in tokens if 0 <= token < row.numel()}), device=row.device)
            values = row[index]
            penalty = sampling.repetition_penalty
            row[index] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.temperature == 0.0 or not generators:
        return logits.argmax(-1)
    probabilities = filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1).cpu()
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn).to(logits.device)


def filtered(logits_KV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the logits with those that may not be chosen at minus infinity; the best one always may."""
    if 0 < top_k < logits_KV.size(-1):
        lowest = logits_KV.topk(top_k, dim=-1).values[..., -1:]
        logits_KV = logits_KV.masked_fill(logits_KV < lowest, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits_KV.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits_KV = logits_KV.masked_fill(dropped, float("-inf"))
    return logits_KV
