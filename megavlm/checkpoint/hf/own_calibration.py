"""Samples for a language model whose tower and connector Transformers has no class for: these are the ones here.

Tower and connector are built alone, in this process, with the directory's weights; the samples are written by the
tokenizer and the template that train the model here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.finite import check_finite
from megavlm.checkpoint.hf.calibration import FEATURES, Inputs
from megavlm.checkpoint.hf.given import SourceOfParts, Understood
from megavlm.checkpoint.hf.shapes import Rule, alone
from megavlm.config import architecture as registry
from megavlm.config.errors import UserError
from megavlm.config.schema import DataConfig, DataSource, ModelConfig, ParallelConfig
from megavlm.data.decoders import make_decoder
from megavlm.data.device_batch import arrangement_on
from megavlm.data.energon_dataset import PackEncoder, RawSample
from megavlm.data.media import arrange, plan_of
from megavlm.data.packing import PackableSample
from megavlm.data.tokenizer import Tokenizer, load_tokenizer, template_of
from megavlm.models.front import build_front, encode
from megavlm.models.fusion import Codes, Fusion, build_fusion
from megavlm.parallel.device import local_device
from megavlm.weights.source import Source


def tokenizer_of_directory(one: SourceOfParts, found: Understood) -> Tokenizer:
    """Return the tokenizer that lies in a directory, for the model's template.

    Raises:
        UserError: there is none, or the model's vocabulary is smaller.
    """
    if found.tokenizer is None:
        raise UserError(f"{one.source.path}: has no tokenizer, which writes the samples; put its file there")
    tokenizer = load_tokenizer(found.tokenizer, template_of(found.model.template, found.tokenizer))
    if tokenizer.vocab_size > found.model.language.vocab_size:
        raise UserError(
            f"{found.tokenizer}: has {tokenizer.vocab_size} tokens, the model's vocabulary "
            f"{found.model.language.vocab_size}; they do not belong together"
        )
    return tokenizer


class OwnSamples:
    """Makes of raw samples what a language model with given features takes.

    Args:
        one: the directory.
        model: what it holds.
        tokenizer: its tokenizer.
        data: the samples, for messages.
        longest: tokens of a sample.
        front: tower, connector and what puts features in their places; None of a language model alone, which leaves
            out what shows pictures.
    """

    def __init__(
        self, one: SourceOfParts, model: ModelConfig, tokenizer: Tokenizer, data: Path, longest: int,
        front: tuple[Any, Any, Fusion] | None,
    ) -> None:  # fmt: skip
        self._front, self._plan = front, plan_of(model)
        settings = DataConfig(train=(DataSource(path=str(data)),), sequence_length=longest)
        self._encoder = PackEncoder(settings, [one.source.path.name], tokenizer, self._plan)
        self._decoder = make_decoder("pil", alpha=settings.image_alpha)  # pictures are few, and exact

    def __call__(self, raw: dict[str, Any]) -> Inputs | str:
        """Return token ids and features of a sample, or why it cannot be used."""
        files = {key: value for key, value in raw.items() if not key.startswith("__")}
        checked = self._encoder.encode_sample(
            RawSample(raw["__key__"], raw["__restore_key__"], files, 0, raw["__shard__"], None)
        )
        if checked.sample is None:
            assert checked.skipped is not None
            return checked.skipped.cause
        sample = checked.sample
        if any(not isinstance(image, bytes) for image in sample.images):
            return "with a film"
        ids = torch.from_numpy(sample.encoded.tokens)[None].long()
        made: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not sample.images:
            return made
        if self._front is None:
            return "with a picture, and this is a language model alone"
        if isinstance(self._front[-1], Codes):
            return "with a picture that is tokens, which are not tried"
        features = self._features(sample, *self._front)
        return features if isinstance(features, str) else made | {FEATURES: features[None].cpu()}

    @torch.no_grad()
    def _features(self, sample: PackableSample, vision: Any, connector: Any, fusion: Fusion) -> Tensor | str:
        """Return [T, E] of the image slots."""
        layouts = [self._plan.plan(one.width, one.height, len(sample.shapes)) for one in sample.shapes]
        decoded = self._decoder.decode(sample.images, self._plan, layouts)
        if decoded.failed:
            return f"bad image ({decoded.causes[0]})"
        arrangement = None if self._plan.fixed else arrange(self._plan, layouts)
        grid = None if arrangement is None or arrangement.grid is None else torch.from_numpy(arrangement.grid)
        features = encode(vision, connector, decoded.pixels.to(local_device()), grid, trains_vision=False)
        return fusion.arranged(features, *arrangement_on(arrangement, local_device()))


@contextlib.contextmanager
def front_of(
    one: SourceOfParts, model: ModelConfig, rules: Sequence[Rule], image_token_id: int, dtype: torch.dtype
) -> Iterator[tuple[Any, Any, Fusion]]:
    """Build tower and connector with a directory's weights, while the block runs.

    Args:
        one: the directory.
        model: what it holds.
        rules: of its family.
        image_token_id: the token of an image slot.
        dtype: in which they compute.

    Raises:
        UserError: a weight is not finite.
    """
    registry.load()
    context = BuildContext(ParallelConfig(), dtype=dtype, initialize=False)
    with alone():
        vision, connector = build_front(model, context)
        fusion = build_fusion(model, connector, context, image_token_id)  # its weights are the connector's
        for part, module in (("vision", vision), ("connector", connector)):
            _fill(part, module, one.source, rules)
            module.to(local_device()).eval().requires_grad_(False)
        yield vision, connector, fusion


@torch.no_grad()
def _fill(part: str, module: nn.Module, source: Source, rules: Sequence[Rule]) -> None:
    own = dict(module.named_parameters())
    for rule in (rule for rule in rules if rule.part == part):
        theirs = [source.get(name) for name in rule.row.theirs]
        for name, tensor in zip(rule.row.theirs, theirs, strict=True):
            check_finite(tensor, f"{source.path}: {name}")
        for name, tensor in zip(rule.row.ours, rule.to_ours(theirs), strict=True):
            own.pop(name.removeprefix(f"{part}.")).copy_(tensor)
    assert not own, f"{part}: no weights for {sorted(own)[:3]}"
