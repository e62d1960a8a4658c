"""Megatron's pretrain() with TP2 x DP2 on two nodes whose link is cut: all ranks end, and a restart goes on."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from nodes.namespaces import Nodes, end, logs, wait_for, why_not

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is None:
    pytest.skip("this megatron-core carries no megatron.training", allow_module_level=True)

from megatron_door.test_pretrain import FLAGS, SCRIPT, data  # noqa: F401 - data is a fixture

STEPS, SAVED = 30, 5
LINE = re.compile(r"iteration +(\d+)/ +\d+ .*?lm loss: (\S+)")

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=str(why_not())), pytest.mark.timeout(1200)]


def words(corpus, *more):
    layout = ["--tensor-model-parallel-size", "2", "--train-iters", str(STEPS), "--log-interval", "1"]
    layout += ["--optimizer", "blockwise_adamw", "--distributed-timeout-minutes", "1"]
    cache = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    return ["-m", "blockwise_lr.megatron", "--on-cpu", str(SCRIPT), *FLAGS, *layout, *cache, *more]


def losses(folder):
    """Iteration -> loss, as the last rank has logged them."""
    text = "".join(file.read_text() for file in sorted(folder.glob("node-*.log")))
    return {int(step): float(loss) for step, loss in LINE.findall(text)}


@pytest.mark.full  # three starts of Megatron on four ranks, and a minute until collectives give up
def test_a_cut_link_ends_all_ranks_and_the_restart_goes_on(data, tmp_path):  # noqa: F811
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    whole = subprocess.run([*start, *words(data)], capture_output=True, text=True, timeout=500)
    assert whole.returncode == 0, whole.stderr[-3000:]
    wanted = {int(step): float(loss) for step, loss in LINE.findall(whole.stdout)}
    saves, nodes = str(tmp_path / "checkpoints"), Nodes()
    flags = words(data, "--save", saves, "--load", saves, "--save-interval", str(SAVED))
    try:
        agents = nodes.torchrun(flags, tmp_path, {}, per_node=2)
        wait_for(tmp_path, agents, lambda: max(losses(tmp_path), default=0) > SAVED, 400)
        nodes.cut()
        nodes.wait_for_ranks(tmp_path, 180)
        codes = end(agents, 20)
        nodes.end_all()
        assert 1 in codes and 0 not in codes, f"{codes}\n{logs(tmp_path)}"
        said = [re.findall(r"^.*blockwise_lr\.megatron, rank \d: (.*)$", log, re.M) for log in texts(tmp_path)]
        print(said)
        assert all(len(lines) == 1 for lines in said), logs(tmp_path)
        assert any(re.match(r"ranks (0-1|2-3) of 4 give no answer", lines[0]) for lines in said)
        nodes.mend()
        before = max(losses(tmp_path))
        assert end(nodes.torchrun(flags, tmp_path, {}, per_node=2), 400) == [0, 0], logs(tmp_path)
    finally:
        nodes.close()
    found = losses(tmp_path)
    resumed = before // SAVED * SAVED
    # the second line after a start is Megatron's average of it and the first
    wanted[resumed + 2] = pytest.approx((wanted[resumed + 1] + wanted[resumed + 2]) / 2, abs=1e-5)
    assert found == wanted


def texts(folder):
    return [file.read_text() for file in sorted(folder.glob("node-*.log"))]
