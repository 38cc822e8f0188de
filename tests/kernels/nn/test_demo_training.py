"""The demo model learns with our layers, which are the network that transformers runs; and what the study writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from balance_study import schemes, study_config
from demo_training.balance_report import write_report
from demo_training.measure import Evaluation, evaluate
from demo_training.model import Trainee, layer_config, load
from demo_training.text import Corpus
from demo_training.training import Options, make_optimizer, train_step
from transformers import Qwen3MoeForCausalLM, set_seed

import moehive.node.demo
from moehive.kernels.nn import LossFreeMoELayer

SHIPPED = Path(next(iter(moehive.node.demo.__path__))) / "model"
OPTIONS = Options(Path(), Path(), 2, None, 3e-3, 0.1, 2, 1, 0, 1)


def test_the_shipped_model_is_the_network_that_our_layers_train() -> None:
    model, tokenizer = load(SHIPPED)
    ids = torch.tensor([tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me speak.")])
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainee = Trainee(model, layer_config(model.config))
        found, reports = trainee.logits(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(reports) == model.config.num_hidden_layers
    exported = trainee.export().state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("name", schemes(study_config()))
def test_every_scheme_of_the_study_learns(name: str) -> None:
    config = study_config()
    set_seed(0)
    trainee = Trainee(Qwen3MoeForCausalLM(config), schemes(config)[name])
    optimizer = make_optimizer(trainee.model, OPTIONS)
    ids = torch.randint(0, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:]
    first, *_, last = [train_step(trainee, optimizer, batch, 3e-3) for _ in range(3)]
    assert last < first
    assert trainee.tokens == 3 * 32 * config.num_hidden_layers
    for layer in trainee.layers:
        if isinstance(layer, LossFreeMoELayer):
            assert layer.gate.e_score_correction_bias is not None
            assert layer.gate.e_score_correction_bias.abs().max() > 0


def test_what_a_capacity_would_drop_is_counted_by_window() -> None:
    config = study_config()
    set_seed(0)
    trainee = Trainee(Qwen3MoeForCausalLM(config), schemes(config)["none"])
    for layer in trainee.layers:
        torch.nn.init.zeros_(layer.gate.weight)  # all experts tie: every token takes the first two
    ids = torch.randint(0, config.vocab_size, (513,))
    found: Evaluation = evaluate(trainee, Corpus(ids, ids, 2048, 4096, ""))
    assert found.over_capacity == pytest.approx((512 - 160) / 512)  # room for 1.25 * 512 * 2 / 8 = 160
    assert found.balance == pytest.approx([1 + 3**0.5] * config.num_hidden_layers)
    assert found.dropped == 0


def write_run(path: Path, seed: int, loss: float, balance: float, settings: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    figures = {"loss": loss, "balance": [1.0, balance], "dropped": 0.0, "over_capacity": 0.125}
    history = [{"step": 1, **figures, "loss": loss + 1}, {"step": 2, **figures}]
    run = {"seed": seed, "steps": 2, "settings": settings, "training_dropped": 0.25, "history": history}
    path.write_text(json.dumps(run))


def test_the_report_says_what_the_runs_say(tmp_path: Path) -> None:
    settings = {"balance_coefficient": 0.05, "bias_update_rate": 0.003, "capacity_factor": 1.25}
    names = list(schemes(study_config()))
    for seed in (0, 1):
        for name, loss, balance in zip(names, (4.04, 4.0, 4.02, 4.2, 3.0), (1.9, 1.2, 1.3, 1.3, 1.0), strict=True):
            if name != "switch" or seed == 0:
                write_run(tmp_path / "runs" / f"{name}-{seed}.json", seed, loss + seed / 100, balance, settings)
    write_run(tmp_path / "runs" / "tuning" / "none-9.json", 9, 4.0, 1.8, settings)
    with pytest.raises(SystemExit, match="needs runs of other"):
        write_report(tmp_path / "runs", tmp_path, study_config(), ["other"])
    write_report(tmp_path / "runs", tmp_path, study_config(), names)
    page, plot = ((tmp_path / f"balance.{kind}").read_text() for kind in ("md", "svg"))
    assert "*auxiliary* ends below 1.25 in every layer and seed (worst 1.20), 0.00 % above the best loss" in page
    assert "*loss-free* ends not below 1.25 in every layer and seed (worst 1.30), 0.50 % above the best loss" in page
    row = "| auxiliary | 0, 1 | 1.20 (1.20 to 1.20) | 1.10 | 12.5 % | 25.0 % | 0.0 % | 4.005 (4.000 to 4.010) | +0.00 %"
    assert f"{row} | -0.99 % |" in page
    assert "| switch | 0 | 1.30 | 1.15 | 12.5 % | 25.0 % | 0.0 % | 4.200 | +5.00 % | +3.96 % |" in page
    assert plot.count('stroke-width="2"/>') == 2 * len(names)
    assert all(f">{name}</text>" in plot for name in names)
