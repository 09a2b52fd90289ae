"""Files of tensors: read without running anything, written as safetensors reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from medisee.foundation.errors import InputError
from medisee.weights.shards import TensorFacts, check_shards, open_shard, shard_paths, some, weight_map, write_shard

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.ones((), dtype=torch.bfloat16),
    "c": torch.arange(5, dtype=torch.float16),
    "d": torch.zeros(0, 4),
}


def facts(tensors: dict[str, Tensor]) -> dict[str, TensorFacts]:
    return {name: TensorFacts(tuple(value.shape), value.dtype) for name, value in tensors.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


shapes = st.lists(st.integers(0, 4), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), max_size=6))
def test_what_is_written_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    drawn.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in drawn.items()}
    path = tmp_path_factory.mktemp("shard") / "model.safetensors"
    write_shard(path, facts(tensors), tensors.__getitem__)
    assert equal(load_file(path), tensors)


def test_transposed_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    tensors = {"a": TENSORS["a"].T}
    write_shard(tmp_path / "x.safetensors", facts(tensors), tensors.__getitem__)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], TENSORS["a"].T)


def test_both_formats_read_the_same(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "x.bin")
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("x.safetensors", "x.bin", "old.bin"):
        with open_shard(tmp_path / name) as shard:
            assert dict(shard.tensors) == facts(TENSORS)
            assert equal({key: shard.read(key) for key in shard.tensors}, TENSORS)


def test_sizes_are_those_on_disk() -> None:
    assert facts(TENSORS)["a"].bytes == 24
    assert (facts(TENSORS)["b"].bytes, facts(TENSORS)["d"].bytes) == (2, 0)


def test_safetensors_come_first(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert shard_paths(tmp_path) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert shard_paths(tmp_path) == [tmp_path / "model.safetensors"]
    assert weight_map(tmp_path) == {}


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no weights"):
        shard_paths(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../other.safetensors"}}'],
)
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index\.json") as caught:
        shard_paths(tmp_path)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("content", [torch.ones(2), {"a": 1}, [torch.ones(2)], {"state": {"a": torch.ones(2)}}])
def test_a_bin_of_something_else_than_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(InputError, match=r"x\.bin: expected names and tensors"), open_shard(tmp_path / "x.bin"):
        pass


def test_every_damaged_shard_is_reported(tmp_path: Path) -> None:
    files = {name: f"model-{name}.safetensors" for name in "abc"}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**files, "e": files["a"]}}))
    (tmp_path / files["b"]).write_bytes(b"{")
    (tmp_path / files["c"]).write_bytes((tmp_path / files["c"]).read_bytes()[:-1])
    with pytest.raises(InputError) as caught:
        check_shards(tmp_path)
    lacking, foreign, truncated = caught.value.problems
    assert "model-a.safetensors: lacks e" in lacking
    assert files["b"] in foreign and files["c"] in truncated


def test_long_lists_are_shortened() -> None:
    assert some({"b", "a"}) == "a, b"
    assert some([str(n) for n in range(9)]) == "0, 1, 2, 3 and 5 more"
