"""Time of a step, predicted: operations over what a GPU gets done, bytes over what memory and wires carry.

Matrix products take their operations over the peak times an efficiency (``planning.gpus``); element-wise work its
bytes over the memory bandwidth; collectives their bytes over NVLink or the network, and a latency. What
Megatron-Core runs under other work (the reduction of input gradients under weight gradients; gradient reduction and
parameter gathering under the backward and forward pass) costs what is left over. benchmarks/planner_published.py holds
it against published runs.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from megavlm.architectures.cost import (
    Attention,
    Kernels,
    LayerPassage,
    Passage,
    adapter_products,
    cost_of,
    decoder_cost,
    expert_parameters,
    layer_kinds,
)
from megavlm.config.schema import LanguageConfig, Recipe
from megavlm.planning.activations import carried_streams, kernels_of, weights_learn
from megavlm.planning.apart import alone, feature_bytes, share_of_step
from megavlm.planning.experts import dispatch_seconds, kinds_of
from megavlm.planning.gpus import COLLECTIVE_SECONDS, KERNEL_SECONDS, Gpu
from megavlm.planning.layout import GPUS_PER_NODE, Chunk, Layout
from megavlm.planning.parameters import NF4_BYTES, apart_elements, learning_elements, replicated_elements
from megavlm.planning.passes import least_passes, passes, timeline
from megavlm.planning.reckoned import Reckoned, shards, splits
from megavlm.planning.schedule import Timeline
from megavlm.planning.seconds import Around, Cost, StepTime
from megavlm.planning.shares import gathered_features, share
from megavlm.planning.stage_flops import ChunkFlops, chunk_flops, planned_flops
from megavlm.planning.workload import Workload

_LAUNCHES = 20
"""Kernels of one layer, forward, at least."""
_FLASH_BACKWARD = 2.5
"""Fused attention backward over forward: five products for two, since scores are made again."""
_HOST_TO_DEVICE = 20e9
"""Bytes/s of pixels from the host."""
_TILE = 128
"""Keys of a query that fused attention computes beyond those that count: it works on tiles of some 128 x 128 scores."""
_TORCH_ATTENTION = 285e12
"""FLOP/s of torch's flash attention at most, in packs of 8192 on an H200 (benchmarks/gpu-torch.json): it is Ampere's
kernel. Transformer Engine has Hopper's."""
_CAST_BYTES = {"delayed": 4, "mxfp8": 4}
"""Bytes moved for each number that becomes FP8: read, and written as it is and transposed; scaling by what the tensor
itself holds reads it twice."""
_CURRENT_CAST_BYTES = 6


class Timer:
    """Times the parts of a recipe on one kind of GPU.

    Args:
        recipe: a checked recipe.
        layout: where it runs.
        gpu: on what.
        workload: an average pack.
        known: what other layouts of a search have in common with this one.
    """

    def __init__(
        self, recipe: Recipe, layout: Layout, gpu: Gpu, workload: Workload, known: Reckoned | None = None
    ) -> None:
        self.recipe, self.layout, self.gpu, self.known = recipe, layout, gpu, known or Reckoned()
        self.pack, self.workload = workload, workload.of_rank(layout.context)  # all of it, and what a rank has of it
        self.kernels: Kernels = kernels_of(recipe)
        # fp32 runs as TF32 on the tensor cores, at half the rate of bf16.
        self.peak = gpu.bf16_flops if self.kernels.number_bytes == 2 else gpu.bf16_flops / 2
        self._alike = shards(layout), layout.experts, recipe.parallel.recompute_granularity

    def _flops(self, chunk: Chunk) -> ChunkFlops:
        load = self.workload
        return chunk_flops(
            self.recipe,
            self.layout,
            chunk,
            tokens=load.tokens,
            squared_lengths=load.squared_lengths,
            images=load.seen,
        )

    def _gemm(self, flops: float, m: float, n: float, k: float, efficiency: float | None = None) -> float:
        """Return the seconds of products of ``flops``, each of the sizes m, n, k."""
        if self.gpu.rates is not None:
            # Measured in bf16; the share of the peak is taken to be that of other types too.
            return flops / (self.gpu.rates.product(m, n, k) * self.peak / self.gpu.bf16_flops)
        return flops / (self.peak * (efficiency or self.gpu.efficiency.gemm))

    def _passage(self, kind: LanguageConfig | None = None) -> LayerPassage:
        language = kind or layer_kinds(self.recipe.model.language)[0]
        return decoder_cost(language).layer_passage(language, self.layout, self.workload.tokens, self.kernels)

    def _linear(self, kind: LanguageConfig | None = None) -> float:
        """Return the seconds of a language layer's products, forward; they may be in FP8."""
        tokens, shapes = self.workload.tokens, self._passage(kind).products
        if self.kernels.fp8 and self.gpu.fp8_flops is not None:
            flops = sum(2 * tokens * rows * width for rows, width in shapes)
            return flops / (self.gpu.fp8_flops * self.gpu.efficiency.fp8_gemm)
        return sum(self._gemm(2 * tokens * rows * width, tokens, rows, width) for rows, width in shapes)

    def _attention(self, flops: float) -> float:
        """Return the seconds of causal attention in the workload's samples."""
        passage, length = self._passage(), self.workload.tokens / self.workload.samples
        return self._attend(Attention(flops, passage.heads, passage.width, length), self.layout.tensor, causal=True)

    def _attend(self, kind: Attention, ranks: int, *, causal: bool) -> float:
        """Return the seconds of ``kind.operations`` on one of the ``ranks`` that share its heads."""
        if self.gpu.rates is not None:
            rate = self.gpu.rates.attend(kind.length, kind.heads / ranks, kind.width, causal=causal)
            return kind.operations / (rate * self.peak / self.gpu.bf16_flops)
        rate = self.peak * self.gpu.efficiency.attention
        if not self.kernels.fused:
            rate = min(rate, _TORCH_ATTENTION)
        keys = kind.length / 2 if causal else kind.length  # half of them are masked
        return kind.operations * (1 + _TILE / keys) / rate

    def _casts(self) -> tuple[float, float]:
        """Return the seconds, forward and backward, of making FP8 numbers around a language layer's products."""
        if not self.kernels.fp8 or self.gpu.fp8_flops is None:
            return 0.0, 0.0
        passage, tokens, hidden = self._passage(), self.workload.tokens, self.recipe.model.language.hidden_size
        each = _CAST_BYTES.get(self.recipe.engine.fp8_recipe, _CURRENT_CAST_BYTES) * tokens
        inputs, gradients = passage.cast_inputs, passage.cast_gradients
        return self._stream(each * inputs, each * hidden), self._stream(each * gradients, each * hidden)

    def _stream(self, moved: float, each: float | None = None) -> float:
        """Return the seconds of passes over memory that move ``moved`` bytes, in tensors of ``each`` bytes."""
        if self.gpu.rates is not None:
            return moved / self.gpu.rates.stream(moved if each is None else each)
        return moved / (self.gpu.bandwidth * self.gpu.efficiency.memory)

    def _tensor_parallel(self, moved: float, count: int, *, beside_products: bool = False) -> float:
        """Return the seconds of ``count`` all-gathers or reduce-scatters of ``moved`` bytes each, in a node.

        ``beside_products``, they go in TP pieces under the product that needs or makes them where the recipe has
        ``engine.tp_comm_overlap``: one piece has no product to hide under.
        """
        tp = self.layout.tensor
        if tp == 1:
            return 0.0
        rate = self.gpu.nvlink * self.gpu.efficiency.nvlink
        pieces = tp if beside_products and self.recipe.engine.tp_comm_overlap else 1
        return count * (moved * (tp - 1) / tp / rate / pieces + COLLECTIVE_SECONDS)

    def _context_parallel(self, moved: float, attention: float) -> tuple[float, float]:
        """Return the seconds, forward and backward, that a layer waits for keys and values of the rest of the pack.

        ``moved`` are the bytes of one rank's. Transformer Engine's ring goes on beside these seconds of ``attention``,
        forward, and brings them again and their gradients, backward; torch's layers gather first.
        """
        wires = self._from_context(moved)
        if not self.kernels.fused:
            return wires, wires
        return max(wires - attention, 0.0), max(2 * wires - _FLASH_BACKWARD * attention, 0.0)

    def _from_context(self, moved: float) -> float:
        """Return the seconds in which a rank gets ``moved`` bytes from each of those that share its pack."""
        others = self.layout.context - 1
        return self._crossing(moved * others, inside=self.layout.context_in_node) if others else 0.0

    def _crossing(self, moved: float, *, inside: bool) -> float:
        """Return the seconds in which a rank sends ``moved`` bytes, inside of a node or to others."""
        rate = self.gpu.nvlink * self.gpu.efficiency.nvlink
        return moved / (rate if inside else self.gpu.network * self.gpu.efficiency.network) + COLLECTIVE_SECONDS

    def layer(self, kind: LanguageConfig | None = None) -> Cost:
        """Return the cost of one language layer; of the first one's kind, unless another is given."""
        language, tp, b = self.recipe.model.language, self.layout.tensor, self.kernels.number_bytes
        tokens = self.workload.tokens
        learns = weights_learn(self.recipe)
        work = self._flops(Chunk(0, 1, first=False, last=False))
        linear, attention = self._linear(kind), work.attention
        local = tokens // tp if self.layout.sequence_parallel else tokens
        stream, wide = local * language.hidden_size * b, tokens * language.hidden_size * b
        passage = self._passage(kind)
        gathered = passage.gathered
        moved = passage.moved * (1 if self.kernels.fused else 3)  # plain torch makes three times the passes over memory
        moved += 2 * gathered  # put in order, which is read and written
        sharing = self._tensor_parallel(gathered, 1) if gathered else 0.0
        sharing += 2 * dispatch_seconds(self.layout, self.gpu, passage.dispatched)  # to the experts and back
        wires = self._tensor_parallel(wide, 4, beside_products=True) + sharing
        ring, back_ring = self._context_parallel(passage.keys_and_values, self._attention(attention))
        casts, back_casts = self._casts()
        stream_seconds = self._stream(moved, stream)
        forward = max(linear + self._attention(attention) + stream_seconds + casts, _LAUNCHES * KERNEL_SECONDS)
        backward = max(
            linear * (1 + int(learns)) + self._attention(_FLASH_BACKWARD * attention) + 2 * stream_seconds + back_casts,
            2 * _LAUNCHES * KERNEL_SECONDS,
        )
        more = self._adapters(kind)
        forward, backward = forward + more[0] + ring, backward + more[1] + back_ring
        if passage.dispatched:
            forward, backward = (
                forward + self.gpu.efficiency.expert_layer,
                backward + 2 * self.gpu.efficiency.expert_layer,
            )
        # The reduction of input gradients runs under the product for the weights, where there is one.
        exposed = (2 if self.layout.sequence_parallel else 0) if learns else 4
        back_wires = self._tensor_parallel(wide, exposed, beside_products=True) + sharing
        if self.recipe.parallel.recompute_granularity == "full":
            backward, back_wires = backward + forward, back_wires + wires
        elif self.recipe.parallel.recompute_granularity == "selective":
            backward += self._attention(attention)
        return Cost(forward + wires, backward + back_wires, wires + back_wires)

    def _adapters(self, kind: LanguageConfig | None) -> tuple[float, float]:
        """Return the seconds, forward and backward, that adapters, and weights in 4 bits, add to a language layer."""
        language = layer_kinds(self.recipe.model.language)[0] if kind is None else kind
        lora, tp = self.recipe.lora, self.layout.tensor
        if lora.rank is None:
            return 0.0, 0.0
        cost = decoder_cost(language)
        b, tokens = self.kernels.number_bytes, self.workload.tokens
        product = sum(
            self._gemm(2 * tokens * elements, tokens, lora.rank, elements / lora.rank)
            for elements in adapter_products(language, lora, tp)
        )
        # Inputs are read, and with dropout written beside a mask; what is added is written, read and summed.
        into, out = cost.adapter_widths(language, lora, tp)
        moved = self._stream(tokens * (into * (1 + 2 * int(lora.dropout > 0)) + 4 * out) * b)
        unpack = 0.0
        if lora.quantize is not None:
            each = expert_parameters(language, self.layout.experts, self.layout.expert_tensor)
            unpack = self._stream(sum([*cost.linear_parameters(language, tp), *each]) * (NF4_BYTES + b))
        return product + moved + unpack, 2 * product + moved + unpack

    def output(self) -> Cost:
        """Return the cost of the output layer and the loss."""
        language, tp, b = self.recipe.model.language, self.layout.tensor, self.kernels.number_bytes
        tokens, rows = self.workload.tokens, decoder_cost(language).vocabulary(language, tp)
        learns = weights_learn(self.recipe) or self.recipe.lora.train_head
        product = self._flops(Chunk(0, 0, first=False, last=True)).output * rows / language.output_rows
        # The loss in fp32 passes over the logits some ten times forward, three times backward.
        seconds, logits = self._gemm(product, tokens, rows // tp, language.hidden_size), tokens * rows / tp
        forward = seconds + self._stream(40 * logits, 4 * logits)
        backward = seconds * (1 + int(learns)) + self._stream(14 * logits, 4 * logits)
        wires = self._tensor_parallel(tokens * language.hidden_size * b, 1)
        return Cost(forward + wires, backward + wires, 2 * wires)

    def vision(self) -> Cost:
        """Return the cost of tower, connector and embedding."""
        model, modules, b = self.recipe.model, self.recipe.modules, self.kernels.number_bytes
        images, (tp, seen) = self.workload.views, share(model, "vision", self.layout, self.workload.seen)
        cost = cost_of(model, "vision")
        passage: Passage = cost.passage(model.vision, tp, seen, self.kernels)
        dense = sum(self._gemm(2 * m * n * k, m, n, k, self.gpu.efficiency.tower) for m, n, k in passage.products)
        shared = (replace(kind, operations=kind.operations / tp) for kind in passage.attention)
        attention = sum(self._attend(kind, tp, causal=False) for kind in shared)
        cut = tp == self.layout.tensor
        wires = self._tensor_parallel(passage.stream, passage.collectives) if images and cut else 0.0
        forward = dense + attention + self._stream(passage.moved, passage.stream)
        forward = max(forward, passage.layers * _LAUNCHES * KERNEL_SECONDS) if images else 0.0
        backward, back_wires = 0.0, 0.0
        if not modules.vision.freeze and model.vision.codes is None:
            backward = 2 * forward + (_FLASH_BACKWARD - 2) * attention
            if cost.again(model.vision, seen):
                backward, back_wires = backward + forward, wires
        hidden = model.language.hidden_size
        work = self._flops(Chunk(0, 0, first=True, last=False))
        tp, seen = share(model, "connector", self.layout, self.workload.seen)
        connector = self._gemm(work.connector, seen.patches, hidden / tp, hidden)
        queries = model.tokens_per_view * images * model.language.hidden_size * b
        gathered = self._tensor_parallel(seen.patches * model.language.hidden_size * b, 1)
        gathered += self._tensor_parallel(queries, 3)
        gathered *= int(tp == self.layout.tensor)
        wires += gathered if images else 0.0
        if features := gathered_features(model, self.layout, images):
            wires += self._tensor_parallel(features * b, 1)
        if not (modules.connector.freeze and modules.vision.freeze):
            backward += connector * (1 + int(not modules.connector.freeze))
            back_wires += gathered
        embedded = self.workload.tokens * self.layout.context * model.language.hidden_size * b
        handed = self._from_context(queries) if images else 0.0
        wires += self._tensor_parallel(embedded, 2) + handed  # the embedding's sum
        back_wires += 0.0 if modules.connector.freeze and modules.vision.freeze else handed
        return Cost(forward + connector + wires, backward + back_wires, wires + back_wires)

    def chunk(self, chunk: Chunk) -> Cost:
        """Return the cost of one micro-batch through a chunk."""
        place = self.known.layers(self.recipe, chunk), chunk.first, chunk.last, chunk.encodes
        return self.known.once(("chunk", *self._alike, *place), lambda: self._chunk(chunk))

    def _chunk(self, chunk: Chunk) -> Cost:
        parts = []
        for kind, count in kinds_of(self.recipe, chunk):
            layer = self.known.once(("layer", *self._alike, id(kind)), functools.partial(self.layer, kind))
            parts.append(Cost(*(count * value for value in (layer.forward, layer.backward, layer.tensor_parallel))))
        if chunk.encodes:
            parts.append(self.known.once(("vision", *self._alike), self.vision))
        elif chunk.first:  # the embedding's sum
            moved = self.workload.tokens * self.recipe.model.language.hidden_size * self.kernels.number_bytes
            wires = self._tensor_parallel(moved, 2)
            parts.append(Cost(wires, 0.0, wires))
        if chunk.last:
            parts.append(self.known.once(("output", *self._alike), self.output))
        # A weight's gradient is written, read, and added to the fp32 sum.
        learning = sum(
            learning_elements(self.recipe, self.layout, chunk, self.known, spread=one) for one in (False, True)
        )
        adding = self._stream(learning * (self.kernels.number_bytes + 8))
        return Cost(
            sum(part.forward for part in parts),
            sum(part.backward for part in parts) + adding,
            sum(part.tensor_parallel for part in parts),
        )

    def costs(self) -> list[Cost]:
        """Return the cost of one micro-batch through each chunk, in the model's order."""

        def alike() -> list[int]:
            kinds = [tuple((id(kind), count) for kind, count in kinds_of(self.recipe, chunk)) for chunk in chunks]
            keys = [(own, chunk.first, chunk.last) for own, chunk in zip(kinds, chunks, strict=True)]
            one_of = {key: number for number, key in enumerate(keys)}
            return [one_of[key] for key in keys]

        chunks = self.layout.chunks
        numbers = self.known.once(("alike", *splits(self.layout)), alike)
        found = {number: self.chunk(chunks[number]) for number in set(numbers)}
        return [found[number] for number in numbers]

    def least(self) -> float:
        """Return a time that no step of this layout stays below: the work of its slowest stage."""
        costs = [cost.forward + cost.backward for cost in self.costs()]
        pipeline = self.layout.pipeline
        passes = self.layout.microbatches * max(sum(costs[stage::pipeline]) for stage in range(pipeline))
        return passes + (sum(self.phases()) if self.layout.apart else 0.0)

    def least_step(self) -> float:
        """Return a time that no step of this layout stays below, but for rounding: :meth:`least` and what is around."""
        costs = self.costs()
        return self._around(costs).with_passes(least_passes(self.layout, costs, self.p2p()))

    def phases(self) -> tuple[float, float, float]:
        """Return the seconds of encoding a step's pictures on all ranks, of going backward, and of handing over.

        Of the rank that has most of them; the hand-over is of features, and of their gradients where there are some.
        """
        key = "phases", shards(self.layout), self.layout.pipeline, self.layout.microbatches
        return self.known.once(key, self._phases)

    def _phases(self) -> tuple[float, float, float]:
        own = share_of_step(self.layout, self.workload.views)
        timer = Timer(self.recipe, alone(self.layout), self.gpu, self.workload.of_views(own))
        cost, modules = timer.vision(), self.recipe.modules
        forward, wide = cost.forward, self.recipe.model.language.hidden_size * self.kernels.number_bytes
        if self.layout.together:  # which is the first stage's, and not the tower's
            forward -= self._tensor_parallel(self.workload.tokens * wide, 2)
        _, learning, _ = apart_elements(self.recipe, self.layout, self.known)
        adding = self._stream(learning * (self.kernels.number_bytes + 8))
        features = feature_bytes(self.recipe, self.layout, self.workload.views)
        # Each rank of the first stage gets all features; it gives back the gradients of its part of the ranks.
        others, inside = (self.layout.places - 1) / self.layout.places, not self.layout.pipeline_crosses_nodes
        out = self._crossing(features * others, inside=inside) if features and self.layout.places > 1 else 0.0
        share = 1 if self.layout.together else self.layout.tensor
        trains = not (modules.vision.freeze and modules.connector.freeze)
        back = out / share if trains else 0.0
        again = forward if features and trains and self.recipe.parallel.vision_recompute else 0.0
        return forward, cost.backward + adding + again, out + back

    def apart(self) -> tuple[float, float]:
        """Return the seconds of reducing and gathering a tower that all ranks hold, unhidden, and of updating it."""
        _, learning, _ = apart_elements(self.recipe, self.layout, self.known)
        if not learning:
            return 0.0, 0.0
        gpus = self.layout.gpus
        rate = self.gpu.nvlink * self.gpu.efficiency.nvlink
        if gpus > GPUS_PER_NODE:
            cards = GPUS_PER_NODE * self.layout.vision_data / gpus  # of a node, that one such sum has
            rate = min(rate, self.gpu.network * cards * self.gpu.efficiency.network)
        ranks = self.layout.vision_data
        wires = (4 + self.kernels.number_bytes) * learning * (ranks - 1) / ranks / rate + 2 * COLLECTIVE_SECONDS
        return wires if ranks > 1 else 0.0, self._update(learning, learning / ranks)

    def p2p(self) -> float:
        """Return the seconds of one message between stages."""
        if self.layout.pipeline == 1:
            return 0.0
        moved = self.workload.tokens * self.recipe.model.language.hidden_size * self.kernels.number_bytes
        moved *= 1 + carried_streams(self.recipe, self.layout)
        moved //= self.layout.tensor if self.layout.sequence_parallel else 1
        return self._crossing(moved, inside=not self.layout.pipeline_crosses_nodes)

    def data_parallel(self, stage: int) -> tuple[float, float]:
        """Return the seconds of gradient reduction and of parameter gathering of a stage's ranks."""
        found = [self._reduced(stage, self.layout.shards), self._reduced(stage, self.layout.expert_data, spread=True)]
        reduced, gathered = (sum(column) for column in zip(*found, strict=True))
        return reduced, gathered

    def _reduced(self, stage: int, data: int, *, spread: bool = False) -> tuple[float, float]:
        """Return :meth:`data_parallel` of experts that are spread over ranks of their own, or of all else."""
        learning = self._learning(stage, spread=spread)
        if data == 1 or (spread and not learning):
            return 0.0, 0.0
        inside = self.layout.tensor * data <= 8 and self.layout.gpus // self.layout.pipeline <= 8
        rate = self.gpu.nvlink * self.gpu.efficiency.nvlink
        if not inside:
            rate = min(rate, self.gpu.network * self.layout.data_ranks_per_node * self.gpu.efficiency.network)
        share = (data - 1) / data / rate
        if not self.recipe.parallel.use_distributed_optimizer:  # an all-reduce, and nothing to gather
            return 2 * 4 * learning * share + COLLECTIVE_SECONDS, 0.0
        gathered = self.kernels.number_bytes * learning * share
        return 4 * learning * share + COLLECTIVE_SECONDS, gathered + COLLECTIVE_SECONDS

    def replicas(self) -> float:
        """Return the seconds in which tensor-parallel ranks add up the gradients of what each holds whole."""
        key = "replicated", self.layout.tensor
        learning = self.known.once(key, lambda: replicated_elements(self.recipe, self.layout))
        if not learning:
            return 0.0
        shard = learning / (self.layout.shards if self.recipe.parallel.use_distributed_optimizer else 1)
        return 2 * self._tensor_parallel(4 * shard, 1)

    def _learning(self, stage: int, *, spread: bool = False) -> int:
        chunks = self.layout.chunks_of(stage)
        return sum(learning_elements(self.recipe, self.layout, chunk, self.known, spread=spread) for chunk in chunks)

    def optimizer(self, stage: int) -> float:
        """Return the seconds of zeroing, norm, clipping and AdamW on a stage's ranks."""
        learning, experts = self._learning(stage), self._learning(stage, spread=True)
        layout, cut = self.layout, self.recipe.parallel.use_distributed_optimizer
        shard = learning / layout.shards + experts / layout.expert_data if cut else learning + experts
        return self._update(learning + experts, shard)

    def _update(self, learning: float, shard: float) -> float:
        # Zeroed whole; the shard is read for the norm, scaled, and updated with masters and moments.
        return self._stream(4 * learning + shard * (4 + 8 + 16 + 12 + self.kernels.number_bytes))

    def timeline(self, costs: list[Cost], microbatches: int) -> Timeline:
        """Simulate a step of equal micro-batches."""
        return timeline(self.layout, costs, microbatches, self.p2p())

    def step(self, *, whole: bool = True) -> StepTime:
        """Return the time of a step; not ``whole`` simulates its beginning alone and goes on at that pace."""
        layout, costs, granularity = self.layout, self.costs(), self.recipe.parallel.recompute_granularity
        pipeline, bubble = passes(layout, costs, self.p2p(), whole=whole)
        around = self._around(costs)
        if layout.apart:
            bubble = (bubble * pipeline + around.handing) / (pipeline + around.vision)
        step = around.with_passes(pipeline)
        flops = self.known.once(("flops", granularity), lambda: planned_flops(self.recipe, self.pack))
        at_peak = step * self.peak * layout.gpus
        return StepTime(
            step=step,
            pipeline=pipeline,
            bubble=bubble,
            stage_seconds=tuple(sum(c.forward + c.backward for c in own) for own in around.stages),
            tensor_parallel=layout.microbatches * max(sum(c.tensor_parallel for c in own) for own in around.stages),
            p2p=self.p2p(),
            data_parallel=around.wired,
            data_parallel_exposed=around.exposed,
            optimizer=around.update,
            mfu=flops.useful / at_peak,
            mfu_conventional=flops.conventional / at_peak,
            hfu=flops.hardware / at_peak,
            vision=around.vision,
        )

    def _around(self, costs: list[Cost]) -> Around:
        """Return what a step takes beside the passes of the pipeline."""
        layout, parallel = self.layout, self.recipe.parallel
        stages = [[costs[chunk.index] for chunk in layout.chunks_of(stage)] for stage in range(layout.pipeline)]
        exposed, wired = 0.0, 0.0
        for stage, own in enumerate(stages):
            reduce, gather = self.data_parallel(stage)
            wired = max(wired, reduce + gather)
            left = reduce - sum(c.backward for c in own) * int(parallel.overlap_grad_reduce)
            left_gather = gather - sum(c.forward for c in own) * int(parallel.overlap_param_gather)
            exposed = max(exposed, max(left, 0.0) + max(left_gather, 0.0) + (self.replicas() if stage == 0 else 0.0))
        update = max(self.optimizer(stage) for stage in range(layout.pipeline))
        vision = handing = 0.0
        if layout.apart:
            encode, backward, handing = self.phases()
            vision = encode + backward + handing
            tower, more = self.apart()
            wired, exposed, update = wired + tower, exposed + tower, update + more
        pixels = layout.microbatches * self.pack.views * self.recipe.model.vision.pixel_bytes
        return Around(stages, wired, exposed, update, vision, handing, pixels / _HOST_TO_DEVICE)
