"""A mean over seeds, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

# half of the width of a 95% interval in standard errors, by degrees of freedom: Student's t, and the normal one beyond
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_NORMAL = 1.96


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95% interval by Student's t); the half is nan for a single value."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2:
        return mean, math.nan
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, _T95.get(count - 1, _NORMAL) * deviation / math.sqrt(count)
