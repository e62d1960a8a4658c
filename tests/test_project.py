"""The project's own files agree with each other."""

import re
from pathlib import Path

import pytest
from setuptools import find_packages
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"blockwise_lr": ROOT / "integrations" / "blockwise_lr", "blockwise_lr.patches": ROOT / "patches"}
NOT_PYTHON = (".cpp", ".h", ".sbatch", ".pbs", ".html", "py.typed")  # what has to be in the wheel beside the modules


@pytest.fixture
def build(monkeypatch):
    """setuptools' own reading of pyproject.toml: what it would put into a wheel, without building one."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    distribution.include_package_data = False  # what earlier builds have left here (SOURCES.txt) is no promise
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    return command


def wheel_files(build):
    """Files of a wheel, by the path they would have in it."""
    files = {"/".join([*package.split("."), f"{module}.py"]) for package, module, _ in build.find_all_modules()}
    data = {f"{package.replace('.', '/')}/{name}" for package, _, _, names in build.data_files for name in names}
    return files | data


def expected_files():
    """Every module and data file of the source folders, by the path it should have in a wheel."""
    found = set()
    for package, folder in SOURCES.items():
        for path in folder.rglob("*"):
            if path.suffix == ".py" or path.name.endswith(NOT_PYTHON):
                found.add(f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}")
    return found


def test_every_folder_with_an_init_is_packaged(build):
    found = {f"blockwise_lr.{name}" for name in find_packages(str(SOURCES["blockwise_lr"]))}
    assert set(build.packages) == {*SOURCES, *found}


def test_no_folder_of_modules_lacks_an_init():
    """setuptools, and so the check above, would pass over it."""
    folders = {path.parent for folder in SOURCES.values() for path in folder.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by it, for their folders are no packages: the second is an error where one process has both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_the_wheel_holds_every_source_file_and_py_typed(build):
    files = wheel_files(build)
    assert {"blockwise_lr/py.typed", "blockwise_lr/kernels/loops.h", "blockwise_lr/patches/base.py"} <= files
    assert files == expected_files()


def test_a_package_that_is_not_listed_is_missed(build):
    build.packages = [package for package in build.packages if package != "blockwise_lr.kernels"]
    build.data_files = [entry for entry in build.data_files if entry[0] != "blockwise_lr.kernels"]
    missing = expected_files() - wheel_files(build)
    assert missing and all(name.startswith("blockwise_lr/kernels/") for name in missing)


def test_pages_name_only_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / "README.md").read_text()))
    assert named and named <= targets


def test_the_citation_is_of_this_version():
    from blockwise_lr import __version__

    citation = (ROOT / "CITATION.cff").read_text()
    bibtex = (ROOT / "README.md").read_text()
    assert f'version: "{__version__}"' in citation and f"version = {{{__version__}}}" in bibtex
