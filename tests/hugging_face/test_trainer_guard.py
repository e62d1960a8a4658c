"""GuardCallback in the real Trainer: a loss that jumps, two ranks, accumulation, and a resume."""

import json
import math
from functools import partial

import pytest
import transformers
from hugging_face import runs
from ranks import pool
from twins import make

from blockwise_lr import BlockError
from blockwise_lr.measure import Unstable

LAST = 8


class Jumping(transformers.Trainer):
    """Its loss is another number of times what it is, in some steps."""

    jumps: dict[int, float] = {}

    def compute_loss(self, *arguments, **keywords):
        loss = super().compute_loss(*arguments, **keywords)
        return loss * self.jumps.get(self.state.global_step + 1, 1.0)


@runs.own_state()
def trained(folder, jumps, resume=False, deepspeed=None, **options):
    """(what the guard did, how rates are lowered at the end, what training ended with)"""
    import blockwise_lr.deepspeed  # noqa: F401
    from blockwise_lr.transformers import BlockwiseAdamWFactory, GuardCallback

    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=LAST,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=4,
        logging_strategy="no",
        use_cpu=deepspeed is None,
        deepspeed=deepspeed,
        report_to=[],
        disable_tqdm=True,
        learning_rate=runs.OPTIMIZER["lr"],
        adam_beta2=runs.OPTIMIZER["betas"][1],
        weight_decay=runs.OPTIMIZER["weight_decay"],
        warmup_steps=1,
    )
    own = {} if deepspeed else {"optimizer_cls_and_kwargs": (BlockwiseAdamWFactory, dict(runs.OPTIMIZER))}
    trainer = Jumping(model=make("llama"), args=arguments, train_dataset=runs.Tokens(), **own)
    trainer.jumps, ended = jumps, None
    callback = GuardCallback(trainer, **{"after": 1, "loss_ratio": 2.0, "steps": 5, **options})
    trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Unstable as error:
        ended = str(error)
    assert ended or "training_step" not in vars(trainer)
    (optimizer,) = callback.guard._optimizers
    lowered = optimizer.param_groups[0].get("lowered_lr")
    return [(alarm.step, alarm.action) for alarm in callback.guard.alarms], lowered, ended


@pytest.mark.parametrize("deepspeed", [None, runs.ds_config("BlockwiseAdamW", 2)], ids=["DDP", "ZeRO-2"])
def test_rates_are_lowered_and_a_resumed_run_knows(tmp_path, deepspeed):
    for alarms, lowered, ended in pool(2).run(trained, str(tmp_path), {3: 100.0, 5: 100.0}, False, deepspeed):
        assert alarms == [(3, "lower")] and lowered == {"factor": 0.5, "until": 8} and ended is None
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["blockwise_lr_guard"]["alarms"][0]["step"] == 3
    # the resumed run still waits at step 5, and would act at once otherwise
    again = pool(2).run(trained, str(tmp_path), {5: 100.0}, str(tmp_path / "checkpoint-4"), deepspeed)
    assert again == 2 * [([(3, "lower")], {"factor": 0.5, "until": 8}, None)]


def test_it_saves_and_stops(tmp_path):
    for alarms, _, ended in pool(2).run(partial(trained, action="stop"), str(tmp_path), {6: 100.0}):
        assert alarms == [(6, "stop")] and "step 6: the loss" in ended and "the state is saved" in ended
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    assert not (tmp_path / "checkpoint-8").exists()


def test_a_loss_that_is_no_number_ends_it_unsaved(tmp_path):
    for _, _, ended in pool(2).run(trained, str(tmp_path), {2: math.nan}):
        assert "step 2: the loss is not finite on a rank" in ended and "nothing is saved" in ended
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("options", [{"action": "roll_back"}, {"variance_ratio": 2.0}, {"loss_ratios": 2.0}])
def test_what_it_does_not_offer(tmp_path, options):
    (error,) = pool(1).run(partial(trained, **options), str(tmp_path), {}, errors=True)
    assert isinstance(error, BlockError) and ("does not offer" in str(error) or "did you mean" in str(error))
