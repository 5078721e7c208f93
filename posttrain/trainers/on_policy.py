"""On-policy distillation: the student writes, and the teacher scores what it wrote.

Rows of data give the prompts; their answers are replaced by the student's own (Agarwal et al. 2023, GKD,
https://arxiv.org/abs/2306.13649; with the reverse divergence, https://arxiv.org/abs/2306.08543). The divergence is not
differentiated through the sampling, as in both papers.
"""

from collections.abc import Iterator

import jax
import numpy as np

from models.functional import Params
from models.lora import merged
from models.tokenizer import Tokenizer
from posttrain.samplers.base import Prompt, Sampler, Sampling
from pretrain.batching import place
from pretrain.data.batch import FIELD_NAMES, TokenBatch, padding_batch
from pretrain.session import TrainingSession
from pretrain.setup import Setup
from recipes.schema import DistillRecipe


class StudentRows:
    """Batches whose answers the student has just written; its weights are synced before it writes."""

    def __init__(self, recipe: DistillRecipe, setup: Setup, tokenizer: Tokenizer, sampler: Sampler) -> None:
        self._recipe, self._setup, self._tokenizer, self._sampler = recipe, setup, tokenizer, sampler
        self._session: TrainingSession | None = None
        self._num_rows = setup.plan.rows_loaded

    def attend(self, session: TrainingSession) -> None:
        """Takes the session whose policy is sampled."""
        self._session = session

    def next_batch(self) -> TokenBatch:
        """The next prompts with the student's answers, on the mesh."""
        rows = next(self._setup.train_iterator, None)
        length = self._recipe.data.sequence_length
        if rows is None:
            batch = padding_batch(self._num_rows, length)
        else:
            prompts = dict(prompts_of(rows))
            batch = student_rows(prompts, self._answers(prompts), (self._num_rows, length))
        return place(batch, self._setup.batch_sharding, self._setup.share)

    def _answers(self, prompts: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        session = self._session
        assert session is not None
        if self._sampler.weight_version != session.done:
            self._sampler.sync(self._whole(session.state.params), session.done)
        sampling = Sampling(
            max_tokens=self._recipe.distill.max_completion_length,
            temperature=self._recipe.sampler.temperature,
            stop_ids=tuple(sorted(self._tokenizer.stop_ids)),
            seed=self._recipe.train.seed,
            step=session.done + 1,
        )
        asked = [Prompt(tuple(tokens.tolist()), number) for number, tokens in prompts.items()]
        return {one.prompt_id: one.token_ids for one in self._sampler.generate(asked, sampling)}

    def _whole(self, params: Params) -> Params:
        """The student as a plain model."""
        model = self._setup.model
        if model.adapters is None:
            return params
        return merged(params, model.adapters, model.layout, dtype=model.options.param_dtype)


def prompts_of(rows: TokenBatch) -> Iterator[tuple[int, np.ndarray]]:
    """The prompt of each row that has one: (row, int32 tokens before its first trained target)."""
    trained = np.asarray(rows.targets_segmentation) != 0
    for number in np.flatnonzero(trained.any(1)):
        yield int(number), np.asarray(rows.inputs)[number, : int(trained[number].argmax()) + 1]


def student_rows(prompts: dict[int, np.ndarray], answers: dict[int, np.ndarray], shape: tuple[int, int]) -> TokenBatch:
    """Rows of prompts with their answers, padded on the right; only the answers are trained.

    Args:
        prompts: by row.
        answers: by row.
        shape: rows and tokens of the batch; a row without prompt is padding.
    """
    fields = {name: np.zeros(shape, np.int32) for name in FIELD_NAMES}
    for number, prompt in prompts.items():
        tokens = np.concatenate([prompt, answers[number]]).astype(np.int32)
        size = len(tokens) - 1
        fields["inputs"][number, :size], fields["targets"][number, :size] = tokens[:-1], tokens[1:]
        for name in ("inputs_position", "targets_position"):
            fields[name][number, :size] = np.arange(size)
        fields["inputs_segmentation"][number, :size] = 1
        fields["targets_segmentation"][number, len(prompt) - 1 : size] = 1
    return TokenBatch(**fields)


def require_one_process() -> None:
    """Raises ValueError where several processes would each sample for themselves."""
    if jax.process_count() > 1:
        raise ValueError(
            f"mesh: {jax.process_count()} processes: the sampler runs in one process with all of the mesh's devices; "
            "start one process"
        )
