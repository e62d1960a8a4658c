"""``"sequence_length_warmup"`` in a ds_config: an engine that cuts what it trains on, whatever its optimizer.

The step is the engine's ``global_steps``, which DeepSpeed saves and loads, so that a resumed run goes on with the right
length by itself; the count of tokens goes along in the checkpoint's client state.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import log_dist

from ..blocks import BlockError
from ..blocks.types import shown
from ..patches import transformers_batches
from ..patches.deepspeed_sequence_length import CHECKPOINTED_TOKENS, PIPELINE_LENGTHS, READS
from ..schedules import BlockwiseTokenCosine
from ..sequence_length import LengthSchedule, WarmupOptions, warmup_of
from ..sequence_length.cutting import map_tensors
from ..sequence_length.warmup import SequenceLengthWarmup, cut_of_trainer
from .client_state import keep_in_checkpoints

KEY = "sequence_length_warmup"


def start_warmup(engine: Any, schedule: LengthSchedule) -> None:
    """Gives an engine the warmup that its ds_config asks for."""
    warmup = EngineWarmup(engine, schedule)
    if isinstance(engine.lr_scheduler, BlockwiseTokenCosine) and engine.lr_scheduler.tokens_of is None:
        engine.lr_scheduler.tokens_of = warmup.tokens
    if "transformers.trainer" in sys.modules:  # a Trainer may be what trains the engine
        transformers_batches.PATCH.apply(transformers_batches.Hooks(cut_of_trainer))
    log_dist(schedule.describe(), ranks=[0])


def schedule_of(engine: Any, given: Any) -> LengthSchedule | None:
    """The schedule that a ds_config's value of the key asks for; None where it has none.

    Raises:
        BlockError: a bad value, sequence parallelism, or a scheduler that counts tokens without it.
    """
    if given is None:
        if isinstance(engine.lr_scheduler, BlockwiseTokenCosine) and engine.lr_scheduler.tokens_of is None:
            raise BlockError(
                f"BlockwiseTokenCosine decays by the tokens that {KEY} counts, and the ds_config has none; add it, or use "
                f"BlockwiseWarmupCosine"
            )
        return None
    if not isinstance(given, Mapping):
        raise BlockError(f'{KEY} is {shown(given)}; write {{"start": 64, "end": 1024, "steps": 45000}}')
    READS.check_instance(engine)
    if engine.sequence_parallel_size > 1:
        raise BlockError(
            f"{KEY} does not go with DeepSpeed's sequence parallelism, under which each of {engine.sequence_parallel_size} "
            f"ranks is given a part of every sequence; remove one of the two"
        )
    return LengthSchedule(WarmupOptions.checked(given, f"{KEY}: "))


class EngineWarmup(SequenceLengthWarmup):
    """The warmup of a DeepSpeed engine."""

    def __init__(self, engine: Any, schedule: LengthSchedule) -> None:
        self.engine = engine
        self._shape: int | None = None  # for which a pipeline's stages have agreed on what they send
        self._set(engine, schedule, engine.module)
        if isinstance(engine, PipelineEngine):
            self._cut_in_pipeline()
        else:
            self._hook = engine.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        keep_in_checkpoints(engine, CHECKPOINTED_TOKENS, KEY, self.state_dict, self._loaded)

    @property
    def completed(self) -> int:
        """The engine's steps."""
        return self.engine.global_steps

    @property
    def replicas(self) -> int:
        """Tensor-parallel ranks, which are given the same batches."""
        if isinstance(self.engine, PipelineEngine):
            return self.engine.grid.get_slice_parallel_world_size()
        return self.engine.mp_world_size

    def step(self) -> None:
        """Nothing: the engine counts."""

    def detach(self) -> None:
        """Gives the engine back as it was."""
        PIPELINE_LENGTHS.undo(self.engine)
        CHECKPOINTED_TOKENS.undo(self.engine)
        if not isinstance(self.engine, PipelineEngine):
            self._hook.remove()
        self._forget()

    def _in_training(self) -> bool:
        return self.engine.module.training

    def _cut_in_pipeline(self) -> None:
        engine = self.engine
        train_batch, eval_batch, next_batch = engine.train_batch, engine.eval_batch, engine._next_batch

        def train(*arguments: Any, **options: Any) -> Any:
            self._agree_on(self.length)
            return train_batch(*arguments, **options)

        def evaluate(*arguments: Any, **options: Any) -> Any:
            self._agree_on(self.schedule.full)
            return eval_batch(*arguments, **options)

        def cut_batch() -> Any:
            batch = next_batch()
            if batch is None or not engine.module.training:
                return batch
            before = self._tokens_here
            cut = map_tensors(batch, self.cut_and_count)
            if not engine.is_first_stage():  # the last stage reads the same batches, for their labels
                self._tokens_here = before
            return cut

        PIPELINE_LENGTHS.apply(engine, train_batch=train, eval_batch=evaluate, _next_batch=cut_batch)

    def _agree_on(self, length: int) -> None:
        """Has the stages tell each other their shapes anew where the length has changed: all do at the same step."""
        if length != self._shape:
            self.engine.reset_activation_shape()
            self._shape = length

    def _loaded(self, state: dict[str, Any] | None) -> None:
        if state is not None and self.engine.global_steps == state["steps"]:  # not where weights alone were loaded
            self.load_state_dict(state)


def length_of(engine: Any) -> int | None:
    """Tokens per sequence that an engine's next step trains on; None where it has no sequence length warmup."""
    warmup = warmup_of(engine)
    return None if warmup is None else warmup.length
