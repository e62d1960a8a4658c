"""The table of what is supported says what the suite's tests show, no more and no less."""

import pytest
from conftest import COLLECTED
from support import FILE, REFUSED, TESTED, counts, table, verdict
from support_rows import SECTIONS


@pytest.fixture
def collected(request):
    """The tests of the suite, where all of it was collected."""
    ids = request.config.stash[COLLECTED]
    folders = {test.split("/")[1] for test in ids if test.count("/") > 1}
    if not {"deepspeed_door", "megatron_door", "optim", "hugging_face", "fuzz"} <= folders or len(ids) < 700:
        pytest.skip("needs a run of the whole suite")
    return ids


def test_the_table_is_that_of_a_run_in_which_all_tests_pass(collected):
    """So a cell whose tests were renamed or taken out, and one that the file claims beyond them, fails here; and a test that
    fails, fails the run."""
    assert FILE.read_text() == table(SECTIONS, dict.fromkeys(collected, True))


def test_verdicts():
    ran = {"tests/a.py::test_x[BlockwiseAdamW-1]": True, "tests/a.py::test_y": False}
    assert verdict("tests/a.py::test_x", ran) == TESTED and verdict("!tests/a.py::test_x", ran) == REFUSED
    assert verdict("tests/a.py::test_y", ran) == verdict("tests/b.py", ran) == verdict("", ran) == "untested"


def test_the_readme_sums_it_up(collected):
    found = counts(SECTIONS, dict.fromkeys(collected, True))
    readme = (FILE.parents[2] / "README.md").read_text()
    assert f"{found[TESTED]} cells tested, {found[REFUSED]} refused, {found['untested']} untested" in readme
