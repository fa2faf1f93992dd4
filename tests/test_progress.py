"""Progress on stderr: ten lines, or a bar on a terminal."""

import sys

import pytest
from test_cli import on_a_terminal

from jitmoe.progress import track


def lines_of(total: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert list(track(range(total), total, "step", str)) == list(range(total))
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    return err.splitlines()


@pytest.mark.parametrize("total", [0, 1, 3, 10, 11, 99, 1000])
def test_a_line_for_each_tenth(total: int, capsys) -> None:
    lines = lines_of(total, capsys)
    assert len(lines) == min(total, 10)
    assert not lines or lines[-1] == f"jitmoe: step {total}/{total} {total - 1}"


def test_a_loop_inside_another_is_silent(capsys) -> None:
    for _ in track(range(2), 2, "outer"):
        capsys.readouterr()
        assert lines_of(5, capsys) == []
    assert capsys.readouterr().err == "jitmoe: outer 2/2\n"


def test_a_loop_that_fails_hides_no_later_one(capsys) -> None:
    with pytest.raises(ZeroDivisionError):
        list(track((1 // n for n in (1, 0)), 2, "step"))
    capsys.readouterr()
    assert len(lines_of(5, capsys)) == 5


def test_a_process_without_stderr_still_works(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track(range(3), 3, "step")) == [0, 1, 2]


def test_a_bar_on_a_terminal_is_gone_afterwards() -> None:
    program = (
        "from jitmoe.progress import track\n"
        "for outer in track(range(2), 2, 'outer', lambda n: f'[b]{n}'):\n"
        "    for inner in track(range(25), 25, 'inner'): pass\n"
        "print('end')"
    )
    shown = on_a_terminal([sys.executable, "-c", program])
    assert "[b]1" in shown and "25/25" in shown and "jitmoe:" not in shown
    left = shown.rpartition("\x1b[2K")[2]
    assert left.endswith("end\r\n") and left.count("\n") == 1, "the bar has left a line"
