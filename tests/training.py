"""A tiny Qwen3-MoE, text for it and runs of the stock Trainer, for every test that trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="ascii").encode()
"""Not of a file that changes: losses follow from it."""
LENGTH = 61
BLOCKS = [torch.tensor(list(TEXT[start : start + LENGTH])) for start in range(0, len(TEXT) - LENGTH, LENGTH)]
HELD_OUT, ROWS = BLOCKS[::3], [block for number, block in enumerate(BLOCKS) if number % 3]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_config(**fields: Any) -> Any:
    """Of a Qwen3-MoE with bytes for words, with sizes as odd as stock grouped_mm takes them."""
    from transformers import Qwen3MoeConfig

    sizes = {
        "vocab_size": 259,
        "hidden_size": 40,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
        "use_cache": False,
        # Experts of the default's 0.02 hardly touch the loss of a model as small as this.
        "initializer_range": 0.2,
    }
    return Qwen3MoeConfig(**sizes | fields)


def tiny_model(implementation: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **fields: Any) -> Any:
    """The same bfloat16 values for every implementation and dtype."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(**fields)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation, dtype=torch.bfloat16)
    return model.to(dtype)


def with_lora(model: Any, rank: int = 5) -> Any:
    """PEFT's LoRA on attention and experts; B begins with values, or A would get no gradient at first."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=ATTENTION, target_parameters=EXPERTS)
    return get_peft_model(model, config)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of bytes, each of which is to be predicted from those before it."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


@dataclass
class Run:
    """What a run of the Trainer left: ``losses`` of training and evaluation, in the order of the log."""

    model: Any
    losses: list[tuple[int, str, float]]

    def curve(self) -> Tensor:
        """The losses alone, float64."""
        return torch.tensor([loss for _, _, loss in self.losses], dtype=torch.float64)


def train(model: Any, out: Path, resume: Path | None = None, **more: Any) -> Run:
    """Six steps of two batches of three rows, evaluated and saved after every second step."""
    from transformers import Trainer, TrainingArguments

    arguments = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": next(model.parameters()).dtype == torch.bfloat16,
        "seed": 3,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **arguments | more),
        train_dataset=Rows(ROWS),
        eval_dataset=Rows(HELD_OUT),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    log = trainer.state.log_history
    losses = [(row["step"], kind, row[kind]) for row in log for kind in ("loss", "eval_loss") if kind in row]
    return Run(model, losses)


def byte_tokenizer() -> Any:
    """Words are bytes, and three more begin, end and fill up."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>"]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
