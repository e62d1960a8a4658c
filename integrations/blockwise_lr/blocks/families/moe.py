"""Families whose stacked experts are stored inputs first."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

FFN = BlockType.FFN

# experts whose weights are (experts, inputs, outputs)
INPUTS_FIRST = Rule("*.experts.{gate_up_proj,down_proj}{,_bias}", FFN, batch_dims=1, transposed=True)

MOE: dict[str, tuple[Rule, ...]] = {
    "llama4": (INPUTS_FIRST,),
    "llama4_text": (INPUTS_FIRST,),
    "gpt_oss": (INPUTS_FIRST,),
    "openai_privacy_filter": (INPUTS_FIRST,),
    "aria_text": (Rule("*.experts.{fc1,fc2,gate_up_proj,down_proj}{,.weight}", FFN, batch_dims=1, transposed=True),),
}
