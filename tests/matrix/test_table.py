"""The table of upstream versions is that of the committed rows, and the rows are of versions that the package takes."""

import pytest
from matrix.smoke import COLUMNS, VERSIONS
from matrix.table import PAGE, page_with_tables, rows

from blockwise_lr.patches import all_upstreams
from blockwise_lr.patches.symbols import is_in

UPSTREAMS = {upstream.package: upstream for upstream in all_upstreams()}


def test_the_page_shows_the_rows():
    assert PAGE.read_text() == page_with_tables(PAGE.read_text())


@pytest.mark.parametrize("package", COLUMNS)
def test_every_row_passed_and_is_in_the_range(package):
    for row in rows(package):
        assert is_in(row["version"], UPSTREAMS[package].versions)
        for column in COLUMNS[package]:
            cell = row["columns"][column]
            ran = cell["passed"] or cell.get("refused")
            assert ran and not cell["failed"], (row["version"], column, cell)


@pytest.mark.parametrize("package", COLUMNS)
def test_every_version_that_is_to_be_run_is_in_the_range(package):
    assert all(is_in(version, UPSTREAMS[package].versions) for version in VERSIONS[package])
