"""``make dist`` runs this: what was built installs in a bare environment and works there, outside of the checkout.

``python tests/packaging/check.py dist/`` takes the one wheel and the one sdist of that folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

TORCH = "torch==2.13.0"
STEP = """
import torch
from blockwise_lr import BlockwiseAdamMini, BlockwiseAdamW, map_blocks
from blockwise_lr.kernels import kernel_for

for kind in (BlockwiseAdamW, BlockwiseAdamMini):
    found = {}
    for kernel in (KERNEL, "reference"):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(50, 16), "lm_head": torch.nn.Linear(16, 50, bias=False)})
        optimizer = kind(model.named_parameters(), lr=1e-3, block_map=map_blocks(model), kernel=kernel)
        for _ in range(3):
            model["lm_head"](model["wte"](torch.arange(50))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[kernel] = [p.detach() for p in model.parameters()]
    for one, two in zip(found[KERNEL], found["reference"]):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
print(type(kernel_for(torch.device("cpu"))).__name__)
"""
# what a module says where its extra is not installed: package, and what to type
EXTRAS = {
    "import blockwise_lr.deepspeed": ('deepspeed is not installed; pip install "deepspeed',),
    "import blockwise_lr.megatron": ('megatron-core is not installed; pip install "megatron-core',),
}
COMMANDS = {
    ("tune", "--out", "runs", "--seeds", "1", "--", "x.py", "{lr}", "{ratios}"): "blockwise-lr[tune]",
    ("families",): "blockwise-lr[transformers]",
    ("inspect", "config.json"): "blockwise-lr[transformers]",
}


class Bare:
    """A new environment in a folder, and processes of it that see neither the checkout nor what was compiled before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=True)

    def install(self, *what: str) -> None:
        pip = [str(self.bin / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
        subprocess.run(pip, check=True, cwd=self.folder)

    def run(self, *command: str, path: str | None = None, extensions: str = "extensions") -> tuple[int, str]:
        """Exit code and output of a command, with nothing but this environment's and the system's programs on PATH."""
        settings = {
            "PATH": os.pathsep.join([str(self.bin), "/usr/local/bin:/usr/bin:/bin"]) if path is None else path,
            "HOME": str(self.folder),
            "TORCH_EXTENSIONS_DIR": str(self.folder / extensions),
        }
        made = subprocess.run(command, cwd=self.folder, env=settings, capture_output=True, text=True)
        return made.returncode, made.stdout + made.stderr

    def python(self, code: str, **settings: str) -> tuple[int, str]:
        return self.run(str(self.bin / "python"), "-c", code, **settings)


def check(holds: bool, what: str, text: str = "") -> None:
    print("ok  " if holds else "FAIL", what, flush=True)
    if not holds:
        sys.exit(text)


def one(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    check(len(found) == 1, f"one {pattern} in {folder}", f"found {found}; make clean, and build again")
    return found[0].resolve()


def sources(names: list[str]) -> set[str]:
    """The package's files of an archive, without what packagers add."""
    return {name for name in names if name.startswith("blockwise_lr/")}


def check_archives(wheel: Path, sdist: Path) -> None:
    in_wheel = sources(zipfile.ZipFile(wheel).namelist())
    check("blockwise_lr/kernels/loops.h" in in_wheel, "the wheel has the C++ source")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    moved = {name.removeprefix("integrations/") for name in names}
    moved |= {f"blockwise_lr/{name}" for name in names if name.startswith("patches/")}
    check(in_wheel <= moved, "the sdist has every file of the wheel", str(in_wheel - moved))


def check_installed(bare: Bare, version: str) -> None:
    code, text = bare.python("import blockwise_lr; print(blockwise_lr.__version__, blockwise_lr.__file__)")
    check(code == 0 and text.startswith(version) and "site-packages" in text, f"imports as {version}", text)
    metadata = "import importlib.metadata as m; print(m.version('blockwise-lr'))"
    check(bare.python(metadata)[1].strip() == version, "its record has the same version")
    (bare.folder / "model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.ModuleDict({'wte': torch.nn.Embedding(5, 4)})\n"
    )
    code, text = bare.run("blockwise-lr", "inspect", "model:make")
    check(code == 0 and "embedding" in text, "blockwise-lr inspect", text)
    code, text = bare.run("blockwise-lr", "doctor")
    check(code == 0 and "no problems" in text, "blockwise-lr doctor", text)


def check_extras(bare: Bare) -> None:
    (bare.folder / "config.json").write_text('{"model_type": "llama"}')
    for code, words in EXTRAS.items():
        status, text = bare.python(code)
        last = text.strip().splitlines()[-1]
        check(status == 1 and all(word in last for word in words), f"{code}: {last}", text)
    for command, words in COMMANDS.items():
        status, text = bare.run("blockwise-lr", *command)
        check(status == 2 and words in text, f"blockwise-lr {command[0]}: {text.strip()}", text)


def check_steps(bare: Bare) -> None:
    """Without a compiler a step says so once and takes PyTorch's kernel; with one it is the compiled kernel's."""
    auto, compiled = STEP.replace("KERNEL", '"auto"'), STEP.replace("KERNEL", '"cpp"')
    code, text = bare.python(auto, path=str(bare.bin), extensions="none")
    said = re.search(r"blockwise_lr: the C\+\+ kernel could not be built.*install g\+\+ and ninja", text)
    check(code == 0 and said is not None and "ReferenceKernel" in text, "steps without a compiler, and says so", text)
    code, text = bare.python(compiled, path=str(bare.bin), extensions="none")
    last = text.strip().splitlines()[-1]
    check(code == 1 and "g++ and ninja are needed" in last, f'kernel="cpp" without a compiler: {last}', text)
    bare.install("ninja")
    code, text = bare.python(compiled)
    check(code == 0 and "CppKernel" in text, "steps with the kernel that it compiles", text)


def main(folder: Path) -> None:
    wheel, sdist = one(folder, "*.whl"), one(folder, "*.tar.gz")
    check_archives(wheel, sdist)
    with tempfile.TemporaryDirectory() as place:
        bare = Bare(Path(place))
        bare.install(TORCH, str(wheel))
        check_installed(bare, wheel.name.split("-")[1])
        check_extras(bare)
        check_steps(bare)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
