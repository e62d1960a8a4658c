"""Keys of ours at the top of a ds_config: read, compared between the ranks, and put to work on an engine that is built."""

from __future__ import annotations

import difflib
import json
from typing import Any

from ..blocks import BlockError
from ..collective.agreement import gathered
from ..patches import PatchError
from ..patches.deepspeed_sequence_length import READS
from ..sequence_length.warmup import settings
from . import metrics, sequence_length

KEYS = (sequence_length.KEY, metrics.KEY)


def start_own_keys(engine: Any) -> None:
    """Starts what an engine's ds_config asks for by our keys. Collective: one small exchange, in which all ranks' are compared.

    Raises:
        BlockError: a misspelt key, a bad option, something that it does not go with, or ranks with different settings; on
            every rank.
    """
    schedule, monitoring, told = None, None, ""
    try:
        given = _given(engine)
        schedule = sequence_length.schedule_of(engine, given.get(sequence_length.KEY))
        monitoring = metrics.options_of(engine, given.get(metrics.KEY))
        of_schedule = None if schedule is None else [settings(schedule.options), schedule.changes]
        of_metrics = None if monitoring is None else monitoring.model_dump()
        told = json.dumps([of_schedule, of_metrics], sort_keys=True)
    except (BlockError, PatchError) as error:
        told = f"error {error}"
    _compare(gathered(told))
    if schedule is not None:
        sequence_length.start_warmup(engine, schedule)
    if monitoring is not None:
        metrics.start_metrics(engine, monitoring)


def _given(engine: Any) -> dict[str, Any]:
    READS.check_instance(engine._config)
    config = engine._config._param_dict
    for key in config:
        close = difflib.get_close_matches(str(key), KEYS, 1, cutoff=0.85)
        if key not in KEYS and close:
            raise BlockError(f"the ds_config has {key!r}; did you mean {close[0]!r}?")
    return {key: config.get(key) for key in KEYS}


def _compare(answers: list[str]) -> None:
    failed = next((answer for answer in answers if answer.startswith("error ")), None)
    if failed is not None:
        raise BlockError(failed.removeprefix("error "))
    odd = next((rank for rank, answer in enumerate(answers) if answer != answers[0]), None)
    if odd is not None:
        ours, theirs = json.loads(answers[0]), json.loads(answers[odd])
        key = next(key for key, mine, other in zip(KEYS, ours, theirs) if mine != other)
        raise BlockError(
            f"the ranks would not train alike: {key} of the ds_config is another on rank {odd} than on rank 0; give every "
            f"rank the same ds_config"
        )
