"""Distillation against NumPy in float64, arithmetic by hand, full logits, and itself in other chunks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.vocab import cross_entropy_sum
from posttrain.losses.distillation import (
    DIVERGENCES,
    TeacherHidden,
    TeacherTopK,
    distillation_loss,
    teacher_top_k,
)
from tests.posttrain.losses.distillation_oracle import (
    TOLERANCE,
    V,
    assert_near,
    capped_head,
    draw,
    head,
    numpy_capped,
    oracle,
    oracle_grads,
    sums_and_grads,
    teacher_params,
)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (2.5, 0.7)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_equal_numpy(divergence, temperature, alpha, k):
    data = draw(1)
    settings = {"divergence": divergence, "temperature": temperature, "alpha": alpha, "k": k}
    loss, soft, hard = oracle(data, **settings)
    grads = oracle_grads(data, **settings)
    for dtype, tolerance in TOLERANCE.items():
        with jax.enable_x64(dtype == np.float64):
            out, found = sums_and_grads(data, dtype, **settings)
        assert_near(out.loss_sum, loss, tolerance)
        assert_near(out.metrics["distill/soft_loss"].sum, soft, tolerance)
        assert_near(out.metrics["distill/hard_loss"].sum, hard, tolerance)
        assert_near(out.weight_sum, data["weights"].sum(), 1e-6)
        for one, expected in zip(found, grads, strict=True):
            assert one.dtype == dtype
            assert_near(one, expected, tolerance)


def one_token(student, teacher, **settings):
    """The output and the gradient at the student's logits, where logits are log-probabilities as given."""
    identity = lambda params, hidden: hidden * params  # noqa: E731

    def numerator(hidden):
        out = distillation_loss(
            identity,
            jnp.ones(()),
            hidden,
            TeacherHidden(jnp.log(jnp.asarray([[teacher]])), jnp.ones(())),
            jnp.asarray([[0]]),
            jnp.ones((1, 1)),
            teacher_head_fn=identity,
            chunk_size=1,
            **{"divergence": "forward_kl", "temperature": 1.0, "alpha": 1.0, **settings},
        )
        return out.loss_sum, out

    (_, out), grad = jax.value_and_grad(numerator, has_aux=True)(jnp.log(jnp.asarray([[student]])))
    return out, np.asarray(grad[0, 0])


def test_divergences_of_two_outcomes_are_the_hand_computed_ones():
    # q = (1/2, 1/2), p = (3/4, 1/4). Forward: 3/4 ln(3/2) + 1/4 ln(1/2), slope q - p. Reverse: 1/2 ln(2/3) + 1/2 ln 2
    # = ln(4/3) / 2, slope q (log(q/p) - KL) = 1/2 (ln(2/3) - ln(4/3) / 2) = -ln(3) / 4 and the opposite.
    out, grad = one_token([0.5, 0.5], [0.75, 0.25])
    assert float(out.loss_sum) == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-6)
    np.testing.assert_allclose(grad, [-0.25, 0.25], rtol=1e-6)
    out, grad = one_token([0.5, 0.5], [0.75, 0.25], divergence="reverse_kl")
    assert float(out.loss_sum) == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    np.testing.assert_allclose(grad, [-math.log(3) / 4, math.log(3) / 4], rtol=1e-6)


def test_temperature_of_two_outcomes_is_the_hand_computed_one():
    # p = (0.9, 0.1) at temperature 2 has odds sqrt(9) = 3: (3/4, 1/4); q stays (1/2, 1/2). The loss is 4 KL, and its
    # slope 4 * (q - p) / 2.
    out, grad = one_token([0.5, 0.5], [0.9, 0.1], temperature=2.0)
    assert float(out.loss_sum) == pytest.approx(4 * (0.75 * math.log(1.5) - 0.25 * math.log(2)), rel=1e-6)
    np.testing.assert_allclose(grad, [-0.5, 0.5], rtol=1e-5)


def test_the_soft_gradient_keeps_its_size_as_the_temperature_grows():
    # To first order in 1 / tau, tau (q - p) is the difference of the centred logits over V, whatever tau is.
    grads = [one_token([0.2, 0.5, 0.3], [0.4, 0.4, 0.2], temperature=tau)[1] for tau in (50.0, 100.0)]
    difference = np.log([0.2, 0.5, 0.3]) - np.log([0.4, 0.4, 0.2])
    for grad in grads:
        np.testing.assert_allclose(grad, (difference - difference.mean()) / 3, rtol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("divergence", "temperature", "shape", "k"),
    [
        ("forward_kl", 1.0, (2, 5, 7, 4), 3),
        ("forward_kl", 2.5, (4, 32, 1000, 40), None),
        ("reverse_kl", 1.0, (3, 16, 33, 8), None),
        ("reverse_kl", 2.5, (1, 13, 257, 64), 3),
    ],
)
def test_a_model_distilled_into_itself_has_exactly_no_loss_and_no_gradient(divergence, temperature, shape, dtype, k):
    rows, length, vocab, chunk_size = shape
    rng = np.random.default_rng(rows)
    params = {"kernel": jnp.asarray(rng.normal(size=(16, vocab)), dtype)}
    hidden = jnp.asarray(rng.normal(size=(rows, length, 16)), dtype)
    out, grads = into_itself(params, hidden, divergence, temperature, k, chunk_size)
    assert float(out.loss_sum) == 0.0
    assert float(out.metrics["distill/soft_loss"].sum) == 0.0
    for grad in jax.tree.leaves(grads):
        assert not np.any(grad)


def into_itself(params, hidden, divergence, temperature, k, chunk_size):
    @jax.jit
    def extract(params, hidden):
        return teacher_top_k(head, params, hidden, k=k, temperature=temperature, chunk_size=chunk_size)

    @jax.jit
    def run(params, hidden, teacher):
        def numerator(params, hidden):
            out = distillation_loss(
                head,
                params,
                hidden,
                teacher,
                jnp.zeros(hidden.shape[:2], jnp.int32),
                jnp.ones(hidden.shape[:2]),
                teacher_head_fn=head if k is None else None,
                divergence=divergence,
                temperature=temperature,
                alpha=1.0,
                chunk_size=chunk_size,
            )
            return out.loss_sum, out

        (_, out), grads = jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True)(params, hidden)
        return out, grads

    return run(params, hidden, TeacherHidden(hidden, params) if k is None else extract(params, hidden))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_whole_top_k_is_the_whole_distribution_and_a_smaller_one_a_lower_bound(divergence):
    data = draw(2)
    found = [
        float(sums_and_grads(data, np.float32, k=k, divergence=divergence)[0].metrics["distill/soft_loss"].sum)
        for k in (1, 3, V - 1, V, None)
    ]
    assert all(low <= high * (1 + 1e-6) for low, high in itertools.pairwise(found))
    assert found[0] > 0
    # With V - 1 tokens the tail is one token, and with V there's none.
    np.testing.assert_allclose(found[2:], found[-1], rtol=1e-5)


def test_top_k_holds_the_most_probable_tokens_and_the_mass_of_the_others():
    data = draw(3)
    logits = numpy_capped(data, data["teacher_hidden"]) / 1.7
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, teacher_params(data))
        hidden = jnp.asarray(data["teacher_hidden"])
        found = teacher_top_k(capped_head, params, hidden, k=3, temperature=1.7, chunk_size=4)
        grad = jax.grad(
            lambda h: teacher_top_k(capped_head, params, h, k=3, temperature=1.7, chunk_size=4).logprobs_RTK.sum()
        )(hidden)
    np.testing.assert_array_equal(found.indices_RTK, order[..., :3])
    np.testing.assert_allclose(np.exp(found.logprobs_RTK), np.take_along_axis(probabilities, order[..., :3], -1))
    np.testing.assert_allclose(np.exp(found.tail_RT), np.take_along_axis(probabilities, order[..., 3:], -1).sum(-1))
    assert not np.any(grad)


def test_alpha_zero_is_plain_cross_entropy():
    data = draw(4)
    out, grads = sums_and_grads(data, np.float32, alpha=0.0, temperature=3.0)
    given = {name: jnp.asarray(array, jnp.float32) for name, array in data.items() if name != "labels"}

    def cross_entropy(kernel, hidden):
        labels = jnp.asarray(data["labels"], jnp.int32)
        return cross_entropy_sum(
            head, {"kernel": kernel}, hidden, labels, given["weights"], z_loss=0.0, chunk_size=4
        ).loss_sum

    value, expected = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))(given["kernel"], given["hidden"])
    assert_near(out.loss_sum, value, 1e-6)
    for one, other in zip(grads, expected, strict=True):
        assert_near(one, other, 1e-6)


def test_a_label_outside_the_vocabulary_is_nan_where_it_counts_and_ignored_by_a_soft_loss_alone():
    data = draw(6)
    data["weights"][0, 0], data["labels"][0, 0] = 1.0, V
    assert np.isnan(sums_and_grads(data, np.float32)[0].loss_sum)
    out, grads = sums_and_grads(data, np.float32, alpha=1.0)
    assert np.isfinite(out.loss_sum) and all(np.isfinite(grad).all() for grad in grads)


def test_nothing_flows_to_the_teacher_and_the_cotangent_scales_the_gradient():
    data = {name: jnp.asarray(a, jnp.int32 if name == "labels" else jnp.float32) for name, a in draw(8).items()}

    def loss(params, hidden, teacher, weights):
        return 3.0 * distillation_loss(
            head, params, hidden, teacher, data["labels"], weights, teacher_head_fn=capped_head,
            divergence="forward_kl", temperature=1.0, alpha=0.5, chunk_size=4,
        ).loss_sum  # fmt: skip

    teacher = TeacherHidden(data["teacher_hidden"], teacher_params(data))
    grads = jax.grad(loss, argnums=(0, 1, 2, 3))({"kernel": data["kernel"]}, data["hidden"], teacher, data["weights"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[2:]))
    _, expected = sums_and_grads(draw(8), np.float32)
    assert_near(grads[0]["kernel"], 3 * expected[0], 1e-6)
    assert_near(grads[1], 3 * expected[1], 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"divergence": "forward-kl"}, "did you mean forward_kl"),
        ({"temperature": 0.0}, r"distill\.temperature=0\.0"),
        ({"alpha": 1.5}, r"distill\.alpha=1\.5"),
        ({"k": V + 1}, rf"distill\.top_k={V + 1}: the vocabulary has {V} tokens"),
        ({"chunk_size": 0}, "at least one token"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        sums_and_grads(draw(), np.float32, **settings)


def test_vocabularies_of_two_sizes_are_refused():
    data = draw()
    data["embedding"] = data["embedding"][:-1]
    with pytest.raises(ValueError, match=f"teacher's vocabulary has {V - 1} tokens, the student's {V}"):
        sums_and_grads(data, np.float32)


def test_top_k_of_a_distribution_given_by_hand():
    # Student (1/2, 1/4, 1/4), teacher's top token 0 with 0.8 and tail 0.2: forward KL over two outcomes with the
    # student's (1/2, 1/2), 0.8 ln 1.6 + 0.2 ln 0.4; slopes q0 - p0 = -0.3, and q_j (1 - 0.2 / 0.5) = 0.15 each.
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25]]]))
    teacher = TeacherTopK(jnp.asarray([[[0]]]), jnp.log(jnp.asarray([[[0.8]]])), jnp.log(jnp.asarray([[0.2]])))

    def numerator(logits):
        return distillation_loss(
            lambda params, hidden: hidden * params, jnp.ones(()), logits, teacher, jnp.asarray([[0]]),
            jnp.ones((1, 1)), teacher_head_fn=None, divergence="forward_kl", temperature=1.0, alpha=1.0, chunk_size=1,
        ).loss_sum  # fmt: skip

    value, grad = jax.value_and_grad(numerator)(logits)
    assert float(value) == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), rel=1e-6)
    np.testing.assert_allclose(grad[0, 0], [-0.3, 0.15, 0.15], rtol=1e-5)
