"""Scoring after a cached prefix as a plain PyTorch loop: transformers, one item at a time, its options as the rows of a batch.

It is faster than a naive loop: the prefix is repeated for the options once per task, not for every item.
"""

import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import LLM_SEED, random_params
from mend_jax.measure.pytorch_side import _load
from mend_jax.measure.scored_tasks import ScoredTask, own_weights
from mend_jax.models.families import Config


class PyTorchScoring:
    """A side of the benchmark: see `scored_tasks.ScoringSide`."""

    def __init__(self, config: Config, llm: str, dtype: str, query_head: bool, tasks: list[ScoredTask]):
        """`query_head`: apply the head at the options' tokens only, not at every token of the input."""
        torch.set_num_threads(measure.cores())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if own_weights(llm):
            self.llm = AutoModelForCausalLM.from_pretrained(llm, local_files_only=True)
        else:
            self.llm = _load(AutoModelForCausalLM, config, random_params(config, LLM_SEED))
        self.llm.requires_grad_(False).to(self.device, getattr(torch, dtype)).eval()
        self.query_head, self.tasks, self.caches = query_head, {task.name: task for task in tasks}, {}

    def description(self) -> dict:
        return {"device": str(self.device), "threads": torch.get_num_threads()}

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else measure.peak_bytes()

    @torch.inference_mode()
    def read(self, name: str) -> float:
        """Seconds of reading a task's demonstrations."""
        demos = torch.tensor([self.tasks[name].demos], device=self.device)
        self._wait()
        start = time.perf_counter()
        cache = self.llm(demos, use_cache=True, logits_to_keep=1).past_key_values
        self._wait()
        seconds = time.perf_counter() - start
        self.caches[name] = {1: cache}
        return seconds

    @torch.inference_mode()
    def score(self, name: str, items: int) -> tuple[float, list[list[float]]]:
        """Seconds of scoring a task's first items, and each one's option scores."""
        self._wait()
        start = time.perf_counter()
        scores = [self._item(name, item) for item in self.tasks[name].items[:items]]
        return time.perf_counter() - start, scores

    def _item(self, name, item) -> list[float]:
        options, P = item.options_tokens, len(self.tasks[name].demos)
        longest = max(map(len, options))
        tokens = torch.zeros((len(options), len(item.x_tokens) + longest - 1), dtype=torch.long)
        mask = torch.ones((len(options), P + tokens.shape[1]), dtype=torch.long)
        for row, seen, option in zip(tokens, mask, options, strict=True):
            read = [*item.x_tokens, *option[:-1]]
            row[: len(read)] = torch.tensor(read)
            seen[P + len(read) :] = 0
        cache = self._cache(name, len(options), P)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        keep = longest if self.query_head else 0
        logits = self.llm(
            tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=keep
        ).logits
        log_probs = torch.log_softmax(logits[:, -longest:].float(), -1)
        return [log_probs[i, torch.arange(len(o)), torch.tensor(o)].mean().item() for i, o in enumerate(options)]

    def _cache(self, name, rows: int, length: int):
        """The keys and values of a task's demonstrations, repeated for `rows` rows, without those of later tokens."""
        kept = self.caches[name]
        if rows not in kept:
            layers = [
                (layer.keys.repeat(rows, 1, 1, 1), layer.values.repeat(rows, 1, 1, 1)) for layer in kept[1].layers
            ]
            kept[rows] = DynamicCache(layers)
        beyond = kept[rows].get_seq_length() - length
        if beyond:
            kept[rows].crop(-beyond)
        return kept[rows]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
