"""What the converters ask of a family of checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.config.architecture import architecture_of
from megavlm.config.schema import ModelConfig
from megavlm.data.films.plan import NO_FILMS
from megavlm.data.media import plan_of
from megavlm.weights.rules import Aside, Row, Table
from megavlm.weights.source import CONFIG, Source

Tree = dict[str, Any]
Constants = dict[str, tuple[tuple[int, ...], float]]
"""Shape and value of tensors that are the same everywhere, by name."""


Tower = tuple[Tree, Any]
"""A vision configuration of Transformers, and the layer (or layers) whose features are taken."""


class Family(ABC):
    """A kind of Hugging Face checkpoint: how it is recognised, its shape, its tables and its ``config.json``.

    This is all that the converters know of one; :data:`megavlm.families.registry.FAMILIES` has those that there are.
    """

    name: ClassVar[str]
    """As ``--family`` and the conversion's record call it."""
    title: ClassVar[str]
    """For people."""
    parts: ClassVar[tuple[str, ...]]
    """The parts of a model that it holds, in the order in which they are converted."""
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Names of the architectures that its parts may be of: :meth:`refuses` gets no other model. A part that does not
    stand here may be of any."""
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {"": {}}
    """Namings that are in use, by name; the first is written where nothing else is known. Each says what the
    words in braces in the tables' names stand for."""

    template: ClassVar[str | None] = None
    """Name of the chat template that its conversations are written in, which the recipe of a converted checkpoint
    gets as ``model.template`` unless :meth:`templates` knows a better one; None for that key's default."""
    image_plan: ClassVar[str | None] = None
    """Name of the image plan of its pictures, which a converted checkpoint gets as ``model.image.kind``, unless
    :meth:`branches` has an ``image``; None for that key's default."""
    slotless: ClassVar[bool] = False
    """Whether its vocabulary has no token for the slots of an image: a conversion gives it one."""
    tower_keys: ClassVar[Mapping[str, Any]] = {}
    """Keys of ``config.json`` by which the family's code takes the tower from the checkpoint, once it was trained."""
    pickle: ClassVar[str | None] = None
    """A file that ``torch.save`` writes, which the family's code reads instead of safetensors."""
    pickles: ClassVar[Mapping[str, tuple[str, str | None]]] = {}
    """Of a checkpoint in pieces: those that are files of ``torch.save``, by what they are called: the file that is
    written, and the key that its tensors stand under; None for none."""
    nested_pickles: ClassVar[bool] = False
    """Whether the tensors of such a file stand in a dictionary for each part, which names here begin with."""
    own_files: ClassVar[tuple[str, ...]] = ()
    """Small files that say, beside ``config.json``, what it is in no other family."""
    with_tower_trained: ClassVar[str | None] = None
    """Of a family whose tower is named and not held: the one that holds it, which is written once it was trained."""
    plan_of_connector: ClassVar[bool] = False
    """Whether its connector goes with its image plan alone: a model that is put together with it takes that plan."""
    own_rotary: ClassVar[bool] = False
    """Whether its language model may have rotary positions of another kind than one number that turns whole heads
    (M-RoPE, a part of a head, neighbouring pairs): :meth:`refuses` then says which."""
    wraps_pictures: ClassVar[tuple[str, str] | None] = None
    """What its processor of Transformers writes around the slots of a picture by itself."""
    own_multiplier: ClassVar[bool] = False
    """Whether its image features may be multiplied by a number (``model.connector.output_multiplier``):
    :meth:`refuses` then says by which."""
    own_norms: ClassVar[bool] = False
    """Whether its language model may have norms behind attention and MLP: :meth:`refuses` then says where."""
    branch_norm: ClassVar[bool] = False
    """Whether its language model may have a norm behind attention alone: :meth:`refuses` then says where."""
    own_tokens: ClassVar[bool] = False
    """Whether pictures are tokens of its language model, whose norms are Chameleon's: :meth:`refuses` then says how."""
    own_cross: ClassVar[bool] = False
    """Whether layers of its language model may attend to pictures (``LanguageConfig.cross_layers``)."""
    own_levels: ClassVar[bool] = False
    """Whether its language model may have features of several tower layers added (``VisionConfig.deepstack``)."""
    two_way: ClassVar[str | None] = None
    """Which positions its language model lets see those behind them: ``LanguageConfig.two_way``."""
    drops_first: ClassVar[bool] = False
    """Whether its connector may leave out the first feature (``model.connector.drop_first_feature``): :meth:`refuses`
    then says where."""
    expands: ClassVar[bool] = False
    """Whether its connector's first layer may be a multiple of the features wide (``model.connector.input_expansion``):
    :meth:`refuses` then says how."""
    class_feature: ClassVar[bool] = False
    """Whether its connector gets the feature of the tower's class token too (``model.vision.class_feature``)."""
    own_positions: ClassVar[bool] = False
    """Whether its tower's class token may have no row of the positional table (``model.vision.class_position``):
    :meth:`refuses` then says where."""
    norms_behind: ClassVar[bool] = False
    """Whether its tower may have norms behind attention and MLP (``model.vision.branch_norms``): :meth:`refuses` then
    says where."""
    visual_expert: ClassVar[bool] = False
    """Whether image tokens may have weights of their own, and a position that they share: :meth:`refuses` then says
    which language models have."""
    features_beside: ClassVar[bool] = False
    """Whether its layers may attend to a second tower's features beside text, and tables be added to those of towers:
    :meth:`refuses` then says how."""
    own_epsilon: ClassVar[bool] = False
    """Whether the norm behind its tower may have an epsilon of its own: :meth:`refuses` then says which."""
    preprocesses: ClassVar[bool] = False
    """Whether its pictures are made pixels by Transformers, as ``preprocessor_config.json`` says."""
    text_folder: ClassVar[str] = ""
    """Folder of its directories in which language model and tokenizer lie, where these are in pieces."""
    tower_folder: ClassVar[str | None] = None
    """Folder in which the tower lies, with the file that says how pictures become pixels, where they are in pieces."""
    film_plans: ClassVar[tuple[str, ...]] = ()
    """Names of the film plans (``model.video.kind``) that its code has; none where its films are not known here."""
    read_as: ClassVar[str | None] = None
    """Name of the family that Transformers reads such a model as, where it has no class for this one."""
    modules: ClassVar[str | None] = None
    """The naming that Transformers' modules have, and so PEFT's adapters; None for the first of ``styles``."""

    finds: ClassVar[str | None] = None
    """A question that its published models answer with boxes, where they do: ``{thing}`` is what is looked for. A
    comment says where its authors ask so, or that no such place was found."""
    box_pixels: ClassVar[bool] = False
    """Whether its ``bbox_2d`` counts pixels of the picture as the model sees it; else thousandths of the sides."""
    kept_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of ``config.json`` that stay as they came where weights go home beside what they came with."""
    box_plane: ClassVar[bool] = False
    """Whether bare numbers (``[0.1, 0.2, 0.5, 0.75]``) are parts of the square that it is padded to, not of itself."""

    @abstractmethod
    def detect(self, source: Source) -> bool:
        """Whether ``source`` is of this family."""

    @abstractmethod
    def branches(self, source: Source) -> Tree:
        """Return the recipe's ``model`` branches of the parts, and ``image`` where the checkpoint says it.

        Raises:
            UserError: the configuration lacks a key, or asks for what the models here cannot do.
        """

    @abstractmethod
    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table of each part."""

    @abstractmethod
    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the ``config.json`` of a model; keys that end in ``.json`` are files of their own.

        Args:
            model: its shape.
            tokens: ids of ``image`` and, where there is one, ``image_start``.
        """

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return the keys of ``config.json`` that say what becomes of pictures, where the family's code reads some.

        A training may change them, and the shape of no part shows it. Keys that end in ``.json`` are other files, with
        those that change in them where they are there.
        """
        return {}

    def refuses(self, model: ModelConfig) -> str | None:
        """Return why the family cannot hold ``model``, whose parts are of its architectures, or None if it can."""
        return None

    def refusal(self, model: ModelConfig) -> str | None:
        """Return why the family cannot hold any model, or None if it can."""
        return next(iter(self.early_refusals(model)), None) or (
            self.refuses(model)
            or self._newline_refused(model)
            or self._multiplier_refused(model)
            or self._films_refused(model)
        )

    def early_refusals(self, model: ModelConfig) -> list[str]:
        """Return all that rules the family out, whatever its own rules are; other architectures alone, if some are."""
        asked = (self._language_refused, self._levels_refused, self._tower_refused, self._connector_refused)
        return self.other_architectures(model) or [reason for ask in asked if (reason := ask(model)) is not None]

    def other_architectures(self, model: ModelConfig) -> list[str]:
        """Return, for each part that is of an architecture which the family has not, so."""
        reasons = []
        for part, known in self.architectures.items():
            there = architecture_of(model, part).name
            if part in self.parts and there not in known:
                preset = getattr(model, part).preset
                reasons.append(f"the {part} preset {preset!r} is of the architecture {there}, not {' or '.join(known)}")
        return reasons

    def _language_refused(self, model: ModelConfig) -> str | None:
        """Return why the language model's norms or positions are not the family's, or None."""
        if "language" not in self.parts:
            return None
        if model.language.cross_layers and not self.own_cross:
            return "layers attend to pictures (model.language.cross_attention_layers), which the family has not"
        if model.language.output_rows != model.language.vocab_size and not self.own_cross:
            return "the output layer has fewer rows than the embedding (model.language.output_vocab_size)"
        # A language model alone sees no pictures, and has no prefixes.
        own, mask = "vision" in self.parts or self.two_way, model.language.two_way
        if mask != self.two_way and (own or mask == "prefix"):
            known = "is causal" if self.two_way is None else f"is {self.two_way}"
            return f"attention is {mask or 'causal'} (model.language.attention_mask), in the family it {known}"
        if getattr(model.language, "post_layernorms", False) and not self.own_norms:
            return "the language model has norms behind attention and MLP (post_layernorms), which the family has not"
        if getattr(model.language, "attention_branch_norm", False) and not self.branch_norm:
            return "a norm stands behind attention alone (attention_branch_norm), which the family has not"
        if model.language.picture_tokens is not None and not self.own_tokens:
            return "pictures are tokens (model.language.image_tokens), in the family they are features"
        if getattr(model.language, "head_layernorm", False) and not self.own_tokens:
            return "each head has a norm of its own (model.language.head_layernorm), which the family has not"
        if not getattr(model.language, "pre_layernorms", True) and not self.own_tokens:
            return (
                "no norm stands in front of attention and MLP (model.language.pre_layernorms), in the family one does"
            )
        if not model.language.one_weight and not self.visual_expert:
            return "image tokens have weights of their own (model.language.visual_expert), which the family has not"
        if model.language.feature_width and not self.features_beside:
            return "layers attend to features beside text (model.language.cross_hidden_size), which the family has not"
        if model.language.shared_positions and not self.visual_expert:
            return "a picture's slots share a position (model.language.image_positions), which the family has not"
        if self.own_rotary or model.language.fused_rotary:
            return None
        return "the language model's rotary positions (model.language.rotary_*) are of a kind that the family has not"

    def _levels_refused(self, model: ModelConfig) -> str | None:
        """Return why the family has no names for the connectors of a deepstack's levels, or None."""
        if model.vision.deepstack and "connector" in self.parts and not self.own_levels:
            return (
                "features of several tower layers are added (model.vision.deepstack_layers), which the family has not"
            )
        return None

    def _tower_refused(self, model: ModelConfig) -> str | None:
        """Return what of the tower's features the family's code has in another way, or None."""
        if "vision" not in self.parts:
            return None
        if bool(model.vision.class_features) != self.class_feature:
            known = "goes with the others'" if self.class_feature else "is dropped, or there is none"
            return f"the class token's feature (model.vision.class_feature): in the family it {known}"
        if getattr(model.vision, "branch_norms", "before") != "before" and not self.norms_behind:
            return (
                "norms stand behind the tower's attention and MLP (model.vision.branch_norms), which the family has not"
            )
        for key in ("class_position", "high_class_position"):
            if not getattr(model.vision, key, True) and not self.own_positions:
                return f"the class token has no row of the positional table (model.vision.{key}), in the family it has"
        for key in ("feature_table", "high_feature_table"):
            if getattr(model.vision, key, False) and not self.features_beside:
                return f"a table is added to the tower's features (model.vision.{key}), which the family has not"
        if getattr(model.vision, "post_layernorm_epsilon", None) is not None and not self.own_epsilon:
            return "the norm behind the tower has an epsilon of its own (model.vision.post_layernorm_epsilon)"
        return None

    def _connector_refused(self, model: ModelConfig) -> str | None:
        """Return why the first feature of a picture cannot be left out, or the first layer be so wide, or None."""
        if "connector" not in self.parts:
            return None
        connector = model.connector
        if getattr(connector, "drop_first_feature", False) and not self.drops_first:
            return (
                "the first feature is left out (model.connector.drop_first_feature), for which the family has no word"
            )
        if getattr(connector, "input_expansion", None) is not None and not self.expands:
            return (
                "the connector's first layer is a multiple of the features wide (model.connector.input_expansion), for"
                " which the family has no word"
            )
        return None

    def _newline_refused(self, model: ModelConfig) -> str | None:
        """Return why the connector's learned newline vector has no place in the family, or None."""
        if "connector" not in self.parts or not plan_of(model).newline:
            return None
        tables = self.tables(model, next(iter(self.styles)))
        if any("image_newline" in one.ours for table in tables if table.part == "connector" for one in table.rest):
            return None
        return f"the image plan {model.image.kind} has a learned newline vector, for which the family has no name"

    def _multiplier_refused(self, model: ModelConfig) -> str | None:
        """Return why the family's code cannot multiply image features as they are here, or None."""
        # A connector alone has no code.
        if self.own_multiplier or not {"connector", "language"} <= {*self.parts}:
            return None
        there = getattr(model.connector, "output_multiplier", 1.0)
        if there == 1:
            return None
        return f"image features are multiplied by {there} (model.connector.output_multiplier), in the family by nothing"

    def _films_refused(self, model: ModelConfig) -> str | None:
        """Return why films cannot become frames in the family's code as they do here, or None."""
        kind = model.video.kind
        if not {"vision", "language"} <= {*self.parts} or kind in (NO_FILMS, *self.film_plans):
            return None
        has = f"{self.title} has {' or '.join(self.film_plans)}" if self.film_plans else "the family has none"
        return f"the film plan is {kind} (model.video.kind), and {has}"

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return tensors without an effect that the family's code wants to load all the same.

        They are written where the original ones are not at hand.
        """
        return {}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what ``processor_config.json`` says after a training; empty for no such file."""
        return {}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the keys of ``preprocessor_config.json`` that say what becomes of pictures, after a training.

        None where each becomes one square, which :mod:`megavlm.families.preprocessor` writes for all families.

        Args:
            model: the model.
            old: the file as it was.
        """
        return None

    def named_tokens(self, image_token: str, known: Callable[[str], bool]) -> dict[str, str]:
        """Return what its processor asks the tokenizer for by name (``extra_special_tokens``), after a training.

        Args:
            image_token: that fills an image's slots.
            known: whether the tokenizer has a token; one that it lacks would be added behind the embedding's rows.
        """
        return {}

    def settings(self, model: ModelConfig) -> Tree:
        """Return what is written beside the weights of a file of :attr:`pickles` that has a key, as its ``config``."""
        return {}

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Return what was trained and has no place in the family's files: a line each, with the key.

        Args:
            model: the model.
            template: name of the template that it was trained in.
        """
        return []

    def feature_layer(self, model: ModelConfig) -> Any:
        """Return the layer, or layers, whose features a tower that is written anew gives.

        Of a family of towers alone, whose ``config.json`` does not say it: see :class:`megavlm.weights.source.Source`.
        """
        return -2

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower | None:
        """Return the whole tower of a ``config.json`` in Transformers' form, with the layer whose features are taken.

        None for a family that has it in no such form. What two families have of one tower, the layers behind it too,
        goes from the one to the other.
        """
        return None

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Return a ``config.json`` of the family with another's tower, see :meth:`tower_of`."""
        return config

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return what is to lie beside the small files of ``source``, as an export could not know it."""
        return {}

    def scattered(self, directory: Path) -> dict[str, Path]:
        """Return where the parts lie, for a checkpoint that is published in pieces; empty for any other directory."""
        return {}

    def tower_apart(self, source: Source, vision: Path | None) -> tuple[Path, Any] | None:
        """Return where the tower is that ``source`` only names, and the layer, or layers, whose features are taken.

        None for a family whose checkpoints need no other one.

        Args:
            source: of this family.
            vision: what the user says.

        Raises:
            UserError: nobody says where it is.
        """
        return None

    def pictures(self, source: Source, tower: Source, vision: Mapping[str, Any]) -> Tree:
        """Return ``model.image`` of a checkpoint whose tower is apart.

        Args:
            source: the checkpoint.
            tower: where its tower was found.
            vision: ``model.vision``.
        """
        raise NotImplementedError(f"{self.name}: has its tower with it")

    def probe(self, style: str) -> str:
        """Return a name that a checkpoint in this naming has."""
        return ""

    def style_for(self, model: ModelConfig) -> str:
        """Return the naming to write where nothing else is known."""
        return next(iter(self.styles))

    def style_of(self, source: Source) -> str:
        """Return the naming that ``source`` uses; the first if none fits, for the sake of the message."""
        return next((s for s in self.styles if self.probe(s) in source), next(iter(self.styles)))

    def templates(self, source: Source) -> tuple[str, ...]:
        """Return what its conversations may be written in, by ``model.template``'s names; the first that goes is taken.

        A name goes with a tokenizer that has its tokens; where none does, the default is taken.
        """
        return ()

    def tokens(self, source: Source) -> dict[str, int]:
        """Return the ids of ``image`` and ``image_start``, as far as the configuration tells."""
        return {}

    def rules(
        self, model: ModelConfig, style: str, slots: Mapping[str, object], parts: Sequence[str]
    ) -> list[tuple[str, Row]]:
        """Return the rules of ``parts``, each with its part.

        Every canonical parameter is covered once: whatever is not is a slip in a table.
        """
        rules = [
            (t.part, r) for t in self.tables(model, style) if t.part in parts for r in t.rules(slots, layers(t, model))
        ]
        covered = [name for _, rule in rules for name in rule.ours]
        wanted = {name for name in slots if name.split(".", 1)[0] in parts}
        assert len(covered) == len(set(covered)) and set(covered) == wanted, sorted(wanted ^ set(covered))
        return rules

    def asides(self, model: ModelConfig, style: str) -> list[Aside]:
        """Return the tensors without a parameter."""
        return [aside for table in self.tables(model, style) for aside in table.asides(layers(table, model))]


def layers(table: Table, model: ModelConfig) -> int:
    """Return the number of layers of a table's part."""
    own = getattr(model, table.part)
    if table.ours.startswith("high.transformer."):  # the second one of two towers
        own = own.high
    return int(own.num_layers) if table.layer else 0


def config_file(source: Source) -> str:
    """Return the path of a source's config.json, for messages."""
    return str(source.directory / CONFIG)
