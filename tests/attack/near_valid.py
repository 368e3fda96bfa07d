"""Files that are almost right: a valid JSON value with odd values in it, then its bytes with something done to them."""

import codecs
import copy
import json

from hypothesis import strategies as st


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**30, 10**120,
    "", " ", "5", "\ud800", "\udfff x", "\x00", "\x1b[31mred", "\u202eevil", "\ufeff", "caf\u00e9", "a|b", "<b>", "x" * 5000,
    "../x", "..", "/etc/passwd", "a/../../b", ".", "%s", "{}", "\n", [], {}, [[]], [None], [1], ["a", "a"], {"a": {}}, {"": 1},
    nested(3), nested(300),
]  # fmt: skip
BYTES = [
    b"\x00", b"\xe9", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"\r", b"\n", b"{", b"[" * 2000, b"]", b'"', b",",
    b"9" * 5000, b"\\ud800", codecs.BOM_UTF8, b"\xe2\x80\xa8", b"\x1b", b"NaN", b"null", b"//",
]  # fmt: skip


def places(value):
    """(container, key) of everything in a JSON value."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, one in inner:
        yield value, key
        yield from places(one)


@st.composite
def values(draw, valid):
    """A JSON value that is `valid` but for up to three places."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(value))
        if not found or draw(st.integers(0, 19)) == 0:
            return draw(st.sampled_from(HOSTILE))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["put", "put", "put", "take", "add", "number"]))
        if change == "take":
            del container[key]
        elif change == "number":
            container[key] = draw(st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8))
        elif change == "add" and isinstance(container, dict):
            container[draw(st.text(max_size=5))] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        else:
            container[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    return value


@st.composite
def contents(draw, valid, lines=False):
    """The bytes of a file of one value, or of `lines` of them, of which something may have been done to the bytes too."""
    count = draw(st.integers(1, 3)) if lines else 1
    rows = [json.dumps(draw(values(valid)), ensure_ascii=draw(st.booleans())) for _ in range(count)]
    data = "".join(row + "\n" for row in rows).encode("utf-8", errors="surrogatepass")
    return draw(damaged(data))


@st.composite
def damaged(draw, data):
    """Some bytes, as they are or with one thing done to them."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    change = draw(
        st.sampled_from(["", "", "", "", "cut", "flip", "put", "mark", "latin", "crlf", "twice", "utf16", "empty"])
    )
    if change == "cut":
        return data[:at]
    if change == "flip" and data:
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if change == "put":
        return data[:at] + draw(st.sampled_from(BYTES)) + data[at:]
    if change == "mark":
        return codecs.BOM_UTF8 + data
    if change == "latin":
        return data.decode("utf-8", errors="replace").encode("latin-1", errors="replace")
    if change == "crlf":
        return data.replace(b"\n", b"\r\n")
    if change == "twice":
        return data + data
    if change == "utf16":
        return data.decode("utf-8", errors="replace").encode("utf-16")
    return b"" if change == "empty" else data
