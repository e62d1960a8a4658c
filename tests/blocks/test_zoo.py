"""Every model of the installed transformers maps strictly, and rightly by numbers that the rules have no part in.

By default a few of every kind; with --full all of them. What cannot be built from its default config is skipped.
"""

import pytest
import torch
from blocks import zoo
from torch import nn

from blockwise_lr import BlockError, map_blocks
from blockwise_lr.blocks.layout import MATRIX
from blockwise_lr.probe import contradictions, probe
from blockwise_lr.transformers.coverage import coverage

FEW = {
    "causal-lm": "LlamaForCausalLM CodeGenForCausalLM CTRLLMHeadModel XLNetLMHeadModel DeepseekV4ForCausalLM "
    "Lfm2MoeForCausalLM MiMoV2FlashForCausalLM NemotronHForCausalLM PersimmonForCausalLM RwkvForCausalLM "
    "BartForCausalLM JetMoeForCausalLM",
    "masked-lm": "AlbertForMaskedLM ModernBertForMaskedLM DebertaV2ForMaskedLM FunnelForMaskedLM LongformerForMaskedLM",
    "seq2seq": "BartForConditionalGeneration MT5ForConditionalGeneration EncoderDecoderModel",
    "image-classification": "BeitForImageClassification Swinv2ForImageClassification ConvNextV2ForImageClassification",
    "image-text-to-text": "LlavaForConditionalGeneration Blip2ForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
    "multimodal-lm": "KyutaiSpeechToTextForConditionalGeneration",
    "speech-seq2seq": "WhisperForConditionalGeneration SpeechT5ForSpeechToText",
    "ctc": "Wav2Vec2ForCTC ParakeetForCTC",
    "pretraining": "ViTMAEForPreTraining",
}


# of these, those whose forward pass takes long on the meta device, and says little that another's does not
SLOW = ["RwkvForCausalLM", "CTRLLMHeadModel", "PersimmonForCausalLM", "ModernBertForMaskedLM"]


def everything(categories=tuple(zoo.CATEGORIES), without=()):
    return [
        pytest.param(
            name,
            id=f"{category} {name}",
            marks=() if name in FEW[category].split() and name not in without else pytest.mark.full,
        )
        for category in categories
        for name in zoo.classes(category)
    ]


def built(name):
    model = zoo.build(name)
    if model is None:
        pytest.skip("its default config builds no model here")
    return model


def is_norm(module):
    return "Norm" in type(module).__name__


@pytest.mark.parametrize("name", everything())
def test_maps_strictly_and_what_modules_are_is_what_they_are_called(name):
    """Every parameter once, all elements; norms, the vocabulary's table and the output layer, by the module itself."""
    model = built(name)
    block_map = map_blocks(model)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(block_map.block_numel().values()) == wanted
    blocks = {id(p): block_map[n].blocks for n, p in model.named_parameters() if n in block_map}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if is_norm(module) and p.dim() == 1 and p.requires_grad:
                assert [str(b) for b in blocks[id(p)]] == ["norm"], type(module)
    table, head = _ends(model)
    if table is not None and table.requires_grad:
        assert [str(b) for b in blocks[id(table)]] == ["embedding"]
    tables = [m.weight for m in model.modules() if "Embedding" in type(m).__name__ and hasattr(m, "weight")]
    if head is not None and head.requires_grad and not any(head is weight for weight in tables):
        assert [str(b) for b in blocks[id(head)]] == ["head"]


def _ends(model):
    """The weights of the input table and the output layer, by the model's own accessors."""
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = get()
        except (NotImplementedError, AttributeError):
            module = None
        weight = getattr(module, "weight", None)
        kind = nn.Embedding if not found else nn.Linear
        found.append(weight if isinstance(module, kind) and isinstance(weight, nn.Parameter) else None)
    return found


@pytest.mark.parametrize("name", everything(("causal-lm",)))
def test_attention_and_feed_forward_elements_are_those_of_the_config(name):
    """Decoders of equal layers: width, heads, head size, inner size and depth give the elements of all matrices."""
    model = built(name)
    wanted = zoo.dense_decoder(model.config)
    if wanted is None:
        pytest.skip("its layers are not all alike")
    found = dict.fromkeys(wanted, 0)
    for layout in map_blocks(model).values():
        for block, numel in layout.block_numel().items():
            if layout.kind == MATRIX and block.value in found:
                found[block.value] += numel
    assert (found["qk"], found["vo"]) == (wanted["qk"], wanted["vo"])
    assert found["ffn"] in (wanted["ffn"], wanted["ffn"] * 3 // 2)


@pytest.mark.parametrize("name", everything(("causal-lm", "masked-lm"), SLOW))
def test_the_forward_pass_does_not_contradict_the_map(name):
    """On the meta device: which parameters feed the scores, and which the values, in every attention that is reached."""
    model = built(name)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            module.config._attn_implementation_internal = "eager"
    ids = torch.ones(1, 6, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 6, 6, device="meta")  # of four dimensions: taken as it is, also without data
    uses = {}
    for more in ({"attention_mask": mask, "use_cache": False}, {"use_cache": False}, {"attention_mask": mask}, {}):
        try:
            uses = max(uses, probe(model, lambda more=more: model(ids, **more)), key=len)
        except BlockError:
            continue
    if not uses:
        pytest.skip("its forward pass does not reach an attention on the meta device")
    block_map = map_blocks(model)
    assert contradictions(block_map, uses) == []
    qk = [n for n in uses if n in block_map and {str(b) for b in block_map[n].blocks} == {"qk"}]
    assert any(uses[name].scores.any() for name in qk) or not qk


def test_coverage_of_a_category():
    """What ``blockwise-lr families --installed`` prints, of one category."""
    (row,) = coverage(["CTC"])
    assert row.category == "ctc" and row.refused == {} and "Wav2Vec2ForCTC" in row.mapped
    assert set(row.mapped) | set(row.not_built) == set(zoo.members("ctc"))
