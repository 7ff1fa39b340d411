"""Loading of run files: YAML becomes a RunConfig or one-line errors, and a dump loads again."""

import textwrap

import pytest

from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import (
    dump_config,
    load_config,
    print_config,
    resolve_config,
    run_dir,
    settings_help,
)
from unimoe_jax.config.merge import dotted, leaves

MODEL = """
model:
  decoder: {vocab_size: 64, hidden_size: 16, mlp_dim: 32, num_layers: 2, num_heads: 2,
            num_kv_heads: 1, norm_eps: 1e-4, moe: {num_experts: 4}}
"""
STAGES = """
stages:
  - name: align
    mixture: {pairs: 1}
    train: [{match: .*, lr: 1}]
    optim: {learning_rate: 2e-3, steps: 10}
  - name: tune
    mixture: {pairs: 1, talk: 2.5}
    train: [{match: .*router.*, lr: 1}, {match: .*, lr: null}]
    init: [{match: .*, source: align}]
    optim: {learning_rate: 1e-4, steps: 20}
    moe: true
"""
RUN = """
include: [parts/model.yaml, parts/stages.yaml]
name: tiny
data:
  sources: {pairs: {path: a.json}, talk: {path: b.json}}
  loader: {row_length: 64, rows: 4}
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that writes the run above with some texts replaced; it returns its path."""

    def write(**files):
        texts = {"run": RUN, "parts/model": MODEL, "parts/stages": STAGES}
        for name, text in (texts | {k.replace("__", "/"): v for k, v in files.items()}).items():
            path = tmp_path / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return tmp_path / "run.yaml"

    return write


def problem(path, *overrides) -> str:
    """The message with which the run file is refused; it has to be a single line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mentions(text, *parts):
    """Assert that a message contains every part."""
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


# ------------------------------------------------------------------------------------ loading


def test_includes_merge_deeply_and_lists_are_replaced(run):
    """The keys of a file take precedence over its includes, later includes over earlier ones."""
    text = RUN + "model: {decoder: {hidden_size: 8, moe: {layers: [1]}}}\n"
    config = load_config(run(run=text))
    assert config.model.decoder.hidden_size == 8
    assert config.model.decoder.vocab_size == 64
    assert config.model.decoder.moe.num_experts == 4
    assert config.model.decoder.moe.layers == (1,)
    later = "model: {decoder: {moe: {layers: [0, 1]}}}\n"
    path = run(
        run=RUN.replace("parts/stages.yaml", "parts/stages.yaml, parts/later.yaml"),
        parts__model=MODEL.replace("num_experts: 4", "num_experts: 4, layers: [1]"),
        parts__later=later,
    )
    assert load_config(path).model.decoder.moe.layers == (0, 1)


def test_a_mapping_over_a_list_changes_single_items(run):
    text = RUN + "stages: {tune: {optim: {steps: 7}}, '0': {moe: true}}\n"
    config = load_config(run(run=text))
    assert config.stages[1].optim.steps == 7
    assert config.stages[1].optim.learning_rate == 1e-4
    assert config.stages[0].moe


def test_anchors_and_merge_keys(run):
    stages = STAGES.replace("optim: {learning_rate: 2e-3", "optim: &fast {learning_rate: 2e-3")
    stages = stages.replace("{learning_rate: 1e-4, steps", "{<<: *fast, b1: 0.5, steps")
    optim = load_config(run(parts__stages=stages)).stages[1].optim
    assert (optim.learning_rate, optim.b1, optim.steps) == (2e-3, 0.5, 20)


def test_null_removes_an_included_section(run):
    stages = STAGES.replace("moe: true", "moe: false")
    path = run(parts__stages=stages, run=RUN + "model: {decoder: {moe: null}}\n")
    assert load_config(path).model.decoder.moe is None


def test_overrides(run):
    config = load_config(
        run(),
        [
            "stages.tune.optim.steps=5",
            "stages.0.optim.learning_rate=1e-3",
            "stages.tune.mixture={talk: 1}",
            "model.decoder.moe.layers=[0]",
            "log.plots=false",
            "checkpoint.every=7",
            "output=out/{name}/a=b",
        ],
    )
    assert config.stages[1].optim.steps == 5
    assert config.stages[0].optim.learning_rate == 1e-3
    assert config.stages[1].mixture == {"talk": 1}
    assert config.model.decoder.moe.layers == (0,)
    assert config.log.plots is False
    assert config.checkpoint.every == 7
    assert run_dir(config).as_posix() == "out/tiny/a=b"


def test_yaml_traps(run):
    """Words and numbers that YAML 1.1 would read as something else are read as they look."""
    config = load_config(run(), ["name=on", "data.loader.max_image_pixels=89_478"])
    assert config.model.decoder.norm_eps == 1e-4 and config.name == "on"
    assert config.data.loader.max_image_pixels == 89478
    assert load_config(run(), ["name=2024-01-01"]).name == "2024-01-01"
    assert load_config(run(), ["seed=010"]).seed == 10
    for word in ("on", "yes", "1"):
        mentions(problem(run(), f"log.plots={word}"), "log.plots", "true or false")
    text = RUN + "mesh: {rules: {on: data, off: null}}\n"
    assert load_config(run(run=text)).mesh.rules == {"on": "data", "off": None}


def test_dump_gives_an_equal_config(run, tmp_path):
    overrides = ["name='1e-4'", "tokenizer='on'", "data.cache='null'", "stages.0.optim.eps=1e-12"]
    config = load_config(run(), overrides)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.name == "1e-4" and config.tokenizer == "on" and config.data.cache == "null"


# ----------------------------------------------------------------------------------- errors


def test_an_unknown_key_is_reported_with_its_file_and_a_suggestion(run):
    path = run(parts__stages=STAGES.replace("learning_rate: 2e-3", "learning_rat: 2e-3"))
    mentions(
        problem(path),
        "parts/stages.yaml: stages.0.optim.learning_rat = 0.002: unknown key",
        "did you mean 'learning_rate'?",
        "warmup_ratio",
    )
    text = problem(run(), "stages.tune.optim.lr=1e-3")
    mentions(text, "command line: stages.1.optim.lr = 0.001", "'learning_rate'")
    mentions(problem(run(), "top_k=3"), "did you mean model.decoder.moe.top_k or")


def test_a_wrong_value_is_reported_with_the_file_that_set_it(run):
    path = run(parts__model=MODEL.replace("vocab_size: 64", "vocab_size: many"))
    mentions(
        problem(path),
        'parts/model.yaml: model.decoder.vocab_size = "many"',
        "allowed: integer > 0",
        "write a number",
    )
    text = problem(path, "model.decoder.vocab_size=-1")
    mentions(text, "command line: model.decoder.vocab_size = -1", "integer > 0")
    text = problem(run(), "model.decoder.moe.dispatch=groupd")
    mentions(text, "grouped | dense", "did you mean 'grouped'?")
    mentions(problem(run(), "model.decoder.moe.layers=[-1]"), "even", "list of integer >= 0")
    mentions(problem(run(), "stages.tune.moe=[dekoder]"), "list of", "did you mean 'decoder'?")
    mentions(problem(run(), "stages.tune.moe=decoder"), "list of", "write [decoder]")
    mentions(problem(run(), "stages.tune.moe=[3]"), "choose from encoder, connector, decoder")
    mentions(problem(run(), "stages.0.optim.steps=1e1"), "= 10.0", "write 10")
    mentions(problem(run(), "stages.0.train.0.match='*'"), "stages.0.train.0.match", "regular expr")


def test_a_missing_key_is_reported_with_the_file_of_its_section(run):
    path = run(parts__model=MODEL.replace("mlp_dim: 32,", ""))
    mentions(problem(path), "parts/model.yaml: model.decoder.mlp_dim is not set", "integer > 0")
    mentions(problem(run(run=RUN.replace("name: tiny", ""))), "run.yaml: name is not set", "text")


def test_settings_that_contradict_each_other_are_reported_with_their_file(run):
    path = run(run=RUN + "model: {decoder: {moe: {top_k: 9}}}\n")
    mentions(problem(path), "run.yaml: model.decoder.moe.top_k = 9:", "num_experts = 4", "1..4")
    text = problem(run(), "model.decoder.moe.num_experts=1")
    mentions(text, "command line: model.decoder.moe.num_experts = 1: top_k = 2 is larger")
    text = problem(run(), "model.decoder.num_kv_heads=3")
    mentions(text, "command line: model.decoder.num_kv_heads = 3: num_heads = 2 is not a multiple")
    text = problem(run(), "model.decoder.moe.layers=[7]")
    mentions(text, "command line: model.decoder.moe.layers: moe.layers [7] are beyond")
    text = problem(run(), "model.decoder.moe.layers=[]")
    mentions(text, "command line: model.decoder.moe.layers", "leave moe out")
    mentions(problem(run(), "model.decoder.head_dim=7"), "model.decoder", "turn pairs")
    mentions(problem(run(), "stages.0.optim.b1=1"), "stages.0.optim.b1 = 1", "< 1")
    text = problem(run(), "stages.tune.name=align")
    mentions(text, "command line: stages.1.name = ", "share a name")
    mentions(problem(run(), "stages.tune.name=../out"), "command line: stages.1.name", "matching")
    mentions(problem(run(), "stages=[]"), "command line: stages: the run lists no stage")
    path = run(parts__stages=STAGES.replace("source: align", "source: algn"))
    mentions(problem(path), 'parts/stages.yaml: stages.1.init.0.source = "algn"', "earlier stage")
    text = problem(run(), "stages.tune.mixture={nothing: 1}")
    mentions(text, "command line: stages.1.mixture.nothing = 1", "['pairs', 'talk']")
    mentions(problem(run(), "output=runs/{nam}"), "command line: output", "{name}")
    text = problem(run(), "mesh.data=0")
    mentions(text, "command line: mesh.data = 0: allowed: -1 or integer > 0")
    text = problem(run(), "mesh.fsdp=-1")  # data is -1 by default
    mentions(text, "command line: mesh.fsdp = -1: data and fsdp are -1", "-1 at most once")


def test_bad_files(run, tmp_path):
    """Files that are missing, include themselves, or are no valid YAML, UTF-8 or mapping."""
    mentions(problem(tmp_path / "none.yaml"), "none.yaml", "cannot be read", "No such file")
    text = problem(run(run=RUN.replace("parts/model.yaml", "parts/modle.yaml")))
    mentions(text, "run.yaml: include", "modle.yaml", "did you mean 'model.yaml'?")
    text = problem(run(parts__model="include: ../run.yaml\n" + MODEL))
    mentions(text, "parts/model.yaml: include", "cycle", "run.yaml -> ")
    text = problem(run(run=RUN + "seed: 1\nseed: 2\n"))
    mentions(text, "run.yaml: line 8", "`seed`", "line 7", "remove")
    mentions(problem(run(run="name: [a\nb: c")), "run.yaml: line 2", "not valid YAML")
    mentions(problem(run(run="- a\n- b\n")), "run.yaml", "a mapping")
    mentions(problem(run(run="name: &a [*a]\n")), "run.yaml", "itself")
    mentions(problem(run(), r'name="\ud800"'), "run.yaml", "surrogates")
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    mentions(problem(tmp_path / "run.yaml"), "run.yaml", "UTF-8")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed", ["'seed'", "key.subkey=value"]),
        ("a..b=1", ["'a..b=1'", "key.subkey=value"]),
        ("stages.tuen.moe=true", ["stages.tuen", "0..1, align, tune", "did you mean 'tune'?"]),
        ("stages.2.moe=true", ["stages.2", "0..1"]),
        ("name.first=x", ['name = "tiny"', "set name itself"]),
        ("name=[a", ["'name=[a'", "not valid YAML"]),
        ("stages={}", ["command line: stages = {}", "list of mapping (StageConfig)"]),
    ],
)
def test_bad_overrides(run, override, parts):
    mentions(problem(run(), override), "command line", *parts)


def test_every_problem_has_its_line(run):
    with pytest.raises(ConfigError) as caught:
        load_config(run(), ["seed=x", "log.evry=1"])
    assert len(str(caught.value).splitlines()) == 2


# ----------------------------------------------------------------------------- origins, help


def test_origins_of_every_value(run):
    resolved = resolve_config(run(), ["stages.tune.optim.steps=5"])
    origins = resolved.origins
    assert origins["stages.1.optim.steps"] == "command line"
    assert origins["stages.1.optim.learning_rate"].endswith("parts/stages.yaml")
    assert origins["model.decoder.hidden_size"].endswith("parts/model.yaml")
    assert origins["name"].endswith("run.yaml")
    assert origins["log.plots"] == "default"
    assert set(origins) == {dotted(key) for key, _ in leaves(resolved.config.model_dump())}


def test_replacing_a_section_changes_the_origin_of_its_parts(run):
    path = run(run=RUN + "stages: {tune: {optim: {steps: 7}}}\n")
    assert resolve_config(path).origins["stages.1.optim.steps"].endswith("run.yaml")
    override = "stages.tune.optim={learning_rate: 1e-3, steps: 9}"
    assert resolve_config(path, [override]).origins["stages.1.optim.steps"] == "command line"


def test_print_config_lists_values_that_work_as_overrides(run, capsys):
    resolved = resolve_config(run(), ["stages.tune.optim.steps=5"])
    print_config(resolved.config, resolved.origins)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("stages.1.optim.steps = 5 ") for line in lines)
    assert all("  # " in line for line in lines)
    (line,) = [line for line in lines if line.startswith("stages.1.optim.steps")]
    assert line.endswith("# command line")


def test_help_lists_every_section_with_type_default_and_description():
    text = settings_help()
    mentions(
        text,
        "model.decoder.moe, model.vision.encoder.moe, model.vision.connector.moe  (MoEConfig)",
        "stages.N.optim  (OptimConfig)",
        "data.sources.NAME  (SourceConfig)",
        "vocab_size: integer > 0; required",
        "learning_rate: number > 0; required",
        'schedule: cosine | linear | constant; default "cosine"',
        "learning-rate multiplier; null freezes",
        "plots: true or false; default true",
    )
    assert "FieldInfo" not in text and "typing." not in text
    assert max(len(line) for line in text.splitlines()) < 200


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=99999999999999999999", ("seed", "<= 2147483647")),
        ("stages.tune.optim.learning_rate=.inf", ("optim.learning_rate", "finite")),
        ("stages.tune.mixture.talk=.inf", ("mixture.talk", "finite")),
    ],
)
def test_infinite_and_huge_numbers_are_refused(run, override, parts):
    mentions(problem(run(), override), "command line", *parts)


def test_an_unknown_key_without_a_similar_one_lists_the_allowed_keys(run):
    assert "remove it. Allowed here: " in problem(run(), "data.loader.zzz=1")


def test_run_files_of_the_package_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").name == "tiny"
    with pytest.raises(ConfigError, match=r"--config tinny: no such file.*did you mean 'tiny'\?"):
        load_config("tinny")
    # A file of the working directory has precedence over a run file of the package.
    (tmp_path / "tiny").write_text("name: mine")
    with pytest.raises(ConfigError, match=r"^tiny: "):
        load_config("tiny")
