"""The parameters of a ModelInferRequest: a map of variants, of which every name must be known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vaeserve_server.errors import InvalidInputError, shown

_INTEGERS = ("int64_param", "uint64_param")
_NUMBERS = (*_INTEGERS, "double_param")
_UINT64_MAX = 2**64 - 1

_Value = TypeVar("_Value")


class Parameters:
    """The parameters of one request to `label`. What is not there has the default."""

    def __init__(self, given: Mapping[str, Any], taken: Sequence[str], label: str) -> None:
        """Take those that are `taken`; InvalidInputError for others, or a misspelt one would do nothing."""
        for name in given:
            if name not in taken:
                raise InvalidInputError(
                    "parameters", f"parameter {shown(name)} is not one that {label} takes: {', '.join(taken)}"
                )
        self._given = given

    def text(self, name: str) -> str:
        """Return a string, '' without one."""
        value = self._of_kind(name, ("string_param",), "a string", "")
        assert isinstance(value, str)
        return value

    def integer(self, name: str) -> int:
        """Return an integer of 64 bits without a sign, 0 without one."""
        expected = "an integer, 0 to 2**64 - 1"
        value = self._of_kind(name, _INTEGERS, expected, 0)
        if not 0 <= value <= _UINT64_MAX:
            raise _wrong(name, value, expected)
        return int(value)

    def number(self, name: str, default: float) -> float:
        """Return an integer or a float."""
        return float(self._of_kind(name, _NUMBERS, "a number", default))

    def choice(self, name: str, choices: Mapping[str, _Value], default: _Value) -> _Value:
        """Return what the string stands for."""
        if name not in self._given:
            return default
        text = self.text(name)
        if text not in choices:
            raise _wrong(name, text, f"one of {', '.join(choices)}")
        return choices[text]

    def _of_kind(self, name: str, kinds: Sequence[str], expected: str, default: Any) -> Any:
        if name not in self._given:
            return default
        kind = self._given[name].WhichOneof("parameter_choice")
        value = None if kind is None else getattr(self._given[name], kind)
        if kind not in kinds:
            raise _wrong(name, value, expected)
        return value


def _wrong(name: str, value: object, expected: str) -> InvalidInputError:
    return InvalidInputError(f"parameters.{name}", f"parameter {name} is {shown(str(value))}; it must be {expected}")
