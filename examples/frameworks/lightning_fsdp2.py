"""FSDP2 through Lightning's ModelParallelStrategy: shard in ``configure_model``, build the optimizer in
``configure_optimizers``, which Lightning calls after it.

    torchrun --nproc_per_node 8 examples/frameworks/lightning_fsdp2.py --devices 8
    torchrun --nproc_per_node 2 examples/frameworks/lightning_fsdp2.py --devices 2 --accelerator cpu

The model and the tokens, the same at every step, are stand-ins.
"""

from __future__ import annotations

import argparse

import lightning
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

from blockwise_lr import BlockwiseAdamW, map_blocks
from blockwise_lr.schedules import BlockwiseWarmupCosine

VOCABULARY = 1024


class Llama(lightning.LightningModule):
    def __init__(self, lr: float, steps: int) -> None:
        super().__init__()
        self.lr, self.steps, self.losses = lr, steps, []
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=VOCABULARY))

    def configure_model(self) -> None:
        if isinstance(self.llama, FSDPModule):  # Lightning calls this more than once
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.llama.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.llama, mesh=mesh)

    def configure_optimizers(self) -> dict:
        optimizer = BlockwiseAdamW(
            self.named_parameters(), lr=self.lr, weight_decay=0.1, block_map=map_blocks(self, config=self.llama.config)
        )
        schedule = BlockwiseWarmupCosine(optimizer, total_num_steps=self.steps, warmup_num_steps=self.steps // 10 + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, ids: torch.Tensor, number: int) -> torch.Tensor:
        loss = self.llama(input_ids=ids, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=torch.accelerator.device_count())
    parser.add_argument("--steps", type=int, default=20, help="of the schedule")
    parser.add_argument("--until", type=int, help="stop after so many steps")
    parser.add_argument("--save", help="write a checkpoint there at the end")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    args = parser.parse_args()
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1),
        max_steps=args.until or args.steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    ids = torch.randint(VOCABULARY, (4 * args.devices, 32), generator=torch.Generator().manual_seed(1))
    module = Llama(lr=6e-4, steps=args.steps)
    trainer.fit(module, torch.utils.data.DataLoader(ids, batch_size=4), ckpt_path=args.resume)
    if args.save:
        trainer.save_checkpoint(args.save)
    print(f"rank {trainer.global_rank} losses {module.losses}", flush=True)


if __name__ == "__main__":
    main()
