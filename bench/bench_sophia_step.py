"""One optimizer step: ours against the published code in eager PyTorch, torch.compile, and torch's fused AdamW."""

import functools

import torch

from bench._harness import Case
from soul import SOUL, SophiaG
from soul_kernels.reference.sophia_step import sophia_step as reference_step


def llama_1b():
    """Shapes of Llama-3.2-1B, 1,235.8 M parameters in 146 tensors."""
    layer = [
        (2048, 2048),
        (512, 2048),
        (512, 2048),
        (2048, 2048),
        (8192, 2048),
        (8192, 2048),
        (2048, 8192),
        (2048,),
        (2048,),
    ]
    return [(128256, 2048), *layer * 16, (2048,)]


def gpt2():
    """Shapes of GPT-2, 124.4 M parameters in 148 tensors."""
    layer = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *layer * 12, (768,), (768,)]


def lora():
    """LoRA of rank 8 on q and v of a 7B model: 128 tensors, 4.2 M parameters."""
    return [(8, 4096), (4096, 8)] * 64


def tiny():
    """Three tensors for a machine without a GPU."""
    return [(1000, 256), (256, 256), (256,)]


def published_step(params, grads, exp_avgs, hessians, *, soul, lr=1e-4, b1=0.965, b2=0.99, rho=0.04, bs=5120, wd=0.1):
    """The published SophiaG.step, or SOUL's, operation for operation."""
    for p, g, m, h in zip(params, grads, exp_avgs, hessians):
        if soul:
            h.mul_(b2).addcmul_(g, g, value=1 - b2)
            m.mul_(b1).add_(g, alpha=1 - b1)
        p.mul_(1 - lr * wd)
        m.mul_(b1).add_(g, alpha=1 - b1)
        ratio = (m.abs() / (rho * bs * h + 1e-15)).clamp(None, 1)
        p.addcmul_(m.sign(), ratio, value=-lr)


def make_params(shapes, device, dtype):
    """Parameters with gradients, of the size of real weights."""
    params = [torch.randn(s, device=device, dtype=dtype).mul_(0.02).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def ours(optimizer, shapes, device, dtype, **options):
    opt = optimizer(make_params(shapes, device, dtype), lr=1e-4, **options)
    return opt.step


def eager(soul, shapes, device, dtype):
    made = make_params(shapes, device, dtype)
    params = [p.detach() for p in made]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return functools.partial(published_step, params, [p.grad for p in made], *states, soul=soul)


def compiled(soul, shapes, device, dtype):
    """torch.compile of the reference, states in the dtypes that ours has."""
    made = make_params(shapes, device, dtype)
    params = [p.detach() for p in made]
    exp_avgs = [torch.zeros_like(p) for p in params]
    hessians = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    options = dict(lr=1e-4, beta1=0.965, rho=0.04, bs=5120, eps=1e-15, weight_decay=0.1, maximize=False, clip_count=None)
    step = torch.compile(reference_step)
    return lambda: step(params, [p.grad for p in made], exp_avgs, hessians, beta2=0.99 if soul else None, **options)


def fused_adamw(shapes, device, dtype):
    return torch.optim.AdamW(make_params(shapes, device, dtype), lr=1e-4, fused=True).step


def check(optimizer, device, dtype):
    """Two steps of ours against the reference: equal bit for bit."""
    shapes = [(300, 257), (17,), ()]
    torch.manual_seed(0)
    a = make_params(shapes, device, dtype)
    b = [p.detach().clone().requires_grad_() for p in a]
    for p, q in zip(a, b):
        q.grad = p.grad
    for params, backend in ((a, "auto"), (b, "reference")):
        opt = optimizer(params, lr=1e-4, backend=backend)
        opt.step()
        opt.step()
    error = max((p.float() - q.float()).abs().max().item() for p, q in zip(a, b))
    assert error == 0.0, f"ours differs from the reference by {error}"
    return {"difference from the reference": error}


def make_case(name, optimizer, shapes, device, dtype, quick):
    soul = optimizer is SOUL
    numel = sum(torch.Size(s).numel() for s in shapes)
    size = dtype.itemsize
    per_param = 3 * size + 2 * size + (8 if soul else 4)  # p read and written, g read; m as p; h in fp32
    variants = {
        "ours": lambda: ours(optimizer, shapes, device, dtype),
        f"published {'SOUL' if soul else 'SophiaG'}, eager": lambda: eager(soul, shapes, device, dtype),
        "torch AdamW, fused": lambda: fused_adamw(shapes, device, dtype),
    }
    if dtype == torch.bfloat16:
        per_param_16 = 5 * size + (2 * size if soul else size)
        note = f"ours, bf16 h ({per_param_16} B/param)"
        variants[note] = lambda: ours(optimizer, shapes, device, dtype, state_dtype=torch.bfloat16)
    if not quick:
        variants["torch.compile of the reference"] = lambda: compiled(soul, shapes, device, dtype)
    title = f"{optimizer.__name__}.step, {name}, {str(dtype)[6:]}, {per_param} B/param"
    return Case(title, variants, lambda: check(optimizer, device, dtype), bytes=per_param * numel)


def cases(device, quick):
    """Functions that make the cases."""
    if device.type == "cpu":
        sizes = [("three tensors", tiny(), torch.float32)]
    else:
        sizes = [
            ("Llama-3.2-1B", llama_1b(), torch.bfloat16),
            ("GPT-2 124M", gpt2(), torch.float32),
            ("LoRA 128 x 32,768", lora(), torch.bfloat16),
        ]
    for name, shapes, dtype in sizes:
        for optimizer in (SophiaG, SOUL):
            yield functools.partial(make_case, name, optimizer, shapes, device, dtype, quick)
