"""The shipped run files: they load, their rules fit the models, and sizes are as published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax
import pytest

from unimoe_jax.checkpoints.origins import origin_of
from unimoe_jax.config import MODULES, MeshConfig, RunConfig, StageConfig
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.parallel.sharding import (
    data_shards,
    make_mesh,
    param_sharding,
    planned_mesh,
    replicated,
    use_mesh,
)
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.optim import make_optimizer
from unimoe_jax.stages.stage import parameter_table
from unimoe_jax.train.dry_run import dry_run, memory

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
# Run files with the published sizes of Uni-MoE and of CuMo.
PUBLISHED = ("unimoe_audio", "unimoe_speech", "unimoe_speech_dp", "unimoe_8e")
CUMO = ("cumo_mistral_7b", "cumo_mixtral_8x7b")
STAGES = [
    (run, stage.name)
    for run in RUNS
    for stage in load_config(CONFIGS / "run" / f"{run}.yaml").stages
]


@cache
def load(run: str) -> RunConfig:
    return load_config(CONFIGS / "run" / f"{run}.yaml")


def stage_of(run: str, name: str) -> StageConfig:
    return next(stage for stage in load(run).stages if stage.name == name)


@cache
def table(run: str, stage: str) -> Mapping[str, ParamInfo]:
    """The parameter table of a stage."""
    config = load(run)
    with use_mesh(planned_mesh(config.mesh), config.mesh.rules):
        return parameter_table(resolve_stage(config, stage_of(run, stage)))


def count(infos: Mapping[str, ParamInfo], pattern: str) -> int:
    """Number of parameters whose path matches the whole pattern."""
    return sum(info.size for path, info in infos.items() if re.fullmatch(pattern, path))


# --------------------------------------------------------------------------- every run file


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_first_lines_say_how_to_use_the_file(path):
    comment = [line for line in path.read_text().splitlines()[:4] if line.startswith("#")]
    if path.parent.name == "run":
        assert comment[0] == f"# python -m unimoe_jax.train --config configs/run/{path.name}"
    else:
        folder = path.parent.name
        assert any(f"include: [../{folder}/{path.name}]" in line for line in comment)


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_rules_fit_the_model_and_the_mesh(run, stage):
    config, infos = load(run), table(run, stage)  # raises for unused or missing training rules
    mesh = planned_mesh(config.mesh)
    with use_mesh(mesh, config.mesh.rules):
        for path, info in infos.items():
            param_sharding(mesh, path, info.shape, info.axes)  # raises if it does not divide
        loader = resolve_stage(config, stage_of(run, stage)).loader
        sized = -1 not in (config.mesh.data, config.mesh.fsdp, config.mesh.expert)
        assert not sized or loader.rows % data_shards(mesh) == 0


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_every_rule_of_init_is_used_and_covers_every_parameter(run, stage):
    config = stage_of(run, stage)
    used = {id(origin_of(path, config.init)) for path in table(run, stage)}
    assert used == {id(take) for take in config.init}


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_every_adapter_rule_makes_adapters(run, stage):
    modules = {path.rsplit("/", 1)[0] for path in table(run, stage) if path.endswith("/lora_a")}
    rules = stage_of(run, stage).lora
    first = {
        next(rule.match for rule in rules if re.fullmatch(rule.match, module)) for module in modules
    }
    assert first == {rule.match for rule in rules}


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_a_list_of_expert_sources_has_one_for_each_expert(run, stage):
    for take in stage_of(run, stage).init:
        if take.experts:
            assert len(take.experts) == load(run).model.decoder.moe.num_experts


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_stages_that_train_encoders(run, stage):
    """Uni-MoE trains its encoders in the base stage, CuMo in all stages after the first."""
    encoders = {path for path in table(run, stage) if "/encoder/" in path}
    trained = {path for path in encoders if table(run, stage)[path].trained}
    assert encoders
    assert trained == (encoders if stage in ("base", "pft", "sft") else set())


@pytest.mark.parametrize(("run", "stage"), STAGES)
def test_upcycling_copies_from_a_dense_stage(run, stage):
    """Only experts are upcycled, and in the stage of their origin the layer is dense."""
    for path in table(run, stage):
        take = origin_of(path, stage_of(run, stage).init)
        if take.upcycle:
            assert "/moe/experts/" in path
            dense = table(run, take.upcycle)
            assert path not in dense
            assert not any(p.startswith(path.split("/moe/")[0] + "/moe/") for p in dense)


# ------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("run", "billions"),
    [
        ("unimoe_audio", 13.23),
        ("unimoe_speech", 19.72),
        ("unimoe_speech_dp", 13.23),
        ("unimoe_8e", 37.04),
        ("unimoe_union", 19.72),
    ],
)
def test_language_model_has_the_published_size(run, billions):
    infos = table(run, "tune")
    kernels = r"(decoder/.*|embed/.*|lm_head/.*)(?<!lora_a)(?<!lora_b)"
    assert count(infos, kernels) / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("run", [*PUBLISHED, "unimoe_union", *CUMO])
def test_first_lines_give_the_number_of_parameters(run):
    """The number is rounded to as many decimals as the comment has."""
    text = (CONFIGS / "run" / f"{run}.yaml").read_text()
    number = re.search(r"^#.* ([\d.]+) billion parameters", text, re.MULTILINE)[1]
    decimals = len(number.partition(".")[2])
    billions = count(table(run, load(run).stages[-1].name), ".*") / 1e9
    assert number == f"{billions:.{decimals}f}"


@pytest.mark.parametrize("run", [*PUBLISHED, "unimoe_union"])
def test_encoders_and_connectors_have_the_published_sizes(run):
    infos, model = table(run, "tune"), load(run).model
    # CLIP has 303,507,456 parameters; its last layer and norm are not used.
    last_clip_layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    post_norm = 2 * 1024
    assert count(infos, "vision/encoder/.*") == 303_507_456 - last_clip_layer - post_norm
    # LLaVA's mm_projector.bin: two layers with biases.
    assert count(infos, "vision/connector/.*") == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    if model.speech:
        assert count(infos, "speech/encoder/.*") == 88_154_112
        unused_word_embeddings = 51865 * 768
        assert count(infos, "speech/connector/.*") == 156_769_024 - unused_word_embeddings
    if model.audio:
        assert count(infos, "audio/encoder/.*") / 1e6 == pytest.approx(90.31, abs=0.005)
        assert count(infos, "audio/connector/.*") == 102_427_648


@pytest.mark.parametrize(
    ("run", "millions"),
    [
        ("unimoe_speech", 54.8),
        # The released 37.9 M include adapters of routers with 0.5 M, which are left out on purpose.
        ("unimoe_audio", 37.9 - 16 * 8 * (4096 + 4) / 1e6),
        ("unimoe_speech_dp", 37.9 - 16 * 8 * (4096 + 4) / 1e6),
        ("unimoe_8e", 8.4 + 92.8),
    ],
)
def test_adapters_of_stage_3_have_the_published_size(run, millions):
    assert count(table(run, "tune"), ".*/lora_[ab]") / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("run", PUBLISHED)
def test_stages_train_the_published_parameters(run):
    medium = "audio" if run == "unimoe_audio" else "speech"
    infos = table(run, "align")
    assert {p for p, i in infos.items() if i.trained} == {
        p for p in infos if p.startswith(f"{medium}/connector/")
    }
    infos = table(run, "tune")
    for path, info in infos.items():
        published = (
            path.endswith(("/lora_a", "/lora_b"))
            or "/router/" in path
            or path.startswith(("vision/connector/", f"{medium}/connector/projector/"))
        )
        assert info.trained == published, path


@pytest.mark.parametrize("run", PUBLISHED)
def test_experts_are_adapters_of_rank_64_on_feed_forward_layers(run):
    experts = [stage for stage in load(run).stages if stage.name.startswith("expert_")]
    assert len(experts) >= 2
    for stage in experts:
        adapters = {path for path in table(run, stage.name) if path.endswith("/lora_a")}
        assert {path.split("/")[-3] for path in adapters} == {"mlp"}
        assert {table(run, stage.name)[path].shape[-1] for path in adapters} == {64}
        assert stage.merge_lora


@pytest.mark.parametrize("run", PUBLISHED)
def test_optimizer_is_the_published_one(run):
    for stage in load(run).stages:
        optim = stage.optim
        rate = 2e-5 if stage.name == "align" else 4e-5
        epochs = 1 if stage.name.startswith("expert_") else 2
        assert (optim.learning_rate, optim.epochs) == (rate, epochs)
        assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 0)
        assert (optim.schedule, optim.warmup_ratio, optim.clip_norm) == ("cosine", 0.03, None)


SPOKEN = {"video_instruct", "race_spoken", "librispeech", "race_choice"}
SOUND = {"wavcaps", "audiocaps", "meld", "clotho_aqa", "clotho"}


@pytest.mark.parametrize(
    ("run", "sources"),
    [
        ("unimoe_speech", SPOKEN | {"llava_150k"}),
        ("unimoe_speech_dp", SPOKEN | {"llava_150k"}),
        ("unimoe_8e", SPOKEN | {"llava_665k"}),
        ("unimoe_audio", SOUND | {"video_instruct", "llava_150k"}),
    ],
)
def test_stage_3_reads_the_published_sources(run, sources):
    """The sources are in table 2 of arXiv 2405.11273.

    A mixture in a run file adds to the included mixture, so this also finds left-over sources.
    """
    tune = next(stage for stage in load(run).stages if stage.name == "tune")
    assert tune.mixture == dict.fromkeys(sources, 1.0)


def test_audio_expert_has_separate_learning_rates():
    infos = table("unimoe_audio", "expert_8")
    rates = {path: 4e-5 * info.lr for path, info in infos.items() if info.trained}
    assert {r for p, r in rates.items() if p.endswith(("lora_a", "lora_b"))} == {4e-4}
    rest = [r for p, r in rates.items() if not p.endswith(("lora_a", "lora_b"))]
    assert rest == pytest.approx([3e-5, 3e-5])


@pytest.mark.parametrize("run", PUBLISHED)
def test_longest_published_sample_fits_a_row(run):
    """2048 text tokens, one video and twenty chunks of sound."""
    config = load(run)
    soft = config.model.tokens_per_medium()
    medium = "audio" if run == "unimoe_audio" else "speech"
    assert config.data.loader.row_length >= 2048 + soft["video"] + 20 * soft[medium]
    assert config.data.loader.row_length <= config.model.decoder.max_positions


# ------------------------------------------------------------------------------------- CuMo


@pytest.mark.parametrize(
    ("run", "dense", "sparse"),
    [
        ("cumo_mistral_7b", 7_570_411_520, 8_250_388_480),
        ("cumo_mixtral_8x7b", 47_031_472_128, 47_711_449_088),
    ],
)
def test_cumo_has_the_published_sizes(run, dense, sparse):
    """The sizes are exact: counted in the originals, and logged by a public run of the 7B."""
    assert count(table(run, "pt"), ".*") == count(table(run, "pft"), ".*") == dense
    sft = table(run, "sft")
    assert count(sft, ".*") == sparse
    assert count(sft, "vision/encoder/.*") == 907_952_128
    assert count(sft, "vision/connector/.*") == 100_704_256
    assert count(table(run, "pft"), "vision/encoder/.*") == 303_505_408
    assert count(table(run, "pt"), "vision/connector/.*") == 25_174_016


@pytest.mark.parametrize("run", CUMO)
def test_cumo_stages_are_as_published(run):
    """Trained parameters, optimizers, templates, image aspects, row lengths, experts, losses."""
    pt, pft, sft = load(run).stages
    trained = {
        stage.name: {p for p, i in table(run, stage.name).items() if i.trained}
        for stage in (pt, pft, sft)
    }
    assert trained["pt"] == {p for p in table(run, "pt") if p.startswith("vision/connector/")}
    assert trained["pft"] == set(table(run, "pft")) and trained["sft"] == set(table(run, "sft"))
    last = 4e-6 if run == "cumo_mistral_7b" else 2e-6
    assert [stage.optim.learning_rate for stage in (pt, pft, sft)] == [1e-3, 2e-6, last]
    offloaded = 1.0 if run == "cumo_mixtral_8x7b" else None
    assert [stage.optim.clip_norm for stage in (pt, pft, sft)] == [None, offloaded, 1.0]
    for stage in (pt, pft, sft):
        optim = stage.optim
        assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.999, 1e-8, 0)
        assert (optim.schedule, optim.warmup_ratio, optim.epochs) == ("cosine", 0.03, 1)
    template = load(run).data.template
    assert [stage.template or template for stage in (pt, pft, sft)] == [
        "plain",
        "mistral_instruct_system",
        "mistral_instruct_system",
    ]
    models = [load(run).stage_model(stage) for stage in (pt, pft, sft)]
    assert [model.vision.aspect for model in models] == ["square", "pad", "pad"]
    lengths = [resolve_stage(load(run), stage).loader.row_length for stage in (pt, pft, sft)]
    assert lengths == [2048, 4096, 4096]
    # Mixtral's decoder has experts in every stage.
    decoder = {"decoder"} if run == "cumo_mixtral_8x7b" else set()
    assert [set(model.experts()) for model in models] == [
        decoder,
        decoder,
        {"encoder", "connector"} | decoder,
    ]
    for module in MODULES:
        losses = getattr(sft.aux, module)
        wanted = (0.1, 0.01) if module in models[2].experts() else (0.0, 0.0)
        assert (losses.balance, losses.router_z, losses.balance_layers) == (*wanted, "mean")
    others = [getattr(stage.aux, module) for stage in (pt, pft) for module in MODULES]
    assert not any(losses.balance or losses.router_z for losses in others)


# ---------------------------------------------------------------------------------- dry run


def test_dry_run_without_data_and_devices(capsys, monkeypatch, tmp_path):
    """It prints sizes, memory and missing files for eight devices that this machine lacks."""
    config = load("unimoe_8e")
    monkeypatch.chdir(tmp_path)
    dry_run(config)
    text = capsys.readouterr().out
    tune = text[text.index("stage tune") :]
    assert re.search(r"moe/experts/gate_proj/kernel +32×8×4096×11008 +bfloat16 +-, expert", tune)
    assert re.search(r"language model +37[,.]\d+", tune)
    memory = float(re.findall(r"sum +([\d.]+) GiB", tune)[-1])
    # A device holds an eighth of the experts and all other parameters in bfloat16, and little else.
    assert 13.4 < memory < 20
    assert "data/llava_665k.json is not here" in text
    assert "checkpoints/vicuna-7b is not here" in tune


@pytest.mark.parametrize(("dtype", "gib"), [("float32", 2), ("bfloat16", 1)])
def test_dry_run_counts_gradients_and_moments_in_their_dtype(dtype: str, gib: int):
    """The optimizer makes two moments for each of 2²⁹ numbers, and the dry run counts the same."""
    config = load("tiny")
    stage, info = config.stages[0], ParamInfo("w", (2**29,), (None,), 1.0, True, dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    text = memory(resolve_stage(config, stage), {"w": info}, {"w": replicated(mesh)}, 1)
    printed = {n.strip(): float(size) for n, size in re.findall(r"(.*\S) +([\d.]+) GiB", text)}
    optimizer = make_optimizer(stage.optim, lambda step: 1.0, {"w": info})
    state = jax.eval_shape(optimizer.init, {"w": jax.ShapeDtypeStruct(info.shape, dtype)})
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert printed["optimizer moments"] == moments / 2**30 == 2 * gib
    assert printed["gradients"] == printed["trained parameters"] == gib
