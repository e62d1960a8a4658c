"""Megatron's own schedules on cut batches, beside the same rows cut by hand, under every kind of parallelism."""

import pytest
import torch
import torch.distributed as dist
from ranks import pool

pytest.importorskip("megatron.core")
from megatron_door.layouts import LENGTH, VOCABULARY, Layout, build_chunks, full_names, megatron
from megatron_door.parts import context_positions
from megatron_door.training import wrap

from blockwise_lr import BlockError

STEPS, MICRO, MICROS = 4, 2, 2
FULL = {"gpt": LENGTH, "llama": 16}  # tokens; learned positions have as many rows as layouts.py gives them
BATCH_NAMES = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def batch_of(step, number, length):
    """A batch as Megatron's GPT dataset collates it: the first ``length`` tokens of rows that are always the same."""
    draw = torch.Generator().manual_seed(10 * step + number)
    ids = torch.randint(0, VOCABULARY, (MICRO, 17), generator=draw)
    return {
        "tokens": ids[:, :length],
        "labels": ids[:, 1 : length + 1],
        "loss_mask": (ids[:, :length] % 5 != 0).float(),
        "position_ids": torch.arange(length).expand(MICRO, length),
        "attention_mask": torch.ones(length, length).triu(1).bool().expand(MICRO, 1, length, length),
    }


def forward(length):
    """A forward step of Megatron's manner: tensor-parallel rank 0 reads and broadcasts into tensors of the step's length."""
    from megatron.core import parallel_state as state

    shapes = dict.fromkeys(BATCH_NAMES, (MICRO, length)) | {"attention_mask": (MICRO, 1, length, length)}
    types = {"loss_mask": torch.float32, "attention_mask": torch.bool}

    def step(data, model):
        given = next(data) if state.get_tensor_model_parallel_rank() == 0 else {}
        batch = {}
        for name in BATCH_NAMES:
            made = given.get(name, torch.empty(shapes[name], dtype=types.get(name, torch.int64)))
            assert made.shape == shapes[name]
            batch[name] = made.contiguous()
            dist.broadcast(
                batch[name], state.get_tensor_model_parallel_src_rank(), state.get_tensor_model_parallel_group()
            )
        mine = context_positions(length, state.get_context_parallel_rank(), state.get_context_parallel_world_size())
        rows = {name: batch[name][:, mine] for name in BATCH_NAMES[:-1]}
        output = model(rows["tokens"], rows["position_ids"], batch["attention_mask"], labels=rows["labels"])

        def loss(losses):
            mean = (losses.float() * rows["loss_mask"]).sum() / batch["loss_mask"].sum()
            return mean, {"loss": mean.detach()}

        return output, loss

    return step


def gradients_of(wrapped, chunks, step, data, length):
    from megatron.core import parallel_state as state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    reads = state.get_tensor_model_parallel_rank() == 0
    stored = get_forward_backward_func()(
        forward_step_func=forward(length),
        data_iterator=data if reads else [None] * len(wrapped) if len(wrapped) > 1 else None,
        model=wrapped,
        num_microbatches=MICROS,
        seq_length=length,
        micro_batch_size=MICRO,
        forward_only=False,
    )
    losses = [float(entry["loss"]) for entry in stored]
    return losses, {name: p.main_grad.clone() for name, p in full_names(chunks)}


def cut_as_by_hand(layout):
    from blockwise_lr.megatron import cut_batches, length_schedule

    with megatron(layout):
        torch.manual_seed(0)
        variant = "gpt" if layout.cp == 1 else "llama"
        chunks, full = build_chunks(variant, layout), FULL[variant]
        wrapped = wrap(chunks, layout)
        schedule = length_schedule(chunks[0].config, start=2, end=full, steps=STEPS, multiple=2)
        lengths, several = [schedule.length(step + 1) for step in range(STEPS)], len(wrapped) > 1
        for step, length in enumerate(lengths):

            def data(size, step=step):
                made = [iter([batch_of(step, number, size) for number in range(MICROS)]) for _ in wrapped]
                return made if several else made[0]

            ours = gradients_of(wrapped, chunks, step, cut_batches(data(full), length), length)
            theirs = gradients_of(wrapped, chunks, step, data(length), length)
            assert ours[0] == theirs[0] and ours[1].keys() == theirs[1].keys()
            assert all(torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])
            assert any(grad.abs().max() > 0 for grad in ours[1].values())
        return lengths, schedule.multiple, full


LAYOUTS = [
    (1, Layout()),
    (2, Layout(tp=2)),
    (2, Layout(tp=2, sp=True)),
    (2, Layout(pp=2)),
    (2, Layout(pp=2, vpp=2, layers=4)),
    (2, Layout(cp=2)),
    (4, Layout(tp=2, cp=2, sp=True)),
    (4, Layout(tp=2, pp=2, sp=True)),
]


@pytest.mark.parametrize("ranks, layout", LAYOUTS, ids=[str(layout) for _, layout in LAYOUTS])
def test_loss_and_gradients_are_those_of_rows_cut_by_hand(ranks, layout):
    lengths, multiple, full = pool(ranks).run(cut_as_by_hand, layout)[0]
    assert multiple == max(2, (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == full


class Config:
    """The fields of a TransformerConfig that are looked at."""

    context_parallel_size, tensor_model_parallel_size, sequence_parallel = 2, 4, True
    fp8 = fp8_recipe = None
    tp_comm_overlap = False
    cuda_graph_impl = "none"


@pytest.mark.parametrize(
    "fields, options, words",
    [
        ({"cuda_graph_impl": "local"}, {}, "does not go with CUDA graphs (--cuda-graph-impl)"),
        ({"tp_comm_overlap": True}, {}, "does not go with --tp-comm-overlap, whose buffers are made for one length"),
        ({}, {"way": "reshape"}, "truncates under Megatron"),
        ({}, {"strat": 3}, "sequence length warmup: unknown parameter 'strat'"),
        ({"fp8": "hybrid"}, {"start": 120}, "rounded up to a multiple of 128, is 128 and the full one 128"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(fields, options, words):
    from blockwise_lr.megatron import length_schedule

    with pytest.raises(BlockError) as error:
        length_schedule(type("Other", (Config,), fields), **{"start": 8, "end": 128, "steps": 9, **options})
    assert words in str(error.value)


def test_lengths_are_multiples_of_what_the_config_needs():
    from blockwise_lr.megatron import length_schedule

    assert length_schedule(Config, start=8, end=128, steps=9).multiple == 16
    assert length_schedule(type("Other", (Config,), {"fp8": "hybrid"}), start=8, end=512, steps=9).multiple == 128
