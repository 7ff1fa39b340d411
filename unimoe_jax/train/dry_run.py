"""Show what a run would do without compiling anything: parameters, memory, rendered samples."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.origins import CHECKPOINT, needed_sources
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import DataConfig, RunConfig
from unimoe_jax.config.load import dump_config, run_dir
from unimoe_jax.config.stage_settings import StageSettings, resolve_stages
from unimoe_jax.data.sources import PREFIX, load_tokenizer, resolve_sources
from unimoe_jax.nn.head import block_size
from unimoe_jax.parallel.placement import bytes_per_device
from unimoe_jax.parallel.sharding import data_shards, param_sharding, planned_mesh, use_mesh
from unimoe_jax.params.table import ParamInfo, describe
from unimoe_jax.stages.data import stage_pipeline
from unimoe_jax.stages.stage import parameter_table
from unimoe_jax.train.preflight import check_start, promised

SAMPLES = 3
GIB = 2**30


def dry_run(config: RunConfig, only: str | None = None) -> None:
    """Print the resolved settings and, per stage (or only for the stage `only`), the parameter
    table, the memory per device, the token budget per modality and three rendered samples.

    Sources whose files are not on this machine are listed and left out, so that a run file can be
    checked far from its data.

    Raises:
        CheckpointError, ConfigError, ParamError, ShardingError: settings that could not run.
    """
    print(dump_config(config))
    mesh = planned_mesh(config.mesh)
    print(f"mesh {dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))}\n")
    data, missing = _split_missing(config.data)
    for name, path in missing.items():
        print(f"data.sources.{name}: {path} is not here; its samples are not shown")
    tokenizer_here = config.tokenizer == "embedded" or Path(config.tokenizer).exists()
    if not tokenizer_here:
        print(f"tokenizer: {config.tokenizer} is not here; no samples are shown")
    layout, to_come = RunLayout(run_dir(config)), _unknown_sources(config)
    with use_mesh(mesh, config.mesh.rules):
        for settings in resolve_stages(config):
            infos = parameter_table(settings)
            to_come[settings.name] = promised(settings, infos)
            if only not in (None, settings.name):
                continue
            print(f"\n{'=' * 12} stage {settings.name} {'=' * 12}")
            groups = settings.pool_groups(data_shards(mesh))
            check_start(settings, infos, layout, to_come)
            shardings = {
                path: param_sharding(mesh, path, info.shape, info.axes)
                for path, info in infos.items()
            }
            print(describe(infos, shardings))
            print(origins(config, settings))
            print(components(infos))
            print(memory(settings, infos, shardings, data_shards(mesh)))
            if tokenizer_here and not missing.keys() & settings.config.mixture.keys():
                print(_samples(config, settings, data, groups))


def _split_missing(data: DataConfig) -> tuple[DataConfig, dict[str, str]]:
    """(the data without sources whose file is not here, the paths of those sources by name)."""
    missing = {
        name: source.path
        for name, source in data.sources.items()
        if not source.path.startswith(PREFIX) and not Path(source.path).is_file()
    }
    kept = {name: s for name, s in data.sources.items() if name not in missing}
    return resolve_sources(data.model_copy(update={"sources": kept})), missing


def _unknown_sources(config: RunConfig) -> dict[str, ParamSource | None]:
    """Checkpoints that are not on this machine, so that nothing is known about them."""
    takes = [take for stage in config.stages for take in stage.init]
    names = [name for name in needed_sources(takes) if name.startswith(CHECKPOINT)]
    return {n: None for n in names if not Path(n.removeprefix(CHECKPOINT)).expanduser().is_dir()}


def origins(config: RunConfig, settings: StageSettings) -> str:
    """Where the parameters start: the rules of `init`, in the order in which they are tried."""
    stages = {stage.name for stage in config.stages}
    lines = []
    for take in settings.config.init:
        for name in take.origins:
            folder = Path(name.removeprefix(CHECKPOINT)).expanduser()
            here = name == "fresh" or name in stages or folder.is_dir()
            label = name if here else f"{folder} is not here"
            label += " (every expert)" if take.upcycle else ""
            lines.append(f"  {take.match:<48}{label}")
    return "starts from\n" + "\n".join(lines) + "\n"


def components(infos: dict[str, ParamInfo]) -> str:
    """Millions of parameters by part of the model: all of them, and the trained ones."""
    total: dict[str, int] = {}
    trained: dict[str, int] = {}
    for path, info in infos.items():
        first, second, *_ = path.split("/")
        name = f"{first} {second}" if second in ("encoder", "connector") else "language model"
        total[name] = total.get(name, 0) + info.size
        trained[name] = trained.get(name, 0) + info.trained * info.size
    rows = [*total.items(), ("sum", sum(total.values()))]
    trained["sum"] = sum(trained.values())
    head = f"{'millions of parameters':<40}{'all':>10}{'trained':>12}"
    lines = [f"  {name:<38}{n / 1e6:>10,.1f}{trained[name] / 1e6:>12,.1f}" for name, n in rows]
    return "\n".join([head, *lines]) + "\n"


def memory(
    settings: StageSettings, infos: dict[str, ParamInfo], shardings: dict, shards: int
) -> str:
    """Estimate of the memory per device, as a table.

    Parameters, gradients and optimizer moments, which have the dtype of their parameters, are
    exact. Activations are estimated as the inputs of every layer, which rematerialisation keeps,
    and a block of logits twice in float32.
    """

    def total(trained: bool) -> int:
        """Bytes per device of the trained or of the frozen parameters."""
        return bytes_per_device(
            {
                path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=shardings[path])
                for path, info in infos.items()
                if info.trained is trained
            }
        )

    tokens = settings.loader.rows * settings.loader.row_length // shards
    decoder = settings.model.decoder
    width = jnp.dtype(settings.precision.compute).itemsize
    layer_inputs = tokens * decoder.hidden_size * decoder.num_layers * width
    sizes = {
        "frozen parameters": total(False),
        "trained parameters": total(True),
        "gradients": total(True),
        "optimizer moments": 2 * total(True),
        "layer inputs (estimate)": layer_inputs,
        "logits of a block (estimate)": 2 * 4 * block_size(tokens) * decoder.vocab_size,
    }
    lines = [f"  {name:<38}{size / GIB:>10.3f} GiB" for name, size in sizes.items()]
    lines.append(f"  {'sum':<38}{sum(sizes.values()) / GIB:>10.3f} GiB")
    return "memory per device\n" + "\n".join(lines)


def _samples(config: RunConfig, settings: StageSettings, data: DataConfig, groups: int) -> str:
    """Steps and tokens per epoch, and a few samples as the model sees them."""
    tokenizer, _ = load_tokenizer(config)
    pipeline = stage_pipeline(settings, data, tokenizer, groups)
    lines = [f"{pipeline.steps_per_epoch} steps per epoch, tokens per epoch by modality:"]
    lines += [f"  {name:<8}{count:>14,}" for name, count in pipeline.token_budget().items()]
    return "\n".join([*lines, "", *pipeline.preview(SAMPLES)])
