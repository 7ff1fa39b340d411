"""The loop of a stage: reports of a resumed stage, saved steps, and waiting for data.

The loop runs over numbers instead of a model, so no program is compiled.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from unimoe_jax.config import MeshConfig
from unimoe_jax.config.media import MODALITY
from unimoe_jax.data.tally import Event, Tally
from unimoe_jax.evaluate.exact_match import exact_match
from unimoe_jax.parallel.sharding import make_mesh
from unimoe_jax.train.loop import StageRun, TrainingStopped
from unimoe_jax.train.stage_log import StageLog
from unimoe_jax.train.stage_programs import StagePrograms
from unimoe_jax.train.stage_start import StageStart
from unimoe_jax.train.summary import StageSummary

STEPS, EVERY = 12, 4


def metrics(step: int, bad_steps: int = 0) -> dict[str, np.ndarray]:
    """Metrics of a step with the loss 1/step and one token."""
    values = dict.fromkeys(("aux", "grad_norm", "lr", "tokens"), 1.0)
    values |= {"loss": 1 / step, "bad_steps": bad_steps, "bad": int(bad_steps > 0)}
    counts = np.ones(len(MODALITY))
    values |= {"nll_by_modality": counts, "targets_by_modality": counts}
    return {name: np.asarray(value) for name, value in values.items()}


class Recorder:
    """Stands in for a metrics file and a progress line."""

    def __init__(self):
        self.records: list[tuple[int, dict]] = []

    def write(self, step, values):
        self.records.append((step, values))

    def update(self, step, values):
        pass

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Rig(StageRun):
    """A stage whose state is the number of steps done.

    start, position: where a resumed stage goes on, as a checkpoint gives it.
    stop_at: a stop signal comes after this step. bad_from: steps from this one on are not finite.
    scores: whether there are held-out samples.
    stop_scoring: a stop signal comes while they are scored.
    """

    def __init__(
        self,
        device,
        start: int = 0,
        position: dict | None = None,
        *,
        data_seconds: float = 0.0,
        every: int = EVERY,
        log_every: int = 1,
        stop_at: int = -1,
        bad_from: int = STEPS + 1,
        scores: bool = False,
        stop_scoring: bool = False,
        tally: Tally | None = None,
    ):
        self.data_seconds, self.bad_from, self.stop_scoring = data_seconds, bad_from, stop_scoring
        self.recorder, self.saved_positions = Recorder(), {}
        config = SimpleNamespace(
            evaluate=("a",) if scores else (), optim=SimpleNamespace(max_bad_steps=2)
        )
        context = SimpleNamespace(
            run=SimpleNamespace(
                checkpoint=SimpleNamespace(every=every), log=SimpleNamespace(every=log_every)
            ),
            mesh=make_mesh(MeshConfig(), [device]),
            stop=SimpleNamespace(agreed=lambda: self.done == stop_at),
            data=None,
        )
        pipeline = SimpleNamespace(
            batches=self.batches, state=lambda step: {"step": step}, tally=tally or Tally(9, 1.0)
        )
        super().__init__(
            context,
            SimpleNamespace(steps=STEPS, settings=SimpleNamespace(name="tune", config=config)),
            pipeline,
            StagePrograms(step={frozenset(): self.step_program}, score={}, heldout=None),
            SimpleNamespace(save=self.keep),
            StageStart(start, {}, start, position or {}),
            self.recorder,
            time.monotonic(),
        )

    @property
    def records(self) -> list[tuple[int, dict]]:
        return self.recorder.records

    def batches(self, start_step: int, **_):
        for index in range(start_step, STEPS):
            time.sleep(self.data_seconds)
            yield index, frozenset(), {}

    def step_program(self, state: int, frozen, batch):
        """Do one more step, which is bad from step `bad_from` on."""
        done = state + 1
        return done, metrics(done, bad_steps=max(0, done - self.bad_from + 1))

    def keep(self, step: int, state: int, position: dict) -> None:
        assert step == state  # the state is the number of steps done
        self.saved_positions[step] = position

    def open_log(self) -> StageLog:
        tokens, seconds = self.start.position.get("speed", (0.0, 0.0))
        return StageLog(
            writer=self.recorder,
            progress=self.recorder,
            summary=self.summary,
            every=self.context.run.log.every,
            steps=STEPS,
            imbalance=lambda step: {},
            total_tokens=tokens,
            total_seconds=seconds,
        )

    def score(self):
        return None if self.stop_scoring else {"a": 1.0}


def test_a_resumed_stage_ends_with_the_same_losses_as_an_uninterrupted_one(devices):
    whole = Rig(devices[0])
    assert whole.run()
    assert sorted(whole.saved_positions) == [4, 8]
    stopped = Rig(devices[0], stop_at=6)
    assert not stopped.run()
    assert sorted(stopped.saved_positions) == [4, 6]
    for step, position in stopped.saved_positions.items():
        resumed = Rig(devices[0], step, position)
        assert resumed.run()
        losses = resumed.summary.first_loss, resumed.summary.last_loss
        assert losses == (whole.summary.first_loss, whole.summary.last_loss)
        assert [step for step, _ in resumed.records] == list(range(step + 1, STEPS + 1))


def test_a_stopped_stage_leaves_no_step_without_a_record(devices):
    """A resumed run starts after the saved step, so a step that has no record by then is lost."""
    stopped = Rig(devices[0], stop_at=6, log_every=10, bad_from=6)
    stopped.run()
    assert [step for step, _ in stopped.records] == [1, 4, 6]
    assert [values["skipped"] for _, values in stopped.records] == [0, 0, 1]
    resumed = Rig(devices[0], 6, stopped.saved_positions[6], log_every=10)
    resumed.run()
    assert [step for step, _ in resumed.records] == [8, 10, 12]


def test_the_last_loss_is_a_mean_of_the_last_steps(devices):
    """With fewer than ten steps it is the mean of all, so that the first does not dominate."""
    rig = Rig(devices[0], stop_at=6)
    rig.run()
    assert rig.summary.first_loss == 1
    assert rig.summary.last_loss == pytest.approx(np.mean([1 / step for step in range(1, 7)]))


def log_of(every: int) -> tuple[StageLog, Recorder]:
    """A log that writes every `every` steps, and the recorder of its records."""
    recorder = Recorder()
    log = StageLog(recorder, recorder, StageSummary(STEPS), every, STEPS, lambda step: {})
    return log, recorder


def test_a_record_covers_all_steps_since_the_last():
    """It counts the skipped steps, and its loss leaves them out, whichever step is recorded."""
    log, recorder = log_of(every=5)
    counts = np.ones(len(MODALITY))
    for step in range(1, 11):
        values = metrics(step, bad_steps=int(step in (3, 4, 7)))
        nll = counts * (np.nan if values["bad"] else step)
        log.add(step, frozenset(), values | {"nll_by_modality": nll})
    records = [values for _, values in recorder.records]
    assert [values["skipped"] for values in records] == [0, 2, 1]
    assert [values["loss_by_modality"]["text"] for values in records] == [1, 3.5, 8.25]


def test_a_record_of_skipped_steps_only_has_no_loss_by_modality():
    log, recorder = log_of(every=1)
    log.add(1, frozenset(), metrics(1, bad_steps=1))
    ((_, values),) = recorder.records
    assert (values["skipped"], values["loss_by_modality"]) == (1, {})


def test_a_resumed_stage_adds_to_the_seconds_of_earlier_runs():
    first = StageSummary(STEPS, seconds=12.5)
    later = StageSummary(STEPS)
    later.restore_fields(first.checkpoint_fields({}))
    assert later.seconds == 12.5
    later.restore_fields({})
    assert later.seconds == 0


def test_waiting_for_data_is_a_share_of_the_time_since_the_last_record(devices):
    rig = Rig(devices[0], data_seconds=0.01, every=STEPS)
    rig.run()
    shares = [values["data_wait_share"] for _, values in rig.records]
    assert len(shares) == STEPS
    assert all(0 <= share <= 1 for share in shares), shares
    # The last record comes without waiting for another batch. In all others, waiting took most of
    # the time.
    assert min(shares[:-1]) > 0.5, shares


@pytest.mark.parametrize(("start", "steps"), [(0, []), (4, [8, STEPS]), (STEPS, [])])
def test_a_signal_while_a_stage_is_scored_costs_no_step(devices, start, steps):
    """The finished steps are saved before scoring, which may take longer than a scheduler waits.

    Only a stage that starts at step 0 is scored before its steps.
    """
    rig = Rig(devices[0], start, scores=True, stop_scoring=True)
    assert not rig.run()
    assert list(rig.saved_positions) == steps


def test_a_resumed_stage_reports_the_samples_of_all_its_runs(devices):
    position = {}
    for number in (1, 2, 3):
        tally = Tally(9, 1.0)
        event = Event("bad", "a", "a.json", number, number, "missing_file", "gone")
        tally.add([event], loaded=1)
        rig = Rig(devices[0], STEPS - 1, position, tally=tally)
        assert rig.run()
        rig.save()
        position = rig.saved_positions[STEPS]
        rig.sum_up()
        assert rig.summary.samples == {"total": 9, "bad": {"missing_file": number}}


def test_the_speed_of_a_resumed_stage_includes_the_steps_of_earlier_runs(devices):
    stopped = Rig(devices[0], stop_at=6)
    stopped.run()
    position = stopped.saved_positions[6]
    assert position["speed"][0] == 6
    resumed = Rig(devices[0], 6, position | {"speed": (6.0, 100.0)})
    resumed.run()
    resumed.sum_up()
    # There are twelve steps of one token each; the six steps of the first run took 100 s.
    assert resumed.summary.tokens_per_s == pytest.approx(12 / 100, rel=0.1)


def test_a_state_that_would_stop_training_is_not_saved(devices):
    """Two steps in a row are bad at step 10, where the state would be saved."""
    rig = Rig(devices[0], every=5, bad_from=9)
    with pytest.raises(TrainingStopped, match=r"step 10 .* last checkpoint is step 5"):
        rig.run()
    assert sorted(rig.saved_positions) == [5]


def test_scoring_ends_when_a_signal_comes(devices):
    mesh = make_mesh(MeshConfig(), devices[:1])
    pipeline = SimpleNamespace(
        batches=lambda **_: ((step, frozenset(), {}) for step in range(9)), steps_per_epoch=9
    )
    scored = []
    fns = {frozenset(): lambda params, batch: scored.append(batch)}
    assert exact_match({}, pipeline, fns, mesh, lambda: len(scored) == 3) is None
    assert len(scored) == 3
