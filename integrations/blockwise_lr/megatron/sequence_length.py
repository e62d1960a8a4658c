"""Sequence length warmup under Megatron: flags for ``pretrain()``, and the same in parts for training loops of one's own.

Every rank comes to a step's length by itself, from the number of the step. Batches are cut where they are read, on
tensor-parallel rank 0 before it broadcasts them and on every pipeline stage that reads some.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..blocks import BlockError
from ..collective.agreement import find_difference
from ..collective.errors import is_rank_zero, run_on_all_ranks
from ..patches.upstream_megatron import global_arguments
from ..sequence_length import Cutter, LengthSchedule, WarmupOptions, layout_multiple
from ..sequence_length.cutting import map_tensors
from ..sequence_length.schedule import PACINGS
from ..sequence_length.warmup import settings

log = logging.getLogger("blockwise_lr")

_FLAG = "--sequence-length-warmup-"
_NAMES = ("start", "steps", "pacing", "root_degree", "multiple", "lengths", "until")
# of TransformerConfig: what is made for one length, and how a user names it
_ONE_LENGTH = {
    "tp_comm_overlap": "--tp-comm-overlap, whose buffers are made for one length",
    "enable_cuda_graph": "CUDA graphs (--enable-cuda-graph), which are captured for one length",
    "external_cuda_graph": "CUDA graphs (--external-cuda-graph), which are captured for one length",
    "hybrid_context_parallel": "--hybrid-context-parallel, which packs sequences",
}
# of Megatron's arguments
_REFUSED = {
    "sft": "--sft, which packs sequences",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking, which packs sequences",
    "hybrid_context_parallel": _ONE_LENGTH["hybrid_context_parallel"],
    "rampup_batch_size": "--rampup-batch-size, which makes steps smaller a second time",
    "step_batch_size_schedule": "--step-batch-size-schedule, which makes steps smaller a second time",
    "rl_use_sequence_packing": "--rl-use-sequence-packing",
    "decoder_seq_length": "--decoder-seq-length",
}


def length_schedule(config: Any, **options: Any) -> LengthSchedule:
    """The lengths of a Megatron model's steps, for a training loop of one's own.

    In it, step ``t`` (from 1) has ``length = schedule.length(t)``: give ``cut_batches(data_iterator, length)`` and
    ``seq_length=length`` to Megatron's ``forward_backward_func``.

    Args:
        config: the model's TransformerConfig, or Megatron's arguments: lengths are multiples of what its parallelism and
            FP8 need.
        options: those of :class:`~blockwise_lr.sequence_length.WarmupOptions`.

    Raises:
        BlockError: a bad option, or a feature of the config that is made for one length.
    """
    for name, feature in _ONE_LENGTH.items():
        if getattr(config, name, False):
            raise BlockError(f"a sequence length warmup does not go with {feature}; leave one of the two out")
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise BlockError(
            "a sequence length warmup does not go with CUDA graphs (--cuda-graph-impl), which are captured for one length; "
            "leave one of the two out"
        )
    checked = WarmupOptions.checked(options, "sequence length warmup: ")
    if checked.way != "truncate":
        raise BlockError(
            "a sequence length warmup truncates under Megatron, whose micro batches have a fixed number of rows"
        )
    fp8 = getattr(config, "fp8", None) and ("mxfp8" if getattr(config, "fp8_recipe", "") == "mxfp8" else "fp8")
    needed, why = layout_multiple(
        context_parallel=config.context_parallel_size,
        tensor_parallel=config.tensor_model_parallel_size,
        sequence_parallel=config.sequence_parallel,
        fp8=fp8,
    )
    schedule = LengthSchedule(checked, needed)
    if why and is_rank_zero():
        log.info(
            "sequence lengths are multiples of %d, for %s and the option multiple %d",
            schedule.multiple,
            why,
            checked.multiple,
        )
    return schedule


def cut_batches(data: Any, length: int) -> Any:
    """Data iterators as Megatron's ``forward_backward_func`` takes them (one, a list for virtual stages, None), whose batches
    are cut to ``length`` tokens a row. Batches are mappings by Megatron's names, or token ids.
    """
    if isinstance(data, list):
        return [cut_batches(one, length) for one in data]
    if data is None:
        return None
    inner = getattr(
        data, "iterable", None
    )  # Megatron's RerunDataIterator, which it insists on and which replays what it gave
    if inner is not None and hasattr(data, "rewind"):
        if not isinstance(inner, _Cutting):
            data.iterable = inner = _Cutting(inner)
        inner.length = length
        return data
    found = _Cutting(data)
    found.length = length
    return found


class _Cutting:
    """An iterator whose batches are cut."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.length = inner, 0
        self.cutter = Cutter()

    def __iter__(self) -> _Cutting:
        return self

    def __next__(self) -> Any:
        return map_tensors(next(self.inner), lambda named: self.cutter(named, self.length)[0])


# ---- pretrain()

_schedules: dict[int, tuple[Any, LengthSchedule | None]] = {}  # of the arguments of a process, by their identity


def length_now(arguments: Any, done: int) -> int | None:
    """The length of the step after ``done`` ones; None where the flags ask for no warmup. Collective the first time.

    Raises:
        BlockError: bad values, a feature that it does not go with, or ranks with other flags; on every rank.
    """
    schedule = _schedule_of(arguments)
    return None if schedule is None else schedule.length(done + 1)


def _schedule_of(arguments: Any) -> LengthSchedule | None:
    kept = _schedules.get(id(arguments))
    if kept is None or kept[0] is not arguments:
        _schedules.clear()
        made = run_on_all_ranks(lambda: _schedule(arguments), "starting the sequence length warmup")
        _compare(made)
        kept = _schedules[id(arguments)] = (arguments, made)
    return kept[1]


def token_decay(scheduler: Any) -> tuple[float, float] | None:
    """Where in its decay Megatron's scheduler is under ``--lr-decay-tokens``, as (steps, decay steps) in its own unit, samples
    of full length; None where it is to count samples.

    Tokens are those of the optimizer steps it has counted: with fp16, steps that overflowed are left out.
    """
    arguments = global_arguments()
    budget = getattr(arguments, "lr_decay_tokens", None)
    if budget is None or scheduler.num_steps <= scheduler.lr_warmup_steps:
        return None
    start = tokens_of(arguments, scheduler.lr_warmup_steps)
    if budget <= start:
        raise BlockError(
            f"--lr-decay-tokens is {budget} and the learning rate's warmup takes {start} tokens; decay over more than these"
        )
    warmup, full = scheduler.lr_warmup_steps, arguments.seq_length
    return warmup + (tokens_of(arguments, scheduler.num_steps) - start) / full, warmup + (budget - start) / full


def tokens_of(arguments: Any, samples: int) -> int:
    """Tokens in the first samples of a run with these flags."""
    schedule = _schedule_of(arguments)
    full = arguments.seq_length if schedule is None else schedule.full
    steps, rest = divmod(samples, arguments.global_batch_size)
    if schedule is None:
        return samples * full
    return schedule.tokens(steps, arguments.global_batch_size) + rest * schedule.length(steps + 1)


def _schedule(arguments: Any) -> LengthSchedule | None:
    given = {name: getattr(arguments, f"sequence_length_warmup_{name}", None) for name in _NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    schedule = None
    if given:
        for name, feature in _REFUSED.items():
            if getattr(arguments, name, None):
                raise BlockError(f"a sequence length warmup does not go with {feature}; leave one of the two out")
        if given.get("pacing") == "discrete":
            schedule = length_schedule(arguments, **given)
        else:
            schedule = length_schedule(arguments, end=arguments.seq_length, **given)
        if schedule.full != arguments.seq_length:
            raise BlockError(
                f"the last of {_FLAG}lengths is {schedule.full} and --seq-length is {arguments.seq_length}; end at the "
                f"full length"
            )
    return schedule


def _compare(schedule: LengthSchedule | None) -> None:
    difference = find_difference({} if schedule is None else settings(schedule.options))
    if difference is not None:
        raise BlockError(
            f"the ranks would not train alike: {_FLAG}{difference.place} is {difference.told()}; give every rank the same flags"
        )
    if schedule is not None and is_rank_zero():
        print(schedule.describe(), flush=True)


def report(arguments: Any, done: int, length: int) -> None:
    """Tells Megatron's log and TensorBoard the length of a step, as often as other figures."""
    from megatron.training import global_vars
    from megatron.training.utils import print_rank_last

    if done % arguments.log_interval == 0:
        tokens = tokens_of(arguments, done * arguments.global_batch_size)
        print_rank_last(f" iteration {done} sequence length: {length} | tokens: {tokens} |")
    writer = global_vars.get_tensorboard_writer()
    if writer and done % arguments.tensorboard_log_interval == 0:
        writer.add_scalar("sequence-length", length, done)
        writer.add_scalar("tokens", tokens_of(arguments, done * arguments.global_batch_size), done)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags to Megatron's parser."""
    group = parser.add_argument_group(title="sequence length warmup")
    add = group.add_argument
    add(f"{_FLAG}start", type=int, metavar="TOKENS", help="Length of the first sequences; the last is --seq-length.")
    add(f"{_FLAG}steps", type=int, metavar="N", help="Iterations until sequences have their full length.")
    add(f"{_FLAG}pacing", choices=PACINGS, help="How the length grows; linear by default.")
    add(f"{_FLAG}root-degree", type=int, metavar="D", help="Of the pacing root; 2 by default.")
    add(
        f"{_FLAG}multiple",
        type=int,
        metavar="K",
        help="Lengths are multiples of it and of what context and sequence parallelism and FP8 need; 8 by default.",
    )
    add(
        "--lr-decay-tokens",
        type=int,
        metavar="N",
        help="Decay the learning rate by tokens, until N of them are trained on; its warmup stays by iterations or samples.",
    )
    add(f"{_FLAG}lengths", type=int, nargs="+", metavar="TOKENS", help="Of the pacing discrete: all lengths.")
    add(
        f"{_FLAG}until",
        type=int,
        nargs="+",
        metavar="N",
        help="Of the pacing discrete: the last iteration of each length but the last.",
    )
