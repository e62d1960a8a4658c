"""What is replaced on single DeepSpeed engines and on the objects that they hold; other engines keep DeepSpeed's own."""

from __future__ import annotations

from .deepspeed_variants import BF16, ENGINE, LOADS_UNIVERSAL, PACKAGE, VERSIONS, ZERO3, ZERO12
from .instances import InstancePatch
from .symbols import Attributes, Symbol, symbols

_CHECKPOINT_ENGINE = "deepspeed.runtime.checkpoint_engine.checkpoint_engine:CheckpointEngine"

SAVED_FILES = InstancePatch(
    name="deepspeed-saved-files",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_CHECKPOINT_ENGINE + ".save", ("self", "state_dict", "path")),
        Symbol(ENGINE + "._copy_recovery_script", ("self", "save_path")),
    ),
    why="during a save: which files a rank writes, and their checksums, is told nowhere",
    until="DeepSpeed's checkpoint engines report what they wrote",
)
MAPPED_LOADS = InstancePatch(
    name="deepspeed-mapped-loads",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol(_CHECKPOINT_ENGINE + ".load", ("self", "path", "map_location")),),
    why="during a load: files that are copied at once are mapped, not read to memory first",
    until="DeepSpeed loads with mmap",
)
UNIVERSAL_LOADS = InstancePatch(
    name="deepspeed-universal-loads",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=LOADS_UNIVERSAL,
    why="DeepSpeed loads a stage's own universal folders only, and gives all param groups the first one's settings",
    until="DeepSpeed loads universal folders in any stage, and every group's settings",
)
STATE_PLACES = InstancePatch(
    name="deepspeed-state-places",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=tuple(Symbol(f"{of}._link_all_hp_params", ("self",)) for of in (ZERO12, BF16)),
    sets=tuple(Attributes(of, ("_param_slice_mappings",)) for of in (ZERO12, BF16)),
    why="with round_robin_gradients DeepSpeed notes wrong places of parameters in its flat tensors",
    until="DeepSpeed notes the true places",
)
STATE_ACCESS = InstancePatch(
    name="deepspeed-state-access",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        *(Symbol(f"{of}._link_all_hp_params", ("self",)) for of in (ZERO12, BF16)),
        Symbol("deepspeed.utils:get_full_hp_param", ("self", "optim_state_key")),
        Symbol("deepspeed.utils:set_full_hp_param", ("self", "value", "optim_state_key")),
        Symbol(ZERO3 + ".get_full_hp_param", ("self", "param", "optim_state_key")),
        Symbol(ZERO3 + ".set_full_hp_param", ("self", "value", "param", "optim_state_key")),
        Symbol(ZERO3 + ".get_local_fp32_param", ("self", "param", "optim_state_key")),
        Symbol(ZERO3 + ".set_local_hp_param", ("self", "value", "param", "optim_state_key")),
    ),
    why="safe_get_full_optimizer_state and its kin cut states out of tensors of the shard's shape; Adam-mini's is another",
    until="DeepSpeed asks the optimizer for a parameter's state",
)
SEGMENT_SUMS = InstancePatch(
    name="deepspeed-segment-sums",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(ZERO12 + ".unscale_and_clip_grads", ("self", "grad_groups_flat", "total_norm")),
        Symbol(ZERO3 + ".unscale_and_clip_grads"),
    ),
    why="ZeRO scales and steps one param group after another; Adam-mini's sums of all go in one all-reduce before",
    until="DeepSpeed scales all gradients before it steps",
)
ONE_DIVISION = InstancePatch(
    name="deepspeed-one-division",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol(ENGINE + ".backward", why="a decorator hides its signature"),),
    why="before 0.19.6 gradients are divided by gradient_accumulation_steps twice where a model returns loss and logits",
    until="DeepSpeed before 0.19.6 is supported no more",
)
LEARNING_RATES = InstancePatch(
    name="deepspeed-learning-rates",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(Symbol("deepspeed.monitor.monitor:MonitorMaster.write_events", ("self", "event_list")),),
    why="DeepSpeed's monitors are given a single learning rate",
    until="DeepSpeed reports every param group's",
)
_STEPS = (
    Symbol(ENGINE + ".step", ("self", "lr_kwargs")),
    Symbol("deepspeed.runtime.pipe.engine:PipelineEngine.train_batch", ("self", "data_iter")),
)
BLOCK_METRICS = InstancePatch(
    name="deepspeed-block-metrics",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=_STEPS,
    why="figures of a step are written after it, which no hook of the engine follows",
    until="DeepSpeed calls something of the user's after each optimizer step",
)
STEPS = InstancePatch(
    name="deepspeed-steps",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=_STEPS,
    why="a run that is to end saves after a step, which no hook of the engine follows",
    until="DeepSpeed calls something of the user's after each optimizer step",
)
GUARDED_CHECKPOINTS = InstancePatch(
    name="deepspeed-guarded-checkpoints",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=symbols(ENGINE, "save_checkpoint", "load_checkpoint"),
    why="what a guard has seen and done is in no state that an engine saves",
    until="DeepSpeed saves the state of objects that it is given",
)
INSTANCE_PATCHES = (
    SAVED_FILES,
    MAPPED_LOADS,
    UNIVERSAL_LOADS,
    STATE_PLACES,
    STATE_ACCESS,
    SEGMENT_SUMS,
    ONE_DIVISION,
    LEARNING_RATES,
    BLOCK_METRICS,
    STEPS,
    GUARDED_CHECKPOINTS,
)
