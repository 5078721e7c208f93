"""Times the loss head: chunked cross entropy and token log-probabilities against the full logits, with their gradients.

    python bench/chunked_loss.py --batch 8 --length 512 --vocab 4096 --dim 256 --chunks 64,128,256,512

Variants are interleaved, so that a busy machine slows all of them; the smallest and the middle time of the rounds are
printed, with XLA's temporary bytes.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from models.ops.vocab import cross_entropy_sum, default_chunk_size, token_logprobs


def head(params, hidden):
    return hidden @ params


def full(kernel, hidden, targets, weights):
    return (weights * optax.softmax_cross_entropy_with_integer_labels(head(kernel, hidden), targets)).sum()


def fused(kernel, hidden, targets, weights, *, chunk_size):
    return cross_entropy_sum(head, kernel, hidden, targets, weights, z_loss=0.0, chunk_size=chunk_size).loss_sum


def recomputed(kernel, hidden, targets, weights, *, chunk_size):
    stats = token_logprobs(head, kernel, hidden, targets, chunk_size=chunk_size, temperature=1.0, with_entropy=False)
    return -(weights * stats.logprob_BT).sum()


def variants(chunk_sizes: list[int]) -> dict[str, Callable]:
    both = functools.partial(jax.grad, argnums=(0, 1))
    table = {"full, gradients": both(full), "full, loss alone": full}
    for size in chunk_sizes:
        table[f"cross_entropy_sum/{size}, gradients"] = both(functools.partial(fused, chunk_size=size))
        table[f"token_logprobs/{size}, gradients"] = both(functools.partial(recomputed, chunk_size=size))
    size = chunk_sizes[0]
    table[f"cross_entropy_sum/{size}, loss alone"] = functools.partial(fused, chunk_size=size)
    table[f"cross_entropy_sum/{size}, frozen head"] = jax.grad(functools.partial(fused, chunk_size=size), argnums=1)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in [("batch", 8), ("length", 512), ("dim", 256), ("vocab", 4096), ("rounds", 8)]:
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--chunks", default="", help="tokens per chunk, by commas; empty: the default and its neighbours"
    )
    parser.add_argument("--dtype", default="float32", help="of the hidden states and the kernel")
    args = parser.parse_args()

    default = default_chunk_size(args.batch * args.length, args.vocab)
    chunk_sizes = [int(size) for size in args.chunks.split(",") if size] or [default, default // 2, 2 * default]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (args.batch, args.length, args.dim), args.dtype)
    kernel = jax.random.normal(keys[1], (args.dim, args.vocab), args.dtype) / args.dim**0.5
    targets = jax.random.randint(keys[2], (args.batch, args.length), 0, args.vocab)
    arrays = (kernel, hidden, targets, jnp.ones((args.batch, args.length)))

    programs = {name: jax.jit(fn).lower(*arrays).compile() for name, fn in variants(chunk_sizes).items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[name].append(time.perf_counter() - start)

    print(f"{jax.default_backend()}, {args.batch} x {args.length} tokens, D={args.dim}, V={args.vocab}, {args.dtype}")
    print(f"the default chunk is {default} tokens")
    for name, program in programs.items():
        least, middle = 1e3 * min(seconds[name]), 1e3 * statistics.median(seconds[name])
        analysis = program.memory_analysis()
        assert analysis is not None, jax.default_backend()
        megabytes = analysis.temp_size_in_bytes / 2**20
        print(f"{name:40s} least {least:8.1f} ms, median {middle:8.1f} ms, temporaries {megabytes:8.1f} MiB")


if __name__ == "__main__":
    main()
