"""Small tokenizer files of the usual layouts: Qwen2's and LLaVA's ``tokenizer.json``, Llama's ``tokenizer.model``."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

QWEN2_ADDED = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
GLM_ADDED = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|image|>", "<|video|>"),
)
"""In the order of zai-org/GLM-4.1V-9B-Thinking, whose pictures' tokens lie beside each other."""
QWEN2_PLAIN_ADDED = ("<tool_call>", "</tool_call>")
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Hello world",
    " two  spaces \n\n lines\t",
    "user\nassistant\nsystem\n",
    "café é 你好 \U0001f389 12345",
    "It's 3<4 && 5>2; <b>bold</b> <0x0A> <|im_end <|extra_0|>",
    "a<|im_start|>user\nHi<|im_end|>\n",
    "",
    " ",
    "\n",
]


def sentences() -> list[str]:
    rng = random.Random(0)
    words = [
        "the",
        "cat",
        "sat",
        "a",
        "red",
        "mat",
        "You",
        "are",
        "helpful",
        "assistant",
        "user",
        "How",
        "many?",
        "Two.",
    ]
    return [" ".join(rng.choice(words) for _ in range(8)) for _ in range(300)]


def write_qwen2(directory: Path, added: Sequence[str] = QWEN2_ADDED, plain: Sequence[str] = QWEN2_PLAIN_ADDED) -> Path:
    """Byte-level BPE, whose special tokens are added behind its vocabulary; with others of GLM-4's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return _save(tokenizer, directory)


def write_llava(directory: Path) -> Path:
    """Llama's BPE with byte fallback: a space before text, a BOS by the post-processor, ``<image>`` and ``<pad>``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*control, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    # A word at a time, as it would be met in the middle of a text.
    tokenizer.train_from_iterator([word for text in sentences() for word in text.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in control]
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<image>", "<pad>")])
    return _save(tokenizer, directory)


def write_llama(directory: Path, **options: Any) -> Path:
    """SentencePiece BPE with byte fallback and a dummy prefix."""
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 360,
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        hard_vocab_limit=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **(defaults | options),
    )
    path = directory / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def write_tiktoken(directory: Path) -> Path:
    """Qwen's file, with three merges."""
    tokens = [bytes([i]) for i in range(256)] + [b"us", b"er", b"user"]
    path = directory / "qwen.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)))
    return path


def _save(tokenizer: Tokenizer, directory: Path) -> Path:
    path = directory / "tokenizer.json"
    tokenizer.save(str(path))
    return path
