"""The bytes that a compiled program's devices send to one another, read from its HLO text (`Compiled.as_text()`)."""

import math
import re

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)  # "%g = bf16[64,32]{1,0} all-gather(%w), ...", or a tuple of results; asynchronous: (operands, results, ...)
CALLS = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
ENDS = re.compile(r" async-(?:update|done)\(")  # these may name the computation of their start again
BRANCHES = re.compile(r"(?:true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")

GROUPS = (  # how HLO writes the groups of devices: mesh axes, [number of groups, devices per group], or all device numbers
    r"mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{(.*?)\}",
    r"\[\d+,(\d+)\]",
    r"\{\{([\d,]*)\}",
)


def sent(text: str) -> dict[str, float]:
    """{collective operation: bytes that one device sends} in the text of a compiled program, loops counted in full.

    Sizes assume rings: an all-gather of S bytes over n devices sends S (n-1)/n, an all-reduce twice that. A loop whose trip
    count the compiler did not find counts once; of a conditional, the branch that sends most counts.
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
    """The share of a tensor's bytes that each device of a ring of n sends to all-gather or reduce-scatter it."""
    return (n - 1) / n


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines} of every computation of a program, the name of its entry computation)."""
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
    """{operation: bytes} that one line's operation sends."""
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
    """The number of devices in one group of a collective operation. Raises ValueError if the line does not contain it."""
    mesh, counted, listed = (re.search(f"replica_groups={pattern}", line) for pattern in GROUPS)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    if not counted and not listed:
        raise ValueError(f"No groups of devices found in {line.strip()}")
    return int(counted[1]) if counted else len(listed[1].split(","))


def _add(into: dict, other: dict, times: float = 1) -> None:
    for kind, size in other.items():
        into[kind] = into.get(kind, 0) + times * size
