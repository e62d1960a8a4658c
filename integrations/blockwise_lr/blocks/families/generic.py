"""Names that mean the same wherever they appear, and what modules are where names do not say; the first match wins.

From what is certain to what is general: norms, mixers and attention, feed-forward networks, both ends of the model,
then the classes of the modules around a parameter.
"""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType
from .attention import ATTENTION
from .ends import EMBEDDINGS, HEADS, INPUTS, MODULES, OUTPUT_LAYERS, PROJECTOR
from .feed_forward import CHANNELS, FEED_FORWARD
from .mixers import MIXERS
from .scales import SCALES

NORM = BlockType.NORM

# a norm's own name, not that of a module around it: the biases below ``normformer`` or ``norm_attn_norm`` are none
_NORMS: tuple[Rule, ...] = (
    Rule("*{norm,Norm}*.{weight,bias,scale,gamma,beta,g,b}", NORM, vector=True, tail=2),
    Rule("*{norm,Norm}*", NORM, vector=True, tail=1),
    Rule("*.{ln,ln_1,ln_2,ln_f,ln1,ln2,ln_attn,ln_mlp,norm1,norm2}.*", NORM, vector=True),
    Rule("*.{q_norm,k_norm}.weight", NORM),  # Cohere's has a row per head
)

GENERIC: tuple[Rule, ...] = (
    *_NORMS,
    *EMBEDDINGS,
    *OUTPUT_LAYERS,
    *MIXERS,
    *ATTENTION,
    *PROJECTOR,
    *FEED_FORWARD,
    *SCALES,
    *INPUTS,
    *HEADS,
    *MODULES,
    *CHANNELS,
)
