# SPDX-License-Identifier: BSD-3-Clause
"""A Hugging Face model and its tokenizer from a folder, or one line that says what the folder lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errors import CheckpointError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging


def load(
    auto_model: type, folder: Path, *, new_head: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, with a head that is yet to be trained where ``new_head``, and the tokenizer.

    Raises CheckpointError where they are not there, not whole, or do not belong together.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, found = auto_model.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
        if found["missing_keys"] and not new_head:
            raise ValueError(f"it has no {', '.join(sorted(found['missing_keys']))}")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
        if not set(tokenizer("a").input_ids) - set(tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no words")  # transformers makes one up where there is none
    except ImportError:
        raise
    except Exception as error:  # transformers and tokenizers have no common class of what damaged files raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{folder} is no model that can be used: {reason}") from error
    return model, tokenizer
