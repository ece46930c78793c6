"""The attentions, each one call of the op, that a rewritten attention is; and how their outputs become its own.

One as a rule. Where the mask lets runs of queries each see another range of keys, one for each run; runs of equal
length that see themselves alone are the samples of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sla_compile.passes.attention_call import AttentionCall
from sla_compile.passes.decide import Rewrite
from sla_compile.passes.operands import Step, after, example
from sla_compile.passes.segments import Segment, within

__all__ = ["TURNED", "from_batch", "of_queries", "parts"]

TURNED = Step("transpose", (1, 2))
"""(B, H, N, D) as (B, N, H, D), and back."""


def parts(call: AttentionCall, decision: Rewrite) -> list[tuple[AttentionCall, Rewrite]]:
    """``call`` as the attentions that it is, each without segments, and what is decided of each."""
    if not decision.segments:
        return [(call, decision)]
    of_keys = [(segment.start, segment.stop) for segment in decision.segments]
    inputs = zip(
        of_queries(call.query, decision),
        _cut(call.key, of_keys, decision),
        _cut(call.value, of_keys, decision),
        decision.segments,
        strict=False,  # samples of a batch are one attention
    )
    return [
        (
            replace(call, query=query, key=key, value=value, attn_mask=None, segments=()),
            replace(decision, segments=(), always_critical=within(decision.always_critical, segment)),
        )
        for query, key, value, segment in inputs
    ]


def of_queries(source: Any, decision: Rewrite) -> list[Any]:
    """Of ``source`` (B, H, queries, D) what each of ``parts`` has."""
    return _cut(source, [(segment.first, segment.last) for segment in decision.segments], decision)


def from_batch(decision: Rewrite) -> tuple[Step, ...]:
    """The steps from the output of the one part whose batch has the segments as samples; none where that is not so."""
    count = _samples(decision)
    return (TURNED, Step("unflatten", (0, (-1, count))), Step("flatten", (1, 2)), TURNED) if count else ()


def _cut(source: Any, ranges: Sequence[tuple[int, int]], decision: Rewrite) -> list[Any]:
    """``source`` (B, H, N, D) along its tokens; whole where there is nothing to cut."""
    if not ranges:
        return [source]
    if count := _samples(decision):
        return [after(source, TURNED, Step("unflatten", (1, (count, -1))), Step("flatten", (0, 1)), TURNED)]
    tokens = int(example(source).shape[2])
    return [
        source if (start, stop) == (0, tokens) else after(source, Step("narrow", (2, start, stop - start)))
        for start, stop in ranges
    ]


def _samples(decision: Rewrite) -> int:
    """How many segments there are, where they are samples of a batch: of one length, each by itself; 0 where not."""
    found = decision.segments
    kinds = {(segment.last - segment.first, within(decision.always_critical, segment)) for segment in found}
    return len(found) if len(kinds) == 1 and all(_by_itself(segment) for segment in found) else 0


def _by_itself(segment: Segment) -> bool:
    return (segment.first, segment.last) == (segment.start, segment.stop)
