"""What the page shows, taken through the code that trains: tokenizer, chat template, label mask and packer."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field

from megavlm.config.checks import source_name
from megavlm.config.errors import UserError
from megavlm.config.schema import DataConfig
from megavlm.data.batch import Pack
from megavlm.data.box_space import BoxSpace
from megavlm.data.cache import located
from megavlm.data.codes import check_codes
from megavlm.data.decoders import make_decoder
from megavlm.data.energon_dataset import PackEncoder, RawSample
from megavlm.data.media import ImagePlan
from megavlm.data.packing import PackableSample, Weigh, build_pack
from megavlm.data.read_pack import decode_pack
from megavlm.data.reader import PackReader
from megavlm.data.shard_reader import DEFECT, ShardReader, open_shards
from megavlm.data.tokenizer import Tokenizer

NO_TASK = "(none)"
_MOST_NAMED = 50
"""Samples of a data set that are named as left out."""


@dataclass
class Counts:
    """Figures of one data set."""

    name: str
    path: str
    total: int
    """Samples that it has."""
    scanned: int = 0
    """Samples that were looked at; the figures below are about them."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each usable sample."""
    images: Counter[int] = field(default_factory=Counter)
    """Samples by number of pictures."""
    films: Counter[int] = field(default_factory=Counter)
    """Samples by number of films."""
    tasks: Counter[str] = field(default_factory=Counter)
    """Samples by task."""
    supervised: int = 0
    """Tokens that are trained on."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples that training would leave out, by cause."""
    named: list[tuple[str, str]] = field(default_factory=list)
    """Key and cause of the first of these."""


@dataclass(frozen=True)
class Shown:
    """A sample laid out as a pack of its own, without padding."""

    pack: Pack
    task: str


@dataclass
class Collected:
    """Everything on the page."""

    data: DataConfig
    plan: ImagePlan
    names: list[str]
    counts: list[Counts]
    samples: list[Shown] = field(default_factory=list)
    packs: list[Pack] = field(default_factory=list)
    masked: dict[str, str] = field(default_factory=dict)
    """Why no token of a sample is supervised, by its key, where a picture of it cannot be decoded."""
    space: BoxSpace | None = None
    """What the numbers of boxes count; None where they count parts of the picture."""


def collect(
    data: DataConfig,
    tokenizer: Tokenizer,
    plan: ImagePlan,
    seed: int,
    *,
    replicas: int = 1,
    samples: int,
    packs: int,
    scan: int,
    weigh: Weigh | None = None,
) -> Collected:
    """Read the data sets of ``data.train``.

    Args:
        data: The data branch, with prepared data sets.
        tokenizer: Its tokenizer.
        plan: What becomes of pictures.
        seed: Seed of the order of the packs.
        replicas: Data-parallel size.
        samples: Samples to show, taken from all data sets in turn, spread over each.
        packs: Packs to show: the first of the first data-parallel rank.
        scan: Samples of each data set to count, spread over it.
        weigh: Says how heavy the pictures of a sample are, as training's reader does.

    Raises:
        MissingFileError: A shard is missing.
        UserError: No sample is usable.
    """
    data = dataclasses.replace(data, train=tuple(located(source, data) for source in data.train))
    for source in data.train:
        check_codes(source.path, None)
    names = [source_name(source) for source in data.train]
    encoder = PackEncoder(data, names, tokenizer, plan)
    found = Collected(data, plan, names, [])
    kept: list[list[Shown]] = []
    for index, source in enumerate(data.train):
        reader = open_shards(source.path)
        counts = Counts(names[index], source.path, len(reader))
        found.counts.append(counts)
        kept.append(_scan(reader, encoder, index, counts, scan, samples))
    if not any(counts.lengths for counts in found.counts):
        skipped = sum((counts.skipped for counts in found.counts), Counter[str]())
        causes = ", ".join(f"{number} {cause}" for cause, number in skipped.most_common())
        remedy = "raise --sequence-length" if "too long" in skipped else "prepare the data again"
        raise UserError(f"no sample of {', '.join(names)} can be trained on ({causes}); {remedy}")
    found.samples = _share_out(kept, samples)
    if packs:
        with warnings.catch_warnings():
            # As many workers as the recipe has make the packs what they are, also on a small machine.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            packed = PackReader(
                data.train, data, tokenizer, plan, weigh=weigh, rank=0, world_size=replicas, seed=seed, training=True
            )
            found.packs = [next(packed) for _ in range(packs)]
        packed.close()
    # As the trainer's feed does it: a sample with a picture that cannot be decoded loses its labels.
    decoder = make_decoder(data.image_decoder, alpha=data.image_alpha)
    for pack in (*(shown.pack for shown in found.samples), *found.packs):
        read = decode_pack(pack, decoder, plan, tokenizer.imgpad_id)
        found.masked |= {f"{skipped.dataset}/{skipped.key}": skipped.cause for skipped in read.masked}
    return found


def _scan(reader: ShardReader, encoder: PackEncoder, source: int, counts: Counts, scan: int, show: int) -> list[Shown]:
    """Count samples spread over a data set; return some of them, spread as well."""
    positions = _spread(counts.total, scan)
    wanted = set(_spread(len(positions), show))
    shown: list[Shown] = []
    missed = 0
    for number, position in enumerate(positions):
        raw = reader[position]
        files = {key: value for key, value in raw.items() if not key.startswith("__")}
        sample = RawSample(raw["__key__"], raw["__restore_key__"], files, source, raw["__shard__"], raw.get(DEFECT))
        checked = encoder.encode_sample(sample)
        counts.scanned += 1
        missed += number in wanted
        if checked.sample is None:
            assert checked.skipped is not None
            counts.skipped[checked.skipped.cause] += 1
            if len(counts.named) < _MOST_NAMED:
                counts.named.append((f"{counts.name}/{checked.skipped.key}", checked.skipped.cause))
            continue
        task = _task(files)
        pack = _alone(checked.sample, encoder)
        counts.lengths.append(len(checked.sample))
        films = sum(not isinstance(data, bytes) for data in checked.sample.images)
        counts.images[len(checked.sample.images) - films] += 1
        counts.films[films] += 1
        counts.tasks[task] += 1
        counts.supervised += pack.supervised_tokens
        if missed:  # the next usable one stands in for one that is not
            missed -= 1
            shown.append(Shown(pack, task))
    return shown


def _share_out(kept: list[list[Shown]], most: int) -> list[Shown]:
    """Take as many of each data set as of the others, while they last; those of each spread over it."""
    ranks = sorted((at, index) for index, shown in enumerate(kept) for at in range(len(shown)))[:most]
    numbers = Counter(index for _, index in ranks)
    spread = {index: iter(_spread(len(kept[index]), number)) for index, number in numbers.items()}
    return [kept[index][next(spread[index])] for _, index in ranks]


def _alone(sample: PackableSample, encoder: PackEncoder) -> Pack:
    return build_pack([sample], len(sample), encoder.tokenizer.eos_id)


def _task(files: dict[str, bytes]) -> str:
    task = json.loads(files["json"]).get("task")
    return NO_TASK if task is None else str(task)


def _spread(total: int, most: int) -> list[int]:
    """At most ``most`` numbers below ``total``, evenly spread, from 0."""
    count = min(total, most)
    return [number * total // count for number in range(count)]
