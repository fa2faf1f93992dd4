"""Rows as tokens: what the model reads, and which of them it should learn to say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.errors import DataError, TrainError
from jitmoe.hf.train.rows import Row

IGNORED = -100
"""Label of a token that is read and not learnt."""


@dataclass(frozen=True)
class Encoded:
    """All rows as tokens.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each, of one length.
        cut: rows that were longer than ``max_length``.
    """

    rows: list[dict[str, list[int]]]
    cut: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row["input_ids"]) for row in self.rows)

    @property
    def largest(self) -> int:
        """The largest number of a token."""
        return max(max(row["input_ids"]) for row in self.rows)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint, able to fill up rows.

    Raises:
        TrainError: the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise TrainError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise TrainError(f"the tokenizer in {folder} has no eos_token: rows could not end. Set it in its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # filled up places are masked, so any token will do
    tokenizer.padding_side = "right"
    return tokenizer


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Encoded:
    """Tokens of all rows; each ends with the tokenizer's eos, unless it is cut.

    Raises:
        DataError: a row has nothing to learn in its first ``max_length`` tokens, or no chat template fits it.
    """
    found, cut = [], 0
    for row in rows:
        read, learnt = _encode_one(row, tokenizer)
        ids, labels = read + learnt, [IGNORED] * len(read) + learnt
        cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        # The first token is predicted by nobody.
        if all(label == IGNORED for label in labels[1:]):
            raise DataError(
                f"{row.place}: nothing to learn in its first {max_length} tokens ({len(read)} are the prompt)"
            )
        found.append({"input_ids": ids, "labels": labels})
    return Encoded(found, cut)


def _encode_one(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that are only read, and those that are learnt."""
    fields = row.fields
    if "messages" in fields:
        return [], _ending(tokenizer(_conversation(row, tokenizer), add_special_tokens=False).input_ids, tokenizer)
    if "text" in fields:
        return [], _ending(tokenizer(fields["text"]).input_ids, tokenizer)
    # Tokens that begin a text belong to the prompt, and those that end one may not follow it.
    prompt = tokenizer(fields["prompt"]).input_ids
    while prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    return prompt, _ending(tokenizer(fields["completion"], add_special_tokens=False).input_ids, tokenizer)


def _conversation(row: Row, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.place}: the tokenizer has no chat template for messages; use text, or prompt and completion"
        )
    try:
        text: str = tokenizer.apply_chat_template(row.fields["messages"], tokenize=False)
    except Exception as error:
        raise DataError(f"{row.place}: the chat template does not take its messages ({error})") from error
    return text


def _ending(ids: list[int], tokenizer: Any) -> list[int]:
    # Templates often end with a line feed behind the eos.
    return ids if tokenizer.eos_token_id in ids[-2:] else [*ids, tokenizer.eos_token_id]
