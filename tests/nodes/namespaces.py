"""Two nodes on this machine: network namespaces with loopbacks and host names of their own, and a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
from ranks import free_port

MARK = "BLOCKWISE_LR_TEST_NODES"  # in the environment of all that runs on the nodes


def why_not() -> str | None:
    """Why there can be none here; None where they can be made."""
    if shutil.which("ip") is None:
        return "ip is not installed (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"bwl-{uuid.uuid4().hex[:8]}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"no network namespaces here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


def logs(folder: Path) -> str:
    """The ends of both nodes' logs."""
    return "\n".join(file.read_text()[-3000:] for file in sorted(folder.glob("node-*.log")))


def wait_for(folder: Path, agents: list[subprocess.Popen], condition: Callable[[], bool], seconds: float = 200) -> None:
    """Waits; an assertion where it takes too long, or an agent ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        states = [agent.poll() for agent in agents]
        assert time.monotonic() < deadline and states == [None, None], f"{states}\n{logs(folder)}"
        time.sleep(0.1)


def end(agents: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """The agents' exit codes; None of one that does not end in time."""
    deadline, codes = time.monotonic() + seconds, []
    for agent in agents:
        try:
            codes.append(agent.wait(max(deadline - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


class Nodes:
    """Nodes 1 and 2."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex[:6]
        self.names = [f"bwl{self.token}n{number}" for number in (1, 2)]
        self.cards = [f"v{self.token}{number}" for number in (1, 2)]
        for name in self.names:
            self._ip("netns", "add", name)
        ends = ("name", self.cards[1], "netns", self.names[1])
        self._ip("link", "add", self.cards[0], "netns", self.names[0], "type", "veth", "peer", *ends)
        for number, (name, card) in enumerate(zip(self.names, self.cards), 1):
            self._ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", card)
            self._ip("-n", name, "link", "set", card, "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def address(self, number: int) -> str:
        """Of a node, in the other's network too."""
        return f"10.77.0.{number}"

    def start(self, number: int, words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
        """Starts a program on a node, whose host name is node-1 or node-2 there."""
        inside = ["unshare", "--uts", "sh", "-c", f'hostname node-{number}; exec "$@"', "sh", *words]
        with log.open("a") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number - 1], *inside],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment, "GLOO_SOCKET_IFNAME": self.cards[number - 1], MARK: self.token},
            )

    def torchrun(
        self, words: list[str], folder: Path, environment: dict[str, str], per_node: int = 1
    ) -> list[subprocess.Popen]:
        """torchrun's agents, one on each node, which log to node-1.log and node-2.log in a folder."""
        port, agents = free_port(), []
        for number in (1, 2):
            meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "x", "--rdzv_endpoint", f"{self.address(1)}:{port}"]
            meeting += ["--rdzv_conf", f"is_host={int(number == 1)}", "--local_addr", self.address(number)]
            start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", str(per_node)]
            given = {**os.environ, "OMP_NUM_THREADS": "1", "START": str(port), **environment}
            agents.append(self.start(number, [*start, *meeting, *words], folder / f"node-{number}.log", given))
        return agents

    def wait_for_ranks(self, folder: Path, seconds: float) -> None:
        """Until all have ended by themselves."""
        deadline = time.monotonic() + seconds
        while self.ranks():
            assert time.monotonic() < deadline, f"a rank hangs\n{logs(folder)}"
            time.sleep(0.2)

    def cut(self) -> None:
        """Pulls the cable out: what is sent is lost, and no connection is closed."""
        self._ip("-n", self.names[0], "link", "set", self.cards[0], "down")

    def mend(self) -> None:
        """And in again."""
        self._ip("-n", self.names[0], "link", "set", self.cards[0], "up")

    def ranks(self) -> int:
        """How many processes that torchrun has started still run."""
        return sum("RANK" in (process.info["environ"] or {}) for process in self._processes())

    def end_all(self) -> None:
        """Ends what still runs on the nodes."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        every = psutil.process_iter(["environ"])
        return [process for process in every if (process.info["environ"] or {}).get(MARK) == self.token]

    def close(self) -> None:
        self.end_all()
        for name in self.names:
            self._ip("netns", "delete", name)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
