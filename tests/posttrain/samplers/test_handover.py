"""Our arrays as torch tensors in Hugging Face's layout: views where they can be, gathered from shards, checksummed."""

import numpy as np
import pytest

from posttrain.samplers import proof

pytestmark = pytest.mark.parity


def every_tensor_arrives(dtype: str, *layouts: str) -> None:
    """Compares with the exporter's tensors, and torch's checksums with JAX's; prints how many tensors were views."""
    import jax
    import torch
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from models.checkpoints.hf_names import checkpoint_tensors
    from models.config import load_preset
    from models.functional import FunctionalModel
    from models.parameters import flatten
    from posttrain.samplers import handover
    from recipes.schema import ModelSection

    config = load_preset("tiny-llama-rl").replace(num_layers=4, family="qwen2", qkv_bias=True, tied_embeddings=False)
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2 if len(jax.devices()) > 1 else 1), ("fsdp", "tensor"))
    for layout in layouts:
        scan, axis = layout != "apart", 0 if layout == "scanned at 0" else 1
        section = ModelSection(preset="tiny-llama-rl", scan_layers=scan, param_scan_axis=axis, param_dtype=dtype)
        model = FunctionalModel(config, section)
        params = model.init(jax.random.key(0))

        def place(leaf):
            axes = ["fsdp", "tensor"] if leaf.ndim > 1 else []
            fits = [name if leaf.shape[i] % mesh.shape[name] == 0 else None for i, name in enumerate(axes)]
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*fits)))

        sharded = jax.tree.map(place, params)
        expected = proof.trainer_checksums(model, sharded)
        leaves, placed = dict(flatten(params)), dict(flatten(sharded))
        views = 0
        for tensor in checkpoint_tensors(config):
            path, layer_axis = proof.leaf_path(tensor, scanned=scan), proof.layer_axis(tensor, model)
            whole = np.asarray(leaves[path]).astype(np.float32)
            whole = tensor.to_hf(whole if layer_axis is None else whole.take(tensor.layer, layer_axis))
            found = handover.hf_tensor(torch, placed[path], tensor, layer_axis)
            assert found.dtype == getattr(torch, dtype)
            np.testing.assert_array_equal(found.float().numpy(), whole, err_msg=tensor.name)
            assert handover.tensor_checksum(torch, found) == expected[tensor.name], tensor.name
            assert handover.tensor_checksum(torch, found.contiguous()) == expected[tensor.name], tensor.name
            first = placed[path].addressable_data(0)
            start = first.unsafe_buffer_pointer()
            views += start <= found.data_ptr() < start + first.nbytes
        print(views, "views of", len(checkpoint_tensors(config)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_on_one_device_are_views_of_the_trainers_arrays(dtype, capsys):
    every_tensor_arrives(dtype, "scanned", "apart")
    # 4 layers of 12 tensors, and 3 more. Stacked at axis 1, the heads of `out` and of 3 biases do not merge.
    assert capsys.readouterr().out == "35 views of 51\n51 views of 51\n"


@pytest.mark.multidevice
def test_tensors_are_gathered_from_eight_devices_one_at_a_time(run_on_devices):
    out = run_on_devices(8, every_tensor_arrives, "float32", "scanned", "scanned at 0", "apart")
    assert out.count("views of 51") == 3
