"""Faults from the field in tensors: no memory (A), other forms (K, L, M), frameworks (C), advice (E), memory (N)."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import build_kernels, case_named, copied, different, layer_of, run_python, same_bits, usable_isas
from torch import Tensor, nn
from yardstick import Inputs, make_inputs, results_of_layer

import jitmoe
from jitmoe import MoELayer
from jitmoe.errors import InputError, InputTypeError, WeightsChangedError
from jitmoe.experts import layer as layer_module
from jitmoe.experts.supplies import supplied
from jitmoe.plan.projections import LORA_NAMES

ISA = usable_isas()[0]
SMALL = case_named("small")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([SMALL], [ISA])


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(SMALL)


@pytest.fixture
def layer(inputs: Inputs) -> MoELayer:
    return layer_of(inputs, ISA)


class Quantised(Tensor):
    """A wrapper subclass, as torchao's are: bfloat16, strided, on the CPU, and without memory."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Quantised":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, requires_grad=values.requires_grad)

    def __init__(self, values: Tensor) -> None:
        self.held = values

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        unwrapped = [t.held if isinstance(t, cls) else t for t in args]
        result = function(*unwrapped, **(kwargs or {}))
        return cls(result) if isinstance(result, Tensor) else result


class Named(Tensor):
    """A subclass that has memory, and could have anything."""


STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Quantised,
    "subclass": lambda tensor: tensor.as_subclass(Named),
}
"""From a plain tensor to one that no kernel can be given."""


def freed(tensor: Tensor) -> Tensor:
    """As FSDP leaves a parameter between its uses."""
    gone = tensor.detach().clone()
    gone.untyped_storage().resize_(0)
    return gone


def call(layer: MoELayer, inputs: Inputs, **changes: Tensor) -> Tensor:
    given = {"x": inputs.x, "topk_ids": inputs.topk_ids, "weights": inputs.weights} | changes
    return layer(**given)


@pytest.mark.field("A")
class TestAddressesOfTensorsThatHaveNone:
    @pytest.mark.parametrize("strange", STRANGE)
    @pytest.mark.parametrize("name", ["x", "topk_ids", "weights"])
    def test_a_input(self, layer: MoELayer, inputs: Inputs, name: str, strange: str) -> None:
        expected = call(layer, inputs)
        tensor = STRANGE[strange](getattr(inputs, name))
        with pytest.raises(InputTypeError, match=rf"^{name} is a \S+\.{type(tensor).__qualname__}, a subclass"):
            call(layer, inputs, **{name: tensor})
        assert same_bits(call(layer, inputs), expected)

    @pytest.mark.parametrize("strange", STRANGE)
    @pytest.mark.parametrize("name", LORA_NAMES)
    def test_a_lora(self, layer: MoELayer, inputs: Inputs, name: str, strange: str) -> None:
        tensor = STRANGE[strange](layer.get_parameter(name).detach())
        del layer._parameters[name]
        setattr(layer, name, tensor)
        with pytest.raises(InputTypeError, match=f"^{name} is a .*{type(tensor).__qualname__}"):
            call(layer, inputs)

    @pytest.mark.parametrize("strange", STRANGE)
    @pytest.mark.parametrize("form", ["stacked", "matrices", "function"])
    def test_a_base(self, inputs: Inputs, form: str, strange: str) -> None:
        make = STRANGE[strange]
        sources = {
            "stacked": make(inputs.up_proj),
            "matrices": [make(matrix) for matrix in inputs.up_proj],
            "function": lambda expert: make(inputs.up_proj[expert]),
        }
        base = inputs.base() | {"up_proj": sources[form]}
        with pytest.raises(InputTypeError, match=r"^up_proj(\[0\])? is a .*dequantize"):
            MoELayer(replace(layer_of(inputs, ISA).config), **base)

    @pytest.mark.parametrize("strange", STRANGE)
    def test_a_loaded_base(self, layer: MoELayer, inputs: Inputs, strange: str) -> None:
        expected = call(layer, inputs)
        state = layer.state_dict()
        state["base_up_proj"] = STRANGE[strange](state["base_up_proj"])
        with pytest.raises(RuntimeError, match="base_up_proj is a "):
            layer.load_state_dict(state)
        assert same_bits(call(layer, inputs), expected)

    @pytest.mark.parametrize("strange", STRANGE)
    def test_a_bias(self, strange: str) -> None:
        inputs = make_inputs(case_named("gpt_oss"))
        base = inputs.base() | {"gate_bias": STRANGE[strange](inputs.base()["gate_bias"])}
        with pytest.raises(InputTypeError, match=r"^gate_bias is a "):
            MoELayer(layer_of(inputs, ISA).config, **base)

    @pytest.mark.parametrize("strange", STRANGE)
    def test_a_saved_tensor(self, layer: MoELayer, inputs: Inputs, strange: str) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, STRANGE[strange]):
            out = call(layer, inputs, x=inputs.x.clone().requires_grad_())
            with pytest.raises(InputTypeError, match=r"is a .*, a subclass"):
                out.backward(inputs.dout)
        assert all(parameter.grad is None for parameter in layer.parameters())

    def test_a_dtensor(self) -> None:
        """In a process of its own, which has a process group."""
        run_python(DTENSOR.replace("ISA", repr(ISA)))

    @pytest.mark.parametrize("name", ["x", "topk_ids", "weights", *LORA_NAMES])
    def test_a_freed_storage(self, layer: MoELayer, inputs: Inputs, name: str) -> None:
        if name in LORA_NAMES:
            layer.get_parameter(name).untyped_storage().resize_(0)
            changes = {}
        else:
            changes = {name: freed(getattr(inputs, name))}
        with pytest.raises(InputError, match=f"^{name} has .* no memory"):
            call(layer, inputs, **changes)

    def test_a_freed_storage_of_the_packed_weights(self, layer: MoELayer, inputs: Inputs) -> None:
        layer.packed_up = freed(layer.packed_up)
        with pytest.raises(InputError, match=r"^packed up has .* no memory"):
            call(layer, inputs)

    def test_a_lazy_zeros_are_zeros(self, layer: MoELayer, inputs: Inputs) -> None:
        """As autograd makes them: a plain tensor with a null address."""
        x = inputs.x.clone().requires_grad_()
        lazy = torch._efficientzerotensor(x.shape, dtype=x.dtype)
        assert lazy.data_ptr() == 0
        call(layer, inputs, x=x).backward(lazy)
        assert x.grad is not None and not x.grad.any()
        assert same_bits(call(layer, inputs, x=lazy), call(layer, inputs, x=torch.zeros_like(x)))

    def test_a_through_a_compiled_layer(self, layer: MoELayer, inputs: Inputs) -> None:
        torch.compiler.reset()
        compiled = torch.compile(layer)
        assert same_bits(compiled(inputs.x, inputs.topk_ids, inputs.weights), call(layer, inputs))
        # Dynamo lets the class itself answer for the operator, and ours gives it the values.
        assert same_bits(compiled(Quantised(inputs.x), inputs.topk_ids, inputs.weights), call(layer, inputs))


DTENSOR = """
import os, tempfile, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from helpers import case_named, layer_of
from yardstick import make_inputs
from jitmoe.errors import InputTypeError

dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
inputs = make_inputs(case_named("small"))
layer = layer_of(inputs, ISA)

def refused(words, x):
    try:
        layer(x, inputs.topk_ids, inputs.weights)
    except InputTypeError as error:
        assert words in str(error) and "DTensor" in str(error), error
    else:
        raise AssertionError("computed from an address that is none")

refused("x is a", distribute_tensor(inputs.x, mesh, [Replicate()]))
fully_shard(layer, mesh=mesh)
try:  # the block called alone, without the hooks that gather its parameters
    type(layer).forward(layer, inputs.x, inputs.topk_ids, inputs.weights)
except InputTypeError as error:
    assert "gate_lora_a is a" in str(error) and "DTensor" in str(error), error
else:
    raise AssertionError("computed from sharded parameters")
out = layer(inputs.x, inputs.topk_ids, inputs.weights)  # with them it works
out.sum().backward()
assert all(p.grad is not None for p in layer.parameters())
dist.destroy_process_group()
"""


def strided_otherwise(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def within_more_memory(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]] if tensor.dim() else tensor


def wider(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.int()


def of_a_lazy_sign(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


FORMS = [strided_otherwise, within_more_memory, wider, of_a_lazy_sign]
"""From a saved tensor to one of equal values."""


@pytest.mark.field("K")
class TestSavedTensorsInAnotherForm:
    @pytest.mark.parametrize("recompute", [False, True], ids=["saves", "recomputes"])
    @pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
    def test_k_equal_values_give_equal_gradients(
        self, inputs: Inputs, form: Callable[[Tensor], Tensor], recompute: bool
    ) -> None:
        layer = layer_of(inputs, ISA, recompute=recompute)
        expected = copied(results_of_layer(layer, inputs))
        with torch.autograd.graph.saved_tensors_hooks(form, lambda tensor: tensor):
            found = results_of_layer(layer, inputs)
        assert different(found, expected) == []

    @pytest.mark.parametrize(
        ("form", "error"),
        [
            (of_a_lazy_sign, None),
            (strided_otherwise, AssertionError),  # torch's graph looks at strides itself
            (within_more_memory, AssertionError),
            (wider, InputTypeError),
        ],
        ids=lambda value: getattr(value, "__name__", "right"),
    )
    def test_k_a_compiled_graph_gives_equal_gradients_or_refuses(self, layer, inputs, form, error) -> None:
        expected = copied(results_of_layer(layer, inputs))
        torch.compiler.reset()
        with torch.autograd.graph.saved_tensors_hooks(form, lambda tensor: tensor):
            if error is None:
                assert different(results_of_layer(torch.compile(layer), inputs), expected) == []
            else:
                with pytest.raises(error):
                    results_of_layer(torch.compile(layer), inputs)

    @pytest.mark.parametrize(
        ("give_back", "error", "words"),
        [
            (lambda t: t[..., :-1] if t.dim() else t, InputError, "gave x back with shape"),
            (
                lambda t: t.float() if t.dtype == torch.int64 else t,
                InputTypeError,
                "gave topk_ids back as torch.float32",
            ),
            (
                lambda t: t.short() if t.dtype == torch.float32 and t.dim() == 2 else t,
                InputTypeError,
                "gave weights back as torch.int16",
            ),
        ],
        ids=["shape", "ids_as_floats", "floats_as_integers"],
    )
    def test_k_another_tensor_is_refused(self, layer, inputs, give_back, error, words) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, give_back):
            out = call(layer, inputs)
            with pytest.raises(error, match=words):
                out.backward(inputs.dout)
        assert all(parameter.grad is None for parameter in layer.parameters())

    def test_k_saved_ids_outside_of_the_experts_are_refused(self, layer: MoELayer, inputs: Inputs) -> None:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor, lambda t: t + 1000 if t.dtype == torch.int64 else t
        ):
            out = call(layer, inputs)
            with pytest.raises(InputError, match="expert ids must lie"):
                out.backward(inputs.dout)


@pytest.mark.field("L")
class TestBitsThatTorchKeepsBesideTheData:
    @pytest.mark.parametrize("form", ["stacked", "matrices", "function"])
    def test_l_negative_base(self, inputs: Inputs, form: str) -> None:
        expected = call(layer_of(inputs, ISA), inputs)

        def lazy(tensor: Tensor) -> Tensor:
            return torch._neg_view(-tensor)

        sources = {
            "stacked": lazy,
            "matrices": lambda t: [lazy(matrix) for matrix in t],
            "function": lambda t: lambda expert: lazy(t[expert]),
        }
        base = {name: sources[form](tensor) for name, tensor in inputs.base().items()}
        layer = layer_of(replace(inputs), ISA)
        packed = MoELayer(layer.config, **base)
        packed.load_state_dict(layer.state_dict())
        for name, tensor in MoELayer(layer.config, **base).unpack().items():
            assert same_bits(tensor, getattr(inputs, name))
        assert same_bits(call(packed, inputs), expected)

    def test_l_negative_bias(self) -> None:
        inputs = make_inputs(case_named("gpt_oss"))
        config = layer_of(inputs, ISA).config
        base = {n: torch._neg_view(-t) if n.endswith("bias") else t for n, t in inputs.base().items()}
        assert different(MoELayer(config, **base).biases(), MoELayer(config, **inputs.base()).biases()) == []

    @pytest.mark.parametrize("name", ["x", "topk_ids", "weights"])
    def test_l_negative_input(self, layer: MoELayer, inputs: Inputs, name: str) -> None:
        expected = call(layer, inputs)
        lazy = torch._neg_view(-getattr(inputs, name))
        assert lazy.is_neg()
        assert same_bits(call(layer, inputs, **{name: lazy}), expected)

    @pytest.mark.parametrize("name", ["x", "topk_ids", "weights"])
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
    def test_l_nested_tensors_are_named(self, layer: MoELayer, inputs: Inputs, name: str, layout: torch.layout) -> None:
        nested = torch.nested.nested_tensor(list(getattr(inputs, name).split([4, 20])), layout=layout)
        with pytest.raises((InputError, InputTypeError), match=rf"^{name} is a .*[nN]ested"):
            call(layer, inputs, **{name: nested})


@pytest.mark.field("M")
class TestPackedWeightsExchanged:
    @pytest.mark.parametrize(
        "exchange",
        [
            lambda packed: packed[:1, :1].clone(),
            lambda packed: packed[:, :-1].contiguous(),
            lambda packed: packed.float(),
            lambda packed: packed.view(torch.bfloat16),
            lambda packed: packed.t().contiguous().t(),
            lambda packed: packed[:1].expand_as(packed),
            lambda packed: packed.to("meta"),
        ],
        ids=["one_element", "shorter", "float32", "bfloat16", "strided", "expanded", "meta"],
    )
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_m_another_form_is_refused(self, layer, inputs, exchange, compiled) -> None:
        torch.compiler.reset()
        used = torch.compile(layer) if compiled else layer
        expected = used(inputs.x, inputs.topk_ids, inputs.weights)
        right = layer.packed_up
        layer.packed_up = exchange(right)
        with pytest.raises(WeightsChangedError, match="packed up weights were replaced"):
            used(inputs.x, inputs.topk_ids, inputs.weights)
        layer.packed_up = right
        assert same_bits(used(inputs.x, inputs.topk_ids, inputs.weights), expected)


@pytest.mark.field("C")
class TestFrameworks:
    def test_c_no_framework_is_shown_the_packed_weights(self, layer: MoELayer) -> None:
        assert dict(layer.named_buffers()) == {}
        assert {name for name, _ in layer.named_parameters()} == set(LORA_NAMES)

    def test_c_averaged_model(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = call(layer, inputs)
        for use_buffers in (False, True):
            averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=use_buffers)
            for _ in range(2):
                averaged.update_parameters(layer)
            assert same_bits(averaged(inputs.x, inputs.topk_ids, inputs.weights), expected)

    def test_c_distributed_data_parallel(self) -> None:
        """Two processes see half of the tokens each, and both get the mean of the gradients of all."""
        run_python(DDP.replace("ISA", repr(ISA)))

    def test_c_keys_of_transformers_do_not_collide(self, tmp_path) -> None:
        pytest.importorskip("transformers")
        from safetensors.torch import load_file

        model = small_transformers_model()
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert {key for key in saved if ".experts." in key} == {key for key in model.state_dict() if ".experts." in key}
        prefix = "model.layers.0.mlp.experts."
        assert {f"{prefix}base_{name}" for name in ("gate_proj", "up_proj", "down_proj")} <= set(saved)

    def test_c_adapters_alone(self, layer: MoELayer, inputs: Inputs, monkeypatch) -> None:
        model = nn.Sequential(nn.Linear(4, 4), layer)
        monkeypatch.setattr(layer, "unpack", lambda: pytest.fail("the whole base was unpacked"))
        state = jitmoe.lora_state_dict(model)
        assert set(state) == {f"1.{name}" for name in LORA_NAMES}
        other = nn.Sequential(nn.Linear(4, 4), MoELayer(layer.config, **inputs.base()))
        assert not same_bits(call(other[1], inputs), call(layer, inputs))
        jitmoe.load_lora_state_dict(other, state)
        assert same_bits(call(other[1], inputs), call(layer, inputs))
        assert set(jitmoe.lora_state_dict(layer)) == set(LORA_NAMES)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: {k: v for k, v in s.items() if k != "up_lora_b"}, "missing up_lora_b; unknown none"),
            (lambda s: s | {"up_lora_c": s["up_lora_b"]}, "missing none; unknown up_lora_c"),
            (lambda s: s | {"up_lora_b": s["up_lora_b"][:1]}, "up_lora_b must have shape"),
        ],
        ids=["missing", "unknown", "shape"],
    )
    def test_c_wrong_adapters_load_nothing(self, layer: MoELayer, inputs: Inputs, change, words: str) -> None:
        expected = copied(jitmoe.lora_state_dict(layer))
        state = {name: tensor + 1 for name, tensor in expected.items()}
        with pytest.raises(InputError, match=words):
            jitmoe.load_lora_state_dict(layer, change(state))
        assert different(jitmoe.lora_state_dict(layer), expected) == []

    def test_c_a_switch(self, layer: MoELayer, inputs: Inputs) -> None:
        bare = replace(inputs, case=replace(SMALL, rank=0), lora=None)
        expected = call(layer_of(bare, ISA), inputs)
        adapted = call(layer, inputs)
        with jitmoe.lora_disabled(nn.Sequential(layer)):
            assert same_bits(call(layer, inputs), expected)
        assert same_bits(call(layer, inputs), adapted) and not same_bits(adapted, expected)

    @pytest.mark.filterwarnings("error")
    def test_c_frozen_adapters_are_not_silent(self, layer: MoELayer, inputs: Inputs) -> None:
        layer.requires_grad_(False)
        with pytest.raises(RuntimeWarning, match=r"LoRA .* frozen.*jitmoe\.train_lora"):
            call(layer, inputs)
        with torch.no_grad():
            call(layer, inputs)
        layer.eval()
        call(layer, inputs)
        layer.train()
        jitmoe.train_lora(nn.Sequential(layer))
        assert call(layer, inputs).requires_grad

    def test_c_peft_around_a_model_with_a_layer(self, tmp_path) -> None:
        """The recipe of the README: PEFT's own adapters beside ours, both trained, saved and loaded."""
        pytest.importorskip("transformers")
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(small_transformers_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        tokens = torch.arange(12).reshape(2, 6)
        with pytest.warns(RuntimeWarning, match="get_peft_model"):
            model(tokens)
        jitmoe.train_lora(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ours = jitmoe.lora_state_dict(model.get_base_model())
        assert all(tensor.any() for tensor in ours.values()), "B has left its zeros"
        with model.disable_adapter(), jitmoe.lora_disabled(model):
            base = model(tokens).logits
        assert same_bits(base, small_transformers_model()(tokens).logits)
        model.save_pretrained(tmp_path)
        torch.save(ours, tmp_path / "experts.pt")

        loaded = peft.PeftModel.from_pretrained(small_transformers_model(), tmp_path)
        jitmoe.load_lora_state_dict(loaded.get_base_model(), torch.load(tmp_path / "experts.pt"))
        assert same_bits(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def small_transformers_model() -> nn.Module:
    """A Qwen3-MoE whose experts are ours, in the same place; the same values at every call."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts, hidden, intermediate = 4, 64, 96
    config = Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=64, moe_intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=2,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for block in model.model.layers:
        fused = block.mlp.experts
        gate, up = fused.gate_up_proj.detach().bfloat16().chunk(2, dim=1)
        ours = jitmoe.MoEConfig(experts, hidden, intermediate, 2, lora_rank=8, isa=ISA)
        block.mlp.experts = MoELayer(ours, gate, up, fused.down_proj.detach().bfloat16())
    return model


DDP = """
import os, sys, tempfile, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from helpers import case_named, layer_of, same_bits
from yardstick import make_inputs

def train(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    inputs = make_inputs(case_named("small"))
    layer = layer_of(inputs, ISA)
    half = slice(rank * 12, rank * 12 + 12)
    alone = layer(inputs.x[half], inputs.topk_ids[half], inputs.weights[half])
    parallel = DistributedDataParallel(layer)
    for _ in range(2):
        layer.zero_grad()
        out = parallel(inputs.x[half], inputs.topk_ids[half], inputs.weights[half])
        assert same_bits(out, alone)
        out.backward(inputs.dout[half])
    found = {name: p.grad.clone() for name, p in layer.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for begin in (0, 12):
        layer.zero_grad()
        part = slice(begin, begin + 12)
        layer(inputs.x[part], inputs.topk_ids[part], inputs.weights[part]).backward(inputs.dout[part])
        for name, p in layer.named_parameters():
            expected[name] += p.grad / 2
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    dist.destroy_process_group()

if __name__ == "__main__":
    folder = tempfile.mkdtemp()
    if os.fork() == 0:
        try:
            train(1, folder)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    train(0, folder)
    assert os.wait()[1] == 0
"""


TO_BFLOAT16, SCALES = r"convert it with \.to\(torch\.bfloat16\)", "mean nothing without their scales"


@pytest.mark.field("E")
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        *(
            (dtype, r"convert it with \.to\(torch\.bfloat16\)")
            for dtype in (torch.float16, torch.float32, torch.float64)
        ),
        *(
            (dtype, "mean nothing without their scales")
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.uint8, torch.int8, torch.bool)
        ),
    ],
    ids=str,
)
def test_e_advice_to_convert_is_for_floats_alone(inputs: Inputs, dtype: torch.dtype, advice: str) -> None:
    with pytest.raises(InputTypeError, match=advice) as raised:
        MoELayer(layer_of(inputs, ISA).config, **inputs.base() | {"up_proj": inputs.up_proj.to(dtype)})
    assert ("scales" in str(raised.value)) == ("scales" in advice)


@pytest.mark.field("E")
class TestShards:
    @pytest.fixture
    def index(self, inputs: Inputs, tmp_path: Path) -> Path:
        from safetensors.torch import save_file

        names = {f"experts.{expert}.up_proj.weight": matrix for expert, matrix in enumerate(inputs.up_proj)}
        shards = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(names)}
        for shard in set(shards.values()):
            save_file({n: t.clone() for n, t in names.items() if shards[n] == shard}, tmp_path / shard)
        save_file({"stacked": inputs.up_proj}, tmp_path / "other.safetensors")
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": shards | {"stacked": "other.safetensors"}}))
        return path

    @pytest.mark.parametrize("name", ["experts.{expert}.up_proj.weight", "stacked"])
    def test_e_an_index_names_the_files(self, inputs: Inputs, index: Path, name: str) -> None:
        source = jitmoe.safetensors_source(index, name)
        for expert, matrix in enumerate(inputs.up_proj):
            assert same_bits(source(expert), matrix)

    def test_e_a_tensor_that_it_does_not_name(self, index: Path) -> None:
        with pytest.raises(InputError, match=r"names no file for experts\.9"):
            jitmoe.safetensors_source(index, "experts.{expert}.up_proj.weight")(9)


@pytest.mark.field("N")
class TestMemoryErrorsOfOneForm:
    """Where torch has no memory left it says RuntimeError; who asked for it sees MemoryError."""

    @pytest.mark.parametrize("name", ["x", "topk_ids", "weights"])
    def test_n_copies_of_inputs(self, layer: MoELayer, inputs: Inputs, name: str) -> None:
        huge = {
            key: getattr(inputs, key)[:1].expand(1 << 36, -1).unflatten(0, (1 << 18, 1 << 18)).transpose(0, 1)
            for key in ("x", "topk_ids", "weights")
        }
        with pytest.raises(MemoryError, match=r"allocate|overflow"):
            call(layer, inputs, **huge)

    def test_n_expanded_tokens(self, layer: MoELayer, inputs: Inputs) -> None:
        huge = {key: getattr(inputs, key)[:1].expand(1 << 36, -1) for key in ("x", "topk_ids", "weights")}
        expected = call(layer, inputs)
        with pytest.raises(MemoryError):
            call(layer, inputs, **huge)
        assert same_bits(call(layer, inputs), expected)

    @pytest.mark.parametrize("use", ["state_dict", "unpack"])
    def test_n_state_dict(self, layer: MoELayer, use: str, monkeypatch) -> None:
        def fails(*_: object, **__: object) -> Tensor:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(torch, "empty", fails)
        with pytest.raises(MemoryError, match="allocate"):
            getattr(layer, use)()

    def test_n_gradients(self, layer: MoELayer, inputs: Inputs) -> None:
        def fails(*_: object) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate memory")

        out = call(layer, inputs)
        with supplied(zeros=fails), pytest.raises(MemoryError):
            out.backward(inputs.dout)


@pytest.mark.field("S")
class TestLoadingInterrupted:
    @pytest.mark.parametrize("stop", [0, 1, 2])
    def test_s_a_mixture_of_old_and_new_base_weights_is_never_computed(
        self, layer: MoELayer, inputs: Inputs, stop: int, monkeypatch
    ) -> None:
        other = layer_of(make_inputs(replace(SMALL, seed=1000)), ISA)
        seen: list[str] = []
        pack = layer_module.pack_parts

        def interrupted(kernels: object, name: str, *rest: object) -> None:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(name)
            pack(kernels, name, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(layer_module, "pack_parts", interrupted)
            with pytest.raises(KeyboardInterrupt):
                layer.load_state_dict(other.state_dict())
        for use in (lambda: call(layer, inputs), layer.state_dict, lambda: call(copy.deepcopy(layer), inputs)):
            with pytest.raises(WeightsChangedError, match=r"interrupted.*load_state_dict"):
                use()
        layer.load_state_dict(other.state_dict())
        assert same_bits(call(layer, inputs), call(other, inputs))
