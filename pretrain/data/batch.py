"""The batch that pretraining steps on, and the figures counted over batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

TokenField = Any
"""int32 [B, T]: numpy on the host, a jax.Array on devices. No array type stands here because the same container
also holds trees of shardings and of abstract shapes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens and what each token is to predict; every field is int32 [B, T], padded on the right.

    A cell is padding where its segmentation is 0; there all six fields are 0. Segments count 1, 2, ... along a row and
    are contiguous, and positions restart at 0 with each of them. Inputs and targets cover the same cells: targets[b, t]
    is the token that follows inputs[b, t] in its document, so no token is asked to predict another document.
    """

    inputs: TokenField
    """Token ids the model reads."""
    inputs_position: TokenField
    """Index of the token within its segment, from 0."""
    inputs_segmentation: TokenField
    """Number of the segment within the row, from 1; 0 is padding."""
    targets: TokenField
    """Token ids to predict: the inputs of the same segment, one later."""
    targets_position: TokenField
    """As inputs_position."""
    targets_segmentation: TokenField
    """As inputs_segmentation; the loss counts the cells where it is not 0."""


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(TokenBatch))


def padding_batch(num_rows: int, sequence_length: int) -> TokenBatch:
    """A batch of padding only, [num_rows, sequence_length]: what a host feeds while others still have rows."""
    return TokenBatch(**{name: np.zeros((num_rows, sequence_length), np.int32) for name in FIELD_NAMES})


@dataclasses.dataclass(frozen=True)
class TextTotals:
    """What a run of batches held, over all hosts."""

    target_tokens: int
    """Predictions: cells whose targets_segmentation is not 0."""
    text_bytes: int
    """UTF-8 bytes of the documents those predictions cover; begin and end marks are no bytes. A document cut into
    pieces gives each its share in proportion to its predictions, and the shares add up to the document."""

    def bits_per_byte(self, loss_sum: float) -> float:
        """The loss per byte of text in bits, which unlike the loss per token does not depend on the tokenizer.

        Args:
            loss_sum: cross-entropy summed over the target tokens, in nats.

        Raises:
            ValueError: the batches held no text, as synthetic ones do.
        """
        if self.text_bytes == 0:
            raise ValueError(
                "text_bytes=0: a loss per byte needs bytes of text, and these batches held none; "
                "report the loss per token instead"
            )
        return loss_sum / (math.log(2.0) * self.text_bytes)
