"""The commands on a model with experts: train at one layout and go on at another, validate, answer."""

from __future__ import annotations

import json
from pathlib import Path

import expert_run_cases
import pytest
import ranks
from benchmark_files import MAKERS
from run_data import make_run_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

L = "model.language."
EXPERTS = [
    f"{L}num_moe_experts=8", f"{L}moe_ffn_hidden_size=32", f"{L}moe_aux_loss_coeff=0.02", f"{L}moe_z_loss_coeff=0.001",
    f"{L}moe_layer_freq=[0, 1, 1, 1]", f"{L}moe_router_score_function=sigmoid",
    f"{L}moe_router_enable_expert_bias=true", f"{L}moe_expert_capacity_factor=1.5", f"{L}num_layers=4",
]  # fmt: skip
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
EP2 = "parallel.expert_model_parallel_size=2"


@pytest.mark.long
def test_a_run_changes_its_layout_and_answers(tmp_path: Path) -> None:
    data, steps = make_run_data(tmp_path), "training.train_steps"
    every = ["training.validation_interval=2", "checkpoint.save_interval=2", "logging.panel_interval=2"]

    def figures(run: str, *words: str) -> list[dict[str, float]]:
        done = ranks.megavlm([*data.words(tmp_path / run, *EXPERTS, *every), *words], world=2)
        assert "EP 2" in done.stdout + done.stderr or EP2 not in words
        return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    whole = figures("whole", f"{steps}=4")
    figures("parts", f"{steps}=4", "training.exit_after_minutes=0.000001", EP2)  # saves after its first step
    parts = figures("parts", f"{steps}=4", EP2)
    assert [line["step"] for line in parts if "loss" in line][-1] == 4
    for name in ("loss", "validation_loss", "experts/balance_loss", "experts/z_loss/3"):
        known = {line["step"]: line[name] for line in whole if name in line}
        found = {line["step"]: line[name] for line in parts if name in line}
        assert found == pytest.approx(known, rel=1e-5), name
    loads = [[line[f"experts/loads/{layer}"] for layer in (1, 2, 3)] for line in whole if "experts/loads/1" in line]
    assert loads == [[line[f"experts/loads/{layer}"] for layer in (1, 2, 3)] for line in parts if "loss" in line]

    for run in ("whole", "parts"):
        events = EventAccumulator(str(tmp_path / run / "tensorboard"), {"images": 0})
        events.Reload()
        assert [event.step for event in events.Images("held_out")] == [2, 4], run
    more = ["logging.panel_samples=8", "parallel.expert_model_parallel_size=1"]
    asked, answers, drawn = ranks.run(expert_run_cases.panel_of, str(tmp_path / "parts"), more)[0]
    assert len(asked) == 8 and len({tuple(answer) for answer in answers}) > 2 and drawn
    cp2 = "parallel.context_parallel_size=2"  # with EP 4: of the ranks that share experts, some are of one replica
    for layout, world in (
        ([EP2], 2),
        ([EP2, "parallel.pipeline_model_parallel_size=2"], 4),
        (["parallel.expert_model_parallel_size=4", cp2], 4),
        ([EP2], 4),
    ):
        found = ranks.run(expert_run_cases.panel_of, str(tmp_path / "parts"), [more[0], *layout], world=world)
        assert all(one[:2] == (asked, answers) for one in found), (layout, found)
        assert [one[2] for one in found] == [drawn, *[""] * (world - 1)], layout

    picture = sorted(path for path in data.images.rglob("*") if path.is_file())[0]
    words = ["generate", str(tmp_path / "parts"), "--prompt", "What is this?", "--max-new-tokens", "4"]
    words += ["--image", str(picture)]
    alone = ranks.megavlm(words).stdout
    split = ranks.megavlm([*words, *TP2, EP2], world=2)
    assert alone.splitlines()[-1] == split.stdout.splitlines()[-1] != ""
    shared = ranks.megavlm([*words, EP2], world=2)  # by two replicas, which share the experts
    assert alone.splitlines()[-1] == shared.stdout.splitlines()[-1]
    mmmu = ["eval", str(tmp_path / "parts"), "--benchmark", "mmmu", "--max-new-tokens=4", "--panel-samples=0"]
    mmmu += MAKERS["mmmu"](tmp_path)
    ranks.megavlm([*mmmu, f"--out={tmp_path / 'one'}"])
    ranks.megavlm([*mmmu, f"--out={tmp_path / 'two'}", EP2], world=2)
    one, two = ((tmp_path / out / "predictions.jsonl").read_text().splitlines() for out in ("one", "two"))
    found = [[(row["id"], row["prediction"]) for row in map(json.loads, lines)] for lines in (one, two)]
    assert found[0] == found[1] and len(found[0]) == 7
    refused = ranks.megavlm([*words, EP2], world=4, check=False)
    said = "replicas that share out experts have 2 ranks, and 4 processes were started"
    assert refused.code == 2 and said in refused.stdout + refused.stderr


@pytest.mark.long
def test_upcycling_copies_mlps_and_changes_no_logits(tmp_path: Path) -> None:
    """Of a checkpoint of the tiny model, at two layouts: the experts are the MLPs, and the losses those of before."""
    found = ranks.run(expert_run_cases.upcycled, str(tmp_path))[0]
    assert found["loss"] == pytest.approx(found["dense"], rel=1e-6)
    assert found["same"] == 2 * expert_run_cases.EXPERTS and found["routers"] > 0
    again = ranks.run(expert_run_cases.losses_of, str(tmp_path / "moe"), [*TP2, EP2], world=2)[0]
    assert again == pytest.approx(found["dense"], rel=1e-6)
    for words, said in (
        ([], f"{L}num_moe_experts: missing"),
        ([*EXPERTS[:2]], f"{L}moe_ffn_hidden_size: 32, but an expert begins as an MLP of"),
        (
            [EXPERTS[0], f"{L}moe_shared_expert_intermediate_size=8"],
            f"{L}moe_shared_expert_intermediate_size: there",
        ),
        ([EXPERTS[0], f"{L}hidden_size=32"], f"{L}hidden_size: 32, but"),
        ([EXPERTS[0], "model.vision.num_layers=9"], "model.vision.num_layers: 9, but"),
    ):
        done = ranks.megavlm(["upcycle", str(tmp_path / "dense"), f"--out={tmp_path / 'no'}", *words], check=False)
        assert done.code == 2 and said in done.stdout + done.stderr, done
        assert not (tmp_path / "no").exists()
