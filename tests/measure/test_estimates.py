"""Sharpness against the exact Gauss-Newton trace, by enumeration over the vocabulary in the unfused twin."""

import json
import math

import numpy as np
import pytest
import torch
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import VOCABULARY, Twin, make, token_ids
from typer.testing import CliRunner

from blockwise_lr import BlockError, BlockType, BlockwiseAdamW, map_blocks
from blockwise_lr.cli import app
from blockwise_lr.measure import (
    Estimate,
    Sharpness,
    SharpnessEvery,
    measure_gradient_noise,
    measure_sharpness,
    measure_updates,
    read_batches,
)
from blockwise_lr.measure.labels import drawn_labels, logit_gradient, probabilities

IDS = torch.randint(0, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(3))


def lively(kind, seed=0):
    """A model whose predictions differ from token to token; freshly initialized ones are nearly uniform."""
    model = make(kind, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


def exact(kind, model, ids):
    """(elements, trace) of each block type: the mean over predicted tokens of sum_c p_c |grad log p_c|^2."""
    twin = Twin(kind, model)
    out = torch.func.functional_call(model, twin.values(), (ids,))
    log_p = out.logits[:, :-1].flatten(0, 1).log_softmax(-1)
    leaves = list(twin.leaves.values())
    numel, trace = {}, {}
    for leaf in leaves:
        numel[leaf.block] = numel.get(leaf.block, 0) + leaf.tensor.numel()
    for token in log_p:
        for value in token:
            grads = torch.autograd.grad(value, [leaf.tensor for leaf in leaves], retain_graph=True, allow_unused=True)
            for leaf, grad in zip(leaves, grads):
                square = 0.0 if grad is None else float(grad.square().sum())
                trace[leaf.block] = trace.get(leaf.block, 0.0) + float(value.detach().exp()) * square / len(log_p)
    return {block: (numel[block], trace[block]) for block in numel}


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_it_is_the_gauss_newton_trace_over_the_size(kind):
    model = lively(kind)
    wanted = exact(kind, model, IDS)
    found = measure_sharpness(model, [IDS], draws=1500)
    assert found.tokens == 6 and {block.value for block in found.blocks()} == set(wanted)
    for block, estimate in found.blocks().items():
        numel, trace = wanted[block.value]
        assert estimate.numel == numel and estimate.error < 0.03 * estimate.sharpness
        assert abs(estimate.sharpness - trace / numel) < 4 * estimate.error, block


def test_batches_and_the_draws_of_each_are_averaged():
    model = lively("llama")
    two = torch.cat([IDS, IDS.flip(1)])
    apart = measure_sharpness(model, [IDS, IDS.flip(1)], draws=400)
    whole = measure_sharpness(model, [two], draws=400, seed=1)
    assert apart.tokens == whole.tokens == 12
    for block, estimate in apart.blocks().items():
        assert len(estimate.traces) == 800
        other = whole.blocks()[block]
        assert abs(estimate.sharpness - other.sharpness) < 4 * math.hypot(estimate.error, other.error)
    layers = apart.grouped(lambda name, block: (name.split(".")[2] if "layers" in name else "", block.value))
    assert {("0", "qk"), ("1", "ffn"), ("", "embedding")} <= set(layers)
    assert sum(of.numel for of in layers.values()) == sum(p.numel() for p in model.parameters())


def in_slices(logits, draws):
    import torch.distributed as dist

    mine, start = logits.chunk(2, -1)[dist.get_rank()], dist.get_rank() * -(-logits.shape[-1] // 2)
    p = probabilities(mine, dist.group.WORLD)
    labels = drawn_labels(p, draws, 4, dist.group.WORLD)
    gradient = logit_gradient(p, labels[0], mine)
    return torch.where(labels >= 0, labels + start, -1), gradient


def test_labels_are_drawn_from_the_predictions_and_the_same_from_slices_of_them():
    logits = 3 * torch.randn(5, 13, generator=torch.Generator().manual_seed(1))
    p, draws = logits.softmax(-1), 20_000
    labels = drawn_labels(probabilities(logits), draws, 4)
    counts = torch.stack([(labels == value).float().mean(0) for value in range(13)], 1)
    assert ((counts - p).abs() < 5 * (p * (1 - p) / draws).sqrt() + 1e-6).all()
    leaf = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, labels[0]).backward()
    (first, left), (second, right) = pool(2).run(in_slices, logits, draws)
    assert torch.equal(first.maximum(second), labels) and torch.equal((first < 0), (second >= 0))
    for gradient in (logit_gradient(probabilities(logits), labels[0], logits), torch.cat([left, right], -1)):
        torch.testing.assert_close(gradient, leaf.grad)


def test_labels_only_say_what_is_left_out():
    model, both = lively("llama"), torch.cat([IDS, IDS.flip(1)])
    labels = both.clone()
    labels[1] = -100
    found = measure_sharpness(model, [{"input_ids": both, "labels": labels}], draws=3)
    assert found.tokens == 6
    with pytest.raises(BlockError, match="predicts no token"):
        measure_sharpness(model, [{"input_ids": both, "labels": torch.full_like(both, -100)}])


@pytest.mark.parametrize(
    "measure",
    [lambda model: measure_sharpness(model, [IDS], draws=2), lambda model: measure_gradient_noise(model, [IDS, IDS])],
    ids=["sharpness", "noise"],
)
def test_training_goes_on_to_the_bit(measure):
    def trained(measured):
        model = make("gpt2")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for batch in token_ids(4, 1, 1)[:, 0, 0]:
            model.train()
            model(batch, labels=batch).loss.backward()
            if measured:
                measure(model)
            assert all(module.training for module in model.modules())
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_every_so_many_steps_of_a_loop_it_is_written_and_training_goes_on_to_the_bit():
    def trained(every):
        model, written = make("llama"), []
        optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-2, block_map=map_blocks(model))
        measure = SharpnessEvery(model, lambda: [IDS], every, draws=2, sinks=[lambda *said: written.append(said)])
        torch.manual_seed(5)
        found = []
        for step, batch in enumerate(token_ids(4, 1, 1)[:, 0, 0], 1):
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(measure(step))
        assert measure.seconds > 0 or not written
        return [p.detach().clone() for p in model.parameters()], written, found

    plain, nothing, none = trained(9)
    weights, written, found = trained(2)
    assert all(torch.equal(a, b) for a, b in zip(weights, plain, strict=True))
    assert not nothing and none == [None] * 4 and [found[0], found[2]] == [None, None]
    assert [step for _, step in written] == [2, 4]
    assert written[1][0]["sharpness/qk"] == found[3].blocks()[BlockType.QK].sharpness
    assert written[1][0]["sharpness_error/norm"] == found[3].blocks()[BlockType.NORM].error
    for every in (0, True, 1.5):
        with pytest.raises(BlockError, match="give a whole number of optimizer steps"):
            SharpnessEvery(make("llama"), list, every)


def test_batches_are_a_list_or_a_function_and_no_iterator():
    model = make("llama")
    by_list, by_function = (SharpnessEvery(model, batches, 1, draws=1) for batches in ([IDS], lambda: [IDS]))
    assert by_list(1) == by_function(1) and by_list(2) == by_function(2)
    with pytest.raises(BlockError, match="one measurement uses up"):
        SharpnessEvery(model, iter([IDS]), 1)


def test_a_model_that_is_called_otherwise_needs_predictions():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

        def forward(self, idx):
            return self.table(idx)

    model = Own()
    blocks = map_blocks(model, rules=[{"match": "table.weight", "block": "embedding"}])
    with pytest.raises(BlockError, match="give predictions="):
        measure_sharpness(model, [IDS], block_map=blocks)
    found = measure_sharpness(
        model,
        [IDS],
        block_map=blocks,
        predictions=lambda model, ids: (model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )
    assert found.tokens == IDS[:, 1:].numel()


def under_deepspeed(stage):
    """What two ranks find with batches of their own, and whether training goes on as without."""
    import torch.distributed as dist

    ends = []
    for measured in (True, False):
        engine = start(make("llama"), config("BlockwiseAdamW", stage))
        train(engine, 2)
        if measured:
            ids = [IDS, IDS.flip(1)][dist.get_rank()]
            found = measure_sharpness(engine.module, [ids], draws=200).as_dict()
            alone = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        train(engine, 2, first=2)
        ends.append(weights(engine))
        engine.destroy()
    return found, alone, all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_find_the_same_together_under_deepspeed(stage):
    (found, values, same), (other, _, other_same) = pool(2).run(under_deepspeed, stage)
    assert found == other and found["tokens"] == 12 and same and other_same
    model = make("llama")
    model.load_state_dict(values)
    whole = measure_sharpness(model, [IDS, IDS.flip(1)], draws=200, seed=9).blocks()
    for block, estimate in whole.items():
        one = found["blocks"][block.value]
        assert abs(one["sharpness"] - estimate.sharpness) < 4 * math.hypot(one["error"], estimate.error)


def sharded(kind, how):
    """What two ranks find with parameters that are sharded and with whole ones, the same draws of labels in both, and
    whether training goes on as without."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    ids = [IDS, IDS.flip(1)][dist.get_rank()]
    whole = measure_sharpness(lively(kind), [ids], draws=3)
    found, ends = None, []
    for measured in (True, False):
        if how == "zero3":
            engine = start(lively(kind), config("BlockwiseAdamW", 3, zero={"stage3_param_persistence_threshold": 0}))
            found = measure_sharpness(engine.module, [ids], draws=3) if measured else found
            train(engine, 2)
            ends.append(weights(engine))
            engine.destroy()
            continue
        model, mesh = lively(kind), init_device_mesh("cpu", (2,))
        for layer in model.transformer.h if kind == "gpt2" else model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = BlockwiseAdamW(model.named_parameters(), lr=1e-3, block_map=map_blocks(lively(kind)))
        model(ids, labels=ids).loss.backward()
        found = measure_sharpness(model, [ids], draws=3, block_map=optimizer.block_map) if measured else found
        optimizer.step()
        ends.append({name: p.full_tensor() for name, p in model.named_parameters() if isinstance(p, DTensor)})
    same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    return {key: part.traces for key, part in whole.parts.items()}, found, same


@pytest.mark.parametrize("how", ["zero3", "fsdp2"])
@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_sharded_equals_whole(kind, how):
    for whole, found, same in pool(2).run(sharded, kind, how):
        assert same and found.parts.keys() == whole.keys()
        for key, traces in whole.items():
            assert found.parts[key].traces == pytest.approx(traces, rel=1e-5), key


def without_tokens_on_one(measure):
    import torch.distributed as dist

    model, second = make("llama"), dist.get_rank() == 1
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)} if second else IDS
    if measure == "sharpness":
        measure_sharpness(model, [batch], draws=1)
    else:
        measure_updates(
            model, {name: p.detach().clone() for name, p in model.named_parameters()}, [] if second else [batch]
        )


@pytest.mark.parametrize("measure, words", [("sharpness", "predicts no token"), ("updates", "no batch to measure on")])
def test_what_one_rank_lacks_stops_all(measure, words):
    for error in pool(2).run(without_tokens_on_one, measure, errors=True):
        assert "failed on rank 1 of 2" in str(error) and words in str(error)


def sliced():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    model, mesh = make("llama"), init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    linear = model.lm_head
    linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(0), Shard(0)]))
    with pytest.raises(BlockError, match="lm_head.weight is sliced by tensor parallelism"):
        measure_sharpness(model, [IDS], block_map=map_blocks(make("llama")))
    linear.weight = torch.nn.Parameter(
        distribute_tensor(linear.weight.to_local().detach(), mesh, [Shard(0), Replicate()])
    )
    with pytest.raises(BlockError, match="lm_head.weight is sharded over ranks"):
        measure_updates(model, {}, [IDS], block_map=map_blocks(make("llama")))


def test_slices_are_refused():
    pool(1).run(sliced)


def test_an_order_that_the_errors_do_not_separate_is_not_stated():
    def of(mean, spread):
        return Estimate(1, (mean - spread, mean + spread))

    parts = {("a", BlockType.QK): of(1.0, 0.1), ("b", BlockType.FFN): of(1.1, 0.1), ("c", BlockType.NORM): of(9.0, 1.0)}
    assert Sharpness(parts, 1).order() == [[BlockType.QK, BlockType.FFN], [BlockType.NORM]]
    assert math.isnan(Estimate(1, (1.0,)).error)


def test_bad_input_is_refused():
    model = lively("llama")
    with pytest.raises(BlockError, match="no batch to measure on"):
        measure_sharpness(model, [])
    with pytest.raises(BlockError, match="draws is 0"):
        measure_sharpness(model, [IDS], draws=0)
    with pytest.raises(BlockError, match="is in no block; make the block_map from this model"):
        measure_sharpness(model, [IDS], block_map=map_blocks(make("gpt2")))


def test_the_command_reads_a_saved_model(tmp_path):
    lively("llama").save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, VOCABULARY, 4000).astype(np.uint16))
    (tmp_path / "ids.bin").write_bytes(np.load(tmp_path / "ids.npy").tobytes())

    def run(*words):
        return CliRunner().invoke(app, ["sharpness", *map(str, words)])

    sizes = ("--length", 16, "--batch", 2, "--batches", 3)
    shown = run(tmp_path / "model", "--tokens", tmp_path / "ids.npy", *sizes)
    assert shown.exit_code == 0 and "from flat to sharp:" in shown.output and "90 predicted tokens" in shown.output
    said = run(tmp_path / "model", "--tokens", tmp_path / "ids.bin", *sizes, "--json")
    blocks = json.loads(said.stdout)["blocks"]
    batches = read_batches(tmp_path / "ids.npy", 16, 2, 3)
    assert torch.stack(batches).shape == (3, 2, 16)
    found = measure_sharpness(lively("llama"), batches)
    assert blocks["qk"]["sharpness"] == pytest.approx(found.blocks()[BlockType.QK].sharpness)
    noisy = ("--tokens", tmp_path / "ids.npy", "--length", 16, "--batch", 2, "--batches", 4, "--gradient-noise")
    told = json.loads(run(tmp_path / "model", *noisy, "--json").stdout)["gradient_noise"]
    four = read_batches(tmp_path / "ids.npy", 16, 2, 4)
    wanted = measure_gradient_noise(lively("llama"), four).blocks()[BlockType.FFN]
    assert told["blocks"]["ffn"]["signal_to_noise"] == pytest.approx(wanted.ratio)
    assert "signal / noise" in run(tmp_path / "model", *noisy).output
    for words, told in (
        ((tmp_path / "model", "--tokens", tmp_path / "ids.npy", *sizes, "--gradient-noise"), "give an even number"),
        ((tmp_path, "--tokens", tmp_path / "ids.npy", *sizes), "holds no config.json"),
        ((tmp_path / "model", "--tokens", tmp_path / "none.npy"), "none.npy"),
        ((tmp_path / "model", "--tokens", tmp_path / "ids.npy", "--length", 4001), "token ids in a row are needed"),
        ((tmp_path / "model", "--tokens", tmp_path / "ids.npy", "--length", 0), "length is 0"),
    ):
        bad = run(*words)
        assert bad.exit_code == 2 and told in bad.output and "Traceback" not in bad.output
