"""Mixers of tokens without a softmax: state-space models, linear attention, gated convolutions and recurrences.

All of their weights are ssm, q, k and v of a linear attention too: no softmax makes its scores sharp, and several of
them hold q, k and v in one weight with what is none of the three.
"""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

SSM = BlockType.SSM

_CLASSES = (
    "MambaMixer,Mamba2Mixer,GatedDeltaNet,DeltaNet,DeltaAttention,LinearAttention,LinearSelfAttention,LightningAttention,"
    "RecurrentBlock,ShortConv,RwkvSelfAttention,xLSTMLayer,LSTM,GRU,FocalNetModulation"
)
_WITHIN = f"*{{{_CLASSES}}}/*"
_PARTS = "in_proj,x_proj,dt_proj,out_proj,conv1d,in_proj_qkvz,in_proj_ba,x_proj_weight,dt_proj_weight,dt_proj_bias"  # Zamba's

MIXERS: tuple[Rule, ...] = (
    # what sets the time scales and the skip is not decayed, as in Mamba's own code
    Rule("*.{mixer,mamba,linear_attn}.{A_log,D,dt_bias}", SSM, undecayed=True),
    Rule("*.{A_log,D,dt_bias,time_decay,time_first,recurrent_param}", SSM, undecayed=True, within=_WITHIN),
    # NemotronH calls every layer of its own "mixer", so only these parts are told by name
    Rule(f"*.{{mixer,mamba}}.{{{_PARTS}}}*", SSM),
    Rule("*.linear_attn.*", SSM),
    Rule("*", SSM, within=_WITHIN),
    Rule("*.rnn_tokens.fc.*", SSM),  # Sequencer's, behind its LSTMs
)
