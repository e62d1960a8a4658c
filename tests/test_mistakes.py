"""Ten likely mistakes of a first start: each is told by its key, its value and its cure, in text that a terminal shows whole.

``pytest tests/test_mistakes.py -s`` prints the texts at 80 columns.
"""

import textwrap

import pytest
import torch
from deepspeed_door.engines import config, start
from ranks import pool
from twins import make
from typer.testing import CliRunner

from blockwise_lr import BlockwiseAdamW

LINES = 14  # of 80 columns


class Mine(torch.nn.Module):
    """A model of a user's own, without a config."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(11, 8)
        self.q_proj, self.k_proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.memory = torch.nn.Linear(8, 8)

    def forward(self, ids):
        return self.memory(self.wte(ids)).sum()


def from_a_ds_config(model, changes):
    settings = config("BlockwiseAdamW", 1)
    for section, change in changes.items():
        settings[section] = {**settings[section], **change}
    start(model(), settings)


def without_the_import():
    """As though blockwise_lr.deepspeed had not been imported: its patches off."""
    import deepspeed

    from blockwise_lr.patches import all_patches

    deepspeed.init_distributed("gloo")
    on = [patch for patch in all_patches() if patch.applied]
    for patch in reversed(on):
        patch.undo()
    try:
        deepspeed.initialize(model=make("llama"), config=config("BlockwiseAdamW", 1))
    finally:
        for patch in on:
            patch.apply()


def params(**given):
    return {"optimizer": {"params": {"lr": 1e-3, **given}}}


def told_by_deepspeed(case, *arguments):
    return str(pool(1).run(case, *arguments, errors=True)[0])


def told_by_the_shell(*arguments):
    from blockwise_lr.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2
    return result.stderr


def told_by_torch():
    return BlockwiseAdamW(make("llama").parameters(), lr=1e-3)


def told_by_a_trainer():
    from blockwise_lr.transformers import BlockwiseAdamWFactory

    return BlockwiseAdamWFactory()(make("llama"))


def error_of(act):
    with pytest.raises(Exception) as error:
        act()
    return str(error.value)


# what was done -> (how it comes about, what the text has to name: key, value, cure)
MISTAKES = {
    "no import": (
        lambda: told_by_deepspeed(without_the_import),
        ["BlockwiseAdamW is not a supported DeepSpeed Optimizer"],  # DeepSpeed's own; the READMEs have the cure
    ),
    "a misspelt type": (
        lambda: told_by_deepspeed(
            from_a_ds_config, lambda_of("llama"), {"optimizer": {"type": "BlockwiseAdamMinni", "params": {"lr": 1e-3}}}
        ),
        ["optimizer.type", "'BlockwiseAdamMinni'", "did you mean 'BlockwiseAdamMini'"],
    ),
    "a misspelt option": (
        lambda: told_by_deepspeed(from_a_ds_config, lambda_of("llama"), params(block_lr_ratio={"qk": 4})),
        ["'block_lr_ratio'", "block_lr_ratios"],
    ),
    "an unknown block type": (
        lambda: told_by_deepspeed(from_a_ds_config, lambda_of("llama"), params(block_lr_ratios={"attention": 4})),
        ["block_lr_ratios", "'attention'", "use one of embedding"],
    ),
    "a number in quotes": (
        lambda: told_by_deepspeed(from_a_ds_config, lambda_of("llama"), params(lr="6e-4")),
        ["lr is '6e-4'", "without quotes"],
    ),
    "a scheduler's parameter of another's": (
        lambda: told_by_deepspeed(
            from_a_ds_config,
            lambda_of("llama"),
            {"scheduler": {"params": {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_max_lr": 1e-3}}},
        ),
        ["scheduler.params", "'warmup_max_lr'", "valid ones are", "warmup_num_steps"],
    ),
    "a name that no rule knows": (
        lambda: told_by_deepspeed(from_a_ds_config, Mine, {}),
        ["memory.weight", "(8, 8)", '"match": "memory.{weight,bias}"', "block_rules"],
    ),
    "Adam-mini and a model without a config": (
        lambda: told_by_deepspeed(
            from_a_ds_config,
            Mine,
            {
                "optimizer": {
                    "type": "BlockwiseAdamMini",
                    "params": {"lr": 1e-3, "block_rules": [{"match": "memory.*", "block": "ffn"}]},
                }
            },
        ),
        ["q_proj", "number of heads", "model.config = {'num_attention_heads'"],
    ),
    "parameters without names": (
        lambda: error_of(told_by_torch),
        ["which parameter is which", "pass block_map=map_blocks(model)"],
    ),
    "a model in place of its parameters": (
        lambda: error_of(lambda: BlockwiseAdamW(torch.nn.Linear(2, 2), lr=1e-3)),
        ["BlockwiseAdamW", "pass model.named_parameters()"],
    ),
    "a Trainer's factory without a rate": (
        lambda: error_of(told_by_a_trainer),
        ["lr", "TrainingArguments", '{"lr": ...}'],
    ),
    "a config that is not there": (
        lambda: told_by_the_shell("inspect", "configs/llama.json"),
        ["'configs/llama.json' is no file", "config.json", "package.module:factory"],
    ),
}


def lambda_of(name):
    """make(name), as something that goes to the rank processes."""
    import functools

    return functools.partial(make, name)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_key_its_value_and_its_cure(name):
    make_it, words = MISTAKES[name]
    text = make_it()
    lines = [wrapped for line in text.splitlines() for wrapped in (textwrap.wrap(line, 80) or [""])]
    print(f"\n{name}:", *lines, sep="\n")
    for word in words:
        assert word in text, (word, text)
    assert len(lines) <= LINES


def test_deepspeeds_own_error_after_a_forgotten_import_is_on_the_pages():
    from page_checks import ROOT

    sentence = MISTAKES["no import"][1][0]
    for page in ("README.md", "integrations/blockwise_lr/deepspeed/README.md"):
        assert sentence in " ".join((ROOT / page).read_text().split()), page
