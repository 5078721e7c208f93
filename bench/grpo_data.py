"""What bench.grpo's contestants complete: four questions of GSM8K, eight completions each, of given lengths."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np

from bench.sft_data import LEARNING_RATE, make_corpus
from models.tokenizer import load_tokenizer
from posttrain.data.problems import load_all, prompt_set
from recipes.load import LoadedRecipe, load_recipe
from recipes.schema import GRPORecipe

NUM_PROMPTS, GROUP, PROMPT_LIMIT = 4, 8, 128
MEDIAN_TOKENS, SPREAD, MOST_TOKENS = 40, 0.8, 256
EQUAL_TOKENS = 128
ROW_LENGTH = {"mixed": 1024, "equal": 1104}
"""Of our update: about the length of two groups, and of one."""
NUM_SLOTS = {"native": 8, "vllm": NUM_PROMPTS * GROUP}
"""Completions that an engine samples at a time: the native one's cost follows them, vLLM's steps."""
BETA = 0.04
REWARD_CHARACTERS = 200
"""The reward is how near a completion's text comes to so many characters: cheap, and different within a group."""


@dataclass(frozen=True)
class Workload:
    """The same for all contestants; kept as a JSON file that their processes read."""

    name: str
    folder: str
    tokenizer: str
    """A folder that transformers opens too."""
    questions: str
    """JSON Lines of `question` and `answer`: NUM_PROMPTS of them."""
    lengths: list[list[int]]
    """Tokens of each completion, its last one included, [NUM_PROMPTS][GROUP]."""
    max_tokens: int
    """What a completion may have at most, which nobody's recipe can know to be less."""
    eos_id: int
    texts: list[str] = field(default_factory=list)
    """The prompts, special tokens spelled out."""
    prompts: list[list[int]] = field(default_factory=list)
    """The prompts' token ids."""

    @property
    def completions(self) -> int:
        """Completions of a step."""
        return sum(map(len, self.lengths))

    @property
    def sampled(self) -> int:
        """Tokens that a step samples."""
        return sum(map(sum, self.lengths))

    @property
    def predicted(self) -> int:
        """Tokens of a step's sequences that predict another, without any padding."""
        return self.sampled + sum(GROUP * (len(prompt) - 1) for prompt in self.prompts)

    @property
    def distinct(self) -> int:
        """The same with each prompt once: what is computed where the completions of a group share it."""
        return self.sampled - self.completions + sum(map(len, self.prompts))

    def write(self) -> Path:
        """Writes the file that `read_workload` reads."""
        path = Path(self.folder) / "workload.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def read_workload(path: str | Path) -> Workload:
    """What `Workload.write` wrote."""
    return Workload(**json.loads(Path(path).read_text()))


def mixed_lengths() -> list[list[int]]:
    """The quantiles of a log-normal distribution, capped, in a random order: no draw makes one run unlike another."""
    count = NUM_PROMPTS * GROUP
    normal = NormalDist(float(np.log(MEDIAN_TOKENS)), SPREAD)
    lengths = [min(MOST_TOKENS, round(np.exp(normal.inv_cdf((rank + 0.5) / count)))) for rank in range(count)]
    return np.random.default_rng(0).permutation(lengths).reshape(NUM_PROMPTS, GROUP).tolist()


def make_workload(name: str, folder: Path) -> Workload:
    """The workload `mixed` or `equal`, with its files in the folder."""
    corpus = make_corpus(folder)
    questions = folder / "questions.jsonl"
    questions.write_text("".join(corpus.path.read_text(encoding="utf-8").splitlines(keepends=True)[:NUM_PROMPTS]))
    lengths = mixed_lengths() if name == "mixed" else [[EQUAL_TOKENS] * GROUP for _ in range(NUM_PROMPTS)]
    bare = Workload(
        name=name,
        folder=str(folder),
        tokenizer=str(corpus.tokenizer),
        questions=str(questions),
        lengths=lengths,
        max_tokens=MOST_TOKENS if name == "mixed" else EQUAL_TOKENS,
        eos_id=2,
    )
    recipe = our_recipe(bare, engine="native", overrides=()).recipe
    assert isinstance(recipe, GRPORecipe)
    tokenizer = load_tokenizer(recipe.tokenizer)
    assert tokenizer.eos_id == bare.eos_id and 0 not in tokenizer.stop_ids
    problems = load_all(recipe.data).train
    rows = prompt_set(
        problems, recipe.data, tokenizer, recipe.tokenizer, max_prompt_length=PROMPT_LIMIT, limit=None
    ).rows
    assert len(rows) == NUM_PROMPTS
    prompts = [list(row.token_ids) for row in rows]
    return Workload(**{**asdict(bare), "texts": [row.text for row in rows], "prompts": prompts})


def our_recipe(workload: Workload, *, engine: str, overrides: tuple[str, ...]) -> LoadedRecipe:
    """The recipe that `posttrain grpo` would be given."""
    folder = Path(workload.folder)
    text = f"""
kind: grpo
model: {{preset: bench-r, scan_layers: false}}
tokenizer: {{path: {workload.tokenizer}}}
data: {{path: {workload.questions}, template: "{{question}}", shuffle: false}}
rl:
  prompts_per_step: {NUM_PROMPTS}
  num_generations: {GROUP}
  max_prompt_length: {PROMPT_LIMIT}
  max_completion_length: {workload.max_tokens}
  row_length: {ROW_LENGTH[workload.name]}
  beta: {BETA}
rewards: {{functions: {{length: 1.0}}, options: {{length: {{target: {REWARD_CHARACTERS}, unit: characters}}}}}}
sampler: {{engine: {engine}, num_slots: {NUM_SLOTS[engine]}}}
train: {{steps: 1000000, per_device_batch_size: 2}}
mesh: {{num_devices: 1}}
optimizer: {{learning_rate: {LEARNING_RATE}}}
schedule: {{kind: constant, warmup_fraction: 0.0, steps: 1000000}}
checkpoint: {{enabled: false}}
run: {{dir: {folder / engine}}}
logging: {{console: none, peak_flops: 1.0e+11}}
"""
    path = folder / f"{engine}.yaml"
    path.write_text(text)
    return load_recipe(str(path), list(overrides))
