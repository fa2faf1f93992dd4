"""Faults from the field in files: writing interrupted half way (S), and readers of foreign bytes (T)."""

import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import build_kernels, case_named, layer_of, run_python, same_bits, usable_isas
from yardstick import make_inputs

from jitmoe import MoELayer, process
from jitmoe.cli import main
from jitmoe.config import MoEConfig
from jitmoe.errors import CaptureError, ConfigError, JitmoeError, PackedFileError
from jitmoe.experts import packed_file
from jitmoe.experts.packed_file import DIGEST_BYTES, HEADER_BYTES, MAGIC
from jitmoe.inspect.recording import read_recording
from jitmoe.memory.model import read_model

ISA = usable_isas()[0]
SMALL = case_named("small")
MUTATIONS = 300


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([SMALL], [ISA])


@pytest.fixture
def layer() -> MoELayer:
    return layer_of(make_inputs(SMALL), ISA)


@pytest.mark.field("S")
class TestWritingInterrupted:
    def test_s_the_lock_ends_with_its_holder_wherever_that_was_interrupted(self, tmp_path: Path) -> None:
        """An interrupt at each line that runs between the first and the last of a save; the next save works."""
        run_python(INTERRUPTED, FOLDER=str(tmp_path))

    @pytest.mark.parametrize("make", ["fifo", "device"])
    def test_s_only_regular_files_are_replaced(self, layer: MoELayer, tmp_path: Path, make: str) -> None:
        path = tmp_path / "target"
        if make == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/null")
        with pytest.raises(PackedFileError, match="no regular file"):
            layer.save_packed(path)
        assert path.is_fifo() or path.is_char_device()

    def test_s_a_read_error_is_one_of_ours(self, layer: MoELayer, tmp_path: Path, monkeypatch) -> None:
        layer.save_packed(tmp_path / "layer.packed")
        for fails_at in (0, 3):
            with monkeypatch.context() as patch:
                patch.setattr(packed_file.os, "pread", failing_after(fails_at, os.pread))
                with pytest.raises(PackedFileError, match=r"cannot be read from .*Input/output"):
                    MoELayer.from_packed(layer.config, tmp_path / "layer.packed")

    def test_s_an_interrupt_inside_of_compiled_code_is_one(self) -> None:
        with pytest.raises(KeyboardInterrupt), process.compiled_call():
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as interrupt:
                raise SystemError("returned a result with an exception set") from interrupt
        with pytest.raises(KeyboardInterrupt), process.compiled_call():
            try:
                raise SystemError("inner") from KeyboardInterrupt()
            except SystemError as inner:
                raise SystemError("outer") from inner
        with pytest.raises(SystemError, match="another"), process.compiled_call():
            raise SystemError("another one")


def failing_after(calls: int, read: Callable[..., bytes]) -> Callable[..., bytes]:
    left = iter(range(calls))

    def fails(*arguments: int) -> bytes:
        if next(left, None) is None:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    return fails


INTERRUPTED = """
import os, sys
from pathlib import Path
from jitmoe import files

path = Path(os.environ["FOLDER"]) / "f"
path.write_bytes(b"old")
stop = 0
while True:
    stop += 1
    lines = [0]
    def trace(frame, event, _):
        if frame.f_code.co_filename.endswith(("files.py", "filelock/_unix.py", "filelock/_api.py")):
            lines[0] += event == "line"
            if lines[0] == stop:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    interrupted = False
    sys.settrace(trace)
    try:
        with files.replacing(path) as stream:
            stream.write(b"new")
    except KeyboardInterrupt:
        interrupted = True
    finally:
        sys.settrace(None)
    assert path.read_bytes() in (b"old", b"new"), stop
    with files.replacing(path) as stream:
        stream.write(b"old")
    assert path.read_bytes() == b"old", stop
    if not interrupted:
        break
assert stop > 20, stop
"""


def mutated(content: bytes, seed: int) -> bytes:
    """The bytes with some changed, cut off, repeated or exchanged."""
    pick = random.Random(seed)
    found = bytearray(content)
    for _ in range(pick.randint(1, 4)):
        place = pick.randrange(len(found)) if found else 0
        kind = pick.randrange(5)
        if kind == 0:
            found[place : place + 1] = bytes([pick.randrange(256)])
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            del found[place : place + pick.randint(1, 40)]
        elif kind == 3:
            found[place:place] = found[place : place + pick.randint(1, 40)]
        else:
            found[place : place + 8] = pick.randbytes(8)
    return bytes(found)


def refused_or_read(read: Callable[[], object], errors: tuple[type[JitmoeError], ...]) -> bool:
    """Whether one of our errors came; any other exception is the fault."""
    try:
        read()
    except errors:
        return True
    return False


VALUES = (None, True, -1, 0, 2**70, 1.5, "x", [], [1], {}, {"offset": 0}, [[[]]])


def other_values(content: object) -> Iterator[object]:
    """``content`` with one value of it, at any depth, in place of another type."""
    if isinstance(content, dict):
        for name in content:
            yield from ({**content, name: value} for value in VALUES)
            yield {key: value for key, value in content.items() if key != name}
            yield from ({**content, name: inner} for inner in other_values(content[name]))


@pytest.mark.field("T")
class TestReadersOfForeignBytes:
    def test_t_packed_files(self, layer: MoELayer, tmp_path: Path) -> None:
        path = tmp_path / "layer.packed"
        layer.save_packed(path)
        whole = path.read_bytes()
        refused = 0
        for seed in range(MUTATIONS):
            path.write_bytes(mutated(whole[:HEADER_BYTES], seed) + whole[HEADER_BYTES:])
            refused += refused_or_read(lambda: MoELayer.from_packed(layer.config, path), (PackedFileError,))
        assert refused > MUTATIONS / 2, "most of them are damaged"

    def test_t_forged_headers(self, layer: MoELayer, tmp_path: Path) -> None:
        """The digest of the header is right, and what it says is not."""
        import hashlib

        path = tmp_path / "layer.packed"
        layer.save_packed(path)
        whole = path.read_bytes()
        start = len(MAGIC) + DIGEST_BYTES
        header = json.loads(whole[start:HEADER_BYTES].rstrip(b"\0"))
        texts = [json.dumps(other) for other in other_values(header)]
        texts += ["[" * 4000, "null", "[]", "7", '"x"', "\xff", "{", json.dumps(header)]
        for text in texts:
            body = text.encode("latin-1")[: HEADER_BYTES - start].ljust(HEADER_BYTES - start, b"\0")
            path.write_bytes(MAGIC + hashlib.sha256(body).digest() + body + whole[HEADER_BYTES:])
            read = lambda: MoELayer.from_packed(layer.config, path).unpack()  # noqa: E731
            if refused_or_read(read, (PackedFileError,)):
                continue
            assert same_bits(read()["up_proj"], layer.unpack()["up_proj"]), "what is accepted is right"

    def test_t_captures(self, layer: MoELayer, tmp_path: Path) -> None:
        inputs = make_inputs(SMALL)
        path = tmp_path / "call.pt"
        layer.capture(path)
        layer(inputs.x, inputs.topk_ids, inputs.weights).backward(inputs.dout)
        whole = path.read_bytes()
        for seed in range(MUTATIONS):
            path.write_bytes(mutated(whole, seed))
            refused_or_read(lambda: read_recording(path), (CaptureError, ConfigError))

    def test_t_captures_with_other_values(self, layer: MoELayer, tmp_path: Path, capsys) -> None:
        inputs = make_inputs(SMALL)
        path = tmp_path / "call.pt"
        layer.capture(path)
        layer(inputs.x, inputs.topk_ids, inputs.weights).backward(inputs.dout)
        content = torch.load(path, weights_only=True)
        values = (None, [1], torch.zeros(0), torch.zeros(2, 3, dtype=torch.complex64))
        for name in content:
            for value in values:
                torch.save({**content, name: value}, path)
                status = main(["replay", str(path)])
                assert status in (0, 1), (name, value)
                assert "Traceback" not in capsys.readouterr().err

    def test_t_models(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        content = {"model_type": "qwen3_moe", "num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32,
                   "num_experts_per_tok": 2, "num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0],
                   "text_config": None, "layer_types": ["full_attention"] * 4}  # fmt: skip
        texts = [json.dumps(other) for other in other_values(content)]
        texts += ["[" * 100_000, '{"text_config":' * 5000 + "{}" + "}" * 5000, "null", "\ud800", "", "{"]
        for text in texts:
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            refused_or_read(lambda: MoEConfig(**read_model(path).fields), (ConfigError,))
        for seed in range(MUTATIONS):
            path.write_bytes(mutated(json.dumps(content).encode(), seed))
            refused_or_read(lambda: MoEConfig(**read_model(path).fields), (ConfigError,))
