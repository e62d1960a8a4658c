"""Rules that give rates of their own, through DeepSpeed: as torch's AdamW with a group for each rate; saved and resumed."""

import pytest
import torch.distributed as dist
from deepspeed_door.engines import (
    ACCUMULATION,
    BETAS,
    CLIP,
    DECAY,
    EPS,
    LR,
    MIN_LR,
    WARMUP,
    config,
    start,
    train,
    trained,
    weights,
)
from deepspeed_door.test_checkpoint import resumed
from deepspeed_door.test_pipeline import RULES as RULES_OF_LAYERS
from deepspeed_door.test_pipeline import engine_of
from kinds import with_kinds
from own_rates import RULES, rate_of, rated
from ranks import pool
from references import once
from twins import RATIOS, REFERENCES, Twin, make, paper_lr, token_ids, worst_difference

OWN = {"optimizer": {"block_rules": RULES}}


@once
def reference(model_kind, kind, steps, ranks):
    """The unfused twin after the same steps in one process."""
    twin = Twin(model_kind, make(model_kind))
    optimizer = REFERENCES[kind](twin, BETAS, EPS, DECAY, rated(twin.leaves, RATIOS))
    for number, batch in enumerate(token_ids(steps, ACCUMULATION, ranks), 1):
        for ids in batch.flatten(0, 1):
            twin.backward(ids, 1 / (ACCUMULATION * ranks))
        twin.clip(CLIP)
        optimizer.step(lambda rate: rate_of(lambda ratio: paper_lr(number, ratio, LR, MIN_LR, WARMUP, steps), rate))
    return {name: value.detach() for name, value in twin.values().items()}


def end_to_end(kind, model, stage, steps):
    found = trained(model, config(kind, stage, steps=steps, **OWN), steps)
    return worst_difference(found, reference(model, kind, steps, dist.get_world_size()), kind)


@pytest.mark.parametrize("kind, model, stage", with_kinds([("gpt2", 1), ("llama", 2), ("llama", 3), ("gpt_neox", 3)]))
def test_equals_the_unfused_twin_with_a_group_for_each_rate(kind, model, stage):
    assert max(pool(2).run(end_to_end, kind, model, stage, 6)) < 1e-5


@pytest.mark.parametrize("kind, stage, universal", [("BlockwiseAdamMini", 2, False), ("BlockwiseAdamW", 3, True)])
def test_resumes_to_the_bit(kind, stage, universal, tmp_path):
    for wanted, found, equal, _ in pool(2).run(resumed, kind, "llama", stage, OWN, str(tmp_path), universal):
        assert found == wanted and equal


def resharded(kind, folder, load):
    """Weights after a universal checkpoint of three ranks goes on on two."""
    options = {**OWN, **({"checkpoint": {"load_universal": True}} if load else {})}
    engine = start(make("llama"), config(kind, 2, **options))
    if load:
        engine.load_checkpoint(folder)
    else:
        train(engine, 2)
        engine.save_checkpoint(folder, tag="two")
        if dist.get_rank() == 0:
            from blockwise_lr.deepspeed.universal import convert

            convert(f"{folder}/two", f"{folder}/universal")
        dist.barrier()
    found = weights(engine), engine.basic_optimizer.describe().partition("elements and")[2]
    engine.destroy()
    return found


def test_a_universal_checkpoint_goes_to_other_ranks(tmp_path):
    saved = pool(3).run(resharded, "BlockwiseAdamMini", str(tmp_path), False)[0]
    for found in pool(2).run(resharded, "BlockwiseAdamMini", str(tmp_path), True):
        assert worst_difference(found[0], saved[0]) == 0 and found[1] == saved[1]
        assert "low 3,072 at 0.001" in found[1] and "qk 1,536 at 0.008" in found[1]


def refused(block_rules, ratios):
    try:
        start(
            make("llama"),
            config("BlockwiseAdamW", 2, optimizer={"block_rules": block_rules, "block_lr_ratios": ratios}),
        )
    except Exception as error:
        return str(error)
    return ""


def test_bad_rules_are_one_sentence_on_every_rank():
    for rules, ratios, words in [
        ([{"match": "*.layers.*", "name": "low"}], {}, "the block 'low' of block_rules has no ratio; add lr_ratio"),
        ([{"match": "*.layers.*", "name": "low"}], {"lwo": 1}, "unknown block type 'lwo'; use one of embedding"),
        ([{"match": "*.layers.*", "layers": "7", "lr_scale": 0.5}], {}, "no trainable parameter in the layers '7'"),
    ]:
        said = pool(2).run(refused, rules, ratios)
        assert said[0] == said[1] and words in said[0], said


def staged():
    """Name -> factor on a pipeline stage of five layers, and what rules that match nothing anywhere say."""
    from blockwise_lr.deepspeed.stages import map_engine_module

    engine = engine_of("BlockwiseAdamW", 0)
    module, said = engine.module, []
    mapped = map_engine_module(module, [*RULES_OF_LAYERS, {"match": "*", "layer_decay": 0.5}], True)
    for layers in ("last", "5"):
        try:
            map_engine_module(module, [*RULES_OF_LAYERS, {"match": "*", "layers": layers, "lr_scale": 0.5}], True)
        except ValueError as error:
            said.append(str(error))
    engine.destroy()
    return {name: layout.lr_scale for name, layout in mapped.items()}, said


def test_layers_are_counted_over_all_pipeline_stages():
    """DeepSpeed numbers what is before and behind the layers as layers too."""
    found = pool(4).run(staged)
    assert {name.partition(".")[0] for scales, _ in found for name in scales} == set("01234")
    for scales, said in found:
        assert all(scale == 0.5 ** (5 - int(name.partition(".")[0])) for name, scale in scales.items())
        assert len(said) == 1 and "block rule '*' matches no trainable parameter on any pipeline stage" in said[0]
