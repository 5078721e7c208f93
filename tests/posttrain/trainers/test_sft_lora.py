"""Fine-tuning with adapters, end to end: the base is never touched, a stopped run goes on as if it hadn't, and what was
learnt leaves as a merged model or for PEFT."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lora
from models.checkpoints import store
from models.checkpoints.huggingface import ModelCard, export_hf, import_hf
from models.checksum import checksum
from models.config import load_preset
from models.functional import FunctionalModel
from models.parameters import flatten
from models.quantized_kernel import VALUES
from posttrain.merge import merge
from posttrain.trainers.sft import prepare_rows, run
from pretrain.session import Result
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import checkpoint_dir, metrics_path
from recipes.schema import ModelSection

RECIPE = """
kind: sft
model:
  preset: tiny-llama
  overrides: {embed_dim: 32, mlp_dim: 64, num_heads: 2, num_kv_heads: 1, vocab_size: 264}
  dropout_rate: 0.1
tokenizer: {path: bytes}
data: {sequence_length: 32, num_workers_threads: 2}
lora: {rank: 4}
optimizer: {learning_rate: 1.0e-2}
schedule: {kind: constant, warmup_fraction: 0, steps: 1000}
train: {steps: 6, per_device_batch_size: 4, seed: 3}
logging: {console: none, peak_flops: 1.0e+11}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    write_inputs(path)
    return path


def write_inputs(folder: Path) -> None:
    """The recipe, and sums to learn."""
    (folder / "recipe.yaml").write_text(RECIPE)
    sums = [{"prompt": f"{n % 9}+{n % 7}=", "completion": str(n % 9 + n % 7)} for n in range(120)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sums))


def loaded(folder: Path, name: str, *overrides: str) -> Any:
    given = [f"data.path={folder / 'sums.jsonl'}", f"run.dir={folder / name}", *overrides]
    return load_recipe(str(folder / "recipe.yaml"), given)


def train(folder: Path, name: str, *overrides: str) -> Result:
    return run(loaded(folder, name, *overrides), ["test"])


def losses(result: Result) -> list[float]:
    return [row["learning/loss"] for row in read_metrics(metrics_path(result.run_dir)) if "learning/loss" in row]


def saved(run_dir: Path, step: int) -> dict[Any, Any]:
    return store.flatten(store.read_host(checkpoint_dir(run_dir, step) / "items", only=None))


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    return train(folder, "straight", "checkpoint.interval=3")


def test_adapters_learn_on_a_base_that_keeps_every_bit(straight: Result, folder: Path) -> None:
    found = losses(straight)
    assert found[-1] < found[0] - 1
    recipe = loaded(folder, "unused").recipe
    config = load_preset("tiny-llama").replace(**dict(recipe.model.overrides))
    plain = FunctionalModel(config, recipe.model)
    drawn = jax.jit(plain.init)(jax.random.fold_in(jax.random.key(3), 0))
    base, pairs = lora.split(straight.state.params)
    for path, leaf in flatten(base):
        np.testing.assert_array_equal(leaf, dict(flatten(drawn))[path], err_msg="/".join(path))
    assert all(bool(leaf.any()) for path, leaf in flatten(pairs) if path[-1] == "lora_b")
    for step in (3, 6):
        extra = json.loads((checkpoint_dir(straight.run_dir, step) / "run.json").read_text())["extra"]
        assert extra["base"] == {
            "source": "random",
            "path": None,
            "dtype": "float32",
            "checksum": f"{checksum(drawn):08x}",
        }
        assert extra["lora"]["rank"] == 4


def test_the_first_loss_is_the_base_s_own(straight: Result, folder: Path) -> None:
    whole = train(folder, "whole", "lora.rank=0", "train.steps=1", "checkpoint.enabled=false")
    assert losses(whole)[0] == pytest.approx(losses(straight)[0], rel=1e-7)


def test_nothing_of_the_base_has_a_gradient_moments_or_a_place_in_the_checkpoint(
    straight: Result, folder: Path
) -> None:
    pairs = sum(leaf.nbytes for _, leaf in flatten(lora.split(straight.state.params)[1]))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(straight.state.opt_state) if leaf.ndim)
    assert moments == 2 * pairs
    leaves = saved(straight.run_dir, 6)
    assert sum(leaf.nbytes for leaf in leaves.values() if leaf is not None) <= 3 * pairs + 16
    assert not any({"kernel", "embedding", "scale"} & set(path) for path in leaves)
    setup = prepare_rows(loaded(folder, "unused").recipe)
    setup.close()
    named = {path for path, _ in flatten(setup.shardings.update) if not lora.is_adapter(path)}
    assert named and all(not jax.tree.leaves(leaf) for path, leaf in flatten(setup.shardings.update) if path in named)


def test_a_resumed_run_is_the_straight_run_bit_for_bit(straight: Result, folder: Path) -> None:
    train(folder, "resumed", "checkpoint.interval=3", "train.steps=3")
    resumed = train(folder, "resumed", "checkpoint.interval=3", "run.resume=must")
    assert losses(resumed) == losses(straight)
    one, other = saved(resumed.run_dir, 6), saved(straight.run_dir, 6)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf is other[path] is None or leaf.tobytes() == other[path].tobytes(), path
    for found, wanted in zip(*(jax.tree.leaves(result.state) for result in (resumed, straight)), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_linen_unrolled_learns_as_nnx_scanned(straight: Result, folder: Path, quantization: str) -> None:
    given = ("checkpoint.enabled=false",)
    if quantization != "none":
        given += ("lora.base_quantization=nf4", "lora.quantization_tile=16")
    nnx = straight if quantization == "none" else train(folder, "nnx-nf4", *given)
    linen = train(folder, "linen-" + quantization, "model.framework=linen", "model.scan_layers=false", *given)
    np.testing.assert_allclose(losses(linen), losses(nnx), rtol=1e-5)


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), pytest.param("int8", 8, marks=pytest.mark.slow)])
def test_a_quantized_base_rests_and_its_adapters_learn_and_resume(folder: Path, quantization: str, bits: int) -> None:
    given = (f"lora.base_quantization={quantization}", "lora.quantization_tile=16", "checkpoint.interval=3")
    result = train(folder, quantization, *given)
    found = losses(result)
    assert found[-1] < found[0] - 1
    values = [leaf for path, leaf in flatten(result.state.params) if path[-1] == VALUES]
    assert values and all(leaf.dtype in (jnp.int8, jnp.uint8) for leaf in values)
    # Seven kernels of two layers: 32 * 64 * 3 in the MLP, 32 * (32 + 16 + 16) + 32 * 32 in attention.
    numbers = 2 * (32 * 64 * 3 + 32 * 64 + 32 * 32)
    assert sum(leaf.nbytes for leaf in values) == numbers * bits // 8
    train(folder, quantization + "-resumed", *given, "train.steps=3")
    assert losses(train(folder, quantization + "-resumed", *given, "run.resume=must")) == found


@pytest.mark.parametrize("quantization", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_the_merged_export_is_the_trained_model(folder: Path, tmp_path: Path, quantization: str) -> None:
    """From a Hugging Face base to a Hugging Face folder: logits within 1e-5 of the largest."""
    base, recipe = tmp_path / "base", loaded(folder, "unused").recipe
    config = load_preset("tiny-llama").replace(**dict(recipe.model.overrides))
    drawn = FunctionalModel(config, recipe.model).init(jax.random.key(9))
    card = ModelCard(name="base", base_model=None, how="Drawn.")
    export_hf(
        base,
        config,
        drawn,
        param_scan_axis=1,
        dtype="float32",
        max_shard_bytes=1 << 30,
        tokenizer_source=None,
        generation={},
        card=card,
    )
    given = (f"model.hf_path={base}", "model.preset=null", "model.overrides={}", "model.dropout_rate=0.0")
    if quantization != "none":
        given += (f"lora.base_quantization={quantization}", "lora.quantization_tile=16")
    result = train(folder, "from-hf-" + quantization, *given)
    merge(result.run_dir, tmp_path / "merged", to="hf", base=None, from_step=None, dtype=None, tokenizer=None)
    found, params = import_hf(tmp_path / "merged", scan_layers=True, param_scan_axis=1, dtype="float32")
    options = ModelSection(hf_path=str(base))
    trained = FunctionalModel(config, options, loaded(folder, "unused", *given).recipe.lora)
    ids = jax.random.randint(jax.random.key(1), (2, 16), 0, config.vocab_size)
    wanted = np.asarray(jax.jit(trained)(result.state.params, ids)[0])
    merged = np.asarray(jax.jit(FunctionalModel(found, options))(params, ids)[0])
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    (base / "model.safetensors").write_bytes((tmp_path / "merged" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="base: its checksum is"):
        merge(result.run_dir, tmp_path / "again", to="hf", base=None, from_step=None, dtype=None, tokenizer=None)
    assert not (tmp_path / "again").exists()
    with pytest.raises(ValueError, match="base: its checksum is"):
        train(folder, "from-hf-" + quantization, *given, "run.resume=must", "train.steps=7")


def test_the_verb_writes_a_folder_for_peft(
    straight: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.cli import main

    monkeypatch.setattr("posttrain.process.start_process", lambda: None)
    assert main(["merge", str(straight.run_dir), str(tmp_path / "peft"), "--to", "peft", "--from-step", "3"]) == 0
    assert "adapters from" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert main(["merge", str(straight.run_dir), str(tmp_path / "other"), "--to", "gguf"]) == 2
    assert "--to=gguf: no such format; choose from hf, peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lora.rank=8", r"lora: checkpoint .*'rank': 4.* recipe .*'rank': 8"),
        ("lora.alpha=32.0", r"lora: checkpoint .*'alpha': 16.0"),
        ("lora.rank=0", r"lora: checkpoint .* recipe None"),
    ],
)
def test_a_run_does_not_go_on_with_other_adapters(
    straight: Result, folder: Path, override: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train(folder, f"other-{override}", override, f"model.load_full_state_path={straight.run_dir}")


def test_adapters_that_cannot_be_are_refused_before_training(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.modules: 'q_proj'"):
        train(folder, "refused", "lora.modules=[q_proj]")
    with pytest.raises(ValueError, match=r"optimizer\.trainable=\[mlp\]: lora\.rank=4 trains the adapters"):
        loaded(folder, "refused", "optimizer.trainable=[mlp]")
    with pytest.raises(ValueError, match=r"lora\.quantization_tile=48: .* has 32 inputs"):
        train(folder, "refused", "lora.base_quantization=int8", "lora.quantization_tile=48")
    assert not (folder / "refused").exists()


def test_a_base_that_is_written_to_is_not_saved(straight: Result, folder: Path) -> None:
    from pretrain.checkpointing import Identity

    recipe = loaded(folder, "unused").recipe
    config = load_preset("tiny-llama").replace(**dict(recipe.model.overrides))
    identity = Identity(config, recipe.model, "", 3, 4, adapters=recipe.lora).with_base(straight.state.params)
    identity.require_base(straight.state.params)
    touched = jax.tree.map(lambda leaf: leaf, straight.state.params)
    touched["decoder"]["decoder_norm"]["scale"] += 1e-7
    with pytest.raises(RuntimeError, match="base: its parameters changed in training"):
        identity.require_base(touched)
    assert dataclasses.replace(identity, base=None).with_base(straight.state.params) == identity


def on_eight_devices(text: str, quantization: str) -> None:
    """The same rows on one device, and on eight that split rows, inputs and heads."""
    folder = Path(text)
    given = ["train.steps=4", "checkpoint.enabled=false", "model.dropout_rate=0.0"]
    if quantization != "none":
        given += [f"lora.base_quantization={quantization}", "lora.quantization_tile=8"]
    one = train(folder, "one", *given, "mesh.num_devices=1", "train.per_device_batch_size=8")
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    eight = train(folder, "eight", *given, *mesh, "train.per_device_batch_size=1")
    np.testing.assert_allclose(losses(eight), losses(one), rtol=1e-5)
    assert losses(one)[-1] < losses(one)[0]
    pairs = [[leaf for _, leaf in flatten(lora.split(result.state.params)[1])] for result in (one, eight)]
    assert any(not leaf.is_fully_replicated for leaf in pairs[1])
    for ours, theirs in zip(*pairs, strict=True):
        # Adam divides by a gradient's own size, so a rounding may move a weight by a share of a step of 0.01.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("quantization", [pytest.param("none", marks=pytest.mark.slow), "nf4"])
def test_eight_devices_learn_as_one_does(run_on_devices: Callable[..., str], tmp_path: Path, quantization: str) -> None:
    write_inputs(tmp_path)
    run_on_devices(8, on_eight_devices, str(tmp_path), quantization)
