"""What cannot go with our optimizers stops every rank in one sentence when the optimizer is built; what goes, is checked."""

import pytest

pytest.importorskip("megatron.core")

from megatron_door.layouts import Layout, build_chunks, megatron
from ranks import pool


def fully_sharded(bf16):
    """Megatron's --use-torch-fsdp2 model."""
    from megatron.core.distributed import DistributedDataParallelConfig, TorchFullyShardedDataParallel

    (chunk,) = build_chunks("llama", Layout(bf16=bf16, extra=dict(transformer_impl="local")))
    return [TorchFullyShardedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)]


def with_fsdp2(bf16):
    from megatron_door.training import make_optimizer

    import blockwise_lr.megatron

    with megatron(Layout()):
        undo = blockwise_lr.megatron.register()
        try:
            return make_optimizer(fully_sharded(bf16), "blockwise_adamw", Layout(bf16=bf16)) is not None
        finally:
            undo()


@pytest.mark.parametrize("bf16", [False, True])
def test_fsdp2_is_refused_on_every_rank(bf16):
    for error in pool(2).run(with_fsdp2, bf16, errors=True):
        assert "parameters are of type DTensor" in str(error) and "leave out --use-torch-fsdp2" in str(error), error


OPTIONS = {
    "optimizer_cpu_offload": "--optimizer-cpu-offload",
    "use_precision_aware_optimizer": "--use-precision-aware-optimizer",
    "optimizer_cuda_graph": "--optimizer-cuda-graph",
    "use_layer_wise_distributed_optimizer": "the layer-wise distributed optimizer",
    "overlap_param_gather_with_optimizer_step": "--overlap-param-gather-with-optimizer-step",
    "reuse_grad_buf_for_mxfp8_param_ag": "--reuse-grad-buf-for-mxfp8-param-ag",
}
DTYPES = {
    "main_grads_dtype": "--main-grads-dtype",
    "main_params_dtype": "--main-params-dtype",
    "exp_avg_dtype": "--exp-avg-dtype",
    "exp_avg_sq_dtype": "--exp-avg-sq-dtype",
}
WRAPPERS = {
    "use_megatron_fsdp": "Megatron-FSDP (--use-megatron-fsdp)",
    "use_custom_fsdp": "Megatron-FSDP (--use-custom-fsdp)",
    "fp8_param_gather": "--fp8-param-gather",
    "fp4_param_gather": "--fp4-param-gather",
}


def refused_flags():
    """The message for each flag that stands in one of Megatron's configs, as an optimizer of ours is built."""
    import torch
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron_door.training import wrap

    import blockwise_lr.megatron

    found = {}
    with megatron(Layout()):
        undo = blockwise_lr.megatron.register()
        wrapped = wrap(build_chunks("llama", Layout()), Layout())

        def attempt(name, place, value):
            config = OptimizerConfig(optimizer="blockwise_adamw", lr=1e-3, min_lr=0.0)
            holder = {"optimizer": config, "wrapper": wrapped[0].ddp_config, "model": wrapped[0].config}[place]
            before = getattr(holder, name, None)
            setattr(holder, name, value)
            try:
                get_megatron_optimizer(config, wrapped, use_gloo_process_groups=False)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
            setattr(holder, name, before)

        for name in OPTIONS:
            attempt(name, "optimizer", True)
        attempt("decoupled_lr", "optimizer", 1e-3)
        attempt("decoupled_weight_decay", "optimizer", False)
        for name in DTYPES:
            attempt(name, "optimizer", torch.bfloat16)
        for name in WRAPPERS:
            attempt(name, "wrapper", True)
        attempt("gtp_weight_remat_size", "model", 2)
        undo()
    return found


def test_flags_that_cannot_go_together_are_named():
    (found,) = pool(1).run(refused_flags)
    wanted = {
        **OPTIONS,
        **DTYPES,
        **WRAPPERS,
        "decoupled_lr": "--decoupled-lr",
        "gtp_weight_remat_size": "generalized tensor",
    }
    assert found.pop("decoupled_weight_decay").startswith("BlockError: blockwise optimizers decouple weight decay")
    assert found.keys() == wanted.keys()
    for name, flag in wanted.items():
        assert found[name].startswith(f"BlockError: blockwise optimizers do not support {flag}"), found[name]


def built(kind, change):
    """Builds an optimizer of ours after a change."""
    import contextlib
    from types import SimpleNamespace

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron
    from blockwise_lr import BlockType
    from blockwise_lr.blocks.rules import Rule
    from blockwise_lr.megatron import build, refusals

    layout = Layout(tp=2) if dist.get_world_size() == 2 else Layout()
    settings = {"block_lr_ratios": {"qk": 2.0 + dist.get_rank()}} if change == "ratios" else {}
    if change == "order":  # of a set, and the address of a function, which are no differences
        settings = {
            "accept_mismatch": {"lr", "betas", "eps", "min_lr"},
            "block_rules": [Rule("*.linear_proj.weight", BlockType.VO, view=lambda shape, heads: shape)],
        }
    own = build._in_place_of_adam
    with megatron(layout):
        undo = blockwise_lr.megatron.register(**settings)
        try:
            if change == "group":  # every rank's tensor parallelism ends at itself
                alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
                return refusals.refuse_unsupported(
                    SimpleNamespace(),
                    [],
                    {"pg_collection": SimpleNamespace(tp=alone, pp=parallel_state.get_pipeline_model_parallel_group())},
                )
            if change == "megatron":  # as if Megatron took its Adam from elsewhere one day
                build._in_place_of_adam = contextlib.nullcontext
            chunks = build_chunks("llama", Layout(tp=layout.tp, bf16=change == "bf16"))
            return make_optimizer(wrap(chunks, layout), kind, layout) is not None
        finally:
            build._in_place_of_adam = own
            undo()


@pytest.mark.parametrize(
    "ranks, change, words",
    [
        (
            2,
            "ratios",
            ["block_lr_ratios is {'qk': 2.0} on rank 0 and {'qk': 3.0} on rank 1", "start all ranks with the same"],
        ),
        (2, "group", ["the pg_collection has another tp group", "parallel_state"]),
        (1, "megatron", ["Megatron built torch.optim.adamw.AdamW where blockwise_adam_mini was asked for", "doctor"]),
        (1, "bf16", ["torch.bfloat16", "where a plain float32 tensor of", "leave out the flag"]),  # and no --bf16
    ],
)
def test_what_is_built_is_what_was_asked_for_on_all_ranks(ranks, change, words):
    for error in pool(ranks).run(built, "blockwise_adam_mini", change, errors=True):
        assert all(text in str(error) for text in words), error


def test_settings_that_are_only_written_otherwise_are_equal():
    assert pool(2).run(built, "blockwise_adamw", "order") == [True, True]


def test_adam_mini_with_cut_heads_is_refused():
    """8 heads, one query group, 4 ranks: two and a half heads each. (AdamW trains it.)"""
    for error in pool(4).run(cut_heads, errors=True):
        assert "tensor parallelism cuts the heads of" in str(error) and "--optimizer blockwise_adamw" in str(error), (
            error
        )


def cut_heads():
    from megatron_door.training import make_optimizer, wrap

    import blockwise_lr.megatron

    layout = Layout(tp=4, extra=dict(num_attention_heads=8))
    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            chunks = build_chunks("shared_group", layout)
            return make_optimizer(wrap(chunks, layout), "blockwise_adam_mini", layout)
        finally:
            undo()
