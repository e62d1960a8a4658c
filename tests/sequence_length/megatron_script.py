"""A pretrain_gpt with Megatron's own get_batch (tensor-parallel rank 0 reads and broadcasts); for Megatron 0.19.

With CUT_BY_HAND (lengths by iteration, parted by commas) it cuts its batches itself, as one would without a warmup.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "megatron"))
import pretrain_gpt
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.utils import get_batch_on_this_tp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

LENGTHS = [int(length) for length in os.environ.get("CUT_BY_HAND", "").split(",") if length]
NAMES = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def forward_step(data, model):
    args, reads = get_args(), mpu.get_tensor_model_parallel_rank() == 0
    length = args.seq_length
    batch = {name: value for name, value in next(data).items() if name in NAMES} if reads else {}
    if LENGTHS and model.training:
        length = LENGTHS[args.curr_iteration]
        batch = {
            name: (value[..., :length, :length] if value.ndim == 4 else value[:, :length]).contiguous()
            for name, value in batch.items()
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=True,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=length,
        mtp_on_this_rank=False,
    )
    print(f"{'train' if model.training else 'evaluation'} length {batch['tokens'].shape[1]}", flush=True)
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses, partial(pretrain_gpt.loss_of, batch["loss_mask"])


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "SentencePieceTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        pretrain_gpt.datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    print(f"length at the end {get_args().seq_length}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
