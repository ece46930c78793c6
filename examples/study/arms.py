"""The arms of the comparison: the attention that each puts into the same dense checkpoint, and how it trains it.

``Student`` is a model with the attention of one arm, compiled block by block. Arms that differ only in their training
share one, and so do seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sla_compile
from examples.study.cuda_graph import GraphedCallable
from examples.study.settings import Settings
from examples.study.video_dit import SelfAttention, VideoDiT, VideoDiTConfig

__all__ = ["ARMS", "MAIN", "Arm", "LinearAttention", "Student", "Wan"]


@dataclass(frozen=True)
class Arm:
    """One way to treat the dense checkpoint."""

    title: str
    attention: str = "sla"
    """"dense", "linear" (plain linear attention, this file's) or "sla"."""
    branch: str = "marginal"
    """``SLAConfig.linear``, for "sla"."""
    calibrated: bool = False
    trained: bool = True
    wide: int = 1
    """Tokens in a block, as a multiple of ``Settings.block``."""
    order: str = "raster"
    """``SLAConfig.reorder``, for "sla"."""
    scaled: bool = False
    """``SLAConfig.sparse_scale``, for "sla"."""
    longer: int = 1
    """Steps of training, as a multiple of ``Settings.steps``."""

    @property
    def sparse(self) -> bool:
        """Whether the arm has a sparsity."""
        return self.attention == "sla"

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the compiled code depends on, besides the sparsity. Arms with the same kind share a ``Student``."""
        return self.attention, self.branch, self.wide, self.order, self.scaled


ARMS = {
    "checkpoint": Arm("dense checkpoint", "dense", trained=False),
    "dense": Arm("dense, trained on", "dense"),
    "sparse": Arm("sparse only", branch="none"),
    "linear": Arm("linear only", "linear"),
    "all": Arm("sparse + linear over all keys", branch="all"),
    "sla": Arm("SLA"),
    "calibrated": Arm("SLA, calibrated only", calibrated=True, trained=False),
    "calibrated-tuned": Arm("SLA, calibrated, trained", calibrated=True),
}
MAIN = tuple(ARMS)
"""The arms of the comparison; the other ones are variants of them."""

ARMS |= {
    "sparse-tiles": Arm("sparse only, tokens in tiles", branch="none", order="tiles"),
    "sla-tiles": Arm("SLA, tokens in tiles", order="tiles"),
    "calibrated-tiles": Arm("SLA, tokens in tiles, calibrated only", order="tiles", calibrated=True, trained=False),
    "sla-wide": Arm("SLA, blocks twice as long", wide=2),
    "sparse-wide": Arm("sparse only, blocks twice as long", branch="none", wide=2),
    "sla-long": Arm("SLA, trained four times as long", longer=4),
    "sparse-long": Arm("sparse only, trained four times as long", branch="none", longer=4),
    "dense-long": Arm("dense, trained on four times as long", "dense", longer=4),
    "sla-scaled": Arm("SLA, sparse branch scaled", scaled=True),
    "calibrated-scaled": Arm("SLA, sparse branch scaled, calibrated only", scaled=True, calibrated=True, trained=False),
    "taylor": Arm("virtual keys", branch="taylor"),
    "calibrated-taylor": Arm("virtual keys, calibrated only", branch="taylor", calibrated=True, trained=False),
    "calibrated-tuned-scaled": Arm("SLA, sparse branch scaled, calibrated, trained", scaled=True, calibrated=True),
}


class LinearAttention(SelfAttention):
    """Linear attention alone, O^l weight^T + bias: the linear branch of SLA over all keys, softmax feature map.

    There is no sparse branch that could carry the start, so the weight starts as the identity.
    """

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__(config)
        self.linear_weight = nn.Parameter(torch.eye(config.head_dim))
        self.linear_bias = nn.Parameter(torch.zeros(config.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, N, D of a head) -> the same."""
        phi_q, phi_k = q.softmax(-1), k.softmax(-1)
        mixed = (phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(2)[..., None])
        return mixed @ self.linear_weight.mT + self.linear_bias


class Wan(nn.Module):
    """A small WanTransformer3DModel of diffusers with the call of ``VideoDiT``."""

    text: Tensor

    def __init__(self) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel

        self.transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            ffn_dim=256,
            num_layers=4,
            text_dim=32,
            freq_dim=64,
        )
        self.register_buffer("text", torch.zeros(1, 8, 32))  # no text: the videos have no captions

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks that are compiled one by one."""
        return self.transformer.blocks

    def forward(self, video: Tensor, time: Tensor) -> Tensor:
        """video (B, C, T, H, W) and time (B), from 0 (data) to 1 (noise) -> velocity (B, C, T, H, W)."""
        text = self.text.expand(len(video), -1, -1)
        return self.transformer(video, time * 1000, text, return_dict=False)[0]


def build(settings: Settings, attention: str = "dense") -> nn.Module:
    """The model of ``settings`` on the CPU, with dense or linear attention."""
    if settings.model == "wan":
        if attention == "linear":
            raise ValueError("arm 'linear': got model 'wan'; accepted: model 'dit', whose attention this file can swap")
        return Wan()
    config = VideoDiTConfig(
        patch=settings.patch,
        heads=settings.heads,
        head_dim=settings.head_dim,
        layers=settings.layers,
        mlp_ratio=settings.mlp_ratio,
    )
    return VideoDiT(config, LinearAttention if attention == "linear" else SelfAttention)


class Student:
    """A model with one kind of attention, its blocks compiled; call it with a noisy video and its time.

    ``capture``: replay training steps and ``velocity`` as CUDA graphs, on a GPU.
    """

    def __init__(
        self, settings: Settings, arm: Arm, sparsity: float | None, device: torch.device, *, capture: bool = True
    ) -> None:
        self.settings, self.device = settings, device
        self.graphed = capture and device.type == "cuda"
        self._velocity = GraphedCallable(self._forward, self.graphed)
        self.model = build(settings, arm.attention).to(device)
        backend = "inductor"
        if arm.attention == "sla":
            backend = "sla"
            self._prepare(arm, sparsity)
        self.gates = list(sla_compile.gate_parameters(self.model))
        for module in self.model.modules():
            if isinstance(module, LinearAttention):
                self.gates += [module.linear_weight, module.linear_bias]
        self.fresh = [gate.detach().clone() for gate in self.gates]
        if backend == "sla" or settings.inner == "inductor":
            options: dict[str, Any] = {"options": {"inner": settings.inner}} if backend == "sla" else {}
            for block in self.model.get_submodule("blocks").children():
                block.compile(backend=backend, **options)

    def _prepare(self, arm: Arm, sparsity: float | None) -> None:
        settings = self.settings
        config = sla_compile.SLAConfig(
            topk=round(1 - (sparsity or 0.0), 6),
            bottomk=settings.bottomk if arm.branch != "taylor" else 0.0,  # all blocks have a virtual key
            block_q=arm.wide * settings.block,
            block_k=arm.wide * settings.block,
            linear=arm.branch,
            reorder=arm.order,
            sparse_scale=arm.scaled,
            grid=settings.grid,
            min_tokens=0,  # short videos too
            inner=settings.inner,
        )
        video = torch.zeros(settings.batch, 3, *settings.size, device=self.device)
        sla_compile.prepare(self.model, (video, video.new_zeros(settings.batch)), config=config)

    @torch.no_grad()
    def reset(self, checkpoint: dict[str, Tensor]) -> None:
        """Be the dense checkpoint again, with fresh gates."""
        unknown = self.model.load_state_dict(checkpoint, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"checkpoint: has {', '.join(unknown)}; accepted: parameters of the dense model")
        for gate, value in zip(self.gates, self.fresh, strict=True):
            gate.copy_(value)
        self.model.requires_grad_(True)
        self.model.zero_grad()

    def optimizer(self, lr: float, gate_lr: float, train: str) -> torch.optim.Optimizer:
        """AdamW on all weights, or (``train="gates"``) on the gates alone.

        Gates start at zero in a trained model, so they get a learning rate of their own and no weight decay.
        """
        known = {id(gate) for gate in self.gates}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in known]
        for parameter in rest:
            parameter.requires_grad_(train == "all")
        groups: list[dict[str, Any]] = [
            {"params": rest, "peak_lr": lr, "weight_decay": 0.01},
            {"params": self.gates, "peak_lr": gate_lr, "weight_decay": 0.0},
        ]
        for group in groups:  # a CUDA graph would keep a number
            group["lr"] = torch.tensor(group["peak_lr"], device=self.device)
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.98), fused=True, capturable=self.graphed
        )

    def rewritten(self) -> bool:
        """True if the compiled code uses every gate of the model."""
        sites = sla_compile.report(self.model).to_dict()["sites"]
        gated = [site for site in sites if site["rewritten"]]
        return len(gated) == len(sla_compile.gates(self.model)) > 0

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def __call__(self, noisy: Tensor, time: Tensor) -> Tensor:
        """The velocity (B, C, T, H, W), float32."""
        with self.autocast():
            velocity: Tensor = self.model(noisy, time)
        return velocity.float()

    def velocity(self, noisy: Tensor, time: Tensor) -> Tensor:
        """The velocity without gradients. It runs the code compiled for training, so nothing is compiled for it."""
        return self._velocity(noisy, time).clone()

    def _forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        with torch.enable_grad():
            return self(noisy, time).detach()
