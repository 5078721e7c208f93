"""Quantised models: which products, that frameworks, layouts and devices agree, and what a key decides."""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import quantize
from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten, init_params, layer_specs, stack_layers, unstack_layers
from models.sharding import DEFAULT_RULES, activation_mesh, batch_sharding, param_shardings
from recipes.schema import MeshSection, ModelSection

CONFIG = load_preset("tiny-llama")
KEY = jax.random.key(9)
QUANTIZED = ("int8", "fp8")
DOT = re.compile(r"stablehlo\.dot_general .* : \(tensor<[^>]*>, tensor<([^>]*)x(\w+)>\) -> ")
"""Finds shape and type of the second operand."""


def section(**changes: Any) -> ModelSection:
    return ModelSection(**{"preset": "tiny-llama", **changes})


def arranged(options: ModelSection) -> dict[str, Any]:
    params = init_params(CONFIG, jax.random.key(0), scan_layers=False, param_scan_axis=1, dtype=jnp.float32)
    return stack_layers(params, CONFIG.num_layers, options.param_scan_axis) if options.scan_layers else params


def tokens(rows: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (rows, 24), 0, CONFIG.vocab_size)


def logits_and_gradients(key: jax.Array | None, options: ModelSection) -> tuple[jax.Array, dict[str, Any]]:
    """Logits, and the gradient of the mean loss of guessing each token itself, unrolled."""
    model = FunctionalModel(CONFIG, options)

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits, _ = model(params, tokens(), noise_key=key)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens()[..., None], axis=-1).mean(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arranged(options))
    return logits, unstack_layers(grads, CONFIG.num_layers, options.param_scan_axis) if options.scan_layers else grads


@functools.cache
def reference(quantization: str, keyed: bool = True) -> tuple[jax.Array, dict[str, Any]]:
    return logits_and_gradients(KEY if keyed else None, section(quantization=quantization))


def errors(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """For each leaf the norm of the difference over the norm of what is expected."""
    ours, theirs = dict(flatten(actual)), dict(flatten(expected))
    assert ours.keys() == theirs.keys()
    return {"/".join(p): float(np.linalg.norm(ours[p] - theirs[p]) / np.linalg.norm(theirs[p])) for p in ours}


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_every_kernel_of_the_layers_is_quantised_and_the_head_is_not(quantization: str, framework: str) -> None:
    options = section(quantization=quantization, framework=framework, scan_layers=False)
    model = FunctionalModel(CONFIG, options)
    text = jax.jit(model).lower(arranged(options), tokens()).as_text()
    products = DOT.findall(text)
    narrow = collections.Counter(shape for shape, dtype in products if dtype in ("i8", "f8E4M3FN"))
    kernels = [spec for path, spec in flatten(layer_specs(CONFIG)) if path[-1] == "kernel"]
    assert len(kernels) == 7
    shapes = ["x".join(map(str, spec.shape)) for spec in kernels]
    assert narrow == collections.Counter(shapes * CONFIG.num_layers)
    heads = [product for product in products if product == (f"{CONFIG.embed_dim}x{CONFIG.vocab_size}", "f32")]
    assert len(heads) == 1


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"framework": "linen"}, marks=pytest.mark.slow),
        {"framework": "linen", "scan_layers": False, "remat": "full"},
        {"scan_layers": False, "remat": "minimal"},
    ],
    ids=str,
)
def test_frameworks_layouts_and_remat_agree(quantization: str, changes: dict[str, Any]) -> None:
    """To 1e-3 of each gradient's norm: an ulp may move a number to the next step; another key's noise makes 2e-2."""
    logits, grads = logits_and_gradients(KEY, section(quantization=quantization, **changes))
    expected_logits, expected = reference(quantization)
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-3 * float(jnp.abs(expected_logits).max()))
    assert max(errors(grads, expected).values()) < 1e-3


@pytest.mark.parametrize(("quantization", "least", "most"), [("int8", 0.002, 0.05), ("fp8", 0.02, 0.25)])
def test_gradients_are_near_float32s(quantization: str, least: float, most: float) -> None:
    found = errors(reference(quantization)[1], reference("none")[1])
    assert least < min(found.values()) and max(found.values()) < most, found


def test_a_key_changes_gradients_of_int8_alone_and_no_forward_pass() -> None:
    for quantization in ("int8", "fp8", "none"):
        logits, grads = reference(quantization)
        plain_logits, plain = reference(quantization, keyed=False)
        np.testing.assert_array_equal(logits, plain_logits)
        found = errors(grads, plain)
        # What feeds the head alone has no quantised product behind it on the way back.
        unquantised = {found.pop(name) for name in ("decoder/decoder_norm/scale", "decoder/logits_dense/kernel")}
        assert unquantised == {0.0}
        if quantization == "int8":
            assert min(found.values()) > 0.002 and max(found.values()) < 0.05
        else:
            assert set(found.values()) == {0.0}


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_a_forward_pass_without_a_key_is_the_same_twice(quantization: str) -> None:
    options = section(quantization=quantization)
    forward = jax.jit(FunctionalModel(CONFIG, options))
    params = arranged(options)
    np.testing.assert_array_equal(forward(params, tokens())[0], forward(params, tokens())[0])
    assert "threefry" not in forward.lower(params, tokens()).as_text()


# Sums of at most 64 products cut the 8 rows of 24 tokens into 4 blocks of 2.
CASES_ON_DEVICES = {"int8": ("int8", quantize.MAX_INT8_SUM), "blocks": ("int8", 64), "fp8": ("fp8", 0)}


def on_eight_devices() -> None:
    """Runs in a process of its own: gradients on a mesh of data, fsdp and tensor axes equal one device's."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    for case, (quantization, longest_sum) in CASES_ON_DEVICES.items():
        quantize.MAX_INT8_SUM = longest_sum
        options = section(quantization=quantization)
        model, params, ids = FunctionalModel(CONFIG, options), arranged(options), tokens(8)

        def loss(params: Any, ids: jax.Array, model: FunctionalModel = model) -> jax.Array:
            return -jax.nn.log_softmax(model(params, ids, noise_key=KEY)[0])[..., :7].mean()

        expected = jax.device_get(jax.jit(jax.grad(loss))(params, ids))
        shardings = param_shardings(CONFIG, mesh, DEFAULT_RULES, scan_layers=True, param_scan_axis=1)
        with activation_mesh(mesh, DEFAULT_RULES):
            step = jax.jit(jax.grad(loss), out_shardings=shardings)
            placed = jax.device_put(ids, batch_sharding(mesh, DEFAULT_RULES))
            actual = jax.device_get(step(jax.device_put(params, shardings), placed))
        print(case, max(errors(actual, expected).values()))


@pytest.mark.slow
@pytest.mark.multidevice
def test_eight_devices_give_one_devices_gradients(run_on_devices: Any) -> None:
    """To 5e-3 of each gradient's norm: sums in another order move some numbers to the next step."""
    found = dict(line.split() for line in run_on_devices(8, on_eight_devices).splitlines())
    assert set(found) == set(CASES_ON_DEVICES)
    assert all(float(error) < 5e-3 for error in found.values()), found
