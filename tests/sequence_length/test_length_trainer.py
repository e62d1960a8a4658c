"""The real Trainer on two ranks, beside one whose collator cuts the rows by hand."""

import logging

import pytest
import torch
from hugging_face import runs
from ranks import pool
from twins import make

WARMUP = {"start": 4, "end": 12, "steps": 4, "multiple": 2}
LENGTHS = [6, 8, 10, 12, 12, 12]


class ByHand:
    """A collator that cuts batches to the length of the step that they are of: two micro batches each."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        length = LENGTHS[min(self.calls // 2, len(LENGTHS) - 1)]
        self.calls += 1
        return {name: torch.stack([row[name] for row in rows])[:, :length] for name in rows[0]}


@runs.own_state()
def train(folder, deepspeed, by_hand=False, resume=False):
    """(losses and gradient norms by step, the length of an evaluation's logits)."""
    import transformers

    import blockwise_lr.deepspeed  # noqa: F401
    from blockwise_lr import transformers as door

    logging.disable(logging.WARNING)
    if deepspeed and not by_hand:
        deepspeed = {**deepspeed, "sequence_length_warmup": WARMUP}
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=runs.STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        logging_steps=1,
        use_cpu=deepspeed is None,
        deepspeed=deepspeed,
        seed=5,
        report_to=[],
        disable_tqdm=True,
        warmup_steps=2,
        learning_rate=2e-3,
        max_grad_norm=0.5,
        adam_beta2=0.95,
        weight_decay=0.1,
    )
    settings = {} if deepspeed else {"optimizer_cls_and_kwargs": (door.BlockwiseAdamWFactory, dict(runs.OPTIMIZER))}
    if by_hand:
        settings["data_collator"] = ByHand()
    elif not deepspeed:
        settings["callbacks"] = [door.SequenceLengthCallback(**WARMUP)]
    trainer = transformers.Trainer(model=make("llama"), args=arguments, train_dataset=runs.Tokens(), **settings)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    ids = torch.zeros(1, 12, dtype=torch.long)
    trainer.model.eval()
    return [(entry["loss"], float(entry["grad_norm"])) for entry in logged], trainer.model(ids).logits.shape[1]


@pytest.mark.parametrize("deepspeed", [None, runs.ds_config("BlockwiseAdamW", 2)], ids=["DDP", "ZeRO-2"])
def test_trains_and_resumes_as_on_rows_cut_by_hand(deepspeed, tmp_path):
    """Gradient norms show that labels are counted after the cut: the Trainer divides by their number."""
    expected = pool(2).run(train, str(tmp_path / "hand"), deepspeed, True)[0][0]
    ours, length = pool(2).run(train, str(tmp_path / "ours"), deepspeed)[0]
    assert len(ours) == runs.STEPS and length == 12
    assert ours == expected
    assert pool(2).run(train, str(tmp_path / "ours"), deepspeed, False, True)[0][0][2:] == expected[2:]


def test_the_callback_is_refused_with_deepspeed(tmp_path):
    with pytest.raises(AssertionError, match='with DeepSpeed write "sequence_length_warmup" into the ds_config'):
        pool(1).run(_with_callback, str(tmp_path))


@runs.own_state()
def _with_callback(folder):
    from blockwise_lr.transformers import SequenceLengthCallback

    class Arguments:
        deepspeed = {"zero_optimization": {}}

    SequenceLengthCallback(**WARMUP).on_train_begin(Arguments(), None, None, model=make("llama"))
