"""Keys of decoder-only language models, and the rules between them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field

from megavlm.architectures.decoders.decoder.experts import expert_rules
from megavlm.architectures.decoders.decoder.latent import LatentConfig, latent_rules
from megavlm.config.fields import Meaning, config_class
from megavlm.config.rules import TP, choices, divides
from megavlm.config.schema import ParallelConfig

_OWN = "model.language"


@config_class
class DecoderConfig(LatentConfig):
    """The decoder-only language model."""

    num_layers: int = Field(gt=0, le=10_000)
    """Number of transformer layers."""
    hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the model."""
    ffn_hidden_size: int = Field(gt=0, le=10_000_000)
    """Width of the MLP (of a gated one, half of what Qwen's config.json calls intermediate_size)."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Attention heads; divisible by the tensor-parallel size."""
    num_query_groups: int = Field(gt=0, le=100_000)
    """Key/value heads; equal to num_attention_heads for multi-head attention."""
    kv_channels: int = Field(gt=0, le=1_000_000)
    """Width of one attention head."""
    vocab_size: int = Field(gt=0, le=10_000_000)
    """Rows of the embedding; at least the tokenizer's size. Padded to a multiple of vocab_divisor x TP inside."""
    vocab_divisor: Annotated[int, Meaning.RUN] = Field(default=128, gt=0, le=1_000_000)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    max_position_embeddings: Annotated[int, Meaning.USE] = Field(gt=0, le=1_000_000_000)
    """Longest segment that the model is meant for."""
    output_vocab_size: int | None = Field(default=None, gt=0, le=10_000_000)
    """Rows of the output layer, where it has fewer than the embedding: the last tokens are never answered (Llama 3.2
    Vision, whose picture's token is one of eight such); null for vocab_size."""
    cross_attention_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that attend to features of pictures instead of to text, behind gates that begin closed
    (Llama 3.2 Vision); a picture is then one token, and no feature stands among the tokens."""
    attention_mask: Literal["causal", "prefix", "images"] = "causal"
    """Which positions of a sample see those behind them: none (causal); all in front of the first answer see each other
    (prefix: PaliGemma); or the features of a picture see each other (images: Gemma 3, as far as a window reaches)."""
    sliding_window: int | None = Field(default=None, gt=0, le=1_000_000_000)
    """Positions that each position attends to, itself among them (Phi-3-mini-4k: 2047); null for all before it."""
    sliding_window_pattern: int | None = Field(default=None, gt=1, le=10_000)
    """With sliding_window: every so manieth layer attends to all before it (Gemma 3: 6); null for a window in all."""
    rotary_base: int = Field(default=10000, gt=0, le=1_000_000_000_000)
    """Base of the rotary position embedding."""
    rope_local_base_freq: int | None = Field(default=None, gt=0, le=1_000_000_000_000)
    """Base in layers with a window, whose positions are not stretched either (Gemma 3: 10000); null for rotary_base."""
    rope_scaling: Literal["linear", "llama3"] | None = None
    """Stretching of rotary positions: linear (positions divided by rope_scaling_factor), llama3 (as Llama 3.1,
    low and high frequency factors 1 and 4, 8192 original positions), or null."""
    rope_scaling_factor: float = Field(default=1.0, ge=1)
    """Factor of rope_scaling; 1 without it."""
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Part of a head that rotary positions turn (Hugging Face: partial_rotary_factor); the rest has no position."""
    rotary_interleaved: bool = False
    """Turn neighbouring channels as a pair (GLM), instead of those half a head apart."""
    rotary_sections: tuple[int, ...] = ()
    """Of M-RoPE: how many of a head's pairs of channels turn by a token's place in time, by its row and by its column
    (Hugging Face: mrope_section). Empty for one position a token, counted from 0."""
    rotary_sections_interleaved: bool = False
    """With rotary_sections: time, row and column take turns over the pairs (Qwen3-VL; Hugging Face: mrope_interleaved),
    instead of having one stretch of them each."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of all norms; LayerNorm subtracts the mean and has a bias (Phi, StableLM)."""
    layernorm_zero_centered_gamma: bool = False
    """Norms multiply by 1 + their weight (Gemma), which starts at 0."""
    norm_epsilon: float = Field(default=1e-6, gt=0)
    """Epsilon of the norms."""
    add_qkv_bias: bool = True
    """Whether the QKV projection has a bias (Qwen v1, Qwen2: yes)."""
    add_bias_linear: bool = False
    """Whether all linear layers have a bias, QKV among them (Phi)."""
    visual_expert: bool = False
    """Whether each linear layer of attention and MLP has a second weight, for the slots of pictures (CogVLM); the last
    slot of a picture takes that of text."""
    cross_hidden_size: int | None = Field(default=None, gt=0, le=1_000_000)
    """With visual_expert: width of the features of a finer view of each picture, to which every layer attends behind
    self-attention while those of the first view stand among the tokens (CogAgent; a pair of towers makes both:
    model.vision.high_to layers). Null for none."""
    cross_compute_hidden_size: int | None = Field(default=None, gt=0, le=1_000_000)
    """With cross_hidden_size: width of that attention, of all its num_attention_heads heads (CogAgent: 1024)."""
    image_positions: Literal["counted", "shared"] = "counted"
    """Whether each slot of a picture has its own position, or all but the first and the last share one (CogVLM)."""
    lm_head_bias: bool = False
    """Whether the output layer has a bias (Phi)."""
    gated_linear_unit: bool = True
    """Whether the MLP's activation is multiplied by a second projection (not in Phi)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Activation of the MLP: silu, the exact gelu, or its tanh form (Gemma, Phi; Hugging Face: gelu_pytorch_tanh,
    gelu_new)."""
    use_parallel_residual: bool = False
    """Attention and MLP stand side by side: both read one norm, and both are added to the stream (Phi)."""
    embedding_multiplier: float = Field(default=1.0, gt=0)
    """Embeddings of tokens are multiplied by it, image features are not (Gemma: sqrt(hidden_size); MiniCPM: 12)."""
    residual_multiplier: float = Field(default=1.0, gt=0)
    """What attention and MLP give is multiplied by it before it is added (MiniCPM: 1.4 / sqrt(num_layers))."""
    logits_scaling: float = Field(default=1.0, gt=0)
    """Logits are divided by it (MiniCPM: hidden_size / 256)."""
    post_layernorms: bool = False
    """A norm also behind attention and behind the MLP, before what they give is added (Gemma 3; GLM-4, Hugging Face:
    post_self_attn_layernorm, post_mlp_layernorm)."""
    attention_branch_norm: bool = False
    """With use_parallel_residual: an RMSNorm of epsilon 1e-6 behind attention, before what it gives is added
    (TinyGPT-V: post_layernorm)."""
    pre_layernorms: bool = True
    """A norm in front of attention and one in front of the MLP; false, with post_layernorms, for those behind alone
    (Chameleon-34B; Hugging Face: swin_norm)."""
    query_pre_attn_scalar: float | None = Field(default=None, gt=0)
    """Scores of attention are divided by its root; null for the width of a head (Gemma 3 27B: 168)."""
    qk_layernorm: bool = False
    """Norm over each head's queries and keys (Qwen3)."""
    head_layernorm: bool = False
    """LayerNorm over each head's queries and keys, with a weight and a bias of that head's own (Chameleon)."""
    image_tokens: tuple[int, ...] = ()
    """The first of the tokens that pictures are written in, and the one behind the last (Chameleon: [4, 8196]). They
    are no part of the softmax, unless loss.image_tokens is above 0 or a picture is asked for. Empty where pictures are
    features."""
    tie_word_embeddings: bool = False
    """Whether embedding and output layer share their weight (Qwen v1: no)."""
    init_method_std: Annotated[float, Meaning.RUN] = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 x layers)."""
    seq_length: Annotated[int | None, Meaning.USE] = Field(default=None, gt=1, le=1_000_000_000)
    """Length that the model was trained with, for the next two keys (Qwen v1: 2048)."""
    use_dynamic_ntk: Annotated[bool, Meaning.USE] = False
    """In generation, widen the rotary base for prompts that are longer than seq_length (Qwen v1's dynamic NTK)."""
    use_logn_attn: Annotated[bool, Meaning.USE] = False
    """In generation, multiply queries past seq_length by log(position) / log(seq_length) (Qwen v1's logn attention)."""
    layer_names: Annotated[Literal["qwen", "llama", "phi3", "phi", "phi_fused", "internlm2", "glm"], Meaning.NAMES] = (
        "llama"
    )
    """Whose names lora.targets calls the layers by: qwen (v1: c_attn, attn.c_proj, w1, w2, mlp.c_proj), llama (and all
    that have its names: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj), phi3 (qkv_proj, o_proj,
    gate_up_proj, down_proj), phi (q_proj, k_proj, v_proj, dense, fc1, fc2), phi_fused (query_key_value, dense, fc1,
    fc2), internlm2 (wqkv, wo, w1, w3, w2) or glm (llama's with gate_up_proj). Presets set it."""

    @property
    def picture_tokens(self) -> tuple[int, int] | None:
        """As the key says; None too where it says something that a rule refuses."""
        return (self.image_tokens[0], self.image_tokens[1]) if len(self.image_tokens) == 2 else None

    @property
    def pre_norms(self) -> int:
        """Norms of a layer in front of its branches."""
        return int(self.pre_layernorms) * (1 if self.use_parallel_residual else 2)

    @property
    def post_norms(self) -> int:
        """Norms of a layer behind its branches."""
        return 2 * int(self.post_layernorms)

    @property
    def qkv_bias(self) -> bool:
        """Whether the QKV projection has a bias."""
        return self.add_qkv_bias or self.add_bias_linear

    @property
    def position_axes(self) -> int:
        """Three with M-RoPE: time, row, column."""
        return 3 if self.rotary_sections else 1

    @property
    def two_way(self) -> Literal["prefix", "images"] | None:
        """What the mask opens."""
        return None if self.attention_mask == "causal" else self.attention_mask

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """As the key says."""
        return self.cross_attention_layers

    @property
    def feature_width(self) -> int:
        """As the key says."""
        return self.cross_hidden_size or 0

    @property
    def output_rows(self) -> int:
        """As the key says."""
        return self.vocab_size if self.output_vocab_size is None else self.output_vocab_size

    @property
    def spans(self) -> Literal["prefix", "images", "cross"] | None:
        """What the mask opens, or the pictures, or who sees them."""
        if self.cross_attention_layers:
            return "cross"
        return "images" if self.visual_expert else self.two_way

    @property
    def one_weight(self) -> bool:
        """Not where there is one for each kind of token."""
        return not self.visual_expert

    @property
    def shared_positions(self) -> bool:
        """If asked for."""
        return self.image_positions == "shared"

    @property
    def takes_deepstack(self) -> bool:
        """It can, but for layers side by side, whose weights are two, or that attend to features: as built."""
        return not (self.use_parallel_residual or self.visual_expert or self.cross_attention_layers)

    @property
    def fused_rotary(self) -> bool:
        """Transformer Engine's kernel turns whole heads by one position."""
        if self.rope_local_base_freq is not None or self.shared_positions:
            return False
        return not self.rotary_sections and not self.rotary_interleaved and self.rotary_percent == 1.0

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are turned."""
        return int(self.kv_channels * self.rotary_percent)

    @property
    def ntk_length(self) -> int | None:
        """The trained length, with dynamic NTK."""
        return self.seq_length if self.use_dynamic_ntk else None

    @property
    def logn_length(self) -> int | None:
        """The trained length, with logn attention."""
        return self.seq_length if self.use_logn_attn else None


BRANCH_EPSILON = 1e-6
"""Of ``attention_branch_norm`` (``LlamaRMSNorm`` in modeling_phi.py of DLYuanGod/TinyGPT-V @ 83f6189b)."""
Function = TypeVar("Function", bound=Callable[..., Any])


def with_all_keys(function: Function) -> Function:
    """Let ``function(language, ..)`` be called with a branch of another package's class.

    Such a class may lack keys of :class:`DecoderConfig` that came later; they have their defaults then.
    """

    @functools.wraps(function)
    def called(language: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(language, DecoderConfig):
            keys = DecoderConfig.__pydantic_fields__  # type: ignore[attr-defined]
            language = DecoderConfig(**{key: getattr(language, key) for key in keys if hasattr(language, key)})
        return function(language, *args, **kwargs)

    return cast(Function, called)


def rules(language: DecoderConfig, layout: ParallelConfig) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    tp = layout.tensor_model_parallel_size
    heads, groups = language.num_attention_heads, language.num_query_groups
    yield from divides(f"{_OWN}.num_attention_heads", heads, tp, TP)
    yield from divides(f"{_OWN}.num_attention_heads", heads, groups, f"{_OWN}.num_query_groups")
    yield from _key_value_heads(language, tp)
    yield from divides(f"{_OWN}.ffn_hidden_size", language.ffn_hidden_size, tp, TP)
    if language.kv_channels % 2:
        yield f"{_OWN}.kv_channels: {language.kv_channels} is odd, and rotary positions turn pairs; make it even"
    yield from _rotary(language)
    if language.sliding_window_pattern is not None and language.sliding_window is None:
        yield f"{_OWN}.sliding_window_pattern: has no effect without {_OWN}.sliding_window; set that, or this to null"
    if language.rope_local_base_freq is not None and language.sliding_window is None:
        yield f"{_OWN}.rope_local_base_freq: has no effect without {_OWN}.sliding_window; set that, or this to null"
    if language.rope_local_base_freq is not None and language.rotary_sections:
        yield f"{_OWN}.rope_local_base_freq: is for positions of one number; set {_OWN}.rotary_sections to []"
    if language.post_layernorms and language.use_parallel_residual:
        yield f"{_OWN}.post_layernorms: not with attention and MLP side by side; set it to false"
    if language.attention_branch_norm and not language.use_parallel_residual:
        yield (
            f"{_OWN}.attention_branch_norm: is for attention and MLP side by side; set {_OWN}.use_parallel_residual to"
            " true, or this to false"
        )
    yield from _cross(language, tp)
    yield from _norms(language, tp)
    yield from _image_tokens(language)
    if language.lm_head_bias and language.tie_word_embeddings:
        yield f"{_OWN}.lm_head_bias: an output layer that is the embedding has no bias; set it to false"
    yield from _visual_expert(language)
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        if getattr(language, key) and language.seq_length is None:
            yield f"{_OWN}.{key}: needs {_OWN}.seq_length, the length that the model was trained with; set it"
    if language.seq_length is not None and not (language.use_dynamic_ntk or language.use_logn_attn):
        yield f"{_OWN}.seq_length: has no effect without {_OWN}.use_dynamic_ntk or use_logn_attn; set it to null"
    if language.rope_scaling is None and language.rope_scaling_factor != 1:
        yield (
            f"{_OWN}.rope_scaling_factor: {language.rope_scaling_factor:g} has no effect without {_OWN}.rope_scaling;"
            " set that to linear or llama3, or this to 1"
        )
    yield from expert_rules(language, layout)
    yield from latent_rules(language, layout)


def _norms(language: DecoderConfig, tp: int) -> Iterator[str]:
    """Check norms behind branches alone, and those of single heads."""
    if not language.pre_layernorms:
        key = f"{_OWN}.pre_layernorms: false"
        if not language.post_layernorms:
            yield f"{key} goes with norms behind attention and MLP; set {_OWN}.post_layernorms to true, or this to true"
        if language.visual_expert:
            yield f"{key} goes without {_OWN}.visual_expert; set one of them back"
        if language.num_moe_experts is not None:
            yield f"{key} goes without {_OWN}.num_moe_experts; set one of them back"
    if language.head_layernorm:
        key = f"{_OWN}.head_layernorm"
        if language.qk_layernorm:
            yield f"{key}: queries and keys have one norm; set this or {_OWN}.qk_layernorm to false"
        if language.cross_attention_layers:
            yield f"{key}: goes without {_OWN}.cross_attention_layers; set one of them back"
        if language.num_query_groups % tp:
            yield (
                f"{_OWN}.num_query_groups: {language.num_query_groups} is not divisible by {TP} ({tp}), and with {key}"
                f" ranks share no key/value heads; lower {TP}"
            )


def _image_tokens(language: DecoderConfig) -> Iterator[str]:
    """Check the range of the tokens of pictures."""
    given = language.image_tokens
    if given and not (len(given) == 2 and 0 <= given[0] < given[1] <= language.output_rows):
        yield (
            f"{_OWN}.image_tokens: {list(given)[:4]} are not the first of a run of tokens and the one behind its last,"
            f" of {language.output_rows}; correct it"
        )
    if given and language.cross_attention_layers:
        yield f"{_OWN}.image_tokens: go without {_OWN}.cross_attention_layers; set one of them back"


def _cross(language: DecoderConfig, tp: int) -> Iterator[str]:
    """Check the output layer's rows, and what layers that attend to pictures go with."""
    rows = language.output_vocab_size
    if rows is not None and rows > language.vocab_size:
        yield f"{_OWN}.output_vocab_size: {rows} is more than {_OWN}.vocab_size ({language.vocab_size}); lower it"
    if rows is not None and rows != language.vocab_size and language.tie_word_embeddings:
        yield f"{_OWN}.output_vocab_size: an output layer that is the embedding has its rows; set it to null"
    layers, last = language.cross_attention_layers, language.num_layers - 1
    if not layers:
        return
    if list(layers) != sorted(set(layers)) or not 0 <= min(layers) <= max(layers) <= last:
        yield f"{_OWN}.cross_attention_layers: {list(layers)[:20]} do not rise from 0 to {last} at most; correct them"
    if len(layers) > last:
        yield f"{_OWN}.cross_attention_layers: no layer is left that attends to text; leave some out"
    if language.num_query_groups % tp:
        yield (
            f"{_OWN}.num_query_groups: {language.num_query_groups} is not divisible by {TP} ({tp}), and with"
            f" {_OWN}.cross_attention_layers ranks share no key/value heads; lower {TP}"
        )
    plain = language.gated_linear_unit and language.activation == "silu" and not language.add_bias_linear
    other = not plain or language.use_parallel_residual or language.post_layernorms or language.residual_multiplier != 1
    if any(language.expert_layers):
        yield f"{_OWN}.cross_attention_layers: do not go with experts; set it to [], or {_OWN}.num_moe_experts to null"
    if other or language.attention_mask != "causal" or language.rotary_sections:
        yield (
            f"{_OWN}.cross_attention_layers: go with Llama's layers alone: a gated SiLU without biases, one norm before"
            " each branch, a causal mask, positions of one number; set it to [], or the others to Llama's"
        )


def _visual_expert(language: DecoderConfig) -> Iterator[str]:
    """Check what goes with weights for image tokens, and with positions that they share."""
    key = f"{_OWN}.visual_expert"
    if language.visual_expert:
        if language.qkv_bias:
            yield f"{key}: linear layers with a bias have one weight; set {_OWN}.add_qkv_bias, add_bias_linear to false"
        if language.use_parallel_residual:
            yield f"{key}: not with attention and MLP side by side; set {_OWN}.use_parallel_residual to false"
        if language.num_moe_experts is not None:
            yield f"{key}: not with {_OWN}.num_moe_experts; set one of them back"
        if not language.gated_linear_unit:
            yield f"{key}: is for an MLP with a gate; set {_OWN}.gated_linear_unit to true, or this to false"
        if language.attention_mask != "causal":
            yield f"{key}: goes with {_OWN}.attention_mask causal; set that, or this to false"
        yield from _features_beside(language)
        if language.cross_attention_layers:
            yield f"{key}: is for features among the tokens; set {_OWN}.cross_attention_layers to [], or this to false"
    elif language.cross_hidden_size is not None or language.cross_compute_hidden_size is not None:
        yield (
            f"{_OWN}.cross_hidden_size: attention to features beside text is built into layers with {key}; set that to"
            f" true, or this and {_OWN}.cross_compute_hidden_size to null"
        )
    if language.shared_positions:
        plain = {
            "rotary_sections": (),
            "rope_local_base_freq": None,
            "cross_attention_layers": (),
            "use_dynamic_ntk": False,
        }
        for name, value in plain.items():
            if getattr(language, name) != value:
                yield f"{_OWN}.image_positions: shared goes without {_OWN}.{name}; set one of them back"
        if language.use_logn_attn:
            yield f"{_OWN}.image_positions: shared goes without {_OWN}.use_logn_attn; set one of them back"


def _features_beside(language: DecoderConfig) -> Iterator[str]:
    """Check attention to features beside text."""
    width, heads = language.cross_compute_hidden_size, language.num_attention_heads
    if (width is None) != (language.cross_hidden_size is None):
        yield (f"{_OWN}.cross_compute_hidden_size: goes with {_OWN}.cross_hidden_size; set both, or both to null")
    elif width is not None:
        yield from divides(f"{_OWN}.cross_compute_hidden_size", width, heads, f"{_OWN}.num_attention_heads")
        if language.residual_multiplier != 1 or language.post_layernorms or language.normalization != "RMSNorm":
            yield (
                f"{_OWN}.cross_hidden_size: goes with RMSNorm, without {_OWN}.residual_multiplier and"
                f" {_OWN}.post_layernorms; set it to null, or these back"
            )


def _rotary(language: DecoderConfig) -> Iterator[str]:
    """Check which channels of a head are turned, and by what."""
    channels, sections = language.rotary_channels, language.rotary_sections
    if language.rotary_percent < 1 and (channels < 2 or channels % 2):
        yield (
            f"{_OWN}.rotary_percent: {language.rotary_percent:g} of {language.kv_channels} channels are {channels}, and"
            " rotary positions turn pairs; choose a part that is even"
        )
        return
    if not sections:
        if language.rotary_sections_interleaved:
            yield f"{_OWN}.rotary_sections_interleaved: has no effect without {_OWN}.rotary_sections; set that"
        return
    pairs = channels // 2
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs:
        yield (
            f"{_OWN}.rotary_sections: {list(sections)} are not the pairs of time, row and column; give three whole"
            f" numbers with the sum {pairs}, the pairs of a head that are turned"
        )
        return
    # Pair 3 i + 1 is the i-th of the rows, 3 i + 2 that of the columns; time has what is left.
    rows, columns = (pairs + 1) // 3, pairs // 3
    if language.rotary_sections_interleaved and (sections[1] > rows or sections[2] > columns):
        yield (
            f"{_OWN}.rotary_sections: {list(sections)} do not take turns over {pairs} pairs: row and column have at"
            f" most {rows} and {columns}; change them, or set {_OWN}.rotary_sections_interleaved to false"
        )
    for key in ("use_dynamic_ntk", "use_logn_attn"):
        if getattr(language, key):
            yield f"{_OWN}.{key}: counts tokens, and with {_OWN}.rotary_sections positions do not; set it to false"


def _key_value_heads(language: DecoderConfig, tp: int) -> Iterator[str]:
    """Check that each rank has whole key/value heads, or that several share one whole head.

    The number of heads is the model's own: what a user can change is the layout.
    """
    groups, width = language.num_query_groups, language.kv_channels

    def splits(size: int) -> bool:
        return groups % size == 0 or (size % groups == 0 and groups * width % size == 0)

    if splits(tp):
        return
    fitting = [n for n in range(1, language.num_attention_heads + 1) if language.num_attention_heads % n == 0]
    remedy = f"set {TP} to one of {choices([n for n in fitting if splits(n)])}"
    if groups % tp and tp % groups:
        yield (
            f"model.language.num_query_groups: {groups} is neither a multiple nor a divisor of {TP} ({tp}), so that"
            f" ranks would share key/value heads unevenly; {remedy}"
        )
    else:
        yield (
            f"model.language.kv_channels: the {groups} x {width} rows of the keys are not divisible by {TP} ({tp});"
            f" {remedy}"
        )


def products(language: DecoderConfig, tp: int) -> tuple[tuple[str, int, int], ...]:
    """Return the sizes of the layers' matrix products: key, number, ranks that share it."""
    heads = language.num_attention_heads * language.kv_channels
    groups = language.num_query_groups * language.kv_channels
    latents = ("kv_lora_rank", "q_lora_rank") if language.latent_attention else ()
    values = language.num_attention_heads * (language.v_head_dim or 0)
    free = language.num_attention_heads * (language.kv_channels - language.rotary_channels)
    return (
        *(((f"{_OWN}.v_head_dim", one, tp) for one in (values, free + values)) if latents else ()),
        *((f"{_OWN}.{name}", getattr(language, name), 1) for name in latents if getattr(language, name) is not None),
        (f"{_OWN}.hidden_size", language.hidden_size, 1),
        (f"{_OWN}.ffn_hidden_size", language.ffn_hidden_size, tp),
        (f"{_OWN}.kv_channels", heads, tp),
        (f"{_OWN}.kv_channels", heads + 2 * groups, tp),
    )
