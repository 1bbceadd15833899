"""The chat templates of MiniGPT-4 and MiniGPT-v2: rows as in :mod:`megavlm.data.template_rows`."""

from __future__ import annotations

from dataclasses import replace

from megavlm.data.template import TEXT, ControlToken, Template, trained

# MiniGPT-4's stage 2 on Vicuna (train_configs/minigpt4_stage2_finetune.yaml, minigpt_base.py and conversation.py of
# Vision-CAIR/MiniGPT-4 @ d94738a7): "###" ends a question and an answer, as plain text. The demo's system sentence was
# not trained, and is left out. A picture is marked by words.
MINIGPT4 = Template(
    name="minigpt4",
    title="MiniGPT-4 on Vicuna",
    begin=("<s>", "###"),
    user=("Human: ", TEXT, " ###"),
    assistant=("Assistant: ", *trained(TEXT, "###")),
    tokens=(ControlToken(("<s>",)),),
    image=("<Img>", "</Img>"),
    picture="{image} ",
    eos=("</s>",),
    stop_text="###",
)
# MiniGPT-v2's (train_configs/minigptv2_finetune.yaml): every exchange begins a document. Llama's tokenizer puts the
# space in front of an answer, which is encoded by itself. Which task words ([vqa], [caption], [grounding], [refer],
# [identify], [detection]) stand between picture and question is the data's.
MINIGPT_V2 = Template(
    name="minigpt_v2",
    title="MiniGPT-v2's [INST]",
    user=("<s>", "[INST] ", TEXT, " [/INST]"),
    assistant=trained(" ", TEXT, "</s>"),
    tokens=(ControlToken(("<s>",)), ControlToken(("</s>",))),
    image=("<Img>", "</Img>"),
    picture="{image} ",
    eos=("</s>",),
    boxes="minigpt_v2",
)
# MiniGPT-4's on Llama 2 (train_configs/minigpt4_llama2_stage2_finetune.yaml): a space more, a token of its own.
MINIGPT4_LLAMA_2 = replace(
    MINIGPT_V2,
    name="minigpt4_llama_2",
    title="the same of MiniGPT-4 on Llama 2",
    user=("<s>", "[INST] ", TEXT, " [/INST] "),
    assistant=trained(TEXT, "</s>"),
    boxes="",
)
# TinyGPT-V's (minigpt4/models/{minigpt_base,minigpt_v2}.py, train_configs/tinygptv_stage{3,4}.yaml of
# DLYuanGod/TinyGPT-V @ 83f6189b): words of MiniGPT-4, Phi-2's token in front of each exchange. Its demo has no space in
# front of "###".
TINYGPT_V = replace(
    MINIGPT4,
    name="tinygpt_v",
    title="TinyGPT-V",
    begin=(),
    user=("<|endoftext|>", "###Human: ", TEXT, " ###"),
    tokens=(ControlToken(("<|endoftext|>",)),),
    eos=("<|endoftext|>",),
    boxes="minigpt_v2",
)

MINIGPT_ROWS = (MINIGPT4, MINIGPT4_LLAMA_2, MINIGPT_V2, TINYGPT_V)
