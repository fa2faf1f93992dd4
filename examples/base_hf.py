"""A base for the example with transformers: a tiny Qwen3-MoE and a tokenizer, both made from the text at hand."""

import sys
from pathlib import Path

import torch
from report_hf import Lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)
from windows import Windows

VOCABULARY, CONTEXT = 512, 128


def make_base(folder: Path, text: Tensor, steps: int, seed: int) -> Path:
    """Train a whole model on ``text`` with transformers' own experts, and save it in bfloat16; returns ``folder``."""
    tokenizer = make_tokenizer(bytes(text.tolist()).decode(errors="replace"))
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=4e-3,
        warmup_steps=steps // 10,
        use_cpu=True,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
    )
    rows = Windows(text, tokenizer, CONTEXT)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Lines("pre-training")])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if trainer.is_world_process_zero():
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return folder


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte pairs that are frequent in ``text``; every text can be said in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
