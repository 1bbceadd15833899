"""Formats that ``megavlm prepare`` reads. One line here and one module with ``matches`` and ``read`` add another."""

from megavlm.data.formats.base import Broken, BrokenError, Record
from megavlm.data.formats.registry import Format, choose, formats, register
from megavlm.data.formats.source import Source

__all__ = ["Broken", "BrokenError", "Format", "Record", "Source", "choose", "formats", "register"]

_HERE = "megavlm.data.formats"

register("qwen-vl", f"{_HERE}.qwen_vl", "Qwen-VL's conversation JSON")
register("llava", f"{_HERE}.llava", "LLaVA's conversation JSON (image beside the conversation, <image> in its text)")
register(
    "codefuse", f"{_HERE}.codefuse", "CodeFuse-VLM's folder: LLaVA JSON by task, or parquet of prompts and answers"
)
register("messages", f"{_HERE}.messages", "messages of roles and contents: OpenAI's, Hugging Face's, ms-swift's, "
         "LLaMA-Factory's")  # fmt: skip
register("alpaca", f"{_HERE}.alpaca", "instruction, input and output, or query and response, with history")
register("coco-captions", f"{_HERE}.coco_captions", "COCO's captions_*.json")
register("vqa", f"{_HERE}.vqa", "questions and answers of VQAv2, OK-VQA, VizWiz, TextVQA, DocVQA, GQA, OCR-VQA, "
         "Visual Genome", ("annotations",))  # fmt: skip
register(
    "vg-regions",
    f"{_HERE}.vg_regions",
    "Visual Genome's region_descriptions.json",
    ("image_info", "per_sample", "boxes"),
)
register("synthdog", f"{_HERE}.synthdog", "SynthDoG's metadata.jsonl, also that of megavlm render-text, or its parquet")
