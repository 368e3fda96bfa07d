"""The distiller as a kind of prefix: how it begins, reads demonstrations, is kept in files. Its network is distiller_module.py.

Axes: B batch, N demonstration tokens, L vectors, D width of the backbone.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.text import counted
from mend_jax.data.bos import NONE
from mend_jax.data.templates import SPACE, Template, as_fields, chosen
from mend_jax.models.families import Config, EncoderDecoderConfig, from_hf_config, key_table
from mend_jax.models.folders import Model, load_tokenizer, local_folder, read_weights
from mend_jax.models.weights import tokens_name
from mend_jax.prefixes import release
from mend_jax.prefixes.context import demo_tokens, pad_columns
from mend_jax.prefixes.distiller_folder import (
    MODULE,
    SETTINGS,
    InWords,
    card_text,
    read_folder,
    read_settings,
    write_folder,
)
from mend_jax.prefixes.distiller_module import DistillerModule, make_vectors
from mend_jax.prefixes.embeddings import OF_LLM, TRAINED, has_tokens, of_llm, whose, with_tokens, without_tokens
from mend_jax.prefixes.kind import FROZEN, Kind, initial_rows
from mend_jax.prefixes.prefix import Prefix
from mend_jax.prefixes.start import first_layers, first_projection, first_rms, with_rms
from mend_jax.run.reading import described
from mend_jax.run.sharding import Place
from mend_jax.scoring import costs


@dataclasses.dataclass(frozen=True, eq=False)
class Distiller(Kind):
    """A distiller with its parameters and its tokenizer: MEND or HyperTuning, which differ only in their losses."""

    name, title, reads_demos, can_nest = "distiller", "a distiller", True, True
    begins_with = ("distiller",)
    same_fields = (
        "prefix.length",
        "data.template",
        "data.bos",
        "llm.path",
        "prefix.backbone",
        "prefix.layers",
        "prefix.train_embeddings",
        "prefix.projection",
        "prefix.residual",
    )

    config: Config  # of the backbone
    params: Any  # of `module`
    projection: str  # "tanh", "linear" or "identity"
    llm_width: int
    tokenizer: Any = None
    dtype: str = "float32"
    attention: str = "xla"
    remat: bool = False
    template: Template = SPACE  # the texts around every x and y: that of config.data.template of its training
    bos: str = NONE  # what its vectors stand behind: config.data.bos of its training
    embeddings: str = TRAINED  # what its backbone reads with (embeddings.py)
    nested: tuple[int, ...] = ()  # shorter numbers of vectors: config.prefix.nested of its training
    residual: bool = False  # config.prefix.residual of its training
    max_input_tokens: int = 0  # config.data.max_input_tokens of its training; 0: not known, and no text is cut

    @property
    def num_vectors(self) -> int:
        return self.params["placeholders"].shape[0]

    @property
    def window(self) -> int:
        """The number of demonstration tokens that it can read: its positions minus one for each vector."""
        return self.config.window - self.num_vectors

    @property
    def reader(self) -> Config:
        return self.config

    @property
    def module(self) -> DistillerModule:
        return self.module_of(self.num_vectors)

    def module_of(self, num_vectors: int) -> DistillerModule:
        """The network for another number of vectors."""
        settings = self.projection, self.dtype, self.attention, self.remat, self.residual
        return DistillerModule(self.config, num_vectors, self.llm_width, *settings)

    def apply(self, params, demos, length, vectors=None) -> Prefix:
        """(B,N) int32 tokens with lengths (B,) int32 -> Prefix((B,L,llm_width) in `dtype`, (B,) int32: `vectors`, else each L)."""
        return make_vectors(self.module, params, demos, length, vectors)

    def _cut(self, count: int) -> "Distiller":
        params = {**self.params, "placeholders": self.params["placeholders"][:count]}
        return dataclasses.replace(self, params=params, nested=tuple(n for n in self.nested if n < count))

    @property
    def shorter(self) -> tuple[int, ...]:
        # A decoder's first vectors do not see the later ones; an encoder's do. Fewer are added to later tokens.
        return () if isinstance(self.config, EncoderDecoderConfig) or self.residual else self.nested

    def read(self, demos):
        """Tokens (B,N) and lengths (B,) of the input of `distill`; N is one of few sizes, because each is compiled."""
        reader = (self.tokenizer, self.config, self.window, "distiller", self.template, self.max_input_tokens)
        tokens, length = demo_tokens(demos, *reader)
        return pad_columns(tokens, self.window), length

    def distill(self, demos) -> Prefix:
        """The vectors of any demonstrations, with the distiller's own parameters.

        Args:
            demos: token ids of one context (list of int) or of several (list of lists), or (x, y) string pairs
                if the distiller has a tokenizer; an x is cut as in training (`max_input_tokens`).
        Returns:
            Prefix((B, L, llm_width) in `dtype`, (B,) int32, each L); B is the number of contexts (paper, section 3.1).
        Raises:
            UserError: no demonstrations, neither ids nor pairs of texts, no tokenizer for texts, a token that the
                distiller does not have, or more tokens than its window.
        """
        tokens, length = self.read(demos)
        return _distill(self.module, self.params, tokens, length)

    def split_params(self) -> tuple[Any, Any]:
        if self.embeddings == TRAINED:
            return self.params, {}
        rest, tokens = without_tokens(self.params["backbone"])
        return {**self.params, "backbone": rest}, {"backbone": with_tokens({}, tokens.astype(self.dtype))}

    @classmethod
    def whole(cls, params, frozen):
        if FROZEN not in frozen:
            return params
        tokens = frozen[FROZEN]["backbone"]["embed"]["tokens"]
        return {**params, "backbone": with_tokens(params["backbone"], tokens)}

    @classmethod
    def backbone(cls, config) -> str:
        if not config.prefix.backbone:
            raise UserError(
                "The config names no model that the distiller starts from: set --config.prefix.backbone=, to the LLM itself or to a"
                " smaller model."
            )
        return config.prefix.backbone

    @classmethod
    def reader_settings(cls, config, backbone: Config) -> Config:
        return first_layers(backbone.headless, config["prefix"].get("layers", 0), config["prefix"]["backbone"])

    @classmethod
    def resolved(cls, name: str, value, backbone: Config, llm):
        if name == "prefix.projection":
            return resolve_projection(value, backbone.width, llm.width)
        return value

    @classmethod
    def check(cls, config, backbone, llm) -> None:
        cls.reader_settings(config, backbone)
        projection = resolve_projection(config.prefix.projection, backbone.width, llm.width)
        if config.prefix.residual and (whose(config) != OF_LLM or projection == "tanh"):
            raise UserError(
                "prefix.residual adds vectors to the LLM's token embeddings: it needs llm.path as prefix.backbone,"
                ' prefix.train_embeddings=False and a prefix.projection that is "linear", "identity" or "auto".'
            )

    @classmethod
    def init(cls, config, llm, seed: int, place: Place | None = None) -> "Distiller":
        """A distiller made from the backbone's weights, by the section `prefix` of a run's config (configs/base.py).

        `place` is as in `load_llm`; small parameters stay where they were made.
        """
        prefix = config.prefix
        backbone = _first_part(config, llm, place)
        settings = backbone.config
        params = {"backbone": backbone.params, "placeholders": initial_rows(prefix, backbone, seed)}
        projection = resolve_projection(prefix.projection, settings.width, llm.config.width)
        last = {}
        if projection != "identity":
            last["projection"] = first_projection(settings.width, llm.config.width, seed, zero=prefix.residual)
        arithmetic = prefix.dtype, llm.attention, prefix.remat
        rest = {"template": chosen(config.data.template), "bos": config.data.bos, "embeddings": whose(config)}
        rest["nested"] = tuple(prefix.nested)
        if prefix.residual:  # a projection that begins at zero: the states that it reads are scaled
            made = cls(settings, params, "identity", llm.config.width, backbone.tokenizer, *arithmetic, **rest)
            made = made._with_rms(first_rms(prefix, llm)) if prefix.rms else made
            return dataclasses.replace(made, params=made.params | last, projection=projection, residual=True)
        made = cls(settings, params | last, projection, llm.config.width, backbone.tokenizer, *arithmetic, **rest)
        return made._with_rms(first_rms(prefix, llm)) if prefix.rms else made

    @classmethod
    def sketch(cls, prefix, backbone: Config, llm, embeddings: str = TRAINED) -> "Distiller":
        projection = resolve_projection(prefix.projection, backbone.width, llm.width)
        arithmetic = {"dtype": prefix.dtype, "remat": prefix.remat}
        rest = {"embeddings": embeddings, "residual": prefix.get("residual", False)}
        made = cls(backbone, None, projection, llm.width, **arithmetic, **rest)
        return dataclasses.replace(made, params=made.module_of(prefix.length).shapes())

    @property
    def vector_weights(self) -> int:
        return 0 if self.projection == "identity" else self.config.width * self.llm_width

    def _with_rms(self, rms: float) -> "Distiller":
        """With first vectors of that root mean square."""

        def vectors_of(params, tokens, length):
            return _distill(self.module, params, tokens, length).embeds

        return dataclasses.replace(self, params=with_rms(vectors_of, self.config, self.params, self.projection, rms))

    def flops(self, llm, context: np.ndarray) -> int:
        return costs.distil(self.config, llm, len(context), self.num_vectors, self.projection)

    def facts(self) -> dict:
        own = {} if self.dtype == "float32" else {"dtype": self.dtype}  # what is usual is not recorded
        own |= {"residual": True} if self.residual else {}
        return {"projection": self.projection} | own

    def placed(self, put, dtype: str) -> "Distiller":
        return dataclasses.replace(self, params=put(self.params), dtype=dtype)

    @classmethod
    def from_run(cls, config: dict, params, backbone: Path | None) -> "Distiller":
        settings = cls.reader_settings(config, from_hf_config(backbone))
        # The run's widths are in the parameters; what "auto" was decided with is not: equal widths, no projection.
        llm_width = params["projection"]["kernel"].shape[1] if "projection" in params else settings.width
        projection = resolve_projection(config["prefix"]["projection"], settings.width, llm_width)
        data, prefix, tokenizer = config["data"], config["prefix"], load_tokenizer(backbone)
        rest = chosen(data["template"]), data.get("bos", NONE), whose(config)
        rest += tuple(prefix.get("nested", ())), prefix.get("residual", False), data.get("max_input_tokens", 0)
        return cls.of(settings, params, projection, tokenizer, *rest)

    @classmethod
    def restored(cls, config: dict, params, backbone: Path | None, place: Place | None = None):
        if whose(config) == TRAINED:
            return params
        settings = from_hf_config(backbone)
        wanted = {name: key_table(settings)[name] for name in [tokens_name(settings)]}
        tokens = read_weights(backbone, settings, place=place, wanted=wanted)["embed"]["tokens"]
        return {**params, "backbone": with_tokens(params["backbone"], tokens)}

    @classmethod
    def backbone_params(cls, params):
        return params["backbone"]

    def read_by(self, llm) -> "Distiller":
        backbone = self.params["backbone"]
        if self.embeddings != OF_LLM or has_tokens(backbone):
            return self
        whole = with_tokens(backbone, of_llm(llm, self.config))
        tokenizer = self.tokenizer or llm.tokenizer
        return dataclasses.replace(self, params={**self.params, "backbone": whole}, tokenizer=tokenizer)

    @classmethod
    def of(
        cls,
        config: Config,
        params: Mapping,
        projection: str,
        tokenizer,
        template: Template = SPACE,
        bos: str = NONE,
        embeddings: str = TRAINED,
        nested: tuple[int, ...] = (),
        residual: bool = False,
        max_input_tokens: int = 0,
    ) -> "Distiller":
        """That of parameters read from files (NumPy or JAX), for the LLM's width that they have; float32."""
        llm_width = config.width if projection == "identity" else params["projection"]["kernel"].shape[1]
        rest = {"template": template, "bos": bos, "embeddings": embeddings, "nested": nested, "residual": residual}
        rest["max_input_tokens"] = max_input_tokens
        return cls(config, jax.tree.map(jnp.asarray, params), projection, llm_width, tokenizer, **rest)

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        return (folder / SETTINGS).exists() and read_settings(folder).get("kind", "distiller") == cls.name

    @classmethod
    def from_folder(cls, folder: Path, place: Place | None = None) -> "Distiller":
        return cls.of(*read_folder(folder, place), _max_input_tokens(folder))

    def settings(self) -> dict:
        """The content of `SETTINGS` in an exported folder."""
        rest = {"bos": self.bos, "embeddings": self.embeddings, "nested": list(self.nested), "residual": self.residual}
        rest["max_input_tokens"] = self.max_input_tokens
        usual = {
            "bos": NONE,
            "embeddings": TRAINED,
            "nested": [],
            "residual": False,
            "max_input_tokens": 0,
        }  # not written, so that older files say the same
        return {
            "num_vectors": self.num_vectors,
            "width": self.config.width,
            "llm_width": self.llm_width,
            "projection": self.projection,
            **as_fields(self.template),
        } | {name: value for name, value in rest.items() if value != usual[name]}

    def write(self, folder: Path, dtype: str = "float32", llm: str = "") -> str:
        write_folder(self, folder, dtype=dtype, llm=llm)
        return f"{self.title[0].upper()}{self.title[1:]} as a Hugging Face folder, with {MODULE} for PyTorch."

    def write_release(self, folder: Path) -> str:
        return release.write_both(self, folder)

    def card(self, llm: str, logits: str) -> tuple[str, str]:
        shape = f"(1, {self.num_vectors}, {self.llm_width})"
        most = "any number of" if self.config.window > 2**29 else f"at most {self.window}"
        vectors = counted(self.num_vectors, "vector")
        words = InWords("demonstrations (x, y), concatenated,", vectors, f"{most} demonstration tokens")
        return "A MEND distiller", card_text(self, llm, logits, shape, "mend_jax.load_distiller", words)


_distill = partial(jax.jit, static_argnums=0)(make_vectors)  # shared by all distillers: each shape is compiled once


def _first_part(config, llm, place: Place | None) -> Model:
    """The part of a run's backbone that a distiller begins with, float32: nothing else of its weights is read."""
    folder = local_folder(config.prefix.backbone)
    whole = from_hf_config(folder)
    settings, table = Distiller.reader_settings(config, whole), llm.params["embed"]["tokens"]
    wanted, shared = key_table(settings), whose(config) == OF_LLM and table.dtype == jnp.float32
    if shared:  # the file's numbers; those of an LLM in bfloat16 or 8 bits may be rounded, and the first rows with them
        del wanted[tokens_name(settings)]
    params = read_weights(folder, whole, place=place, wanted=wanted)
    return Model(settings, with_tokens(params, table) if shared else params, load_tokenizer(folder), folder)


def _max_input_tokens(folder: Path) -> int:
    """Where an exported folder's training cut inputs; 0: an older folder, which does not say. Raises UserError for no such number."""
    found = read_settings(folder).get("max_input_tokens", 0)
    if type(found) is not int or found < 0:
        raise UserError(
            f"{folder / SETTINGS} has max_input_tokens={described(found)}, no number of tokens: export the distiller again."
        )
    return found


def resolve_projection(projection: str, width: int, llm_width: int) -> str:
    """The projection, with "auto" resolved. Raises UserError if `identity` is given for unequal widths."""
    if projection == "auto":
        return "identity" if width == llm_width else "tanh"
    if projection == "identity" and width != llm_width:
        raise UserError(
            f'prefix.projection="identity" needs a backbone as wide as the LLM ({llm_width}), not {width}: use "tanh" or "linear".'
        )
    return projection
