"""What clients send, as pydantic reads it and the OpenAPI page shows it. Names in requests are ids and texts, never paths."""

from typing import Annotated, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field

from mend_jax.cli.errors import UserError
from mend_jax.data.templates import TEMPLATES
from mend_jax.packs.demonstrations import pair_of
from mend_jax.serving.refusal import Refused

TOKENS = 64  # of an answer, where the client does not say

Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Nothing is converted and nothing unknown is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Demonstration(Strict):
    """An example of the task: an input and the output that is right for it. Other fields, as MetaICL's files have, are ignored."""

    model_config = ConfigDict(extra="ignore")

    input: Text
    output: Text


class Question(Strict):
    """What both kinds of questions have: what stands before them, and the inputs."""

    input: Text | list[Text] = Field(description="One input, or several, each of which is answered.")
    pack: str | None = Field(None, description="The id of a pack, whose vectors stand before each input.")
    demonstrations: list[Demonstration] | None = Field(
        None,
        description="In the place of a pack: the demonstrations themselves, in the prompt. With neither nothing stands there.",
    )
    template: Literal[*TEMPLATES] | None = Field(
        None, description="The texts around inputs and outputs; a pack has its own. null: the distiller's, or space."
    )
    keep: bool = Field(
        False,
        description="Keep the LLM's keys and values of the demonstrations for the next request with the same ones.",
    )


class ScoreRequest(Question):
    """Which of several options is the likeliest answer?"""

    options: list[Text] = Field(description="The answers to choose from, all different.")


class GenerateRequest(Question):
    """What does the LLM answer in its own words?"""

    max_tokens: int | None = Field(
        None, ge=1, description=f"Tokens of an answer, at most; null: {TOKENS}, if the server makes so many."
    )
    temperature: float = Field(
        0.0, ge=0, le=1000, description="0: the likeliest token each time; else tokens are drawn."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Only the likeliest tokens are drawn whose probabilities add up to it."
    )
    stop: Text | list[Text] | None = Field(
        None, description="Texts before which an answer ends; null: what the template puts before the next example."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the draws.")


def read_json(body: bytes):
    """The value of a JSON text. Raises `Refused` for anything else: what is no UTF-8, NaN, half a surrogate, too deep."""
    return _parsed(body, "The body")


def read_pairs(body: bytes, lines: bool, most: int) -> list[tuple[str, str]]:
    """The (x, y) pairs of demonstrations: a JSON list of objects, or `lines` of them; `most` of them at most. Raises `Refused`."""
    if lines:
        places = [(f"Line {number}", line) for number, line in enumerate(body.split(b"\n"), 1) if line.strip()]
        rows = [(where, _parsed(line, where)) for where, line in places[: most + 1]]
    else:
        value = read_json(body)
        if not isinstance(value, list):
            raise Refused(
                422, 'The body is no list: send [{"input": ..., "output": ...}, ...], or lines as application/x-ndjson.'
            )
        rows = [(f"Demonstration {number}", row) for number, row in enumerate(value, 1)]
    require_count("demonstrations", len(rows), most)
    for where, row in rows:
        if not isinstance(row, dict):
            raise Refused(422, f'{where} is no object: a demonstration is {{"input": ..., "output": ...}}.')
    try:
        return [pair_of(row, where) for where, row in rows]
    except UserError as error:
        raise Refused(422, str(error)) from None


def require_count(what: str, count: int, most: int) -> None:
    """Raises `Refused` for none, or for more than `most`."""
    if count == 0:
        raise Refused(422, f"There are no {what}: send at least one.")
    if count > most:
        raise Refused(422, f"There are more than {most} {what}, the most that this server takes: send fewer.")


def require_texts(what: str, texts: list[str]) -> None:
    """Raises `Refused` for a text of white space alone."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise Refused(422, f"{what} {number} is empty: give it a word.")


def sentence_of(errors: list[dict]) -> str:
    """The sentence for a client of pydantic's errors: of the one that is deepest in the body."""
    error = max(errors, key=lambda error: sum(isinstance(part, int) for part in error["loc"]))
    # Of a field with two types, pydantic names the type too, which is no identifier.
    parts = (part for part in error["loc"][1:] if isinstance(part, int) or part.isidentifier())
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)[:60]
    return f"{place.lstrip('.') or 'The body'} is wrong ({error['msg'].rstrip('.')}): /docs says what is understood."


def _parsed(text: bytes, where: str):
    try:
        return pydantic_core.from_json(text.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
        try:
            text.decode()
        except UnicodeDecodeError as wrong:
            raise Refused(400, f"{where} is not UTF-8 (byte {wrong.start}): send it as UTF-8.") from None
        raise Refused(400, f"{where} is not valid JSON ({reason}): correct it.") from None
