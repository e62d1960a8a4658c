"""Megatron's layers trained by DeepSpeed engines: TP through ``mpu``, and a PipelineModule with tied embeddings."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from kinds import options_of
from megatron_door.layouts import (
    LENGTH,
    Layout,
    build_chunks,
    gather_full,
    load_full,
    make_config,
    megatron,
    vocabulary,
)
from megatron_door.training import BATCH, BETAS, CLIP, DECAY, EPS, LR, MIN_LR, WARMUP, batches, reference, worst
from megatron_door.twin import model_inputs

TOTAL = 10
DEEP = Layout(layers=4)  # of pipelines: the edges of their shards lie where the tests say


def ds_config(kind: str, stage: int, micro_batch: int, accumulation: int, **settings: Any) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "optimizer": {
            "type": kind,
            "params": {
                **options_of(kind, {"lr": LR, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY}),
                **settings,
            },
        },
        "scheduler": {
            "type": "BlockwiseWarmupCosine",
            "params": {"total_num_steps": TOTAL, "warmup_num_steps": WARMUP, "min_lr": MIN_LR},
        },
    }


def initialize(**arguments: Any) -> Any:
    import deepspeed

    import blockwise_lr.deepspeed  # noqa: F401  the one line a user adds

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    return deepspeed.initialize(**arguments)[0]


def tensor_parallel(variant: str, kind: str, stage: int, **settings: Any) -> dict[str, float]:
    """TP=2 x ZeRO DP=2 with ``mpu=megatron.core.parallel_state``; worst difference from the unfused twin."""
    first, wanted, _ = reference(
        variant, kind, TOTAL, schedule="paper", vector_biases=settings.get("bias_segments") == "vector"
    )
    layout = Layout(tp=2)
    with megatron(layout):
        from megatron.core import parallel_state

        (model,) = build_chunks(variant, layout)
        load_full([model], first)
        ranks = parallel_state.get_data_parallel_world_size()
        engine = initialize(
            model=model, mpu=parallel_state, config=ds_config(kind, stage, 1, BATCH // ranks, **settings)
        )
        for batch in batches(TOTAL).chunk(ranks, 1)[parallel_state.get_data_parallel_rank()]:
            for ids in batch.split(1):
                loss = engine(*model_inputs(ids), labels=ids[:, 1:].contiguous()).mean()
                engine.backward(loss)
                engine.step()
        found, apart = gather_full([model], first)
        engine.destroy()
    return {**worst(found, wanted, kind), "apart": apart}


def slice_blocks(variant: str) -> tuple[dict[str, list], dict[str, list]]:
    """Under TP=2, every parameter's (block, rows) pieces as the DeepSpeed door and as the Megatron door map them."""
    with megatron(Layout(tp=2)):
        from megatron.core import parallel_state

        from blockwise_lr.megatron.mapping import map_chunks

        (model,) = build_chunks(variant, Layout(tp=2))
        engine = initialize(model=model, mpu=parallel_state, config=ds_config("BlockwiseAdamW", 1, 1, 1))
        maps = engine.basic_optimizer.block_map, map_chunks([model]).ours
        engine.destroy()
    return tuple(
        {name: [(piece.block.value, piece.size) for piece in layout.pieces] for name, layout in each.items()}
        for each in maps
    )


class Embedding(torch.nn.Module):
    """The first stage: token ids to hidden states."""

    def __init__(self, config: Any, rows: int) -> None:
        super().__init__()
        from megatron.core import tensor_parallel

        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            rows, config.hidden_size, init_method=config.init_method, config=config
        )

    @property
    def weight(self) -> torch.Tensor:
        return self.word_embeddings.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.word_embeddings(ids).transpose(0, 1).contiguous()


def logits(module: Embedding, hidden: torch.Tensor) -> torch.Tensor:
    """The tied output layer, as GPTModel computes it."""
    return torch.nn.functional.linear(hidden, module.weight).transpose(0, 1)


def cross_entropy(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.float().flatten(0, 1), labels.flatten())


def pipeline_layers(variant: str) -> list[Any]:
    """Layer specs of a Megatron GPT: tied embedding, transformer layers, final norm, tied head."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerLayer

    config = make_config(variant, DEEP)
    submodules = get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization=config.normalization
    ).submodules
    rotary = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True)(LENGTH)

    class Layer(TransformerLayer):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
            return super().forward(hidden, attention_mask=mask, rotary_pos_emb=rotary)[0]

    return [
        TiedLayerSpec("embed", Embedding, config, vocabulary(variant)),
        *(LayerSpec(Layer, config, submodules, layer_number=number + 1) for number in range(config.num_layers)),
        LayerSpec(torch.nn.RMSNorm, config.hidden_size, config.layernorm_epsilon),
        TiedLayerSpec("embed", Embedding, config, vocabulary(variant), forward_fn=logits),
    ]


def single_process_name(name: str) -> str:
    """The name in GPTModel of a PipelineModule's parameter."""
    first, rest = name.split(".", 1)
    if first == "tied_modules":
        return "embedding.word_embeddings.weight"
    return f"decoder.final_layernorm.{rest}" if int(first) == 5 else f"decoder.layers.{int(first) - 1}.{rest}"


def pipeline(variant: str, kind: str, stage: int, kernel: str = "auto") -> dict[str, Any]:
    """PP=2 x ZeRO DP=2 in a PipelineModule of Megatron layers; worst difference from the unfused twin, and at which
    elements of its rows the shards' edges cut the tied embedding on any stage."""
    first, wanted, _ = reference(variant, kind, TOTAL, schedule="paper", layers=DEEP.layers)
    with megatron(Layout()):
        from deepspeed.pipe import PipelineModule

        initialize_group()
        module = PipelineModule(
            pipeline_layers(variant), num_stages=2, loss_fn=cross_entropy, partition_method="uniform"
        )
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(first[single_process_name(name)])
        engine = initialize(model=module, config=ds_config(kind, stage, 1, BATCH // 2, kernel=kernel))
        cut = engine.basic_optimizer.shards.boundaries.get("tied_modules.embed.word_embeddings.weight")
        width = make_config(variant, DEEP).hidden_size
        edges = [] if cut is None else [int(edge) % width for edge in cut.positions]
        share = batches(TOTAL).chunk(2, 1)[engine.grid.get_data_parallel_rank()]
        data = iter([(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for batch in share for ids in batch.split(1)])
        for _ in range(TOTAL):
            engine.train_batch(data)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            everyone, {single_process_name(name): p.detach().clone() for name, p in module.named_parameters()}
        )
        engine.destroy()
    found: dict[str, torch.Tensor] = {}
    apart = 0.0
    for weights in everyone:
        for name, value in weights.items():
            apart = max(apart, float((found.setdefault(name, value) - value).abs().max()))
    return {**worst(found, wanted, kind), "apart": apart, "edges": edges}


def initialize_group() -> None:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
