"""FSDP2 through Accelerate: the optimizer is built as always, before ``prepare()``, and takes over what Accelerate shards.

    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP \
        examples/frameworks/accelerate_fsdp2.py

The model and the tokens are stand-ins; ``train`` is what a training script has of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers
from accelerate import Accelerator

from blockwise_lr import BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    batches: Sequence[torch.Tensor],
    optimizer_class: Callable = BlockwiseAdamW,
    lr: float = 6e-4,
    resume: str | None = None,
    save: tuple[int, str] | None = None,
) -> tuple[torch.nn.Module, list[float]]:
    """Trains on this rank's batches; returns the prepared model and the losses.

    Args:
        batches: one (sequences, tokens) of token ids per step.
        resume: a folder of ``save_state`` to go on from.
        save: after how many steps to save, and where.
    """
    optimizer = optimizer_class(model.named_parameters(), lr=lr, weight_decay=0.1, block_map=map_blocks(model))
    schedule = BlockwiseWarmupCosine(optimizer, total_num_steps=len(batches), warmup_num_steps=len(batches) // 10 + 1)
    # the schedule counts optimizer steps and is stepped below: a prepared one is stepped once for each process
    accelerator.register_for_checkpointing(schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(resume)
    losses = []
    for done, ids in enumerate(batches[schedule.last_epoch :], start=schedule.last_epoch + 1):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if save is not None and done == save[0]:
            accelerator.save_state(save[1])
    return model, losses


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=1024))
    own = torch.Generator().manual_seed(1 + accelerator.process_index)
    batches = torch.randint(1024, (50, 4, 128), generator=own).to(accelerator.device)
    _, losses = train(accelerator, model, batches)
    accelerator.print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
