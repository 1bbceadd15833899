"""What other rooms may ask of the parts of a model, beside what ``schema.py`` declares of them: plain answers.

The class of an architecture's keys has another where it is so.
"""

from __future__ import annotations

from typing import Any, Literal


class VisionTraits:
    """Of a tower."""

    @property
    def class_features(self) -> int:
        """Features in front of those of one picture's patches: that of a class token, where the tower gives it."""
        return 0

    @property
    def ungridded(self) -> str | None:
        """Its key, as it is set, that has features of one picture lie in no grid of rows and columns; None for none."""
        return None

    @property
    def codes(self) -> int | None:
        """Rows of the codebook whose numbers it gives instead of features; None of one that gives features."""
        return None

    @property
    def features_per_image(self) -> int:
        """Features of one picture."""
        own: Any = self
        return int(own.patches_per_image) + self.class_features

    @property
    def features_past(self) -> tuple[int, int]:
        """Of each patch: features that go past the connector to language layers which attend to them, their width."""
        return 0, 0


class ConnectorTraits:
    """Of a connector."""

    @property
    def takes_class_feature(self) -> bool:
        """Whether it takes a class token's feature in front of those of the patches."""
        return False

    @property
    def takes_codes(self) -> bool:
        """Whether it takes codes, and not features."""
        return False

    @property
    def each_patch(self) -> bool:
        """Whether each patch becomes a slot of its own, from its own feature; others may stand around them."""
        return False


class LanguageTraits:
    """Of a language model."""

    @property
    def spans(self) -> Literal["prefix", "images", "cross"] | None:
        """Positions of a sample that its layers must be told: those that see each other, or pictures; None for none."""
        own: Any = self
        kind: Literal["prefix", "images"] | None = own.two_way
        return kind

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Layers, counted from 0, that attend to features of pictures, which then do not stand among the tokens."""
        return ()

    @property
    def picture_tokens(self) -> tuple[int, int] | None:
        """The first of the tokens that pictures are, and the one behind the last; None where they are features."""
        return None

    @property
    def attending_layers(self) -> tuple[int, ...]:
        """Layers, counted from 0, that attend to features of pictures: instead of to text, or beside it."""
        own: Any = self
        return tuple(range(own.num_layers)) if self.feature_width else self.cross_layers

    @property
    def feature_width(self) -> int:
        """Width of features that each layer attends to beside text, while others stand among the tokens; else 0."""
        return 0

    @property
    def recurrent(self) -> bool:
        """Whether its layers hand a state from position to position, and attend to nothing (Mamba)."""
        return False

    @property
    def latent_attention(self) -> bool:
        """Whether keys and values are made of a latent, which is narrower than they are (MLA)."""
        return False

    @property
    def encodes(self) -> bool:
        """Whether an encoder of its own reads what stands in front of an answer (T5)."""
        return False

    @property
    def output_rows(self) -> int:
        """Rows of the output layer, without padding."""
        own: Any = self
        return int(own.vocab_size)

    @property
    def one_weight(self) -> bool:
        """Whether each linear layer of a layer has one weight, whichever token it multiplies."""
        return True

    @property
    def shared_positions(self) -> bool:
        """Whether the features of a picture share one position, but for its first and last slot (CogVLM)."""
        return False
