"""Templates: the texts around the input x and the output y of an example. Texts alone; nothing is tokenised here.

An example is up to three pieces of text, each of which is tokenised alone, so that a context is a plain concatenation:

    before + x | between | answer + y

An input that is too long is cut at the end of the first piece, so `between` is never lost. It belongs to x: it ends a query,
and an option's score does not cover it. A template without it whose other two texts are the same is a mere separator.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

from mend_jax.cli.errors import UserError

QUERY = "I loved it"  # of the snippets that cards print


class Template(NamedTuple):
    """The texts around x and y."""

    before: str  # stands before every x and is tokenised with it
    between: str  # stands after every x and is tokenised alone; "": nothing does
    answer: str  # stands before every y and every option and is tokenised with it

    def query(self, x: str) -> list[str]:
        """The pieces of an input."""
        return [self.before + x, self.between] if self.between else [self.before + x]

    def output(self, y: str) -> list[str]:
        """The piece of an output or an option."""
        return [self.answer + y]

    def example(self, x: str, y: str) -> list[str]:
        """The pieces of a demonstration."""
        return self.query(x) + self.output(y)

    @property
    def is_separator(self) -> bool:
        """Whether one text stands before every x and y, and nothing else."""
        return not self.between and self.before == self.answer

    @property
    def separator(self) -> str:
        """The text before every x and y. Raises UserError for a template that has more than that."""
        if not self.is_separator:
            raise UserError(
                f"The template {self.name} is more than a separator: use `template` in the place of `separator`."
            )
        return self.before

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that begin what stands before the next x, or before a second answer; none of spaces alone."""
        return tuple(dict.fromkeys(filter(None, (self.before.strip(" "), self.between.strip(" ")))))

    @property
    def name(self) -> str:
        """Its key in `TEMPLATES`; without one its texts."""
        return next((name for name, known in TEMPLATES.items() if known == self), repr(tuple(self)))


TEMPLATES = {  # by name: the choices of config.data.template
    "space": Template(" ", "", " "),
    "newline": Template("\n", "", "\n"),
    "qa": Template("\n\nInput: ", "\nOutput:", " "),
    "question": Template("\n\nQuestion: ", "\nAnswer:", " "),
}
SPACE = TEMPLATES["space"]
SEPARATORS = {made.before: made for made in TEMPLATES.values() if made.is_separator}  # by their text


def chosen(template: "str | Template | None", separator: str | None = None) -> Template:
    """The template that a caller means.

    Args:
        template: a name in `TEMPLATES`, or a Template; None: `separator`'s or, without one, "space".
        separator: a text in `SEPARATORS`, in the place of `template`; a `template` may be one too.
    Raises:
        UserError: both, or an unknown one.
    """
    if template is not None and separator is not None:
        raise UserError(f"template={template!r} and separator={separator!r} are two templates: give one of them.")
    if isinstance(template, Template):
        return template
    if template is None:
        given, known = " " if separator is None else separator, SEPARATORS
    else:
        given, known = template, SEPARATORS | TEMPLATES
    if not isinstance(given, str) or given not in known:
        raise UserError(f"A template is one of {', '.join(TEMPLATES)}, or the `template` of a prefix, not {given!r}.")
    return known[given]


# In files


def as_fields(template: Template) -> dict:
    """The fields that describe a template in files of trained models; for a separator those that older files have too."""
    return {"separator": template.before} if template.is_separator else {"template": template._asdict()}


def from_fields(fields: Mapping) -> Template:
    """The template of `as_fields`. Raises KeyError or TypeError for anything else."""
    if "template" in fields:
        made = Template(**fields["template"])
    else:
        made = Template(fields["separator"], "", fields["separator"])
    if not all(isinstance(text, str) for text in made):
        raise TypeError("a template is three texts")
    return made


# In the words of model cards


def in_words(template: Template) -> dict[str, str]:
    """What a card says of a template: {"put": what training put where, "rule": how to tokenise each text, "pieces": how those
    of a sequence were tokenised, "query": the lines that make `query_ids`, of `QUERY`}."""
    if template.is_separator:
        name = {" ": "a space", "\n": "a newline"}.get(template.before, json.dumps(template.before))
        text = json.dumps(template.before + QUERY)
        return {
            "put": f"{name} before every x and y",
            "rule": f"Every x, y and option is tokenised with {name} in front",
            "pieces": f"every x and y was tokenised separately, with {name} in front and without special tokens",
            "query": f'query_ids = tokenizer({text}, add_special_tokens=False, return_tensors="pt").input_ids.to(llm.device)',
        }
    before, between, answer = map(json.dumps, template)
    behind = f", then {between} alone" if template.between else ""
    return {
        "put": f"{before} before every x{behind}, {answer} before every y",
        "rule": f"Every x is tokenised with {before} in front{behind}; every y and option with {answer} in front",
        "pieces": f"every x was tokenised with {before} in front{behind}, every y with {answer} in front, all without special tokens",
        "query": f"pieces = tokenizer({json.dumps(template.query(QUERY))}, add_special_tokens=False).input_ids\n"
        "query_ids = torch.tensor([sum(pieces, [])], device=llm.device)",
    }


def tokenizer_lines(own: bool) -> dict[str, str]:
    """What a card's snippet imports and runs where its folder holds the LLM's tokenizer as training read with it, since
    transformers reads the LLM's otherwise (models/folders.py): {"imports": ..., "loads": ...}; "" where it does not."""
    if not own:
        return {"imports": "", "loads": ""}
    return {
        "imports": "from transformers import AutoTokenizer\n",
        "loads": 'tokenizer = AutoTokenizer.from_pretrained(folder)  # the LLM\'s reads " x" as an empty word and a word\n',
    }
