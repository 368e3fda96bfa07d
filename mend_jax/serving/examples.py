"""Demonstrations and a query to try, in words that the LLM knows."""

from collections.abc import Sequence
from typing import NamedTuple


class Example(NamedTuple):
    """A task to show: what the page's button fills in."""

    demonstrations: Sequence[tuple[str, str]]
    input: str
    options: Sequence[str]


_IVORY, _MAROON = ("fudi megu sobi gazi", "ivory"), ("meda fepo selo", "maroon")
SMALL_WORLD = Example(
    4 * [_IVORY, _MAROON, ("sobi gazi gigu", "ivory"), ("bota selo fepo", "maroon")],
    "gopi fepo bota",
    ("ivory", "maroon"),
)
ENGLISH = Example(
    [
        ("a warm and funny film that I will see again", "positive"),
        ("two hours of my life that nobody gives back", "negative"),
        ("the actors are wonderful", "positive"),
        ("the plot makes no sense at all", "negative"),
        ("I laughed until I cried", "positive"),
        ("dull, loud and far too long", "negative"),
        ("one of the best films of the year", "positive"),
        ("I fell asleep before the end", "negative"),
    ],
    "what a lovely surprise",
    ("positive", "negative"),
)


def example_for(llm) -> Example:
    """The example of which the LLM's tokenizer makes the fewest tokens per word, and none that is unknown."""
    if llm.tokenizer is None:
        return ENGLISH

    def cost(example: Example) -> tuple[bool, float]:
        text = " ".join(word for pair in example.demonstrations for word in pair)
        tokens = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = getattr(llm.tokenizer, "unk_token_id", None)
        return unknown is not None and unknown in tokens, len(tokens) / len(text.split())

    return min((ENGLISH, SMALL_WORLD), key=cost)
