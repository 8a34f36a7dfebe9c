"""safetensors files and tensors in pieces, against safetensors' own library and brute force."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigdet.pieces.index import Index, Place, key_in
from bigdet.pieces.reading import Stored
from bigdet.pieces.tensor_file import DTYPES, Spec, TensorFile, write_tensors


def tensors_of_all_types() -> dict[str, torch.Tensor]:
    shapes = [(3, 5), (), (0, 4), (7,)]
    return {
        f"{name} {shape}": torch.randint(0, 2, shape).to(dtype)
        for name, dtype in DTYPES.items()
        for shape in shapes
    }


def test_files_of_all_types_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = tensors_of_all_types()
    specs = {name: Spec(name.split()[0], tuple(t.shape)) for name, t in tensors.items()}
    write_tensors(tmp_path / "own", specs, iter(tensors.values()), {"a": "b", "umlaut": "\u00e4"})
    torch.testing.assert_close(load_file(tmp_path / "own"), tensors, rtol=0, atol=0)
    save_file(tensors, tmp_path / "theirs", {"a": "b"})
    read = TensorFile(tmp_path / "theirs")
    assert (read.specs, read.metadata) == (specs, {"a": "b"})
    torch.testing.assert_close(dict(read), tensors, rtol=0, atol=0)
    for file in (read, TensorFile(tmp_path / "own")):  # in which some are not aligned
        mapped = {name: file.mapped(name) for name in file}
        torch.testing.assert_close(mapped, tensors, rtol=0, atol=0)
    mapped["F32 (7,)"].fill_(5)  # a copy of its own from here on
    torch.testing.assert_close(dict(file), tensors, rtol=0, atol=0)


def test_hash_is_that_of_the_file(tmp_path: Path) -> None:
    import hashlib

    digest = write_tensors(tmp_path / "file", {"a": Spec("F32", (3,))}, [torch.arange(3.0)])
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_one_tensor_at_a_time_is_asked_for(tmp_path: Path) -> None:
    written = []

    def tensors():
        for number in range(3):
            written.append((tmp_path / "file").stat().st_size)
            yield torch.full((1_000_000,), float(number))

    specs = {str(number): Spec("F32", (1_000_000,)) for number in range(3)}
    write_tensors(tmp_path / "file", specs, tensors())
    assert written[2] >= 4_000_000  # the first is on its way to the disk before the third is made


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_file_is_one_clear_error(tmp_path: Path, size: int) -> None:
    save_file({"a": torch.zeros(50)}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:size])
    with pytest.raises(ValueError, match="file: cannot be read as safetensors"):
        TensorFile(tmp_path / "file")


def test_ranges_of_a_tensor_in_pieces_equal_those_of_the_whole(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = torch.randn(6, 7)
    for trial in range(20):
        folder = tmp_path / str(trial)
        folder.mkdir()
        # Two ways to cut it, the files of one of which are not all there.
        places = []
        for way in ("a", "b"):
            cuts = [0, *sorted(draw.sample(range(1, 42), draw.randint(0, 6))), 42]
            for first, stop in itertools.pairwise(cuts):
                file = f"pieces-{way}-{draw.randint(0, 2)}.safetensors"
                places.append(Place(first, stop - first, file))
        draw.shuffle(places)
        for file in {place.file for place in places}:
            pieces = {
                key_in(file, "model", "w", place.first): place
                for place in places if place.file == file
            }  # fmt: skip
            specs = {key: Spec("F32", (place.count,)) for key, place in pieces.items()}
            values = [whole.flatten()[p.first : p.first + p.count] for p in pieces.values()]
            write_tensors(folder / file, specs, values)
        index = Index({"model": {"w": Spec("F32", (6, 7))}}, {("model", "w"): places}, {"a": "b"})
        stored = Stored(folder, Index.from_json(index.to_json()))
        assert stored.metadata == {"a": "b"}
        gone = f"pieces-b-{draw.randint(0, 2)}.safetensors"
        (folder / gone).unlink(missing_ok=True)
        for _ in range(20):
            first = draw.randint(0, 42)
            count = draw.randint(0, 42 - first)
            assert stored.lacking([("model", "w", first, count)]) == set()
            got = stored.read("model", "w", first, count)
            assert torch.equal(got, whole.flatten()[first : first + count])
        assert torch.equal(next(stored.whole()), whole)
        assert sum(place.count for place in stored.cover("w")) == 42


def test_what_is_lacking_is_named_and_no_more(tmp_path: Path) -> None:
    files = [f"pieces-1-{rank}.safetensors" for rank in range(3)]
    places = [Place(10 * rank, 10, file) for rank, file in enumerate(files)]
    write_tensors(tmp_path / files[0], {"w/model@0": Spec("F32", (10,))}, [torch.ones(10)])
    stored = Stored(tmp_path, Index({"model": {"w": Spec("F32", (30,))}}, {("model", "w"): places}))
    assert stored.lacking([("model", "w", 0, 10)]) == set()
    assert stored.lacking([("model", "w", 0, 11)]) == {files[1]}
    assert stored.lacking([("model", "w", 5, 20)]) == set(files[1:])
    assert stored.lacking([("model", "w", 20, 0)]) == set()
    with pytest.raises(ValueError, match=r"w \(model\) is in pieces-1-1.safetensors, which is not"):
        stored.read("model", "w", 9, 2)
