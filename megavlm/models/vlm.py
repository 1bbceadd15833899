"""The vision-language model: a tower and a connector in front of a language model, cut into pipeline stages.

Shape legend: S positions of a pack, N views of its images, Q features of a view, T image slots, E width of the language
model, V the padded vocabulary; 1 stands for the batch dimension: a micro-batch is one pack.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.architectures.context import BuildContext
from megavlm.config import architecture as registry
from megavlm.config.schema import ModelConfig
from megavlm.data.positions import positions_of
from megavlm.data.spans import spans_of
from megavlm.layers.cross import tell_pictures
from megavlm.layers.cross_beside import slots_of_samples, tell_samples
from megavlm.layers.segments import context_split
from megavlm.models.front import build_front, encode, encode_shared, replicated
from megavlm.models.fusion import BESIDE, FEATURES, Extras, Fusion, build_fusion
from megavlm.models.streams import PictureStream, Streams, cut_for_ranks, one_after_the_other
from megavlm.parallel.context import ContextSplit
from megavlm.parallel.replicas import mark_everywhere, mark_on_all_stages


class VisionLanguageModel(MegatronModule):
    """One pipeline chunk of the whole model; only the first chunk holds tower and connector.

    Args:
        model: the recipe's ``model`` branch.
        context: layout, number type, layer implementation.
        image_token_id: the token whose embedding is replaced by image features (``<imgpad>``).
        pre_process: this is the first chunk.
        post_process: this is the last chunk.
        vp_stage: index of the chunk on its stage, with a virtual pipeline.
    """

    def __init__(
        self,
        model: ModelConfig,
        context: BuildContext,
        image_token_id: int,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        registry.load()
        context = replace(context, deepstack=model.vision.deepstack)
        language = registry.LANGUAGE.find(model.language.preset).build(
            model.language, context, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        super().__init__(config=language.config)
        self.settings = model
        self.padding_token = int(image_token_id == 0)
        """What fills packs of prompts up: no slot of an image, as 0 is where ``<unk>`` is."""
        self._experts = any(model.language.expert_layers)
        # What Megatron-Core's schedules and gradient finalisation look for.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        self.vision: Any = None
        self.connector: Any = None
        self.fusion: Fusion | None = None
        if pre_process:
            self.vision, self.connector = build_front(model, context)
            self.fusion = build_fusion(model, self.connector, context, image_token_id)
        self.replicas, self.apart = replicated(model, context), context.vision_apart
        self.streams = _streams(language, model, vp_stage)
        self._received: Tensor | None = None
        self.own_positions = positions_of(model, image_token_id)
        self.two_way_spans = spans_of(model, image_token_id)
        self.language = language

    @property
    def decoder(self) -> Any:
        """The language model's layers, where Megatron-Core's schedules and CUDA graphs look for them."""
        return self.language.decoder

    @property
    def crosses(self) -> bool:
        """Whether layers attend to pictures, of any chunk."""
        return isinstance(self.streams, PictureStream)

    def rows_beside(self, packed: PackedSeqParams, image_grid: Tensor | None, *, learns: bool) -> int:
        """Return the rows that go over boundaries with a micro-batch, with sequence parallelism this rank's.

        Args:
            packed: its pack.
            image_grid: of its pictures, where they have sizes of their own.
            learns: whether it is trained on: there is a row of features then, if only of zeros.
        """
        if not isinstance(self.streams, PictureStream):
            return 0
        return self.streams.rows_for(self._features_beside(packed, image_grid, learns=learns), self.config.hidden_size)

    def _features_beside(self, packed: PackedSeqParams, image_grid: Tensor | None, *, learns: bool) -> int:
        """Return the features that a micro-batch's layers attend to, with sequence parallelism this rank's."""
        if not self.crosses:
            return 0
        if self.settings.language.feature_width:
            pictures = sum(slots_of_samples(packed)) // self.settings.tokens_per_view
            rows = pictures * self._rows_a_picture
        else:
            rows = 0 if image_grid is None else sum(self._rows_of_pictures(image_grid))
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return -(-max(rows, int(learns)) // ranks)

    @property
    def _rows_a_picture(self) -> int:
        """Features of one picture that layers attend to while others stand among the tokens."""
        return self.settings.vision.patches_per_image * self.settings.vision.features_past[0]

    def _rows_of_pictures(self, image_grid: Tensor) -> list[int]:
        return [self.settings.vision.rows_of(one) for one in image_grid.tolist()]

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the activations of the previous stage (called by Megatron-Core's schedules)."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Return the weight that embedding and output layer share, for Megatron-Core."""
        return self.language.shared_embedding_or_output_weight()

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        image_weight: Tensor | None = None,
        image_grid: Tensor | None = None,
        view_features: Tensor | None = None,
        segment_sources: Tensor | None = None,
    ) -> Tensor:
        """Run this chunk.

        Args:
            tokens: [1, S] int64, all of the pack on every rank; S is CP times smaller in what follows.
            position_ids: [1, S] int64, from 0 in each segment; or [1, 3, S] (``own_positions``). Rotary angles go by
                those in ``packed_seq_params``.
            packed_seq_params: segment borders, for every stage.
            labels: [1, S] int64 token to predict; positions that do not count hold any valid id.
            images: first chunk: [N, 3, H, W], uint8 or normalised floats; N may be 0. With ``image_grid``
                [P, F] patches.
            image_features: first chunk: [T, E] instead of ``images``, where they are known already: of the slots, as
                :meth:`arranged` returns them.
            image_index: first chunk, with ``images``: where their features go, see :meth:`arranged`.
            image_weight: the same.
            image_grid: [N, 3] int64 on the host: frames, rows and columns of patches of each picture, where pictures
                have sizes of their own. Every chunk needs it where layers attend to pictures.
            view_features: first chunk: [Q, N, E] features instead of ``images``, where others have encoded these.
            segment_sources: [G] int64, for every stage: -1 for a segment of padding, which routers of experts do not
                count; None where there is none.

        Returns:
            Last chunk: [1, S] loss per position, or [1, S, V / TP] logits without labels. Else [S, 1, E]
            activations (S / TP with sequence parallelism), and behind them what travels beside (``streams.py``).
        """
        decoder_input, beside, extras = None, None, None
        if self.settings.language.feature_width:
            tell_samples(packed_seq_params, self.settings.tokens_per_view, self._rows_a_picture)
        elif self.crosses and image_grid is not None:
            tell_pictures(packed_seq_params, self._rows_of_pictures(image_grid))
        if view_features is not None and self.fusion is not None:
            image_features = self.arranged(view_features, image_index, image_weight)
        if self.fusion is not None:
            decoder_input, beside, extras = self._fused(
                self.fusion, tokens, position_ids, images, image_features, image_index, image_weight, image_grid,
                context_split(packed_seq_params),
            )  # fmt: skip
        elif self._received is not None:
            hidden, beside = self.streams.split(
                self._received,
                self._features_beside(packed_seq_params, image_grid, learns=torch.is_grad_enabled()),
            )
            self.language.set_input_tensor(hidden)
        self._received = None
        output = self.language(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=packed_seq_params,
            extra_block_kwargs=extras
            if beside is None or not self.streams.taken
            else {"context": beside, **(extras or {})},
            **self._padding(packed_seq_params, segment_sources, position_ids.size(-1)),
        )
        return output if self.post_process else self.streams.join(output, beside)

    def _padding(self, packed: PackedSeqParams, segment_sources: Tensor | None, length: int) -> dict[str, Tensor]:
        """Return [1, S] where there is padding (S / TP with sequence parallelism), for layers with experts alone."""
        if segment_sources is None or not self._experts:
            return {}
        lengths, split = packed.cu_seqlens_q.diff().long(), context_split(packed)
        if split is not None:  # every rank has as much of each segment
            lengths = lengths // split.size
        mask_1S = torch.repeat_interleave(segment_sources < 0, lengths, output_size=length)[None]
        if split is not None:
            mask_1S = mask_1S | ~split.own_real(mask_1S.device)
        if self.config.sequence_parallel:
            group = mpu.get_tensor_model_parallel_group()
            mask_1S = mask_1S.chunk(group.size(), dim=1)[group.rank()]
        return {"padding_mask": mask_1S}

    def _fused(
        self,
        fusion: Fusion,
        tokens: Tensor,
        position_ids: Tensor,
        images: Tensor | None,
        image_features: Tensor | None,
        image_index: Tensor | None,
        image_weight: Tensor | None,
        image_grid: Tensor | None,
        split: ContextSplit | None,
    ) -> tuple[Tensor, Tensor | None, Extras]:
        """Return the first layer's input [S, 1, E] (S / TP with sequence parallelism), and what the layers get with it.

        Of a pack that context-parallel ranks share, it is cut here: all of them embed and fuse all of it.

        That is [R * S, 1, E], what goes beside the stream, and arguments of this chunk's block.

        A function of its own, so that nothing that it makes on the way is held while the layers run.
        """
        empty = image_features is None and (images is None or images.size(0) == 0)
        if (
            image_features is None
            and (features_QNE := self.encode_images(images, image_grid, shared=split is not None)) is not None
        ):
            image_features = self.arranged(features_QNE, None if empty else image_index, image_weight)
        tokens = fusion.written(tokens, image_features)
        embeddings_S1E = self.language.embedding(input_ids=tokens, position_ids=position_ids)
        fused_S1E, extras = fusion.fuse(embeddings_S1E, image_features, tokens, stand_in=empty)
        if split is not None:
            rows = split.own_rows(fused_S1E.device)
            fused_S1E = fused_S1E.index_select(0, rows)
            if extras is not None and BESIDE in extras:
                extras = {**extras, BESIDE: extras[BESIDE].index_select(0, rows)}
        if self.config.sequence_parallel:
            fused_S1E = scatter_to_sequence_parallel_region(fused_S1E)
        if torch.is_grad_enabled() and not fused_S1E.requires_grad:
            # Activation recompute and the pipeline need a path for gradients even if all below is frozen.
            fused_S1E = fused_S1E.detach().requires_grad_()
        shared = self.config.sequence_parallel
        if extras is not None and FEATURES in extras:
            features_F1E = cut_for_ranks(extras[FEATURES]) if shared else extras[FEATURES]
            return fused_S1E, features_F1E, {name: value for name, value in extras.items() if name != FEATURES} or None
        if extras is None or BESIDE not in extras:
            return fused_S1E, None, extras
        width = embeddings_S1E.size(-1)
        beside = one_after_the_other(extras[BESIDE], width, sequence_parallel=shared)
        return fused_S1E, beside, {name: value for name, value in extras.items() if name != BESIDE} or None

    def encode_images(
        self, images: Tensor | None, grid: Tensor | None = None, *, shared: bool = False
    ) -> Tensor | None:
        """Return [Q, N, E] features of ``images``, or None where there are none and none are needed.

        With the ``grid`` of pictures that have sizes of their own, they are [Q, 1, E], one picture after the other.

        For a training micro-batch without images, one empty picture stands in wherever tower or connector
        learn; :meth:`forward` gives it no weight. Gradients are then zero rather than missing: overlapped gradient
        reduction would wait for missing ones forever.

        With ``shared``, context-parallel ranks, which all call this with the same pictures, encode a part of them each.
        """
        assert self.vision is not None and self.connector is not None
        missing = images is None or images.size(0) == 0
        if missing and (self.apart or not torch.is_grad_enabled()):
            return None
        trains_vision = any(p.requires_grad for p in self.vision.parameters())
        if missing:
            if not trains_vision and not any(p.requires_grad for p in self.connector.parameters()):
                return None
            images, grid = self._empty_picture()
        assert images is not None
        # An empty picture is the same on all ranks, and its features go nowhere: nothing to share out.
        replicas = frozenset[str]() if missing else self.replicas
        work = encode_shared if shared and not missing else encode
        return work(self.vision, self.connector, images, grid, trains_vision=trains_vision, replicas=replicas)

    def _empty_picture(self) -> tuple[Tensor, Tensor | None]:
        """Return the pixels of the picture that stands in where there are none, and its grid if it has one."""
        if self.settings.vision.packed:
            pixels, grid = self.vision.empty(self.connector_device())
            return pixels, grid
        shape = (1, *self.settings.vision.pixel_shape)
        return torch.zeros(shape, dtype=torch.uint8, device=self.connector_device()), None

    def arranged(
        self, features_QNE: Tensor, image_index: Tensor | None = None, image_weight: Tensor | None = None
    ) -> Tensor:
        """Return the features [T, E] of the image slots, from those of the views.

        Args:
            features_QNE: what :meth:`encode_images` returns.
            image_index: [T, K] which of them stand where, see ``megavlm.models.fusion``; None for in their order.
            image_weight: [T, K] of these; None where K is 1.
        """
        assert self.fusion is not None
        return self.fusion.arranged(features_QNE, image_index, image_weight)

    def connector_device(self) -> torch.device:
        """Return the device that images belong on."""
        return next(itertools.chain(self.connector.parameters(), self.vision.parameters())).device


def _streams(language: Any, model: ModelConfig, vp_stage: int | None) -> Streams | PictureStream:
    """Return what goes beside the residual stream of a chunk."""
    levels, crossed, width = model.vision.deepstack, model.language.attending_layers, model.language.feature_width
    if not levels and not crossed:
        return Streams(0, 0, 0)
    config = language.config
    first = get_transformer_layer_offset(config, vp_stage)
    if crossed:
        return PictureStream.of_chunk(crossed, first, len(language.decoder.layers), width or None)
    whole = get_num_layers_to_build(config, None if vp_stage is None else 0, 0)
    return Streams.of_chunk(levels, first, len(language.decoder.layers), whole)


def build_chunks(model: ModelConfig, context: BuildContext, image_token_id: int) -> list[VisionLanguageModel]:
    """Build the chunks of this rank's pipeline stage (one, or several with a virtual pipeline)."""
    virtual = context.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunks.append(
            VisionLanguageModel(
                model,
                context,
                image_token_id,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
            )
        )
    if context.vision_apart:
        _hold_vision(chunks[0], model, context, image_token_id)
    return chunks


def _hold_vision(chunk: VisionLanguageModel, model: ModelConfig, context: BuildContext, image_token_id: int) -> None:
    """Let a stage's first chunk hold tower and connector, whatever the stage."""
    if chunk.vision is None:
        # The random state of other placements, whose later stages draw nothing here; the first rank's weights come.
        with torch.random.fork_rng():
            chunk.vision, chunk.connector = build_front(model, context)
            build_fusion(model, chunk.connector, context, image_token_id)  # its weights are the connector's
    for part in (chunk.vision, chunk.connector):
        mark_everywhere(part) if context.vision_whole else mark_on_all_stages(part)
    if context.vision_whole and chunk.fusion is not None and mpu.get_tensor_model_parallel_rank() > 0:
        chunk.fusion.learns = False
