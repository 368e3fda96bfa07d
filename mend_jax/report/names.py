"""What methods and rows are called in the report, the same in every table and figure."""

from collections.abc import Iterable

METHODS = {
    "zero_shot": "zero-shot",
    "prompt_tuning": "PromptTuning",
    "icl": "Vanilla ICL",
    "hypertuning": "HyperTuning",
    "mend": "MEND",
}
UNTRAINED = "-"  # the value of a label that says how something was trained, where nothing was
UNTRAINED_NAME = "untrained"


def method_name(name: str) -> str:
    """`mend, nested` as `MEND, nested`; a method that is not known keeps its name."""
    head, comma, rest = name.partition(",")
    return METHODS.get(head, head) + comma + rest


def value_name(label: str, value: str) -> str:
    """The value of a label as it is shown."""
    if label == "demonstrations" and value == "none":  # their perturbation
        return "unchanged"
    return method_name(value) if label == "method" else value


def joined(labels: Iterable[tuple[str, str]]) -> str:
    """Labels as one text: `MEND, K=4`, `beta=0.5`. Numbers stand with their names, other values alone; empty ones are left out."""
    parts, before = [], ""
    for name, value in labels:
        if name == "value" and before:  # of a hyperparameter, whose name is the label before it
            parts[-1] = f"{before}={value}"
        elif value and not (value == UNTRAINED and UNTRAINED_NAME in parts):
            parts.append(f"{name}={value}" if _is_number(value) else _word(name, value))
        before = value if name == "hyperparameter" else ""
    return ", ".join(parts)


def _word(name: str, value: str) -> str:
    return UNTRAINED_NAME if value == UNTRAINED else value_name(name, value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
