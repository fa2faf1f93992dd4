"""Quantised weights seen from inside: traces, captures, checked kernels; and what quantising loses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import case_named, config_of, copied, different, usable_isas
from quantized import PACKINGS, Pair, options_of, packing_named, pair_of, quantized_base
from torch import Tensor
from yardstick import make_inputs, results_of_layer

import jitmoe
from jitmoe import MoELayer, Quantized
from jitmoe.errors import BudgetError, CaptureError, InputError
from jitmoe.formats import packing_of
from jitmoe.inspect.check import make_call, make_layer
from jitmoe.inspect.recording import read_recording
from jitmoe.inspect.replay import Replay, compare
from jitmoe.isa import ISAS
from jitmoe.oracle.formats import codes_of, dequantize, scales_of

ISA = usable_isas()[0]
RAGGED = case_named("ragged_100")
M_STEP = ISAS[ISA].m_steps[-1]
EXPERT, ROW, COLUMN = 2, 70, 41

KINDS = ("fp8_block", "fp8_row-bfloat16", "int4_group64-float16", "mxfp4")
"""One packing of each way to share scales."""

EVERY_KIND = pytest.mark.parametrize("name", KINDS)


def pair(name: str, **options: object) -> Pair:
    return pair_of(make_inputs(RAGGED), name, ISA, m_step=M_STEP, **options)


def layer_on(name: str, base: dict[str, Quantized]) -> MoELayer:
    return MoELayer(config_of(RAGGED, ISA, m_step=M_STEP, **options_of(name)), **base)


class TestTrace:
    def finding(self, layer: MoELayer) -> jitmoe.inspect.trace_report.Finding:
        with jitmoe.trace() as report:
            results_of_layer(layer, make_inputs(RAGGED))
        first = report.first()
        assert first
        return first

    @EVERY_KIND
    def test_same_bits_and_nothing_to_find(self, name: str) -> None:
        layer, plain = pair(name)
        inputs = make_inputs(RAGGED)
        with jitmoe.trace() as report:
            found = copied(results_of_layer(layer, inputs))
        assert report.first() is None
        assert different(found, copied(results_of_layer(plain, inputs))) == []

    def test_a_code_is_named(self) -> None:
        base = quantized_base(RAGGED, packing_named("fp8_row"))
        base["gate_proj"].values[EXPERT, ROW, COLUMN] = float("nan")
        found = self.finding(layer_on("fp8_row", base))
        assert found.cause == "weights" and found.expert == EXPERT and found.column == ROW
        assert f"gate_proj[{EXPERT}, {ROW}, {COLUMN}] (expert, out, in) is not finite" in found.sentence

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        ("name", "place"),
        [("fp8_block", (1, 0)), ("fp8_row", (ROW, 0)), ("int8_row", (ROW,)), ("int4_group64-float16", (ROW, 1))],
    )
    def test_a_scale_is_named(self, name: str, place: tuple[int, ...], value: float) -> None:
        base = quantized_base(RAGGED, packing_named(name))
        # Up has 130 rows and 100 columns: the second square of fp8_block begins at row 128.
        base["up_proj"].scales[(EXPERT, *place)] = value
        found = self.finding(layer_on(name, base))
        row, column = (*place, 0)[:2]
        assert found.cause == "weights" and found.expert == EXPERT
        assert f"up_proj_scale[{EXPERT}, {row}, {column}], the scale of up_proj[{EXPERT}, " in found.sentence

    def test_a_scale_of_mxfp4_is_named(self) -> None:
        base = quantized_base(RAGGED, packing_named("mxfp4"))
        base["down_proj"].scales[EXPERT, ROW, 3] = 255
        assert f"down_proj_scale[{EXPERT}, {ROW}, 3], the scale of down_proj[{EXPERT}, {ROW}, 96]" in (
            self.finding(layer_on("mxfp4", base)).sentence
        )


@EVERY_KIND
@pytest.mark.parametrize("recompute", [False, True])
def test_checked_kernels_find_nothing(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, plain = pair(name, recompute=recompute)
    inputs = make_inputs(RAGGED)
    expected = copied(results_of_layer(plain, inputs))
    monkeypatch.setenv("JITMOE_CHECKED", "1")
    assert different(copied(results_of_layer(layer, inputs)), expected) == []


class TestCapture:
    @EVERY_KIND
    def test_it_is_computed_again(self, name: str, tmp_path: Path) -> None:
        layer, _ = pair(name)
        layer.capture(tmp_path / "call.pt")
        results_of_layer(layer, make_inputs(RAGGED))
        content = torch.load(tmp_path / "call.pt", weights_only=True)
        base = quantized_base(RAGGED, packing_named(name))
        assert content["gate_proj"].dtype == base["gate_proj"].values.dtype
        assert torch.equal(content["gate_proj_scale"], base["gate_proj"].scales)
        replay = Replay(read_recording(tmp_path / "call.pt"))
        assert "the same bits" in replay.summary()
        assert replay.layer.config.weight_format == PACKINGS[name][0]
        assert replay.compare().faults == []

    def test_a_file_without_scales_is_refused(self, tmp_path: Path) -> None:
        layer, _ = pair("fp8_block")
        layer.capture(tmp_path / "call.pt")
        results_of_layer(layer, make_inputs(RAGGED))
        content = torch.load(tmp_path / "call.pt", weights_only=True)
        del content["up_proj_scale"]
        torch.save(content, tmp_path / "call.pt")
        with pytest.raises(CaptureError, match="up_proj_scale"):
            read_recording(tmp_path / "call.pt")


class TestCheck:
    @pytest.mark.parametrize("name", ["int8_row", "int4_group32", "mxfp4"])
    def test_a_quantised_layer_is_within_the_error_rule(self, name: str) -> None:
        case = replace(RAGGED, tokens=128)
        config = config_of(case, ISA, m_step=M_STEP, **options_of(name))
        inputs = make_call(config, case.tokens)
        layer = make_layer(config, inputs)
        assert all(torch.equal(decoded, getattr(inputs, key)) for key, decoded in layer.decode().items())
        assert compare(layer, inputs).faults == []


def test_the_budget_knows_the_bytes() -> None:
    layer, plain = pair("mxfp4")
    held = sum(tensor.nbytes for tensor in (*layer._packed().values(), *layer.buffers(), *layer.parameters()))
    base = quantized_base(RAGGED, packing_named("mxfp4"))
    assert MoELayer(replace(layer.config, memory_budget=held), **base)
    with pytest.raises(BudgetError, match="the weights and parameters of the layer"):
        MoELayer(replace(layer.config, memory_budget=held - 1), **base)
    with pytest.raises(BudgetError, match="the weights and parameters of the layer"):
        MoELayer(replace(plain.config, memory_budget=held), *plain.unpack().values())


class TestQuantize:
    """The nearest code, by a search over all of them."""

    @staticmethod
    def weights() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        weights = (torch.randn(2, 131, 70, generator=generator) * 0.05).bfloat16()
        weights[1, 5] = 0.0
        return weights

    @pytest.mark.parametrize("name", PACKINGS)
    def test_nearest_code(self, name: str) -> None:
        weight_format, group, scale = PACKINGS[name]
        packing, weights = packing_named(name), self.weights()
        sources, report = jitmoe.quantize({"gate_proj": weights}, weight_format, group, scale)
        source = sources["gate_proj"]
        assert source.values.shape == (2, *packing.value_shape(131, 70))
        ours = dequantize(packing, source.values, source.scales, 131, 70)
        scales = scales_of(packing, source.scales, 131, 70).double()
        codes = codes_of(packing, source.values, 70).double()
        distance = (codes * scales - weights).abs()
        # The same scales with each code in turn: none comes nearer, but where two are as near up to the rounding of
        # weight / scale to float32: half a unit in the last place of the largest code, on both sides.
        rounding = scales.abs() * codes.abs().max() * 2**-23
        for code in range(256 if packing.format.bits == 8 else 16):
            byte = code if packing.format.bits == 8 else code * 17
            values = torch.full_like(source.values.view(torch.uint8), byte).view(source.values.dtype)
            other = (codes_of(packing, values, 70) * scales - weights).abs()
            assert not (distance > other + rounding).any(), code
        assert not ours[1, 5].any() and not ours[1, 5].isnan().any()
        exact = weights.double()
        expected = ((ours.double() - exact).square().sum() / exact.square().sum()).sqrt().item()
        assert report.errors["gate_proj"].rms == pytest.approx(expected, rel=1e-12)
        assert "gate_proj" in str(report) and weight_format in str(report)

    def test_the_scale_is_that_of_the_largest(self) -> None:
        sources, _ = jitmoe.quantize({"w": self.weights()})
        assert torch.equal(sources["w"].scales, self.weights().float().abs().amax(-1) / 127)
        assert sources["w"].values.abs().amax() == 127

    def test_a_weight_without_a_code_is_named(self) -> None:
        weights = self.weights()
        weights[1, 3, 4] = float("inf")
        with pytest.raises(InputError, match=r"up_proj\[1, 3, 4\] is inf"):
            jitmoe.quantize({"up_proj": weights})

    def test_bfloat16_is_no_format_to_quantise_to(self) -> None:
        with pytest.raises(InputError, match="bfloat16 is no quantised format"):
            jitmoe.quantize({"up_proj": self.weights()}, "bfloat16")


def test_groups_of_int4_alone_have_a_size() -> None:
    assert packing_of("mxfp4", 128).group == 32 and packing_of("fp8_row", 128).group == 0
