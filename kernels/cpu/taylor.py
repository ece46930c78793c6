"""Attention to critical keys and to virtual ones on the CPU, forward and explicit backward (``linear="taylor"``).

For one head, over the critical keys c and the marginal blocks j of query block i, in one softmax:

    l_c = scale q.k_c,   l_j = scale q.kbar_j + b_ij,   b_ij = ln n_j + w_ij + shift
    S_i = sum_j a_ij C_j,   a_i = softmax over j of (scale qbar_i.kbar_j + b_ij)
    O = sum_c p_c v_c + sum_j p_j (vbar_j + scale S_i^T q)

with the `Moments` n, kbar, vbar, C of each key block, and w by its variance and the mean squares of the queries
(``kernels/reference.py`` says why). Work goes as in `attention`, whose axes these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sla_compile.common.kernel_interface import AttentionInputs, ForwardResult, Gradients
from sla_compile.common.options import AttentionOptions, BackwardOptions

from .classify import Choice, blocks_of, classify, pool
from .gathered import (
    Keys,
    Lists,
    accumulate,
    add_onto_keys,
    bias_of,
    chunks,
    gather,
    groups,
    key_side,
    listed_scores,
    log_sum,
    of_heads,
    of_key_heads,
    scatter_add,
    softmax,
    token_major,
    work_dtype,
)

__all__ = ["backward", "forward"]


def forward(inputs: AttentionInputs, options: AttentionOptions) -> ForwardResult:
    """Output, and what its backward needs, of one call; no ``linear_out``."""
    q, k, v, _, _, key_mask, sparsity, shift = inputs
    block_q, block_k = options.block_q, options.block_k
    batch, heads, tokens, _ = q.shape
    work = work_dtype(q)
    query_blocks, key_blocks = -(-tokens // block_q), -(-k.shape[2] // block_k)
    out = token_major(q)
    lse = q.new_empty(batch, heads, tokens, dtype=work)
    block_map = q.new_empty(batch, heads, query_blocks, key_blocks, dtype=torch.int8)
    for group, key_group in groups(q, k, query_blocks):
        bias = bias_of(key_mask, group[0], block_k, work)
        live = None if bias is None else bias.amax(dim=1) > float("-inf")
        choice = Choice.of(tokens, k.shape[2], live, of_heads(sparsity, 1, group), options)
        keys = key_side(k[key_group], v[key_group], block_k, work, bias, options.causal)
        moments = Moments.of(keys)
        rows = _Rows.of(q[group], moments, of_heads(shift, 0, group), options)
        ranked = block_map[group] = classify(rows.rank, choice)
        rows.keep(ranked)
        lists = Lists.of(ranked, keys.k.shape[0], choice.candidates is None)
        for part in _chunks(rows, keys, lists, block_q):
            span = slice(part.start * block_q, min(part.stop * block_q, tokens))
            queries = blocks_of(q[group][:, span], block_q, work)
            scaled = queries * options.scale
            chunk = _Chunk.of(scaled, keys, moments, rows, lists, part)
            values = of_key_heads(chunk.p_virtual, moments.value).flatten(0, 1)
            weighted = scaled.flatten(0, 1) * chunk.share
            for p, others in ((chunk.p_exact, chunk.values), (weighted, chunk.slope.flatten(0, 1))):
                torch.baddbmm(values, p, others, out=values)
            out[group][:, span] = values.view(queries.shape).flatten(1, 2)[:, : span.stop - span.start]
            chunk_lse = log_sum(chunk.scores, chunk.p).view(queries.shape[:3])
            lse[group][:, span] = chunk_lse.flatten(1, 2)[:, : span.stop - span.start]
    return ForwardResult(out, q.new_empty(0), lse, block_map)


def backward(grad_out: Tensor, inputs: AttentionInputs, result: ForwardResult, options: BackwardOptions) -> Gradients:
    """Gradients at grad_out of the call that gave ``result``, whose classes are constants; out and lse are not read."""
    q, k, v, _, _, key_mask, _, shift = inputs
    block_q, scale, tokens = options.block_q, options.scale, q.shape[2]
    work = work_dtype(q)
    dq, dk, dv = (token_major(x) for x in (q, k, v))
    dshift = torch.zeros(shift.shape if shift is not None else 0, dtype=work, device=q.device)
    for group, key_group in groups(q, k, result.block_map.shape[2]):
        key_bias = bias_of(key_mask, group[0], options.block_k, work)
        keys = key_side(k[key_group], v[key_group], options.block_k, work, key_bias, options.causal)
        moments = Moments.of(keys)
        rows = _Rows.of(q[group], moments, of_heads(shift, 0, group), options)
        rows.keep(result.block_map[group])
        lists = Lists.of(result.block_map[group], keys.k.shape[0])
        grad_k, grad_v = torch.zeros_like(keys.k), torch.zeros_like(keys.v)
        grad_q = keys.k.new_empty(q[group].shape)
        grads = moments.zeros()
        grad_bias, grad_mean = torch.zeros_like(rows.bias), torch.zeros_like(rows.mean)
        for part in _chunks(rows, keys, lists, block_q):
            span = slice(part.start * block_q, min(part.stop * block_q, tokens))
            queries = blocks_of(q[group][:, span], block_q, work)
            upstream = blocks_of(grad_out[group][:, span], block_q, work)
            scaled, listed = queries * scale, lists.rows(part).blocks
            chunk = _Chunk.of(scaled, keys, moments, rows, lists, part)
            g, flat = upstream.flatten(0, 1), scaled.flatten(0, 1)
            # dO.v of every key, then dl = p (dO.v - sum of p dO.v)
            along = upstream @ chunk.slope.mT
            gained = (along * scaled).sum(dim=-1, keepdim=True)
            of_exact, of_virtual = chunk.split(of_values := torch.empty_like(chunk.p))
            torch.bmm(g, chunk.values.mT, out=of_exact)
            of_key_heads(upstream, moments.value.mT, out=of_virtual)
            of_virtual += gained
            d_exact, d_virtual = chunk.split(torch._softmax_backward_data(of_values, chunk.p, -1, chunk.p.dtype))
            scatter_add(grad_v, listed, chunk.p_exact.mT @ g)
            scatter_add(grad_k, listed, d_exact.mT @ flat)
            add_onto_keys(grads.value, chunk.p_virtual, upstream)
            add_onto_keys(grads.mean, d_virtual, scaled)
            dscaled = (d_exact @ chunk.keys).view(queries.shape) + of_key_heads(d_virtual, moments.mean)
            # of scaled S, which the share of the virtual keys weighs
            share = chunk.share.view(*queries.shape[:3], 1)
            dscaled += along.mul_(share)
            grad_slope = (scaled.mT @ upstream.mul(share)).flatten(2)
            mixture = rows.mixture[:, part]
            add_onto_keys(grads.slope.flatten(2), mixture, grad_slope)
            d_mixture = of_key_heads(grad_slope, moments.slope.flatten(2).mT)
            d_logits = torch._softmax_backward_data(d_mixture, mixture, -1, mixture.dtype)
            grad_mean[:, part] = of_key_heads(d_logits, moments.mean) * scale
            add_onto_keys(grads.mean, d_logits, rows.mean[:, part], scale)
            grad_bias[:, part] = d_logits + d_virtual.sum(dim=2)
            grad_q[:, span] = (dscaled * scale).flatten(1, 2)[:, : span.stop - span.start]
        if shift is not None:
            accumulate(dshift, grad_bias.sum(dim=(1, 2)), 0, group)
        # w = scale^2 / 2 (mean of q^2).var where it is below its bound
        d_spread = grad_bias.masked_fill_(rows.bounded, 0) * (scale * scale / 2)
        add_onto_keys(grads.variance, d_spread, rows.squares)
        _add_row_gradients(grad_q, q[group], grad_mean, of_key_heads(d_spread, moments.variance), block_q)
        moments.add_gradients(grads, keys, grad_k, grad_v)
        dq[group] = grad_q
        dk[key_group] = grad_k.flatten(1, 2)[:, : k.shape[2]]
        dv[key_group] = grad_v.flatten(1, 2)[:, : k.shape[2]]
    dshift = dshift if shift is None else dshift.to(shift.dtype)
    return Gradients(dq, dk, dv, q.new_empty(0), q.new_empty(0), dshift)


@dataclass
class Moments:
    """Of each key block under the weights of its keys, or their gradients; 0 where all weights are 0."""

    size: Tensor
    """ln n (Tn), n the sum of weights."""
    shares: Tensor
    """(Tn, block_k, 1): each key's weight over n."""
    mean: Tensor
    """kbar (Gk, Tn, D)."""
    variance: Tensor
    """(Gk, Tn, D)."""
    value: Tensor
    """vbar (Gk, Tn, D)."""
    slope: Tensor
    """C (Gk, Tn, D, D): the mean of (k - kbar) v^T."""

    @classmethod
    def of(cls, keys: Keys) -> Moments:
        blocks, block = keys.k.shape[1:3]
        if keys.weights is None:
            weights = keys.k.new_ones(blocks, block, 1)
            weights[-1, block - keys.missing :] = 0
        else:
            weights = keys.weights
        total = weights.sum(dim=(1, 2))
        shares = weights / total.masked_fill(total == 0, 1).view(-1, 1, 1)
        weighted = shares * keys.v
        mean = (shares * keys.k).sum(dim=2)
        off = keys.k - mean.unsqueeze(2)
        return cls(
            total.log(), shares, mean, (shares * off.square()).sum(dim=2), weighted.sum(dim=2), off.mT @ weighted
        )

    def zeros(self) -> Moments:
        """Gradients to add to."""
        zeros = (torch.zeros_like(x) for x in (self.mean, self.variance, self.value, self.slope))
        return Moments(self.size, self.shares, *zeros)

    def add_gradients(self, grads: Moments, keys: Keys, grad_k: Tensor, grad_v: Tensor) -> None:
        """Carry ``grads`` on to those of the keys and values (Gk, Tn, block_k, D)."""
        off = keys.k - self.mean.unsqueeze(2)
        of_k = grads.mean.unsqueeze(2) + 2 * off * grads.variance.unsqueeze(2)
        of_k += (keys.v - self.value.unsqueeze(2)) @ grads.slope.mT
        grad_k += self.shares * of_k
        grad_v += self.shares * (grads.value.unsqueeze(2) + off @ grads.slope)


@dataclass
class _Rows:
    """What query blocks and key blocks have with each other: all rows of a group."""

    mean: Tensor
    """qbar (G, Tm, D)."""
    squares: Tensor
    """The mean of q^2 (G, Tm, D)."""
    bounded: Tensor
    """(G, Tm, Tn) bool: where w is at its bound."""
    shift: Tensor | float
    """(G, 1, 1)."""
    bias: Tensor
    """b (G, Tm, Tn)."""
    logits: Tensor
    """scale qbar.kbar + b (G, Tm, Tn)."""
    rank: Tensor
    """What blocks are ranked by (G, Tm, Tn): the logits without shift and without a bound to w."""
    mixture: Tensor
    """a (G, Tm, Tn), after `keep`."""

    @classmethod
    def of(cls, q: Tensor, moments: Moments, shift: Tensor | None, options: BackwardOptions) -> _Rows:
        """From q (G, Lq, D) and shift (G)."""
        work, scale = moments.mean.dtype, options.scale
        mean, squares = pool(q, options.block_q, work), pool(q.to(work).square(), options.block_q, work)
        spread = of_key_heads(squares, moments.variance.mT).mul_(scale * scale / 2)
        bound = moments.size.clamp(min=0)
        bounded = spread > bound
        added = 0.0 if shift is None else shift.detach().to(work).view(-1, 1, 1)
        bias = torch.minimum(spread, bound) + moments.size + added
        scores = of_key_heads(mean, moments.mean.mT).mul_(scale)
        logits = scores + bias
        return cls(mean, squares, bounded, added, bias, logits, spread + scores + moments.size, logits)

    def keep(self, block_map: Tensor) -> None:
        """Have virtual keys at the marginal blocks of a block map (G, Tm, Tn) alone."""
        absent = block_map != 0
        self.bias = self.bias.masked_fill(absent, float("-inf"))
        self.mixture = softmax(self.logits.masked_fill_(absent, float("-inf")))


@dataclass
class _Chunk:
    """The attention of the query blocks of a chunk; R = G * C."""

    keys: Tensor
    """Gathered critical keys (R, width * block_k, D), as ``values``."""
    values: Tensor
    scores: Tensor
    """Of critical keys and then of virtual ones (R, block_q, width * block_k + Tn)."""
    p: Tensor
    """Their softmax."""
    slope: Tensor
    """S (G, C, D, D)."""

    @classmethod
    def of(cls, scaled: Tensor, keys: Keys, moments: Moments, rows: _Rows, lists: Lists, part: slice) -> _Chunk:
        """Of scaled queries (G, C, block_q, D), the query blocks ``part`` of a group."""
        listed = lists.rows(part)
        gathered = gather(keys.k, listed.blocks)
        columns = gathered.shape[1] + moments.size.shape[0]
        scores = scaled.new_empty(scaled.shape[0] * scaled.shape[1], scaled.shape[2], columns)
        slope = of_key_heads(rows.mixture[:, part], moments.slope.flatten(2))
        slope = slope.view(*scaled.shape[:2], *moments.slope.shape[2:])
        chunk = cls(gathered, gather(keys.v, listed.blocks), scores, scores, slope)
        exact, virtual = chunk.split(scores)
        listed_scores(scaled.flatten(0, 1), gathered, keys, listed, out=exact)
        of_key_heads(scaled, moments.mean.mT, out=virtual)
        virtual += rows.bias[:, part].unsqueeze(2)
        chunk.p = softmax(scores) if listed.may_be_empty(keys) else scores.softmax(dim=-1)
        return chunk

    def split(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What ``columns``, laid out as the scores, has of critical keys (R, block_q, width * block_k), and of virtual
        ones (G, C, block_q, Tn)."""
        exact = self.keys.shape[1]
        return columns[..., :exact], columns[..., exact:].view(*self.slope.shape[:2], columns.shape[1], -1)

    @property
    def p_exact(self) -> Tensor:
        return self.split(self.p)[0]

    @property
    def p_virtual(self) -> Tensor:
        return self.split(self.p)[1]

    @property
    def share(self) -> Tensor:
        """The virtual keys' part of the softmax (R, block_q, 1)."""
        return self.p_virtual.sum(dim=-1, keepdim=True).flatten(0, 1)


def _chunks(rows: _Rows, keys: Keys, lists: Lists, block_q: int) -> list[slice]:
    """Slices of query blocks whose scores and slopes stay in cache."""
    group, query_blocks, key_blocks = rows.bias.shape
    block_k, dim = keys.k.shape[2:]
    columns = lists.blocks.shape[2] * block_k + key_blocks
    return list(chunks(query_blocks, group * max(block_q * columns, dim * dim)))


def _add_row_gradients(dq: Tensor, q: Tensor, of_mean: Tensor, of_squares: Tensor, block: int) -> None:
    """Add to dq (G, Lq, D) those of the means of q and of q^2 over blocks (G, Tm, D)."""
    whole = q.shape[1] // block
    for first, last, size in ((0, whole, block), (whole, whole + 1, q.shape[1] - whole * block)):
        if size and last > first:
            span = slice(first * block, first * block + (last - first) * size)
            dq_i, q_i = (x[:, span].view(len(x), last - first, size, -1) for x in (dq, q))
            dq_i += (of_mean[:, first:last] / size).unsqueeze(2)
            dq_i.addcmul_(q_i, of_squares[:, first:last].unsqueeze(2), value=2 / size)
