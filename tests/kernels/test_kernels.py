"""Every kernel against the reference, over random layouts and cuts, and where numbers stop being ordinary.

The Triton kernel runs in its interpreter where there is no GPU.
"""

import os
import random
import subprocess
import sys

import pytest
import torch
from random_layouts import random_layouts

from blockwise_lr.blocks import BlockType, ParamLayout, Piece
from blockwise_lr.kernels import ReferenceKernel, StepValues, Work, kernel_for
from blockwise_lr.optim import CLASSES
from blockwise_lr.plan.shards import Fragment
from blockwise_lr.plan.step_plan import element_plan, segment_plan, slot_numel
from blockwise_lr.rules import RULES

DEVICES = {"cpp": torch.device("cpu"), "triton": torch.device("cuda" if torch.cuda.is_available() else "cpu")}
REFERENCE = ReferenceKernel()
QK, VO = BlockType.QK, BlockType.VO


@pytest.fixture(scope="module", autouse=True)
def language_patched_once_a_launch():
    """Triton's interpreter patches triton.language at a launch, and to the same effect again at every call of a function in
    it, which is most of its time."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    patch, used = interpreter._patch_lang, {}  # function -> those of the modules that it sees

    def patch_once(function):
        if function not in used:
            seen = function.__globals__.values()
            used[function] = [module for module in (language, language.core) if any(module is value for value in seen)]
        if all(module.static_print is print for module in used[function]):  # as the patch has it
            return interpreter._LangPatchScope()
        return patch(function)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(params=DEVICES)
def kernel(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return kernel_for(DEVICES[request.param], request.param)


def shard(rng):
    """A flat shard of random fragments: (numel, fragments, layouts)."""
    fragments, used, offset = [], [], rng.randint(0, 3)
    for layout in random_layouts(rng):
        start = rng.choice([0, rng.randint(0, layout.numel - 1)])
        numel = rng.choice([layout.numel - start, rng.randint(1, layout.numel - start)])
        fragments.append(Fragment(layout.name, start, numel, offset))
        used.append(layout)
        offset += numel + rng.choice([0, 5])
    return offset, fragments, used


def tensors(numel, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # torch's own pow rounds otherwise at the edges of its threads' shares, so the inputs keep to multiplication
    scale = 2.0 ** torch.randint(-20, 10, (numel,), generator=generator)
    param, grad = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator) * scale
    return (
        param,
        grad.clamp(-6e4, 6e4).to(dtype),
        torch.randn(numel, generator=generator),
        torch.rand(numel, generator=generator),
    )


def values(rule, plan, step=7, **options):
    """Those of a step that every rule moves weights in."""
    group = {**rule.Options().group_defaults(), "betas": (0.9, 0.95), "eps": 1e-8, **options}
    return StepValues(
        tuple(0.01 * (i + 1) for i in range(len(plan.classes))),
        tuple(0.1 * i for i in range(len(plan.classes))),
        rule.scalars(group, step),
    )


def seeds(kernel, count):
    """So many random cases; a few where Triton's interpreter runs them, which is a thousand times slower."""
    return range(count if kernel.name != "triton" or torch.cuda.is_available() else min(count, 3))


def device_of(kernel):
    return DEVICES.get(kernel.name, torch.device("cpu"))


def step(rule, kernel, case, dtype=torch.float32, tweak=None, out=None):
    """One step of a rule by a kernel: the parameter and the states after it."""
    numel, fragments, used = case
    device = device_of(kernel)
    param, grad, *states = tensors(numel, 5, dtype)
    if tweak is not None:
        tweak(grad)
    param, grad, *states = (t.to(device) for t in (param, grad, *states[: len(rule.element_states)]))
    if rule.segment_state is None:
        plan = element_plan(numel, fragments, used)
        kernel.step(rule, [Work(param, grad, states, plan, values(rule, plan), out)])
        return [t.cpu() for t in (param, *states)]
    plan = segment_plan(numel, fragments, used, parts={"plain": 2})
    moments = torch.rand(plan.slots, generator=torch.Generator().manual_seed(6)).to(device)
    work = Work(param, grad, states, plan, values(rule, plan), out, moments)
    kernel.step(rule, [work])
    sums = torch.zeros(plan.slots, device=device)
    kernel.sum_squares(grad, plan.shared, sums)
    slots, sizes = (torch.from_numpy(a).to(device) for a in slot_numel(plan.shared))
    moments[slots] = 0.95 * moments[slots] + 0.05 * sums[slots] / sizes
    kernel.step(rule, [work], presummed=True)
    return [t.cpu() for t in (param, *states, moments)]


def close(found, wanted):
    for name, a, b in zip(("parameter", "first state", "second state"), found, wanted, strict=False):
        assert float((a - b).norm() / b.norm().clamp_min(1e-30)) < 1e-6, name


@pytest.mark.parametrize("unrectified", ["skip", "sgd"])
def test_steps_of_radam_that_are_not_rectified(unrectified, kernel):
    rule, found = RULES["radam"], []
    numel, fragments, used = shard(random.Random(1))
    plan = element_plan(numel, fragments, used)
    for by in (kernel, REFERENCE):
        param, grad, *states = (t.to(device_of(by)) for t in tensors(numel, 5))
        by.step(rule, [Work(param, grad, states, plan, values(rule, plan, 3, unrectified=unrectified))])
        found.append([t.cpu() for t in (param, *states)])
    close(*found)
    assert torch.equal(found[0][0], tensors(numel, 5)[0]) == (unrectified == "skip")


@pytest.fixture(params=[name for name, rule in RULES.items() if not rule.whole_matrices])  # Muon's bodies are AdamW's
def rule(request):
    return RULES[request.param]


@pytest.mark.parametrize("seed", range(25))
def test_random_layouts_and_cuts(rule, kernel, seed):
    case = shard(random.Random(seed))
    close(step(rule, kernel, case), step(rule, REFERENCE, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_read_as_they_are(rule, kernel, dtype):
    for seed in seeds(kernel, 8):
        case = shard(random.Random(seed))
        close(step(rule, kernel, case, dtype), step(rule, REFERENCE, case, dtype))


def rounded(kernel, param):
    """To bfloat16. Triton's interpreter cuts the low bits off; test_compiled.py sees that compiled code rounds."""
    if kernel.name == "triton" and not torch.cuda.is_available():
        param = (param.view(torch.int32) & -65536).view(torch.float32)
    return param.bfloat16()


def test_the_bfloat16_copy_is_the_rounded_parameter_and_changes_nothing_else(rule, kernel):
    for seed in seeds(kernel, 8):
        numel, fragments, _ = case = shard(random.Random(seed))
        out = torch.full((numel,), 7.0, dtype=torch.bfloat16, device=device_of(kernel))
        found = step(rule, kernel, case, out=out)
        assert all(torch.equal(a, b) for a, b in zip(found, step(rule, kernel, case)))
        held = torch.zeros(numel, dtype=torch.bool)
        for fragment in fragments:
            held[fragment.offset : fragment.offset + fragment.numel] = True
        assert torch.equal(out.cpu()[held], rounded(kernel, found[0])[held])
        assert (out.cpu()[~held] == 7).all()


def works(rule, kernel, numbers):
    """A tensor's step for each seed: gradients of several types, memory that does not begin at 16 bytes, copies."""
    device, made = device_of(kernel), []
    for seed in numbers:
        numel, fragments, used = shard(random.Random(seed))
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        param, grad, *states = (t.to(device) for t in tensors(numel, seed, dtype)[: 2 + len(rule.element_states)])
        if seed % 5 == 3:
            param = torch.cat([param[:1], param])[1:]
        out = torch.zeros(numel, dtype=torch.bfloat16, device=device) if seed % 3 == 0 else None
        plan = (element_plan if rule.segment_state is None else segment_plan)(numel, fragments, used)
        moments = None
        if rule.segment_state is not None:
            moments = torch.rand(plan.slots, generator=torch.Generator().manual_seed(seed)).to(device)
        made.append(Work(param, grad, states, plan, values(rule, plan, 7 + seed % 7 // 6), out, moments))
    return made


def test_tensors_that_are_stepped_together_are_stepped_as_each_alone(rule, kernel):
    """In any company, and in other company from step to step."""
    last = 20 if len(seeds(kernel, 20)) == 20 else 7
    for numbers in (range(last), range(last), range(1, last, 2), [4], range(last)):
        together, alone = works(rule, kernel, numbers), works(rule, kernel, numbers)
        kernel.step(rule, together)
        for work in alone:
            REFERENCE.step(rule, [work])
        for a, b in zip(together, alone, strict=True):
            close(
                [t.cpu() for t in (a.param, *a.states, *([] if a.moments is None else [a.moments]))],
                [t.cpu() for t in (b.param, *b.states, *([] if b.moments is None else [b.moments]))],
            )
            if a.out is not None:
                written = (a.out != 0).cpu()
                assert written.any() and torch.equal(a.out.cpu()[written], rounded(kernel, a.param.cpu())[written])


def test_one_launch_steps_all_tensors_of_a_kind(rule, monkeypatch):
    triton = pytest.importorskip("blockwise_lr.kernels.triton", exc_type=ImportError)

    launched = []
    launch = triton.TritonKernel._launch
    monkeypatch.setattr(
        triton.TritonKernel,
        "_launch",
        lambda self, rule, group, *rest: launched.append(len(group)) or launch(self, rule, group, *rest),
    )
    kernel = kernel_for(DEVICES["triton"], "triton")
    kernel.step(rule, works(rule, kernel, [1, 7, 5, 11]))
    assert launched == [4]


def test_tables_are_kept_by_the_rectangles_and_not_by_where_these_lay():
    from blockwise_lr.kernels.triton_tasks import Kept

    kept, cpu = Kept(), torch.device("cpu")
    first, made = element_plan(4, [], []).local, []
    for number in range(3):  # each new plan may lie where the last one was
        other = element_plan(4, [], []).local
        made.append(kept.get([first, other], "elements", cpu, lambda: number))
        assert kept.get([first, other], "elements", cpu, lambda: "made again") == number
        del other
    assert made == [0, 1, 2]
    plans = [element_plan(4, [], []).local for _ in range(20)]
    for other in plans:
        kept.get([first, other], "elements", cpu, object)
    assert len(kept._known[first]) == Kept.most


def spoil(value, every):
    def tweak(grad):
        grad[::every] = value

    return tweak


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42, 3e38])
def test_nan_inf_and_denormals_go_where_torch_lets_them(rule, kernel, value):
    for seed in seeds(kernel, 6):
        case = shard(random.Random(seed))
        found, wanted = (
            step(rule, kernel, case, tweak=spoil(value, 37)),
            step(rule, REFERENCE, case, tweak=spoil(value, 37)),
        )
        for a, b in zip(found, wanted):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        close([a[b.isfinite()].double() for a, b in zip(found, wanted)], [b[b.isfinite()].double() for b in wanted])


def test_results_do_not_depend_on_run_or_threads(rule, kernel):
    scale = 1 if device_of(kernel).type == "cpu" and kernel.name == "triton" else 10  # the interpreter is slow
    rows, width, columns = 60 * scale, 70 * scale, 120 * scale
    layout = ParamLayout("big", (rows, width), (Piece(QK, rows, 5 * scale),))
    wide = ParamLayout(
        "wide", (40 * scale, columns), (Piece(QK, 80 * scale, 10 * scale), Piece(VO, 40 * scale, 1)), transposed=True
    )
    first, second = layout.numel - 100, wide.numel - 30
    case = (first + second, [Fragment("big", 100, first, 0), Fragment("wide", 0, second, first)], [layout, wide])
    threads, runs = torch.get_num_threads(), []
    for count in (1, 2, 3, 2):
        torch.set_num_threads(count)
        runs.append(step(rule, kernel, case))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
    close(runs[0], step(rule, REFERENCE, case))


def test_many_tiles_and_several_steps_of_a_real_optimizer():
    from twins import make

    from blockwise_lr import map_blocks

    for kind in CLASSES.values():
        results = []
        for kernel in ("reference", "auto"):
            model = make("gpt2")
            optimizer = kind(model.named_parameters(), lr=1e-2, block_map=map_blocks(model), kernel=kernel)
            for number in range(8):
                generator = torch.Generator().manual_seed(number)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-6


def test_optimizers_write_bfloat16_copies_for_those_who_ask():
    from twins import make

    from blockwise_lr import map_blocks

    for kind in CLASSES.values():
        for kernel in ("reference", "auto"):
            model = make("gpt2")
            optimizer = kind(model.named_parameters(), lr=1e-2, block_map=map_blocks(model), kernel=kernel)
            copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in model.parameters()}
            optimizer.write_copies(copies)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            assert all(torch.equal(copy, p.detach().bfloat16()) for p, copy in copies.items())
            some = next(iter(copies))
            with pytest.raises(ValueError, match="must be a bfloat16 tensor"):
                optimizer.write_copies({some: some.detach().half()})
            with pytest.raises(ValueError, match="not in this optimizer's param groups"):
                optimizer.write_copies({some.detach().clone(): copies[some]})


def test_without_a_compiler_it_warns_once_and_goes_on(tmp_path):
    script = (
        "import logging, torch; logging.basicConfig(); from blockwise_lr.kernels import kernel_for\n"
        "print([kernel_for(torch.device('cpu')).name for _ in range(3)])"
    )
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['reference', 'reference', 'reference']", done.stderr
    assert done.stderr.count("the C++ kernel could not be built") == 1


def test_a_rule_without_compiled_bodies_is_stepped_by_the_reference(kernel):
    class Plain(type(RULES["lion"])):  # unnamed: no rule of its own
        cpp = triton = None

    for seed in range(3):
        case = shard(random.Random(seed))
        for found, wanted in zip(step(Plain(), kernel, case), step(RULES["lion"], REFERENCE, case), strict=True):
            assert torch.equal(found, wanted)


def test_a_rule_has_a_name_of_its_own():
    with pytest.raises(ValueError, match="the update rule Other is named 'lion', as Lion is; rename it"):
        type("Other", (type(RULES["lion"]),), {"name": "lion"})


@pytest.mark.parametrize("device", ["xpu", "hpu"])
def test_other_devices_take_the_reference(device):
    assert kernel_for(torch.device(device)).name == "reference"
    for name in ("cpp", "triton"):
        with pytest.raises(
            ValueError, match=f"the kernel '{name}' is not usable on {device} here: .*; use kernel=\"auto\""
        ):
            kernel_for(torch.device(device), name)
