"""Muon by flags, through Megatron's real pretrain()."""

from megatron_door.test_pretrain import data, launch, losses  # noqa: F401  the fixture of a small corpus


def test_flags_reach_the_optimizer_and_it_learns(data):  # noqa: F811
    flags = ["--optimizer", "blockwise_muon", "--block-lr-ratios", "qk=2", "--block-muon", "momentum=0.9", "ns_steps=4"]
    code, log = launch(data, *flags)
    assert code == 0, log[-3000:]
    assert losses(log)[-1] < losses(log)[0] - 0.5
    assert (
        "iteration 5 learning rates | embedding: 1.000000E-02 | qk: 2.000000E-03 | vo: 1.000000E-03 | "
        "ffn: 1.000000E-03 | norm: 1.000000E-03 |" in log
    )


def test_what_would_have_no_effect_is_refused(data):  # noqa: F811
    code, log = launch(data, "--optimizer", "blockwise_muon", "--muon-momentum", "0.8")
    assert code == 1 and "--muon-momentum is 0.8, and blockwise_muon takes what it needs from --block-muon" in log
    code, log = launch(data, "--optimizer", "blockwise_muon", "--block-muon", "beta=1")
    assert code == 2 and "block_muon has no 'beta'" in log
