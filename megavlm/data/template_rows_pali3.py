"""The template of PaLI-3: a row as in :mod:`megavlm.data.template_rows`."""

from __future__ import annotations

from megavlm.data.template import TEXT, ControlToken, Template, trained

# PaLI-3 was not published: its language model is a UL2, whose tokenizer is T5's, and this is how T5 reads a question
# and an answer. build_inputs_with_special_tokens of src/transformers/models/t5/tokenization_t5.py,
# huggingface/transformers @ 0384cd83, ends both; _shift_right of modeling_t5.py there begins an answer. What stands in
# front of <pad> goes through the encoder. Task words in front of a question are the data's.
PALI3 = Template(
    name="pali3",
    title="PaLI-3 on UL2: pictures, question, </s>; an answer behind <pad>",
    user=(TEXT, "</s>"),
    assistant=("<pad>", *trained(TEXT, "</s>")),
    tokens=(ControlToken(("<pad>",)), ControlToken(("</s>",))),
    picture="{image}",
    images_first=True,
    eos=("</s>",),
    most_exchanges=1,
    joined=False,
)
