"""One optimizer step: ours in every rounding and state dtype, against the published code, torch.compile, and fused AdamWs."""

import functools
import gc

import torch

from bench._harness import Case
from soul import SOUL, SophiaG
from soul_kernels.reference.sophia_step import sophia_step as reference_step

STATE_DTYPES = {None: "default", torch.float32: "fp32", torch.bfloat16: "bf16", "8bit": "8-bit"}
ROUNDINGS = ("nearest", "stochastic", "compensated")
HUGE = 2**31 + 2**20  # elements: offsets beyond 32 bits
HUGE_BYTES = 28 * HUGE  # parameters, gradients and the states of all variants of that case, with 2 bytes to spare


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


def models():
    """The models of the tables: name, shapes, dtype."""
    return [
        ("Llama-3.2-1B", llama_1b(), torch.bfloat16),
        ("GPT-2 124M", gpt2(), torch.float32),
        ("GPT-2 124M", gpt2(), torch.bfloat16),
        ("LoRA 128 x 32,768", lora(), torch.bfloat16),
    ]


def tiny(quick):
    """Small tensors for a machine without a GPU."""
    return [(30, 40), (17,)] if quick else [(1000, 256), (256, 256), (256,)]


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


def foreach_step(params, grads, exp_avgs, hessians, *, soul, lr=1e-4, b1=0.965, b2=0.99, rho=0.04, bs=5120, wd=0.1):
    """The published formula with torch's foreach functions."""
    if soul:
        torch._foreach_mul_(hessians, b2)
        torch._foreach_addcmul_(hessians, grads, grads, value=1 - b2)
    torch._foreach_mul_(exp_avgs, b1)
    torch._foreach_add_(exp_avgs, grads, alpha=1 - b1)
    torch._foreach_mul_(params, 1 - lr * wd)
    denominators = torch._foreach_mul(hessians, rho * bs)
    torch._foreach_add_(denominators, 1e-15)
    ratios = torch._foreach_abs(exp_avgs)
    torch._foreach_div_(ratios, denominators)
    torch._foreach_clamp_max_(ratios, 1)
    torch._foreach_addcmul_(params, torch._foreach_sign(exp_avgs), ratios, value=-lr)


def make_params(shapes, device, dtype):
    """Parameters with gradients, of the size of real weights."""
    params = [torch.randn(s, device=device, dtype=dtype).mul_(0.02).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p).mul_(1e-3)
    return params


def ours(optimizer, params, **options):
    opt = optimizer(params, lr=1e-4, **options)
    if optimizer is SophiaG:
        opt.update_hessian()  # a Hessian of zeros would draw less power than a real one
    return opt.step


def published(step, soul, params):
    """``step`` on states in the dtype of the parameters."""
    grads = [p.grad for p in params]
    states = [torch.zeros_like(g) for g in grads], [g * g for g in grads]
    return functools.partial(step, [p.detach() for p in params], grads, *states, soul=soul)


def compiled_reference(soul, params):
    """torch.compile of the reference, states in the dtypes that ours has."""
    grads = [p.grad for p in params]
    exp_avgs = [torch.zeros_like(g) for g in grads]
    hessians = [g.float() ** 2 for g in grads]
    options = dict(
        lr=1e-4, beta1=0.965, rho=0.04, bs=5120, eps=1e-15, weight_decay=0.1, maximize=False, eps_mode="add",
        param_rounding="nearest", low_bits=None, exp_avg_scales=None, hessian_scales=None, corrections=None,
        salts=[0] * len(params), steps=None, grad_factor=None, skip=None, telemetry=None,
    )  # fmt: skip
    step = torch.compile(reference_step)
    return lambda: step([p.detach() for p in params], grads, exp_avgs, hessians, beta2=0.99 if soul else None, **options)


def optimi_adamw(params, **options):
    import optimi

    # Its Triton kernel where there is a GPU; foreach elsewhere.
    kind = "triton" if params[0].is_cuda else "foreach"
    return optimi.AdamW(params, lr=1e-4, **{kind: True}, **options).step


def flash_adamw(params):
    import flashoptim

    bits = None if params[0].dtype == torch.float32 else 24
    return flashoptim.FlashAdamW(params, lr=1e-4, master_weight_bits=bits).step


def bytes_per_param(dtype, hessian_in_step, *, param_rounding="compensated", state_dtype=None):
    """What one pass must move: p and m read and written, g and h read, and h written with the Hessian in the step.

    Low bits of compensated parameters are read and written; so is an fp32 scale for 256 values with every 8-bit state.
    """
    m, h = {
        None: (2 if dtype == torch.bfloat16 else 4, 4),
        torch.float32: (4, 4),
        torch.bfloat16: (2, 2),
        "8bit": (1 + 4 / 256, 1 + 4 / 256),
    }[state_dtype]
    low = 2 if param_rounding == "compensated" and dtype != torch.float32 else 0
    return 3 * dtype.itemsize + 2 * m + (2 if hessian_in_step else 1) * h + low


def peers(soul, params, dtype, quick):
    """Name -> (function that makes it, bytes a parameter that one pass over its states must move)."""
    size, half = dtype.itemsize, dtype != torch.float32
    same = (7 if soul else 6) * size  # both states in the dtype of the parameter
    label = "SOUL" if soul else "SophiaG"
    found = {
        f"published {label}, eager": (lambda: published(published_step, soul, params), same),
        f"foreach {label}, eager": (lambda: published(foreach_step, soul, params), same),
    }
    if not quick:
        found |= {
            f"foreach {label}, torch.compile": (lambda: published(torch.compile(foreach_step), soul, params), same),
            "our reference, torch.compile": (
                lambda: compiled_reference(soul, params),
                bytes_per_param(dtype, soul, param_rounding="nearest"),
            ),
        }
    found["torch AdamW, fused"] = (lambda: torch.optim.AdamW(params, lr=1e-4, fused=True).step, 7 * size)
    found["optimi AdamW"] = (lambda: optimi_adamw(params, kahan_sum=False), 7 * size)
    if half:
        found["optimi AdamW, Kahan"] = (lambda: optimi_adamw(params, kahan_sum=True), 9 * size)
    # Both states in 8 bits with a 16-bit scale for 32, read and written; one byte of low bits below fp32, read and written.
    found["FlashOptim AdamW, 8-bit"] = (lambda: flash_adamw(params), 3 * size + 4 * (1 + 2 / 32) + 2 * half)
    return found


def check(optimizer, variants, device, dtype, quick):
    """Two steps of every variant of ours against the reference: parameters and states are equal bit for bit.

    8-bit states on a GPU are not: there the kernel divides approximately and fuses multiply-add, so that a number at the border
    of two codes falls either way once in a great while. At lr 1e-2 each such one is worth 2e-4, and a wrong kernel 1e-1.
    """
    worst = 0.0
    for options in variants:
        results = []
        for backend in ("auto", "reference"):
            torch.manual_seed(0)
            params = make_params(tiny(True) if quick else [(300, 257), (17,), ()], device, dtype)
            opt = optimizer(params, lr=1e-2, bs=51200, backend=backend, **options)  # about half of them clipped
            if optimizer is SophiaG:
                opt.update_hessian()
            opt.step()
            opt.step()
            results.append((params, [opt.state[p] for p in params]))
        (got, got_states), (want, want_states) = results
        error = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(got, want))
        worst = max(worst, error)
        if device.type == "cuda" and options.get("state_dtype") == "8bit":
            assert error < 1e-3, f"{options}: parameters differ from the reference by {error}"
            continue
        same = all(torch.equal(a[name], b[name]) for a, b in zip(got_states, want_states) for name in b)
        assert error == 0.0 and same, f"{options}: not the reference's bits; parameters differ by {error}"
    return {"difference from the reference": worst}


def check_far_end(params):
    """One step: the last elements, beyond 2^31, are those of the reference, bit for bit."""
    (param,) = params
    end = param.detach()[-4096:].clone().requires_grad_()
    end.grad = param.grad[-4096:].clone()
    options = dict(lr=1e-2, bs=51200, param_rounding="nearest")
    big, small = SOUL(params, **options), SOUL([end], backend="reference", **options)
    big.step()
    small.step()
    same = [torch.equal(big.state[param][name][-4096:], small.state[end][name]) for name in ("exp_avg", "hessian")]
    assert torch.equal(param.detach()[-4096:], end.detach()) and all(same), "elements beyond 2^31 are wrong"
    return {"difference from the reference beyond 2^31": 0.0}


def make_case(name, optimizer, variants, shapes, device, dtype, quick, *, with_peers=False):
    """Ours with each of the options in ``variants``; the parameters and gradients are shared by all that take turns."""
    soul = optimizer is SOUL
    params = make_params(shapes, device, dtype)
    made = {}
    for options in variants:
        per_param = bytes_per_param(dtype, soul, **options)
        rounding = options.get("param_rounding", "compensated") if dtype != torch.float32 else "exact"
        label = f"ours, {rounding}, {STATE_DTYPES[options.get('state_dtype')]} states"
        made[label] = functools.partial(ours, optimizer, params, **options), per_param
    if with_peers:
        made |= peers(soul, params, dtype, quick)
    numel = sum(p.numel() for p in params)
    labels = {label: f"{label}, {per_param:.4g} B/param" for label, (_, per_param) in made.items()}
    return Case(
        f"{optimizer.__name__}.step, {name}, {str(dtype)[6:]}",
        {labels[label]: make for label, (make, _) in made.items()},
        functools.partial(check, optimizer, variants, device, dtype, quick),
        bytes={labels[label]: per_param * numel for label, (_, per_param) in made.items()},
    )


def make_huge_case(device, quick):
    variants = [dict(param_rounding="nearest"), dict(), dict(state_dtype="8bit")]
    case = make_case(f"one tensor of {HUGE:,}", SOUL, variants, [(HUGE,)], device, torch.bfloat16, quick)
    params = case.variants[next(iter(case.variants))].args[1]
    case.variants["torch AdamW, fused"] = lambda: torch.optim.AdamW(params, lr=1e-4, fused=True).step
    case.bytes["torch AdamW, fused"] = 14 * HUGE
    case.check = functools.partial(check_far_end, params)
    return case


def fits(nbytes, device):
    """Tells whether a GPU has so much memory left, and says so if it does not."""
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if free < nbytes:
        print(f"\none tensor of {HUGE:,} left out: it needs {nbytes / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    return free >= nbytes


def cases(device, quick):
    """Functions that make the cases."""
    if device.type == "cpu":
        sizes = [("tiny", tiny(quick), torch.float32), ("tiny", tiny(quick), torch.bfloat16)]
    else:
        sizes = models()
    for name, shapes, dtype in sizes:
        for optimizer in (SophiaG, SOUL):
            main = [dict(), dict(param_rounding="nearest", state_dtype=torch.bfloat16), dict(state_dtype="8bit")]
            if dtype == torch.float32:
                main = [dict(), dict(state_dtype=torch.bfloat16), dict(state_dtype="8bit")]
                groups = []
            else:
                groups = [[dict(param_rounding=r, state_dtype=s) for r in ROUNDINGS] for s in STATE_DTYPES]
            yield functools.partial(make_case, name, optimizer, main, shapes, device, dtype, quick, with_peers=True)
            for group in groups:
                title = f"{name}, {STATE_DTYPES[group[0]['state_dtype']]} states"
                yield functools.partial(make_case, title, optimizer, group, shapes, device, dtype, quick)
    if device.type == "cuda" and fits(HUGE_BYTES, device):
        yield functools.partial(make_huge_case, device, quick)
