"""DeepSpeed's switches for ZeRO, precision and offload: each trains right, or is refused before the first step."""

import unittest.mock

import pytest
import torch
from deepspeed_door.engines import config, start
from deepspeed_door.test_parity import beside_torch, end_to_end
from kinds import KINDS
from ranks import pool
from twins import make

SMALL = {"reduce_bucket_size": 1500, "allgather_bucket_size": 1500}
RIGHT = {
    "overlap_comm": (2, {"zero": {"overlap_comm": True, "contiguous_gradients": True, **SMALL}}),
    "overlap_comm, stage 1": (1, {"zero": {"overlap_comm": True, **SMALL}}),
    "contiguous_gradients, reduce_scatter off": (2, {"zero": {"contiguous_gradients": False, "reduce_scatter": False}}),
    "use_multi_rank_bucket_allreduce off": (
        2,
        {"zero": {"use_multi_rank_bucket_allreduce": False, "ignore_unused_parameters": False}},
    ),
    "zero_allow_untested_optimizer": (
        1,
        {
            "zero_allow_untested_optimizer": True,
            "communication_data_type": "fp32",
            "prescale_gradients": True,
            "gradient_predivide_factor": 2.0,
        },
    ),
    "param_persistence_threshold 0, overlap_comm": (
        3,
        {"zero": {"stage3_param_persistence_threshold": 0, "overlap_comm": True}},
    ),
    "leaf_module": (3, {"zero": {"leaf_module": {"classes": ["LlamaMLP"]}, "stage3_param_persistence_threshold": 0}}),
    "offload_param and offload_optimizer": (
        3,
        {
            "zero": {
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
                "stage3_param_persistence_threshold": 0,
            }
        },
    ),
    "zero_hpz_partition_size": (3, {"zero": {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}}),
    "reduce_scatter off, stage 3": (3, {"zero": {"reduce_scatter": False, "contiguous_gradients": False}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("feature", RIGHT)
def test_a_switch_of_zero_changes_no_weight(feature, kind):
    stage, options = RIGHT[feature]
    assert max(pool(2).run(end_to_end, kind, "llama", stage, 6, options)) < 1e-5


@pytest.mark.parametrize(
    "stage, dtype, options",
    [
        (2, "fp32", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        (3, "fp32", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        (1, "bf16", {"bf16": {"immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
        (1, "bf16", {"bf16": {"immediate_grad_update": False}, "data_types": {"grad_accum_dtype": "fp32"}}),
        (2, "bf16", {"communication_data_type": "fp32"}),
    ],
    ids=str,
)
def test_low_precision_switches_equal_torch_adamw_inside_deepspeed(stage, dtype, options):
    assert max(pool(2).run(beside_torch, stage, dtype, False, options)) < 1e-6


def started(kind, stage, options):
    start(make("llama"), config(kind, stage, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "stage, options, words",
    [
        (
            1,
            {"zero": {"zenflow": {"topk_ratio": 0.1, "update_interval": 2}, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.zenflow",
        ),
        (
            3,
            {"zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "offload_optimizer.super_offload",
        ),
        (3, {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, 'set "ratio": 1.0'),
        (
            3,
            {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "offload_optimizer to nvme; use",
        ),
        (3, {"zero": {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}}, "offload_param to nvme; use"),
        (1, {"zero": {"elastic_checkpoint": True}}, "elastic_checkpoint"),
        (2, {"dtype": "bf16", "bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads"),
        (
            2,
            {"dtype": "bf16", "bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "bf16.bf16_master_weights_and_grads",
        ),
    ],
    ids=str,
)
def test_what_another_optimizer_would_step_is_refused(kind, stage, options, words):
    errors = pool(2).run(started, kind, stage, options, errors=True)
    assert len({str(error) for error in errors}) == 1
    assert words in str(errors[0]) and type(errors[0]).__name__ == "BlockError"


def sharded(settings):
    """The float32 LLaMA twin, made under zero.Init."""
    import deepspeed
    from twins import MODELS

    deepspeed.init_distributed("gloo")
    accelerator = deepspeed.get_accelerator()
    torch.manual_seed(0)
    # where fp16 is not native, zero.Init of DeepSpeed 0.19.8 makes weights in bfloat16, whatever dtype it is given
    with (
        unittest.mock.patch.object(accelerator, "is_fp16_supported", lambda: True),
        deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32),
    ):
        return MODELS["llama"]()


def made_under_zero_init(kind, uneven):
    """A model made sharded trains as one that was made whole; with another order on one rank all ranks refuse it."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed_door.engines import reference, train, weights
    from twins import worst_difference

    settings = config(kind, 3, steps=6, train_micro_batch_size_per_gpu=2)
    model = sharded(settings)
    whole = make("llama")
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for p, value in zip(model.parameters(), whole.parameters()):
            p.data.copy_(value)
    if uneven and dist.get_rank() == 1:
        mlp = model.model.layers[0].mlp
        mlp._modules = dict(sorted(mlp._modules.items(), reverse=True))
    engine = start(model, settings)
    train(engine, 6)
    found = weights(engine)
    engine.destroy()
    return worst_difference(found, reference("llama", kind, 6, dist.get_world_size()), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_models_made_under_zero_init(kind):
    assert max(pool(2).run(made_under_zero_init, kind, False)) < 1e-5
    for error in pool(2).run(made_under_zero_init, kind, True, errors=True):
        assert "the ranks would not train alike: parameter 5 of the model" in str(error)


def made_for_another_stage(kind, stage, dtype):
    """A model of empty tensors, for a stage that would train these."""
    model = sharded(config(kind, 3))
    start(model, config(kind, stage, dtype=dtype, steps=6))


@pytest.mark.parametrize("kind, stage, dtype", [*zip(KINDS, (0, 1, 2), ("fp32", "bf16", "fp32"))])
def test_models_made_under_zero_init_for_another_stage_are_refused(kind, stage, dtype):
    for error in pool(2).run(made_for_another_stage, kind, stage, dtype, errors=True):
        assert "made under deepspeed.zero.Init" in str(error) and f"stage is {stage}; set stage 3" in str(error)
