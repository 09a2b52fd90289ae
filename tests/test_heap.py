"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from medisee.heap import keep_freed_memory
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
    from medisee import heap

    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert heap.keep_freed_memory() is False
