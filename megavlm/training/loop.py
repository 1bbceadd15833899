"""The training loop of one run."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.checkpoint import distributed as checkpoint
from megavlm.checkpoint.adapters import check_same_adapters
from megavlm.checkpoint.base import base_for
from megavlm.checkpoint.hf.converted import converted
from megavlm.checkpoint.hf.exporter import Exporter
from megavlm.checkpoint.manifest import MANIFEST, check
from megavlm.checkpoint.paths import newest_first, read_run, read_tree, resolve
from megavlm.checkpoint.placement import misplaced
from megavlm.checkpoint.proof import raise_first
from megavlm.checkpoint.saver import Saver, State
from megavlm.checkpoint.slots import model_state
from megavlm.config.architecture import BRANCHES
from megavlm.config.checks import idle_intervals, remarks
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.fields import meaning_of
from megavlm.config.help import to_tree, to_yaml
from megavlm.config.schema import ImageConfig, Recipe
from megavlm.data.decoders import make_decoder
from megavlm.data.feed import Feed, Prefetcher
from megavlm.data.media import plan_kinds, plan_of
from megavlm.data.positions import positions_of
from megavlm.data.quarantine import Quarantine
from megavlm.data.reader import PackReader
from megavlm.data.spans import spans_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.families.presets import expand_presets
from megavlm.inference.boxes import family_of
from megavlm.models.codes import tokens_of
from megavlm.models.fusion import NEWLINE
from megavlm.parallel.faults import at_step, fault
from megavlm.parallel.layout import describe
from megavlm.parallel.lock import LockView
from megavlm.parallel.state import (
    agreed,
    any_rank,
    any_rank_of,
    from_first_rank,
    is_lost_peer,
    is_reader,
    replicas_share_experts,
)
from megavlm.planning.weighing import weigher_of
from megavlm.training.build import build_training
from megavlm.training.graphs import LayerGraphs
from megavlm.training.guard import StepGuard, check_finite
from megavlm.training.heartbeat import Heartbeat, blame
from megavlm.training.heldout import read_held_out, validate
from megavlm.training.loss import task_mean
from megavlm.training.metrics import Metrics
from megavlm.training.optimizer import learning_rates, recipe_settings_kept
from megavlm.training.order import StepOrder
from megavlm.training.panel import answer_panel
from megavlm.training.progress import Deadline, Progress
from megavlm.training.random_state import random_state, restore_random_state
from megavlm.training.recorder import Recorder
from megavlm.training.spread import PictureSpread
from megavlm.training.step import train_step
from megavlm.training.stopping import STOPPED, StopRequest
from megavlm.weights.kinds import holds_model

logger = logging.getLogger(__name__)

_LET_OTHERS_SPEAK_SECONDS = 2.0


class Trainer:
    """One run on this rank: built from a recipe, at its newest checkpoint if it has one.

    Args:
        recipe: the run, checked.
        tokenizer: its tokenizer.
        lock: of the run's directory.
        stop: signals that were sent.
        record: what checkpoints say of the run beside its progress.

    Raises:
        UserError: the data or the checkpoint does not fit the recipe.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, lock: LockView, stop: StopRequest | None = None,
        record: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.tokenizer, self.lock, self.record = recipe, tokenizer, lock, dict(record or {})
        self.deadline = Deadline(recipe.training.exit_after_minutes)
        self.checkpoints = Path(recipe.output_dir) / "checkpoints"
        self.replicas = mpu.get_data_parallel_world_size()
        self.num_microbatches = recipe.training.global_batch_size // self.replicas
        logger.info("layout: %s", describe(recipe.parallel, dist.get_world_size()))
        for line in remarks(recipe):
            logger.warning("%s", line)
        self.exporter = Exporter(recipe, dist.get_rank())
        settings = recipe.checkpoint
        self.saver = Saver(
            self.checkpoints, settings.keep, asynchronous=settings.async_save, lock=lock, needed=self.exporter.needed
        )
        self.stop = StopRequest() if stop is None else stop
        self.tasks = task_mean(recipe)
        self.plan = plan_of(recipe.model)
        self.training = build_training(recipe, tokenizer.imgpad_id)
        self.spread = None if self.training.vision is None else PictureSpread(recipe)
        with agreed("looking where each parameter would be saved"):  # not hours later, at the first save
            raise_first(list(misplaced(self.training.modules, model_state(self.training.modules))))
        self.parent: Path | None = None
        self.base: Path | None = None
        self.progress, reader_state = self._load()
        decoder = make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha) if is_reader() else None
        self.codes = tokens_of(recipe, self.training.chunks[0])
        self.held_out = read_held_out(recipe, tokenizer, decoder, self.codes)
        self.family = None
        if self.parent is not None and recipe.logging.panel_interval is not None:
            with agreed(f"reading whose {self.parent} is"):
                self.family = family_of(self.parent)  # says what boxes count in answers
        if idle := idle_intervals(recipe):
            logger.info("data.validation is empty: %s has no effect", " and ".join(idle))
        self.feed = self._open_feed(decoder, reader_state)
        self.graphs = LayerGraphs(recipe, self.training, self.num_microbatches)
        prefetcher = self.feed.prefetcher
        with agreed(f"writing to {recipe.output_dir}"):
            counters = prefetcher.counters if prefetcher else None
            self.metrics = Metrics(recipe, self.progress, counters, self.training.configs, lock)
            self.recorder = Recorder(recipe.logging, Path(recipe.output_dir), dist.get_rank())
            self.heartbeat = Heartbeat(Path(recipe.output_dir), dist.get_rank(), dist.get_world_size(), lock)
            self.guard = StepGuard(recipe.training, self.progress, Path(recipe.output_dir), lock)

    def train(self) -> int:
        """Train to the last step, or until asked to stop; a checkpoint is saved at the end.

        Returns:
            The exit code: 0, or STOPPED after a signal.
        """
        progress, settings = self.progress, self.recipe.training
        if progress.step >= settings.steps:
            logger.info("nothing to do: the run is complete at step %d", progress.step)
        with self.stop.listening(), self._watched():
            while progress.step < settings.steps:
                self._step()
                stop, time_is_up = self._agree_on_stopping()
                last = stop or time_is_up or progress.step == settings.steps
                if last or self._due(self.recipe.checkpoint.save_interval):
                    self.save(last=last)
                elif self.saver.busy:
                    self._saving(self.saver.poll)
                self.exporter.poll()
                if stop:
                    logger.info("asked to stop (%s) at step %d; start again to go on", self.stop.signal, progress.step)
                    return STOPPED
                if time_is_up:
                    logger.info(
                        "training.exit_after_minutes: time is up at step %d; start again to go on", progress.step
                    )
                    break
        return 0

    def _agree_on_stopping(self) -> list[bool]:
        """Return whether some rank was asked to stop, and whether time is up.

        Raises:
            LostError: another run has the directory now; on the ranks that saw it.
            OtherRankError: the same, on the others.
        """
        start = time.perf_counter()
        *answers, lost = any_rank_of([self.stop.signal is not None, self.deadline.passed(), self.lock.lost()])
        self.heartbeat.waited_seconds += time.perf_counter() - start
        if lost:
            with agreed("keeping the lock of output_dir"):
                self.lock.look()
                self.lock.check()
        return answers

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Say at the end how this rank left, and whom it lost if a collective broke."""
        phase = "failed"
        try:
            yield
            phase = "done" if self.progress.step >= self.recipe.training.steps else "stopped"
        except RuntimeError as error:
            if is_lost_peer(error):
                self.heartbeat.beat(self.progress.step + 1, phase, now=True)
                time.sleep(_LET_OTHERS_SPEAK_SECONDS)
                line = blame(Path(self.recipe.output_dir), dist.get_rank(), self.progress.step + 1)
                if line is not None:
                    logger.error("%s", line)
            raise
        finally:
            self.heartbeat.beat(self.progress.step, phase, now=True)

    def _step(self) -> None:
        """Take one step, with what is due after it."""
        progress, training, settings = self.progress, self.training, self.recipe.training
        at_step(progress.step + 1)
        self.heartbeat.beat(progress.step + 1, "training")
        fault("step.begin")
        self.recorder.begin(progress.step + 1)
        self.graphs.before_step()
        self.metrics.begin()
        batches = self.feed.next_step(self.num_microbatches)
        if training.vision is not None and training.vision.ahead and progress.step + 1 < settings.steps:
            training.vision.encode_ahead(self.feed.peek_step(self.num_microbatches))
        self.metrics.fetched()
        training.scheduler.step(1)
        sources, highest = len(self.recipe.data.train), self.guard.largest_loss()
        result = train_step(training.chunks, training.optimizer, batches, sources, highest, self.tasks, training.vision)
        self.guard.take(result, self.feed.sample_keys)
        self.metrics.step(result, batches, learning_rates(self.recipe, training.optimizer))
        self.recorder.end(progress.step)
        fault("step.end")
        if self.held_out and self._due(settings.validation_interval):
            self.validate()
        if self.held_out and self._due(self.recipe.logging.panel_interval):
            self.draw_panel()

    def validate(self) -> None:
        """Report the loss on each held-out data set."""
        with self.training.settled():
            losses = validate(self.training.chunks, self.held_out, self.training.vision, self.spread)
        if losses:
            logger.info("step %d | validation loss %s", self.progress.step, _list_losses(losses))
            self.metrics.write(losses)

    def draw_panel(self) -> None:
        """Put held-out images with the model's answers on TensorBoard."""
        picture = None
        # Where parameters are gathered during the forward pass, all replicas take part in that.
        with self.training.settled():
            first = mpu.get_data_parallel_rank() == 0
            if first or replicas_share_experts():
                packs = self.held_out[0].packs if first else None
                picture = answer_panel(self.training.chunks, packs, self.recipe, self.tokenizer, self.family)
        picture = from_first_rank(picture)
        if picture is not None:
            self.metrics.image("held_out", picture)

    def save(self, *, last: bool = False) -> None:
        """Save a checkpoint that the run goes on from exactly; published before this returns if it is the ``last``."""
        self.heartbeat.beat(self.progress.step, "saving", now=True)
        self._saving(self.saver.finish)  # what a thread has written comes first: this one inherits from it
        self.metrics.flush()
        modules = self.training.modules
        with self.training.settled():
            check_finite(modules)
            state = State(
                modules=modules,
                optimizer=self.training.optimizer,
                scheduler=self.training.scheduler,
                reader=self.feed.prefetcher.state() if self.feed.prefetcher else None,
                random=random_state(),
                run={**self.progress.to_json(), **self.record},
                recipe_yaml=to_yaml(self.recipe),
                parent=self.parent,
                tokenizer=Path(self.recipe.data.tokenizer) if self.recipe.data.tokenizer else None,
                base=self.base,
            )
            saved = self._saving(lambda: self.saver.save(state, wait=last))
        if saved:
            self.metrics.write({"checkpoint_stalled_seconds": self.saver.stalled_seconds})

    def _saving(self, work: Callable[[], Path | None]) -> bool:
        """Save or publish, and return whether it went well.

        A failure stops the run or is logged, as the recipe says; all ranks fail alike. A lost rank always stops it.
        """
        try:
            path = work()
        except (OSError, RuntimeError) as error:
            if self.recipe.checkpoint.on_error == "stop" or is_lost_peer(error):
                raise
            logger.warning("no checkpoint was saved, and the run goes on (checkpoint.on_error): %s", error)
            return False
        if path is not None:
            self.parent = path
            self.exporter.published(path)
        return True

    def finish_exports(self, stopped: Callable[[], bool]) -> None:
        """Wait for the exports of checkpoints, and delete those that were kept for them alone; not a collective."""
        if self.exporter.finish(stopped):
            self.saver.prune()

    def close(self) -> None:
        """End threads and files."""
        self.recorder.close()
        self.feed.close()
        self.metrics.close()

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.step % interval == 0

    def _load(self) -> tuple[Progress, Any]:
        """Load where the run stands: its newest checkpoint, given weights, or nothing."""
        training, settings = self.training, self.recipe.checkpoint
        newest = newest_whole(self.checkpoints) if settings.resume else None
        load = self._given_weights(newest)
        if newest is not None:
            with agreed(f"resuming from {newest}"):
                _check_same_model(newest, self.recipe)
                check_same_adapters(newest, self.recipe, resuming=True)
                self.base = self._find_base(newest, load)
                state = checkpoint.load_reader_state(newest, self.replicas) if is_reader() else None
            with recipe_settings_kept(training.optimizer):
                checkpoint.load(
                    newest,
                    modules=training.modules,
                    optimizer=training.optimizer,
                    scheduler=training.scheduler,
                    base=self.base,
                )
            _restore_random(newest)
            self.saver.point_at(newest)
            self.exporter.resumed(newest)
            self.parent = newest
            progress = Progress.from_json(read_run(newest))
            logger.info("resumed from %s at step %d", newest, progress.step)
            return progress, state
        if load is not None:
            with agreed(f"loading {load}"):  # a conversion may be where this rank's machine does not see it
                path = resolve(load)
                fresh = _check_same_model(path, self.recipe, resuming=False)
                check_same_adapters(path, self.recipe, resuming=False)
                self.base = self._find_base(path, load)
                if (path / MANIFEST).is_file():
                    check(path, dist.get_rank(), dist.get_world_size())
            weights = checkpoint.load(path, modules=training.modules, base=self.base, fresh=fresh)
            self.parent = path
            # The fp32 masters of weights in FP8 come from the checkpoint, not from what rounding has left.
            exact = {"state_dict": weights} if self.recipe.engine.fp8_param_gather else {}
            training.optimizer.reload_model_params(**exact)
        return Progress(), None

    def _given_weights(self, newest: Path | None) -> Path | None:
        """Return the checkpoint (or run) that ``checkpoint.load`` means, converted if it is a Hugging Face directory.

        None where nothing is loaded from there: the run goes on from ``newest``, which has no adapters.
        """
        load = self.recipe.checkpoint.load
        if load is None or (newest is not None and self.recipe.lora.rank is None):
            return None
        return converted(Path(load), self.recipe) if holds_model(Path(load)) else Path(load)

    def _find_base(self, path: Path, load: Path | None) -> Path | None:
        """Return the checkpoint whose weights the run's adapters are for; None for a run without adapters."""
        if self.recipe.lora.rank is None:
            return None
        return base_for(path, load) or path

    def _open_feed(self, decoder: Any, state: Any) -> Feed:
        """Open the training data on reader ranks."""
        recipe, prefetcher = self.recipe, None
        with agreed("opening data.train"):
            if is_reader():
                reader = PackReader(
                    recipe.data.train,
                    recipe.data,
                    self.tokenizer,
                    self.plan,
                    positions_of(recipe.model, self.tokenizer.imgpad_id),
                    weigher_of(recipe),
                    spans_of(recipe.model, self.tokenizer.imgpad_id),
                    self.codes,
                    rank=mpu.get_data_parallel_rank(),
                    world_size=self.replicas,
                    seed=recipe.training.seed,
                    training=True,
                )
                prefetcher = Prefetcher(
                    reader,
                    decoder,
                    self.plan,
                    self.tokenizer.imgpad_id,
                    depth=recipe.data.prefetch_steps * self.num_microbatches,
                    state=state,
                    quarantine=Quarantine(Path(recipe.output_dir), mpu.get_data_parallel_rank()),
                )
        ordered = recipe.data.balance_images and self.spread is None  # no stage encodes while others wait
        return Feed(prefetcher, StepOrder(recipe) if ordered else None, self.spread)


def newest_whole(root: Path) -> Path | None:
    """Return the newest checkpoint in ``root`` that its manifest says is whole, or None; a collective.

    Ranks share the reading. A damaged one is passed over with a warning, and left where it is.
    """
    for path in newest_first(root):
        problem = None
        try:
            check(path, dist.get_rank(), dist.get_world_size())
        except (UserError, OSError) as error:
            problem = str(error)
        if not any_rank(problem is not None):
            return path
        logger.warning("%s is damaged and is passed over: %s", path.name, problem or "another rank's log says how")
    if newest_first(root):
        raise RecipeError(
            f"{root}: every checkpoint is damaged, and starting anew would write over the run; move them away, or set "
            "checkpoint.resume=false and another output_dir"
        )
    return None


def _restore_random(path: Path) -> None:
    """Draw on where the run stopped, if it had as many ranks; each rank has its own state."""
    own = path / f"random-{dist.get_rank()}.json"
    if read_run(path).get("world_size") == dist.get_world_size() and own.is_file():
        restore_random_state(json.loads(own.read_text(encoding="utf-8")))


def _list_losses(losses: dict[str, float]) -> str:
    names = [(name.partition("/")[2], value) for name, value in losses.items() if "/" in name]
    return ", ".join(f"{value:.4f} ({name})" for name, value in names)


def _check_same_model(path: Path, recipe: Recipe, *, resuming: bool = True) -> frozenset[str]:
    """Refuse a checkpoint of another model, by the first key that differs.

    Returns:
        Parameters that the checkpoint has not, and that begin anew.

    Raises:
        RecipeError: naming the key.
    """
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"checkpoint.load: {path} holds parts of a model only; "
            "compose a whole one with tools/checkpoint_convert/hf_to_megatron.py --language ... --vision ..."
        )
    saved = expand_presets({"model": read_tree(path).get("model") or {}})["model"]  # for those written by hand
    wanted = to_tree(recipe)["model"]
    for branch in BRANCHES:
        own = getattr(recipe.model, branch)
        for key, value in wanted[branch].items():
            there = saved[branch].get(key, own.__pydantic_fields__[key].default)
            there = list(there) if isinstance(there, tuple) else there  # a default, which YAML has as a list
            if there == value or not meaning_of(own, key).fixed:
                continue
            if key == "preset" and _same_kind(branch, str(there), value):
                continue
            raise RecipeError(
                f"model.{branch}.{key}: {_shown(value)}, but {path} was saved with {_shown(there)}; "
                "set it to that, or choose another output_dir or checkpoint.load"
            )
    return _new_newline(path, saved, recipe, resuming=resuming)


def _shown(value: object) -> str:
    """Return a value as messages have it: the first numbers of a long list."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:80]} .. (whole in its recipe.yaml)"


def _new_newline(path: Path, saved: dict[str, Any], recipe: Recipe, *, resuming: bool) -> frozenset[str]:
    """Return the newline vector, where a run is the first with one: a stage that is started from one without.

    LLaVA-1.6's stage 1 shows pictures whole, and its stage 2 in tiles.

    Raises:
        RecipeError: naming the key; the run goes on, the vector would not learn, or it would be thrown away.
    """
    kind, kinds = (saved.get("image") or {}).get("kind", ImageConfig().kind), plan_kinds()
    if kind not in kinds or kinds[kind].plan.newline == plan_of(recipe.model).newline:
        return frozenset()
    own = recipe.model.image.kind
    has, lacks = (kind, own) if kinds[kind].plan.newline else (own, kind)
    both = (
        f"model.image.kind: {own!r}, but {path} was saved with {kind!r}; {has} has a learned newline vector and "
        f"{lacks} has none"
    )
    if has == kind or resuming:
        raise RecipeError(f"{both}: choose a plan that agrees with the checkpoint in that")
    if recipe.modules.connector.freeze:
        raise RecipeError(f"{both}, and it would not learn: set modules.connector.freeze to false")
    logger.info("%s: it begins anew", both)
    return frozenset({f"connector.{NEWLINE}"})


def _same_kind(branch: str, *presets: str) -> bool:
    """Whether two presets of a branch are sizes of the same architecture, which other keys say."""
    try:
        one, other = (BRANCHES[branch].find(preset) for preset in presets)
    except UserError:
        return False
    return one.architecture is other.architecture and not (one.pattern or other.pattern)
