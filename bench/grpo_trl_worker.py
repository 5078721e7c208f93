"""TRL's GRPOTrainer with transformers' generation, a turn of steps at a time. Runs in an environment of its own.

Completions end at the workload's lengths: a logits processor lets a row sample its end token there, and nowhere else.
So TRL sees completions that ended by themselves. This file imports nothing that needs JAX, and has no entry of its own:
`bench.grpo` starts it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from bench.turns import Orders


class EndsAt(LogitsProcessor):
    """Forbids the end token before a row's last position, and everything else there."""

    def __init__(self, lengths: list[int], eos_id: int) -> None:
        self.last, self.eos_id = torch.tensor(lengths) - 1, eos_id
        self.prompt: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of the next token."""
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        ends = self.last <= input_ids.shape[1] - self.prompt
        scores[:, self.eos_id] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, self.eos_id] = 0.0
        return scores


class Turns(TrainerCallback):
    """Waits for orders between steps, and reports each."""

    def __init__(self, orders: Orders, spent: dict[str, float]) -> None:
        self.orders, self.spent = orders, spent

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the first order."""
        control.should_training_stop = not self.orders.next_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports a step, and waits when the turn is over."""
        split, self.spent["rollout"], self.spent["reference"] = dict(self.spent), 0.0, 0.0
        self.orders.end_step({"split": split})
        control.should_training_stop = not self.orders.next_step()


class GivenLengths(GRPOTrainer):
    """GRPOTrainer whose completions have given lengths, and whose generation and scoring are timed."""

    def prepare(self, lengths: list[int], prompts: list[list[int]], eos_id: int, spent: dict[str, float]) -> None:
        """Sets the lengths of a step's rows, which its prompts must match token by token."""
        generate, score = self.model.generate, self.ref_model.forward

        def timed_generate(**inputs: Any) -> torch.Tensor:
            start = time.perf_counter()
            rows = [
                row[mask.bool()].tolist()
                for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            group = len(rows) // len(prompts)
            # TRL shuffles the prompts, and the lengths go with them.
            order = [prompts.index(row) * group + number % group for number, row in enumerate(rows)]
            ends = EndsAt([lengths[place] for place in order], eos_id)
            made = generate(**inputs, logits_processor=LogitsProcessorList([ends]))
            spent["rollout"] += time.perf_counter() - start
            return made

        def timed_score(*args: Any, **inputs: Any) -> Any:
            start = time.perf_counter()
            output = score(*args, **inputs)
            spent["reference"] += time.perf_counter() - start
            return output

        self.model.generate, self.ref_model.forward = timed_generate, timed_score


def main() -> None:
    """Trains until the input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--workload", "--sizes", "--output", "--settings"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    orders = Orders()
    workload, given = json.loads(Path(args.workload).read_text()), json.loads(args.settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workload["tokenizer"], padding_side="left")
    lengths = [length for group in workload["lengths"] for length in group]
    torch.manual_seed(0)
    # Both the policy and its reference are read from a folder, as TRL wants it.
    LlamaForCausalLM(LlamaConfig(**json.loads(args.sizes))).save_pretrained(f"{args.output}/model")
    # TRL's defaults suit a GPU: half precision and recomputed activations would only slow a CPU down.
    config = GRPOConfig(
        output_dir=args.output,
        per_device_train_batch_size=given["rows"],
        gradient_accumulation_steps=len(lengths) // given["rows"],
        num_generations=given["group"],
        max_completion_length=workload["max_tokens"],
        model_init_kwargs={"dtype": "float32"},
        beta=given["beta"],
        loss_type="grpo",
        temperature=1.0,
        max_steps=10**6,
        learning_rate=given["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    spent = {"rollout": 0.0, "reference": 0.0}
    wanted = given["characters"]
    trainer = GivenLengths(
        model=f"{args.output}/model",
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in workload["texts"]]),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [max(-1.0, -abs(len(one) - wanted) / wanted) for one in completions],
        callbacks=[Turns(orders, spent)],
    )
    trainer.prepare(lengths, workload["prompts"], workload["eos_id"], spent)
    trainer.train()
    sys.stdout.flush()
