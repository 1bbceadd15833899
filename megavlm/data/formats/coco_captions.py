"""COCO's captions: ``{"images": [{"id", "file_name", ..}], "annotations": [{"id", "image_id", "caption"}]}``.

Source: cocodataset.org/#format-data, caption generation. Flickr30k-CNA, nocaps and others come in the same form. Each
caption is a record, in Qwen-VL's words: ``Generate the caption in English:`` (in Chinese, where it is).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.formats.base import Broken, BrokenError, Record, field, identity, language_of, pair, plain
from megavlm.data.formats.source import Source

_SPLIT = re.compile(r"(?:train|val|test)\d{4}")


def matches(source: Source) -> bool:
    """Whether it is an object with images and annotations that have captions."""
    if not isinstance(source.outline.get("images"), list):
        return False
    annotations = source.outline.get("annotations")
    return isinstance(annotations, list) and any(isinstance(a, dict) and "caption" in a for a in annotations)


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield a record for each caption.

    Raises:
        UserError: The file is no caption file.
    """
    if not matches(source):
        raise UserError(f"{source.path} has no 'images' and 'annotations' with captions; give COCO's captions_*.json")
    files = {image["id"]: image.get("file_name") for image in source.rows("images") if _has_id(image)}
    for annotation in source.rows("annotations"):
        try:
            yield _record(source, files, annotation)
        except BrokenError as error:
            yield error.about(identity(annotation, "id"))


def _has_id(image: Any) -> bool:
    return isinstance(image, dict) and isinstance(image.get("id"), str | int)


def _record(source: Source, files: dict[str | int, Any], annotation: Any) -> Record:
    image_id = field(annotation, "image_id", (str, int))
    name = files.get(image_id)
    if not isinstance(name, str) or not name:
        raise BrokenError("image missing", f"image {image_id} is not among the file's images")
    caption = plain(field(annotation, "caption"), "the caption")
    split = _SPLIT.search(source.path.stem)
    image = source.find_image([name, *([f"{split[0]}/{name}"] if split else [])])
    return pair(
        annotation.get("id", image_id), "caption", image, f"Generate the caption in {language_of(caption)}:", caption
    )
