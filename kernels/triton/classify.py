"""Classification on the GPU: block scores, the three classes, and the lists of critical blocks.

The scores S = pool(Q) pool(K)^T * scale (B, H, Tm, Tn) come from float32 means by products as precise as those of
float32; each row is then split by threshold search over order-preserving integer keys: the ``critical`` largest are
+1, what the largest ``Tn - negligible`` leave is -1, the rest 0, ties going to the lower key-block index first. No
sort, no host sync. Options (dead and forced blocks, causal, shares read on the device) have a kernel of their own,
in which rows have unequal numbers of critical blocks, and so counts.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import triton
import triton.language as tl

from sla_compile.common.blocks import (
    exact_fraction,
    forced_blocks,
    num_blocks,
    num_critical,
    num_negligible,
    shares_of,
)
from sla_compile.common.options import AttentionOptions

from ..steps import BlockLists, KernelInputs, KeyWeights
from .masks import batch_stride, block_tiers
from .tiles import FULL_PRECISION, ceil_div, power_of_two, stacked

__all__ = ["block_scores", "classes", "classify_rows", "classify_rows_with_options", "critical_lists", "longest_first"]

_ORDER_TILE = 16
_ORDER_STEP = 512
_ORDER_BINS = 32
# most lines for the kernel, which compares every line with every other; more are sorted, in several launches
_ORDER_SORTED = 16384


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def score_kernel(
    pooled_q,
    pooled_k,
    scores,
    scale,
    num_queries,
    num_keys,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head = tl.program_id(0).to(tl.int64)
    queries = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = tl.program_id(2) * TILE + tl.arange(0, TILE)
    query_base = pooled_q + batch_head * num_queries * HEAD_DIM
    key_base = pooled_k + batch_head * num_keys * HEAD_DIM
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, HEAD_DIM, STEP):
        dims = first + tl.arange(0, STEP)
        query_mask = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
        key_mask = (keys < num_keys)[:, None] & (dims < HEAD_DIM)[None, :]
        query = tl.load(query_base + queries[:, None] * HEAD_DIM + dims[None, :], mask=query_mask, other=0.0)
        key = tl.load(key_base + keys[:, None] * HEAD_DIM + dims[None, :], mask=key_mask, other=0.0)
        total = tl.dot(query, tl.trans(key), total, input_precision=PRECISION)
    base = scores + batch_head * num_queries * num_keys
    address = base + queries[:, None].to(tl.int64) * num_keys + keys[None, :]
    tl.store(address, total * scale, mask=(queries < num_queries)[:, None] & (keys < num_keys)[None, :])


@triton.jit
def ordered_key(score):
    """int32 that compare as the float32 ``score`` do."""
    # -0 equals +0 as a score but not as bits
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ALL_BUT_SIGN: tl.constexpr = 0x7FFFFFFF
    return bits ^ ((bits >> 31) & ALL_BUT_SIGN)


@triton.jit
def score_of(key):
    """The inverse of `ordered_key`."""
    ALL_BUT_SIGN: tl.constexpr = 0x7FFFFFFF
    return (key ^ ((key >> 31) & ALL_BUT_SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def take_largest(key, valid, count):
    """Mask of the ``count`` largest of ``key`` [lanes] (int32) in ``valid``; of equal keys the first."""
    LEAST: tl.constexpr = -2147483648
    MOST: tl.constexpr = 2147483647
    low = tl.min(tl.where(valid, key, MOST), 0)
    # no threshold above the least integer is reached by what is not valid
    key = tl.where(valid, key, LEAST)
    high = tl.max(key, 0)
    # the count-th largest key is the largest threshold that at least `count` keys reach; one that exactly as many
    # reach will do, and is found sooner
    step = 0
    while low < high:
        # the upper middle, without overflow
        middle = (low | high) - ((low ^ high) >> 1)
        # that of the scores first: between two signs half of all integers are scores of nearly 0
        of_scores = ordered_key(0.5 * score_of(low) + 0.5 * score_of(high))
        middle = tl.where((step < 4) & (of_scores > low) & (of_scores <= high), of_scores, middle)
        step += 1
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached == count, middle, tl.where(reached > count, high, middle - 1))
    threshold = low
    member = (key >= threshold) & valid
    if tl.sum(member.to(tl.int32), 0) > count:
        above = (key > threshold) & valid
        tied = (key == threshold) & valid
        ties_wanted = count - tl.sum(above.to(tl.int32), 0)
        tie_rank = tl.cumsum(tied.to(tl.int32), 0)
        member = above | (tied & (tie_rank <= ties_wanted))
    return member


@triton.jit
def store_list(list_base, member, lanes):
    """Write the indices of the members, ascending; return how many."""
    indicator = member.to(tl.int32)
    position = tl.cumsum(indicator, 0) - 1
    tl.store(list_base + position, lanes, mask=member)
    return tl.sum(indicator, 0)


@triton.jit
def store_parted_list(list_base, count, partial_count, member, partial, lanes):
    """Write the indices of the members, ascending, those of ``partial`` after the others, and their numbers."""
    whole = store_list(list_base, member & ~partial, lanes)
    rest = store_list(list_base + whole, member & partial, lanes)
    tl.store(count, whole + rest)
    tl.store(partial_count, rest)


@triton.jit
def store_marginal(matrix, row, width, label, lanes, num_keys):
    """A row of the 0/1 matrix of the marginal blocks, 0 where it is padded."""
    value = tl.where((label == 0) & (lanes < num_keys), 1.0, 0.0).to(matrix.dtype.element_ty)
    tl.store(matrix + row * width + lanes, value, mask=lanes < width)


@triton.jit(do_not_specialize=["num_keys", "critical", "negligible", "width"])
def classify_kernel(scores, block_map, lists, matrix, width, num_keys, critical, negligible, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    valid = lanes < num_keys
    score = tl.load(scores + row * num_keys + lanes, mask=valid, other=0.0)
    key = ordered_key(score)
    is_critical = take_largest(key, valid, critical)
    label = tl.where(is_critical, 1, 0)
    if negligible > 0:
        is_kept = take_largest(key, valid, num_keys - negligible)
        label = tl.where(is_kept, label, -1)
    tl.store(block_map + row * num_keys + lanes, label.to(tl.int8), mask=valid)
    if matrix is not None:
        store_marginal(matrix, row, width, label, lanes, num_keys)
    store_list(lists + row * critical, is_critical, lanes)


@triton.jit
def share_of(size, numerator, denominator):
    """floor(size * numerator / denominator), exactly."""
    return size.to(tl.int64) * numerator // denominator


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_rows",
        "num_keys",
        "num_heads",
        "list_width",
        "width",
        "stride_tiers",
        "stride_sparsity",
        "stride_share",
        "topk",
        "topk_whole",
        "bottomk",
        "bottomk_whole",
    ]
)
def classify_with_options_kernel(
    scores,
    block_map,
    lists,
    counts,
    partial_counts,
    matrix,
    width,
    tiers,
    sparsity,
    num_queries,
    num_rows,
    num_keys,
    num_heads,
    list_width,
    stride_tiers,
    stride_sparsity,
    stride_share,
    topk,
    topk_whole,
    bottomk,
    bottomk_whole,
    LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_TIERS: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    HAS_SPARSITY: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Shares are topk / topk_whole and bottomk / bottomk_whole of the row's blocks, or of those below the diagonal."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    valid = lanes < num_keys
    live = valid
    forced = lanes < 0
    if HAS_TIERS:
        batch = row // (num_rows * num_heads)
        tier = tl.load(tiers + batch * stride_tiers + lanes, mask=valid, other=-1)
        live = tier >= 0
        forced = tier > 0
        if HAS_PARTIAL:
            forced = live & ((tier & 1) != 0)
            partial = live & ((tier & 2) != 0)
    scope = valid
    size = tl.zeros([], tl.int32) + num_keys
    least = 1
    if CAUSAL:
        first_query = (row % num_rows).to(tl.int32) * BLOCK_Q
        last_query = tl.minimum(first_query + BLOCK_Q, num_queries) - 1
        scope = valid & ((lanes + 1) * BLOCK_K <= first_query)
        size = first_query // BLOCK_K
        least = 0
        forced = (forced & scope) | (live & ~scope & (lanes * BLOCK_K <= last_query))
    critical = share_of(size, topk, topk_whole)
    negligible = share_of(size, bottomk, bottomk_whole)
    if HAS_SPARSITY:
        WHOLE: tl.constexpr = 1000000  # sparsity is in millionths
        of_head = sparsity + row // num_rows % num_heads * stride_sparsity
        wanted = tl.maximum(tl.load(of_head), 0)
        critical = tl.minimum(critical, share_of(size, tl.minimum(wanted, WHOLE), WHOLE))
        dropped = tl.minimum(tl.maximum(tl.load(of_head + stride_share), 0), WHOLE)
        negligible = share_of(size, dropped, WHOLE)
    candidate = scope & live & ~forced
    candidates = tl.sum(candidate.to(tl.int32), 0)
    # dead blocks rank last, so they use up the negligible first
    dead = tl.sum((scope & ~live).to(tl.int32), 0)
    critical = tl.minimum(tl.maximum(critical.to(tl.int32), least), candidates)
    kept = candidates - tl.maximum(negligible.to(tl.int32) - dead, 0)

    score = tl.load(scores + row * num_keys + lanes, mask=valid, other=0.0)
    key = ordered_key(score)
    is_critical = forced | take_largest(key, candidate, critical)
    is_kept = take_largest(key, candidate, tl.maximum(kept, 0))
    label = tl.where(is_critical, 1, tl.where(is_kept, 0, -1))
    tl.store(block_map + row * num_keys + lanes, label.to(tl.int8), mask=valid)
    if matrix is not None:
        store_marginal(matrix, row, width, label, lanes, num_keys)
    if HAS_PARTIAL:
        store_parted_list(lists + row * list_width, counts + row, partial_counts + row, is_critical, partial, lanes)
    else:
        tl.store(counts + row, store_list(lists + row * list_width, is_critical, lanes))


@triton.jit(
    do_not_specialize=[
        "stride_kinds",
        "num_heads",
        "num_lines",
        "num_items",
        "stride_matrix",
        "stride_line",
        "stride_item",
        "stride_member",
    ]
)
def critical_list_kernel(
    block_map,
    lists,
    counts,
    partial_counts,
    kinds,
    stride_kinds,
    num_heads,
    num_lines,
    num_items,
    stride_matrix,
    stride_line,
    stride_item,
    stride_member,
    LANES: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Items are those of GROUP matrices, ``stride_member`` apart, of each the first before the second of any."""
    program = tl.program_id(0).to(tl.int64)
    matrix = program // num_lines
    line = program % num_lines
    lanes = tl.arange(0, LANES)
    address = block_map + matrix * stride_matrix + line * stride_line + (lanes // GROUP).to(tl.int64) * stride_item
    if GROUP > 1:
        address += (lanes % GROUP).to(tl.int64) * stride_member
    member = tl.load(address, mask=lanes < num_items, other=0) == 1
    if HAS_PARTIAL:
        kind = tl.load(kinds + matrix // num_heads * stride_kinds + lanes, mask=lanes < num_items, other=0)
        list_base = lists + program * num_items
        store_parted_list(list_base, counts + program, partial_counts + program, member, kind > 0, lanes)
    else:
        tl.store(counts + program, store_list(lists + program * num_items, member, lanes))


@triton.jit
def length_key(counts, lines, total, longest, BINS: tl.constexpr):
    """A key of each line by which the longest come first: its bin of length, then its index."""
    count = tl.load(counts + lines, mask=lines < total, other=0)
    bin_of_length = BINS - 1 - tl.minimum(count * BINS // (longest + 1), BINS - 1)
    LAST: tl.constexpr = 2147483647
    return tl.where(lines < total, bin_of_length * total + lines, LAST)


@triton.jit(do_not_specialize=["total", "longest"])
def longest_first_kernel(counts, order, total, longest, TILE: tl.constexpr, STEP: tl.constexpr, BINS: tl.constexpr):
    lines = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = length_key(counts, lines, total, longest, BINS)
    before = tl.zeros([TILE, STEP], tl.int32)
    for first in range(0, total, STEP):
        others = length_key(counts, first + tl.arange(0, STEP), total, longest, BINS)
        before += (others[None, :] < key[:, None]).to(tl.int32)
    tl.store(order + tl.sum(before, 1), lines, mask=lines < total)
    if tl.program_id(0) == 0:
        tl.store(order + total, 0)


def _lanes_and_warps(items: int) -> tuple[int, int]:
    lanes = max(32, power_of_two(items))
    return lanes, max(1, min(8, lanes // 1024))


def block_scores(pooled_q: torch.Tensor, pooled_k: torch.Tensor, scale: float) -> torch.Tensor:
    """pool(Q) pool(K)^T * scale, float32 (B, H, Tm, Tn), of contiguous float32 (B, H, Tm, D) and (B, Hk, Tn, D).

    Not ``torch.matmul``: under TF32, allowed by the user for the model's own products, rankings would change.
    """
    scores = pooled_q.new_empty(*pooled_q.shape[:3], pooled_k.shape[2])
    batch, heads, num_keys, head_dim = pooled_k.shape
    pooled_q = stacked(pooled_q, heads)
    num_queries = pooled_q.shape[2]
    tile = 64 if max(num_queries, num_keys) > 64 else 32
    grid = (batch * heads, ceil_div(num_queries, tile), ceil_div(num_keys, tile))
    score_kernel[grid](
        pooled_q,
        pooled_k,
        scores,
        scale,
        num_queries,
        num_keys,
        HEAD_DIM=head_dim,
        TILE=tile,
        STEP=32,
        PRECISION=FULL_PRECISION,
    )
    return scores


def classes(
    scores: torch.Tensor,
    inputs: KernelInputs,
    sparsity: torch.Tensor | None,
    options: AttentionOptions,
    matrix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, BlockLists]:
    """The block map and the critical blocks of its rows, with counts where rows may have unequal numbers of them.

    A ``matrix``, an `empty_matrix`, is made the `marginal_matrix` of the block map.
    """
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    weights = inputs.key_weights
    tiers = block_tiers(weights, options.always_critical, keys, options.block_k, scores.device)
    if tiers is None and sparsity is None and not options.causal:
        critical = num_critical(options.topk, scores.shape[3])
        negligible = num_negligible(options.bottomk, critical, scores.shape[3])
        return classify_rows(scores, critical, negligible, matrix)
    forced = sum(last - first for first, last in forced_blocks(options.always_critical, keys, options.block_k))
    return classify_rows_with_options(
        scores,
        options,
        sparsity=sparsity,
        tiers=tiers,
        has_partial=weights is not None,
        queries=queries,
        forced=forced,
        matrix=matrix,
    )


def classify_rows(
    scores: torch.Tensor, critical: int, negligible: int, matrix: torch.Tensor | None = None
) -> tuple[torch.Tensor, BlockLists]:
    """The block map, int8, of ``scores`` (B, H, Tm, Tn), and the critical key blocks of each row; and `classes`'s
    ``matrix``."""
    batch, heads, num_queries, num_keys = scores.shape
    block_map = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    lists = torch.empty((batch, heads, num_queries, critical), dtype=torch.int32, device=scores.device)
    lanes, warps = _lanes_and_warps(num_keys)
    # what is None is no parameter of the compiled kernel
    width = matrix.stride(1) if matrix is not None else None
    classify_kernel[(batch * heads * num_queries,)](
        scores, block_map, lists, matrix, width, num_keys, critical, negligible, LANES=lanes, num_warps=warps
    )
    return block_map, BlockLists(lists, None)


def classify_rows_with_options(
    scores: torch.Tensor,
    options: AttentionOptions,
    *,
    sparsity: torch.Tensor | None,
    tiers: torch.Tensor | None,
    has_partial: bool,
    queries: int,
    forced: int,
    matrix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, BlockLists]:
    """`classify_rows` where rows differ: by ``sparsity`` (`AttentionInputs`), ``tiers`` (`block_tiers`) or causality.

    ``forced`` is the most blocks of a row that ``tiers`` forces. The lists are as wide as the options allow.
    """
    block_q, block_k, causal = options.block_q, options.block_k, options.causal
    batch, heads, rows, columns = scores.shape
    width = forced + shares_of(columns, options.topk, options.bottomk)[0]
    if causal:
        width += num_blocks(block_q, block_k) + 1
    width = min(columns, width)
    block_map = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    lists = torch.empty((batch, heads, rows, width), dtype=torch.int32, device=scores.device)
    counts = torch.empty((batch, heads, rows), dtype=torch.int32, device=scores.device)
    partial = torch.empty_like(counts) if has_partial else None
    critical, negligible = (_within_32_bits(exact_fraction(share)) for share in (options.topk, options.bottomk))
    lanes, warps = _lanes_and_warps(columns)
    classify_with_options_kernel[(batch * heads * rows,)](
        scores,
        block_map,
        lists,
        counts,
        partial,
        # what is None is no parameter of the compiled kernel
        matrix,
        matrix.stride(1) if matrix is not None else None,
        tiers if tiers is not None else block_map,
        sparsity if sparsity is not None else block_map,
        queries,
        rows,
        columns,
        heads,
        width,
        batch_stride(tiers),
        0 if sparsity is None or sparsity.dim() == 1 else sparsity.stride(0),
        1 if sparsity is None else sparsity.stride(-1),
        critical.numerator,
        critical.denominator,
        negligible.numerator,
        negligible.denominator,
        LANES=lanes,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        HAS_TIERS=tiers is not None,
        HAS_PARTIAL=has_partial,
        HAS_SPARSITY=sparsity is not None,
        CAUSAL=causal,
        num_warps=warps,
    )
    return block_map, BlockLists(lists, counts, partial)


def _within_32_bits(share: Fraction) -> Fraction:
    """``share`` itself where its decimals are up to nine, else the nearest that keeps products within 64 bits."""
    return share.limit_denominator(2**31 - 1)


def critical_lists(
    block_map: torch.Tensor, *, by_column: bool, weights: KeyWeights | None = None, group: int = 1
) -> BlockLists:
    """The critical blocks of each row (or column) of a contiguous int8 block map (B, H, Tm, Tn).

    The lists are as wide as the worst case, (B, H, lines, items), because the true one is known only on the device.
    With ``weights``, of rows, the lists have those that are ``partial`` at their ends. Of columns, those of a ``group``
    of query heads are one list, as `BlockLists.blocks` says.
    """
    batch, heads, num_queries, num_keys = block_map.shape
    heads //= group
    lines, items = (num_keys, num_queries * group) if by_column else (num_queries, num_keys)
    strides = (1, num_keys) if by_column else (num_keys, 1)
    lists = torch.empty((batch, heads, lines, items), dtype=torch.int32, device=block_map.device)
    counts = torch.empty((batch, heads, lines), dtype=torch.int32, device=block_map.device)
    partial = torch.empty_like(counts) if weights is not None else None
    kinds = weights.blocks if weights is not None else None
    lanes, warps = _lanes_and_warps(items)
    # what is None is no parameter of the compiled kernel
    critical_list_kernel[(batch * heads * lines,)](
        block_map,
        lists,
        counts,
        partial,
        kinds,
        batch_stride(kinds) if kinds is not None else None,
        heads if kinds is not None else None,
        lines,
        items,
        num_queries * num_keys * group,
        strides[0],
        strides[1],
        num_queries * num_keys if group > 1 else None,
        LANES=lanes,
        HAS_PARTIAL=weights is not None,
        GROUP=group,
        num_warps=warps,
    )
    return BlockLists(lists, counts, partial)


def longest_first(lists: BlockLists, longest: int) -> torch.Tensor:
    """In which order to work on lines whose ``lists`` have counts (B, H, lines) of up to ``longest``.

    Returns int32 (B * H * lines + 1): indices of lines, those with more entries first, in bins, so that lines of about
    one length stay with their heads; and at the end a 0, for programs that count how far they are.
    """
    counts = lists.counts
    assert counts is not None
    total = counts.numel()
    order = counts.new_empty(total + 1)
    if total > _ORDER_SORTED:
        bins = counts.flatten() * _ORDER_BINS // (longest + 1)
        order[:total] = bins.sort(descending=True, stable=True).indices
        order[total:].zero_()  # an assignment would copy from the host
        return order
    longest_first_kernel[(ceil_div(total, _ORDER_TILE),)](
        counts, order, total, longest, TILE=_ORDER_TILE, STEP=_ORDER_STEP, BINS=_ORDER_BINS
    )
    return order
