"""Adapters of experts beside PEFT: what its own files mean, and what it makes of ours."""

import pytest
import torch
from adapters import OLD_SIZES, adapter_of, assert_same, edit_config, numbers
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from jitmoe import AdapterError  # noqa: E402
from jitmoe.hf.adapters.choices import Choices  # noqa: E402
from jitmoe.hf.adapters.convert import convert, read_adapter  # noqa: E402
from jitmoe.hf.adapters.files import MODEL, write  # noqa: E402
from jitmoe.hf.adapters.formats import FORMATS  # noqa: E402

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WAYS = [name for name in FORMATS if name != "peft-fused"]
SIZES = {"unequal": (24, 10), "H == I": (16, 16), "H == 2I": (16, 8)}
"""H and I; the models have five experts."""


def qwen(sizes: str = "unequal", dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    hidden, intermediate = SIZES[sizes]
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=hidden, moe_intermediate_size=intermediate, intermediate_size=20, head_dim=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_experts=5, num_experts_per_tok=2,
        decoder_sparse_step=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=32, hidden_size=24, intermediate_size=10, head_dim=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def tuned(model, make=torch.randn, **options):
    """``model`` with LoRA on its experts, and values in it."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": PARAMETERS, "task_type": "CAUSAL_LM"}
    with pytest.warns() if "rank_pattern" in options else pytest.MonkeyPatch.context():
        model = peft.get_peft_model(model, peft.LoraConfig(**given | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(make(*parameter.shape))
    return model


def wrappers(model):
    """PEFT's wrapper of each parameter, by the prefix of its experts in files."""
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            yield name.removesuffix(".base_layer"), module.parameter_name, module


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


class TestMeaning:
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("options", [{}, {"rank_pattern": {"mlp.experts.gate_up_proj": 2}}, {"r": 1}], ids=str)
    def test_the_delta_is_that_of_peft(self, tmp_path, sizes, options):
        model = tuned(qwen(sizes), numbers, **options)
        model.save_pretrained(tmp_path / "source")
        layers = {layer.prefix: layer for layer in read_adapter(tmp_path / "source").layers}
        seen = 0
        for prefix, parameter, wrapper in wrappers(model):
            delta, layer = wrapper.get_delta_weight("default"), layers[prefix]
            pairs = [layer.gate, layer.up] if parameter == "gate_up_proj" else [layer.down]
            ours = torch.cat([pair.scale * (pair.b @ pair.a) for pair in pairs], dim=1)
            assert torch.equal(ours, delta)
            seen += 1
        assert seen == 4

    def test_the_delta_of_rows_that_alternate(self, tmp_path):
        model = tuned(gpt_oss(), numbers)
        model.save_pretrained(tmp_path / "source")
        adapter = read_adapter(tmp_path / "source", choices=Choices(interleaved=True))
        layers = {layer.prefix: layer for layer in adapter.layers}
        for prefix, parameter, wrapper in wrappers(model):
            delta, layer = wrapper.get_delta_weight("default").transpose(1, 2), layers[prefix]
            if parameter == "down_proj":
                assert torch.equal(layer.down.scale * (layer.down.b @ layer.down.a), delta)
            else:
                assert torch.equal(layer.gate.scale * (layer.gate.b @ layer.gate.a), delta[:, 0::2])
                assert torch.equal(layer.up.scale * (layer.up.b @ layer.up.a), delta[:, 1::2])

    def test_gpt_oss_must_be_said(self, tmp_path):
        tuned(gpt_oss()).save_pretrained(tmp_path / "source")
        edit_config(tmp_path / "source", base_model_name_or_path="openai/gpt-oss-20b")
        with pytest.raises(AdapterError, match="--interleaved"):
            read_adapter(tmp_path / "source")


class TestThroughPeft:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("way", WAYS)
    def test_what_comes_back_is_the_same_to_peft(self, tmp_path, way, sizes, dtype):
        model = tuned(qwen(sizes, dtype))
        model.save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "there", way)
        convert(tmp_path / "there", tmp_path / "back", "peft-fused")
        original, back = (load_file(tmp_path / name / MODEL) for name in ("source", "back"))
        assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
        again = peft.PeftModel.from_pretrained(qwen(sizes, dtype), tmp_path / "back")
        assert torch.equal(logits(again), logits(model))
        assert not torch.equal(logits(again), logits(qwen(sizes, dtype))), "an adapter that does nothing"

    @pytest.mark.parametrize("rslora", [False, True])
    def test_with_patterns_and_other_modules(self, tmp_path, rslora):
        options = {"rank_pattern": {"mlp.experts.gate_up_proj": 2, "q_proj": 3}, "alpha_pattern": {"k_proj": 5}}
        model = tuned(qwen(), target_modules=["q_proj", "k_proj"], use_rslora=rslora, **options)
        model.save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "there", "peft-per-expert")
        convert(tmp_path / "there", tmp_path / "back", "peft-fused")
        with pytest.warns(match="rank_pattern keys did not match"):
            again = peft.PeftModel.from_pretrained(qwen(), tmp_path / "back")
        assert torch.equal(logits(again), logits(model))
        assert_same(read_adapter(tmp_path / "back"), read_adapter(tmp_path / "source"))

    @pytest.mark.parametrize("sizes", SIZES)
    def test_unshared_a_as_peft_itself_joins_it(self, tmp_path, sizes):
        """PEFT joins A of gate and up when it loads adapters of transformers 4."""
        hidden, intermediate = SIZES[sizes]
        adapter = adapter_of(sizes=(5, 3, hidden, intermediate), layers=(0, 1), shared=False, nan=False)
        write(tmp_path / "modules", FORMATS["peft-per-expert"].write(adapter, Choices()), force=False)
        convert(tmp_path / "modules", tmp_path / "fused", "peft-fused")
        theirs = peft.PeftModel.from_pretrained(qwen(sizes), tmp_path / "modules")
        ours = peft.PeftModel.from_pretrained(qwen(sizes), tmp_path / "fused")
        for (_, name, one), (_, _, other) in zip(wrappers(theirs), wrappers(ours), strict=True):
            assert one.scaling == other.scaling, name
            for side in ("lora_A", "lora_B"):
                assert torch.equal(getattr(one, side).default.weight, getattr(other, side).default.weight), name
        assert torch.equal(logits(theirs), logits(ours))


class TestBefore019:
    """In and out exchanged: ``delta = einsum("o r e, e r i -> e i o", B, A)``, as ParamWrapper of PEFT 0.18 had it."""

    @pytest.mark.parametrize("version", [{}, {"peft_version": "0.18.1"}], ids=str)
    @pytest.mark.parametrize("sizes", OLD_SIZES)
    def test_told_by_shape(self, tmp_path, sizes, version):
        experts, rank, hidden, intermediate = OLD_SIZES[sizes]
        shapes = {"base_layer.": (hidden, 2 * intermediate), "": (intermediate, hidden)}
        tensors, expected = {}, {}
        for part, (in_, out) in shapes.items():
            a, b = numbers(experts * rank, out), numbers(in_, rank * experts)
            tensors[f"model.layers.0.mlp.experts.{part}lora_A.weight"] = a
            tensors[f"model.layers.0.mlp.experts.{part}lora_B.weight"] = b
            by_rank, by_expert = b.view(in_, rank, experts), a.view(experts, rank, out)
            expected[part] = torch.einsum("o r e, e r i -> e i o", by_rank, by_expert)
        write(tmp_path / "old", {"adapter_config.json": {"r": rank, "lora_alpha": rank, **version}}, force=False)
        save_file(tensors, tmp_path / "old" / MODEL)
        done = convert(tmp_path / "old", tmp_path / "new", "peft-fused")
        assert "before 0.19" in done.notes[0]
        layer = read_adapter(tmp_path / "new").layers[0]
        assert torch.equal(
            torch.cat([pair.b @ pair.a for pair in (layer.gate, layer.up)], dim=1), expected["base_layer."]
        )
        assert torch.equal(layer.down.b @ layer.down.a, expected[""])
        again = convert(tmp_path / "new", tmp_path / "again", "peft-fused")
        assert again.notes == (), "today's layout is not taken for the old one"
        assert_same(read_adapter(tmp_path / "again"), read_adapter(tmp_path / "new"))
