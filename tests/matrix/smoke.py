"""What is run on each upstream version: a few of the suite's own tests, by the columns of the table.

Each column is a regular expression over test ids; all optimizers and models that match run.
"""

from __future__ import annotations

_PARITY = r"tests/deepspeed_door/test_parity\.py::test_equals_the_unfused_twin\[\w+-\w+"
_CHECK = r"tests/deepspeed_door/test_checkpoint\.py::"
_MEGATRON = r"tests/megatron_door/test_megatron_parity\.py::test_equals_the_single_process_twin\[\w+-(?:gpt|gqa)"
_SAVED = r"tests/megatron_door/test_megatron_checkpoint\.py::"

# package -> column -> its tests
COLUMNS: dict[str, dict[str, str]] = {
    "deepspeed": {
        **{f"ZeRO-{stage}": rf"{_PARITY}-{stage}-2-" for stage in range(4)},
        "resumes": rf"{_CHECK}test_a_resumed_run_goes_on_to_the_bit\[\w+-\w+-[1-3]-2-.*-False\]",
        "other ranks and stage": rf"{_CHECK}test_universal_checkpoints_continue_anywhere\[\w+-\w+-\d-[23]-\d-[23]-",
        "names": r"tests/patching/test_drift\.py::test_an_attribute_of_an_object.*\[deepspeed",
    },
    "megatron-core": {
        "DP": rf"{_MEGATRON}-2-distributed\]",
        "TP=2": rf"{_MEGATRON}-2-tp2\]",
        "PP=2": rf"{_MEGATRON}-2-pp2\]",
        "TP=2 PP=2": rf"{_MEGATRON}-4-tp2\.pp2\]",
        "resumes": rf"{_SAVED}test_the_same_layout_resumes_to_the_bit\[",
        "other TP, PP, DP": rf"{_SAVED}test_another_layout_goes_on_as_the_first\[.*AdamMini",
        "names": r"tests/patching/test_drift\.py::test_an_attribute_of_an_object.*\[megatron",
    },
}
# the versions of the table, and the Python that runs each
VERSIONS: dict[str, dict[str, str]] = {
    "deepspeed": dict.fromkeys(
        [
            *("0.16.9", "0.17.5", "0.17.6"),
            *(f"0.18.{last}" for last in range(4, 10)),
            *(f"0.19.{last}" for last in range(9)),
        ],
        "3.11",
    ),
    "megatron-core": {"0.15.3": "3.11", "0.16.1": "3.11", "0.17.0": "3.12", "0.18.0": "3.12", "0.19.2": "3.12"},
}


def files(package: str) -> list[str]:
    """The test files that a package's columns are in."""
    return sorted({pattern.partition("::")[0].replace("\\", "") for pattern in COLUMNS[package].values()})
