"""Settings of a stage that change its data: template, image aspect, images for text samples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.helpers import Folder, data_config, model_config, talk
from unimoe_jax.config import ConfigError, LoaderConfig, OptimConfig, RunConfig, StageConfig
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.evaluate.controls import chance_levels, with_shuffled_media
from unimoe_jax.stages.data import heldout_pipeline, stage_pipeline, stage_steps

LOADER = LoaderConfig(row_length=128, rows=2)


@pytest.fixture
def mixed(folder: Folder):
    """Two samples with a wide image, two without."""
    wide = folder.image("wide.png", size=(32, 16), value=200)
    asked = talk("what is this <image>", image=wide)
    return folder.write("mixed.json", [asked, talk("who are you"), asked, talk("what is red")])


def run_of(path, **stage) -> tuple[RunConfig, StageConfig]:
    """A run with one stage that has the given settings, and that stage."""
    data = data_config(path, LOADER).model_copy(update={"template": "mistral_instruct"})
    optim = OptimConfig(learning_rate=1, steps=1)
    settings = {"mixture": {"all": 1}, "train": (), "optim": optim, "evaluate": ("all",)}
    config = StageConfig(name="one", **settings, **stage)
    model = model_config(speech=False, audio=False)
    run = RunConfig(name="x", model=model, data=data, stages=(config,))
    return run, config


@pytest.mark.parametrize("build", [stage_pipeline, heldout_pipeline])
def test_a_stage_may_set_its_template_and_image_aspect(build, mixed, tokenizer):
    for stage, template, aspect in (
        ({}, "mistral_instruct", "square"),
        ({"template": "plain", "aspect": "pad"}, "plain", "pad"),
    ):
        run, config = run_of(mixed, **stage)
        pipeline = build(resolve_stage(run, config), run.data, tokenizer, 1)
        (reader,) = pipeline.readers
        assert reader.template == template
        image = next(b.image_GIHWC for _, s, b in pipeline.batches(stop_step=2) if "image" in s)
        # The colour of the padding is CLIP's mean, which is zero up to its rounding to bytes.
        assert (np.abs(image[0, 0, 0]).max() < 0.02) == (aspect == "pad")


def test_plain_samples_are_media_and_caption(mixed, tokenizer):
    run, config = run_of(mixed, template="plain")
    pipeline = stage_pipeline(resolve_stage(run, config), run.data, tokenizer, 1)
    assert any("<image:4> [[a red bird\n]]" in text for text in pipeline.preview(2))


@pytest.mark.parametrize("unused", ["skip", "count"])
def test_samples_without_an_image_may_count_as_one_with_a_black_image(unused, mixed, tokenizer):
    """With `unused_images: count`, text samples have a black image that counts, as in CuMo."""
    model = model_config(speech=False, audio=False)
    vision = model.vision.model_copy(update={"unused_images": unused})
    model = model.model_copy(update={"vision": vision})
    loader = LOADER.model_copy(update={"packing": False})
    data = data_config(mixed, loader)
    pipeline = Pipeline(data, model, {"all": 1}, tokenizer, loader, seed=0, shards=1)
    batches = list(pipeline.batches(stop_step=pipeline.steps_per_epoch))
    budget = pipeline.token_budget()
    assert budget["image"] == 2 * model.vision.num_tokens
    assert (
        budget["text"]
        == sum(len(r.load(n, r.measure(n)[0])[0]) for r in pipeline.readers for n in range(4))
        - budget["image"]
    )
    # With `count`, every batch has images, one for each sample, as in CuMo.
    wanted = [{"image"}, {"image"}] if unused == "count" else [set(), {"image"}]
    assert sorted(sorted(s) for _, s, _ in batches) == sorted(sorted(s) for s in wanted)
    filled = sum(int(np.any(b.image_GIHWC)) for _, s, b in batches if s)
    assert filled >= 1
    for _, signature, batch in batches:
        if signature and unused == "count":
            assert batch.image_GIHWC.shape[1] == 2
        for row in range(2):
            is_text = not (batch.slot_BT[row] >= 0).any()
            assert is_text or "image" in signature


def test_stages_read_the_same_source_in_different_orders(mixed, tokenizer):
    def order(name: str) -> list[int]:
        stage = StageConfig(
            name=name, mixture={"all": 1}, train=(), optim=OptimConfig(learning_rate=1, steps=1)
        )
        data = data_config(mixed)
        data = data.model_copy(update={"loader": LOADER})
        run = RunConfig(name="run", model=model_config(), data=data, stages=(stage,))
        plan = stage_pipeline(resolve_stage(run, stage), data, tokenizer, 1).plan
        return [n for epoch in range(8) for n in plan.epoch(epoch).members.tolist()]

    assert order("tune1") == order("tune1") != order("tune2")


def test_a_stage_has_at_least_one_step(mixed, tokenizer):
    """Epochs become steps; settings that leave no step are refused."""
    run, config = run_of(mixed)
    pipeline = stage_pipeline(resolve_stage(run, config), run.data, tokenizer, 1)
    for epochs, steps in ((0.6, 1), (3.0, 3)):
        optim = OptimConfig(learning_rate=1, epochs=epochs)
        changed = resolve_stage(run, config.model_copy(update={"optim": optim}))
        assert stage_steps(changed, pipeline) == steps
    optim = OptimConfig(learning_rate=1, epochs=0.2)
    with pytest.raises(
        ConfigError, match=r"stages.one.optim.epochs = 0.2: .* per epoch: 1; set more"
    ):
        stage_steps(resolve_stage(run, config.model_copy(update={"optim": optim})), pipeline)


BROKEN = (
    '{"conversations": [',
    "[]",
    '{"conversations": [{"from": "human"}, {"from": "gpt"}]}',
    "{}",
)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_chance_leaves_out_records_that_cannot_be_scored(folder: Folder, form):
    """Chance levels are computed after a run is trained, so a broken record must not end it.

    The loader skips such records as well.
    """
    good = [json.dumps(talk(f"say\u2028{word}", word), ensure_ascii=False) for word in "aab"]
    lines = [*good, *(BROKEN if form == "lines" else BROKEN[1:])]
    text = "\n".join(lines) if form == "lines" else f"[{', '.join(lines)}]"
    path = folder.root / "data.json"
    path.write_text("\ufeff" * (form == "list") + text)
    data = data_config(path, LOADER)
    assert chance_levels(data, ["all"]) == {"all": pytest.approx(2 / 3)}
    shuffled = with_shuffled_media(data, ["all"], folder.root)
    assert chance_levels(shuffled, ["all"]) == {"all": pytest.approx(2 / 3)}
