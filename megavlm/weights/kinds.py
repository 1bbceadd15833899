"""What a directory is that somebody gave for something else: said with the command that makes of it what is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.config.prepared import META

_HF_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "visual.bin",
    "mm_projector.bin",
)  # fmt: skip
LANGUAGE, OUTSIDE = "llm", "outside"
"""The folder of a language model in a checkpoint in pieces; where such a one's own small files are kept."""
_PIECES = (LANGUAGE, "visual_encoder", "projector")
EVA_TOWER, Q_FORMER, PROJECTION = "eva_vit_g", "blip2", "minigpt"
"""What the pieces of a MiniGPT are called beside its language model; each is a file."""
_EVA_FILE = "eva_vit_g.pth"
DINO, SIGLIP, TRAINED = "dino_featurizer", "siglip_featurizer", "trained"
"""What the pieces of a Cobra are called: two folders of timm's, and the file of what was trained."""
COBRA_FILE = "checkpoints/latest-checkpoint.pt"
_IN = "megavlm convert hf-to-megatron"


def _any(path: Path, *patterns: str) -> bool:
    return path.is_dir() and any(next(path.glob(pattern), None) is not None for pattern in patterns)


def pieces_of(path: Path) -> dict[str, Path]:
    """Return the pieces of a checkpoint whose parts lie apart (xtuner, HPT 1.5, MiniGPT-4); empty for another.

    The language model, and the tokenizer, are in ``llm``, or outside of the folders.
    """
    found = {name: path / name for name in _PIECES if (path / name).is_dir()}
    return found if {"visual_encoder", "projector"} <= found.keys() else _minigpt(path) or _cobra(path)


def _cobra(path: Path) -> dict[str, Path]:
    """Return the pieces of a Cobra: what its code trained and saved, and timm's towers in folders beside it."""
    found = {name: path / name for name in (DINO, SIGLIP) if (path / name).is_dir()}
    if len(found) < 2:
        return {}
    return found | ({TRAINED: path / COBRA_FILE} if (path / COBRA_FILE).is_file() else {})


def _minigpt(path: Path) -> dict[str, Path]:
    """Return the pieces of a MiniGPT: the files that its code reads beside ``llm``, each as ``torch.save`` wrote it.

    Raises:
        UserError: there are several files of a kind.
    """
    if not (path / _EVA_FILE).is_file() or not (path / LANGUAGE).is_dir():
        return {}
    found = {LANGUAGE: path / LANGUAGE, EVA_TOWER: path / _EVA_FILE}
    others = sorted(file for file in path.glob("*.pth") if file.name != _EVA_FILE)
    for name, what in ((Q_FORMER, "BLIP-2's Q-Former (blip2_*.pth)"), (PROJECTION, "what was trained behind it")):
        files = [file for file in others if file.name.startswith("blip2_") == (name == Q_FORMER)]
        if len(files) > 1:
            raise UserError(f"{path}: both {files[0].name} and {files[1].name} may be {what}; move one elsewhere")
        if files:
            found[name] = files[0]
    return found


def is_hugging_face(path: Path) -> bool:
    """Whether weights lie at ``path`` as the Hugging Face hub has them; a directory may hold other things as well."""
    return _any(path, *_HF_WEIGHTS) or (path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".pth"))


def holds_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a published checkpoint of megavlm, or a run that has one."""
    if (path / "run.json").is_file():
        return True
    found = [child for root in (path, path / "checkpoints") if root.is_dir() for child in root.glob("step-*")]
    return any(re.fullmatch(r"step-\d{8,}", child.name) and child.is_dir() for child in found)


def holds_model(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face directory, of weights that are there or should be, and no checkpoint of ours.

    A half downloaded one is one as well: whoever opens it says what is missing.
    """
    if not path.is_dir() or holds_checkpoint(path):
        return False
    if any((path / name).is_file() for name in ("adapter_config.json", "conversion.json")):
        return False
    return (
        (path / "config.json").is_file() or is_hugging_face(path) or not {LANGUAGE, TRAINED}.isdisjoint(pieces_of(path))
    )


# In this order: the first that holds names the directory.
_KINDS: tuple[tuple[Callable[[Path], bool], str], ...] = (
    (
        holds_checkpoint,
        "a checkpoint of megavlm, or a run with some; to Hugging Face it goes by: megavlm convert megatron-to-hf "
        "--megatron {path} --out DIR",
    ),
    (
        lambda path: (path / "adapter_config.json").is_file(),
        "an adapter as PEFT saves it; convert it with its base: "
        + _IN + " --adapter {path} --base CHECKPOINT --out DIR",
    ),
    (
        lambda path: (path / "conversion.json").is_file(),
        "the folder of small files in a checkpoint; give {parent}",
    ),
    (
        lambda path: path.name.endswith(".partial") or _any(path, "step-*.partial", "checkpoints/step-*.partial"),
        "unfinished: what was writing it was interrupted; start that again",
    ),
    (
        lambda path: (path / "latest_checkpointed_iteration.txt").is_file() or _any(path, "iter_*/", "mp_rank_*"),
        "a checkpoint of Megatron-LM, which is not read; save it in Hugging Face's format, then: "
        + _IN + " --hf DIR --out CHECKPOINT",
    ),
    (
        lambda path: (path / ".metadata").is_file() or _any(path, "*.distcp"),
        "a distributed checkpoint without run.json, so it is not one that megavlm published",
    ),
    (
        is_hugging_face,
        "weights in Hugging Face's format; convert them once: " + _IN + " --hf {path} --out CHECKPOINT",
    ),
    (
        lambda path: (path / COBRA_FILE).is_file(),
        "what Cobra's code trained, without the towers, which it takes from timm: put vit_large_patch14_reg4_dinov2 "
        f"into {{path}}/{DINO} and vit_so400m_patch14_siglip_384 into {{path}}/{SIGLIP} (a model.safetensors each)",
    ),
    (lambda path: (path / META).is_dir(), "a data set that megavlm prepare made"),
    (lambda path: (path / "config.json").is_file(), "a Hugging Face directory without its weights; download them too"),
    (lambda path: path.is_file(), "a file; give a directory"),
)  # fmt: skip


def what_is(path: Path) -> str | None:
    """Return what lies at ``path``, with the way from there to a checkpoint; None where nothing tells."""
    if not path.exists():
        return "not there; correct the path"
    for holds, text in _KINDS:
        if holds(path):
            return text.format(path=path, parent=path.parent)
    inside = sorted(
        child.name for child in path.iterdir() if child.is_dir() and (holds_checkpoint(child) or is_hugging_face(child))
    )
    if inside:
        return f"a directory of others; give one of {', '.join(inside[:5])}{', ..' if len(inside) > 5 else ''} in it"
    return None
