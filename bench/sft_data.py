"""What bench.sft trains on: GSM8K and its own vocabulary, as a recipe for us and as token lists for the others."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.tokenizer import load_tokenizer, train_bpe
from posttrain.data.examples import Example, example_format, make_example
from posttrain.data.sources import Records, train_sources
from posttrain.data.word_problems import GAIN_VERBS, LARGEST, LEVELS, LOSS_VERBS, word_problems, write_problems
from recipes.schema import SFTRecipe

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS, LENGTH, LEARNING_RATE = 8, 512, 3e-4
VOCABULARY = 4096
GENERATED_COUNT, GENERATED_VOCABULARY = 4000, 384
"""Generated problems, and the ids they have pairs to merge for; the model's head keeps its VOCABULARY columns."""

Turn = tuple[float, int]
"""Seconds of some steps, and the tokens in them that predict another."""


@dataclass(frozen=True)
class Corpus:
    """Questions and worked answers, and the vocabulary trained on them."""

    origin: str
    path: Path
    """JSON Lines with `question` and `answer`."""
    tokenizer: Path
    """A folder that transformers opens too."""


def make_corpus(folder: Path) -> Corpus:
    """GSM8K where it lies beside the repository, generated word problems otherwise; trains the vocabulary."""
    if GSM8K.is_file():
        path, size, origin = GSM8K, VOCABULARY, "GSM8K, train split"
    else:
        problems = word_problems(
            GENERATED_COUNT, seed=0, split="train", levels=LEVELS, verbs=GAIN_VERBS + LOSS_VERBS, largest=LARGEST
        )
        path = write_problems(problems, folder / "problems.jsonl", tags=None)
        size, origin = (
            GENERATED_VOCABULARY,
            f"generated word problems, since there is no ../{GSM8K.relative_to(ROOT.parent)}",
        )
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = (f"{record['question']}\n{record['answer']}" for record in records)
    return Corpus(f"{origin}; BPE of {size} ids trained on it", path, train_bpe(texts, size, folder / "bpe"))


def make_recipe(corpus: Corpus, *, vocab_size: int) -> SFTRecipe:
    """The recipe of the timed run: packed rows, completions alone trained, AdamW with clipping."""
    return SFTRecipe.model_validate(
        {
            "kind": "sft",
            "model": {"preset": "bench-r", "scan_layers": False, "overrides": {"vocab_size": vocab_size}},
            "tokenizer": {"path": str(corpus.tokenizer)},
            "data": {"path": str(corpus.path), "sequence_length": LENGTH},
            "train": {"per_device_batch_size": ROWS},
            "mesh": {"num_devices": 1},
            "schedule": {"kind": "constant"},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "checkpoint": {"enabled": False},
        }
    )


def read_examples(recipe: SFTRecipe) -> list[Example]:
    """Every example of the recipe's data, tokenised as the recipe says, in the data's order.

    Raises:
        ValueError: one has more than LENGTH tokens, so that contestants would cut it differently.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    (source,) = train_sources(recipe.data)
    records = Records(source, 0)
    section = recipe.tokenizer
    form = example_format(recipe.data, source, list(records.features), add_bos=section.add_bos, add_eos=section.add_eos)
    examples = [make_example(records[index].values, tokenizer, form) for index in range(len(records))]
    longest = max(len(example.tokens) for example in examples)
    if longest > LENGTH:
        raise ValueError(f"{source.named()}: an example of {longest} tokens: rows hold {LENGTH}; raise LENGTH")
    return examples


def predicted_tokens(examples: Sequence[Example]) -> int:
    """Positions that predict a token: one fewer than its tokens for each example, in every trainer's rows alike."""
    return sum(len(example.tokens) - 1 for example in examples)


def write_labelled(examples: Sequence[Example], path: Path) -> Path:
    """JSON Lines of `input_ids` and `labels`, -100 where a token is not trained: what transformers reads."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            pairs = zip(example.tokens.tolist(), example.trained.tolist(), strict=True)
            labels = [token if trained else -100 for token, trained in pairs]
            file.write(json.dumps({"input_ids": example.tokens.tolist(), "labels": labels}) + "\n")
    return path
