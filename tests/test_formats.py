"""Weight formats: every code decoded right, and the bits of the bfloat16 layer on W' in all that a layer computes."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from emulated import NEEDS_TILES, Emulated, tiles
from helpers import EVERY_ISA, NATIVE, case_named, config_of, copied, different, same_bits, usable_isas
from quantized import BASES, PACKINGS, decoded, options_of, packing_named, pair_of, quantized_base, random_quantized
from test_back_end import compile_text
from test_pack import SIZES
from torch import Tensor
from yardstick import CASES, Case, make_inputs, results_of_layer

from jitmoe import MemoryPlan, MoEConfig, MoELayer, Quantized, build
from jitmoe.errors import ConfigError, InputError, InputTypeError, PackedFileError, WeightsChangedError
from jitmoe.experts.pack import decode_experts, empty_packed, pack_experts, unpack_experts
from jitmoe.experts.quantized import SCALE_DTYPES
from jitmoe.formats import FORMATS, Packing
from jitmoe.isa import ISAS
from jitmoe.jit import capability, kernels
from jitmoe.oracle.formats import dequantize
from jitmoe.plan.shapes import plan_kernels

ISA = usable_isas()[0]
SLOW = pytest.mark.slow

EVERY_PACKING = pytest.mark.parametrize("name", PACKINGS)
RAGGED = case_named("ragged_100")
"""Its width of 130 has a second square of fp8_block and a second group of 128, both in part."""


def kernels_of(name: str, isa: str) -> kernels.Kernels:
    config = MoEConfig(1, 32, 32, 1, lora_rank=0, m_step=ISAS[isa].m_steps[-1], **options_of(name))
    return kernels.load(plan_kernels(config, isa).shapes[-1])


def decoded_by(name: str, isa: str, matrix: Quantized, out: int, in_: int) -> Tensor:
    """What the kernels make of one matrix."""
    packing, found = packing_named(name), kernels_of(name, isa)
    packed = empty_packed(1, out, in_, packing)
    pack_experts(found, "w", Quantized(matrix.values[None], matrix.scales[None]), packed, out, in_, packing)
    return decode_experts(found, packed, out, in_)[0]


SPECIAL = (
    *(0.0, -0.0, 1.0, -1.0, 0.37, -1.7e-3, 2.0**-9, 3.1e-39, 1e-45, 2.0**-126, 2.0**-117, 1.9 * 2.0**-118, 2.0**-133),
    *(
        1.99 * 2.0**118,
        2.0**119,
        2.0**120,
        3e38,
        -3e38,
        float("inf"),
        -float("inf"),
        float("nan"),
        1.0 + 2**-7,
        1.0 + 2**-23,
        65504.0,
    ),
)
"""Scales that are not finite, that make denormals and overflows of some codes, or round at a tie."""


def every_code(packing: Packing) -> tuple[Quantized, int, int]:
    """Every code with every special scale: a matrix, its rows and its columns."""
    form = packing.format
    usual = torch.tensor(SPECIAL).to(SCALE_DTYPES[packing.scale]) if packing.scale != "e8m0" else None
    if form.sharing == "square":
        out, in_ = 128 * len(SPECIAL), 256
        codes = (torch.arange(out)[:, None] + torch.arange(in_)) % 256
        assert usual is not None
        return Quantized(_codes(packing, codes), usual[:, None].repeat(1, 2)), out, in_
    if form.sharing == "row":
        assert usual is not None
        scales = torch.cat([usual.repeat_interleave(32), usual])  # a strip of each, and all kinds mixed
        out, in_ = len(scales), 256
        codes = torch.arange(in_).repeat(out, 1)
        return Quantized(_codes(packing, codes), scales.view(packing.scale_shape(out, in_))), out, in_
    # In the first strip a block has one scale, so that the usual ones meet no other; in the second one all kinds.
    scales = torch.arange(256, dtype=torch.uint8) if usual is None else usual
    out, groups = 64, len(scales)
    in_ = groups * packing.group
    table = torch.stack([scales.repeat(32, 1), torch.stack([scales.roll(i) for i in range(32)])]).view(out, groups)
    codes = (torch.arange(out)[:, None] + torch.arange(in_)) % 16
    return Quantized(_codes(packing, codes), table.contiguous()), out, in_


def _codes(packing: Packing, codes: Tensor) -> Tensor:
    """Codes [out, in] as the format ships them."""
    if packing.format.bits == 8:
        return codes.to(torch.uint8).view(getattr(torch, packing.format.value_dtype))
    pairs = codes.view(codes.shape[0], -1, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    if packing.format.name == "mxfp4":
        return packed.view(codes.shape[0], -1, 16)
    return packed.view(torch.int32)


def same_values(one: Tensor, other: Tensor) -> bool:
    """The same bits, where a NaN equals any other."""
    return torch.equal(one.isnan(), other.isnan()) and same_bits(one.nan_to_num(0), other.nan_to_num(0))


def check_every_code(name: str, isa: str) -> None:
    packing = packing_named(name)
    matrix, out, in_ = every_code(packing)
    expected = dequantize(packing, matrix.values, matrix.scales, out, in_)
    assert expected.isnan().any() and expected.isinf().any() and not (expected == 0).all()
    found = decoded_by(name, isa, matrix, out, in_)
    assert same_values(found, expected)
    assert set(found[found.isnan()].view(torch.int16).tolist()) <= {0x7FC0, 0xFFC0 - 0x10000}, "a NaN of another kind"


@EVERY_ISA
@EVERY_PACKING
def test_every_code_with_every_kind_of_scale(name: str, isa: str) -> None:
    check_every_code(name, isa)


def test_codes_by_hand() -> None:
    """The oracle itself, beside the tables of the formats."""
    codes = torch.tensor([[0x00, 0x80, 0x01, 0x07, 0x08, 0x7E, 0xFE, 0x7F, 0xFF]], dtype=torch.uint8)
    e4m3 = dequantize(
        packing_named("fp8_row"),
        codes.view(torch.float8_e4m3fn),
        torch.ones(1, 1), 1, 9,
    )  # fmt: skip
    expected = [0.0, -0.0, 2.0**-9, 7 * 2.0**-9, 2.0**-6, 448.0, -448.0, float("nan"), float("nan")]
    assert same_values(e4m3, torch.tensor([expected]).bfloat16())
    words = torch.tensor([0x76543210, -0x01234568], dtype=torch.int32).view(1, 2)  # the second is 0xfedcba98
    int4 = dequantize(packing_named("int4_group32"), words, torch.ones(1, 1).bfloat16(), 1, 16)
    assert int4[0].tolist() == list(range(-8, 8))
    blocks = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8).view(1, 1, 16)
    mxfp4 = dequantize(packing_named("mxfp4"), blocks, torch.tensor([[128]], dtype=torch.uint8), 1, 32)
    positive = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert same_values(mxfp4, torch.tensor([[*positive, *(-x for x in positive)] * 2]).bfloat16())
    assert dequantize(packing_named("mxfp4"), blocks, torch.tensor([[255]], dtype=torch.uint8), 1, 32).isnan().all()


@EVERY_PACKING
@pytest.mark.parametrize("isa", ["ref", ISA])
def test_round_trip_of_every_size(name: str, isa: str) -> None:
    """Values and scales come back bit for bit, what fills the last word too; what lay there before does not matter."""
    packing, found = packing_named(name), kernels_of(name, isa)
    for out, in_ in (*SIZES, (1, 31), (129, 257), (257, 129)):
        source = random_quantized(packing, (3,), out, in_, seed=out, std=1.0)
        packed = empty_packed(3, out, in_, packing).fill_(0x7FC1)
        assert packed.nbytes == 3 * packing.packed_bytes(out, in_)
        pack_experts(found, "w", source, packed, out, in_, packing)
        back = unpack_experts(found, packed, out, in_, packing=packing)
        assert isinstance(back, Quantized)
        assert torch.equal(back.values.view(torch.uint8), source.values.view(torch.uint8))
        assert torch.equal(back.scales, source.scales)
        expected = dequantize(packing, source.values, source.scales, out, in_)
        assert same_bits(decode_experts(found, packed, out, in_), expected)


LAYOUT = """
#include "weights/layout.hpp"
using namespace jitmoe;
constexpr Shape shape{.isa = Isa::ref, .hidden = 1, .intermediate = 1, .m_step = 1, .format = Format::FORMAT,
                      .group_size = GROUP, .scale = Scale::SCALE};
extern "C" int64_t items(int64_t out, int64_t in) { return Layout<shape>::items(out, in); }
"""


@EVERY_PACKING
def test_the_planner_knows_the_bytes_of_the_kernels(name: str, tmp_path) -> None:
    packing = packing_named(name)
    text = LAYOUT.replace("FORMAT", packing.format.name).replace("GROUP", str(packing.group))
    items = ctypes.CDLL(str(compile_text(text.replace("SCALE", packing.scale), "ref", tmp_path))).items
    items.restype = ctypes.c_int64
    for out, in_ in (*SIZES, (129, 257), (2048, 1408), (2880, 2880)):
        assert items(ctypes.c_int64(out), ctypes.c_int64(in_)) == packing.packed_bytes(out, in_), (out, in_)


MODELS = {"Qwen3-30B-A3B": (128, 2048, 768), "DeepSeek-V3": (256, 7168, 2048), "gpt-oss-120b": (128, 2880, 2880)}
BITS = {
    "int4_group32": 4.5,
    "mxfp4": 4.25,
    "fp8_block": 8.0,
    "fp8_row": 8.0,
    "int8_row": 8.0,
    "int4_group128-float32": 4.25,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BITS)
def test_bits_of_a_weight_in_the_memory_plan(name: str, model: str) -> None:
    experts, hidden, intermediate = MODELS[model]
    config = MoEConfig(experts, hidden, intermediate, 8, isa="avx2", **options_of(name))
    planned = MemoryPlan.of(config, tokens=1).by_kind()["packed weight"]
    exact = experts * 3 * hidden * intermediate * BITS[name] / 8
    assert exact <= planned * 1.0001 and planned <= 1.01 * exact, planned / exact


LAYER_CASES = [(name, case) for name in PACKINGS for case in CASES]


def few(name: str, case: Case, isa: str) -> bool:
    """The cells of `make test`: a shape for each packing on the best set and on AVX2, and gpt-oss as shipped."""
    if case.name == "gpt_oss":
        return name == "mxfp4" and isa == ISA
    return case.name == "ragged_100" and isa in (ISA, "avx2")


def cells() -> Iterator[pytest.param]:
    for name, case in LAYER_CASES:
        for isa in ISAS:
            if isa in NATIVE:
                marks = [pytest.mark.isa(isa), *([] if few(name, case, isa) else [pytest.mark.slow])]
                yield pytest.param(name, case, isa, marks=marks, id=f"{name}-{case}-{isa}")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built(request: pytest.FixtureRequest) -> None:
    """Compile in parallel what the selected tests would otherwise compile one by one."""
    mine = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    wanted = [item.callspec.params for item in mine if {"case", "isa", "name"} <= item.callspec.params.keys()]
    configs = [
        config_of(cell["case"], cell["isa"], m_step=ISAS[cell["isa"]].m_steps[-1], **chosen)
        for cell in wanted
        if cell["isa"] in usable_isas()
        for chosen in ({}, options_of(cell["name"]))
    ]
    build(configs, progress=False)


def check_layer(name: str, case: Case, isa: str, m_step: int) -> None:
    inputs = make_inputs(case)
    for more in ({}, {"recompute": True}, {"batch_invariant": True}):
        one, other = (
            copied(results_of_layer(layer, inputs)) for layer in pair_of(inputs, name, isa, m_step=m_step, **more)
        )
        assert different(one, other) == [], f"{more}: not the bits of the bfloat16 layer on W'"
        assert all(result.isfinite().all() for result in one.values())


@pytest.mark.parametrize(("name", "case", "isa"), list(cells()))
def test_bits_of_the_bfloat16_layer(name: str, case: Case, isa: str) -> None:
    check_layer(name, case, isa, ISAS[isa].m_steps[-1])


def row_cells() -> Iterator[pytest.param]:
    for name in ("fp8_block", "int4_group32", "mxfp4"):
        for isa in NATIVE:
            fast = (name, isa) == ("fp8_block", ISA)
            yield pytest.param(name, isa, marks=[pytest.mark.isa(isa), *([] if fast else [SLOW])], id=f"{name}-{isa}")


@pytest.mark.parametrize(("name", "isa"), list(row_cells()))
def test_few_and_many_rows(name: str, isa: str) -> None:
    """Rows that are multiplied in registers, in one row block and in some, and more than a chunk of weights."""
    for m_step in ISAS[isa].m_steps:
        for tokens in (1, 3, 5, 9, 13, 20, 90):
            inputs = make_inputs(Case("rows", 1, hidden=544, intermediate=320, top_k=1, rank=8, tokens=tokens))
            layers = pair_of(inputs, name, isa, m_step=m_step)
            one, other = (copied(results_of_layer(layer, inputs)) for layer in layers)
            assert different(one, other) == [], (m_step, tokens)


def check_tiles(name: str, case: Case, isa: str, m_step: int) -> None:
    capability.resolve_isa(isa)
    check_layer(name, case, isa, m_step)


@NEEDS_TILES
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "int4_group32" else SLOW) for name in PACKINGS]
)
def test_bits_of_the_bfloat16_layer_on_amx(name: str) -> None:
    process = Emulated()
    process(check_tiles, name, case_named("ragged_33"), tiles(), ISAS[tiles()].m_steps[-1])
    process.close()


class TestBase:
    """Base weights in, out, and what is refused."""

    @EVERY_PACKING
    def test_state_dict_and_back(self, name: str) -> None:
        inputs = make_inputs(RAGGED)
        layer, _ = pair_of(inputs, name, ISA)
        base, state = quantized_base(RAGGED, packing_named(name)), layer.state_dict()
        for key, matrix in base.items():
            values = state[f"base_{key}"]
            assert torch.equal(values.view(torch.uint8), matrix.values.view(torch.uint8))
            assert values.dtype == matrix.values.dtype
            assert same_bits(state[f"base_{key}_scale"], matrix.scales)
        expected = copied(results_of_layer(layer, inputs))
        layer.packed_down.zero_()
        with pytest.raises(WeightsChangedError):
            results_of_layer(layer, inputs)
        assert not layer.load_state_dict(state).missing_keys
        assert different(copied(results_of_layer(layer, inputs)), expected) == []

    def test_a_state_dict_without_scales_is_refused(self) -> None:
        layer, _ = pair_of(make_inputs(RAGGED), "fp8_block", ISA)
        state = layer.state_dict()
        del state["base_up_proj_scale"]
        with pytest.raises(RuntimeError, match="up_proj_scale"):
            layer.load_state_dict(state)

    def test_expert_by_expert(self) -> None:
        base = quantized_base(RAGGED, packing_named("int4_group32"))
        config = config_of(RAGGED, ISA, **options_of("int4_group32"))
        lists = {key: [matrix[e] for e in range(RAGGED.experts)] for key, matrix in base.items()}
        for sources in (lists, {key: matrix.__getitem__ for key, matrix in base.items()}):
            found = MoELayer(config, **sources).decode([2, 0])
            whole = decoded(base, packing_named("int4_group32"), RAGGED)
            assert all(same_bits(found[key], whole[key][[2, 0]]) for key in BASES)

    @pytest.mark.parametrize("verify", [True, False])
    @EVERY_PACKING
    def test_packed_file(self, name: str, verify: bool, tmp_path) -> None:
        inputs = make_inputs(RAGGED)
        layer, _ = pair_of(inputs, name, ISA)
        layer.save_packed(tmp_path / "weights")
        mapped = MoELayer.from_packed(layer.config, tmp_path / "weights", verify)
        mapped.load_state_dict({key: value for key, value in layer.state_dict().items() if "lora" in key}, strict=False)
        assert different(copied(results_of_layer(mapped, inputs)), copied(results_of_layer(layer, inputs))) == []
        base = quantized_base(RAGGED, packing_named(name))
        for key, matrix in mapped.unpack().items():
            assert isinstance(matrix, Quantized) and torch.equal(matrix.scales, base[key].scales)

    def test_errors_name_what_is_wrong(self) -> None:
        good = quantized_base(RAGGED, packing_named("fp8_row"))
        config = config_of(RAGGED, ISA, **options_of("fp8_row"))
        plain = config_of(RAGGED, ISA)
        gate = good["gate_proj"]
        wrong = {
            r"gate_proj must be jitmoe.Quantized\(values, scales\) of fp8_row": gate.values.bfloat16(),
            r"values of gate_proj must be float8_e4m3fn, got torch.int8": Quantized(
                gate.values.view(torch.int8), gate.scales
            ),
            r"scales of gate_proj must be float32, got torch.bfloat16; scale_dtype": Quantized(
                gate.values, gate.scales.bfloat16()
            ),
            r"scales of gate_proj must have shape \[4, 130, 1\]": Quantized(gate.values, gate.scales[..., 0]),
            r"values of gate_proj must have shape": Quantized(gate.values[:, 1:], gate.scales),
        }
        for words, source in wrong.items():
            with pytest.raises((InputError, InputTypeError), match=words):
                MoELayer(config, **{**good, "gate_proj": source})
        with pytest.raises(InputTypeError, match="gate_proj is Quantized, and the config's weight_format is bfloat16"):
            MoELayer(plain, **good)

    def test_errors_of_the_config(self) -> None:
        with pytest.raises(ConfigError, match="weight_format must be one of bfloat16, fp8_block"):
            MoEConfig(1, 1, 1, 1, weight_format="nf4")
        with pytest.raises(ConfigError, match="group_size must be one of 32, 64, 128; got 48"):
            MoEConfig(1, 1, 1, 1, weight_format="int4_group", group_size=48)
        with pytest.raises(ConfigError, match="scale_dtype of fp8_block must be one of float32; got 'bfloat16'"):
            MoEConfig(1, 1, 1, 1, weight_format="fp8_block", scale_dtype="bfloat16")

    def test_another_format_in_a_packed_file_is_refused(self, tmp_path) -> None:
        layer, plain = pair_of(make_inputs(RAGGED), "int4_group32", ISA)
        layer.save_packed(tmp_path / "int4")
        plain.save_packed(tmp_path / "plain")
        for config, path in (
            (plain.config, tmp_path / "int4"),
            (layer.config, tmp_path / "plain"),
            (replace(layer.config, group_size=64), tmp_path / "int4"),
            (replace(layer.config, scale_dtype="float16"), tmp_path / "int4"),
        ):
            with pytest.raises(PackedFileError, match=r"other|another format"):
                MoELayer.from_packed(config, path)


def test_the_table_of_formats_has_all_names() -> None:
    assert {weight_format for weight_format, _, _ in PACKINGS.values()} | {"bfloat16"} == set(FORMATS)
