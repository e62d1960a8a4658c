"""The PBS job scripts with stand-ins for PBS's commands: what they are asked to run on a node is run here."""

import os
import re
import subprocess
import time
from pathlib import Path

from blockwise_lr.jobs import PBS, Job

ROOT = Path(__file__).resolve().parents[2]
MEGATRON = ROOT / "examples" / "pbs" / "megatron.pbs"
TOLD = 'line=$(printf "%s|" "$@"); echo "$line$A|$NCCL_DEBUG|${TORCH_EXTENSIONS_DIR##*/}"'


def run(folder, script, torchrun=TOLD, **commands):
    """What a script prints and its exit code, as a job on nodes n1 and n2."""
    tools = folder / "bin"
    tools.mkdir()
    commands = {
        "pbs_tmrsh": 'export NODE=$1; shift; exec env -i PATH="$PATH" NODE="$NODE" "$@"',  # it takes no environment along
        "torchrun": torchrun,
        "qsig": "true",
        **commands,
    }
    for name, body in commands.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    (folder / "nodes").write_text("n1\nn1\nn2\nn2\n")
    (folder / "job.pbs").write_text(script)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PBS_O_WORKDIR": str(folder),
        "PBS_NODEFILE": str(folder / "nodes"),
        "PBS_JOBID": "123.server",
        "PBS_JOBNAME": "job",
        "TMPDIR": str(folder),
    }
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:  # a pipe would wait for what it leaves
        done = subprocess.run(["bash", str(folder / "job.pbs")], stdout=out, stderr=err, env=environment, timeout=60)
    done.stdout, done.stderr = (folder / "out").read_text(), (folder / "err").read_text()
    return done


def test_torchrun_starts_on_every_node_with_the_jobs_environment(tmp_path):
    job = Job(["train.py", "--deepspeed_config", "a b.json"], nodes=2, gpus=2, venv="", env={"A": "it's"})
    done = run(tmp_path, PBS().script(job))
    assert done.returncode == 0, done.stderr
    shared = (
        "--nnodes|2|--nproc_per_node|2|--rdzv_id|123.server|--rdzv_backend|c10d|--rdzv_endpoint|n1:20123|--rdzv_conf|"
    )
    end = "train.py|--deepspeed_config|a b.json|it's|WARN|torch-extensions-123.server"
    assert sorted(done.stdout.splitlines()) == [
        f"{shared}is_host=0|--local_addr|n2|{end}",
        f"{shared}is_host=1|--local_addr|n1|{end}",
    ]


def test_one_node_that_fails_ends_the_job_though_another_hangs(tmp_path):
    script = PBS().script(Job(["train.py"], nodes=2, gpus=2, venv="")).replace("LEFT=120", "LEFT=1")
    began = time.monotonic()
    hangs = '[[ $NODE == n1 ]] && exit 7; echo $$ > "$0.pid"; exec sleep 50 > /dev/null 2>&1'
    done = run(tmp_path, script, torchrun=hangs)
    assert done.returncode == 7 and time.monotonic() - began < 40
    os.kill(int((tmp_path / "bin" / "torchrun.pid").read_text()), 9)  # as PBS does with what a job leaves


def test_ranks_that_were_asked_to_save_are_sent_again(tmp_path):
    script = PBS().script(Job(["train.py"], nodes=2, gpus=2, venv=""))
    script = re.sub("^BEFORE=.*", "BEFORE=1", script, flags=re.M)
    done = run(tmp_path, script, torchrun="sleep 3; exit 1", qsub='echo "sent $1"')
    assert done.returncode == 0 and f"sent {tmp_path}/job.pbs" in done.stdout, done.stderr


def test_megatrons_file_reads_the_models_arguments_and_is_torchruns_else(tmp_path):
    (tmp_path / "configs" / "megatron").mkdir(parents=True)
    (tmp_path / "configs" / "megatron" / "llama-3-8b.args").write_text("--num-layers 32\n--swiglu\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("A=$CUDA_DEVICE_MAX_CONNECTIONS\nexport A\n")
    text = MEGATRON.read_text()
    done = run(tmp_path, re.sub("^BEFORE=[0-9]*", "BEFORE=0", text, flags=re.M))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert "-m|blockwise_lr.megatron|Megatron-LM/pretrain_gpt.py|--num-layers|32|--swiglu|--data-path|" in line
        assert line.endswith("--exit-signal-handler|1|WARN|torch-extensions-123.server")
    start = 'cd "$PBS_O_WORKDIR"'
    whole = (ROOT / "examples" / "pbs" / "deepspeed.pbs").read_text()
    assert text.partition(start)[2] == whole.partition(start)[2] != ""
