"""Starts an engine with a random configuration and trains it beside the unfused twin; runs in the rank processes."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train, weights
from fuzz.configs import LR, STEPS, Drawn
from twins import DEFAULT_RATIOS, RATIOS, REFERENCES, Twin, make, paper_lr, token_ids, worst_difference


def outcome(drawn: Drawn) -> tuple[str, str | float]:
    """("error", its type and text), or ("trained", the worst tensor's difference from the twin)."""
    logging.disable(logging.WARNING)
    settings = config(drawn.kind, drawn.stage, zero=drawn.zero)
    settings["optimizer"]["params"] = {**drawn.optimizer, **(drawn.unlike if dist.get_rank() == 1 else {})}
    if drawn.scheduler is None:
        del settings["scheduler"]
    else:
        settings["scheduler"]["params"] = drawn.scheduler
    try:
        engine = start(make(drawn.model), settings)
    except Exception as error:
        return "error", f"{type(error).__name__}: {error}"
    train(engine, STEPS)
    found = weights(engine)
    engine.destroy()
    # ranks hold the same weights, so one comparison is enough
    return "trained", worst_difference(found, reference(drawn), drawn.kind) if dist.get_rank() == 0 else 0.0


def reference(drawn: Drawn) -> dict[str, torch.Tensor]:
    """The twin's weights after the same steps."""
    accumulation, clip = config("", 0)["gradient_accumulation_steps"], config("", 0)["gradient_clipping"]
    twin = Twin(drawn.model, make(drawn.model))
    given = drawn.optimizer["block_lr_ratios"]
    given = {"preset": given} if isinstance(given, str) else dict(given)
    ratios = {**(RATIOS if given.pop("preset", "") == "paper" else DEFAULT_RATIOS), **given}
    ratios["head"] = given.get("head", ratios["embedding"])  # an untied output layer follows the embedding
    if drawn.optimizer.get("decay_norms_and_biases"):
        for leaf in twin.leaves.values():
            leaf.decayed = True
    optimizer = REFERENCES[drawn.kind](
        twin, tuple(drawn.optimizer["betas"]), drawn.optimizer.get("eps", 0.0), drawn.optimizer["weight_decay"], ratios
    )
    ranks = dist.get_world_size()
    for number, batch in enumerate(token_ids(STEPS, accumulation, ranks), 1):
        for ids in batch.flatten(0, 1):
            twin.backward(ids, 1 / (accumulation * ranks))
        twin.clip(clip)
        optimizer.step(lambda ratio, number=number: rate(drawn, ratio, number))
    return {name: value.detach() for name, value in twin.values().items()}


def rate(drawn: Drawn, ratio: float, number: int) -> float:
    """The rate of a ratio at an update, with the minimum held down to the ratio's own peak."""
    if drawn.scheduler is None:
        return ratio * LR
    low = min(drawn.scheduler["min_lr"], ratio * LR)
    return paper_lr(number, ratio, LR, low, drawn.scheduler["warmup_num_steps"], drawn.scheduler["total_num_steps"])


def outcomes(configs: list[Drawn]) -> list[tuple[str, str | float]]:
    """Of several configurations, one after another in the same processes."""
    return [outcome(drawn) for drawn in configs]


def verdict(drawn: Drawn, answers: list[tuple[str, str | float]]) -> str | None:
    """What is wrong with the ranks' outcomes; None where nothing is."""
    kinds = {kind for kind, _ in answers}
    if kinds == {"error"}:
        texts = {str(text) for _, text in answers}
        if len(texts) > 1:
            return f"ranks raise different errors: {texts}"
        text = texts.pop()
        if not drawn.words:
            return f"refused without a fault: {text}"
        if not text.startswith(("BlockError: ", "UnmappedParameterError: ")) or not all(
            word in text for word in drawn.words
        ):
            return f"an error that does not name {drawn.words}: {text}"
        return None if len(text) < 1500 else f"an error of {len(text)} characters"
    if kinds == {"trained"}:
        if drawn.words:
            return f"trained in spite of a fault in {drawn.words}"
        worst = max(float(value) for _, value in answers)
        return None if worst < 1e-5 and not math.isnan(worst) else f"differs from the twin by {worst:.1e}"
    return f"some ranks train and some raise: {answers}"
