"""Policy losses against NumPy in float64 token by token, arithmetic by hand, and themselves laid out otherwise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.advantages import ADVANTAGES
from posttrain.losses.aggregation import AGGREGATIONS
from posttrain.losses.kl_estimators import KL_ESTIMATORS
from posttrain.losses.policy import ALGORITHMS, policy_loss
from tests.posttrain.losses.policy_oracle import (
    EVERYTHING,
    SETTINGS,
    Layout,
    Sampled,
    assert_near,
    draw,
    lay_out,
    oracle,
    sums_and_grads,
    with_aggregation,
)

LENGTHS = [5, 3, 1, 6, 2]
PACKED = Layout(rows=[[0, 1], [2, 3], [4]], length=14, prompt=2)
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}


def rows_of(grads, layout):
    """Gradients by sequence, laid out in rows; zero everywhere else."""
    filler = [Sampled(grad, grad, grad, grad, grad, 0.0) for grad in grads]
    return np.nan_to_num(lay_out(filler, layout)["logps"])


def agrees(sequences, layout=PACKED, dtypes=(np.float64, np.float32), **settings):
    """The loss of these sequences and its gradient are the oracle's."""
    value, weight, grads = oracle(sequences, **settings)
    for dtype in dtypes:
        with jax.enable_x64(dtype == np.float64):
            out, grad, _ = sums_and_grads(lay_out(sequences, layout, dtype), **settings)
        assert grad.dtype == dtype
        assert_near(out.loss_sum, value, TOLERANCE[dtype])
        assert_near(grad, rows_of(grads, layout), TOLERANCE[dtype])
        assert float(out.weight_sum) == weight


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_loss_and_gradient_equal_numpy(algorithm, estimator, aggregation):
    agrees(
        draw(1, LENGTHS),
        algorithm=algorithm,
        kl_estimator=estimator,
        kl_coefficient=0.3,
        **with_aggregation(aggregation),
    )


@pytest.mark.parametrize("correction", ["token", "sequence"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_truncated_importance_weights_and_the_dual_clip_equal_numpy(algorithm, correction):
    agrees(
        draw(2, LENGTHS, spread=0.9),
        algorithm=algorithm,
        sampler_correction=correction,
        sampler_cap=1.5,
        dual_clip=1.6,
        epsilon_high=None,
        kl_coefficient=0.1,
        entropy_coefficient=0.05,
        **with_aggregation("sequence-mean-token-mean"),
    )


def test_the_samples_of_these_tests_take_every_branch():
    for seed, spread in [(1, 0.4), (2, 0.9)]:
        arrays = lay_out(draw(seed, LENGTHS, spread), PACKED)
        for algorithm, parts in ALGORITHMS.items():
            settings = {"sampler_correction": "token", "sampler_cap": 1.5, "dual_clip": 1.6}
            metrics = sums_and_grads(arrays, algorithm=algorithm, **settings)[0].metrics
            if parts.clips:
                for name in ("clip_fraction_high", "clip_fraction_low"):
                    assert 0 < float(metrics[f"policy/{name}"].sum) < sum(LENGTHS), (seed, algorithm, name)
            if parts.clips and seed == 2:
                assert float(metrics["policy/dual_clip_fraction"].sum) > 0
            assert float(metrics["sampler/importance_weight"].sum) < sum(LENGTHS) * 1.5


def one_token(ratio, advantage, **settings):
    """Loss, gradient and metrics of one token with this ratio, where the old log-probability is ln 0.5."""
    old = math.log(0.5)
    one = Sampled(*(np.array([x]) for x in (old + math.log(ratio), old, old, old, 1.0)), advantage)
    with jax.enable_x64(True):
        out, grad, _ = sums_and_grads(lay_out([one], Layout([[0]], 1)), **settings)
    return float(out.loss_sum), float(grad[0, 0]), {name: float(m.sum) for name, m in out.metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        # -min(rho A, clip(rho, 0.8, 1.28) A); d loss / d logp is -rho A where the first term is the smaller, else 0.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.5, -2.0, 1.6, 0.0),
        (0.9, -2.0, 1.8, 1.8),
        # The dual clip at 3: -max(rho A, 3 A) for A < 0.
        (5.0, -2.0, 6.0, 0.0),
        (5.0, 2.0, -2.56, 0.0),
    ],
)
def test_clipped_objective_of_one_token_is_the_hand_computed_one(ratio, advantage, loss, grad):
    found, slope, metrics = one_token(ratio, advantage, dual_clip=3.0)
    assert found == pytest.approx(loss, rel=1e-12)
    assert slope == pytest.approx(grad, rel=1e-12)
    beyond = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    assert metrics["policy/clip_fraction"] == beyond
    assert metrics["policy/dual_clip_fraction"] == (advantage < 0 and ratio > 3)


def test_gspo_of_two_tokens_is_the_hand_computed_one():
    # Ratios 2 and 1/2 of two tokens have the geometric mean 1, so with A = 3 nothing is clipped: each token's loss is
    # -3, and its gradient -3 under gspo-token's own token and -3 / 2 from each of both tokens under gspo.
    logps = np.log([0.4, 0.2])
    one = Sampled(logps, np.log([0.2, 0.4]), logps, logps, logps, 3.0)
    for algorithm in ("gspo-token", "gspo"):
        with jax.enable_x64(True):
            out, grad, _ = sums_and_grads(lay_out([one], Layout([[0]], 2)), algorithm=algorithm)
        assert float(out.loss_sum) == pytest.approx(-6.0, rel=1e-12)
        np.testing.assert_allclose(grad, [[-3.0, -3.0]], rtol=1e-12)
    # Ratios 2 and 2 have the mean 2: clipped at 1.28 in both tokens.
    one = Sampled(np.log([0.4, 0.8]), np.log([0.2, 0.4]), logps, logps, logps, 3.0)
    out, grad, _ = sums_and_grads(lay_out([one], Layout([[0]], 2)), algorithm="gspo-token")
    assert float(out.loss_sum) == pytest.approx(-2 * 1.28 * 3, rel=1e-6)
    assert not grad.any()


@pytest.mark.parametrize(
    ("aggregation", "numerator", "weight"),
    [
        # Two sequences of 1 and 3 tokens, on policy, advantages 1 and -2: token losses are -1, and 2, 2, 2.
        ("token-mean", -1 + 6, 4),
        ("sequence-mean-token-mean", -1 + 2, 2),
        ("sequence-mean-token-sum", -1 + 6, 2),
        ("sequence-mean-token-sum-norm", (-1 + 6) / 7, 2),
    ],
)
@pytest.mark.parametrize("rows", [[[0], [1]], [[0, 1]], [[], [1, 0]]])
def test_aggregations_of_two_sequences_are_the_hand_computed_ones(aggregation, numerator, weight, rows):
    sequences = [
        Sampled(*[np.full(n, -1.0)] * 2, *[np.zeros(n)] * 3, advantage) for n, advantage in [(1, 1.0), (3, -2.0)]
    ]
    out, _, _ = sums_and_grads(lay_out(sequences, Layout(rows, 6), np.float32), **with_aggregation(aggregation))
    assert float(out.loss_sum) == pytest.approx(numerator, rel=1e-6)
    assert float(out.weight_sum) == weight


@pytest.mark.parametrize("sequence_norm", AGGREGATIONS)
def test_first_on_policy_gradient_is_the_same_for_every_ratio(sequence_norm):
    # At pi = old every ratio is 1, and its gradient is 1 at the token, or 1/n at each of the sequence's n tokens,
    # which is the same where the sequence's tokens weigh alike.
    sequences = [
        Sampled(one.logps, one.logps, one.sampler, one.ref, one.entropy, one.advantage) for one in draw(3, LENGTHS)
    ]
    arrays = lay_out(sequences, PACKED)
    grads = {}
    for given in ("explicit", None):
        if given is None:
            arrays["old_logps"] = None
        for algorithm in ALGORITHMS:
            with jax.enable_x64(True):
                grads[algorithm, given] = first_gradient(arrays, algorithm, sequence_norm)
    for grad in grads.values():
        np.testing.assert_allclose(grad, grads["grpo", "explicit"], rtol=0, atol=1e-12)


def first_gradient(arrays, algorithm, aggregation):
    given = {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}
    logps = given.pop("logps")
    settings = {**SETTINGS, "algorithm": algorithm, **with_aggregation(aggregation)}
    return np.asarray(jax.grad(lambda x: policy_loss(x, **given, **settings, max_segments=4).loss_sum)(logps))


def test_gspo_equals_gspo_token_under_sequence_means_also_off_policy():
    arrays = lay_out(draw(1, LENGTHS), PACKED)
    settings = with_aggregation("sequence-mean-token-mean")
    with jax.enable_x64(True):
        found = [sums_and_grads(arrays, algorithm=name, **settings) for name in ("gspo", "gspo-token")]
    assert_near(found[0][0].loss_sum, found[1][0].loss_sum, 1e-12)
    assert_near(found[0][1], found[1][1], 1e-12)


def test_gspo_of_one_token_answers_equals_grpo():
    arrays = lay_out(draw(4, [1] * 5), PACKED)
    with jax.enable_x64(True):
        found = [sums_and_grads(arrays, algorithm=name)[:2] for name in ("grpo", "gspo", "gspo-token")]
    for out, grad in found[1:]:
        assert_near(out.loss_sum, found[0][0].loss_sum, 1e-12)
        assert_near(grad, found[0][1], 1e-12)


@pytest.mark.parametrize("segment", [0, 5, -1])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_counted_token_of_no_sequence_makes_the_loss_nan(aggregation, segment):
    arrays = lay_out(draw(7, [4, 2]), Layout([[0, 1]], 6), np.float32)
    arrays["segment_ids"][0, 5] = segment
    assert np.isnan(sums_and_grads(arrays, **with_aggregation(aggregation))[0].loss_sum)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("gap", [300.0, -300.0])
def test_wild_log_probabilities_leave_value_and_gradient_finite(algorithm, gap):
    one = draw(8, [3])[0]
    wild = Sampled(one.logps, one.logps + gap, one.logps - gap, one.logps + gap, one.entropy, -1.0)
    settings = {"algorithm": algorithm, **EVERYTHING}
    out, grad, _ = sums_and_grads(lay_out([wild], Layout([[0]], 4), np.float32), **settings)
    assert np.isfinite(grad).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_equal_rewards_leave_only_the_kl_term():
    sequences = [Sampled(one.logps, one.old, one.sampler, one.ref, one.entropy, 0.0) for one in draw(9, LENGTHS)]
    out, _, _ = sums_and_grads(lay_out(sequences, PACKED, np.float32), kl_coefficient=0.5)
    assert float(out.metrics["policy/loss"].sum) == 0.0
    kl = out.metrics["policy/kl"]
    assert float(out.loss_sum) == pytest.approx(0.5 * float(kl.sum), rel=1e-6)


def test_metrics_are_the_means_over_counted_tokens():
    sequences = draw(10, LENGTHS)
    arrays = lay_out(sequences, PACKED, np.float32)
    out, _, _ = sums_and_grads(arrays, sampler_correction="token", kl_estimator="mse_kl", kl_coefficient=0.1)
    tokens = {
        name: np.concatenate([getattr(s, name) for s in sequences]) for name in ("logps", "old", "sampler", "ref")
    }
    d = tokens["old"] - tokens["sampler"]
    expected = {
        "policy/kl": (tokens["ref"] - tokens["logps"]) ** 2 / 2,
        "policy/entropy": np.concatenate([s.entropy for s in sequences]),
        "policy/ratio": np.exp(tokens["logps"] - tokens["old"]),
        "policy/log_ratio_abs": np.abs(tokens["logps"] - tokens["old"]),
        "sampler/mismatch_kl": np.exp(d) - 1 - d,
        "sampler/logp_diff_abs": np.abs(d),
        "sampler/importance_weight": np.minimum(np.exp(d), 2.0),
    }
    for name, values in expected.items():
        assert float(out.metrics[name].sum) == pytest.approx(values.sum(), rel=1e-5), name
        assert float(out.metrics[name].weight) == len(values), name
    policy = out.metrics["policy/loss"]
    assert float(policy.sum + 0.1 * out.metrics["policy/kl"].sum) == pytest.approx(float(out.loss_sum), rel=1e-5)


def test_terms_without_their_arrays_are_left_out():
    arrays = lay_out(draw(11, LENGTHS), PACKED, np.float32)
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    given |= {"old_logps": None, "sampler_logps": None, "ref_logps": None, "entropy": None}
    out = policy_loss(**given, **SETTINGS, max_segments=4)
    assert not {"policy/kl", "policy/entropy", "sampler/mismatch_kl"} & set(out.metrics)
    for setting, value in [("kl_coefficient", 0.1), ("entropy_coefficient", 0.1), ("sampler_correction", "token")]:
        with pytest.raises(ValueError, match=rf"rl\.{setting}={value}: .*missing"):
            policy_loss(**given, **{**SETTINGS, setting: value}, max_segments=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aggregation": "sequence-mean"}, "use sequence-mean-token-mean"),
        ({"aggregation": "seq-mean-token-sum"}, "use sequence-mean-token-sum"),
        ({"aggregation": "x"}, "no such aggregation"),
        ({"aggregation": "sequence-mean-token-sum-norm"}, "length_norm: None"),
        ({"length_norm": 5.0}, "has no effect"),
        ({"algorithm": "gpso-token"}, "did you mean gspo-token"),
        ({"epsilon": 1.5}, "0 <= epsilon <= 1"),
        ({"epsilon_high": -0.1}, "epsilon_high >= 0"),
        ({"dual_clip": 1.2}, "above 1"),
        ({"kl_estimator": "k3"}, "low_var_kl"),
        ({"sampler_correction": "sentence"}, "token, sequence, off"),
        ({"sampler_cap": 0.0}, "above 0"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(settings, message):
    arrays = lay_out(draw(11, LENGTHS), PACKED, np.float32)
    with pytest.raises(ValueError, match=message):
        sums_and_grads(arrays, **settings)


def test_the_parts_that_algorithms_name_exist():
    for algorithm in ALGORITHMS.values():
        assert algorithm.advantage in ADVANTAGES
        assert algorithm.aggregation in AGGREGATIONS
