"""The examples run, and show what they say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_are_short_and_say_how_to_run():
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) <= 80, path
        assert f"python examples/{path.name}\n" in text
        assert f"examples/{path.name}" in (ROOT / "README.md").read_text()


def test_an_example_runs_as_a_program():
    ran = subprocess.run([sys.executable, ROOT / "examples/seam_pcm.py"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("maps and gradients differ by at most") and not ran.stderr


def test_clam_style_has_the_losses_of_its_plain_twin(monkeypatch):
    clam_style = load("clam_style")
    losses = torch.tensor(clam_style.main(), dtype=torch.float64)
    # 60 steps of float64: errors of 1e-16 grow with the training, by less than 1e4 here.
    torch.testing.assert_close(losses[:, 0], losses[:, 1], rtol=0, atol=1e-12)
    assert losses[-10:].mean() < 0.5 * losses[:10].mean()

    right = clam_style.dropout_factors
    monkeypatch.setattr(clam_style, "dropout_factors", lambda seed, *args: right(seed + 1, *args))
    other = torch.tensor(clam_style.main(), dtype=torch.float64)
    assert (other[:, 0] - other[:, 1]).abs().max() > 1e-3  # the masks are what makes them equal
    assert torch.equal(other[:, 0], losses[:, 0])


def test_torchmil_calling_is_torchmils():
    torchmil_calling = load("torchmil_calling")
    losses = torchmil_calling.main()
    assert losses[-1] < 0.2 * losses[0]

    for gated in (False, True):
        pool = torchmil_calling.AttentionPool(16, 8, act="gelu", gated=gated)
        X, mask, _ = torchmil_calling.random_bags(5, 16)
        z, f = pool(X, mask, return_att=True)
        assert z.shape == (5, 16) and f.shape == (5, 40) and torch.equal(pool(X, mask), z)
        for bag, keep, pooled in zip(X, mask.bool(), z):  # padding changes nothing
            torch.testing.assert_close(pool(bag[keep][None])[0], pooled)
        names = {key.removesuffix(".weight") for key in pool.to_state_dict("torchmil") if key.endswith("weight")}
        assert names == {"fc1.module", "fc2"} | ({"fc_gated.module"} if gated else set())


def test_pcm_is_replaced_in_one_line():
    # maps of 768 affinities in float32, and their gradients: some 100 roundings
    assert load("seam_pcm").main() < 100 * 2**-24


def test_pamr_draws_maps_to_the_edges_in_training():
    losses, raw, refined = load("pamr_loop").main()
    assert losses[-1] < 0.1 * losses[20]
    assert refined > raw + 0.2 and refined > 0.9


def test_topk_and_additive_heads_train():
    losses, logits, parts = load("topk_additive").main()
    assert all(means[-1] < 0.3 * means[0] for means in losses.values()) and len(losses) == 2
    torch.testing.assert_close(parts.sum(0, keepdim=True), logits)
    assert parts[:8].sum() > 2 * parts[8:].abs().sum()


def test_masked_top_is_only_in_training():
    torch.manual_seed(0)
    network, h = load("topk_additive").MaskedTop(12, top=10, share=1.0), torch.randn(50, 12)
    network.eval()
    pooled = torch.softmax(network.attention.scores(h), 1) @ h
    torch.testing.assert_close(network(h), network.classifier(pooled))
    network.train()
    scores = network.attention.scores(h)
    rest = scores < scores.topk(10).values[:, -1:]  # all of the highest ten of each branch are left out
    weights = scores.exp() * rest
    torch.testing.assert_close(network(h), network.classifier(weights / weights.sum(1, keepdim=True) @ h))
