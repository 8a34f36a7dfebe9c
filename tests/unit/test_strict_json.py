import json

from bigdet.host.strict_json import to_json


def refuse(word: str) -> None:
    raise AssertionError(word)


def test_numbers_that_json_does_not_have_become_null():
    value = {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"), None)], "c": "NaN"}
    expected = {"a": None, "b": [1.5, None, [None, None]], "c": "NaN"}
    for indent in (None, 1):
        assert json.loads(to_json(value, indent), parse_constant=refuse) == expected


def test_finite_values_are_written_as_ever():
    value = {"loss/total": 0.1, "step": 3, "text": "\u00e9", "list": [True, None]}
    assert to_json(value) == json.dumps(value)
    assert to_json(value, 1) == json.dumps(value, indent=1)
