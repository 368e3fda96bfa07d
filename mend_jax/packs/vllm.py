"""A pack and a query as requests to a vLLM server, which takes embeddings in the place of a prompt.

The server is started with `vllm serve LLM --enable-prompt-embeds`. Its completions read "prompt_embeds", the whole prompt; its
chat reads a part of a message, {"type": "prompt_embeds", "data": ...}, around which it puts the LLM's chat template
(https://docs.vllm.ai/en/latest/features/prompt_embeds/). Both are a base64 text of a tensor (T, width) as `torch.save` writes it,
so that PyTorch is needed here.
"""

import base64
import io
import json
import urllib.error
import urllib.request

import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data.query import query_tokens
from mend_jax.packs.pack import Pack
from mend_jax.run.distributed import to_host

DTYPES = ("float32", "bfloat16", "float16")  # of what is sent: that of the server's LLM
SECONDS = 120  # until a server that says nothing is given up


def prompt_embeds(llm, pack: Pack, query=None, dtype: str = "bfloat16") -> np.ndarray:
    """The embeddings that the LLM reads: the BOS where there is one, the vectors, the query in the pack's template.

    Args:
        llm: from `load_llm`; only its token embeddings and tokenizer are used.
        pack: for this LLM.
        query: a text or token ids; None: the vectors alone (for a part of a chat message).
        dtype: of the result's values, which are float32 numbers that it can hold.
    Returns:
        (T, width) float32.
    Raises:
        UserError: another LLM's pack, an encoder–decoder, an empty query, one beyond the window, an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}, that of the server's LLM.")
    if llm.start_token is not None:
        raise UserError(f"{llm.path} is an encoder–decoder, to which vLLM gives no embeddings: use a decoder-only LLM.")
    pack.check(llm)
    rows = [np.asarray(pack.vectors)]
    if query is not None:
        tokens = query_tokens(llm, query, "query", pack.template.query)
        if not tokens:
            raise UserError("A query is empty: it needs at least one token.")
        rows.append(to_host(llm.embed(llm.params, jnp.asarray([tokens]))[0]))
    if llm.bos is not None and query is not None:
        rows.insert(0, to_host(llm.embed(llm.params, jnp.asarray([[llm.bos]]))[0]))
    joined = np.concatenate([row.astype(np.float32) for row in rows])
    if len(joined) >= llm.window:
        raise UserError(
            f"The vectors and the query have {len(joined)} positions, and {llm.path} reads at most {llm.window}, answer included:"
            " shorten the query."
        )
    return np.asarray(jnp.asarray(joined).astype(dtype).astype(jnp.float32))


def encode(embeds: np.ndarray, dtype: str = "bfloat16") -> str:
    """(T, width) float32 -> the text that vLLM decodes. Raises UserError where PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError("vLLM's requests are written by PyTorch: pip install torch.") from None
    buffer = io.BytesIO()
    torch.save(torch.tensor(embeds).to(getattr(torch, dtype)), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def completion_request(llm, pack: Pack, query, model: str, dtype: str = "bfloat16", **options) -> dict:
    """The JSON of a request to /v1/completions.

    Args:
        llm, pack, query, dtype: as in `prompt_embeds`.
        model: what the server calls the LLM.
        options: of the request, such as max_tokens, temperature, stop.
    """
    return {"model": model, "prompt_embeds": encode(prompt_embeds(llm, pack, query, dtype), dtype)} | options


def chat_request(llm, pack: Pack, query: str, model: str, dtype: str = "bfloat16", **options) -> dict:
    """The JSON of a request to /v1/chat/completions: one message of the user, the vectors and then the query's text.

    The server puts its chat template around them. The distiller was not trained so: compare the answers before you trust them.
    """
    if not isinstance(query, str) or not query.strip():
        raise UserError("The query of a chat is a text with at least one word.")
    vectors = {"type": "prompt_embeds", "data": encode(prompt_embeds(llm, pack, None, dtype), dtype)}
    text = {"type": "text", "text": "".join(pack.template.query(query))}
    return {"model": model, "messages": [{"role": "user", "content": [vectors, text]}]} | options


def ask(url: str, request: dict, key: str = "") -> str:
    """The answer of a server at `url`, such as "http://localhost:8000", to one of the two requests.

    Raises UserError: no server there, one that is too slow, an answer that says no, or that is none.
    """
    place = "chat/completions" if "messages" in request else "completions"
    address = f"{url.rstrip('/')}/v1/{place}"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        asked = urllib.request.Request(address, json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=SECONDS) as response:
            choice = json.loads(response.read())["choices"][0]
        return choice["message"]["content"] if "messages" in request else choice["text"]
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        raise UserError(
            f"{address} answered {error.code} ({said or error.reason}): is it a vLLM server with --enable-prompt-embeds?"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise UserError(f"{address} answered what is no JSON: is it a vLLM server?") from None
        reason = getattr(error, "reason", error)
        raise UserError(f"{address} cannot be reached ({reason}): start the server, or give its address.") from None
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{address} answered JSON without an answer: is it a vLLM server?") from None
