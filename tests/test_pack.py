"""Packing: the documented layout, bit for bit there and back, from every kind of source, without a second copy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import any_shape, case_named, config_of, layer_of, run_python, same_bits, usable_isas
from safetensors.torch import save_file
from yardstick import Inputs, make_inputs

from jitmoe import MoELayer, safetensors_source
from jitmoe.errors import InputError, InputTypeError, WeightsChangedError
from jitmoe.experts.pack import empty_packed, pack_experts, unpack_experts
from jitmoe.experts.seal import Seal
from jitmoe.jit import kernels
from jitmoe.plan.shapes import packed_elements

ISA = usable_isas()[0]
BASES = ("gate_proj", "up_proj", "down_proj")


def any_kernels() -> kernels.Kernels:
    return kernels.load(any_shape())


def random_bits(experts: int, out: int, in_: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 of all 65536 patterns: infinities, denormals and NaNs of every payload and sign among them."""
    patterns = np.random.default_rng(seed).integers(0, 1 << 16, (experts, out, in_), dtype=np.uint16)
    return torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)


def packed_by_formula(matrix: torch.Tensor) -> np.ndarray:
    """The picture in gemm/interface.hpp as index arithmetic, for one matrix [out, in]; padding is zero."""
    out, in_ = matrix.shape
    strips, blocks = -(-out // 32), -(-in_ // 32)
    padded = np.zeros((strips * 32, blocks * 32), np.int16)
    padded[:out, :in_] = matrix.view(torch.int16).numpy()
    # out = (strip, tile, lane), in = (block, pair, half); stored strip, block, tile, pair, lane, half.
    axes = padded.reshape(strips, 2, 16, blocks, 16, 2)
    return axes.transpose(0, 3, 1, 4, 2, 5).reshape(-1)


SIZES = [(1, 1), (1, 33), (33, 1), (15, 17), (16, 32), (31, 31), (32, 32), (33, 65), (47, 100), (64, 96), (130, 48)]


@pytest.mark.parametrize(("out", "in_"), SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_layout_and_round_trip(out: int, in_: int, threads: int) -> None:
    experts = 3
    source = random_bits(experts, out, in_)
    packed = empty_packed(experts, out, in_)
    # What lies there before must not matter: an arena or a reused buffer is not zero.
    packed.fill_(0x7FC1)
    address = packed.data_ptr()
    any_kernels().pack(source.data_ptr(), address, experts, out, in_, threads)
    for expert in range(experts):
        np.testing.assert_array_equal(packed[expert].numpy(), packed_by_formula(source[expert]))
    back = torch.full((experts, out, in_), 7.0, dtype=torch.bfloat16)
    any_kernels().unpack(address, back.data_ptr(), experts, out, in_, threads)
    assert same_bits(back, source)


@pytest.mark.parametrize(("out", "in_"), SIZES)
def test_packed_elements_is_what_the_formula_fills(out: int, in_: int) -> None:
    assert packed_elements(out, in_) == packed_by_formula(random_bits(1, out, in_)[0]).size


def test_every_instruction_set_packs_alike() -> None:
    source = random_bits(2, 33, 47)
    results = []
    for isa in usable_isas():
        packed = empty_packed(2, 33, 47)
        pack_experts(kernels.load(any_shape(isa)), "w", source, packed, 33, 47)
        results.append(packed)
    assert all(same_bits(results[0], packed) for packed in results[1:])


def sources_of(inputs: Inputs, folder: Path) -> dict[str, Callable[[str], object]]:
    """Ways to hand the same base over, by name; each takes the name of a projection."""
    stacked, single = folder / "stacked.safetensors", folder / "single.safetensors"
    tensors = {name: getattr(inputs, name) for name in BASES}
    save_file(tensors, stacked)
    save_file({f"layers.0.{e}.{n}": t[e].clone() for n, t in tensors.items() for e in range(len(t))}, single)
    return {
        "tensor": lambda name: tensors[name],
        "strided tensor": lambda name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2),
        "parameter": lambda name: torch.nn.Parameter(tensors[name]),
        "list": lambda name: list(tensors[name]),
        "function": lambda name: tensors[name].__getitem__,
        "stacked file": lambda name: safetensors_source(stacked, name),
        "file per expert": lambda name: safetensors_source(str(single), f"layers.0.{{expert}}.{name}"),
    }


KINDS = ("tensor", "strided tensor", "parameter", "list", "function", "stacked file", "file per expert")


@pytest.mark.parametrize("kind", KINDS)
def test_sources(kind: str, tmp_path: Path) -> None:
    inputs = make_inputs(case_named("ragged_31"))
    source = sources_of(inputs, tmp_path)[kind]
    layer = MoELayer(config_of(inputs.case, ISA), *(source(name) for name in BASES))
    unpacked = layer.unpack()
    assert list(unpacked) == list(BASES)
    for name in BASES:
        assert same_bits(unpacked[name], getattr(inputs, name)), name


def test_a_function_is_asked_once_per_expert_in_order() -> None:
    inputs = make_inputs(case_named("ragged_31"))
    asked: list[int] = []

    def gate(expert: int) -> torch.Tensor:
        asked.append(expert)
        return inputs.gate_proj[expert]

    MoELayer(config_of(inputs.case, ISA), gate, inputs.up_proj, inputs.down_proj)
    assert asked == list(range(inputs.case.experts))


def bad_sources(good: torch.Tensor) -> dict[str, tuple[object, type[Exception], str]]:
    """A base [E, out, in] that is wrong in one way, the exception and words that its message must have."""
    experts, out, in_ = good.shape
    return {
        "float32": (good.float(), InputTypeError, r"gate_proj must be bfloat16, got torch\.float32"),
        "float16": (good.half(), InputTypeError, r"gate_proj must be bfloat16"),
        "transposed": (good.transpose(1, 2), InputError, rf"gate_proj must have shape \[{experts}, {out}, {in_}\]"),
        "one expert too few": (good[1:], InputError, "gate_proj must have shape"),
        "meta": (good.to("meta"), InputError, "gate_proj must be a dense CPU tensor"),
        "sparse": (good.float().to_sparse().bfloat16(), InputError, "gate_proj must be a dense CPU tensor"),
        "short list": (list(good[1:]), InputError, f"gate_proj has {experts - 1} matrices"),
        "list with a wrong matrix": (
            [*good[:-1], good[0].T],
            InputError,
            rf"gate_proj\[{experts - 1}\] must have shape",
        ),
        "list of arrays": ([np.zeros((out, in_))] * experts, InputTypeError, r"gate_proj\[0\] must be a torch.Tensor"),
        "function of float32": (lambda e: good[e].float(), InputTypeError, r"gate_proj\[0\] must be bfloat16"),
    }


@pytest.mark.parametrize("kind", bad_sources(torch.zeros(2, 3, 4, dtype=torch.bfloat16)))
def test_bad_sources_are_refused_by_name(kind: str) -> None:
    inputs = make_inputs(case_named("ragged_31"))
    source, error, words = bad_sources(inputs.gate_proj)[kind]
    with pytest.raises(error, match=words):
        MoELayer(config_of(inputs.case, ISA), source, inputs.up_proj, inputs.down_proj)


def test_the_layer_does_not_follow_its_source() -> None:
    inputs = make_inputs(case_named("ragged_31"))
    before = inputs.gate_proj.clone()
    layer = layer_of(inputs, ISA)
    inputs.gate_proj.zero_()
    assert same_bits(layer.unpack()["gate_proj"], before)


def test_unpack_experts_gives_a_copy() -> None:
    source = random_bits(1, 33, 31)
    packed = empty_packed(1, 33, 31)
    pack_experts(any_kernels(), "w", source, packed, 33, 31)
    unpack_experts(any_kernels(), packed, 33, 31).zero_()
    assert same_bits(unpack_experts(any_kernels(), packed, 33, 31), source)


class TestSeal:
    """Frozen means frozen: a write to the packed weights is an error of the next call, not a different result."""

    def test_a_write_is_an_error_that_names_the_projection(self) -> None:
        inputs = make_inputs(case_named("small"))
        layer = layer_of(inputs, ISA)
        layer.packed_up[0, 0] += 1
        with pytest.raises(WeightsChangedError, match=r"packed up weights.*load_state_dict"):
            layer(inputs.x, inputs.topk_ids, inputs.weights)

    def test_changed_weights_are_not_saved(self, tmp_path: Path) -> None:
        layer = layer_of(make_inputs(case_named("small")), ISA)
        layer.packed_gate.zero_()
        with pytest.raises(WeightsChangedError, match="packed gate weights"):
            layer.save_packed(tmp_path / "weights.jitmoe")
        assert not list(tmp_path.iterdir())

    def test_load_state_dict_closes_it_again(self) -> None:
        inputs = make_inputs(case_named("small"))
        layer = layer_of(inputs, ISA)
        canonical, expected = layer.state_dict(), layer(inputs.x, inputs.topk_ids, inputs.weights)
        layer.packed_down.zero_()
        layer.load_state_dict(canonical)
        assert same_bits(layer(inputs.x, inputs.topk_ids, inputs.weights), expected)

    def test_a_copy_is_sealed_anew(self) -> None:
        seal, packed = Seal(), torch.zeros(4, dtype=torch.int16)
        seal.close("gate", packed)
        copy = packed.clone()
        seal.check("gate", copy)
        copy.add_(1)
        with pytest.raises(WeightsChangedError):
            seal.check("gate", copy)


CONSTRUCTION = r"""
import re, torch
from pathlib import Path
from jitmoe import MoEConfig, MoELayer

E, H, I = 96, 512, 512
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

def matrix(expert):
    return torch.full((I, H), float(expert), dtype=torch.bfloat16)

small = MoELayer(MoEConfig(2, H, I, 1, lora_rank=0), matrix, matrix, matrix)
ids = torch.zeros(1, 1, dtype=torch.int64)
small(torch.zeros(1, H, dtype=torch.bfloat16), ids, torch.ones(1, 1))
before = peak()
keep = KEEP
source = [matrix(e) for e in range(E)] if keep else matrix
layer = MoELayer(MoEConfig(E, H, I, 1, lora_rank=0), source, source, source)
print((peak() - before) / (3 * E * H * I * 2))
"""
"""Prints the peak of memory that construction added, in units of one copy of the base (here 151 MB)."""


@pytest.mark.parametrize(("keep", "least", "most"), [(False, 0.8, 1.1), (True, 1.15, 1.5)])
def test_construction_holds_one_copy(keep: bool, least: float, most: float) -> None:
    """A function's matrices are let go one by one; holding a third of the base in a list shows that we measure it."""
    copies = float(run_python(CONSTRUCTION.replace("KEEP", str(keep)), JITMOE_ISA=ISA))
    assert least <= copies <= most, f"{copies:.2f} copies of the base at the peak"
