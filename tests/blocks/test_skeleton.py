"""Models without code: the parameters they declare, and ties between them."""

from blockwise_lr import map_blocks
from blockwise_lr.blocks.skeleton import Skeleton, layers

SHAPES = {
    "embedding.word_embeddings.weight": (10, 8),
    **layers(2, "decoder.layers", {"self_attention.linear_qkv.weight": (24, 8)}),
    "output_layer.weight": (10, 8),
}


def test_names_shapes_and_order():
    model = Skeleton(SHAPES, {"num_attention_heads": 2})
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == SHAPES
    assert list(dict(model.named_parameters())) == list(SHAPES)
    assert all(p.is_meta for p in model.parameters())


def test_a_tied_output_layer_is_the_embedding_itself():
    model = Skeleton(SHAPES, {"num_attention_heads": 2})
    assert len(map_blocks(model, family="megatron")) == 4
    model.tie("output_layer.weight", "embedding.word_embeddings.weight")
    assert model.output_layer.weight is model.embedding.word_embeddings.weight
    assert list(map_blocks(model, family="megatron")) == [name for name in SHAPES if name != "output_layer.weight"]
