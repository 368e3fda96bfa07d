"""Tokenised data on disk: made once by parallel processes, then found again by fingerprint.

    <cache>/shards-<tokenizers, template>/<file>-<source>.array_record    one per source file
    <cache>/text-<key>.json, <cache>/tasks-<key>.json                     manifests that list a source's shards, written last

A shard appears only when complete, so an interrupted `prepare` resumes with the first missing shard. Of a manifest only the
numbers of items and tokens are believed, and these only where its checksum is right; all else is known without it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.data import c4, metaicl
from mend_jax.data.templates import Template, chosen
from mend_jax.data.tokenize import fingerprint, readable, run_job, shard_counts, stamps_of, tokenizer_text
from mend_jax.run.reading import require_regular
from mend_jax.run.sealed import FIELD, read_sealed, write_sealed

TFDS_SHARD = 20_000  # documents of a prepared tfds dataset in one of our shards
IN_PROCESS = 4_000_000  # bytes of source; for fewer, starting processes takes longer than the work
FORMAT = 1  # format of the shards: a new number makes old caches invalid


def prepare_text(config, tokenizer, distiller_tokenizer=None) -> dict:
    """The manifest of config.data.text, which is tokenised first if it is not yet; by both tokenizers if the distiller's is given.

    Returns {"shards": [{"path", "split", "items", "tokens"}], "dtype", "tokenizers": 1 or 2}. Raises UserError.
    """
    text = str(config.data.text)
    tfds = text and c4.tfds_folder(text)
    jobs = _tfds_jobs(text, Path(config.data.cache).expanduser()) if tfds else _file_jobs(text)
    return _prepare("text", jobs, _several(tokenizer, distiller_tokenizer), "", config)


def prepare_tasks(config, tokenizer, tasks: list[str], split: str = "train", distiller_tokenizer=None) -> dict:
    """The manifest of the tasks' examples, which are tokenised first if they are not yet; its shards also have a "task", and it
    has "between": for each tokenizer the ids, list of int, that the template puts between x and y.

    Args:
        tasks: task names; each must have its file.
        split: "train" for the meta-training files, "dev" for the dev examples of all of validation's seeds together.
        distiller_tokenizer: the distiller's if it differs from the LLM's, else None; both then tokenise the examples.
    """
    folder, jobs, template = config.data.tasks, [], chosen(config.data.template)
    for task in tasks:
        if split == "train":
            files = [metaicl.meta_train_file(folder, task)]
        else:
            files = [
                metaicl.example_file(folder, task, config.data.k, s, split) for s in metaicl.validation_seeds(config)
            ]
        with readable(folder):
            stamps = stamps_of(files)
            data = [file.read_bytes() for file in files]
        name = task.replace("/", "_").replace(":", "_")
        jobs.append(
            {"kind": "task", "task": task, "files": [str(f) for f in files], "source": str(files[0]), "split": split,
             "stamps": stamps,
             "before": template.before, "answer": template.answer,
             "name": f"{name}-{split}-{fingerprint(*data)}", "bytes": sum(map(len, data))}
        )  # fmt: skip
    tokenizers = _several(tokenizer, distiller_tokenizer)
    manifest = _prepare("tasks", jobs, tokenizers, _template_key(template), config)
    return manifest | {"between": [_ids(reads, template.between) for reads in tokenizers]}


def contents(manifest: dict, *files: Path) -> str:
    """A hash of the sources of a manifest's shards and of other files, independent of where they are stored."""
    with readable(manifest["source"]):
        return fingerprint(*(shard["file"] for shard in manifest["shards"]), *(file.read_bytes() for file in files))


def _template_key(template: Template) -> str:
    """A template's part of the shards' key; a separator's is what it was before there were other templates."""
    return template.separator if template.is_separator else json.dumps(template)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _several(tokenizer, distiller_tokenizer) -> list:
    return [tokenizer] if distiller_tokenizer is None else [tokenizer, distiller_tokenizer]


def _file_jobs(folder) -> list[dict]:
    return [
        {"kind": "text", "source": str(file), "split": split, "bytes": file.stat().st_size, "stamps": stamps_of([file]),
         "name": f"{file.name.removesuffix('.json.gz')}-{_file_fingerprint(file)}"}
        for split, files in c4.text_files(folder).items() for file in files
    ]  # fmt: skip


def _tfds_jobs(folder, cache: Path) -> list[dict]:
    path = c4.tfds_folder(folder)
    info, jobs = c4.open_tfds(path).info, []
    stamps, key = stamps_of(sorted(path.iterdir())), _tfds_key(sorted(path.iterdir()), cache)
    for split in ("train", "validation"):
        count = info.splits[split].num_examples if split in info.splits else 0
        for start in range(0, count, TFDS_SHARD):
            stop = min(start + TFDS_SHARD, count)
            jobs.append(
                {"kind": "tfds", "source": str(path), "split": split, "start": start, "stop": stop, "stamps": stamps,
                 "name": f"{split}-{start:09d}-{key}", "bytes": info.splits[split].num_bytes * (stop - start) // count}
            )  # fmt: skip
    if not any(job["split"] == "train" for job in jobs):
        raise UserError(f"{path} has no split 'train': set config.data.text to a prepared C4.")
    return jobs


def _tfds_key(files: list[Path], cache: Path) -> str:
    """A hash of the beginnings and ends of files and, where others with the same ones were seen first, of all that they hold.

    Unlike gzip's, the files of tfds do not end with a checksum. They are read in full once for each size and time of change.
    """
    key = fingerprint(*map(_file_fingerprint, files))
    record, stats = cache / f"tfds-{key}.json", [file.stat() for file in files]
    now = fingerprint(
        *(part for file, s in zip(files, stats, strict=True) for part in (file.name, s.st_size, s.st_mtime_ns))
    )
    try:
        known = read_sealed(record, "it is made again")
    except (FileNotFoundError, UserError):
        known = {}
    seen = known.get("seen", {})
    if now not in seen:
        seen[now] = fingerprint(*map(_sha256, files))
        with contextlib.suppress(OSError):  # a cache that is only read
            cache.mkdir(parents=True, exist_ok=True)
            write_sealed(record, {"first": known.get("first", seen[now]), "seen": seen})
    return key if seen[now] == known.get("first", seen[now]) else fingerprint(key, seen[now])


def _sha256(file: Path) -> bytes:
    with readable(file), open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _file_fingerprint(file: Path) -> str:
    """A hash of a file's name, size and first and last 64 KiB: C4 is too large to read in full at every start.

    A gzip file ends with a checksum of its content.
    """
    require_regular(file, c4.AGAIN)
    with readable(file):
        stat = file.stat()
        with file.open("rb") as content:
            head = content.read(1 << 16)
            content.seek(max(0, stat.st_size - (1 << 16)))
            return fingerprint(file.name, stat.st_size, head, content.read())


def _prepare(kind: str, jobs: list[dict], tokenizers: list, template: str, config) -> dict:
    """Runs the jobs whose shards are missing, then writes the manifest, under a lock so that one process does the work.

    template: from `_template_key`; "" for plain text.
    """
    texts, count = [tokenizer_text(tokenizer) for tokenizer in tokenizers], len(tokenizers)
    largest = max(max(tokenizer.get_vocab().values(), default=0) for tokenizer in tokenizers)
    dtype = "uint16" if largest < 1 << 16 else "uint32"
    shard_key = fingerprint(FORMAT, texts[0], template, dtype, *texts[1:])
    cache = Path(config.data.cache).expanduser().absolute()
    shards = cache / f"shards-{shard_key}"
    manifest = cache / f"{kind}-{fingerprint(shard_key, *(job['name'] for job in jobs))}.json"
    source = str(config.data.text if kind == "text" else config.data.tasks)
    for job in jobs:
        job |= {"out": str(shards / f"{job['name']}.array_record"), "dtype": dtype}
    if found := _read_manifest(manifest, jobs, source, count):
        return found
    try:
        shards.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{shards} cannot be created ({error.strerror}): set config.data.cache to a folder that you can write to."
        ) from error
    with _lock(cache / f".{manifest.name}.lock"):
        if found := _read_manifest(manifest, jobs, source, count):  # another process made it in the meantime
            return found
        _run([job for job in jobs if not Path(job["out"]).exists()], texts, config.data.processes, kind)
        made = [_shard(job) | shard_counts(job["out"], job["kind"], count) for job in jobs]
        try:
            write_sealed(manifest, {"dtype": dtype, "shards": made})
        except OSError as error:
            raise UserError(f"{manifest} cannot be written ({error.strerror}): check config.data.cache.") from error
        return _manifest(made, jobs, source, count)


def _shard(job: dict) -> dict:
    """What a manifest says of a job's shard, but for the numbers of its items and tokens."""
    return {"file": Path(job["out"]).name, "split": job["split"], "task": job.get("task", "")}


def _manifest(made: list[dict], jobs: list[dict], source: str, tokenizers: int) -> dict:
    listed = [shard | {"path": job["out"]} for shard, job in zip(made, jobs, strict=True)]
    return {"dtype": jobs[0]["dtype"], "shards": listed, "source": source, "tokenizers": tokenizers}


def _read_manifest(path: Path, jobs: list[dict], source: str, tokenizers: int) -> dict | None:
    """The manifest, or None if it or one of its shards is missing. One that is damaged is made again."""
    try:
        sealed = f'"{FIELD}"' in path.read_text(errors="replace")
        made = read_sealed(path, "it is made again")["shards"]
        known = [{name: shard[name] for name in ("file", "split", "task")} for shard in made]
    except (OSError, UserError, KeyError, TypeError):
        return None
    if known != [_shard(job) for job in jobs] or not all(os.path.exists(job["out"]) for job in jobs):
        return None
    if not sealed:  # an older version wrote it, perhaps where nothing can be written now
        made = [_shard(job) | shard_counts(job["out"], job["kind"], tokenizers) for job in jobs]
    return _manifest(made, jobs, source, tokenizers)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}): set config.data.cache to a folder that you can write to."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another command that prepares the same data in {path.parent} ...", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: doing the work twice is only slower
            pass
        yield


def _run(jobs: list[dict], tokenizers: list[str], processes: int, kind: str) -> None:
    """Runs all jobs, with a progress bar over the bytes of their sources."""
    total = sum(job["bytes"] for job in jobs)
    if not jobs:
        return
    with Progress(total, "B", scale=True) as bar:
        bar.at(f"tokenising {kind}")
        progress = WorkersProgress(bar)
        if processes <= 1 or total < IN_PROCESS or len(jobs) == 1:
            ready = [Tokenizer.from_str(text) for text in tokenizers]
            for job in jobs:
                progress.finish(job, run_job(ready, job, lambda done, job=job: progress.update(job, done)))
        else:
            _run_workers(jobs, tokenizers, min(processes, len(jobs)), progress)


class WorkersProgress:
    """The workers' progress, summed for one bar; used from several threads."""

    def __init__(self, bar):
        self.bar, self.lock, self.done, self.tokens = bar, threading.Lock(), {}, 0

    def update(self, job: dict, done: int) -> None:
        with self.lock:
            self.bar.update(min(done, job["bytes"]) - self.done.get(job["name"], 0))
            self.done[job["name"]] = min(done, job["bytes"])

    def finish(self, job: dict, result: dict) -> None:
        self.update(job, job["bytes"])
        with self.lock:
            self.tokens += result["tokens"]
            self.bar.add(f"{self.tokens:,} tokens, {self.tokens / max(self.bar.seconds, 1e-9) / 1e3:,.0f}k/s")


def _run_workers(jobs: list[dict], tokenizers: list[str], processes: int, progress: Progress) -> None:
    """Runs the jobs in that many processes. The first error stops all of them and is raised."""
    queue, errors, workers = list(reversed(jobs)), [], []  # jobs are taken from the end
    package = str(Path(__file__).parents[2])
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "mend_jax.data.tokenize"]
    try:
        for _ in range(processes):
            pipe = subprocess.PIPE
            workers.append(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, start_new_session=True)
            )
        threads = [
            threading.Thread(target=_feed, args=(w, workers, tokenizers, queue, progress, errors)) for w in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # also after an interrupt: incomplete shards leave nothing behind
        for worker in workers:
            worker.kill()
            worker.wait()
    if errors:
        raise UserError(errors[0])


def _feed(worker, workers, tokenizers: list[str], queue: list, progress: Progress, errors: list) -> None:
    """Sends one worker a job at a time and reads its messages. An error ends all workers."""
    job = None
    try:
        print(json.dumps(tokenizers), file=worker.stdin, flush=True)
        while queue and not errors:
            job = queue.pop()
            print(json.dumps(job), file=worker.stdin, flush=True)
            for line in worker.stdout:
                message = json.loads(line)
                if "progress" in message:
                    progress.update(job, message["progress"])
                    continue
                if "error" in message:
                    errors.append(message["error"])
                    for other in workers:
                        other.kill()
                else:
                    progress.finish(job, message["result"])
                break
            else:
                raise BrokenPipeError
    except IndexError:  # another thread took the last job
        return
    except BrokenPipeError:
        what, code = job["source"] if job else "the tokenizer", worker.wait()  # its pipes close before it has ended
        errors.append(f"A process that tokenised {what} died (exit code {code}): is there enough memory?")
