"""The loop's bookkeeping: what a resumed stage says of itself, and how waiting is counted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.config import MeshConfig
from unimoe_jax.config.media import MODALITY
from unimoe_jax.data.tally import Event, Tally
from unimoe_jax.evaluate.exact_match import exact_match
from unimoe_jax.parallel.sharding import batch_mesh_axes, current_mesh, make_mesh
from unimoe_jax.train import finish, loop
from unimoe_jax.train.finish import leave_results
from unimoe_jax.train.loop import TrainingStopped, _steps
from unimoe_jax.train.stage_log import StageLog
from unimoe_jax.train.summary import StageSummary

STEPS, EVERY = 12, 4


def metrics(step: int, bad_steps: int = 0) -> dict[str, np.ndarray]:
    numbers = dict.fromkeys(("aux", "grad_norm", "lr", "tokens"), 1.0)
    counts = np.ones(len(MODALITY))
    own = {"loss": 1 / step, "bad_steps": bad_steps, "bad": int(bad_steps > 0)}
    own |= {"nll_by_modality": counts, "targets_by_modality": counts}
    return {name: np.asarray(value) for name, value in (numbers | own).items()}


class Rig:
    """`_steps` over numbers instead of a model: the state is the number of steps done."""

    def __init__(
        self,
        device,
        *,
        data_seconds: float = 0.0,
        every: int = EVERY,
        stop_at: int = -1,
        log_every: int = 1,
    ):
        self.log_every = log_every
        self.records, self.saved = [], {}
        self.summary = StageSummary(STEPS)
        self.data_seconds, self.bad_from = data_seconds, STEPS + 1
        self.state = 0
        self.runtime = SimpleNamespace(
            run=SimpleNamespace(checkpoint=SimpleNamespace(every=every)),
            mesh=make_mesh(MeshConfig(), [device]),
            stop=SimpleNamespace(agreed=lambda: self.state == stop_at),
        )

    def batches(self, start_step: int, **_):
        for index in range(start_step, STEPS):
            time.sleep(self.data_seconds)
            yield index, frozenset(), {}

    def step(self, state: int, frozen, batch):
        """Counted in `self.state`, and bad from step `bad_from` on."""
        self.state = state + 1
        bad = max(0, self.state - self.bad_from + 1)
        return self.state, metrics(self.state, bad)

    def save(self, step: int, state: int) -> None:
        self.saved[step] = self.summary.position({})

    def run(self, done: int = 0, position: dict | None = None) -> bool:
        self.summary.resume(position or {})
        write = SimpleNamespace(
            write=lambda step, values: self.records.append((step, values)),
            update=lambda step, values: None,
            close=lambda: None,
        )
        every = self.log_every
        log = StageLog(write, write, self.summary, every, STEPS, imbalance=lambda step: {})
        stage = SimpleNamespace(
            steps=STEPS, config=SimpleNamespace(optim=SimpleNamespace(max_bad_steps=2))
        )
        fns, pipeline = {frozenset(): self.step}, SimpleNamespace(batches=self.batches)
        _, ended = _steps(self.runtime, stage, pipeline, done, {}, fns, done, log, self.save)
        return ended


def test_a_resumed_stage_ends_with_the_losses_of_one_that_was_not_stopped(devices):
    whole = Rig(devices[0])
    assert whole.run()
    assert sorted(whole.saved) == [4, 8]
    stopped = Rig(devices[0], stop_at=6)
    assert not stopped.run()
    assert sorted(stopped.saved) == [4, 6]
    for step, position in stopped.saved.items():
        resumed = Rig(devices[0])
        assert resumed.run(step, position)
        assert resumed.summary == whole.summary
        assert [step for step, _ in resumed.records] == list(range(step + 1, STEPS + 1))


def test_a_stopped_stage_leaves_no_step_without_a_record(devices):
    """What is not recorded when a state is saved is lost: a resumed stage begins after it."""
    stopped = Rig(devices[0], stop_at=6, log_every=10)
    stopped.bad_from = 6
    stopped.run()
    assert [step for step, _ in stopped.records] == [1, 4, 6]
    assert [values["skipped"] for _, values in stopped.records] == [0, 0, 1]
    resumed = Rig(devices[0], log_every=10)
    resumed.run(6, stopped.saved[6])
    assert [step for step, _ in resumed.records] == [8, 10, 12]


def test_the_last_loss_is_a_mean_of_the_last_steps(devices):
    """Of all where there are less than ten, so that it does not lean on the first."""
    rig = Rig(devices[0], stop_at=6)
    rig.run()
    assert rig.summary.first_loss == 1
    assert rig.summary.last_loss == pytest.approx(np.mean([1 / step for step in range(1, 7)]))


def test_a_record_tells_of_all_steps_since_the_last():
    """How many were skipped, and the loss of those that were not, whichever step is recorded."""
    records = []
    write = SimpleNamespace(write=lambda step, values: records.append(values), update=lambda *_: 0)
    log = StageLog(write, write, StageSummary(STEPS), 5, STEPS, imbalance=lambda step: {})
    counts = np.ones(len(MODALITY))
    for step in range(1, 11):
        found = metrics(step, bad_steps=int(step in (3, 4, 7)))
        nll = counts * (np.nan if found["bad"] else step)
        log.add(step, frozenset(), found | {"nll_by_modality": nll})
    assert [values["skipped"] for values in records] == [0, 2, 1]
    assert [values["loss_by_modality"]["text"] for values in records] == [1, 3.5, 8.25]


def test_a_record_of_nothing_but_skipped_steps_has_no_loss_by_modality():
    records = []
    write = SimpleNamespace(write=lambda step, values: records.append(values), update=lambda *_: 0)
    log = StageLog(write, write, StageSummary(STEPS), 1, STEPS, imbalance=lambda step: {})
    log.add(1, frozenset(), metrics(1, bad_steps=1))
    assert (records[0]["skipped"], records[0]["loss_by_modality"]) == (1, {})


def test_seconds_are_taken_over():
    first = StageSummary(STEPS, seconds=12.5)
    later = StageSummary(STEPS)
    later.resume(first.position({}))
    assert later.seconds == 12.5
    later.resume({})
    assert later.seconds == 0


def test_waiting_for_data_is_a_share_of_the_time_in_which_it_was(devices):
    rig = Rig(devices[0], data_seconds=0.01, every=STEPS)
    rig.run()
    shares = [values["data_wait_share"] for _, values in rig.records]
    assert len(shares) == STEPS
    assert all(0 <= share <= 1 for share in shares), shares
    # The last record comes without another batch; all others waited for most of their time.
    assert min(shares[:-1]) > 0.5, shares


@pytest.fixture
def saved(monkeypatch) -> dict[int, dict]:
    """step -> position of what `train_stage` saves, where it trains nothing at all."""
    found = {}

    class Checkpoints(contextlib.nullcontext):
        def __init__(self, folder, keep):
            super().__init__(self)

        def save(self, step, state, position):
            found[step] = position

    log = SimpleNamespace(writer=contextlib.nullcontext(), total_tokens=0, total_seconds=0)
    monkeypatch.setattr(loop, "StepCheckpoints", Checkpoints)
    monkeypatch.setattr(loop, "_compile", lambda *_: ({}, {}, None))
    monkeypatch.setattr(loop, "_open_log", lambda *_: log)
    monkeypatch.setattr(loop, "leave_results", lambda *_: None)
    monkeypatch.setattr(loop, "exact_match", lambda *given: None if given[-1]() else {"a": 1.0})
    return found


def sitting(monkeypatch, done: int, position: dict, tally: Tally, *, stop: bool = False):
    """What `train_stage` returns if it goes on at step `done`. stop: a signal has come by then."""
    pipeline = SimpleNamespace(state=lambda step: {}, tally=tally)
    stage = SimpleNamespace(steps=STEPS, trained={})
    monkeypatch.setattr(loop, "_prepare", lambda *_: (pipeline, stage))
    monkeypatch.setattr(loop, "_start", lambda *_: (stage, {}, done, position))

    def steps(*given):
        *_, log, save = given
        log.total_tokens += 6
        log.total_seconds += 1 + done / STEPS
        save(STEPS - 1, stage)
        return stage, True

    monkeypatch.setattr(loop, "_steps", steps)
    runtime = SimpleNamespace(
        run=SimpleNamespace(checkpoint=SimpleNamespace(keep=1), log=SimpleNamespace(every=1)),
        stop=SimpleNamespace(agreed=lambda: stop),
        folder=Path(),
        mesh=None,
        is_writer=False,
        tell=print,
    )
    config = SimpleNamespace(name="tune", evaluate=("a",) if stop else ())
    return loop.train_stage(runtime, config)


@pytest.mark.parametrize(("done", "steps"), [(0, []), (4, [11, STEPS]), (STEPS, [11])])
def test_a_signal_while_a_stage_is_scored_costs_no_step(saved, monkeypatch, done, steps):
    """Scoring may take longer than a scheduler waits; the steps that are done are saved by then.
    Only a stage that begins is scored before its steps."""
    assert sitting(monkeypatch, done, {}, Tally(9, 1.0), stop=True) is None
    assert list(saved) == steps


def test_a_resumed_stage_tells_of_the_samples_of_all_sittings(saved, monkeypatch):
    position = {}
    for number in (1, 2, 3):
        tally = Tally(9, 1.0)
        event = Event("bad", "a", "a.json", number, number, "missing_file", "gone")
        tally.add([event], loaded=1)
        summary = sitting(monkeypatch, STEPS - 1, position, tally)
        assert summary.samples == {"total": 9, "bad": {"missing_file": number}}
        position = saved[STEPS - 1]


def test_the_speed_of_a_resumed_stage_is_that_of_all_its_steps(saved, monkeypatch):
    first = sitting(monkeypatch, 0, {}, Tally(9, 1.0))
    assert first.tokens_per_s == 6
    assert sitting(monkeypatch, STEPS, saved[STEPS - 1], Tally(9, 1.0)).tokens_per_s == 4


def resumed_at_4(monkeypatch, check_state) -> list[int]:
    """The seeds of fresh parameters where a stage goes on that began with seed 1 and is now the
    second of its run."""
    seeds = []
    monkeypatch.setattr(loop, "open_sources", lambda *_: {})
    monkeypatch.setattr(loop, "initial_params", lambda *given, only: seeds.append(given[3]))
    config = SimpleNamespace(name="tune")
    stage = SimpleNamespace(config=config, infos={}, steps=STEPS, state_template=lambda mesh: None)
    run = SimpleNamespace(seed=0, stages=[SimpleNamespace(name="new"), config])
    runtime = SimpleNamespace(run=run, mesh=None, folder=None, tell=print)
    found = (4, SimpleNamespace(seed=np.uint32(1)), {"data": {}})
    folder = Path("tune/steps")
    checkpoints = SimpleNamespace(restore_latest=lambda template, tell: found, folder=folder)
    loop._start(runtime, stage, SimpleNamespace(check_state=check_state), checkpoints)
    return seeds


def test_what_is_frozen_is_drawn_as_when_the_stage_began(monkeypatch):
    """A stage put before it counts in the seeds of the ones behind, not in one that has begun."""
    assert resumed_at_4(monkeypatch, lambda state: 4) == [1]


def test_other_data_are_refused_with_the_name_of_the_stage(monkeypatch):
    def check_state(state):
        raise ValueError("the data differ")

    with pytest.raises(CheckpointError, match=r"^tune/steps/4: the data differ"):
        resumed_at_4(monkeypatch, check_state)


def placed(mesh) -> SimpleNamespace:
    """A runtime on `mesh` with a table of axes that is not the default."""
    return SimpleNamespace(run=SimpleNamespace(mesh=MeshConfig(rules={"batch": "data"})), mesh=mesh)


def test_programs_are_traced_with_the_table_of_the_run(devices, monkeypatch):
    """They are in threads, which start with the default one."""

    def lower(*_):
        found = batch_mesh_axes(), current_mesh().size
        return SimpleNamespace(compile=lambda: found)

    monkeypatch.setattr(loop, "lower_step", lower)
    pipeline = SimpleNamespace(signatures=("text",), spec=lambda name: name)
    stage = SimpleNamespace(config=SimpleNamespace(evaluate=()))
    progress = SimpleNamespace(announce=lambda text: None)
    runtime = placed(make_mesh(MeshConfig(data=2, expert=2), devices[:4]))
    steps, _, _ = loop._compile(runtime, stage, pipeline, progress)
    assert steps == {"text": (("data",), 4)}


def test_who_interrupts_compilation_does_not_wait_for_it(devices, monkeypatch):
    started, ended = threading.Event(), threading.Event()

    class Program:
        def __init__(self, name):
            self.name = name

        def compile(self):
            if self.name == "interrupted":
                started.wait(30)
                raise KeyboardInterrupt
            started.set()
            ended.wait(10)

    monkeypatch.setattr(loop, "lower_step", lambda run, stage, mesh, name: Program(name))
    names = dict.fromkeys(("interrupted", "long"))
    pipeline = SimpleNamespace(signatures=names, spec=lambda name: name)
    runtime = placed(make_mesh(MeshConfig(), devices[:1]))
    stage = SimpleNamespace(evaluate=())
    progress = SimpleNamespace(announce=lambda text: None)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop._compile(runtime, SimpleNamespace(config=stage), pipeline, progress)
    assert time.monotonic() - began < 8
    ended.set()


def test_a_result_is_never_without_its_summary(tmp_path, monkeypatch):
    """A finished stage is passed over: what a crash after its result would lose never comes."""

    def save(folder, params, manifest):
        assert json.loads((folder.parent / "summary.json").read_text())["heldout"] == {"a": 0.5}
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "results", lambda stage, params: (params, []))
    monkeypatch.setattr(finish, "save_final", save)
    runtime = SimpleNamespace(run=SimpleNamespace(name="run"), folder=tmp_path, is_writer=True)
    config = SimpleNamespace(name="tune", merge_lora=False, init=(), mixture={})
    model = SimpleNamespace(decoder=SimpleNamespace(moe_layers=lambda: ()))
    stage = SimpleNamespace(config=config, steps=STEPS, model_config=model)
    with pytest.raises(KeyboardInterrupt):
        leave_results(
            runtime, stage, {}, tmp_path / "final", StageSummary(STEPS, heldout={"a": 0.5})
        )


def test_scoring_ends_when_told(devices):
    mesh = make_mesh(MeshConfig(), devices[:1])
    pipeline = SimpleNamespace(
        batches=lambda **_: ((step, frozenset(), {}) for step in range(9)), steps_per_epoch=9
    )
    scored = []
    fns = {frozenset(): lambda params, batch: scored.append(batch)}
    assert exact_match({}, pipeline, fns, mesh, lambda: len(scored) == 3) is None
    assert len(scored) == 3


def test_a_state_that_would_stop_training_is_not_saved(devices):
    rig = Rig(devices[0], every=5)
    rig.bad_from = 9  # two in a row at step 10, where it would be saved
    with pytest.raises(TrainingStopped, match=r"step 10 .* last checkpoint is step 5"):
        rig.run()
    assert sorted(rig.saved) == [5]
