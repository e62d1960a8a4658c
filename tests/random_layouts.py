"""Parameters of every kind of layout in random sizes, and what their elements are, written out one by one."""

from __future__ import annotations

import random

import numpy as np

from blockwise_lr.blocks import BlockType, ParamLayout, Piece

QK, VO, FFN, NORM = BlockType.QK, BlockType.VO, BlockType.FFN, BlockType.NORM


def random_layouts(rng: random.Random) -> list[ParamLayout]:
    """Plain, per head, grouped QKV and its bias, transposed, stacked experts both ways, a norm."""
    head, heads, width, rows = rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 70), rng.randint(1, 90)
    q, k, v = Piece(QK, head * 2, head), Piece(QK, head, head), Piece(VO, head, 1)
    total, side = 4 * head * heads, head * heads
    return [
        ParamLayout("plain", (rows, width), (Piece(FFN, rows),)),
        ParamLayout("heads", (side, width), (Piece(QK, side, head),)),
        ParamLayout("groups", (total, width), (q, k, v), repeat=heads),
        ParamLayout("bias", (total,), tuple(Piece(p.block, p.size, 0) for p in (q, k, v)), repeat=heads, kind="bias"),
        ParamLayout(
            "columns",
            (width, 3 * side),
            (Piece(QK, side, head), Piece(QK, side, head), Piece(VO, side, 1)),
            transposed=True,
        ),
        ParamLayout("experts", (3, 2 * head, width), (Piece(FFN, 2 * head),), batch_dims=1),
        ParamLayout("expert columns", (3, width, 2 * head), (Piece(FFN, 2 * head),), batch_dims=1, transposed=True),
        ParamLayout("norm", (width,), (Piece(NORM, width, 0),), kind="norm"),
    ]


def pieces_and_segments(layout: ParamLayout) -> tuple[np.ndarray, np.ndarray]:
    """Per element, row-major: the number of its piece, and of its segment within all of the piece's."""
    axis = np.concatenate([np.full(piece.size, number) for number, piece in enumerate(layout.pieces)] * layout.repeat)
    segment = np.empty(layout.outputs, np.int64)
    for number, piece in enumerate(layout.pieces):
        held = np.flatnonzero(axis == number)  # this piece's rows of all repeats, in order
        segment[held] = np.arange(len(held)) // piece.unit if piece.unit else 0
    per_matrix = np.array([segment[axis == number].max() + 1 for number in range(len(layout.pieces))])
    matrix = np.arange(layout.batch)[:, None, None]
    if layout.transposed:
        piece = np.broadcast_to(axis, (layout.batch, layout.inputs, layout.outputs))
        segments = np.broadcast_to(segment, piece.shape) + matrix * per_matrix[piece]
    else:
        piece = np.broadcast_to(axis[:, None], (layout.batch, layout.outputs, layout.inputs))
        segments = np.broadcast_to(segment[:, None], piece.shape) + matrix * per_matrix[piece]
    return piece.ravel(), segments.ravel()
