"""The Energon side of the reader: raw samples -> token ids -> packs that carry samples over.

Everything here runs where Energon reads: in its worker processes, or in the calling one without workers.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon import Cooker, SavableDataset, TaskEncoder, WorkerConfig, stateless
from megatron.energon.epathlib import EPath
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.base_dataset import set_sample_restore_key
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import PackingDataset
from megatron.energon.wrappers.base import SampleIndex, get_sample_restore_key
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from megavlm.config.errors import UserError
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.batch import Pack, SkippedSample
from megavlm.data.chat import encode_conversation
from megavlm.data.codes import CARD, CodesError, PictureTokens, codes_in
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError, FilmLayout
from megavlm.data.films.streams import av_module
from megavlm.data.images import ImageError, lay_out
from megavlm.data.machine import is_machine_fault
from megavlm.data.media import ImageLayout, ImagePlan, views_of
from megavlm.data.packing import PackableSample, Weigh, build_pack, choose_pack
from megavlm.data.positions import OwnPositions
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, UnsafePathError, parse_conversation
from megavlm.data.shard_names import check_names
from megavlm.data.shard_reader import DEFECT, ShardDataset
from megavlm.data.spans import TwoWaySpans, check_spans
from megavlm.data.template import TemplateError
from megavlm.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_BROKEN_IN_A_ROW = 1000
"""Reading stops with an error after so many unusable samples one after the other."""


@dataclass
class RawSample:
    """A sample's files as they lie in the shard."""

    __key__: str
    __restore_key__: tuple[Any, ...]
    files: dict[str, bytes]
    source: int
    shard: str
    defect: str | None
    """What is wrong with the shard there."""


@dataclass
class CheckedSample:
    """A sample ready to be packed, or the reason why it cannot be."""

    __key__: str
    __restore_key__: tuple[Any, ...]
    sample: PackableSample | None
    skipped: SkippedSample | None = None


@dataclass
class PackedSample:
    """A pack with the key that Energon can make it again from."""

    pack: Pack
    __restore_key__: tuple[Any, ...] = ()


class BrokenSampleError(UserError):
    """A sample that cannot be trained on; the text is a short cause, the same for all of its kind."""


@stateless
def _cook(sample: dict[str, Any]) -> RawSample:
    files = {key: value for key, value in sample.items() if not key.startswith("__")}
    source = sample["__subflavors__"]["source"]
    return RawSample(
        sample["__key__"], sample["__restore_key__"], files, source, sample["__shard__"], sample.get(DEFECT)
    )


class PackEncoder(TaskEncoder):
    """Tokenises samples and packs them.

    Args:
        data: The data branch of the recipe.
        names: Name of each data set, for sample keys.
        tokenizer: The tokenizer.
        plan: What becomes of images.
        positions: How the model's positions are made, where they are not counted.
        weigh: Says how heavy the pictures of a sample are; None counts their views.
        spans: Which positions see each other both ways, where some do.
        codes: How codes of pictures are read, where pictures are tokens.
        carded: Whether each data set says what its codes are of; None: all do.
    """

    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(
        self,
        data: DataConfig,
        names: Sequence[str],
        tokenizer: Tokenizer,
        plan: ImagePlan,
        positions: OwnPositions | None = None,
        weigh: Weigh | None = None,
        spans: TwoWaySpans | None = None,
        codes: PictureTokens | None = None,
        carded: Sequence[bool] | None = None,
    ) -> None:
        tokenizer.template.check_training()
        check_spans(spans, tokenizer.template)
        if plan.films is not None:
            av_module()  # said before the first film is met
        self.data = data
        self.names = names
        self.tokenizer = tokenizer
        self.plan = plan
        self.positions = positions
        self.weigh = weigh
        self.spans = spans
        self.codes = codes
        self.carded = carded

    @stateless
    def encode_sample(self, sample: RawSample) -> CheckedSample:
        """Tokenise; what is wrong is said in the result, never by an exception, which Energon would not count."""
        try:
            return CheckedSample(sample.__key__, sample.__restore_key__, self._encode(sample))
        except BrokenSampleError as error:
            cause = str(error)
        except Exception as error:
            if is_machine_fault(error):
                # Nothing is wrong with the sample. Energon passes this one on, and counts the others.
                raise FatalSampleError(f"sample {sample.__key__}: {type(error).__name__}: {error}") from error
            logger.warning("sample %s cannot be read", sample.__key__, exc_info=True)
            cause = f"error ({type(error).__name__})"
        skipped = SkippedSample(self.names[sample.source], sample.shard, sample.__key__, cause)
        return CheckedSample(sample.__key__, sample.__restore_key__, None, skipped)

    def _encode(self, sample: RawSample) -> PackableSample:
        if sample.defect is not None:
            raise BrokenSampleError(sample.defect)
        if "json" not in sample.files:
            raise BrokenSampleError("no record")
        try:
            record = json.loads(sample.files["json"])
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
            raise BrokenSampleError("bad JSON") from None
        except ValueError:  # a number of thousands of digits
            raise BrokenSampleError("bad record") from None
        try:
            conversation = parse_conversation(record, answers_show=True)
        except UnsafePathError as error:
            raise BrokenSampleError(error.cause) from None
        except UserError:
            raise BrokenSampleError("bad record") from None
        answers = (one.text for one in conversation.turns if one.role == "assistant")
        if not self._predicts and any(IMAGE_PLACEHOLDER in text for text in answers):
            raise BrokenSampleError(
                "an answer shows a picture" + (", and loss.image_tokens is 0" if self.codes else "")
            )
        coded = None if self.codes is None else codes_in(sample.files, len(conversation.images))
        if coded is not None and self.carded is not None and not self.carded[sample.source]:
            raise BrokenSampleError(f"codes without {CARD} beside the shards; copy it too, or prepare them again")
        if conversation.images and self._predicts and coded is None:
            raise BrokenSampleError("pictures without codes, and loss.image_tokens; prepare it with --image-codes")
        shown = [] if coded is not None else _shown(sample.files, conversation)
        try:
            layouts = lay_out(shown, self.plan)
            if coded is not None:
                layouts = [self.plan.plan(self.plan.side, self.plan.side)] * len(coded)
        except FilmError as error:
            raise BrokenSampleError(f"bad film ({error.cause})") from None
        except ImageError as error:
            raise BrokenSampleError(f"bad image ({error.cause})") from None
        try:
            runs = [layout.runs for layout in layouts]
            encoded = encode_conversation(conversation, self.tokenizer, runs, self.data.system_message)
        except TemplateError:
            raise BrokenSampleError("not of the template's form") from None
        except UserError:
            raise BrokenSampleError("control token") from None
        slots = int((encoded.tokens == self.tokenizer.imgpad_id).sum())
        if encoded.num_images != len(layouts) or slots != sum(layout.tokens for layout in layouts):
            raise BrokenSampleError("slots do not match images")
        if len(encoded.tokens) > self.data.sequence_length:
            raise BrokenSampleError("too long")
        if self.codes is not None and coded is not None:
            try:
                encoded = self.codes.written(encoded, self.codes.read(coded), self.tokenizer.imgpad_id)
            except CodesError as error:
                raise BrokenSampleError(f"bad codes ({error})") from None
            layouts = []  # nothing is left to be seen
        return PackableSample(
            encoded=encoded,
            images=tuple(shown),
            key=f"{self.names[sample.source]}/{sample.__key__}",
            source=sample.source,
            shard=sample.shard,
            shapes=tuple(layout.film if isinstance(layout, FilmLayout) else layout.shape for layout in layouts),
            views=self._weight(layouts),
        )

    @property
    def _predicts(self) -> bool:
        """Whether tokens of pictures are predicted."""
        return self.codes is not None and self.codes.weight > 0

    def _weight(self, layouts: Sequence[ImageLayout]) -> int:
        if self.weigh is not None:
            return self.weigh(layouts)
        return round(sum(views_of(self.plan, layout) for layout in layouts))

    @stateless
    def pack_selected_samples(self, samples: list[CheckedSample]) -> PackedSample:
        """Lay the chosen samples out as one pack."""
        chosen = [sample.sample for sample in samples if sample.sample is not None]
        length, padding = self.data.sequence_length, self.tokenizer.eos_id
        return PackedSample(build_pack(chosen, length, padding, self.plan, self.positions, self.spans))

    def build_batch(self, dataset: SavableDataset, *, worker_config: WorkerConfig, **_: Any) -> SavableDataset:
        """Put the packer after the tokeniser; a pack is a micro-batch, so nothing is batched."""
        return CarryOverPackingDataset(
            dataset,
            # Without packing, the oldest sample is always the whole pack: a buffer of one does that.
            buffer_size=self.data.packing_buffer_size if self.data.packing == "carry_over" else 1,
            capacity=self.data.sequence_length,
            balance_images=self.data.balance_images,
            final_packer=self.pack_selected_samples,
            worker_config=worker_config,
        )


def _shown(files: Mapping[str, Any], conversation: Conversation) -> list[bytes | Film]:
    """Return a sample's pictures and films in the order in which its conversation shows them.

    Raises:
        BrokenSampleError: There are others than it shows.
    """
    found: dict[str, list[str]] = {}
    for what, start, number in (("image", "img", len(conversation.images)), ("film", "film", len(conversation.films))):
        there = {name for name in files if re.fullmatch(rf"{start}\w*", name) and not name.startswith("filmindex")}
        wanted = [f"{start}{i}" for i in range(number)]
        if not set(wanted) <= there:
            raise BrokenSampleError(f"{what} missing")
        if len(there) > number:
            raise BrokenSampleError(f"more {what}s than slots")
        found[start] = wanted
    images, films = iter(found["img"]), iter(found["film"])
    shown: list[bytes | Film] = []
    for moves in conversation.shows:
        name = next(films if moves else images)
        shown.append(Film(files[name], files.get(f"filmindex{name[4:]}")) if moves else files[name])
    return shown


class CarryOverPackingDataset(PackingDataset):
    """Energon's packing stage with :func:`choose_pack`: what one pack leaves waits for the next.

    Each pack carries the broken samples since the one before.
    """

    _savable_fields = ("_reading_buffer", "_final_packing_sample_index", "_skipped")

    def __init__(
        self,
        dataset: SavableDataset,
        *,
        buffer_size: int,
        capacity: int,
        balance_images: bool,
        final_packer: Any,
        worker_config: WorkerConfig,
    ) -> None:
        self.capacity = capacity
        self.balance_images = balance_images
        super().__init__(
            dataset,
            buffer_size,
            pre_packer=choose_pack,
            final_packer=final_packer,
            final_packer_stateless=True,
            worker_config=worker_config,
        )

    def reset_state_own(self) -> None:
        """Forget all waiting samples."""
        self._reading_buffer = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._final_packing_sample_index = SampleIndex(self.worker_config, src=self)
        self._skipped: list[tuple[str, ...]] = []
        self._broken_in_a_row = 0

    def __iter__(self) -> Iterator[PackedSample]:
        buffer = self._reading_buffer
        buffer.worker_start()
        source = iter(self.dataset)
        more = True
        while True:
            while more and len(buffer.buffer) < self.buffer_size:
                sample = next(source, None)
                if sample is None:
                    more = False
                else:
                    self._take_in(sample)
            if not buffer.buffer:
                return
            yield self._next_pack()

    def _take_in(self, sample: CheckedSample) -> None:
        if sample.sample is not None:
            self._broken_in_a_row = 0
            self._reading_buffer.append(sample)
            return
        assert sample.skipped is not None
        self._skipped.append(sample.skipped)
        self._broken_in_a_row += 1
        if self._broken_in_a_row >= MAX_BROKEN_IN_A_ROW:
            causes = Counter(skipped[-1] for skipped in self._skipped)
            raise UserError(
                f"{self._broken_in_a_row} samples in a row are unusable, the last is {sample.__key__}: {dict(causes)}"
            )

    def _next_pack(self) -> PackedSample:
        buffer = self._reading_buffer
        if self.buffer_size == 1:
            chosen = [0]
        else:
            chosen = self._choose([waiting.sample for waiting in buffer.buffer])
        samples = [buffer.buffer[index] for index in chosen]
        with self._final_packing_sample_index.ctx() as index:
            packed = self.final_packer(samples)
        for position in reversed(chosen):
            buffer.pop(position)
        # From a restored state they come as plain tuples.
        packed.pack.skipped = [SkippedSample(*fields) for fields in self._skipped]
        self._skipped = []
        return set_sample_restore_key(packed, index, *(get_sample_restore_key(s) for s in samples), src=self)

    def _choose(self, waiting: list[PackableSample]) -> list[int]:
        lengths = [len(sample) for sample in waiting]
        if not self.balance_images:
            return choose_pack(lengths, self.capacity)
        # Workers take turns: this counts the packs of all of them.
        config = self.worker_config
        number = self._final_packing_sample_index.current_idx * max(1, config.num_workers) + config.rank_worker_id()
        return choose_pack(lengths, self.capacity, [sample.views for sample in waiting], number)


def build_dataset(
    sources: Sequence[DataSource],
    encoder: PackEncoder,
    worker_config: WorkerConfig,
    *,
    training: bool,
) -> SavableDataset:
    """Chain data sets, shuffling, blending, tokenising and packing.

    Training repeats for ever and draws from the data sets by weight; else there is one pass in file order.

    Raises:
        MissingFileError: A shard, or its index, is missing.
        UserError: A data set has fewer samples than there are readers to share it, a shard outside its directory, or
            more shards or samples than there can be.
    """
    readers = worker_config.world_size * max(1, worker_config.num_workers)
    datasets = []
    for index, source in enumerate(sources):
        check_names(Path(source.path))
        dataset = ShardDataset(
            EPath(source.path),
            split_part="train",
            training=training,
            worker_config=worker_config,
            subflavors={"source": index},
            decoder=None,
            # Runs of this many neighbours are shuffled; the shuffle buffer mixes them further.
            max_samples_per_sequence=100 if training else None,
        )
        dataset.check_shards()
        if len(dataset) < readers:
            raise UserError(
                f"data set {source.path} has {len(dataset)} samples, too few to share among {readers} readers "
                f"(data-parallel size x data.num_workers)"
            )
        datasets.append(LoadedDataset(dataset=dataset, weight=source.weight))
    if not training:
        return encoder.build_val_datasets(datasets=datasets, worker_config=worker_config, batch_size=1)
    return encoder.build_train_datasets(
        datasets=datasets,
        worker_config=worker_config,
        batch_size=None,
        shuffle_buffer_size=encoder.data.shuffle_buffer_size,
        blend_mode=DatasetBlendMode.DATASET_WEIGHT,
    )
