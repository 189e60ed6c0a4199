"""AdamW over all parameters in one launch, and the norm of all gradients, on CPU and CUDA.

    norm = global_grad_norm(p.grad for p in model.parameters())
    optimizer.step(grad_norm=norm, max_norm=1.0)        # clips; skips where norm is not finite

Nothing here waits for the device: the norm, the clipping factor, the loss scale and the decision to
skip a step are read where the kernel runs. docs/adamw.md has the formula, numerics and cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flashtrain import _kernels
from flashtrain.ops._arguments import checked
from flashtrain.ops._library import launch_context, real_tensors, to_kernel
from flashtrain.ops.adamw.checks import (
    check_element,
    check_parameter,
    check_scale,
    check_tensor,
    check_values,
)

_LOW_DTYPES = (torch.float16, torch.bfloat16)


def _to_kernel(tensors: list[Any]) -> list[Any]:
    return [None if t is None else to_kernel(t) for t in tensors]


# --- Norm -----------------------------------------------------------------------------------------


@checked
def global_grad_norm(grads: Iterable[Tensor | None]) -> Tensor:
    """The 2-norm of all elements of all gradients, float32 [], on their device.

    Args:
      grads: float32, float16 or bfloat16, mixed or not, of any shapes, all on one device; None is
        left out.

    One pass over memory, the same bits each time. Squares are summed in float32 within 32,768
    elements, then in float64. inf or NaN where a gradient is, or where a square passes 3e38.
    """
    dense: list[Tensor] = []
    for grad in grads:
        if grad is None:
            continue
        check_tensor(f"grads[{len(dense)}]", grad)
        if dense and grad.device != dense[0].device:
            raise ValueError(
                f"grads[{len(dense)}]: is on {grad.device}; supported: all on one device, here "
                f"{dense[0].device}"
            )
        dense.append(grad.contiguous().resolve_neg())
    if not dense:
        return torch.zeros(())
    first = dense[0]
    norm = first.new_empty((), dtype=torch.float32)
    _kernels.grad_norm(
        _to_kernel([grad.detach() for grad in dense]),
        to_kernel(norm),
        lambda size: to_kernel(first.new_empty((size,), dtype=torch.uint8)),
        launch_context(first),
    )
    return norm


# --- Optimizer ------------------------------------------------------------------------------------


class FusedAdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay: one launch for all tensors of all groups.

    Args:
      params: parameters or groups, float32, float16 or bfloat16, dense, all on one device.
        Gradients may have any of these dtypes.
        Groups may be empty.
      lr: a float, or a float32 tensor [] on the parameters' device, read there at each step.
      betas, eps, weight_decay: as in torch.optim.AdamW; each group may have its own. They must be
        finite, in `param_groups` too; only an lr on a GPU is not looked at.
      master_weights: low-precision parameters have a float32 copy in the state, "master", which is
        updated and rounded to the parameter. Else every step rounds, and small updates are lost.
        Elements of a parameter that were written since the last step (loaded, clamped) move from
        where they are: their masters are not the parameter any more and start there again.

    State by parameter, as in torch.optim.AdamW: step (float32 [], on the parameter's device),
    exp_avg and exp_avg_sq, always float32, and master. `state_dict` and `load_state_dict` exchange
    with torch.optim.AdamW's.

    torch.amp.GradScaler works with it and does not wait for the device. A step may be captured in a
    CUDA graph; take one before, so that the state exists.
    """

    _step_supports_amp_scaling = True  # for GradScaler, which sets grad_scale and found_inf

    _skipped_steps: Tensor | None = None
    _table: Tensor | None = None  # see _tables
    _table_on_host: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        master_weights: bool = True,
    ) -> None:
        self.master_weights = master_weights
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        number = len(self.param_groups) - 1
        for i, p in enumerate(group["params"]):
            check_parameter(f"params of group {number}, number {i}", p)
            if p.device != self._device:
                raise ValueError(
                    f"params of group {number}, number {i}: is on {p.device}; supported: all "
                    f"parameters on one device, here {self._device}"
                )
        check_values(group)

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped on the device, int64 [], since this object was made."""
        steps, device = self._skipped_steps, self._device
        if steps is None or steps.device != device:
            with real_tensors():
                steps = torch.zeros((), dtype=torch.int64) if steps is None else steps
                self._skipped_steps = steps = steps.to(device)
        return steps

    @property
    def _device(self) -> torch.device:
        """Of all parameters; groups may be empty."""
        params = (p for group in self.param_groups for p in group["params"])
        first = next(params, None)
        return torch.device("cpu") if first is None else first.device

    @torch.no_grad()
    @checked
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
        grad_norm: Tensor | None = None,
        max_norm: float | None = None,
        skip: Tensor | None = None,
    ) -> Any:
        """Updates every parameter that has a gradient, or nothing at all.

        Args:
          closure: computes the loss anew, with gradients; its result is returned.
          grad_scale: gradients are divided by it: a number, or a tensor of one element on the
            parameters' device, where 0, inf and NaN skip the step.
          grad_norm: `global_grad_norm` of the gradients as they are, scaled. Where it is inf or
            NaN the step is skipped: parameters and state, step counts too, stay as they are.
          max_norm: gradients, unscaled, are clipped to this norm, as by
            torch.nn.utils.clip_grad_norm_, without a pass over them; needs grad_norm.
          skip: a tensor of one element on the parameters' device, of any dtype; where it is not 0
            the step is skipped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm: got {max_norm}; supported: greater than 0, or None")
        if max_norm is not None and grad_norm is None:
            raise ValueError(
                "max_norm: got no grad_norm with it; supported: grad_norm=global_grad_norm(grads)"
            )
        for group in self.param_groups:
            check_values(group)
        lists, group_indices = self._collect()
        if not lists["params"]:
            return loss
        if grad_scale is None:
            grad_scale = getattr(self, "grad_scale", None)
        params = lists["params"]
        scalars = {
            "grad_scale": self._scalar("grad_scale", grad_scale),
            "grad_norm": self._scalar("grad_norm", grad_norm),
            "skip": self._scalar("skip", self._skip(skip)),
            "skipped_steps": self.skipped_steps,
        }
        arguments: dict[str, Any] = {name: _to_kernel(values) for name, values in lists.items()}
        arguments |= {name: None if t is None else to_kernel(t) for name, t in scalars.items()}
        _kernels.adamw_step(
            **arguments,
            **self._tables(len(params)),
            groups=group_indices,
            group_values=[self._group_values(group) for group in self.param_groups],
            max_norm=math.inf if max_norm is None else max_norm,
            stream=launch_context(params[0]),
        )
        torch.autograd.graph.increment_version(params)
        return loss

    def _skip(self, skip: Tensor | None) -> Tensor | None:
        """`skip`, or GradScaler's found_inf, or what holds where one of them does."""
        found_inf = getattr(self, "found_inf", None)
        if skip is None or found_inf is None:
            return found_inf if skip is None else skip
        return (skip != 0) | (found_inf != 0)

    def _scalar(self, name: str, value: float | Tensor | None) -> Tensor | None:
        """float32 of one element on the parameters' device."""
        if value is None:
            return None
        if not isinstance(value, Tensor):
            check_scale(value)
            return torch.full((), value, dtype=torch.float32, device=self._device)
        check_element(name, value)
        if value.device != self._device:
            raise ValueError(f"{name}: is on {value.device}; supported: on {self._device}")
        return value.detach().float().resolve_neg()

    # --- What a step passes to the kernel ---

    def _init_state(self, p: Tensor) -> dict[str, Any]:
        """State in the parameter's strides, so that all of them are read in one order."""
        with real_tensors():
            state = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, dtype=torch.float32, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32, requires_grad=False),
            }
            if self._has_master(p):
                state["master"] = p.detach().float()
        self.state[p] = state
        return state

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights and p.dtype in _LOW_DTYPES

    def _fit_state(self, p: Tensor, state: dict[str, Any]) -> None:
        """Fits state to the parameter's dtype and strides, which `p.data = ...` may change."""
        with real_tensors():
            if not self._has_master(p):
                state.pop("master", None)
            elif "master" not in state:
                state["master"] = p.detach().float()
            strides = torch.empty_like(p, device="meta").stride()
            for key in {"exp_avg", "exp_avg_sq", "master"} & state.keys():
                value = state[key]
                if value.stride() != strides and value.shape == p.shape:
                    state[key] = torch.empty_like(p, dtype=torch.float32).copy_(value)

    def _collect(self) -> tuple[dict[str, list[Any]], list[int]]:
        """The parameters that have state, their gradients (or None) and state; their groups."""
        params, grads, masters, exp_avgs, exp_avg_sqs, steps = [], [], [], [], [], []
        group_indices = []
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                grad, state = p.grad, self.state.get(p)
                if not state:
                    if grad is None:
                        continue
                    state = self._init_state(p)
                elif state["exp_avg"].stride() != p.stride() or (
                    "master" in state
                ) != self._has_master(p):
                    self._fit_state(p, state)
                if grad is not None:
                    if grad.is_sparse:
                        raise ValueError(
                            f"grad of a parameter {list(p.shape)}: is sparse; supported: "
                            "dense gradients"
                        )
                    if grad.stride() != p.stride() or grad.is_neg():
                        grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
                params.append(p)
                grads.append(grad)
                masters.append(state.get("master"))
                exp_avgs.append(state["exp_avg"])
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])
                group_indices.append(index)
        lists = {
            "params": params,
            "grads": grads,
            "masters": masters,
            "exp_avgs": exp_avgs,
            "exp_avg_sqs": exp_avg_sqs,
            "steps": steps,
        }
        return lists, group_indices

    def _group_values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, lr_on_device = group["lr"], None
        if isinstance(lr, Tensor):
            if lr.device == self._device:
                lr, lr_on_device = 0.0, to_kernel(self._scalar("lr", lr))
            else:
                lr = float(lr)
        beta1, beta2 = group["betas"]
        return lr, lr_on_device, beta1, beta2, group["eps"], group["weight_decay"]

    def _tables(self, num_params: int) -> dict[str, Any]:
        """Where the kernel finds the pointers: kept from step to step, but new for a capture.

        The captured writes of a graph would otherwise replace what later steps rely on.
        """
        if self._device.type == "cpu":
            return {"table": None, "table_on_host": None}
        size = _kernels.adamw_table_bytes(num_params, len(self.param_groups))
        if torch.cuda.is_current_stream_capturing():
            table = torch.empty(size, dtype=torch.uint8, device=self._device)
            return {"table": to_kernel(table), "table_on_host": None}
        table = self._table
        if table is None or table.numel() != size or table.device != self._device:
            with real_tensors():
                table = torch.empty(size, dtype=torch.uint8, device=self._device)
                self._table, self._table_on_host = table, torch.zeros(size, dtype=torch.uint8)
        return {"table": to_kernel(table), "table_on_host": to_kernel(self._table_on_host)}

    # --- State ---

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"master_weights": self.master_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a FusedAdamW or of a torch.optim.AdamW over the same parameters.

        Moments and masters stay float32. A missing master is made of the parameter.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"{option}: got {group[option]}; supported: False")
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        saved = [state_dict["state"].get(i, {}) for i in ids]
        for number, (p, entries) in enumerate(zip(params, saved)):
            for key in {"exp_avg", "exp_avg_sq", "master"} & entries.keys():
                name, value = f"state of parameter {number}, {key}", entries[key]
                check_tensor(name, value)
                if value.shape != p.shape:
                    raise ValueError(
                        f"{name}: got shape {list(value.shape)}; supported: the parameter's, "
                        f"{list(p.shape)}"
                    )
        super().load_state_dict(state_dict)  # it rounds state to the parameters' dtypes
        for p, entries in zip(params, saved):
            if entries:
                for key, value in self._init_state(p).items():
                    if key in entries:
                        value.copy_(torch.as_tensor(entries[key]))
