"""The pretraining step of reference model R against the machine's matmul peak, its own bare matmuls, and Tunix's step.

    python -m bench.train_step [--rounds 7]

R is the preset bench-r: a Llama of 6.45M parameters, its layers unrolled (model.scan_layers=false: six layers compile
soon, and a step on a CPU is shorter); a batch is 8 rows of 512 tokens, float32, AdamW. Each round times the contestants
in turn, and a ratio is taken within a round, so that a machine whose speed drifts gives fair ratios; medians of the
rounds are printed. What is timed:

    peak     one 2048 x 2048 x 2048 float32 matmul in JAX
    matmuls  the weight matmuls of one step alone: forward and both backward products, same shapes, no attention
    ours     the whole jitted training step (loss, gradients, clipping, AdamW, metrics), state donated
    tunix    Tunix's PeftTrainer step on its own Llama of that size, with its default loss and the same AdamW
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from models.config import TransformerConfig, load_preset
from models.parameters import flatten, param_specs
from pretrain.batching import place
from pretrain.data.synthetic import synthetic_batch
from pretrain.performance import matmul_parameters, train_flops_per_token
from pretrain.setup import prepare
from pretrain.state import init_state
from pretrain.step import StepOptions, jit_train_step, make_train_step
from recipes.load import load_recipe
from recipes.schema import PretrainRecipe

BATCH, LENGTH, LEARNING_RATE = 8, 512, 3e-4
RECIPE = [
    "model.preset=bench-r",
    "model.scan_layers=false",
    f"train.per_device_batch_size={BATCH}",
    f"data.sequence_length={LENGTH}",
    "mesh.num_devices=1",
    "schedule.kind=constant",
    f"optimizer.learning_rate={LEARNING_RATE}",
]


def peak() -> Callable[[], None]:
    """One square matmul."""
    square = jnp.ones((2048, 2048), jnp.float32)
    matmul = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(matmul(square, square))


def bare_matmuls(config: TransformerConfig) -> Callable[[], None]:
    """Forward and backward products of every weight matrix of a step, on [tokens, in] activations."""
    shapes = []
    specs = param_specs(config, scan_layers=False, param_scan_axis=1)
    for path, spec in flatten(specs):
        if path[-1] != "kernel":
            continue
        inputs = 2 if path[-2] == "out" else 1
        shapes.append((int(np.prod(spec.shape[:inputs])), int(np.prod(spec.shape[inputs:]))))
    assert sum(rows * columns for rows, columns in shapes) == matmul_parameters(config) - norm_parameters(config)
    tokens = BATCH * LENGTH
    weights = [jnp.ones(shape, jnp.float32) for shape in shapes]
    x = {size: jnp.ones((tokens, size), jnp.float32) for shape in shapes for size in shape}

    @jax.jit
    def products(weights: list[jax.Array], x: dict[int, jax.Array]) -> list[tuple[jax.Array, ...]]:
        # Equal shapes differ in their weight, so that no product is shared between two.
        return [(x[w.shape[0]] @ w, x[w.shape[1]] @ w.T, (x[w.shape[0]] + w[0, 0]).T @ x[w.shape[1]]) for w in weights]

    return lambda: jax.block_until_ready(products(weights, x))


def norm_parameters(config: TransformerConfig) -> int:
    """Parameters of norms: they scale, but multiply no matrix."""
    specs = param_specs(config, scan_layers=True, param_scan_axis=1)
    return sum(int(np.prod(spec.shape)) for path, spec in flatten(specs) if path[-1] == "scale")


def our_step(framework: str) -> Callable[[], None]:
    """The training step that `posttrain pretrain` runs."""
    recipe = load_recipe("pretrain_tiny", [*RECIPE, f"model.framework={framework}"]).recipe
    assert isinstance(recipe, PretrainRecipe)
    setup = prepare(recipe)
    options = StepOptions(setup.plan, recipe.optimizer.clip_norm, skip_nonfinite=False, report_norms=True)
    step = make_train_step(setup.loss_fn, setup.tx, setup.schedule, setup.shardings, options)
    jitted = jit_train_step(step, setup.shardings, setup.batch_sharding)
    batch = place(next(setup.train_iterator), setup.batch_sharding, setup.share)
    key, proceed = jax.random.key(1), jnp.asarray(True)
    held = [init_state(setup.model, setup.tx, setup.shardings, None, seed=0)]

    def run() -> None:
        held[0], metrics = jitted(held[0], batch, key, proceed)
        jax.block_until_ready((held[0], metrics))

    return run


def tunix_step(config: TransformerConfig) -> Callable[[], None]:
    """The jitted step of Tunix's PeftTrainer on its Llama, rows full of tokens."""
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    sizes = ModelConfig(
        num_layers=config.num_layers,
        vocab_size=config.vocab_size,
        embed_dim=config.embed_dim,
        hidden_dim=config.mlp_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        rope_theta=10_000,
        norm_eps=config.norm_eps,
    )
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    tokens = jnp.asarray(
        synthetic_batch(
            vocab_size=config.vocab_size, global_rows=BATCH, sequence_length=LENGTH, max_segments_per_row=None
        ).inputs
    )
    inputs = {
        "input_tokens": tokens,
        "input_mask": jnp.ones_like(tokens),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape),
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH)),
    }
    with mesh:
        model = Llama3(sizes, rngs=nnx.Rngs(0))
        trainer = PeftTrainer(
            model,
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.1)),
            TrainingConfig(eval_every_n_steps=10**9, checkpoint_root_directory=tempfile.mkdtemp()),
        ).with_gen_model_input_fn(lambda given: inputs)
        step, _ = trainer.jit_train_and_eval_step()
    fed = TrainingInput(input_tokens=tokens, input_mask=inputs["input_mask"])

    def run() -> None:
        with mesh:
            jax.block_until_ready((step(fed), nnx.state(trainer.model)))

    return run


def main() -> None:
    """Times the contestants in interleaved rounds and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-tunix", action="store_true")
    args = parser.parse_args()
    config = load_preset("bench-r")
    contestants = {
        "peak": peak(),
        "matmuls": bare_matmuls(config),
        "ours (nnx)": our_step("nnx"),
        "ours (linen)": our_step("linen"),
    }
    if not args.skip_tunix:
        contestants["tunix"] = tunix_step(config)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
        run()
    for _ in range(args.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    flops = train_flops_per_token(config) * BATCH * LENGTH
    utilisation = {
        name: [flops / mine / (2 * 2048**3 / best) for mine, best in zip(times, seconds["peak"], strict=True)]
        for name, times in seconds.items()
    }
    for name, times in seconds.items():
        line = f"{name:14s} median {statistics.median(times):7.3f} s  least {min(times):7.3f} s"
        if name != "peak":
            line += f"  {statistics.median(utilisation[name]):6.1%} of peak"
            line += (
                f"  {statistics.median(a / b for a, b in zip(times, seconds['matmuls'], strict=True)):5.2f} x matmuls"
            )
        if name.startswith("ours") and "tunix" in seconds:
            faster = statistics.median(b / a for a, b in zip(times, seconds["tunix"], strict=True))
            line += f"  {faster:5.2f} x as fast as tunix"
        print(line)


if __name__ == "__main__":
    main()
