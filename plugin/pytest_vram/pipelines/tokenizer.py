"""A tokenizer with no vocabulary: random weights read nothing into the words, only their number costs."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers


class StandInTokenizer:
    """Stands in for any tokenizer or processor: always as many tokens as the text encoder takes, none of it padding."""

    pad_token = eos_token = "x"
    padding_side = "right"
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}
        self.tokenizer = self  # a processor's

    def __call__(
        self, text: Any = "", *_: Any, max_length: int | None = None, return_length: bool = False, **__: Any
    ) -> transformers.BatchEncoding:
        batch = len(text) if isinstance(text, (list, tuple)) else 1
        ids = torch.ones(batch, max_length or self.model_max_length, dtype=torch.long)
        ids[:, -1] = self.eos_token_id
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if return_length:
            encoded["length"] = torch.full((batch,), ids.shape[1])
        return transformers.BatchEncoding(encoded)

    def apply_chat_template(
        self, chat: Sequence[Any], *_: Any, tokenize: bool = True, return_dict: bool = False, **options: Any
    ) -> Any:
        """`chat` is one conversation, or a list of them."""
        if not tokenize:
            return "a prompt"
        turns = chat[0] if isinstance(chat[0], list) else chat
        if all(turn.get("role") == "system" for turn in turns):
            options.setdefault("max_length", 8)  # a system message is no prompt: its length is cut off
        encoded = self([""] * (len(chat) if isinstance(chat[0], list) else 1), **options)
        return encoded if return_dict else encoded["input_ids"]

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return [3] * 8  # 1 is every token of a prompt: that of an image must be another

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def tokenize(self, *_: Any, **__: Any) -> list[str]:
        return ["x"]

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        return [""]
