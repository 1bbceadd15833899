"""The fields of a chat completion that are not obeyed, and the values at which they change nothing.

Clients send much unasked. A field whose value says "nothing of the kind" is taken; one that would change the answer is
refused with its name, as is one that is not known: it may be a misspelt one. ``null`` always means "not given".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megavlm.inference.server.errors import bad_request

READ = frozenset(
    {
        "model", "messages", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens",
        "max_completion_tokens", "n", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs",
    }
)  # fmt: skip
"""Obeyed."""

IGNORED = frozenset(
    {
        # OpenAI's: bookkeeping, billing and caches.
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "parallel_tool_calls",
        # Other servers': names, caches and places in a queue.
        "request_id", "rid", "cache_salt", "priority", "cache_prompt", "keep_alive", "ttl",
    }
)  # fmt: skip
"""They change nothing about the answer, whatever they hold."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # How tokens are chosen, elsewhere (vLLM, SGLang, TGI, llama.cpp, Transformers).
    "min_p": (0,),
    "typical_p": (1,),
    "top_a": (0,),
    "mirostat": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "num_return_sequences": (1,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "no_repeat_ngram_size": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "watermark": (False,),
    "detokenize": (True,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "grammar": (),
    # How a prompt is made and an answer is written, elsewhere. Special tokens such as <box> are always written.
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "truncate_prompt_tokens": (-1,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_hidden_states": (False,),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    # Reasoning, which this server's models have not.
    "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},),
    "reasoning": ({}, {"enabled": False}, {"effort": "none"}),
    "include_reasoning": (True, False),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    # Empty bags of further fields.
    "extra_body": ({},),
    "options": ({},),
    "provider": ({},),
    "plugins": ([],),
    "transforms": ([],),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
    "custom_params": ({},),
}


def check_fields(body: Mapping[str, Any]) -> None:
    """Refuse a request with a field that is not understood, or whose wish cannot be fulfilled.

    Args:
        body: what was sent, without nulls.

    Raises:
        ApiError: there is one.
    """
    for key, value in body.items():
        if key in READ or key in IGNORED:
            continue
        if key not in NEUTRAL:
            raise bad_request(f"{key[:100]}: there is no such parameter", key[:100], "unknown_parameter")
        if not any(_equal(value, neutral) for neutral in NEUTRAL[key]):
            raise bad_request(f"{key}: this server does not support it; leave it out", key, "unsupported_parameter")


def check_inner(inner: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse an object within a message that holds something else than ``known``, unless it is empty.

    A picture in a field of another server's form would be left out in silence.

    Raises:
        ApiError: it does.
    """
    for key, value in inner.items():
        if key not in known and value not in (None, False, "", [], {}):
            name = f"{where}.{key[:100]}"
            raise bad_request(f"{name}: there is no such field", name, "unknown_parameter")


def _equal(value: Any, neutral: Any) -> bool:
    """Whether they are the same, where 0 is 0.0 but not false."""
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (value, neutral))
    return (numbers or type(value) is type(neutral)) and bool(value == neutral)
