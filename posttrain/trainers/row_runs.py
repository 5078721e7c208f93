"""What the runs on rows of data share: how each opens, and how it reads its rows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax

from models.sharding import activation_mesh
from models.tokenizer import Tokenizer, load_tokenizer
from pretrain.runtime import require_shared_directory, runtime
from pretrain.setup import ModelSetup, Setup
from recipes.rundir import Run, create_run
from recipes.schema import RowsRecipe

logger = logging.getLogger(__name__)

AnyRecipe = TypeVar("AnyRecipe", bound=RowsRecipe)


@contextmanager
def opened_run(
    recipe: AnyRecipe, argv: Sequence[str], prepare: Callable[[AnyRecipe], Setup]
) -> Iterator[tuple[Setup, Run]]:
    """Devices, checked parts, the run's directory and the mesh, in the order in which a mistake costs least.

    Raises:
        ValueError: the recipe doesn't fit the model, the data, the devices or the run it resumes.
    """
    with runtime(recipe.train, recipe.mesh):
        require_shared_directory(recipe.run)
        setup = prepare(recipe)
        try:
            with create_run(recipe, argv, jax.process_index() == 0) as attempt:
                logger.info(attempt.story)
                with activation_mesh(setup.mesh, setup.rules):
                    yield setup, attempt
        finally:
            setup.close()


@dataclass(frozen=True)
class RowReading:
    """How a host reads its rows."""

    tokenizer: Tokenizer
    rows: int
    """Of a training batch."""
    eval_rows: int
    """Of a held-out batch."""
    options: dict[str, Any]
    """The keywords that all iterators of rows take."""


def row_reading(recipe: RowsRecipe, parts: ModelSetup) -> RowReading:
    """What a host's iterators are made with."""
    rows, eval_rows = (plan.rows_loaded // parts.share.count for plan in (parts.plan, parts.eval_plan))
    options = {
        "vocab_size": parts.config.vocab_size,
        "add_bos": recipe.tokenizer.add_bos,
        "add_eos": recipe.tokenizer.add_eos,
        "host_index": parts.share.index,
        "host_count": parts.share.count,
    }
    return RowReading(load_tokenizer(recipe.tokenizer), rows, eval_rows, options)
