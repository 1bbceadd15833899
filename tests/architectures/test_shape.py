"""Every architecture has one shape: keys with a text, rules, sizes, a cost or a stated refusal; no name is special."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from megavlm.architectures import cost
from megavlm.config import architecture
from megavlm.config.architecture import BRANCHES, Architecture
from megavlm.config.fields import meaning_of
from megavlm.config.keys import find_key
from megavlm.config.schema import ConnectorConfig, LanguageConfig, ParallelConfig, VisionConfig
from megavlm.data.media import plan_kinds
from megavlm.data.templates import names
from megavlm.families.registry import FAMILIES

PACKAGE = Path(__file__).parents[2] / "megavlm"
BASES = {"vision": VisionConfig, "connector": ConnectorConfig, "language": LanguageConfig}
PROTOCOLS = {"vision": cost.TowerCost, "connector": cost.ConnectorCost, "language": cost.DecoderCost}
ROOMS = {"vision": "towers", "connector": "connectors", "language": "decoders"}

architecture.load()
ALL = [(branch, one) for branch, registry in BRANCHES.items() for one in registry.architectures()]
every_architecture = pytest.mark.parametrize(("branch", "one"), ALL, ids=[f"{b}-{a.name}" for b, a in ALL])


@every_architecture
def test_an_architecture_is_a_folder_of_one_shape(branch: str, one: Architecture) -> None:
    folder = f"megavlm.architectures.{ROOMS[branch]}.{one.name}"
    assert one.build.partition(":")[0] == f"{folder}.build"
    assert one.config.__module__ == one.rules.__module__ == f"{folder}.config"
    assert issubclass(one.config, BASES[branch]) and one.config.__doc__
    for key in one.config.__pydantic_fields__:
        found = find_key(f"model.{branch}.{key}", one.name)
        assert found is not None and found.meaning, f"{one.name}: {key} has no text, which --help would show"
        assert meaning_of(one.config, key) is not None
    assert one.cost is None or one.cost.__name__ == f"{folder}.cost"
    assert {path.name for path in (PACKAGE / "architectures" / ROOMS[branch] / one.name).glob("*.py")} >= {
        "__init__.py", "config.py", "tables.py", "build.py", *(["cost.py"] if one.cost is not None else []),
    }  # fmt: skip


@every_architecture
def test_a_cost_answers_all_that_is_asked(branch: str, one: Architecture) -> None:
    if one.cost is None:
        pytest.skip("has none, and is refused where one is needed (test_outside_package.py)")
    # What layers that attend to pictures cost is asked of language models that have a key for them.
    crosses = "cross_attention_layers" in one.config.__pydantic_fields__
    assert crosses == hasattr(one.cost, "cross_work")
    for name, asked in inspect.getmembers(PROTOCOLS[branch], inspect.isfunction):
        if name.startswith("_") or (name.startswith("cross_") and not crosses):
            continue
        wanted = inspect.signature(asked).parameters
        there = inspect.signature(getattr(one.cost, name)).parameters
        kinds = [[p.kind for p in parameters] for parameters in (list(wanted.values())[1:], there.values())]
        assert kinds[0] == kinds[1], f"{one.cost.__name__}.{name}"


@every_architecture
def test_rules_are_of_the_branch_and_the_layout(branch: str, one: Architecture) -> None:
    first, second = inspect.signature(one.rules).parameters.values()
    assert "Recipe" not in str(first.annotation) and second.annotation in ("ParallelConfig", ParallelConfig)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_what_is_registered(name: str) -> None:
    family = FAMILIES[name]
    assert family.title and set(family.parts) <= set(BRANCHES)
    known = {BRANCHES[part]: set(there) for part, there in family.architectures.items()}
    assert all(there <= {one.name for one in registry.architectures()} for registry, there in known.items())
    assert family.architectures, "whose refuses would get models of every architecture"
    assert family.template is None or family.template in names()
    assert family.image_plan is None or family.image_plan in plan_kinds()
    assert family.with_tower_trained is None or family.with_tower_trained in FAMILIES


def test_nothing_else_asks_for_the_name_of_an_architecture_or_family() -> None:
    names_of_all = {one.name for _, one in ALL} | set(FAMILIES)
    names_of_all |= {name for registry in BRANCHES.values() for name in registry.names()}
    asked = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("architectures", "families"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare | ast.MatchValue):
                continue
            source = ast.unparse(node)
            for text in (one.value for one in ast.walk(node) if isinstance(one, ast.Constant)):
                if not isinstance(text, str):
                    continue
                # These are values of other keys, too, and names of modules.
                other = text in ("linear", "llama", "qwen") and "preset" not in source and "family" not in source
                if (text in names_of_all and not other) or re.search("mlp.*x_gelu", text):
                    asked.append(f"{path.relative_to(PACKAGE)}: {source}")
    assert not asked


def test_what_a_recipe_needs_imports_no_torch() -> None:
    for branch, one in ALL:
        for file in ("config", "tables", "__init__", *(["cost"] if one.cost is not None else [])):
            module = importlib.import_module(f"megavlm.architectures.{ROOMS[branch]}.{one.name}".removesuffix("."))
            path = Path(str(module.__file__)).with_name(f"{file}.py")
            imported = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                for name in (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import)
                    else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                )
            }  # fmt: skip
            assert not imported & {"torch", "megatron", "numpy"}, path
