"""MaxText's own checkpoints through our models: what has to be converted, and that nothing else has to.

Names, shapes and the order of rotary pairs are MaxText's already. Two conventions differ:

- its Llama never scales queries at run time, as 1/sqrt(head_dim) sits in the query kernel's initial values. Ours is
  the kernel times sqrt(head_dim). Its GPT-3 divides queries at run time, as ours does;
- its tied output head multiplies float32 hidden states with the embedding table rounded to bfloat16, whatever the
  configured dtypes. The lookup of the same table is not rounded, so no tied table gives the same logits to better than
  bfloat16's step. The comparison to 1e-4 unties the head and gives it the rounded table.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints import store
from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.parameters import count_params, unstack_layers
from recipes.schema import ModelSection

ATOL = 1e-4
LAYOUTS = [(framework, scan) for framework in ("linen", "nnx") for scan in (True, False)]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters in Linen's naming, and MaxText's logits with their inputs."""
    items = folder / "items"
    restored = store.restore(items, {"params": store.read_metadata(items)["params"]}, only=["params"], cast=False)
    return restored["params"]["params"], dict(np.load(folder / "logits.npz"))


def worst_error(
    config: TransformerConfig, params: dict[str, Any], given: dict[str, np.ndarray], framework: str, scan: bool
) -> float:
    """Largest absolute difference to MaxText's logits."""
    options = ModelSection(preset="gpt3-52k", framework=framework, scan_layers=scan)
    params = params if scan else unstack_layers(params, config.num_layers, 1)
    model = FunctionalModel(config, options)
    rows = (given["tokens"], given["positions"], given["segment_ids"])
    logits = jax.jit(lambda params, rows: model(params, rows[0], rows[1], segment_ids=rows[2])[0])(params, rows)
    return float(np.abs(np.asarray(logits) - given["logits"]).max())


def with_rounded_head(config: TransformerConfig, params: dict[str, Any]) -> tuple[TransformerConfig, dict[str, Any]]:
    """The head untied, holding the table as MaxText's head multiplies with it."""
    rounded = params["token_embedder"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32)
    decoder = {**params["decoder"], "logits_dense": {"kernel": rounded.T}}
    return config.replace(tied_embeddings=False), {**params, "decoder": decoder}


def test_gpt3_52k_has_its_published_number_of_parameters() -> None:
    # Tables 1024*16 + 2048*16; one layer: qkv 16*48+48, out 256+16, mlp 2*1024+64+16, two norms 2*32; last norm 32.
    assert count_params(load_preset("gpt3-52k")) == 49152 + (816 + 272 + 2128 + 64) + 32 == 52464


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS)
def test_gpt3_52k_written_by_maxtext_gives_maxtext_logits(shared_dir: Path, framework: str, scan: bool) -> None:
    params, given = read(shared_dir / "fixtures/maxtext/gpt3-52k")
    config, params = with_rounded_head(load_preset("gpt3-52k"), params)
    assert worst_error(config, params, given, framework, scan) < ATOL


def test_gpt3_52k_with_its_tied_head_differs_from_maxtext_by_the_rounding_of_its_head_alone(shared_dir: Path) -> None:
    params, given = read(shared_dir / "fixtures/maxtext/gpt3-52k")
    table = np.asarray(params["token_embedder"]["embedding"])
    rounding = np.abs(table - table.astype(jnp.bfloat16).astype(np.float32)).max()
    error = worst_error(load_preset("gpt3-52k"), params, given, "nnx", True)
    # 16 products of a hidden state of about 1 with a rounding error of at most `rounding` each: ours is the exact one.
    assert ATOL < error < 16 * rounding


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS)
def test_llama_written_by_maxtext_gives_maxtext_logits_once_queries_are_rescaled(
    shared_dir: Path, framework: str, scan: bool
) -> None:
    params, given = read(shared_dir / "fixtures/maxtext/llama-tiny")
    config = load_preset("tiny-llama").replace(num_layers=3, rope_theta=500_000.0)
    query = params["decoder"]["layers"]["self_attention"]["query"]
    query["kernel"] = query["kernel"] * config.head_dim**0.5
    assert worst_error(config, params, given, framework, scan) < ATOL
