"""A MEND distiller in PyTorch: demonstrations become a few vectors that a frozen LLM reads in their place.

    from mend_distiller import MendDistiller

    distiller = MendDistiller.from_pretrained("this/folder")
    vectors = distiller.distill([("a great film", "positive"), ("dull", "negative")])  # (1, L, llm_width)
    query = distiller.query_ids(tokenizer, "I loved it")  # in the tokens of the LLM's tokenizer, with the training's template
    query = llm.get_input_embeddings()(query.to(llm.device))
    embeds = torch.cat([vectors.to(query), query], dim=1)  # in the LLM's dtype, on its device
    logits = llm(inputs_embeds=embeds).logits
    # or, of an encoder–decoder, whose decoder says y:
    start = torch.tensor([[llm.config.decoder_start_token_id]], device=llm.device)
    logits = llm(inputs_embeds=embeds, decoder_input_ids=start).logits

Needs torch, transformers and safetensors. Axes: B contexts, N demonstration tokens, L vectors, D backbone width.
A distiller of chunks (`join` in distiller_config.json) packs whole demonstrations, in order, into chunks that it reads one
by one; the chunks' vectors are concatenated ("concat") or averaged ("mean").
MEND: Meta dEmonstratioN Distillation for Efficient and Effective In-Context Learning (Li et al., ICLR 2024), 3.1.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, normalizers  # which transformers needs too
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel


class MendDistiller(nn.Module):
    """A decoder, or T5's encoder, that reads the demonstrations and then L placeholders; its states at the placeholders,
    projected, are the vectors; with `residual` they are added to the embeddings of the last L demonstration tokens."""

    def __init__(
        self,
        backbone,
        num_vectors: int,
        llm_width: int,
        projection: str,
        tokenizer=None,
        template=(" ", "", " "),
        chunks=None,
        residual=False,
        bos="false",
        max_input_tokens=0,
    ):
        super().__init__()
        width = backbone.get_input_embeddings().embedding_dim  # also the width of its states
        self.backbone = backbone
        self.placeholders = nn.Parameter(torch.zeros(num_vectors, width))
        self.projection = None if projection == "identity" else nn.Linear(width, llm_width)
        self.activation = torch.tanh if projection == "tanh" else nn.Identity()
        self.tokenizer = _as_trained(tokenizer)  # for texts
        self.before, self.between, self.answer = template  # stand before every x, after it and before every y
        self.chunks = chunks  # None, or (join, chunk_demos, chunk_tokens)
        self.residual = residual
        self.bos = bos  # "true", "false" or "auto": where the tokenizer puts its BOS before a text
        self.max_input_tokens = max_input_tokens  # where training cut every x of a demonstration; 0: nowhere

    @classmethod
    def from_pretrained(cls, folder, dtype: torch.dtype = torch.float32, llm=None, tokenizer=None) -> "MendDistiller":
        """The distiller of an exported folder, in evaluation mode, in `dtype`, on the device of `llm` or, without one, the CPU.

        `llm` and `tokenizer` are the transformers model whose token embeddings it reads with, and its tokenizer, where
        distiller_config.json says `"embeddings": "llm"`. `dtype` may be another one than the LLM's.
        """
        folder = Path(folder)
        settings = json.loads((folder / "distiller_config.json").read_text())
        has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "vocab.json"))
        tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else tokenizer
        kind = T5EncoderModel if AutoConfig.from_pretrained(folder).model_type == "t5" else AutoModel
        if settings.get("embeddings") == "llm" or (folder / "model.int8.safetensors").exists():
            backbone = _backbone(llm, folder, kind, settings).to(dtype)
        else:
            backbone = kind.from_pretrained(folder, dtype=dtype)
        names = ("num_vectors", "llm_width", "projection")
        chunks = [settings[name] for name in ("join", "chunk_demos", "chunk_tokens")] if "join" in settings else None
        if "template" in settings:
            template = [settings["template"][name] for name in ("before", "between", "answer")]
        else:  # one text before every x and y
            template = settings["separator"], "", settings["separator"]
        rest = settings.get("residual", False), settings.get("bos", "false"), settings.get("max_input_tokens", 0)
        model = cls(backbone, *(settings[name] for name in names), tokenizer, template, chunks, *rest)
        found = model.load_state_dict(load_file(folder / "distiller.safetensors"), strict=False)
        missing = [name for name in found.missing_keys if not name.startswith("backbone.")]
        if missing or found.unexpected_keys:
            raise ValueError(f"{folder}: distiller.safetensors lacks {missing} and has unknown {found.unexpected_keys}")
        return model.to("cpu" if llm is None else llm.device, dtype).eval()

    @property
    def window(self) -> int:
        """Demonstration tokens that it can read: the backbone's positions (T5 has no limit) minus one for each vector."""
        return getattr(self.backbone.config, "max_position_embeddings", 2**30) - len(self.placeholders)

    @property
    def separator(self) -> str:
        """The text before every x and y, where the template has no other."""
        if self.between or self.before != self.answer:
            raise ValueError("the template is more than a separator: use query_ids and output_ids")
        return self.before

    def first_ids(self, tokenizer):
        """The token ids (1,1) or (1,0) that stood before everything in training, the vectors too: the LLM's BOS, or none;
        `tokenizer` is the LLM's."""
        bos = tokenizer.bos_token_id
        there = self.bos == "true" or (self.bos == "auto" and bos is not None and tokenizer("a").input_ids[:1] == [bos])
        return torch.tensor([[bos] if there else []], dtype=torch.long)

    def query_ids(self, tokenizer, x: str):
        """The token ids (1,Q) of an input x as training read it; `tokenizer` is the LLM's, which `_as_trained` may change."""
        return torch.tensor([_ids(_as_trained(tokenizer), self.before + x, self.between)])

    def output_ids(self, tokenizer, y: str):
        """The token ids (1,T) of an output y, or of an option, behind its query."""
        return torch.tensor([_ids(_as_trained(tokenizer), self.answer + y)])

    def forward(self, input_ids, lengths=None, num_vectors=None):
        """(B,N) right-padded tokens with lengths (B,) (None: all are N) -> vectors (B,L,llm_width).

        `num_vectors` is one of the shorter lengths that it was trained with ("nested" in distiller_config.json), or None.
        """
        B, N = input_ids.shape
        if self.window < N:
            raise ValueError(f"the demonstrations have {N} tokens, but the distiller reads at most {self.window}")
        if lengths is None:
            lengths = torch.full((B,), N, device=input_ids.device)
        embeds = self.backbone.get_input_embeddings()(input_ids)
        placeholders = self.placeholders[:num_vectors]
        L, D = placeholders.shape
        embeds = torch.cat([embeds, embeds.new_zeros(B, L, D)], dim=1)
        # The placeholders come right after each row's last token: causal attention then never sees padding, but T5's
        # encoder must be told where the padding begins.
        places = (lengths[:, None] + torch.arange(L, device=input_ids.device))[..., None].expand(B, L, D)
        embeds = embeds.scatter(1, places, placeholders.to(embeds.dtype).expand(B, L, D))
        options = {"use_cache": False}
        if isinstance(self.backbone, T5EncoderModel):
            options = {"attention_mask": torch.arange(N + L, device=input_ids.device) < (lengths + L)[:, None]}
        states = self.backbone(inputs_embeds=embeds, **options).last_hidden_state.gather(1, places)
        vectors = self.activation(states if self.projection is None else self.projection(states))
        if self.residual:  # zero where there are fewer tokens than vectors
            last = places - L
            vectors = vectors + embeds.gather(1, last.clamp(min=0)) * (last >= 0)
        return vectors

    @torch.no_grad()
    def distill(self, demos, num_vectors=None):
        """The vectors of demonstrations: token ids of one context or of several, or (x, y) string pairs of one context.

        A distiller of chunks takes the demonstrations of one context: (x, y) string pairs, or the token ids of each. `num_vectors` as in `forward`.
        """
        if isinstance(demos, str) or any(isinstance(part, (str, dict)) for part in demos):
            raise ValueError("text demonstrations are a list of (input, output) pairs: give [(x, y), ...]")
        if len(demos) == 0 or (isinstance(demos[0], (tuple, list)) and len(demos[0]) == 0):
            raise ValueError("there are no demonstrations, or an empty context: give at least one token")
        if isinstance(demos[0], (tuple, list)) and isinstance(demos[0][0], str):
            if self.tokenizer is None:
                raise ValueError("texts need a tokenizer, but this folder has none: give token ids")
            ids = [self._pair_ids(x, y) for x, y in demos]
            demos = ids if self.chunks else [sum(ids, [])]
        elif not isinstance(demos[0], (tuple, list)):
            demos = [demos]
        if self.chunks:
            demos = self._packed(demos)
        device = self.placeholders.device
        rows = [torch.tensor(row, dtype=torch.long, device=device) for row in demos]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        vectors = self(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, num_vectors)
        if self.chunks is None:
            return vectors
        return vectors.flatten(0, 1)[None] if self.chunks[0] == "concat" else vectors.mean(0, keepdim=True)

    def _pair_ids(self, x: str, y: str) -> list:
        """The token ids of a demonstration, its x cut as in training."""
        cut = _ids(self.tokenizer, self.before + x)[: self.max_input_tokens or None]
        return cut + _ids(self.tokenizer, self.between, self.answer + y)

    def _packed(self, demos):
        """The token ids of each chunk: whole demonstrations, in order, without those that are longer than a chunk."""
        _, most, size = self.chunks
        chunks, counts = [], []
        for number, demo in enumerate(demos, 1):
            if len(demo) > size:
                too_long = f"demonstration {number} has {len(demo)} tokens and is left out: a chunk holds {size}"
                warnings.warn(too_long, stacklevel=3)
                continue
            if not chunks or counts[-1] == most or len(chunks[-1]) + len(demo) > size:
                chunks.append([])
                counts.append(0)
            chunks[-1] = chunks[-1] + list(demo)
            counts[-1] += 1
        if not chunks:
            raise ValueError(f"no demonstration is as short as a chunk, {size} tokens: shorten them")
        return chunks


def _as_trained(tokenizer):
    """`tokenizer`, changed, if it puts a space before a text that begins with one: as in training it no longer does.

    Tokenizers like Mistral 7B v0.1's do, and would read " x" as an empty word and a word. Other texts are read as before.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    state = json.loads(normalizer.__getstate__()) if isinstance(normalizer, normalizers.Sequence) else {}
    steps = state.get("normalizers", [])
    if [step["type"] for step in steps] == ["Prepend", "Replace"] and steps[0]["prepend"] == steps[1]["content"]:
        space = steps[0]["prepend"]
        once = normalizers.Replace(Regex(rf"\A{space}{space}"), space)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space), once])
    return tokenizer


def _ids(tokenizer, *texts):
    """The token ids, as a list, of texts that are tokenised one by one; none of an empty one."""
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
    return sum(pieces, [])


def _backbone(llm, folder, kind, settings):
    """The backbone of a folder that transformers alone cannot read: without token embeddings, or in 8 bits."""
    config = AutoConfig.from_pretrained(folder)
    backbone, given = kind(config) if kind is T5EncoderModel else kind.from_config(config), ()
    if settings.get("embeddings") == "llm":
        _take_embeddings(backbone, llm, folder)
        given = ("wte.weight", "embed_tokens.weight", "shared.weight")
    found = backbone.load_state_dict(_weights(folder), strict=False)
    tied = ("encoder.embed_tokens.weight",) if kind is T5EncoderModel else ()
    missing = [name for name in found.missing_keys if not name.endswith((*given, *tied))]
    if missing or found.unexpected_keys:
        raise ValueError(f"{folder}: the backbone's file lacks {missing} and has unknown {found.unexpected_keys}")
    return backbone


def _take_embeddings(backbone, llm, folder):
    if llm is None:
        raise ValueError(
            f"{folder} reads with the LLM's token embeddings: give from_pretrained(..., llm=model, tokenizer=its tokenizer)"
        )
    table, own = llm.get_input_embeddings().weight.detach(), backbone.get_input_embeddings().weight
    if table.shape != own.shape:
        raise ValueError(f"{folder} was trained for another LLM: its embeddings are not {tuple(table.shape)}")
    backbone.get_input_embeddings().weight = nn.Parameter(table.clone())


def _weights(folder):
    """The backbone's tensors; a matrix in 8 bits has a scale for each row beside it."""
    packed = folder / "model.int8.safetensors"
    if not packed.exists():
        return load_file(folder / "model.safetensors")
    tensors = load_file(packed)
    scales = {name: tensors.pop(name + ".scale")[:, None] for name in list(tensors) if name + ".scale" in tensors}
    return {name: tensor.float() * scales[name] if name in scales else tensor for name, tensor in tensors.items()}
