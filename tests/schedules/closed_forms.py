"""Schedules written out by hand, knowing nothing of blockwise_lr: the learning rate at an update ``t`` from 1.

``p`` is a block type's peak, ``b`` the base rate, ``m`` the shared minimum, ``w`` the warmup, ``n`` the end.
"""

import math


def up(t, p, w, start=0.0):
    return start + (p - start) * t / w


def fall(style, p, m, x):
    if style == "linear":
        return p - (p - m) * x
    if style == "cosine":
        return m + (p - m) / 2 * (1 + math.cos(math.pi * x))
    if style == "minus_sqrt":
        return p - (p - m) * math.sqrt(x)
    return p * math.exp(x * math.log(m / p))


def warmup_then(style):
    def rate(t, p, b, m, w, n):
        return up(t, p, w) if t <= w else m if t >= n else fall(style, p, m, (t - w) / (n - w))

    return rate


def constant(t, p, b, m, w, n):
    return min(up(t, p, w), p)


def inverse_sqrt(t, p, b, m, w, n):
    """p min(t / w, sqrt(w / t)), of "Attention is all you need", from below bounded by m."""
    return p * t / w if t <= w else max(m, p * (w / t) ** 0.5)


def wsd(style, decay):
    def rate(t, p, b, m, w, n):
        if t <= w:
            return up(t, p, w)
        return p if t <= n - decay else fall(style, p, m, min((t - (n - decay)) / decay, 1))

    return rate


def official_wsd(t, p, b, m, w, n):
    """get_lr of train_llama_bw_wsd.py with the ratio in gamma: thirds, the second from the peak to the base rate."""
    first, second = int(n * 1 / 3), int(n * 2 / 3)
    if t <= w:
        return p * t / w
    if t <= first:
        return p
    if t <= second:
        return p + (p - b) / (first - second) * (t - first)
    return b + (m - b) / (n - second) * (min(t, n) - second)


def infinite(style, cooldown, factor, scale=10.0, anneal=None):
    def before(t, p, w):
        if t <= w:
            return up(t, p, w)
        if t >= w + cooldown:
            return factor * p
        x = (t - w) / cooldown
        if style == "inverse_sqrt":
            return p + (factor * p - p) * (1 / math.sqrt(1 + scale * x) - 1) / (1 / math.sqrt(1 + scale) - 1)
        return fall(style, p, factor * p, x)

    def rate(t, p, b, m, w, n):
        if anneal is None or t <= anneal[0]:
            return before(t, p, w)
        return fall("exponential", before(anneal[0], p, w), m, min((t - anneal[0]) / anneal[1], 1))

    return rate
