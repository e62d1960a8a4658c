"""Both ends of a model: embeddings, tokens and positions, patches and frames, projectors between towers; and heads."""

from __future__ import annotations

from ..rules import Rule
from ..types import BlockType

EMBEDDING, HEAD = BlockType.EMBEDDING, BlockType.HEAD

_TOKENS = (
    "cls_token,class_token,class_embedding,mask_token,dist_token,distillation_token,reg_token,register_tokens,"
    "cls_register_token,query_tokens,latent_query,latents,image_newline,view_separator,probe,masked_spec_embed,mask_emb,"
    "silence_embeds,sub_img_feature_extensor,global_img_feature_extensor,eoi_embedding,label_embeddings_concat,codevectors"
)
_POSITIONS = (
    "pos_embed,pos_embed_window,patch_pos,pixel_pos,spatial_pos,temporal_pos,class_pos,position_embeddings,position_embedding,positional_embedding,positional_embedding_vlm,pos_embedding,"
    "pos_emb"
)
# modules that make the vectors of tokens: from ids, pixels, frames
_CLASSES = (
    "Embeddings,Embedding,Embedder,Embeds,PatchEmbed,PatchMerging,PatchMergingV2,Stem,ConvStem,Subsampling,SubsamplingConv2D,Subsampler,"
    "Conv1dSubsampler,FeatureEncoder,FeatureExtractor,FeatureProjection,FeatureStacking,ConcatEmbeddingToMel,Prenet,"
    "Preprocessor,EmbeddingTable,VectorQuantizer,InklingVisionEncoderLayer"
)
_PROJECTORS = (
    "mm_projector,vision_projector,multimodal_projector,connector,merger,deepstack_merger_list,deepstack_mergers,aligner,"
    "modality_projection,language_projection,image_to_text_projection,visual_projection,vision_projection,projector,"
    "vision_adapter,audio_projector,audio_adapter,embed_vision,embed_audio,patch_merger,enc_to_dec_proj"
)
_PROJECTOR_CLASSES = (
    "Projector,MultiModalProjector,MultimodalProjection,Connector,PatchMerger,VisionMerger,DeepStackMerger,Aligner,AlignerMLP,"
    "DownsampleMLP,Merger,ResamplerModel,Projection,AudioAdapter,ConformerAdapter,Wav2Vec2Adapter,Wav2Vec2BertAdapter,ImageEmbedding,AudioEmbedding,TextProjection"
)

EMBEDDINGS: tuple[Rule, ...] = (
    Rule(
        "*.{embed_tokens,wte,wpe,tok_embeddings,word_embeddings,position_embeddings,token_type_embeddings}.weight",
        EMBEDDING,
    ),
    Rule("*.{embed_positions,embed_in,embeddings,shared,tokens_embed,positions_embed}.weight", EMBEDDING),
)
# makes the input vectors of the image's tokens
PROJECTOR: tuple[Rule, ...] = (
    Rule("*.mm_input_projection_weight", EMBEDDING, transposed=True),  # Gemma 3's projector computes x @ W
    Rule("*.multi_modal_projector.*", EMBEDDING),
)
INPUTS: tuple[Rule, ...] = (
    Rule(f"*.{{{_TOKENS}}}", EMBEDDING, batch_dims=None),
    Rule("{cls_token_0,cls_token_1,cls_token1,cls_token2,cls_token3,cls_token4}", EMBEDDING, batch_dims=None),
    Rule("*.attn_pool.latent", EMBEDDING, batch_dims=None),
    Rule("proj.{weight,bias}", EMBEDDING, within="TNT/Linear/"),  # of a patch's pixels
    Rule(f"*.{{{_POSITIONS}}}{{,_0,_1,1,2,3,4}}", EMBEDDING, batch_dims=None),
    Rule("*.position_embeddings.weights.*", EMBEDDING, batch_dims=None),  # Reformer's, the outer sum of two tables
    Rule(
        "*.{patch_embed,patch_embeds,patch_embedding,patch_embeddings,patch_conv,patch_projection,conv_proj}.*",
        EMBEDDING,
    ),
    Rule("*.{patch_embedder,to_patch_embedding,stem,conv_stem,vision_embed_tokens}.*", EMBEDDING),
    Rule("*.{feature_projection,pos_conv_embed,subsampling,subsample,subsampler}.*", EMBEDDING),
    Rule(
        "*.{embeddings_project,embedding_hidden_mapping_in,embedding_projection,embedding_transformation}.*", EMBEDDING
    ),
    Rule("*.{per_layer_model_projection,patch_embedding_projection,decoder_embed,encoder_to_decoder}.*", EMBEDDING),
    Rule(
        "*.{pre_projection,noisy_images_proj,cond_proj,protein_projector,thinker_to_talker_proj,head_linear}.*",
        EMBEDDING,
    ),
    Rule("*.{image_to_mm_projection,text_to_mm_projection,out_mid}.*", EMBEDDING),
    Rule("*.{proj1,proj2,proj}.*", EMBEDDING, within="*{AudioEncoder,AudioModel,AsrDecoder,DiarizationModel}/Linear/"),
    # the convolutions of a speech encoder before its first layer
    Rule(
        "*.{conv1,conv2,conv3,conv2d1,conv2d2,conv2d3,conv_out,input_linear}.*",
        EMBEDDING,
        within="*{Encoder,AudioModel,VisionModel}/{Conv1d,Conv2d,Linear}/",
    ),
)
MODULES: tuple[Rule, ...] = (
    Rule("*", EMBEDDING, within=f"*{{{_CLASSES}}}/*"),
    Rule(f"*.{{{_PROJECTORS}}}.*", EMBEDDING),
    Rule("*", EMBEDDING, within=f"*{{{_PROJECTOR_CLASSES}}}/*"),
)

_HEADS = (
    "classifier,cls_classifier,distillation_classifier,score,lm_heads,ctc_head,ctc_proj,predictions,cls,pooler,lm_loss,"
    "generator_lm_head,logits_dense,vocab_projector,vocab_transform,word_timestamp_head,discriminator_predictions,"
    "generator_predictions,entity_predictions,answer_head,obj_predict_head,contact_head,mlm_head,embedding_decoder,"
    "output_projection,codec_head,pred_layer,dist_head,last_convolution,sop_classifier,decoder_pred,proj_out,speaker_proj,project_hid,embedding_proj_layer,final_layer,seq_relationship,post_projection,action_out_proj"
)
# exact names and places, which come before all else
OUTPUT_LAYERS: tuple[Rule, ...] = (
    Rule("*.{lm_head,embed_out}.*", HEAD),
    Rule("{output,head,fc,decoder,decoder.head}.{weight,bias}", HEAD),
    Rule("*.out.*", HEAD, within="*{CTCEncoder,GraniteSpeech5Encoder}/Linear/"),
    Rule("*.{text_projection,image_projection,visual_projection}.*", HEAD, within="*{CLIPModel,FlavaModel}/Linear/"),
)
HEADS: tuple[Rule, ...] = (
    Rule("{project_q,quantizer.weight_proj}.{weight,bias}", HEAD),  # wav2vec 2.0's targets, in pre-training only
    Rule(f"*.{{{_HEADS}}}.*", HEAD),
    # of a whole image classifier; below other names a head may be an attention's
    Rule("{head,heads,head_dist,aux_head,classif,last_linear,pre_classifier,AuxLogits.fc}.*", HEAD),
    Rule(
        "*",
        HEAD,
        within="*{PredictionHead,PredictionHeads,PreTrainingHeads,SelectionHead,VQVAEHead,Pooler,LMHead,ClassificationHead,ClassificationLayer}/*",
    ),
)
