"""TRL's SFTTrainer on the examples of bench.sft, a turn of steps at a time. Runs in an environment of its own.

Reads a number of steps from each line of its input, takes so many, and prints one JSON line per step: its seconds, the
collator's work included, its predicted tokens, and the share of its cells that are no padding. Ends with its input.
This file imports nothing of the repository, and has no entry of its own: `bench.sft_trl` starts it.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Turns(TrainerCallback):
    """Waits for orders between steps, and reports each."""

    def __init__(self, counted: dict[str, int], out: Any) -> None:
        self.counted = counted
        self.out = out
        self.left = 0
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits for the first order."""
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports a step, and waits when the turn is over."""
        tokens, cells = self.counted["tokens"], self.counted["cells"]
        self.counted.update(tokens=0, cells=0)
        seconds = time.perf_counter() - self.start
        print(json.dumps({"seconds": seconds, "tokens": tokens, "filled": tokens / cells}), file=self.out, flush=True)
        self.left -= 1
        self.start = time.perf_counter()
        if self.left == 0:
            self.wait(control)

    def wait(self, control: Any) -> None:
        """Blocks until there is an order, or none will come."""
        line = sys.stdin.readline()
        control.should_training_stop = not line
        self.left = int(line or 0)
        self.start = time.perf_counter()


class CountingTrainer(SFTTrainer):
    """SFTTrainer that counts what goes into each step."""

    counted: dict[str, int]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The step, after a look at its mask."""
        mask = inputs["attention_mask"]
        self.counted["tokens"] += int(mask.sum()) - len(mask)
        self.counted["cells"] += mask.numel()
        return super().training_step(model, inputs, *args, **kwargs)


def model_of(sizes: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))


def main() -> None:
    """Trains until the input ends."""
    parser = argparse.ArgumentParser()
    for name in ("--examples", "--tokenizer", "--sizes", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    args = parser.parse_args()
    # What the libraries print goes to stderr, so that stdout holds the lines of steps alone.
    out, sys.stdout = sys.stdout, sys.stderr
    with open(args.examples, encoding="utf-8") as file:
        dataset = Dataset.from_list([json.loads(line) for line in file])
    # TRL's defaults suit a GPU: half precision and recomputed activations would only slow a CPU down.
    config = SFTConfig(
        output_dir=args.output,
        per_device_train_batch_size=args.rows,
        max_length=args.length,
        max_steps=10**6,
        learning_rate=args.learning_rate,
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
    counted = {"tokens": 0, "cells": 0}
    trainer = CountingTrainer(
        model=model_of(json.loads(args.sizes)),
        args=config,
        train_dataset=dataset,
        processing_class=PreTrainedTokenizerFast.from_pretrained(args.tokenizer),
        callbacks=[Turns(counted, out)],
    )
    trainer.counted = counted
    trainer.train()
