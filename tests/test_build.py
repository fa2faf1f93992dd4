"""The kernel cache: one compilation per key, and nothing loaded that was not checked (faults 14 to 19)."""

import ctypes
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jitmoe.config import MoEConfig
from jitmoe.errors import BuildError, CacheSecurityError
from jitmoe.jit import abi, build, cache, location, render, toolchain, warm
from jitmoe.jit.render import Instance
from jitmoe.plan.shapes import Shape

pytestmark = pytest.mark.usefixtures("cold_cache", "tiny_templates")


def instance(answer: int = 42, isa: str = "ref") -> Instance:
    """A kernel that compiles in no time and can say who it is."""
    shape = Shape(isa, hidden=answer, intermediate=8, padded_rank=0, m_step=4, lora_bf16=False)
    return Instance(shape, f'#include "tiny.hpp"\nextern "C" int answer() {{ return {answer} + ZERO; }}\n')


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def key_of(made: Instance) -> str:
    return build.instance_key(made, toolchain.find_compiler(), build.template_headers())


def names(root: Path, *suffixes: str) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.suffix in suffixes)


@pytest.fixture
def tiny_templates(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "tiny-templates"
    folder.mkdir()
    (folder / "tiny.hpp").write_text("#define ZERO 0\n")
    (folder / "instance.cpp.in").write_text("// $name\n")
    with render.templates_from(folder):
        yield folder


class TestBuild:
    def test_the_second_call_compiles_nothing(self, fake_compiler, cold_cache):
        compiler = fake_compiler()
        wanted = [instance(1), instance(2)]
        first = build.build_instances(wanted)
        second = build.build_instances(wanted)
        assert compiler.runs == 2
        assert [report.status for report in first] == ["compiled"] * 2
        assert [report.status for report in second] == ["cached"] * 2
        assert [replace(report, status="", seconds=0) for report in first] == [
            replace(report, status="", seconds=0) for report in second
        ]
        assert [answer_of(report.path) for report in second] == [1, 2]
        assert build.ensure(wanted[0]) == first[0].path
        assert all(report.path.is_relative_to(cold_cache) and len(report.key) == 64 for report in first)

    def test_source_log_and_metadata_stay_beside_the_library(self):
        folder = build.ensure(instance()).parent
        assert {path.name for path in folder.iterdir()} == {"kernel.so", "kernel.cpp", "build.log", "meta.json"}
        assert (folder / "kernel.cpp").read_text() == instance().text
        assert "-std=c++20" in (folder / "build.log").read_text()

    def test_the_same_kernel_asked_for_twice_at_once(self, fake_compiler):
        compiler = fake_compiler()
        reports = build.build_instances([instance(), instance(), instance()])
        assert compiler.runs == 1
        assert sorted(report.status for report in reports) == ["cached", "cached", "compiled"]

    def test_configs_become_a_report_without_duplicates(self, capfd):
        config = MoEConfig(num_experts=4, hidden_size=64, intermediate_size=32, top_k=2, isa="ref")
        forced = replace(config, m_step=4)
        report = warm.build([config, forced])
        assert [(kernel.isa, kernel.m_step) for kernel in report.kernels] == [("ref", 4), ("ref", 14)]
        lines = str(report).splitlines()
        assert lines[0].split() == ["kernel", "isa", "M_STEP", "status", "seconds", "library"]
        assert [line.split()[:3] for line in lines[1:]] == [
            ["ref_h64_i32_r32_m4_f32", "ref", "4"],
            ["ref_h64_i32_r32_m14_f32", "ref", "14"],
        ]
        assert warm.build(forced, progress=False).kernels[0].key == report.kernels[0].key
        said = capfd.readouterr().err.splitlines()
        assert len(said) == 2 and said[-1].startswith("jitmoe: kernel 2/2 ref_h64_i32_r32_m")

    def test_nothing_to_build(self):
        assert warm.build([]).kernels == ()


class TestKey:
    def test_everything_that_makes_the_code_changes_the_key(self, tiny_templates, monkeypatch):
        keys = [key_of(instance())]
        keys.append(key_of(replace(instance(), text=instance().text + "//\n")))
        (tiny_templates / "tiny.hpp").write_text("#define ZERO  0\n")
        keys.append(key_of(instance()))
        (tiny_templates / "other.hpp").write_text("")
        keys.append(key_of(instance()))
        (tiny_templates / "other.hpp").rename(tiny_templates / "another.hpp")
        keys.append(key_of(instance()))
        monkeypatch.setattr(toolchain, "COMMON_FLAGS", (*toolchain.COMMON_FLAGS, "-g"))
        keys.append(key_of(instance()))
        monkeypatch.setattr(abi, "ABI_VERSION", 999)
        keys.append(key_of(instance()))
        compiler = replace(toolchain.find_compiler(), identity="g++ 99")
        keys.append(build.instance_key(instance(), compiler, build.template_headers()))
        keys.append(key_of(instance(isa="avx512")))
        assert len(set(keys)) == len(keys)

    def test_no_path_is_in_the_key(self, tiny_templates, tmp_path, monkeypatch):
        before = key_of(instance())
        moved = tiny_templates.rename(tmp_path / "moved")
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(tmp_path / "elsewhere"))
        compiler = replace(toolchain.find_compiler(), path=Path("/elsewhere/g++"))
        with render.templates_from(moved):
            assert build.instance_key(instance(), compiler, build.template_headers()) == before

    def test_parts_do_not_run_into_each_other(self):
        compiler = toolchain.find_compiler()
        one = build.instance_key(instance(), compiler, (("a.hpp", b"bc"),))
        assert build.instance_key(instance(), compiler, (("a.hppb", b"c"),)) != one

    def test_a_changed_template_is_compiled_again(self, tiny_templates):
        assert answer_of(build.ensure(instance())) == 42
        (tiny_templates / "tiny.hpp").write_text("#define ZERO 1\n")
        assert answer_of(build.ensure(instance())) == 43

    def test_what_is_hashed_is_what_is_compiled(self, tiny_templates, monkeypatch):
        headers = build.template_headers()
        monkeypatch.setattr(build, "template_headers", lambda: headers)
        (tiny_templates / "tiny.hpp").write_text("#define ZERO 1\n")
        assert answer_of(build.ensure(instance())) == 42


class TestCompilerTrouble:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("echo 'kernel.cpp:1: error: broken'; exit 1", "exit status 1: kernel.cpp:1: error: broken"),
            ("kill -9 $$", "killed by SIGKILL"),
            ("sleep 1000", "did not finish within 0.5 s"),
            ("echo junk > kernel.so; exit 1", "exit status 1"),
        ],
    )
    def test_it_leaves_only_the_log_and_the_next_try_works(self, fake_compiler, cold_cache, monkeypatch, body, message):
        fake_compiler(body)
        monkeypatch.setenv("JITMOE_COMPILE_TIMEOUT", "0.5")
        with pytest.raises(BuildError, match=message) as caught:
            build.ensure(instance())
        log = location.open_place().writable().log_path(key_of(instance()))
        assert f"log: {log}" in str(caught.value) and log.is_file()
        assert [path for path in cold_cache.iterdir() if path.suffix not in (".lock", ".log")] == []
        fake_compiler()
        monkeypatch.delenv("JITMOE_COMPILE_TIMEOUT")
        assert answer_of(build.ensure(instance())) == 42
        assert not log.exists()

    def test_a_failed_kernel_does_not_take_the_others_with_it(self, cold_cache):
        broken = replace(instance(), text="nonsense")
        with pytest.raises(BuildError, match="nonsense"):
            build.build_instances([instance(1), broken])
        assert answer_of(build.ensure(instance(1))) == 1

    def test_disk_full(self, cold_cache, monkeypatch):
        def full(path: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with monkeypatch.context() as patch:
            patch.setattr(cache, "_sync", full)
            with pytest.raises(BuildError, match=r"cannot store the kernel ref_h42.*No space left.*JITMOE_CACHE_DIR"):
                build.ensure(instance())
        assert [path for path in cold_cache.iterdir() if path.suffix != ".lock"] == []
        assert answer_of(build.ensure(instance())) == 42

    def test_a_lock_that_is_never_released(self):
        store = location.open_place().writable()
        with (
            store.lock("0" * 64, 1.0),
            pytest.raises(BuildError, match=r"held .*0\.lock for 0\.1 s"),
            store.lock("0" * 64, 0.1),
        ):
            pytest.fail("two holders of one lock")


class TestManyProcesses:
    def test_a_cold_start_compiles_each_kernel_once(self, fake_compiler):
        # Slow, and with junk in the output file for a while: a reader that does not wait would see it.
        compiler = fake_compiler('echo junk > kernel.so; sleep 0.3; exec "$REAL" "$@"')
        fork = multiprocessing.get_context("fork")
        start, answers = fork.Barrier(5), fork.SimpleQueue()

        def use_both() -> None:
            start.wait(30)
            for report in build.build_instances([instance(1), instance(2)]):
                answers.put((report.status, answer_of(report.path)))

        children = [fork.Process(target=use_both) for _ in range(5)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0] * 5
        assert compiler.runs == 2
        said = sorted(answers.get() for _ in range(10))
        assert said == sorted([("cached", 1), ("cached", 2)] * 4 + [("compiled", 1), ("compiled", 2)])

    def test_killed_at_every_step_of_publishing(self, cold_cache):
        store = location.open_place().writable()
        key = key_of(instance())
        for step in range(100):
            store.clear()
            if not killed_at(step, lambda: build.ensure(instance())):
                break
            entry = cold_cache / key[: cache.PREFIX_DIGITS]
            assert not entry.exists() or answer_of(store.find(key)) == 42, "a reader would see half an entry"
            # No lock is left, and whatever lies there does not disturb the next try.
            assert answer_of(build.ensure(instance())) == 42
            assert names(cold_cache, ".tmp", ".log") == []
        assert 10 < step < 99, "the loop must have gone through every step and come to an end"


DISK_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "subprocess.Popen"}
"""What the interpreter announces before it does it; the writer's steps are a subset."""


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a forked child that gets SIGKILL before its ``step``-th use of the disk; whether it did."""
    child = os.fork()
    if child == 0:
        remaining = [step]

        def kill_at_zero(event: str, _: object) -> None:
            if event in DISK_EVENTS:
                remaining[0] -= 1
                if remaining[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_zero)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def flip_one_bit(entry: Path) -> None:
    data = bytearray((entry / "kernel.so").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "kernel.so").write_bytes(data)


def truncate(entry: Path) -> None:
    os.truncate(entry / "kernel.so", (entry / "kernel.so").stat().st_size // 2)


def put_another_kernel(entry: Path) -> None:
    (entry / "kernel.so").write_bytes(build.ensure(instance(7)).read_bytes())


def put_another_entry(entry: Path) -> None:
    other = build.ensure(instance(7)).parent
    cache._remove(entry)
    other.rename(entry)


def link_library_elsewhere(entry: Path) -> None:
    elsewhere = entry.parent.parent / "elsewhere.so"
    (entry / "kernel.so").rename(elsewhere)
    (entry / "kernel.so").symlink_to(elsewhere)


def link_entry_elsewhere(entry: Path) -> None:
    elsewhere = entry.parent.parent / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)


class TestDamage:
    @pytest.mark.parametrize(
        "damage",
        [
            flip_one_bit,
            truncate,
            put_another_kernel,
            put_another_entry,
            link_library_elsewhere,
            link_entry_elsewhere,
            pytest.param(lambda entry: (entry / "kernel.so").write_bytes(b""), id="empty"),
            pytest.param(lambda entry: (entry / "kernel.so").unlink(), id="missing"),
            pytest.param(lambda entry: (entry / "meta.json").unlink(), id="no_meta"),
            pytest.param(lambda entry: (entry / "meta.json").write_text("[1"), id="broken_meta"),
            pytest.param(lambda entry: (entry / "meta.json").write_text("[1]"), id="meta_of_another_kind"),
        ],
    )
    def test_a_damaged_entry_is_set_aside_and_built_again(self, fake_compiler, cold_cache, caplog, damage):
        compiler = fake_compiler()
        path = build.ensure(instance())
        damage(path.parent)
        before = compiler.runs
        assert not all(
            entry.intact and entry.meta["key"] == key_of(instance()) for entry in location.open_place().entries()
        )
        report = build.build_instances([instance()])[0]
        assert (report.status, compiler.runs - before) == ("compiled", 1)
        assert answer_of(report.path) == 42
        assert names(cold_cache, ".bad") == [path.parent.name + ".bad"]
        assert "is damaged" in caplog.text
        assert build.build_instances([instance()])[0].status == "cached"

    def test_damage_twice_keeps_the_newer_one(self, cold_cache):
        for _ in range(2):
            truncate(build.ensure(instance()).parent)
        assert answer_of(build.ensure(instance())) == 42
        assert len(names(cold_cache, ".bad")) == 1


class TestHostileDirectory:
    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
    def test_writable_by_others(self, cold_cache, mode):
        cold_cache.mkdir()
        cold_cache.chmod(mode)
        with pytest.raises(CacheSecurityError, match=r"is writable by others\. Repair it: chmod go-w"):
            build.ensure(instance())

    def test_replaceable_through_its_parent(self, cold_cache):
        cold_cache.parent.chmod(0o777)
        with pytest.raises(CacheSecurityError, match="can be replaced by others"):
            build.ensure(instance())
        cold_cache.parent.chmod(0o1777)
        assert answer_of(build.ensure(instance())) == 42

    @pytest.mark.parametrize("dangling", [False, True])
    def test_symbolic_link(self, cold_cache, tmp_path, dangling):
        target = tmp_path / "target"
        if not dangling:
            target.mkdir()
        cold_cache.symlink_to(target)
        with pytest.raises(CacheSecurityError, match="is a symbolic link"):
            build.ensure(instance())

    def test_foreign_owner(self, cold_cache, monkeypatch):
        cold_cache.mkdir()
        if os.geteuid() == 0:
            os.chown(cold_cache, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: cold_cache.stat().st_uid + 1)
        with pytest.raises(CacheSecurityError, match="belongs to user id"):
            build.ensure(instance())

    def test_only_the_owner_can_read_what_is_kept(self, cold_cache):
        umask = os.umask(0)
        try:
            build.ensure(instance())
        finally:
            os.umask(umask)
        modes = {path: path.stat().st_mode & 0o777 for path in [cold_cache, *cold_cache.rglob("*")]}
        assert len(modes) == 7
        assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes


class TestAwkwardDirectory:
    @pytest.fixture
    def in_a_private_directory(self) -> Callable[[str], None]:
        location._private_root.cache_clear()
        location._Private.root = None

        def check(reason: str) -> None:
            with pytest.warns(RuntimeWarning, match=f"kernels cannot be kept in .*{reason}") as warned:
                path = build.ensure(instance())
            assert len(warned) == 1
            assert answer_of(path) == 42
            assert path.parents[1].stat().st_mode & 0o777 == 0o700
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert build.ensure(instance()) == path

        return check

    def test_below_a_file(self, cold_cache, in_a_private_directory):
        cold_cache.write_text("")
        in_a_private_directory("File exists")

    def test_too_long(self, tmp_path, monkeypatch, in_a_private_directory):
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(tmp_path / ("x" * 300)))
        in_a_private_directory("too long")

    def test_no_home(self, monkeypatch, in_a_private_directory):
        monkeypatch.delenv("JITMOE_CACHE_DIR")
        monkeypatch.setattr(location.platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
        in_a_private_directory("there is no home directory")

    def test_noexec(self, cold_cache, monkeypatch, in_a_private_directory):
        flags = {cold_cache: os.ST_NOEXEC}
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags.get(path, 0)))
        in_a_private_directory("mounted noexec")

    def test_read_only(self, cold_cache, monkeypatch, in_a_private_directory):
        # By permission bits alone this could not be tested as root, whom they do not bind.
        cold_cache.mkdir()
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, *args: path != cold_cache and allowed(path, *args))
        in_a_private_directory("it is not writable")

    def test_the_private_directory_is_gone_when_the_process_ends(self):
        twice = "open_place().writable().root, open_place().writable().root"
        code = f"from jitmoe.jit.location import open_place; print({twice})"
        environment = os.environ | {"JITMOE_CACHE_DIR": "/dev/null/kernels"}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        first, second = result.stdout.split()
        assert first == second and not Path(first).exists()
        assert result.stderr.count("RuntimeWarning") == 1


class TestMaintenance:
    def test_list_and_clear(self, cold_cache):
        build.build_instances([instance(1), instance(2)])
        foreign = cold_cache / "notes.txt"
        foreign.write_text("mine")
        truncate(build.ensure(instance(2)).parent)
        store = location.open_place().writable()
        assert [(entry.meta["name"], entry.intact) for entry in store.entries()] == [
            ("ref_h1_i8_r0_m4_f32", True),
            ("ref_h2_i8_r0_m4_f32", False),
        ]
        assert store.clear() == 2
        assert store.entries() == []
        assert foreign.read_text() == "mine", "a cache directory that holds other files is not swept"
        assert answer_of(build.ensure(instance(1))) == 1
