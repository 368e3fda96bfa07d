"""Several processes of one command: JAX's own distributed runtime, started if this process is one of several.

| where | how JAX learns the address, the number of processes and the index |
| --- | --- |
| SLURM step (srun), Open MPI | by itself |
| TPU pod slice, TPU slices on GKE | by itself |
| anywhere else | JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID; only the last differs |

A single process starts nothing. All processes run the same command and see the same workdir.
"""

import contextlib
import itertools
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

from mend_jax.cli.errors import UserError

NUMBER, INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
PATIENCE = 10  # seconds that a failing process waits for the others to fail too
HEARD = 5  # seconds that a command may take to react to SIGTERM while it runs a JAX program, before it is ended
STOPPED = 75  # exit code after SIGTERM: EX_TEMPFAIL, "try again"
_calls = itertools.count()  # calls of `told_to_stop` in this process
_stop_printed = threading.Event()  # set once a thread that ends the process has printed the last message


def start() -> None:
    """Connects to the other processes, if there are any. To be called before anything is computed.

    Raises UserError if the settings are incomplete or the other processes do not connect.
    """
    import jax  # slow, and only now needed

    if not is_one_of_several(jax.config.jax_platforms or ""):
        return
    number, index = _number(NUMBER), _number(INDEX)
    told = os.environ.get("JAX_COORDINATOR_ADDRESS") and None not in (number, index)
    method = {"cluster_detection_method": "deactivate"} if told else {}
    try:
        jax.distributed.initialize(num_processes=number, process_id=index, **method)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"The processes cannot connect ({reason}): give all the same JAX_COORDINATOR_ADDRESS=HOST:PORT and {NUMBER}, "
            f"and each its own {INDEX}, or start them with a script of launch/."
        ) from error


def is_one_of_several(platforms: str = "") -> bool:
    """Whether the environment sets up several processes; `platforms` is jax.config.jax_platforms ("tpu,cpu" with TPUs)."""
    env = os.environ
    if env.get("JAX_COORDINATOR_ADDRESS"):
        return True
    if any(int(env.get(name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if "tpu" not in platforms:
        return False
    if int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts
    return "TPU_SKIP_MDS_QUERY" not in env  # a TPU VM: its metadata server tells JAX the number of processes


def wait_for_all(name: str) -> None:
    """Returns when all processes have reached this call."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def of_first(value: float) -> float:
    """Process 0's `value`, on all processes, so that they decide alike."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    bits = np.frombuffer(np.float64(value).tobytes(), np.uint32)  # JAX would round a float64
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def to_host(array):
    """A whole array as numpy. If other processes hold parts of it, all processes must make this call."""
    import jax
    import numpy as np

    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


def told_to_stop() -> bool:
    """True on all of several processes in the same call, counted from the start, after SIGTERM to any of them.

    JAX catches the signal and lets the processes agree on a call that none has reached yet, so all must call equally often.
    """
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(next(_calls))


INTERRUPTED = 130  # exit code after Ctrl-C


class Stopped(BaseException):
    """SIGTERM arrived."""


@contextlib.contextmanager
def stops_at_sigterm(keeps: bool = True) -> Iterator[None]:
    """Within it, SIGTERM raises `Stopped`: for work that may end at once. Does nothing outside the main thread.

    `keeps` is as in `stopped`.
    A main thread that waits for others, computes or compiles does not see the signal: then another thread ends the process.
    With several processes the handler replaces JAX's, so `told_to_stop` no longer sees the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_, frame):
        if _collecting(frame):  # Python only prints what is raised there
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return
        raise Stopped

    signals, told = os.pipe()  # receives the number of each signal at once
    os.set_blocking(told, False)
    threading.Thread(target=_end_deaf, args=(signals, stop, keeps), daemon=True).start()
    before = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before[0] or signal.SIG_DFL)
        signal.set_wakeup_fd(before[1])
        os.close(told)


def _collecting(frame) -> bool:
    """Whether a signal interrupted JAX's callback of Python's garbage collection."""
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False


def _end_deaf(signals: int, stop, keeps: bool) -> None:
    """Ends the process if, soon after SIGTERM, the main thread has not left `stops_at_sigterm`, which closes the pipe.

    Handlers other than `stop`, such as a training's, may take longer.
    """
    with os.fdopen(signals, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is stop:
                if select.select([pipe], [], [], HEARD)[0]:
                    continue
                say_stopped(keeps)
                _stop_printed.set()  # the main thread may still see the signal once the others have gone
                leave(STOPPED)
                os._exit(STOPPED)


def say_stopped(keeps: bool) -> None:
    """Prints the last message that the user sees, once."""
    if not _stop_printed.is_set():
        print(f"{label()}{stopped(keeps)}", file=sys.stderr, flush=True)


def stopped(keeps: bool) -> str:
    """What a stopped command says; `keeps`: whether what it had finished is on disk, where the same command finds it."""
    return f"Stopped. The same command {'goes on from what is finished' if keeps else 'begins anew'}."


def is_running() -> bool:
    """Whether this process is connected to others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints, and that writes the files that are written once."""
    return not is_running() or sys.modules["jax"].process_index() == 0


def label() -> str:
    """The label in front of a message: empty for the first process."""
    return "" if is_first() else f"process {sys.modules['jax'].process_index()}: "


def leave(code: int) -> None:
    """Ends a process that failed, without waiting for others that may never come. Returns if `code` is 0 or it is alone."""
    if code == 0 or not is_running():
        return
    together = threading.Thread(target=sys.modules["jax"].distributed.shutdown, daemon=True)
    together.start()
    together.join(PATIENCE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text} is not a whole number: set it to one, or unset it.")
    return int(text)
