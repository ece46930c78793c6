"""What a file may bring as JSON is bounded in every respect, and each error names place, value and bound."""

from __future__ import annotations

import json
import re
import time

import pytest

from sla_compile.checkpoints import bounded_json
from sla_compile.checkpoints.bounded_json import read_json


def test_what_is_within_bounds_is_read_as_it_is() -> None:
    data = {"a": [1, 2.5, None, True, "text"], "b": {"c": [[[[[]]]]]}}
    assert read_json("x", json.dumps(data)) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "x: nested too deeply; accepted: up to 8 levels"),
        ("[" * 10 + "]" * 10, "x[0][0][0][0][0][0][0][0]: nested too deeply; accepted: up to 8 levels"),
        ('{"a": "' + "b" * 1001 + '"}', "x['a']: got 'bbbb"),
        ('{"' + "a" * 1001 + '": 1}', "a key of x: got 'aaaa"),
        (r'["\u001b[31m"]', "accepted: printable text of up to 1000 characters"),
        (json.dumps([0] * 10_001), "x: 10001 entries; accepted: up to 10000"),
        ("[9007199254740993]", "x[0]: got 9007199254740993 (int); accepted: a number up to 9007199254740992"),
        ("[1e999]", "x[0]: got inf (float); accepted: a number up to"),
        ("[NaN]", "x: no JSON that can be read: NaN is no number of JSON"),
        ("9" * 10_000, "x: no JSON that can be read: "),
        ("[1,", "x: no JSON that can be read: "),
        (" " * 2**22 + "1", "x: 4194305 characters; accepted: up to 4194304"),
    ],
)
def test_what_is_not_is_refused_at_once(text: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_json("x", text)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - start < 2


def test_the_docstring_tells_the_bounds() -> None:
    told = str(read_json.__doc__)
    assert f"{bounded_json.LONGEST_TEXT // 2**20} MiB" in told
    for bound in (bounded_json.DEEPEST, f"{bounded_json.MOST_ITEMS:,}", bounded_json.LONGEST_STRING):
        assert f"{bound}" in told
