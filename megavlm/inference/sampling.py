"""What users say about how tokens are chosen, checked. Commands do so before they load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError

if TYPE_CHECKING:
    import torch

NO_TOKEN = -1
"""What is chosen where the logits allow no choice: one is NaN or infinite, or none is above minus infinity."""


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
        only: choose among the tokens from the first of these two up to the one in front of the second; None for all. So
            a model says a picture, where its pictures are tokens.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    report: int | None = None
    only: tuple[int, int] | None = None

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
        import torch  # noqa: PLC0415 - see above

        return torch.Generator().manual_seed((self.seed + index) % 2**63)
