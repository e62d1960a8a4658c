"""Muon for the hidden matrices, Adam-mini for all else, with one learning rate per block type."""

from __future__ import annotations

from .adam_mini import AdamMini, AdamMiniOptions
from .muon import MuonOptions


class MuonMiniOptions(MuonOptions, AdamMiniOptions):
    """Those of Adam-mini, for all that is no hidden matrix, and Muon's own."""


class MuonMini(AdamMini):
    """Muon as :class:`~blockwise_lr.rules.muon.Muon` has it for hidden matrices, and Adam-mini for the rest.

    Beside the momentum it keeps one number per row or head, for matrices an unused one: half of the memory of AdamW's states.
    """

    name = "muon_mini"
    title = "MuonMini"
    Options = MuonMiniOptions
    complex_as_pairs = False
    whole_matrices = True
