"""Sharpness of sharded Megatron models beside that of the whole model in one process, the same labels drawn."""

import itertools

import pytest

pytest.importorskip("megatron.core")

import torch
import torch.distributed as dist
from megatron_door.layouts import LENGTH, VOCABULARY, Layout, build_chunks, load_full, megatron
from megatron_door.training import make_optimizer, start_model, train, wrap
from megatron_door.twin import model_inputs
from ranks import pool

from blockwise_lr import BlockError
from blockwise_lr.measure import SharpnessEvery
from blockwise_lr.measure import measure_sharpness as measure_whole

DRAWS = 3


def batches(replica):
    """Two batches of a data-parallel rank."""
    ids = torch.randint(0, VOCABULARY, (2, 2, 2, LENGTH), generator=torch.Generator().manual_seed(11))
    return list(ids[replica])


def lively(variant, layers=2):
    """Weights of a whole model whose predictions differ from token to token."""
    model = start_model(variant, layers=layers)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model


def logits(model, ids):
    """As blockwise_lr.measure takes them."""
    padded = torch.cat([ids, ids[:, :1]], 1)
    return model(*model_inputs(padded))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()


def whole(variant, layers=2):
    """(what one process finds by blockwise_lr.measure, what it finds by blockwise_lr.megatron, the weights)."""
    from blockwise_lr.megatron import measure_sharpness
    from blockwise_lr.megatron.mapping import map_chunks

    with megatron(Layout(layers=layers)):
        model = lively(variant, layers)
        ours, maps = measure_sharpness(model, batches(0), draws=DRAWS), map_chunks([model])
        for p in model.parameters():
            p.tensor_model_parallel = False  # Megatron marks slices, and one that is the whole as well
        plain = measure_whole(model, batches(0), draws=DRAWS, block_map=maps.ours, predictions=logits)
        return plain, ours, {name: p.detach().clone() for name, p in model.named_parameters()}


def sharded(variant, layout, weights):
    """What this rank finds."""
    from megatron.core import parallel_state

    from blockwise_lr.megatron import measure_sharpness

    with megatron(layout):
        chunks = build_chunks(variant, layout)
        load_full(chunks, weights)
        return measure_sharpness(wrap(chunks, layout), batches(parallel_state.get_data_parallel_rank()), draws=DRAWS)


def alike(found, wanted):
    assert found.parts.keys() == wanted.parts.keys() and found.tokens == wanted.tokens
    for key, part in wanted.parts.items():
        assert found.parts[key].numel == part.numel, key
        assert found.parts[key].traces == pytest.approx(part.traces, rel=1e-4, abs=1e-9), key


@pytest.mark.parametrize(
    "variant, ranks, layout",
    [
        ("gpt", 2, Layout(tp=2)),  # biases
        ("gqa", 2, Layout(tp=2)),  # norms of heads
        ("gpt", 2, Layout(tp=2, sp=True)),
        ("llama", 2, Layout(pp=2)),  # an embedding on both stages
        ("moe", 2, Layout(tp=2, sp=True)),
        ("gqa", 4, Layout(tp=2, pp=2, sp=True, distributed=True)),
        ("llama", 2, Layout(pp=2, vpp=2, layers=4)),  # an embedding in the first chunk of one and the last of the other
        ("gqa", 2, Layout(cp=2)),
        ("llama", 4, Layout(pp=2, cp=2)),
        ("moe", 2, Layout(tp=2, ep=2, sp=True)),  # experts whole on either rank
    ],
    ids=str,
)
def test_sharded_equals_whole(variant, ranks, layout):
    ((plain, ours, weights),) = pool(1).run(whole, variant, layout.layers)
    alike(ours, plain)
    for found in pool(ranks).run(sharded, variant, layout, weights):
        alike(found, plain)


def test_data_parallel_ranks_put_their_draws_together():
    ((plain, _, weights),) = pool(1).run(whole, "llama")
    first, second = pool(2).run(sharded, "llama", Layout(), weights)
    assert first == second and first.tokens == 2 * plain.tokens
    for key, part in plain.parts.items():
        both = first.parts[key]
        assert len(both.traces) == 2 * len(part.traces) and both.traces[: len(part.traces)] == pytest.approx(
            part.traces, rel=1e-4, abs=1e-9
        )


def whole_of_two():
    """(traces by parameter and draw that all of two replicas' tokens have together, the weights), by loss and backward."""
    from blockwise_lr.measure.labels import drawn_labels, probabilities, seed_of

    with megatron(Layout()):
        model = lively("moe").eval()
        traces = {}
        for number in range(2):
            for draw in range(DRAWS):
                loss, tokens = 0.0, 0
                for replica in range(2):
                    predictions, _ = logits(model, batches(replica)[number])
                    labels = drawn_labels(probabilities(predictions), DRAWS, seed_of(0, replica, number))[draw]
                    loss += torch.nn.functional.cross_entropy(predictions, labels, reduction="sum")
                    tokens += len(labels)
                model.zero_grad()
                (loss / tokens).backward()
                for name, p in model.named_parameters():
                    traces.setdefault(name, []).append(tokens * float(p.grad.square().sum()))
        return traces, {name: p.detach().clone() for name, p in model.named_parameters()}


# gloo gathers no parts of unequal size, which the other dispatcher would have it do
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}


@pytest.mark.parametrize(
    "ranks, layout",
    [(2, Layout(ep=2)), (4, Layout(tp=2, ep=2, etp=2, sp=True, distributed=True, extra=ALLGATHER))],
    ids=str,
)
def test_experts_on_several_ranks(ranks, layout):
    """A draw is of both ranks' tokens, which the experts of either get."""
    ((traces, weights),) = pool(1).run(whole_of_two)
    for found in pool(ranks).run(sharded, "moe", layout, weights):
        assert found.tokens == 2 * 2 * 2 * (LENGTH - 1)
        by_name = found.grouped(lambda name, _: name)
        assert by_name.keys() == traces.keys()
        for name, wanted in traces.items():
            assert by_name[name].numel == weights[name].numel(), name
            assert by_name[name].traces == pytest.approx(wanted, rel=1e-4, abs=1e-9), name


def with_fused_gradients():
    """What a model finds whose linear layers would add gradients to Megatron's buffers, by a kernel that is not here."""
    from blockwise_lr.megatron import measure_sharpness

    with megatron(Layout()):
        model = lively("gpt")
        linear = [module for module in model.modules() if hasattr(module, "gradient_accumulation_fusion")]
        for module in linear:
            module.gradient_accumulation_fusion = True
        found = measure_sharpness(model, batches(0), draws=DRAWS)
        return found, len(linear), all(module.gradient_accumulation_fusion for module in linear)


def test_no_gradient_goes_into_megatrons_buffers():
    ((_, ours, _),) = pool(1).run(whole, "gpt")
    ((found, count, fused),) = pool(1).run(with_fused_gradients)
    assert found == ours and count == 9 and fused


def trained(layout, measured):
    from megatron.core import parallel_state

    import blockwise_lr.megatron
    from blockwise_lr.megatron import measure_sharpness

    with megatron(layout):
        undo = blockwise_lr.megatron.register()
        try:
            chunks = build_chunks("gpt", layout)
            wrapped = wrap(chunks, layout)
            optimizer = make_optimizer(wrapped, "blockwise_adamw", layout)
            held_out, steps = batches(parallel_state.get_data_parallel_rank()), itertools.count(1)
            every = SharpnessEvery(wrapped, lambda: held_out, 1, measure=measure_sharpness, draws=1)
            torch.manual_seed(3)
            losses = train(wrapped, optimizer, 3, (lambda: every(next(steps))) if measured else None)
            assert len(every.history) == 3 * measured and all(chunk.training for chunk in wrapped)
            weights = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
            return losses, weights, torch.rand(1)
        finally:
            undo()


def test_training_goes_on_to_the_bit():
    layout = Layout(tp=2, distributed=True, extra={"hidden_dropout": 0.2, "attention_dropout": 0.2})
    for (losses, weights, number), (same, others, again) in zip(
        pool(2).run(trained, layout, True), pool(2).run(trained, layout, False), strict=True
    ):
        assert losses == same and number == again
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def refused(variant, layout, ids, words):
    from blockwise_lr.megatron import measure_sharpness

    with megatron(layout), pytest.raises(BlockError, match=words):
        measure_sharpness(build_chunks(variant, layout), ids if dist.get_rank() == 0 else batches(0))
    return True


@pytest.mark.parametrize(
    "variant, ranks, layout, words",
    [
        ("moe", 2, Layout(tp=2), "experts under tensor parallelism without --sequence-parallel"),
        ("deepseek", 1, Layout(), "multi-token prediction"),
    ],
    ids=str,
)
def test_what_is_not_measured_is_named(variant, ranks, layout, words):
    assert all(pool(ranks).run(refused, variant, layout, batches(0), words))


@pytest.mark.parametrize(
    "ids, words",
    [
        ([], "no batch to measure on"),
        ([torch.zeros(2, 1, dtype=torch.long)], "no shape"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], "of shapes"),
    ],
)
def test_bad_batches_stop_every_rank(ids, words):
    assert all(pool(2).run(refused, "gpt", Layout(tp=2), ids, words))


@pytest.mark.parametrize(
    "ids, words",
    [
        ([torch.zeros(2, LENGTH, dtype=torch.long)], "rank 0 has 1 batches"),
        ([torch.zeros(2, 6, dtype=torch.long)], "6 tokens cannot be cut"),
    ],
)
def test_bad_batches_of_a_draw_together_stop_every_rank(ids, words):
    assert all(pool(2).run(refused, "gpt", Layout(cp=2), ids, words))
