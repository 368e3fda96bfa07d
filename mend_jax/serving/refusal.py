"""What the server answers where it does not do what it was asked: a status code and one sentence."""

import json
from collections.abc import Mapping


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, dict(headers or {})

    @property
    def body(self) -> bytes:
        """The answer's JSON. Texts of the client stand in it as they came, so that what is no text is escaped."""
        return json.dumps({"error": self.sentence}).encode()


def busy(sentence: str, status: int = 503) -> Refused:
    """A refusal of what may succeed in a moment."""
    return Refused(status, sentence, {"Retry-After": "1"})
