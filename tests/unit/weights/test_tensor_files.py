import builtins
import os
import pathlib
import pickle
import shutil
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bigdet.weights.tensor_files import read_tensors

ARRAYS = {
    "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">f4"),
    "half": np.array([0.5, -2.0], dtype=np.float16),
    "number": np.array(7),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nest", [None, "model", "blobs"])
def test_a_pickle_of_arrays_gives_their_values(tmp_path, protocol, nest):
    arrays = OrderedDict(ARRAYS)
    content = arrays if nest is None else {nest: arrays, "__author__": "x", "n": np.int64(3)}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    tensors = read_tensors(path)[0]
    assert set(tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert tensors[name].tolist() == array.tolist(), name
        assert tensors[name].shape == array.shape


def test_a_pickle_of_python_2_gives_its_values(tmp_path):
    # What Python 2 wrote of {"conv1_w": numpy.array([1.5, -2.0], dtype="float32")}, protocol 0:
    # bytes are text there, and the numbers of the array too.
    content = (
        b"(dp0\nS'conv1_w'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n"
        b"(I0\ntp4\nS'b'\np5\ntp6\nRp7\n(I1\n(I2\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\n"
        b"tp11\nRp12\n(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\n"
        b"S'\\x00\\x00\\xc0?\\x00\\x00\\x00\\xc0'\np15\ntp16\nbs."
    )
    (tmp_path / "a.pkl").write_bytes(content)
    assert read_tensors(tmp_path / "a.pkl")[0]["conv1_w"].tolist() == [1.5, -2.0]


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path):
    trace = tmp_path / "was-here"
    path = tmp_path / "a.pkl"
    attacks = [
        Code(os.system, f"touch {trace}"),
        Code(builtins.exec, f"open({str(trace)!r}, 'w')"),
        Code(open, str(trace), "w"),
        Code(builtins.getattr, "text", "upper"),
        Code(np.load, str(trace)),
    ]
    for attack in attacks:
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps({"conv1_w": ARRAYS["plain"], "x": attack}, protocol))
            with pytest.raises(ValueError, match=r"a\.pkl: .*it asks for .*Nothing in it was run"):
                read_tensors(path)
    pickle.loads(pickle.dumps(attacks[0]))  # the attack works where nothing guards
    assert trace.exists()


@pytest.mark.parametrize(
    "value", [np.array(["text"]), np.array([None]), np.zeros(2, dtype=[("a", "f4")]), {1, 2}]
)
def test_what_is_no_number_is_refused(tmp_path, value):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": value}, protocol=2))
    with pytest.raises(ValueError, match=r"a\.pkl: cannot be read as a pickle of arrays"):
        read_tensors(tmp_path / "a.pkl")


def test_code_in_a_torch_file_is_refused_and_never_run(tmp_path):
    trace = tmp_path / "was-here"
    torch.save(
        {"model": {"a": torch.ones(1)}, "x": Code(os.system, f"touch {trace}")}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match=r"a\.pth: torch cannot read it as weights alone"):
        read_tensors(tmp_path / "a.pth")
    assert not trace.exists()


def test_torch_files_of_both_kinds_and_safetensors_are_read(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save({"state_dict": OrderedDict(tensors), "epoch": 3}, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("zip.pth", "old.pt", "a.safetensors"):
        read = read_tensors(tmp_path / name)[0]
        assert set(read) == {"a", "b"}
        assert all(torch.equal(read[key], tensors[key]) for key in read)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors"])
def test_a_cut_file_is_one_clear_error(tmp_path, name):
    path = tmp_path / name
    arrays = {"a": np.arange(1000.0)}
    if name == "a.pkl":
        path.write_bytes(pickle.dumps(arrays))
    elif name == "a.pth":
        torch.save({"a": torch.arange(1000.0)}, path)
    else:
        save_file({"a": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"If it was cut off, copy it again"):
        read_tensors(path)


def test_other_endings_and_files_without_tensors_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"found the ending '.npz', expected one of .safetensors"):
        read_tensors(tmp_path / "a.npz")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="no named tensors"):
        read_tensors(tmp_path / "a.pkl")


@pytest.fixture
def notes(monkeypatch):
    """Objects as mmdetection's runs leave them in checkpoints: of a package that is not here."""
    package = types.ModuleType("mmengine")
    history = type("HistoryBuffer", (list,), {"__module__": "mmengine"})
    config = type("ConfigDict", (dict,), {"__module__": "mmengine"})
    package.HistoryBuffer, package.ConfigDict = history, config
    monkeypatch.setitem(sys.modules, "mmengine", package)
    buffer = history([1.0, 2.0])
    buffer.values = np.arange(3)
    notes = {"log": buffer, "cfg": config(a=1), "path": pathlib.PurePosixPath("x"), "set": {1}}
    yield notes
    assert type(buffer) is history


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("key", ["CLASSES", "dataset_meta"])
def test_mmdetections_notes_are_left_out(tmp_path, notes, key, is_zip):
    classes = ("cat", "dog")
    weights = OrderedDict(a=torch.arange(6.0).view(2, 3).t(), b=nn.Parameter(torch.ones(2)))
    meta = {"epoch": 12, key: classes if key == "CLASSES" else {"classes": classes}}
    content = {"meta": {**meta, **notes}, "state_dict": weights, "message_hub": notes}
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    del sys.modules["mmengine"]
    tensors, names = read_tensors(path)
    assert names == ["cat", "dog"]
    assert tensors.keys() == {"a", "b"}
    assert tensors["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["b"].tolist() == [1, 1]


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_among_the_notes_is_refused_and_never_run(tmp_path, is_zip):
    trace = tmp_path / "was-here"
    path = tmp_path / "a.pth"
    attacks = [
        Code(os.system, f"touch {trace}"),
        Code(builtins.eval, f"open({str(trace)!r}, 'w')"),
        Code(builtins.getattr, "text", "upper"),
        Code(torch.load, str(trace)),
        Code(shutil.copy, __file__, str(trace)),
    ]
    for attack in attacks:
        content = {"meta": {"note": attack}, "state_dict": {"a": torch.ones(2)}}
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match=r"a\.pth: .*it asks for "):
            read_tensors(path)
    assert not trace.exists()


def test_a_file_of_classes_that_are_no_names_has_none(tmp_path):
    for number, meta in enumerate(({"CLASSES": [1, 2]}, {"CLASSES": None}, {"CLASSES": ()}, "x")):
        path = tmp_path / f"{number}.pth"
        torch.save({"meta": meta, "state_dict": {"a": torch.ones(2)}}, path)
        assert read_tensors(path)[1] is None
