"""Text as rows of tokens for transformers' Trainer."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Windows(Dataset[dict[str, Tensor]]):
    """Rows of ``length`` tokens that follow each other in a text; each token is to be predicted from those before it.

    Args:
        text: bytes of the text, as :func:`text.load_corpus` gives them.
        tokenizer: of transformers.
        length: tokens of a row.
    """

    def __init__(self, text: Tensor, tokenizer: Any, length: int) -> None:
        # Piece by piece, as tokenizers warn of texts that are longer than their model's context.
        lines = bytes(text.tolist()).decode(errors="replace").splitlines(keepends=True)
        ids = [number for row in tokenizer(lines, add_special_tokens=False).input_ids for number in row]
        length = min(length, len(ids))
        self.rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
