"""What a run computes in, and what training stores its weights in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from medisee.foundation.hardware import compute_dtype, to_training_precision

CPU = torch.device("cpu")


class Stored(nn.Module):
    """A weight of each kind that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.learning = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.stored_half = nn.Parameter(torch.full((2,), 1.5, dtype=torch.float16), requires_grad=False)
        self.stored_brain = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
        self.stored_single = nn.Parameter(torch.ones(2), requires_grad=False)
        self.packed = nn.Parameter(torch.tensor([-3, 7], dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("dtype", "half", "brain"),
    [(torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16, torch.bfloat16)],
)
def test_each_kind_of_weight_is_stored_as_the_run_needs_it(
    dtype: torch.dtype, half: torch.dtype, brain: torch.dtype
) -> None:
    model = Stored()
    to_training_precision(model, dtype)
    found = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert found == {
        "learning": torch.float32,
        "stored_half": half,
        "stored_brain": brain,
        "stored_single": torch.float32,
        "packed": torch.int8,
    }
    assert model.packed.tolist() == [-3, 7]
    assert model.stored_half.tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (True, True, torch.bfloat16),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),  # AMD since Zen 4
        (False, False, torch.float32),
    ],
)
def test_auto_depends_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert compute_dtype("auto", CPU) == expected


@pytest.mark.parametrize(("name", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_named_type_is_taken_as_it_is(name: str, expected: torch.dtype) -> None:
    assert compute_dtype(name, CPU) == expected


def test_auto_is_float32_on_an_unknown_device() -> None:
    assert compute_dtype("auto", torch.device("meta")) == torch.float32


PROGRAM = """
import resource
import torch
from medisee.foundation.hardware import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def faults_of(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of(10)
print(faults_of(20))
"""


def page_faults(*, keep: bool) -> int:
    """Returns how many pages a process asks the system for while it makes a tensor of 48 MB again and again."""
    argv = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_serves_the_next_tensor() -> None:
    kept, returned = page_faults(keep=True), page_faults(keep=False)
    assert kept < returned / 10


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from medisee.foundation import hardware

    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert hardware.keep_freed_memory() is False
