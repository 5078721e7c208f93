"""What MaxText's parameters mean where that differs from ours, as one table of families; both ways, moments included.

Tree names and shapes are the same. Ours are Hugging Face's numbers; MaxText's differ from them in five ways, read off
its sources (0.2.5) and, for llama and gpt3, off checkpoints that it wrote:

- llama, mistral and gemma2 never scale queries at run time: the query kernel holds the factor. Qwen and gpt3 scale.
- gemma2's token table holds Hugging Face's times sqrt(embed_dim); its lookup does not scale, and its tied head divides.
- gemma2's norms hold the weight itself; Hugging Face and we hold the weight minus one. gpt3's hold it minus one.
- llama with Llama 3.1's rotary scaling turns neighbouring elements of a head, (0, 1), (2, 3), ...; all others turn the
  two halves, as Hugging Face and we do. The scaling's numbers are fixed in its source.
- gemma2 keeps a sliding and a full layer in one block, under names that end in _local and _global.

Where ours = factor * theirs, a gradient of ours is theirs / factor: first moments are divided by the factor, second
ones by its square.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.config import RopeScaling, TransformerConfig

Path = tuple[str, ...]

PAIR = ("local", "global")
_ROPE_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
# By the name above the parameter tree in an optimizer's state: the power of the gradient's scale that a moment has.
_MOMENT_POWERS = {"mu": 1, "nu": 2, "trace": 1}
_TURNED = ("query", "key")


@dataclass(frozen=True)
class Numerics:
    """How a family's parameters differ between MaxText and us."""

    query_factor: float
    """Our query projection is MaxText's times this."""
    table_factor: float
    """Our token table is MaxText's times this."""
    norms_hold_weight: bool
    """MaxText's norms hold the weight, and ours the weight minus one."""
    neighbours_turn: bool
    """MaxText rotates neighbouring elements of a head, and we its halves."""
    paired_layers: bool
    """MaxText keeps two layers in one block."""

    def changes(self) -> list[str]:
        """What is converted on the way to ours, one phrase each."""
        found = []
        if self.query_factor != 1.0:
            factor = self.query_factor
            found.append(f"query projections times {factor:.6g} (mu / {factor:.6g}, nu / {factor**2:.6g})")
        if self.table_factor != 1.0:
            factor = 1 / self.table_factor
            found.append(f"token table divided by {factor:.6g} (mu times {factor:.6g}, nu times {factor**2:.6g})")
        if self.norms_hold_weight:
            found.append("norm weights minus one")
        if self.neighbours_turn:
            found.append("rotary pairs from neighbours to halves, in queries and keys")
        if self.paired_layers:
            found.append("blocks of a local and a global layer to two layers")
        return found


def numerics_of(config: TransformerConfig) -> Numerics:
    """The differences for an architecture.

    Raises:
        ValueError: MaxText computes no such architecture; the field is named.
    """
    family = config.family
    if config.rope_scaling is not None and (
        config.rope_scaling != _ROPE_SCALING or family != "llama" or config.qk_norm
    ):
        raise ValueError(
            f"model.rope_scaling={config.rope_scaling}: MaxText scales in llama alone, by the numbers of Llama 3.1 "
            f"({_ROPE_SCALING}), so its tree would mean another model; convert to hf, linen or nnx instead"
        )
    paired = family == "gemma2"
    if paired and (config.num_layers % 2 or config.attention_pattern != ("sliding", "full")):
        raise ValueError(
            f"model.num_layers={config.num_layers}, attention_pattern={config.attention_pattern}: MaxText keeps "
            "gemma2's layers in blocks of a sliding and a full one; use an even number of layers and that pattern"
        )
    folded = family in ("llama", "mistral", "gemma2")
    return Numerics(
        query_factor=_query_factor(config, folded=folded),
        table_factor=config.embed_dim**-0.5 if config.scale_embeddings else 1.0,
        norms_hold_weight=config.norm_scale_plus_one and config.norm == "rms",
        neighbours_turn=config.rope_scaling is not None,
        paired_layers=paired,
    )


def _query_factor(config: TransformerConfig, *, folded: bool) -> float:
    """Scores are scale * query * key; MaxText's scale is 1 where the kernel holds it, else head_dim ** -0.5."""
    if config.query_scale is None:
        return config.head_dim**0.5 if folded else 1.0
    return (1.0 if folded else config.head_dim**-0.5) / config.query_scale


def require_known_moments(path: Path, numerics: Numerics) -> None:
    """Raises ValueError for a tree of moments that are not known to follow their parameters to other numbers.

    Args:
        path: of the tree in the optimizer's state.
        numerics: of the family.
    """
    if numerics.changes() and path[-1] not in _MOMENT_POWERS:
        raise ValueError(
            f"opt_state/{'/'.join(path)}: parameters of this family are other numbers in MaxText, and only the moments "
            f"{', '.join(_MOMENT_POWERS)} are known to follow them; convert with --params-only"
        )


def leaf_to_ours(path: Path, leaf: Any, kind: str, numerics: Numerics) -> Any:
    """One array of a parameter tree, or of a tree of moments, in our numerics.

    Args:
        path: of the parameter, in our names.
        leaf: the array; None, a frozen parameter's moment, stays.
        kind: "" for parameters, else the name above the tree in the optimizer's state.
        numerics: of the family.
    """
    return _convert(path, leaf, kind, numerics, to_ours=True)


def leaf_to_maxtext(path: Path, leaf: Any, kind: str, numerics: Numerics) -> Any:
    """The inverse of `leaf_to_ours`."""
    return _convert(path, leaf, kind, numerics, to_ours=False)


def _convert(path: Path, leaf: Any, kind: str, numerics: Numerics, *, to_ours: bool) -> Any:
    factor = _factor(path, numerics)
    turns = numerics.neighbours_turn and "self_attention" in path and path[-2] in _TURNED
    if leaf is None or (factor == 1.0 and not turns and not (numerics.norms_hold_weight and path[-1] == "scale")):
        return leaf
    if turns:
        leaf = _turn(leaf, to_ours=to_ours)
    if kind:
        # The factor's square is exact for head dims and widths, which are whole.
        power = _MOMENT_POWERS[kind]
        scale = 1.0 if factor == 1.0 else 1 / factor if power == 1 else 1 / _square(factor)
        return _times(leaf, scale if to_ours else 1 / scale)
    if numerics.norms_hold_weight and path[-1] == "scale":
        return (leaf.astype(np.float64) + (-1.0 if to_ours else 1.0)).astype(leaf.dtype)
    return _times(leaf, factor if to_ours else 1 / factor)


def _factor(path: Path, numerics: Numerics) -> float:
    if "self_attention" in path and path[-2] == "query":
        return numerics.query_factor
    return numerics.table_factor if path[0] == "token_embedder" else 1.0


def _square(factor: float) -> float:
    square = factor * factor
    whole = round(square) if square >= 1 else 1 / round(1 / square)
    return whole if abs(square / whole - 1) < 1e-12 else square


def _times(leaf: Any, scale: float) -> Any:
    # In float64, so that the one rounding is that of the result.
    return leaf if scale == 1.0 else (leaf.astype(np.float64) * scale).astype(leaf.dtype)


def _turn(leaf: Any, *, to_ours: bool) -> Any:
    """Moves element 2 i to i and 2 i + 1 to i + N / 2 along the last axis, of length N, or back."""
    size = leaf.shape[-1]
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    return np.take(leaf, order if to_ours else np.argsort(order), axis=-1)


def as_maxtext_computes(config: TransformerConfig, params: dict[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """MaxText's parameters, unconverted, with the configuration under which our model computes what MaxText does.

    So a converted tree is compared with the original through another route than the conversion. Neighbouring rotary
    pairs have no switch in our model: there the heads are turned here, by indexing of its own.

    Args:
        config: the architecture in our terms.
        params: NumPy arrays of MaxText's in our names (blocks already split into layers).
    """
    numerics = numerics_of(config)
    changes: dict[str, Any] = {}
    if numerics.query_factor != 1.0:
        changes["query_scale"] = config.attention_scale * numerics.query_factor
    if numerics.norms_hold_weight:
        changes["norm_scale_plus_one"] = False
    table = params["token_embedder"]["embedding"]
    if config.scale_embeddings:
        changes["scale_embeddings"] = False
        if config.tied_embeddings:
            changes["tied_embeddings"] = False
            kernel = np.ascontiguousarray((table / np.sqrt(np.float32(config.embed_dim))).T)
            params = {**params, "decoder": {**params["decoder"], "logits_dense": {"kernel": kernel}}}
    if numerics.neighbours_turn:
        decoder = {
            name: _with_halves(layer) if name.startswith("layers") else layer
            for name, layer in params["decoder"].items()
        }
        params = {**params, "decoder": decoder}
    return config.replace(**changes) if changes else config, params


def _with_halves(layer: dict[str, Any]) -> dict[str, Any]:
    attention = dict(layer["self_attention"])
    for name in ("query", "key"):
        attention[name] = {
            part: np.concatenate([leaf[..., ::2], leaf[..., 1::2]], axis=-1) for part, leaf in attention[name].items()
        }
    return {**layer, "self_attention": attention}
