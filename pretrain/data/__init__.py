"""Data pipelines of pretraining: from a recipe's data section to batches of packed rows, resumable to the row."""

from pretrain.data.batch import FIELD_NAMES, TextTotals, TokenBatch, padding_batch
from pretrain.data.build import check_vocabulary, make_eval_iterator, make_train_iterator
from pretrain.data.iterators import BatchIterator, EvalIterator

__all__ = [
    "FIELD_NAMES", "BatchIterator", "EvalIterator", "TextTotals", "TokenBatch", "check_vocabulary",
    "make_eval_iterator", "make_train_iterator", "padding_batch",
]  # fmt: skip
