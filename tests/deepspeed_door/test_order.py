"""A checkpoint belongs to the order in which flat tensors hold the parameters: another one is refused on every rank
before anything is loaded, and what reorders them is converted rightly."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make, worst_difference

from blockwise_lr.checkpoint import CheckpointError, Manifest

ADAMW, MINI = "BlockwiseAdamW", "BlockwiseAdamMini"
ROUND_ROBIN = {"round_robin_gradients": True}
TOTAL = 10


def model(order, seed=0):
    """The small Llama; "swapped": gate_proj and up_proj, which have one shape, defined the other way round; "turned": the
    layers' attention and MLP."""
    made = make("llama", seed)
    for layer in made.model.layers:
        if order == "swapped":
            modules = layer.mlp._modules
            layer.mlp._modules = {name: modules[name] for name in ("up_proj", "gate_proj", *modules)}
        elif order == "turned":
            modules = layer._modules
            layer._modules = {name: modules[name] for name in ("mlp", *modules)}
    return made


def module_weights(engine):
    return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def saved(folder, kind, stage, zero=None, order="", dtype="fp32"):
    """A checkpoint after two updates; the weights then, from the optimizer's fp32 values and, but for ZeRO-3, from the
    module."""
    engine = start(model(order), config(kind, stage, steps=TOTAL, zero=zero, dtype=dtype))
    train(engine, 2)
    engine.save_checkpoint(folder, tag="two")
    found = weights(engine)
    same = stage == 3 or dtype != "fp32" or all(torch.equal(found[n], p) for n, p in module_weights(engine).items())
    engine.destroy()
    return found, same


def state(engine):
    """What a refused load must leave as it was."""
    found = {key: getattr(engine, key) for key in ("global_steps", "global_samples", "micro_steps", "skipped_steps")}
    return found, engine.lr_scheduler.state_dict(), [group["lr"] for group in engine.basic_optimizer.param_groups]


def loaded(folder, kind, stage, zero=None, order="", dtype="fp32", tag=None, universal=False, **arguments):
    """(error of a load, whether everything is as before, weights after it)."""
    engine = start(
        model(order, seed=5),
        config(
            kind,
            stage,
            steps=TOTAL,
            zero=zero,
            dtype=dtype,
            **({"checkpoint": {"load_universal": True}} if universal else {}),
        ),
    )
    train(engine, 1)
    before, was = weights(engine), state(engine)
    try:
        engine.load_checkpoint(folder, tag=tag, **arguments)
        message = None
    except CheckpointError as error:
        message = f"{type(error).__name__}: {error}"
    after = weights(engine)
    untouched = state(engine) == was and all(torch.equal(before[name], after[name]) for name in before)
    engine.destroy()
    return message, untouched, after


def refused(*arguments, **settings):
    answers = pool(2).run(loaded, *arguments, *settings.values())
    assert all(answer[1] for answer in answers), "a refused load left something behind"
    assert answers[0][0] == answers[1][0]
    return answers[0][0]


@pytest.mark.parametrize(
    "kind, stage, dtype, before, after",
    [
        (MINI, 1, "fp32", {}, {"order": "swapped"}),
        (ADAMW, 2, "fp32", {}, {"order": "turned"}),
        (ADAMW, 3, "bf16", {"order": "swapped"}, {}),
        (ADAMW, 0, "bf16", {}, {"order": "swapped"}),
        (ADAMW, 2, "fp32", {"zero": ROUND_ROBIN}, {}),
        (MINI, 1, "fp32", {}, {"zero": ROUND_ROBIN}),
        (ADAMW, 3, "fp32", {"zero": {"sub_group_size": 3000}}, {"zero": {"sub_group_size": 9000}}),
    ],
)
def test_another_order_is_refused_and_changes_nothing(kind, stage, dtype, before, after, tmp_path):
    pool(2).run(saved, str(tmp_path), kind, stage, before.get("zero"), before.get("order", ""), dtype)
    message = refused(str(tmp_path), kind, stage, after.get("zero"), after.get("order", ""), dtype)
    assert "MismatchError" in message and "does not fit this run" in message
    orders = before.get("order", "") + after.get("order", "")
    if orders == "swapped":
        assert all(f"model.layers.0.mlp.{name}_proj.weight" in message for name in ("gate", "up"))
    elif "zero" in after and "zero" in before:
        assert "zero_optimization: " in message
    assert ("blockwise_lr.deepspeed.universal" in message) == (stage > 0)
    answers = pool(2).run(loaded, str(tmp_path), kind, stage, before.get("zero"), before.get("order", ""), dtype)
    assert all(message is None for message, _, _ in answers)


def test_fp32_without_zero_goes_by_name(tmp_path):
    """There are no flat tensors: the module's weights come back by name whatever the order."""
    wanted, _ = pool(2).run(saved, str(tmp_path), ADAMW, 0)[0]
    found = pool(2).run(loaded, str(tmp_path), ADAMW, 0, None, "swapped")
    assert all(message is None and worst_difference(after, wanted) == 0 for message, _, after in found)


def strip(folder, how):
    """Makes a checkpoint one of an older version, or one whose manifest was lost."""
    manifest = Manifest.read(folder)
    if how == "lost":
        (folder / "blockwise_lr.json").unlink()
    else:
        layout = manifest.layout.model_copy(update={"flats": None, "order": []})
        manifest.model_copy(update={"layout": layout}).write(folder)


@pytest.mark.parametrize("how, stage", [("older", 2), ("lost", 1), ("lost", 3)])
def test_checkpoints_without_a_record_of_their_order_load_where_it_is_the_same(how, stage, tmp_path):
    wanted, _ = pool(2).run(saved, str(tmp_path), ADAMW, stage)[0]
    strip(tmp_path / "two", how)
    message = refused(str(tmp_path), ADAMW, stage, None, "swapped")
    assert "another order" in message and "gate_proj" in message and "up_proj" in message
    for message, _, after in pool(2).run(loaded, str(tmp_path), ADAMW, stage):
        assert message is None and worst_difference(after, wanted) == 0


@pytest.mark.parametrize(
    "kind, stage, zero, target, order",
    [
        (MINI, 2, ROUND_ROBIN, 1, ""),
        (ADAMW, 1, ROUND_ROBIN, 3, "swapped"),
        (MINI, 2, ROUND_ROBIN, 2, "turned"),
        (MINI, 3, {"sub_group_size": 3000}, 2, "swapped"),
    ],
)
def test_any_order_is_converted_rightly(kind, stage, zero, target, order, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from blockwise_lr.deepspeed.universal import convert

    wanted, same = pool(2).run(saved, str(tmp_path), kind, stage, zero)[0]
    assert same, "DeepSpeed's safe_get_full_fp32_param tells other values than the module holds"
    merged = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert worst_difference({name: merged[name] for name in wanted}, wanted) == 0
    convert(str(tmp_path / "two"), str(tmp_path / "any"))
    zero = ROUND_ROBIN if target < 3 else None
    for message, _, after in pool(3).run(loaded, str(tmp_path), kind, target, zero, order, "fp32", "any", True):
        assert message is None and worst_difference(after, wanted) == 0


def test_deepspeeds_own_converter_gets_round_robin_right_too(tmp_path):
    from deepspeed.checkpoint.ds_to_universal import main

    from blockwise_lr.deepspeed.universal import UniversalFolder

    wanted, _ = pool(2).run(saved, str(tmp_path), ADAMW, 2, ROUND_ROBIN)[0]
    main(
        Namespace(
            input_folder=str(tmp_path / "two"),
            output_folder=str(tmp_path / "any"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    source = UniversalFolder(str(tmp_path / "any"))
    assert all(torch.equal(source.values(name, "fp32", p.numel()), p.flatten()) for name, p in wanted.items())


def plain_deepspeed(folder, zero):
    """A checkpoint of torch's AdamW with DeepSpeed's own slice mappings."""
    settings = config("AdamW", 2, steps=TOTAL, zero=zero)
    settings["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    engine = start(make("llama"), settings)
    train(engine, 1)
    engine.save_checkpoint(folder, tag="two")
    engine.destroy()


def test_wrong_mappings_are_not_converted(tmp_path):
    from blockwise_lr.deepspeed.universal import convert

    pool(2).run(plain_deepspeed, str(tmp_path), ROUND_ROBIN)
    with pytest.raises(CheckpointError, match="saved with round_robin_gradients by DeepSpeed alone"):
        convert(str(tmp_path / "two"), str(tmp_path / "any"))
    assert not Path(tmp_path, "any").exists()


def test_parts_that_are_no_whole_are_not_converted(tmp_path):
    """As with experts that differ from rank to rank: both ranks hold the same stretch of one parameter."""
    from blockwise_lr.deepspeed.universal import convert

    pool(2).run(saved, str(tmp_path), ADAMW, 2)
    strip(tmp_path / "two", "lost")
    path = tmp_path / "two" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    states = torch.load(path, weights_only=False)
    states["blockwise_lr"]["flats"][0][1][0][1] = 0
    torch.save(states, path)
    with pytest.raises(CheckpointError, match="what its ranks hold of .* does not follow one another"):
        convert(str(tmp_path / "two"), str(tmp_path / "any"))


def test_the_manifest_names_every_ranks_contents(tmp_path):
    pool(2).run(saved, str(tmp_path), MINI, 2)
    layout = json.loads((tmp_path / "two" / "blockwise_lr.json").read_text())["layout"]
    assert len(layout["flats"]) == 2 and len(set(layout["flats"].values())) == 2
    assert layout["order"] == [name for name, _ in make("llama").named_parameters()]
