"""Accelerate's loop: accumulation, and its own save and load, with a warmup among what they keep."""

import pytest
import torch
from twins import VOCABULARY, make

from blockwise_lr.sequence_length import SequenceLengthWarmup

FULL, LENGTHS = 32, [12, 16, 20, 24, 28, 32]


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def parts_of(accelerator):
    """Model and optimizer as Accelerate has prepared them, and the warmup, registered for its checkpoints."""
    model = make("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    warmup = SequenceLengthWarmup(model, start=8, end=FULL, steps=6, multiple=4)
    accelerator.register_for_checkpointing(warmup)
    return model, optimizer, warmup


def batches(step):
    return torch.randint(0, VOCABULARY, (2, 2, FULL), generator=torch.Generator().manual_seed(step))


def train(accelerator, model, optimizer, warmup, steps):
    """Losses of every micro batch, as a user's loop has them."""
    losses = []
    for step in steps:
        for ids in batches(step):
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if accelerator.sync_gradients:
                    warmup.step()
    return losses


def by_hand():
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step, length in enumerate(LENGTHS):
        for ids in batches(step):
            loss = model(input_ids=ids[:, :length], labels=ids[:, :length]).loss
            (loss / 2).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_it_trains_and_resumes_as_on_rows_cut_by_hand(accelerator, tmp_path):
    expected = by_hand()
    parts = parts_of(accelerator)
    assert train(accelerator, *parts, range(3)) == expected[:6]
    accelerator.save_state(str(tmp_path / "state"))
    assert train(accelerator, *parts, range(3, 6)) == expected[6:]
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    again = parts_of(accelerator)
    accelerator.load_state(str(tmp_path / "state"))
    assert again[2].completed == 3 and again[2].tokens() == 4 * sum(LENGTHS[:3])
    assert train(accelerator, *again, range(3, 6)) == expected[6:]
