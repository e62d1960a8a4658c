"""A pretrain_gpt in Megatron's own style (megatron-core 0.19, which carries megatron.training); knows nothing of blocks.

torchrun --nproc_per_node 2 -m blockwise_lr.megatron pretrain_gpt.py --optimizer blockwise_adamw …
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split


def datasets(samples: list[int]) -> tuple:
    """Megatron's datasets (training, validation, test) of --data-path and --split."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=True,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()


datasets.is_distributed = True  # every rank reads its own data


def loss_of(mask: torch.Tensor, losses: torch.Tensor) -> tuple:
    """(sum of token losses, number of tokens, what the log shows)."""
    mask = mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.detach()])}


def forward_step(data: Iterator[dict], model: torch.nn.Module) -> tuple:
    """One micro batch through the model."""
    batch = {name: value.cuda() for name, value in next(data).items() if isinstance(value, torch.Tensor)}
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses, partial(loss_of, batch["loss_mask"])


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "SentencePieceTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
