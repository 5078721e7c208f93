"""Tunix's PeftTrainer with its default loss on padded rows, for bench.sft: a step at a time, and the step compiled."""

import itertools
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

from bench.sft_data import LEARNING_RATE, LENGTH, ROWS, Turn, predicted_tokens
from models.config import TransformerConfig
from posttrain.data.examples import Example


def padded_input(examples: Sequence[Example]) -> TrainingInput:
    """A row of LENGTH tokens for each example, padded with 0; the mask says what is trained."""
    tokens, trained = np.zeros((2, len(examples), LENGTH), np.int32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        trained[row, : len(example.tokens)] = example.trained
    return TrainingInput(input_tokens=jnp.asarray(tokens), input_mask=jnp.asarray(trained))


def model_input(given: TrainingInput) -> dict[str, jax.Array]:
    """What Tunix's default loss takes, made as its examples make it."""
    filled = given.input_tokens != 0
    return {
        "input_tokens": given.input_tokens,
        "input_mask": given.input_mask,
        "positions": build_positions_from_mask(filled),
        "attention_mask": make_causal_attn_mask(filled),
    }


class TunixSteps:
    """The trainer and its jitted step; batches are made beforehand, so its steps carry no work on data."""

    def __init__(self, config: TransformerConfig) -> None:
        """Builds Tunix's own Llama of the config's sizes, with our optimizer."""
        assert config.family == "llama", config.family
        sizes = ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.embed_dim,
            hidden_dim=config.mlp_dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_theta),
            norm_eps=config.norm_eps,
        )
        adamw = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.1)
        options = TrainingConfig(eval_every_n_steps=10**9, checkpoint_root_directory=tempfile.mkdtemp())
        self._mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
        with self._mesh:
            trainer = PeftTrainer(
                Llama3(sizes, rngs=nnx.Rngs(0)), optax.chain(optax.clip_by_global_norm(1.0), adamw), options
            )
            self._trainer = trainer.with_gen_model_input_fn(model_input)
            self._step, _ = self._trainer.jit_train_and_eval_step()

    def feed(self, examples: Sequence[Example]) -> None:
        """Sets the examples that `take` goes through, over and over."""
        batches = [examples[start : start + ROWS] for start in range(0, len(examples) - ROWS + 1, ROWS)]
        fed = [(padded_input(batch), predicted_tokens(batch)) for batch in batches]
        self._batches = itertools.cycle(fed)

    def take(self, steps: int) -> Turn:
        """Takes steps."""
        start, tokens = time.perf_counter(), 0
        with self._mesh:
            for _ in range(steps):
                batch, count = next(self._batches)
                loss = self._step(batch)
                tokens += count
            jax.block_until_ready((loss, nnx.state(self._trainer.model)))
        return time.perf_counter() - start, tokens

    def compiled(self) -> Any:
        """The step compiled for ROWS rows of LENGTH tokens, without taking it."""
        cells = jnp.ones((ROWS, LENGTH), jnp.int32)
        partial: Any = self._step
        with self._mesh:
            return partial.func.lower(*partial.args, TrainingInput(input_tokens=cells, input_mask=cells)).compile()
