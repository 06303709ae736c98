"""fast.py computes what model.py does; memory, recompute, compile and int8 weights."""

import argparse
import dataclasses
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

import data
import fast
import train
from data import collate
from fast import FastLlama, FastRMSNorm, SwiGLU
from model import Config, Llama
from spul import Objective, SoftPrompt, answer_hidden
from support import hardware
from support.hardware import Int8Linear, load_llama, prepare_layers, step_memory
from tests.helpers import BOTH, CONFIG, SHAPES, kept, small_batch, teacher_of, tiny, tokens_of
from tests.helpers import vectors

POSITIONS = pytest.mark.parametrize("position", ["aligned", "after-label"])
SCALE = argparse.Namespace(recompute=False, compile=False)
RECOMPUTE = argparse.Namespace(recompute=True, compile=False)


def both_kinds(dtype=torch.float32, **changes):
    return [tiny(kind=kind, **changes).to(dtype) for kind in (Llama, FastLlama)]


def losses_and_gradient(llama, examples, teacher, shared_ids=(), position="aligned"):
    """train.losses of one batch, and the gradient of phi and of the encoder's weights."""
    torch.manual_seed(0)
    prompt = SoftPrompt(4, 32, 8)
    phi = prompt()
    phi.retain_grad()
    batch = collate(examples, shared_ids=shared_ids, keep_last=position == "after-label")
    objective = Objective(kl_position=position)
    terms = train.losses(llama, lambda: phi, batch, teacher, objective)
    terms["loss"].backward()
    values = torch.cat([term.detach().flatten() for term in terms.values()])  # those of rows, too
    return values, phi.grad, *(parameter.grad for parameter in prompt.parameters())


# ------------------------------------------------------------------- the plain and the fast forward


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_fast_give_the_same_outputs(shape):
    plain, quick = both_kinds(**SHAPES[shape])
    tokens = tokens_of(3, 14)
    phi = vectors(5)
    torch.testing.assert_close(quick(tokens), plain(tokens), atol=1e-4, rtol=1e-4)
    for shared_ids in ((), (7, 8, 9)):
        expected = plain.prompted(tokens, phi, shared_ids)
        got = quick.prompted(tokens, phi, shared_ids)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        got = quick.hidden(tokens, quick.prefix(phi, shared_ids))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@POSITIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_fast_give_the_same_losses_and_gradients(shape, position):
    found = []
    examples = [dataclasses.replace(e, ids=(7, 8, 9) + e.ids) for e in small_batch(2, 3)]
    for llama in both_kinds(**SHAPES[shape]):
        teacher = teacher_of(llama, examples, int(position == "after-label"))
        found.append(losses_and_gradient(llama, examples, teacher, (7, 8, 9), position))
    assert found[0][1].abs().max() > 1e-3
    for plain, quick in zip(*found, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(quick, plain, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("shape", ["llama GQA", "qwen2 window", "qwen3"])
def test_plain_and_fast_are_equally_near_to_float32_in_bf16(shape):
    examples = small_batch(2, 3)
    exact = tiny(**SHAPES[shape])
    teacher = teacher_of(exact, examples)
    values, gradient, *_ = losses_and_gradient(exact, examples, teacher)
    for llama in both_kinds(torch.bfloat16, **SHAPES[shape]):
        got, g, *_ = losses_and_gradient(llama, examples, teacher.bfloat16())
        torch.testing.assert_close(got, values, atol=0.5, rtol=0.1)
        assert F.cosine_similarity(g.flatten(), gradient.flatten(), dim=0) > 0.95


def test_plain_and_fast_have_the_same_parameters():
    plain, quick = both_kinds(**SHAPES["qwen3"])
    names = [[(name, p.shape) for name, p in m.named_parameters()] for m in (plain, quick)]
    assert names[0] == names[1]


def test_both_ways_to_attend_agree(monkeypatch):
    """Products, for few keys on a CPU, and the fused kernel: outputs, and phi's gradient."""
    llama = tiny(kind=FastLlama)
    tokens = tokens_of(3, 8)
    fused = []
    attention = F.scaled_dot_product_attention

    def note(*args, **how):
        fused.append(True)
        return attention(*args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    found = []
    for most in (fast.MAX_KEYS, 0):
        monkeypatch.setattr(fast, "MAX_KEYS", most)
        assert not fused
        phi = vectors(4)
        out = llama.prompted(tokens, phi)
        out.square().sum().backward()
        found.append((out.detach(), phi.grad))
    assert fused
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_a_token_alone_is_attended_by_products_whatever_the_number_of_keys(monkeypatch):
    llama = tiny(kind=FastLlama, eos_token_id=None)
    prompts = [[3, 4, 5, 6], [7, 8]]
    expected = llama.generate(prompts, None, 6)
    fused = []
    attention = F.scaled_dot_product_attention

    def note(q, *args, **how):
        fused.append(q.shape[2])
        return attention(q, *args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    monkeypatch.setattr(fast, "MAX_KEYS", 0)
    assert llama.generate(prompts, None, 6) == expected
    assert set(fused) == {4}  # the prompts alone


def test_the_frozen_norm_has_the_gradient_of_its_formula():
    x, w, weights = (
        torch.randn(5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    x.requires_grad_()
    norm = FastRMSNorm(16, 1e-5).requires_grad_(False)
    norm.weight.copy_(w[0])
    by_hand = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[0]
    torch.testing.assert_close(norm(x), by_hand)
    (g,), (h,) = (torch.autograd.grad((y * weights).sum(), x) for y in (norm(x), by_hand))
    torch.testing.assert_close(g, h)


def test_the_frozen_norm_leaves_the_gradient_it_is_given_as_it_was():
    """As after attention, where autograd gives x and norm(y) the same tensor."""
    norm = FastRMSNorm(16, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 16))
    x, y = (torch.randn(5, 16).requires_grad_() for _ in range(2))
    g, _ = torch.autograd.grad((x + norm(y)).square().sum(), (x, y))
    expected = 2 * (x + norm(y)).detach()
    torch.testing.assert_close(g, expected)


def test_a_norm_that_learns_gets_its_weights_gradient():
    norm = FastRMSNorm(16, 1e-5)
    norm(torch.randn(5, 16)).square().sum().backward()
    assert norm.weight.grad.abs().min() > 0


def test_swiglu_has_the_gradients_of_its_formula():
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    gate, up, weights = (torch.randn(5, 16, generator=g) for g in generators)
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    by_hand = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(SwiGLU.apply(gate, up), by_hand)
    got = torch.autograd.grad((SwiGLU.apply(gate, up) * weights).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad((by_hand * weights).sum(), inputs))


@BOTH
@POSITIONS
def test_ids_that_all_rows_share_change_no_loss_and_no_gradient(kind, position):
    llama = tiny(kind=kind)
    examples = [dataclasses.replace(e, ids=(7, 8, 9) + e.ids) for e in small_batch(2, 3)]
    teacher = teacher_of(llama, examples, int(position == "after-label"))
    found = []
    for shared_ids in ((), (7, 8, 9)):
        found.append(losses_and_gradient(llama, examples, teacher, shared_ids, position))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


@BOTH
def test_the_teacher_does_not_depend_on_ids_left_out_or_batches(kind):
    llama = tiny(kind=kind)
    examples = [dataclasses.replace(e, ids=(7, 8, 9) + e.ids) for e in small_batch(0, 5)]
    for batch_size in (1, 2, 32):
        got = answer_hidden(llama, examples, batch_size=batch_size)
        for e, h in zip(examples, got, strict=True):
            whole = llama.hidden(torch.tensor([e.ids]))[0]
            expected = whole[len(e.ids) - e.n - 1 : -1]
            torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------- what fast.py does not know


@dataclasses.dataclass
class NewConfig(Config):
    soft_cap: float = None  # what no part of fast.py reads


def test_fast_names_a_field_of_the_config_that_it_does_not_know():
    assert fast.unknown_fields(Config(**CONFIG)) == []
    assert fast.unknown_fields(NewConfig(**CONFIG)) == []
    assert fast.unknown_fields(NewConfig(**CONFIG, soft_cap=30.0)) == ["soft_cap"]


def test_a_field_that_fast_does_not_know_runs_on_the_plain_forward_and_the_screen_says_so(
    folder, monkeypatch, capsys
):
    def read(path):
        return NewConfig(**vars(Config.from_file(path / "config.json")), soft_cap=30.0)

    monkeypatch.setattr(hardware, "read_config", read)
    llama = load_llama(folder, torch.float32, "cpu")
    assert type(llama) is Llama
    assert "soft_cap" in capsys.readouterr().out


def test_commands_take_the_fast_forward_unless_plain_is_asked_for(folder, capsys):
    assert type(load_llama(folder, torch.float32, "cpu")) is FastLlama
    assert type(load_llama(folder, torch.float32, "cpu", plain=True)) is Llama
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------- recompute, compile and memory


@BOTH
def test_recomputing_keeps_less_and_changes_nothing(kind):
    examples = small_batch(8, 24)
    found = []
    for options in (SCALE, RECOMPUTE):
        llama = tiny(kind=kind)
        prepare_layers(llama, options)
        teacher = teacher_of(llama, examples)
        out = []
        size, _ = kept(llama, lambda: out.append(llama.prompted(tokens_of(8, 24), vectors(4))))
        found.append((size, *losses_and_gradient(llama, examples, teacher)))
    assert found[1][0] < 0.4 * found[0][0]
    torch.testing.assert_close(found[0][1:], found[1][1:])


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler"
)
def test_compiled_layers_give_the_same_losses_and_gradient():
    llama = tiny(kind=FastLlama, num_hidden_layers=2)
    examples = small_batch(2, 3)
    teacher = teacher_of(llama, examples)
    expected = losses_and_gradient(llama, examples, teacher)
    torch._dynamo.utils.counters.clear()
    prepare_layers(llama, argparse.Namespace(recompute=False, compile=True))
    got = losses_and_gradient(llama, examples, teacher)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # it really was compiled
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_of_a_step_is_told_in_advance(recompute, dtype):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=8, vocab_size=64)
    llama = tiny(kind=FastLlama, **sizes).to(dtype)
    prepare_layers(llama, RECOMPUTE if recompute else SCALE)
    prompt = SoftPrompt(8, 64, 8)
    rows = [tokens_of(1, 40, i)[0].remainder(64).tolist() for i in range(16)]
    batch = collate([data.Example(tuple(ids), 1, "", False) for ids in rows])
    teacher = torch.zeros(16, 64, dtype=dtype)
    size, _ = kept(llama, lambda: train.losses(llama, prompt, batch, teacher))
    told = step_memory(llama, *batch.tokens.shape, 8, 16, recompute)
    # With recompute it includes what one of the eight layers needs while it is computed again.
    assert 0.9 * size < told < (3 if recompute else 1.2) * size


# ------------------------------------------------------------------------------------- int8 weights


def test_int8_weights_are_nearest_and_their_product_is_that_of_the_dequantised():
    weight = torch.randn(24, 16)
    x = torch.randn(5, 16, requires_grad=True)
    packed = Int8Linear.pack("a.weight", weight)
    back = packed["a.weight"].float() * packed["a.scale"][:, None]
    assert packed["a.weight"].dtype == torch.int8
    assert packed["a.weight"].abs().amax(dim=1).eq(127).all()
    assert ((back - weight).abs() <= packed["a.scale"][:, None] * 0.5001).all()
    layer = Int8Linear(16, 24)
    bias = torch.ones(24)
    layer.load_state_dict({"weight": packed["a.weight"], "scale": packed["a.scale"], "bias": bias})
    weights = torch.randn(5, 24)
    found = []
    for y in (layer(x), x @ back.T + 1):
        found.append((y, *torch.autograd.grad((y * weights).sum(), x)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
def test_an_int8_model_keeps_no_cast_weight_and_gives_nearly_the_same_outputs(plain, folder):
    llama = load_llama(folder, torch.float32, "cpu", plain)
    packed = load_llama(folder, torch.float32, "cpu", plain, quantize="int8")
    tokens = tokens_of(2, 9)
    phi = vectors(4)
    _, tensors = kept(packed, lambda: packed.prompted(tokens, phi))
    shapes = {p.shape for p in packed.layers.parameters() if p.dtype == torch.int8}
    assert len(shapes) == 4
    assert all(dtype == torch.int8 for shape, dtype in tensors if shape in shapes)
    h, q = (m.prompted(tokens, phi).detach() for m in (llama, packed))
    assert not torch.equal(h, q)
    assert F.cosine_similarity(h, q, dim=-1).min() > 0.99
