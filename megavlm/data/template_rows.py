"""The chat templates of published families, as data; docs/templates.md has them as a table.

Where a row is from is said above it; ``tests/data/test_template_rows.py`` holds each against strings that are written
out from there. What a family's code does beside its template (which words it strips, where it moves an image) is the
data's matter, and not done here.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.data.template import IMAGES, SYSTEM, TEXT, ControlToken, Template, trained
from megavlm.data.template_rows_minigpt import MINIGPT_ROWS
from megavlm.data.template_rows_pali3 import PALI3


def _needs(*names: str) -> tuple[ControlToken, ...]:
    return tuple(ControlToken((name,)) for name in names)


# ChatML as Qwen-VL's fine-tuning script trains it: header, text and end of a turn are encoded apart, and of every turn
# the two tokens and the newline behind it are trained on.
QWEN_VL = Template(
    name="qwen_vl",
    title="Qwen-VL's ChatML",
    system=(*trained("<|im_start|>"), "system\n", TEXT, *trained("<|im_end|>", "\n")),
    user=(*trained("<|im_start|>"), "user\n", TEXT, *trained("<|im_end|>", "\n")),
    assistant=(*trained("<|im_start|>"), "assistant\n", *trained(TEXT, "<|im_end|>", "\n")),
    tokens=(
        ControlToken(("<|im_start|>",), appended=True),
        ControlToken(("<|im_end|>",), appended=True),
        ControlToken(("<img>", "<|vision_start|>"), appended=True),
        ControlToken(("</img>", "<|vision_end|>"), appended=True),
    ),
    slot=ControlToken(("<imgpad>", "<|image_pad|>", "<image>"), appended=True),
    image=("<img>", "</img>"),
    picture="Picture {number}: {image}\n",
    stops=("<|im_end|>",),
    default_system="You are a helpful assistant.",
    joined=False,
    boxes="qwen_vl",
)

# LLaVA, stage 1: the question's words are left out, and a newline ends the caption.
LLAVA_PLAIN = Template(
    name="llava_plain",
    title="LLaVA's captions, stage 1",
    begin=("<s>",),
    user=(IMAGES,),
    assistant=trained(TEXT, "\n"),
    tokens=_needs("<s>"),
    eos=("</s>",),
    stop_text="\n",
    most_exchanges=1,
)
LLAVA_PLAIN_LLAMA_3 = replace(
    LLAVA_PLAIN,
    name="llava_plain_llama_3",
    title="the same, on Llama 3",
    begin=("<|begin_of_text|>",),
    tokens=_needs("<|begin_of_text|>"),
    eos=("<|end_of_text|>",),
)
LLAVA_PLAIN_NO_BOS = replace(
    LLAVA_PLAIN,
    name="llava_plain_no_bos",
    title="the same, on Qwen2 and Yi, whose texts begin with nothing",
    begin=(),
    tokens=_needs("<|endoftext|>"),
    eos=("<|endoftext|>",),
)
LLAVA_PLAIN_GEMMA = replace(
    LLAVA_PLAIN,
    name="llava_plain_gemma",
    title="the same, on Gemma",
    begin=("<bos>",),
    tokens=_needs("<bos>"),
    eos=("<eos>",),
)

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)

# LLaVA-1.5, and the names of Vicuna's users below it: another token ends an answer.
VICUNA_V1 = Template(
    name="vicuna_v1",
    title="Vicuna v1, LLaVA-1.5's form",
    begin=("<s>",),
    system=(TEXT, " "),
    user=("USER: ", TEXT, " "),
    assistant=("ASSISTANT:", *trained(" ", TEXT, "</s>")),
    tokens=_needs("<s>", "</s>"),
    eos=("</s>",),
    default_system=_VICUNA,
)
VICUNA_V1_ENDOFTEXT = replace(
    VICUNA_V1,
    name="vicuna_v1_endoftext",
    title="the same, on Phi, StableLM and Qwen1.5",
    begin=(),
    assistant=("ASSISTANT:", *trained(" ", TEXT, "<|endoftext|>")),
    tokens=_needs("<|endoftext|>"),
    eos=("<|endoftext|>",),
)
VICUNA_V1_IM_END = replace(
    VICUNA_V1_ENDOFTEXT,
    name="vicuna_v1_im_end",
    title="the same, on Qwen2-Instruct (TinyLLaVA)",
    assistant=("ASSISTANT:", *trained(" ", TEXT, "<|im_end|>")),
    tokens=_needs("<|im_end|>"),
    eos=("<|im_end|>",),
)
VICUNA_V1_END_OF_TEXT = replace(
    VICUNA_V1,
    name="vicuna_v1_end_of_text",
    title="the same, on Llama 3 (Bunny)",
    begin=("<|begin_of_text|>",),
    assistant=("ASSISTANT:", *trained(" ", TEXT, "<|end_of_text|>")),
    tokens=_needs("<|begin_of_text|>", "<|end_of_text|>"),
    eos=("<|end_of_text|>",),
)

VICUNA_V1_ENDOFTEXT_BOS = replace(
    VICUNA_V1_ENDOFTEXT,
    name="vicuna_v1_endoftext_bos",
    title="the same, on Phi-3 (Bunny)",
    begin=("<s>",),
    tokens=_needs("<s>", "<|endoftext|>"),
)
VICUNA_V1_GEMMA = replace(
    VICUNA_V1,
    name="vicuna_v1_gemma",
    title="the same, on Gemma (Mipha)",
    begin=("<bos>",),
    assistant=("ASSISTANT:", *trained(" ", TEXT, "<eos>")),
    tokens=_needs("<bos>", "<eos>"),
    eos=("<eos>",),
)
# Imp's on Phi-2: its tokenizer is given Llama's end, and no BOS.
IMP_PHI2 = replace(VICUNA_V1, name="imp_phi2", title="the same, on Phi-2 (Imp)", begin=(), tokens=_needs("</s>"))

_VISION_AND_LANGUAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# LLaVA on Llama 2: every exchange begins a document, and a space stands before its end.
LLAMA_2 = Template(
    name="llama_2",
    title="Llama 2's [INST], as LLaVA trains it",
    user=("<s>", "[INST] ", TEXT, " [/INST]"),
    user_with_system=("<s>", "[INST] ", "<<SYS>>\n", SYSTEM, "\n<</SYS>>\n\n", TEXT, " [/INST]"),
    assistant=trained(" ", TEXT, " ", "</s>"),
    tokens=_needs("<s>", "</s>"),
    eos=("</s>",),
    default_system=_VISION_AND_LANGUAGE,
)
# LLaVA-1.6 on Mistral: one document, and no system turn unless one is given.
MISTRAL = replace(
    LLAMA_2,
    name="mistral",
    title="[INST] as LLaVA-1.6 trains Mistral",
    begin=("<s>",),
    user=LLAMA_2.user[1:],
    user_with_system=LLAMA_2.user_with_system[1:],
    default_system="",
)

# MiniGemini's on Mixtral: every exchange begins a document, and there is no system turn unless one is given.
MGM_MISTRAL = replace(LLAMA_2, name="mgm_mistral", title="[INST] as MiniGemini trains Mixtral", default_system="")

_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Llama 3's own; HPT 1.5 Air trains it.
LLAMA_3 = Template(
    name="llama_3",
    title="Llama 3's headers",
    begin=("<|begin_of_text|>",),
    system=("<|start_header_id|>", "system", "<|end_header_id|>", "\n\n", TEXT, "<|eot_id|>"),
    user=("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", TEXT, "<|eot_id|>"),
    assistant=("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n", *trained(TEXT, "<|eot_id|>")),
    tokens=_needs("<|begin_of_text|>", *_LLAMA_3),
    eos=("<|end_of_text|>", "<|eot_id|>"),
    stops=("<|eot_id|>",),
)
# chat_template of meta-llama/Llama-3.2-11B-Vision-Instruct for conversations that show pictures, which have no system
# turn of their own (that of words alone has one with a date: model.template=checkpoint).
MLLAMA = replace(
    LLAMA_3,
    name="mllama",
    title="Llama 3's headers, a picture is one token (Llama 3.2 Vision)",
    slot=ControlToken(("<|image|>",)),
    picture="{image}",
)
# With MiniCPM-V's marks; a tokenizer's <unk> fills the slots (tokenizer_config.json and chat of MiniCPM-Llama3-V-2_5).
MINICPM_LLAMA_3 = replace(
    LLAMA_3,
    name="minicpm_llama_3",
    title="the same with the image marks of MiniCPM-Llama3-V 2.5",
    tokens=(*LLAMA_3.tokens, *_needs("<image>", "</image>", "<slice>", "</slice>")),
    slot=ControlToken(("<unk>",)),
    image=("<image>", "</image>"),
)
# MiniGemini's: the answer's header is "system".
MGM_LLAMA_3 = replace(
    LLAMA_3,
    name="mgm_llama_3",
    title="MiniGemini's Llama 3, whose answers are headed system",
    assistant=("<|start_header_id|>", "system", "<|end_header_id|>", "\n\n", *trained(TEXT, "<|eot_id|>")),
    default_system=_VISION_AND_LANGUAGE,
)

# HPT 1.5 Air's (vlmeval/utils/xtuner_util.py of HyperGAI/HPT @ 144edb7f): a system turn, answers end the document, and
# the code that encodes the form writes a BOS of its own in front of its one.
HPT_LLAMA_3 = replace(
    LLAMA_3,
    name="hpt_llama_3",
    title="the same of HPT 1.5 Air, answers end the document",
    begin=("<|begin_of_text|>", "<|begin_of_text|>"),
    assistant=("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n", *trained(TEXT, "<|end_of_text|>")),
    tokens=_needs("<|begin_of_text|>", "<|end_of_text|>", *_LLAMA_3),
    eos=("<|end_of_text|>",),
    stops=("<|eot_id|>",),
    default_system="Answer the questions carefully!",
)

# xtuner's: the newline behind an answer is not trained on.
PHI_3 = Template(
    name="phi_3",
    title="Phi-3",
    begin=("<s>",),
    system=("<|system|>", "\n", TEXT, "<|end|>", "\n"),
    user=("<|user|>", "\n", TEXT, "<|end|>", "\n"),
    assistant=("<|assistant|>", "\n", *trained(TEXT, "<|end|>"), "\n"),
    last_assistant=("<|assistant|>", "\n", *trained(TEXT, "<|end|>")),
    tokens=_needs("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos=("<|endoftext|>",),
    stops=("<|end|>",),
)

# Imp's on Phi-3: the same string with Vicuna's system turn.
IMP_PHI3 = replace(PHI_3, name="imp_phi3", title="Phi-3 with Vicuna's system turn (Imp)", default_system=_VICUNA)

# ALLaVA's (allava/serve/cli.py): no system turn, and every piece of an exchange is encoded apart.
ALLAVA = Template(
    name="allava",
    title="ALLaVA: [INST] without a BOS, on Phi and StableLM",
    user=("[INST] ", TEXT, " [/INST] "),
    assistant=trained(TEXT, "<|endoftext|>"),
    tokens=_needs("<|endoftext|>"),
    eos=("<|endoftext|>",),
    joined=False,
)

# Cobra's on Mamba: roles are plain words of GPT-NeoX's tokenizer, and an image stands in front of everything.
ZEPHYR = Template(
    name="zephyr",
    title="Zephyr's form, as Cobra trains Mamba",
    system=("<|system|>\n", TEXT, "<|endoftext|>", "\n"),
    user=("<|user|>\n", TEXT, "<|endoftext|>", "\n"),
    assistant=("<|assistant|>\n", *trained(TEXT, "<|endoftext|>"), "\n"),
    last_assistant=("<|assistant|>\n", *trained(TEXT, "<|endoftext|>")),
    tokens=_needs("<|endoftext|>"),
    images_first=True,
    picture="{image}",
    eos=("<|endoftext|>",),
)

# Gemma's own; a system text stands in front of the first question, as Gemma 3 has it.
GEMMA = Template(
    name="gemma",
    title="Gemma",
    begin=("<bos>",),
    user=("<start_of_turn>", "user\n", TEXT, "<end_of_turn>", "\n"),
    user_with_system=("<start_of_turn>", "user\n", SYSTEM, "\n\n", TEXT, "<end_of_turn>", "\n"),
    assistant=("<start_of_turn>", "model\n", *trained(TEXT, "<end_of_turn>"), "\n"),
    tokens=_needs("<bos>", "<start_of_turn>", "<end_of_turn>"),
    eos=("<eos>",),
    stops=("<end_of_turn>",),
)
# With pictures: Gemma 3's processor writes blank lines and marks around each (processing_gemma3.py of Transformers).
GEMMA3 = replace(
    GEMMA,
    name="gemma3",
    title="Gemma 3 with pictures",
    tokens=(*GEMMA.tokens, *_needs("<start_of_image>", "<end_of_image>")),
    slot=ControlToken(("<image_soft_token>",)),
    image=("\n\n<start_of_image>", "<end_of_image>\n\n"),
    picture="{image}",
)
# MiniGemini's: each answer also ends the document, and the newline between is trained on.
MGM_GEMMA = replace(
    GEMMA,
    name="mgm_gemma",
    title="MiniGemini's Gemma, each answer ends the document",
    assistant=("<start_of_turn>", "model\n", *trained(TEXT, "<end_of_turn>", "\n", "<eos>")),
)

# PaliGemma's: processing_paligemma.py of Transformers and big_vision's transforms write pictures, a
# BOS, the prefix and a newline, and encode the answer apart.
PALIGEMMA = Template(
    name="paligemma",
    title="PaliGemma: pictures, prefix, a newline, answer",
    user=("<bos>", TEXT, "\n"),
    assistant=trained(TEXT, "<eos>"),
    tokens=_needs("<bos>", "<eos>"),
    slot=ControlToken(("<image>",)),
    picture="{image}",
    images_first=True,
    eos=("<eos>",),
    most_exchanges=1,
    joined=False,
)

_DEEPSEEK_BEGIN, _DEEPSEEK_END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEEPSEEK = Template(
    name="deepseek",
    title="DeepSeek-VL",
    begin=(_DEEPSEEK_BEGIN,),
    system=(TEXT, "\n\n"),
    user=("User: ", TEXT, "\n\n"),
    assistant=("Assistant:", *trained(" ", TEXT, _DEEPSEEK_END)),
    tokens=_needs(_DEEPSEEK_BEGIN, _DEEPSEEK_END),
    slot=ControlToken(("<image_placeholder>", "<image>", "<imgpad>"), appended=True),
    eos=(_DEEPSEEK_END,),
    default_system=_VISION_AND_LANGUAGE,
)

# Idefics3's, which SmolVLM has with another beginning: the chat template that its processor carries. What stands around
# a picture's tiles, its image plan writes.
IDEFICS3 = Template(
    name="idefics3",
    title="Idefics3",
    begin=("<|begin_of_text|>",),
    system=("System: ", TEXT, "<end_of_utterance>", "\n"),
    user=("User:", TEXT, "<end_of_utterance>", "\n"),
    assistant=("Assistant:", *trained(" ", TEXT, "<end_of_utterance>"), "\n"),
    tokens=_needs("<|begin_of_text|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
    slot=ControlToken(("<image>",)),
    picture="{image}",
    gap=" ",
    eos=("<|end_of_text|>", "<|im_end|>"),
    stops=("<end_of_utterance>",),
)
SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    title="SmolVLM, Idefics3's form on SmolLM2",
    begin=("<|im_start|>",),
    tokens=_needs("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
)

# MiniCPM-V 2.0: role tokens and texts are encoded apart, without a BOS. The end stands once, but is trained behind each
# answer, in the place of the next role. A tokenizer's <unk> fills the slots.
MINICPM = Template(
    name="minicpm",
    title="MiniCPM-V 2.0",
    user=("<\u7528\u6237>", TEXT),
    assistant=("<AI>", *trained(TEXT)),
    last_assistant=("<AI>", *trained(TEXT, "</s>")),
    tokens=_needs("<\u7528\u6237>", "<AI>", "</s>", "<image>", "</image>"),
    slot=ControlToken(("<unk>",)),
    image=("<image>", "</image>"),
    eos=("</s>",),
    ends="</s>",
    joined=False,
)

_CHATML = _needs("<|im_start|>", "<|im_end|>")
# Qwen2's and Qwen2.5's own, and LLaVA's on them (LLaVA-OneVision).
QWEN2 = Template(
    name="qwen2",
    title="ChatML of Qwen1.5 and Qwen2, LLaVA-OneVision's form",
    system=("<|im_start|>", "system\n", TEXT, "<|im_end|>", "\n"),
    user=("<|im_start|>", "user\n", TEXT, "<|im_end|>", "\n"),
    assistant=("<|im_start|>", "assistant\n", *trained(TEXT, "<|im_end|>"), "\n"),
    tokens=_CHATML,
    eos=("<|endoftext|>",),
    stops=("<|im_end|>",),
    default_system="You are a helpful assistant.",
)
QWEN2_5 = replace(
    QWEN2,
    name="qwen2_5",
    title="the same with the system turn of Qwen2.5",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
# Imp's on Qwen1.5: no newline behind the last answer.
IMP_QWEN2 = replace(
    QWEN2,
    name="imp_qwen2",
    title="ChatML with Vicuna's system turn (Imp)",
    last_assistant=("<|im_start|>", "assistant\n", *trained(TEXT, "<|im_end|>")),
    default_system=_VICUNA,
)
QWEN2_VL = replace(
    QWEN2,
    name="qwen2_vl",
    title="the same with the image marks of Qwen2-VL and Qwen2.5-VL",
    tokens=(*_CHATML, *_needs("<|vision_start|>", "<|vision_end|>")),
    slot=ControlToken(("<|image_pad|>",)),
    image=("<|vision_start|>", "<|vision_end|>"),
    picture="{image}",
)
QWEN3_VL = replace(QWEN2_VL, name="qwen3_vl", title="the same of Qwen3-VL, without a system turn", default_system="")
# Qwen3's own without thoughts: an empty one stands before the last answer, and a prompt ends with it.
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    title="ChatML of Qwen3, without thoughts",
    last_assistant=(
        *("<|im_start|>", "assistant\n", "<think>", "\n\n", "</think>", "\n\n"),
        *trained(TEXT, "<|im_end|>"),
        "\n",
    ),
    default_system="",
)
# GLM-4's: no text ends an answer; the mark of the next turn does, which the model writes itself.
_GLM_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|begin_of_image|>", "<|end_of_image|>")
GLM4V = Template(
    name="glm4v",
    title="GLM-4.1V, answers without thoughts of their own",
    begin=("[gMASK]", "<sop>"),
    system=("<|system|>", "\n", TEXT),
    user=("<|user|>", "\n", TEXT),
    assistant=("<|assistant|>", "\n", *trained(TEXT)),
    last_assistant=("<|assistant|>", "\n", *trained(TEXT, "<|user|>")),
    tokens=_needs(*_GLM_TOKENS),
    slot=ControlToken(("<|image|>",)),
    image=("<|begin_of_image|>", "<|end_of_image|>"),
    picture="{image}",
    eos=("<|endoftext|>",),
    stops=("<|user|>",),
    ends="<|user|>",
)
# GLM-4.5's and 4.6's, asked for no thoughts (chat_template.jinja, enable_thinking false); GLM-4.5V adds pictures.
GLM4_5V = replace(
    GLM4V,
    name="glm4_5v",
    title="GLM-4.5V and GLM-4.6V, answers without thoughts",
    user=("<|user|>", "\n", TEXT, "/nothink"),
    assistant=("<|assistant|>", "\n", "<think>", "</think>", "\n", *trained(TEXT)),
    last_assistant=("<|assistant|>", "\n", "<think>", "</think>", "\n", *trained(TEXT, "<|user|>")),
)
INTERNVL2_5 = replace(
    QWEN2,
    name="internvl2_5",
    title="ChatML of InternVL 2.5 and 3",
    tokens=(*_CHATML, *_needs("<img>", "</img>")),
    slot=ControlToken(("<IMG_CONTEXT>",)),
    image=("<img>", "</img>"),
    eos=("<|endoftext|>", "</s>"),
    default_system=(
        "\u4f60\u662f\u4e66\u751f\u00b7\u4e07\u8c61\uff0c\u82f1\u6587\u540d\u662fInternVL\uff0c\u662f\u7531\u4e0a\u6d77"
        "\u4eba\u5de5\u667a\u80fd\u5b9e\u9a8c\u5ba4\u3001\u6e05\u534e\u5927\u5b66\u53ca\u591a\u5bb6\u5408\u4f5c\u5355"
        "\u4f4d\u8054\u5408\u5f00\u53d1\u7684\u591a\u6a21\u6001\u5927\u8bed\u8a00\u6a21\u578b\u3002"
    ),
)
# LLaVA-1.6 and MiniGemini on Yi-34B: no newline behind a turn.
CHATML_DIRECT = Template(
    name="chatml_direct",
    title="ChatML without newlines behind turns, LLaVA-1.6-34B's form",
    system=("<|im_start|>", "system\n", TEXT, "<|im_end|>"),
    user=("<|im_start|>", "user\n", TEXT, "<|im_end|>"),
    assistant=("<|im_start|>", "assistant\n", *trained(TEXT, "<|im_end|>")),
    tokens=_CHATML,
    eos=("<|endoftext|>", "</s>"),
    stops=("<|im_end|>",),
    default_system="Answer the questions.",
)
# Vary's and Vary-toy's, of Qwen v1: "mpt" of vary/utils/conversation.py, and the marks around a picture of
# vary/data/conversation_dataset_qwen.py (Ucas-HaoranWei/Vary-toy @ c6e40597), whose label mask it has.
VARY = replace(
    CHATML_DIRECT,
    name="vary",
    title="the same with the image marks of Qwen-VL (Vary-toy)",
    tokens=(*_CHATML, ControlToken(("<img>",), appended=True), ControlToken(("</img>",), appended=True)),
    slot=QWEN_VL.slot,
    image=("<img>", "</img>"),
    eos=("<|endoftext|>",),
    default_system="You should follow the instructions carefully and explain your answers in detail.",
)

ROWS = (
    QWEN_VL, LLAVA_PLAIN, LLAVA_PLAIN_LLAMA_3, LLAVA_PLAIN_NO_BOS, LLAVA_PLAIN_GEMMA, VICUNA_V1,
    VICUNA_V1_ENDOFTEXT, VICUNA_V1_END_OF_TEXT, VICUNA_V1_ENDOFTEXT_BOS, VICUNA_V1_GEMMA, VICUNA_V1_IM_END, IMP_PHI2,
    IMP_PHI3, IMP_QWEN2, ALLAVA, LLAMA_2, MISTRAL, MGM_MISTRAL, LLAMA_3, MGM_LLAMA_3, HPT_LLAMA_3, PHI_3, ZEPHYR, GEMMA,
    GEMMA3, MGM_GEMMA, PALIGEMMA, DEEPSEEK, IDEFICS3, SMOLVLM, MINICPM, MLLAMA, MINICPM_LLAMA_3,
    QWEN2, QWEN2_5, QWEN2_VL, QWEN3_VL, QWEN3, GLM4V, GLM4_5V, INTERNVL2_5, CHATML_DIRECT, VARY, *MINIGPT_ROWS, PALI3,
)  # fmt: skip
