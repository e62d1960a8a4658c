"""A plain module with a warmup, beside the same module on rows that were cut by hand."""

import copy

import pytest
import torch
from twins import VOCABULARY, make

from blockwise_lr import BlockError
from blockwise_lr.sequence_length import SequenceLengthWarmup, warmup_of

FULL, STEPS = 32, 6
OPTIONS = dict(start=8, end=FULL, steps=STEPS, multiple=4)
LENGTHS = [12, 16, 20, 24, 28, 32, 32]


def batches(number):
    draw = torch.Generator().manual_seed(number)
    return [torch.randint(0, VOCABULARY, (2, FULL), generator=draw) for _ in range(2)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_rows_cut_by_hand(kind, checkpointing):
    """Two micro batches a step, with positions and masks of two and four dimensions."""
    ours, plain = make(kind), make(kind)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    warmup = SequenceLengthWarmup(ours, **OPTIONS)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, plain)]
    masks = [torch.ones(2, FULL), torch.zeros(2, 1, FULL, FULL).masked_fill(torch.ones(FULL, FULL).triu(1) > 0, -1e9)]
    for number, s in enumerate(LENGTHS):
        assert warmup.length == s
        for ids, mask in zip(batches(number), masks):
            positions = torch.arange(FULL)[None]
            loss = ours(input_ids=ids, labels=ids, position_ids=positions, attention_mask=mask).loss
            cut_mask = mask[:, :s] if mask.ndim == 2 else mask[..., :s, :s]
            expected = plain(
                input_ids=ids[:, :s], labels=ids[:, :s], position_ids=positions[:, :s], attention_mask=cut_mask
            ).loss
            assert loss.item() == expected.item()
            loss.backward()
            expected.backward()
        theirs = gradients(plain)
        assert all(torch.equal(value, theirs[name]) for name, value in gradients(ours).items())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        warmup.step()
    assert warmup.tokens() == 4 * sum(LENGTHS)
    ours.eval()
    assert ours(input_ids=ids).logits.shape[1] == FULL
    warmup.detach()
    ours.train()
    assert ours(ids).logits.shape[1] == FULL and warmup_of(ours) is None


def test_labels_that_are_shifted_keep_as_many_predictions():
    model = make("llama")
    warmup = SequenceLengthWarmup(model, **OPTIONS)
    ids = batches(0)[0]
    batch = warmup.cut({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    assert torch.equal(batch["labels"], ids[:, 1:13])
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    assert loss.numel() == 2 * 12


class Nano(torch.nn.Module):
    """Arguments under names of its own, as nanoGPT has them."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, idx, targets=None, scale=None):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_models_with_names_of_their_own():
    torch.manual_seed(0)
    model = Nano()
    SequenceLengthWarmup(model, **OPTIONS)
    ids = torch.randint(0, VOCABULARY, (2, FULL + 1))
    logits, loss = model(ids[:, :-1], targets=ids[:, 1:])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.table(ids[:, :12]).flatten(0, 1), ids[:, 1:13].flatten())
    assert logits.shape[1] == 12 and loss.item() == expected.item()


def test_state_goes_on_where_it_was(caplog):
    def run(model, warmup, optimizer, first, last):
        losses = []
        for number in range(first, last):
            loss = model(input_ids=batches(number)[0], labels=batches(number)[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            warmup.step()
            losses.append(loss.item())
        return losses

    def start():
        model = make("llama")
        return model, SequenceLengthWarmup(model, **OPTIONS), torch.optim.AdamW(model.parameters(), lr=1e-3)

    parts = start()
    run(*parts, 0, 3)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    straight, tokens = run(*parts, 3, 7), parts[1].tokens()
    again = start()
    for part, state in zip(again, saved):
        part.load_state_dict(state)
    assert run(*again, 3, 7) == straight and again[1].tokens() == tokens == 2 * sum(LENGTHS)
    other = SequenceLengthWarmup(make("llama"), start=8, end=FULL, steps=7)
    other.load_state_dict(saved[1])
    assert "goes on with steps = 7; the checkpoint had 6" in caplog.text
    with pytest.raises(BlockError, match="no state of a sequence length warmup"):
        other.load_state_dict({"step": 3})


def test_a_second_warmup_is_refused():
    model = make("llama")
    SequenceLengthWarmup(model, **OPTIONS)
    with pytest.raises(BlockError, match="has a sequence length warmup already"):
        SequenceLengthWarmup(model, **OPTIONS)


def test_a_compiled_model_is_compiled_once_per_length_at_most():
    """With the hook on the compiled module, and on the module that is compiled."""
    for outside in (True, False):
        torch._dynamo.reset()
        graphs = []
        plain = model = Nano()
        if not outside:
            warmup = SequenceLengthWarmup(model, **OPTIONS)
        model = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=None)
        if outside:
            warmup = SequenceLengthWarmup(model, **OPTIONS)
        for number in range(12):
            ids = batches(number)[0]
            logits, _ = model(ids, ids)
            assert torch.equal(logits, plain.table(ids[:, : warmup.length]))
            warmup.step()
        assert 1 <= len(graphs) <= len(warmup.schedule.changes)
