"""The scripts that start several processes: what they would run, what they run, and when they start it again.

sbatch, srun, scontrol, kubectl and gcloud are stand-ins here, which write down how they were called.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from mend_jax.cli.config_files import ROOT

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "train",
    "--config=configs/base.py:x",
    "--workdir=/a b/c",
    "--config.data.text=$(X)'\"{{NAME}}\\ü",
    "#",
    "",
]
SETTINGS = {
    "local": {"PROCESSES": "2", "PORT": "1234"},
    "slurm": {"PARTITION": "gpu"},
    "kubernetes": {"NAME": "mend", "IMAGE": "registry/mend:1", "CLAIM": "shared"},
    "tpu_pod": {"TPU": "mend", "ZONE": "z", "ACCELERATOR": "v4-32", "VERSION": "tpu-ubuntu2204-base", "POLL": "0"},
}
NEEDED = [(script, name) for script, names in SETTINGS.items() for name in names if name not in ("PORT", "POLL")]
STAND_IN = r"""#!/bin/bash
# Its name and arguments go to $CALLS; srun and a `ssh` that runs a command end with the next code of $CODES, a `describe`
# or `show job` prints the next line of $STATES, the last one for ever.
{ printf '%s\x1f' "${0##*/}" "$@"; echo; } >>"$CALLS"
next() { sed -n 1p "$1"; if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi; }
case "${0##*/} $*" in
*describe* | *show\ job*) next "$STATES" ;;
*create*) echo ACTIVE >"$STATES" ;;
kubectl*) cat >"$CALLS.stdin" ;;
srun* | *-m\ mend_jax*) exit "$(next "$CODES")" ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, arguments, **settings) -> (finished process, what it called)."""
    shutil.copytree(ROOT / "launch", tmp_path / "clone" / "launch")
    (tmp_path / "clone" / "mend_jax").mkdir()
    (tmp_path / "clone" / "mend_jax" / "train.py").write_text("")
    for name in ("sbatch", "srun", "scontrol", "kubectl", "gcloud", "git"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    calls = tmp_path / "calls"

    def launch(script, arguments=ARGUMENTS, codes=(0,), states=("ACTIVE",), **settings):
        calls.write_text("")
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "TMPDIR": str(tmp_path), "PYTHON": sys.executable}
        environment |= {name.upper(): str(tmp_path / name) for name in ("calls", "codes", "states")} | settings
        command = [str(tmp_path / "clone" / "launch" / f"{script}.sh"), *arguments]
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
        return done, [line.split("\x1f")[:-1] for line in calls.read_text().split("\n")[:-1]]

    return launch


@pytest.mark.parametrize(("script", "missing"), NEEDED)
def test_a_missing_setting_is_one_sentence(launch, script, missing):
    settings = {name: value for name, value in SETTINGS[script].items() if name != missing}
    failed, calls = launch(script, **settings)
    assert failed.returncode == 1 and calls == [] and failed.stdout == ""
    assert re.fullmatch(rf"error: {missing} is not set: [^\n]+\.\n", failed.stderr)


@pytest.mark.parametrize("script", SETTINGS)
def test_a_missing_command_is_one_sentence(launch, script):
    failed, calls = launch(script, [], **SETTINGS[script])
    assert failed.returncode == 1 and calls == []
    assert re.fullmatch(r"error: name a command of mend_jax, such as: [^\n]+\n", failed.stderr)


@pytest.mark.parametrize("script", SETTINGS)
def test_help_is_the_scripts_head(launch, script):
    done, calls = launch(script, ["--help"])
    assert (done.returncode, calls, done.stderr) == (0, [], "")
    assert done.stdout.startswith("A command of mend_jax ") and "DRY_RUN=1" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("script", SETTINGS)
def test_an_unknown_command_is_one_sentence(launch, script):
    failed, calls = launch(script, ["tarin", "--config=configs/base.py"], **SETTINGS[script])
    assert failed.returncode == 1 and calls == [] and failed.stdout == ""
    assert re.fullmatch(r'error: mend_jax has no command "tarin": name train, [^\n]+\.\n', failed.stderr)


@pytest.mark.parametrize(("script", "program"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("tpu_pod", "gcloud")])
def test_a_machine_without_the_scheduler_is_one_sentence(launch, script, program, tmp_path):
    for name in ("bash", "dirname", "sed", "seq", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which(name))
    failed, _ = launch(script, **SETTINGS[script], PATH=str(tmp_path))
    assert failed.returncode == 1 and re.fullmatch(rf"error: {program} is not there: [^\n]+\.\n", failed.stderr)


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("local", "PROCESSES", "two"),
        ("slurm", "NODES", "0"),
        ("slurm", "GPUS", "all"),
        ("slurm", "TASK", "core"),
        ("kubernetes", "NODES", "-1"),
        ("kubernetes", "NAME", "My_Run"),
        ("kubernetes", "SELECTOR", "a100"),
    ],
)
def test_a_wrong_setting_is_one_sentence(launch, script, name, value):
    failed, calls = launch(script, **(SETTINGS[script] | {name: value}))
    assert failed.returncode == 1 and calls == [] and failed.stdout == ""
    assert re.fullmatch(rf"error: {name}={value} [^\n]+\.\n", failed.stderr)


def dry(launch, script, **settings):
    """The commands that a dry run prints, as the shell would read them."""
    done, calls = launch(script, DRY_RUN="1", **(SETTINGS[script] | settings))
    assert done.returncode == 0 and calls == [] and done.stderr == "", done.stderr
    return [words(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def words(line):
    """As the shell reads them."""
    found = subprocess.run(["bash", "-c", rf"printf '%s\0' {line}"], capture_output=True, text=True, check=True)
    return found.stdout.split("\0")[:-1]


def test_local(launch):
    printed = dry(launch, "local")
    module, *arguments = ARGUMENTS
    for i, command in enumerate(printed):
        settings = [
            "JAX_COORDINATOR_ADDRESS=localhost:1234", "JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={i}",
        ]  # fmt: skip
        assert command == ["env", *settings, sys.executable, "-m", f"mend_jax.{module}", *arguments]
    assert len(printed) == 2


COMMAND = [sys.executable, "-m", "mend_jax.train", *ARGUMENTS[1:]]


@pytest.mark.parametrize(
    ("settings", "tasks", "cpus", "before"),
    [
        ({"NODES": "2", "GPUS": "4"}, 4, 8, []),
        ({"NODES": "2", "GPUS": "4", "TASK": "node", "CPUS": "2"}, 1, 8, ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]),
    ],
)
def test_slurm_prints_what_it_submits_and_what_the_job_runs(launch, settings, tasks, cpus, before):
    printed = dry(launch, "slurm", SBATCH_ARGS="--account=us --qos=low", **settings)
    assert printed[0] == ["mkdir", "-p", "logs"] and printed[-1] == ["scontrol", "requeue", "JOB"]
    size = ["--nodes=2", f"--ntasks-per-node={tasks}"]
    _, submitted, step, _ = printed
    assert submitted[0] == "sbatch" and submitted[-len(ARGUMENTS) - 1 :] == ["launch/slurm.sh", *ARGUMENTS]
    flags = {*size, "--partition=gpu", "--gpus-per-node=4", f"--cpus-per-task={cpus}", "--requeue", "--signal=TERM@300"}
    assert flags | {"--open-mode=append", "--account=us", "--qos=low"} <= set(submitted)
    begin = [
        *before,
        "srun",
        *size,
        f"--cpus-per-task={cpus}",
        "--gpu-bind=none",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--label",
    ]
    assert step == [*begin, *COMMAND]

    settings = SETTINGS["slurm"] | settings | {"SBATCH_ARGS": "--account=us --qos=low"}
    done, calls = launch("slurm", **settings)  # on the login node
    assert done.returncode == 0 and calls == [submitted]
    done, calls = launch("slurm", SLURM_JOB_ID="17", **settings)  # in the job
    assert done.returncode == 0 and calls == [step[len(before) :]]


@pytest.mark.parametrize(
    ("code", "states", "requeued"),
    [
        (75, '["RUNNING"]', True),
        (75, '["TIMEOUT", "COMPLETING"]', True),
        (75, "", True),  # SLURM does not say
        (75, '["CANCELLED", "COMPLETING"]', False),  # scancel
        *((code, '["RUNNING"]', False) for code in (0, 2, 1, 137)),
    ],
)
def test_slurm_requeues_what_was_told_to_stop(launch, code, states, requeued):
    done, calls = launch("slurm", codes=[code], states=[f'"job_state": {states}'], SLURM_JOB_ID="17")
    assert done.returncode == code
    asked = [["scontrol", "--json", "show", "job", "17"]] if code == 75 else []
    assert calls[1:] == asked + ([["scontrol", "requeue", "17"]] if requeued else [])


def check(value, schema, where="manifest"):
    """What is needed of JSON schema: type, required, properties, additionalProperties, items, enum, pattern."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    assert set(schema) <= {
        "type",
        "required",
        "properties",
        "additionalProperties",
        "items",
        "enum",
        "pattern",
        "description",
    }
    if "type" in schema:
        assert isinstance(value, types[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
        assert schema["type"] != "integer" or not isinstance(value, bool), f"{where}: {value!r}"
    if "enum" in schema:
        assert value in schema["enum"], f"{where}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema:
        assert re.search(schema["pattern"], value), f"{where}: {value!r}"
    for name in schema.get("required", ()):
        assert name in value, f"{where} has no {name}"
    for name, inner in value.items() if isinstance(value, dict) else ():
        found = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        assert found, f"{where}: {name} is unknown"
        check(inner, found, f"{where}.{name}")
    for i, inner in enumerate(value if isinstance(value, list) else ()):
        check(inner, schema["items"], f"{where}[{i}]")


SCHEMA = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())


def manifest(launch, **settings):
    done, calls = launch("kubernetes", DRY_RUN="1", **(SETTINGS["kubernetes"] | settings))
    assert done.returncode == 0 and calls == [], done.stderr
    found = yaml.safe_load(done.stdout)
    check(found, SCHEMA)
    return done.stdout, found


@pytest.mark.parametrize(
    "settings", [{}, {"NODES": "4", "SELECTOR": "a.b/c=d,e=f", "RESOURCE": "google.com/tpu", "GPUS": "4"}]
)
def test_kubernetes_manifest(launch, settings):
    text, found = manifest(launch, **settings)
    nodes = int(settings.get("NODES", 1))
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", nodes, nodes)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "mend_jax.train"]
    assert [text.replace("$$(", "$(") for text in container["args"]] == ARGUMENTS[1:]  # as Kubernetes reads it
    assert not re.search(r"(?<!\$)\$\(", "".join(container["args"]))  # or it would put a variable in
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["JAX_COORDINATOR_ADDRESS"] == "mend-workers-0-0.mend:1234"
    assert values["JAX_NUM_PROCESSES"] == str(nodes) and "JAX_PROCESS_ID" in values
    assert container["resources"]["limits"] == {
        settings.get("RESOURCE", "nvidia.com/gpu"): int(settings.get("GPUS", 8))
    }
    assert pod["nodeSelector"] == ({"a.b/c": "d", "e": "f"} if settings else {})


def test_kubernetes_restarts_what_was_told_to_stop(launch):
    """A 75 fails the Job by its pod policy, and that reason restarts the JobSet uncounted; a crash is counted."""
    _, found = manifest(launch)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert by_code["action"] == by_condition["action"] == "FailJob"
    assert by_code["onExitCodes"]["values"] == [75] and job["backoffLimit"] == 0
    assert by_code["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and found["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else a pod policy is refused


def test_kubernetes_applies_what_it_prints(launch, tmp_path):
    text, _ = manifest(launch)
    done, calls = launch("kubernetes", **SETTINGS["kubernetes"])
    assert done.returncode == 0 and calls == [["kubectl", "apply", "-f", "-"]]
    assert (tmp_path / "calls.stdin").read_text() == text.removeprefix("# kubectl apply -f -\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["spec"]["failurePolicy"].update(maxRestart=3), "maxRestart is unknown"),
        (lambda m: m["spec"]["replicatedJobs"][0].pop("template"), "has no template"),
        (lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"), "none of"),
        (lambda m: m["metadata"].update(name="My"), "'My'"),
        (lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"), "no integer"),
    ],
)
def test_the_schema_finds_mistakes(launch, change, said):
    _, found = manifest(launch)
    change(found)
    with pytest.raises(AssertionError, match=said):
        check(found, SCHEMA)


def remote_words(call):
    """The words of our command in a call of `gcloud ... ssh`, as the worker's shell reads them."""
    text = next(word for word in call if word.startswith("--command=")).removeprefix("--command=")
    return words(text.removeprefix("cd mend_jax && exec "))


def test_tpu_pod_prints_what_it_runs(launch):
    settings = {"SPOT": "1", "PROJECT": "p", "SETUP": "mount /shared"}
    create, archive, copy, install, command = printed = dry(launch, "tpu_pod", **settings)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mend"]
    wanted = {"--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base", "--spot", "--zone=z", "--project=p"}
    assert wanted <= set(create) and archive[:2] == ["git", "archive"]
    for call in (copy, install, command):
        assert "--worker=all" in call and "--zone=z" in call
    assert "mount /shared" in install[-1]
    assert remote_words(command) == [".venv/bin/python", *COMMAND[1:]]

    done, calls = launch("tpu_pod", states=["", "ACTIVE"], **(SETTINGS["tpu_pod"] | settings))
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if "describe" not in call] == printed


def kinds(calls):
    names = {"create": "create", "delete": "delete", "scp": "copy"}
    found = [next((names[word] for word in call if word in names), None) for call in calls]
    runs = ["run" if any("exec .venv" in word for word in call) else None for call in calls]
    return [one or two for one, two in zip(found, runs, strict=True) if one or two]


@pytest.mark.parametrize(
    ("codes", "states", "code", "expected"),
    [
        ([0], ["ACTIVE"], 0, ["copy", "run"]),  # the slice was there
        ([0], ["", "WAITING_FOR_RESOURCES", "ACTIVE"], 0, ["create", "copy", "run"]),
        ([75, 0], ["ACTIVE"], 0, ["copy", "run", "copy", "run"]),  # told to stop: again
        ([255, 0], ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"], 0,
         ["copy", "run", "delete", "create", "copy", "run"]),  # taken away: a new one, and again
        ([2], ["ACTIVE"], 1, ["copy", "run"]),  # a mistake
        ([0], ["FAILED"], 1, []),
    ],
)  # fmt: skip
def test_tpu_pod_goes_on(launch, codes, states, code, expected):
    done, calls = launch("tpu_pod", codes=codes, states=states, **SETTINGS["tpu_pod"])
    assert (done.returncode, kinds(calls)) == (code, expected), done.stderr
    assert code == 0 or re.search(r"^error: [^\n]+\n\Z", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("program", "codes"),
    [
        ("exit 0", {0}),
        ('[ "$JAX_PROCESS_ID" = 1 ] && exit 2; sleep 0.5', {2}),
        ('[ "$JAX_PROCESS_ID" = 1 ] && kill -KILL $$; exec sleep 100', {137}),  # the others are ended too
    ],
)
def test_local_ends_with_the_code_of_the_first_that_fails(launch, tmp_path, program, codes):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    done, _ = launch("local", **(SETTINGS["local"] | {"PYTHON": str(python)}))
    assert done.returncode in codes, done.stderr


def test_local_hands_sigterm_to_all(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ntrap 'exit 75' TERM\ntouch {tmp_path}/ready$JAX_PROCESS_ID\nsleep 100 & wait\n")
    python.chmod(0o755)
    settings = os.environ | SETTINGS["local"] | {"PYTHON": str(python)}
    launcher = subprocess.Popen([ROOT / "launch" / "local.sh", "train"], env=settings, stdout=subprocess.DEVNULL)
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
        assert launcher.poll() is None
    launcher.terminate()
    assert launcher.wait(timeout=300) == 75
