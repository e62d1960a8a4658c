"""Runs of the real Trainer and of Accelerate on the CPU; they run in the rank processes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from twins import VOCABULARY, make

STEPS, SAVE_AT = 6, 3
OPTIMIZER = {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "block_lr_ratios": "paper"}


class Tokens(torch.utils.data.Dataset):
    """Fixed random sequences of 12 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def ds_config(kind: str, stage: int, **top: Any) -> dict[str, Any]:
    """A ds_config whose batch sizes and step counts the Trainer fills in ("auto")."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": kind, "params": dict(OPTIMIZER)},
        "scheduler": {
            "type": "BlockwiseWarmupCosine",
            "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"},
        },
        **top,
    }


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Accelerate and transformers keep one state per process: a case starts without it, and leaves none to the next one.

    With stage 3's left behind, transformers makes every later model of the process under zero.Init.
    """
    _reset_state()
    try:
        yield
    finally:
        _reset_state()


def _reset_state() -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@own_state()
def train(
    folder: str,
    deepspeed: dict | None,
    kind: str = "BlockwiseAdamW",
    resume: bool = False,
    model: str = "llama",
    every: int = 0,
) -> dict[str, Any]:
    """Trains with the Trainer, saving after SAVE_AT steps.

    Args:
        folder: where checkpoints go; shared by the ranks.
        deepspeed: a ds_config; None trains with plain DDP through ``optimizer_cls_and_kwargs``.
        kind: the optimizer, where deepspeed does not say it.
        resume: go on from the checkpoint at SAVE_AT.
        every: measure the sharpness every so many steps.

    Returns:
        losses by step, the learning rates of the block types at the end, and the optimizer's class, the
        weights, and what was logged of the sharpness.
    """
    import transformers

    import blockwise_lr.deepspeed
    from blockwise_lr import transformers as door

    logging.disable(logging.WARNING)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=SAVE_AT,
        logging_steps=1,
        use_cpu=deepspeed is None,
        deepspeed=deepspeed,
        seed=5,
        report_to=[],
        disable_tqdm=True,
        warmup_steps=2,
        learning_rate=OPTIMIZER["lr"],
        max_grad_norm=0.5,
        adam_beta2=OPTIMIZER["betas"][1],
        weight_decay=OPTIMIZER["weight_decay"],
    )
    settings = {} if deepspeed else {"optimizer_cls_and_kwargs": (getattr(door, kind + "Factory"), dict(OPTIMIZER))}
    trainer = transformers.Trainer(model=make(model), args=arguments, train_dataset=Tokens(), **settings)
    ids = torch.randint(0, VOCABULARY, (2, 2, 9), generator=torch.Generator().manual_seed(9))
    if every:
        rank = trainer.args.process_index
        trainer.add_callback(door.SharpnessCallback(trainer, lambda: [ids[rank]], every, draws=2))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVE_AT}" if resume else None)
    optimizer = blockwise_lr.deepspeed.optimizer_of(trainer.model_wrapped) if deepspeed else trainer.optimizer.optimizer
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {
        "losses": losses,
        "lrs": optimizer.block_lrs()[0],
        "optimizer": type(optimizer).__name__,
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "sharpness": {entry["step"]: entry for entry in trainer.state.log_history if "sharpness/qk" in entry},
    }


@own_state()
def accelerate(folder: str, stage: int, resume: bool = False) -> dict[str, Any]:
    """The training loop of an Accelerate user, with a ds_config that has our optimizer and schedule.

    Args, returns: as :func:`train`.
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim, DummyScheduler

    import blockwise_lr.deepspeed

    logging.disable(logging.WARNING)
    settings = ds_config("BlockwiseAdamW", stage)
    settings.update(train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1, gradient_clipping=0.5)
    settings["scheduler"]["params"] = {"total_num_steps": STEPS, "warmup_num_steps": 2}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    model = make("gpt2")
    optimizer = DummyOptim(model.parameters(), lr=OPTIMIZER["lr"], weight_decay=OPTIMIZER["weight_decay"])
    data = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, DummyScheduler(optimizer))
    if resume:
        accelerator.load_state(f"{folder}/state")
    losses = {}
    for step, batch in zip(range(1, STEPS + 1), data):
        if resume and step <= SAVE_AT:
            continue
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = float(loss.detach())
        if step == SAVE_AT and not resume:
            accelerator.save_state(f"{folder}/state")
    inner = blockwise_lr.deepspeed.optimizer_of(model)
    return {"losses": losses, "lrs": inner.block_lrs()[0], "optimizer": type(inner).__name__}


def accelerate_alone(folder: str) -> dict[str, Any]:
    """The rates before each optimizer step, of a run and of one that goes on from its state after SAVE_AT."""
    return {"run": _accelerate_alone(folder, False), "resumed": _accelerate_alone(folder, True)}


@own_state()
def _accelerate_alone(folder: str, resumed: bool) -> list[dict[str, float]]:
    """Accelerate without DeepSpeed, gradients accumulated over 4 micro batches."""
    from accelerate import Accelerator

    from blockwise_lr import BlockwiseAdamW, map_blocks
    from blockwise_lr.schedules import BlockwiseWarmupCosine

    logging.disable(logging.WARNING)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = make("llama", seed=int(resumed))
    optimizer = BlockwiseAdamW(
        model.named_parameters(), lr=OPTIMIZER["lr"], block_map=map_blocks(model), block_lr_ratios="paper"
    )
    schedule = BlockwiseWarmupCosine(optimizer, STEPS, 2)
    data = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    model, wrapped, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    rates = []
    if resumed:
        accelerator.load_state(f"{folder}/alone")
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                rates.append(optimizer.block_lrs()[0])
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
        if accelerator.sync_gradients and len(rates) == SAVE_AT and not resumed:
            accelerator.save_state(f"{folder}/alone")
    return rates[:STEPS]
