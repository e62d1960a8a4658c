"""BlockMetricsCallback in the real Trainer, with DeepSpeed and without."""

import pytest
import transformers
from hugging_face import runs
from ranks import pool
from twins import make

from blockwise_lr import BlockError


@runs.own_state()
def logged(folder, deepspeed, optimizer=None):
    import blockwise_lr.deepspeed  # noqa: F401
    from blockwise_lr.transformers import BlockMetricsCallback, BlockwiseAdamWFactory

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        use_cpu=deepspeed is None,
        deepspeed=deepspeed,
        report_to=[],
        disable_tqdm=True,
        warmup_steps=1,
        learning_rate=runs.OPTIMIZER["lr"],
        adam_beta2=runs.OPTIMIZER["betas"][1],
        weight_decay=runs.OPTIMIZER["weight_decay"],
        optim="adamw_torch",
    )
    own = {} if deepspeed or optimizer else {"optimizer_cls_and_kwargs": (BlockwiseAdamWFactory, dict(runs.OPTIMIZER))}
    trainer = transformers.Trainer(model=make("llama"), args=arguments, train_dataset=runs.Tokens(), **own)
    trainer.add_callback(BlockMetricsCallback(trainer, every=2))
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3, 4]
    return [line for line in trainer.state.log_history if "blocks/weight_rms/qk" in line]


@pytest.mark.parametrize("deepspeed", [None, runs.ds_config("BlockwiseAdamW", 2)], ids=["DDP", "ZeRO-2"])
def test_figures_are_in_the_trainers_log(tmp_path, deepspeed):
    first, second = pool(2).run(logged, str(tmp_path), deepspeed)
    assert [line["step"] for line in first] == [2, 4] and first == second
    for line in first:
        for kind in ("variance_l1", "variance_max", "gradient_norm", "weight_rms", "update_rms", "update_to_weight"):
            assert all(line[f"blocks/{kind}/{block}"] > 0 for block in ("embedding", "qk", "vo", "ffn", "norm", "head"))


def test_another_optimizer_is_told(tmp_path):
    (error,) = pool(1).run(logged, str(tmp_path), None, "torch's", errors=True)
    assert isinstance(error, BlockError) and "the Trainer has" in str(error) and "BlockwiseAdamWFactory" in str(error)
