"""Saving and loading through DeepSpeed: to the bit on the same layout, at any other through universal checkpoints."""

import os

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make, worst_difference

ADAMW, MINI, LION = "BlockwiseAdamW", "BlockwiseAdamMini", "BlockwiseLion"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SUB_GROUPS = {"sub_group_size": 3000}
TOTAL = 10


BF16_OPTIMIZER = {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}
PERCENTILES = {"optimizer": {"block_clip": "30%"}}
FP16 = {"dtype": "fp16", "fp16": {"loss_scale_window": 2}}  # doubles the scale before the save


def _losses_and_weights(engine, first, steps):
    return train(engine, steps, first=first), weights(engine)


def loss_scale(engine):
    """The state of a dynamic loss scaler."""
    state = vars(getattr(engine.optimizer, "loss_scaler", None) or object)
    return {key: state.get(key) for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}


def resumed(kind, model, stage, options, folder, universal=False):
    """(losses, weights equal, loss scales) of a run that went on and of one that was loaded, both after the same save."""
    from blockwise_lr.deepspeed.universal import convert

    if options.get("dtype") == "fp16":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # torch computes in half on any CPU; DeepSpeed asks for AMX
    engine = start(make(model), config(kind, stage, steps=TOTAL, **options))
    train(engine, 3)
    engine.save_checkpoint(folder, tag="three")
    scales = [loss_scale(engine)]
    wanted, wanted_weights = _losses_and_weights(engine, 3, 3)
    engine.destroy()
    if universal:
        if dist.get_rank() == 0:
            convert(os.path.join(folder, "three"), os.path.join(folder, "universal"))
        dist.barrier()
        options = {**options, "checkpoint": {"load_universal": True}}
    engine = start(make(model, seed=5), config(kind, stage, steps=TOTAL, **options))
    engine.load_checkpoint(folder)
    scales.append(loss_scale(engine))
    found, found_weights = _losses_and_weights(engine, 3, 3)
    engine.destroy()
    return wanted, found, all(torch.equal(wanted_weights[name], found_weights[name]) for name in wanted_weights), scales


@pytest.mark.parametrize(
    "kind, model, stage, ranks, options, universal",
    [
        (ADAMW, "gpt2", 0, 2, {}, False),
        (MINI, "llama", 0, 2, {}, False),
        (MINI, "gpt2", 0, 2, {"dtype": "bf16"}, False),
        (ADAMW, "gpt2", 1, 2, {"dtype": "bf16"}, False),
        (MINI, "gpt_neox", 1, 2, {}, False),
        (MINI, "llama", 1, 2, BF16_OPTIMIZER, False),
        (ADAMW, "gpt2", 1, 2, BF16_OPTIMIZER, True),
        (MINI, "llama", 2, 2, FP16, False),
        (MINI, "gpt2", 2, 2, FP16, True),
        (MINI, "llama_tied", 2, 3, {}, False),
        (MINI, "gpt2", 2, 2, {"zero": OFFLOAD}, False),
        (ADAMW, "gpt_neox", 3, 2, {"zero": OFFLOAD}, False),
        (MINI, "gpt2", 3, 3, {}, False),
        (MINI, "llama", 3, 2, {"zero": SUB_GROUPS, "dtype": "bf16"}, False),
        (ADAMW, "llama", 3, 2, FP16, True),
        (LION, "llama", 1, 2, BF16_OPTIMIZER, False),
        (LION, "llama", 2, 2, FP16, True),
        (LION, "llama", 3, 2, {"zero": SUB_GROUPS}, True),
        (ADAMW, "llama", 2, 2, PERCENTILES, False),
        (ADAMW, "llama", 3, 2, {"zero": SUB_GROUPS, **PERCENTILES}, True),
    ],
)
def test_a_resumed_run_goes_on_to_the_bit(kind, model, stage, ranks, options, universal, tmp_path):
    for wanted, found, equal, scales in pool(ranks).run(resumed, kind, model, stage, options, str(tmp_path), universal):
        assert wanted == found
        assert equal
        assert scales[0] == scales[1]
        if options is FP16:
            assert scales[0]["cur_scale"] > 2**8 and scales[0]["cur_iter"] == 3


# ---- other layouts


def saved_and_continued(kind, model, stage, options, folder):
    """Trains, saves, goes on for five updates, and returns the weights after them."""
    engine = start(make(model), config(kind, stage, steps=TOTAL, **options))
    train_on(engine, 0, 4)
    engine.save_checkpoint(folder, tag="here")
    train_on(engine, 4, 5)
    found = weights(engine)
    engine.destroy()
    return found


def loaded_and_continued(kind, model, stage, options, folder):
    settings = config(kind, stage, steps=TOTAL, **{**options, "checkpoint": {"load_universal": True}})
    settings["gradient_accumulation_steps"] = SEQUENCES // dist.get_world_size()
    engine = start(make(model, seed=5), settings)
    engine.load_checkpoint(folder)
    train_on(engine, 4, 5)
    found = weights(engine)
    engine.destroy()
    return found, engine.global_steps


SEQUENCES = 12  # a global batch that 1, 2, 3 and 4 ranks divide


def train_on(engine, first, steps):
    """Updates on global batches that do not depend on the number of ranks."""
    from twins import token_ids

    data = token_ids(first + steps, 1, SEQUENCES)[first:, 0]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for batch in data:
        for ids in batch[rank::ranks]:
            loss = engine(ids, labels=ids).loss
            engine.backward(loss)
            engine.step()


def saving(options, ranks):
    return {**options, "gradient_accumulation_steps": SEQUENCES // ranks}


@pytest.mark.parametrize(
    "kind, model, source, ranks, target, new_ranks, options",
    [
        (MINI, "llama", 1, 4, 1, 2, {}),
        (MINI, "gpt2", 2, 4, 2, 3, {}),
        (ADAMW, "gpt_neox", 1, 4, 1, 3, {}),
        (ADAMW, "gpt2", 2, 4, 1, 2, {}),
        (MINI, "gpt2", 1, 2, 3, 2, {}),
        (ADAMW, "llama", 1, 2, 3, 3, {"zero": SUB_GROUPS}),
        (MINI, "llama", 3, 4, 3, 2, {"zero": SUB_GROUPS}),
        (MINI, "gpt_neox", 3, 3, 1, 2, {}),
        (MINI, "llama_tied", 3, 2, 2, 4, {"zero": OFFLOAD}),
        (LION, "llama", 1, 4, 3, 2, {}),
    ],
)
def test_universal_checkpoints_continue_anywhere(
    kind, model, source, ranks, target, new_ranks, options, tmp_path, record_property
):
    from blockwise_lr.deepspeed.universal import convert

    plain = {key: value for key, value in options.items() if key != "zero"}
    wanted = pool(ranks).run(saved_and_continued, kind, model, source, saving(plain, ranks), str(tmp_path))[0]
    convert(str(tmp_path / "here"), str(tmp_path / "here_universal"))
    for found, steps in pool(new_ranks).run(loaded_and_continued, kind, model, target, options, str(tmp_path)):
        worst = worst_difference(found, wanted, kind)
        record_property("worst", worst)
        assert worst < 1e-5
        assert steps == 9


def saved_weights(stage, folder):
    engine = start(make("llama"), config(MINI, stage, steps=TOTAL, dtype="bf16"))
    train(engine, 2)
    engine.save_checkpoint(folder)
    found = weights(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_fp32_reads_our_checkpoints(stage, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    wanted = pool(2).run(saved_weights, stage, str(tmp_path))[0]
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- what is not converted, and pipelines


def test_a_checkpoint_without_zero_is_not_converted(tmp_path):
    from blockwise_lr.checkpoint import CheckpointError
    from blockwise_lr.deepspeed.universal import convert

    pool(2).run(saved_weights, 0, str(tmp_path))
    with pytest.raises(CheckpointError, match="holds no optimizer state of ZeRO"):
        convert(str(tmp_path / "global_step2"), str(tmp_path / "universal"))
    assert not (tmp_path / "universal").exists()


class Layer(torch.nn.Module):
    """A block between the two ends, which share the embedding."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(24, 16, bias=False)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, x):
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


def pipeline(kind, stage, seed):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    module = PipelineModule(
        [
            TiedLayerSpec("embed_tokens", torch.nn.Embedding, 61, 16),
            LayerSpec(Layer),
            LayerSpec(Layer),
            TiedLayerSpec("embed_tokens", torch.nn.Embedding, 61, 16, forward_fn=lambda layer, x: x @ layer.weight.T),
        ],
        num_stages=2,
        partition_method="uniform",
        loss_fn=lambda out, ids: torch.nn.functional.cross_entropy(out.flatten(0, 1), ids.flatten()),
    )
    rules = [{"match": "*_proj*", "block": "ffn"}]
    return start(
        module,
        config(kind, stage, steps=TOTAL, optimizer={"block_rules": rules}),
        model_parameters=list(module.parameters()),
    )


def pipeline_resumed(kind, stage, folder):
    """Losses of two updates, and the weights after them, of a run that went on and of one that was loaded."""
    from deepspeed.utils import groups

    ids = torch.randint(0, 61, (TOTAL, 2, 2, 6), generator=torch.Generator().manual_seed(1))

    def go_on(engine, first, steps):
        batches = iter([(part, part) for step in ids[first : first + steps] for part in step])
        return [float(engine.train_batch(batches)) for _ in range(steps)]

    found = []
    for seed, load in ((0, False), (5, True)):
        engine = pipeline(kind, stage, seed)
        if load:
            engine.load_checkpoint(folder)
        else:
            go_on(engine, 0, 3)
            engine.save_checkpoint(folder, tag="three")
        losses = go_on(engine, 3, 2)
        found.append((losses, {name: p.detach().clone() for name, p in engine.module.named_parameters()}))
        engine.destroy()
    groups.mpu = None  # DeepSpeed keeps the pipeline's for engines to come
    return found[0][0] == found[1][0] and all(torch.equal(p, found[1][1][name]) for name, p in found[0][1].items())


@pytest.mark.parametrize("kind, stage", [(MINI, 1), (ADAMW, 0), (LION, 1)])
def test_a_pipeline_resumes_to_the_bit(kind, stage, tmp_path):
    """Every stage holds other parameters, so every rank's record of them is another."""
    assert pool(2).run(pipeline_resumed, kind, stage, str(tmp_path)) == [True, True]
