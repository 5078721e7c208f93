"""Both frameworks behind one functional face: parameters in, arrays out.

Parameters are nested dicts in Linen's naming (`decoder/layers/...` or `decoder/layers_0/...`) whichever framework runs,
so trainers, optimizers and sharding are written once; NNX state is made from them inside the traced function, which is
free.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from models import lora
from models.config import TransformerConfig
from models.inference.cache import KVCache
from models.linen.transformer import Transformer as LinenTransformer
from models.nnx.transformer import Transformer as NNXTransformer
from models.ops.head import HeadParams, head_params
from models.parameters import SpecTree, flatten, init_params, nnx_path
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection

Params = dict[str, Any]


def abstract_nnx(
    config: TransformerConfig, options: ModelSection, adapters: LoraSection | None = None
) -> NNXTransformer:
    """The NNX model with shapes for arrays; allocates nothing."""
    return nnx.eval_shape(lambda: NNXTransformer(config, options, adapters=adapters, rngs=nnx.Rngs(params=0)))


def nnx_from_params(abstract: NNXTransformer, params: Params) -> NNXTransformer:
    """An NNX model that holds `params`; the arrays are shared, not copied."""
    graphdef, state = nnx.split(abstract)
    values = {nnx_path(path): leaf for path, leaf in flatten(params)}
    flat = [(path, variable.replace(values.pop(path))) for path, variable in nnx.to_flat_state(state)]
    assert not values, f"parameters without a place in the model: {sorted(values)}"
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@dataclass(frozen=True)
class FunctionalModel:
    """A transformer of either framework as pure functions of its parameters."""

    config: TransformerConfig
    options: ModelSection
    adapters: LoraSection | None = None
    """What of the tree are low-rank adapters, and how the rest rests; None: the plain model."""

    def init(self, key: PRNGKeyArray) -> Params:
        """Draws parameters; the same key gives the same weights in either framework and layer layout.

        Adapters change neither the base's weights nor, at first, what the model computes.
        """
        base = init_params(
            self.config,
            key,
            scan_layers=self.options.scan_layers,
            param_scan_axis=self.options.param_scan_axis,
            dtype=self.options.param_dtype,
        )
        if self.adapters is None:
            return base
        pairs = lora.init_adapters(self.config, self.adapters, self.layout, key)
        return lora.join(lora.quantize_base(base, self.config, self.adapters, self.layout), pairs)

    @cached_property
    def specs(self) -> SpecTree:
        """What `init` draws: names, shapes and logical axes."""
        return lora.adapted_param_specs(
            self.config,
            self.adapters,
            scan_layers=self.options.scan_layers,
            param_scan_axis=self.options.param_scan_axis,
        )

    @property
    def layout(self) -> lora.Layout:
        """Where the layers of a tree stand."""
        return lora.Layout(self.config.num_layers, self.options.scan_layers, self.options.param_scan_axis)

    @cached_property
    def _linen(self) -> LinenTransformer:
        return LinenTransformer(self.config, self.options, self.adapters)

    @cached_property
    def _abstract_nnx(self) -> NNXTransformer:
        return abstract_nnx(self.config, self.options, self.adapters)

    def hidden_states(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        noise_key: PRNGKeyArray | None = None,
        prefix_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """All but the output head; arguments as in `models.nnx.transformer.Transformer.hidden_states`."""
        args = (tokens, positions, cache, attention_mask, segment_ids)
        if self.options.framework == "linen":
            options = {"noise_key": noise_key, "prefix_ids": prefix_ids}
            return self._linen.apply({"params": params}, *args, **options, method="hidden_states")
        model = nnx_from_params(self._abstract_nnx, params)
        return model.hidden_states(*args, noise_key=noise_key, prefix_ids=prefix_ids)

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        noise_key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "B T V"], KVCache | None]:
        """Logits and cache; arguments as in `models.nnx.transformer.Transformer.hidden_states`."""
        args = (tokens, positions, cache, attention_mask, segment_ids)
        if self.options.framework == "linen":
            return self._linen.apply({"params": params}, *args, noise_key=noise_key)
        return nnx_from_params(self._abstract_nnx, params)(*args, noise_key=noise_key)

    def head(self, params: Params) -> HeadParams:
        """The output head's parameters."""
        return head_params(params)
