"""Which compiler is found, what it is told, and what happens when it misbehaves (fault 14)."""

import ctypes
import os
import shutil
import time
from pathlib import Path

import pytest

from jitmoe.errors import BuildError
from jitmoe.isa import ISAS
from jitmoe.jit import toolchain

ANSWER = 'extern "C" int answer() { return 42; }\n'


def compile_text(
    folder: Path, text: str, isa: str = "ref", timeout: float = 60.0, include: Path | None = None
) -> ctypes.CDLL:
    """Compile ``text`` in ``folder`` with the compiler that is found, headers of ``include`` at hand, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    source, output = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(text, encoding="utf-8")
    compiler = toolchain.find_compiler()
    flags = toolchain.flags(isa, compiler.kind)
    toolchain.compile(compiler, source, output, flags, include or folder, timeout, folder / "build.log")
    return ctypes.CDLL(str(output))


def has_ended(pid: int) -> bool:
    """Whether ``pid`` is gone or a zombie; waits for it for some seconds."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


class TestFindCompiler:
    @pytest.fixture
    def programs(self, tmp_path, monkeypatch, fake_compiler):
        """Fake compilers by name; only those in the folder ``bin`` are on PATH, and no variable is set."""
        binaries = tmp_path / "bin"
        binaries.mkdir()
        made = {name: fake_compiler(name=name).path for name in ("chosen", "system", "bin/g++", "bin/clang++")}
        monkeypatch.delenv("JITMOE_CXX")
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(binaries))
        return made

    def test_order(self, programs, monkeypatch):
        monkeypatch.setenv("JITMOE_CXX", str(programs["chosen"]))
        monkeypatch.setenv("CXX", str(programs["system"]))
        assert toolchain.find_compiler().path == programs["chosen"]
        monkeypatch.delenv("JITMOE_CXX")
        assert toolchain.find_compiler().path == programs["system"]
        monkeypatch.delenv("CXX")
        assert toolchain.find_compiler().path == programs["bin/g++"]
        programs["bin/g++"].unlink()
        assert toolchain.find_compiler().path == programs["bin/clang++"]
        programs["bin/clang++"].unlink()
        with pytest.raises(BuildError, match=r"apt install g\+\+; Fedora: dnf install gcc-c\+\+; conda"):
            toolchain.find_compiler()

    @pytest.mark.parametrize("variable", ["JITMOE_CXX", "CXX"])
    def test_a_variable_that_names_nothing_is_an_error(self, programs, monkeypatch, variable):
        monkeypatch.setenv(variable, "/nowhere/g++")
        with pytest.raises(BuildError, match=f"{variable}='/nowhere/g\\+\\+' is not a program"):
            toolchain.find_compiler()

    @pytest.mark.parametrize(
        ("body", "message"),
        [("echo hello", "neither GCC nor clang"), ("exit 3", "exit status 3"), ("exit 0", "said nothing")],
    )
    def test_a_program_that_is_no_compiler(self, programs, monkeypatch, body, message):
        programs["chosen"].write_text(f"#!/bin/sh\n{body}\n")
        monkeypatch.setenv("JITMOE_CXX", str(programs["chosen"]))
        with pytest.raises(BuildError, match=message):
            toolchain.find_compiler()

    def test_identity_follows_an_upgrade(self, programs):
        program = programs["bin/g++"]
        before = toolchain.find_compiler()
        program.write_text(
            "#!/bin/sh\ncase $1 in --version) echo 'g++ 99.1'; echo 'Free Software Foundation';; *) echo x86;; esac\n"
        )
        after = toolchain.find_compiler()
        assert (after.identity, after.kind) == ("g++ 99.1 x86", "gcc")
        assert before.identity != after.identity
        assert str(program.parent) not in before.identity, "a path in the key would make every checkout compile again"


class TestFlags:
    def test_every_instruction_set_names_its_features_one_by_one(self):
        for isa in ISAS:
            for kind in toolchain.KIND_FLAGS:
                flags = toolchain.flags(isa, kind)
                assert "-std=c++20" in flags and "-fopenmp" in flags
                assert not [flag for flag in flags if flag.startswith("-march") or flag == "-ffast-math"]

    def test_the_flags_are_accepted_and_the_exports_visible(self, tmp_path):
        for isa in ISAS:
            assert compile_text(tmp_path / isa, ANSWER, isa).answer() == 42

    def test_two_instances_share_no_variable(self, tmp_path):
        text = 'inline int& runs() { static int n = 0; return n; }\nextern "C" int run() { return ++runs(); }\n'
        first, second = compile_text(tmp_path / "1", text), compile_text(tmp_path / "2", text)
        assert [first.run(), first.run(), second.run()] == [1, 2, 1]

    @pytest.mark.isa("avx512")
    def test_multiply_and_add_round_twice_unless_written_as_fma(self, tmp_path):
        library = compile_text(tmp_path, 'extern "C" double f(double a, double c) { return a * a + c; }\n', "avx512")
        library.f.restype, library.f.argtypes = ctypes.c_double, [ctypes.c_double] * 2
        value = 1.0 + 2.0**-30
        assert library.f(value, -(value * value)) == 0.0


class TestMisbehaviour:
    def test_an_error_in_the_source(self, tmp_path):
        with pytest.raises(BuildError) as caught:
            compile_text(tmp_path, "int a;\nint b = nonsense;\n")
        message = str(caught.value)
        assert "kernel.cpp:2:" in message and "nonsense" in message.splitlines()[0]
        assert f"command: {toolchain.find_compiler().path} -std=c++20" in message
        log = tmp_path / "build.log"
        assert f"log: {log}" in message
        assert "nonsense" in log.read_text() and log.stat().st_mode & 0o777 == 0o600

    def test_exit_status(self, tmp_path, fake_compiler):
        fake_compiler("echo only this >&2; exit 7")
        with pytest.raises(BuildError, match="exit status 7: only this"):
            compile_text(tmp_path / "x", ANSWER)

    def test_killed(self, tmp_path, fake_compiler):
        fake_compiler("kill -9 $$")
        with pytest.raises(BuildError, match="was killed by SIGKILL"):
            compile_text(tmp_path / "x", ANSWER)

    def test_a_hang_ends_with_all_its_children(self, tmp_path, fake_compiler):
        fake_compiler(f"sleep 1000 & echo $! > '{tmp_path}/child'; wait")
        with pytest.raises(BuildError, match=r"did not finish within 0\.5 s and was killed"):
            compile_text(tmp_path / "x", ANSWER, timeout=0.5)
        assert has_ended(int((tmp_path / "child").read_text()))

    def test_a_background_process_that_keeps_the_output_open_holds_nothing_up(self, tmp_path, fake_compiler):
        fake_compiler(f'sleep 1000 & echo $! > \'{tmp_path}/child\'; "$REAL" "$@"')
        try:
            assert compile_text(tmp_path / "x", ANSWER, timeout=60.0).answer() == 42
        finally:
            os.kill(int((tmp_path / "child").read_text()), 9)

    @pytest.mark.parametrize("body", ["exit 0", "echo junk > kernel.so", ": > kernel.so"])
    def test_success_without_a_library(self, tmp_path, fake_compiler, body):
        fake_compiler(body)
        with pytest.raises(BuildError, match="reported success and wrote no shared library"):
            compile_text(tmp_path / "x", ANSWER)

    def test_not_executable_after_all(self, tmp_path, fake_compiler):
        compiler = fake_compiler()
        toolchain.find_compiler()
        found = toolchain.find_compiler()
        compiler.path.unlink()
        with pytest.raises(BuildError, match="could not be started"):
            toolchain.compile(found, tmp_path / "k.cpp", tmp_path / "k.so", (), tmp_path, 5.0, tmp_path / "log")

    def test_spaces_and_letters_beyond_ascii(self, tmp_path, monkeypatch):
        folder = tmp_path / "Kölner Übersetzer 東京 'quoted'"
        folder.mkdir()
        real = toolchain.find_compiler().path
        link = folder / real.name
        link.symlink_to(shutil.which(real) or real)
        monkeypatch.setenv("JITMOE_CXX", str(link))
        assert toolchain.find_compiler().path == link
        assert compile_text(folder / "ä b", ANSWER).answer() == 42
