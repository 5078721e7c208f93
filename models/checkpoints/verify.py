"""Whether a conversion computes what its source computes: logits of both on fixed prompts.

The destination is read again from its files, by its own configuration. Source and destination are computed by routes
that share as little as their formats allow:

- ours: the loader that runs use, and the framework that the checkpoint names;
- Hugging Face: our importer and model, and besides them NumPy on the folder's own tensors (`hf_reference`);
- MaxText: its numbers unconverted, under a configuration of our model that reads them as MaxText does.

The prompts hold packed documents, padding on both sides, and positions far apart.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from models.checkpoints.contents import Kind
from models.checkpoints.convert import Converted, cast_params
from models.checkpoints.hf_reference import reference_logits
from models.checkpoints.huggingface import import_hf
from models.checkpoints.loader import Placement, load_params
from models.checkpoints.maxtext import read_raw
from models.checkpoints.maxtext_numerics import as_maxtext_computes, numerics_of
from models.checkpoints.restack import Layout
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.config import TransformerConfig, build_config
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, unflatten
from models.sharding import DEFAULT_RULES
from recipes.schema import MeshSection, ModelSection

logger = logging.getLogger(__name__)

EXACT = 1e-4
"""Of the larger of 1 and the largest logit. Both sides compute in float32 from the same numbers, so they differ by the
order of sums, by some 1e-6; the least of the faults that the tests plant, each in one tensor or key, makes 0.16."""
HALF = 5e-2
"""The same where numbers are rescaled and kept in 16 bits: there the rounding of a factor that is no power of two, or
of a norm's weight of about one, is part of MaxText's format."""
LENGTH = 24
_FARTHEST = 2048


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens, int32 [B, T]."""

    tokens: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    """The document of each token, 0 for padding."""


@dataclass(frozen=True)
class Verdict:
    """How far a conversion is from its source."""

    max_difference: float
    """The largest |difference| of logits over all routes, prompts and tokens that are no padding."""
    tolerance: float
    differences: dict[str, float]
    """By route."""

    @property
    def passes(self) -> bool:
        """Whether the conversion computes what its source does."""
        return self.max_difference <= self.tolerance


def fixed_prompts(config: TransformerConfig) -> Prompts:
    """The same prompts for the same sizes, always.

    Row 0 packs two documents and ends in padding, row 1 begins with padding, row 2 has one document whose positions run
    to 2047 (or the model's last), so that slow rotary frequencies and a wrong scaling of them show.
    """
    length = min(LENGTH, config.max_position)
    draw = np.random.default_rng(0).integers(0, config.vocab_size, (3, length))
    positions, segments = np.zeros((2, 3, length), np.int64)
    first, second, start = (length * 10) // 24, (length * 21) // 24, (length * 7) // 24
    for row, number, begin, end in ((0, 1, 0, first), (0, 2, first, second), (1, 1, start, length), (2, 1, 0, length)):
        segments[row, begin:end] = number
        positions[row, begin:end] = np.arange(end - begin)
    positions[2] = np.linspace(0, min(config.max_position, _FARTHEST) - 1, length).astype(np.int64)
    draw[segments == 0] = 0
    return Prompts(draw.astype(np.int32), positions.astype(np.int32), segments.astype(np.int32))


def verify(converted: Converted, *, tolerance: float | None) -> Verdict:
    """Compares a conversion with its source.

    Args:
        converted: what `convert` did; the destination is read from its files.
        tolerance: largest |difference| of logits; None takes EXACT (or HALF) times the larger of 1 and the largest
            logit.

    Raises:
        ValueError: the destination cannot be read back; what is wrong with it is said.
    """
    prompts = fixed_prompts(converted.source.config)
    source = _source_logits(converted, prompts)
    counted = prompts.segment_ids != 0
    differences = {}
    for route, logits in _destination_logits(converted, prompts).items():
        if logits.shape != source.shape:
            raise ValueError(
                f"{converted.written}: logits of shape {list(logits.shape)}: the source gives {list(source.shape)}, so "
                "the two are different models; convert again"
            )
        distance = np.abs(logits - source)[counted].max()
        # A NaN is no agreement.
        differences[route] = float(distance) if np.isfinite(distance) else float("inf")
    if tolerance is None:
        share = HALF if _loses_bits(converted) else EXACT
        tolerance = share * max(1.0, float(np.abs(source[counted]).max()))
    return Verdict(max(differences.values()), tolerance, differences)


def _source_logits(converted: Converted, prompts: Prompts) -> Float[np.ndarray, "B T V"]:
    """The source's own, by its own route; rounded as was asked for, so that only the conversion is left to differ."""
    source, target = converted.source, converted.target
    kind: Kind = converted.origin.kind
    if target.dtype is None and kind == "hf":
        return reference_logits(converted.origin.folder, prompts.tokens, prompts.positions, prompts.segment_ids)
    if target.dtype is None and kind == "maxtext":
        return _maxtext_logits(converted.origin.folder, source.config, prompts)
    framework = "nnx" if source.info is None else source.info.framework
    return _logits(source.config, cast_params(source.params, target.dtype), source.layout, framework, prompts)


def _destination_logits(converted: Converted, prompts: Prompts) -> dict[str, Float[np.ndarray, "B T V"]]:
    written, source = converted.written, converted.source
    if converted.target.format == "hf":
        config, params = import_hf(written, scan_layers=True, param_scan_axis=1, dtype="float32")
        rows = (prompts.tokens, prompts.positions, prompts.segment_ids)
        return {
            "our model on the folder": _logits(config, params, Layout(True, 1), "nnx", prompts),
            "NumPy on the folder": reference_logits(written, *rows),
        }
    if converted.target.format == "maxtext":
        return {"MaxText's numerics": _maxtext_logits(written, source.config, prompts)}
    info = read_run_info(written)
    config = build_config(info.model, where=str(written / RUN_INFO_NAME))
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    params = load_params(written, FunctionalModel(config, _options(info)), placement, verify="full")
    layout = Layout(info.scan_layers, info.param_scan_axis)
    return {"our loader and model": _logits(config, params, layout, info.framework, prompts)}


def _maxtext_logits(items: Path, config: TransformerConfig, prompts: Prompts) -> Float[np.ndarray, "B T V"]:
    raw = read_raw(items, config)
    its_config, params = as_maxtext_computes(config, raw.params)
    return _logits(its_config, params, raw.layout, "nnx", prompts)


def _options(info: RunInfo) -> ModelSection:
    return ModelSection(framework=info.framework, scan_layers=info.scan_layers, param_scan_axis=info.param_scan_axis)


def _logits(
    config: TransformerConfig, params: dict[str, Any], layout: Layout, framework: Any, prompts: Prompts
) -> Float[np.ndarray, "B T V"]:
    """Our model in float32, at the highest precision of matrix products that the device has."""
    options = ModelSection(
        framework=framework,
        scan_layers=layout.scan_layers,
        param_scan_axis=layout.param_scan_axis,
        attention="dot_product",
    )
    model = FunctionalModel(config, options)
    params = unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in flatten(params)})

    @jax.jit
    def run(params: Any, tokens: Any, positions: Any, segment_ids: Any) -> Any:
        return model(params, tokens, positions, segment_ids=segment_ids)[0]

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, prompts.tokens, prompts.positions, prompts.segment_ids))


def _loses_bits(converted: Converted) -> bool:
    """Whether numbers were rescaled and kept in 16 bits."""
    if "maxtext" not in (converted.origin.kind, converted.target.format):
        return False
    dtype = converted.target.dtype
    leaves = [leaf for _, leaf in flatten(converted.source.params)]
    half = dtype in ("bfloat16", "float16") or any(leaf.dtype.itemsize == 2 for leaf in leaves)
    return half and bool(numerics_of(converted.source.config).changes())
