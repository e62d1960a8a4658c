"""DeepSpeed engines whose ds_config has a sequence length warmup, which DeepSpeed itself had until 0.16 and dropped."""

from __future__ import annotations

from .deepspeed_variants import ENGINE, PACKAGE, VERSIONS
from .instances import InstancePatch
from .symbols import Attributes, Symbol, symbols
from .upstream import Upstream

_PIPELINE = "deepspeed.runtime.pipe.engine:PipelineEngine"

CHECKPOINTED_TOKENS = InstancePatch(
    name="deepspeed-checkpointed-tokens",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=symbols(ENGINE, "save_checkpoint", "load_checkpoint"),
    why="the tokens that an engine has trained on are in no state that it saves",
    until="DeepSpeed counts tokens",
)
PIPELINE_LENGTHS = InstancePatch(
    name="deepspeed-pipeline-lengths",
    package=PACKAGE,
    versions=VERSIONS,
    symbols=(
        Symbol(_PIPELINE + ".train_batch", ("self", "data_iter")),
        Symbol(_PIPELINE + ".eval_batch"),
        Symbol(_PIPELINE + "._next_batch", ("self",)),
    ),
    reads=(Symbol(_PIPELINE + ".reset_activation_shape", ("self",)),),
    why="stages agree on the shape of what they send once, and batches are cut where they are read",
    until="DeepSpeed has a sequence length warmup again",
)
READS = Upstream(
    name="deepspeed-sequence-length-reads",
    package=PACKAGE,
    versions=VERSIONS,
    instances=(
        Attributes(
            "deepspeed.runtime.config:DeepSpeedConfig", ("_param_dict",), why="keys that DeepSpeed does not know"
        ),
        Attributes(
            ENGINE, ("global_steps", "mp_world_size", "sequence_parallel_size"), why="the step, and who has its data"
        ),
    ),
    why="a ds_config's further keys are handed on nowhere",
    until="DeepSpeed has a sequence length warmup again",
)
INSTANCE_PATCHES = (CHECKPOINTED_TOKENS, PIPELINE_LENGTHS)
