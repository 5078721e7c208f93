"""TRL for bench.sft: its environment under .cache/, made once with pip, and the process that runs there."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.sft_data import LEARNING_RATE, LENGTH, ROOT, Turn
from bench.turns import TurnProcess
from models.config import TransformerConfig

ENVIRONMENT = ROOT / ".cache" / "bench-trl"
PACKAGES = ("trl==1.16.0", "transformers==5.12.1", "accelerate==1.15.0", "datasets==5.2.0", "torch==2.13.0+cpu")
"""Pinned, so that figures can be measured again. torch is the build for CPUs: that of the default index brings CUDA."""


OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
"""For processes that need nothing from a network."""


class Unavailable(Exception):
    """The environment cannot be made here."""


def trl_python() -> Path:
    """The interpreter of the environment, which is made if it is not there.

    Raises:
        Unavailable: pip does not get the packages.
    """
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "packages.txt"
    wanted = "\n".join(PACKAGES)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"TRL: installing {', '.join(PACKAGES)} into {ENVIRONMENT.relative_to(ROOT)}", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        install = [str(python), "-m", "pip", "install", "--quiet", *PACKAGES]
        made = subprocess.run(install, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        lines = [line for line in (made.stderr or made.stdout).splitlines() if not line.startswith("WARNING")]
        raise Unavailable(
            f"{' '.join(lines[-2:])}; set PIP_FIND_LINKS to a folder or page that has {PACKAGES[-1]}, "
            "or pass --skip-trl"
        )
    stamp.write_text(wanted)
    return python


def llama_sizes(config: TransformerConfig) -> dict[str, Any]:
    """Hugging Face's names for the sizes of a Llama."""
    assert config.family == "llama", config.family
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


class TrlProcess:
    """SFTTrainer in its own process: `take(steps)` is a turn, and between turns it waits and computes nothing."""

    def __init__(self, config: TransformerConfig, *, examples: Path, tokenizer: Path, rows: int) -> None:
        """Starts it. `examples` is a file of `write_labelled`, `rows` the examples of a batch.

        Raises:
            Unavailable: the environment cannot be made.
        """
        command = [str(trl_python()), "-c", "from bench.sft_trl_worker import main; main()"]
        given = {
            "examples": examples,
            "tokenizer": tokenizer,
            "sizes": json.dumps(llama_sizes(config)),
            "output": tempfile.mkdtemp(),
            "rows": rows,
            "length": LENGTH,
            "learning-rate": LEARNING_RATE,
        }
        command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        self._process = TurnProcess(command, OFFLINE)

    def take(self, steps: int) -> Turn:
        """Takes steps; raises as `TurnProcess.take`."""
        taken = self._process.take(steps)
        return sum(step["seconds"] for step in taken), sum(step["tokens"] for step in taken)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()
