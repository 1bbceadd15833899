"""The chat template of Chameleon; see :mod:`megavlm.data.template_rows`.

As ``tokens_from_ui`` of ``chameleon/inference/chameleon.py`` writes a prompt (facebookresearch/chameleon @ dbbe47fd),
and ``ChameleonProcessor`` of Transformers: what the user shows and says, and the end of a turn; an answer ends with the
document (``TextDecoder`` there). How a second question stands behind an answer was published nowhere: there is none.
"""

from __future__ import annotations

from megavlm.data.template import TEXT, ControlToken, Template, trained

CHAMELEON = Template(
    name="chameleon",
    title="Chameleon's, of one question",
    begin=("<s>",),
    user=(TEXT, "<reserved08706>"),
    assistant=trained(TEXT, "</s>"),
    tokens=tuple(ControlToken((name,)) for name in ("<s>", "</s>", "<reserved08706>", "<racm3:break>", "<eoss>")),
    slot=ControlToken(("<image>",)),
    image=("<racm3:break>", "<eoss>"),
    picture="{image}",
    eos=("</s>",),
    most_exchanges=1,
    joined=False,
)
ROWS = (CHAMELEON,)
