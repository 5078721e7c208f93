"""Preference pairs: each answer trained with its own length, pairs told apart by id, errors that name the record."""

import json
from collections import Counter

import jax
import numpy as np
import pytest

from posttrain.data.pairs import make_preference_eval_iterator, make_preference_iterator, make_preference_pass
from pretrain.data import FIELD_NAMES
from recipes.sections.posttrain_data import PreferenceDataSection

BOS, EOS = 256, 257
MAKERS = {"train": make_preference_iterator, "eval": make_preference_eval_iterator, "pass": make_preference_pass}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def make(byte, jsonl):
    """`make(records, how="train", rows_per_batch=2, host=(0, 1), **data)`: an iterator over these records."""

    def build(records, *, how="train", rows_per_batch=2, host=(0, 1), tokenizer=byte, **data):
        settings = {"sequence_length": 64, "num_workers_threads": 3, "eval_split": "train", **data}
        if "mixture" not in settings:
            settings["path"] = jsonl(records)
        return MAKERS[how](
            PreferenceDataSection(**settings),
            tokenizer,
            vocab_size=300,
            rows_per_batch=rows_per_batch,
            add_bos=True,
            add_eos=True,
            host_index=host[0],
            host_count=host[1],
        )

    return build


@pytest.fixture
def pairs(rng):
    """43 prompts with two answers of 1 to 40 letters each."""
    draws = np.minimum(rng.geometric(0.08, (43, 2)), 40)
    return [{"prompt": f"{i}:", "chosen": "g" * a, "rejected": "b" * b} for i, (a, b) in enumerate(draws)]


def spoken(tokenizer, batch, index=0):
    """(what is given before the answer, what is trained) of the chosen and of the rejected row of a pair, as text."""
    found = []
    for side in range(2):
        valid = batch.inputs_segmentation[index, side] == 1
        tokens = [int(batch.inputs[index, side, 0]), *map(int, batch.targets[index, side][valid])]
        trained = 1 + np.flatnonzero(batch.targets_segmentation[index, side])
        assert trained.tolist() == list(range(trained[0], trained[-1] + 1)), "an answer is one run of tokens"
        texts = (tokens[: trained[0]], tokens[trained[0] : trained[-1] + 1])
        found.append(tuple(tokenizer.decode(part, skip_special=False) for part in texts))
    return found


def test_a_pair_is_two_rows_of_one_length_each_with_its_own_mask(make):
    batch = next(make([{"prompt": "ab", "chosen": "xyz", "rejected": "q"}], how="pass", sequence_length=8))
    # Pairs of prompt <bos>ab: 5 + 1 tokens to predict with xyz<eos>, 3 + 1 with q<eos>; the second pair is padding.
    assert batch.inputs[0].tolist() == [[BOS, *b"abxyz", 0, 0], [BOS, *b"abq", 0, 0, 0, 0]]
    assert batch.targets[0].tolist() == [[*b"abxyz", EOS, 0, 0], [*b"abq", EOS, 0, 0, 0, 0]]
    assert batch.targets_segmentation[0].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert batch.inputs_segmentation[0].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.inputs_position[0].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [1.0, 0.0] and batch.pair_id.tolist() == [0, -1]
    assert batch.weights.dtype == np.float32 and batch.pair_id.dtype == np.int32
    for name in FIELD_NAMES:
        assert getattr(batch, name).dtype == np.int32 and not getattr(batch, name)[1].any()


def test_rows_are_the_chosen_ones_and_then_the_rejected_ones(make, pairs, byte):
    batch = next(make(pairs, rows_per_batch=3))
    flat = batch.rows()
    for name in FIELD_NAMES:
        np.testing.assert_array_equal(getattr(flat, name)[:3], getattr(batch, name)[:, 0])
        np.testing.assert_array_equal(getattr(flat, name)[3:], getattr(batch, name)[:, 1])
    # On devices too, and under tracing.
    traced = jax.jit(lambda held: held.rows())(batch)
    np.testing.assert_array_equal(traced.inputs, flat.inputs)


@pytest.mark.parametrize(
    ("record", "given", "chosen", "rejected"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "<bos>a ", "b<eos>", "c<eos>"),
        # Without a prompt column two texts share what they begin with.
        ({"chosen": "Q? yes", "rejected": "Q? no"}, "<bos>Q? ", "yes<eos>", "no<eos>"),
        ({"chosen": "Q? no way", "rejected": "Q? no"}, "<bos>Q? no", " way<eos>", "<eos>"),
        (
            {"chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
            "<bos>user: Q\nassistant: ",
            "yes<eos>",
            "no<eos>",
        ),
        (
            {"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
            "<bos>user: Q\nassistant: ",
            "yes<eos>",
            "no<eos>",
        ),
        # The prompt is said twice, as some data sets have it.
        (
            {"prompt": "Q", "chosen": [user("Q"), assistant("yes")], "rejected": [user("Q"), assistant("no")]},
            "<bos>user: Q\nassistant: ",
            "yes<eos>",
            "no<eos>",
        ),
        (
            {"prompt": "Q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
            "<bos>user: Q\nassistant: ",
            "yes<eos>",
            "no<eos>",
        ),
    ],
)
def test_every_format_gives_the_same_pair(make, byte, record, given, chosen, rejected):
    batch = next(make([record], how="pass"))
    assert spoken(byte, batch) == [(given, chosen), (given, rejected)]


def test_as_chat_lays_strings_out_with_the_chat_template(make, byte):
    batch = next(make([{"prompt": "Q", "chosen": "yes", "rejected": "no"}], how="pass", as_chat=True))
    same = next(
        make([{"prompt": [user("Q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}], how="pass")
    )
    for name in FIELD_NAMES:
        np.testing.assert_array_equal(getattr(batch, name), getattr(same, name))


def test_an_earlier_answer_that_both_share_is_prompt(make, byte):
    shared = [user("a"), assistant("b"), user("c")]
    record = {"chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e"), user("f"), assistant("g")]}
    batch = next(make([record], how="pass", sequence_length=128))
    texts = [
        byte.decode(batch.targets[0, side][batch.targets_segmentation[0, side] == 1], skip_special=False)
        for side in range(2)
    ]
    assert texts == ["d<eos>", "e<eos>g<eos>"]


def test_one_pass_holds_every_pair_once_in_buckets_and_training_has_the_same_tokens(make, pairs):
    def by_id(iterator):
        found = {}
        for batch in iterator:
            for index in np.flatnonzero(batch.weights):
                valid = batch.inputs_segmentation[index] == 1
                longest = int(valid.sum(axis=1).max())
                length = batch.inputs.shape[2]
                assert longest <= length and (length == 16 or longest > {32: 16, 64: 32}[length])
                assert int(batch.pair_id[index]) not in found
                found[int(batch.pair_id[index])] = batch.targets[index][valid].tolist()
        return found

    one_pass = by_id(make(pairs, how="pass", buckets=[16, 32]))
    assert sorted(one_pass) == list(range(43))
    assert by_id(make(pairs, num_epochs=1, buckets=[16, 32])) == one_pass
    assert by_id(make(pairs, how="eval", buckets=[16, 32], rows_per_batch=5)) == one_pass


def test_a_mixtures_pairs_are_numbered_on_and_a_pass_holds_all_of_them(make, jsonl, pairs):
    entries = [{"path": jsonl(pairs[:10], "a.jsonl"), "weight": 2.0}, {"path": jsonl(pairs[10:], "b.jsonl")}]
    seen = Counter()
    for batch in make(None, how="pass", mixture=entries):
        seen.update(batch.pair_id[batch.weights == 1].tolist())
    assert seen == Counter(range(43))
    mixed = make(None, mixture=entries, rows_per_batch=30)
    ids = next(mixed).pair_id
    assert (ids < 10).sum() == 20


@pytest.mark.parametrize("settings", [{}, {"buckets": [16, 32]}, {"host": (1, 2), "buckets": [16]}])
def test_resuming_after_any_batch_continues_the_straight_run(make, pairs, digest, settings):
    spoilt = [{**pair, "rejected": " "} if index % 6 == 2 else pair for index, pair in enumerate(pairs)]
    data = {"num_epochs": 2, "untrainable": "skip", **settings}
    straight = make(spoilt, **data)
    states, digests = [straight.get_state()], []
    for batch in straight:
        digests.append(digest(batch))
        states.append(json.loads(json.dumps(straight.get_state())))
    count = len(digests)
    assert count > 8 and straight.tallies["skipped"] > 8
    for taken in sorted({0, 1, count // 2, count - 1, count}):
        resumed = make(spoilt, **data)
        resumed.set_state(states[taken])
        assert [digest(batch) for batch in resumed] == digests[taken:]
        assert resumed.tallies == straight.tallies


def test_hosts_together_hold_the_batch_that_one_host_holds(make, pairs):
    data = {"num_epochs": 1, "buckets": [16, 32]}
    whole = list(make(pairs, rows_per_batch=4, **data))
    parts = [list(make(pairs, rows_per_batch=2, host=(host, 2), **data)) for host in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for batch, left, right in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda *halves: np.concatenate(halves), left, right)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)


def test_overlong_pairs_lose_their_ends_or_are_dropped_and_counted(make):
    records = [
        {"prompt": "a", "chosen": "x" * 20, "rejected": "y"},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    ]
    cut = make(records, how="pass", sequence_length=8)
    (batch,) = cut
    assert cut.tallies["truncated"] == 1 and (batch.targets[0, 0] == [*b"axxxxxxx"]).all()
    dropping = make(records, how="pass", sequence_length=8, overlong="drop")
    (batch,) = dropping
    assert batch.pair_id.tolist() == [1, -1]
    assert (dropping.tallies["dropped"], dropping.tallies["examples"]) == (1, 1)
    assert cut.tallies["target_tokens"] == 7 + 2 + 2 + 2 and cut.totals.text_bytes == 0


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, {}, "chosen and rejected are the same tokens"),
        ({"chosen": "x", "rejected": "x"}, {}, "chosen and rejected are the same tokens"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]},
            {},
            "chosen and rejected are the same messages",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("z"), assistant("c")]},
            {},
            "share their first 0 messages, and behind those both need an answer",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
            {},
            "share their first 1 messages, and behind those both need an answer",
        ),
        ({"prompt": "a", "chosen": "x", "rejected": " "}, {}, "one of its answers holds nothing to train on"),
        (
            {"prompt": "a", "chosen": "x" * 30 + "y", "rejected": "x" * 30 + "z"},
            {"sequence_length": 16},
            "what tells its answers apart lies behind data.sequence_length=16",
        ),
        (
            {"prompt": "a", "chosen": "x" * 30, "rejected": "y"},
            {"sequence_length": 16, "overlong": "refuse"},
            "32 tokens",
        ),
    ],
)
def test_a_pair_that_cannot_be_learnt_from_is_refused_with_the_records_name(make, record, data, message):
    good = {key: [user("q"), assistant(key)] if isinstance(value, list) else key for key, value in record.items()}
    with pytest.raises(ValueError, match=rf"data.path=.* record 1 \(from 0\): .*{message}"):
        make([good, record], **data)


def test_columns_that_are_not_there_and_formats_that_do_not_fit_are_refused(make):
    with pytest.raises(
        ValueError, match=r"data.columns.rejected=rejected: .* has the columns chosen, prompt, and pairs"
    ):
        make([{"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match=r"data.columns.chosen=best: .* has the columns chosen, rejected"):
        make([{"chosen": "b", "rejected": "c"}], columns={"chosen": "best"})
    with pytest.raises(ValueError, match=r"data.as_chat=true: .* does not hold a prompt with two answers as text"):
        make([{"chosen": "b", "rejected": "c"}], as_chat=True)
    with pytest.raises(ValueError, match=r"record 0 .*column chosen: 'b': a conversation is a list of messages"):
        make([{"chosen": "b", "rejected": "c"}], format="messages")


def test_qwen3_pairs_share_the_prompt_a_sampler_is_given(make, qwen3, jsonl):
    record = {"chosen": [user("Hi"), assistant("Hello.")], "rejected": [user("Hi"), assistant("Go away.")]}
    data = PreferenceDataSection(path=jsonl([record]), sequence_length=64)
    iterator = make_preference_pass(
        data, qwen3, vocab_size=151936, rows_per_batch=1, add_bos=True, add_eos=True, host_index=0, host_count=1
    )
    batch = next(iterator)
    prompt = qwen3.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", add_bos=False, add_eos=False)
    for side, said in enumerate(("Hello.", "Go away.")):
        answer = qwen3.encode(f"<think>\n\n</think>\n\n{said}<|im_end|>", add_bos=False, add_eos=False)
        trained = batch.targets_segmentation[0, side] == 1
        assert batch.targets[0, side][trained].tolist() == answer
        assert batch.inputs[0, side][: len(prompt)].tolist() == prompt
        assert np.flatnonzero(trained)[0] == len(prompt) - 1
