"""The converters on any shipped recipe's model, at its published size, each way, against ``cp`` of the same bytes.

As ``convert_14b.py``, whose measure it is: a directory with random weights in the layout of the family, names and
shapes of which come from the family's own table (that they are the published ones is what tests/families proves).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import convert_14b as base

from megavlm.parallel.device import prepare_device

prepare_device()  # before Megatron-Core is imported

from megavlm.checkpoint.hf.shapes import alone, family_slots, make_rules  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import ModelConfig  # noqa: E402
from megavlm.families.known import FAMILIES  # noqa: E402
from megavlm.families.preprocessor import PREPROCESSOR, trained_preprocessor  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402


def published(family_name: str, model: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, Any]]]:
    """Return names and shapes of a model's tensors in a family's layout, and the small files beside them.

    Raises:
        SystemExit: the family cannot hold it.
    """
    family = FAMILIES[family_name]
    why = family.refusal(model)
    if why is not None:
        raise SystemExit(f"--family {family_name}: {why}")
    with alone():
        rules = make_rules(family, model, family.style_for(model), family_slots(family, model))
    found = {name: shape for rule in rules for name, shape in zip(rule.row.theirs, rule.shapes, strict=True)}
    tree = family.config(model, {"image": model.language.vocab_size - 1})
    files = {name: tree.pop(name) for name in list(tree) if name.endswith(".json")}
    if family.preprocesses:
        files[PREPROCESSOR] = trained_preprocessor(model, {}, family.trained_pictures(model, {}))
    return found, {"config.json": {**tree, **family.pictures_of(model), "torch_dtype": "bfloat16"}, **files}


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="The converters on a recipe's model against cp of the same bytes.")
    parser.add_argument("--recipe", default="internvl3_8b/sft", help="whose model is made (default internvl3_8b/sft)")
    parser.add_argument("--family", default="internvl", choices=sorted(FAMILIES), help="layout (default internvl)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as"
        " model.language.num_layers=2: does the script run?")  # fmt: skip
    base.add_options(parser)
    arguments = parser.parse_args()
    if not arguments.work.is_dir():
        parser.error(f"--work {arguments.work}: is no directory")
    model = load_recipe(arguments.recipe, arguments.set, expand_presets).model
    shapes, files = published(arguments.family, model)
    result = base.run(arguments, base.Weights(shapes), files, {"recipe": arguments.recipe, "family": arguments.family})
    words = f"{arguments.recipe} as {arguments.family}, {model.language.num_layers} + {model.vision.num_layers} layers"
    print(base.table_of(result, words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
