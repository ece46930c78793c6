"""The steps of a call on a GPU that have kernels in Triton and, for Hopper, in Gluon: one signature for both.

``triton/steps.py``, ``hopper/steps.py`` and ``hopper/wide_steps.py`` are the `Steps`; ``triton/attention.py`` chooses
one for each call.
Axes: B batch, H heads, Hk heads of keys and values, each of which serves H / Hk query heads that follow each other, Lq
queries, Lk keys, D head dimension, Tm and Tn query and key blocks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from sla_compile.common.options import BackwardOptions

__all__ = [
    "BlockLists",
    "KernelInputs",
    "KeyMoments",
    "KeyWeights",
    "LinearStates",
    "MomentGradients",
    "QueryGradients",
    "Steps",
    "Upstream",
    "VirtualKeys",
    "VirtualQueryGradients",
]


class KeyWeights(NamedTuple):
    """A key mask as kernels read it: key j has the weight exp(b_j) in every branch."""

    bias: Tensor
    """b, float32 (B or 1, Tn * block_k): at most 0, and -inf at masked keys and past the last one."""
    blocks: Tensor
    """int8 (B or 1, Tn), of each key block: 0 where all its keys weigh 1, -1 where none has a weight, else 2."""


class KernelInputs(NamedTuple):
    """The tensors of a call in the form in which kernels read them."""

    q: Tensor
    """(B, H, Lq, D), `vector_readable` as k and v, (B, Hk, Lk, D)."""
    k: Tensor
    v: Tensor
    gate: Tensor | None
    """A `gate_matrix` of the gate's weight; None exactly where there is no linear branch."""
    bias: Tensor | None
    """The gate's bias (D) or (H, D); None: zero."""
    key_weights: KeyWeights | None
    """Of the key mask; None: every key counts, with a weight of 1."""

    @property
    def key_bias(self) -> Tensor | None:
        """The bias alone."""
        return None if self.key_weights is None else self.key_weights.bias

    @property
    def group(self) -> int:
        """Query heads to one head of keys and values."""
        return self.q.shape[1] // max(1, self.k.shape[1])


class BlockLists(NamedTuple):
    """The critical blocks of each row of the block map, or of each column."""

    blocks: Tensor
    """int32 (B, H, lines, width), ascending; with ``partial``, those that it counts after the others. Of columns,
    (B, Hk, Tn, width): entry m * H / Hk + g is block m of the g-th query head of the key head."""
    counts: Tensor | None
    """int32 (B, H, lines): how many entries of each list are written; None: all of them."""
    partial: Tensor | None = None
    """int32 (B, H, lines): how many of them, the last, are key blocks not all of whose keys weigh 1; None: unknown."""


class LinearStates(NamedTuple):
    """h and z of the linear branch by blocks, their sums H and Z by rows, or the gradients of any of these."""

    states: Tensor
    """(B, H, T, D, D up to a multiple of 8); bfloat16 for 16-bit inputs, else float32."""
    normalizers: Tensor
    """float32 (B, H, T, D)."""


class KeyMoments(NamedTuple):
    """Of each key block; 0 where all weights are."""

    sizes: Tensor
    """ln n, float32 (B, Hk, Tn); -inf where n is 0."""
    spans: Tensor
    """kbar and var, float32 (2, B, Hk, Tn, D)."""
    keys: Tensor
    """kbar in the inputs' type, (B, Hk, Tn, D up to a multiple of 8)."""
    values: Tensor
    """vbar like ``keys``."""
    slopes: Tensor
    """C (B, Hk, Tn up to a multiple of 8 with zeros, D, D up to a multiple of 8), in the type of block states."""


class MomentGradients(NamedTuple):
    """Gradients of ``spans`` and of vbar, float32, and of ``slopes`` as these are."""

    spans: Tensor
    values: Tensor
    slopes: Tensor


class VirtualKeys(NamedTuple):
    """The virtual keys of a call, one for each key block, and what each query block makes of them."""

    keys: Tensor
    """(B, Hk, Tn, D up to a multiple of 8), in the inputs' type, as ``values``."""
    values: Tensor
    bias: Tensor
    """float32 (B, H, Tm, Tn up to a multiple of 64): added to their logits; -inf where the row has no such key."""
    slopes: Tensor
    """S of each row, like `LinearStates`'s states."""
    shares: Tensor
    """float32 (B, H, Lq): of each query's softmax, what the virtual keys have; filled by the forward."""


class Upstream(NamedTuple):
    """What a backward has beside the inputs: the gradient of the output, and what the forward returned."""

    grad_out: Tensor
    """(B, H, Lq, D), `vector_readable`, as are ``out`` and, with a linear branch, ``linear_out``."""
    out: Tensor
    linear_out: Tensor
    lse: Tensor
    """float32 (B, H, Lq)."""


class QueryGradients(NamedTuple):
    """What `linear_backward`, or the virtual keys' backward, leaves to the steps after it."""

    dq: Tensor
    """(B, H, Lq, D), in memory (B, Lq, H, D): the part of what stands beside the sparse branch; else uninitialised."""
    statistics: Tensor
    """float32 (B, H, 2, Lq up to a multiple of block_q): lse in base 2 and D^s times the scale, past the last query
    +inf and 0."""
    complete: bool
    """Whether ``statistics`` is filled; if not, `attention_backward_query` fills it."""
    started: bool
    """Whether ``dq`` holds a part."""


class VirtualQueryGradients(NamedTuple):
    """What the backward of an attention to critical and virtual keys gives on the queries' side."""

    dq: Tensor
    """(B, H, Lq, D), in memory (B, Lq, H, D)."""
    statistics: Tensor
    """As in `QueryGradients`, and complete."""
    virtual_statistics: Tensor
    """Those of virtual keys: from D^s, dO.(scale S^T q) is taken off."""
    slopes: Tensor
    """dS of each tile of queries, of which block_q is a multiple, (B, H, tiles, ...) like ``VirtualKeys.slopes``."""


class Steps(Protocol):
    """The steps in which they differ; a module with these functions is one."""

    def key_states(
        self, inputs: KernelInputs, options: BackwardOptions, *, pool: bool, runs_beside: bool = False
    ) -> tuple[LinearStates, Tensor]:
        """h and z of each key block, in one pass over k and v that are weighed by the mask, and the float32 means
        of k by blocks (B, Hk, Tn, D), of shape (0,) without ``pool``.

        Here as elsewhere ``runs_beside`` says that the kernel may run `beside` the one that was launched before it.
        """

    def key_moments(self, inputs: KernelInputs, options: BackwardOptions) -> KeyMoments:
        """The moments of all key blocks, in one pass over k and v."""

    def attention_forward(
        self,
        inputs: KernelInputs,
        lists: BlockLists,
        linear: LinearStates | None,
        options: BackwardOptions,
        *,
        runs_beside: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out, linear_out and lse, as in `ForwardResult`, over the critical ``lists`` of the rows.

        ``linear`` is H and Z, (B, H, Tm or 1, ...); None: no linear branch. The kernel that it may run `beside` makes
        nothing else of what it reads.
        """

    def virtual_forward(
        self, inputs: KernelInputs, lists: BlockLists, virtual: VirtualKeys, options: BackwardOptions
    ) -> tuple[Tensor, Tensor]:
        """out and lse over the critical ``lists`` of the rows and the ``virtual`` keys, whose shares are filled."""

    def linear_backward(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        linear: LinearStates | None,
        options: BackwardOptions,
        *,
        runs_beside: bool = False,
    ) -> tuple[QueryGradients, LinearStates | None]:
        """The backward of the linear branch from the queries' side.

        ``linear`` is H and Z again. Returned with the queries' gradients are dH and dZ of each tile of queries, None
        without that branch; block_q is a multiple of the tile.
        """

    def attention_backward_query(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        lists: BlockLists,
        gradients: QueryGradients,
        options: BackwardOptions,
    ) -> None:
        """Add the sparse branch's dQ, of the critical ``lists`` of the rows, to ``gradients.dq``; where that is
        not started, write it there."""

    def few_columns(self, inputs: KernelInputs, options: BackwardOptions) -> bool:
        """Whether there are so few key blocks that kernels of a backward are to run beside each other."""

    def column_order(self, inputs: KernelInputs, lists: BlockLists, options: BackwardOptions) -> Tensor:
        """The order of work on the ``lists`` of the columns, for `attention_backward_key` or `virtual_backward_key`."""

    def attention_backward_key(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        lists: BlockLists,
        order: Tensor,
        statistics: Tensor,
        linear: LinearStates | None,
        options: BackwardOptions,
        *,
        runs_beside: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """dK and dV (B, Hk, Lk, D), in memory (B, Lk, Hk, D), of the critical ``lists`` of the columns and, with a
        linear branch, of ``linear``: dh and dz, (B, Hk, Tn or 1, ...). ``order`` is that of `column_order`."""

    def virtual_backward_query(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        lists: BlockLists,
        virtual: VirtualKeys,
        options: BackwardOptions,
    ) -> VirtualQueryGradients:
        """The queries' side of the backward of `virtual_forward`, of the critical ``lists`` of the rows and of the
        ``virtual`` keys; to dq what the moments of queries add is not yet added."""

    def virtual_key_gradients(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        virtual: VirtualKeys,
        statistics: Tensor,
        options: BackwardOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the ``virtual`` keys and of their values by attention, float32 (B, Hk, Tn, D), and the sums of
        dl by tiles of queries, of which block_q is a multiple, float32 (B, H, tiles, ...) in rows like those of
        ``bias``, unwritten past Tn; from the ``statistics`` of virtual keys."""

    def virtual_backward_key(
        self,
        upstream: Upstream,
        inputs: KernelInputs,
        lists: BlockLists,
        order: Tensor,
        statistics: Tensor,
        moments: KeyMoments,
        gradients: MomentGradients,
        options: BackwardOptions,
    ) -> tuple[Tensor, Tensor]:
        """As `attention_backward_key`, with what ``gradients`` of the ``moments`` of key blocks make of dK and dV:

        of dK_n (dkbar + 2 (k_n - kbar) dvar + dC (v_n - vbar)) / n, of dV_n (dvbar + dC^T (k_n - kbar)) / n, by the
        weights of the keys.
        """
