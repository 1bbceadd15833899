"""Tiny Idefics3 and SmolVLM: by Transformers, with the tokenizer and the processor files that published ones have."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import _TEXT, _VISION, made
from tokenizer_files import write_qwen2
from tokenizers import AddedToken, Tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

SIDE, IMAGE = 28, 119
TOKENS = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)), "<image>",
)  # fmt: skip
CLASSES: dict[str, tuple[type[PreTrainedModel], Callable[..., PretrainedConfig]]] = {
    "Idefics3": (Idefics3ForConditionalGeneration, Idefics3Config),
    "SmolVLM": (SmolVLMForConditionalGeneration, SmolVLMConfig),
}


def idefics3_files(kind: str = "Idefics3", longest: int = 2 * SIDE) -> dict[str, Any]:
    """``preprocessor_config.json`` as HuggingFaceTB/SmolVLM-256M-Instruct has it, for tiles of 28 pixels."""
    return {
        "do_convert_rgb": True, "do_image_splitting": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
        "do_resize": True, "image_mean": [0.5] * 3, "image_processor_type": f"{kind}ImageProcessor",
        "image_std": [0.5] * 3, "max_image_size": {"longest_edge": SIDE}, "processor_class": f"{kind}Processor",
        "resample": 1, "rescale_factor": 1 / 255, "size": {"longest_edge": longest},
    }  # fmt: skip


def idefics3(
    text: PretrainedConfig | None = None, *, kind: str = "Idefics3", factor: int = 2, tied: bool = False,
    image: int = IMAGE, **vision: Any,
) -> PreTrainedModel:  # fmt: skip
    """Idefics3: SigLIP's last layer behind the norm, squares of patches through one matrix, a Llama."""
    model, config = CLASSES[kind]
    text = text or LlamaConfig(**{**_TEXT, "tie_word_embeddings": tied}, rms_norm_eps=1e-5)
    own = config(
        vision_config={**_VISION, **vision}, text_config=text.to_dict(), image_token_id=image, scale_factor=factor,
        tie_word_embeddings=tied,
    )  # fmt: skip
    one = made(model, own)
    one.save_pretrained = functools.partial(_publish, one, kind)  # type: ignore[method-assign]
    return one


def _publish(model: PreTrainedModel, kind: str, directory: Path, **keys: Any) -> None:
    type(model).save_pretrained(model, directory, **keys)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(idefics3_files(kind), indent=2))


def _saved(directory: Path, **keys: Any) -> Path:
    idefics3(**keys).save_pretrained(directory)
    return directory


def idefics3_hub(directory: Path) -> Path:
    """A config.json as the first published ones have it: the tower called idefics3, and what is said of a Llama."""
    idefics3().save_pretrained(directory)
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    tree["vision_config"]["model_type"] = "idefics3"
    tree["text_config"] |= {
        "architectures": ["VLlama3ForCausalLM"], "qk_layer_norms": False, "rope_interleaved": False,
        "use_resampler": False, "pixel_shuffle_factor": 2, "neftune_noise_alpha": 0.0,
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    return directory


class TilesSource(TransformersSource):
    """A class that takes the tiles of all pictures of a sample together."""

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Let Transformers' processor make the tiles."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, 3, plan.side, plan.side), heights, layouts)
        made_ = self.processor([photographs(sizes)], return_tensors="pt")
        given = {key: torch.as_tensor(made_[key]) for key in ("pixel_values", "pixel_attention_mask")}
        pixels = given["pixel_values"][0]
        assert len(pixels) == sum(len(own.views) for own in layouts)
        return Shown(ids, given, pixels, heights, layouts)


# What the processors of both carry.
CHAT = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for one in message['content'] %}"
    "{{ '<image>' if one['type'] == 'image' else one['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def idefics3_answers(directory: Path, kind: str = "Idefics3", begin: str = "<|begin_of_text|>") -> Path:
    """With tokenizer, template and processor."""
    directory.mkdir(parents=True, exist_ok=True)
    path = write_qwen2(directory)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (begin, *TOKENS)])
    tokenizer.save(str(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    text = LlamaConfig(**{**_TEXT, "vocab_size": tokenizer.get_vocab_size(), "tie_word_embeddings": False})
    text.max_position_embeddings = 1024
    idefics3(text, kind=kind, image=tokenizer.token_to_id("<image>")).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(begin + CHAT)
    own = {"image_seq_len": 4, "processor_class": f"{kind}Processor"}
    (directory / "processor_config.json").write_text(json.dumps(own))
    return directory


IDEFICS3 = {
    "idefics3": ("idefics3", _saved),
    "idefics3_tied": ("idefics3", functools.partial(_saved, tied=True, factor=4)),
    "idefics3_hub": ("idefics3", idefics3_hub),
    "smolvlm": ("smolvlm", functools.partial(_saved, kind="SmolVLM")),
}
"""Checkpoints: family, and what writes them."""
