"""The training reader: packs from prepared data sets, in an order that a restart continues exactly.

One reader per data-parallel rank. Energon reads, shuffles, blends and keeps the state; this module adds the
packer, a state that is plain JSON, and the checks that keep a state from being used where it does not fit.
"""

from __future__ import annotations

import base64
import dataclasses
import gc
import hashlib
import json
import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader
from megatron.energon.savable_loader import SavableDataLoaderState

from megavlm.config.checks import source_name
from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.prepared import META
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.batch import Pack, SkippedSample
from megavlm.data.cache import located
from megavlm.data.codes import CARD, PictureTokens, check_codes
from megavlm.data.energon_dataset import PackEncoder, build_dataset
from megavlm.data.media import ImagePlan
from megavlm.data.packing import Weigh
from megavlm.data.plans_single import SquashPlan
from megavlm.data.positions import OwnPositions
from megavlm.data.spans import TwoWaySpans
from megavlm.data.state_codec import from_plain, to_plain
from megavlm.data.templates import QWEN_VL
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.worker_signals import StopsWithParent

logger = logging.getLogger(__name__)

STATE_VERSION = 2
_CHECKPOINT_SECONDS = 15.0
"""A worker notes its state this often; a restart re-reads at most the packs since then."""
_MOST_STATE = 256 << 20  # bytes of a reader's state, unpacked: a few may be packed into very little
_ENERGON_IN_PROCESS = threading.Lock()
"""Energon keeps the active worker in class variables, so one thread of a process may be inside it at a time."""


class PackReader:
    """Reads packs of one data-parallel rank.

    A training reader never ends. A validation reader makes one pass in file order, always in the calling process,
    and each ``iter()`` starts again from the beginning; its last pack may hold much padding.

    ``next`` may be called from any one thread, but not from two at a time, and not while ``state`` runs.

    Args:
        sources: Data sets to read; :attr:`Pack.segment_sources` counts them.
        data: The data branch of the recipe.
        tokenizer: The tokenizer.
        plan: What becomes of images.
        positions: How the model's positions are made, where they are not counted.
        weigh: Says how heavy the pictures of a sample are (``megavlm.planning.weighing``); None counts their views.
        spans: Which positions see each other both ways, where some do.
        codes: How codes of pictures are read, where pictures are tokens.
        rank: Data-parallel rank, from 0.
        world_size: Data-parallel size.
        seed: Seed of the data order.
        training: Shuffle, blend by weight and repeat for ever; else one pass in order.

    Raises:
        MissingFileError: A data set was not prepared.
        UserError: There is no data set, one has fewer samples than there are readers, or its codes of pictures are of
            another model.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        data: DataConfig,
        tokenizer: Tokenizer,
        plan: ImagePlan,
        positions: OwnPositions | None = None,
        weigh: Weigh | None = None,
        spans: TwoWaySpans | None = None,
        codes: PictureTokens | None = None,
        *,
        rank: int,
        world_size: int,
        seed: int,
        training: bool,
    ) -> None:
        if not sources:
            raise ValueError("there are no data sets to read")
        self.sources = tuple(located(source, data) for source in sources)
        for source in self.sources:
            check_codes(source.path, codes)
        self.training = training
        self.dropped: Counter[str] = Counter()
        """Samples left out so far, by cause."""
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._num_workers = data.num_workers if training else 0
        names = [source_name(source) for source in self.sources]
        carded = [(Path(source.path) / CARD).is_file() for source in self.sources]
        self._encoder = PackEncoder(data, names, tokenizer, plan, positions, weigh, spans, codes, carded)
        self._template = tokenizer.template.fingerprint
        self._former_templates = tokenizer.template.former_fingerprints
        self._images = _images_of(plan)
        self._data_hash = hash_data(self.sources, data, tokenizer, plan, codes)
        self._loader = self._build_loader()
        self._restorer: SavableDataLoader | None = None
        self._packs: Iterator[Any] | None = None

    def __iter__(self) -> PackReader:
        if not self.training and self._packs is not None:
            self._loader, self._packs = self._build_loader(), None
        return self

    def __next__(self) -> Pack:
        # The first call forks the workers, and they inherit what Energon keeps in class variables.
        with self._inside_energon() if self._packs is not None else _ENERGON_IN_PROCESS:
            if self._packs is None:
                if self._num_workers:
                    gc.collect()  # what workers inherit they could not destroy: worker_signals.py
                self._packs = iter(self._loader)
            packed = next(self._packs)
        pack: Pack = packed.pack
        self.dropped.update(pack.dropped)
        pack.restore_key = json.dumps({"key": to_plain(packed.__restore_key__), "skipped": pack.skipped})
        return pack

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs to go on after the last pack: JSON values only.

        Raises:
            RuntimeError: A worker process ended, so that its state is lost.
        """
        assert self.training, "a validation reader always starts from the beginning"
        with self._inside_energon():
            loader = self._save_loader()
        text = json.dumps(to_plain(loader), separators=(",", ":"))
        return self._identity() | {"loader": base64.b64encode(zlib.compress(text.encode(), 1)).decode()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was called; only before the first pack.

        Raises:
            UserError: The state belongs to another rank, data-parallel size, number of workers, seed or data, or
                is broken.
        """
        assert self._packs is None, "restore comes before the first pack"
        older = {"template": QWEN_VL.fingerprint, "images": self._images}  # of a state from before the keys
        if isinstance(state, dict) and str(state.get("template")) in self._former_templates:
            state = {**state, "template": self._template}
        for key, value in self._identity().items():
            if not isinstance(state, dict) or (older | state).get(key) != value:
                was = (older | state).get(key) if isinstance(state, dict) else state
                raise UserError(
                    f"the reader state was saved with {key} {was!r}, but this run has {value!r}; set it back, or begin "
                    "another stage from the weights (checkpoint.load, another output_dir)"
                )
        try:
            packed = zlib.decompressobj()
            text = packed.decompress(base64.b64decode(state["loader"]), _MOST_STATE)
            if not packed.eof:
                raise UserError("it is cut short, or larger than a reader's state is")
            plain = json.loads(text)
        except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
            raise UserError(f"broken reader state: {error}") from None
        loader = from_plain(plain)
        if loader is not None and not isinstance(loader, SavableDataLoaderState):
            raise UserError("broken reader state: it holds no loader state")
        self._loader.restore_state_rank(loader)
        if loader is not None and self._num_workers:
            # Energon forgets the offset here: a state saved before each worker gave a pack would repeat packs.
            self._loader._worker_sample_counters = [
                (worker.state.sample_index if worker.state else 0) - 1 + worker.offset
                for worker in loader.worker_states
            ]

    def restore_pack(self, restore_key: str) -> Pack:
        """Make a pack again from its :attr:`Pack.restore_key`.

        Raises:
            UserError: The key was not made by a reader.
        """
        try:
            content = json.loads(restore_key)
            key, skipped = from_plain(content["key"]), [SkippedSample(*fields) for fields in content["skipped"]]
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise UserError(f"broken restore key: {error}") from None
        with _ENERGON_IN_PROCESS:
            if self._restorer is None:
                # Of its own: files that it opens must not be shared with workers that are forked later.
                self._restorer = self._build_loader()
            pack: Pack = self._restorer.restore_sample(key).pack
        pack.restore_key, pack.skipped = restore_key, skipped
        self.dropped.update(pack.dropped)
        return pack

    def close(self) -> None:
        """End the worker processes; the reader cannot be used any more. May be called again."""
        workers = getattr(self._loader, "_iterator", None)
        if workers is not None:
            workers._shutdown_workers()
        self._packs = iter(())

    def _save_loader(self) -> SavableDataLoaderState | None:
        while True:
            workers = getattr(self._loader, "_iterator", None)
            for process in workers._workers if workers is not None else ():
                if not process.is_alive():
                    # Energon would wait for its answer for ever.
                    raise RuntimeError(f"a reader process ended (exit code {process.exitcode})")
            loader = self._loader.save_state_rank()
            # A worker that is asked in the moment between its start and its first checkpoint answers with nothing
            # and a sample to skip, and Energon would take that for a state.
            if workers is None or loader is None or all(worker.state for worker in loader.worker_states):
                return loader
            time.sleep(0.01)

    def _build_loader(self) -> SavableDataLoader:
        worker_config = WorkerConfig(
            rank=self._rank,
            world_size=self._world_size,
            num_workers=self._num_workers,
            seed_offset=self._seed,
        )
        loader = get_savable_loader(
            build_dataset(self.sources, self._encoder, worker_config, training=self.training),
            checkpoint_every_sec=_CHECKPOINT_SECONDS,
            gc_collect_every_n_steps=10 if self._num_workers else 0,
            watchdog_timeout_seconds=None,
        )
        # A pack holds no tensors to pin; and the loader must not draw from the trainer's random numbers.
        loader.pin_memory = False
        loader.generator = torch.Generator()
        loader.worker_init_fn = StopsWithParent(loader.worker_init_fn)
        return loader

    def _inside_energon(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._num_workers else _ENERGON_IN_PROCESS

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "rank": self._rank,
            "world_size": self._world_size,
            "num_workers": self._num_workers,
            "seed": self._seed,
            "template": self._template,
            "images": self._images,
            "data_hash": self._data_hash,
        }


def _images_of(plan: ImagePlan) -> str:
    """Return a plan in words, with a digest of all its values where these are many.

    The side is not told: the same tokens of a finer picture may go on.
    """
    values = {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan) if one.name != "side"}
    if plan.films is None:
        del values["films"]  # states from before films still fit
    text = f"{type(plan).__name__}({', '.join(f'{key}={value!r}' for key, value in values.items())})"
    return text if len(text) <= 160 else f"{text[:150]}.. {hashlib.sha256(text.encode()).hexdigest()[:8]})"


def hash_data(
    sources: Sequence[DataSource], data: DataConfig, tokenizer: Tokenizer, plan: ImagePlan,
    codes: PictureTokens | None = None,
) -> str:  # fmt: skip
    """Digest of everything that decides which packs come in which order; directories may move."""
    parts: list[Any] = [
        data.sequence_length,
        data.packing,
        data.packing_buffer_size,
        data.shuffle_buffer_size,
        tokenizer.template.default_system if data.system_message is None else data.system_message,
        # Of squashing, the number alone: states from before other plans still fit.
        plan.tokens_per_view if isinstance(plan, SquashPlan) else repr(plan),
        tokenizer.vocab_size,
        tokenizer.encode("<|im_start|>The quick brown fox, 0123456789\n\u4f60\u597d"),
    ]
    if data.packing == "carry_over" and data.balance_images:
        parts.append("balance_images")  # left out otherwise: states from before the key still fit
    if plan.films is not None:
        parts.append(repr(plan.films))
    for source in sources:
        meta = Path(source.path) / META
        if not (meta / ".info.json").is_file():
            raise MissingFileError(f"data set {source.path} is not prepared; make it with megavlm prepare")
        identity = (meta / "index.uuid").read_text() if (meta / "index.uuid").is_file() else ""
        parts += [source.weight, (meta / ".info.json").read_text(), identity]
        if codes is not None and (card := Path(source.path) / CARD).is_file():
            parts += [card.read_text(encoding="utf-8"), codes.weight > 0]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
