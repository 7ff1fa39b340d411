"""Metrics records as arrays over steps."""

import numpy as np

from unimoe_jax.metrics.series import expert_load, losses_by_modality


def test_expert_load_is_summed_over_the_last_quarter():
    records = [{"stage": "a", "step": s, "expert_load": [[[s, 1]]]} for s in range(1, 9)]
    np.testing.assert_array_equal(expert_load(records), [[[7 + 8, 2]]])
    assert expert_load([{"stage": "a", "step": 1}]) is None


def test_losses_by_modality_come_from_the_records_that_hold_them():
    records = [
        {"step": 1, "loss_by_modality": {"image": 2.0}, "loss": 2.0},
        {"step": 2, "loss_by_modality": {"image": 1.0, "text": "nan"}, "loss": 5.0},
        {"step": 3, "loss": 4.0},
    ]
    losses = losses_by_modality(records)
    np.testing.assert_array_equal(losses["image"], [[1, 2], [2.0, 1.0]])
    assert set(losses) == {"image", "text"}
