"""The zoo's benchmark at toy size: that every reference is the function it stands for, and that the rows are there."""

import pytest
import torch

from benchmarks import common, zoo
from distiller_zoo import METHODS

TINY = zoo.Sizes(channels=4, classes=5, feat_dim=8, n_data=40, nce_k=12)
OPTIONS = [f"--{name}={value}" for name, value in vars(TINY).items()] + ["--seconds=0.001"]


def rows(text: str) -> list[list[str]]:
    """The cells of the table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("method", zoo.CASES)
def test_a_reference_has_the_value_and_the_gradients_of_the_loss(method):
    """Twice, for CRD: its second value depends on the memories and constants that the first call left behind."""
    ours, reference = zoo.make_steps(zoo.CASES[method], TINY, batch=9, dtype=torch.float64)
    # A singular vector's derivative divides by the distance between singular values.
    tolerance = 1e-6 if method == "kdsvd" else 1e-8
    for _ in range(2):
        (value, gradients), (expected, expected_gradients) = ours(), reference()
        assert value.shape == expected.shape == ()
        assert expected > 0
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
        sizes = [gradient.abs().max().item() for gradient in expected_gradients]
        for found, gradient, size in zip(gradients, expected_gradients, sizes, strict=True):
            assert size > 0
            # A bias before a standardisation has a gradient of rounding errors alone.
            atol = tolerance * size + 1e-12 * max(sizes)
            torch.testing.assert_close(found, gradient, rtol=tolerance, atol=atol)


def test_arguments_are_as_in_training():
    maps_s, maps_t, *_, pooled = zoo.make_inputs(("maps_s", "maps_t", "target", "f_s"), TINY, 6)
    assert [tuple(f.shape) for f in maps_s] == [(6, 4, 32, 32), (6, 8, 16, 16), (6, 16, 8, 8)]
    for f in maps_s + maps_t:
        assert f.is_contiguous(memory_format=torch.channels_last) and f.dtype == torch.float32 and f.min() == 0
    assert all(f.requires_grad for f in [*maps_s, pooled]) and not any(f.requires_grad for f in maps_t)
    preact, _ = zoo.make_inputs(("preact_s", "preact_t"), TINY, 6)
    assert all(f.min() < 0 for f in preact)


def test_it_prints_a_row_per_method(capsys, monkeypatch):
    """Without the profiler, which is slow to start."""
    monkeypatch.setattr(zoo, "peak_memory", lambda function, device: len(function()) * 2**20)
    zoo.main([*OPTIONS, "--batch_sizes", "4"])
    text = capsys.readouterr().out
    assert common.machine() in text
    table = rows(text)
    assert [row[:2] for row in table] == [[method, "4"] for method in zoo.CASES]
    assert set(zoo.CASES) <= set(METHODS)
    for _, _, reference, ours, ratio, *memory in table:
        assert float(ratio) == pytest.approx(float(reference) / float(ours), rel=0.02)
        assert memory == ["2", "2"]


def test_it_prints_a_row_per_batch_size(capsys):
    zoo.main([*OPTIONS, "--batch_sizes", "4", "2", "--methods", "nst", "kd"])
    table = rows(capsys.readouterr().out)
    assert [row[:2] for row in table] == [["nst", "4"], ["nst", "2"], ["kd", "4"], ["kd", "2"]]
    assert all(float(cell) > 0 for row in table for cell in row[2:])


def test_a_reference_that_does_not_fit_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(zoo, "available_memory", lambda device: 1000)
    zoo.main([*OPTIONS, "--batch_sizes", "4", "--methods", "nst", "kd"])
    (_, _, reference, ours, ratio, memory_reference, memory), kd = rows(capsys.readouterr().out)
    assert reference == ratio == memory_reference == "-"
    assert float(ours) > 0 and float(memory) > 0
    assert "-" not in kd


@pytest.mark.parametrize("method", ["crd", "fsp", "rkd", "nst", "nce", "ccl"])
def test_what_a_reference_is_said_to_need_is_near_what_it_holds(method):
    sizes, batch = zoo.Sizes(channels=16, n_data=500, nce_k=400), 16
    _, reference = zoo.make_steps(zoo.CASES[method], sizes, batch)
    held, estimate = common.peak_memory(reference), 4 * zoo.CASES[method].large(sizes, batch)
    assert 0.7 * held < estimate < 1.1 * held


def test_an_unknown_method_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        zoo.main(["--methods", "magic"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "magic" in error and all(method in error for method in zoo.CASES)
