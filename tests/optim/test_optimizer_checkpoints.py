"""Checkpoints of the published class, of ours and of other optimizers; resuming bit for bit."""

import copy
import io
import pickle

import pytest
import torch

from soul import SOUL, SophiaG
from soul.optim.state_dicts import State
from soul_kernels.reference.rounding import encode, load_state
from tests.support.helpers import assert_close
from tests.support.optimizers import BRAIN, FLOAT, HALF, PublishedSophiaG, give_gradients, make, twin


def test_loads_a_checkpoint_of_the_published_class_and_goes_on(device):
    params = make(device)
    others = twin(params)
    published = PublishedSophiaG(others, lr=1e-3)
    for _ in range(3):
        give_gradients(params, others)
        published.update_hessian()
        published.step()
    params = twin(others)
    ours = SophiaG(params, lr=5.0, bs=5120)
    buffer = io.BytesIO()
    torch.save(published.state_dict(), buffer)
    buffer.seek(0)
    ours.load_state_dict(torch.load(buffer, weights_only=True))
    assert ours.param_groups[0]["lr"] == 1e-3 and ours.param_groups[0]["eps"] == 1e-15
    assert ours.state[params[0]]["step"] == 3
    give_gradients(params, others)
    ours.step(), published.step()
    for p, q in zip(params, others):
        assert_close(p, q, 1e-6, "p after loading")


def through_torch_save(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "optimizer.pt")
    return torch.load(tmp_path / "optimizer.pt", weights_only=True)


def through_safetensors(state_dict, tmp_path):
    """Return a checkpoint's tensors, by index and name, and its options."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    save_file({f"{i}.{n}": t for i, state in state_dict["state"].items() for n, t in state.items()}, tmp_path / "o.safetensors")
    states = {}
    for key, tensor in load_file(tmp_path / "o.safetensors").items():
        index, name = key.split(".")
        states.setdefault(int(index), {})[name] = tensor
    return {"state": states, "param_groups": copy.deepcopy(state_dict["param_groups"])}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("state_dtype", [None, FLOAT, BRAIN, "8bit"], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_resume_is_bitwise(dtype, state_dtype, rounding, device, tmp_path):
    """torch's own load_state_dict would cast every state, int8 codes and scales included, to the parameter's dtype."""
    params = make(device, dtype, shapes=((40, 32), (300,), ()))
    options = dict(bias_correction=True, rho="auto", seed=3, state_dtype=state_dtype, param_rounding=rounding)
    opt = SophiaG(params, lr=1e-3, **options)
    for _ in range(2):
        give_gradients(params)
        opt.update_hessian()
        opt.step()
    resumed = []
    for through in (through_torch_save, through_safetensors):
        resumed.append(SophiaG(twin(params), lr=9.0))  # options come from the checkpoint
        resumed[-1].load_state_dict(state_dict=through(opt.state_dict(), tmp_path))
    for _ in range(2):
        give_gradients(params, *(other.param_groups[0]["params"] for other in resumed))
        for each in (opt, *resumed):
            each.update_hessian()
            each.step()
    for other in resumed:
        assert torch.equal(opt.param_groups[0]["rho"], other.param_groups[0]["rho"])
        for p, q in zip(params, other.param_groups[0]["params"]):
            assert torch.equal(p, q)
            assert opt.state[p].keys() == other.state[q].keys()
            for name, value in opt.state[p].items():
                assert value.dtype == other.state[q][name].dtype and torch.equal(value, other.state[q][name]), name


def test_checkpoint_of_another_shape_is_refused():
    a = SOUL(make())
    b = SOUL(make(shapes=((4, 5), (7,), ())))
    give_gradients(a.param_groups[0]["params"])
    a.step()
    b.param_groups[0]["lr"] = 0.5
    give_gradients(b.param_groups[0]["params"])
    b.step()
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(ValueError, match=r"state_dict exp_avg: expected shape \(4, 5\), got \(40, 5\)"):
        b.load_state_dict(a.state_dict())
    after = b.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_checkpoints_of_other_optimizers_and_with_bad_options_are_refused():
    params = make()
    opt = SOUL(params, lr=1e-3)
    give_gradients(params)
    opt.step()
    adam = torch.optim.AdamW(others := twin(params))
    give_gradients(params, others)
    adam.step()
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["rho"] = -1.0
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected states exp_avg, hessian, got exp_avg, exp_avg_sq, step"):
        opt.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="rho: expected"):
        opt.load_state_dict(bad)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(opt.state[params[0]]["exp_avg"], before["state"][0]["exp_avg"])
    opt.load_state_dict(before)
    assert opt.clip_fraction() != opt.clip_fraction()  # NaN: the last step was another optimizer's


def test_loading_keeps_what_the_checkpoint_does_not_say():
    params = make()
    published = PublishedSophiaG(twin(params), lr=1e-3)
    ours = SophiaG([{"params": params, "bs": 7}], backend="reference")
    ours.load_state_dict(published.state_dict())
    assert ours.param_groups[0]["bs"] == 7 and ours.param_groups[0]["backend"] == "reference"
    other = SophiaG(twin(params), backend="auto", rho=0.5)
    other.load_state_dict(ours.state_dict())
    assert other.param_groups[0]["backend"] == "auto" and other.param_groups[0]["rho"] == 0.04


def test_load_hooks_see_and_change_the_checkpoint():
    params = make(dtype=BRAIN)
    a = SOUL(params, lr=1e-3)
    b = SOUL(twin(params), lr=1e-3)
    give_gradients(params)
    a.step()
    dtypes = []

    def double_hessian(optimizer, state_dict):
        for state in state_dict["state"].values():
            state["hessian"] = 2 * state["hessian"]
        return state_dict

    b.register_load_state_dict_pre_hook(double_hessian)
    b.register_load_state_dict_post_hook(lambda optimizer: dtypes.extend(s["hessian"].dtype for s in optimizer.state.values()))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert dtypes == [FLOAT] * 3  # the post-hook finds the states as they are going to stay
    for p, q in zip(params, b.param_groups[0]["params"]):
        assert torch.equal(b.state[q]["hessian"], 2 * a.state[p]["hessian"])


def test_a_published_checkpoint_loads_into_any_storage():
    params = make(shapes=((10, 32),))
    published = PublishedSophiaG(params, lr=1e-3)
    give_gradients(params)
    published.update_hessian(), published.step()
    for state_dtype, tolerance in ((FLOAT, 0.0), (BRAIN, 5e-3), ("8bit", 0.04)):
        (param,) = other = twin(params, BRAIN)
        opt = SophiaG(other, state_dtype=state_dtype, bias_correction=True)
        opt.load_state_dict(published.state_dict())
        state = opt.state[param]
        for name in ("exp_avg", "hessian"):
            value = load_state(state[name], state.get(f"{name}_scale"), name)
            assert_close(value, published.state[params[0]][name], tolerance, f"{name} as {state_dtype}")
        give_gradients(other)
        opt.step()
        assert param.isfinite().all() and state["low_bits"].any()


def test_the_published_class_loads_our_checkpoint_and_goes_on():
    params = make()
    others = twin(params)
    ours = SophiaG(params, lr=1e-3)
    give_gradients(params)
    ours.update_hessian(), ours.step()
    others = twin(params)
    published = PublishedSophiaG(others, lr=9.0)
    published.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch would share the tensors
    give_gradients(params, others)
    ours.step(), published.step()
    for p, q in zip(params, others):
        assert_close(p, q, 1e-6, "p after loading")


def test_8_bit_states_load_into_another_memory_format():
    """A scale is for 32 neighbours in memory: codes that are copied by index would get the wrong scales."""
    params = make(shapes=((4, 32, 5, 7),))
    opt = SOUL(params, state_dtype="8bit")
    params[0].grad = torch.randn(4, 32, 5, 7) * torch.logspace(-4, 0, 32)[:, None, None]
    opt.step()
    (other,) = others = [params[0].detach().to(memory_format=torch.channels_last).requires_grad_()]
    loaded = SOUL(others)
    loaded.load_state_dict(opt.state_dict())
    for name in ("exp_avg", "hessian"):
        got, want = (
            load_state(o.state[p][name], o.state[p][f"{name}_scale"], name) for o, p in ((loaded, other), (opt, params[0]))
        )
        assert_close(got, want, 0.04, name)


def test_a_published_checkpoint_leaves_rho_auto():
    params = make()
    published = PublishedSophiaG(params, lr=1e-3, rho=0.5)
    opt = SophiaG(twin(params), rho="auto", clip_target=0.3)
    opt.load_state_dict(published.state_dict())
    group = opt.param_groups[0]
    assert group["clip_target"] == 0.3 and group["rho"].item() == pytest.approx(0.04) and group["lr"] == 1e-3


def test_low_bits_of_another_model_are_refused():
    params = make(dtype=BRAIN)
    opt = SOUL(params)
    give_gradients(params)
    opt.step()
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][0]["low_bits"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^state_dict low_bits: expected \(40, 5\) of torch.int8, got \(3,\)"):
        opt.load_state_dict(checkpoint)


@pytest.mark.parametrize("kind, published_code", [(SophiaG, None), (SOUL, True), (SOUL, False)])
@pytest.mark.parametrize("state_dtype", [None, "8bit"])
def test_an_export_to_the_published_class_goes_on_there(kind, published_code, state_dtype):
    """States and momentum are the same for every way of storing ours; and the export can be loaded again."""
    options = {} if published_code is None else {"published_code": published_code}
    params = make(shapes=((300,), (7, 32)))
    ours = kind(params, lr=torch.tensor(1e-3), betas=(0.81, 0.95), rho=0.5, bs=20, state_dtype=state_dtype, **options)
    for _ in range(2):
        give_gradients(params)
        if kind is SophiaG:
            ours.update_hessian()
        ours.step()
    exported = ours.export_published()
    assert all(set(state) == {"step", "exp_avg", "hessian"} for state in exported["state"].values())
    names = {"lr", "betas", "rho", "weight_decay", "maximize", "capturable", "params"}
    assert set(exported["param_groups"][0]) == names and type(exported["param_groups"][0]["lr"]) is float
    others = twin(params)
    published = PublishedSophiaG(others, lr=9.0, soul=kind is SOUL)
    published.load_state_dict(exported)
    for p, q in zip(params, others):
        for name in ("exp_avg", "hessian"):
            state = ours.state[p]
            assert torch.equal(load_state(state[name], state.get(f"{name}_scale"), name), published.state[q][name]), name
            assert published.state[q][name].data_ptr() != state[name].data_ptr()
    give_gradients(params, others)
    ours.step(), published.step(bs=20)
    for p, q in zip(params, others):
        # After the step: 8-bit states have been rounded in ours, and the published class has none to round.
        assert_close(p, q, 1e-5 if state_dtype is None else 1e-3, "p after the export")
    back = kind(twin(params), state_dtype="8bit", **options | ({} if kind is SophiaG else {"published_code": True}))
    back.load_state_dict(published.state_dict())
    assert int(back.state[back.param_groups[0]["params"][0]]["step"]) == 3


def test_codes_that_were_taken_for_values_are_refused():
    """The published class loads a plain state_dict with 8-bit states without complaint; its states are then nonsense."""
    params = make(shapes=((10, 32),))
    opt = SOUL(params, state_dtype="8bit", published_code=True)
    give_gradients(params)
    opt.step()
    published = PublishedSophiaG(twin(params))
    published.load_state_dict(copy.deepcopy(opt.state_dict()))
    before = copy.deepcopy(opt.state_dict())
    message = r"^state_dict exp_avg: expected codes in torch.uint8 beside exp_avg_scale, got torch.float32; .*export_published"
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(published.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][0]["hessian"] = wrong["state"][0]["hessian"].to(torch.int8)
    with pytest.raises(ValueError, match="^state_dict hessian: expected floating-point values, or codes in torch.uint8, got"):
        opt.load_state_dict(wrong)
    for name, value in opt.state[params[0]].items():
        assert torch.equal(value, before["state"][0][name])


def test_the_momentum_of_a_checkpoint_is_kept_or_refused():
    """published_code says whether beta1 or its square acts; checkpoints of SOUL's own code do not say it."""
    params = make()
    published = PublishedSophiaG(params, betas=(0.9, 0.95), soul=True)
    give_gradients(params)
    published.step()
    paper = SOUL(twin(params), betas=(0.5, 0.5))
    with pytest.raises(ValueError, match="^published_code: expected True for a checkpoint of SOUL.s published code, got False"):
        paper.load_state_dict(published.state_dict())
    assert paper.param_groups[0]["betas"] == (0.5, 0.5) and not paper.state
    marked = copy.deepcopy(published.state_dict())
    marked["param_groups"][0]["published_code"] = False  # of other code, as the user knows
    paper.load_state_dict(marked)
    assert paper.param_groups[0]["betas"] == (0.9, 0.95)
    code = SOUL(twin(params), published_code=True)
    code.load_state_dict(published.state_dict())
    assert code.param_groups[0]["published_code"] is True
    for source, want in ((code, True), (paper, False), (SophiaG(make()), False)):  # ours carry it, as they carry betas
        for other in (SOUL(twin(params)), SOUL(twin(params), published_code=True)):
            other.load_state_dict(source.state_dict())
            assert other.param_groups[0]["published_code"] is want
    with pytest.raises(ValueError, match="^state_dict published_code: expected False for SophiaG, got True; load it into SOUL"):
        SophiaG(twin(params)).load_state_dict(code.state_dict())


@pytest.mark.parametrize("dtype, tolerance", [(FLOAT, 1e-6), (BRAIN, 1e-2)])
def test_as_published_is_the_published_code(dtype, tolerance):
    params = make(dtype=dtype, shapes=((40, 5), (300,)))
    others = twin(params)
    ours = SOUL.as_published([{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}], lr=1e-2, rho=0.1, bs=50)
    theirs = PublishedSophiaG([{"params": others[:1], "weight_decay": 0.0}, {"params": others[1:]}], lr=1e-2, rho=0.1,
                              betas=(0.9, 0.95), soul=True)  # fmt: skip
    for _ in range(5):
        give_gradients(params, others)
        ours.step(), theirs.step(bs=50)
    for p, q in zip(params, others):
        assert ours.state[p].keys() == theirs.state[q].keys()  # no low bits
        for name, value in ours.state[p].items():
            assert name == "step" or value.dtype == theirs.state[q][name].dtype == dtype
        assert_close(p, q, tolerance, "p")
        assert_close(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"], tolerance, "m")
    assert [g["weight_decay"] for g in ours.param_groups] == [0.0, 0.1]
    with pytest.raises(ValueError, match="^params: expected one dtype in group 0, got torch.bfloat16 and torch.float32; make"):
        SOUL.as_published([*make(), *make(dtype=BRAIN)])


def test_checkpoints_hold_plain_dicts(tmp_path):
    """``torch.load`` takes no classes of ours with ``weights_only``; states keep noting changes through copies and files."""
    params = make()
    give_gradients(params)
    opt = SOUL(params)
    opt.step()
    assert all(type(state) is dict for state in opt.state_dict()["state"].values())
    torch.save(opt.state_dict(), tmp_path / "checkpoint.pt")
    loaded = SOUL(twin(params))
    loaded.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    copies = [opt, loaded, copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for optimizer in copies:
        assert all(type(state) is State for state in optimizer.state.values())
        assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("change", [
    lambda state: state.__setitem__("a", 1), lambda state: state.__delitem__("b"), lambda state: state.__ior__({"a": 1}),
    lambda state: state.clear(), lambda state: state.pop("b"), lambda state: state.popitem(),
    lambda state: state.setdefault("a", 1), lambda state: state.update(a=1),
])  # fmt: skip
def test_a_state_notes_every_change(change):
    state, plain = State(b=2), {"b": 2}
    before = State.last_change
    assert state == plain and state["b"] == 2 and State.last_change is before
    change(state), change(plain)
    assert state == plain and State.last_change is not before


def older_codes(values, name):
    """8-bit states as older checkpoints have them, to nearest: floats e4m3 or e5m3, and an fp32 scale for 256 values."""
    top, shrink, sign = (8, 120, 0x80) if name == "exp_avg" else (16, 112, 0)
    groups = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 256)).view(-1, 256)
    exponent = (((groups.abs().amax(1).view(torch.int32) + 0x100000) >> 23) - top).clamp(min=1)
    scale = (exponent << 23).view(torch.float32)
    code = ((groups.abs() / scale[:, None] * 2.0**-shrink).view(torch.int32) + 0x80000) >> 20
    code = torch.where(groups < 0, code | sign, code)
    return code.to(torch.uint8).flatten()[: values.numel()].view(values.shape), scale


@pytest.mark.parametrize("shape", [(40, 32), (3, 256), (5, 3, 32)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_8_bit_states_of_older_checkpoints_are_encoded_anew(shape, backend, device):
    params = make(device, shapes=(shape,))
    opt = SOUL(params, state_dtype="8bit", lr=1e-3)
    give_gradients(params)
    opt.step()
    checkpoint = copy.deepcopy(opt.state_dict())
    state = checkpoint["state"][0]
    wants = {}
    for name in ("exp_avg", "hessian"):
        wants[name] = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-4
        wants[name] = wants[name] if name == "exp_avg" else wants[name].square()
        state[name], state[f"{name}_scale"] = older_codes(wants[name], name)
    others = twin(params)
    loaded = SOUL(others, lr=1e-3, backend=backend)
    with pytest.warns(UserWarning, match="^state_dict: 8-bit states of the older format.* were encoded anew"):
        loaded.load_state_dict(checkpoint)
    for name, want in wants.items():
        code, scale = (loaded.state[others[0]][key] for key in (name, f"{name}_scale"))
        assert code.dtype == torch.uint8 and scale.nbytes == 2 * want.numel() // 32
        got = load_state(code, scale, name).cpu()
        assert ((got - want).abs() <= want.abs() / 15 + 0.01 * want.abs().max()).all(), name  # the older code's own error
    give_gradients(others)
    loaded.step()
    assert others[0].isfinite().all()
    state["hessian_scale"] = state["hessian_scale"].half()
    with pytest.raises(
        ValueError, match=r"^state_dict hessian_scale: expected .* of torch.int16, or their bytes, got .* of torch.float16"
    ):
        SOUL(twin(params)).load_state_dict(checkpoint)


def flat_8_bit_checkpoint(shape, older):
    """Return parameters, a checkpoint whose codes have scales in a vector, whatever their shape, and what they decode to."""
    params = make(shapes=(shape,))
    opt = SOUL(params, lr=1e-3, state_dtype="8bit")
    give_gradients(params)
    opt.step()
    checkpoint = copy.deepcopy(opt.state_dict())
    state = checkpoint["state"][0]
    wants = {}
    for name in ("exp_avg", "hessian"):
        generator = torch.Generator().manual_seed(3)
        if older:  # of numbers that this format has
            wants[name] = torch.randint(8, 16, shape, generator=generator) * 2.0**-20
            state[name], state[f"{name}_scale"] = older_codes(wants[name], name)
        else:
            code, state[f"{name}_scale"] = encode(torch.randn(shape, generator=generator).flatten(), None, name)
            state[name] = code.view(shape)
            wants[name] = load_state(state[name], state[f"{name}_scale"], name)
    return params, checkpoint, wants


@pytest.mark.parametrize("older", [False, True], ids=["flat", "older"])
@pytest.mark.parametrize("shape", [(300,), (40, 33), ()])
def test_codes_of_parameters_without_8_bit_states_are_decoded(shape, older, recwarn):
    """Older checkpoints have codes of all parameters. In fp32 nothing is lost, so nobody is warned."""
    params, checkpoint, wants = flat_8_bit_checkpoint(shape, older)
    loaded = SOUL(twin(params), state_dtype="8bit")
    loaded.load_state_dict(checkpoint)
    (param,) = loaded.param_groups[0]["params"]
    assert set(loaded.state[param]) == {"step", "exp_avg", "hessian"} and not recwarn.list
    for name, want in wants.items():
        assert loaded.state[param][name].dtype == FLOAT and torch.equal(loaded.state[param][name], want) and want.any()
    give_gradients([param])
    loaded.step()
    again = SOUL(twin([param]))
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.state[again.param_groups[0]["params"][0]]["hessian"], loaded.state[param]["hessian"])


def test_scales_in_a_vector_are_those_of_the_rows():
    """A checkpoint of a matrix from before scales had rows goes on bit for bit."""
    params, checkpoint, _ = flat_8_bit_checkpoint((6, 64), older=False)
    rows = copy.deepcopy(checkpoint)
    for name in ("exp_avg_scale", "hessian_scale"):
        rows["state"][0][name] = rows["state"][0][name].view(torch.uint8).view(6, 4)
    opts = [SOUL(twin(params)), SOUL(twin(params))]
    for opt, saved in zip(opts, (checkpoint, rows)):
        opt.load_state_dict(saved)
    ours, theirs = (opt.param_groups[0]["params"] for opt in opts)
    give_gradients(ours, theirs)
    for opt in opts:
        opt.step()
    assert torch.equal(ours[0], theirs[0])
    for name, value in opts[0].state[ours[0]].items():
        assert torch.equal(value, opts[1].state[theirs[0]][name]) and (not name.endswith("_scale") or value.shape == (6, 4))
