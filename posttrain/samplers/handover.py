"""The engine's side of a sync, in torch: our arrays as Hugging Face's tensors, their checksums, what layers answer.

Arrays cross as DLPack views, on whatever device they are. What is copied is one tensor at a time, where an array is
sharded over devices or its axes do not merge into a matrix. Torch is imported by `posttrain.samplers.vllm` alone,
which passes its module to these functions.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.checkpoints.hf_names import Tensor
from models.functional import Params
from models.parameters import flatten
from posttrain.samplers.proof import COLUMN_SALT, ROW_SALT, checksum_weights, probe_rows, probe_vector

# The parts of vLLM's fused projections, in their order.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


_CHECKSUM_BLOCK = 2**16
"""Elements."""


def check_reachable(params: Params) -> None:
    """Checks that an engine in this process can read all of the parameters.

    Raises:
        ValueError: an array lies on devices of several processes; it is named.
    """
    for path, leaf in flatten(params):
        if not leaf.is_fully_addressable:
            raise ValueError(
                f"sync: {'/'.join(path)}: the array lies on devices of several processes, and this engine reads those "
                "of its own; gather the policy onto each process's devices before sync"
            )


def hf_tensor(torch: Any, leaf: jax.Array, tensor: Tensor, layer_axis: int | None) -> Any:
    """A torch tensor in Hugging Face's layout.

    Args:
        torch: its module.
        leaf: of the trainer's parameters, with any sharding over this process's devices.
        tensor: which part of it.
        layer_axis: the leaf's axis that counts layers; None where it holds one tensor.
    """
    value = _one_layer(torch, leaf, tensor, layer_axis)
    assert tensor.form in ("linear", "plain"), tensor
    if tensor.form == "linear":
        return value.reshape(tensor.hf_shape[::-1]).T
    return value.reshape(tensor.hf_shape)


def _one_layer(torch: Any, leaf: jax.Array, tensor: Tensor, axis: int | None) -> Any:
    if leaf.is_fully_replicated:
        value = torch.from_dlpack(leaf.addressable_data(0))
        return value if axis is None else value.select(axis, tensor.layer)
    whole = None
    for index, piece in _pieces(torch, leaf):
        if axis is not None:
            assert tensor.layer is not None
            layer = tensor.layer - (index[axis].start or 0)
            if not 0 <= layer < piece.shape[axis]:
                continue
            index, piece = index[:axis] + index[axis + 1 :], piece.select(axis, layer)
        if whole is None:
            whole = torch.empty(tensor.shape, dtype=piece.dtype, device=piece.device)
        whole[index].copy_(piece)
    return whole


def _pieces(torch: Any, leaf: jax.Array) -> Iterator[tuple[tuple[slice, ...], Any]]:
    """Each distinct shard once, with its place."""
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, torch.from_dlpack(shard.data)


def tensor_checksum(torch: Any, tensor: Any) -> int:
    """The checksum of `posttrain.samplers.proof.trainer_checksums`, of a torch tensor in Hugging Face's layout."""
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]).reshape(-1, tensor.shape[-1])
    rows, columns = (
        torch.from_numpy(checksum_weights(count, salt=salt).view(np.int32)).to(bits.device)
        for count, salt in zip(bits.shape, (ROW_SALT, COLUMN_SALT), strict=True)
    )
    if bits.stride(0) == 1:
        # The sums go along memory, whichever way the matrix lies in it.
        bits, rows, columns = bits.T, columns, rows
    sums = torch.empty(bits.shape[0], dtype=torch.int32, device=bits.device)
    # Products and sums wrap modulo 2**32. They go block by block, so that the products stay in a CPU's caches.
    count = max(1, _CHECKSUM_BLOCK // bits.shape[1])
    for start in range(0, bits.shape[0], count):
        block = bits[start : start + count]
        block = block.to(torch.int32) & 0xFFFF if tensor.dtype.itemsize == 2 else block
        torch.sum(block * columns, 1, dtype=torch.int32, out=sums[start : start + count])
    return int((sums * rows).sum(dtype=torch.int64)) % 2**32


def layer_outputs(torch: Any, model: Any) -> dict[str, np.ndarray]:
    """What the engine's layers answer, as `posttrain.samplers.proof.trainer_layer_outputs` has it.

    Args:
        torch: its module.
        model: vLLM's.
    """
    answers: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, module in _layers(model):
            answers |= {part: value.float().cpu().numpy() for part, value in _answers(torch, name, module)}
    return answers


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "quant_method") or (
            getattr(module, "weight", None) is not None and not list(module.children())
        ):
            yield name, module
    if getattr(model.config, "tie_word_embeddings", False):
        yield "lm_head", getattr(model, "lm_head", None) or model.model.embed_tokens


def _answers(torch: Any, name: str, module: Any) -> Iterator[tuple[str, Any]]:
    weight = f"{name}.weight"
    if name.endswith("embed_tokens"):
        rows = torch.tensor(probe_rows(module.org_vocab_size), device=module.weight.device)
        yield weight, module(rows)
    elif name == "lm_head":
        yield weight, _matrix_answer(torch, module, module.embedding_dim, None)[: module.org_vocab_size]
    elif hasattr(module, "input_size"):
        answer = _matrix_answer(torch, module, module.input_size, module.bias)
        prefix, _, last = name.rpartition(".")
        parts = _FUSED.get(last, (last,))
        sizes = module.output_sizes if last in _FUSED else [answer.shape[0]]
        for part, value in zip(parts, answer.split(list(sizes)), strict=True):
            yield f"{prefix}.{part}.weight", value
    elif module.weight.ndim == 1:
        yield weight, module.weight


def _matrix_answer(torch: Any, module: Any, inputs: int, bias: Any) -> Any:
    weight = next(module.parameters())
    x = torch.from_numpy(probe_vector(inputs)).to(device=weight.device, dtype=weight.dtype)
    return module.quant_method.apply(module, x[None], bias)[0]
