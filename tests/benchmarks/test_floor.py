"""Counting operations, and measuring the speeds of the machine."""

import pytest
import torch
from benchmarks import floor
from benchmarks.floor import best_seconds, copy_bandwidth, operations, peak_operations
from benchmarks.table import Setting
from torch import nn

CPU = Setting(torch.device("cpu"), "bfloat16")


def test_a_backward_pass_makes_two_gradients_except_for_images() -> None:
    """A convolution's weights, then two linear layers' weights and inputs."""
    first, second, third = 2 * 3 * 8 * 9 * 100, 2 * 800 * 16, 2 * 16 * 4
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(800, 16), nn.ReLU(), nn.Linear(16, 4))
    forward = first + second + third
    assert operations(model, 10) == forward
    assert operations(model, 10, backward=True) == forward + first + 2 * (second + third)
    assert next(model.parameters()).device.type == "cpu"  # a copy was counted
    assert model.training


def test_speeds_are_the_work_by_the_fewest_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, took = [0.0], iter((9.0, 5.0, 3.0, 2.0, 4.0, 8.0, 7.0))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += next(took)

    assert best_seconds(call, CPU) == 2.0
    seconds = iter((0.5, 2.0, 4.0))
    monkeypatch.setattr(floor, "best_seconds", lambda call, setting: next(seconds))
    assert copy_bandwidth(CPU) == 2 * (64 << 20) / 0.5, "a copied byte is read and written"
    assert peak_operations(CPU) == 2 * 2048**3 / 2.0, "of the faster precision"
