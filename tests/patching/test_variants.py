"""What differs between upstream versions: every known one has exactly one way, any other one clear sentence."""

import importlib.metadata
import re

import pytest
from matrix.smoke import VERSIONS

from blockwise_lr.patches import PatchError, all_patches, deepspeed_variants
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
    [("deepspeed", "0.15.4"), ("deepspeed", "0.18.8"), ("deepspeed", "0.20.0"), ("megatron-core", "0.14.0")],
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


def test_declarations_of_ranges_lie_in_what_was_read():
    for declared in DECLARED:
        assert isinstance(declared, (Symbol, Attributes))
        assert any(declared.is_in(version) for version in KNOWN), declared


def config(stage, steps, **settings):
    from deepspeed.runtime.config import DeepSpeedConfig

    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}} if stage else {"stage": 0}
    return DeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": steps,
            "zero_optimization": offload,
            **settings,
        }
    )


@pytest.mark.parametrize("stage, steps, refused", [(1, 3, True), (2, 3, True), (2, 2, False), (3, 3, False)])
def test_gradients_that_deepspeed_would_lose_are_refused(stage, steps, refused, monkeypatch):
    """As of DeepSpeed before 0.19, whatever version is installed."""
    import torch

    from blockwise_lr.blocks import BlockError
    from blockwise_lr.deepspeed import unsupported

    monkeypatch.setattr(unsupported, "OFFLOADED_MICRO_BATCHES", Variants("deepspeed", {">=0": 2}))
    given = config(stage, steps), torch.nn.Linear(2, 2), object(), None
    if not refused:
        unsupported.refuse_unsupported(*given)
        return
    with pytest.raises(
        BlockError, match="loses gradients where offload_optimizer .* 3 are asked for; install deepspeed>=0.19"
    ):
        unsupported.refuse_unsupported(*given)


def test_states_that_deepspeed_would_not_load_are_refused(monkeypatch):
    """As of DeepSpeed 0.18.0 to 0.18.5."""
    import torch

    from blockwise_lr.blocks import BlockError
    from blockwise_lr.deepspeed import unsupported

    monkeypatch.setattr(unsupported, "LOADS_BF16_WITHOUT_ZERO", Variants("deepspeed", {">=0": False}))
    bf16 = {"bf16": {"enabled": True}}
    unsupported.refuse_unsupported(config(1, 1, **bf16), torch.nn.Linear(2, 2), object(), None)
    with pytest.raises(BlockError, match="does not load the optimizer's state .*; set zero_optimization.stage to 1"):
        unsupported.refuse_unsupported(config(0, 1, **bf16), torch.nn.Linear(2, 2), object(), None)
