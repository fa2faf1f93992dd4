"""From rendered instances to shared libraries: looks into the cache and compiles what is missing."""

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from jitmoe import settings
from jitmoe.errors import BuildError
from jitmoe.isa import ISAS
from jitmoe.jit import abi, cache, library, location, render, toolchain
from jitmoe.jit.location import Place
from jitmoe.jit.render import Instance, Program
from jitmoe.jit.toolchain import Compiler
from jitmoe.limits import available_memory, usable_cpus
from jitmoe.plan.shapes import Shape
from jitmoe.progress import track

COMPILER_BYTES = 1 << 29
"""Memory of one compiler, generously: GCC 12 takes 260 MB for the largest kernel (2026-11-25)."""

Headers = tuple[tuple[str, bytes], ...]
"""Path below the templates, with slashes, and content of each template header, in the order of the paths."""


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a build.

    Attributes:
        shape: of the kernel, or the program.
        key: 64 hexadecimal digits over everything that determines its code.
        path: the shared library, its digest checked.
        status: "compiled" or "cached".
        seconds: wall time to compile the kernel, or to find and check it.
    """

    shape: Shape | Program
    key: str
    path: Path
    status: str
    seconds: float

    @property
    def isa(self) -> str:
        """Instruction set."""
        return self.shape.isa

    @property
    def m_step(self) -> int:
        """Rows of a register block; 0 for a program."""
        return self.shape.m_step


def build_instances(
    instances: Sequence[Instance], progress: bool = False, store: Place | None = None
) -> list[KernelReport]:
    """Find or compile each of ``instances``, one compiler per CPU at a time; reports in the given order.

    Args:
        instances: what to compile.
        progress: say on stderr how many are done; see :func:`~jitmoe.progress.track`.
        store: where the libraries are kept; the process's cache where not given.

    Raises:
        BuildError: a kernel is not in the cache, and there is no compiler, or it fails. After the first failure no
            further build begins.
        CacheSecurityError: somebody else could write into the cache.
    """
    compiler, headers, store = _find_compiler(), template_headers(), store or location.open_place()
    with ThreadPoolExecutor(max_workers=_compilers()) as pool:
        futures = [pool.submit(_find_or_compile, instance, compiler, headers, store) for instance in instances]
        finished = (future.result() for future in as_completed(futures))
        try:
            for _ in track(finished, len(futures), "kernel", _outcome) if progress else finished:
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def ensure(instance: Instance) -> Path:
    """Path of the compiled library of ``instance``; compiles it where the cache has none.

    Raises:
        BuildError: there is no compiler, or it fails.
        CacheSecurityError: somebody else could write into the cache.
    """
    return build_instances([instance])[0].path


def template_headers() -> Headers:
    """Every C++ header of the templates. Each key covers them, and each compilation gets a copy.

    Raises:
        BuildError: they cannot be read: the installation is damaged, or this process has no descriptors left.
    """
    try:
        return tuple(sorted(_headers_in(render.template_dir(), "")))
    except OSError as error:
        raise BuildError(f"the templates of the kernels cannot be read: {error}. {render.READ_ADVICE}") from error


def _headers_in(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.name.endswith(".hpp"):
            yield prefix + entry.name, entry.read_bytes()
        elif entry.is_dir():
            yield from _headers_in(entry, f"{prefix}{entry.name}/")


def instance_key(instance: Instance, compiler: Compiler, headers: Headers) -> str:
    """SHA-256 over all that determines the library's code. It covers no path, so all checkouts agree."""
    flags = toolchain.flags(instance.shape.isa, compiler.kind)
    return compiled_key(source_key(instance, headers), compiler.identity, flags)


def compiled_key(source: str, identity: str, flags: Sequence[str]) -> str:
    """The key of sources with the key ``source`` that a compiler of ``identity`` compiled with ``flags``."""
    return _digest([source, identity, *flags])


def source_key(instance: Instance, headers: Headers) -> str:
    """SHA-256 over what does not depend on the compiler."""
    parts = [str(abi.ABI_VERSION), *ISAS[instance.shape.isa].flags, instance.text]
    return _digest([*parts, *(part for header in headers for part in header)])


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        # The length before each part separates it from the next.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _outcome(report: KernelReport) -> str:
    return f"{report.shape.name} {report.status} {report.seconds:.1f} s"


def _compilers() -> int:
    """Compilers at a time: one a CPU, and fewer where memory is short."""
    return max(1, min(usable_cpus(), available_memory() // COMPILER_BYTES))


def _find_compiler() -> Compiler | BuildError:
    """The compiler, or why there is none: kernels that are in the cache need none."""
    try:
        return toolchain.find_compiler()
    except BuildError as error:
        return error


def _find_or_compile(
    instance: Instance, compiler: Compiler | BuildError, headers: Headers, store: Place
) -> KernelReport:
    start = time.perf_counter()
    status = "cached"
    if isinstance(compiler, BuildError):
        key, path = source_key(instance, headers), store.find_source(source_key(instance, headers))
        if path is None:
            raise compiler
    else:
        key = instance_key(instance, compiler, headers)
        path = store.find(key)
        if path is None:
            path, status = _compile_once(instance, key, compiler, headers, store.writable())
    return KernelReport(instance.shape, key, path, status, time.perf_counter() - start)


def _compile_once(
    instance: Instance, key: str, compiler: Compiler, headers: Headers, store: cache.Cache
) -> tuple[Path, str]:
    """Under the lock of ``key``: take what another process published meanwhile, or compile and publish."""
    timeout = settings.get("compile_timeout")
    try:
        # The holder may need one whole compilation, and time to write the result.
        with store.lock(key, timeout + 60.0) as alone:
            path = store.find(key)
            if path is not None:
                return path, "cached"
            folder = store.start(key, alone)
            try:
                _compile_into(folder, instance, headers, compiler, timeout, store.log_path(key))
                library.try_in_child(folder / cache.LIBRARY)
                return store.publish(key, folder, _origin(instance, compiler, headers)), "compiled"
            except BaseException:
                store.abandon(folder)
                raise
    except OSError as error:
        raise BuildError(
            f"cannot store the kernel {instance.shape.name} in {store.root}: {error}. "
            "Make room there or set JITMOE_CACHE_DIR."
        ) from error


def _compile_into(
    folder: Path, instance: Instance, headers: Headers, compiler: Compiler, timeout: float, log: Path
) -> None:
    # The compiler gets the bytes that the key covers, even if a header is edited now or lies inside a zip file. The
    # name of the folder makes messages say templates/<file>.
    include = folder / "templates"
    include.mkdir()
    for name, content in headers:
        (include / name).parent.mkdir(exist_ok=True)
        (include / name).write_bytes(content)
    source = folder / cache.SOURCE
    source.write_text(instance.text, encoding="utf-8")
    flags = toolchain.flags(instance.shape.isa, compiler.kind)
    toolchain.compile(compiler, source, folder / cache.LIBRARY, flags, include, timeout, log)
    shutil.rmtree(include)


def _origin(instance: Instance, compiler: Compiler, headers: Headers) -> dict[str, str]:
    """Where a cache entry comes from: its sources, and the rest for people."""
    return {
        "source": source_key(instance, headers),
        "name": instance.shape.name,
        "isa": instance.shape.isa,
        "compiler": compiler.identity,
        "flags": " ".join(toolchain.flags(instance.shape.isa, compiler.kind)),
    }
