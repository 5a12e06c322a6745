"""A tokenizer with no vocabulary: random weights read nothing into the words, only their number costs."""

from typing import Any

import torch
import transformers


class StandInTokenizer:
    """Stands in for a CLIP or T5 tokenizer: always as many tokens as the text encoder takes, none of them padding."""

    pad_token = eos_token = "x"
    padding_side = "right"
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, length: int) -> None:
        self.model_max_length = length
        self.added_tokens_encoder: dict[str, int] = {}

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

    def tokenize(self, *_: Any, **__: Any) -> list[str]:
        return ["x"]

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        return [""]
