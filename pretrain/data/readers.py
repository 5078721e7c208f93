"""Opens the data set that a recipe names.

Every kind of data ends as `Documents`, a sequence of strings in random access, so that order, packing and resumption
are written once. Data that is not as the recipe says is an error here, before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable

from pretrain.data.hugging_face import HuggingFaceDocuments
from pretrain.data.sources import Documents, Source
from pretrain.data.text_files import TextDocuments
from pretrain.data.tfds_reader import open_tfds

READERS: dict[str, Callable[[Source], Documents]] = {
    "text": TextDocuments,
    "tfds": open_tfds,
    "hf": HuggingFaceDocuments,
}


def open_documents(source: Source) -> Documents:
    """Opens the data set that `source` names.

    Raises:
        ValueError: it is missing, empty, of another format than its kind says, or without the split or column named.
    """
    documents = READERS[source.kind](source)
    if len(documents) == 0:
        raise ValueError(f"{source.named()}: it holds no documents; training needs at least one, so name other data")
    return documents
