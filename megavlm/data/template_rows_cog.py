"""The chat templates of CogVLM and CogAgent, as data; see :mod:`megavlm.data.template_rows`.

In its checkpoints' own words: ``_history_to_prompt`` and ``build_conversation_input_ids`` of ``modeling_cogvlm.py``
beside the weights (a copy with its history: github.com/Niky-san/cogvlm2_surce @ 7982d39e). One picture stands behind
the BOS, exchanges are lines, and the answer is encoded apart, before which SentencePiece puts the space. The end stands
once, but is trained behind each answer. The authors' first trainer wrote a space more in front of answers
(``utils/utils/language.py`` of github.com/THUDM/CogVLM @ 11f10496); its checkpoints' own code does not. A tokenizer's
``<unk>`` fills the slots, which pads Vicuna's texts.
"""

from __future__ import annotations

from dataclasses import replace

from megavlm.data.template import TEXT, ControlToken, Template, trained

COGVLM = Template(
    name="cogvlm",
    title="CogVLM's chat",
    begin=("<s>",),
    user=("Question: ", TEXT, " "),
    assistant=("Answer:", *trained(" ", TEXT), "\n"),
    last_assistant=("Answer:", *trained(" ", TEXT, "</s>")),
    tokens=(ControlToken(("<s>",)), ControlToken(("</s>",))),
    slot=ControlToken(("<unk>",)),
    picture="{image}",
    images_first=True,
    eos=("</s>",),
    ends="</s>",
    boxes="cogvlm",
)
COGVLM_VQA = replace(
    COGVLM,
    name="cogvlm_vqa",
    title="the same, for answers of a few words",
    assistant=("Short answer:", *COGVLM.assistant[1:]),
    last_assistant=("Short answer:", *COGVLM.last_assistant[1:]),
)
# Of the base and grounding checkpoints: a text, and how it goes on.
COGVLM_BASE = replace(
    COGVLM,
    name="cogvlm_base",
    title="CogVLM's base and grounding models, without words of their own",
    user=(TEXT,),
    assistant=trained(TEXT, "</s>"),
    last_assistant=(),
    ends="",
    most_exchanges=1,
    joined=False,
)
# CogAgent's chat: one text with the earlier answers in it; behind its last space SentencePiece puts another one in
# front of the answer, which is encoded apart. Its other versions are the rows above: beside its weights their text
# begins with "<EOI>", where the authors' trainer (``utils/utils/language.py``) puts the picture; here it is that place
# too, and no text.
COGAGENT = replace(
    COGVLM,
    name="cogagent",
    title="CogAgent's chat",
    user=(" [INST] ", TEXT, " [/INST]"),
    assistant=trained(" ", TEXT),
    last_assistant=(" ", *trained(" ", TEXT, "</s>")),
)
ROWS = (COGVLM, COGVLM_VQA, COGVLM_BASE, COGAGENT)
