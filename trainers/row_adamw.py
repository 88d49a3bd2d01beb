"""AdamW whose work follows the experts that fired."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# Elements of a piece of rows: its five temporaries stay in the cache.
PIECE_ELEMENTS = 2**16


class RowAdamW(Optimizer):
    """AdamW in which every row of a parameter with a sparse gradient has its own clock.

    A row takes a step when it is in the gradient, and only then: its moments decay, its bias correction counts, and
    its weight decays from one such step to the next, as if the row were a parameter of its own under
    `torch.optim.AdamW` that saw only these gradients. Rows that were never in a gradient keep their value exactly, and
    their moments are never written. Parameters with dense gradients are stepped by the fused `torch.optim.AdamW`; so
    are all, to rounding, where every row is in every gradient.

    It is not what AdamW does with the same gradients made dense: that one goes on moving a row by its momentum after
    the expert has stopped firing, and divides the gradient of an expert that fires seldom by a second moment that is
    mostly zeros. An expert that fires once in n steps then moves up to √n times as far per firing as here.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as for `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the stock one, which leaves the clocks on the device that they were loaded to."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; see the class. `closure` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_gradient = [parameter for parameter in group["params"] if parameter.grad is not None]
            dense = [parameter for parameter in with_gradient if not parameter.grad.is_sparse]
            self._step_dense(group, dense)
            for parameter in with_gradient:
                if parameter.grad.is_sparse:
                    self._step_rows(group, parameter)
        return loss

    def _state(self, parameter: Tensor, steps: tuple[int, ...]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(steps, dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _step_dense(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._state(parameter, ()) for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_rows(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self._state(parameter, (len(parameter),))
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        size = max(1, PIECE_ELEMENTS // max(1, parameter[0].numel()))
        for rows, values in zip(gradient.indices()[0].split(size), gradient.values().split(size), strict=True):
            _step_some_rows(parameter, rows, values, state, group)


def _step_some_rows(
    parameter: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    step = state["step"][rows] + 1
    state["step"][rows] = step
    # The textbook's lr · m̂ / (√v̂ + ε), with the corrections of m and v, one number a row, taken out of it.
    step = step.view(-1, *[1] * (parameter.dim() - 1))
    correction = (1 - beta2**step).sqrt_()
    rate = group["lr"] * correction / (1 - beta1**step)
    mean = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
    state["exp_avg"].index_copy_(0, rows, mean)
    square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["exp_avg_sq"].index_copy_(0, rows, square)
    direction = mean.div_(square.sqrt_().add_(group["eps"] * correction))
    moved = parameter.index_select(0, rows)
    if group["weight_decay"]:
        moved.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.index_copy_(0, rows, moved.addcmul_(direction, rate, value=-1))
