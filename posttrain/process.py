"""What a command that computes sets up in its process, before JAX is used; never at import."""

import logging
import os
import warnings
from pathlib import Path

import jax

OUR_PACKAGES = ("models", "posttrain", "pretrain", "recipes", "rewards")


class PrintHandler(logging.Handler):
    """Prints records, so that a progress bar that has taken over stdout shows them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record; warnings and worse say what they are."""
        text = self.format(record)
        print(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}", flush=True)


def _of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Skipping non-TPU device")


def start_process() -> None:
    """Shows our own log lines, and keeps compiled programs between commands."""
    handler = PrintHandler()
    for name in OUR_PACKAGES:
        package = logging.getLogger(name)
        package.setLevel(logging.INFO)
        package.propagate = False
        if not any(isinstance(known, PrintHandler) for known in package.handlers):
            package.addHandler(handler)
    # Orbax warns at every save without OCDBT, which the recipe chose.
    warnings.filterwarnings("ignore", category=UserWarning, module="orbax")
    # vLLM looks at names of torch that are going away, and Tunix looks for a TPU's memory: neither can be acted upon.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("absl").addFilter(_of_use)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "posttrain" / "jax"))
