"""Times one layer's causal attention, forward and backward, by every implementation that runs on this machine.

    python bench/attention.py --batch 8 --length 512 --heads 8 --kv-heads 4 --head-dim 32

Rounds are interleaved: each calls every implementation once, and an implementation's ratio is the median over rounds of
its time by the blocked attention's in the same round. So a machine that other work slows down still gives fair
ratios; the milliseconds themselves are medians, with the fastest round beside them.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.attention import dot_product_attention
from models.ops.blocked_attention import blocked_attention, pick_block
from models.ops.masks import causal_mask


def parse_arguments() -> argparse.Namespace:
    """Reads the shape, the masks and the number of rounds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 8), ("length", 512), ("heads", 8), ("kv-heads", 4), ("head-dim", 32), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--documents", type=int, default=1, help="documents of equal length packed into each row")
    parser.add_argument("--window", type=int, default=None, help="keys a query may look back on")
    parser.add_argument("--softcap", type=float, default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="block sizes to time beside the chosen one")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--skip-others", action="store_true", help="time the blocked attention alone")
    return parser.parse_args()


def implementations(args: argparse.Namespace) -> dict[str, Callable]:
    """Maps names to functions of q, k, v and segment ids; the first is the blocked attention with its own block."""
    scale = args.head_dim**-0.5

    def blocked(q, k, v, segment_ids, block_size=None):
        masks = {"segment_ids_BT": segment_ids, "window": args.window}
        return blocked_attention(q, k, v, **masks, scale=scale, softcap=args.softcap, block_size=block_size)

    def einsum(q, k, v, segment_ids):
        mask = causal_mask(segment_ids, args.window)
        return dot_product_attention(q, k, v, mask, scale=scale, softcap=args.softcap)

    def library(q, k, v, segment_ids):
        mask = causal_mask(segment_ids, args.window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale)

    chosen = pick_block(args.batch * args.heads, args.length)
    functions: dict[str, Callable] = {f"blocked, block {chosen} (chosen)": blocked}
    for block in args.blocks:
        functions[f"blocked, block {block}"] = functools.partial(blocked, block_size=block)
    if not args.skip_others:
        functions["plain einsum"] = einsum
        if args.softcap is None:
            functions["jax.nn.dot_product_attention"] = library
    return functions


def compile_step(function: Callable, inputs: list[jax.Array], forward_only: bool):
    """Returns the compiled forward (and backward) pass and the seconds that tracing and compiling took."""

    def step(q, k, v, segment_ids, d_out):
        if forward_only:
            return function(q, k, v, segment_ids)
        out, pullback = jax.vjp(lambda q, k, v: function(q, k, v, segment_ids), q, k, v)
        return out, pullback(d_out)

    start = time.perf_counter()
    compiled = jax.jit(step).lower(*inputs).compile()
    return compiled, time.perf_counter() - start


def main() -> None:
    """Compiles, checks that the implementations agree, times them in rounds, and prints a table."""
    args = parse_arguments()
    rng = np.random.default_rng(0)
    shapes = [(args.batch, args.length, heads, args.head_dim) for heads in (args.heads, args.kv_heads)]
    q, k, v, d_out = (jnp.asarray(rng.standard_normal(shapes[i]), args.dtype) for i in (0, 1, 1, 0))
    ids = np.arange(args.length) * args.documents // args.length + 1
    inputs = [q, k, v, jnp.asarray(np.tile(ids, (args.batch, 1)), jnp.int32), d_out]
    steps, seconds, results = {}, {}, {}
    for name, function in implementations(args).items():
        steps[name], seconds[name] = compile_step(function, inputs, args.forward_only)
        results[name] = jax.block_until_ready(steps[name](*inputs))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        # A shuffled order, since what runs before a step decides what it finds in the caches.
        for name in rng.permutation(list(steps)):
            start = time.perf_counter()
            jax.block_until_ready(steps[name](*inputs))
            times[name].append(time.perf_counter() - start)
    base = next(iter(times))
    print(
        f"{'':34}{'ratio':>8}{'median ms':>11}{'best ms':>9}{'compile s':>11}{'temporaries MB':>16}{'difference':>12}"
    )
    for name, taken in times.items():
        ratio = np.median(np.divide(taken, times[base]))
        memory = steps[name].memory_analysis().temp_size_in_bytes / 2**20
        pairs = zip(jax.tree.leaves(results[name]), jax.tree.leaves(results[base]), strict=True)
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
        print(
            f"{name:34}{ratio:8.2f}{np.median(taken) * 1e3:11.1f}{min(taken) * 1e3:9.1f}{seconds[name]:11.2f}"
            f"{memory:16.1f}{difference:12.1e}"
        )


if __name__ == "__main__":
    main()
