"""The package graph, read from the source: data flows one way, and the frameworks are known to their adapters alone.

Imports inside functions count; those for type checkers alone do not.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "integrations" / "blockwise_lr"
# What each package may import besides itself, lowest first. Modules of the root stand on top, but for those at the bottom.
BOTTOM = ("_version",)
LAYERS = (
    ("blocks",),
    ("plan", "collective"),
    ("rules",),
    ("kernels",),
    ("checkpoint",),
    ("optim",),
    ("schedules", "sequence_length"),
    ("measure",),
    ("tuning",),
    ("planning", "jobs", "reporting"),
    ("patches",),
    ("deepspeed", "megatron", "transformers"),
)
FREE_STANDING = ("patches",)  # imports nothing of the rest
FRAMEWORKS = {
    "deepspeed": ("deepspeed", "patches"),
    "megatron": ("megatron", "patches"),
    "transformers": ("transformers", "inspection", "patches"),  # which builds a model from a config.json
}


def sources():
    """Module name -> its file, patches/ under its installed name."""
    found = {}
    for root, prefix in ((PACKAGE, ("blockwise_lr",)), (ROOT / "patches", ("blockwise_lr", "patches"))):
        for path in sorted(root.rglob("*.py")):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


class Imports(ast.NodeVisitor):
    """The modules that a module imports, by line."""

    def __init__(self, module, is_package):
        self.package = module.split(".") if is_package else module.split(".")[:-1]
        self.found = []

    def visit_If(self, node):
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            for child in node.body:
                self.visit(child)
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node):
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node):
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        # "from . import x" and "from .. import x" name modules, or what the package itself defines
        self.found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]


def imports():
    """(importing module, imported name, where)."""
    found = []
    for module, path in sources().items():
        visitor = Imports(module, path.name == "__init__.py")
        visitor.visit(ast.parse(path.read_text()))
        found += [(module, name, f"{path.relative_to(ROOT)}:{line}") for name, line in visitor.found]
    return found


def part(module):
    """The sub-package that a module of blockwise_lr is in; the module itself at the root; "" for the root package."""
    parts = module.split(".")
    if len(parts) == 1:
        return ""
    if (PACKAGE / parts[1]).is_dir() or parts[1] == "patches" or (PACKAGE / f"{parts[1]}.py").is_file():
        return parts[1]
    return ""  # what blockwise_lr/__init__.py defines


def edges():
    """(importing part, imported part) -> where."""
    found = {}
    for module, name, where in imports():
        if name.partition(".")[0] == "blockwise_lr" and part(module) != part(name):
            found.setdefault((part(module), part(name)), []).append(where)
    return found


def level(name):
    """Where a part stands; the root package and its modules are above all others."""
    if name in BOTTOM:
        return -1
    return next((number for number, layer in enumerate(LAYERS) if name in layer), len(LAYERS))


def test_every_package_has_its_place():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"patches"}
    assert packages == {name for layer in LAYERS for name in layer}


def test_packages_import_only_what_lies_below_them():
    wrong = {pair: where for pair, where in edges().items() if level(pair[0]) <= level(pair[1]) < len(LAYERS)}
    assert not wrong, wrong


def test_packages_do_not_import_the_root():
    wrong = {pair: where for pair, where in edges().items() if level(pair[0]) < len(LAYERS) == level(pair[1])}
    assert not wrong, wrong


def test_root_modules_form_no_circle():
    """They may import each other."""
    below = {}
    for above, under in edges():
        below.setdefault(above, set()).add(under)

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        for under in below.get(name, ()):
            visit(under, [*path, name])

    for name in below:
        visit(name, [])


@pytest.mark.parametrize("name", FREE_STANDING)
def test_free_standing_packages_import_nothing_of_the_rest(name):
    assert not {pair: where for pair, where in edges().items() if pair[0] == name}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_are_imported_by_their_adapters_alone(framework):
    wrong = [
        where
        for module, name, where in imports()
        if name.partition(".")[0] == framework and part(module) not in FRAMEWORKS[framework]
    ]
    assert not wrong


def test_the_reader_of_imports_sees_what_it_should():
    """Relative and lazy imports, and no others than those."""
    visitor = Imports("blockwise_lr.optim.base", False)
    visitor.visit(
        ast.parse(
            "from typing import TYPE_CHECKING\n"
            "from ..rules import options\n"
            "if TYPE_CHECKING:\n    from ..cli import app\nelse:\n    import numpy\n"
            "def act():\n    from .. import __version__\n    import deepspeed.comm as dist\n"
        )
    )
    assert [name for name, _ in visitor.found] == [
        "typing.TYPE_CHECKING",
        "blockwise_lr.rules.options",
        "numpy",
        "blockwise_lr.__version__",
        "deepspeed.comm",
    ]
