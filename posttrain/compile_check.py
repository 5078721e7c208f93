"""`posttrain check --compile`: the memory of a device by phase, as reckoned from shapes and as XLA compiles the step.

The work is `posttrain.abstract_step`'s, in a process of its own: JAX fixes its devices when it starts, so fake ones
for the recipe's mesh need a fresh process. It is bounded in time, and its memory is given back.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.verbs.check import wrapped
from recipes.load import LoadedRecipe, dump_recipe
from recipes.schema import MESH_AXES, MeshSection, TrainingRecipe

USUAL_DEVICES = 8
"""Where neither the recipe nor the command line says how many: those of a common accelerator host."""
TIMEOUT_SECONDS = 300.0
ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
WHAT = 34
"""Columns of the table's first column; each phase has 12 more."""


def check_compile(
    loaded: LoadedRecipe, *, devices: int | None, device_memory_gib: float | None, timeout: float | None
) -> bool:
    """Prints what a step of the recipe takes.

    Args:
        loaded: a recipe that trains.
        devices: for a mesh that takes what there is; None is USUAL_DEVICES.
        device_memory_gib: of each; None compares with nothing.
        timeout: seconds that lowering and compiling may take; None is TIMEOUT_SECONDS.

    Returns:
        Whether the step fits; True where no memory is given.

    Raises:
        ValueError: the recipe does not fit its model or mesh, or the work took too long or broke.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, TrainingRecipe), recipe.kind
    for name, value in (("--device-memory-gib", device_memory_gib), ("--timeout", timeout)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value:g}: an amount above 0; correct it")
    count, notes = mesh_devices(recipe.mesh, devices)
    start = time.perf_counter()
    found = ask(loaded, count, TIMEOUT_SECONDS if timeout is None else timeout)
    found["assumptions"] = notes + found["assumptions"]
    seconds = time.perf_counter() - start
    for line in report_lines(loaded, found, device_memory_gib, seconds):
        print(line)
    too_large = excess(found, device_memory_gib)
    return not too_large


def mesh_devices(mesh: MeshSection, asked: int | None) -> tuple[int, list[str]]:
    """How many devices a mesh has, and what that assumes.

    Raises:
        ValueError: the command line asks for another number than the recipe.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1) * mesh.dcn_data
    free = next((axis for axis, size in sizes.items() if size == -1), None)
    said = mesh.num_devices if mesh.num_devices is not None else fixed if free is None else None
    if said is not None:
        if asked is not None and asked != said:
            key = "mesh.num_devices" if mesh.num_devices is not None else "the product of the mesh's axes"
            raise ValueError(f"--devices={asked}: {key} is {said}; remove --devices, or change the mesh")
        return said, []
    if asked is not None:
        return asked, []
    count = -(-USUAL_DEVICES // fixed) * fixed
    return count, [f"mesh.{free}=-1 takes what devices there are: {count} (--devices N for another number)"]


def ask(loaded: LoadedRecipe, devices: int, timeout: float) -> dict[str, Any]:
    """Lowers and compiles in a process with so many fake devices.

    Raises:
        ValueError: it took too long, or broke, or the recipe does not fit.
    """
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    try:
        with tempfile.TemporaryDirectory(prefix="posttrain-check-") as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(dump_recipe(loaded.recipe), encoding="utf-8")
            command = [sys.executable, "-m", "posttrain.abstract_step", str(recipe)]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{loaded.source}: --timeout={timeout:g}: lowering and compiling for {devices} devices took longer; raise "
            "it, lower --devices, or set model.scan_layers=true, which keeps the time flat in the number of layers"
        ) from None
    if done.returncode != 0:
        sys.stderr.write(done.stderr[-4000:])
        ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with code {done.returncode}"
        raise ValueError(
            f"{loaded.source}: --compile: the process that lowers and compiles ended {ended}; its last words are above"
        )
    found = json.loads(done.stdout.rstrip().splitlines()[-1])
    if "error" in found:
        raise ValueError("\n".join(f"{loaded.source}: {line}" for line in found["error"].splitlines()))
    return found


# --- the report ---


def report_lines(
    loaded: LoadedRecipe, found: dict[str, Any], device_memory_gib: float | None, seconds: float
) -> Iterator[str]:
    """The table, what it assumes, and whether it fits."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "no axis is split"
    count = found["num_devices"]
    yield (f"{loaded.source}: {found['parameters']:,} parameters on {count} device{'s' * (count != 1)} ({mesh})")
    if found["assumptions"]:
        yield "assumed:"
        for note in found["assumptions"]:
            yield wrapped(f"- {note}")
    yield ""
    unit = unit_of(found, device_memory_gib)
    yield f"{unit[0] + ' of a device':<{WHAT}}" + "".join(f"{phase:>12}" for phase in found["phases"])
    yield from table_lines(found, device_memory_gib, unit)
    yield ""
    yield from xla_lines(found, unit)
    yield ""
    yield from verdict_lines(found, device_memory_gib)
    yield f"lowered and compiled in {seconds:.0f} s; nothing was run"


Unit = tuple[str, int]
"""A name and its bytes."""


def unit_of(found: dict[str, Any], device_memory_gib: float | None) -> Unit:
    """What figures of this size are read in."""
    return ("GiB", GIB) if max(phase_sums(found, device_memory_gib).values()) >= GIB else ("MiB", MIB)


def table_lines(found: dict[str, Any], device_memory_gib: float | None, unit: Unit) -> Iterator[str]:
    """Each role by phase, and their sum."""
    phases = found["phases"]
    for entry in found["entries"]:
        name = entry["what"] if entry["exact"] else f"{entry['what']} *"
        yield row(name, [entry["sizes"].get(phase) for phase in phases], unit)
    share = found["memory_share"]
    if share is not None and device_memory_gib is not None:
        yield row(f"sampler: vLLM, {100 * share:.0f} %", [round(share * device_memory_gib * GIB)] * len(phases), unit)
    sums = phase_sums(found, device_memory_gib)
    yield row("sum", [sums[phase] for phase in phases], unit)
    if share is not None and device_memory_gib is None:
        yield wrapped(
            f"beside it vLLM takes {100 * share:.0f} % of a device's memory (sampler.memory_share); "
            "--device-memory-gib X adds it up"
        )
    yield wrapped("* an estimate; the other rows follow from shapes")


def phase_sums(found: dict[str, Any], device_memory_gib: float | None) -> dict[str, int]:
    """Bytes of a device in each phase, the sampler's share included where the memory is known."""
    sampler = round((found["memory_share"] or 0.0) * (device_memory_gib or 0.0) * GIB)
    return {
        phase: sampler + sum(entry["sizes"].get(phase, 0) for entry in found["entries"]) for phase in found["phases"]
    }


def xla_lines(found: dict[str, Any], unit: Unit) -> Iterator[str]:
    """What XLA says of each program."""
    programs = {program["phase"]: program for program in found["programs"]}

    def line(name: str, size_of: Callable[[dict[str, Any]], int]) -> str:
        return row(name, [size_of(programs[phase]) if phase in programs else None for phase in found["phases"]], unit)

    yield f"XLA's figures, lowered for CPU ({unit[0]})"
    yield line("arguments", lambda program: program["argument"])
    yield line("results beside them", lambda program: max(0, program["output"] - program["alias"]))
    yield line("temporaries", lambda program: program["temp"])
    yield line("sum", xla_bytes)
    if any(program["host_argument"] for program in programs.values()):
        yield line("on the host: arguments", lambda program: program["host_argument"])
    if found["bfloat16"]:
        yield wrapped(
            "A CPU multiplies bfloat16 in float32, and keeps float32 copies of what it multiplies: there temporaries "
            "are larger than on an accelerator."
        )


def xla_bytes(program: dict[str, Any]) -> int:
    """Bytes of a device while a program runs, as XLA has them; donated arguments hold their results."""
    return program["argument"] + max(0, program["output"] - program["alias"]) + program["temp"]


def verdict_lines(found: dict[str, Any], device_memory_gib: float | None) -> Iterator[str]:
    """Whether it fits."""
    sums = phase_sums(found, device_memory_gib)
    phase = max(sums, key=lambda name: sums[name])
    name, size = unit_of(found, device_memory_gib)
    need = f"{sums[phase] / size:,.2f} {name} a device, in the {phase} phase"
    if device_memory_gib is None:
        yield wrapped(f"verdict: the most is {need}")
    elif sums[phase] <= device_memory_gib * GIB:
        yield wrapped(f"verdict: fits: {need}, of --device-memory-gib={device_memory_gib:g}")
    else:
        yield wrapped(
            f"warning: does not fit: {need}, of --device-memory-gib={device_memory_gib:g}; use more devices, "
            f"{remedies(found)}"
        )


def remedies(found: dict[str, Any]) -> str:
    """What would take less."""
    known = (
        "train.per_device_batch_size, model.remat=full, optimizer.memory=pinned_host, or adapters (lora.rank), whose "
        "base may rest in model.param_dtype=bfloat16"
    )
    return known if found["memory_share"] is None else f"a lower sampler.memory_share, {known}"


def excess(found: dict[str, Any], device_memory_gib: float | None) -> bool:
    """Whether the largest phase is beyond a device's memory."""
    if device_memory_gib is None:
        return False
    return max(phase_sums(found, device_memory_gib).values()) > device_memory_gib * GIB


def row(name: str, sizes: list[int | None], unit: Unit) -> str:
    """A line of a table."""
    cells = ("-" if size is None else f"{size / unit[1]:,.2f}" for size in sizes)
    return f"{name:<{WHAT}}" + "".join(f"{cell:>12}" for cell in cells)
