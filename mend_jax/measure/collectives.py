"""What the devices of a compiled program send to one another, read in its text (HLO, as `Compiled.as_text()` gives it)."""

import math
import re

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)  # "%g = bf16[64,32]{1,0} all-gather(%w), ...", or a tuple of results; begun apart: (operands, results, ...)
CALLS = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
ENDS = re.compile(r" async-(?:update|done)\(")  # may name again what was called at its start
BRANCHES = re.compile(r"(?:true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")

GROUPS = (  # as it writes the groups of devices: axes of a mesh, [number of groups, devices in one], all devices by number
    r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{(.*?)\}",
    r"\[\d+,(\d+)\]",
    r"\{\{([\d,]*)\}",
)


def sent(text: str) -> dict[str, float]:
    """{collective operation: bytes that one device sends} in the text of a compiled program, loops counted in full.

    As rings send them: of an all-gather of S bytes over n devices S (n-1)/n, of an all-reduce twice that. A loop whose
    number of turns the compiler did not find counts once, of the branches of a condition the one that sends most.
    """
    bodies, entry = _computations(text)
    known: dict[str, dict] = {}

    def total(name: str) -> dict[str, float]:
        if name not in known:
            known[name] = {}
            for line in bodies[name]:
                _add(known[name], _own(line))
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                for called in CALLS.findall(line) if not ENDS.search(line) else ():
                    _add(known[name], total(called), int(trips[1]) if trips else 1)
                branches = re.findall(r"[\w.\-]+", " ".join(BRANCHES.findall(line)))
                _add(known[name], max(map(total, branches), key=lambda of: sum(of.values()), default={}))
        return known[name]

    return total(entry)


def ring(n: int) -> float:
    """The share of S bytes that a device sends where rings of n devices gather or reduce-scatter them."""
    return (n - 1) / n


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines} of every function of a program, the name of the one that is called)."""
    bodies, entry, name = {}, "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            entry, bodies[name] = (name if header[1] else entry), []
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _own(line: str) -> dict[str, float]:
    """What one operation sends."""
    found = COLLECTIVE.search(line)
    if not found:
        return {}
    result, kind, begun = found.groups()
    if begun and kind != "all-reduce" and result.startswith("("):
        result = _parts(result)[1]
    size = sum(
        max(1, int(re.sub(r"\D", "", dtype) or 8) // 8) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", result)
    )
    if kind == "collective-permute":
        return {kind: float(size)}
    n = _group(line)
    return {kind: size * {"all-reduce": 2 * ring(n), "reduce-scatter": n - 1}.get(kind, ring(n))}


def _parts(kind: str) -> list[str]:
    """The members of a tuple's type, which may be tuples too."""
    parts, depth = [""], 0
    for letter in kind[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _group(line: str) -> int:
    """Devices that take part in one group of a collective operation. Raises ValueError where the text does not say it."""
    mesh, counted, listed = (re.search(f"replica_groups={pattern}", line) for pattern in GROUPS)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if not counted and not listed:
        raise ValueError(f"No groups of devices are found in {line.strip()}")
    return int(counted[1]) if counted else len(listed[1].split(","))


def _add(into: dict, other: dict, times: float = 1) -> None:
    for kind, size in other.items():
        into[kind] = into.get(kind, 0) + times * size
