"""Kernels in one file, from a machine with a compiler to one without.

The file is a zip archive: ``index.json`` says what is in it, ``<n>/kernel.so`` and ``<n>/kernel.cpp`` are the kernels.
Nothing is unpacked by a name that stands in the file, and nothing is believed that can be computed again: the key of
the sources follows from the text and from the templates here, the key of the kernel from that, the compiler and the
flags. Who made the file is not known: a library is code, so only a digest from a trusted hand tells that it is the one.
"""

import hashlib
import json
import os
import platform
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe import files, settings
from jitmoe.errors import BuildError, KernelError
from jitmoe.isa import EMULATED_FEATURES, ISAS
from jitmoe.jit import abi, cpu, library, toolchain, trust
from jitmoe.jit.build import Headers, compiled_key, source_key, template_headers
from jitmoe.jit.cache import LIBRARY, SOURCE, Entry
from jitmoe.jit.location import Place
from jitmoe.jit.render import Instance, Program
from jitmoe.version import __version__

INDEX = "index.json"

INDEX_BYTES = 1 << 24
"""Most bytes of the index; a kernel takes a thousand."""

KERNEL_BYTES = 1 << 26
"""Most bytes of a library or of its source; ours have less than a megabyte."""

LOCK_SECONDS = 60.0

FIELDS = ("key", "source", "name", "isa", "compiler", "flags", "library_digest", "source_digest")
"""Of a kernel in the index; all of them text."""

_NAME = re.compile(r"[0-9a-z_]{1,200}")


@dataclass(frozen=True)
class Moved:
    """One kernel and what became of it: "exported", "imported", "already here", or why it was left out."""

    name: str
    outcome: str

    @property
    def usable(self) -> bool:
        """Whether it now lies where it was meant to lie."""
        return self.outcome in ("exported", "imported", "already here")


def export_kernels(path: Path, store: Place) -> list[Moved]:
    """Write every kernel of ``store`` that this version of jitmoe can use to ``path``.

    Raises:
        CacheSecurityError: somebody else could have written a kernel.
        KernelError: there is none to export.
        OSError: the file cannot be written.
    """
    headers = template_headers()
    moved: list[Moved] = []
    index: list[dict[str, str]] = []
    with files.replacing(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in store.entries():
            fault = _export_fault(entry, headers)
            moved.append(Moved(str(entry.meta.get("name", "?")), fault or "exported"))
            if fault is None:
                index.append(_add(archive, entry, str(len(index))))
        if not index:
            raise KernelError(f"{store.root} holds no kernel of this version to export: run `jitmoe build` first")
        about = {"jitmoe": __version__, "abi": abi.ABI_VERSION, "machine": platform.machine(), "kernels": index}
        archive.writestr(INDEX, json.dumps(about, indent=1))
    return moved


def _export_fault(entry: Entry, headers: Headers) -> str | None:
    if not entry.intact:
        return "damaged"
    if entry.meta.get("isa") not in ISAS:
        return "of an older version of jitmoe"
    text = (entry.directory / SOURCE).read_text(encoding="utf-8")
    return _source_fault(entry.meta, text, headers)


def _add(archive: zipfile.ZipFile, entry: Entry, number: str) -> dict[str, str]:
    """Put the files of ``entry`` into ``archive``; return its part of the index."""
    facts = {name: str(entry.meta[name]) for name in FIELDS[:6]}
    for field, name in (("library_digest", LIBRARY), ("source_digest", SOURCE)):
        content = (entry.directory / name).read_bytes()
        facts[field] = hashlib.sha256(content).hexdigest()
        archive.writestr(f"{number}/{name}", content)
    if facts["library_digest"] != entry.meta["digest"]:
        raise KernelError(f"{entry.directory} changed while it was read: try again")
    return facts


def import_kernels(path: Path, store: Place, digest: str | None = None) -> list[Moved]:
    """Put the kernels of the file ``path`` that fit this machine into ``store``.

    Args:
        path: what :func:`export_kernels` wrote.
        store: where they go; each with this user as owner and mode 0600, after a trial in a process of its own.
        digest: SHA-256 that the file must have.

    Raises:
        CacheSecurityError: somebody else can write the file, or the cache.
        KernelError: it is damaged, of another version or processor, or has another digest. Nothing was imported.
        OSError: it cannot be read.
    """
    headers = template_headers()
    with trust.opened(os.path.realpath(path)) as descriptor, open(descriptor, "rb", closefd=False) as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest is not None and found != digest.lower():
            raise KernelError(f"{path} has the SHA-256 {found}, not {digest}: it is not the file that was exported")
        try:
            with zipfile.ZipFile(stream) as archive:
                kernels = _read_index(archive, path)
                contents = [_read_kernel(archive, facts, number, path) for number, facts in enumerate(kernels)]
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise KernelError(f"{path} is no file of exported kernels, or damaged: {error}") from error
    return [_bring(facts, *content, headers, store) for facts, content in zip(kernels, contents, strict=True)]


def _read_index(archive: zipfile.ZipFile, path: Path) -> list[dict[str, str]]:
    about = json.loads(_read(archive, INDEX, INDEX_BYTES, path))
    if not isinstance(about, dict) or not isinstance(about.get("kernels"), list):
        raise KernelError(f"{path} is no file of exported kernels: its {INDEX} has another form")
    here = {"jitmoe": __version__, "abi": abi.ABI_VERSION, "machine": platform.machine()}
    for name, wanted in here.items():
        if about.get(name) != wanted:
            raise KernelError(f"{path} is for {name} {about.get(name)!r}, here is {wanted!r}: export it there again")
    for facts in about["kernels"]:
        texts = isinstance(facts, dict) and all(isinstance(facts.get(field), str) for field in FIELDS)
        if not texts or facts["isa"] not in ISAS or not _NAME.fullmatch(facts["name"]):
            raise KernelError(f"{path} describes a kernel in another form than ours: {str(facts)[:200]}")
    return list(about["kernels"])


def _read_kernel(archive: zipfile.ZipFile, facts: Mapping[str, str], number: int, path: Path) -> tuple[bytes, bytes]:
    """Library and source, their digests checked."""
    code = _read(archive, f"{number}/{LIBRARY}", KERNEL_BYTES, path)
    text = _read(archive, f"{number}/{SOURCE}", KERNEL_BYTES, path)
    for content, field in ((code, "library_digest"), (text, "source_digest")):
        if hashlib.sha256(content).hexdigest() != facts[field]:
            raise KernelError(f"{path} is damaged: {facts['name']} does not have the digest that was exported")
    return code, text


def _read(archive: zipfile.ZipFile, name: str, most: int, path: Path) -> bytes:
    """A member of the archive, by a name of ours; no more of it than ``most`` bytes, whatever its head says."""
    try:
        with archive.open(name) as member:
            content = member.read(most + 1)
    except KeyError:
        raise KernelError(f"{path} lacks {name}") from None
    if len(content) > most:
        raise KernelError(f"{path} is damaged: its {name} is larger than {most} bytes")
    return content


def _source_fault(facts: Mapping[str, Any], text: str, headers: Headers) -> str | None:
    """Whether the keys are those of ``text`` and the templates here, compiled as we compile; None if they are."""
    source = source_key(Instance(Program(facts["name"], facts["isa"]), text), headers)
    if source != facts["source"]:
        return "made from other templates than those here"
    if compiled_key(source, facts["compiler"], facts["flags"].split(" ")) != facts["key"]:
        return "its key is not that of its sources, compiler and flags"
    return None


def _bring(facts: Mapping[str, str], code: bytes, text: bytes, headers: Headers, store: Place) -> Moved:
    lacking = _lacking(facts)
    fault = f"this CPU lacks {', '.join(lacking)}" if lacking else _source_fault(facts, text.decode(), headers)
    if fault is None and store.find(facts["key"]):
        return Moved(facts["name"], "already here")
    return Moved(facts["name"], fault or _publish(facts, code, text, store))


def _lacking(facts: Mapping[str, str]) -> list[str]:
    """Features of the kernel and of its compiler that neither this CPU nor the emulator executes."""
    host = cpu.detect()
    missing = {*cpu.missing_features(facts["isa"], host), *(toolchain.features_in(facts["compiler"]) - host.features)}
    emulated = EMULATED_FEATURES if (settings.get("emulate") or "0") != "0" else frozenset()
    return sorted(missing - emulated)


def _publish(facts: Mapping[str, str], code: bytes, text: bytes, store: Place) -> str:
    """Publish it as a build does: in a directory of its own, tried in a child process, renamed when whole."""
    cache, key = store.writable(), facts["key"]
    try:
        with cache.lock(key, LOCK_SECONDS) as alone:
            folder = cache.start(key, alone)
            try:
                (folder / LIBRARY).write_bytes(code)
                (folder / SOURCE).write_bytes(text)
                library.try_in_child(folder / LIBRARY)
                cache.publish(key, folder, {name: facts[name] for name in FIELDS[1:6]})
            except BaseException:
                cache.abandon(folder)
                raise
    except BuildError as error:
        return f"cannot be used here: {error}"
    except OSError as error:
        raise KernelError(f"cannot store the kernel {facts['name']} in {cache.root}: {error}") from error
    return "imported"
