"""The table of faults names tests that exist, and each kind has one."""

import faults
import pytest
from test_mutants import names_in


@pytest.mark.parametrize("row", faults.ROWS)
def test_tests_of_a_row_exist(row: int) -> None:
    _, tests = faults.ROWS[row]
    for test in tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), test
    assert bool(tests) != (row in faults.GAPS), "a gap is named as one"


def test_all_rows_and_kinds_are_there() -> None:
    assert list(faults.ROWS) == list(range(1, 29))
    assert {kind for kind, tests in faults.marked().items() if not tests} == set()


def test_names_say_their_kind() -> None:
    """In the files of the field, each test has the letter of its kind in its name."""
    for kind, tests in faults.marked().items():
        for test in tests:
            file, _, name = test.partition("::")
            if not file.startswith("test_field_"):
                continue
            inside = [n.partition("::")[2] or n for n in names_in(file) if n == name or n.startswith(f"{name}::")]
            own = [n for n in inside if n.startswith("test_")]
            assert own and all(n.startswith(f"test_{kind.lower()}_") for n in own), test
