"""The project's own files agree with each other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_listed_for_installation():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(blockwise_lr[\w.]*)",\n', text))
    source = ROOT / "integrations"
    found = {".".join(init.parent.relative_to(source).parts) for init in source.rglob("__init__.py")}
    assert listed == found | {"blockwise_lr.patches"}


def test_the_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([\w-]+)`", (ROOT / "README.md").read_text()))
    assert named and named <= targets
