"""A pack: the vectors of one set of demonstrations in a safetensors file, with what they are for in its metadata.

    vectors             (l, llm_width) float32, the file's only tensor
    pack_format         "1"; a program refuses a newer one
    llm                 the LLM, a path or a name as it was given; `llm_fingerprint` and `tokenizer_fingerprint` decide
    distiller           as it was given; `distiller_fingerprint`, `kind` (of prefix)
    num_vectors         l
    num_demonstrations  K, those that were read; `dropped` are the numbers (from 0) of those that did not fit, as JSON
    shorter             numbers of vectors, as JSON: the first so many are a prefix that the distiller was trained to make too
    template            the three texts around x and y, as JSON; `bos`: what the vectors stand behind
    demonstrations      [[x, y], ...] as JSON, those that were read; only where they were asked to be kept
    made_of             the fingerprint of all demonstrations that it was made of; older packs have none
    checksum            of all of it; a pack without one, of an older version, is believed

All values are strings, as safetensors wants them. Reading a pack runs no code of it.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, deserialize

from mend_jax.cli.errors import UserError
from mend_jax.data.bos import bos_token
from mend_jax.data.json_lines import is_text
from mend_jax.data.templates import Template
from mend_jax.data.tokenize import fingerprint as text_fingerprint
from mend_jax.data.tokenize import tokenizer_text
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models import folders
from mend_jax.models.weights import write_file
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.files import whole_file
from mend_jax.run.reading import parse_json, require_path, require_regular
from mend_jax.run.sealed import FIELD, checksum

FORMAT = 1
READ = tuple(map(str, range(1, FORMAT + 1)))  # formats, as files have them
SUFFIX = ".pack.safetensors"
TENSOR = "vectors"
LARGEST = 2**30  # bytes of a pack that is read: thousands of times an ordinary one
NUMBERS = ("num_vectors", "num_demonstrations")
LISTS = ("template", "dropped", "demonstrations", "shorter")


@dataclasses.dataclass(frozen=True, eq=False)
class Pack:
    """Vectors and what they are for."""

    vectors: np.ndarray  # (l, llm_width) float32
    llm: str
    llm_fingerprint: str
    tokenizer_fingerprint: str  # the LLM's tokenizer; "" where it has none
    distiller: str
    distiller_fingerprint: str
    kind: str
    template: Template
    bos: str
    num_demonstrations: int
    dropped: tuple[int, ...] = ()  # numbers from 0; what commands print counts from 1
    demonstrations: tuple[tuple[str, str], ...] | None = None
    shorter: tuple[int, ...] = ()  # lengths for `first`
    made_of: str = ""  # `fingerprint_of` its demonstrations; "": an older pack, of which it is not known

    @property
    def num_vectors(self) -> int:
        return len(self.vectors)

    @property
    def prefix(self) -> Prefix:
        """The vectors as a `Prefix` of one row."""
        return Prefix(jnp.asarray(self.vectors)[None], jnp.asarray([len(self.vectors)], jnp.int32))

    def first(self, count: int) -> "Pack":
        """The pack of the first `count` vectors. Raises UserError for a length that the distiller was not trained with."""
        if count == self.num_vectors:
            return self
        if count not in self.shorter:
            known = ", ".join(map(str, (*sorted(self.shorter), self.num_vectors)))
            raise UserError(
                f"A pack of {self.num_vectors} vectors cannot be cut to {count}: packs of {known} can be made of its vectors."
            )
        shorter = tuple(number for number in self.shorter if number < count)
        return dataclasses.replace(self, vectors=self.vectors[:count], shorter=shorter)

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all, and its folder where there is none. Raises UserError where it cannot be written."""
        vectors, facts = self._content()
        target = Path(path).expanduser()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as temporary:
                write_file({TENSOR: vectors}, temporary, facts)
        except OSError as error:
            raise UserError(
                f"{target} cannot be written ({error.strerror or error}): free some space, or name another file."
            ) from None

    def to_bytes(self) -> bytes:
        """The content of its file."""
        vectors, facts = self._content()
        return safetensors.numpy.save({TENSOR: vectors}, facts)

    def _content(self) -> tuple[np.ndarray, dict[str, str]]:
        """The vectors and the metadata of its file, with their checksum."""
        vectors, facts = np.ascontiguousarray(self.vectors, np.float32), self.metadata()
        return vectors, facts | {FIELD: _checksum(vectors, facts)}

    def metadata(self) -> dict[str, str]:
        """The metadata of its file."""
        facts = {"pack_format": FORMAT, "num_vectors": self.num_vectors}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != TENSOR and value is not None:
                facts[field.name] = json.dumps(value, ensure_ascii=False) if field.name in LISTS else value
        return {name: str(value) for name, value in facts.items()}

    def check(self, llm, where: str = "The pack") -> None:
        """Raises UserError if the vectors are not for `llm` (from `load_llm`); `where` names the pack."""
        require_packs_llm(self, where, llm.path, llm.fingerprint)
        if tokenizer_fingerprint(llm.tokenizer) != self.tokenizer_fingerprint:
            raise UserError(
                f"{where} was made with another tokenizer than {llm.path} has now: distil the demonstrations again."
            )
        if bos_token(self.bos, llm.tokenizer, llm.path) != llm.bos:
            raise UserError(f'{where} is for an LLM that reads with bos="{self.bos}": load the LLM so.')
        if self.vectors.shape[1] != llm.config.width or self.num_vectors > llm.window:
            raise UserError(
                f"{where} holds {self.num_vectors} vectors of width {self.vectors.shape[1]}, but {llm.path} reads {llm.window} of width"
                f" {llm.config.width}: distil the demonstrations again."
            )


def load_pack(path: str | Path, llm=None) -> Pack:
    """The pack in a file.

    Args:
        path: a file that `Pack.save` or `python -m mend_jax.distill` wrote.
        llm: from `load_llm`: the LLM that is to read the vectors; None checks nothing but the file.
    Raises:
        UserError: no such file, a damaged or cut one, one that is no pack, of a newer format, or for another LLM.
    """
    require_path(path, "load_pack(FILE, llm)")
    path = Path(path).expanduser()
    try:
        require_regular(path, remedy := "name a pack, a file that `python -m mend_jax.distill` wrote")
    except FileNotFoundError:
        raise UserError(f"{path} is not there: {remedy}.") from None
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for a pack: name another file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): copy or make it again.") from None
    pack = pack_of(content, str(path))
    if llm is not None:
        pack.check(llm, str(path))
    return pack


def pack_of(content: bytes, where: str = "The file") -> Pack:
    """The pack in a file's content. Raises UserError, as `load_pack` does, which names the file by `where`."""
    if content[8:9] != b"{" or 0 not in content[:8]:  # the length of its header is far below 2^56
        raise UserError(
            f"{where} is no pack: name a file that `python -m mend_jax.distill` wrote, or copy or make it again."
        )
    try:
        deserialize(content)  # raises for all that is damaged or cut, before the header is read once more
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        facts = parse_json(header, dict).get("__metadata__", {})
        _check_format(where, facts)
        vectors, known = safetensors.numpy.load(content)[TENSOR], facts.pop(FIELD, None)
        if known not in (None, _checksum(vectors, facts)):
            raise ValueError("it has changed since it was written")
        return _from_facts(vectors, facts)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{where} cannot be read as a pack ({reason}): copy or make it again (mend_jax.distill)."
        ) from None


def require_packs_llm(pack: Pack, where: str | Path, llm: str | Path, theirs: str = "") -> None:
    """Raises UserError if the model that `llm` names, of the fingerprint `theirs` ("": it is computed), is not the pack's;
    `where` names the pack."""
    theirs = theirs or folders.fingerprint(llm)
    if theirs != pack.llm_fingerprint:
        raise UserError(
            f"{where} holds vectors for the LLM {pack.llm} ({pack.llm_fingerprint}), not for {llm} ({theirs}): load that LLM, or distil"
            " the demonstrations for this one."
        )


def load_packs_llm(pack: Pack, path: str | Path, llm: str = "", dtype: str = "float32", weights: str = "full"):
    """The LLM that a pack, read from `path`, is for: in `llm`, or else where the pack says. Raises UserError for another."""
    if llm:
        require_packs_llm(pack, path, llm)  # before it is loaded, which may take long
    with asking_for_llm(pack, path, llm):
        found = load_llm(llm or pack.llm, dtype, weights=weights, bos=pack.bos)
    pack.check(found, str(path))
    return found


@contextlib.contextmanager
def asking_for_llm(pack: Pack, path: str | Path, llm: str) -> Iterator[None]:
    """Lets a UserError ask for --llm where it was not given and the pack's LLM cannot be read where the pack says."""
    try:
        yield
    except UserError as error:
        if llm:
            raise
        raise UserError(
            f"{path} is for the LLM {pack.llm}, which cannot be read ({error}): say where it is, --llm=FOLDER."
        ) from None


def _check_format(where: str, facts: dict[str, str]) -> None:
    number = facts.get("pack_format")
    if number is None:
        raise UserError(f"{where} is a safetensors file but no pack: make one with `python -m mend_jax.distill`.")
    if number not in READ:
        raise UserError(f"{where} is a pack of format {number[:20]}, this program reads up to {FORMAT}: update it.")


def _from_facts(vectors: np.ndarray, facts: dict[str, str]) -> Pack:
    """The pack of a file's content. Raises KeyError, TypeError or ValueError where it is none."""
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype != np.float32:
        raise ValueError(f"its vectors are {vectors.dtype} {vectors.shape}")
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.square(vectors).sum(1)).all()
    if not finite:  # an LLM's norms add up the squares: of larger ones its answers are no numbers
        raise ValueError("its vectors, or their squares, are not finite")
    fields = {field.name: facts[field.name] for field in dataclasses.fields(Pack) if field.name in facts}
    for name in set(LISTS) & fields.keys():
        fields[name] = parse_json(fields[name], list)
    fields["template"] = Template(*map(_text, fields["template"]))
    fields["num_demonstrations"] = int(fields["num_demonstrations"])
    fields["dropped"] = tuple(map(_number, fields["dropped"]))
    fields["shorter"] = tuple(map(_number, fields.get("shorter", ())))
    if "demonstrations" in fields:
        fields["demonstrations"] = tuple((_text(x), _text(y)) for x, y in fields["demonstrations"])
    if int(facts["num_vectors"]) != len(vectors):
        raise ValueError(f"it says {facts['num_vectors']} vectors and holds {len(vectors)}")
    return Pack(vectors, **fields)


def fingerprint_of(demos: Iterable[tuple[str, str]]) -> str:
    """16 hexadecimal digits that change with any text, or the order, of demonstrations."""
    return text_fingerprint("demonstrations", *(text for pair in demos for text in pair))


def _checksum(vectors: np.ndarray, facts: dict[str, str]) -> str:
    return checksum([facts, str(vectors.shape), hashlib.sha256(vectors.tobytes()).hexdigest()])


def _number(value) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not the number of a demonstration")
    return value


def _text(value) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise TypeError(f"{value!r} is not a text")
    return value


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hexadecimal digits that change with any token or rule of a tokenizer; "" for none."""
    return "" if tokenizer is None else text_fingerprint(tokenizer_text(tokenizer))
