"""What runs on a CUDA device: a check of on_device.py and its arguments, by name."""

from __future__ import annotations

from typing import Any

from kinds import BIASED, KINDS

OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
MODELS = ("llama", "gpt2")


def _cases() -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for kind, row in KINDS.items():
        for model in MODELS:
            if not (row.jumps and model in BIASED):
                found[f"plain-{kind}-{model}"] = ("plain", kind, model, False)
        found[f"fsdp2-{kind}"] = ("plain", kind, "llama", True)
        for stage in range(4):
            found[f"zero{stage}-{kind}"] = ("zero", kind, "llama", stage, {})
        found[f"zero2-offload-{kind}"] = ("zero", kind, "llama", 2, OFFLOAD)
        for stage in (1, 2, 3):
            found[f"bf16-zero{stage}-{kind}"] = ("same_gradients", kind, "llama", stage, {"dtype": "bf16"})
        found[f"fp16-zero2-{kind}"] = ("same_gradients", kind, "llama", 2, {"dtype": "fp16"})
        found[f"resumed-zero2-bf16-{kind}"] = ("resumed", kind, "llama", 2, {"dtype": "bf16"})
        found[f"resumed-zero3-{kind}"] = ("resumed", kind, "llama", 3, {})
    return found


CASES = _cases()
