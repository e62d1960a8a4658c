"""Compiles the Triton kernel for a GPU that need not be there, and prints what it moves memory and rounds with, as JSON.

Run by test_compiled.py in a process of its own, since the test process has the interpreted kernel; with --full for all
gradients and devices.
"""

import json
import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from blockwise_lr.kernels import triton as kernel
from blockwise_lr.rules import RULES

NUMBERS = {"numbers": "*fp32", "classes": "i32"}
WORK = {"owner": "*i32", "table": "*i64"}
PLACES = {"places": "*i64"}
SIZES = {"BLOCK": kernel.BLOCK, "COLUMNS": kernel.COLUMNS, "FIELDS": kernel.FIELDS, "PLACES": kernel._PLACES}


def memory_instructions(function, types: dict[str, str], capability: int, **constants) -> list[str]:
    """The global loads and stores of the compiled function, and its roundings to bfloat16."""
    constants |= {name: size for name, size in SIZES.items() if name in function.arg_names}
    places = {name: (function.arg_names.index(name),) for name in function.arg_names}
    aligned = {places[name]: [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(
        function,
        types | dict.fromkeys(constants, "constexpr"),
        {places[name]: value for name, value in constants.items()},
        aligned,
    )
    text = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    return sorted(set(re.findall(r"(?:ld|st)\.global[.\w]*|cvt\.rn\.bf16[.\w]*", text)))


def main() -> None:
    found = {}
    targets = ((90, "*bf16"), (80, "*fp16"), (90, "*fp32"))
    for capability, gradient in targets if "--full" in sys.argv else targets[:1]:
        tensors = {"p": "*fp32", "g": gradient, "m": "*fp32", "v": "*fp32", "out": "*bf16"} | WORK | PLACES
        at = f"sm_{capability} {gradient}"
        for rule in RULES.values():
            body = {"BODY": kernel.compiled_body(rule.triton), "COPY": True, "MANY": capability == 90}
            if rule.segment_state is None:
                body["STATES"] = len(rule.states)
                found[f"{at} {rule.name}"] = memory_instructions(
                    kernel._element_step, tensors | NUMBERS, capability, **body
                )
                continue
            body["MOMENT"] = kernel.compiled_body(rule.triton_moment)
            for own in (True, False):
                found[f"{at} {rule.name} {own}"] = memory_instructions(
                    kernel._segment_step, tensors | {"numels": "*fp32"} | NUMBERS, capability, OWN_SUMS=own, **body
                )
        found[f"{at} sums"] = memory_instructions(kernel._sums, {"g": gradient, "sums": "*fp32"} | WORK, capability)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
