"""Feed-forward networks, mixtures of them, and their routers; convolutions and other linear layers between channels."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

FFN, ROUTER = BlockType.FFN, BlockType.ROUTER

_CLASSES = (
    "MLP,Mlp,MLPLayer,MLPBlock,MlpBlock,FFN,FeedForward,FeedForwardNetwork,FFNBlock,DenseActDense,DenseGatedActDense,DenseGatedACT,"
    "Experts,ParallelExperts,Intermediate,LaurelBlock,AltUp,GLU,GluMlp,ResidualConnection,ConvolutionModule,MessageGate,SnakeBeta,Bottleneck,OutputBottleneck,BottleneckLayer,Upsampling,AMPBlock,CNBlock"
)

ROUTERS: tuple[Rule, ...] = (
    Rule("*.{mlp,feed_forward,block_sparse_moe,mixer,moe,text_moe,vision_moe,ffn}.{gate,router}.*", ROUTER),
    Rule("*.shared_expert_gate.*", ROUTER),
    Rule("*", ROUTER, within="*{Router,TopKRouter,TopkRouter,TopKGating,TopKGate,Gating}/*"),
    Rule("*.{gate,router}.{weight,bias}", ROUTER, within="*{MoE,Moe,SparseMoeBlock,SparseMLP,MoeBlock}/*"),
    # deepspeed.moe.layer.MoE, whose experts may be any module; a residual one has a dense expert and two weights beside
    Rule("*.gate.wg.{weight,bias}", ROUTER),
    Rule("*.deepspeed_moe.experts.deepspeed_experts.*", FFN),
    Rule("*{moe,MoE,mlp,ffn,feed_forward,expert}*.coefficient.{weight,bias}", ROUTER),
)
FEED_FORWARD: tuple[Rule, ...] = (
    *ROUTERS,
    Rule("*.{experts,shared_experts}.{gate_up_proj,gate_proj,up_proj,down_proj}{,_bias}", FFN, batch_dims=1),
    # JetMoE keeps (experts, outputs, inputs) in modules of its own
    Rule("*.{input_linear,output_linear}.weight", FFN, batch_dims=1, within="*ParallelExperts/"),
    Rule("*.{gate_proj,up_proj,down_proj,gate_up_proj}.*", FFN),
    Rule("*.{feed_forward,ffn,mlp}.{w1,w2,w3,c_fc,c_proj,fc1,fc2,fc_in,fc_out}.*", FFN),
    Rule("*.experts.*.{w1,w2,w3}.*", FFN),
    Rule("*.{dense_h_to_4h,dense_4h_to_h}.*", FFN),
    Rule("*.{fc1,fc2,lin1,lin2,pwconv1,pwconv2,wi,wi_0,wi_1,Wi,ffn_output}.{weight,bias}", FFN),
    Rule(
        "*.{intermediate,output,intermediate_query,output_query,lang_inter,lang_output,visn_inter,visn_output}.{dense,conv1d}.*",
        FFN,
    ),
    Rule("*.{intermediate_dense,output_dense}.*", FFN),
    Rule("*.DenseReluDense.*", FFN),
    Rule("*.{linear1,linear2}.{weight,bias}", FFN, within="*{EncoderLayer,DecoderLayer}/*"),
    Rule("*.ffn.{weight,bias}", FFN),
    Rule("*.{mlp_out_proj.weight,mlp_out_proj.bias,mlp_bias}", FFN),
    Rule("*{moe,MoE,mlp,ffn,feed_forward,expert}*.mlp.*", FFN),
)
# Where no name says more: after embeddings, projectors and heads.
CHANNELS: tuple[Rule, ...] = (
    Rule("*", FFN, within=f"*{{{_CLASSES}}}/*"),
    Rule("*.{mlp,ffn,feed_forward,ff,shared_mlp,mlp_layer,linear_tokens}.*", FFN),
    Rule("*.{per_layer_input_gate,per_layer_projection,altup_projections,altup_unembed_projections}.*", FFN),
    Rule("*.{attn_hc,ffn_hc,hc_head}.*", FFN),  # hyper-connections: weights between parallel residual streams
    Rule("*.adapter_modules.*", FFN),
    Rule(
        "*.proj.*", FFN, within="*{HieraLayer,HieraBlock,MultiScaleBlock}/Linear/"
    ),  # the residual of a layer that widens
    Rule("*.shortcut_proj_{attn,mlp}.*", FFN),  # and MViT's, called project in torchvision
    Rule("*.project.*", FFN, within="*MultiscaleBlock/Linear/"),
    Rule("*.proj.*", FFN, within="TNT/*Block/Linear/"),  # from a patch's pixels to the patch
    Rule("*.{projs,revert_projs}.*", FFN, within="*MultiScaleBlock/*"),  # CrossViT's, between its branches
    Rule("*.pool.fc.*", FFN, within="*Pooling/*"),  # PiT's, of the class token where a stage widens
    Rule(
        "*.linear.*", FFN, within="*HybridLayer/Linear/"
    ),  # Zamba's, behind the shared attention and feed-forward layer
    Rule("*.linear.*", FFN, within="*Norm*/Linear/"),  # an adaptive norm's, which makes factors of a condition
    Rule("*.downsample.reduction.*", FFN),
    # a convolution outside of attention and of what makes the input vectors
    Rule("*", FFN, within="*{Conv1d,Conv2d,Conv2dSame,Conv3d,ConvTranspose1d,ConvTranspose2d}/*"),
)
