"""What an error of each head becomes: the linear layer that an attention's output goes into, found while it runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sla_compile.fitting.observer import Arguments, GatedCall, gated_calls
from sla_compile.fitting.sensitivity import SiteSensitivity

__all__ = ["find_head_projections"]


@torch.no_grad()
def find_head_projections(model: nn.Module, batch: Arguments, sites: Mapping[str, SiteSensitivity]) -> None:
    """Set ``head_gram`` of those ``sites`` (by gate path) with a topk for each head, from one dense run on ``batch``.

    A layer is found where the heads' outputs, joined by views alone, are the input of ``F.linear``. Where none is, for
    a product in between or weights that are quantised or sharded, the heads of that attention count alike.
    """
    if not any(site.by_head for site in sites.values()):
        return
    found = _Projections(sites)
    with gated_calls(model, found.observe, found.look):
        model(*batch[0], **batch[1])


class _Projections:
    """Knows the output of the last attention by its memory, and looks at what ``F.linear`` takes."""

    def __init__(self, sites: Mapping[str, SiteSensitivity]) -> None:
        self.sites = sites
        self.path = ""
        self.output: Tensor | None = None
        """Of the last attention, (B, H, N, D); held, so that no other tensor gets its memory."""

    def observe(self, call: GatedCall) -> Tensor:
        if not self.sites[call.path].by_head:
            self.output = None
            return call.dense
        # in (B, N, H, D) memory, so that joining the heads makes no copy
        self.path, self.output = call.path, call.dense.transpose(1, 2).contiguous().transpose(1, 2)
        return self.output

    def look(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Keep the Gram matrices of ``weight``'s columns, if ``input`` is the heads' outputs side by side."""
        if self.output is None:
            return
        heads, dim = self.output.shape[1], self.output.shape[3]
        plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
        if not plain or input.shape[-1] != heads * dim or input.stride(-1) != 1:
            return
        if input.untyped_storage().data_ptr() != self.output.untyped_storage().data_ptr():
            return
        columns = weight.detach().float().reshape(-1, heads, dim).transpose(0, 1)  # (H, C, D)
        self.sites[self.path].head_gram = columns.mT @ columns
        self.output = None
