"""Parameter names without what wrappers, adapters and parametrizations add to them."""

from __future__ import annotations

import re

# Prefixes that wrappers add to names: torch.compile, DDP and DeepSpeed, FSDP, PEFT.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
    r"base_model\.model|base_layer|modules_to_save\.[^.]+|original_module)\."
)
# PEFT's low-rank factors of a weight W = B A: B has W's output rows, A has `rank` rows
_LOW_RANK = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.[^.]+?)?(?:\.weight)?\Z")
# torch.nn.utils.parametrizations: the tensors that make a weight stand for it
_PARAMETRIZED = re.compile(r"\.parametrizations\.([^.]+)\.original\d*\Z")


def plain_name(name: str) -> str:
    """The name without the prefixes of torch.compile, DDP, FSDP, DeepSpeed and PEFT."""
    return _WRAPPERS.sub("", name)


def low_rank_factor(name: str) -> str:
    """ "A" or "B" for PEFT's low-rank factors of a weight; "" for any other parameter."""
    found = _LOW_RANK.search(plain_name(name))
    return found.group(1) if found else ""


def plain_names(name: str) -> tuple[str, str]:
    """What rules are matched with: the name of the weight that a parameter stands for, and the name as it is."""
    plain = _PARAMETRIZED.sub(r".\1", plain_name(name))
    factor = _LOW_RANK.search(plain)
    return (plain if factor is None else plain[: factor.start()] + ".weight"), name
