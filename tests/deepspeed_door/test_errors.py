"""Bad input stops the start with one sentence that says what, where and how to mend it, on every rank alike."""

import importlib.metadata

import pytest
from deepspeed_door.engines import LR, config, start
from ranks import pool
from twins import make

from blockwise_lr.patches.deepspeed_variants import VERSIONS


def refused(change, model="llama"):
    """Starts an engine with a changed optimizer entry and returns nothing, if it starts."""
    settings = config("BlockwiseAdamW", 2)
    settings["optimizer"]["params"].update(change.get("optimizer", {}))
    settings["scheduler"]["params"].update(change.get("scheduler", {}))
    settings["zero_optimization"].update(change.get("zero", {}))
    for section, name in change.get("types", {}).items():
        settings[section]["type"] = name
    for key in change.get("without", ()):
        del settings["scheduler"]["params"][key]
    network = make(model)
    if change.get("unknown"):
        import torch

        network.model.mystery = torch.nn.Linear(3, 5)
    start(network, settings)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"optimizer": {"block_lr_ratios": {"embeddings": 10}}},
            ["block_lr_ratios", "'embeddings'", "use one of embedding"],
        ),
        ({"optimizer": {"block_lr_ratios": {"qk": -8}}}, ["block_lr_ratios['qk'] is -8", "above 0"]),
        ({"optimizer": {"block_lr_ratios": {"qk": float("nan")}}}, ["block_lr_ratios['qk'] is nan", "above 0"]),
        ({"optimizer": {"block_weight_decay": {"vo": -1}}}, ["block_weight_decay['vo'] is -1", "0 or above"]),
        ({"optimizer": {"min_lr": 2 * LR}}, ["min_lr", "up to lr"]),
        ({"optimizer": {"lr": "fast"}}, ["lr is 'fast'", "write the number without quotes"]),
        ({"optimizer": {"momentum": 0.9}}, ["unknown parameter 'momentum'", "block_lr_ratios"]),
        (
            {"optimizer": {"block_rules": [{"match": "*.adapter.*", "block": "ffn"}]}},
            ["'*.adapter.*' matches no trainable parameter"],
        ),
        ({"optimizer": {"block_rules": [{"match": "*", "block": "mlp"}]}}, ["unknown block type 'mlp'", "use one of"]),
        ({"optimizer": {"block_rules": [{"match": "*"}]}}, ['give either "block" or "split"']),
        ({"scheduler": {"min_lr": 1.0}}, ["min_lr is 1.0", "up to lr"]),
        ({"scheduler": {"warmup_num_steps": 11}}, ["warm up in fewer steps"]),
        (
            {"types": {"optimizer": "BlockwiseAdam"}},
            ["optimizer.type is 'BlockwiseAdam'", "did you mean 'BlockwiseAdamW'"],
        ),
        ({"types": {"optimizer": "blockwise_adam_mini"}}, ["did you mean 'BlockwiseAdamMini'", "BlockwiseLion"]),
        (
            {"types": {"scheduler": "BlockwiseWarmupCosin"}},
            ["scheduler.type is", "did you mean 'BlockwiseWarmupCosine'"],
        ),
        (
            {"scheduler": {"warmup_steps": 5}},
            ["no parameter 'warmup_steps' (did you mean 'warmup_num_steps'?)", "min_lr"],
        ),
        ({"without": ["total_num_steps"]}, ["BlockwiseWarmupCosine needs total_num_steps", "valid ones are"]),
        (
            {"unknown": True},
            [
                "model.mystery.weight",
                "(5, 3)",
                "nearest rule",
                '{"match": "model.mystery.{weight,bias}", "block": "ffn"}',
            ],
        ),
    ],
)
def test_bad_settings_are_refused_on_every_rank(change, words):
    errors = pool(2).run(refused, change, errors=True)
    assert len({str(error) for error in errors}) == 1
    for word in words:
        assert word in str(errors[0])
    assert type(errors[0]).__name__ in ("BlockError", "UnmappedParameterError")


def on_version(version):
    import blockwise_lr.patches.deepspeed_types as module

    module.PATCH.undo()
    original = importlib.metadata.version
    importlib.metadata.version = lambda name: version if name == "deepspeed" else original(name)
    try:
        module.PATCH.apply()
    finally:
        importlib.metadata.version = original
        module.PATCH.apply()  # the ranks go on to other cases


def test_an_unsupported_deepspeed_is_refused():
    errors = pool(2).run(on_version, "0.14.0", errors=True)
    for error in errors:
        assert "deepspeed 0.14.0 is installed" in str(error) and f'pip install "deepspeed{VERSIONS}"' in str(error)


def test_names_of_others_are_left_alone():
    from blockwise_lr.deepspeed.names import meant
    from blockwise_lr.optim import CLASSES

    for name in ("AdamW", "Adam", "Lamb", "OneBitAdam", "Muon", "Lion", None, *CLASSES):
        assert meant(name, CLASSES) is None
    assert meant("BlockWiseAdamW", CLASSES) == "BlockwiseAdamW"


def started_line():
    import logging

    import deepspeed

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    deepspeed.utils.logger.addHandler(handler)
    level = deepspeed.utils.logger.level
    try:
        import blockwise_lr.deepspeed  # noqa: F401

        deepspeed.init_distributed("gloo")
        deepspeed.utils.logger.setLevel(logging.INFO)
        deepspeed.initialize(model=make("llama"), config=config("BlockwiseAdamW", 2))[0].destroy()
    finally:
        deepspeed.utils.logger.removeHandler(handler)
        deepspeed.utils.logger.setLevel(level)
    return [line for line in said if "peak learning rates" in line]


def test_a_right_start_says_so_once():
    first, second = pool(2).run(started_line)
    assert len(first) == 1 and not second
    assert f"norm 160 at {LR:g}" in first[0] and "block_lrs(engine)" in first[0]
