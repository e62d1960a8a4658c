"""What differs between upstream versions: every known one has exactly one way, any other one clear sentence."""

import importlib.metadata
import re

import pytest
from matrix.smoke import VERSIONS

from blockwise_lr.patches import PatchError, all_patches, deepspeed_variants, upstream_deepspeed
from blockwise_lr.patches.symbols import Attributes, Symbol, is_in
from blockwise_lr.patches.variants import Variants

TABLES = {name: table for name, table in vars(deepspeed_variants).items() if isinstance(table, Variants)}
# every bound that a table or a declaration has, and the versions that the matrix runs
BOUNDS = re.compile(r"\d+\.\d+(?:\.\d+)?")
DECLARED = [d for d in (*deepspeed_variants.READS, *deepspeed_variants.INSTANCES) if d.versions]
NAMED = {bound for table in TABLES.values() for versions in table.ways for bound in BOUNDS.findall(versions)}
NAMED |= {bound for declared in DECLARED for bound in BOUNDS.findall(declared.versions)}
KNOWN = sorted(v for v in {*NAMED, *VERSIONS["deepspeed"]} if is_in(v, deepspeed_variants.READ))


@pytest.mark.parametrize("name", TABLES)
def test_every_known_version_has_exactly_one_way(name):
    for version in KNOWN:
        assert sum(is_in(version, versions) for versions in TABLES[name].ways) == 1, version


def test_no_way_is_guessed_for_another_version():
    table = Variants("deepspeed", {">=2": "two", "<2": "one"})
    assert (table.of("2.0"), table.of("1.9")) == ("two", "one")
    with pytest.raises(
        PatchError, match=r"deepspeed 3\.0 is installed, and only >=2,<3 and <2 are known here; install"
    ):
        Variants("deepspeed", {">=2,<3": "two", "<2": "one"}).of("3.0")


@pytest.mark.parametrize(
    "package, version",
    [("deepspeed", "0.15.4"), ("deepspeed", "0.18.3"), ("deepspeed", "0.20.0"), ("megatron-core", "0.14.0")],
)
def test_a_version_outside_the_range_is_told_with_the_range_and_the_way_out(package, version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    for patch in all_patches():
        if patch.package == package:
            with pytest.raises(PatchError) as error:
                patch.check()
            words = str(error.value)
            assert words.startswith(f"{package} {version} is installed, which '{patch.name}' was not written for; ")
            assert f'pip install "{package}{patch.versions}"' in words


def test_a_version_left_out_of_the_range_is_told_why(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.18.3")
    with pytest.raises(PatchError) as error:
        upstream_deepspeed.UPSTREAM.check()
    assert str(error.value).startswith(
        "deepspeed 0.18.3 is installed, which divides gradients by gradient_accumulation_steps at every output of a model"
    )
    assert f'; pip install "deepspeed{deepspeed_variants.VERSIONS}", or a newer' in str(error.value)
    for versions in deepspeed_variants.REFUSED:
        named = BOUNDS.findall(versions)
        assert named and not any(is_in(version, deepspeed_variants.VERSIONS) for version in named)


def test_declarations_of_ranges_lie_in_what_was_read():
    for declared in DECLARED:
        assert isinstance(declared, (Symbol, Attributes))
        assert any(declared.is_in(version) for version in KNOWN), declared


def check_refusal(monkeypatch, table, way, settings, words):
    """That a DeepSpeed of that way refuses a ds_config in these words; takes it where they are None."""
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    from blockwise_lr.blocks import BlockError
    from blockwise_lr.deepspeed import unsupported

    monkeypatch.setattr(unsupported, table, Variants("deepspeed", {">=0": way}))
    given = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **settings}), torch.nn.Linear(2, 2), object(), None
    if words is None:
        unsupported.refuse_unsupported(*given)
        return
    with pytest.raises(BlockError, match=words):
        unsupported.refuse_unsupported(*given)


@pytest.mark.parametrize("stage, steps, refused", [(1, 3, True), (2, 3, True), (2, 2, False), (3, 3, False)])
def test_gradients_that_deepspeed_would_lose_are_refused(stage, steps, refused, monkeypatch):
    """As of DeepSpeed before 0.19, whatever version is installed."""
    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    words = "loses gradients where offload_optimizer .* 3 are asked for; install deepspeed>=0.19" if refused else None
    settings = {"gradient_accumulation_steps": steps, "zero_optimization": zero}
    check_refusal(monkeypatch, "OFFLOADED_MICRO_BATCHES", 2, settings, words)


@pytest.mark.parametrize("stage, steps, refused", [(2, 2, True), (2, 1, False), (1, 2, False), (3, 2, False)])
def test_gradients_that_stage_2_would_replace_are_refused(stage, steps, refused, monkeypatch):
    """As of DeepSpeed 0.17.6 to 0.18.2."""
    words = "on the gradients of the last micro batch alone, and 2 .*; install deepspeed>=" if refused else None
    settings = {"gradient_accumulation_steps": steps, "zero_optimization": {"stage": stage}}
    check_refusal(monkeypatch, "ADDS_UP_IN_STAGE_2", False, settings, words)


EARLY, OTHERWISE = deepspeed_variants.AVERAGES_TOO_EARLY, deepspeed_variants.WRAPS_OTHERWISE


@pytest.mark.parametrize(
    "wrong, immediate, accumulation, words",
    [
        (None, False, "fp32", None),
        (OTHERWISE, True, "fp32", "cannot save ZeRO stage 1 in bf16 .* fp32; install deepspeed>=0.19"),
        (
            EARLY,
            False,
            "float32",
            "leaves the last micro batch out of its averages .* float32; set bf16.immediate_grad",
        ),
        (EARLY, True, "fp32", None),
        (EARLY, False, "bf16", None),
    ],
)
def test_float32_accumulation_that_deepspeed_gets_wrong_is_refused(wrong, immediate, accumulation, words, monkeypatch):
    """As of DeepSpeed 0.17.6 to 0.18.9."""
    settings = {
        "bf16": {"enabled": True, "immediate_grad_update": immediate},
        "data_types": {"grad_accum_dtype": accumulation},
        "zero_optimization": {"stage": 1},
    }
    check_refusal(monkeypatch, "FLOAT32_ACCUMULATION", wrong, settings, words)


@pytest.mark.parametrize("stage, refused", [(0, True), (1, False)])
def test_states_that_deepspeed_would_not_load_are_refused(stage, refused, monkeypatch):
    """As of DeepSpeed 0.18.0 to 0.18.5."""
    words = "does not load the optimizer's state .*; set zero_optimization.stage to 1" if refused else None
    settings = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    check_refusal(monkeypatch, "LOADS_BF16_WITHOUT_ZERO", False, settings, words)
