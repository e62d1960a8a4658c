"""The guard: alone, over ranks, and as a DeepSpeed engine's."""

import math

import pytest
import torch
import torch.distributed as dist
from deepspeed_door.engines import config, start, train, weights
from ranks import pool
from twins import make, worst_difference

from blockwise_lr import BlockError, BlockwiseAdamW, map_blocks
from blockwise_lr.checkpoint import CheckpointError
from blockwise_lr.measure import Guard, Unstable


def optimizer_of(model=None):
    model = model or make("llama")
    return BlockwiseAdamW(
        model.named_parameters(), lr=1e-3, weight_decay=0.0, block_map=map_blocks(model), block_lr_ratios="paper"
    )


def test_rates_are_lowered_for_a_while_whatever_the_schedule_says():
    model = make("llama")
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    guard, rates = Guard(optimizer, after=0, loss_ratio=1.2, factor=0.25, steps=2), []
    for loss in (2.0, 1.9, 2.5, 3.0, 1.8, 1.7):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        rates.append(optimizer.block_lrs()[0]["qk"] / optimizer.param_groups[0]["lr"])
        alarm = guard.step(loss)
        schedule.step()
        assert (alarm is not None) == (loss == 2.5)  # 3.0 lies in the two steps that it waits
    assert rates == pytest.approx([8, 8, 8, 2, 2, 8])
    (alarm,) = guard.alarms
    assert (alarm.step, alarm.action) == (3, "lower") and "1.32 times the lowest" in alarm.reason


@pytest.mark.filterwarnings("error")
def test_a_loss_may_be_a_tensor_with_its_graph():
    loss = torch.tensor([1.5], requires_grad=True) * 2
    guard = Guard(optimizer_of(), after=0)
    assert guard.step(loss.sum()) is None and guard.loss_ratio.lowest == 3.0


def test_a_step_at_lowered_rates_is_a_step_at_that_lr():
    def moved(lower):
        model = make("llama")
        optimizer = optimizer_of(model)
        if lower:
            optimizer.lower_lrs(0.5, 1)
        else:
            optimizer.param_groups[0]["lr"] *= 0.5
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(moved(True), moved(False))


def test_lowered_rates_are_saved_with_the_state():
    model = make("llama")
    first = optimizer_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    first.lower_lrs(0.1, 5)
    again = optimizer_of(model)
    again.load_state_dict(first.state_dict())
    assert again.block_lrs() == first.block_lrs() and again.block_lrs()[0]["qk"] == pytest.approx(8e-4)


def test_the_first_steps_are_not_judged_and_nan_always_is():
    guard = Guard(optimizer_of(), after=3, loss_ratio=1.2)
    assert [guard.step(loss) for loss in (1.0, 5.0, 9.0)] == [None] * 3
    with pytest.raises(Unstable, match="step 4: the loss is not finite on a rank; the run stops, nothing is saved"):
        guard.step(math.nan)


def test_it_stops_when_lowering_does_not_help_and_saves_first():
    saved = []
    guard = Guard(optimizer_of(), after=0, loss_ratio=1.2, steps=2, attempts=2, save=lambda: saved.append(1))
    seen = [guard.step(loss) for loss in (1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0)]
    assert [alarm is not None for alarm in seen] == [False, True, False, False, True, False, False]
    with pytest.raises(Unstable, match="though rates were lowered 2 times; the run stops, the state is saved"):
        guard.step(2.0)
    assert saved == [1]


def test_the_variance_may_ring_too():
    guard = Guard(optimizer_of(), after=0, variance_ratio=4.0, action="stop")
    assert guard.step(1.0, {"variance_max/qk": 1e-4, "variance_max/ffn": 1e-3}) is None
    assert guard.step(1.0, {"variance_max/qk": 3e-4, "variance_max/ffn": 1e-5}) is None
    with pytest.raises(Unstable, match="largest second moment of ffn is 5 times"):
        guard.step(1.0, {"variance_max/qk": 3e-4, "variance_max/ffn": 5e-5})


def test_a_state_goes_on_where_it_was_saved():
    first, again = (Guard(optimizer_of(), after=0, loss_ratio=1.2, steps=3) for _ in range(2))
    for loss in (1.0, 2.0):
        first.step(loss)
    again.load_state_dict(first.state_dict())
    losses = (2.0, 1.0, 1.0, 2.0, 1.1)
    assert [again.step(loss) for loss in losses] == [first.step(loss) for loss in losses]
    assert again.alarms == first.alarms and len(again.alarms) == 2


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_ratio": 1.0}, "loss_ratio is 1.0"),
        ({"action": "rollback"}, "action is 'rollback'"),
        ({"actions": "lower"}, "did you mean 'action'"),
        ({"action": "roll_back"}, "needs a folder of checkpoints"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(BlockError, match=words):
        Guard(optimizer_of(), **options)


def on_ranks():
    guard = Guard(optimizer_of(), after=0, loss_ratio=1.5)
    mine = [(1.0, 1.0), (1.0, 1.4), (1.0, 3.0)]  # only the mean of the last is above
    seen = [guard.step(losses[dist.get_rank()]) for losses in mine]
    try:
        guard.step((1.0, math.inf)[dist.get_rank()])
    except Unstable as error:
        return seen, str(error)


def test_ranks_decide_alike():
    first, second = pool(2).run(on_ranks)
    assert first == second and first[0][:2] == [None, None] and first[0][2].action == "lower"
    assert "not finite on a rank" in first[1]


def on_stages():
    guard = Guard(optimizer_of(), after=0, loss_ratio=1.5)
    mine = [(None, 1.0), (None, None), (None, 2.0)]  # a pipeline's last stage alone has losses; none of a skipped step
    return [guard.step(losses[dist.get_rank()]) for losses in mine]


def test_stages_without_a_loss_are_no_part_of_the_mean():
    first, second = pool(2).run(on_stages)
    assert first == second and first[:2] == [None, None] and first[2].step == 3


def spiked(folder, stage, at, action, attempts=3, saves=(2, 4)):
    """Trains 8 steps; the losses that the guard is told are 10 from step `at` on as often as asked; what it did."""
    import blockwise_lr.deepspeed as door

    engine = start(make("llama"), config("BlockwiseAdamW", stage, steps=20))
    guard = door.guard(engine, folder, action=action, after=2, loss_ratio=1.5, attempts=attempts, steps=1)
    told, spikes, ended = [], list(at), None
    data = 0
    try:
        while engine.global_steps < 8:
            train(engine, 1, first=data)
            data, step = data + 1, engine.global_steps
            loss = 10.0 if spikes and step == spikes[0] else 1.0
            if loss > 1:
                spikes.pop(0)
            alarm = guard.step(loss)
            told.append((step, None if alarm is None else alarm.back_to))
            assert data == engine.global_steps + guard.skipped
            if alarm is None and step in saves:
                engine.save_checkpoint(folder)
    except (Unstable, CheckpointError) as error:
        ended = str(error)
    found = told, ended, [a.action for a in guard.alarms], weights(engine), guard.skipped
    engine.destroy()
    return found


def without(stage, batches):
    """The weights after these batches, with nothing that happens."""
    engine = start(make("llama"), config("BlockwiseAdamW", stage, steps=20))
    for batch in batches:
        train(engine, 1, first=batch)
    found = weights(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_goes_back_and_skips_the_data(tmp_path, stage):
    first, second = pool(2).run(spiked, str(tmp_path), stage, [5], "roll_back")
    told, ended, actions, after, skipped = first
    assert told == [(1, None), (2, None), (3, None), (4, None), (5, 4), (5, None), (6, None), (7, None), (8, None)]
    assert second[0] == told and ended is None and actions == ["roll_back"] and skipped == 1
    expected = pool(2).run(without, stage, [0, 1, 2, 3, 5, 6, 7, 8])[0]
    assert worst_difference(after, expected) == 0


def test_an_engine_stops_when_going_back_does_not_help(tmp_path):
    _told, ended, actions, *_ = pool(2).run(spiked, str(tmp_path), 1, [5, 5, 5], "roll_back", 2)[0]
    assert "3 times after step 4, which was gone back to" in ended and "the newest checkpoint holds" in ended
    assert actions == ["roll_back", "roll_back", "stop"]


def test_an_engine_without_a_checkpoint_says_so(tmp_path):
    _told, ended, *_ = pool(2).run(spiked, str(tmp_path), 1, [3], "roll_back", 3, ())[0]
    assert "holds no complete checkpoint yet" in ended


def resumed(folder, save):
    import blockwise_lr.deepspeed as door

    engine = start(make("llama"), config("BlockwiseAdamW", 1, steps=20))
    guard = door.guard(engine, folder, after=0, loss_ratio=1.5, steps=3, factor=0.5)
    if not save:
        engine.load_checkpoint(folder)
    else:
        for step, loss in enumerate((1.0, 4.0)):
            train(engine, 1, first=step)
            guard.step(loss)
        engine.save_checkpoint(folder)
    rates = door.block_lrs(engine)[0]["qk"] / door.optimizer_of(engine).param_groups[0]["lr"]
    with pytest.raises(BlockError, match="has a guard already"):
        door.guard(engine)
    found = guard.state_dict(), rates
    engine.destroy()
    return found


def test_what_it_did_is_in_the_checkpoint(tmp_path):
    saved = pool(2).run(resumed, str(tmp_path), True)
    assert pool(2).run(resumed, str(tmp_path), False) == saved
    state, ratio = saved[0]
    assert [alarm["action"] for alarm in state["alarms"]] == ["lower"] and ratio == pytest.approx(4.0)
