"""What the server takes and keeps, at most. Every field is a flag of `python -m mend_jax.serve`, which describes it."""

import dataclasses

from mend_jax.cli.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    max_body: int = 2**20
    max_file: int = 64 * 2**20
    max_demonstrations: int = 1024
    max_inputs: int = 64
    max_options: int = 64
    max_query_tokens: int = 1024
    max_tokens: int = 256
    max_waiting: int = 256
    max_connections: int = 512
    max_seconds: float = 60.0
    body_seconds: float = 10.0
    pack_bytes: int = 256 * 2**20
    cache_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 < value < float("inf"):
                raise UserError(f"--{name}={value} is no limit: give a number above 0.")
