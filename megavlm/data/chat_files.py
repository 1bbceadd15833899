"""The small files beside a tokenizer that say how its model is spoken to, as Transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json

_JINJA, _PROCESSOR_TEMPLATE = "chat_template.jinja", "chat_template.json"
_TOKENIZER, _SPECIAL, _PROCESSOR = "tokenizer_config.json", "special_tokens_map.json", "processor_config.json"
_GENERATION = "generation_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROCESSOR_FILES = (_PROCESSOR_TEMPLATE, _PROCESSOR, "preprocessor_config.json")
_LARGEST = 16 << 20

Tree = dict[str, Any]


class NoTemplateError(UserError):
    """No chat template lies beside a tokenizer."""


class ChatFiles:
    """What lies beside a tokenizer.

    Args:
        tokenizer: the tokenizer's file.

    Raises:
        UserError: a file is broken.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer, self.directory = tokenizer, tokenizer.parent
        self.settings = self._read(_TOKENIZER)
        special = self._read(_SPECIAL)
        found = {key: special.get(key) if self.settings.get(key) is None else self.settings[key] for key in _TOKENS}
        more = self.settings.get("extra_special_tokens")
        found |= {key: value for key, value in self.settings.items() if key.endswith("_token") and key not in _TOKENS}
        found |= more if isinstance(more, dict) else {}
        self.tokens = {key: text for key, value in found.items() if (text := _content(value))}
        """Texts of the special tokens, by Transformers' names."""

    def template(self, name: str = "") -> tuple[str, str]:
        """Return the chat template's text, and its file for messages.

        Args:
            name: which, of several; empty for the default one.

        Raises:
            UserError: there is none.
        """
        found: dict[str, tuple[str, str]] = {}
        jinja = self.directory / _JINJA
        if jinja.is_file():
            found["default"] = self._text(jinja), str(jinja)
        for file in (_PROCESSOR_TEMPLATE, _PROCESSOR, _TOKENIZER):
            value = self._read(file).get("chat_template")
            if value is None:
                continue
            for key, text in _named(value, str(self.directory / file)).items():
                found.setdefault(key, (text, str(self.directory / file)))
        if not found:
            raise NoTemplateError(
                f"model.template: checkpoint takes the chat_template beside the tokenizer, and {self.directory} has "
                f"none ({_JINJA}, {_PROCESSOR_TEMPLATE}, {_TOKENIZER}); name a registered template (docs/templates.md)"
            )
        wanted = name or ("default" if "default" in found else next(iter(found)) if len(found) == 1 else "default")
        if wanted not in found:
            raise UserError(
                f"model.template: {self.directory} has no chat template {wanted!r}, only {', '.join(sorted(found))}; "
                f"write checkpoint:{sorted(found)[0]}"
            )
        return found[wanted]

    def begin(self) -> tuple[str, ...]:
        """Return the token that Transformers puts in front of what a processor encodes, where text lacks it.

        ``tokenizer.apply_chat_template`` puts none; a processor (of a model with pictures) encodes as the tokenizer
        does by itself.
        """
        bos = self.tokens.get("bos_token")
        if bos is None or not any((self.directory / name).is_file() for name in _PROCESSOR_FILES):
            return ()
        return (bos,) if self._adds_bos(bos) else ()

    def ends(self) -> tuple[str, ...]:
        """Return names of the token that ends a document."""
        own = self.tokens.get("eos_token")
        usual = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
        return tuple(dict.fromkeys([*([own] if own else []), *usual]))

    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer, as ``generation_config.json`` says."""
        value = self._read(_GENERATION).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        return tuple(one for one in values if type(one) is int and one >= 0)

    def image_names(self) -> list[str]:
        """Return what the files call the token of an image's slots."""
        return [text for one in (self._read(_PROCESSOR), self.tokens) if (text := _content(one.get("image_token")))]

    def known_tokens(self) -> frozenset[str]:
        """Return the special tokens that the files name."""
        names = set(self.tokens.values())
        for file in (self.tokenizer.name, "tokenizer.json"):
            if file.endswith(".json"):
                added = self._read(file).get("added_tokens")
                names |= {e["content"] for e in added if isinstance(e, dict) and "content" in e} if added else set()
        decoder = self.settings.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            names |= {e["content"] for e in decoder.values() if isinstance(e, dict) and "content" in e}
        names |= set(self._read("added_tokens.json"))
        return frozenset(name for name in names if isinstance(name, str))

    def _adds_bos(self, bos: str) -> bool:
        if isinstance(self.settings.get("add_bos_token"), bool):
            return bool(self.settings["add_bos_token"])
        tree = self._read("tokenizer.json")
        if not tree:
            return (
                str(self.settings.get("tokenizer_class", "")).startswith("Llama") or self.tokenizer.suffix == ".model"
            )
        post = tree.get("post_processor") or {}
        steps = post.get("processors") or [post]
        singles = [one.get("single") or [] for one in steps if isinstance(one, dict)]
        return any(s and isinstance(s[0], dict) and s[0].get("SpecialToken", {}).get("id") == bos for s in singles)

    def _read(self, name: str) -> Tree:
        path = self.directory / name
        if not path.is_file() or (path.stat().st_size > _LARGEST and name != "tokenizer.json"):
            return {}
        return read_json(path)

    @staticmethod
    def _text(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8: {error}") from None


def has_template(tokenizer: Path) -> bool:
    """Whether a chat template lies beside a tokenizer, be it a good one or not."""
    try:
        ChatFiles(tokenizer).template()
    except NoTemplateError:
        return False
    except UserError:
        return True
    return True


def _content(value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _named(value: Any, where: str) -> dict[str, str]:
    """Return templates by name, from a text or a list of named ones.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return dict(value)
    if isinstance(value, list):
        try:
            found = {one["name"]: one["template"] for one in value}
        except (TypeError, KeyError):
            found = {}
        if found and all(isinstance(text, str) for pair in found.items() for text in pair):
            return found
    raise UserError(f"{where}: chat_template must be a text, or a list of names and templates; restore the file")
