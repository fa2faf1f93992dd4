"""Faults from the field around the cache: hostile (Q), warm (F), poor systems (G, H), libraries (P), homes (J, R)."""

import ctypes
import errno
import hashlib
import json
import mmap
import os
import resource
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from helpers import run_python
from test_build import answer_of, instance, key_of, names, tiny_templates

from jitmoe import files, limits, settings
from jitmoe.cli import main
from jitmoe.errors import BuildError, CacheSecurityError, KernelError, SettingError
from jitmoe.experts import workspace
from jitmoe.jit import build, cache, cpu, library, location, toolchain, trust

__all__ = ["tiny_templates"]

pytestmark = pytest.mark.usefixtures("cold_cache", "tiny_templates")

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
STRANGER = 12345


@pytest.fixture(autouse=True)
def no_private_directory() -> None:
    location._private_root.cache_clear()
    location._Private.root = None
    files.warn_once.cache_clear()


def entry_of(path: Path) -> Path:
    assert path.name == cache.LIBRARY
    return path.parent


@pytest.mark.field("Q")
class TestCodeOfOthers:
    @AS_ROOT
    @pytest.mark.parametrize("what", [".", "kernel.so", "meta.json"])
    def test_q_an_entry_of_somebody_else(self, cold_cache: Path, what: str) -> None:
        path = build.ensure(instance())
        os.chown(entry_of(path) / what, STRANGER, -1)
        for use in (lambda: build.ensure(instance()), lambda: library.load(path)):
            with pytest.raises(CacheSecurityError, match=r"belongs to user id 12345.*Remove it"):
                use()
        os.chown(entry_of(path) / what, 0, -1)
        assert answer_of(build.ensure(instance())) == 42

    @pytest.mark.parametrize("what", [".", "kernel.so", "meta.json"])
    @pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH], ids=["group", "others"])
    def test_q_an_entry_that_others_can_write(self, what: str, mode: int) -> None:
        path = build.ensure(instance())
        target = entry_of(path) / what
        target.chmod(target.stat().st_mode | mode)
        with pytest.raises(CacheSecurityError, match="somebody else can write it"):
            build.ensure(instance())

    def test_q_a_library_exchanged_after_the_check_is_not_loaded(self, tmp_path: Path, monkeypatch) -> None:
        """Exchanged between the digest and the loader: what was checked is loaded."""
        path, other = build.ensure(instance(1)), build.ensure(instance(2))
        load = ctypes.CDLL

        def exchanged(name: str) -> ctypes.CDLL:
            os.replace(other, path)
            return load(name)

        monkeypatch.setattr(library.ctypes, "CDLL", exchanged)
        assert library.load(path).answer() == 1
        monkeypatch.undo()
        with pytest.raises(KernelError, match="has changed since it was published"):
            library.load(path)

    def test_q_names_of_descriptors_are_never_taken_for_an_older_library(self) -> None:
        """The loader gives back a library that it knows by name, and descriptors get the same number again."""
        assert [library.load(build.ensure(instance(n))).answer() for n in (1, 2, 3, 1)] == [1, 2, 3, 1]

    @AS_ROOT
    def test_q_a_parent_of_somebody_else(self, tmp_path: Path, monkeypatch) -> None:
        parent = tmp_path / "theirs"
        (parent / "inner" / "kernels").mkdir(parents=True, mode=0o700)
        (parent / "inner" / "kernels").chmod(0o700)
        os.chown(parent, STRANGER, -1)
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(parent / "inner" / "kernels"))
        with pytest.raises(CacheSecurityError, match=f"can be replaced by others: {parent} belongs to user id 12345"):
            build.ensure(instance())

    @AS_ROOT
    def test_q_a_parent_that_a_foreign_group_can_write(self, cold_cache: Path) -> None:
        os.chown(cold_cache.parent, -1, STRANGER)
        cold_cache.parent.chmod(0o775)
        with pytest.raises(CacheSecurityError, match="is writable by the group 12345"):
            build.ensure(instance())

    def test_q_the_group_that_a_user_has_for_himself_is_no_stranger(self, cold_cache: Path, monkeypatch) -> None:
        cold_cache.parent.chmod(0o775)
        gid = cold_cache.parent.stat().st_gid
        user, group = SimpleNamespace(pw_gid=gid, pw_name="ann"), SimpleNamespace(gr_name="ann", gr_mem=[])
        monkeypatch.setattr(trust.pwd, "getpwuid", lambda _: user)
        monkeypatch.setattr(trust.grp, "getgrgid", lambda _: group)
        assert trust._is_private_group(gid)
        assert answer_of(build.ensure(instance())) == 42
        group.gr_mem = ["ann", "bob"]
        assert not gid or not trust._is_private_group(gid)

    @AS_ROOT
    def test_q_a_link_of_somebody_else_on_the_way(self, tmp_path: Path, monkeypatch) -> None:
        """As in a directory where everybody may create links."""
        (tmp_path / "real").mkdir(mode=0o700)
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "real")
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(link / "kernels"))
        assert answer_of(build.ensure(instance())) == 42
        os.lchown(link, STRANGER, -1)
        with pytest.raises(CacheSecurityError, match=f"the link {link} belongs to user id 12345"):
            build.ensure(instance())

    def test_q_what_the_target_of_a_link_lies_in_counts_too(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "open" / "real").mkdir(parents=True)
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "link").symlink_to(Path("open") / "real")
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(tmp_path / "link" / "kernels"))
        with pytest.raises(CacheSecurityError, match="open is writable by everybody"):
            build.ensure(instance())

    def test_q_links_in_a_circle_end(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "one").symlink_to(tmp_path / "two")
        (tmp_path / "two").symlink_to(tmp_path / "one")
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(tmp_path / "one" / "kernels"))
        with pytest.warns(RuntimeWarning, match="kernels cannot be kept in"):
            assert answer_of(build.ensure(instance())) == 42


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch) -> Callable[[], None]:
    def remove() -> None:
        for variable in ("JITMOE_CXX", "CXX"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))

    return remove


@pytest.mark.field("F")
class TestWarmCache:
    def test_f_needs_no_compiler(self, no_compiler) -> None:
        path = build.ensure(instance())
        no_compiler()
        report = build.build_instances([instance()])[0]
        assert (report.status, report.path) == ("cached", path)
        with pytest.raises(BuildError, match=r"no C.. compiler"):
            build.ensure(instance(7))

    @pytest.mark.parametrize("what", ["kernel.so", "meta.json"])
    def test_f_a_damaged_entry_needs_one(self, no_compiler, what: str) -> None:
        (entry_of(build.ensure(instance())) / what).write_text("{}")
        no_compiler()
        with pytest.raises(BuildError, match=r"no C.. compiler"):
            build.ensure(instance())

    def test_f_other_templates_need_one(self, no_compiler, tiny_templates: Path) -> None:
        build.ensure(instance())
        (tiny_templates / "tiny.hpp").write_text("#define ZERO 1\n")
        no_compiler()
        with pytest.raises(BuildError, match=r"no C.. compiler"):
            build.ensure(instance())

    @pytest.mark.filterwarnings("error")
    def test_f_needs_no_writable_directory(self, cold_cache: Path, monkeypatch, fake_compiler) -> None:
        compiler = fake_compiler()
        path = build.ensure(instance())
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda path, *args: path != cold_cache and allowed(path, *args))
        assert build.ensure(instance()) == path and compiler.runs == 1
        with pytest.raises(RuntimeWarning, match="it is not writable"):
            build.ensure(instance(7))

    @AS_ROOT
    def test_f_one_that_only_root_can_write_serves_everybody(self, cold_cache: Path) -> None:
        path = build.ensure(instance())
        for folder in [*cold_cache.parents][:4]:
            if str(folder).startswith(str(Path("/tmp") / "pytest-of")):
                folder.chmod(folder.stat().st_mode | 0o055)
        for made in (cold_cache, entry_of(path), *entry_of(path).iterdir()):
            made.chmod(0o755 if made.is_dir() else 0o644)
        child = os.fork()
        if child == 0:
            try:
                os.setgid(STRANGER)
                os.setuid(STRANGER)
                os._exit(0 if build.ensure(instance()) == path and library.load(path).answer() == 42 else 1)
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def refusing(call: Callable, number: int, wanted: Callable[..., bool] = lambda *_: True) -> Callable:
    """``call``, which fails with ``number`` where ``wanted`` says so of its arguments."""

    def refuse(*arguments: object, **options: object) -> object:
        if wanted(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments, **options)

    return refuse


@pytest.mark.field("G")
class TestServicesThatASystemLacks:
    def test_g_huge_pages(self, monkeypatch) -> None:
        class NoHugePages(mmap.mmap):
            def madvise(self, *_: int) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(workspace.mmap, "mmap", NoHugePages)
        with pytest.warns(RuntimeWarning, match="no huge pages") as warned:
            assert workspace.allocate(4 << 20).nbytes == workspace.allocate(4 << 20).nbytes == 4 << 20
        assert len(warned) == 1

    def test_g_fsync_of_a_directory(self, cold_cache: Path, tmp_path: Path, monkeypatch) -> None:
        is_folder = lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode)  # noqa: E731
        monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.EINVAL, is_folder))
        with pytest.warns(RuntimeWarning, match="cannot be synchronised"):
            assert answer_of(build.ensure(instance())) == 42
        with pytest.warns(RuntimeWarning, match="cannot be synchronised"), files.replacing(tmp_path / "f") as stream:
            stream.write(b"whole")
        assert (tmp_path / "f").read_bytes() == b"whole"

    def test_g_a_full_disk_is_still_an_error(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "f").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", refusing(os.fsync, errno.ENOSPC))
        with pytest.raises(OSError, match="No space"), files.replacing(tmp_path / "f") as stream:
            stream.write(b"new")
        assert (tmp_path / "f").read_bytes() == b"old"

    def test_g_modes(self, monkeypatch) -> None:
        umask = os.umask(0o077)
        try:
            monkeypatch.setattr(Path, "chmod", refusing(Path.chmod, errno.EPERM))
            with pytest.warns(RuntimeWarning, match="modes cannot be set"):
                path = build.ensure(instance())
        finally:
            os.umask(umask)
        assert answer_of(path) == 42 and build.ensure(instance()) == path

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_g_locks(self, tmp_path: Path, cold_cache: Path, monkeypatch, number: int) -> None:
        monkeypatch.setattr(filelock.FileLock, "_acquire", refusing(lambda self: None, number))
        with pytest.warns(RuntimeWarning, match="no file locks in"):
            assert answer_of(build.ensure(instance())) == 42
        with pytest.warns(RuntimeWarning, match="no file locks in"), files.replacing(tmp_path / "f") as stream:
            stream.write(b"whole")
        assert (tmp_path / "f").read_bytes() == b"whole"

    def test_g_without_locks_the_first_to_finish_publishes(self, cold_cache: Path, monkeypatch, recwarn) -> None:
        monkeypatch.setattr(filelock.FileLock, "_acquire", refusing(lambda self: None, errno.ENOLCK))
        paths: list[Path] = []
        workers = [threading.Thread(target=lambda: paths.append(build.ensure(instance()))) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(set(paths)) == 1 and len(paths) == 3 and answer_of(paths[0]) == 42
        assert names(cold_cache, ".tmp", ".bad") == []


@pytest.mark.field("H")
class TestLimitsOfAContainer:
    @pytest.fixture
    def groups(self, tmp_path: Path, monkeypatch) -> Callable[[str, dict[str, str]], None]:
        monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(limits, "MEMBERSHIP", tmp_path / "membership")

        def make(membership: str, contents: dict[str, str]) -> None:
            (tmp_path / "membership").write_text(membership)
            for name, content in contents.items():
                path = tmp_path / "cgroup" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)

        return make

    GIB = 1 << 30

    @pytest.mark.parametrize(
        ("membership", "contents", "expected"),
        [
            ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "5", "a/memory.max": str(2 << 20),
                           "a/memory.current": str(1 << 20), "a/memory.stat": "anon 3\ninactive_file 1024\n"},
             (1 << 20) + 1024),
            ("0::/\n", {"memory.max": "4096", "memory.current": "5000"}, 0),
            ("3:cpu:/x\n2:memory:/x\n", {"memory/x/memory.limit_in_bytes": "8192",
                                         "memory/x/memory.usage_in_bytes": "8000",
                                         "memory/x/memory.stat": "total_inactive_file 100\n"}, 292),
            ("0::/../gone\n", {"memory.max": "8192", "memory.current": "0"}, 8192),
        ],
        ids=["parent", "over", "version 1", "outside the namespace"],
    )  # fmt: skip
    def test_h_memory_is_the_least_headroom(self, groups, membership, contents, expected) -> None:
        groups(membership, contents)
        assert limits.available_memory() == expected

    @pytest.mark.parametrize(
        ("membership", "contents", "expected"),
        [
            ("0::/a\n", {"a/cpu.max": "max 100000", "cpu.max": "150000 100000"}, 2),
            ("0::/a\n", {"a/cpu.max": "10000 100000"}, 1),
            ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
            ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
            ("nonsense\n", {}, 64),
        ],
        ids=["parent", "part of one", "version 1", "no quota", "nonsense"],
    )
    def test_h_compilers_are_bounded_by_the_quota(self, groups, monkeypatch, membership, contents, expected) -> None:
        groups(membership, contents)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
        assert limits.usable_cpus() == expected
        monkeypatch.setattr(build, "available_memory", lambda: 100 * self.GIB)
        assert build._compilers() == expected

    def test_h_and_by_memory(self, monkeypatch) -> None:
        monkeypatch.setattr(build, "usable_cpus", lambda: 64)
        for available, expected in ((3 * self.GIB, 6), (0, 1)):
            monkeypatch.setattr(build, "available_memory", lambda available=available: available)
            assert build._compilers() == expected

    def test_h_an_estimate_says_so(self, groups, capsys) -> None:
        groups("0::/\n", {"memory.max": str(1 << 20), "memory.current": "0"})
        sizes = "--num-experts 4 --hidden-size 256 --intermediate-size 256 --top-k 2 --isa ref --tokens 8"
        assert main(["estimate", *sizes.split()]) == 0
        assert "free memory: does not fit" in capsys.readouterr().out


@pytest.mark.field("P")
class TestBrokenLibraries:
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ('printf "\\177ELF" > kernel.so; head -c 5000 /dev/zero >> kernel.so', "ELF"),
            ('"$REAL" "$@" && truncate -s 2000 kernel.so', "SIGBUS"),
            ('sed -i "1i __attribute__((constructor)) static void f() { __builtin_trap(); }" kernel.cpp; "$REAL" "$@"',
             "SIGILL"),
            ('sed -i "1i __attribute__((constructor)) static void f() { __builtin_abort(); }" kernel.cpp; "$REAL" "$@"',
             "SIGABRT"),
            ('sed -i "s/return 42/extern int missing(); return missing()/" kernel.cpp; "$REAL" "$@"', "missing"),
        ],
        ids=["magic_and_zeros", "half", "illegal_instruction", "abort", "symbol"],
    )  # fmt: skip
    def test_p_is_tried_before_it_is_published(self, fake_compiler, cold_cache: Path, body: str, words: str) -> None:
        fake_compiler(body)
        with pytest.raises(BuildError, match=words):
            build.ensure(instance())
        assert [path.name for path in cold_cache.iterdir() if path.suffix not in (".lock", ".log")] == []
        fake_compiler()
        assert answer_of(build.ensure(instance())) == 42

    def test_p_a_library_that_hangs(self, fake_compiler, monkeypatch) -> None:
        monkeypatch.setattr(library, "TRIAL_SECONDS", 1.0)
        hang = "#include <unistd.h>\\n__attribute__((constructor)) static void f() { pause(); }"
        fake_compiler(f'sed -i "1i {hang}" kernel.cpp; "$REAL" "$@"')
        with pytest.raises(BuildError, match="did not finish within 1 s"):
            build.ensure(instance())

    def test_p_a_kernel_of_another_interface(self, tmp_path: Path) -> None:
        from test_toolchain import compile_text

        compile_text(
            tmp_path, 'extern "C" int jitmoe_abi() { return 0; }\nextern "C" long jitmoe_call_size() { return 8; }'
        )
        with pytest.raises(BuildError, match="it has the interface"):
            library.try_in_child(tmp_path / "kernel.so")

    def test_p_a_wrapper_that_adds_what_the_cpu_lacks(self, monkeypatch, tmp_path: Path) -> None:
        wrapper = self.wrapper(tmp_path, monkeypatch, "-mavx512f")
        have = cpu.detect()
        monkeypatch.setattr(toolchain.cpu, "detect", lambda: cpu.Cpu(have.model, have.features - {"avx512f"}))
        with pytest.raises(BuildError, match=f"{wrapper} compiles for avx512f, which this CPU lacks"):
            build.ensure(instance())

    def test_p_a_wrapper_that_adds_what_the_cpu_has_gets_keys_of_its_own(self, monkeypatch, tmp_path: Path) -> None:
        plain = key_of(instance())
        self.wrapper(tmp_path, monkeypatch, "-msse4.2")
        assert "sse4.2" in toolchain.find_compiler().identity and key_of(instance()) != plain

    def wrapper(self, folder: Path, monkeypatch, flag: str) -> Path:
        real = toolchain.find_compiler().path
        path = folder / "wrapper"
        path.write_text(f'#!/bin/sh\nexec {real} {flag} "$@"\n')
        path.chmod(0o755)
        monkeypatch.setenv("JITMOE_CXX", str(path))
        return path

    @pytest.mark.parametrize("make", ["fifo", "nested", "huge", "folder"])
    def test_p_readers_of_metadata_end(self, make: str) -> None:
        meta = entry_of(build.ensure(instance())) / "meta.json"
        meta.unlink()
        if make == "fifo":
            os.mkfifo(meta, 0o600)
        elif make == "folder":
            meta.mkdir()
        else:
            meta.write_text("[" * 100_000 if make == "nested" else json.dumps({"key": "x" * (1 << 22)}))
        assert answer_of(build.ensure(instance())) == 42

    @pytest.mark.parametrize("make", ["file", "dangling", "fifo"])
    def test_p_an_entry_that_is_none(self, cold_cache: Path, capsys, make: str) -> None:
        entry = entry_of(build.ensure(instance()))
        shutil.rmtree(entry)
        if make == "file":
            entry.write_text("")
        elif make == "fifo":
            os.mkfifo(entry)
        else:
            entry.symlink_to(cold_cache / "nowhere")
        assert main(["cache", "list"]) == 0
        assert "damaged" in capsys.readouterr().out
        assert answer_of(build.ensure(instance())) == 42
        assert names(cold_cache, ".bad") == [f"{entry.name}.bad"]

    def test_p_an_orphaned_compiler_that_keeps_writing(self, cold_cache: Path, fake_compiler) -> None:
        key = key_of(instance())
        left = location.open_place().writable().start(key)
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                left.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # removed just now
                    (left / f"cc{number}.s").write_text("")

        orphan = threading.Thread(target=write)
        orphan.start()
        try:
            assert answer_of(build.ensure(instance())) == 42
        finally:
            stop.set()
            orphan.join()

    def test_p_no_descriptors_left(self, tiny_templates: Path, cold_cache: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        toolchain.find_compiler()
        used = max(int(name) for name in os.listdir("/proc/self/fd"))
        held = [os.dup(0) for _ in range(used)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
            with pytest.raises(BuildError, match=r"(?s)Too many open files"):
                build.ensure(instance())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in held:
                os.close(descriptor)
        assert answer_of(build.ensure(instance())) == 42

    def test_p_an_entry_that_the_loader_refuses(self) -> None:
        path = build.ensure(instance())
        path.write_bytes(b"\x7fELF" + bytes(5000))
        meta = json.loads((entry_of(path) / "meta.json").read_text())
        meta["digest"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (entry_of(path) / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(KernelError, match=r"cannot be loaded.*jitmoe cache clear"):
            library.load(path)


@pytest.mark.field("J")
class TestTextFromOutside:
    @pytest.mark.parametrize("text", ["~/kernels", "$HOME/kernels", "${HOME}/kernels"])
    def test_j_home_is_expanded(self, tmp_path: Path, monkeypatch, text: str) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("JITMOE_CACHE_DIR", text)
        assert location.location() == tmp_path / "kernels"

    @pytest.mark.parametrize("text", ["$NOT_SET_ANYWHERE/kernels", "~nobody-of-this-name/kernels"])
    def test_j_what_cannot_be_expanded_is_refused(self, monkeypatch, text: str) -> None:
        monkeypatch.setenv("JITMOE_CACHE_DIR", text)
        with pytest.raises(SettingError, match=r"JITMOE_CACHE_DIR=.*does not exist"):
            settings.get("cache_dir")

    def test_j_a_relative_path_does_not_follow_chdir(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("JITMOE_CACHE_DIR", f"kernels-{tmp_path.name}")
        before = location.location()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert location.location() == before == tmp_path / f"kernels-{tmp_path.name}"

    @pytest.mark.parametrize("encoding", ["ascii:strict", "ascii:surrogateescape"])
    def test_j_names_that_a_terminal_cannot_show(self, tmp_path: Path, encoding: str) -> None:
        program = "from jitmoe.cli import main; main(['cache', 'list']); main(['doctor', '--nonsense'])"
        out = run_python(program, JITMOE_CACHE_DIR=str(tmp_path / "größe-キャッシュ"), PYTHONIOENCODING=encoding)
        assert "no kernels in" in out


@pytest.mark.field("R")
class TestHomesAndForks:
    def test_r_no_home_at_all(self, monkeypatch) -> None:
        def no_home(_: str) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("JITMOE_CACHE_DIR")
        monkeypatch.setattr(location.platformdirs, "user_cache_path", no_home)
        with pytest.warns(RuntimeWarning, match="there is no home directory"):
            assert answer_of(build.ensure(instance())) == 42

    def test_r_cache_and_temporary_directory_both_noexec(self, monkeypatch) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
        with pytest.raises(BuildError, match=r"neither from .* nor from .*noexec.*JITMOE_CACHE_DIR"):
            build.ensure(instance())

    def test_r_umask_0_gives_our_own_modes(self, tmp_path: Path, monkeypatch) -> None:
        place = tmp_path / "new" / "newer" / "kernels"
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(place))
        umask = os.umask(0)
        try:
            assert answer_of(build.ensure(instance())) == 42
        finally:
            os.umask(umask)
        assert {path.stat().st_mode & 0o777 for path in (place, place.parent, place.parent.parent)} == {0o700}

    def test_r_a_path_too_long_is_called_so(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("JITMOE_CACHE_DIR", str(tmp_path.joinpath(*["x" * 200] * 20)))
        with pytest.warns(RuntimeWarning, match="its path is too long"):
            build.ensure(instance())

    def test_r_numba_without_a_place_for_its_cache(self, tmp_path: Path) -> None:
        """The package lies where nothing can be written, and so does NUMBA_CACHE_DIR."""
        run_python(
            "import warnings, numpy as np\n"
            "from numba.core import caching\n"
            "caching.CacheImpl._locator_classes = []\n"
            "with warnings.catch_warnings(record=True) as seen:\n"
            "    warnings.simplefilter('always')\n"
            "    from jitmoe.host.route import route\n"
            "    from jitmoe.host.tokens import gather_rows_address\n"
            "    assert gather_rows_address()\n"
            "    assert route(np.array([[1, 0]]), 2).active.tolist() == [0, 1]\n"
            "said = [str(w.message) for w in seen if 'NUMBA_CACHE_DIR' in str(w.message)]\n"
            "assert len(said) == 1, said\n"
        )

    @pytest.mark.parametrize("moment", [0.0, 0.1, 0.3, 1.0])
    def test_r_a_fork_during_the_first_call_of_another_thread(self, tmp_path: Path, moment: float) -> None:
        out = run_python(FORK.replace("MOMENT", str(moment)), NUMBA_CACHE_DIR=str(tmp_path / "numba"))
        assert out.split() == ["child", "parent"] or out.split() == ["parent", "child"]


FORK = """
import os, signal, sys, threading, time
import numpy as np
from jitmoe.host.route import route
from jitmoe.host.tokens import gather_rows_address, sum_rows_address

def first_call():
    assert gather_rows_address() and sum_rows_address()
    assert route(np.array([[1, 0]]), 2).active.tolist() == [0, 1]

thread = threading.Thread(target=first_call)
thread.start()
time.sleep(MOMENT)
child = os.fork()
if child == 0:
    signal.alarm(60)
    first_call()
    print("child", flush=True)
    os._exit(0)
thread.join()
status = os.waitpid(child, 0)[1]
assert status == 0, status
print("parent", flush=True)
"""


@pytest.mark.field("I")
class TestDoctor:
    @pytest.fixture
    def doctor(self, capsys) -> Iterator[Callable[[], tuple[int, str, str]]]:
        from jitmoe.jit import render

        def run() -> tuple[int, str, str]:
            status = main(["doctor"])
            said = capsys.readouterr()
            return status, said.out, said.err

        with render.templates_from(Path(str(render._shipped()))):  # the real kernels
            yield run

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ('"$REAL" "$@" && truncate -s 3000 kernel.so', "tried its library"),
            ('case "$*" in *-mavx2*) echo "error: unrecognized option -mavx2"; exit 1;; esac; "$REAL" "$@"',
             "unrecognized option -mavx2"),
        ],
        ids=["half_a_library", "flags"],
    )  # fmt: skip
    def test_i_tries_what_a_layer_needs(self, doctor, fake_compiler, monkeypatch, body: str, words: str) -> None:
        monkeypatch.setenv("JITMOE_ISA", "avx2")
        if not any(found.isa == "avx2" and found.usable for found in build_capabilities()):
            pytest.skip("this CPU lacks AVX2")
        fake_compiler(body)
        status, out, err = doctor()
        assert status == 1 and words in err and "everything" not in out

    def test_i_wrong_results_are_a_problem(self, doctor, monkeypatch) -> None:
        from jitmoe.inspect.replay import Comparison

        monkeypatch.setattr(Comparison, "faults", property(lambda _: ["out"]))
        status, _, err = doctor()
        assert status == 1 and "computes wrongly (out)" in err

    @pytest.mark.parametrize(("kind", "macro", "version"), [("gcc", "__GNUC__", 10), ("clang", "__clang_major__", 9)])
    def test_i_an_old_compiler_is_named_with_what_is_needed(
        self, fake_compiler, monkeypatch, kind, macro, version
    ) -> None:
        says = {"gcc": "g++ 10.1 Free Software Foundation", "clang": "clang version 9.0"}[kind]
        made = fake_compiler()
        made.path.write_text(
            f'#!/bin/sh\ncase "$1" in --version) echo "{says}";; -dumpmachine) echo x86_64-linux-gnu;;\n'
            f'-dM) echo "#define {macro} {version}";; esac\n'
        )
        with pytest.raises(BuildError, match=rf"jitmoe needs {kind} 1\d or newer"):
            toolchain.find_compiler()


def build_capabilities():
    from jitmoe.jit.capability import capabilities

    return capabilities()
