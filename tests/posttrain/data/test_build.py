"""The iterators of supervised fine-tuning: every example once an epoch, on any hosts, resumed to the bit."""

import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest

from models.config import load_preset
from models.functional import FunctionalModel
from models.tokenizer import load_tokenizer, train_bpe
from posttrain.data.build import make_sft_eval_iterator, make_sft_iterator
from pretrain.data.iterators import BatchIterator, EvalIterator
from pretrain.losses import make_loss_fn
from recipes.schema import ModelSection, TokenizerSection
from recipes.sections.posttrain_data import PosttrainDataSection

BOS, EOS = 256, 257
PROMPT = b"Question: %s\nAnswer:"


@pytest.fixture
def rows(rng):
    """61 different questions, their answers of 1 to 80 letters."""
    lengths = np.minimum(rng.geometric(0.06, 61), 80)
    return [
        {"question": f"{i}?", "answer": "".join(rng.choice(list("abcdé "), n)) + "."} for i, n in enumerate(lengths)
    ]


@pytest.fixture
def make(byte):
    """`make(path=..., rows_per_batch=3, host=(0, 1), evaluation=False, **data)`: the iterator of that section."""

    def build(*, rows_per_batch=3, host=(0, 1), evaluation=False, vocab_size=300, tokenizer=byte, **data):
        settings = {"sequence_length": 64, "num_workers_threads": 3, **data}
        return (make_sft_eval_iterator if evaluation else make_sft_iterator)(
            PosttrainDataSection(**settings),
            tokenizer,
            vocab_size=vocab_size,
            rows_per_batch=rows_per_batch,
            add_bos=True,
            add_eos=True,
            host_index=host[0],
            host_count=host[1],
        )

    return build


def expected(rows, length=64):
    """(tokens, trained indices) of each row, written out from the rule; at most `length` + 1 tokens."""
    found = []
    for row in rows:
        prompt = PROMPT % row["question"].encode()
        tokens = (BOS, *prompt, *b" ", *row["answer"].encode(), EOS)[: length + 1]
        found.append((tokens, tuple(range(1 + len(prompt), len(tokens)))))
    return found


PADDED = {"packing": False, "buckets": [24, 40]}
SETTINGS = [
    pytest.param({}, id="packed"),
    pytest.param({"max_segments_per_row": 1, "shuffle": False}, id="packed in order"),
    pytest.param({"packing": False}, id="padded"),
    pytest.param(PADDED, id="buckets"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_each_epoch_holds_every_example_once_with_its_mask(make, jsonl, rows, examples_of, settings):
    iterator = make(path=jsonl(rows), num_epochs=2, **settings)
    found = [example for batch in iterator for example in examples_of(batch)]
    assert Counter(found) == Counter(expected(rows) * 2)
    trained = sum(len(indices) for _, indices in found)
    assert iterator.totals.target_tokens == trained
    assert (iterator.tallies["examples"], iterator.tallies["skipped"]) == (122, 0)
    cut = sum(len(PROMPT) - 2 + len(f"{row['question']} {row['answer']}".encode()) + 1 > 64 for row in rows)
    assert iterator.tallies["truncated"] == 2 * cut > 0


def test_bucketed_batches_are_as_long_as_their_longest_row_needs(make, jsonl, rows, examples_of):
    shapes = Counter()
    for batch in make(path=jsonl(rows), num_epochs=1, **PADDED):
        length = batch.inputs.shape[1]
        shapes[length] += 1
        for tokens, _ in examples_of(batch):
            assert len(tokens) - 1 <= length and (length == 24 or len(tokens) - 1 > {40: 24, 64: 40}[length])
    assert set(shapes) == {24, 40, 64}


def test_without_shuffling_rows_come_in_order_and_seeds_give_other_orders(make, jsonl, rows, examples_of, digest):
    path = jsonl(rows)
    straight = make(path=path, num_epochs=1, packing=False, shuffle=False)
    assert [example for batch in straight for example in examples_of(batch)] == expected(rows)
    first, again, other = (next(make(path=path, shuffle_seed=seed)) for seed in (0, 0, 1))
    assert digest(first) == digest(again) != digest(other)
    epochs = [example for batch in make(path=path, num_epochs=2, packing=False) for example in examples_of(batch)]
    assert epochs[:61] != epochs[61:] and sorted(epochs[:61]) == sorted(epochs[61:])


@pytest.mark.parametrize("settings", [*SETTINGS, pytest.param({"host": (1, 2)}, id="one of two hosts")])
def test_resuming_after_any_batch_continues_the_straight_run(make, jsonl, rows, digest, settings):
    # Some records are skipped, so that the counts have to be restored too.
    spoilt = [{**row, "answer": ""} if index % 7 == 3 else row for index, row in enumerate(rows)]
    data = {"path": jsonl(spoilt), "num_epochs": 3, "untrainable": "skip", "rows_per_batch": 4, **settings}
    straight = make(**data)
    states, digests = [straight.get_state()], []
    for batch in straight:
        digests.append(digest(batch))
        states.append(json.loads(json.dumps(straight.get_state())))
    count = len(digests)
    assert count > 6 and straight.tallies["skipped"] > 5
    for taken in sorted({0, 1, 2, count // 2, count - 1, count}):
        resumed = make(**data)
        resumed.set_state(states[taken])
        assert [digest(batch) for batch in resumed] == digests[taken:]
        assert resumed.tallies == straight.tallies


def test_the_position_is_that_of_the_batch_handed_out_whatever_is_read_ahead(make, jsonl, rows, digest):
    for settings in ({}, PADDED):
        few = make(path=jsonl(rows), prefetch_buffer=1, num_workers_threads=1, **settings)
        many = make(path=jsonl(rows), prefetch_buffer=20, num_workers_threads=16, **settings)
        for _ in range(8):
            assert digest(next(few)) == digest(next(many))
            assert few.get_state() == many.get_state()


def test_hosts_share_packed_records_and_together_read_each_once(make, jsonl, rows, examples_of):
    found = []
    for host in range(3):
        found.append([e for b in make(path=jsonl(rows), num_epochs=1, host=(host, 3)) for e in examples_of(b)])
    assert [len(part) for part in found] == [21, 20, 20]
    assert Counter(itertools.chain(*found)) == Counter(expected(rows))


@pytest.mark.parametrize(
    "settings",
    [
        {"evaluation": True, "eval_split": "train"},
        {**PADDED, "num_epochs": 1},
        {"evaluation": True, "eval_split": "train", **PADDED},
    ],
)
def test_global_batches_are_the_same_for_any_number_of_hosts(make, jsonl, rows, settings):
    def rows_of(count):
        parts = [
            list(make(path=jsonl(rows), rows_per_batch=6 // count, host=(h, count), **settings)) for h in range(count)
        ]
        assert len({len(part) for part in parts}) == 1
        return [
            np.concatenate([p.targets_segmentation for p in step] + [p.inputs for p in step])
            for step in zip(*parts, strict=True)
        ]

    one, two, three = (rows_of(count) for count in (1, 2, 3))
    for other in (two, three):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_evaluation_is_one_pass_in_order_that_reset_repeats_and_counts(make, jsonl, rows, examples_of, digest):
    iterator = make(path=jsonl(rows), eval_split="train", evaluation=True, sequence_length=128, rows_per_batch=5)
    first = list(iterator)
    assert Counter(e for batch in first for e in examples_of(batch)) == Counter(expected(rows, 128))
    totals = iterator.totals
    # The space before an answer is trained text, the end of sequence is none.
    assert totals.text_bytes == sum(len(row["answer"].encode()) + 1 for row in rows)
    assert totals.target_tokens == totals.text_bytes + len(rows)
    iterator.reset()
    assert iterator.totals.target_tokens == 0
    assert [digest(batch) for batch in iterator] == [digest(batch) for batch in first]
    assert isinstance(iterator, BatchIterator) and isinstance(iterator, EvalIterator)


def test_a_mixture_draws_by_weight_and_numbers_go_on(make, jsonl, examples_of):
    paths = [jsonl([{"text": f"{name}{i}"} for i in range(40)], f"{name}.jsonl") for name in "ab"]
    entries = [{"path": paths[0], "weight": 3.0}, {"path": paths[1], "weight": 1.0}]
    iterator = make(mixture=entries, packing=False, rows_per_batch=40)
    seen = Counter(chr(tokens[1]) for tokens, _ in examples_of(next(iterator)))
    assert seen == {"a": 30, "b": 10}


def test_pretrainings_loss_of_packed_rows_is_that_of_the_answers_alone(make, jsonl, rows):
    config = load_preset("tiny-llama").replace(vocab_size=300)
    model = FunctionalModel(config, ModelSection(preset="tiny-llama", attention="dot_product"))
    params = model.init(jax.random.key(0))
    loss_fn = jax.jit(make_loss_fn(model, z_loss=0.0, chunk_size=64, trainable=None))
    data = {"path": jsonl(rows), "num_epochs": 1, "shuffle": False}
    packed = [loss_fn(params, batch, None) for batch in make(rows_per_batch=4, **data)]
    # The oracle reads one example at a time, unpacked and unpadded, and sums the logits' own log-softmax in float64.
    logits_fn = jax.jit(lambda params, tokens: model(params, tokens, jax.numpy.arange(tokens.shape[1])[None])[0])
    expected_sum, expected_tokens = 0.0, 0
    for tokens, trained in expected(rows[:8]):
        # Behind its end each is filled up to one length, which a causal model does not see.
        filled = np.array([[*tokens, *[0] * (64 - len(tokens[:-1]))]], np.int32)
        logits = np.asarray(logits_fn(params, filled[:, :64])[0], np.float64)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected_sum -= sum(log_probabilities[index - 1, tokens[index]] for index in trained)
        expected_tokens += len(trained)
    few = [loss_fn(params, batch, None) for batch in make(rows_per_batch=4, **{**data, "split": "train[:8]"})]
    assert sum(float(sums.weight_sum) for sums in few) == expected_tokens
    np.testing.assert_allclose(sum(float(sums.loss_sum) for sums in few), expected_sum, rtol=1e-5)
    padded = [loss_fn(params, batch, None) for batch in make(rows_per_batch=4, packing=False, **data)]
    totals = [
        (sum(float(sums.loss_sum) for sums in part), sum(float(sums.weight_sum) for sums in part))
        for part in (packed, padded)
    ]
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-5)


def test_a_batch_is_a_pytree_of_int32_arrays(make, jsonl, rows):
    leaves = jax.tree.leaves(next(make(path=jsonl(rows))))
    assert len(leaves) == 6 and all(leaf.dtype == np.int32 and leaf.shape == (3, 64) for leaf in leaves)


def test_refused_records_are_found_before_the_first_step_and_named(make, jsonl, rows):
    spoilt = [*rows[:40], {"question": "q", "answer": " "}, *rows[40:]]
    with pytest.raises(ValueError, match=r"^data.path=.* data.split='train' record 40 \(from 0\): it holds nothing"):
        make(path=jsonl(spoilt))
    # Beyond the records that are checked, the error comes when it is read, and is the same.
    late = make(path=jsonl(spoilt), checked_records=10, num_epochs=1)
    with pytest.raises(ValueError, match=r"record 40 \(from 0\): it holds nothing to train on"):
        list(late)
    kept = make(path=jsonl(spoilt), untrainable="skip", num_epochs=1)
    assert sum(1 for _ in kept) and (kept.tallies["skipped"], kept.tallies["examples"]) == (1, 61)


def test_a_chat_that_cannot_be_masked_is_refused_with_its_name(make, jsonl):
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [*good[:1], {"role": "assistant", "content": "b<eos>c"}]
    with pytest.raises(ValueError, match=r"record 1 \(from 0\): .*message 1 \(assistant\): its text spells the stop"):
        make(path=jsonl([{"messages": good}, {"messages": bad}]), untrainable="skip")


def test_data_without_any_row_is_refused(make, jsonl):
    path = jsonl([{"question": "q", "answer": ""}] * 3)
    with pytest.raises(ValueError, match="every record was left out"):
        make(path=path, untrainable="skip")
    with pytest.raises(ValueError, match="every record was left out"):
        make(path=jsonl([{"text": "x" * 100}]), overlong="drop")
    # In order, the second of two hosts meets records 1 and 3 only.
    path = jsonl([{"text": text} for text in ("a", "", "b", "")])
    with pytest.raises(ValueError, match="every record was left out"):
        make(path=path, untrainable="skip", shuffle=False, host=(1, 2))


def test_fewer_records_than_hosts_and_a_small_vocabulary_are_refused(make, jsonl, rows):
    with pytest.raises(ValueError, match="it has 2 records for 3 hosts"):
        make(path=jsonl(rows[:2]), host=(0, 3))
    with pytest.raises(ValueError, match=r"model.overrides.vocab_size=100: the tokenizer has 259 ids"):
        make(path=jsonl(rows), vocab_size=100)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"shuffle_seed": 1}, "shuffle_seed=0, now 1"),
        ({"completion_only": False}, "sources="),
        ({"prompt_template": "{question}"}, "sources="),
        ({"sequence_length": 32}, "sequence_length=64, now 32"),
        ({"overlong": "drop"}, "overlong='truncate', now 'drop'"),
        ({"split": "train[:30]"}, "sources="),
        ({"host": (0, 2)}, "host="),
    ],
)
def test_a_position_of_other_rows_is_refused(make, jsonl, rows, changed, named):
    path = jsonl(rows)
    state = make(path=path).get_state()
    with pytest.raises(ValueError, match=f"saved data position: .*{named}.*would not continue"):
        make(**{"path": path, **changed}).set_state(state)


def test_a_position_with_another_chat_template_is_refused(make, jsonl, with_template):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl([{"messages": messages}])
    turn = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>%s' }}"
    ask = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    one, other = (with_template("{% for m in messages %}" + turn % end + "{% endfor %}" + ask) for end in ("", "\\n"))
    state = make(path=path, tokenizer=one).get_state()
    with pytest.raises(ValueError, match="chat_template="):
        make(path=path, tokenizer=other).set_state(state)


def test_gsm8k_packs_with_its_own_vocabulary_and_every_answer_is_whole(shared_dir, tmp_path, make, examples_of):
    path = shared_dir / "data" / "gsm8k" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = (f"{record['question']}\n{record['answer']}" for record in records)
    tokenizer = load_tokenizer(TokenizerSection(path=str(train_bpe(texts, 4096, tmp_path / "bpe"))))
    iterator = make(
        path=str(path), split="train[:1000]", tokenizer=tokenizer, vocab_size=4096, sequence_length=512,
        rows_per_batch=8, num_epochs=1, shuffle=False,
    )  # fmt: skip
    batches = list(iterator)
    found = [example for batch in batches for example in examples_of(batch)]
    answers = {tokenizer.decode([tokens[index] for index in trained], skip_special=False) for tokens, trained in found}
    assert answers == {f" {record['answer']}<eos>" for record in records[:1000]}
    assert len(found) == 1000 and iterator.tallies["truncated"] == 0
    filled = np.mean([np.count_nonzero(row) / 512 for batch in batches[:-1] for row in batch.inputs_segmentation])
    assert filled > 0.9, f"packing fills {filled:.3f} of the cells"
