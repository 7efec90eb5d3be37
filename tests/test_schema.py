"""Dataclasses and JSON: what is written is what is read back, and what does not fit is named."""

import dataclasses
import json
import math
from dataclasses import dataclass

import pytest

from spikesink import schema
from spikesink.errors import UserError


@dataclass(frozen=True)
class Point:
    at: float
    rate: float
    ci95: list[float] | None


@dataclass(frozen=True)
class Found:
    curve: list[Point] = schema.keyed("at")
    names: dict[str, int] = schema.sometimes()
    note: str | None = schema.sometimes()
    point: Point | None = schema.or_empty()
    schema: str = "found-1"


WHOLE = Found([Point(0.3, 0.5, [0.4, 0.6]), Point(1.0, math.nan, None)], names={"a": 1})


def test_what_is_written_is_read_back(tmp_path):
    schema.save(tmp_path / "f.json", WHOLE)
    written = json.loads((tmp_path / "f.json").read_text())
    assert written == {
        "curve": {"0.3": {"rate": 0.5, "ci95": [0.4, 0.6]}, "1.0": {"rate": None, "ci95": None}},
        "names": {"a": 1},
        "point": {},
        "schema": "found-1",
    }
    again = schema.load(Found, tmp_path / "f.json", "detect.py")
    assert again.curve[0] == WHOLE.curve[0] and math.isnan(again.curve[1].rate) and again.note is again.point is None
    schema.save(tmp_path / "f.json", dataclasses.replace(WHOLE, point=WHOLE.curve[0]))
    assert schema.load(Found, tmp_path / "f.json", "detect.py").point == WHOLE.curve[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "found-0"}, "run detect.py again"),
        ({"curve": {"0.3": {"rate": "0.5", "ci95": None}}}, r"curve\[0\].rate is '0.5'"),
        ({"curve": {"0.3": {"ci95": None}}}, r"curve\[0\].rate is missing"),
        ({"names": {"a": True}}, "names.a is True"),
        ({"names": [1]}, "names is not an object"),
        ({"else": 1}, "unknown entry 'else'"),
        ({"curve": []}, "curve is not an object"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    (tmp_path / "f.json").write_text(json.dumps(schema.to_json(WHOLE) | change))
    with pytest.raises(UserError, match=words):
        schema.load(Found, tmp_path / "f.json", "detect.py")


def test_a_tuple_is_read_place_by_place():
    kind = tuple[float, list[float] | None, dict[str, float]]
    assert schema.from_json(kind, [1, None, {"a": 2}]) == (1.0, None, {"a": 2.0})
    assert schema.from_json(tuple[float, ...], [1, 2, 3]) == (1.0, 2.0, 3.0)
    for wrong in ([1, None], [1, 2.0, {}], [1, None, {}, 4]):
        with pytest.raises(schema.Misfit):
            schema.from_json(kind, wrong)
