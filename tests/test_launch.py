"""The launch scripts: they parse, stop with a sentence, and install once. No package is installed here."""

import http.server
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from facts import states

from mend_jax.cli.config_files import ROOT

SCRIPTS = ["launch/quickstart.sh", "launch/test.sh", ".ci/run"]
ALONE = ["launch/accelerator.sh"]  # see test_accelerator.py
JOBS = [f"launch/{name}.sh" for name in ("local", "slurm", "kubernetes", "tpu_pod")]  # see test_launch_jobs.py
PIP = """#!/bin/sh
# Stands for the environment's Python: writes down what it is asked to do, installs nothing.
echo "$@" >>"$CALLS"
case "$*" in
*"pip install"*) exit "${PIP_CODE:-0}" ;;
"- http"*) exit "${INDEX_CODE:-0}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """The scripts in a folder of their own, with an environment that is already made."""
    for folder in ("launch", ".ci"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("requirements.txt", "requirements-test.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    _interpreter(tmp_path / ".venv" / "bin" / "python", PIP)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("")
    return tmp_path


def _interpreter(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def launch(clone, script, *arguments, **environment):
    """(finished process, the calls of the environment's Python)"""
    calls = clone / "calls"
    calls.write_text("")
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone), "CALLS": str(calls), **environment}
    command = [str(clone / script), *arguments]
    process = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60)
    return process, [line for line in calls.read_text().splitlines() if not line.startswith(("-c", "- "))]


@pytest.mark.parametrize("script", [*SCRIPTS, *ALONE, *JOBS, "launch/environment.sh"])
def test_parses(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not there: pip install -r requirements-test.txt")
    scripts = [*SCRIPTS, *ALONE, *JOBS, "launch/environment.sh"]
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, *ALONE, *JOBS])
def test_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize(
    ("script", "requirements", "work"),
    [
        (
            "launch/quickstart.sh",
            "requirements.txt",
            "-m mend_jax.experiments.methods --config=configs/small_world.py:quick",
        ),
        ("launch/test.sh", "requirements-test.txt", "-m pytest"),
        (".ci/run", "requirements-test.txt", "-m pytest"),
    ],
)
def test_installs_once_and_passes_arguments_on(clone, script, requirements, work):
    first, calls = launch(clone, script, "--seed", "a b")
    assert first.returncode == 0, first.stderr
    assert len(calls) == 2 and "pip install" in calls[0] and f"-r {requirements}" in calls[0]
    assert calls[1].startswith(work) and calls[1].endswith(" --seed a b")
    again, calls = launch(clone, script)
    assert again.returncode == 0 and len(calls) == 1 and calls[0].startswith(work)
    (clone / "requirements.txt").write_text("jax")
    assert "pip install" in launch(clone, script)[1][0]


@pytest.mark.parametrize("script", ["launch/test.sh", ".ci/run"])
def test_quick_leaves_the_slow_tests_out_and_passes_arguments_on(clone, script):
    usual = launch(clone, script, "-x", "a b")[1][-1]
    assert "slow" not in usual and usual.endswith(" -x a b")
    assert launch(clone, script, "quick", "-x", "a b")[1][-1] == usual.replace(" -x", " -m not slow -x")
    assert launch(clone, script, "quick")[1][-1] == usual.replace("-x a b", "-m not slow")
    assert launch(clone, script, "-k", "quick")[1][-1].endswith(" -k quick")


def test_the_mark_that_quick_leaves_out_is_registered(pytestconfig):
    assert any(line.startswith("slow:") for line in pytestconfig.getini("markers"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_hands_sigterm_to_the_command_and_ends_with_its_code(clone, script):
    ends_with_75 = 'trap "exit 75" TERM; touch "$CALLS"; while sleep 0.05; do :; done'
    program = f'case "$*" in *"pip install"* | "-c "* | "- "*) ;; *) {ends_with_75} ;; esac'
    _interpreter(clone / ".venv" / "bin" / "python", f"#!/bin/bash\n{program}\n")
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone), "CALLS": str(clone / "ready")}
    launcher = subprocess.Popen([clone / script], env=environment, stdout=subprocess.DEVNULL)
    while not (clone / "ready").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.terminate()
    assert launcher.wait(timeout=60) == 75


def test_an_accelerators_jax_is_installed_when_it_is_named(clone):
    launch(clone, "launch/quickstart.sh")
    calls = launch(clone, "launch/quickstart.sh", JAX_EXTRA="cuda13")[1]
    assert "pip install" in calls[0] and calls[0].endswith("jax[cuda13]")


@pytest.mark.parametrize("script", SCRIPTS)
def test_stops_at_a_failed_installation_and_tries_again(clone, script):
    failed, calls = launch(clone, script, PIP_CODE="1")
    assert failed.returncode == 1 and len(calls) == 1
    assert "error: pip could not install" in failed.stderr
    assert "pip install" in launch(clone, script)[1][0]


def test_pytorch_without_cuda_where_its_index_answers(clone):
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        pytest.skip("PyTorch's own index is for Linux without NVIDIA's GPUs")
    index = "--extra-index-url https://download.pytorch.org/whl/cpu -r requirements-test.txt"
    assert index in launch(clone, "launch/test.sh")[1][0]
    (clone / ".venv" / "installed-requirements-test").unlink()
    process, calls = launch(clone, "launch/test.sh", INDEX_CODE="1")
    assert "pip install" in calls[0] and "--extra-index-url" not in calls[0]
    [line] = (line for line in process.stderr.splitlines() if "PyTorch" in line)
    states(line, "https://download.pytorch.org/whl/cpu", "pip's own index")


class Index(http.server.BaseHTTPRequestHandler):
    """Answers /busy at the second time, and nothing else but /there."""

    def do_GET(self):
        self.server.asked.append(self.path)
        busy = self.path == "/busy" and self.server.asked.count("/busy") == 1
        self.send_response(503 if busy else 404 if self.path == "/gone" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_whether_an_index_answers():
    with http.server.ThreadingHTTPServer(("localhost", 0), Index) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://localhost:{server.server_port}"
        pages = (f"{here}/there", f"{here}/busy", f"{here}/gone", "http://localhost:1/unreachable")
        command = 'source launch/environment.sh; for page in "${@:2}"; do answers "$1" "$page"; echo $?; done'
        found = subprocess.run(
            ["bash", "-c", command, "bash", sys.executable, *pages], cwd=ROOT, capture_output=True, text=True
        )
        server.shutdown()
    assert found.stdout.split() == ["0", "0", "1", "1"]
    assert server.asked == ["/there", "/busy", "/busy", "/gone"]


def test_makes_an_environment_that_is_broken_anew(clone):
    _interpreter(clone / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    _interpreter(clone / "python", '#!/bin/sh\necho "$@" >>"$CALLS"\n')
    failed, calls = launch(clone, "launch/test.sh", PYTHON=str(clone / "python"))
    assert failed.returncode == 1 and "-m venv --clear .venv" in calls


def test_another_folder_is_not_taken_for_an_environment(clone):
    (clone / "documents").mkdir()
    (clone / "documents" / "letter").write_text("dear")
    failed, _ = launch(clone, "launch/test.sh", VENV="documents", PYTHON=sys.executable)
    assert failed.returncode == 1 and "not a Python environment" in failed.stderr
    assert (clone / "documents" / "letter").exists()


def test_says_which_python_is_needed(clone):
    old = clone / "old"
    for name in ("python3", "python3.11", "python3.12"):
        _interpreter(old / name, "#!/bin/sh\nexit 1\n")
    failed, _ = launch(clone, "launch/quickstart.sh", VENV="new", PATH=f"{old}:/usr/bin:/bin")
    assert failed.returncode == 1 and "Python 3.11 or 3.12 is needed" in failed.stderr
