"""The acceptance in small: a context on a 16th of its full cache, with the full cache's tokens and bounded memory.

scripts/bench/long_context.py is the same for 128K tokens, with speeds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig

from moehive.swarm.model.kv.cache import kv_cache
from moehive.swarm.model.kv.fidelity import logit_error

CONTEXT, CHUNK, STEPS = 4096, 512, 6
LAYERS, HEAD = 48, 16  # layers as Qwen3-30B-A3B has: with fewer than 17, one layer alone exceeds a 16th
FULL = LAYERS * (CONTEXT + STEPS) * 2 * HEAD * 4  # one key-value head, fp32


@pytest.fixture(scope="module")
def model() -> Any:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=1,
        num_key_value_heads=1, head_dim=HEAD, num_experts=2, num_experts_per_tok=1, max_position_embeddings=8192,
        eos_token_id=None,
    )  # fmt: skip
    config.initializer_range = 0.2
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(0, 256, (1, CONTEXT), generator=torch.Generator().manual_seed(1))


def generate(model: Any, text: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    """Tokens [STEPS] and their logits [STEPS, V]."""
    made = model.generate(
        text, attention_mask=torch.ones_like(text), past_key_values=cache, prefill_chunk_size=CHUNK, do_sample=False,
        max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return made.sequences[0, CONTEXT:], torch.cat(made.logits)


@pytest.mark.slow
def test_the_full_caches_tokens_on_a_sixteenth_of_its_memory(model: Any, text: Tensor, tmp_path: Path) -> None:
    wanted = generate(model, text, DynamicCache(config=model.config))
    for mode, more in (("spill", {}), ("window", {"window": 32})):
        with kv_cache(model, mode, budget=FULL // 16, directory=tmp_path, **more) as cache:  # type: ignore[arg-type]
            found = generate(model, text, cache)
            stats = cache.stats()
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert stats.memory_peak <= FULL // 16
        assert stats.disk_peak > 0.9 * FULL


def test_eight_bits_say_what_they_change(model: Any, text: Tensor, tmp_path: Path) -> None:
    error = logit_error(model, text[:, :256], "int8")
    assert error.positions == 0  # by default blocks are long where tokens are small
    from moehive.swarm.model.kv.options import KvOptions

    options = KvOptions("int8", budget=1 << 20, directory=tmp_path, block_tokens=64)
    error = logit_error(model, text[:, :256], options)
    assert error.positions == 192
    assert 0 < error.relative < 0.2


# VmHWM is this process' own peak. The tensors that are given exist before, as activations would.
_FILL = """
import re, sys
from pathlib import Path
import torch
from moehive.swarm.model.kv.codecs import RawCodec
from moehive.swarm.model.kv.engine import KvEngine
from moehive.swarm.model.kv.options import KvBudgets
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
layers, heads, chunk, chunks, dim = 40, 4, 256, 16, 64
keys, values = torch.randn(1, heads, chunk, dim), torch.randn(1, heads, chunk, dim)
engine = KvEngine(layers, RawCodec(), KvBudgets(int(sys.argv[1]), 0, 1 << 30, Path(sys.argv[2])), torch.device("cpu"))
small = KvEngine(1, RawCodec(), KvBudgets(1 << 22, 0, 1 << 30, Path(sys.argv[2])), torch.device("cpu"))
for _ in range(3):
    small.update(0, keys, values)  # all that is loaded once is loaded
small.close()
before = peak()
for _ in range(chunks):
    for layer in range(layers):
        engine.update(layer, keys, values)
print(engine.full_bytes, engine.device.peak, engine.disk.used, peak() - before)
"""


def test_the_process_grows_by_the_budget_and_not_by_the_cache(tmp_path: Path) -> None:
    budget = 20 << 20
    command = [sys.executable, "-c", _FILL, str(budget), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    full, counted, on_disk, grown = map(int, output.split())
    assert full == 16 * budget
    assert 0.6 * budget < counted <= budget
    assert on_disk > full - budget
    assert grown < budget + (4 << 20), f"{grown} bytes with a budget of {budget}"
