"""How image features come to the language model: the one place between connector and decoder.

A :class:`Fusion` makes of embeddings and features what the decoder takes in, and extras for its layers.
In a :class:`Splice` features stand in place of the embeddings of image slots; a :class:`Deepstack` does that, and has
others added behind the first layers; with :class:`Cross` layers attend to them, and none stands among the tokens; a
:class:`SpliceBeside` has some among the tokens, and others that layers attend to. With :class:`Codes` there are no
features: pictures are tokens themselves.
Which feature goes where is told by the image plan
(``megavlm.data.media.Arrangement``), on the host.

Shape legend: S positions of a pack, N views of its images, Q features of a view, T image slots, K features that a slot
is made of, E width of the language model; 1 stands for the batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

NEWLINE = "image_newline"
"""Name of the newline vector, a parameter [E] of the connector: it is frozen, trained and saved with it."""

BESIDE = "beside"
"""Of the extras, [S, 1, R * E], of which each of R layers adds E to its output. It is as long as the decoder's input,
so that sequence parallelism cuts both alike and it can travel from stage to stage (``megavlm.models.streams``)."""

Extras = Mapping[str, Any] | None
"""What the layers get beside the decoder's input: :data:`BESIDE`, and keyword arguments of Megatron-Core's block.

None for a fusion that is done before the first layer, as :class:`Splice` is, and where there are no pictures.
What is neither :data:`BESIDE` the stream nor :data:`FEATURES` reaches the layers of the chunk that fuses only.
"""

FEATURES = "features"
"""Of the extras, [F, 1, E], or of a width of their own, that layers attend to: they travel too, and sequence
parallelism cuts them as they are."""


class Fusion(Protocol):
    """What a way to bring image features into the language model does; on the first chunk."""

    learns: bool
    """Whether this rank has a gradient of the fusion's own weights: where tower and connector lie apart from the
    pipeline, one tensor-parallel rank has, as those of all ranks of the job are added up."""

    def arranged(self, features_QNE: Tensor, index_TK: Tensor | None, weight_TK: Tensor | None) -> Tensor:
        """Return the features of a micro-batch as :meth:`fuse` takes them: [T, E], one for each image slot.

        They may be kept, and put together with those of other samples: generation makes them once for each prompt.

        Args:
            features_QNE: what the connector made of the views.
            index_TK: which of them stand where, see :func:`arrange_features`; None for in their order.
            weight_TK: of these; None where K is 1.
        """

    def written(self, tokens: Tensor, features_TE: Tensor | None) -> Tensor:
        """Return [1, S] the tokens that are embedded: as they are, or with pictures written among them.

        Args:
            tokens: [1, S] int64, with the image token in every slot.
            features_TE: what :meth:`arranged` returned; None where there is none.
        """

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Return the decoder's input [S, 1, E], not yet cut for sequence parallelism, and the extras.

        Args:
            embeddings_S1E: of ``tokens``.
            features_TE: what :meth:`arranged` returned; None where there is neither a picture nor a stand-in.
            tokens: [1, S] int64.
            stand_in: the features are of the empty picture of a micro-batch without pictures. Nothing may depend on
                their values, but each parameter that made them, and the fusion's own, must get a gradient: of zeros.
        """


def build_fusion(model: ModelConfig, connector: nn.Module, context: BuildContext, image_token_id: int) -> Fusion:
    """Return the model's fusion. Where it has weights, they are the connector's: they have a name and a rank already.

    The one place that chooses.
    """
    if model.language.picture_tokens is not None:
        return Codes(model.language.picture_tokens[0], image_token_id)
    if model.language.cross_layers:
        return Cross(connector, image_token_id)
    if model.language.feature_width:
        return SpliceBeside(connector, image_token_id, model)
    if model.vision.deepstack:
        return Deepstack(connector, image_token_id)
    if plan_of(model).newline:
        add_newline(connector, model.language.hidden_size, context.dtype, initialize=context.initialize)
    return Splice(connector, image_token_id)


class Splice:
    """Features replace the embeddings of image slots; the layers know nothing of pictures.

    Args:
        connector: which holds the newline vector, if there is one.
        image_token_id: the token of an image slot.
    """

    def __init__(self, connector: nn.Module, image_token_id: int) -> None:
        self._connector = connector
        self._image_token_id = image_token_id
        self.learns = True

    def arranged(self, features_QNE: Tensor, index_TK: Tensor | None, weight_TK: Tensor | None) -> Tensor:
        """Return the features [T, E] of the image slots."""
        newline = newline_of(self._connector)
        if newline is not None and not self.learns:
            newline = newline.detach()
        return arrange_features(features_QNE, index_TK, weight_TK, newline)

    def written(self, tokens: Tensor, features_TE: Tensor | None) -> Tensor:
        """Return the tokens: features are no tokens."""
        return tokens

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Put the features where ``tokens`` holds the image token.

        How many slots there are is told by the features: to count them would be to wait for the device, which checks
        the number itself.
        """
        if features_TE is None:
            return embeddings_S1E, None
        flat_TE = features_TE.to(embeddings_S1E.dtype)
        if stand_in:
            newline = newline_of(self._connector)
            nothing = flat_TE.sum() if newline is None else flat_TE.sum() + newline.sum()
            return embeddings_S1E + 0.0 * nothing, None
        slots = tokens[0] == self._image_token_id
        wanted = flat_TE.size(0)
        torch._assert_async(slots.sum() == wanted, f"there are not {wanted} image slots, as there are image features")
        positions = torch.nonzero_static(slots, size=wanted).squeeze(1)
        return embeddings_S1E.index_copy(0, positions, flat_TE.unsqueeze(1)), None


class Deepstack(Splice):
    """A splice of the last tower layer's features; those of R others are added at the same slots, layer by layer.

    Features are (1 + R) * E wide here, of the last layer and of the levels (``megavlm.models.levels``).
    """

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Put the features where ``tokens`` holds the image token, and the levels' into zeros there."""
        if features_TE is None or stand_in:
            return super().fuse(embeddings_S1E, features_TE, tokens, stand_in=stand_in)
        width = embeddings_S1E.size(-1)
        fused_S1E, _ = super().fuse(embeddings_S1E, features_TE[:, :width], tokens, stand_in=False)
        levels_TE = features_TE[:, width:].to(embeddings_S1E.dtype)
        positions = torch.nonzero_static(tokens[0] == self._image_token_id, size=levels_TE.size(0)).squeeze(1)
        nothing = levels_TE.new_zeros(embeddings_S1E.size(0), 1, levels_TE.size(1))
        return fused_S1E, {BESIDE: nothing.index_copy(0, positions, levels_TE.unsqueeze(1))}


class Cross(Splice):
    """Layers attend to the features; the tokens keep their embeddings, those of pictures too (Llama 3.2 Vision)."""

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Hand the features over. In training there is always a row, as layers learn by it, if from nothing."""
        if stand_in and features_TE is not None:
            features_TE = features_TE.sum(0, keepdim=True) * 0.0
        if features_TE is None and torch.is_grad_enabled():
            features_TE = embeddings_S1E.new_zeros(1, embeddings_S1E.size(-1))
        if features_TE is None:
            return embeddings_S1E, None
        return embeddings_S1E, {FEATURES: features_TE.to(embeddings_S1E.dtype).unsqueeze(1)}


class Codes:
    """The codes of a tower are written among the tokens, before these are embedded: their embeddings learn as all do.

    Args:
        first_token: of code 0; the others follow it.
        image_token_id: the token of an image slot.
    """

    def __init__(self, first_token: int, image_token_id: int) -> None:
        self._first, self._image_token_id = first_token, image_token_id
        self.learns = True

    def arranged(self, features_QNE: Tensor, index_TK: Tensor | None, weight_TK: Tensor | None) -> Tensor:
        """Return the codes [T, 1] of the image slots."""
        assert weight_TK is None, "a code is no mean of others"
        flat_F1 = features_QNE.transpose(0, 1).flatten(0, 1)
        return flat_F1 if index_TK is None else flat_F1[index_TK[:, 0]]

    def written(self, tokens: Tensor, features_TE: Tensor | None) -> Tensor:
        """Return [1, S] tokens with those of the pictures in their slots."""
        if features_TE is None:
            return tokens
        slots, wanted = tokens[0] == self._image_token_id, features_TE.size(0)
        torch._assert_async(slots.sum() == wanted, f"there are not {wanted} image slots, as there are codes")
        positions = torch.nonzero_static(slots, size=wanted).squeeze(1)
        return tokens.index_copy(1, positions, features_TE.T.to(tokens.dtype) + self._first)

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Return the embeddings, among which those of pictures are."""
        return embeddings_S1E, None


class SpliceBeside(Splice):
    """A splice of what the connector made; layers attend to what the tower gave past it (CogAgent).

    Features are wider than E here: behind those of a picture's slots stand the others (``megavlm.models.levels``), in
    as many rows as the tower's first view has patches; rows behind these are empty.

    Args:
        connector: the connector.
        image_token_id: the token of an image slot.
        model: which says how many there are.
    """

    def __init__(self, connector: nn.Module, image_token_id: int, model: ModelConfig) -> None:
        super().__init__(connector, image_token_id)
        self._slots, self._patches = model.tokens_per_view, model.vision.patches_per_image
        self._width = model.language.feature_width

    def fuse(
        self, embeddings_S1E: Tensor, features_TE: Tensor | None, tokens: Tensor, *, stand_in: bool
    ) -> tuple[Tensor, Extras]:
        """Put features where ``tokens`` holds the image token, and hand the others over.

        In training there is always one, as layers learn by it, if from nothing.
        """
        width, nothing = embeddings_S1E.size(-1), stand_in or features_TE is None
        # Copied, so that what autograd keeps of them does not hold the others too.
        own = features_TE if nothing or features_TE is None else features_TE[:, :width].contiguous()
        fused_S1E, _ = super().fuse(embeddings_S1E, own, tokens, stand_in=stand_in)
        if nothing or features_TE is None:
            if not torch.is_grad_enabled():
                return fused_S1E, None
            return fused_S1E, {FEATURES: embeddings_S1E.new_zeros(1, 1, self._width)}
        beside_NQX = features_TE[:, width:].to(embeddings_S1E.dtype).unflatten(0, (-1, self._slots))
        return fused_S1E, {FEATURES: beside_NQX[:, : self._patches].reshape(-1, 1, self._width)}


def add_newline(connector: nn.Module, hidden_size: int, dtype: torch.dtype, *, initialize: bool) -> None:
    """Give a connector the vector that stands at the end of a row of an image's features.

    It is the same on all tensor-parallel ranks, and so is its gradient: behind it the embeddings are scattered, or not,
    by Megatron-Core's mappings, whose backward gathers.
    """
    vector = nn.Parameter(torch.empty(hidden_size, dtype=dtype))
    if initialize:
        nn.init.normal_(vector, std=hidden_size**-0.5)  # as LLaVA-1.6 begins
    connector.register_parameter(NEWLINE, vector)


def newline_of(connector: nn.Module) -> Tensor | None:
    """Return a connector's newline vector, if there is one."""
    return getattr(connector, NEWLINE, None)


def arrange_features(
    features_QNE: Tensor, index_TK: Tensor | None, weight_TK: Tensor | None, newline_E: Tensor | None
) -> Tensor:
    """Return the features [T, E] of the image slots: reordered, interpolated, with the newline vector.

    Args:
        features_QNE: what the connector made of the views.
        index_TK: rows of the views' features, view by view; -1 is the newline. None keeps their order.
        weight_TK: of these rows; None where K is 1.
        newline_E: the newline vector.
    """
    flat_FE = features_QNE.transpose(0, 1).flatten(0, 1)
    if index_TK is None:
        return flat_FE
    # Plain indexing, whose gradient is summed in a fixed order: tensor-parallel ranks must find the same.
    if weight_TK is None:
        slots_TE = flat_FE[index_TK[:, 0].clamp(min=0)]
    else:
        taken_TKE = flat_FE[index_TK.clamp(min=0)].float()
        slots_TE = (taken_TKE * weight_TK[..., None]).sum(1).to(flat_FE.dtype)
    if newline_E is None:
        return slots_TE
    # A mean of rows would round a bf16 gradient at each; a sum over those chosen does not.
    return torch.where(index_TK[:, :1] < 0, newline_E.to(slots_TE.dtype), slots_TE)
