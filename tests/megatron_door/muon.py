"""Muon in real megatron-core beside torch.optim.Muon in one process; runs in the rank processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_door import training
from megatron_door.checkpoints import Job, loading, saving
from megatron_door.layouts import Layout, build_chunks, megatron
from megatron_door.training import reference, steps_parity, trained
from megatron_door.twin import BLOCK_RATIOS

MUON, MINI = "BlockwiseMuon", "BlockwiseMuonMini"
training.NAMES.update({MUON: "blockwise_muon", MINI: "blockwise_muon_mini"})
RATIOS = {"block_lr_ratios": {block: BLOCK_RATIOS[block] for block in ("qk", "vo", "ffn")}}


def farthest(found: dict, wanted: dict, start: dict) -> dict[str, Any]:
    """The largest difference of any parameter, over how far it has gone, and which it is."""
    apart = {n: float((found[n] - wanted[n]).norm() / (wanted[n] - start[n]).norm()) for n in wanted}
    name = max(apart, key=lambda n: apart[n])
    return {"worst": apart[name], "name": name}


def parity(variant: str, kind: str, layout: Layout, steps: int) -> dict[str, Any]:
    first, wanted, _ = reference(variant, kind, steps, layers=layout.layers)
    found, apart = trained(variant, kind, layout, steps, first, **RATIOS)
    return {**farthest(found, wanted, first), "apart": apart}


def bf16_steps(variant: str, kind: str, layout: Layout, steps: int) -> dict[str, Any]:
    return steps_parity(variant, kind, layout, steps, **RATIOS)


def saved_and_loaded(kind: str, variant: str, layout: Layout, form: str, folder: str) -> dict[str, Any]:
    """What a run that went on and one that loaded what it had saved came to."""
    job = Job(kind, variant, layout, form, settings=RATIOS)
    return {"wanted": saving(job, folder), "found": loading(job, folder)}


def loaded_elsewhere(kind: str, variant: str, layout: Layout, form: str, folder: str) -> dict[str, Any]:
    return loading(replace(Job(kind, variant, form=form, settings=RATIOS), layout=layout), folder)


def built(layout: Layout, kind: str, variant: str, options: dict, config: dict) -> None:
    """Builds the optimizer, with fields of the OptimizerConfig set."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    import blockwise_lr.megatron

    with megatron(layout):
        undo = blockwise_lr.megatron.register(**options)
        try:
            wrapped = training.wrap(build_chunks(variant, layout), layout)
            chosen = OptimizerConfig(optimizer=training.NAMES[kind], lr=1e-3, min_lr=1e-4, **config)
            get_megatron_optimizer(chosen, wrapped, use_gloo_process_groups=False)
        finally:
            undo()
