"""A packed weight acts like the weight that it stands for, or refuses in words; no plain copy is made in secret."""

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY, eager_model, experts_of, on_jitmoe, tokens
from helpers import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import jitmoe
from jitmoe.errors import InputTypeError, WeightsChangedError
from jitmoe.hf.weight import PackedWeight

WEIGHTS = ("gate_up_proj", "down_proj")
EVERY_WEIGHT = pytest.mark.parametrize("name", WEIGHTS)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    jitmoe.hf.register()


def packed_model(family: str = "qwen3_moe") -> tuple[Any, Any]:
    """A model with eager experts, and a copy of it that is packed."""
    eager = eager_model(family)
    ours = on_jitmoe(eager)
    assert jitmoe.hf.pack(ours) == len(experts_of(ours))
    return eager, ours


def pair(name: str, family: str = "qwen3_moe") -> tuple[nn.Parameter, nn.Parameter]:
    """A plain weight and the packed one."""
    eager, ours = packed_model(family)
    plain, packed = (getattr(next(iter(experts_of(model).values())), name) for model in (eager, ours))
    return plain, packed


@EVERY_FAMILY
@EVERY_WEIGHT
def test_it_looks_like_the_weight(family: str, name: str) -> None:
    plain, packed = pair(name, family)
    assert isinstance(packed, PackedWeight) and isinstance(packed, nn.Parameter)
    for fact in ("shape", "dtype", "device", "requires_grad", "is_leaf", "layout"):
        assert getattr(packed, fact) == getattr(plain, fact), fact
    assert packed.numel() == plain.numel() and packed.element_size() == plain.element_size()
    assert same_bits(packed.contiguous(), plain)
    assert "packed for jitmoe" in repr(packed)


@EVERY_FAMILY
def test_counts_of_the_model_are_the_same(family: str) -> None:
    eager, ours = packed_model(family)
    assert ours.num_parameters() == eager.num_parameters()
    assert ours.get_memory_footprint() == eager.get_memory_footprint()
    assert ours.dtype == eager.dtype and ours.device == eager.device
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in eager.named_parameters()]


@EVERY_FAMILY
def test_state_dict_unpacks_nothing_and_loads_anywhere(family: str) -> None:
    eager, ours = packed_model(family)
    state = ours.state_dict()
    assert state.keys() == eager.state_dict().keys()
    assert sum(isinstance(value, PackedWeight) for value in state.values()) == len(WEIGHTS) * len(experts_of(ours))
    other = eager_model(family, seed=1)
    other.load_state_dict(state)
    assert all(map(same_bits, other.parameters(), eager.parameters()))


@EVERY_FAMILY
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_into_packed_experts(family: str, assign: bool) -> None:
    _, ours = packed_model(family)
    other = eager_model(family, seed=1)
    ids = tokens()
    with torch.no_grad():
        before = ours(ids).logits
        expected = on_jitmoe(other)(ids).logits
        ours.load_state_dict(other.state_dict(), assign=assign)
        found = ours(ids).logits
    assert same_bits(found, expected) and not same_bits(found, before)
    assert all(isinstance(getattr(m, name), PackedWeight) for m in experts_of(ours).values() for name in WEIGHTS)


@EVERY_FAMILY
def test_save_pretrained_writes_what_an_eager_model_writes(family: str, tmp_path: Path) -> None:
    for name, model in zip(("eager", "ours"), packed_model(family), strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("eager", "ours")]
    assert len(files[1]) > 1
    eager, ours = ({k: v for file in one for k, v in load_file(file).items()} for one in files)
    assert eager.keys() == ours.keys()
    assert [name for name in eager if not same_bits(eager[name], ours[name])] == []
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("eager", "ours")]
    assert configs[0] == configs[1]


def test_torch_save_writes_plain_weights(tmp_path: Path) -> None:
    eager, ours = packed_model()
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert {type(value) for value in state.values()} == {Tensor}
    assert all(same_bits(state[name], value) for name, value in eager.state_dict().items())


def test_savers_that_read_addresses_are_refused(tmp_path: Path) -> None:
    _, ours = packed_model()
    with pytest.raises(InputTypeError, match=r"gate_up_proj is packed .*no address; take \.contiguous\(\)"):
        save_file({"w": next(iter(experts_of(ours).values())).gate_up_proj.detach()}, tmp_path / "w.safetensors")


@EVERY_WEIGHT
def test_a_copy_is_a_copy(name: str) -> None:
    plain, packed = pair(name)
    for copied in (copy.deepcopy(packed), packed.detach().clone()):
        with torch.no_grad():
            copied.copy_(torch.zeros_like(plain))
        assert same_bits(packed.contiguous(), plain)
        assert not copied.contiguous().count_nonzero()
    assert isinstance(copy.deepcopy(packed), nn.Parameter)


@EVERY_FAMILY
@EVERY_WEIGHT
def test_arithmetic_in_place_is_that_of_the_weight(family: str, name: str) -> None:
    plain, packed = pair(name, family)
    delta = torch.randn(plain.shape)
    for weight in (plain, packed):
        weight.data += delta
        weight.data -= 0.5 * delta.bfloat16()
        weight.data.add_(delta.bfloat16(), alpha=0.25)
    assert same_bits(packed.contiguous(), plain)
    assert isinstance(packed, PackedWeight)


@EVERY_WEIGHT
def test_assigning_data_packs_it(name: str) -> None:
    plain, packed = pair(name)
    new = torch.randn(plain.shape).bfloat16()
    packed.data = new
    assert same_bits(packed.contiguous(), new)
    other = packed.data.clone()
    other += new
    packed.data = other
    assert same_bits(packed.contiguous(), new + new)


def test_the_next_call_sees_what_was_written() -> None:
    eager, ours = packed_model()
    ids = tokens()
    for model in (eager, ours):
        for module in experts_of(model).values():
            module.down_proj.data += module.down_proj.data.clone().contiguous()
    with torch.no_grad():
        assert same_bits(ours(ids).logits, on_jitmoe(eager)(ids).logits)


def test_weights_written_between_forward_and_backward_are_an_error() -> None:
    _, ours = packed_model()
    ids = tokens()
    for module in experts_of(ours).values():
        module.requires_grad_(False)
    loss = ours(ids, labels=ids).loss
    next(iter(experts_of(ours).values())).down_proj.data += 1.0
    with pytest.raises(WeightsChangedError, match="between forward and backward"):
        loss.backward()
    ours(ids, labels=ids).loss.backward()


READS = {
    "select": lambda w: w[3],
    "index": lambda w: w[torch.tensor(3)],
    "index-two": lambda w: w[torch.tensor([5, 1])],
    "slice": lambda w: w[2:5],
    "every-other": lambda w: w[::2],
    "chunk-experts": lambda w: w.chunk(3)[1],
    "halves": lambda w: w.chunk(2, dim=1)[1],
    "half-of-one": lambda w: w.chunk(2, dim=1)[0][4],
    "last-axis": lambda w: w.chunk(2, dim=2)[1],
    "unbind": lambda w: torch.unbind(w)[6],
    "transpose": lambda w: w.transpose(-1, -2),
    "float": lambda w: w.float(),
    "sum": lambda w: w.sum(),
    "product": lambda w: w * 2,
    "finite": lambda w: torch.isfinite(w).all().float(),
    "flatten": lambda w: w.reshape(-1)[:7],
    "columns": lambda w: w[..., 1:4],
}


@pytest.mark.parametrize("read", READS)
@EVERY_WEIGHT
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_reading(family: str, name: str, read: str) -> None:
    plain, packed = (weight.detach() for weight in pair(name, family))
    expected, found = READS[read](plain), READS[read](packed)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert same_bits(found.contiguous(), expected.contiguous())


@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like, torch.ones_like])
def test_others_like_it_are_plain(make: Any) -> None:
    plain, packed = pair("down_proj")
    made = make(packed.detach())
    assert type(made) is Tensor and made.shape == plain.shape and made.dtype == plain.dtype


REFUSED = {
    "float": (lambda model: model.float(), "cannot become torch.float32.*unpack"),
    "half": (lambda model: model.half(), "cannot become torch.float16.*unpack"),
    "meta": (lambda model: model.to("meta"), "stays on the CPU, it cannot go to meta.*unpack"),
    "zero": (lambda model: next(iter(experts_of(model).values())).down_proj.data.zero_(), "frozen: aten.zero_"),
    "multiply": (lambda model: next(iter(experts_of(model).values())).down_proj.data.mul_(2), "frozen: aten.mul_"),
    "normal": (lambda model: nn.init.normal_(next(iter(experts_of(model).values())).down_proj), "frozen: aten.normal_"),
    "part": (lambda model: next(iter(experts_of(model).values())).down_proj.data[2].copy_(torch.ones(())), "a part of"),
    "shape": (
        lambda model: setattr(next(iter(experts_of(model).values())).down_proj, "data", torch.zeros(3).bfloat16()),
        "has shape",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_is_refused_in_words(change: str) -> None:
    _, ours = packed_model()
    ids = tokens()
    act, words = REFUSED[change]
    with torch.no_grad():
        expected = ours(ids).logits
        with pytest.raises(jitmoe.JitmoeError, match=words):
            act(ours)
        experts = experts_of(ours)
        if change not in ("float", "half", "meta"):  # those have changed the modules before the experts
            assert same_bits(ours(ids).logits, expected)
    assert all(isinstance(getattr(m, name), PackedWeight) for m in experts.values() for name in WEIGHTS)


def test_moves_that_change_nothing_work() -> None:
    eager, ours = packed_model()
    ids = tokens()
    moved = ours.to("cpu").to(torch.bfloat16).cpu().bfloat16()
    with torch.no_grad():
        assert same_bits(moved(ids).logits, on_jitmoe(eager.bfloat16())(ids).logits)


def test_unpack_gives_plain_parameters_back() -> None:
    eager, ours = packed_model()
    assert jitmoe.hf.unpack(ours) == len(experts_of(ours))
    assert not any(isinstance(parameter, PackedWeight) for parameter in ours.parameters())
    assert all(map(same_bits, ours.parameters(), eager.parameters()))
    ours.float()


def test_other_implementations_read_it_and_are_warned() -> None:
    eager, ours = packed_model()
    ids = tokens()
    ours.set_experts_implementation("eager")
    with torch.no_grad(), pytest.warns(UserWarning, match=r"unpacks experts .*set_experts_implementation"):
        assert same_bits(ours(ids).logits, eager(ids).logits)


def test_launchers_are_told_to_leave_packed_weights_alone() -> None:
    """Names of the moment, of the model and of a PeftModel of it; what the model had ignored before stays ignored."""
    eager = eager_model("qwen3_moe")
    eager._ddp_params_and_buffers_to_ignore = ["mine"]
    ours = on_jitmoe(eager)
    for _ in range(2):
        jitmoe.hf.pack(ours)
    names = [name for name, weight in ours.named_parameters() if isinstance(weight, PackedWeight)]
    expected = {"mine", *names, *(f"base_model.model.{name}" for name in names)}
    assert set(ours._ddp_params_and_buffers_to_ignore) == expected and len(names) == 4
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours._ddp_params_and_buffers_to_ignore))):
        assert set(getattr(copied, "_ddp_params_and_buffers_to_ignore", copied)) == expected
    jitmoe.hf.unpack(ours)
    assert set(ours._ddp_params_and_buffers_to_ignore) == {"mine"}


@EVERY_FAMILY
@EVERY_WEIGHT
def test_a_copy_of_the_same_values_writes_nothing(family: str, name: str) -> None:
    plain, packed = pair(name, family)
    with torch.no_grad():
        packed.copy_(plain.clone())
        assert packed.packed.writes == 0
        plain[-1, -1, -1] += 1
        packed.copy_(plain)
    assert packed.packed.writes == 1 and same_bits(packed.contiguous(), plain)
