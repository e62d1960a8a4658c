"""Which runs come next, as a pure function of the losses so far: so a search goes on from wherever it was stopped.

1. One rate for all (AdamW): learning rates a factor of 2 apart, until the best has a worse one on both sides.
2. The ratios to start from: the same, from AdamW's best rate over the FFN's ratio.
3. Ratios, from the better of the two: each block type's is doubled and halved, and goes on in the direction that improves;
   then the learning rate of all. Again until a pass over all changes nothing.
4. AdamW's best and the best ratios once more with other seeds: the difference of these is what the search has gained. The
   seed of the search itself is left out, for its best is a minimum over noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..blocks.presets import DEFAULT, lr_ratios
from ..blocks.types import DEFAULT_RATIO_OF, BlockError, BlockType
from .statistics import interval

_FARTHEST = 20  # factors of 2 from the first learning rate, in either direction


@dataclass(frozen=True)
class Setting:
    """One run: the base learning rate, a ratio per block type (in the order of ``Search.stated``), and a seed."""

    lr: float
    ratios: tuple[float, ...]
    seed: int = 0


Losses = Mapping[Setting, float]  # infinite for a run that diverged
Move = Callable[[Setting, float], Setting]  # by a factor, along a line


@dataclass(frozen=True)
class Found:
    """What the runs so far say.

    Attributes:
        adamw: the best run with one rate, None before there is one.
        best: the best run of all.
        gains: AdamW's loss less the best ratios', per further seed.
    """

    adamw: Setting | None
    best: Setting | None
    gains: tuple[float, ...]

    @property
    def gain(self) -> tuple[float, float] | None:
        """Mean over seeds, and half of its 95% interval (nan for one seed); None without further seeds."""
        return interval(self.gains) if self.gains else None


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        lr: where AdamW's learning rates start.
        blocks: block types whose ratios are searched; the others keep those they start from: 1 where AdamW's search has ended,
            ``start``'s where theirs has.
        start: ratios to start from, a preset's name or by block type.
        seeds: seeds in all.
        trials: runs at most, those with further seeds among them.
        margin: by how many nats a move must improve to be made.
        stated: block types whose ratios every run is told: ``blocks``, and all that follow no other (see
            blocks.types.DEFAULT_RATIO_OF). So a run of AdamW is one, whatever is searched.
    """

    lr: float
    blocks: tuple[BlockType, ...]
    start: str | Mapping[str, float] = DEFAULT
    seeds: int = 3
    trials: int = 60
    margin: float = 0.0
    stated: tuple[BlockType, ...] = field(init=False)
    _ones: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BlockError(f"--lr is {self.lr}; give the learning rate at which AdamW's search starts, above 0")
        if self.seeds < 1 or self.trials < 7 or not self.blocks:
            raise BlockError(
                "give at least 1 seed, 7 trials (three rates of AdamW and of the ratios) and one block type"
            )
        others = (block for block in BlockType if block not in DEFAULT_RATIO_OF and block not in self.blocks)
        object.__setattr__(self, "stated", (*self.blocks, *others))
        object.__setattr__(self, "_ones", (1.0,) * len(self.stated))

    def ratios(self, setting: Setting) -> dict[str, float]:
        """A setting's ratios by block type."""
        return {block.value: ratio for block, ratio in zip(self.stated, setting.ratios)}

    def next_runs(self, losses: Losses) -> list[Setting]:
        """The runs that the losses so far call for, side by side if there are processors; none when the search is over."""
        searched = [setting for setting in losses if setting.seed == 0]
        left = self.trials - 2 * (self.seeds - 1) - len(searched)
        missing = self._searched(losses) if left > 0 else []
        return missing[:left] if missing else self._further_seeds(losses)

    def found(self, losses: Losses) -> Found:
        """What the losses so far say."""
        finite = {setting: loss for setting, loss in losses.items() if setting.seed == 0 and math.isfinite(loss)}
        best = min(finite, key=lambda setting: finite[setting], default=None)
        same = {setting: loss for setting, loss in finite.items() if setting.ratios == self._ones}
        adamw = min(same, key=lambda setting: same[setting], default=None)
        gains = []
        for seed in range(1, self.seeds):
            if best is not None and adamw is not None and best != adamw:
                pair = losses.get(replace(adamw, seed=seed)), losses.get(replace(best, seed=seed))
                gains += [] if None in pair else [pair[0] - pair[1]]  # type: ignore[operator]
        return Found(adamw, best, tuple(gains))

    def is_adamw_found(self, losses: Losses) -> bool:
        """Whether AdamW's best rate has a worse one on both sides, so that the runs went on to ratios."""
        return not line(Setting(self.lr, self._ones), losses, _scaled)[0]

    def has_other_ratios(self, losses: Losses) -> bool:
        """Whether a run had other ratios than ones."""
        return any(setting.ratios != self._ones for setting in losses)

    def _further_seeds(self, losses: Losses) -> list[Setting]:
        found = self.found(losses)
        if found.adamw is None or found.best is None or found.best == found.adamw:
            return []
        pair = (found.adamw, found.best)
        wanted = (replace(setting, seed=seed) for seed in range(1, self.seeds) for setting in pair)
        return [setting for setting in wanted if setting not in losses]

    def _searched(self, losses: Losses) -> list[Setting]:
        """What the first three stages still need."""
        missing, adamw = line(Setting(self.lr, self._ones), losses, _scaled)
        if missing:
            return missing
        ratios = lr_ratios(self.start)
        start = tuple(ratios[block] for block in self.stated)
        best = adamw
        if start != self._ones:
            middle = self._rounded(adamw.lr / ratios[BlockType.FFN])
            missing, other = line(Setting(middle, start), losses, _scaled)
            if missing:
                return missing
            best = min(adamw, other, key=lambda setting: losses[setting])
        return self._moves(best, losses)

    def _moves(self, best: Setting, losses: Losses) -> list[Setting]:
        changed = True
        while changed:
            changed = False
            for axis in (*range(len(self.blocks)), None):
                missing, moved = line(best, losses, _scaled if axis is None else _along(axis), self.margin)
                if missing:
                    return missing
                changed, best = changed or moved != best, moved
        return []

    def _rounded(self, lr: float) -> float:
        """The learning rate of AdamW's grid that is nearest."""
        return self.lr * 2.0 ** round(math.log2(lr / self.lr))


def _scaled(setting: Setting, factor: float) -> Setting:
    return replace(setting, lr=setting.lr * factor)


def _along(axis: int) -> Move:
    def moved(setting: Setting, factor: float) -> Setting:
        ratios = list(setting.ratios)
        ratios[axis] *= factor
        return replace(setting, ratios=tuple(ratios))

    return moved


def line(middle: Setting, losses: Losses, moved: Move, margin: float = 0.0) -> tuple[list[Setting], Setting]:
    """A search along one line, by factors of 2, until the best has worse ones on both sides.

    Args:
        middle: where it starts.
        moved: (setting, factor) -> setting.
        margin: by how much another one must be better than the middle to be taken.

    Returns:
        what must be run first, and the best so far.

    Raises:
        BlockError: it goes on for ever, as where every run diverges.
    """
    places: dict[int, Setting] = {number: moved(middle, 2.0**number) for number in (-1, 0, 1)}
    while not (missing := [setting for setting in places.values() if setting not in losses]):
        best = min(places, key=lambda number: (losses[places[number]], abs(number)))
        if math.isinf(losses[places[best]]):
            best = min(places)  # all diverged: lower
        low, high = min(places), max(places)
        if low < best < high:
            if losses[places[best]] > losses[places[0]] - margin:
                best = 0
            return [], places[best]
        if high - low > _FARTHEST:
            raise BlockError(
                f"no best learning rate or ratio was found between {places[low]} and {places[high]}; see the runs' logs"
            )
        further = best - 1 if best == low else best + 1
        places[further] = moved(middle, 2.0**further)
    return missing, middle


def searched_blocks(names: Iterable[str]) -> tuple[BlockType, ...]:
    """Block types by name, in the order given.

    Raises:
        BlockError: an unknown name.
    """
    known = {block.value: block for block in BlockType}
    found = [name for name in names if name]
    unknown = [name for name in found if name not in known]
    if unknown:
        raise BlockError(f"--blocks names {', '.join(unknown)}; block types are {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in found))
