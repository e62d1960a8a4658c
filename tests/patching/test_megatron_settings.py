"""Settings of the Megatron door belong to an OptimizerConfig: two models of one process train with different ones."""

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout, build_chunks, megatron
from ranks import pool


def two_models():
    """The ratios and classes of optimizers that configs with and without settings of their own are built with."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron_door.training import wrap

    import blockwise_lr.megatron

    def built(config):
        wrapped = wrap(build_chunks("llama", Layout()), Layout())
        optimizer = get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False).chained_optimizers[0]
        groups = optimizer.param_groups
        return type(optimizer.optimizer).__name__, groups[0].get("block_lr_ratios", {}).get("qk")

    def config(name, **values):
        return OptimizerConfig(optimizer=name, lr=1e-3, min_lr=0.0, **values)

    with megatron(Layout()):
        one = blockwise_lr.megatron.register(block_lr_ratios={"qk": 2.0})
        two = blockwise_lr.megatron.register(block_lr_ratios={"qk": 7.0})
        try:
            found = [
                built(one.attach_to(config("blockwise_adamw"))),
                built(two.attach_to(config("blockwise_adam_mini"))),
                built(one.attach_to(config("blockwise_adam_mini"))),  # the kind is the config's
                built(config("blockwise_adamw")),  # what was registered last
                built(config("adam")),
            ]
        finally:
            two()
        kept = blockwise_lr.megatron.settings.settings_of(config("blockwise_adamw")).block_lr_ratios
        one()
        none = blockwise_lr.megatron.settings.settings_of(config("blockwise_adamw")).block_lr_ratios
    return found, kept, none


def test_two_models_of_one_process_have_settings_of_their_own():
    ((found, kept, none),) = pool(1).run(two_models)
    assert found == [
        ("BlockwiseAdamW", 2.0),
        ("BlockwiseAdamMini", 7.0),
        ("BlockwiseAdamMini", 2.0),
        ("BlockwiseAdamW", 7.0),
        ("AdamW", None),
    ]
    assert kept == {"qk": 2.0} and none is None


def attached_to_adam():
    from megatron.core.optimizer import OptimizerConfig

    import blockwise_lr.megatron

    undo = blockwise_lr.megatron.register()
    try:
        undo.attach_to(OptimizerConfig(optimizer="adam", lr=1e-3))
    finally:
        undo()


def test_settings_are_not_attached_to_megatrons_own_optimizers():
    (error,) = pool(1).run(attached_to_adam, errors=True)
    assert "attached to an OptimizerConfig of optimizer 'adam'; name one of blockwise_adamw" in str(error)
