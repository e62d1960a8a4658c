"""Megatron models handed to DeepSpeed, configured by the ds_config alone, train as one process does."""
# Without q and k norms: under tensor parallelism their gradients are partial, and it is Megatron's own training loop that
# adds them up (finalize_model_grads), which DeepSpeed's engine does not call, whatever the optimizer.
import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

from megatron_door.inside_deepspeed import pipeline, tensor_parallel  # noqa: E402
from ranks import pool  # noqa: E402

KINDS = ["BlockwiseAdamW", "BlockwiseAdamMini"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 2])
def test_tensor_parallel_model_with_zero(kind, stage, record_property):
    for result in pool(4).run(tensor_parallel, "llama", kind, stage):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_module_of_megatron_layers_with_zero(kind, record_property):
    """The tied embedding's copies are compared to the bit. No shard's edge lies in them here: Adam-mini may leave a row that
    an edge cuts on one stage only one bit apart, since the row's squares are then added up in another order."""
    for result in pool(4).run(pipeline, "llama", kind, 1):
        record_property("worst", result["worst"])
        assert result["worst"] < 1e-5, result
        assert result["apart"] == 0.0, result
