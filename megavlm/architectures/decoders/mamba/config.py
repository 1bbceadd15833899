"""Keys of Mamba language models, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import LanguageConfig, ParallelConfig

_OWN = "model.language"


@config_class
class MambaConfig(LanguageConfig):
    """The Mamba language model: layers of one norm and one mixer, with RMSNorm and without attention or MLP."""

    num_layers: int = Field(gt=0, le=10_000)
    """Number of layers."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the model."""
    intermediate_size: int = Field(gt=0, le=10_000_000)
    """Channels of a mixer (twice hidden_size in the published ones); divisible by the tensor-parallel size."""
    state_size: int = Field(default=16, gt=0, le=10_000)
    """Numbers of each channel's state."""
    conv_kernel: int = Field(default=4, gt=1, le=1000)
    """Positions that a mixer's convolution sees, the own one among them."""
    time_step_rank: int = Field(gt=0, le=1_000_000)
    """Rank of the projection that makes the step sizes (hidden_size / 16 in the published ones)."""
    vocab_size: int = Field(gt=0, le=10_000_000)
    """Rows of the embedding; at least the tokenizer's size. Padded to a multiple of vocab_divisor x TP inside."""
    vocab_divisor: Annotated[int, Meaning.RUN] = Field(default=128, gt=0, le=1_000_000)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Annotated[int, Meaning.RUN] = Field(default=2048, gt=0, le=1_000_000_000)
    """Longest segment that the model is meant for: nothing ends there, but it was trained with no longer ones."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of the norms."""
    tie_word_embeddings: bool = True
    """Whether embedding and output layer share their weight."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights of the linear layers and of the embedding; output projections get it
    divided by sqrt(2 x layers)."""

    @property
    def recurrent(self) -> bool:
        """It is."""
        return True

    @property
    def fused_rotary(self) -> bool:
        """There are no heads to turn."""
        return False


def rules(language: MambaConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from divides(f"{_OWN}.intermediate_size", language.intermediate_size, layout.tensor_model_parallel_size, TP)
    if layout.recompute_granularity == "selective":
        yield (
            "parallel.recompute_granularity: selective is for the core of attention, which Mamba has not (its scan is"
            " always computed again); set it to full or null"
        )
