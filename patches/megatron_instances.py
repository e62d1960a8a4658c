"""What is replaced on single Megatron optimizers; optimizers that are not ours keep Megatron's own."""

from __future__ import annotations

from .instances import InstancePatch
from .symbols import Symbol, symbols
from .upstream_megatron import DISTRIBUTED, PACKAGE, VERSIONS

OPTIMIZER_STATES = InstancePatch(
    name="megatron-optimizer-states",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(DISTRIBUTED + "._get_main_param_and_optimizer_states", ("self", "model_param")),
        Symbol(DISTRIBUTED + "._set_main_param_and_optimizer_states", ("self", "model_param", "tensors")),
        *symbols(
            DISTRIBUTED,
            "load_parameter_state_from_dp_zero",
            "load_parameter_state_from_dp_reshardable",
            "load_parameter_state_from_fully_reshardable",
            "load_parameter_state_from_fs_model_space",
        ),
    ),
    why="Megatron's checkpoints hold states of the parameters' shape; Adam-mini's second moment goes through spread out",
    until="Megatron asks the inner optimizer for a parameter's state",
)
INSTANCE_PATCHES = (OPTIMIZER_STATES,)
