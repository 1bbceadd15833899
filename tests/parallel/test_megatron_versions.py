"""What differs between versions of Megatron-Core: held on the one that runs here, and against both forms of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer, optimizer
from torch.nn import functional as F

from megavlm.checkpoint.safe import check_files
from megavlm.parallel import megatron_versions as versions
from megavlm.parallel.adam import AdamW


def test_an_activation_is_a_module_without_a_share_of_checkpoints():
    kind = versions.activation_of(F.silu)
    made = kind(config=object())
    assert isinstance(kind, type) and isinstance(made, torch.nn.Module)
    assert torch.equal(made(torch.arange(3.0)), F.silu(torch.arange(3.0)))
    assert made.sharded_state_dict("prefix.", (), None) == {} and not list(made.state_dict())


class _Sixteen:
    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        return sharded_state_dict, checkpoint_dir, None


class _Nineteen:
    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "nvrx") -> Any:
        return sharded_state_dict, checkpoint_dir, async_strategy


def test_a_save_is_megatrons_own():
    assert versions.plan_save(_Sixteen(), 1, 2) == (1, 2, None)
    assert versions.plan_save(_Nineteen(), 1, 2) == (1, 2, "mcore")


def test_groups_are_known_by_kind_while_they_load():
    modules = (optimizer, distrib_optimizer)
    before = [module.param_group_identifier_keys for module in modules]
    with pytest.raises(KeyError), versions.groups_known_by_kind():
        assert all("max_lr" not in module.param_group_identifier_keys for module in modules)
        assert all("wd_mult" in module.param_group_identifier_keys for module in modules)
        raise KeyError
    assert [module.param_group_identifier_keys for module in modules] == before


def test_groups_of_one_kind_keep_their_parameters():
    saved = [{"wd_mult": wd, "lr_mult": 1.0, "step": 7, "params": [i]} for i, wd in enumerate((1.0, 0.0, 1.0))]
    current = [{"wd_mult": wd, "lr_mult": 1.0} for wd in (1.0, 0.0, 1.0)]
    with versions.groups_known_by_kind():
        matched = optimizer.MegatronOptimizer._filter_and_reorder_param_groups(current, saved)
        assert [(group["params"], group["wd_mult"], group["step"]) for group in matched] == [
            ([0], 1.0, 7), ([1], 0.0, 7), ([2], 1.0, 7),
        ]  # fmt: skip
        with pytest.raises(ValueError, match="no parameter group"):
            optimizer.MegatronOptimizer._filter_and_reorder_param_groups([{"wd_mult": 0.5}], saved)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}', True),  # 0.19
        ('{"sharded_backend": "torch_dist", "common_backend": "torch", "common_backend_version": 1}', True),  # 0.16
        ('{"sharded_backend": "torch_dist", "common_backend": "zarr"}', False),
        ('{"sharded_backend": "zarr"}', False),
        ("{}", False),
    ],
)
def test_a_checkpoint_of_either_version_is_one(tmp_path, text, good):
    (tmp_path / "metadata.json").write_text(text)
    torch.save({}, tmp_path / "common.pt")
    if good:
        check_files(tmp_path)
    else:
        with pytest.raises(ValueError, match="torch_dist format"):
            check_files(tmp_path)


def test_adam_takes_what_either_version_passes():
    parameter = torch.nn.Parameter(torch.ones(2))
    AdamW([parameter], adam_w_mode=True)
    AdamW([parameter], adam_w_mode=True, capturable=False)
    with pytest.raises(ValueError, match="CUDA graph"):
        AdamW([parameter], capturable=True)
