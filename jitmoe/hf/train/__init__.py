"""Training of a local checkpoint with stock tools: transformers' Trainer, PEFT's LoRA, the experts on jitmoe."""
