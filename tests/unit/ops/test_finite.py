import torch

from bigdet.ops.finite import describe_not_finite, is_finite


def test_nan_and_infinities_are_found_in_any_type():
    assert not is_finite(torch.tensor([1.0, float("nan")]))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
    assert not is_finite(torch.tensor([float("-inf")], dtype=torch.bfloat16))
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.zeros(0, 3))
    assert is_finite(torch.full((2,), 3e38))  # whose sum is infinite


def test_tensors_are_named_and_their_numbers_counted():
    bad = torch.tensor([[0.0, float("nan")], [float("inf"), 1.0]])
    tensors = {"a": torch.zeros(3), "b": bad, "c": torch.ones(2)}
    assert describe_not_finite(tensors) == ("1 of 3 tensors is not finite: b (2 of 4 numbers)")
    assert describe_not_finite({"a": torch.zeros(3)}) == ""
    many = describe_not_finite({str(number): bad for number in range(5)})
    assert many.startswith("5 of 5 tensors are not finite: 0 (2 of 4 numbers), 1 ")
    assert many.endswith("2 (2 of 4 numbers), ...")
