"""Every private name of DeepSpeed or Megatron that the package reads is declared in patches/, where drift is looked for."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "integrations" / "blockwise_lr"
# Python's own and PyTorch's: a read of one that is gone fails by itself, at import or at the first step
LOUD = {
    "_Hash": "hashlib",
    "_actions": "argparse",
    "_get_formatter": "argparse",
    "_expand_help": "argparse",
    "_disable_dynamo": "torch",
    "_get_build_directory": "torch.utils.cpp_extension",
    "_optimizer_load_state_dict_pre_hooks": "torch.optim.Optimizer",
    "_optimizer_load_state_dict_post_hooks": "torch.optim.Optimizer",
    "_fsdp_flattened": "torch's FSDP1 marks; tests/optim/test_fsdp.py wraps a real one",
}


def own_names():
    """What the package defines or sets itself."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "patches").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def read_names(path):
    """(private name, line) that a file reads of an object."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1:
            name = getattr(node.args[1], "value", None)
        else:
            continue
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
            yield name, node.lineno


def declared_names():
    """The last names of all symbols, and the attributes of instances, of everything that patches/ declares."""
    from blockwise_lr.patches import all_instance_patches, all_patches, all_upstreams

    found = {name for upstream in all_upstreams() for attributes in upstream.instances for name in attributes.names}
    declared = [*all_upstreams(), *all_patches(), *all_instance_patches()]
    symbols = [symbol for each in declared for symbol in (*each.symbols, *each.reads)]
    return found | {symbol.path.rpartition(":")[2].rpartition(".")[2] for symbol in symbols}


@pytest.fixture(scope="module")
def undeclared():
    known = own_names() | declared_names() | LOUD.keys()
    return lambda path: [(name, line) for name, line in read_names(path) if name not in known]


def test_what_is_read_of_upstream_is_declared(undeclared):
    found = {str(path.relative_to(ROOT)): undeclared(path) for path in PACKAGE.rglob("*.py")}
    assert not any(found.values()), {path: names for path, names in found.items() if names}


def test_a_read_that_is_not_declared_is_seen(undeclared, tmp_path):
    (tmp_path / "one.py").write_text("engine._no_such_thing\ngetattr(engine, '_nor_this', None)\nself.public\n")
    assert undeclared(tmp_path / "one.py") == [("_no_such_thing", 1), ("_nor_this", 2)]
