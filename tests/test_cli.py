"""The command line: what it prints, and its exit status."""

import json
import os
import pty
import subprocess
import sys
from typing import get_args

import pytest
from helpers import run_python

from jitmoe import settings
from jitmoe.cli import doctor, main
from jitmoe.isa import ISAS, IsaChoice
from jitmoe.jit import capability, location
from jitmoe.jit.render import Instance, render
from jitmoe.plan.shapes import Shape

SIZES = ["--num-experts", "4", "--hidden-size", "64", "--intermediate-size", "32", "--top-k", "2", "--isa", "ref"]


@pytest.fixture
def run(capsys, cold_cache, monkeypatch):
    """Run the command in this process; gives (exit status, stdout, stderr)."""
    monkeypatch.delenv("JITMOE_ISA", raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def quick_kernels(monkeypatch):
    """Instances that compile in no time."""

    def tiny(shape: Shape) -> Instance:
        return Instance(shape, f'extern "C" int m_step() {{ return {shape.m_step}; }}\n')

    monkeypatch.setattr("jitmoe.jit.render.render", tiny)


CACHE = ["cache", "cache path", "cache list", "cache clear", "cache export", "cache import"]
CONVERT = ["convert", "convert-weights"]
COMMANDS = ["", "doctor", "build", "show", "bench", "estimate", "replay", "check", *CONVERT, "train", *CACHE]


class TestHelp:
    @pytest.mark.parametrize("option", ["--help", "-h"])
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help_everywhere(self, run, command, option):
        status, out, err = run(*command.split(), option)
        assert (status, err) == (0, "")
        assert out.split()[: 2 + len(command.split())] == ["Usage:", "jitmoe", *command.split()]
        assert "…" not in out, "a text is cut off"

    def test_doctor_help_lists_every_variable(self, run):
        out = run("doctor", "--help")[1]
        for setting in settings.SETTINGS.values():
            assert setting.variable in out

    @pytest.mark.parametrize(
        "wrong",
        ["", "cache", "nonsense", "build --frob", "build --hidden-size wide", "build --isa sse9", "replay",
         "check --mode guess", "bench --phases --memory", "bench --sweep tokens --targets", "bench --repeat"],
    )  # fmt: skip
    def test_wrong_usage_is_status_2(self, run, wrong):
        status, out, err = run(*wrong.split())
        assert (status, out) == (2, "") and "─ Error ─" in err and "Traceback" not in err

    def test_as_a_module(self):
        result = subprocess.run([sys.executable, "-m", "jitmoe", "--version"], capture_output=True, text=True)
        assert (result.returncode, result.stdout.split()[0]) == (0, "jitmoe")

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_a_script_for_completion(self, run, monkeypatch, shell):
        monkeypatch.setenv("_JITMOE_COMPLETE", f"source_{shell}")
        status, out, _ = run()
        assert status == 0 and f"_JITMOE_COMPLETE=complete_{shell}" in out

    def test_choices_are_those_of_the_config(self):
        assert get_args(IsaChoice) == ("auto", *ISAS)

    @pytest.mark.parametrize(
        "arguments", ["--help", "cache list", "estimate --isa ref --tokens 8 --num-experts 4 --top-k 2 "
                      "--hidden-size 64 --intermediate-size 32"]
    )  # fmt: skip
    def test_what_needs_no_torch_does_not_load_it(self, arguments, cold_cache):
        program = "import sys; from jitmoe.cli import main; status = main({}); print(status, 'torch' in sys.modules)"
        assert run_python(program.format(arguments.split())).splitlines()[-1] == "0 False"


class TestOutput:
    def test_a_reader_that_goes_away(self, cold_cache):
        """As `jitmoe show ... | true`: no traceback, and nothing more when Python ends."""
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "jitmoe", "cache", "list"]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=buffered, timeout=60)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_a_name_that_the_terminal_cannot_show(self, tmp_path):
        place = tmp_path / "größe"
        environment = {**os.environ, "JITMOE_CACHE_DIR": str(place), "PYTHONIOENCODING": "ascii"}
        found = {
            action: subprocess.run(
                [sys.executable, "-m", "jitmoe", "cache", action], env=environment, capture_output=True, timeout=60
            )
            for action in ("list", "path")
        }
        assert found["list"].stdout == f"no kernels in {tmp_path}/gr\\xf6\\xdfe\n".encode()
        assert found["path"].stdout == os.fsencode(place) + b"\n", "a script gets the bytes as they are"
        assert not any(done.returncode or done.stderr for done in found.values())

    def test_a_table_on_a_terminal(self, cold_cache):
        shown = on_a_terminal([sys.executable, "-m", "jitmoe", "doctor"])
        assert str(cold_cache)[:20] in shown and "compiler" in shown and "Traceback" not in shown


def on_a_terminal(command: list[str]) -> str:
    """What ``command`` shows on a terminal, control sequences included."""
    shown = b""
    ours, its = pty.openpty()
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(its)
        # Linux ends the reading with an error when the last writer has closed the terminal.
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


class TestDoctor:
    def test_a_healthy_machine(self, run, cold_cache):
        status, out, err = run("doctor")
        assert (status, err) == (0, "")
        rows = {line.split()[0]: line for line in out.splitlines() if line}
        assert {"torch", "numba", "cpu", "isa", "threads", "cache", "compiler", "kernel", "layer"} <= set(rows)
        for found in capability.capabilities():
            assert rows[found.isa].split()[1] == ("yes" if found.usable else "no")
            assert found.reason in rows[found.isa]
        assert f"{cold_cache}, writable, 0 kernels" in rows["cache"]
        assert out.endswith("everything that jitmoe needs is here\n")

    def test_no_compiler(self, run, monkeypatch, tmp_path):
        for variable in ("JITMOE_CXX", "CXX"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        status, out, err = run("doctor")
        assert status == 1
        assert "apt install g++" in err and "1 problem(s)" in out

    def test_as_json(self, run, monkeypatch, tmp_path):
        monkeypatch.setenv("JITMOE_CXX", str(tmp_path / "none"))
        status, out, err = run("doctor", "--json")
        report = json.loads(out)
        assert (status, err) == (1, "")
        assert {"jitmoe", "torch", "cpu", "isa", "threads", "cache", "compiler", *ISAS} <= set(report["facts"])
        assert ["not a program that can be run" in problem for problem in report["problems"]] == [True]

    def test_a_compiler_that_cannot_compile(self, run, fake_compiler):
        fake_compiler("echo \"k.cpp:1: fatal error: 'omp.h' file not found\"; exit 1")
        status, _, err = run("doctor")
        assert status == 1 and "'omp.h' file not found" in err

    def test_an_instruction_set_that_cannot_be_used(self, run, monkeypatch):
        monkeypatch.setenv("JITMOE_ISA", "sse9")
        status, _, err = run("doctor")
        assert status == 1 and "JITMOE_ISA: unknown instruction set 'sse9'" in err

    def test_a_cache_that_others_can_write_to(self, run, cold_cache):
        cold_cache.mkdir()
        cold_cache.chmod(0o777)
        status, _, err = run("doctor")
        assert status == 1 and "chmod go-w" in err

    @pytest.mark.filterwarnings("ignore:kernels cannot be kept:RuntimeWarning")
    def test_a_cache_that_cannot_be_used(self, run, cold_cache):
        cold_cache.write_text("")
        status, out, err = run("doctor")
        assert status == 1 and "set JITMOE_CACHE_DIR" in err and "not usable" in out

    def test_a_missing_package(self, run, monkeypatch):
        installed = doctor._version
        monkeypatch.setattr(doctor, "_version", lambda name: doctor.MISSING if name == "torch" else installed(name))
        status, _, err = run("doctor")
        assert status == 1 and "pip install torch" in err


class TestBuildAndShow:
    def test_build_then_cached(self, run, quick_kernels):
        status, out, _ = run("build", *SIZES)
        assert status == 0
        assert [line.split()[1:4] for line in out.splitlines()[1:]] == [
            ["ref", "4", "compiled"],
            ["ref", "14", "compiled"],
        ]
        out = run("build", *SIZES, "--m-step", "14")[1]
        assert [line.split()[1:4] for line in out.splitlines()[1:]] == [["ref", "14", "cached"]]

    def test_a_compile_error_is_a_message(self, run, fake_compiler, quick_kernels):
        fake_compiler("echo 'error: it is broken'; exit 1")
        status, _, err = run("build", *SIZES)
        assert status == 1
        assert "jitmoe: the compiler failed with exit status 1: error: it is broken" in err
        assert "Traceback" not in err

    def test_show_prints_plan_key_and_text(self, run):
        status, out, _ = run("show", *SIZES, "--lora-dtype", "bfloat16", "--m-step", "4")
        assert status == 0
        shape = Shape("ref", 64, 32, 32, 4, True)
        assert render(shape).text in out
        assert shape.name in out and str(shape) in out
        key = next(line.split()[1] for line in out.splitlines() if line.startswith("key"))
        assert len(key) == 64

    def test_options_override_the_file(self, run, tmp_path):
        path = tmp_path / "model.json"
        fields = {"num_experts": 8, "hidden_size": 128, "intermediate_size": 96, "top_k": 2, "lora_rank": 0}
        path.write_text(json.dumps(fields | {"isa": "ref"}))
        assert "ref_h128_i96_r0_m4_f32" in run("show", "--config", str(path))[1]
        assert "ref_h64_i96_r0_m4_f32" in run("show", "--config", str(path), "--hidden-size", "64")[1]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "cannot be read"),
            ("[1]", "must hold a JSON object"),
            ('{"hiden_size": 1}', "unknown fields hiden_size; known: activation"),
            (
                '{"hidden_size": -1, "num_experts": 1, "intermediate_size": 1, "top_k": 1}',
                "hidden_size must be between",
            ),
            ("{}", "lacks num_experts, hidden_size, intermediate_size, top_k: give --num-experts"),
        ],
    )
    def test_a_bad_config_file(self, run, tmp_path, content, message):
        path = tmp_path / "model.json"
        path.write_text(content)
        status, _, err = run("build", "--config", str(path))
        assert status == 1 and message in err

    def test_a_missing_config_file(self, run):
        status, _, err = run("show", "--config", "/nowhere.json")
        assert status == 1 and "/nowhere.json cannot be read" in err


class TestCache:
    def test_path_list_clear(self, run, cold_cache, quick_kernels):
        assert run("cache", "path") == (0, f"{cold_cache}\n", "")
        assert run("cache", "list")[:2] == (0, f"no kernels in {cold_cache}\n")
        run("build", *SIZES)
        lines = run("cache", "list")[1].splitlines()
        assert [line.split()[:2] for line in lines[1:]] == [
            ["ref_h64_i32_r32_m14_f32", "intact"],
            ["ref_h64_i32_r32_m4_f32", "intact"],
        ]
        location.open_place().entries()[0].directory.joinpath("kernel.so").unlink()
        assert run("cache", "list")[1].splitlines()[1].split()[1] == "damaged"
        assert run("cache", "clear") == (0, f"removed 2 kernels from {cold_cache}\n", "")
        assert run("cache", "list")[1] == f"no kernels in {cold_cache}\n"

    def test_a_hostile_directory_is_a_message(self, run, cold_cache):
        cold_cache.mkdir()
        cold_cache.chmod(0o777)
        status, _, err = run("cache", "list")
        assert status == 1 and err.startswith("jitmoe: kernel cache") and "Traceback" not in err
