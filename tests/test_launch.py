"""Launch files: shell scripts, JobSets of Kubernetes, and the stages of the Dockerfile.

Shell scripts are checked by shellcheck, and run with small programs in place of the real ones.
JobSets are checked by a schema of the fields that they use. `tests/parallel/test_multihost.py`
starts a real run with `launch/local.sh`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unimoe_jax.config.load import load_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

# ------------------------------------------------------------------------------ shell scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(path):
    # pip installs shellcheck beside the interpreter, which may not be on the PATH.
    beside_python = Path(sys.executable).parent
    program = shutil.which("shellcheck", path=f"{beside_python}:{os.environ['PATH']}")
    assert program, "shellcheck is part of the extra [test]"
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert path.stat().st_mode & 0o100, f"{path} is not executable"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_without_arguments_print_their_usage(path):
    done = subprocess.run(["bash", path], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"launch/{path.name}" in done.stderr


@pytest.mark.parametrize("arguments", [["--tpu"], ["--tpu", "pod", "--zone"]])
def test_an_option_without_a_value_prints_the_usage(arguments):
    script = LAUNCH / "tpu_pod.sh"
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch/tpu_pod.sh --tpu NAME --zone ZONE" in done.stderr


def test_slurm_sends_sigterm_in_time_and_requeues():
    options = re.findall(r"^#SBATCH (.+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--signal=TERM@120", "--requeue"} <= set(options)
    tasks, gpus = (
        next(option.split("=")[1] for option in options if option.startswith(name))
        for name in ("--ntasks-per-node", "--gpus-per-node")
    )
    assert tasks == gpus  # one process per GPU


# ------------------------------------------------------------------ processes on this machine

# A program that waits for a signal and prints how many it got; `fail` makes process 1 fail at once.
STAND_IN = """
import os, signal, sys, time
index, got = int(os.environ["JAX_PROCESS_ID"]), []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
os.write(1, b"process %d has begun\\n" % index)
if sys.argv[1] == "fail" and index == 1:
    sys.exit(3)
end = time.monotonic() + 60
while time.monotonic() < end and not got:
    time.sleep(0.05)
time.sleep(0.5)  # for a second signal
os.write(1, b"process %d got %d\\n" % (index, len(got)))
"""


@pytest.fixture
def local(tmp_path):
    """Return a function that starts launch/local.sh with the program above.

    The machine seems to have two GPUs, one of them with a MIG part, which does not count. In the
    environment, None removes a variable.
    """
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    gpus = tmp_path / "nvidia-smi"
    gpus.write_text("#!/bin/sh\nprintf 'GPU 0: H200\\n  MIG 0: part\\nGPU 1: H200\\n'\n")
    gpus.chmod(0o755)
    variables = {"PYTHONPATH": str(tmp_path), "PROGRAM": "stand_in", "PYTHON": sys.executable}
    variables |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}

    started = []

    def start(processes: int, argument: str, **environment: str | None) -> subprocess.Popen:
        env = {**os.environ, **variables, **environment}
        launcher = subprocess.Popen(
            [LAUNCH / "local.sh", "--processes", str(processes), argument],
            env={name: value for name, value in env.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group, as under a terminal
        )
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.terminate()
        launcher.communicate(timeout=50)


def test_the_other_processes_are_killed_after_one_has_failed(local):
    started = time.monotonic()
    launcher = local(3, "fail", GRACE="1")
    errors = launcher.communicate(timeout=50)[1]
    assert launcher.returncode == 3
    assert time.monotonic() - started < 50
    assert "ended with code 3; 2 that did not leave within 1 s are killed" in errors


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["launcher", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once(local, send, number):
    """A second signal would end a run at once, without saving.

    `kill` reaches the launcher alone; a terminal sends Ctrl-C to the whole process group.
    """
    launcher = local(2, "wait")
    begun = [launcher.stdout.readline() for _ in range(2)]
    assert all("has begun" in line for line in begun)
    send(launcher.pid, number)
    printed = launcher.communicate(timeout=50)[0]
    assert launcher.returncode == 0
    assert sorted(printed.splitlines()) == ["process 0 got 1", "process 1 got 1"]


def test_a_grace_period_that_is_no_number_is_refused(local):
    launcher = local(1, "wait", GRACE="soon")
    assert "GRACE=soon: allowed: whole seconds" in launcher.communicate(timeout=50)[1]
    assert launcher.returncode == 2


def test_more_processes_than_gpus_are_refused(local):
    """CUDA_VISIBLE_DEVICES limits the number of GPUs; with an empty value, no GPU is needed."""
    for processes, visible, gpus in ((3, None, 2), (2, "5", 1)):
        launcher = local(processes, "wait", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES=visible)
        errors = launcher.communicate(timeout=50)[1]
        assert launcher.returncode == 2
        assert f"--processes {processes}: each takes a GPU, and there are {gpus}; " in errors
    launcher = local(3, "wait", JAX_PLATFORMS="", CUDA_VISIBLE_DEVICES="")  # hidden
    assert all("has begun" in launcher.stdout.readline() for _ in range(3))


# --------------------------------------------------------------------------- TPU pods and SLURM


def test_stop_on_a_pod_ends_its_run_and_nothing_else(tmp_path):
    """The process in `.pid` is only ended if it is a run: its number may belong to another one."""
    (tmp_path / "unimoe_jax").mkdir()
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/bash\ncd "$HOME" && exec bash -c "${!#}"\n'
    )  # its last argument is a command
    gcloud.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}

    def stop(running: subprocess.Popen) -> str:
        (tmp_path / "unimoe_jax/.pid").write_text(f"{running.pid}\n")
        command = [LAUNCH / "tpu_pod.sh", "--tpu", "pod", "--zone", "here", "--stop"]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0
        return done.stderr

    other = subprocess.Popen(["sleep", "60"])
    ours = subprocess.Popen(["bash", "-c", "exec -a unimoe_jax.train sleep 60"])
    assert "no run here" in stop(other)
    assert other.poll() is None
    other.kill()
    other.wait()
    assert stop(ours) == ""
    assert ours.wait(timeout=20) == -signal.SIGTERM
    assert "no run here" in stop(ours)


@pytest.mark.parametrize(("gpus", "code"), [("8", 0), ("4", 75), (None, 3)])
def test_slurm_runs_a_process_per_gpu(tmp_path, gpus, code):
    """The number of reserved tasks counts only if the number of GPUs is unknown.

    Exit code 75 of a run that has stopped and saved queues the job again.
    """
    for name, ending in (("srun", f"exit {code}"), ("scontrol", "exit 0")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n{ending}\n')
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "python",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "12",
    }
    variables |= {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    command = ["bash", LAUNCH / "slurm.sh", "--config", "run.yaml"]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    count = int(gpus or 8)
    tasks = f"--ntasks={2 * count} --ntasks-per-node={count} --cpus-per-task=12"
    program = "python -m unimoe_jax.train --config run.yaml"
    again = ["scontrol requeue 7"] if code == 75 else []
    assert done.stdout.splitlines() == [f"srun {tasks} {program}", *again]
    assert done.returncode == code


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "k8s_jobset.yaml"], ids=lambda path: path.name)
def test_launch_files_set_no_hyper_parameters(path):
    """The settings of a run belong into its run file; launch files only name folders."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    settings = re.findall(r"\b(?:optim|model|stages|loader|mesh|precision)[.=]", "\n".join(lines))
    assert settings == []


# ------------------------------------------------------------------------------------ JobSets


class Strict(BaseModel):
    """A part of a JobSet; fields that the schema does not list are errors."""

    model_config = ConfigDict(extra="forbid")


class FieldRef(Strict):
    fieldPath: Annotated[
        str, Field(pattern=r"^metadata\.(name|annotations\['[\w./-]+'\]|labels\['[\w./-]+'\])$")
    ]


class ValueFrom(Strict):
    fieldRef: FieldRef


class Env(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
    value: str | None = Field(None, strict=True)  # Kubernetes refuses numbers
    valueFrom: ValueFrom | None = None

    @model_validator(mode="after")
    def _exactly_one(self):
        assert (self.value is None) != (self.valueFrom is None), "value or valueFrom"
        return self


class Port(Strict):
    containerPort: Annotated[int, Field(gt=0, lt=65536)]


class Mount(Strict):
    name: str
    mountPath: Annotated[str, Field(pattern="^/")]


class Resources(Strict):
    limits: dict[Literal["nvidia.com/gpu", "google.com/tpu"], Annotated[int, Field(gt=0)]]


class Container(Strict):
    name: str
    image: str
    command: list[str]
    args: list[str]
    env: list[Env]
    ports: list[Port]
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: str


class EmptyDir(Strict):
    medium: Literal["Memory"]
    sizeLimit: Annotated[str, Field(pattern=r"^\d+[MG]i$")]


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSpec(Strict):
    restartPolicy: Literal["Never"]
    terminationGracePeriodSeconds: Annotated[int, Field(ge=60)]
    nodeSelector: dict[str, str] = {}
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_exist(self):
        mounted = {mount.name for mount in self.containers[0].volumeMounts}
        assert mounted == {volume.name for volume in self.volumes}
        return self


class PodTemplate(Strict):
    spec: PodSpec


class JobSpec(Strict):
    parallelism: Annotated[int, Field(gt=0)]
    completions: int
    completionMode: Literal["Indexed"]
    backoffLimit: Literal[0]
    template: PodTemplate

    @model_validator(mode="after")
    def _all_at_once(self):
        assert self.parallelism == self.completions, "processes must run at the same time"
        return self


class JobTemplate(Strict):
    spec: JobSpec


class ReplicatedJob(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    replicas: Literal[1]
    template: JobTemplate


class FailurePolicy(Strict):
    maxRestarts: Annotated[int, Field(gt=0)]


class Network(Strict):
    enableDNSHostnames: Literal[True]  # the coordinator is found by name


class JobSetSpec(Strict):
    failurePolicy: FailurePolicy
    network: Network
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1, max_length=1)]


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    labels: dict[str, str]
    annotations: dict[str, str] = {}


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: Metadata
    spec: JobSetSpec


def jobsets() -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "k8s_jobset.yaml").read_text()))


def job_of(jobset: JobSet) -> JobSpec:
    return jobset.spec.replicatedJobs[0].template.spec


@pytest.mark.parametrize("document", jobsets(), ids=lambda document: document["metadata"]["name"])
def test_jobset_follows_the_schema(document):
    job = job_of(JobSet.model_validate(document))
    pod = job.template.spec
    container = pod.containers[0]
    env = {variable.name: variable.value for variable in container.env}
    mounts = [mount.mountPath for mount in container.volumeMounts]
    assert pod.terminationGracePeriodSeconds == 120
    assert any(env["XDG_CACHE_HOME"].startswith(f"{path}/") for path in mounts)
    output = next(arg for arg in container.args if arg.startswith("output="))
    assert any(output.startswith(f"output={path}/") for path in mounts)
    load_config(ROOT / next(a for a in container.args if a.startswith("--config=")).split("=")[1])
    if "nvidia.com/gpu" in container.resources.limits:
        assert int(env["PROCESSES"]) == job.completions
        assert {"JOBSET_NAME", "REPLICATED_JOB_NAME"} <= env.keys()
    else:
        assert "--cluster=tpu" in container.args


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("apiVersion",), "v1"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), 9),
        (("spec", "network", "enableDNSHostnames"), False),
        (("spec", "surprise"), 1),
    ],
)
def test_the_schema_refuses_jobsets_that_would_not_work(path, value):
    document = jobsets()[0]
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValidationError):
        JobSet.model_validate(document)


# ---------------------------------------------------------------------------------- Dockerfile


def test_dockerfile_has_a_target_for_each_platform():
    text = (LAUNCH / "Dockerfile").read_text()
    assert set(re.findall(r"^FROM base AS (\w+)$", text, re.MULTILINE)) == {"cpu", "cuda", "tpu"}
    for name in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for part in name.split():
            assert (ROOT / part).exists(), part
    extras = re.findall(r"'\.\[(\w+)\]'", text)
    settings = (ROOT / "setup.cfg").read_text().split("extras_require]")[1]
    known = re.findall(r"^(\w+) =", settings, re.MULTILINE)
    assert set(extras) <= set(known)
