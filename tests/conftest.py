"""Makes the helpers in this folder importable, and sets the environment, here and in the rank processes."""

import atexit
import os
import shutil
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.join(HERE, "..", "examples")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# read when PyTorch is imported, here and in what tests start: side by side, threads of several processes on the same cores
# spend twice their time on waiting for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "BLOCKWISE_LR_TEST_REFERENCES" not in os.environ:  # the ranks, which share it, have it from here (references.py)
    os.environ["BLOCKWISE_LR_TEST_REFERENCES"] = tempfile.mkdtemp(prefix="blockwise-lr-references-")
    atexit.register(shutil.rmtree, os.environ["BLOCKWISE_LR_TEST_REFERENCES"], ignore_errors=True)
# in PyTorch's own folder, checkouts and environments would build over each other's extensions
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    os.path.join(os.path.dirname(HERE), "build", "torch_extensions", sys.implementation.cache_tag),
)
if not os.path.exists("/dev/nvidiactl"):  # read when the Triton kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


COLLECTED = pytest.StashKey[set[str]]()  # the ids of all tests found, those left to the full lane included


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the combinations marked full (see README.md)")
    parser.addoption("--support", metavar="FILE", help="write the table of what is supported from what passes")


def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = {item.nodeid for item in items}
    if config.getoption("--full"):
        return
    kept = [item for item in items if not item.get_closest_marker("full")]
    kept = list(_thinned(kept)) if _has_older_megatron() else kept
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


# the layouts that the lane on Python 3.12 runs on megatron-core 0.19
_LAYOUTS = (
    "test_megatron_parity.py",
    "test_megatron_checkpoint.py",
    "test_megatron_muon.py",
    "test_inside_deepspeed.py",
)


def _has_older_megatron():
    if "BLOCKWISE_LR_MATRIX" in os.environ:  # which runs cases of its own choice on every version
        return False
    try:
        return tuple(map(int, version("megatron-core").split(".")[:2])) < (0, 19)
    except PackageNotFoundError:
        return False


def _thinned(items):
    """Of the layouts' tests every third case of each function; all the others."""
    seen = Counter()
    for item in items:
        if item.path.name in _LAYOUTS:
            seen[item.path, item.originalname] += 1
            if seen[item.path, item.originalname] % 3 != 1:
                continue
        yield item


def pytest_sessionfinish(session):
    path = session.config.getoption("--support")
    if path and not hasattr(session.config, "workerinput"):  # pytest-xdist's workers report to the one that writes
        from support import table
        from support_rows import SECTIONS

        reports = session.config.pluginmanager.get_plugin("terminalreporter").stats
        outcomes = {report.nodeid: True for report in reports.get("passed", ()) if report.when == "call"}
        outcomes.update({report.nodeid: False for kind in ("failed", "error") for report in reports.get(kind, ())})
        with open(path, "w") as file:
            file.write(table(SECTIONS, outcomes))


def pytest_terminal_summary(terminalreporter):
    """One line per test function whose cases recorded how far they were from their reference."""
    figures = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "worst" and report.when == "call":
                test, _, case = report.nodeid.rpartition("::")[2].partition("[")
                figures.setdefault(test, {})[case.rstrip("]")] = value
    for test, cases in figures.items():
        worst = max(cases, key=cases.get)
        terminalreporter.line(f"{test}: {len(cases)} cases, worst relative difference {cases[worst]:.1e} ({worst})")
