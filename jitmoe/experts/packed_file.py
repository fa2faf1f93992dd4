"""Packed weights of one layer in a file: written once, mapped by every process that computes with them.

0 B    magic (8 B), SHA-256 of what follows (32 B), the header as JSON, zeros up to 4 KB
2 MB   gate_proj, packed: 2-byte items [E, packed items], scales among them
...    up_proj, then down_proj, each from the next multiple of 2 MB on; with ``tensor_parallel`` the next part's

The header of a file with several parts says how many; their order is that of the columns.
"""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.config import MoEConfig
from jitmoe.errors import PackedFileError
from jitmoe.experts.teams import by_part
from jitmoe.experts.workspace import PAGE
from jitmoe.files import replacing
from jitmoe.plan.parts import Part, parts_of
from jitmoe.plan.projections import projections
from jitmoe.plan.shapes import PACKED_LAYOUT, round_up
from jitmoe.plan.teams import Team

Matrices = dict[str, npt.NDArray[np.int16]]
"""The packed gate, up and down weights under these names, [E, packed items]; of parts under gate_0 and so on."""

MAGIC = b"jitmoe\0W"
HEADER_BYTES = 4096
DIGEST_BYTES = 32
SIZES = ("num_experts", "hidden_size", "intermediate_size")
BFLOAT16_SAYS = {"weight_format": "bfloat16", "group_size": 0, "scale_dtype": "none"}
"""What the header of quantised weights says beside the sizes; that of bfloat16 does not say it."""

MAP_NORESERVE = 0x4000
"""Linux on x86-64; the mmap module of Python 3.11 does not name it."""

AGAIN = "Write it again with layer.save_packed()"

CHUNK = 1 << 20
"""Bytes read at a time to compute a digest."""


def write_packed(path: Path, config: MoEConfig, matrices: Mapping[str, npt.NDArray[np.int16]]) -> None:
    """Write ``matrices`` to ``path``, whole or not at all.

    Raises:
        PackedFileError: ``path`` cannot be written, or the disk is full; what was there is unchanged.
    """
    places = _places(config)
    digests = {}
    try:
        with replacing(path) as stream:
            for name, (offset, nbytes) in places.items():
                content = matrices[name].reshape(-1).view(np.uint8).data
                assert content.nbytes == nbytes, f"{name}: {content.nbytes} bytes, expected {nbytes}"
                stream.seek(offset)
                stream.write(content)
                digests[name] = hashlib.sha256(content).hexdigest()
            stream.seek(0)
            stream.write(_header(config, places, digests))
    except OSError as error:
        raise PackedFileError(f"packed weights cannot be written to {path}: {error}") from error


def map_packed(path: Path, config: MoEConfig, verify: bool) -> Matrices:
    """The matrices in ``path``, mapped: pages are read when touched and shared with every process that maps them.

    The mapping is private: a write to it stays in this process and never reaches the file.

    Raises:
        PackedFileError: no file, no file of :func:`write_packed`, of another layout or other sizes, or damaged.
    """
    try:
        # Not blocking: a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PackedFileError(f"packed weights cannot be read from {path}: {error}") from error
    try:
        places = _places(config)
        try:
            digests = _check_header(path, descriptor, config, places)
            if verify:
                _check_digests(path, descriptor, config, places, digests)
        except PackedFileError:
            raise
        except OSError as error:
            raise PackedFileError(f"packed weights cannot be read from {path}: {error}") from error
        try:
            pages = mmap.mmap(
                descriptor,
                _length(places),
                flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            raise PackedFileError(f"{path} cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    return {
        name: np.frombuffer(pages, np.int16, nbytes // 2, offset).reshape(config.num_experts, -1)
        for name, (offset, nbytes) in places.items()
    }


def _places(config: MoEConfig) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each matrix. Multiples of a huge page: file systems that have huge pages can map them."""
    places = {}
    end = HEADER_BYTES
    for part in parts_of(config):
        for projection in projections(config.hidden_size, part.end - part.first):
            nbytes = config.num_experts * projection.packed_items(config) * 2
            name = f"{projection.name}{part.suffix}"
            places[name] = (round_up(end, PAGE), nbytes)
            end = sum(places[name])
    return places


def _length(places: Mapping[str, tuple[int, int]]) -> int:
    return max(offset + nbytes for offset, nbytes in places.values())


def _header(config: MoEConfig, places: Mapping[str, tuple[int, int]], digests: Mapping[str, str]) -> bytes:
    matrices = {
        name: {"offset": offset, "nbytes": nbytes, "sha256": digests[name]} for name, (offset, nbytes) in places.items()
    }
    sizes = {name: getattr(config, name) for name in SIZES}
    if config.parts > 1:
        sizes["tensor_parallel"] = config.parts
    packing = _packing(config) if config.packing.quantized else {}
    text = json.dumps({"layout": PACKED_LAYOUT, **sizes, **packing, "matrices": matrices}).encode()
    body = text.ljust(HEADER_BYTES - len(MAGIC) - DIGEST_BYTES, b"\0")
    return MAGIC + hashlib.sha256(body).digest() + body


def _check_header(
    path: Path, descriptor: int, config: MoEConfig, places: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Digests of the matrices, after everything that the header says was found right."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        raise PackedFileError(f"{path} is not a regular file; name one that layer.save_packed() wrote")
    header = _read_header(path, os.pread(descriptor, HEADER_BYTES, 0))
    if header.get("layout") != PACKED_LAYOUT:
        raise PackedFileError(
            f"{path} has version {header.get('layout')} of the packed layout, this jitmoe reads version "
            f"{PACKED_LAYOUT}: write the file again with layer.save_packed()"
        )
    other = [
        f"{name} is {header.get(name)}, the config's is {getattr(config, name)}"
        for name in SIZES
        if header.get(name) != getattr(config, name)
    ]
    if other:
        raise PackedFileError(f"{path} holds a layer of other sizes: its {'; its '.join(other)}")
    parts = header.get("tensor_parallel", 1)
    if parts != config.parts:
        raise PackedFileError(
            f"{path} holds weights for tensor_parallel={parts}, the config says {config.parts}: take {parts}, or write "
            "another file with layer.save_packed() of a layer that has the count of the config"
        )
    found = {name: header.get(name, usual) for name, usual in BFLOAT16_SAYS.items()}
    if found != _packing(config):
        raise PackedFileError(
            f"{path} holds weights of another format: {_words(found)}, the config's are {_words(_packing(config))}"
        )
    if info.st_size != _length(places):
        raise PackedFileError(
            f"{path} is damaged: it has {info.st_size} bytes, expected {_length(places)}. Write it again"
        )
    return _digests(path, header, places)


def _digests(path: Path, header: Mapping[str, Any], places: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """SHA-256 of each matrix, if the header places it where this layout does."""
    matrices = header.get("matrices")
    digests: dict[str, str] = {}
    for name, (offset, nbytes) in places.items():
        found = matrices.get(name) if isinstance(matrices, dict) else None
        said = found if isinstance(found, dict) else {}
        if (said.get("offset"), said.get("nbytes")) != (offset, nbytes) or not isinstance(said.get("sha256"), str):
            raise PackedFileError(f"{path} has a header that says other things of {name} than its layout. {AGAIN}")
        digests[name] = said["sha256"]
    return digests


def _packing(config: MoEConfig) -> dict[str, str | int]:
    packing = config.packing
    return {"weight_format": packing.format.name, "group_size": packing.group, "scale_dtype": packing.scale}


def _words(packing: Mapping[str, str | int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in packing.items() if value not in (0, "none"))


def _read_header(path: Path, block: bytes) -> dict[str, Any]:
    if not block.startswith(MAGIC):
        raise PackedFileError(f"{path} is no file of packed weights: it does not begin as those of save_packed() do")
    digest, body = block[len(MAGIC) :][:DIGEST_BYTES], block[len(MAGIC) + DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != digest:
        raise PackedFileError(f"{path} is damaged: its header is not what was written. Write it again")
    try:
        header = json.loads(body.rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"{path} has a header that is no JSON: {error}. {AGAIN}") from error
    if not isinstance(header, dict):
        raise PackedFileError(f"{path} has a header that is no JSON object. {AGAIN}")
    return header


def _check_digests(
    path: Path,
    descriptor: int,
    config: MoEConfig,
    places: Mapping[str, tuple[int, int]],
    digests: Mapping[str, str],
) -> None:
    """Read everything once, the matrices side by side; through the page cache, where the mapping will find it.

    Pages come from the NUMA node of the thread that reads them first, so each part is read on its own.
    """
    found: dict[str, str] = {}

    def digest(name: str) -> None:
        offset, nbytes = places[name]
        content = hashlib.sha256()
        for start in range(0, nbytes, CHUNK):
            content.update(os.pread(descriptor, min(CHUNK, nbytes - start), offset + start))
        found[name] = content.hexdigest()

    def digest_part(part: Part, _: Team) -> None:
        for name in part.names():
            digest(name)

    if config.parts == 1:
        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(digest, places))
    else:
        by_part(parts_of(config), config.parts, digest_part)
    damaged = [name for name in places if found[name] != digests[name]]
    if damaged:
        raise PackedFileError(
            f"{path} is damaged: the {' and '.join(damaged)} weights are not what was written. Write it again"
        )
