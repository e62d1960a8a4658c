"""Factors of whole channels and branches: LayerScale, residual gates and weights; norm, since they scale as a norm does."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

NORM = BlockType.NORM

_FACTORS = (
    "layer_scale,layer_scale_1,layer_scale_2,layer_scale_parameter,lambda_1,lambda_2,lambda1,lambda2,lambdas,gamma,gamma_1,"
    "gamma_2,gamma1,gamma2,gamma3,gamma_xca,ls1,ls2,ffn_gamma,gate_attn,gate_ffn,gate_ffw,gate_attention,cross_attn_attn_gate,cross_attn_mlp_gate,"
    "input_residual,post_attention_residual,correct_output_scale,layer_scalar,logit_scale,logit_bias,latent_scaling_factor,"
    "latent_bias_factor,high_res_vision_alpha,hidden_states_scale,hidden_states_bias,residual_scale,residual_bias,"
    "alpha_cross_attn,alpha_dense,input_hidden_states_scale,input_hidden_states_bias"
)

SCALES: tuple[Rule, ...] = (
    Rule(f"*.{{{_FACTORS}}}", NORM, batch_dims=None),
    Rule(
        "*.{ls1,ls2,ls3,layer_scale1,layer_scale2,self_attn_layer_scale,mlp_layer_scale,layer_scale}.*",
        NORM,
        vector=True,
    ),
    Rule("*.{gate,scale}", NORM, vector=True, within="*{ResidualGate,LayerScale,Embedding}/"),
    Rule("*.{alpha,beta}", NORM, batch_dims=None, within="*Affine/"),  # ResMLP's, in place of norms
    Rule("*.grn.*", NORM, batch_dims=None),  # ConvNeXt V2's global response norm
)
