"""Causal self-attention through JAX's own fused kernels: cuDNN's on GPUs, Pallas' splash attention on TPUs.

Same meaning and arguments as `blocked_attention`, except that the window must be static. The kernels exist on their
hardware alone; `unsupported_reason` says beforehand whether a call can be served.

Neither kernel is split over devices by the compiler's partitioner in every mesh: splash attention runs whole on each
device unless it is called inside `jax.shard_map` over the batch and head axes.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, DTypeLike, Float, Int

# The TPU's vector lanes: splash attention's blocks are whole multiples of them.
_LANES = 128


def unsupported_reason(
    platform: str, *, head_dim: int, dtype: DTypeLike, softcap: float | None, compute_capability: str | None
) -> str | None:
    """Says why the fused kernels cannot serve a call, or returns None when they can.

    Args:
        platform: As `jax.default_backend()` names it.
        head_dim: N.
        dtype: Of queries, keys and values.
        softcap: The logit cap, or None.
        compute_capability: Of the GPU, as `device.compute_capability` gives it ("9.0"); None elsewhere.
    """
    dtype = jnp.dtype(dtype)
    if platform == "tpu":
        return None if dtype in (jnp.bfloat16, jnp.float32) else f"splash attention takes no {dtype} arrays"
    if platform != "gpu":
        return f"there is no fused kernel for {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 or float16 arrays, not {dtype}"
    if softcap is not None:
        return "cuDNN attention has no logit softcap"
    is_hopper = compute_capability is not None and int(compute_capability.split(".")[0]) >= 9
    largest = 256 if is_hopper else 128
    if head_dim % 8 or head_dim > largest:
        return f"cuDNN attention takes head dims that are multiples of 8 up to {largest} here, not {head_dim}"
    return None


def flash_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B T K N"],
    v_BSKN: Float[Array, "B T K N"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    block_size: int | None,
) -> Float[Array, "B T H N"]:
    """Causal self-attention by the fused kernel of the default backend; see `blocked_attention` for the arguments.

    Args:
        q_BTHN: Queries.
        k_BSKN: Keys, on the queries' time axis.
        v_BSKN: Values.
        segment_ids_BT: Ids >= 0, with 0 for padding; None where every position belongs to one document.
        window: Number of keys a query may look back on, itself included; None for all.
        scale: Factor of the logits.
        softcap: If not None, logits become softcap * tanh(logits / softcap) before the mask.
        block_size: Length of splash attention's blocks, a multiple of 128; None picks one. cuDNN picks its own.

    Returns:
        The attention output, in q's dtype; padding rows are exactly 0.

    Raises:
        ValueError: if the kernel of this backend cannot serve the call.
    """
    platform = jax.default_backend()
    capability = jax.devices()[0].compute_capability if platform == "gpu" else None
    reason = unsupported_reason(
        platform, head_dim=q_BTHN.shape[-1], dtype=q_BTHN.dtype, softcap=softcap, compute_capability=capability
    )
    if reason is not None:
        raise ValueError(f"model.attention=flash: {reason}; set model.attention to blocked or dot_product")
    if platform == "gpu":
        if block_size is not None:
            raise ValueError(f"flash_attention: block_size={block_size}: cuDNN picks its own blocks; give None")
        return gpu_attention(
            q_BTHN,
            k_BSKN,
            v_BSKN,
            segment_ids_BT=segment_ids_BT,
            window=window,
            scale=scale,
            implementation="cudnn",
        )
    return tpu_attention(
        q_BTHN,
        k_BSKN,
        v_BSKN,
        segment_ids_BT=segment_ids_BT,
        window=window,
        scale=scale,
        softcap=softcap,
        block_size=block_size,
        interpret=False,
    )


def gpu_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B T K N"],
    v_BSKN: Float[Array, "B T K N"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T H N"]:
    """cuDNN attention ("cudnn"), or its meaning in plain operations ("xla").

    Segments reach it as a mask, which takes B * T * T numbers of q's dtype.
    """
    T = q_BTHN.shape[1]
    # cuDNN's backward pass wants an even length. The padded position comes last, so no real query sees it.
    q_BTHN, k_BSKN, v_BSKN = (_pad_time(x, 2) for x in (q_BTHN, k_BSKN, v_BSKN))
    mask = None
    if segment_ids_BT is not None:
        ids_BT = _pad_time(segment_ids_BT, 2)
        # Padding may see padding here, so that no row is empty; `_clear_padding` removes what it computes.
        mask = (ids_BT[:, :, None] == ids_BT[:, None, :])[:, None]
    out_BTHN = jax.nn.dot_product_attention(
        q_BTHN,
        k_BSKN,
        v_BSKN,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return _clear_padding(out_BTHN[:, :T], segment_ids_BT)


def tpu_attention(
    q_BTHN: Float[Array, "B T H N"],
    k_BSKN: Float[Array, "B T K N"],
    v_BSKN: Float[Array, "B T K N"],
    *,
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    block_size: int | None,
    interpret: bool,
) -> Float[Array, "B T H N"]:
    """Splash attention, one row of the batch per kernel. `interpret` runs the kernels in Python on any device."""
    _, T, H, _ = q_BTHN.shape
    multiple = _LANES if block_size is None else block_size
    if multiple % _LANES:
        raise ValueError(f"flash_attention: block_size={block_size}: blocks are multiples of {_LANES}; round it up")
    # Padded positions come last, so the causal rule hides them from every real query.
    q_BTHN, k_BSKN, v_BSKN = (_pad_time(x, multiple) for x in (q_BTHN * scale, k_BSKN, v_BSKN))
    length = q_BTHN.shape[1]
    ids = None
    if segment_ids_BT is not None:
        ids_BT = _pad_time(segment_ids_BT, multiple)
        ids = splash.SegmentIds(q=ids_BT, kv=ids_BT)
    shape = (length, length)
    mask: splash.Mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = block_size or max(size for size in (128, 256, 384, 512) if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    out_BHTN = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q_BTHN, k_BSKN, v_BSKN)), ids)
    return _clear_padding(out_BHTN.swapaxes(1, 2)[:, :T], segment_ids_BT)


def _pad_time(x, multiple: int):
    """Pads axis 1 with zeros to the next multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def _clear_padding(out_BTHN, segment_ids_BT):
    """Zeroes padding rows, which the kernels let attend to padding; their gradient is cut with them."""
    if segment_ids_BT is None:
        return out_BTHN
    return jnp.where((segment_ids_BT != 0)[..., None, None], out_BTHN, 0)
