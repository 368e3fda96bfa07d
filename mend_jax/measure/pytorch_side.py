"""The same train step in PyTorch with transformers, the way the public release does it.

Logits at all positions, the teacher under no_grad, autograd through the frozen LLM. It is faster than the release where that
does not change the result: no dropout, no cache of keys and values, transformers' fast attention (sdpa), no padding. Where
several queries share a context, which the release does not have, the teacher reads it once and its cache is repeated.
"""

import time

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import (
    CLIP,
    LEARNING_RATE,
    LLM_SEED,
    STEPS,
    Settings,
    batch_tokens,
    distiller_params,
    random_params,
)
from mend_jax.models.families import to_hf_config
from mend_jax.models.weights import to_tensors


class PyTorchStep:
    """A side of the benchmark: see `jax_side.StepSide`."""

    def __init__(self, settings: Settings, query_head: bool):
        """`query_head`: apply the head at the query's tokens only, which the release does not do."""
        torch.set_num_threads(measure.cores())
        self.settings, self.query_head = settings, query_head
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, settings.dtype)
        self.llm = _load(AutoModelForCausalLM, settings.llm, random_params(settings.llm, LLM_SEED))
        self.llm.requires_grad_(False).to(self.device, dtype).eval()
        params = distiller_params(settings)
        self.backbone = _load(AutoModel, settings.distiller, params["backbone"], "").to(self.device)
        self.placeholders = torch.nn.Parameter(torch.from_numpy(params["placeholders"]).to(self.device))
        trained, self.projection = [*self.backbone.parameters(), self.placeholders], None
        if "projection" in params:
            self.projection = torch.nn.Linear(settings.distiller.width, settings.llm.width, device=self.device)
            with torch.no_grad():
                self.projection.weight.copy_(torch.from_numpy(params["projection"]["kernel"].T))
                self.projection.bias.copy_(torch.from_numpy(params["projection"]["bias"]))
            trained += self.projection.parameters()
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.schedule = schedule(self.optimizer, lambda step: 1 - step / STEPS)
        demos, query = batch_tokens(settings)
        self.demos, self.query = (torch.from_numpy(a).long().to(self.device) for a in (demos, query))

    def description(self) -> dict:
        return {"device": str(self.device), "threads": torch.get_num_threads()}

    def reset_peak(self) -> int:
        measure.reset_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self.peak_bytes()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else measure.peak_bytes()

    def matmul_flops(self) -> float:
        """FLOP/s of a large square product of this dtype: the best of five."""
        size = 2048 if self.device.type == "cpu" else 8192
        dtype = getattr(torch, self.settings.dtype)
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        times = []
        for _ in range(6):  # the first warms up
            self._wait()
            start = time.perf_counter()
            a @ b
            self._wait()
            times.append(time.perf_counter() - start)
        return 2 * size**3 / min(times[1:])

    def run(self) -> dict[str, float]:
        """Runs one step; returns its seconds, losses and gradient norm."""
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        mixed = self.settings.dtype != "float32"
        with torch.autocast(self.device.type, dtype=getattr(torch, self.settings.dtype), enabled=mixed):
            kd, pred = self._losses()
        loss = kd + pred
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self._wait()
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        values = {"loss": loss, "kd": kd, "pred": pred, "grad_norm": norm}
        return times | {name: value.item() for name, value in values.items()}

    def _losses(self):
        rows, target, queries = len(self.demos), self.settings.target, self.settings.queries
        placeholders = self.placeholders.expand(rows, -1, -1)
        read = torch.cat([self.backbone.get_input_embeddings()(self.demos), placeholders], 1)
        vectors = self.backbone(inputs_embeds=read, use_cache=False).last_hidden_state[:, -self.settings.vectors :]
        if self.projection is not None:
            vectors = torch.tanh(self.projection(vectors))
        embed = self.llm.get_input_embeddings()
        vectors = vectors.repeat_interleave(queries, 0).to(embed.weight.dtype)
        student = self._query_logits(torch.cat([vectors, embed(self.query)], 1))
        with torch.no_grad():
            teacher = self._teacher_logits(embed)
        log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        kd = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1).mean()
        predictions = student[:, -target - 1 : -1].flatten(0, 1)
        return kd, F.cross_entropy(predictions, self.query[:, -target:].flatten())

    def _teacher_logits(self, embed):
        if self.settings.queries == 1:
            return self._query_logits(torch.cat([embed(self.demos), embed(self.query)], 1))
        cache = self.llm.get_decoder()(inputs_embeds=embed(self.demos), use_cache=True).past_key_values
        cache.batch_repeat_interleave(self.settings.queries)
        return self.llm(inputs_embeds=embed(self.query), past_key_values=cache, use_cache=True).logits.float()

    def _query_logits(self, embeds):
        keep = self.settings.query
        output = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep if self.query_head else 0)
        return output.logits[:, -keep:].float()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _load(model_class, config, params, prefix: str | None = None):
    """The transformers model of `config` with our weights."""
    model = model_class.from_config(AutoConfig.for_model(**to_hf_config(config)))
    tensors = {name: torch.from_numpy(array) for name, array in to_tensors(config, params, prefix).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise AssertionError(f"keys that do not fit: {missing}, {unexpected}")
    model.tie_weights()
    return model
