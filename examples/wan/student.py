"""The Wan transformer that is trained: its form (gates, LoRA, all weights), its teacher, and how it is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla_compile
from examples.wan.draws import Draw
from examples.wan.levels import Levels

__all__ = ["LORA", "TRAINED", "Student", "dtype_of", "load_result", "settings_of", "transformer_of"]

TRAINED = ("lora", "gates", "all")
LORA = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers of a block that LoRA adapts, of self- and cross-attention."""
LORA_FILE, WEIGHTS = "pytorch_lora_weights.safetensors", "transformer"


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of SLA for the command line's ``options``.

    A head may have up to ``max_topk`` blocks, so that ``allocate`` can spread the budget and a fine-tune begin denser.
    """
    settings = {
        "linear": options["linear"],
        "topk": options["topk"],
        "max_topk": max(options["topk"], options["max_topk"]),
        "topk_by": options["topk_by"],
        "block_q": options["block"],
        "block_k": options["block"],
        "min_tokens": options["min_tokens"],
    }
    if options["linear"] != "taylor":
        settings["sparse_scale"] = True
    return settings | dict(options["sla"])


def dtype_of(options: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """What a run computes in: as the command line says, or bf16 on a GPU and float32 on a CPU."""
    by_device = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[options["precision"] or by_device]


class Student:
    """A Wan transformer in the form that is trained, in place.

    model: on its device, weights in bf16 or float32; its attention stays dense until ``switch``.
    trained: "lora" and "gates" leave the weights as they are, "all" trains them in float32.
    dtype: of its inputs, and what autocast computes in.
    inner: what compiles the blocks.
    teacher: the dense model, where "all" changes the weights; otherwise it is this model, uncompiled and unadapted.
    """

    def __init__(
        self,
        model: Any,
        trained: str,
        *,
        dtype: torch.dtype,
        rank: int,
        inner: str,
        checkpointing: bool,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.trained, self.inner, self.other_teacher = model, trained, inner, teacher
        self.device = next(model.parameters()).device
        self.dtype = dtype
        self.levels: Levels | None = None
        model.requires_grad_(trained == "all")
        if trained == "lora":
            from peft import LoraConfig

            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA)))
        if checkpointing:
            model.enable_gradient_checkpointing()
        self._as_float32()

    def compile_dense(self) -> None:
        """Compile the blocks as they are."""
        self.model.compile_repeated_blocks(backend=self.inner, dynamic=False)

    def prepare(self, example: Draw, settings: Mapping[str, Any]) -> None:
        """Give the attentions their gates."""
        with self.autocast():
            sla_compile.prepare(self.model, kwargs=example.arguments(self.dtype), config=dict(settings))
        self._with_gates()

    def load_gates(self, folder: Path) -> None:
        """The same with gates that were saved, and the topks of each level, if there are levels."""
        sla_compile.load(self.model, folder)
        self._with_gates()
        if (levels := Levels.of(folder)) is not None:
            self.follow(levels)

    def save_gates(self, folder: Path) -> None:
        """What ``load_gates`` loads."""
        if self.levels is not None:
            self.levels.plan.set(self.model, 0.5)  # in the file are the topks of one level: the same one always
            self.levels.save(folder)
        sla_compile.save(self.model, folder)

    def follow(self, levels: Levels) -> None:
        """Have the topks of its level in each call from here on."""
        self.levels = levels
        levels.follow(self.model)

    def switch(self) -> None:
        """Compile the blocks with sparse-linear attention."""
        _switch(self.model, self.inner)

    def _with_gates(self) -> None:
        for parameter in sla_compile.gate_parameters(self.model):
            parameter.requires_grad_(True)
        self._as_float32()

    def _as_float32(self) -> None:
        """What is trained is held in float32: steps in bf16 are lost to rounding."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def optimizer(self, lr: float, gate_lr: float) -> torch.optim.AdamW:
        """AdamW, the gates with a rate of their own and no decay."""
        gates = set(map(id, sla_compile.gate_parameters(self.model)))
        weights = [p for p in self.parameters().values() if id(p) not in gates]
        groups: list[dict[str, Any]] = [{"params": weights, "lr": lr, "peak_lr": lr}] if weights else []
        own = [p for p in self.parameters().values() if id(p) in gates]
        if own:
            groups.append({"params": own, "lr": gate_lr, "peak_lr": gate_lr, "weight_decay": 0.0})
        return torch.optim.AdamW(groups)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def velocity(self, draw: Draw, model: Any = None) -> Tensor:
        """The velocity that the model, as it is compiled, gives: (B, C, T, H, W), float32. ``model``: it, wrapped."""
        arguments = draw.arguments(self.dtype)
        # With weights that are frozen the first block would have a graph of its own, and be compiled twice.
        noisy = arguments["hidden_states"].detach().requires_grad_(torch.is_grad_enabled())
        with self.autocast():
            return (self.model if model is None else model)(**arguments | {"hidden_states": noisy})[0].float()

    @torch.no_grad()
    def dense_velocity(self, draw: Draw) -> Tensor:
        """The teacher's: of the model before it was switched and trained. Nothing of it is held in memory twice,
        unless all weights are trained."""
        if self.other_teacher is not None:
            with self.autocast():
                return self.other_teacher(**draw.arguments(self.dtype))[0].float()
        with self.dense():
            return self.velocity(draw)

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """Within this the model computes what it did before it was switched and, but for "all", trained."""
        if self.trained == "lora":
            self.model.disable_adapters()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            if self.trained == "lora":
                self.model.enable_adapters()

    def loss(self, draw: Draw, towards: str, model: Any = None) -> Tensor:
        """Mean squared error to the velocity of the "teacher" or of the data ("flow")."""
        target = self.dense_velocity(draw) if towards == "teacher" else draw.velocity
        return F.mse_loss(self.velocity(draw, model), target)

    def save_result(self, folder: Path) -> None:
        """Gates, and the adapter or the weights if they were trained, for ``load_result``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_gates(folder)
        if self.trained == "lora":
            from diffusers import WanPipeline
            from peft import get_peft_model_state_dict

            WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(self.model))
        elif self.trained == "all":
            self.model.save_pretrained(folder / WEIGHTS)


def load_result(pipe: Any, folder: Path, *, inner: str = "inductor") -> None:
    """Give the transformer of a Wan pipeline what ``save_result`` wrote, and compile its blocks.

    Weights that were all trained are loaded by the pipeline itself: see ``transformer_of``.
    """
    if (folder / LORA_FILE).is_file():
        pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    sla_compile.load(pipe.transformer, folder)
    if (levels := Levels.of(folder)) is not None:
        levels.follow(pipe.transformer)
    _switch(pipe.transformer, inner)


def _switch(model: Any, inner: str) -> None:
    # Not dynamic: training and sampling differ in their batches, and each has a graph of its own.
    model.compile_repeated_blocks(backend="sla", options={"inner": inner}, dynamic=False)


def transformer_of(checkpoint: str, folder: Path | None, dtype: torch.dtype) -> Any:
    """The transformer of ``checkpoint``, or the one that was trained in all its weights, where ``folder`` has one."""
    from diffusers import WanTransformer3DModel

    if folder is not None and (folder / WEIGHTS).is_dir():
        return WanTransformer3DModel.from_pretrained(folder / WEIGHTS, torch_dtype=dtype)
    return WanTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer", torch_dtype=dtype)
