"""One name for each figure, whatever wrote it.

Block figures and rates have the names that our sinks and Megatron's log give to TensorBoard, Weights & Biases and trackio:
``blocks/update_rms/qk``, ``blocks/sharpness/qk``, ``learning-rate/qk``.
"""

from __future__ import annotations

import re

from ..blocks import BlockType

LOSS, VALIDATION, RATE = "loss", "validation_loss", "learning-rate"
GRAD_NORM, SECONDS_PER_STEP, TFLOPS, SAMPLES_PER_SECOND = (
    "grad_norm",
    "seconds_per_step",
    "tflops",
    "samples_per_second",
)
TOKENS_PER_SECOND, MEMORY, BATCH = "tokens_per_second", "memory_bytes", "batch"
FINAL = "final validation loss"  # where it was measured otherwise than the curve's last point
SHARPNESS, SHARPNESS_ERROR = "sharpness", "sharpness_error"
# what BlockMonitor reports, in the order of the page
BLOCK_FIGURES = ("gradient_norm", "update_to_weight", "update_rms", "weight_rms", "variance_l1", "variance_max")
FORWARD_TIME = "forward_time"  # of ranks: the slowest's, over the median, and which it is
LOSS_RATIOS = ("loss_ratio", "loss_ratio_max", "loss_ratio_share")

_SAME = {
    LOSS: ("loss", "lm loss", "train_loss", "training_loss", "training loss", "train loss", "training"),
    VALIDATION: (
        *(
            "validation_loss",
            "val_loss",
            "valid_loss",
            "eval_loss",
            "dev_loss",
            "lm loss validation",
            "validation loss",
        ),
        *("eval/loss", "val/loss", "valid/loss", "validation/loss", "validation"),
    ),
    RATE: ("learning-rate", "learning_rate", "learning rate", "lr"),
    GRAD_NORM: ("grad-norm", "grad_norm", "grad norm", "gradient_norm"),
    SECONDS_PER_STEP: ("iteration-time", "seconds_per_step"),
    TFLOPS: ("throughput", "throughput per gpu (tflop/s/gpu)"),
    SAMPLES_PER_SECOND: ("samples_per_second", "train_samples_per_second"),
    TOKENS_PER_SECOND: ("tokens_per_second", "tokens/s"),
    MEMORY: ("mem-max-allocated-bytes", "memory_bytes", "peak_memory_bytes"),
    BATCH: ("batch-size", "global batch size"),
}
_OF = {spelt: name for name, every in _SAME.items() for spelt in every}
_OF_BLOCK = re.compile(
    rf"(?:^|/)(?P<kind>{'|'.join((*BLOCK_FIGURES, FORWARD_TIME, SHARPNESS_ERROR, SHARPNESS))})/(?P<block>[\w.-]+)$"
)
_OF_LOSS_RATIO = re.compile(rf"(?:^|/)({'|'.join(LOSS_RATIOS)})$")
_RATE_OF_BLOCK = re.compile(r"(?:^|/)(?:learning[-_]rate|lr)/(?P<block>[\w.-]+)$")
_RATE_OF_DEEPSPEED = re.compile(r"^Train/Samples/lr_(?P<block>[\w.-]+)$")
_RATE_SPELT = re.compile(rf"(?:^|/)lr_(?P<block>{'|'.join(block.value for block in BlockType)})$")
_PREFIXES = ("train/samples/", "train/", "training/", "metrics/")


def known_name(raw: str) -> str:
    """The name that a figure has here; its own where none of ours fits."""
    if found := _OF_BLOCK.search(raw):
        return f"blocks/{found['kind']}/{found['block']}"
    if found := _OF_LOSS_RATIO.search(raw):
        return f"blocks/{found[1]}"
    for pattern in (_RATE_OF_BLOCK, _RATE_OF_DEEPSPEED, _RATE_SPELT):
        if found := pattern.search(raw):
            return f"{RATE}/{found['block']}"
    name = raw.strip().lower()
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _OF.get(name, raw)


def blocks_of(names: list[str], prefix: str) -> list[str]:
    """Block types that have a figure ``prefix/<block>``, in our order, blocks of the user's own last."""
    found = {name.removeprefix(prefix + "/") for name in names if name.startswith(prefix + "/")}
    order = [block.value for block in BlockType]
    return sorted(found, key=lambda block: (order.index(block) if block in order else len(order), block))
