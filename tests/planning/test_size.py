"""Parameters, operations and activations of real modules against PyTorch's own counters."""

import gc

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import blockwise_lr
from blockwise_lr.blocks import BlockError, map_blocks
from blockwise_lr.inspection import load_model
from blockwise_lr.planning import model_size, state_bytes
from blockwise_lr.planning.state import peak_bytes
from blockwise_lr.transformers.activations import activation_bytes, pass_peak

CONFIGS = {
    "llama": transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=64,
        n_layer=3,
        n_head=4,
        vocab_size=500,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
MIXTRAL = transformers.MixtralConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=500,
    num_local_experts=8,
    num_experts_per_tok=2,
)


def built(config, **options):
    return transformers.AutoModelForCausalLM.from_config(config, **options).train()


@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_are_what_pytorch_counts(kind):
    model = built(CONFIGS[kind], attn_implementation="eager")
    ids = torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    size = model_size(model)
    # eager attention computes the masked half as well
    assert counter.get_total_flops() / ids.numel() == pytest.approx(6 * size.active + 12 * 32 * size.attended, rel=1e-6)
    assert size.flops_per_token(32) == 6 * size.active + 6 * 32 * size.attended
    assert size.parameters == sum(p.numel() for p in model.parameters()) and size.attended == 3 * 64
    assert size.head == 500 * 64


def test_of_experts_those_that_a_token_goes_to_are_counted():
    with torch.device("meta"):
        model = built(MIXTRAL)
    size, experts = model_size(model), 2 * 8 * 3 * 64 * 128
    router, attention = 2 * 8 * 64, 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert size.body == experts / 4 + router + attention and size.head == 500 * 64
    assert size.parameters == experts + router + attention + 2 * 500 * 64 + 5 * 64


def test_a_megatron_argument_file_has_the_size_of_its_model():
    size = model_size(load_model("configs/megatron/llama-3-70b.args", 128256))
    assert size.parameters == 70_553_706_496 and size.attended == 80 * 8192  # Meta's LLaMA 3 70B
    assert size.active == size.parameters - 128256 * 8192 - (2 * 80 + 1) * 8192


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_activations_are_what_a_real_forward_pass_keeps(kind, dtype, checkpointing):
    config = CONFIGS[kind]
    model = built(config, attn_implementation="sdpa", dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(4, 128, dtype=torch.long)
    model(input_ids=ids, labels=ids, use_cache=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    kept = sum(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    assert loss.grad_fn is not None
    counted = activation_bytes(config, 4, 128, dtype=dtype, checkpointing=checkpointing)
    assert counted == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["BlockwiseAdamW", "BlockwiseAdamMini"])
def test_a_step_takes_what_was_predicted_at_its_peak(name, kind, checkpointing):
    """Against every allocation and release of a real step, in one process."""
    config = CONFIGS[kind]
    model = built(config, attn_implementation="sdpa", dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    block_map, ids = map_blocks(model), torch.zeros(4, 128, dtype=torch.long)
    optimizer = getattr(blockwise_lr, name)(model.named_parameters(), lr=1e-3, block_map=block_map)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()  # what earlier tests left would be released within the step
    held = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    taken = most = sum({value.data_ptr(): value.untyped_storage().nbytes() for value in held}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    rule = {"BlockwiseAdamW": "adamw", "BlockwiseAdamMini": "adam_mini"}[name]
    states = state_bytes(block_map, stage=0, ranks=1, optimizer=rule, precision="fp32")
    found = pass_peak(config, 4, 128, dtype=torch.float32, checkpointing=checkpointing)
    assert peak_bytes(states, 0, found.gradients, found.others) == pytest.approx(most, rel=0.01)


def test_activations_of_70b_need_no_memory_and_grow_with_the_batch():
    config = transformers.AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    one, two = (activation_bytes(config, count, 2048) for count in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    with pytest.raises(BlockError, match="0 sequences"):
        activation_bytes(config, 0, 2048)
