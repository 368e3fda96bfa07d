"""Packs in other programs: PEFT, transformers alone, a vLLM server. Their scores and texts are ours."""

import base64
import contextlib
import dataclasses
import http.server
import io
import json
import re
import threading

import numpy as np
import pytest
import test_t5
import tokenizer_files
from facts import says
from safetensors.numpy import load_file
from tiny_training import write_tokenizer

import mend_jax
from mend_jax import export
from mend_jax.data.templates import TEMPLATES
from mend_jax.models import folders as model_folders
from mend_jax.packs import vllm
from mend_jax.packs.adapter import card, export_pack
from mend_jax.packs.pack import Pack, tokenizer_fingerprint

torch = pytest.importorskip("torch")
OPTIONS = ["w50 w3", "w51"]


def llm_of(kind, folder):
    if kind == "gpt2":
        folder = tokenizer_files.save_model_folder(
            folder / "llm", "byte", tokenizer_files.GPT2 | {"n_embd": 32}, seed=3
        )
    else:
        test_t5.torch_model(test_t5.ROWS["t5-small"]).save_pretrained(folder)
        write_tokenizer(folder, [f"w{i}" for i in range(61)])
    return mend_jax.load_llm(folder)


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def llm(request, tmp_path_factory):
    return llm_of(request.param, tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return llm_of("gpt2", tmp_path_factory.mktemp("llm"))


def pack_for(llm, template="space", **facts):
    """Random vectors."""
    vectors = 0.3 * np.random.default_rng(1).standard_normal((5, llm.config.width), np.float32)
    known = {
        "llm": llm.path,
        "llm_fingerprint": model_folders.fingerprint(llm.path),
        "tokenizer_fingerprint": tokenizer_fingerprint(llm.tokenizer),
        "distiller": "d",
        "distiller_fingerprint": "0",
        "kind": "distiller",
        "template": TEMPLATES[template],
        "bos": "false",
        "num_demonstrations": 16,
    }
    return Pack(vectors, **known | facts)


def saved(pack, folder):
    pack.save(folder / "a.pack.safetensors")
    return folder / "a.pack.safetensors"


def torch_llm(llm):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForCausalLM if llm.start_token is None else AutoModelForSeq2SeqLM
    return kind.from_pretrained(llm.path).eval()


# PEFT and transformers


@pytest.mark.slow
def test_peft_scores_as_we_do(llm, tmp_path):
    peft = pytest.importorskip("peft")
    pack = pack_for(llm)
    assert "5 vectors" in export_pack(saved(pack, tmp_path), tmp_path / "out")
    model = peft.PeftModel.from_pretrained(torch_llm(llm), tmp_path / "out").eval()
    wanted = mend_jax.score_options(llm, pack, "w4 w5", OPTIONS)
    x = llm.tokenizer(" w4 w5", add_special_tokens=False)["input_ids"]
    for option, score in zip(OPTIONS, wanted, strict=True):
        y = llm.tokenizer(" " + option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            if llm.start_token is None:
                logits = model(input_ids=torch.tensor([x + y])).logits[0, pack.num_vectors + len(x) - 1 : -1]
            else:
                read = torch.tensor([[llm.start_token, *y[:-1]]])
                logits = model(input_ids=torch.tensor([x]), decoder_input_ids=read).logits[0]
        found = logits.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)].mean()
        assert float(found) == pytest.approx(score, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["space", "qa"])
def test_the_cards_snippets_run_and_answer_as_we_do(template, llm, tmp_path, capsys):
    """The scores of options of one token by both snippets' logits, and the greedy text."""
    pytest.importorskip("peft")
    if llm.start_token is not None and template == "qa":
        pytest.skip("its tokenizer does not know the template's words")
    pack = pack_for(llm, template)
    export_pack(saved(pack, tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2 and str(tmp_path) not in text and "/" not in text.split("For the LLM ")[1].split(";")[0]
    [said] = mend_jax.generate_text(llm, pack, ["I loved it"], 16, stop=())
    options = [said.tokens[0], 5, 9]
    wanted = mend_jax.score_options(llm, pack, "I loved it", [[token] for token in options])
    for block in blocks:
        known = {"folder": str(tmp_path / "out"), "llm": torch_llm(llm), "tokenizer": llm.tokenizer, "torch": torch}
        with torch.no_grad():
            exec(block, known)  # the snippet
        assert known["logits"][0, -1].log_softmax(-1)[options].tolist() == pytest.approx(wanted, abs=1e-4)
    shown = capsys.readouterr().out.strip()
    assert shown == llm.tokenizer.decode(known["answer"][0], skip_special_tokens=True).strip()
    tokens = known["answer"][0].tolist()[0 if llm.start_token is None else 1 :]
    assert tokens[: len(said.tokens)] == said.tokens


@pytest.mark.slow
def test_an_adapters_snippets_suit_the_llms_tokenizer_and_arithmetic(tmp_path):
    """Of an LLM whose tokenizer transformers reads otherwise than we do, in bfloat16 and where there are no numbers."""
    pytest.importorskip("peft")
    fields = tokenizer_files.GPT2 | {"n_embd": 32}
    llm = mend_jax.load_llm(tokenizer_files.save_model_folder(tmp_path / "llm", "spaced", fields, seed=4))
    pack = pack_for(llm)
    export_pack(saved(pack, tmp_path), tmp_path / "out")
    wanted = mend_jax.score_options(llm, pack, "I loved it", [[3], [5], [9]])
    for block in re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL):
        for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
            block = block.split("mask =")[0]  # what follows draws tokens, which "meta" has none of
            known = {"folder": str(tmp_path / "out"), "llm": torch_llm(llm).to(device, dtype)}
            with torch.no_grad():
                exec(block, known | {"tokenizer": tokenizer_files.load(llm.path)}, known)
            logits, tolerance = known["logits"], 1e-4 if dtype == torch.float32 else 0.05
            assert logits.device.type == device and logits.dtype == dtype
            if device == "cpu":
                assert logits[0, -1].float().log_softmax(-1)[[3, 5, 9]].tolist() == pytest.approx(wanted, abs=tolerance)


def test_the_adapters_files(decoder, tmp_path, capsys):
    pack = pack_for(decoder)
    path = saved(pack, tmp_path)
    export.main(str(tmp_path / "out"), pack=str(path))
    assert str(tmp_path / "out") in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["prompt_embeddings"], pack.vectors)
    packaged = card(dataclasses.replace(pack, llm="smollm2-135m-instruct"), False)
    assert "mend_jax.export --llm=smollm2-135m-instruct" in packaged
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["num_virtual_tokens"], settings["token_dim"], settings["num_layers"]) == (5, 32, 2)
    with says(tmp_path / "out", "there already"):
        export_pack(path, tmp_path / "out")
    with says("BOS"):
        export_pack(saved(pack_for(decoder, bos="true"), tmp_path), tmp_path / "new")
    with says("--backbone=b", "--workdir"):
        export.main(out=str(tmp_path / "out"), llm="x", backbone="b")
    with says("--workdir", "--llm", "--pack"):
        export.main(str(tmp_path / "new"), pack="a", workdir="b")


def test_an_adapter_of_an_llm_that_lies_elsewhere(decoder, tmp_path):
    """Of a hub's name the owner stays, without whom nobody finds it; another LLM is refused."""
    path = saved(dataclasses.replace(pack_for(decoder), llm="an/llm"), tmp_path)
    export.main(str(tmp_path / "out"), pack=str(path), llm=str(decoder.path))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "an/llm"
    assert 'For the LLM "an/llm";' in (tmp_path / "out" / "README.md").read_text()
    gone = saved(dataclasses.replace(pack_for(decoder), llm=str(tmp_path / "gone")), tmp_path)
    with says(gone, tmp_path / "gone", "--llm"):
        export_pack(gone, tmp_path / "new")
    other = saved(pack_for(decoder, llm_fingerprint="f"), tmp_path)
    with says(other, "f", decoder.path):
        export_pack(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# vLLM


def decoded(text):
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)


@pytest.mark.parametrize("dtype", vllm.DTYPES)
def test_a_completion_holds_the_embeddings_of_the_whole_prompt(decoder, dtype):
    pack = pack_for(decoder, "qa")
    request = vllm.completion_request(decoder, pack, "w4 w5", "m", dtype, max_tokens=3)
    assert {k: v for k, v in request.items() if k != "prompt_embeds"} == {"model": "m", "max_tokens": 3}
    found = decoded(request["prompt_embeds"])
    pieces = decoder.tokenizer(pack.template.query("w4 w5"), add_special_tokens=False)["input_ids"]
    table = torch_llm(decoder).get_input_embeddings()
    wanted = torch.cat([torch.from_numpy(pack.vectors), table(torch.tensor(sum(pieces, [])))])
    assert found.dtype == getattr(torch, dtype) and torch.equal(found, wanted.to(found.dtype))
    json.dumps(request)


def test_a_chat_message_holds_the_vectors_and_the_text(decoder):
    pack = pack_for(decoder, "qa")
    request = vllm.chat_request(decoder, pack, "w4", "m", "float32", temperature=0)
    [message] = request["messages"]
    vectors, text = message["content"]
    assert (message["role"], vectors["type"], text) == (
        "user",
        "prompt_embeds",
        {"type": "text", "text": "\n\nInput: w4\nOutput:"},
    )
    assert torch.equal(decoded(vectors["data"]), torch.from_numpy(pack.vectors)) and request["temperature"] == 0


@contextlib.contextmanager
def server(answer):
    """The address of a server that answers each request with `answer(path, body)` -> (status, text)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            status, text = answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.slow
def test_a_server_that_reads_the_embeddings_gives_our_text(decoder):
    """A stub of vLLM's two addresses, with transformers behind it."""
    pack, model = pack_for(decoder), torch_llm(decoder)

    def answer(path, body):
        if path == "/v1/completions":
            embeds = decoded(body["prompt_embeds"])[None]
        else:
            assert path == "/v1/chat/completions"
            vectors, text = body["messages"][0]["content"]
            ids = decoder.tokenizer(text["text"], add_special_tokens=False, return_tensors="pt").input_ids
            embeds = torch.cat([decoded(vectors["data"])[None], model.get_input_embeddings()(ids)], 1)
        mask = torch.ones(embeds.shape[:2])
        made = model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=body["max_tokens"], do_sample=False
        )
        text = decoder.tokenizer.decode(made[0])
        choice = {"text": text} if "prompt_embeds" in body else {"message": {"content": text}}
        return 200, json.dumps({"choices": [choice]})

    wanted = decoder.tokenizer.decode(mend_jax.generate_text(decoder, pack, ["w4 w5"], 6, stop=())[0].tokens)
    with server(answer) as url:
        for make in (vllm.completion_request, vllm.chat_request):
            assert vllm.ask(url, make(decoder, pack, "w4 w5", "m", "float32", max_tokens=6)) == wanted


def test_servers_that_do_not_answer_are_one_sentence(decoder):
    request = {"model": "m", "prompt_embeds": ""}
    for status, text, facts in (
        (400, '{"message": "no\nembeds"}', ("400", "--enable-prompt-embeds")),
        (200, "<html>", ("no JSON",)),
        (200, '{"choices": []}', ("vLLM",)),
        (200, "[1]", ("vLLM",)),
    ):
        with server(lambda *_, status=status, text=text: (status, text)) as url, says(f"{url}/v1/completions", *facts):
            vllm.ask(url, request)
    with says("http://127.0.0.1:9/v1/completions", "start the server"):
        vllm.ask("http://127.0.0.1:9", request)


def test_what_cannot_be_asked_is_one_sentence(decoder, tmp_path):
    pack = pack_for(decoder)
    with says("empty"):
        vllm.completion_request(decoder, pack, "", "m")
    with says(decoder.window, "shorten the query"):
        vllm.completion_request(decoder, pack, [1] * (decoder.window - pack.num_vectors), "m")
    with says("dtype", "int8", "bfloat16"):
        vllm.completion_request(decoder, pack, "w1", "m", "int8")
    with says("text"):
        vllm.chat_request(decoder, pack, " ", "m")
    with says(decoder.path, "LLM"):
        vllm.completion_request(decoder, pack_for(decoder, llm_fingerprint="f"), "w1", "m")
