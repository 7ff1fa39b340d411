"""Numbers as text, and facts of stages that are computed from records."""

import pytest

from unimoe_jax.report.numbers import (
    finished_text,
    format_number,
    format_percent,
    scored_stage,
    stage_facts,
)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1.5, "1.5000"), ("nan", "nan"), ("inf", "inf")]
)
def test_numbers_that_are_missing_or_not_finite_stay_visible(value, text):
    assert format_number(value) == text


def test_shares_are_shown_in_per_cent():
    assert format_percent(0.125) == "12.5 %" and format_percent(None) == "–"


def test_finished_text_counts_the_stages_of_an_unfinished_run():
    summary = {"seconds": 48.2, "stages": {"a": {}}}
    assert finished_text(summary) == "finished in 48.2 s"
    assert finished_text(summary | {"stages_in_all": 4}) == "1 of 4 stages finished in 48.2 s"


def test_scored_stage_is_the_last_one_with_scores():
    stages = {"a": {"heldout": {"x": 1}}, "b": {"heldout": {"x": 1}}, "c": {"heldout": None}}
    assert scored_stage(stages) == "b" and scored_stage({}) == ""


def test_facts_of_a_running_stage():
    records = [
        {"step": 10, "time": 5.0, "loss": 4.0, "tokens_per_s": 100},
        {"step": 20, "time": 8.0, "loss": "nan", "tokens_per_s": 300},
    ]
    assert stage_facts(records) == {
        "steps": 20,
        "seconds": 3.0,
        "first_loss": 4.0,
        "last_loss": "nan",
        "tokens_per_s": 200.0,
        "heldout": None,
    }
