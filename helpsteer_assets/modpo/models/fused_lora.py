"""LoRA layers in fewer passes over memory: y = x W^T + s (x A^T) B^T as one autograd function.

peft's layer makes tensors for the base output, the adapter's output, its scaled copy and the sum, and its backward pass
makes as many. For a frozen W the products below suffice; they add to an existing tensor where possible.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable


class FusedLoraLinear(Linear):
    """peft's LoRA layer with a faster forward and backward where one plain adapter is active."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        adapter = self._fusible(x)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        return _LoraLinear.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.scaling[adapter],
        )

    def _fusible(self, x: torch.Tensor) -> str | None:
        """The active adapter, if it is the only one and is plain LoRA; else None."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        dropout = self.lora_dropout[active[0]]
        if self.training and not isinstance(dropout, torch.nn.Identity) and dropout.p > 0:
            return None
        base = self.get_base_layer()
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        return active[0] if type(base) is torch.nn.Linear and frozen and base.weight.dtype == x.dtype else None


def fuse_lora(model: PeftModel) -> PeftModel:
    """Give every plain LoRA layer of a model the fused forward; returns the model."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
    return model


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        lowered = flat @ lora_a.to(x.dtype).t()
        y = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        y.addmm_(lowered, lora_b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, lowered, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, lowered, weight, lora_a, lora_b = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1])
        raised = (g @ lora_b.to(g.dtype)).mul_(ctx.scaling)
        x_gradient = a_gradient = b_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (g @ weight).addmm_(raised, lora_a.to(g.dtype)).view(*upstream.shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            a_gradient = (raised.t() @ flat).to(lora_a.dtype)
        if ctx.needs_input_grad[4]:
            # Matrix libraries are faster at a product with few rows than with few columns.
            b_gradient = (lowered.t() @ g).mul_(ctx.scaling).t().to(lora_b.dtype)
        return x_gradient, None, None, a_gradient, b_gradient, None
