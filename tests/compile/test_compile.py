"""Ahead-of-time compilation: what compiled programs do, what a model needs, the program itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimoe_jax.compile.__main__ import PROGRAMS, main
from unimoe_jax.compile.decoding import decoding_program
from unimoe_jax.compile.flops import jaxpr_flops, step_flops
from unimoe_jax.compile.hlo import Array, group_size, read
from unimoe_jax.compile.hlo_memory import activation_bytes, occupied
from unimoe_jax.compile.measure import assumed_batch, parse_media
from unimoe_jax.compile.summary import report_path, verdict
from unimoe_jax.compile.targets import target_devices
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.nn.attention.packed import attend_packed, tiles_of
from unimoe_jax.parallel.sharding import ShardingError, make_mesh, use_mesh

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests/parallel/multihost.yaml"


# --------------------------------------------------------------------------- compiled programs


def stats_of(function, *shapes, **options):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read(jax.jit(function, **options).lower(*structs).compile().as_text())


def test_products_count_as_often_as_their_loop_runs():
    def layers(x, w_L):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_L)[0]

    stats = stats_of(layers, (16, 32), (5, 32, 32))
    assert stats.flops == 5 * 2 * 16 * 32 * 32
    assert stats.loops_unknown == 0


def test_loops_of_unknown_length_are_kept_apart():
    def rows(x, w, n):
        return jax.lax.fori_loop(0, n.astype(int)[0], lambda i, x: jnp.tanh(x @ w) + i, x)

    stats = stats_of(rows, (16, 32), (32, 32), (1,))
    assert (stats.flops, stats.flops_unknown) == (0, 2 * 16 * 32 * 32)
    assert stats.loops_unknown == 1


def test_convolutions_count_the_elements_that_meet():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2,), [(1, 1)])

    # 8 positions, a kernel of 3 with stride 2: the first of 4 windows reaches into the padding.
    stats = stats_of(convolve, (2, 5, 8), (7, 5, 3))
    assert stats.flops == 2 * 2 * 7 * 5 * (2 + 3 + 3 + 3)


def test_collectives_have_bytes_groups_and_runs(devices):
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def exchange(x):
        def body(x, _):
            return jax.lax.all_to_all(x, "b", 0, 0, tiled=True) + 1, None

        def local(x):
            x, _ = jax.lax.scan(body, x, None, length=3)
            return jax.lax.psum(x, "a")

        return jax.shard_map(
            local, mesh=mesh, in_specs=PartitionSpec("b"), out_specs=PartitionSpec("b")
        )(x)

    sharding = NamedSharding(mesh, PartitionSpec("b"))
    stats = stats_of(exchange, (64, 32), in_shardings=sharding, out_shardings=sharding)
    found = {(one.op, one.bytes, one.group, one.count) for one in stats.collectives}
    local = 16 * 32 * 4
    assert found == {("all-to-all", local, 4, 3), ("all-reduce", local, 2, 1)}
    assert not any(one.conditional for one in stats.collectives)


@pytest.mark.parametrize(
    "groups,size",
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", 2),
        ("mesh['a'=2,'b'=4], device_ids=([8]) {'a','b'}", 8),
    ],
)
def test_groups_are_counted_in_every_notation(groups, size):
    assert group_size(f"(%x), channel_id=14, replica_groups={groups}, dimensions={{1}}") == size


# As a TPU compiler writes it: products are convolutions, groups name axes of a mesh, loops carry no
# count, one collective is spread over two fusions.
TPU = """HloModule jit_step

%start.1 (p: bf16[16,64]) -> bf16[32,64] {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={0}
}

%done.1 (q: bf16[16,64]) -> bf16[32,64] {
  %q = bf16[16,64]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,64]{1,0} all-gather(%q), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={0}
}

%body.1 (b: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %b = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%b), index=1
  %f.1 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%start.1
  %f.2 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%done.1
  %c = bf16[16,32]{1,0} convolution(%x, %f.2), dim_labels=bf_oi->bf
  %more = s32[]{:T(128)} constant(1)
  %k.1 = s32[]{:T(128)} copy(%i)
  %k.2 = s32[]{:T(128)} add(%k.1, %more)
  ROOT %t = (s32[]{:T(128)}, bf16[16,64]{1,0}) tuple(%k.2, %x)
}

%condition.1 (k: (s32[], bf16[16,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  %k = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%k), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %a = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, bf16[16,64]{1,0}) while(%a), condition=%condition.1, body=%body.1
}
"""


# A product that passes parts of an operand round its devices takes two of them in a trip.
@pytest.mark.parametrize(("step", "limit", "trips"), [(1, 6, 6), (2, 6, 3), (2, 5, 3)])
def test_tpu_programs_are_read(step, limit, trips):
    text = TPU.replace("constant(1)", f"constant({step})")
    stats = read(text.replace("constant(6)", f"constant({limit})"))
    assert stats.flops == trips * 2 * 16 * 32 * 64
    (gather,) = stats.collectives
    assert (gather.op, gather.bytes, gather.group, gather.count) == ("all-gather", 4096, 2, trips)


def test_tpu_loops_that_count_by_what_they_carry_are_kept_apart():
    stats = read(TPU.replace("add(%k.1, %more)", "add(%k.1, %k.1)"))
    assert (stats.flops, stats.loops_unknown) == (0, 1)


# As a GPU's compiler writes it: products are calls of a library, with its room as a second result.
GPU = """HloModule jit_step

ENTRY %main (a: bf16[16,64], b: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm.1 = (bf16[16,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %c = bf16[16,32]{1,0} get-tuple-element(%gemm.1), index=0
}
"""


def test_gpu_programs_are_read():
    assert read(GPU).flops == 2 * 16 * 32 * 64


# ---------------------------------------------------------------------------- memory in classes

LAYERS, ROWS, WIDTH = 5, 16, 64


def layers_loss(remat: bool, w_L, x):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T)

    def one(x, w):
        return (jax.checkpoint(layer) if remat else layer)(x, w), None

    return jnp.sum(jax.lax.scan(one, x, w_L)[0] ** 2)


def activations_of(function, *shapes) -> int:
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return activation_bytes(jax.jit(function).lower(*structs).compile().as_text())


def test_activations_are_what_layers_keep_for_the_backward_pass():
    def found(remat: bool) -> int:
        grad = jax.grad(lambda w_L, x: layers_loss(remat, w_L, x))
        return activations_of(grad, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))

    one = ROWS * WIDTH * 4
    # The input of every layer, and what the loss hands back.
    assert LAYERS * one <= found(True) <= (LAYERS + 1) * one + 64
    # Without recomputation the result of both tanh as well.
    assert found(False) >= 3 * LAYERS * one


def test_activations_of_micro_batches_are_those_of_one():
    def step(w_L, x_M):
        def one(total, x):
            return total + jax.grad(lambda w_L: layers_loss(True, w_L, x))(w_L), None

        return jax.lax.scan(one, jnp.zeros_like(w_L), x_M)[0]

    found = activations_of(step, (LAYERS, WIDTH, WIDTH), (3, ROWS, WIDTH))
    assert LAYERS * ROWS * WIDTH * 4 <= found <= (LAYERS + 1) * ROWS * WIDTH * 4 + 64


# Two loops as a TPU compiler writes them: room without a value, one constant for both passes, and a
# combined collective that makes a forward operation depend on a backward one.
LOOPS = """HloModule jit_step

%fill.1 (a: f32[4,16]) -> f32[4,16] {
  ROOT %a = f32[4,16]{1,0} parameter(0)
}

%body.1 (b: (f32[16], f32[4,16])) -> (f32[16], f32[4,16]) {
  %b = (f32[16]{0}, f32[4,16]{1,0}) parameter(0)
  %z = f32[] constant(0), metadata={op_name="jit(step)/transpose(jvp(M))/zeros"}
  %x = f32[16]{0} get-tuple-element(%b), index=0
  %s = f32[4,16]{1,0} get-tuple-element(%b), index=1
  %f = f32[4,16]{1,0} fusion(%s), kind=kLoop, calls=%fill.1, metadata={op_name="jit(step)/jvp(M)/d"}
  ROOT %t = (f32[16]{0}, f32[4,16]{1,0}) tuple(%x, %f)
}

%condition.1 (c: (f32[16], f32[4,16])) -> pred[] {
  %c = (f32[16]{0}, f32[4,16]{1,0}) parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (w: f32[16]) -> f32[16] {
  %w = f32[16]{0} parameter(0)
  %room = f32[4,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %sums = f32[64,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %early = f32[16]{0} negate(%w), metadata={op_name="jit(step)/transpose(jvp(M))/neg"}
  %both = f32[16]{0} all-reduce(%early), metadata={op_name="jit(step)/jvp(M)/pmax"}
  %t.1 = (f32[16]{0}, f32[4,16]{1,0}) tuple(%both, %room)
  %w.1 = (f32[16]{0}, f32[4,16]{1,0}) while(%t.1), condition=%condition.1, body=%body.1, \
metadata={op_name="jit(step)/jvp(M)/while"}
  %kept = f32[4,16]{1,0} get-tuple-element(%w.1), index=1
  %same = f32[16]{0} get-tuple-element(%w.1), index=0
  %back = f32[64,64]{1,0} fusion(%kept, %sums, %w), kind=kLoop, calls=%fill.1, \
metadata={op_name="jit(step)/transpose(jvp(M))/while"}
  ROOT %out = f32[16]{0} add(%back, %w)
}
"""


def test_activations_of_tpu_programs():
    assert activation_bytes(LOOPS) == 4 * 16 * 4


def test_no_activations_without_a_backward_pass():
    shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    assert activations_of(lambda w_L, x: layers_loss(True, w_L, x), *shapes) == 0


def test_tpus_pad_what_they_hold():
    assert occupied(Array("f32", (3, 5, 1), "2,1,0:T(8,128)")) == 3 * 8 * 128 * 4
    assert occupied(Array("bf16", (3, 1, 5), "1,2,0:T(8,128)(2,1)")) == 3 * 128 * 8 * 2
    assert occupied(Array("bf16", (3, 5, 1), "2,1,0:T(8,128)(2,1)S(1)")) == 0


# --------------------------------------------------------------------------- what a model needs


def test_products_of_a_trace():
    def layers(x, w_L):
        def one(x, w):
            return jax.checkpoint(lambda x: jnp.einsum("bd,df->bf", x, w))(x), None

        return jax.lax.scan(one, x, w_L)[0]

    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))
    assert jaxpr_flops(jax.make_jaxpr(layers)(x, w)) == 3 * 2 * 4 * 8 * 8


def test_neither_count_holds_what_attention_does_between_tiles():
    def attended(q, k, v, mask):
        tiles = tiles_of(mask, jnp.ones(mask.shape[:2], bool))
        return attend_packed(q, k, v, tiles, scale=1.0) @ jnp.eye(8)[None, None]

    heads = ((2, 100, 1, 8),) * 3
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in heads]
    mask = jax.ShapeDtypeStruct((2, 100, 100), bool)
    needed = jaxpr_flops(jax.make_jaxpr(attended)(*structs, mask))
    assert needed == 2 * 200 * 8 * 8
    stats = read(jax.jit(attended).lower(*structs, mask).compile().as_text())
    # Two tiles of queries; in a trip, two products of 64 positions with 64.
    assert (stats.flops, stats.loops_unknown) == (needed, 1)
    assert stats.flops_unknown == 2 * (2 * 2 * (2 * 64 * 64 * 8))


def test_experts_need_top_k_times_a_layer():
    run = load_config(CONFIG)
    stage = run.stages[0].model_copy(update={"lora": ()})
    spec, _ = assumed_batch(resolve_stage(run, stage), 1, None)
    total, experts, head = step_flops(resolve_stage(run, stage), spec)
    decoder, tokens = run.model.decoder, np.prod(spec.token_id_BT.shape)
    kernels = 3 * decoder.hidden_size * decoder.mlp_dim
    # Frozen experts: forward and the gradient of their input, no gradient of weights.
    assert experts == decoder.moe.top_k * 2 * (2 * tokens * kernels)
    assert head == 2 * (2 * tokens * decoder.hidden_size * decoder.vocab_size)
    three = decoder.model_copy(update={"moe": decoder.moe.model_copy(update={"top_k": 3})})
    more = run.model_copy(update={"model": run.model.model_copy(update={"decoder": three})})
    assert step_flops(resolve_stage(more, stage), spec).total - total == pytest.approx(experts / 2)


# --------------------------------------------------------------------------------- the program


def test_batches_are_half_soft_tokens_unless_told():
    run = load_config(CONFIG)
    spec, media = assumed_batch(resolve_stage(run, run.stages[0]), 4, None)
    assert spec.token_id_BT.shape == (8, 64)
    # Four groups of 128 positions: 64 for two media of 16 tokens.
    assert media == {"image": 2, "video": 2}
    assert spec.image_GIHWC.shape == (4, 2, 48, 48, 3)
    assert parse_media("image=3", run.model) == {"image": 3}
    assert assumed_batch(resolve_stage(run, run.stages[0]), 4, {"image": 3})[0].video_GIFHWC is None


def test_only_optimizer_steps_hold_micro_batches():
    run = load_config(CONFIG, ["stages.tune.optim.accumulate=3"])
    rows = {
        program: assumed_batch(resolve_stage(run, run.stages[0]), 4, None, program)[
            0
        ].token_id_BT.shape[0]
        for program in ("train", "score")
    }
    assert rows == {"train": 24, "score": 8}


@pytest.mark.parametrize(
    "text", ["image", "image=x", "sound=1", "image=1,", "image=0", "image=1,image=2"]
)
def test_bad_media_are_refused(text):
    with pytest.raises(ConfigError, match="NAME=COUNT"):
        parse_media(text, load_config(CONFIG).model)


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5p", "cpu:x", "v5p:2by2", "h200:2x4", "cpu:0", "h200:0", "v5e:0x4"]
)
def test_bad_topologies_are_refused(topology):
    with pytest.raises(ConfigError, match="KIND:SHAPE"):
        target_devices(topology)


@pytest.mark.parametrize("flag", ["--rows", "--length"])
@pytest.mark.parametrize("text", ["0", "-4", "x"])
def test_sizes_of_generation_count_something(flag, text, capsys):
    command = ["--config", str(CONFIG), "--topology", "cpu:1", "--program", "decode"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"{flag}={text}"])
    assert stopped.value.code == 2
    assert f"argument {flag}: {text!r} is not a whole number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "x"])
def test_a_device_has_memory(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(CONFIG), "--topology", "cpu:1", f"--memory={text}"])
    assert stopped.value.code == 2
    assert f"argument --memory: {text!r} is not a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--hlo"])
def test_targets_are_checked_before_compiling(flag, devices, tmp_path, capsys, monkeypatch):
    def compile_program(*_):
        raise AssertionError("compiles before it looks where results go")

    monkeypatch.setattr("unimoe_jax.compile.measure.compile_program", compile_program)
    monkeypatch.setattr(
        "unimoe_jax.compile.__main__.set_effort", lambda name: None
    )  # of this process
    monkeypatch.setattr("unimoe_jax.compile.__main__.target_devices", lambda topology: devices)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for target, said in ((tmp_path, "is a folder"), (tmp_path / "file/x", "cannot be made")):
        arguments = ["--config", str(CONFIG), "--topology", "cpu:8", flag, str(target)]
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {flag} {target}: ") and said in line


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_cache_must_divide_over_the_mesh(devices, program):
    """Kernels do where heads do not: the run can be trained so, but not served."""
    run = load_config(CONFIG, ["mesh={data: 1, tensor: 2}"])
    mesh = make_mesh(run.mesh, devices[:2])
    said = r"^model.decoder.num_kv_heads = 1 does not divide over mesh.tensor = 2; allowed: 1 "
    with use_mesh(mesh.abstract_mesh), pytest.raises(ShardingError, match=said):
        decoding_program(
            resolve_stage(run, run.stages[0]), mesh, run.mesh.rules, program, rows=2, length=8
        )


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_a_cache_is_cut_once_over_an_axis(devices, program):
    """Before any weight is placed: parameters have no rows, so their own checks pass."""
    rules = "mesh={data: 2, rules: {batch: data, kv_heads: data}}"
    run = load_config(CONFIG, [rules, "model.decoder.num_kv_heads=2"])
    mesh = make_mesh(run.mesh, devices[:2])
    said = "the cache of keys and values: .*; change mesh.rules.batch or mesh.rules.kv_heads"
    with use_mesh(mesh.abstract_mesh, run.mesh.rules), pytest.raises(ShardingError, match=said):
        decoding_program(
            resolve_stage(run, run.stages[0]), mesh, run.mesh.rules, program, rows=2, length=8
        )


@pytest.mark.parametrize(
    "program,asked,compiled",
    [
        ("prefill", (8, 100), (8, 128)),
        ("prefill", (8, 2000), (2, 2048)),
        ("decode", (3, 300), (4, 1024)),
    ],
)
def test_programs_of_generation_are_of_the_size_that_is_reported(devices, program, asked, compiled):
    changes = {"mesh": "{data: 2}", "model.decoder.max_positions": "4096"}
    run = load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    mesh = make_mesh(run.mesh, devices[:2])
    with use_mesh(mesh.abstract_mesh):
        rows, length = asked
        made = decoding_program(
            resolve_stage(run, run.stages[0]), mesh, {}, program, rows=rows, length=length
        )
        assert (made.rows, made.length) == compiled
        logits, *_ = jax.tree.leaves(made.compile().out_info)
        if program == "prefill":
            assert logits.shape[0] == made.rows


def test_reports_of_programs_have_names_of_their_own():
    names = [str(report_path("run", "tune", "cpu:8", name)) for name in PROGRAMS]
    assert names[0] == "run_tune_cpu_8.json"
    assert names[2:] == ["run_tune_cpu_8_prefill.json", "run_tune_cpu_8_decode.json"]


def test_verdicts():
    report = {"memory": {"sum": 3 * 2**30}}
    assert verdict(report, 4.0) == "fits: 3.00 of 4.00 GiB per device"
    assert verdict(report, 2.5) == "does not fit: 0.50 GiB more than the 2.50 of a device"
    assert verdict(report | {"needed_gib": 5.0}, 4.0).startswith("does not fit: 1.00")


def test_program_reports_what_a_mesh_of_other_devices_would_hold(tmp_path):
    path = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "unimoe_jax.compile", "--config", str(CONFIG)),
        *("--topology", "cpu:4", "--json", str(path), "--memory", "0.0001"),
        "mesh={data: 1, fsdp: 2, expert: 2}",
    ]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # 0.0001 GiB are too few
    report = json.loads(path.read_text())
    assert report["verdict"] in done.stdout
    assert report["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
    memory, decoder = report["memory"], load_config(CONFIG).model.decoder
    # At least the input of every layer of the decoder, for the rows of one of four devices.
    rows = report["rows"] // 4 * report["row_length"]
    assert memory["activations"] >= decoder.num_layers * rows * decoder.hidden_size * 4
    assert memory["temporaries"] > 0
    # Moments are two float32 copies of what trains, and a few counters.
    assert 0 < memory["optimizer"] - 2 * memory["trained parameters"] < 64
    assert memory["sum"] == sum(size for name, size in memory.items() if name != "sum")
    parts = {tuple(one["shape"]): one["per_device"] for one in report["experts"].values()}
    # Layers, experts, width, hidden width: experts over one axis, the width over another.
    assert parts and all(
        part[1] * 2 == shape[1] and np.prod(part) * 4 == np.prod(shape)
        for shape, part in parts.items()
    )
    assert {"all-gather", "all-reduce"} <= {row["op"] for row in report["collectives"]}
    assert 0.9 < report["flops_ratio"] < 2
