"""The benchmarks of speed, at sizes that take no time, and without the network."""

import argparse
import io
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import speed

    threads = torch.get_num_threads()
    yield speed
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(speed):
    return speed.parse(["--crop", "16", "--layers", "1", "--dim", "64", "--batch", "1"])


def test_a_package_answers_line_by_line(speed, tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{speed.STEP}\n{speed.ENCODER}\n{speed.MEMORY}\n"))
    speed.serve(argparse.Namespace(**vars(tiny) | {"serve": "here"}))
    version, step, encoder, memory = capsys.readouterr().out.splitlines()
    assert version == torch.__version__
    assert float(step) > float(encoder) > 0
    assert float(memory) > 1


def test_the_floor_is_counted_from_products_and_attention(speed, tiny):
    found = speed.floors(tiny)
    tokens, dim, pixels = 3 * 4, 64, 64
    products, attention, seconds = found[speed.ENCODER]
    # patches, q k v and output, and two layers of twice the width
    assert products == 2 * tokens * dim * (pixels + 4 * dim + 4 * dim)
    assert attention == 2 * 2 * tokens * tokens * dim
    assert seconds > 0
    assert found[speed.STEP][0] > found[speed.ENCODER][0]


def test_the_report_has_medians_ranges_and_ratios(speed, tiny):
    pairs = {
        speed.STEP: [(4.0, 2.0), (3.0, 2.0), (9.0, 3.0)],
        speed.ENCODER: [(1.0, 1.0)],
        speed.MEMORY: [(300.0, 200.0)],
    }
    text = speed.report(tiny, pairs, dict.fromkeys((speed.STEP, speed.ENCODER), (1e9, 2e9, 0.5)))
    assert "| MAE step, s | 4.00 (3.00-9.00) | 2.00 (2.00-3.00) | 2.00 (1.50-3.00) | 0.50 |" in text
    assert "| peak memory of a step, MiB (B=2) | 300 | 200 | 1.50 |  |" in text
    assert "| MAE step | 1 | 2 |" in text


def test_torch_of_the_release_is_the_same(speed, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("release.call", lambda *command: calls.append([str(part) for part in command]))
    speed.build_environment(tmp_path / "release", "torch==1.2.3")
    assert calls[-1][-2:] == ["muvit==0.1.0", "torch==1.2.3"]


def test_the_benchmark_of_a_gpu_runs_dry_on_a_cpu(speed, tmp_path, monkeypatch):
    """All but the compiler, and the release, which has no place in this environment."""
    import gpu

    sizes = ["--batch", "1", "--steps", "1", "--crop", "16", "--layers", "1", "--dim", "64", "--workers", "0"]
    monkeypatch.setattr(gpu, "VARIANTS", {name: gpu.VARIANTS[name] for name in ("here", "recomputed")})
    options = gpu.parse(["--device", "cpu", "--no-release", "--loader-samples", "2", "--slide-px", "512", *sizes])
    monkeypatch.setattr(gpu, "parse", lambda _: options)
    monkeypatch.setattr(gpu, "in_process", lambda name, _: gpu.measure_step(name, options))
    options.output = tmp_path / "gpu.md"
    gpu.main()
    text = options.output.read_text()
    assert "| here |" in text and "| here, recomputed |" in text
    assert "samples/s with 0 processes" in text and "s per gigapixel" in text


@pytest.mark.long
def test_the_benchmark_of_context_caching_counts_operations(speed, monkeypatch, capsys):
    import context_caching

    for name, value in {"CROP": 64, "SIDE": 1024, "BLOCK": 512}.items():
        monkeypatch.setattr(context_caching, name, value)
    config = partial(context_caching.EncoderConfig, dim=64, num_layers=1)
    monkeypatch.setattr(context_caching, "EncoderConfig", config)
    monkeypatch.setattr(sys, "argv", ["context_caching.py", "--rounds", "1"])
    context_caching.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| c")]
    saved = {row[0].removeprefix("| "): float(row[4]) for row in rows}
    assert list(saved) == ["coarse to fine", "cached", "cached, copies", "cached, all told", "cached, copies, all told"]
    assert saved["cached"] > saved["cached, copies"] > saved["cached, copies, all told"] > saved["coarse to fine"] > 1
