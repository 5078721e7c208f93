"""Causal self-attention in tiles, written for XLA's CPU backend.

The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a tile of logits lives only while it is
used, the softmax runs online over key blocks, the forward pass keeps the output and the log-sum-exp of each row, and
the backward pass recomputes the tiles. What makes it fast on a CPU is below that level:

* Loops, not unrolled code: one `scan` over query blocks around one `while` over the key blocks that the causal rule,
  the window and the segments leave. A tile stays in the cores' caches, and the compile time does not grow with T.
* The G query heads of a kv head share one product of G * block rows.
* XLA's fast matrix product contracts the left factor's minor axis. The backward pass therefore forms its tiles
  transposed, [key, query], and accumulates the query gradient as [N, query]; then none of its five products needs
  a transposed left factor, which runs at a quarter of the speed.
* Masks compare arrays that are laid out along a tile's axes beforehand, so they fuse into the exponential; index
  arithmetic inside that loop would stop the compiler from using vector instructions.

Products run in float32 (float64 for float64 inputs) whatever the inputs' dtype.

Axis letters beyond the usual ones: C blocks along time, R = G * block query rows of a tile, S = block keys of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# The logit of a hidden key. It is finite, so that a row without any visible key meets no inf - inf.
_HIDDEN = -1e30

# Measured on two cores with 2 MiB of second-level cache each (bench/attention.py). Large blocks win, since XLA spreads
# a product over cores only where one entry of its batch is large, until tiles of B * H * block ** 2 numbers outgrow the
# caches, or until a block passes a quarter of the row, when the work above the diagonal costs more than it saves.
_MAX_BLOCK, _MIN_BLOCK = 256, 64
PREFIX_BLOCK = _MIN_BLOCK
"""Positions of a tile where completions share a prompt: each sees its prompt and itself, little of a row, and small
tiles leave out more of the rest. Segments that begin where a tile begins touch the fewest."""
_TILE_ELEMENTS = 2**21


class _Spec(NamedTuple):
    """The static part of a call: `groups` is G, `num_blocks` is counted along time.

    Rows in line stand one behind the other, as if they were one: each visits the tiles that it needs itself. Rows that
    are not share their tiles, [B, ...] of each, and visit those that any of them needs.
    """

    block: int
    num_blocks: int
    groups: int
    in_line: bool
    scale: float
    softcap: float | None


class _Marks(NamedTuple):
    """What decides which key a query sees, laid out along the rows (R) and columns (S) of a tile.

    The ids are None when the batch has no segments or no prefixes, the window is None when there is none. A query of
    segment 0 (padding) carries the id -1, which no key has, and so does one without a prefix.
    """

    query_offset_R: Array
    key_offset_S: Array
    query_id_CB1R: Array | None
    prefix_id_CB1R: Array | None
    key_id_CB1S: Array | None
    window: Array | None
    needed_CC: Array
    """For each query block the key blocks that it looks at come first, in order; `count_C` says how many they are. Rows
    in line have their blocks' numbers among all."""
    count_C: Array


def blocked_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B T K N"],
    v_BSKN: Float[Array, "B T K N"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None,
    prefix_ids_BT: Int[Array, "B T"] | None = None,
    window: int | Int[Array, ""] | None,
    scale: float,
    softcap: float | None,
    block_size: int | None,
) -> Float[Array, "B T H N"]:
    """Causal self-attention with segments, a sliding window and a logit softcap, in memory linear in T.

    Query i sees key j iff j <= i, key j carries the query's segment id or its prefix id, that is not 0, and
    i - j < window. So several completions share a prompt that stands before them in the row once. A row that sees
    no key (padding) gives exactly 0 and takes and gives no gradient. Query head h reads kv head h // (H // K).

    Args:
        q_BTHN: Queries.
        k_BSKN: Keys, on the queries' time axis.
        v_BSKN: Values.
        segment_ids_BT: Ids >= 0, with 0 for padding; None where every position belongs to one document.
        prefix_ids_BT: A second segment that each query sees, 0 for none. None where no query has one, and always
            where there are no segments.
        window: Number of keys a query may look back on, itself included; None for all. It may be a traced scalar, so
            that scanned layers can differ in it; blocks outside it are skipped either way.
        scale: Factor of the logits, usually N ** -0.5.
        softcap: If not None, logits become softcap * tanh(logits / softcap) before the mask (Gemma 2,
            https://arxiv.org/abs/2408.00118, section 2).
        block_size: Queries and keys a tile spans; None picks one from the shape.

    Returns:
        The attention output, in q's dtype. The softmax runs in float32 at least.

    Raises:
        ValueError: if H is not a multiple of K, or a static window or the block size is below 1.
    """
    B, T, H, _ = q_BTHN.shape
    num_kv_heads = k_BSKN.shape[2]
    if H % num_kv_heads:
        raise ValueError(
            f"blocked_attention: num_heads={H}, num_kv_heads={num_kv_heads}: each kv head serves the same number of "
            "query heads; make num_heads a multiple of num_kv_heads"
        )
    for name, value in (("window", window), ("block_size", block_size)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"blocked_attention: {name}={value}: it counts positions; give at least 1, or None")
    if block_size is None:
        block_size = pick_block(B * H, T) if prefix_ids_BT is None else min(PREFIX_BLOCK, -(-T // 16) * 16)
    block = block_size
    # Rows with shared prompts differ in the tiles they need, and small products waste no time on being spread over
    # cores (31 to 42 % less time on two of them).
    in_line = prefix_ids_BT is not None and jax.default_backend() == "cpu"
    spec = _Spec(block, -(-T // block), H // num_kv_heads, in_line, scale, softcap)
    window = None if window is None else jnp.asarray(window, jnp.int32)
    return _attend(spec, q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window)


def pick_block(num_rows: int, length: int) -> int:
    """Returns the block length for `num_rows` = B * H attention matrices of `length` positions.

    The fastest power of two is shortened to a multiple of 16 so that the last block carries little padding.
    """
    block = _MAX_BLOCK
    while block > _MIN_BLOCK and (4 * block > length or num_rows * block**2 > _TILE_ELEMENTS):
        block //= 2
    num_blocks = -(-length // block)
    return -(-length // (num_blocks * 16)) * 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window):
    return _attend_forward(spec, q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window)[0]


def _attend_forward(spec, q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window):
    """Online softmax over key blocks; equations of FlashAttention-2, algorithm 1."""
    marks = _marks(spec, len(q_BTHN), segment_ids_BT, prefix_ids_BT, window)
    k_CBKSN, v_CBKSN = (_split(x, spec, groups=1) for x in (k_BSKN, v_BSKN))

    def query_block(_, block):
        i, q_BKRN = block

        def key_block(turn, carry):
            j = marks.needed_CC[i, turn]
            top_BKR, total_BKR, out_BKRN = carry
            logits_BKRS = _dot(q_BKRN, k_CBKSN[j], 3, 3)
            logits_BKRS, _ = _cap(spec, logits_BKRS)
            logits_BKRS = _hide(spec, marks, logits_BKRS, i, j, key_axis=-1)
            # Until a row meets its first visible key its weights are exp(0); that key's exp(_HIDDEN - top) clears them.
            new_top_BKR = jnp.maximum(top_BKR, logits_BKRS.max(-1))
            shrink_BKR = jnp.exp(top_BKR - new_top_BKR)
            weights_BKRS = jnp.exp(logits_BKRS - new_top_BKR[..., None])
            total_BKR = total_BKR * shrink_BKR + weights_BKRS.sum(-1)
            out_BKRN = out_BKRN * shrink_BKR[..., None] + _dot(weights_BKRS, v_CBKSN[j], 3, 2)
            return new_top_BKR, total_BKR, out_BKRN

        start = jnp.full_like(q_BKRN[..., 0], _HIDDEN), jnp.zeros_like(q_BKRN[..., 0]), jnp.zeros_like(q_BKRN)
        top_BKR, total_BKR, out_BKRN = lax.fori_loop(0, marks.count_C[i], key_block, start)
        seen_BKR = top_BKR > _HIDDEN / 2
        total_BKR = jnp.where(seen_BKR, total_BKR, 1)
        lse_BKR = jnp.where(seen_BKR, top_BKR + jnp.log(total_BKR), 0)
        return None, (jnp.where(seen_BKR[..., None], out_BKRN / total_BKR[..., None], 0), lse_BKR)

    q_CBKRN = _split(q_BTHN * spec.scale, spec, groups=spec.groups)
    _, (out_CBKRN, lse_CBKR) = lax.scan(query_block, None, (jnp.arange(len(q_CBKRN), dtype=jnp.int32), q_CBKRN))
    out_BTHN = _join(out_CBKRN, spec, like=q_BTHN)
    return out_BTHN, (q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window, out_BTHN, lse_CBKR)


def _attend_backward(spec, residuals, d_out_BTHN):
    """Gradients from recomputed tiles; FlashAttention-2, algorithm 2, with tiles transposed to [key, query]."""
    q_BTHN, k_BSKN, v_BSKN, segment_ids_BT, prefix_ids_BT, window, out_BTHN, lse_CBKR = residuals
    marks = _marks(spec, len(q_BTHN), segment_ids_BT, prefix_ids_BT, window)
    k_CBKSN, v_CBKSN = (_split(x, spec, groups=1) for x in (k_BSKN, v_BSKN))
    k_CBKNS = k_CBKSN.swapaxes(-1, -2)
    q_CBKRN, d_out_CBKRN = (_split(x, spec, groups=spec.groups) for x in (q_BTHN * spec.scale, d_out_BTHN))
    # Summed in the order in which numbers lie: on tiles, with their transposition, this took 4 % of a training step.
    delta_BTH1 = (d_out_BTHN.astype(q_CBKRN.dtype) * out_BTHN.astype(q_CBKRN.dtype)).sum(-1, keepdims=True)
    delta_CBKR = _split(delta_BTH1, spec, groups=spec.groups)[..., 0]

    def query_block(carry, block):
        i, q_BKRN, d_out_BKRN, lse_BKR, delta_BKR = block

        def key_block(turn, carry):
            j = marks.needed_CC[i, turn]
            d_q_BKNR, d_k_CBKSN, d_v_CBKSN = carry
            logits_BKSR = _dot(k_CBKSN[j], q_BKRN, 3, 3)
            logits_BKSR, slope_BKSR = _cap(spec, logits_BKSR)
            logits_BKSR = _hide(spec, marks, logits_BKSR, i, j, key_axis=-2)
            weights_BKSR = jnp.exp(logits_BKSR - lse_BKR[..., None, :])
            d_logits_BKSR = weights_BKSR * (_dot(v_CBKSN[j], d_out_BKRN, 3, 3) - delta_BKR[..., None, :]) * slope_BKSR
            d_v_CBKSN = d_v_CBKSN.at[j].add(_dot(weights_BKSR, d_out_BKRN, 3, 2))
            d_k_CBKSN = d_k_CBKSN.at[j].add(_dot(d_logits_BKSR, q_BKRN, 3, 2))
            return d_q_BKNR + _dot(k_CBKNS[j], d_logits_BKSR, 3, 2), d_k_CBKSN, d_v_CBKSN

        start = jnp.zeros_like(q_BKRN.swapaxes(-1, -2)), *carry
        d_q_BKNR, *carry = lax.fori_loop(0, marks.count_C[i], key_block, start)
        return tuple(carry), d_q_BKNR

    blocks = jnp.arange(len(q_CBKRN), dtype=jnp.int32), q_CBKRN, d_out_CBKRN, lse_CBKR, delta_CBKR
    carry = jnp.zeros_like(k_CBKSN), jnp.zeros_like(v_CBKSN)
    (d_k_CBKSN, d_v_CBKSN), d_q_CBKNR = lax.scan(query_block, carry, blocks)
    d_q_BTHN = _join(d_q_CBKNR.swapaxes(-1, -2) * spec.scale, spec, like=q_BTHN)
    return d_q_BTHN, _join(d_k_CBKSN, spec, like=k_BSKN), _join(d_v_CBKSN, spec, like=v_BSKN), None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(a, b, a_axis: int, b_axis: int):
    """Matrix product over the named axes, batched over B and K."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))))


def _split(x_BTHN, spec: _Spec, *, groups: int):
    """[B, T, K * groups, N] -> [C, B, K, groups * block, N] in the working dtype, T padded to whole blocks.

    The blocks of rows in line follow each other: [B * C, 1, K, groups * block, N].
    """
    _, T, H, N = x_BTHN.shape
    x_BTHN = x_BTHN.astype(jnp.promote_types(x_BTHN.dtype, jnp.float32))
    x_BTHN = jnp.pad(x_BTHN, ((0, 0), (0, spec.num_blocks * spec.block - T), (0, 0), (0, 0)))
    if spec.in_line:
        x_BTHN = x_BTHN.reshape(1, -1, H, N)
    x = x_BTHN.reshape(len(x_BTHN), -1, spec.block, H // groups, groups, N).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], groups * spec.block, N)


def _join(x_CBKRN, spec: _Spec, *, like):
    """The inverse of `_split`, in the shape and dtype of `like`."""
    B, T, H, N = like.shape
    x = x_CBKRN.reshape(*x_CBKRN.shape[:3], -1, spec.block, N).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, -1, H, N)[:, :T].astype(like.dtype)


def _cap(spec: _Spec, logits):
    """Returns the soft-capped logits and their derivative by the raw ones: 1 - tanh ** 2."""
    if spec.softcap is None:
        return logits, 1
    bend = jnp.tanh(logits / spec.softcap)
    return spec.softcap * bend, 1 - bend * bend


def _hide(spec: _Spec, marks: _Marks, logits, i, j, *, key_axis: int):
    """Sets the logits of the keys in block j that the queries in block i must not see to `_HIDDEN`.

    `key_axis` is -1 for tiles [B, K, R, S] and -2 for tiles [B, K, S, R].
    """
    query_axis = -3 - key_axis
    queries, keys = (functools.partial(jnp.expand_dims, axis=axis) for axis in (key_axis, query_axis))
    distance = queries(marks.query_offset_R + (i - j) * spec.block) - keys(marks.key_offset_S)
    visible = distance >= 0
    if marks.window is not None:
        visible &= distance < marks.window
    if marks.query_id_CB1R is not None and marks.key_id_CB1S is not None:
        same = queries(marks.query_id_CB1R[i]) == keys(marks.key_id_CB1S[j])
        if marks.prefix_id_CB1R is not None:
            same |= queries(marks.prefix_id_CB1R[i]) == keys(marks.key_id_CB1S[j])
        visible &= same
    return jnp.where(visible, logits, _HIDDEN)


def _marks(spec: _Spec, num_rows: int, segment_ids_BT, prefix_ids_BT, window) -> _Marks:
    """Lays positions and segment ids out along tiles, and lists the key blocks that each query block needs."""
    offset = jnp.arange(spec.block, dtype=jnp.int32)
    block = jnp.arange(spec.num_blocks, dtype=jnp.int32)
    needs_BCC = jnp.broadcast_to(block <= block[:, None], (num_rows, spec.num_blocks, spec.num_blocks))
    if window is not None:
        needs_BCC &= block >= ((block * spec.block - window + 1) // spec.block)[:, None]
    query_id = prefix_id = key_id = None
    if segment_ids_BT is not None:
        ids_BCS, key_id, query_id = _along_blocks(spec, segment_ids_BT)
        meets_BCC = _meeting(ids_BCS, ids_BCS)
        if prefix_ids_BT is not None:
            prefix_ids_BCS, _, prefix_id = _along_blocks(spec, prefix_ids_BT)
            meets_BCC |= _meeting(prefix_ids_BCS, ids_BCS)
        needs_BCC &= meets_BCC
    if not spec.in_line:
        needs_BCC = needs_BCC.any(0, keepdims=True)
    # Those that are needed sort first, and stay in order among themselves.
    needed_BCC = jnp.argsort(~needs_BCC, axis=-1, stable=True).astype(jnp.int32)
    needed_BCC += spec.num_blocks * jnp.arange(len(needed_BCC), dtype=jnp.int32)[:, None, None]
    needed_CC, count_C = needed_BCC.reshape(-1, spec.num_blocks), needs_BCC.sum(-1, dtype=jnp.int32).reshape(-1)
    return _Marks(jnp.tile(offset, spec.groups), offset, query_id, prefix_id, key_id, window, needed_CC, count_C)


def _along_blocks(spec: _Spec, ids_BT) -> tuple[Array, Array, Array]:
    """Ids by row and block, as keys carry them, [C, B, 1, S], and as queries do, [C, B, 1, R]: 0 is -1, which matches
    none."""
    B, T = ids_BT.shape
    ids_BT = jnp.pad(ids_BT.astype(jnp.int32), ((0, 0), (0, spec.num_blocks * spec.block - T)))
    ids_BCS = ids_BT.reshape(B, spec.num_blocks, spec.block)
    ids_CBS = ids_BCS.reshape(-1, 1, spec.block) if spec.in_line else ids_BCS.swapaxes(0, 1)
    ids_CB1S = ids_CBS[:, :, None]
    return ids_BCS, ids_CB1S, jnp.tile(jnp.where(ids_CB1S == 0, -1, ids_CB1S), spec.groups)


def _meeting(query_ids_BCS: Int[Array, "B C S"], key_ids_BCS: Int[Array, "B C S"]) -> Array:
    """[B, C, C]: whether the range of ids of a query block meets that of a key block, padding left out."""

    def ends(ids_BCS):
        return jnp.where(ids_BCS == 0, jnp.iinfo(ids_BCS.dtype).max, ids_BCS).min(-1), ids_BCS.max(-1)

    (low_BC, high_BC), (key_low_BC, key_high_BC) = ends(query_ids_BCS), ends(key_ids_BCS)
    return (high_BC[:, :, None] >= key_low_BC[:, None]) & (key_high_BC[:, None] >= low_BC[:, :, None])
