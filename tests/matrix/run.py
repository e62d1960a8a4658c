"""Runs the smoke set on upstream versions, each in an overlay over the common environment, and writes the table of them.

``python tests/matrix/run.py`` runs all versions of smoke.py; ``… megatron-core 0.15.3`` one; ``--table`` only writes the table
in README.md from the rows. Versions that another Python needs are left out where it is not named in $PYTHON312.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERES = f"{sys.version_info.major}.{sys.version_info.minor}"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from matrix.smoke import COLUMNS, VERSIONS, files  # noqa: E402
from matrix.table import write_tables  # noqa: E402


def interpreter(python: str) -> str | None:
    """The interpreter of the environment that runs a version; None where there is none."""
    if python == HERES:
        return sys.executable
    return os.environ.get("PYTHON" + python.replace(".", ""))


def overlay(package: str, version: str, python: str) -> Path:
    """A folder with that version alone, installed from the package index where it is not there yet."""
    folder = ROOT / "build" / "matrix" / f"{package}-{version}"
    if not folder.exists():
        part = folder.with_name(folder.name + ".part")
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), f"{package}=={version}"]
        # DeepSpeed's setup.py imports torch, which pip's own build environments do not have
        subprocess.run([*command, "--no-build-isolation"], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
        part.rename(folder)
    return folder


def run(package: str, version: str, rows: Path) -> bool:
    """Runs one version and writes its row; whether all of it passed, or was refused by name."""
    python = interpreter(VERSIONS[package].get(version, HERES))
    if python is None:
        print(f"{package} {version}: left out, for it needs Python {VERSIONS[package][version]} (PYTHON312=...)")
        return True
    folder = overlay(package, version, python)
    path, row = os.pathsep.join([str(folder), str(HERE.parent)]), rows / f"{package}-{version}.json"
    settings = {
        "PYTHONPATH": path,
        "BLOCKWISE_LR_MATRIX": f"{package}={row}",
        "TORCH_EXTENSIONS_DIR": str(ROOT / "build" / "torch_extensions" / folder.name),
    }
    print(f"{package} {version}", flush=True)
    command = [python, "-m", "pytest", "-q", "-p", "matrix.plugin", "--timeout", "600", *files(package)]
    row.unlink(missing_ok=True)
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode in (0, 1)  # 1: tests failed
    return (
        ended
        and row.is_file()
        and not any(found["failed"] for found in json.loads(row.read_text())["columns"].values())
    )


def chosen(package: str | None, versions: list[str]) -> Iterator[tuple[str, str]]:
    """What was asked for; all versions by default."""
    for name in COLUMNS if package is None else [package]:
        yield from ((name, version) for version in (versions or VERSIONS[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", nargs="?", choices=list(COLUMNS))
    parser.add_argument("version", nargs="*")
    parser.add_argument(
        "--rows", type=Path, default=HERE / "rows", help="folder for the rows (default: beside this file)"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, write the table from the rows")
    given = parser.parse_args()
    given.rows.mkdir(parents=True, exist_ok=True)
    passed = given.table or all([run(*pair, given.rows) for pair in chosen(given.package, given.version)])
    if given.rows == HERE / "rows":
        write_tables()
    sys.exit(not passed)


if __name__ == "__main__":
    main()
