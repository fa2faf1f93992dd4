"""Adapters of experts as files: what is replaced and what is not, and the command that converts them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from adapters import adapter_of, assert_same
from helpers import killed_at

from jitmoe import AdapterError
from jitmoe.cli import main
from jitmoe.files import replacing_folder
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.convert import convert, read_adapter
from jitmoe.hf.adapters.files import write
from jitmoe.hf.adapters.formats import FORMATS


@pytest.fixture
def source(tmp_path):
    """Write an adapter in a layout; gives its path."""

    def call(layout, adapter=None):
        write(tmp_path / "source", FORMATS[layout].write(adapter or adapter_of(), Choices()), force=False)
        return tmp_path / "source"

    return call


class TestFiles:
    @pytest.mark.parametrize("layout", FORMATS)
    def test_what_exists_is_replaced_only_when_asked(self, source, tmp_path, layout):
        path, there = source("peft-fused"), tmp_path / "there"
        convert(path, there, layout)
        with pytest.raises(AdapterError, match=r"exists: .* --force"):
            convert(path, there, layout)
        convert(path, there, layout, force=True)
        assert_same(read_adapter(there), adapter_of())
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source", "there"]

    def test_what_is_no_adapter_stays(self, source, tmp_path):
        path, there = source("peft-fused"), tmp_path / "there"
        there.mkdir()
        (there / "thesis.tex").write_text("mine")
        for layout in ("jitmoe", "sglang"):
            with pytest.raises(AdapterError, match=r"is no file|holds thesis\.tex"):
                convert(path, there, layout, force=True)
        assert (there / "thesis.tex").read_text() == "mine"

    def test_in_place(self, source):
        path = source("peft-fused")
        convert(path, path, "ancestor", force=True)
        assert_same(read_adapter(path), adapter_of())

    def test_a_place_that_cannot_be_written(self, source, tmp_path):
        with pytest.raises(AdapterError, match="cannot be written"):
            convert(source("peft-fused"), tmp_path / "nowhere" / "there", "sglang")

    def test_an_error_in_the_middle(self, tmp_path):
        (tmp_path / "it").mkdir()
        (tmp_path / "it" / "old").touch()
        with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "it") as folder:
            (folder / "new").touch()
            raise ZeroDivisionError
        assert [entry.name for entry in tmp_path.rglob("*")] == ["it", "old"]

    def test_killed_at_any_line(self, tmp_path):
        """The old folder or the new one, whole; between two renames the old one waits for the next call."""
        place, seen = tmp_path / "it", set()

        def content(folder: Path) -> list[str]:
            return sorted(entry.name for entry in folder.iterdir())

        def publish() -> None:
            with replacing_folder(place) as folder:
                (folder / "new").touch()
                (folder / "newer").touch()

        for step in range(200):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            (place / "old").touch()
            done = not killed_at(step, publish)
            seen.add("new" if place.exists() and content(place) == ["new", "newer"] else "old")
            if not place.exists():
                seen.add("between")
                assert content(tmp_path / ".it.old") == ["old"]
            else:
                assert content(place) in (["old"], ["new", "newer"])
            publish()
            assert content(tmp_path) == ["it"] and content(place) == ["new", "newer"]
            if done:
                break
        assert done and seen == {"old", "between", "new"}


class TestCommand:
    def test_a_conversion(self, source, tmp_path, capsys):
        path = source("sglang", adapter_of(shared=False))
        assert main(["convert", str(path), str(tmp_path / "there"), "--to", "peft-fused", "--from", "sglang"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("sglang -> peft-fused: 2 layer(s) of 5 experts") and "NOTE: RANK DOUBLED" in out

    def test_a_refusal(self, source, tmp_path, capsys):
        assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "there"), "--to", "jitmoe"]) == 1
        assert "jitmoe: " in capsys.readouterr().err

    def test_an_unknown_layout(self, tmp_path, capsys):
        assert main(["convert", str(tmp_path), str(tmp_path / "there"), "--to", "vLLM"]) == 2

    @pytest.mark.parametrize("option", ["--interleaved", "--concatenated"])
    def test_how_rows_lie(self, source, tmp_path, option):
        path = source("jitmoe", replace(adapter_of(), config={"base_model_name_or_path": "openai/gpt-oss-20b"}))
        arguments = ["convert", str(path), str(tmp_path / "there"), "--to", "peft-fused"]
        assert main(arguments) == 1
        assert main([*arguments, option]) == 0
        found = read_adapter(tmp_path / "there", choices=Choices(interleaved=option == "--interleaved"))
        assert_same(found, adapter_of())
