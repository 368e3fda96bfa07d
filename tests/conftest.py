"""What all tests share: 8 simulated CPU devices, a kept compile cache, no network, tiny models."""

import gc
import os
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# All of this must stand before jax is imported; what the caller has set stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is XLA's compiler, so two settings make it faster than users have it, here and in the commands that
# tests start with this environment. This is the first: the older way to fuse operations needs half the time for small
# programs, and one module for all code of a program, not up to 32, a tenth less. Nothing in this process undoes it, since
# XLA reads its flags once.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The second: most of XLA's optimisations are left out. The fixture `optimised` undoes it for a test, but not for the
# commands that the test starts. The last command of test_end_to_end.py has neither setting.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# PyTorch's threads wait by spinning: where tests share the cores, a tiny model takes thirty times its CPU seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of a benchmark, which takes all cores
# A container may forbid Python to keep what it compiled: each command that a test starts would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402

# For a command that a test starts: the same flags and one device, since of a flag that stands twice the last counts.
ONE_DEVICE = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"}

WORDS = ["<unk>", "<eos>", *(f"w{i}" for i in range(60))]  # of the tiny models' tokenizer


# The files that take minutes: they come first, so that none of them is left for one of two workers at the end.
LONG = (
    "test_end_to_end", "test_processes", "test_family_training", "test_t5_training", "test_train", "test_benchmark", "test_golden",
    "test_int8", "test_scaling", "test_t5", "test_accelerator", "test_start", "test_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_collection_finish():
    """Tracing makes millions of short-lived objects, and Python would look through all that was imported again and again for
    garbage: a tenth of the main thread's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_dropped():
    """After each file. A compiled program holds memory maps, and a process that has more than the kernel's 65,530
    (vm.max_map_count) dies in the compiler."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimised():
    """XLA's optimisations, as users have them, in this process and test; the older fusion stays (see XLA_FLAGS above)."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def kill_rng():
    """Draws the moments at which a test kills a run. They are others every time; `MEND_KILL_SEED=N pytest ...` repeats
    those of a run that failed, whose N stands in its captured output."""
    seed = int(os.environ.get("MEND_KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"the moments of this test's kills: MEND_KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def shared():
    """The real inputs beside the checkout, where they are there."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not there")
    return folder


@pytest.fixture(scope="session")
def golden():
    """Values of the public PyTorch release (tests/golden/README.md)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Of three kinds, {name: tokenizer of transformers} (tokenizer_files.py)."""
    import tokenizer_files

    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: tokenizer_files.load(save(folder / kind)) for kind, save in tokenizer_files.SAVE.items()}


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """A folder as transformers saves GPT2LMHeadModel, with a tokenizer: 2 layers, width 32, 96 positions, 64 tokens."""
    return _torch_gpt2(tmp_path_factory.mktemp("tiny_llm"), seed=1, n_embd=32, n_layer=2, n_head=4, n_positions=96)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """A distiller's backbone, narrower than `tiny_llm` and with its tokenizer: 2 layers, width 24, 80 positions."""
    return _torch_gpt2(tmp_path_factory.mktemp("tiny_backbone"), seed=2, n_embd=24, n_layer=2, n_head=2, n_positions=80)


@pytest.fixture(scope="session")
def serving_models(tmp_path_factory):
    """What a server of the tests has: (llm, distiller, its workdir), as serving_client.py makes them."""
    from serving_client import make_models

    return make_models(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def packs(serving_models):
    """Of two sets of demonstrations, for that server."""
    from serving_client import DEMOS

    from mend_jax.packs.make import make_packs

    llm, distiller, workdir = serving_models
    return make_packs(llm, distiller, [DEMOS, DEMOS[1:3]], workdir)


@pytest.fixture(scope="session")
def torch_llm(tiny_llm):
    """PyTorch's model of `tiny_llm`."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(tiny_llm).eval()


def _torch_gpt2(folder, seed, **sizes):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=1, **sizes
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # fresh biases are 0 and fresh norms 1, which would hide most mistakes
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    """A tokenizer of the words w0 ... w59, one token each; spaces only separate."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)
