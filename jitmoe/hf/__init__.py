"""jitmoe in the ecosystem of Hugging Face: transformers, PEFT and the files of adapters."""
