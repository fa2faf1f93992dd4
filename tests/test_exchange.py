"""Kernels brought from one cache to another in a file: what arrives, and what is refused."""

import json
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jitmoe.cli import main
from jitmoe.errors import BuildError, CacheSecurityError, KernelError
from jitmoe.jit import build, exchange
from jitmoe.jit.cache import read_entry
from jitmoe.jit.exchange import export_kernels, import_kernels
from jitmoe.jit.location import Place
from jitmoe.jit.render import Instance, Program

TEXT = 'extern "C" int answer() { return 42; }\n'


def instance(name: str = "tiny", isa: str = "ref") -> Instance:
    return Instance(Program(name, isa), TEXT)


def place(folder: Path) -> Place:
    folder.mkdir(mode=0o700)
    return Place(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with two kernels: one for every CPU, one for AMX."""
    folder = tmp_path_factory.mktemp("exchange")
    store = place(folder / "there")
    build.build_instances([instance(), instance("wide", "amx")], store=store)
    export_kernels(folder / "kernels.zip", store)
    return folder / "kernels.zip"


def rewritten(
    exported: Path,
    path: Path,
    index: Callable[[dict], None] = lambda about: None,
    files: Callable[[dict], None] = lambda files: None,
) -> Path:
    """A copy of the file in which ``index`` and ``files`` have changed something."""
    with zipfile.ZipFile(exported) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(contents[exchange.INDEX])
    index(about)
    contents[exchange.INDEX] = json.dumps(about).encode()
    files(contents)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def only_first(about: dict) -> None:
    del about["kernels"][1:]


class TestArrives:
    def test_a_machine_without_a_compiler_finds_it(self, exported, tmp_path, monkeypatch):
        store = place(tmp_path / "here")
        monkeypatch.setenv("JITMOE_CXX", "/nowhere/g++")
        with pytest.raises(BuildError):
            build.build_instances([instance()], store=store)
        assert "imported" in [kernel.outcome for kernel in import_kernels(exported, store)]
        (report,) = build.build_instances([instance()], store=store)
        assert report.status == "cached"

    def test_owner_and_mode_are_ours(self, exported, tmp_path):
        store = place(tmp_path / "here")
        import_kernels(exported, store)
        for entry in store.entries():
            assert entry.intact and stat.S_IMODE(entry.directory.stat().st_mode) == 0o700
            for path in entry.directory.iterdir():
                info = path.stat()
                assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o600, os.geteuid())

    def test_twice_is_once(self, exported, tmp_path):
        store = place(tmp_path / "here")
        first, second = (import_kernels(exported, store)[0] for _ in range(2))
        assert (first.outcome, second.outcome) == ("imported", "already here")

    def test_commands(self, exported, tmp_path, cold_cache, capsys):
        digest = build.hashlib.sha256(exported.read_bytes()).hexdigest()
        assert main(["cache", "import", str(exported), "--sha256", digest]) == 0
        assert main(["cache", "export", str(tmp_path / "again.zip")]) == 0
        out = capsys.readouterr().out
        assert "tiny" in out and "imported" in out and "exported" in out and "sha256 " in out

    def test_no_compiler_names_the_way(self, monkeypatch):
        monkeypatch.delenv("JITMOE_CXX", raising=False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(BuildError, match="jitmoe cache import FILE"):
            build.toolchain.find_compiler()


class TestRefused:
    @pytest.mark.parametrize(
        ("index", "files", "message"),
        [
            (lambda a: a.update(abi=a["abi"] + 1), None, "is for abi"),
            (lambda a: a.update(jitmoe="0.0.1"), None, "is for jitmoe '0.0.1'"),
            (lambda a: a.update(machine="riscv64"), None, "is for machine 'riscv64'"),
            (lambda a: a["kernels"][0].update(name="../../evil"), None, "another form"),
            (lambda a: a["kernels"][0].pop("flags"), None, "another form"),
            (lambda a: a.update(kernels=7), None, "another form"),
            (None, lambda f: f.update({"0/kernel.so": f["0/kernel.so"] + b"!"}), "digest that was exported"),
            (None, lambda f: f.update({"0/kernel.cpp": b"int x;"}), "digest that was exported"),
            (None, lambda f: f.pop("1/kernel.so"), "lacks 1/kernel.so"),
            (None, lambda f: f.pop("index.json"), "lacks index.json"),
            (None, lambda f: f.update({"index.json": b"{"}), "or damaged"),
        ],
    )
    def test_the_whole_file(self, exported, tmp_path, index, files, message):
        changes = {name: change for name, change in (("index", index), ("files", files)) if change}
        path = rewritten(exported, tmp_path / "changed.zip", **changes)
        store = place(tmp_path / "here")
        with pytest.raises(KernelError, match=message):
            import_kernels(path, store)
        assert not store.entries()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"source": "0" * 64}, "other templates"),
            ({"key": "../" * 20}, "key is not that of its sources"),
            ({"compiler": "g++ (another) 99"}, "key is not that of its sources"),
            ({"compiler": "g++ 12 x86_64-linux-gnu with amx-tile"}, "this CPU lacks amx-tile"),
            ({"isa": "amx"}, "this CPU lacks"),
        ],
    )
    def test_one_kernel(self, exported, tmp_path, monkeypatch, fields, message):
        monkeypatch.setattr("jitmoe.jit.cpu.detect", lambda: build.toolchain.cpu.Cpu("old", frozenset()))

        def change(about: dict) -> None:
            only_first(about)
            about["kernels"][0].update(fields)

        store = place(tmp_path / "here")
        (moved,) = import_kernels(rewritten(exported, tmp_path / "changed.zip", change), store)
        assert message in moved.outcome and not moved.usable and not list(store.root.iterdir())

    def test_what_this_machine_cannot_load(self, exported, tmp_path):
        """With digests that fit: a library of another system."""
        content = b"\x7fELF of nothing"

        def change(about: dict) -> None:
            only_first(about)
            about["kernels"][0]["library_digest"] = exchange.hashlib.sha256(content).hexdigest()

        path = rewritten(exported, tmp_path / "changed.zip", change, lambda f: f.update({"0/kernel.so": content}))
        store = place(tmp_path / "here")
        (moved,) = import_kernels(path, store)
        assert "cannot be used here" in moved.outcome and not store.entries()

    def test_names_in_the_archive_are_never_paths(self, exported, tmp_path):
        path = rewritten(
            exported, tmp_path / "changed.zip", files=lambda f: f.update({"../../escaped": b"x", "/tmp/escaped": b"x"})
        )
        before = {entry.name for entry in tmp_path.iterdir()}
        import_kernels(path, place(tmp_path / "here"))
        assert {entry.name for entry in tmp_path.iterdir()} == before | {"here"}
        assert not (tmp_path.parent / "escaped").exists()

    def test_a_head_that_lies_about_the_size(self, exported, tmp_path, monkeypatch):
        monkeypatch.setattr(exchange, "KERNEL_BYTES", 100)
        with pytest.raises(KernelError, match="larger than 100 bytes"):
            import_kernels(exported, place(tmp_path / "here"))

    def test_another_digest(self, exported, tmp_path):
        with pytest.raises(KernelError, match="not the file that was exported"):
            import_kernels(exported, place(tmp_path / "here"), "0" * 64)

    def test_a_file_that_others_can_write(self, exported, tmp_path):
        path = rewritten(exported, tmp_path / "open.zip")
        path.chmod(0o666)
        with pytest.raises(CacheSecurityError, match="somebody else can write it"):
            import_kernels(path, place(tmp_path / "here"))

    def test_nothing_that_fits_is_status_1(self, exported, tmp_path, cold_cache, capsys):
        path = rewritten(exported, tmp_path / "changed.zip", lambda a: a["kernels"][0].update(source="0" * 64))
        rewritten(path, tmp_path / "one.zip", only_first)
        assert main(["cache", "import", str(tmp_path / "one.zip")]) == 1
        assert "no kernel of" in capsys.readouterr().err

    def test_damaged_ones_are_not_exported(self, tmp_path):
        store = place(tmp_path / "there")
        (report,) = build.build_instances([instance()], store=store)
        assert read_entry(report.path.parent).intact
        report.path.write_bytes(b"other")
        with pytest.raises(KernelError, match="holds no kernel"):
            export_kernels(tmp_path / "kernels.zip", store)
        assert not (tmp_path / "kernels.zip").exists()
