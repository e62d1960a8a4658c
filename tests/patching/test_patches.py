"""The frame of the patches, on real DeepSpeed."""

import pytest

from blockwise_lr.patches import Patch, PatchError, all_patches
from blockwise_lr.patches.base import Symbol


def test_the_deepspeed_patch_comes_off_and_on():
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    from blockwise_lr.patches.deepspeed_types import PATCH

    PATCH.undo()
    original, known = DeepSpeedEngine._configure_basic_optimizer, list(ZERO_SUPPORTED_OPTIMIZERS)
    undo = PATCH.apply()
    PATCH.apply()
    patched = DeepSpeedEngine._configure_basic_optimizer
    assert patched is not original and len(ZERO_SUPPORTED_OPTIMIZERS) == len(known) + 2
    undo()
    assert DeepSpeedEngine._configure_basic_optimizer is original and known == ZERO_SUPPORTED_OPTIMIZERS
    assert not hasattr(lr_schedules, "BlockwiseWarmupCosine")
    PATCH.apply()


def test_a_changed_signature_is_refused_and_nothing_is_left_changed():
    def install(undo):
        raise AssertionError("must not be reached")

    patch = Patch(
        "test",
        "deepspeed",
        ">=0",
        (Symbol("deepspeed.runtime.engine:DeepSpeedEngine.step", ("self", "x")),),
        "",
        "",
        install,
    )
    with pytest.raises(PatchError, match=r"takes \('self', 'lr_kwargs'\) where \('self', 'x'\) was expected"):
        patch.apply()
    gone = Patch("test", "deepspeed", ">=0", (Symbol("deepspeed.runtime.engine:Gone"),), "", "", install)
    with pytest.raises(PatchError, match="does not exist in the installed version"):
        gone.apply()


def test_every_patch_says_what_it_is():
    for patch in all_patches():
        assert patch.name and patch.symbols and patch.why and patch.until and patch.versions
