"""Names of DeepSpeed that it does not promise to keep: each one that bigdet uses is there.

pyproject.toml takes DeepSpeed below the next minor version; when that is raised, look here first.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
from deepspeed.launcher import runner
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import mixed_precision_linkage
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

ENGINE_CODE = Path(__file__).parents[3] / "bigdet" / "engine"
FLAT, SHARDED = DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3

METHODS = [
    (FLAT, "_lazy_init_hp_params_optimizer_state"),
    (FLAT, "refresh_fp32_params"),
    (FLAT, "update_lp_params"),
    (FLAT, "loss_scale"),
    (tensor_fragment, "get_optim_state_fragment"),
    (SHARDED, "get_param_id"),
    (SHARDED, "checkpoint_event_prologue"),
    (SHARDED, "checkpoint_event_epilogue"),
    (SHARDED, "_reassign_or_swap_out_partitioned_parameters"),
    (SHARDED, "loss_scale"),
    (SHARDED, "partition_grads"),
    (SHARDED, "is_gradient_accumulation_boundary"),
    (torch_autocast, "PARAM_COMM_DTYPE_ATTR_NAME"),
    (DeepSpeedEngine, "set_gradient_accumulation_boundary"),
    (DeepSpeedEngine, "get_global_grad_norm"),
    (DeepSpeedEngine, "destroy"),
    (parameter_offload, "FWD_MODULE_STACK"),
    (parameter_offload.DeepSpeedZeRoOffload, "get_param_coordinator"),
    (PartitionedParameterCoordinator, "is_invalid_trace"),
    (PartitionedParameterCoordinator, "_invalidate_trace"),
    (PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release"),
    (deepspeed.ops, "__compatible_ops__"),
    (runner, "main"),
    (runner, "parse_args"),
]
SET_ON_SELF = [
    (DeepSpeedEngine, "enable_backward_allreduce"),
    (DeepSpeedEngine, "seq_data_parallel_group"),
    (FLAT, "_hp_optimizer_states_linked"),
    (FLAT, "overflow"),
    (SHARDED, "overflow"),
    (SHARDED, "fp32_partitioned_groups_flat"),
    (SHARDED, "fp16_partitioned_groups_flat"),
    (SHARDED, "grad_position"),
    (SHARDED, "fp16_groups"),
    (SHARDED, "communication_data_type"),
    (SHARDED, "gradient_accumulation_dtype"),
    (SHARDED, "parameter_offload"),
    (SHARDED, "micro_step_id"),
    (SHARDED, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"),
    (parameter_offload.DeepSpeedZeRoOffload, "forward_hooks"),
    (parameter_offload.DeepSpeedZeRoOffload, "backward_hooks"),
]


@pytest.mark.parametrize(("owner", "name"), METHODS, ids=lambda value: str(value))
def test_functions_and_properties_are_there(owner, name):
    assert hasattr(owner, name)


@pytest.mark.parametrize(("owner", "name"), SET_ON_SELF, ids=lambda value: str(value))
def test_attributes_are_set(owner, name):
    written = name.removeprefix(f"_{owner.__name__}")  # inside the class
    assert re.search(rf"self\.{written}\s*(:[^=]+)?= ", inspect.getsource(owner))


def test_parameters_and_arguments_are_there():
    assert "param.ds_tensor = " in inspect.getsource(Init)
    assert "param.ds_persist = True" in inspect.getsource(parameter_offload.DeepSpeedZeRoOffload)
    assert "lp_param._hp_mapping" in inspect.getsource(mixed_precision_linkage)
    assert {"lp_fragment_address"} <= {field.name for field in dataclasses.fields(tensor_fragment)}
    assert {"start", "numel"} == {field.name for field in dataclasses.fields(fragment_address)}
    assert "scale_wrt_gas" in inspect.getsource(DeepSpeedEngine)
    decorated = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    assert hasattr(inspect.getclosurevars(decorated).nonlocals["func"], "cache_clear")


def test_the_list_is_complete():
    code = "".join(file.read_text() for file in sorted(ENGINE_CODE.glob("*.py")))
    used = set(
        re.findall(
            r"(?:self\._zero|self\._engine|self\._engine\.optimizer|(?<![.\w])zero)\.(\w+)", code
        )
    )
    ordinary = {"backward", "module", "optimizer", "step", "zero_grad"}  # DeepSpeed documents them
    assert used - ordinary <= {name for _, name in (*METHODS, *SET_ON_SELF)}


def test_the_import_leaves_no_variable_to_other_processes() -> None:
    code = (
        "import os; import bigdet.engine.deepspeed_engine;"
        "from deepspeed.accelerator import get_accelerator;"
        "print(get_accelerator().device_name(), os.environ.get('DS_ACCELERATOR'))"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "cpu None"
