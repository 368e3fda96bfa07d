"""What JAX finds on this machine: devices, versions, the driver's own line.

python -m mend_jax.measure.devices --out=devices.json
"""

import subprocess

import jax

from mend_jax.cli import command_line as cli
from mend_jax.measure.machine import machine
from mend_jax.run.files import write_report

QUERY = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"


def devices(out: str) -> None:
    """The command.

    Args:
        out: the JSON file to write.
    """
    first = jax.devices()[0]
    report = {
        "platform": first.platform,
        "device": first.device_kind,
        "count": jax.device_count(),
        "memory_bytes": (first.memory_stats() or {}).get("bytes_limit"),
        "nvidia_smi": _nvidia_smi(),
        "machine": machine(),
    }
    print(
        f"{report['count']} x {report['device']} ({report['platform']}); {report['nvidia_smi'] or 'no NVIDIA driver'}"
    )
    write_report(out, report)


def _nvidia_smi() -> str | None:
    command = ["nvidia-smi", QUERY, "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    cli.run(devices)
