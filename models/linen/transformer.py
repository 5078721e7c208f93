"""The language model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from models.config import TransformerConfig
from models.context import step_context
from models.inference.cache import KVCache
from models.linen.decoder import Decoder
from models.linen.embedding import Embedding
from models.ops.head import HeadParams, output_logits
from models.ops.linear import dropout
from models.parameters import embedding_specs
from models.sharding import constrain
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection


class Transformer(nn.Module):
    """A decoder-only transformer; methods and arguments are those of `models.nnx.transformer.Transformer`."""

    config: TransformerConfig
    options: ModelSection
    adapters: LoraSection | None = None

    def setup(self) -> None:
        """Declares the submodules."""
        self.token_embedder = Embedding(embedding_specs(self.config)["embedding"], self.options)
        self.decoder = Decoder(self.config, self.options, self.adapters)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        attention_mask: Bool[Array, "B T S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        noise_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits for every token; see `hidden_states` for the arguments."""
        hidden, cache = self.hidden_states(tokens, positions, cache, attention_mask, segment_ids, noise_key=noise_key)
        return self.logits(hidden), cache

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        attention_mask: Bool[Array, "B T S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        noise_key: PRNGKeyArray | None = None,
        prefix_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Runs all but the output head; arguments and results as in the NNX twin."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        config, rate = self.config, self.options.dropout_rate
        context = step_context(
            config,
            positions,
            segment_ids=segment_ids,
            attention_mask=attention_mask,
            noise_key=noise_key,
            prefix_ids=prefix_ids,
        )
        x = self.token_embedder(tokens)
        if config.scale_embeddings:
            x = x * jnp.asarray(config.embed_dim**0.5, x.dtype)
        x = constrain(x, "batch", "time", "activation_embed")
        first, last = (None, None)
        if noise_key is not None:
            first, last = (jax.random.fold_in(noise_key, config.num_layers + i) for i in range(2))
        x = dropout(x, first, rate=rate, broadcast_time=False)
        x, cache = self.decoder(x, positions, context, cache)
        x = dropout(x, last, rate=rate, broadcast_time=False)
        if cache is not None:
            cache = replace(cache, lengths=cache.lengths + tokens.shape[1])
        return x, cache

    def head(self) -> HeadParams:
        """The output head's parameters, as `models.ops.head.head_params` names them."""
        if self.config.tied_embeddings:
            return {"embedding": self.token_embedder.embedding}
        return {"kernel": self.decoder.logits_dense.kernel}

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head: normalised hidden states to logits in the logits dtype."""
        logits = output_logits(
            self.head(), hidden, softcap=self.config.logits_softcap, dtype=jnp.dtype(self.options.logits_dtype)
        )
        return constrain(logits, "batch", "time", "activation_vocab")
