"""Keys of encoder-decoder language models, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, divides
from megavlm.config.schema import LanguageConfig, ParallelConfig

_OWN = "model.language"


@config_class
class EncoderDecoderConfig(LanguageConfig):
    """The encoder-decoder language model: T5's, with a gated MLP and an output layer of its own.

    Pictures and words in front of an answer go to the encoder, the answer to the decoder. It is trained, and does not
    answer.
    """

    num_layers: int = Field(gt=0, le=10_000)
    """Number of layers of the encoder, and of the decoder."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the model."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP, which has a gate; divisible by the tensor-parallel size."""
    num_attention_heads: int = Field(gt=0, le=1_000_000)
    """Attention heads; divisible by the tensor-parallel size."""
    kv_channels: int = Field(gt=0, le=1_000_000)
    """Width of one attention head."""
    activation: Literal["gelu_tanh", "silu"] = "gelu_tanh"
    """Activation of the MLP's gate."""
    relative_buckets: int = Field(default=32, gt=3, le=10_000)
    """Distances between positions that have a bias of their own, in the encoder half of them before and half behind."""
    relative_farthest: int = Field(default=128, gt=1, le=1_000_000)
    """Distance from which on all share one bias."""
    vocab_size: int = Field(gt=0, le=10_000_000)
    """Rows of the embedding; at least the tokenizer's size. Padded to a multiple of vocab_divisor x TP inside."""
    vocab_divisor: Annotated[int, Meaning.RUN] = Field(default=128, gt=0, le=1_000_000)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Annotated[int, Meaning.RUN] = Field(default=8192, gt=0, le=1_000_000_000)
    """Longest segment that the model is meant for; biases by distance end nowhere."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights of the linear layers, of the embedding and of the biases by distance;
    output projections get it divided by sqrt(2 x layers), and queries by sqrt(kv_channels)."""

    @property  # type: ignore[misc]
    def tie_word_embeddings(self) -> bool:
        """They are two weights."""
        return False

    @property
    def num_query_groups(self) -> int:
        """Each head has keys and values of its own."""
        return self.num_attention_heads

    @property
    def two_way(self) -> Literal["prefix"]:
        """What stands in front of the answer goes to the encoder."""
        return "prefix"

    @property
    def encodes(self) -> bool:
        """It does."""
        return True

    @property
    def fused_rotary(self) -> bool:
        """No head is turned."""
        return False


def rules(language: EncoderDecoderConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    for key in ("num_attention_heads", "ffn_hidden_size"):
        yield from divides(f"{_OWN}.{key}", getattr(language, key), layout.tensor_model_parallel_size, TP)
    if language.relative_farthest <= language.relative_buckets // 2:
        yield (
            f"{_OWN}.relative_farthest: {language.relative_farthest} is no more than the distances that have a bias"
            f" each (half of relative_buckets, {language.relative_buckets}); take more"
        )
    for key, why in (
        ("pipeline_model_parallel_size", "an encoder and a decoder are not cut into stages"),
        ("context_parallel_size", "an encoder-decoder's packs are not cut over ranks"),
    ):
        if getattr(layout, key) > 1:
            yield f"parallel.{key}: {why} (model.language.preset {language.preset}); set it to 1"
