# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator,no-untyped-call"
"""The Triton kernels of ``listed_attention``: a program for each query block, key block, or tile of virtual keys."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "backward", "forward"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, start, D: tl.constexpr, B: tl.constexpr):
    """Rows start to start + B of a contiguous (rows, D)."""
    return pointer + (start + tl.arange(0, B))[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def _forward(
    q, k, v, keys, values, bias, counts, lists, out, share, lse, scale, N, M, D: tl.constexpr, B: tl.constexpr
):
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R = N // B
    q += bh * N * D
    k += bh * N * D
    v += bh * N * D
    keys += bh * M * D
    values += bh * M * D
    bias += (bh * R + i) * M
    lists += (bh * R + i) * R
    query = tl.load(_tile(q, i * B, D, B))
    largest = tl.full([B], float("-inf"), tl.float32)
    total = tl.zeros([B], tl.float32)
    virtual = tl.zeros([B], tl.float32)
    acc = tl.zeros([B, D], tl.float32)
    for t in range(tl.load(counts + bh * R + i)):
        j = tl.load(lists + t)
        s = tl.dot(query, tl.trans(tl.load(_tile(k, j * B, D, B)))) * (scale * LOG2E)
        m = tl.maximum(largest, tl.max(s, 1))
        p, decay = tl.exp2(s - m[:, None]), tl.exp2(largest - m)
        value = tl.load(_tile(v, j * B, D, B))
        acc = acc * decay[:, None] + tl.dot(p.to(value.dtype), value)
        total = total * decay + tl.sum(p, 1)
        largest = m
    for t in range(M // B):
        extra = tl.load(bias + t * B + tl.arange(0, B)) * LOG2E
        s = tl.dot(query, tl.trans(tl.load(_tile(keys, t * B, D, B)))) * (scale * LOG2E) + extra[None, :]
        m = tl.maximum(largest, tl.max(s, 1))
        p, decay = tl.exp2(s - m[:, None]), tl.exp2(largest - m)
        value = tl.load(_tile(values, t * B, D, B))
        acc = acc * decay[:, None] + tl.dot(p.to(value.dtype), value)
        total = total * decay + tl.sum(p, 1)
        virtual = virtual * decay + tl.sum(p, 1)
        largest = m
    rows = bh * N + i * B + tl.arange(0, B)
    tl.store(_tile(out + bh * N * D, i * B, D, B), (acc / total[:, None]).to(out.dtype.element_ty))
    tl.store(share + rows, virtual / total)
    tl.store(lse + rows, largest + tl.log2(total))


@triton.jit
def _backward_queries(
    q,
    k,
    v,
    keys,
    values,
    bias,
    d_out,
    d_share,
    lse,
    delta,
    counts,
    lists,
    d_q,
    scale,
    N,
    M,
    D: tl.constexpr,
    B: tl.constexpr,
):
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R = N // B
    k += bh * N * D
    v += bh * N * D
    keys += bh * M * D
    values += bh * M * D
    bias += (bh * R + i) * M
    lists += (bh * R + i) * R
    rows = bh * N + i * B + tl.arange(0, B)
    query = tl.load(_tile(q + bh * N * D, i * B, D, B))
    d_o = tl.load(_tile(d_out + bh * N * D, i * B, D, B))
    d_s, norm, shift = tl.load(d_share + rows), tl.load(lse + rows), tl.load(delta + rows)
    acc = tl.zeros([B, D], tl.float32)
    for t in range(tl.load(counts + bh * R + i)):
        j = tl.load(lists + t)
        key = tl.load(_tile(k, j * B, D, B))
        p = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2E) - norm[:, None])
        d_p = tl.dot(d_o, tl.trans(tl.load(_tile(v, j * B, D, B))))
        acc += tl.dot((p * (d_p - shift[:, None])).to(key.dtype), key)
    for t in range(M // B):
        key = tl.load(_tile(keys, t * B, D, B))
        extra = tl.load(bias + t * B + tl.arange(0, B)) * LOG2E
        p = tl.exp2(tl.dot(query, tl.trans(key)) * (scale * LOG2E) + extra[None, :] - norm[:, None])
        d_p = tl.dot(d_o, tl.trans(tl.load(_tile(values, t * B, D, B)))) + d_s[:, None]
        acc += tl.dot((p * (d_p - shift[:, None])).to(key.dtype), key)
    tl.store(_tile(d_q + bh * N * D, i * B, D, B), (acc * scale).to(d_q.dtype.element_ty))


@triton.jit
def _backward_keys(q, k, v, d_out, lse, delta, counts, lists, d_k, d_v, scale, N, D: tl.constexpr, B: tl.constexpr):
    j, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R = N // B
    q += bh * N * D
    d_out += bh * N * D
    lists += (bh * R + j) * R
    key = tl.load(_tile(k + bh * N * D, j * B, D, B))
    value = tl.load(_tile(v + bh * N * D, j * B, D, B))
    acc_k = tl.zeros([B, D], tl.float32)
    acc_v = tl.zeros([B, D], tl.float32)
    for t in range(tl.load(counts + bh * R + j)):
        i = tl.load(lists + t)
        rows = bh * N + i * B + tl.arange(0, B)
        query, d_o = tl.load(_tile(q, i * B, D, B)), tl.load(_tile(d_out, i * B, D, B))
        norm, shift = tl.load(lse + rows), tl.load(delta + rows)
        p = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2E) - norm[None, :])
        acc_v += tl.dot(p.to(d_o.dtype), d_o)
        d_p = tl.dot(value, tl.trans(d_o))
        acc_k += tl.dot((p * (d_p - shift[None, :])).to(query.dtype), query)
    tl.store(_tile(d_k + bh * N * D, j * B, D, B), (acc_k * scale).to(d_k.dtype.element_ty))
    tl.store(_tile(d_v + bh * N * D, j * B, D, B), acc_v.to(d_v.dtype.element_ty))


@triton.jit
def _backward_virtual(
    q,
    keys,
    values,
    bias,
    d_out,
    d_share,
    lse,
    delta,
    d_keys,
    d_values,
    d_bias,
    scale,
    N,
    M,
    D: tl.constexpr,
    B: tl.constexpr,
):
    j, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    R = N // B
    q += bh * N * D
    d_out += bh * N * D
    key = tl.load(_tile(keys + bh * M * D, j * B, D, B))
    value = tl.load(_tile(values + bh * M * D, j * B, D, B))
    acc_k = tl.zeros([B, D], tl.float32)
    acc_v = tl.zeros([B, D], tl.float32)
    for i in range(R):
        rows = bh * N + i * B + tl.arange(0, B)
        columns = (bh * R + i) * M + j * B + tl.arange(0, B)
        query, d_o = tl.load(_tile(q, i * B, D, B)), tl.load(_tile(d_out, i * B, D, B))
        d_s, norm, shift = tl.load(d_share + rows), tl.load(lse + rows), tl.load(delta + rows)
        extra = tl.load(bias + columns) * LOG2E
        p = tl.exp2(tl.dot(key, tl.trans(query)) * (scale * LOG2E) + extra[:, None] - norm[None, :])
        acc_v += tl.dot(p.to(d_o.dtype), d_o)
        d_logits = p * (tl.dot(value, tl.trans(d_o)) + d_s[None, :] - shift[None, :])
        acc_k += tl.dot(d_logits.to(query.dtype), query)
        tl.store(d_bias + columns, tl.sum(d_logits, 1))
    tl.store(_tile(d_keys + bh * M * D, j * B, D, B), (acc_k * scale).to(d_keys.dtype.element_ty))
    tl.store(_tile(d_values + bh * M * D, j * B, D, B), acc_v.to(d_values.dtype.element_ty))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    counts: Tensor,
    lists: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), the share of virtual keys and the logarithm (base 2) of the sum of weights, both (B, H, N)."""
    batch, heads, tokens, width = q.shape
    out = torch.empty_like(q)
    share, lse = (torch.empty(batch, heads, tokens, device=q.device) for _ in range(2))
    _forward[(tokens // block, batch * heads)](
        q,
        k,
        v,
        keys,
        values,
        bias,
        counts,
        lists,
        out,
        share,
        lse,
        width**-0.5,
        tokens,
        keys.shape[2],
        D=width,
        B=block,
    )
    return out, share, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    d_out: Tensor,
    d_share: Tensor,
    lse: Tensor,
    delta: Tensor,
    lists: tuple[Tensor, Tensor],
    transposed: tuple[Tensor, Tensor],
    block: int,
) -> tuple[Tensor, ...]:
    """The gradients of the first six arguments."""
    batch, heads, tokens, width = q.shape
    virtual, scale, blocks = keys.shape[2], width**-0.5, (tokens // block, batch * heads)
    d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
    d_keys, d_values, d_bias = (torch.empty_like(x) for x in (keys, values, bias))
    shared = {"D": width, "B": block}
    _backward_queries[blocks](
        q, k, v, keys, values, bias, d_out, d_share, lse, delta, *lists, d_q, scale, tokens, virtual, **shared
    )
    _backward_keys[blocks](q, k, v, d_out, lse, delta, *transposed, d_k, d_v, scale, tokens, **shared)
    if virtual:
        grid = (virtual // block, batch * heads)
        saved = (q, keys, values, bias, d_out, d_share, lse, delta)
        _backward_virtual[grid](*saved, d_keys, d_values, d_bias, scale, tokens, virtual, **shared)
    return d_q, d_k, d_v, d_keys, d_values, d_bias
