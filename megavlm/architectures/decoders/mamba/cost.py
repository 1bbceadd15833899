"""The cost of a Mamba language model: see :class:`megavlm.architectures.cost.DecoderCost`.

Read off the layers that ``build`` makes, in plain torch. mamba-ssm's kernels keep about the same: the scan's inputs,
and states between its blocks (their time is not measured).
"""

from __future__ import annotations

from megavlm.architectures.cost import Kernels, LayerPassage, LayerPassing, Shards, Work
from megavlm.architectures.decoders.mamba.config import MambaConfig
from megavlm.config.lora import targets_of
from megavlm.config.schema import LoraConfig

_BLOCK = 256
"""Positions between two states that are kept: ``layers/selective_scan.py``."""


def vocabulary(language: MambaConfig, tensor: int) -> int:
    """Return the rows of the embedding over all tensor-parallel ranks, padding among them."""
    multiple = language.vocab_divisor * tensor
    return -(-language.vocab_size // multiple) * multiple


def _small(language: MambaConfig) -> int:
    """Return what ``x_proj`` gives of a position."""
    return language.time_step_rank + 2 * language.state_size


def layer_parameters(language: MambaConfig, tensor: int) -> list[int]:
    """Return the elements of each parameter of one language layer on one rank."""
    hidden, own = language.hidden_size, language.intermediate_size // tensor
    return [
        hidden,
        *linear_parameters(language, tensor),
        own * language.conv_kernel,
        own,
        own * language.time_step_rank,
        own,
        own * language.state_size,
        own,
        own * hidden,
    ]


def linear_parameters(language: MambaConfig, tensor: int) -> list[int]:
    """Return the elements of the weights that adapters may stand beside."""
    own = language.intermediate_size // tensor
    return [2 * own * language.hidden_size, own * _small(language)]


def _beside(language: MambaConfig, lora: LoraConfig, tensor: int) -> list[tuple[int, int]]:
    """Return what each layer with adapters reads of a token on one rank, and gives."""
    own = language.intermediate_size // tensor
    widths = {"in_proj": (language.hidden_size, 2 * own), "x_proj": (own, _small(language))}
    return [widths[target.linear.partition(".")[2]] for target in targets_of(lora, language)]


def adapter_parameters(language: MambaConfig, lora: LoraConfig, tensor: int) -> list[int]:
    """Return the elements of each adapter parameter of one language layer on one rank."""
    assert lora.rank is not None
    return [lora.rank * width for widths in _beside(language, lora, tensor) for width in widths]


def adapter_widths(language: MambaConfig, lora: LoraConfig, tensor: int) -> tuple[int, int]:
    """Return the numbers of a token that the adapters of one language layer read, and that they add to."""
    found = _beside(language, lora, tensor)
    return sum(read for read, _ in found), sum(given for _, given in found)


def layer_work(language: MambaConfig, tokens: float, squared_lengths: float) -> Work:
    """Return the operations of a forward pass through one layer; they go with the tokens alone.

    Those of products, that of the states with what comes out of them among these. The convolution and the states' steps
    are element-wise, and not counted, as those of norms and activations are not.
    """
    hidden, inner = language.hidden_size, language.intermediate_size
    weights = 3 * hidden * inner + inner * (_small(language) + language.time_step_rank)
    return Work(products=2 * tokens * (weights + inner * language.state_size))


def layer_kept(language: MambaConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return the bytes that one language layer keeps without recomputation.

    That is the norm's input, and what it gives; what is mixed and its gate; what the convolution gives; the step sizes
    and what they are made of; what goes into ``out_proj``; the states between blocks; places in the pack.
    """
    b, own = kernels.number_bytes, language.intermediate_size // shards.tensor
    local = tokens // shards.tensor if shards.sequence_parallel else tokens
    stream = local * language.hidden_size
    norm = stream * b if kernels.fused else stream * (4 + b * int(learns))
    inputs = (stream + tokens * own) * b * int(learns)
    inside = tokens * (4 * own + _small(language)) * b
    states = -(-tokens // _BLOCK) * own * language.state_size * 4
    return norm + inputs + inside + states


def attention_kept(language: MambaConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool) -> int:
    """Return nothing: no layer attends, and selective recomputation is refused."""
    return 0


def adapters_kept(language: MambaConfig, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels) -> int:
    """Return the bytes that the adapters of one language layer keep: what A and B multiply."""
    assert lora.rank is not None
    b, local = kernels.number_bytes, tokens // shards.tensor if shards.sequence_parallel else tokens
    own = language.intermediate_size // shards.tensor
    reads = {"in_proj": local * language.hidden_size, "x_proj": tokens * own}
    names = [target.linear.partition(".")[2] for target in targets_of(lora, language)]
    # What the convolution gives is kept in any case.
    kept = sum(reads[name] * (b * int(name == "in_proj" or lora.dropout > 0) + int(lora.dropout > 0)) for name in names)
    return kept + len(names) * tokens * lora.rank * b


def shared_kept(language: MambaConfig, tokens: int) -> int:
    """Return nothing: there are no angles of positions."""
    return 0


def layer_passing(
    language: MambaConfig, lora: LoraConfig, shards: Shards, tokens: int, kernels: Kernels, *, learns: bool
) -> LayerPassing:
    """Return what comes and goes within a layer.

    In a block of the scan there are decays, what is added, states, products and sums of them, in fp32; backward their
    gradients too.
    """
    b, own = kernels.number_bytes, language.intermediate_size // shards.tensor
    local = tokens // shards.tensor if shards.sequence_parallel else tokens
    wide, stream = tokens * language.hidden_size * b, local * language.hidden_size * b
    block = 0 if kernels.fused else min(tokens, _BLOCK) * own * language.state_size * 4
    inner = tokens * own * b
    return LayerPassing(
        forward=max(wide + 2 * stream, 6 * block), backward=2 * stream + 7 * inner + 10 * block, gathered=0
    )


def layer_passage(language: MambaConfig, shards: Shards, tokens: int, kernels: Kernels) -> LayerPassage:
    """Return what a forward pass through one layer takes time for."""
    b, own, hidden = kernels.number_bytes, language.intermediate_size // shards.tensor, language.hidden_size
    local = tokens // shards.tensor if shards.sequence_parallel else tokens
    # Convolution, step sizes, scan: each channel's inputs are read and what comes out is written. Plain torch passes
    # over the states of all positions, in fp32, about ten times.
    states = 0 if kernels.fused else 40 * tokens * own * language.state_size
    return LayerPassage(
        products=((2 * own, hidden), (_small(language), own), (own, language.time_step_rank), (hidden, own)),
        heads=shards.tensor,
        width=1,
        moved=5 * local * hidden * b + 9 * tokens * own * b + states,
        gathered=0.0,
        cast_inputs=0.0,
        cast_gradients=0.0,
    )
