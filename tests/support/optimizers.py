"""The published optimizer, and helpers that make parameters and their gradients."""

import torch

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


class PublishedSophiaG(torch.optim.Optimizer):
    """The arithmetic of the published class; with ``soul`` each step first updates h and m, as SOUL's code does."""

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, maximize=False, soul=False):
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, maximize=maximize, capturable=False)
        super().__init__(params, defaults)
        self.soul = soul

    def _state(self, p):
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["hessian"] = torch.zeros_like(p), torch.zeros_like(p)
        return state

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                b2 = group["betas"][1]
                self._state(p)["hessian"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)

    @torch.no_grad()
    def step(self, bs=5120):
        if self.soul:
            self.update_hessian()
        for group in self.param_groups:
            b1 = group["betas"][0]
            lr = group["lr"]
            for p in group["params"]:
                state = self._state(p)
                state["step"] += 1
                if self.soul:
                    state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                p.mul_(1 - lr * group["weight_decay"])
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                ratio = (state["exp_avg"].abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(None, 1)
                p.addcmul_(state["exp_avg"].sign(), ratio, value=-lr)


def make(device="cpu", dtype=FLOAT, shapes=((40, 5), (7,), ())):
    """Return random parameters."""
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def twin(params, dtype=None):
    """Return copies of parameters, in ``dtype`` where it is given."""
    return [p.detach().to(dtype or p.dtype).clone().requires_grad_() for p in params]


def give_gradients(params, *others, scale=1.0, generator=None):
    """Give parameters random gradients, and the same ones to those at their positions in ``others``."""
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator).to(p) * scale
        for other in others:
            other[index].grad = p.grad.to(other[index].dtype, copy=True)


def norm_of(params):
    """Return the L2 norm of all gradients."""
    return torch.cat([p.grad.flatten().double() for p in params]).norm().item()
