"""A model whose parameters are its logits, so that a trainer's gradient at the logits can be looked at."""

from typing import Any

import jax
import jax.numpy as jnp

from models.config import load_preset
from models.functional import FunctionalModel, Params
from recipes.schema import ModelSection

VOCABULARY = 259


class LogitsModel(FunctionalModel):
    """Hidden states are the parameter `logits` [B, T, V], and the head is the identity."""

    def hidden_states(self, params: Params, *args: Any, **kwargs: Any) -> tuple[jax.Array, None]:
        """The logits themselves."""
        return params["logits"], None

    def head(self, params: Params) -> Any:
        """A product with it changes nothing, and nothing of its gradient."""
        return {"kernel": jnp.eye(VOCABULARY)}


def logits_model() -> LogitsModel:
    """The model; its other sizes are never read."""
    return LogitsModel(load_preset("tiny-llama").replace(vocab_size=VOCABULARY), ModelSection(preset="tiny-llama"))


def random_logits(key: int, batch: int, length: int) -> Params:
    """Parameters of the model: [batch, length, V]."""
    return {"logits": jax.random.normal(jax.random.key(key), (batch, length, VOCABULARY))}
