"""Loading compiled kernels: a library of another version is refused, a matching one loaded once."""

import hashlib
import json
from pathlib import Path

import pytest
from helpers import any_shape
from test_toolchain import compile_text

from jitmoe.errors import KernelError
from jitmoe.jit import abi, kernels
from jitmoe.jit.build import ensure
from jitmoe.jit.render import render


@pytest.fixture(scope="module")
def library() -> Path:
    return ensure(render(any_shape()))


@pytest.mark.parametrize(("name", "value"), [("abi", abi.ABI_VERSION + 1), ("call_size", abi.CALL.itemsize + 8)])
def test_a_library_of_another_version_is_refused(name: str, value: int, tmp_path: Path) -> None:
    said = {"abi": abi.ABI_VERSION, "call_size": abi.CALL.itemsize, name: value}
    functions = "".join(f"long long jitmoe_{name}() {{ return {value}; }}\n" for name, value in said.items())
    compile_text(tmp_path, f'extern "C" {{\n{functions}}}\n')
    digest = hashlib.sha256((tmp_path / "kernel.so").read_bytes()).hexdigest()
    (tmp_path / "meta.json").write_text(json.dumps({"digest": digest}))
    with pytest.raises(KernelError, match=r"another version.*jitmoe cache clear"):
        kernels.Kernels(tmp_path / "kernel.so")


def test_a_matching_library_is_loaded_once(library: Path) -> None:
    assert kernels.Kernels(library).path == library
    assert kernels.load(any_shape()) is kernels.load(any_shape())
