"""Where DeepSpeed's versions differ in what is read of them or put in place: of each concern, one way per range.

All else in this project asks here and knows of no versions. Beside each concern stands what it reads, declared for its
range, so that a name that is gone within a range is refused before any training step.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .symbols import Attributes, Symbol, symbols
from .variants import Variants

PACKAGE = "deepspeed"
# VERSIONS are those that passed the matrix, or lie beyond the newest; READ are those whose sources the ways
# below were written from (pyproject.toml has VERSIONS too); REFUSED says why a version within is left out.
VERSIONS = ">=0.16.9,!=0.17.0,!=0.17.1,!=0.17.2,!=0.17.3,!=0.17.4,!=0.18.0,!=0.18.1,!=0.18.2,!=0.18.3,<0.20"
READ = ">=0.16.4,<0.20"
REFUSED = {
    ">=0.17.0,<=0.17.4": "with which the tests have not been run",
    ">=0.18.0,<0.18.3": "with which the tests have not passed yet",
    "==0.18.3": "which divides gradients by gradient_accumulation_steps at every output of a model, the loss and what it is "
    "computed of, and offers no way out",
}
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer"
_CONFIG = "deepspeed.runtime.config:DeepSpeedConfig"
_PRECISION = "deepspeed.runtime.precision_config:"
_CHECKPOINT_ENGINE = "deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine"
_TORCHS = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine"


# ---- ZeRO-1 and 2: at which element of its group's buffer each parameter begins, in the order of round_robin_bit16_groups


def _noted_starts(wrapper: Any) -> Sequence[Sequence[int]]:
    return wrapper.round_robin_bit16_offsets


def _summed_starts(wrapper: Any) -> Sequence[Sequence[int]]:
    """Without parameter_alignment there is no padding between parameters."""
    sizes = ([p.numel() for p in group] for group in wrapper.round_robin_bit16_groups)
    return [list(itertools.accumulate(numels, initial=0))[:-1] for numels in sizes]


STARTS = Variants(PACKAGE, {">=0.19.7": _noted_starts, "<0.19.7": _summed_starts})


# ---- ZeRO-1 and 2: DeepSpeed links parameters to where they lie, and not to where they would in the order of definition


@contextlib.contextmanager
def _as_though_padded(wrapper: Any) -> Iterator[None]:
    """It counts with true places where parameter_alignment puts padding between parameters."""
    padding = wrapper.round_robin_bit16_padding
    wrapper.round_robin_bit16_padding = [[True]] * len(padding)
    try:
        yield
    finally:
        wrapper.round_robin_bit16_padding = padding


@contextlib.contextmanager
def _in_the_buffers_order(wrapper: Any) -> Iterator[None]:
    """It adds up sizes in the order of bit16_groups."""
    groups = wrapper.bit16_groups
    wrapper.bit16_groups = wrapper.round_robin_bit16_groups
    try:
        yield
    finally:
        wrapper.bit16_groups = groups


LINKING_TRUE_PLACES = Variants(PACKAGE, {">=0.19.7": _as_though_padded, "<0.19.7": _in_the_buffers_order})


# ---- ZeRO-1 and 2: a group's averaged gradients, where they lie in one tensor before the group is stepped; else None


def _preflattened(wrapper: Any, group: int) -> torch.Tensor | None:
    return wrapper._get_preflattened_grad_partition(group)


def _never_flat(wrapper: Any, group: int) -> torch.Tensor | None:
    return None


FLAT_GRADIENTS = Variants(PACKAGE, {">=0.19.2": _preflattened, "<0.19.2": _never_flat})


# ---- ZeRO-1 and 2 with an offloaded optimizer: up to how many micro batches DeepSpeed adds up; None: any number
# (Before 0.19 the sum of the first two is not kept for the third, see async_accumulate_grad_in_cpu_via_gpu; in 0.17 the
# second counts for nothing.)

OFFLOADED_MICRO_BATCHES: Variants[int | None] = Variants(
    PACKAGE, {">=0.19": None, ">=0.18,<0.19": 2, ">=0.17,<0.18": 1, "<0.17": 2}
)


# ---- ZeRO-2: whether gradients of earlier micro batches are kept; in these each micro batch's take the place of the sum

ADDS_UP_IN_STAGE_2 = Variants(PACKAGE, {">=0.18.3": True, ">=0.17.6,<0.18.3": False, "<0.17.6": True})


# ---- ZeRO-1 in bf16 with float32 accumulation, BF16_Optimizer's: what is wrong with it
# (0.18.5 to 0.18.9 average over the ranks before they add the last micro batch, unless immediate_grad_update adds each at once,
# deepspeedai/DeepSpeed#7985; before, a name that two wrappers shared has them take the one for fp16 without ZeRO)

AVERAGES_TOO_EARLY, WRAPS_OTHERWISE = "averages too early", "wraps otherwise"
FLOAT32_ACCUMULATION: Variants[str | None] = Variants(
    PACKAGE,
    {">=0.19": None, ">=0.18.5,<0.19": AVERAGES_TOO_EARLY, ">=0.17.6,<0.18.5": WRAPS_OTHERWISE, "<0.17.6": None},
)


# ---- whether gradients are divided by gradient_accumulation_steps at every output of the model, and so twice where one (the
# logits) lies below another (the loss); 0.18.3 does so even with scale_wrt_gas=False

DIVIDES_AT_EACH_OUTPUT = Variants(PACKAGE, {">=0.19.6": False, ">=0.18.3,<0.19.6": True, "<0.18.3": False})


# ---- ZeRO-3: whether each of several parameters is waited for, where they are gathered in one call; a CUDA stream keeps them
# in order, gloo does not (deepspeedai/DeepSpeed#8539)

WAITS_FOR_EACH_GATHER = Variants(PACKAGE, {">=0.19.8": True, "<0.19.8": False})


# ---- a ds_config's settings of fp16 and bf16, section by section


def _sections(config: Any) -> dict[str, Mapping[str, Any]]:
    return {"fp16": config.float16_config.model_dump(), "bf16": config.bfloat16_config.model_dump()}


_FLAT = {
    "fp16": {
        "enabled": "fp16_enabled",
        "auto_cast": "fp16_auto_cast",
        "fp16_master_weights_and_grads": "fp16_master_weights_and_gradients",
        "loss_scale": "loss_scale",
        "initial_scale": "initial_dynamic_scale",
        "dynamic_loss_scale": "dynamic_loss_scale_args",
    },
    "bf16": {"enabled": "bfloat16_enabled", "immediate_grad_update": "bfloat16_immediate_grad_update"},
}


def _attributes(config: Any) -> dict[str, Mapping[str, Any]]:
    """They are attributes of the whole config; their names in the sections are ours."""
    return {
        section: {key: getattr(config, attribute) for key, attribute in names.items()}
        for section, names in _FLAT.items()
    }


PRECISION = Variants(PACKAGE, {">=0.17.1": _sections, "<0.17.1": _attributes})


# ---- which files a checkpoint has


def _with_rank(engine: Any, folder: str, tag: str) -> str:
    return engine._get_ckpt_name(folder, tag, mp_placeholder="*", pp_placeholder="0")


def _rank_known(engine: Any, folder: str, tag: str) -> str:
    """It is 0 wherever load_universal is set."""
    return engine._get_ckpt_name(folder, tag, mp_placeholder="*")


# (engine, folder, tag) -> a glob of the model files of a universal checkpoint
UNIVERSAL_FILES = Variants(PACKAGE, {">=0.18": _with_rank, "<0.18": _rank_known})
# (engine) -> whether each rank writes its optimizer's state to a file of its own, rather than the first all of it
HAS_RANKS_FILES = Variants(
    PACKAGE,
    {
        ">=0.18.6": lambda engine: engine.zero_optimization(),
        "<0.18.6": lambda engine: engine.zero_optimization() or engine.bfloat16_enabled(),
    },
)


def _says_so(checkpoint_engine: Any) -> bool:
    return checkpoint_engine.is_decoupled()


def _is_not_torchs(checkpoint_engine: Any) -> bool:
    """Nebula's is the only other one."""
    return not isinstance(checkpoint_engine, Symbol(_TORCHS).value())


# (checkpoint engine) -> whether it goes on writing after its save returns
WRITES_LATER = Variants(PACKAGE, {">=0.17.1": _says_so, "<0.17.1": _is_not_torchs})
# whether an optimizer's state is loaded in bf16 without ZeRO: these save it as ZeRO's is saved, and load it as though not
LOADS_BF16_WITHOUT_ZERO = Variants(PACKAGE, {">=0.18.6": True, ">=0.18,<0.18.6": False, "<0.18": True})
# whether the converter of ZeRO-3 reads the first of a rank's flat tensors alone
CONVERTS_ONE_FLAT = Variants(PACKAGE, {">=0.18": False, "<0.18": True})


# ---- what of this is replaced or read

_UNIVERSAL = ("self", "checkpoint_folder", "load_optimizer_states", "load_from_fp32_weights")
LOADS_UNIVERSAL = (
    *(Symbol(f"{of}._load_universal_checkpoint", _UNIVERSAL) for of in (ZERO12, BF16)),
    Symbol(f"{ZERO3}._load_universal_checkpoint", _UNIVERSAL, ">=0.18"),
    Symbol(f"{ZERO3}._load_universal_checkpoint", (*_UNIVERSAL, "param_shapes"), "<0.18"),
)
_NAMES = ("self", "checkpoints_path", "tag", "mp_placeholder")
CHECKPOINT_NAME = (
    Symbol(ENGINE + "._get_ckpt_name", (*_NAMES, "pp_placeholder"), ">=0.18"),
    Symbol(ENGINE + "._get_ckpt_name", _NAMES, "<0.18"),
)
READS = (
    *CHECKPOINT_NAME,
    *LOADS_UNIVERSAL,
    Symbol(ZERO12 + "._get_preflattened_grad_partition", ("self", "group_idx"), ">=0.19.2", "Adam-mini's sums"),
    *symbols(_CHECKPOINT_ENGINE, "is_decoupled", versions=">=0.17.1"),
    Symbol(_TORCHS, None, "<0.17.1"),
)
INSTANCES = (
    Attributes(ZERO12, ("round_robin_bit16_offsets",), ">=0.19.7", "which part of which parameter lies where"),
    Attributes(ZERO12, ("round_robin_bit16_padding",), ">=0.19.7", "DeepSpeed's links are put right"),
    Attributes(_CONFIG, ("float16_config", "bfloat16_config"), ">=0.17.1", "compared over the ranks; some are refused"),
    Attributes(_CONFIG, tuple(name for names in _FLAT.values() for name in names.values()), "<0.17.1", "the same"),
    Attributes(_CONFIG, ("torch_autocast_enabled",), ">=0.17.2", "compared over the ranks"),
    Attributes(_PRECISION + "DeepSpeedFP16Config", ("fp16_master_weights_and_grads",), ">=0.17.1", "refused"),
    Attributes(
        _PRECISION + "DeepSpeedBF16Config",
        ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
        ">=0.18.3",
        "refused",
    ),
    Attributes("deepspeed.runtime.zero.config:DeepSpeedZeroConfig", ("zenflow",), ">=0.17.5", "refused"),
    Attributes(
        "deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
        ("super_offload",),
        ">=0.18",
        "refused",
    ),
    Attributes(UNFUSED, ("loss_scale_config",), ">=0.18.6", "put back where a load fails"),
    Attributes(UNFUSED, ("cur_scale", "cur_iter"), "<0.18.6", "the same"),
)
