"""The typed tree that a recipe fills: every key of ``megavlm train``, its type, default and meaning.

The string under a field is its help text (``megavlm train --help``), so write it for users. The keys of a model's
branches are those of its architectures; what a preset gives has no default, ``families.presets`` fills it in first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from megavlm.config.architecture import Branch
from megavlm.config.fields import Meaning, config_class
from megavlm.config.image import ImageConfig as ImageConfig
from megavlm.config.logs import LoggingConfig
from megavlm.config.loss import LossConfig
from megavlm.config.parallel import ParallelConfig as ParallelConfig
from megavlm.config.towers import Colours, Rendered, TowerPart
from megavlm.config.traits import ConnectorTraits, LanguageTraits, VisionTraits
from megavlm.config.video import VideoConfig as VideoConfig


@config_class
class VisionConfig(VisionTraits, Rendered):
    """The vision tower: pictures to features. Each architecture has a class of keys of its own.

    What other rooms may ask of any tower is declared here; an architecture's class has it as keys or properties.
    """

    preset: str
    """Name of a registered vision preset; it gives the other keys of this branch their defaults."""
    tensor_parallel: Annotated[Literal["auto", "shard", "replicate"], Meaning.RUN] = "auto"
    """How the tower lies on the tensor-parallel ranks: shard (each layer is cut), replicate (each rank has all of it,
    and encodes a part of the pictures), or auto: shard where they divide its heads and widths, else replicate."""

    if TYPE_CHECKING:
        image_size: int  # side of the square that the tower is made for, in pixels
        hidden_size: int  # width of the layers
        num_layers: int  # for layer-wise decay
        layernorm_epsilon: float  # connectors with norms take it over
        image_mean: tuple[float, float, float]
        image_std: tuple[float, float, float]

        def __getattr__(self, name: str) -> Any: ...  # keys of its architecture alone

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the features of one picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many features a picture has")

    @property
    def packed(self) -> bool:
        """Whether it takes pictures of any size, as flat patches with the grid of each; else equal squares."""
        return False

    @property
    def deepstack(self) -> int:
        """Layers of the tower whose features are added behind as many language layers, from the first on."""
        return 0

    @property
    def feature_size(self) -> int:
        """Width of a feature."""
        return self.hidden_size

    def rows_of(self, patches: Sequence[int]) -> int:
        """Return the features of a picture of so many frames, rows and columns of patches, where it is ``packed``."""
        return math.prod(patches)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the squares that it takes of one picture: several where it is two towers that each take one."""
        return (int(self.image_size),)

    @property
    def colours(self) -> tuple[Colours, ...]:
        """Mean and deviation of red, green and blue of each of these squares."""
        return ((self.image_mean, self.image_std),)

    @property
    def towers(self) -> tuple[TowerPart, ...]:
        """Itself, or the towers that it is made of."""
        return (TowerPart("", self.num_layers, 1.0),)

    @property
    def patches_per_image(self) -> int:
        """Patches of one picture, each of which has a feature."""
        rows, columns = self.grid
        return rows * columns


@config_class
class ConnectorConfig(ConnectorTraits):
    """The module between tower and language model. Each architecture has a class of keys of its own."""

    preset: str
    """Name of a registered connector (docs/connectors.md): linear, mlpNx_gelu with a number for N, resampler, .."""
    tensor_parallel: Annotated[Literal["auto", "shard", "replicate"], Meaning.RUN] = "auto"
    """How the connector lies on the tensor-parallel ranks; see model.vision.tensor_parallel."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # keys of its architecture alone

    @property
    def packed(self) -> bool:
        """Whether it takes the features of a packed tower: of pictures of any size, one after the other, in blocks."""
        return False

    @property
    def level(self) -> ConnectorConfig:
        """The connector of each level of a deepstack; the same, unless a class says else."""
        return self

    @property
    def spatial(self) -> bool:
        """Whether the tokens of a square of patches are a square too, each where its patches are; not of queries."""
        return getattr(self, "num_queries", None) is None

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Return the tokens that features of so many rows and columns become; one each, unless a class says else."""
        return grid[0] * grid[1]


@config_class
class LanguageConfig(LanguageTraits):
    """The decoder-only language model. Each architecture has a class of keys of its own.

    What other rooms may ask of any language model is declared here.
    """

    preset: str
    """Name of a registered language preset; it gives the other keys of this branch their defaults."""

    if TYPE_CHECKING:
        num_layers: int
        hidden_size: int
        vocab_size: int  # rows of the embedding, without padding
        max_position_embeddings: int  # longest segment that the model is meant for
        tie_word_embeddings: bool

        def __getattr__(self, name: str) -> Any: ...  # keys of its architecture alone

    @property
    def position_axes(self) -> int:
        """Numbers of a token's position: 1, or 3 where it has a time, a row and a column of its own (M-RoPE)."""
        return 1

    @property
    def two_way(self) -> Literal["prefix", "images"] | None:
        """Positions that see those behind them: all in front of the first answer, or those of a picture; None: none."""
        return None

    @property
    def takes_deepstack(self) -> bool:
        """Whether it can add features behind its first layers (``BuildContext.deepstack``)."""
        return False

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each of its layers has a mixture of experts in its MLP's place; or nothing, where none has."""
        return ()

    @property
    def fused_rotary(self) -> bool:
        """Whether Transformer Engine's kernel can turn its heads (``engine.apply_rope_fusion``)."""
        return True

    @property
    def ntk_length(self) -> int | None:
        """Tokens of a prompt above which generation widens the rotary base (dynamic NTK); None for never."""
        return None

    @property
    def logn_length(self) -> int | None:
        """Position from which on generation scales queries (logn attention); None for never."""
        return None


@config_class
class ModelConfig:
    """What is trained: a vision tower, a connector and a language model."""

    preset: str | None = None
    """Name of a registered whole model (tiny, qwen_vl_7b, codefuse_vl_14b): sets the presets of the three branches."""
    template: str = "qwen_vl"
    """How conversations are written (docs/templates.md): the name of a registered chat template, or checkpoint for the
    chat_template that the model's own directory carries."""
    vision: Annotated[VisionConfig, Branch("vision")]
    """The vision tower."""
    connector: Annotated[ConnectorConfig, Branch("connector")]
    """The connector."""
    language: Annotated[LanguageConfig, Branch("language")]
    """The language model."""
    image: ImageConfig = Field(default_factory=ImageConfig)
    """What becomes of pictures."""
    video: VideoConfig = Field(default_factory=VideoConfig)
    """What becomes of films."""

    @property
    def tokens_per_view(self) -> int:
        """Features that tower and connector make of one view; a picture's tokens: ``megavlm.data.media.plan_of``."""
        return self.connector.tokens_of(self.vision.grid)


@config_class
class EngineConfig:
    """Number formats and kernels: FP8, communication overlap, fusions (docs/precision.md)."""

    fp8: Literal["e4m3", "hybrid"] | None = None
    """Multiply matrices in FP8: hybrid (E4M3, gradients E5M2), e4m3 for all, or null for none. Needs
    training.precision bf16, Transformer Engine and a GPU of compute capability 8.9 or more."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 values are scaled: by the largest value of past steps (delayed), of the tensor itself (tensorwise, also
    called current scaling), of each block of 128 (blockwise: Hopper, CUDA 12.9), of each 32 (mxfp8: Blackwell)."""
    fp8_margin: int = Field(default=0, ge=0)
    """With delayed: powers of two that scales stay below the largest value that FP8 holds."""
    fp8_amax_history_len: int = Field(default=1024, gt=0)
    """With delayed: steps whose largest values are remembered."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """With delayed: take the largest of these values, or the last one."""
    fp8_wgrad: bool = True
    """With delayed: also compute the gradients of weights in FP8 (the others always do)."""
    fp8_param_gather: bool = False
    """Keep the weights of FP8 layers in FP8 and gather them so between data-parallel ranks; the fp32 masters stay.
    Needs parallel.use_distributed_optimizer; not with mxfp8."""
    first_last_layers_bf16: bool = False
    """Keep the first and last layers of the language model in BF16; not with delayed."""
    num_layers_at_start_in_bf16: int = Field(default=1, ge=0)
    """With first_last_layers_bf16: how many at the start."""
    num_layers_at_end_in_bf16: int = Field(default=1, ge=0)
    """With first_last_layers_bf16: how many at the end."""
    vision_bf16: bool = True
    """Keep the vision tower in BF16 though the language model computes in FP8."""
    connector_bf16: bool = True
    """Keep the connector in BF16 though the language model computes in FP8."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication of the language model with its matrix products (Transformer Engine's user
    buffers); needs TP > 1 on one node, and parallel.sequence_parallel."""
    bias_activation_fusion: Literal["auto", "on", "off"] = "auto"
    """Fused activation of the language model's MLP; auto: on a GPU."""
    bias_dropout_fusion: Literal["auto", "on", "off"] = "auto"
    """Fused bias and residual sum; auto: on a GPU."""
    apply_rope_fusion: Literal["auto", "on", "off"] = "auto"
    """Transformer Engine's rotary kernel; auto: with Transformer Engine's layers."""
    gradient_accumulation_fusion: Literal["auto", "on", "off"] = "auto"
    """Add weight gradients to their fp32 sums inside the matrix product; needs NVIDIA Apex; auto: where it is built."""
    cross_entropy_loss_fusion: Literal["auto", "on", "off"] = "auto"
    """Fused loss; auto: on a GPU, in bf16."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """Whose fused loss: Megatron-Core's or Transformer Engine's."""
    cuda_graph_impl: Literal["none", "transformer_engine"] = "none"
    """Replay the MLPs of the language layers as CUDA graphs from the fourth step on, instead of launching their kernels
    one by one. Attention stays out: the number of a pack's segments changes. Needs bf16 and Transformer Engine."""


@config_class
class DataSource:
    """One data set of a blend."""

    path: str
    """Directory that megavlm prepare wrote; or what it reads, which is then prepared once, in data.cache: a file of
    JSON, JSON lines, parquet or tar, a directory of these, a saved Hugging Face data set, or a URL (s3://, gs://)."""
    images: str | None = None
    """Of plain data: directory, or URL, that paths of pictures start from; null for where the data is."""
    format: str | None = None
    """Of plain data: its format, as megavlm prepare --help lists them; null for what it looks like."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this data set in the blend, relative to the others."""
    name: str | None = None
    """Name in logs and TensorBoard; null for the directory's name."""
    task: str | None = None
    """With loss.kind task_mean: the task that this data set belongs to, which may have several; null for its name."""
    loss_weight: float = Field(default=1.0, gt=0)
    """With loss.kind task_mean: weight of the task's mean, relative to the others in the step."""


@config_class
class DataConfig:
    """Where samples come from and how they become micro-batches."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """Data sets to train on, blended by weight."""
    validation: tuple[DataSource, ...] = ()
    """Held-out data sets, each evaluated for itself."""
    cache: str | None = None
    """Directory in which plain data is prepared, shared by runs; null for megavlm/data in XDG_CACHE_HOME, or in
    ~/.cache. On several nodes, one that all see; else each node prepares its own."""
    tokenizer: str | None = None
    """Tokenizer file (.tiktoken, tokenizer.json or a SentencePiece .model), or a directory with one in it.
    Null for the one that lies in the checkpoint that checkpoint.load names."""
    sequence_length: int = Field(gt=0, le=1_000_000_000)
    """Tokens of one pack (one micro-batch)."""
    packing: Literal["carry_over", "none"] = "carry_over"
    """carry_over fills packs exactly and carries samples over; none puts one sample in each pack."""
    packing_buffer_size: int = Field(default=256, gt=0, le=1_000_000_000)
    """Samples among which the packer chooses."""
    shuffle_buffer_size: int = Field(default=256, gt=0, le=1_000_000_000)
    """Samples among which the reader shuffles."""
    num_workers: int = Field(default=1, ge=0)
    """Reader processes per data-parallel rank."""
    image_decoder: Literal["auto", "dali", "simplejpeg", "pil"] = "auto"
    """Image decoding: auto takes DALI where a GPU is, else simplejpeg."""
    image_alpha: Literal["white", "drop"] = "white"
    """What is transparent in a picture: white shows it over white, as a person sees it; drop shows the colours that lie
    under it, mostly black, as models have seen it whose processor calls convert("RGB")."""
    prefetch_steps: int = Field(default=2, gt=0)
    """Steps that are read and decoded ahead."""
    system_message: str | None = None
    """System turn put before each conversation that has none; empty for none, null for that of model.template."""
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """A sample that cannot be used is left out, counted by its cause and listed in output_dir/quarantine-N.jsonl
    (N: the data-parallel rank); more than this share of the samples read so far ends the run."""
    max_bad_after_samples: int = Field(default=1000, gt=0)
    """Samples to read, over all readers, before max_bad_fraction counts."""
    balance_images: bool = True
    """Among the samples that fill a pack equally well, take those that make its number of images the average, and run
    the packs of a step in the order in which the pipeline waits least for its first stage. False packs by length
    alone and keeps the order of reading, as a run did that was started before this key."""


@config_class
class ModuleTraining:
    """How one of the three modules learns."""

    freeze: bool = False
    """Keep this module's weights as they are."""
    lr_multiplier: float = Field(default=1.0, gt=0)
    """Factor on the learning rate."""
    layer_decay: float = Field(default=1.0, gt=0, le=1.0)
    """Layer-wise decay: the learning rate of layer i is multiplied by this to the power of its
    distance from the top."""


@config_class
class ModulesConfig:
    """Training of the parts: frozen or not, with which share of the learning rate."""

    vision: ModuleTraining = Field(default_factory=ModuleTraining)
    """The vision tower."""
    connector: ModuleTraining = Field(default_factory=ModuleTraining)
    """The connector; layer_decay must stay 1."""
    language: ModuleTraining = Field(default_factory=ModuleTraining)
    """The language model; layer_decay must stay 1."""


@config_class
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate of the last step (cosine, WSD): as in Megatron-Core, the schedule reaches its end in the last step,
    not after it, so with 0 the last step changes no weight."""
    schedule: Literal["cosine", "constant", "WSD"] = "cosine"
    """Shape after warm-up: cosine to min_lr, constant, or warm-up-stable-decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    wsd_decay_steps: int | None = Field(default=None, gt=0)
    """With WSD: steps of the final decay (cosine) to min_lr."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW beta1."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW beta2."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""


@config_class
class TrainingConfig:
    """The loop."""

    train_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps of the whole run; null with epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead of train_steps: passes over data.train, as steps of what its samples fill when they are packed. Of
    several data sets the one counts that takes longest by its size and weight; the others are passed more often."""
    global_batch_size: int = Field(gt=0, le=1_000_000_000)
    """Packs per step over all data-parallel ranks; divisible by the data-parallel size."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute type; bf16 keeps fp32 master weights and reduces gradients in fp32."""
    seed: int = Field(default=1234, ge=0, le=2**62)
    """Seed of the initial weights and of the data order."""
    exit_after_minutes: float | None = Field(default=None, gt=0)
    """Save a checkpoint and leave with exit code 0 after this time; null for never."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """A step whose loss or gradient is not finite, on any rank, changes nothing and is counted; more than this many in
    a row end the run."""
    loss_spike_factor: float | None = Field(default=None, gt=1)
    """Skip a step whose loss is more than this factor above its running mean (after 20 steps); null for never."""
    validation_interval: int | None = Field(default=None, gt=0)
    """Steps between validations; null for none."""
    validation_packs: int = Field(default=16, gt=0)
    """Packs per validation data set, over all data-parallel ranks."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, of a run whose epochs were counted."""
        assert self.train_steps is not None
        return self.train_steps


@config_class
class CheckpointConfig:
    """Saving and resuming."""

    save_interval: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; null saves only at the end (and when exit_after_minutes ends the run)."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints in a thread while training goes on, from a copy in host memory."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (a full disk) does to the run: stop, or continue with a warning."""
    resume: bool = True
    """Go on from the newest checkpoint in output_dir, if there is one."""
    load: str | None = None
    """Checkpoint whose weights to start from (fresh optimizer and step 0), or a Hugging Face directory: model,
    template, image plan and tokenizer are then its own, and its weights are converted once; ignored when resuming."""
    converted_dir: str | None = None
    """Where Hugging Face directories are converted to, for this run and others; null for a directory "converted" beside
    output_dir."""
    export_hf: Literal["last", "every"] | int | None = None
    """Also write a Hugging Face directory to output_dir/hf, in the background: of the last checkpoint, of every one, or
    of those of every so many steps and the last; null for none. Of adapters there are two: merged, and as PEFT's."""
    lock_timeout_seconds: float = Field(default=60.0, ge=1)
    """One run at a time has output_dir. Where the run that has it cannot be seen, as it is on another machine or in
    another container, it is taken for dead once it has given no sign of life for this long, and output_dir is taken
    over."""


@config_class
class LoraConfig:
    """LoRA and Q-LoRA: the language model learns through adapters beside frozen weights (docs/finetuning.md)."""

    rank: int | None = Field(default=None, gt=0)
    """Rank of the adapters; null for none. Needs checkpoint.load, their base: checkpoints hold what learns alone."""
    alpha: float = Field(default=16.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the adapters."""
    targets: tuple[str, ...] = ()
    """Layers with adapters, by the ends of their Hugging Face names: of Qwen v1 c_attn, attn.c_proj, w1, w2, mlp.c_proj
    (c_proj: both); of Llama, Qwen2 and Qwen3 q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj (of every
    expert too; experts.gate_proj: of routed ones; cross_attn.q_proj: of pictures alone); of CogVLM
    language_expert_query_key_value, vision_mlp.up_proj and so on; all-linear: all of them."""
    train_embeddings: bool = False
    """Let the embedding's own weights learn beside the adapters."""
    train_head: bool = False
    """Let the output layer's own weights learn beside the adapters."""
    train_norms: bool = False
    """Let the weights of the language model's norms learn beside the adapters (TinyGPT-V); their biases stay."""
    quantize: Literal["nf4"] | None = None
    """Q-LoRA: keep the frozen weights of the language model's layers in 4 bits (NF4, double quantisation); null keeps
    them in training.precision. Needs bitsandbytes."""


@config_class
class Recipe:
    """A whole training run."""

    output_dir: str
    """Directory of the run: checkpoints, TensorBoard files, the resolved recipe."""
    model: ModelConfig
    """The model."""
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """The layout."""
    data: DataConfig
    """The data."""
    modules: ModulesConfig = Field(default_factory=ModulesConfig)
    """Training of the parts."""
    optimizer: OptimizerConfig
    """Optimizer and schedule."""
    training: TrainingConfig
    """The loop."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    """Logs."""
    loss: LossConfig = Field(default_factory=LossConfig)
    """The loss."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """Number formats and kernels."""
    lora: LoraConfig = Field(default_factory=LoraConfig)
    """Adapters."""
