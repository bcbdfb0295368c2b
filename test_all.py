"""All tests of the project, on a CPU and without a network: python -m pytest test_all.py

    python test_all.py --bench          # training forms of both mixers against a loop over tokens
    python test_all.py --compare-teacher DIR --target DIR      # 20 prompts, with and without drafts
    python test_all.py --ablate         # the paper's Tables 6 to 9 at toy size, and our switches

Models have 2 to 4 layers of width 64 and mostly compute in float64, where two correct ways to the
same number agree to 1e-9 and a wrong one does not. The Triton kernels run in Triton's interpreter
(on CUDA, where there is one); all other tests use the PyTorch form.

Contents:  1 helpers   2 scan and bridge to attention   3 multi-step kernels   4 decoding, padding
           5 conversion   6 losses   7 evaluation   8 training, kill and resume   9 saving and
           generate()   10 errors   11 the command line   12 Algorithm 2   13 debugger,
           README   14 --bench   15 --ablate, pictures
"""

import argparse
import copy
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import timeit
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"     # of the kernel tests; the rest: CPU
os.environ["HF_HUB_OFFLINE"] = "1"                          # no test asks the network
if DEVICE == "cpu":                     # read while the kernels are built, so only for this import
    os.environ["TRITON_INTERPRET"] = "1"

import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

import mamba_in_llama as M  # noqa: E402
import spec_decode as S  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)                    # models decode by the PyTorch form
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = os.path.dirname(os.path.abspath(__file__))
MIXERS = ["mamba2", "mamba"]
V = 97                                                      # vocabulary of the small models

# ---------------------------------------------------------------------------------------------
# 1. Helpers.
# ---------------------------------------------------------------------------------------------


def make_teacher(kind="llama", layers=4, kv=2, tied=False, dtype=torch.float64, seed=0, **fields):
    """A random teacher of width 64 with 4 heads of 16, whose attention is far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**dict(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv, max_position_embeddings=64,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None),
        **fields})
    teacher = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            p.data = p.data.to(dtype)               # and not the buffers: RoPE stays fp32
            if name.endswith("bias"):
                p.normal_(std=0.3)
            elif p.ndim == 2:
                p.normal_(std=0.15)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return teacher


@torch.no_grad()
def randomize(student, seed=0):
    """Move every mixer parameter off its special start (identity conv, open gate, no bias)."""
    torch.manual_seed(seed)
    for p in [p for mixer in student.mixers().values() for p in mixer.parameters()]:
        p.add_(0.1 * torch.randn_like(p))
    return student


def make_student(attn_layers=None, mixer="mamba2", recipe="near_linear", seed=0, teacher=None,
                 **fields):
    """A hybrid whose mixers are random around their start."""
    d_state = fields.pop("d_state", None)
    teacher = teacher or make_teacher(seed=seed, **fields)
    return randomize(M.convert_to_hybrid(teacher, attn_layers, mixer, recipe, d_state), seed)


def draw(b, l, seed=0):
    """Random tokens (b,l)."""
    return torch.randint(V, (b, l), generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------------------------------------
# 2. The scan, and the bridge to attention.
# ---------------------------------------------------------------------------------------------


def scan_inputs(mixer, b=2, l=13, H=3, P=4, N=4, seed=0):
    """x, delta, A, B, C, state as the mixers make them, in float64."""
    torch.manual_seed(seed)
    p, n = (1, 1) if mixer == "mamba2" else (P, N)

    def r(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return [r(b, l, H, P), F.softplus(r(b, l, H, p)), -r(H, p, n).exp(), r(b, l, H, N),
            r(b, l, H, N), r(b, H, P, N)]


@pytest.mark.parametrize("scan", [M.recurrence, M.chunked_scan])
def test_scan_by_hand(scan):
    """One head, P = 1, N = 2, A = -ln 2, so that decay = 2^-Delta; C = (1, 1) sums the state.

    t  Delta  decay  x  B       h = decay h + Delta x B                    y
    1    1     1/2   1  (1,0)   (1, 0)                                     1
    2    1     1/2   2  (0,1)   (1/2, 0) + 2 (0,1)   = (1/2, 2)            2.5
    3    2     1/4   4  (1,1)   (1/8, 1/2) + 8 (1,1) = (8.125, 8.5)       16.625
    """
    def f(*v):
        return torch.tensor(v, dtype=torch.float64)

    x, delta = f(1, 2, 4).view(1, 3, 1, 1), f(1, 1, 2).view(1, 3, 1, 1)
    B, C = f(1, 0, 0, 1, 1, 1).view(1, 3, 1, 2), torch.ones(1, 3, 1, 2, dtype=torch.float64)
    y, state = scan(x, delta, f(-math.log(2)).view(1, 1, 1), B, C)
    close(y.flatten(), f(1, 2.5, 16.625))
    close(state.flatten(), f(8.125, 8.5))


def scan_and_gradients(scan, inputs):
    """y, final state, and the gradients of every input from both, the initial state included."""
    inputs = [v.detach().clone().requires_grad_() for v in inputs]
    outs = scan(*inputs)
    torch.manual_seed(1)            # small integers are exact in bf16; .mT: strided gradients
    loss = sum((torch.randint(-4, 5, v.mT.shape, device="cpu").to(v) * v.mT).sum() for v in outs)
    return *outs, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("l,chunk", [(1, 4), (3, 64), (13, 1), (13, 5), (16, 4), (31, 7), (65, 64)])
def test_chunked_scan_is_the_recurrence(mixer, l, chunk):
    inputs = scan_inputs(mixer, l=l)
    fast = functools.partial(M.chunked_scan, chunk=chunk)
    for a, b in zip(scan_and_gradients(M.recurrence, inputs), scan_and_gradients(fast, inputs)):
        close(a, b)


def check_mamba_scan_kernels(b, l, H, P, N, dtype=torch.float32, strength=1):
    """Mamba's kernels on x, B, C of that dtype against the recurrence in float64."""
    x, delta, A, B, C, state = scan_inputs("mamba", b, l, H, P, N)
    delta, A = delta * strength, A * strength
    delta[0, :3] = 0                                    # a row whose first tokens are padding
    x, B, C, delta, A, state = (*(v.to(dtype) for v in (x, B, C)),
                                *(v.float() for v in (delta, A, state)))
    inputs = x, delta, A, B, C, state
    want = scan_and_gradients(M.recurrence, [v.double() for v in inputs])

    def strided(tensors):                               # as views of a projection's columns are
        return [v.mT.contiguous().mT for v in tensors]

    with kernels():
        inputs = [v.to(DEVICE) for v in inputs]
        found = scan_and_gradients(lambda *v: M.chunked_scan(*strided(v)), inputs)
        with torch.no_grad():                           # which keeps no states
            for v, same_v in zip(found, M.chunked_scan(*inputs)):
                assert torch.equal(v, same_v)
        y, _ = M.chunked_scan(*(v.requires_grad_() for v in inputs))
        assert "Triton" in type(y.grad_fn).__name__
    for v, exact in zip(found, want):
        error = (v.cpu().double() - exact).abs().max() / exact.abs().max()
        assert error < (1e-5 if v.dtype == torch.float32 else 1e-2), (v.shape, error)


@pytest.mark.parametrize("l,P,N,kind", [
    (2, 4, 4, {}), (12, 16, 16, {}), (17, 16, 16, dict(dtype=torch.bfloat16)),  # 1 to 3 chunks
    (21, 40, 6, {}), (9, 20, 5, {}),                    # several programs a head, padded states
    (40, 4, 4, dict(strength=50))])                     # exp(-3000) is 0
def test_mamba_scan_kernels_are_the_recurrence(l, P, N, kind):
    check_mamba_scan_kernels(2, l, 2, P, N, **kind)


@pytest.mark.skipif(DEVICE == "cpu", reason="sizes of models: for a GPU")
@pytest.mark.parametrize("b,l,H,P,N", [(4, 301, 36, 16, 16), (3, 150, 9, 64, 64),
                                       (1, 99, 4, 128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_scan_kernels_at_model_sizes(b, l, H, P, N, dtype):
    check_mamba_scan_kernels(b, l, H, P, N, dtype)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("T", [1, 3])
def test_only_the_last_tokens_are_read(mixer, T):
    """C may bring T <= l tokens: the recurrence, and one chunk of Mamba2 as decoding uses it."""
    x, delta, A, B, C, state = scan_inputs(mixer, l=7)
    (y, end), (last, same_end) = (M.recurrence(x, delta, A, B, c, state) for c in (C, C[:, -T:]))
    close(last, y[:, -T:])
    close(same_end, end)
    if mixer == "mamba2":
        u, cum, B, C = (v.transpose(1, 2) for v in (delta * x, (delta * A[:, 0]).cumsum(1), B, C))
        close(M.chunk_outputs(u, cum, B, C[:, :, -T:], state).transpose(1, 2), last)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixers_compile(mixer):
    """A compiled mixer, as long stages on a GPU train it: the same values and gradients."""
    student = make_student([], mixer, layers=1, dtype=torch.float32)
    module, u = student.mixers()[0], torch.randn(2, 33, student.config.hidden_size)
    rope = student.model.rotary_emb(u, torch.arange(33)[None])

    def run(f):
        module.zero_grad()
        y = f(u, position_embeddings=rope)[0]
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    compiled = torch.compile(module, backend="aot_eager", dynamic=False)
    for a, b in zip(run(compiled), run(module)):
        close(a, b, 1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_gradcheck(mixer):
    inputs = [v.requires_grad_() for v in scan_inputs(mixer, b=1, l=5, H=2, P=2, N=3)]
    assert torch.autograd.gradcheck(lambda *v: M.chunked_scan(*v, chunk=2), inputs)


@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_splits_anywhere(mixer):
    *inputs, state = scan_inputs(mixer, l=23)
    whole, end = M.chunked_scan(*inputs, state, chunk=5)
    for cut in (1, 5, 11, 22):
        first, rest = ([v[:, part] if v.ndim == 4 else v for v in inputs]   # A has no time axis
                       for part in (slice(cut), slice(cut, None)))
        y1, h = M.chunked_scan(*first, state, chunk=5)
        y2, h = M.chunked_scan(*rest, h, chunk=5)
        close(torch.cat([y1, y2], 1), whole)
        close(h, end)


@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_survives_strong_decay(mixer):
    """exp(-3000) is 0: nothing may be divided by it, in float32 and over many chunks."""
    x, delta, A, B, C, _ = (v.float() for v in scan_inputs(mixer, l=200))
    inputs = [v.requires_grad_() for v in (x, delta * 30, A * 100, B, C)]
    y, _ = M.chunked_scan(*inputs, chunk=16)
    want, _ = M.recurrence(*inputs)
    close(y, want, 1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


class LinearizedAttention(torch.nn.Module):
    """The teacher's attention without its softmax: O (tril(Q K^T / sqrt(head_dim)) V)."""

    def __init__(self, attention, rope):
        super().__init__()
        self.attention, self.rope = attention, rope

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        a = self.attention
        q, k, v = (proj(hidden_states).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
                   for proj in (a.q_proj, a.k_proj, a.v_proj))              # (b,heads,l,head_dim)
        if self.rope:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q @ k.mT * a.head_dim ** -0.5).tril()                     # (b,H,l,l)
        return a.o_proj((scores @ v).transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("kind,kv", [("llama", 2), ("llama", 4), ("mistral", 1), ("qwen2", 2),
                                     ("qwen2", 4)])
def test_recipe_linear_attention_is_linearized_attention(mixer, rope, kind, kv):
    teacher = make_teacher(kind, layers=3, kv=kv)
    student = M.convert_to_hybrid(teacher, [1], mixer, "linear_attention", rope=rope)
    for i in (0, 2):
        layer = teacher.model.layers[i]
        layer.self_attn = LinearizedAttention(layer.self_attn, rope)
    tokens = draw(2, 37)
    with torch.no_grad():
        close(student(tokens).logits, teacher(tokens).logits)


# ---------------------------------------------------------------------------------------------
# 3. Multi-step kernels: random schedules of decode and commit against the plain recurrence over
#    the accepted tokens only.
# ---------------------------------------------------------------------------------------------


@contextmanager
def kernels():
    """Where Triton kernels run: on the GPU, or on the CPU in the interpreter."""
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE):
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def sizes(mixer, H=4, GX=2, GB=2, P=16, N=16):
    p, n = (1, 1) if mixer == "mamba2" else (P, N)
    return dict(H=H, GX=GX, GB=GB, P=P, N=N, p=p, n=n)


def weights(s, skip, wide):
    A = -torch.rand(s["H"], s["p"], s["n"], dtype=wide) * 4 - 0.01
    bias = torch.randn(s["H"], s["p"], dtype=wide) - 1
    return A, bias, torch.randn(s["H"], s["p"], dtype=wide) if skip else None


def group(h, H, G, runs):
    return (h // (H // G * runs)) * runs + h % runs


def oracle(x, dt, B, C, A, bias, D, z, h, runs):
    """One token of one row in float64. x (Gx,P)  h (H,P,N) -> y (H,P), h"""
    H = C.shape[0]
    x = torch.stack([x[group(i, H, x.shape[0], runs)] for i in range(H)])
    B = torch.stack([B[group(i, H, B.shape[0], runs)] for i in range(H)])
    delta = torch.log1p(torch.exp(dt + bias))
    h = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
    y = (h * C[:, None]).sum(-1) + (0 if D is None else D * x)
    return y if z is None else y * z / (1 + torch.exp(-z)), h


def f64(v):
    return v if v is None else v.double()


def projection(b, T, s, gate, dtype):
    """x, dt, B, C, z as column slices of one tensor, as a layer's input projection gives them."""
    widths = [(s["GX"], s["P"]), (s["H"], s["p"]), (s["GB"], s["N"]), (s["H"], s["N"]),
              (s["H"], s["P"])]
    out = torch.randn(b, T, sum(g * w for g, w in widths), dtype=torch.float64).to(dtype)
    parts = out.split([g * w for g, w in widths], -1)
    x, dt, B, C, z = (v.unflatten(-1, gw) for v, gw in zip(parts, widths))
    return x, dt, B, C, z if gate else None


def empty_buffers(s, b, slots, dtype, wide):
    """The state and the rings of x, dt and B, as `multi_step` takes them."""
    return (torch.zeros(b, s["H"], s["P"], s["N"], dtype=wide),
            torch.zeros(b, slots, s["GX"], s["P"], dtype=dtype),
            torch.zeros(b, slots, s["H"], s["p"], dtype=wide),
            torch.zeros(b, slots, s["GB"], s["N"], dtype=dtype))


@kernels()
def schedule(mixer, dtype, impl, seed, ring=16, b=3, calls=12, runs=1, gate=True, skip=True,
             max_T=None, fixed=None, s=None, fold_at=None):
    """Run `calls` rounds; return the largest errors (outputs, final state), relative to the max."""
    s, fold_at = s or sizes(mixer), fold_at or ring
    torch.manual_seed(seed)
    rng, wide = random.Random(seed), torch.promote_types(dtype, torch.float32)
    A, bias, D = weights(s, skip, wide)
    state, *rings = empty_buffers(s, b, 2 * ring + rng.randrange(3), dtype, wide)
    counts = torch.zeros(3, b, dtype=torch.int32)
    h = [torch.zeros(s["H"], s["P"], s["N"], dtype=torch.float64) for _ in range(b)]
    pending = [[] for _ in range(b)]                # provisional tokens of each row
    worst, scale = 0.0, 1e-30

    def call(T, n_valid):
        nonlocal worst, scale
        base, length, waiting = counts
        flush = length - base + waiting + T > fold_at
        new = projection(b, T, s, gate, dtype)
        y = M.multi_step(*new[:4], A, bias, D, new[4], state, *rings, counts, fold_at, runs, impl)
        assert y.dtype == dtype and y.isfinite().all()
        for r in range(b):
            taken = T if n_valid is None else int(n_valid[r])
            g = h[r]
            for old in pending[r]:
                g = oracle(*old[:4], f64(A), f64(bias), f64(D), old[4], g, runs)[1]
            for t in range(taken):
                token = [f64(v if v is None else v[r, t]) for v in new]
                want, g = oracle(*token[:4], f64(A), f64(bias), f64(D), token[4], g, runs)
                worst = max(worst, (y[r, t].double() - want).abs().max().item())
                scale = max(scale, want.abs().max().item())
                pending[r].append(token)
        counts[0] = torch.where(flush, length, base)
        counts[2] += T if n_valid is None else n_valid

    def commit(accepted):
        for r in range(b):
            for old in pending[r][:accepted[r]]:
                h[r] = oracle(*old[:4], f64(A), f64(bias), f64(D), old[4], h[r], runs)[1]
            pending[r].clear()
        counts[1] += torch.tensor(accepted, dtype=torch.int32)
        counts[2] = 0

    for k in range(calls):
        room = ring
        for _ in range(rng.choice([1, 1, 2, 3])):   # several calls may stand before one commit
            if room == 0 or fixed and room < ring:
                break
            T = fixed[k % len(fixed)] if fixed else rng.randint(1, min(room, max_T or room))
            some = None if fixed or rng.random() < 0.5 else torch.tensor(
                [rng.randint(0, T) for _ in range(b)], dtype=torch.int32)
            call(T, some)
            room -= T
        commit([len(q) if fixed else rng.randint(0, len(q)) for q in pending])
    for _ in range(2):                              # a full ring folds everything into the state
        if ring > 0 and (counts[1] > counts[0]).any():
            call(ring, torch.zeros(b, dtype=torch.int32))
    want = torch.stack(h)
    error = (state.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
    return worst / scale, error.item()


@pytest.fixture
def small_tiles(monkeypatch):
    """Loops of several rounds where a launch of this size would take one; quicker to interpret."""
    monkeypatch.setattr(M, "tile_sizes", lambda mamba2, b, H, P, N, T, ring: (
        16, 16 if mamba2 else 2 ** (N - 1).bit_length() // 4,
        max(16, 2 ** (ring - 1).bit_length()) if mamba2 else 2,
        max(8, 2 ** (T - 1).bit_length()) if mamba2 else 1, True, 1, None, 2))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("ring", [1, 2, 5, 16])
@pytest.mark.parametrize("runs,gate,skip", [(1, True, True), (2, False, True), (1, True, False)])
def test_definition(mixer, ring, runs, gate, skip):
    for seed in range(2):
        y, h = schedule(mixer, torch.float64, "torch", seed, ring=ring, runs=runs, gate=gate,
                        skip=skip, s=sizes(mixer, H=8, GX=4, GB=2, P=3, N=5))
        assert y < 1e-10 and h < 1e-10


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("ring,runs,gate,skip", [(1, 1, True, True), (5, 2, True, False),
                                                 (16, 1, False, True), (16, 2, True, True),
                                                 (20, 1, True, True)])
def test_kernel_float32(mixer, ring, runs, gate, skip, small_tiles):
    y, h = schedule(mixer, torch.float32, "triton", ring, ring=ring, runs=runs, gate=gate,
                    skip=skip, b=2, calls=4)
    assert y < 1e-5 and h < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("ring", [1, 8])
def test_kernel_bfloat16(mixer, ring):
    """The state stays at fp32's precision, the outputs are rounded to bf16 once."""
    y, h = schedule(mixer, torch.bfloat16, "triton", 7, ring=ring, b=2, calls=4)
    assert y < 8e-3 and h < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("P,N", [(48, 32), (16, 80), (64, 64)])
def test_kernel_sizes(mixer, P, N, small_tiles):
    y, h = schedule(mixer, torch.float32, "triton", 3, ring=6, b=1, calls=4,
                    s=sizes(mixer, H=2, GX=2, GB=1, P=P, N=N))
    assert y < 1e-5 and h < 1e-5


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("impl,dtype", [("torch", torch.float64), ("triton", torch.float32)])
def test_flush_at_every_position(mixer, impl, dtype, small_tiles):
    for T in range(1, 6):                           # all accepted: the ring fills at another place
        y, h = schedule(mixer, dtype, impl, T, ring=5, b=1, calls=7, fixed=[T],
                        s=sizes(mixer, H=1, GX=1, GB=1))
        assert max(y, h) < (1e-10 if impl == "torch" else 1e-5)


@pytest.mark.parametrize("impl,dtype", [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("fold_at", [1, 3])
def test_mamba_may_fold_before_its_ring_is_full(fold_at, impl, dtype, small_tiles):
    """Also when the pending tokens alone, up to 7, are more than `fold_at`."""
    y, h = schedule("mamba", dtype, impl, fold_at, ring=7, b=2, calls=5, fold_at=fold_at)
    assert max(y, h) < (1e-10 if impl == "torch" else 1e-5)


@pytest.mark.parametrize("impl,dtype", [("torch", torch.float64), ("triton", torch.float32),
                                        ("triton", torch.bfloat16)])
@pytest.mark.parametrize("act", [True, False])
@kernels()
def test_conv(impl, dtype, act):
    """Rows bring and accept different numbers of tokens; what they do not bring is garbage."""
    rng, (b, c, W, ring) = random.Random(0), (3, 24, 4, 5)
    torch.manual_seed(0)
    weight, bias = torch.randn(c, W, dtype=dtype), torch.randn(c, dtype=dtype)
    ring_u = torch.zeros(b, 2 * ring + W - 1, c, dtype=dtype)
    counts, past = torch.zeros(3, b, dtype=torch.int32), [[] for _ in range(b)]
    for _ in range(12):
        T = rng.randint(1, ring)
        n_valid = torch.tensor([rng.randint(0, T) for _ in range(b)], dtype=torch.int32)
        u = torch.randn(b, T, c + 8, dtype=torch.float64).to(dtype)[..., 8:]
        out = M.conv_step(u, weight, bias, ring_u, counts, act, impl)
        for r in range(b):
            rows = past[r] + [v.double() for v in u[r, :n_valid[r]]]
            for t in range(n_valid[r]):
                window = ([torch.zeros(c).double()] * W + rows[:len(past[r]) + t + 1])[-W:]
                want = (torch.stack(window, 1) * weight.double()).sum(1) + bias.double()
                want = F.silu(want) if act else want
                tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
                torch.testing.assert_close(out[r, t].double(), want, atol=tol, rtol=tol)
            accepted = rng.randint(0, int(n_valid[r]))
            past[r] = rows[:len(past[r]) + accepted]
            counts[1, r] += accepted


@pytest.mark.skipif(DEVICE != "cpu", reason="CUDA tensors always take Triton")
def test_dispatch(monkeypatch):
    f32, f64 = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert not M.use_triton(None, f32), "models in these tests must not run the interpreter"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert M.use_triton(None, f32) and not M.use_triton(None, f64)
    assert M.use_triton("triton", f64) and not M.use_triton("torch", f32)


# ---------------------------------------------------------------------------------------------
# 4. Decoding and padding: prefill + decode + commit in any pattern = one forward.
# ---------------------------------------------------------------------------------------------


def left_pad(rows, filler=0):
    """Lists of ids of different lengths -> tokens, attention_mask (b,l), padded on the left."""
    l = max(map(len, rows))
    return (torch.tensor([[filler] * (l - len(r)) + r for r in rows]),
            torch.tensor([[0] * (l - len(r)) + [1] * len(r) for r in rows]))


def next_logits(model, row, n):
    """The last n logits of one unpadded row, by a plain forward. -> (n,V)"""
    logits = model(torch.tensor([row or [0]])).logits[0]
    return logits[len(logits) - n:]


def follow_schedule(student, seed, ring, rounds=6, prompts=(5, 1, 8), tol=1e-9):
    """Random decode and commit, every logit against a forward of the tokens that stand.

    Rows bring different numbers of tokens, accept different numbers, some of them 0; several
    decodes may stand before a commit. -> cache, the committed rows
    """
    rng = random.Random(seed)
    b, cache = len(prompts), M.MixerCache.allocate(student, len(prompts), 64, ring)
    rows = [[rng.randrange(V) for _ in range(n)] for n in prompts]
    if all(prompts):
        tokens, mask = left_pad(rows)
        logits = student.prefill(tokens, cache, mask)
        for r, row in enumerate(rows):
            close(logits[r, -1:], next_logits(student, row, 1), tol)
    for _ in range(rounds):
        pending, room = [[] for _ in rows], ring
        for _ in range(rng.choice([1, 1, 2, 3])):
            if room == 0:
                break
            T = rng.randint(1, room)
            room -= T
            tokens = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in rows])
            n_valid = None if rng.random() < 0.5 else torch.tensor(
                [rng.randint(0, T) for _ in rows], dtype=torch.int32)
            logits = student.decode(tokens, cache, n_valid)
            assert logits.shape == (b, T, V)
            for r in range(b):
                n = T if n_valid is None else int(n_valid[r])
                pending[r] += tokens[r, :n].tolist()
                close(logits[r, :n], next_logits(student, rows[r] + pending[r], n), tol)
        accepted = [rng.randint(0, min(len(p), 40 - len(row))) for p, row in zip(pending, rows)]
        cache.commit(torch.tensor(accepted))
        for row, p, n in zip(rows, pending, accepted):
            row += p[:n]
        assert cache.length.tolist() == [len(row) for row in rows]
    return cache, rows


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("recipe", list(M.RECIPES))
@pytest.mark.parametrize("ring", [1, 2, 5, 16])
@torch.no_grad()
def test_decode_is_forward(mixer, recipe, ring):
    follow_schedule(make_student(None, mixer, recipe, layers=2), seed=ring, ring=ring)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layers,fields", [
    ([0, 1], {}), ([], {}), ([1], dict(kv=4)), ([0], dict(kind="qwen2", kv=1)),
    ([1], dict(kind="mistral", sliding_window=4)), ([], dict(d_state=8)), ([1], dict(d_state=4)),
    ([1], dict(attn_implementation="eager"))])
@torch.no_grad()
def test_decode_is_forward_for_every_shape(mixer, layers, fields):
    """100 % and 0 % attention, teachers, a sliding window, d_state below head_dim, eager masks."""
    student = make_student(layers, mixer, layers=2, **fields)
    tol = 1e-4 if "attn_implementation" in fields else 1e-9     # eager softmax is always float32
    follow_schedule(student, seed=1, ring=6, tol=tol)
    follow_schedule(student, seed=2, ring=3, prompts=(0, 0), tol=tol)   # an empty cache is fine


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_cache_after_any_history_equals_fresh_prefill(mixer):
    student = make_student([1], mixer, layers=3)
    for seed in range(4):
        cache, rows = follow_schedule(student, seed, ring=4)
        fresh = M.MixerCache.allocate(student, len(rows), 64, ring=4)
        tokens, mask = left_pad(rows)
        student.prefill(tokens, fresh, mask)
        for step in range(3):
            new = draw(len(rows), 4, seed=step)
            close(student.decode(new, cache), student.decode(new, fresh))
            for c in (cache, fresh):
                c.commit(torch.tensor([3, 1, 0]))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("recipe", ["near_linear", "paper"])
@torch.no_grad()
def test_without_a_ring_every_token_stands(mixer, recipe):
    """Rows of different lengths, then token by token; a commit of nothing is allowed, n_valid and
    two tokens at once are not."""
    student, rows = make_student([1], mixer, recipe, layers=3), [
        draw(1, n)[0].tolist() for n in (3, 9, 1)]
    tokens, mask = left_pad(rows)
    cache = M.MixerCache.allocate(student, 3, 32, ring=0)
    student.prefill(tokens, cache, mask)
    for new in draw(3, 7, seed=5).split(1, 1):
        logits, rows = student.decode(new, cache), [a + b for a, b in zip(rows, new.tolist())]
        cache.commit([0, 0, 0])
        for row, got in zip(rows, logits):
            close(got[0], student(torch.tensor([row])).logits[0, -1])
    assert cache.length.tolist() == [10, 16, 8]
    with pytest.raises(ValueError, match="exceed the ring of 0"):
        student.decode(draw(3, 2), cache)
    with pytest.raises(ValueError, match="n_valid"):
        student.decode(draw(3, 1), cache, torch.tensor([1, 1, 0]))


@pytest.mark.parametrize("mixer,most", [("mamba", M.MAMBA_FOLD_AT), ("mamba2", 16)])
@torch.no_grad()
def test_when_tokens_are_folded(mixer, most):
    """Since its checkpoint Mamba keeps 8 tokens at most, Mamba2 what its ring holds."""
    student, tokens, logits, kept = make_student([1], mixer, layers=2), draw(1, 40), [], []
    cache = M.MixerCache.allocate(student, 1, 64, ring=16)
    for token in tokens.split(1, 1):
        logits.append(student.decode(token, cache))
        cache.commit([1])
        kept.append(int(cache.counts[1] - cache.counts[0]))
    close(torch.cat(logits, 1), student(tokens).logits)
    assert max(kept) == most


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_decoding_swaps_compute_the_same_and_are_undone(kind, monkeypatch):
    """In float32, where attention and products of up to 15 rows run as our own forms."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(M, "SMALL", 0)              # or no product of a toy is large enough
    student, tokens = make_student([1], kind=kind, layers=2, dtype=torch.float32), draw(1, 12)
    owners = [(student.model.config, "_attn_implementation"), (torch.nn.Linear, "forward")]
    before = [getattr(*owner) for owner in owners]
    with M.few_tokens(student, tokens, False):
        assert all(getattr(*owner) != old for owner, old in zip(owners, before))
    cache = M.MixerCache.allocate(student, 1, 64)
    logits = [student.decode(part, cache) for part in tokens.split([7, 1, 4], 1)]
    close(torch.cat(logits, 1), student(tokens).logits, 1e-4)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        student.decode(tokens + V, M.MixerCache.allocate(student, 1, 64))
    assert [getattr(*owner) for owner in owners] == before


def attention_definition(qkv, cos, sin, cache, window):
    """What `attention_step` computes, by the functions that a CPU decodes with, in float64."""
    qkv, cos, sin, G = qkv.double(), cos.double(), sin.double(), cache.layers[0].k.shape[1]
    q, k, v = qkv.split([qkv.shape[2] - 2 * G, G, G], 2)
    cache.layers = [M.AttentionState(*(x.double() for x in cache.layers[0]))]
    q, k = (M.apply_rope(x, cos, sin).transpose(1, 2) for x in (q, k))
    k, v = cache.update(k, v.transpose(1, 2), 0)
    t = (cache.counts[1] + cache.counts[2])[:, None] + torch.arange(q.shape[2])
    keys, t = torch.arange(k.shape[2]), t[:, None, :, None]
    seen = (keys <= t) & (keys > t - (window or 1000))
    mask = torch.zeros(seen.shape).double().masked_fill(~seen, -math.inf)
    return M.attend_in_groups(None, q, k, v, mask, q.shape[-1] ** -0.5)[0]


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("H,G,d,T,splits,window", [
    (4, 2, 16, 1, 1, None), (6, 2, 24, 5, 2, None), (3, 3, 16, 6, 4, 7), (8, 1, 32, 3, 1, 2),
    (4, 1, 16, 18, 2, 20), (9, 3, 64, 2, 8, None)])
@kernels()
def test_attention_kernel(H, G, d, T, splits, window, dtype, tol, monkeypatch):
    """Rows of 0 to 44 tokens, some of them pending, that bring fewer than T; padding of all kinds
    (heads of 24, 20 queries in tiles of 16); more splits than columns; windows within new tokens.
    """
    monkeypatch.setattr(M, "attention_tiles", lambda *shape: (16, 16, 4, 2, splits))
    torch.manual_seed(T)
    b, counts = 4, torch.tensor([[0] * 4, [0, 3, 17, 40], [0, 1, 0, 4]], dtype=torch.int32)
    kept = M.AttentionState(*torch.randn(2, b, G, 72, d).to(dtype))
    cache, n_valid = M.MixerCache([kept], counts, 16, 66), torch.tensor([T, 1, T - 1, T])
    cache.columns = 1
    t = torch.arange(T)
    cache.positions = (counts[1:].sum(0)[:, None] + t).masked_fill(t >= n_valid[:, None], 66)
    qkv = torch.randn(b, T, H + 2 * G, d).to(dtype)
    angle = torch.randn(b, T, d // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    twin = copy.deepcopy(cache)
    got = M.attention_step(qkv, cos, sin, kept, cache, d ** -0.5, window)
    want = attention_definition(qkv, cos, sin, twin, window)
    assert got.dtype == dtype and not got.isnan().any()
    real = t < n_valid[:, None]                                          # (b,T)
    close(got[real].double(), want[real], tol)
    for mine, theirs in zip(kept, twin.layers[0]):
        close(mine[:, :, :66].double(), theirs[:, :, :66], tol)


@pytest.mark.parametrize("layers,fields", [
    ([0, 1], dict(kv=1)), ([1], dict(kind="mistral", sliding_window=4)), ([0, 1], dict(
        kind="qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1))])
@torch.no_grad()
def test_decode_by_the_attention_kernel(layers, fields, monkeypatch):
    """Whole models in float32, every logit against a forward; both layers of a mixed model."""
    calls, step = [], M.attention_step
    monkeypatch.setattr(M, "attention_tiles", lambda *shape: (16, 16, 4, 2, 2))
    monkeypatch.setattr(M, "attention_step", lambda *args: calls.append(args[-1]) or step(*args))
    with kernels():
        student = make_student(layers, layers=2, dtype=torch.float32, **fields)
        follow_schedule(student, seed=1, ring=6, rounds=4, tol=1e-3)
        follow_schedule(student, seed=2, ring=3, rounds=2, prompts=(0, 0), tol=1e-3)
    assert set(calls) == ({None, 3} if "max_window_layers" in fields else
                          {fields.get("sliding_window")})


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_layer_kernels(dtype, tol):
    """Norm, RoPE and scale: two rows of three tokens, slices of a wider tensor, one token (whose
    strides say nothing), widths that are no power of two."""
    with kernels():
        torch.manual_seed(0)
        x, weight = torch.randn(2, 3, 24).to(dtype), torch.randn(24).to(dtype)
        normed = M.norm_by_kernel(SimpleNamespace(weight=weight, variance_epsilon=1e-5), x)
        close(normed.double(), F.rms_norm(x.double(), (24,), weight.double(), 1e-5), tol)
        for T in 3, 1:
            v = torch.randn(2, T, 100).to(dtype)[..., 20:92].view(2, T, 3, 24)
            angle = torch.randn(2, T, 12).repeat(1, 1, 2)
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            want = M.apply_rope(*(w.double() for w in (v, cos, sin)))
            want[:, :, 1:] *= 0.5
            close(M.rope_by_kernel(v, cos, sin, 1, 0.5).double(), want, tol)


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("b,T", [(1, 1), (2, 4), (3, 3), (4, 4), (3, 6)])
@torch.no_grad()
def test_product_kernel(dtype, tol, b, T, monkeypatch):
    """1, 8, 9 and 16 rows in one launch, 18 by parts: every factor and summand, widths that fit no
    tile, x also as columns of a wider tensor; against float64."""
    launch, launched = M.launch, []
    monkeypatch.setattr(M, "launch", lambda kernel, *args, **more: (
        launched.append(kernel), launch(kernel, *args, **more)))
    with kernels():
        torch.manual_seed(b * T)
        n, k = 40, 300
        wide, total, bias = (torch.randn(shape).to(dtype) for shape in (
            (b, T, k + 9), (b, T, n), (n,)))
        W, gate = (torch.randn(2, n, k) / k ** 0.5).to(dtype)
        for x in (wide[..., :k], wide[..., 9:].contiguous()):
            for parts in ({}, {"bias": bias}, {"total": total}, {"bias": bias, "total": total},
                          {"gate": gate}):
                want = x.double() @ W.double().T
                if "gate" in parts:
                    want = want * F.silu(x.double() @ gate.double().T)
                for part in parts.keys() & {"bias", "total"}:
                    want = want + parts[part].double()
                own = {name: v.clone() for name, v in parts.items()}    # total is changed
                y = M.product_by_kernel(x, W, **own)
                close(y.double(), want, tol)
                assert y is own.get("total", y)
    assert launched.count(M.product_kernel) == (10 if b * T <= 16 else 0)


class Adapted(torch.nn.Linear):
    """A linear layer that is more than its weight, as an adapter's is."""

    def forward(self, x):
        return super().forward(2 * x)


def adapted(model):
    """An adapter on q."""
    model.model.layers[1].self_attn.q_proj.__class__ = Adapted


def hooked(model):
    """A hook on an MLP."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, y: 2 * y)


def hooked_before(model):
    """A hook before the last norm."""
    model.model.norm.register_forward_pre_hook(lambda module, inputs: 2 * inputs[0])


def other_norm(model):
    """A norm of another class."""
    class Norm(type(model.model.norm)):
        def forward(self, x):
            return 2 * super().forward(x)
    model.model.layers[0].input_layernorm.__class__ = Norm


def other_trunk(model):
    """A trunk of another class."""
    class Trunk(type(model.model)):
        def forward(self, *args, **more):
            out = super().forward(*args, **more)
            out.last_hidden_state = 2 * out.last_hidden_state
            return out
    model.model.__class__ = Trunk


def transposed(model):
    """A weight whose rows do not lie in a row."""
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.T.contiguous().T)


def replaced(model):
    """Another forward of one norm only."""
    norm = model.model.layers[1].post_attention_layernorm
    norm.forward = lambda x, forward=norm.forward: 2 * forward(x)


@pytest.mark.parametrize("change,fields", [
    (None, dict(mlp_bias=True)), (None, dict(hidden_act="gelu")), (adapted, {}), (hooked, {}),
    (hooked_before, {}), (replaced, {}), (other_norm, {}), (other_trunk, {}), (transposed, {})])
@torch.no_grad()
def test_decode_of_layers_that_the_kernels_do_not_serve(change, fields):
    """The mixers' kernels run, attention and MLP stay transformers' own."""
    with kernels():
        student = make_student([1], layers=2, dtype=torch.float32, **fields)
        if change:
            change(student)
        assert not M.MixerCache.allocate(student, 1).kernels_serve
        follow_schedule(student, seed=1, ring=4, rounds=2, tol=1e-3)


@torch.no_grad()
def test_hooks_that_leave_the_kernels_right():
    """transformers' own, which record outputs and stay, and those of a module that is called."""
    with kernels():
        student, tokens = make_student([1], layers=2, dtype=torch.float32), draw(1, 9).to(DEVICE)
        student.model(tokens, output_hidden_states=True, use_cache=False)
        student.model.embed_tokens.register_forward_hook(lambda module, inputs, x: 2 * x)
        assert M.MixerCache.allocate(student, 1).kernels_serve
        follow_schedule(student, seed=1, ring=4, rounds=2, tol=1e-3)


def test_a_gpu_model_without_kernels_keeps_its_linear_layers():
    """float64, autocast, no Triton: nn.Linear is only swapped for `layers_by_kernels` or a CPU."""
    model, forward = make_student([1], layers=2), torch.nn.Linear.forward
    with M.few_tokens(model, SimpleNamespace(is_cuda=True, numel=lambda: 1), False):
        assert torch.nn.Linear.forward is forward
    with M.few_tokens(model, SimpleNamespace(is_cuda=True, numel=lambda: 1), True):
        assert torch.nn.Linear.forward is M.linear_of_few
    assert torch.nn.Linear.forward is forward


def test_tiles_are_wide_enough_for_products():
    """On a GPU a product takes 16 terms or more, in the interpreter any number."""
    for N in 4, 8, 12, 16, 64, 128:
        _, BN, BR, *_ = M.tile_sizes(True, 1, 4, N, N, 1, 4)
        assert BN >= 16 and BR >= 16


@torch.no_grad()
def test_qwen2_slides_only_in_layers_that_say_so():
    """A window in the configuration, and layer types that never use it."""
    student = make_student([0, 1], kind="qwen2", layers=2, use_sliding_window=True,
                           sliding_window=3, max_window_layers=2)
    follow_schedule(student, seed=1, ring=4, rounds=2)


@pytest.mark.parametrize("mixer", MIXERS)
def test_single_step_is_the_recurrence(mixer):
    """One token, in place, for two rows: outputs and the state that it moves."""
    x, delta, A, B, C, state = scan_inputs(mixer, l=1)
    want, after = M.recurrence(x, delta, A, B, C, state)
    close(M.single_step(x, delta, A, B, C, state), want)
    close(state, after)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_of_few(biased):
    """Small products as they are, large ones by blocks of 32 outputs and a rest."""
    for n, k, dtype in ((6, 96, torch.float32), (1216, 96, torch.float32),
                        (1545, 96, torch.float32), (1216, 96, torch.bfloat16)):
        linear = torch.nn.Linear(k, n, bias=biased).to(dtype)
        for x in (torch.randn(1, 1, k).to(dtype), torch.randn(2, 3, k).to(dtype)):
            y = M.linear_of_few(linear, x)
            close(y, linear(x), 1e-5)
            assert y.is_contiguous()


@torch.no_grad()
def test_cache_reorders_its_rows():
    student = make_student([1], "mamba2", layers=2)
    cache, rows = follow_schedule(student, 0, ring=4)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    rows = [rows[2], rows[2], rows[0]]
    new = draw(3, 2)
    logits = student.decode(new, cache)
    for r in range(3):
        close(logits[r], next_logits(student, rows[r] + new[r].tolist(), 2))


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layers", [[], [1], [0, 1]])
@pytest.mark.parametrize("recipe", ["near_linear", "paper"])
@torch.no_grad()
def test_padded_batch_equals_its_rows_and_padding_cannot_leak(mixer, layers, recipe):
    student = make_student(layers, mixer, recipe, layers=2)
    rows = [draw(1, n, n)[0].tolist() for n in (3, 9, 1)]
    for filler in (0, 55):                          # what stands in the padding does not matter
        tokens, mask = left_pad(rows, filler)
        logits = student(tokens, attention_mask=mask).logits
        cache = M.MixerCache.allocate(student, 3, 64)
        prefilled = student.prefill(tokens, cache, mask, logits_to_keep=0)
        shifted = [torch.tensor([r + [filler] * (9 - len(r)) for r in rows]), mask.flip(1)]
        right = student(shifted[0], attention_mask=shifted[1]).logits
        for r, row in enumerate(rows):
            want = next_logits(student, row, len(row))
            close(logits[r, -len(row):], want)
            close(prefilled[r, -len(row):], want)
            close(right[r, :len(row)], want)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_model_is_causal(mixer):
    student, tokens = make_student([1], mixer, layers=2), draw(1, 20)
    other = tokens.clone()
    other[:, 12] = (other[:, 12] + 1) % V
    a, b = student(tokens).logits[0], student(other).logits[0]
    close(a[:12], b[:12])
    assert (a[12:] - b[12:]).abs().amax(-1).min() > 1e-6, "every later token sees the change"


# ---------------------------------------------------------------------------------------------
# 5. Conversion (Algorithm 1).
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("recipe", list(M.RECIPES))
@pytest.mark.parametrize("kind,kv,d_state", [("llama", 2, None), ("mistral", 4, 8),
                                             ("qwen2", 2, None), ("qwen2", 1, 4)])
def test_conversion_copies_exactly_the_right_rows(mixer, recipe, kind, kv, d_state):
    """in_proj's rows are z, x, B, C, dt: V, K, Q land in x, B, C, and nothing else comes from
    the teacher: conversions of two teachers by one seed agree in all other rows."""
    students, teachers = [], [make_teacher(kind, layers=2, kv=kv, seed=s) for s in (0, 1)]
    for teacher in teachers:
        before = parameters_of(teacher)
        torch.manual_seed(7)
        students.append(M.convert_to_hybrid(teacher, [1], mixer, recipe, d_state))
        assert same(before, parameters_of(teacher)), "the teacher changed"
    a, b = (s.model.layers[0].self_attn for s in students)
    attention = teachers[0].model.layers[0].self_attn
    z, kv_width = 0 if recipe == "linear_attention" else 64, kv * 16
    x, B, C, end = z, z + kv_width, z + 2 * kv_width, z + 2 * kv_width + 64
    if recipe == "random":
        for p, q in zip(a.parameters(), b.parameters()):
            assert torch.equal(p, q), "a random mixer knows nothing of its teacher"
    else:
        for source, where in ((attention.v_proj, slice(x, B)), (attention.k_proj, slice(B, C)),
                              (attention.q_proj, slice(C, end))):
            assert torch.equal(a.in_proj.weight[where], source.weight)
            bias = torch.zeros(len(source.weight)).double() if source.bias is None else source.bias
            assert torch.equal(a.in_proj.bias[where], bias)
        assert torch.equal(a.out_proj.weight, attention.o_proj.weight)
        for p, q in ((a.in_proj.weight, b.in_proj.weight), (a.in_proj.bias, b.in_proj.bias)):
            assert torch.equal(p[:x], q[:x]) and torch.equal(p[end:], q[end:])
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            assert "proj.weight" in name or "proj.bias" in name or torch.equal(p, q)
    theirs = parameters_of(teachers[0])             # everything around the mixers is copied
    ours = {k: v for k, v in parameters_of(students[0]).items() if "layers.0.self_attn" not in k}
    assert set(ours) == {k for k in theirs if "layers.0.self_attn" not in k}
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_keeping_every_layer_is_the_teacher(kind, tied):
    teacher = make_teacher(kind, layers=2, tied=tied)
    student, tokens = M.convert_to_hybrid(teacher, [1, 0]), draw(2, 11)
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_conversion_defaults_and_types():
    teacher = make_teacher(dtype=torch.bfloat16)
    student = M.convert_to_hybrid(teacher)
    assert list(student.config.attn_layers) == [1, 3]
    mixers = {i: layer.self_attn for i, layer in enumerate(student.model.layers)
              if not hasattr(layer.self_attn, "q_proj")}
    assert sorted(mixers) == [0, 2]
    assert mixers[0].in_proj.weight.dtype == torch.bfloat16
    assert mixers[0].A_log.dtype == mixers[0].dt_bias.dtype == torch.float32
    for share, want in ((0, []), (0.5, [1, 3]), (0.25, [3]), (1, [0, 1, 2, 3]), (0.75, [1, 2, 3])):
        assert M.attention_layers(share, 4) == want
    assert M.attention_layers(0.125, 32) == [7, 15, 23, 31]


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_hybrid_stays_close_to_float32(mixer):
    """States and decays are fp32 whatever the weights are."""
    student = make_student([1], mixer, layers=2, dtype=torch.float32)
    tokens = draw(2, 40)
    with torch.no_grad():
        want = student(tokens).logits
        low = copy.deepcopy(student).bfloat16()
        got = low(tokens).logits
        cache = M.MixerCache.allocate(low, 2, 64)
        stepped = low.prefill(tokens, cache)[:, 0]
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    close = 0.1 * want.abs().max()
    assert (got - want).abs().max() < close and (stepped - got[:, -1]).abs().max() < close


# ---------------------------------------------------------------------------------------------
# 6. Losses (Eq. 2 and Eq. 4).
# ---------------------------------------------------------------------------------------------


def logits64(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_distillation_loss_by_hand():
    """Two words, two predicted tokens, the second unlabelled.

    p_T = (1/2, 1/2) (logits 0, 0), p_S = (3/4, 1/4) (logits ln 3, 0), label 0:
    CE = -ln(3/4); KL[p_T || p_S] = 1/2 ln(1/2 / 3/4) + 1/2 ln(1/2 / 1/4) = 1/2 ln(4/3).
    """
    student = torch.tensor([[[math.log(3), 0.0], [5.0, -5.0], [1.0, 2.0]]])
    teacher = torch.zeros(1, 3, 2)
    labels = torch.tensor([[1, 0, -100]])           # labels[:, 0] is predicted by nothing
    loss, parts = M.distillation_loss(student, teacher, labels, alpha=2.0, beta=0.5)
    ce, kl = math.log(4 / 3), 0.5 * math.log(4 / 3)
    assert parts["ce"].item() == pytest.approx(ce, abs=1e-6)
    assert parts["kl"].item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(2 * ce + 0.5 * kl, abs=1e-6) and parts["tokens"] == 1


def test_distillation_loss_special_cases():
    logits, labels = logits64(2, 7, V), draw(2, 7)
    assert M.distillation_loss(logits, logits + 3.0, labels)[1]["kl"].abs() < 1e-12
    other = logits64(2, 7, V, seed=1)
    assert M.distillation_loss(logits, other, labels)[1]["kl"] > 0.1
    none = torch.full_like(labels, -100)
    logits.requires_grad_()
    loss, parts = M.distillation_loss(logits, other, none)
    assert loss == 0 and parts["tokens"] == 0
    assert not torch.autograd.grad(loss, logits)[0].any()
    half = labels.clone()
    half[1] = -100                                  # mean over labelled tokens, not over rows
    one = M.distillation_loss(logits[:1], other[:1], labels[:1])[0]
    close(M.distillation_loss(logits, other, half)[0], one)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_chunked_loss_and_gradients_are_the_plain_ones(chunk, labelled):
    labels = draw(2, 9)
    labels[torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) >= labelled] = -100
    leaves = [logits64(2, 9, 6, seed=1), logits64(V, 6, seed=2)]        # hidden states, head
    t_hidden, t_head = logits64(2, 9, 8, seed=3), logits64(V, 8, seed=4)
    results = []
    for chunked in (False, True):
        hidden, head = (v.clone().requires_grad_() for v in leaves)
        if chunked:
            loss, parts = M.chunked_distillation_loss(hidden, t_hidden, head, t_head, labels,
                                                      0.7, 0.3, chunk)
        else:
            loss, parts = M.distillation_loss(hidden @ head.T, t_hidden @ t_head.T, labels,
                                              0.7, 0.3)
        results.append((loss, parts["ce"], parts["kl"], *torch.autograd.grad(
            loss, (hidden, head), allow_unused=True)))
    for a, b in zip(*results):
        a, b = (torch.zeros(()) if v is None else v.detach().double() for v in (a, b))
        assert torch.allclose(a, b, atol=1e-10)
    assert (results[0][0] == 0) == (labelled == 0)


def test_token_losses_against_torch():
    s, t, y = logits64(11, V), logits64(11, V, seed=1), draw(1, 11)[0]
    ce, kl = M.token_losses(s, t, y)
    close(ce, F.cross_entropy(s, y, reduction="none"))
    close(kl, F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True,
                       reduction="none").sum(-1))
    assert not M.token_losses(s, None, y)[1].any()
    assert M.token_losses(s.bfloat16(), t.bfloat16(), y)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("words", [37, 5000])
def test_token_losses_kernel(words, with_teacher, dtype):
    """One token to several blocks of words, both losses, and the gradient of a weighted sum."""
    with kernels():
        torch.manual_seed(0)
        s, t = (10 * torch.randn(2, 7, words)).to(dtype)
        y, g = torch.arange(7) * 5, torch.randn(2, 7)
        s[2, 3], t[3, 4] = 60, 90                   # near-certain words: no overflow
        t, results = t if with_teacher else None, []
        for losses, wide in (M.token_losses, torch.float64), (M.TokenLosses.apply, dtype):
            x = s.to(wide).requires_grad_()
            ce, kl = losses(x, t if t is None else t.to(wide), y)
            (g[0] * ce + g[1] * kl).sum().backward()
            results.append([v.detach().double() for v in (ce, kl, x.grad)])
    exact = 1e-5 if dtype == torch.float32 else 5e-3
    for want, got, tolerance in zip(*results, (1e-4, 1e-4, exact)):
        assert (want - got).abs().max() <= tolerance * (1 + want.abs().max())


def test_loss_of_the_forward_is_a_mean_or_a_share():
    """As a Trainer that accumulates gradients asks for: the sum over its count of labels."""
    student, tokens = make_student([1], layers=2, dtype=torch.float32), draw(2, 8)
    out = student(tokens, labels=tokens)
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    close(out.loss, want, 1e-5)
    close(student(tokens, labels=tokens, num_items_in_batch=100).loss, want * 14 / 100, 1e-5)


def test_sequence_logps_sums_labelled_tokens():
    logits, labels = logits64(2, 5, V), draw(2, 5)
    labels[0, 3:] = -100
    labels[1, :] = -100
    logp = logits.log_softmax(-1)
    want = logp[0, 0, labels[0, 1]] + logp[0, 1, labels[0, 2]]
    close(M.sequence_logps(logits, labels), torch.stack([want, torch.zeros_like(want)]))


def test_dpo_loss_by_hand():
    """Equal models: -log sigmoid(0) = log 2. Margins 3 and -1, beta 1/2:
    -log sigmoid(1/2 (3 - -1)) = log(1 + e^-2), rewards 3/2 and -1/2."""
    p = torch.tensor([-5.0, -9.0])
    losses, chosen, rejected = M.dpo_loss(p, p - 1, p, p - 1)
    assert losses.shape == (2,) and torch.allclose(losses, torch.full((2,), math.log(2)))
    assert not chosen.any() and not rejected.any()
    one = torch.ones(1)
    losses, chosen, rejected = M.dpo_loss(-2 * one, -8 * one, -5 * one, -7 * one, beta=0.5)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-6)
    assert (chosen.item(), rejected.item()) == (1.5, -0.5)


# ---------------------------------------------------------------------------------------------
# 7. Evaluation.
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_len", [0, 1, 7])
@torch.no_grad()
def test_evaluate_against_a_direct_computation(prefix_len):
    teacher = make_teacher(layers=2)
    student, tokens = M.convert_to_hybrid(teacher, [1]), draw(5, 12)
    got = M.evaluate(student, teacher, tokens, prefix_len, batch_size=2)
    first = max(prefix_len, 1)
    s, t = (m(tokens).logits[:, first - 1:-1].log_softmax(-1).flatten(0, 1)
            for m in (student, teacher))
    y = tokens[:, first:].flatten()
    nats, teacher_nats = F.nll_loss(s, y).item(), F.nll_loss(t, y).item()
    want = {"perplexity": math.exp(nats), "teacher_perplexity": math.exp(teacher_nats),
            "ratio": math.exp(nats - teacher_nats), "kl": (t.exp() * (t - s)).sum(-1).mean().item(),
            "agreement": (s.argmax(-1) == t.argmax(-1)).double().mean().item()}
    assert got == pytest.approx(want, rel=1e-5)
    assert got["kl"] > 0.01 and got["agreement"] < 1


@torch.no_grad()
def test_choose_layers_finds_what_the_mixers_broke():
    """Mixers of zeros in all layers but one, which computes what its attention does: that one is
    worth nothing, and of the others the KL that comes back is what a direct look says."""
    teacher = make_teacher(layers=3)
    student, tokens = M.convert_to_hybrid(teacher, []), draw(6, 12)
    for mixer in student.mixers().values():
        mixer.out_proj.weight.zero_()
    teacher.model.layers[1].self_attn.o_proj.weight.zero_()
    before = parameters_of(student)
    keep, scores = M.choose_layers(student, teacher, 2, tokens, tokens)
    assert keep == [0, 2] and scores[1] == pytest.approx(0, abs=1e-9)
    assert min(scores[0], scores[2]) > 1e-3 and same(before, parameters_of(student))
    restored = M.convert_to_hybrid(teacher, [2])
    for mixer in restored.mixers().values():
        mixer.out_proj.weight.zero_()
    kl = [M.evaluate(m, teacher, tokens)["kl"] for m in (student, restored)]
    assert scores[2] == pytest.approx(kl[0] - kl[1], abs=1e-9)


@torch.no_grad()
def test_choose_layers_takes_the_earlier_rounds_into_account():
    """In three rounds: the greedy choice among whole hybrids; scores of one round pick others."""
    teacher, tokens = make_teacher(layers=6), draw(6, 12)
    student = M.convert_to_hybrid(teacher, [])
    mixers = student.mixers()
    for mixer, scale in zip(mixers.values(), (0.01, 0.32, 0.86, 0.08, 1.41, 0.18)):
        mixer.out_proj.weight *= scale

    def kl(kept):
        """What `evaluate` says of the hybrid that keeps these layers and has these mixers."""
        hybrid = M.convert_to_hybrid(teacher, kept)
        for i, mixer in hybrid.mixers().items():
            mixer.load_state_dict(mixers[i].state_dict())
        return M.evaluate(hybrid, teacher, tokens)["kl"]

    greedy = []
    for _ in range(3):
        greedy.append(min(set(range(6)) - {*greedy}, key=lambda i: kl([*greedy, i])))
    choices = [M.choose_layers(student, teacher, 3, tokens, tokens, rounds)[0] for rounds in (3, 1)]
    assert choices[0] == sorted(greedy) != choices[1]


def test_greedy_agreement():
    teacher, prompts = make_teacher(layers=2, dtype=torch.float32), draw(5, 6).tolist()
    prompts[0] = prompts[0][:3]                     # rows of different lengths
    student = M.convert_to_hybrid(teacher, [0, 1])
    same = M.greedy_agreement(student, teacher, prompts, n=9)
    assert same == {"common_prefix": 9, "identical": 1, "prompts": 5}
    student.lm_head.weight.data = student.lm_head.weight.data.roll(1, 0)    # other words always
    other = M.greedy_agreement(student, teacher, prompts, n=9)
    assert other == {"common_prefix": 0, "identical": 0, "prompts": 5}


def test_evaluate_teacher_against_itself():
    teacher = make_teacher(layers=2).train()
    got = M.evaluate(teacher, teacher, draw(3, 9))
    assert got["ratio"] == 1 and got["kl"] == pytest.approx(0, abs=1e-12) and got["agreement"] == 1
    assert teacher.training, "evaluate leaves the mode as it was"


# ---------------------------------------------------------------------------------------------
# 8. Training: what moves, what stops it, what a kill costs.
# ---------------------------------------------------------------------------------------------


def test_batch_rows_covers_each_row_once_an_epoch():
    for n, size in ((10, 3), (4, 8), (7, 7)):
        drawn = torch.cat([M.batch_rows(n, size, step) for step in range(3 * n)])
        assert len(drawn) == 3 * n * size
        epochs = drawn.view(-1, n)
        assert (epochs.sort(-1).values == torch.arange(n)).all()
        assert len({tuple(e.tolist()) for e in epochs}) > 1, "epochs are shuffled anew"
    assert torch.equal(M.batch_rows(10, 3, 5), M.batch_rows(10, 3, 5))
    assert not torch.equal(M.batch_rows(100, 50, 5, seed=0), M.batch_rows(100, 50, 5, seed=1))


def test_seed_reaches_the_order_of_rows_and_the_pseudo_labels(monkeypatch, tmp_path):
    """--seed: what a stage trains on, and what the teacher writes."""
    monkeypatch.chdir(tmp_path)                     # --tiny replaces ./tiny_run
    seeds = []
    monkeypatch.setattr(M, "batch_rows", lambda *args: seeds.append(args[-1]) or torch.arange(2))
    monkeypatch.setattr(M, "sample", lambda *args, seed, **options: seeds.append(seed) or 1 / 0)
    args = M.parse_args(["--tiny", "--seed", "7"])
    args.batch, args.prompts, data = 2, None, M.Data((draw(4, 8), draw(4, 8)), ())
    for stage in M.STAGES[:3]:
        M.train_stage(stage, 1e-4, make_student([1], layers=2), make_teacher(layers=2), data, args,
                      M.Progress())
    with pytest.raises(ZeroDivisionError):
        M.real_data(None, SimpleNamespace(user_start=[1]), args)
    assert set(seeds) == {7} and len(seeds) >= 4    # three stages and the labels


@pytest.mark.parametrize("mixer", MIXERS)
def test_stage_one_moves_mixers_only(mixer):
    teacher = make_teacher(layers=3, dtype=torch.float32)
    student, tokens = M.convert_to_hybrid(teacher, [1], mixer), draw(8, 24)
    mine = {n for n, _ in student.named_parameters() if re.search(r"layers\.[02]\.self_attn", n)}
    before, theirs, seen = parameters_of(student), parameters_of(teacher), []
    handle = student.model.layers[0].self_attn.in_proj.weight.register_post_accumulate_grad_hook(
        lambda _: seen.append({n: p.grad is None for n, p in student.named_parameters()}))
    M.distil("stage 1", student, teacher, tokens, tokens, steps=3, batch_size=4, only_mixers=True)
    handle.remove()
    after = parameters_of(student)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in mine if n in moved} and len(moved) >= len(mine) - 2
    assert len(seen) == 3 and all(missing for step in seen for n, missing in step.items()
                                  if n not in mine), "MLP gradients must stay None"
    assert same(theirs, parameters_of(teacher))
    M.distil("stage 2", student, teacher, tokens, tokens, steps=1, batch_size=4)
    final = parameters_of(student)
    assert all(not torch.equal(after[n], final[n]) for n in final if "mlp" in n)
    assert same(theirs, parameters_of(teacher)), "the student shares weights with its teacher"


@pytest.mark.parametrize("mixer", MIXERS)
def test_alignment_lowers_its_loss_and_the_kl(mixer):
    teacher = make_teacher(layers=3, dtype=torch.float32)
    student, tokens = M.convert_to_hybrid(teacher, [1], mixer), draw(32, 24)
    before, others = M.evaluate(student, teacher, tokens), parameters_of(student)
    history = M.align_mixers(student, teacher, tokens, steps=40, batch_size=8, lr=3e-3)
    after = M.evaluate(student, teacher, tokens)
    assert [step for step, _ in history] == list(range(40))
    losses = [loss for _, loss in history]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and after["kl"] < before["kl"]
    assert all(torch.equal(v, others[n]) for n, v in parameters_of(student).items()
               if "mlp" in n or "embed" in n)
    assert not teacher.model.layers[0].self_attn._forward_hooks, "hooks must be taken off again"
    assert M.align_mixers(M.convert_to_hybrid(teacher, [0, 1, 2]), teacher, tokens, 5) == []


def test_dpo_raises_the_margin():
    teacher = make_teacher(layers=2, dtype=torch.float32)
    student = M.convert_to_hybrid(teacher, [1])
    chosen, rejected = ((t, t) for t in (draw(8, 12, 1), draw(8, 12, 2)))
    history = M.dpo(student, teacher, chosen, rejected, steps=15, batch_size=8, lr=1e-3)
    assert history[-1][1] < 0.5 * history[0][1]
    assert M.reward_accuracy(student, teacher, chosen, rejected) == 1
    assert M.reward_accuracy(student, teacher, rejected, chosen) == 0


@pytest.fixture
def signals():
    """Progress catches SIGTERM and Ctrl-C: give them back after the test."""
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in old.items():
        signal.signal(s, handler)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(bad, tmp_path, signals):
    student = make_student([1], layers=2, dtype=torch.float32)
    progress, tokens, seen = M.Progress(str(tmp_path), every=0), draw(2, 8), {}

    def loss_of_rows(mine, rows):
        loss = student(tokens, labels=tokens).loss
        if len(progress.state.get("history", [])) == 2:
            seen.update(parameters_of(student), file=(tmp_path / "progress.pt").read_bytes())
            loss = loss * bad
        return loss

    with pytest.raises(FloatingPointError, match="step 3") as caught:
        M.train("stage 2", student, student, loss_of_rows, tokens, 5, 2, 1e-3,
                progress=progress)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "progress.pt").read_bytes() == seen.pop("file")
    assert same(seen, parameters_of(student)), "the step with the bad loss was taken"
    saved = torch.load(tmp_path / "progress.pt", weights_only=True)
    assert same(seen, saved["student"]) and len(saved["history"]) == 2


@pytest.mark.parametrize("compiling, least", [(0, 2), (0.6, 3)])
def test_train_stops_after_its_seconds_without_the_first_step(compiling, least):
    """The first step compiles, for longer than the whole run may take, and is not counted."""
    student, tokens = make_student([1], layers=2, dtype=torch.float32), draw(2, 8)
    pause = [compiling]

    def loss_of_rows(mine, rows):
        time.sleep(pause.pop() if pause else 0)
        return student(tokens, labels=tokens).loss

    start = time.monotonic()
    history = M.train("timed", student, student, loss_of_rows, tokens, 10 ** 9, 2, 1e-3,
                      seconds=0.5)
    assert 0.4 < time.monotonic() - start < 5 and len(history) >= least


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A directory as users have it: a tiny teacher with tokenizer and chat template, JSONL and npz
    files. -> dict of paths, and the Chat"""
    root = tmp_path_factory.mktemp("world")
    tokenizer, pairs, *_ = M.tiny_world()
    chat = M.Chat(tokenizer)
    pairs = [(" ".join(q.split()[:3]), " ".join(a.split()[:6])) for q, a in pairs]
    text = [t for q, a in pairs[:400] for ids in chat.pair(q, a) for t in ids]
    teacher = M.tiny_teacher(len(tokenizer), torch.tensor(text), steps=60)  # knows where turns end
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    rows = {"prompts": [{"prompt": q} for q, _ in pairs[:24]],
            "sft": [{"prompt": q, "response": a} for q, a in pairs[:12]] +
                   [{"messages": [{"role": "user", "content": q},
                                  {"role": "assistant", "content": a}]} for q, a in pairs[12:24]],
            "preferences": [{"prompt": q, "chosen": a, "rejected": pairs[i + 30][1]}
                            for i, (q, a) in enumerate(pairs[:16])]}
    paths = {"teacher": str(root / "teacher"), "root": root}
    for kind, lines in rows.items():
        paths[kind] = str(root / f"{kind}.jsonl")
        with open(paths[kind], "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    tokens, _ = chat.pack([chat.pair(q, a) for q, a in pairs[:48]], 48)
    paths["npz"] = str(root / "tokens.npz")
    numpy.savez(paths["npz"], tokens=tokens.numpy().astype("uint16"))
    return {**paths, "chat": chat}


SMALL = ["--tokens", "2000", "--length", "48", "--batch", "4", "--eval-rows", "4", "--pairs", "8",
         "--rows", "24", "--lr", "1e-3"]


def command(world, out, *more, **files):
    """argv of a small run of the command line. files: prompts=, sft=, ... names in `world`"""
    argv = ["--teacher", world["teacher"], "--out", str(out), *SMALL, *more]
    for flag, name in files.items():
        argv += ["--" + flag.replace("_", "-"), world[name]]
    return argv


def weights_of(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory):
    """What runs that are killed and resumed must equal. -> tables, weights, steps of the run"""
    out, steps = tmp_path_factory.mktemp("whole") / "out", []
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        real = M.batch_rows
        patch.setattr(M, "batch_rows", lambda *a, **k: steps.append(0) or real(*a, **k))
        result = M.main(command(world, out, "--tokens", "5000", tokens_file="npz"))
    for s, handler in old.items():
        signal.signal(s, handler)
    return result["tables"]["mamba2"], weights_of(out), len(steps)


def untimed(rows):
    """Table rows without their seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def terminate_in_step(step, patch):
    """SIGTERM reaches this process in its training step number `step`. -> [steps until then]"""
    real, left = M.batch_rows, [step]

    def batch_rows(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        left[0] -= 1
        return real(*args, **kwargs)

    patch.setattr(M, "batch_rows", batch_rows)
    return left


@pytest.mark.parametrize("where", [0.0, 0.1, 0.3, 0.7, 0.99])
def test_kill_and_resume_equals_an_uninterrupted_run(where, world, uninterrupted, tmp_path,
                                                     monkeypatch, signals):
    """SIGTERM while a step is running, in each stage: the rest of the run does not notice."""
    rows, weights, steps = uninterrupted
    argv = command(world, tmp_path / "out", "--tokens", "5000", tokens_file="npz")
    left = terminate_in_step(int(where * steps), monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        M.main(argv)
    assert stopped.value.code == 3
    result = M.main([*argv, "--resume"])
    assert untimed(result["tables"]["mamba2"]) == untimed(rows)
    assert same(weights, weights_of(tmp_path / "out"))
    assert left[0] == -steps + int(where * steps), "no step is lost and none is taken twice"


def process_of(rank, argv, step, meet):
    """Process `rank` of 2 in which the command line runs; SIGTERM reaches rank 0 in that step."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            terminate_in_step(step, patch)
        with pytest.raises(SystemExit) as stopped:
            M.main(argv)
    torch.distributed.barrier()                     # neither may leave while the other still talks,
    torch.distributed.destroy_process_group()       # and gloo's threads not outlive the process
    assert stopped.value.code == 3


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_sharded_run_resumes_with_another_number_of_processes(before, after, world, uninterrupted,
                                                              tmp_path, signals, monkeypatch):
    """FSDP: 2 processes compute what 1 does with the same global batch, and a run that is stopped
    in stage 2 goes on with any number of them: losses, table and weights agree to rounding."""
    rows, weights, steps = uninterrupted
    argv = command(world, tmp_path / "out", "--tokens", "5000", tokens_file="npz")
    more = ["--resume", "--json", str(tmp_path / "f.json")]
    if (before, after) == (2, 1):
        with monkeypatch.context() as patch:            # two processes cannot share one GPU
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            torch.multiprocessing.spawn(process_of, (argv, int(0.8 * steps), tmp_path / "meet"), 2)
        M.main(argv + more)
    else:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            terminate_in_step(int(0.8 * steps), patch)
            M.main(argv)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                               "--nproc_per_node=2", os.path.join(HERE, "mamba_in_llama.py"),
                               *argv, *more], env=clean_environment(), capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("bit for bit") == 1, "rank 0 alone prints"
    table = json.loads((tmp_path / "f.json").read_text())["tables"]["mamba2"]
    for got, want in zip(table, rows, strict=True):
        # fp32 sums in another order, through AdamW; stage 3's are log p of whole answers
        rounding = 2e-2 if got["stage"] == "stage 3" else 5e-3
        assert got["losses"] == pytest.approx(want["losses"], rel=rounding)
        assert got["ratio"] == pytest.approx(want["ratio"], rel=5e-3)
    for name, value in weights_of(tmp_path / "out").items():
        close(value, weights[name], 5e-3)


# ---------------------------------------------------------------------------------------------
# 9. Saving and generate().
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("recipe,kind,tied,dtype,d_state", [
    ("near_linear", "llama", True, torch.float32, None),
    ("paper", "mistral", False, torch.float32, 8),
    ("linear_attention", "qwen2", False, torch.float64, None),
    ("random", "qwen2", True, torch.bfloat16, None)])
@torch.no_grad()
def test_save_and_load_is_bit_equal(mixer, recipe, kind, tied, dtype, d_state, tmp_path):
    student = make_student([1], mixer, recipe, kind=kind, tied=tied, dtype=dtype, layers=2,
                           d_state=d_state)
    student.save_pretrained(tmp_path)
    again, tokens = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), draw(2, 9)
    assert type(again) is M.HybridForCausalLM
    assert same(parameters_of(student), parameters_of(again))
    logits, tol = again(tokens).logits, 1e-12 if dtype == torch.float64 else 0  # other alignment
    close(student.eval()(tokens).logits, logits, tol)
    assert {n: p.dtype for n, p in student.named_parameters()} == {
        n: p.dtype for n, p in again.named_parameters()}


def clean_environment(**extra):
    """The environment of a user's shell, without what this test process has set or can import."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return {**env, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def test_trust_remote_code_works_without_this_project(tmp_path):
    student, tokens = make_student([1], layers=2, dtype=torch.float32), draw(1, 9)
    student.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "mamba_in_llama.py").exists()
    script = (
        "import importlib.util, sys, torch\n"
        "assert importlib.util.find_spec('mamba_in_llama') is None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('saved', trust_remote_code=True)\n"
        f"tokens = torch.tensor({tokens.tolist()})\n"
        "torch.save([model(tokens).logits, model.generate(tokens, max_new_tokens=5,"
        " do_sample=False)], 'out.pt')\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env=clean_environment(
                              HF_HOME=str(tmp_path / "home"),
                              HF_MODULES_CACHE=str(tmp_path / "modules")))
    assert done.returncode == 0, done.stderr
    logits, generated = torch.load(tmp_path / "out.pt")
    close(logits, student(tokens).logits, 1e-5)
    assert torch.equal(generated, student.generate(tokens, max_new_tokens=5, do_sample=False))


SHARES = [[], [1], [0, 1]]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("layers", SHARES)
@torch.no_grad()
def test_greedy_generate_is_the_argmax_loop(mixer, layers):
    """A batch of different lengths, padded on the left, against each row alone and no cache."""
    student = make_student(layers, mixer, layers=2)
    rows = [draw(1, n, n)[0].tolist() for n in (7, 2, 4)]
    tokens, mask = left_pad(rows)
    out = student.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for r, row in enumerate(rows):
        want = list(row)
        for _ in range(12):
            want.append(int(next_logits(student, want, 1).argmax()))
        assert out[r, tokens.shape[1] - len(row):].tolist() == want


@pytest.mark.parametrize("layers", SHARES)
@pytest.mark.parametrize("settings", [dict(num_beams=3), dict(num_beams=4, num_return_sequences=2),
                                      dict(do_sample=True, num_return_sequences=3, top_k=20),
                                      dict(do_sample=True, num_beams=2, temperature=2.0)])
@torch.no_grad()
def test_beams_and_sampling_with_cache_equal_those_without(layers, settings):
    student = make_student(layers, "mamba2", layers=2)
    tokens, mask = left_pad([draw(1, n, n)[0].tolist() for n in (6, 3)])
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(student.generate(tokens, attention_mask=mask, max_new_tokens=8,
                                     use_cache=use_cache, pad_token_id=0, **settings))
    assert torch.equal(*outs) and outs[0].shape == (2 * settings.get("num_return_sequences", 1), 14)


def test_generate_stops_at_the_end_token():
    student, tokens = make_student([1], layers=2), draw(1, 5)
    free = student.generate(tokens, max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    end = free[3]
    out = student.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=end,
                           pad_token_id=0)[0, 5:].tolist()
    assert out == free[:free.index(end) + 1]


def test_assisted_generation_is_refused():
    """Cropping does not rewind a recurrent state: transformers must refuse, not write nonsense."""
    student, tokens = make_student([1], layers=2), draw(1, 5)
    for settings in (dict(prompt_lookup_num_tokens=2), dict(assistant_model=student)):
        with pytest.raises(ValueError, match="stateful"):
            student.generate(tokens, max_new_tokens=4, do_sample=False, **settings)


@torch.no_grad()
def test_without_attention_the_context_is_no_limit():
    student, tokens = make_student([], layers=2), draw(1, 150)
    cache = M.MixerCache.allocate(student, 1)
    close(student.prefill(tokens, cache), student(tokens).logits[:, -1:])
    assert student.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 153)


# ---------------------------------------------------------------------------------------------
# 10. Errors: ValueError in Python, one line and exit code 2 on the command line.
# ---------------------------------------------------------------------------------------------


def wrong_teacher(kind, **fields):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))


QWEN3 = dict(vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16,
             num_attention_heads=4, num_key_value_heads=2)
CONVERSIONS = [
    (lambda: wrong_teacher("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=V), {}, "GPT2LMHead"),
    (lambda: wrong_teacher("qwen3", **QWEN3), {}, "q_norm"),
    (lambda: make_teacher(layers=1, kv=3), {}, "4 query heads.*3"),
    (make_teacher, dict(attn_layers=[0, 4]), r"4\].*0\.\.3"),
    (make_teacher, dict(attn_layers=[-1]), r"-1.*0\.\.3"),
    (make_teacher, dict(attn_layers=[2, 1, 2]), "repeated"),
    (make_teacher, dict(mixer="rwkv"), "'rwkv'.*mamba2"),
    (make_teacher, dict(recipe="best"), "'best'.*near_linear"),
    (make_teacher, dict(d_state=5), "5 does not divide.*16"),
    (make_teacher, dict(d_state=32), "32 does not divide.*16"),
    (make_teacher, dict(d_state=0), "0 does not divide.*16"),
    (make_teacher, dict(colour="red"), "colour")]


@pytest.mark.parametrize("teacher,arguments,line", CONVERSIONS)
def test_conversion_errors(teacher, arguments, line):
    with pytest.raises(ValueError, match=line) as caught:
        M.convert_to_hybrid(teacher(), **arguments)
    assert "\n" not in str(caught.value)


def long_decode(student, cache):
    student.prefill(draw(2, 60), cache)
    student.decode(draw(2, 8), cache)


def commit(n):
    def act(student, cache):
        student.decode(draw(2, 3), cache)
        cache.commit(torch.tensor(n))
    return act


DECODINGS = [
    (lambda s, c: s.prefill(draw(2, 0), c), "empty"),
    (lambda s, c: s.prefill(draw(2, 65), c), "65.*longer.*64"),
    (lambda s, c: [s.prefill(draw(2, 3), c) for _ in range(2)], "empty cache"),
    (lambda s, c: s.prefill(draw(2, 3), c, torch.tensor([[1, 1, 0], [1, 1, 1]])), "left"),
    (lambda s, c: s.prefill(draw(2, 3), c, torch.tensor([[0, 0, 0], [1, 1, 1]])), "empty"),
    (lambda s, c: s.prefill(draw(2, 3), c, torch.ones(2, 4).long()), r"\(2, 4\).*\(2, 3\)"),
    (lambda s, c: s.decode(draw(2, 9), c), "9 more.*ring of 8"),
    (lambda s, c: [s.decode(draw(2, 5), c) for _ in range(2)], "5 tokens.*5 more.*ring of 8"),
    (long_decode, "68.*64"),
    (commit([4, 0]), r"\[4, 0\].*\[3, 3\]"),
    (commit([-1, 0]), r"\[-1, 0\].*\[3, 3\]"),
    (lambda s, c: s.prefill(torch.full((2, 3), V), c), f"{V}.*vocabulary"),
    (lambda s, c: s.decode(torch.full((2, 3), V), c), f"{V}.*vocabulary"),
    (lambda s, c: s(torch.full((2, 3), V)), f"{V}.*vocabulary"),
    (lambda s, c: M.MixerCache.allocate(s, 0), "batch_size 0"),
    (lambda s, c: M.MixerCache.allocate(s, 1, ring=-1), "ring -1"),
    (lambda s, c: s.generate(draw(2, 0), max_new_tokens=2), "empty|at least|input_ids"),
    (lambda s, c: M.attention_layers(1.5, 4), "1.5.*0..1"),
    (lambda s, c: M.attention_layers(-0.1, 4), "-0.1.*0..1")]


@pytest.mark.parametrize("act,line", DECODINGS)
def test_decoding_errors(act, line):
    student = make_student([1], layers=2)
    with pytest.raises(ValueError, match=line):
        act(student, M.MixerCache.allocate(student, 2, 64, ring=8))


BAD_ROWS = [
    ("prompts", '{"prompt": "a"}\n{"prompt": "b"', 2), ("prompts", '{"text": "a"}\n', 1),
    ("prompts", '{"prompt": "a"}\n["b"]\n', 2), ("prompts", '{"prompt": ""}\n', 1),
    ("prompts", '{"prompt": 5}\n', 1), ("sft", '{"prompt": "a"}\n', 1),
    ("sft", '{"prompt": "a", "response": ["b"]}\n', 1), ("sft", '{"messages": "hello"}\n', 1),
    ("sft", '{"messages": [{"role": "user"}]}\n', 1),
    ("preferences", '{"prompt": "a", "chosen": "b"}\n', 1)]


@pytest.mark.parametrize("kind,text,line", BAD_ROWS)
def test_jsonl_errors_name_file_and_line(kind, text, line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows.jsonl:{line}: ") as caught:
        M.read_jsonl(str(path), kind)
    assert "\n" not in str(caught.value)


def damaged(world, name, damage):
    """A copy of the teacher's directory after `damage(folder)`."""
    folder = world["root"] / name
    if not folder.exists():
        shutil.copytree(world["teacher"], folder)
        damage(folder)
    return str(folder)


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_file(world, name, content):
    path = world["root"] / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        numpy.savez(path, **content)
    return str(path)


def not_empty(world, *names):
    folder = world["root"] / ("full" + "".join(names))
    folder.mkdir(exist_ok=True)
    for name in names or ["notes.txt"]:
        (folder / name).write_text("mine")
    return str(folder)


ids = numpy.arange(80).reshape(2, 40)
MISTAKES = {
    "nothing": (lambda w: [], "--teacher"),
    "no out": (lambda w: ["--teacher", w["teacher"]], "--out"),
    "share": (lambda w: command(w, "o", "--attention", "1.5"), "1.5.*0..1"),
    "negative share": (lambda w: command(w, "o", "--attention", "-1"), "-1.*0..1"),
    "share nan": (lambda w: command(w, "o", "--attention", "nan"), "nan"),
    "share word": (lambda w: command(w, "o", "--attention", "half"), "attention.*half"),
    "length": (lambda w: command(w, "o", "--length", "0", tokens_file="npz"),
               "--length: 0 must be above 0"),
    "lr": (lambda w: command(w, "o", "--lr", "-1", tokens_file="npz"), "--lr: -1"),
    "minutes": (lambda w: command(w, "o", "--minutes", "-1", tokens_file="npz"),
                "--minutes: -1"),
    "pairs": (lambda w: command(w, "o", "--pairs", "0", tokens_file="npz"), "--pairs: 0"),
    "sample batch": (lambda w: command(w, "o", "--sample-batch", "0",
                                       tokens_file="npz"), "--sample-batch: 0"),
    "mixer": (lambda w: command(w, "o", "--mixer", "rwkv", tokens_file="npz"), "rwkv.*mamba2"),
    "shares": (lambda w: command(w, "o", "--shares", "0.5,0.6", tokens_file="npz"),
               "--shares: 0.5,0.6 must be 4 numbers with sum 1"),
    "rates": (lambda w: command(w, "o", "--rates", "1,a,1,1", tokens_file="npz"), "rates.*1,a,1,1"),
    "both plans": (lambda w: command(w, "o", "--stepwise", "--choose-layers", tokens_file="npz"),
                   "not both"),
    "context": (lambda w: command(w, "o", "--length", "2000"), "2000.*1024"),
    "d_state": (lambda w: command(w, "o", "--d-state", "5", tokens_file="npz"), "5.*32"),
    "teacher": (lambda w: command({**w, "teacher": "/no/such"}, "o"), "/no/such"),
    "teacher kind": (lambda w: command({**w, "teacher": damaged(w, "odd", lambda f: wrong_teacher(
        "qwen3", **QWEN3).save_pretrained(f))}, "o"), "q_norm"),
    "teacher tensor": (lambda w: command({**w, "teacher": damaged(w, "torn", drop_tensor)}, "o",
                                         tokens_file="npz"), "layers.1.mlp.up_proj.weight"),
    "template": (lambda w: command({**w, "teacher": damaged(w, "mute", lambda f: os.remove(
        f / "chat_template.jinja"))}, "o"), "chat template"),
    "out": (lambda w: command(w, not_empty(w), tokens_file="npz"), "full is not empty"),
    "out file": (lambda w: command(w, w["npz"], tokens_file="npz"), "tokens.npz"),
    "resume": (lambda w: command(w, "new", "--resume", tokens_file="npz"), "nothing to resume"),
    "resume junk": (lambda w: command(w, not_empty(w, "progress.pt"), "--resume",
                                      tokens_file="npz"), "progress.pt"),
    "prompts": (lambda w: [*command(w, "o"), "--prompts", "/no/such.jsonl"], "/no/such.jsonl"),
    "sft row": (lambda w: [*command(w, "o", tokens_file="npz"), "--sft", wrong_file(
        w, "bad.jsonl", '{"prompt": "a"}')], "bad.jsonl:1"),
    "preference row": (lambda w: [*command(w, "o", tokens_file="npz"), "--preferences", wrong_file(
        w, "bad.jsonl", '{"prompt": "a"}')], "bad.jsonl:1"),
    "npz": (lambda w: [*command(w, "o"), "--tokens-file", "/no/such.npz"], "/no/such.npz"),
    "npz junk": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(w, "a.npz", "hello")],
                 "a.npz"),
    "npz array": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(
        w, "b.npz", {"rows": ids})], "b.npz.*tokens"),
    "npz shape": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(
        w, "c.npz", {"tokens": ids[0]})], "c.npz"),
    "npz vocabulary": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(
        w, "d.npz", {"tokens": ids + 5000})], "5079.*vocabulary of 512"),
    "npz negative": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(
        w, "e.npz", {"tokens": ids - 7})], "-7.*vocabulary of 512"),
    "npz answers": (lambda w: [*command(w, "o"), "--tokens-file", wrong_file(
        w, "f.npz", {"tokens": ids * 0 + 9})], "no answers"),
    "json": (lambda w: command(w, "o", "--json", "/no/such/dir/f.json", tokens_file="npz"),
             "/no/such/dir"),
    "loss": (lambda w: command(w, "o", "--lr", "1e30", "--tokens", "3000", tokens_file="npz"),
             "loss is .*step"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_command_line_errors_are_one_line_and_exit_code_2(name, world, tmp_path, monkeypatch,
                                                          capsys, signals):
    argv, line = MISTAKES[name]
    argv = argv(world)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        M.cli(lambda: M.main(argv))
    lines = [s for s in capsys.readouterr().err.splitlines() if s.strip()]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and re.search(line, lines[0])


@pytest.mark.parametrize("flags, line", [(["--choose-layers"], "--choose-layers runs in one"),
                                         (["--batch", "6"], "--batch 6 is no multiple of twice")])
def test_flags_that_do_not_go_with_two_processes(flags, line, world, tmp_path, monkeypatch):
    monkeypatch.setattr(M, "world", lambda: (0, 2))
    with pytest.raises(ValueError, match=line):
        M.parse_args(command(world, tmp_path / "out", *flags, tokens_file="npz"))


# ---------------------------------------------------------------------------------------------
# 11. The command line as a user types it.
# ---------------------------------------------------------------------------------------------


def shell(*argv, cwd, timeout=120):
    """python mamba_in_llama.py ... in a process of its own, in directory `cwd`."""
    return subprocess.run([sys.executable, os.path.join(HERE, "mamba_in_llama.py"), *argv], cwd=cwd,
                          env=clean_environment(), capture_output=True, text=True, timeout=timeout)


STORY = ["converted", "alignment", "stage 1", "stage 2", "stage 3"]


def test_cli_where_the_teacher_writes_its_own_data(world, tmp_path):
    done = shell(*command(world, "out", "--attention", "0.5", "--mixer", "mamba2", "--tokens",
                          "4000", "--json", "report.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention stays in layers [1, 3] of 0..3" in done.stdout
    assert "reloads it bit for bit" in done.stdout
    assert "teacher :" in done.stdout and "student :" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["tables"]["mamba2"]
    assert [row["stage"] for row in rows] == STORY
    for row in rows:
        assert row["ratio"] == pytest.approx(row["perplexity"] / row["teacher_perplexity"])
        assert 0 <= row["agreement"] <= 1 and row["kl"] >= 0 and row["seconds"] >= 0
        assert re.search(rf"^{row['stage']} +{row['ratio']:.3f}", done.stdout, re.M)
    greedy = report["greedy"]["mamba2"]
    assert greedy["prompts"] >= 1 and 0 <= greedy["common_prefix"] <= 32
    assert 0 <= greedy["identical"] <= 1 and "tokens agree" in done.stdout
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert list(student.config.attn_layers) == [1, 3]
    chat = M.Chat(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert chat.pair("hello", "you") == world["chat"].pair("hello", "you")
    again = shell(*command(world, "out"), cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1) and "not empty" in again.stderr


def test_cli_stepwise_with_jsonl_files(world, tmp_path, signals, monkeypatch, capsys):
    """50 % -> 25 % attention, human answers in stage 2, human preferences in stage 3."""
    monkeypatch.chdir(tmp_path)
    result = M.main(command(world, "out", "--attention", "0.25", "--mixer", "mamba", "--stepwise",
                            "--tokens", "3000", prompts="prompts", sft="sft",
                            preferences="preferences"))
    printed = capsys.readouterr().out
    assert printed.index("layers [1, 3]") < printed.index("layers [3]")
    stages = [row["stage"] for row in result["tables"]["mamba"]]
    assert stages == [f"{s} at {share}" for share in ("50%", "25%") for s in STORY[:4]] + [
        "stage 3 at 25%"] or stages == [f"{s} at {share}" for share in ("50%", "25%")
                                        for s in STORY[:4]] + ["stage 3"]
    assert "DPO reward accuracy on held-out pairs" in printed
    assert list(AutoModelForCausalLM.from_pretrained("out").config.attn_layers) == [3]


def test_cli_chooses_layers_and_resumes(world, tmp_path, signals, monkeypatch, capsys):
    """All layers are aligned, then the best stay; a run killed after that keeps the choice."""
    argv = command(world, tmp_path / "out", "--choose-layers", "--shares", "0.5,0.2,0.2,0.1",
                   tokens_file="npz")
    with monkeypatch.context() as patch:
        terminate_in_step(8, patch)                 # 5 steps of alignment, then stage 1
        with pytest.raises(SystemExit):
            M.main(argv)
        printed = capsys.readouterr().out
    result = M.main([*argv, "--resume"])
    keep = re.findall(r"layers (\[.*?\]) of", printed)[-1]
    assert "layers [] of" in printed and "KL that attention regains, by layer: " in printed
    assert f"layers {keep} of" in capsys.readouterr().out and len(json.loads(keep)) == 2
    stages = [row["stage"] for row in result["tables"]["mamba2"]]
    assert stages == ["converted at 0%", "alignment at 0%"] + [
        f"{s} at 50%" for s in ("converted", *STORY[2:])]
    ratios = [row["ratio"] for row in result["tables"]["mamba2"]]
    assert ratios[2] < ratios[1], "restored attention helps"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.attn_layers
    assert list(saved) == json.loads(keep)


def test_cli_skips_stages_and_uses_data_again(world, tmp_path, signals, monkeypatch, capsys):
    """A share of 0 leaves a stage out; data.pt of one run is the --tokens-file of the next. Losses
    that are looked at four at a time, as on a GPU ten, are all there at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "LOOK_EVERY", {DEVICE: 4})
    argv = command(world, "one", "--shares", "0.6,0,0.4,0", "--batch", "4", tokens_file="npz")
    rows = M.main(argv)["tables"]["mamba2"]
    assert [row["stage"] for row in rows] == ["converted", "alignment", "stage 2"]
    assert "DPO reward accuracy" not in capsys.readouterr().out
    assert [row["steps"] for row in rows] == [0, *(
        round(2000 * share / 4 / 48) for share in (0.6, 0.4))]
    argv = command(world, "two", "--shares", "0.6,0,0.4,0", "--batch", "4")
    again = M.main([*argv, "--tokens-file", "one/data.pt"])["tables"]["mamba2"]
    assert [row["stage"] for row in again] == [row["stage"] for row in rows]
    one, two = (torch.load(f"{name}/data.pt") for name in ("one", "two"))
    for part in "train", "heldout":
        assert torch.equal(one[part][0], two[part][0]) and torch.equal(one[part][1], two[part][1])


def test_cli_minutes_and_no_attention(world, tmp_path, signals, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    result = M.main(command(world, "out", "--attention", "0", "--minutes", "0.05",
                            "--json", "f.json", tokens_file="npz"))
    assert [row["stage"] for row in result["tables"]["mamba2"]] == STORY
    spent = sum(row["seconds"] for row in result["tables"]["mamba2"][1:])
    assert 2 < spent < 10 and time.monotonic() - start < 40
    assert "layers [] of 0..3" in capsys.readouterr().out
    assert json.loads((tmp_path / "f.json").read_text())["args"]["minutes"] == 0.05


def test_cli_killed_and_resumed_in_processes_of_its_own(world, uninterrupted, tmp_path):
    argv = command(world, "out", "--tokens", "5000", "--save-every", "0", tokens_file="npz")
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "mamba_in_llama.py"), *argv],
                               cwd=tmp_path, env=clean_environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "progress.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3 and "--resume" in stderr
    done = shell(*argv, "--resume", "--json", "f.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, weights, _ = uninterrupted
    table = json.loads((tmp_path / "f.json").read_text())["tables"]["mamba2"]
    assert [r["stage"] for r in table] == STORY
    rounding = 1e-5 if DEVICE == "cpu" else 5e-3        # `shell` hides a GPU from the command
    for got, want in zip(table, rows):
        assert got["ratio"] == pytest.approx(want["ratio"], rel=rounding)
    for name, value in weights_of(tmp_path / "out").items():
        close(value, weights[name], rounding)


def test_tiny_tells_the_whole_story(tmp_path, monkeypatch, capsys, signals):
    """--tiny itself, with a teacher of few steps, few questions and two steps per stage."""
    train, tiny_teacher, tiny_world = M.train, M.tiny_teacher, M.tiny_world

    def short(name, student, teacher, loss_of_rows, tokens, steps, *rest, **options):
        return train(name, student, teacher, loss_of_rows, tokens, min(steps, 2), *rest,
                     **options)

    monkeypatch.setattr(M, "train", short)
    monkeypatch.setattr(M, "tiny_teacher", lambda v, t, **k: tiny_teacher(v, t, steps=3))
    monkeypatch.setattr(M, "tiny_world", lambda *a: (tiny_world(*a)[0], tiny_world(*a)[1][:50]))
    monkeypatch.chdir(tmp_path)
    M.main(["--tiny", "--json", "f.json"])
    printed = capsys.readouterr().out
    tables = json.loads((tmp_path / "f.json").read_text())["tables"]
    assert list(tables) == MIXERS and printed.count("bit for bit") == 2
    for rows in tables.values():
        assert [row["stage"] for row in rows] == STORY
        assert all(row["ratio"] > 0 and row["human_ratio"] > 0 for row in rows)
    for mixer in MIXERS:
        assert (tmp_path / "tiny_run" / mixer / "model.safetensors").exists()


def test_help_names_defaults(tmp_path):
    done = shell("--help", cwd=tmp_path)
    assert done.returncode == 0
    flags = set(re.findall(r"--[a-z-]+", done.stdout))
    assert flags >= {"--tiny", "--teacher", "--attention", "--mixer", "--out", "--prompts", "--sft",
                     "--preferences", "--tokens", "--minutes", "--stepwise", "--tokens-file",
                     "--json", "--resume"}
    assert "(default: 0.5)" in " ".join(done.stdout.split())


# ---------------------------------------------------------------------------------------------
# Data: what is labelled, what a row becomes.
# ---------------------------------------------------------------------------------------------


def test_chat_labels_and_packs_answers_only(world):
    chat = world["chat"]
    prompt, answer = chat.pair("one two", "three four")
    assert answer[-1] == chat.end
    tokens, labels = chat.pack([(prompt, answer), (prompt[:3], answer[:2])], 1000)
    assert tokens.shape == (2, len(prompt) + len(answer))
    assert tokens[0].tolist() == prompt + answer
    assert labels[0].tolist() == [-100] * len(prompt) + answer
    assert labels[1].tolist() == [-100] * 3 + answer[:2] + [-100] * (tokens.shape[1] - 5)
    found = chat.label(torch.tensor([prompt + answer + prompt + answer]))
    assert found[0].tolist() == labels[0].tolist() * 2, "every answer of a conversation"
    cut = chat.pack([(prompt, answer)], len(prompt) + 1)
    assert cut[1][0].tolist() == [-100] * len(prompt) + answer[:1]


# ---------------------------------------------------------------------------------------------
# 12. Algorithm 2 (spec_decode.py): exactness first. SPEC_GRID=1 runs the whole first grid.
# ---------------------------------------------------------------------------------------------

VS = 61
SHARES = {1.0: [0, 1, 2, 3], 0.5: [1, 3], 0.25: [2], 0.0: []}
DRAFTS = ["itself", "plain", "hybrid", "layers", "words", "ngram", "right", "wrong", "random"]
_models = {}


def toy_llama(vocab=VS, layers=4, width=64, seed=0, sharp=8.0, **fields):
    """A random Llama whose head is scaled up, so that its choices depend on the context."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **fields))
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
        for name, p in model.named_parameters():
            if p.ndim == 2 and "layers" in name:
                p.mul_(4)
    return model.eval()


def toy(mixer, share, dtype=torch.float64, **fields):
    """Cached toy targets: a converted toy Llama with random gates, convolutions and decays."""
    key = mixer, share, dtype, tuple(sorted(fields.items()))
    if key not in _models:
        model = M.convert_to_hybrid(toy_llama(**fields).to(dtype), SHARES[share], mixer,
                                    recipe="paper").eval()
        _models[key] = model
    return _models[key]


class Scripted:
    """A draft that knows the answer: always right, always wrong, or random."""

    static = False

    def __init__(self, kind, answers):
        self.kind, self.answers = kind, answers

    def start(self, target, rows, lookahead, sampling, ring):
        self.rows, self.K, self.prompts = rows, lookahead, rows.length.tolist()
        self.draw = random.Random(0)

    def propose(self):
        out = []
        for answer, prompt, length in zip(self.answers, self.prompts, self.rows.length.tolist()):
            rest = answer[length - prompt:][:self.K]
            rest = rest + [0] * (self.K - len(rest))
            if self.kind == "wrong":
                rest = [(t + 1) % VS for t in rest]
            if self.kind == "random":
                rest = [t if self.draw.random() < 0.6 else self.draw.randrange(VS) for t in rest]
            out.append(rest)
        return S.Proposal(torch.tensor(out))

    def settle(self, n_accepted):
        pass


def draft_of(kind, target, answers):
    if kind in ("right", "wrong", "random"):
        return Scripted(kind, answers)
    dtype = target.get_input_embeddings().weight.dtype
    return {"itself": lambda: target, "plain": lambda: toy_llama(layers=2, seed=3).to(dtype),
            "hybrid": lambda: toy("mamba2", 0.5, dtype),
            "layers": lambda: S.LayerSubsetDraft(target, [0, 2, 3]),
            "words": lambda: S.ModelDraft(toy_llama(seed=3).to(dtype), torch.arange(0, VS, 2)),
            "ngram": lambda: S.NGramDraft(2, 1)}[kind]()


GRID = list(itertools.product(["mamba", "mamba2"], SHARES, DRAFTS, range(1, 9), [1, 4],
                              range(1, 41)))
SAMPLE = GRID if os.environ.get("SPEC_GRID") else random.Random(0).sample(GRID, 192)


@pytest.mark.parametrize("part", range(8))
def test_greedy_equals_plain_decoding(part):
    """Every value of every axis often; end tokens taken from the middle of the plain output."""
    for i, (mixer, share, kind, K, b, length) in enumerate(SAMPLE[part::8]):
        draw = random.Random(hash((i, part)))
        target = toy(mixer, share, torch.float32 if i % 4 == 0 else torch.float64)
        torch.manual_seed(i)
        prompts = [torch.randint(VS, (length if j == 0 else draw.randint(1, 40),))
                   for j in range(b)]
        budget = draw.randint(1, 24)
        plain = S.generate(target, prompts, budget)
        answers = [t.tolist() for t in plain.tokens]
        assert [len(a) for a in answers] == [budget] * b
        eos = None
        if i % 3:
            eos = [draw.choice(draw.choice(answers)) for _ in range(i % 3)]
            plain = S.generate(target, prompts, budget, eos_token_id=eos)
            for answer, row in zip(answers, plain.tokens):
                cut = next((k + 1 for k, t in enumerate(answer) if t in eos), budget)
                assert row.tolist() == answer[:cut]
        got = S.speculative_decode(target, draft_of(kind, target, answers), prompts, budget,
                                   lookahead=K, eos_token_id=eos)
        where = (mixer, share, kind, K, b, length, budget, eos)
        assert [t.tolist() for t in got.tokens] == [t.tolist() for t in plain.tokens], where
        assert got.rounds == 0 or 1 <= got.tokens_per_round <= K + 1
        if kind in ("right", "itself") and eos is None and budget > K + 1:
            assert got.rounds <= math.ceil((budget - 1) / (K + 1)), where
        if kind == "wrong":
            assert got.accepted == 0


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("share", SHARES)
def test_generate_equals_forward(mixer, share):
    """The oracle itself: argmax of a forward pass without any cache, row by row."""
    target = toy(mixer, share)
    prompts = [torch.randint(VS, (l,)) for l in (1, 5, 23)]
    got = S.generate(target, prompts, 12)
    for prompt, new in zip(prompts, got.tokens):
        text = prompt.tolist()
        for token in new.tolist():
            with torch.no_grad():
                assert int(target(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)


def test_sample_is_generate_in_batches():
    """Rows end with the end token; a seed decides; a padded batch draws what its rows may say."""
    target = toy("mamba2", 0.5, torch.float32)
    prompts = [[i + 1] * (1 + i % 4) for i in range(7)]
    free = M.sample(target, prompts, 20, None, batch_size=3, seed=5)
    assert [len(row) for row in free] == [20] * 7
    assert free == M.sample(target, prompts, 20, None, batch_size=3, seed=5)
    assert free != M.sample(target, prompts, 20, None, batch_size=3, seed=6)
    end = free[0][10]
    ended = M.sample(target, prompts[:3], 20, end, batch_size=3, seed=5)
    assert ended[0] == free[0][:free[0].index(end) + 1]
    greedy = M.sample(target, prompts, 9, None, batch_size=4, top_k=1)
    assert greedy == [row.tolist() for row in S.generate(target, prompts, 9).tokens]


def test_hand_example():
    """p says 1 2 3 4; the draft says 1 2 9 4: two stand, and the third token is the target's 3."""
    logits = F.one_hot(torch.tensor([[1, 2, 3, 4, 5]]), 10).float()
    n, token = S.accept(logits, S.Proposal(torch.tensor([[1, 2, 9, 4]])), S.Sampling())
    assert (n.item(), token.item()) == (2, 3)
    n, token = S.accept(logits, S.Proposal(torch.tensor([[1, 2, 3, 4]])), S.Sampling())
    assert (n.item(), token.item()) == (4, 5)


@pytest.mark.parametrize("settings, expected", [
    (dict(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
    (dict(temperature=1, top_p=0.8), [0.625, 0.375, 0, 0]),
    (dict(temperature=1, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    (dict(temperature=0), [1, 0, 0, 0]),
    (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])], ids=str)
def test_probabilities(settings, expected):
    """0.5, 0.3, 0.15, 0.05; temperature 0.5 squares them, and the squares sum to 0.365."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    p = S.Sampling(**settings).probabilities(logits)
    assert torch.allclose(p, torch.tensor(expected, dtype=torch.float32))


def chi_square_z(seen, p):
    """How many standard deviations the chi-square statistic lies above its mean (Wilson-Hilferty).

    Cells that expect fewer than 5 draws are pooled. seen, p (cells,)
    """
    expected = p * seen.sum()
    small = expected < 5
    seen = torch.cat([seen[~small], seen[small].sum()[None]]).double()
    expected = torch.cat([expected[~small], expected[small].sum()[None]]).double()
    assert seen[expected == 0].sum() == 0                   # nothing outside the support
    seen, expected = seen[expected > 0], expected[expected > 0]
    if len(seen) == 1:
        return 0.0
    df, chi = len(seen) - 1, float(((seen - expected) ** 2 / expected).sum())
    return ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


SAMPLINGS = [dict(temperature=1.0), dict(temperature=0.6), dict(temperature=1.7),
             dict(temperature=1.0, top_k=3), dict(temperature=1.3, top_p=0.7),
             dict(temperature=0.8, top_k=4, top_p=0.9)]
KINDS = ["plain", "hybrid", "subset", "ngram"]


@pytest.mark.parametrize("settings, kind", [
    pair for i, pair in enumerate(itertools.product(SAMPLINGS, KINDS))
    if (i + i // 4) % 2 == 0], ids=str)
def test_sampled_distribution(settings, kind):
    """20,000 draws of three tokens, the last two through rounds, against all 6^3 probabilities."""
    vocab, draws = 6, 20_000
    target = toy("mamba2", 0.5, torch.float32, vocab=vocab, layers=4, width=16, sharp=3.0)
    plain = toy_llama(vocab=vocab, layers=1, width=16, seed=5, sharp=3.0)
    draft = {"plain": plain, "hybrid": toy("mamba", 0.5, torch.float32, vocab=vocab, layers=4,
                                           width=16, sharp=3.0),
             "subset": S.ModelDraft(plain, torch.tensor([0, 2, 3])),
             "ngram": S.NGramDraft(2, 1)}[kind]
    prompt = torch.tensor([1, 4, 2, 1, 4])
    got = S.speculative_decode(target, draft, prompt.expand(draws, -1), 3, lookahead=2,
                               generator=torch.Generator().manual_seed(1), **settings)
    words = torch.cartesian_prod(*[torch.arange(vocab)] * 3)                    # (216,3)
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(len(words), -1), words], 1)).logits[:, 4:7]
    p = S.Sampling(**settings).probabilities(logits).gather(2, words[..., None])[..., 0].prod(1)
    cell = torch.stack(got.tokens) @ torch.tensor([vocab ** 2, vocab, 1])
    assert chi_square_z(cell.bincount(minlength=vocab ** 3), p) < 3.5
    assert got.accepted > 0 and got.accepted < got.drafted


def test_argmax_in_blocks():
    """What `greedy` does on a GPU: the first of equal words, in bf16 there are many."""
    torch.manual_seed(0)
    for V, block in (96, 32), (600, 120), (600, 600), (7, 1):
        logits = torch.randn(2, 3, V).bfloat16().float()
        logits[0, 0] = 1
        assert torch.equal(S.argmax_in_blocks(logits, block), logits.argmax(-1))


def test_plain_sampling_distribution():
    """generate() draws from the same distribution; end tokens and budgets hold when sampling."""
    target = toy("mamba2", 0.5, torch.float32, vocab=6, layers=4, width=16, sharp=3.0)
    got = S.generate(target, torch.tensor([[1, 2]]).expand(20_000, -1), 2, temperature=0.9,
                     generator=torch.Generator().manual_seed(0))
    words = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        logits = target(torch.cat([torch.tensor([[1, 2]]).expand(36, -1), words], 1)).logits[:, 1:3]
    p = S.Sampling(0.9).probabilities(logits).gather(2, words[..., None])[..., 0].prod(1)
    cell = torch.stack(got.tokens) @ torch.tensor([6, 1])
    assert chi_square_z(cell.bincount(minlength=36), p) < 3.5
    got = S.speculative_decode(target, S.NGramDraft(1, 1), [[1, 2]] * 64, 20, temperature=1.5,
                               eos_token_id=[3, 5])
    for row in got.tokens:
        ends = [i for i, t in enumerate(row.tolist()) if t in (3, 5)]
        assert (ends == [len(row) - 1]) if ends else len(row) == 20


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
@pytest.mark.parametrize("share", SHARES)
def test_state_after_rejection(mixer, share):
    """After rounds with rejected tokens, logits and states are those of a fresh run."""
    target, draw = toy(mixer, share), random.Random(1)
    tokens = torch.randint(VS, (3, 60))
    cache = M.MixerCache.allocate(target, 3, 80, ring=8)
    target.prefill(tokens[:, :5], cache)
    at = torch.tensor([5, 5, 5])
    for _ in range(9):                                      # rows accept different counts
        n = torch.tensor([draw.randint(0, 5) for _ in range(3)])
        block = torch.randint(VS, (3, 5))
        for i in range(3):
            block[i, :n[i]] = tokens[i, at[i]:at[i] + n[i]]
        target.decode(block, cache)
        cache.commit(n)
        at += n
    assert cache.length.tolist() == at.tolist()
    probe = torch.randint(VS, (3, 2))
    logits = target.decode(probe, cache)
    for _ in range(2):                                      # push everything out of the ring
        cache.commit(cache.counts[2].clone())
        target.decode(torch.zeros(3, 8, dtype=torch.long), cache)
    for i in range(3):
        fresh = M.MixerCache.allocate(target, 1, 80, ring=8)
        target.prefill(tokens[i:i + 1, :at[i]], fresh)
        again = target.decode(probe[i:i + 1], fresh)
        assert torch.allclose(again[0], logits[i], rtol=1e-9, atol=1e-9)
        for _ in range(2):
            fresh.commit(fresh.counts[2].clone())
            target.decode(torch.zeros(1, 8, dtype=torch.long), fresh)
        assert int(fresh.counts[0, 0]) == int(cache.counts[0, i])       # folded equally far
        for ours, theirs in zip(cache.layers, fresh.layers):
            if isinstance(ours, M.MixerState):
                assert torch.allclose(ours.state[i], theirs.state[0], rtol=1e-9, atol=1e-9)


def test_first_difference_names_the_token_and_the_gap():
    target, prompt = toy("mamba2", 0.5), torch.tensor([1, 2, 3])
    plain = S.generate(target, prompt, 6).tokens[0]
    assert S.first_difference(target, prompt, plain, plain.clone()) is None
    other = plain.clone()
    other[4] = (other[4] + 1) % VS
    with torch.no_grad():
        logits = target(torch.cat([prompt, plain[:4]])[None]).logits[0, -1]
    gap = f"{abs(float(logits[plain[4]] - logits[other[4]])):.2g}"
    assert S.first_difference(target, prompt, plain, other) == (
        f"token 4 differs, its two logits are {gap} apart")


def test_latest_match():
    """ab?ab: the last two words occurred at 0..1, and 2 followed; nothing matches 9."""
    tokens = torch.tensor([[7, 8, 1, 7, 8, 0, 0], [1, 2, 3, 4, 9, 0, 0], [5, 5, 5, 0, 0, 0, 0]])
    found = S.latest_match(tokens, torch.tensor([5, 5, 3]), 3, 1)
    assert found.tolist() == [2, 0, 2]


def test_layer_subset_saves_and_shares(tmp_path):
    for model in (toy_llama(), toy("mamba2", 0.5, torch.float32), make_teacher("qwen2")):
        draft = S.LayerSubsetDraft(model, [0, 3])
        assert len(model.model.layers) == model.config.num_hidden_layers == 4   # left as it was
        ours = {p.data_ptr() for p in draft.parameters()}
        assert ours <= {p.data_ptr() for p in model.parameters()}
        draft.save_pretrained(tmp_path / type(model).__name__)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__)
        tokens = torch.randint(VS, (2, 9))
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), draft.parameters()))
        with torch.no_grad():                       # weights that lie elsewhere may round otherwise
            close(again(tokens).logits, draft(tokens).logits, 1e-6)
        assert again.config.num_hidden_layers == 2


def test_vocab_subset():
    """A draft with a short head says only those words, and the output is still the target's."""
    target = toy("mamba2", 0.5)
    subset = torch.arange(0, VS, 2)
    draft = S.ModelDraft(toy_llama(seed=3).double(), subset)
    prompts, said = [torch.randint(VS, (l,)) for l in (3, 9)], []
    got = S.speculative_decode(target, draft, prompts, 20, on_round=lambda rows, proposal, n, t:
                               said.extend(proposal.tokens.flatten().tolist()))
    plain = S.generate(target, prompts, 20)
    assert [t.tolist() for t in got.tokens] == [t.tolist() for t in plain.tokens]
    assert set(said) <= set(subset.tolist())


def test_simulated_acceptance():
    """# Gen of a draft that is right with probability P is (1 - P^(K+1)) / (1 - P)."""
    target = toy("mamba2", 0.5, torch.float32)
    got = S.speculative_decode(target, toy_llama(seed=3), torch.randint(VS, (16, 4)), 100,
                               lookahead=3, simulate=0.7)
    assert abs(got.tokens_per_round - (1 - 0.7 ** 4) / 0.3) < 0.25


def other_context(length):
    model = toy_llama()
    model.config.max_position_embeddings = length
    return model


ERRORS = [
    (dict(lookahead=0), "lookahead 0"),
    (dict(lookahead=16), "ring of 16"),
    (dict(max_new_tokens=0), "max_new_tokens 0"),
    (dict(temperature=-1), "temperature -1"),
    (dict(top_k=-2), "top_k -2"),
    (dict(top_p=0.0), "top_p 0.0"),
    (dict(input_ids=[]), "no prompts"),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "empty"),
    (dict(input_ids=[[1], []]), "prompt 1"),
    (dict(input_ids=[[1, VS]]), f"token {VS}"),
    (dict(input_ids=[[1, -1]]), "token -1"),
    (dict(eos_token_id=VS), "end tokens"),
    (dict(draft=lambda: toy_llama(vocab=VS + 3)), "vocabulary"),
    (dict(target=lambda: other_context(3), input_ids=[[1] * 4]), "context of 3"),
    (dict(draft=lambda: S.NGramDraft(0)), "ngram 0"),
    (dict(draft=lambda: S.LayerSubsetDraft(toy_llama(), [4])), r"indices in 0..3"),
    (dict(draft=lambda: S.LayerSubsetDraft(toy_llama(), [1, 1])), "layers"),
    (dict(draft=lambda: S.LayerSubsetDraft(toy_llama(), [])), "layers"),
]


@pytest.mark.parametrize("change, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(change, message):
    arguments = dict(target=lambda: toy("mamba2", 0.5), draft=lambda: toy_llama(),
                     input_ids=[[1, 2]], max_new_tokens=3) | change
    with pytest.raises(ValueError, match=message) as error:
        for name in "target", "draft":
            arguments[name] = arguments[name]()
        S.speculative_decode(**arguments)
    assert "\n" not in str(error.value)


def write_authors(folder, mixer, **overrides):
    """A checkpoint as the authors write it, random weights, one layer of four kept. -> weights"""
    from safetensors.torch import save_file
    D, H, G, hd = 32, 4, 2, 8
    rand = torch.Generator().manual_seed(0)
    model = toy_llama(width=D, vocab=VS)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    new = lambda *s: torch.randn(*s, generator=rand) * 0.3                      # noqa: E731
    for i in (0, 1, 3):
        w = {n: p for n, p in w.items() if not n.startswith(f"model.layers.{i}.self_attn")}
        m = {"out_proj.weight": new(D, D)}
        if mixer == "mamba2":
            m |= {"in_proj.weight": new(2 * D + 2 * G * hd + H, D), "dt_bias": new(H),
                  "conv1d.weight": new(D + 2 * G * hd, 1, 4), "conv1d.bias": new(D + 2 * G * hd),
                  "A_log": new(H), "D": new(H), "norm.weight": new(D)}
        else:
            m |= {"in_proj_x.weight": new(G * hd, D), "in_proj_z.weight": new(D, D),
                  "B_proj.weight": new(G * hd, D), "C_proj.weight": new(D, D),
                  "dt_proj_down.weight": new(2, D), "dt_proj.weight": new(D, 2),
                  "dt_proj.bias": new(D), "conv1d.weight": new(D, 1, 4), "conv1d.bias": new(D),
                  "A_log": new(D, 4), "D": new(D)}
        w |= {f"model.layers.{i}.mamba.{n}": p for n, p in m.items()}
    model.config.save_pretrained(folder)
    ssm = {"expand": 1, "ngroups": H, "d_state": hd} if mixer == "mamba2" else {
        "expand": 1, "d_state": 4}
    config = dict(d_model=D, ssm_cfg=ssm, rms_norm_eps=1e-5, vocab_size=None, d_inner=D,
                  d_xb=G * hd, intermediate_size=2 * D, hidden_act="silu", n_layer=4,
                  attn_layers=[2])
    (folder / "mamba_config.json").write_text(json.dumps(config | overrides))
    half = len(w) // 2
    for k, part in enumerate((list(w.items())[:half], list(w.items())[half:])):
        save_file(dict(part), folder / f"model-{k}.safetensors")
    return w


def authors_mixer(w, u, mixer, H=4, G=2, hd=8, N=4):
    """Section 5 of the paper's facts, token by token and channel by channel, in float64. u (l,D)"""
    silu = lambda v: v / (1 + torch.exp(-v))                                    # noqa: E731
    softplus = lambda v: torch.log1p(torch.exp(v))                              # noqa: E731
    w, u, l, D = {n: p.double() for n, p in w.items()}, u.double(), len(u), u.shape[1]

    def conv(v):
        out = torch.zeros_like(v)
        for t in range(l):
            for k in range(4):
                if t - 3 + k >= 0:
                    out[t] += w["conv1d.weight"][:, 0, k] * v[t - 3 + k]
        return silu(out + w["conv1d.bias"])

    if mixer == "mamba2":
        z, xBC, dt = (u @ w["in_proj.weight"].T).split([D, 2 * G * hd + D, H], 1)
        x, B, C = conv(xBC).split([G * hd, G * hd, D], 1)
        x, B = (v.view(l, G, hd).repeat_interleave(H // G, 1).reshape(l, D) for v in (x, B))
        delta = softplus(dt + w["dt_bias"]).repeat_interleave(hd, 1)            # per channel
        A, skip, N = -w["A_log"].exp().repeat_interleave(hd), w["D"].repeat_interleave(hd), hd
        A = A[:, None].expand(D, N)
    else:
        z, C = u @ w["in_proj_z.weight"].T, u @ w["C_proj.weight"].T
        groups = G * hd // N
        x, B = (v.view(l, groups, N).repeat_interleave(D // (G * hd), 1).reshape(l, D)
                for v in (u @ w["in_proj_x.weight"].T, u @ w["B_proj.weight"].T))
        x = conv(x)
        dt = (u @ w["dt_proj_down.weight"].T) @ w["dt_proj.weight"].T + w["dt_proj.bias"]
        delta = softplus(dt + w["dt_proj.bias"])
        A, skip = -w["A_log"].exp(), w["D"]
    h, ys = torch.zeros(D, N, dtype=torch.float64), []
    for t in range(l):
        y = torch.zeros(D, dtype=torch.float64)
        for c in range(D):
            run = slice(c // N * N, c // N * N + N)                             # the channel's head
            h[c] = torch.exp(delta[t, c] * A[c]) * h[c] + delta[t, c] * x[t, c] * B[t, run]
            y[c] = (h[c] * C[t, run]).sum() + skip[c] * x[t, c]
        ys.append(y * silu(z[t]))
    y = torch.stack(ys)
    if mixer == "mamba2":
        y = y.view(l, H, hd)
        y = (y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).view(l, D) * w["norm.weight"]
    return y @ w["out_proj.weight"].T


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_authors_checkpoint(mixer, tmp_path):
    w = write_authors(tmp_path, mixer)
    model = S.load_authors_checkpoint(str(tmp_path), torch.float64)
    assert model.config.mixer == mixer and sorted(model.mixers()) == [0, 1, 3]
    u = torch.randn(7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, ours in model.mixers().items():
        prefix = f"model.layers.{i}.mamba."
        theirs = {n[len(prefix):]: p for n, p in w.items() if n.startswith(prefix)}
        with torch.no_grad():
            y = ours(u[None])[0][0]
        assert torch.allclose(y, authors_mixer(theirs, u, mixer), rtol=1e-6, atol=1e-6)
    plain = S.generate(model, [[1, 2, 3]], 12)
    got = S.speculative_decode(model, S.LayerSubsetDraft(model, [0, 2]), [[1, 2, 3]], 12)
    assert plain.tokens[0].tolist() == got.tokens[0].tolist()
    assert S.load_authors_checkpoint(str(tmp_path)).dtype == torch.bfloat16


def test_authors_checkpoint_errors(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        S.load_authors_checkpoint(str(tmp_path))
    write_authors(tmp_path, "mamba", d_xb=99)
    with pytest.raises(ValueError, match="d_xb 99"):
        S.load_authors_checkpoint(str(tmp_path))
    write_authors(tmp_path, "mamba")
    os.remove(tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        S.load_authors_checkpoint(str(tmp_path))
    w = write_authors(tmp_path, "mamba")
    for name, shape, line in (("model.layers.3.mamba.new", (1,), "unknown tensor of a mamba"),
                              ("model.layers.3.mamba.A_log", (3, 4), r"has shape \(3, 4\)")):
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        torch.save(w | {name: torch.zeros(shape)}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=line):
            S.load_authors_checkpoint(str(tmp_path))
    torch.save(w, tmp_path / "pytorch_model.bin")
    ours = dict(S.load_authors_checkpoint(str(tmp_path), torch.float64).named_parameters())
    assert torch.equal(ours["model.layers.3.self_attn.dt_bias"],
                       2 * w["model.layers.3.mamba.dt_proj.bias"].double())
    assert torch.equal(ours["lm_head.weight"], w["lm_head.weight"].double())


@pytest.mark.parametrize("authors", [True, False])
def test_hub_name(authors, tmp_path):
    """A name instead of a directory, as the hub's own cache holds it after a download; --target
    finds out by itself whether it is in the authors' format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    cache = tmp_path / "hub" / "models--someone--model"
    folder = cache / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    if authors:
        write_authors(folder, "mamba2")
    else:
        toy_llama(vocab=VS).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, "spec_decode.py"), "--target", "someone/model",
         "--prompt", "one two three one two", "--max-new-tokens", "8"], capture_output=True,
        text=True, timeout=120, env=clean_environment(HF_HOME=str(tmp_path)))
    assert done.returncode == 0 and "1 of 1" in done.stdout, done.stderr


# ---- the command line, as a user types it ----------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with tiny_run/{teacher,mamba,mamba2}: random weights, a real tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer, _ = M.tiny_world()
    for name in ("teacher", "mamba2", "mamba"):
        # a teacher unsure enough that 256 rows will also say the mark that begins an answer
        model = toy_llama(vocab=len(tokenizer), width=32, sharp=1.0 if name == "teacher" else 8.0)
        model.config.max_position_embeddings = 1024     # --compare-teacher has long prompts
        if name != "teacher":
            model = M.convert_to_hybrid(model, [1, 3], name)
        model.generation_config.eos_token_id = 2
        model.save_pretrained(folder / "tiny_run" / name)
        tokenizer.save_pretrained(folder / "tiny_run" / name)
    return folder


def spec_cli(home, text):
    """Run `python spec_decode.py <text>`. -> exit code, stdout, stderr"""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "spec_decode.py")
    done = subprocess.run([sys.executable, script, *shlex.split(text)], cwd=home, text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_command_tiny(home):
    code, out, err = spec_cli(home, "--tiny --max-new-tokens 16 --json t.json")
    assert code == 0, err
    rows = json.loads((home / "t.json").read_text())
    assert len(rows) == 6 and all(r["identical"] == "1 of 1" for r in rows[1:])
    assert "round  1:" in out and "speed-up" in out and "Traceback" not in err


@pytest.mark.parametrize("draft", ["ngram:3", "layers:0,3", "tiny_run/mamba"])
def test_command_decodes(home, draft):
    code, out, err = spec_cli(home, f"--target tiny_run/mamba2 --draft {draft} --lookahead 3 "
                                   "--prompt 'The import statement' --max-new-tokens 16")
    assert code == 0 and out.rstrip().endswith("1 of 1"), err


def test_command_samples(home):
    code, out, err = spec_cli(home, "--target tiny_run/mamba2 --draft layers:0,3 --temperature 0.9 "
                                   "--top-k 20 --prompt 'The import statement' --max-new-tokens 9")
    assert code == 0 and out.rstrip().endswith("(sampled)"), err


def test_command_bench(home):
    code, out, err = spec_cli(home, "--bench --sizes tiny --max-new-tokens 8 --json b.json")
    assert code == 0 and "SIMULATED" in out, err
    assert {"speed_up", "share_of_floor", "verify_over_step"} <= set(
        json.loads((home / "b.json").read_text())[0])


def test_bench_kernel_and_pictures(tmp_path, monkeypatch):
    """Every T of every layer once; both kinds of rows can be drawn."""
    pytest.importorskip("matplotlib")
    layers = {"a": ("mamba2", 2, 1, 8, 8), "b": ("mamba", 4, 2, 4, 4)}
    monkeypatch.setattr(S, "KERNEL_LAYERS", layers)
    rows = S.bench_kernel(None, torch.device("cpu"))
    assert [(r["layer"], r["T"]) for r in rows] == [(a, T) for a in layers for T in range(1, 17)]
    assert all(r["us_single_steps"] == r["us"] for r in rows if r["T"] == 1)
    S.plot(rows, tmp_path / "kernel.png")
    S.plot([dict(target="t", draft="d", K=4, speed_up=2.0, paper_speed_up=p) for p in (None, 1.8)],
           tmp_path / "bench.png")
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_acceptance_for_gives_the_papers_gen():
    """# Gen = 1 + P + ... + P^K; a # Gen out of reach is a draft that is always right."""
    for gen, K in (3.9, 3), (3.6, 4), (1.0, 4):
        assert abs(sum(S.acceptance_for(gen, K) ** j for j in range(K + 1)) - gen) < 2e-3
    assert S.acceptance_for(4.04, 3) == 1.0


def test_command_needle(home):
    code, out, err = spec_cli(home, "--needle --target tiny_run/mamba2 --lengths 64 96 --depths "
                                   "0 1 --trials 1")
    assert code == 0 and "cache of one row" in out, err


def test_command_compare_teacher(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    main(["--compare-teacher", "tiny_run/teacher", "--target", "tiny_run/mamba2", "--tokens", "3",
          "--json", "c.json"])
    assert capsys.readouterr().out.count("10 of 10") == 4
    assert len(json.loads((home / "c.json").read_text())) == 12


def test_command_make_draft(home):
    code, out, err = spec_cli(home, "--make-draft layers:0,2 --target tiny_run/teacher --out new "
                                   "--rows 256 --length 48 --minutes 0.02 --max-new-tokens 8")
    assert code == 0 and (home / "new" / "config.json").exists(), err
    assert re.search(r"fine-tuned .* (\d+) of \1\n", out), out


WRONG = [("", "--target and --prompt"), ("--tiny --bench", "give one of"),
         ("--target nowhere --prompt x", "cannot load nowhere"),
         ("--target tiny_run/mamba2 --prompt x --draft layers:9", "0..3"),
         ("--target tiny_run/mamba2 --prompt x --draft ngram:x", "ngram:x"),
         ("--target tiny_run/mamba2 --prompt x --lookahead 16", "ring of 16"),
         ("--target tiny_run/mamba2 --prompt x --lookahead 0", "lookahead"),
         ("--target tiny_run/mamba2 --prompt x --temperature -1", "temperature"),
         ("--target tiny_run/mamba2 --prompt x --draft tiny_run/mamba --draft-words 0", "words"),
         ("--bench --sizes 9b", "9b"), ("--bench --simulate-acceptance 1.5", "1.5"),
         ("--make-draft layers:0 --target tiny_run/teacher --out tiny_run", "is not empty"),
         ("--make-draft ngram:3 --target tiny_run/teacher --out x", "want layers:I,J"),
         ("--tiny --rows 3", "unknown: --rows 3"), ("--needle --lengths 8", "at least 64"),
         ("--bench --json nowhere/x.json", "--json: there is no directory nowhere"),
         ("--bench --plot nowhere/x.png", "--plot: there is no directory nowhere")]


@pytest.mark.parametrize("text, message", WRONG, ids=[t for t, _ in WRONG])
def test_command_errors(home, text, message, monkeypatch, capsys):
    """One line and exit code 2; in this process, since importing torch takes seconds."""
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as stop:
        M.cli(lambda: S.main(shlex.split(text)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and message in line


def test_outputs_are_checked_before_the_toy_story(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_run").mkdir()
    with pytest.raises(ValueError, match="no directory nowhere"):
        M.parse_args(["--tiny", "--json", "nowhere/f.json"])
    assert (tmp_path / "tiny_run").exists(), "nothing is replaced yet"
    with pytest.raises(ValueError, match="--curves nowhere.json: no file"):
        parse_args(["--curves", "nowhere.json", "--plot", str(tmp_path)])


@pytest.mark.parametrize("run, text", [
    (S.parse_args, "--bench --plot x.png"), (lambda argv: parse_args(argv), "--ablate --plot x")])
def test_pictures_want_matplotlib_before_the_work(run, text, monkeypatch):
    monkeypatch.setattr(M, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run(text.split())


# ---------------------------------------------------------------------------------------------
# 13. A debugger can stop inside: at the weight moves, in VERIFY and inside the Triton kernel.
# ---------------------------------------------------------------------------------------------


def readme_block(beginning):
    """The fenced block of README.md that begins so, without its fence."""
    with open(os.path.join(HERE, "README.md")) as file:
        found, = (b for b in re.findall(r"```\w*\n(.*?)```", file.read(), re.S)
                  if b.startswith(beginning))
    return found


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is for CPUs")
def test_pdb_tour_of_the_readme(tmp_path):
    """The README's session, typed into pdb: weight moves, VERIFY, inside the Triton kernel."""
    (tmp_path / "session.py").write_text(readme_block("import torch, mamba_in_llama as M"))
    with open(os.path.join(HERE, "mamba_in_llama.py")) as file:
        text = file.read()
    assert text.count("# 2. new tokens among themselves") == 1
    line = 2 + text[:text.index("# 2. new tokens among themselves")].count("\n")
    typed = [v.split("  #")[0] for v in readme_block("n  ").splitlines()]
    typed = "\n".join(typed).replace("LINE", f"{os.path.join(HERE, 'mamba_in_llama.py')}:{line}")
    done = subprocess.run([sys.executable, "-m", "pdb", "session.py"], cwd=tmp_path, text=True,
                          input=typed + "\n", capture_output=True, timeout=120,
                          env=clean_environment(TRITON_INTERPRET="1", PYTHONPATH=HERE))
    for seen in (r"'C': slice\(64, 96, None\)", r"\(tensor\(\[\d+\]\), tensor\(\[\[ *\d+, +\d+,",
                 r"-> scores \*= ", r"\(5, 16, 16\)"):
        assert re.search(seen, done.stdout), done.stdout + done.stderr


# ---- the README's other promises -------------------------------------------------------------


def readme_commands():
    """Every `python ...` line in the README's bash blocks, comments and continuations resolved."""
    with open(os.path.join(HERE, "README.md")) as file:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", file.read(), re.S))
    return [shlex.split(line, comments=True)[1:] for line in
            blocks.replace("\\\n", " ").splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_commands_parse(words, tmp_path, monkeypatch):
    """The tests of sections 11, 12 and 15 run each kind of command; here every flag is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "find_spec", bool)       # --plot: as if matplotlib were installed
    program, argv = words[0], words[1:]
    if program == "-m":
        assert argv == ["pytest", "test_all.py"]
    else:
        {"mamba_in_llama.py": M.parse_args, "spec_decode.py": S.parse_args,
         "test_all.py": parse_args}[program](argv)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_pipeline_without_this_project(home, share, tmp_path):
    """A saved directory in a bare process: chat, a padded batch, beams and sampling as here."""
    teacher = toy_llama(vocab=512, width=32, sharp=1.0)
    model = M.convert_to_hybrid(teacher, [1, 3] if share else [])
    tokenizer = AutoTokenizer.from_pretrained(home / "tiny_run" / "teacher")
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    M.save(model, SimpleNamespace(tokenizer=tokenizer), tmp_path / "saved")
    script = """if True:
        import importlib.util, json, transformers
        assert not importlib.util.find_spec("mamba_in_llama")
        pipe = transformers.pipeline("text-generation", "saved", trust_remote_code=True)
        pipe.tokenizer.padding_side = "left"
        def answer(text, **settings):
            out = pipe(text, max_new_tokens=12, **settings)
            return [row["generated_text"] for rows in out
                    for row in (rows if isinstance(rows, list) else [rows])]
        texts = ["The import statement", "A"]
        chat = [{"role": "user", "content": "What is a list?"}]
        print(json.dumps([answer(chat, do_sample=False)[0][-1]["content"],
                          answer(texts, do_sample=False, batch_size=2),
                          answer(texts, num_beams=3, do_sample=False, batch_size=2),
                          answer(texts, do_sample=True, top_k=1, batch_size=2)]))
        """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True,
                          capture_output=True, env=clean_environment(
                              HF_HOME=str(tmp_path / "home"),
                              HF_MODULES_CACHE=str(tmp_path / "modules")))
    assert done.returncode == 0, done.stderr
    chat, greedy, beams, sampled = json.loads(done.stdout.splitlines()[-1])
    words = functools.partial(tokenizer.decode, skip_special_tokens=True)
    ids = [S.encode("What is a list?", tokenizer), *(
        S.encode(text, tokenizer, raw=True) for text in ("The import statement", "A"))]
    ours = [words(new) for new in S.generate(model, ids, 12, eos_token_id=2).tokens]
    assert chat == ours[0] and greedy == [words(i) + a for i, a in zip(ids[1:], ours[1:])]
    batch, mask = left_pad([row.tolist() for row in ids[1:]], 2)
    out = model.generate(batch, attention_mask=mask, max_new_tokens=12, num_beams=3)
    assert beams == [words(row) for row in out] and sampled == greedy


def test_readme_exercises_fit_the_files():
    """What an exercise replaces stands exactly once in its file."""
    with open(os.path.join(HERE, "README.md")) as file:
        edits = re.findall(r"In `(\w+\.py)` replace `([^`]+)` by\s+`([^`]+)`", file.read())
    assert len(edits) >= 5
    for name, old, new in edits:
        with open(os.path.join(HERE, name)) as file:
            text = file.read()
        assert text.count(old) == 1 and new not in (old, ""), (name, old)


def test_ablations(tmp_path, capsys):
    """Table 9 and what stage 2 and 3 add, at the smallest size; a second call computes nothing."""
    runs = [BASE["50 %"], BASE["50 %"] + (SFT,), BASE["50 %"] + (SFT, DPO), OURS,
            stepwise(HALF, QUARTER), (("remove", HALF, ()), ALL)]
    ablation_world(tmp_path, SMALLEST)
    results = [ablation_run(run, 0, tmp_path, SMALLEST) for run in runs]
    assert all(r["ratio"] > 0 and 0 <= r["preference"] <= 1 for r in results)
    assert [list(r["curves"]) for r in results] == [
        ["stage 1"], ["SFT"], ["DPO"], ["alignment", "stage 1"], ["stage 1"], ["everything"]]
    rows = ablate("9", 1, tmp_path, SMALLEST, tmp_path / "f.json")
    printed = capsys.readouterr().out
    assert "2 runs, 2 of them done before" in printed and re.search(r"order: \d of 1", printed)
    assert [row["ratio"][0] for row in rows] == [results[0]["ratio"], results[-1]["ratio"]]
    assert json.loads((tmp_path / "f.json").read_text())["rows"] == rows


def test_ablation_sweep_runs_parents_first(tmp_path):
    results, run = {}, BASE["50 %"] + (DPO,)
    ablation_world(tmp_path, SMALLEST)
    sweep([(0, run), (0, BASE["50 %"])], results, tmp_path, SMALLEST, lambda: None)
    assert list(results) == [(0, BASE["50 %"]), (0, run)]


def test_verdict_counts_pairs_on_which_all_seeds_agree():
    rows = [dict(row="a", paper=1.0, ratio=[1.0, 1.1]), dict(row="b", paper=2.0, ratio=[1.2, 1.3]),
            dict(row="c", paper=3.0, ratio=[0.9, 1.0]), dict(row="d", paper=4.0, ratio=[1.1, 1.4])]
    line = verdict(rows, "ratio", paper_wants_high=False)
    assert line == ("order: 3 of 6 pairs as in the paper, 1 undecided between seeds; the other way "
                    "round: c beats a, c beats b")


def test_pictures_draw(tmp_path):
    pytest.importorskip("matplotlib")
    for run in (OURS, BASE["25 %"]):
        ablation_run(run, 0, tmp_path, SMALLEST)
    curves = [{kind: [2.0, 1.0, 0.5] for kind in RATES}]
    rows = [dict(table=key, row=label, paper=figure, ratio=[1.1], curves=curves)
            for key, table in TABLES.items() for label, _, figure in table.rows]
    plot_ablations(rows, tmp_path, SMALLEST, tmp_path / "assets")
    assert len(list((tmp_path / "assets").glob("*.png"))) == 4


def test_curves_of_real_runs_draw(tmp_path):
    """From the JSON file that the repository carries, by the command of the README."""
    pytest.importorskip("matplotlib")
    report = os.path.join(HERE, "assets", "h100_smollm2.json")
    if not os.path.exists(report):
        pytest.skip("no assets/ beside this file")
    main(["--curves", report, "--plot", str(tmp_path)])
    assert (tmp_path / "smollm2.png").stat().st_size > 10_000


# ---- --compare-teacher: what speculation brings a real model, and that it changes nothing ------


def trial_prompts():
    """Ten prompts that ask for free text, and ten for text that repeats itself. -> two lists"""
    free = [f"Tell me about {thing}." for thing in (
        "rain", "Paris", "bread", "the moon", "chess", "cats", "trains", "tea", "music", "bees")]
    code = (textwrap.indent, textwrap.shorten, textwrap.fill, shlex.join, shlex.quote)
    again = ["Add a comment to this code and print all of it:\n" + inspect.getsource(f)
             for f in code]
    again += ["Go on with this list up to 40:\n" + "".join(
        f"{i}. There are {i} {word} on the table.\n" for i in range(1, 9))
        for word in ("apples", "pens", "dogs", "cups", "keys")]
    return free, again


def compare_teacher(teacher, target, n_new):
    """20 prompts, greedy: plain decoding, ngram:3, and transformers' own generate. -> rows

    Hybrid and teacher each are their own target; transformers decodes the teacher on the same
    prompts, a quarter of the tokens. All times are without the prompt.
    """
    args = S.parse_args(["--target", target, "--prompt", "-", "--max-new-tokens", str(n_new)])
    device, n, rows = torch.device(DEVICE), max(1, n_new // 4), []
    (hybrid, tokenizer), (teacher, _) = S.load(target, device), S.load(teacher, device)

    @functools.lru_cache                                # once a prompt, not once a target
    def transformers_generate(prompt):
        spent = [timeit.timeit(lambda n_new=n_new: teacher.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False,
            max_new_tokens=n_new, min_new_tokens=n_new), timer=S.timer, number=1)
            for n_new in (n + 1, 1)]
        return S.DecodeResult([range(n + 1)], n, 0, 0, 1.0, spent[0] - spent[1], 0.0)

    for kind, texts in zip(("free text", "text that repeats itself"), trial_prompts()):
        prompts = [S.encode(text, tokenizer).to(device) for text in texts]
        for name, model in ("hybrid", hybrid), ("teacher", teacher):
            print(f"\n{name}, {len(prompts)} prompts for {kind}, {n_new} tokens")
            rows += [{"target": name, "prompts": kind} | row for row in S.compare(
                model, {"ngram:3": S.NGramDraft(3)}, prompts, args,
                **{"transformers, teacher": transformers_generate})]
    return rows


# ---------------------------------------------------------------------------------------------
# 14. --bench: training forms against a loop over tokens, at one layer of SmolLM2-135M.
# ---------------------------------------------------------------------------------------------


def time_scan(mixer, form, length, device, repeats=5):
    """Best seconds of forward + backward at (1,length), 9 heads of 64 x 64, and peak bytes."""
    torch.manual_seed(0)
    p, n = (1, 1) if mixer == "mamba2" else (64, 64)
    shapes = [(1, length, 9, 64), (1, length, 9, p), (9, p, n), (1, length, 9, 64),
              (1, length, 9, 64)]
    inputs = [torch.randn(s, device=device) for s in shapes]
    inputs[1], inputs[2] = F.softplus(inputs[1] - 4), -inputs[2].exp()
    inputs = [v.requires_grad_() for v in inputs]
    scan, best = getattr(M, form), math.inf
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(repeats):
        begin = time.perf_counter()
        y, _ = scan(*inputs)
        y.square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
    return best, peak


def bench(length=2048):
    """Print a table; each measurement in a fresh process, so that its peak memory is its own."""
    print(f"forward + backward of one layer's scan, (1, {length}), 9 heads, state 64 x 64, "
          f"float32, {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'mixer':<8}{'form':<14}{'ms':>10}{'peak MiB':>10}{'speed-up':>10}")
    rows = []
    for mixer in MIXERS:
        slow = None
        for form in ("recurrence", "chunked_scan"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak = pool.apply(time_scan, (mixer, form, length, DEVICE))
            slow = slow or seconds
            rows.append({"mixer": mixer, "form": form, "seconds": seconds, "peak_bytes": peak,
                         "speed_up": slow / seconds})
            print(f"{mixer:<8}{form:<14}{1e3 * seconds:10.1f}{peak / 2 ** 20:10.0f}"
                  f"{slow / seconds:9.1f}x", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------
# 15. --ablate: the paper's Tables 6 to 9 at toy size, then our own switches one at a time.
# ---------------------------------------------------------------------------------------------

# A run is a tuple of steps: where attention stays (with the recipe's fields that differ), then
# stages (name, share of the budget). Every run is made once per seed and kept in ./ablate_run;
# a run that goes on from another one starts from that one's student.
SIZE = dict(layers=8, width=64, teacher_steps=400, answers=1024, steps=120, batch=8, length=96,
            rows=48)
SMALLEST = dict(layers=8, width=64, teacher_steps=2, answers=8, steps=4, batch=2, length=48, rows=4)
HALF, QUARTER, EIGHTH, NONE = (1, 3, 5, 7), (3, 7), (7,), ()
MIXERS_ONLY, ALL, SFT, DPO = ("stage 1", 1.0), ("everything", 1.0), ("SFT", 0.5), ("DPO", 0.25)
ALIGNED = ("alignment", 0.4), ("stage 1", 0.6)              # the same number of steps in all
RATES = {"alignment": 1e-2, "stage 1": 5e-3, "everything": 5e-3, "SFT": 1e-3, "DPO": 5e-4}
METRICS = {"ratio": "perplexity ratio on the teacher's held-out answers, lower is better",
           "human_ratio": "perplexity ratio on held-out text that people wrote, lower is better",
           "preference": "share of held-out pairs where people's answer is the likelier one, "
                         "higher is better"}


def run_of(layers, *stages, **fields):
    """The run that keeps attention in `layers`; fields: what differs from near_linear."""
    return (("convert", layers, tuple(sorted(fields.items()))), *stages)


def random_start(layers, stage):
    return run_of(layers, stage, attn_init=False)


def stepwise(first, second):
    """Half of the budget at each share; the second student keeps what the first has learnt."""
    half = ("stage 1", 0.5)
    return run_of(first, half) + run_of(second, half)


class Table(NamedTuple):
    title: str
    metric: str                        # of METRICS: what the rows are ordered by
    paper: str                         # what the paper's figures are
    rows: list                         # (label, run, the paper's figure or None)


BASE = {share: run_of(layers, MIXERS_ONLY) for share, layers in (
    ("50 %", HALF), ("25 %", QUARTER), ("12.5 %", EIGHTH), ("0 %", NONE))}
OURS = run_of(HALF, *ALIGNED)
TABLES = {
    "6 left": Table("how much attention stays (stage 1 alone)", "ratio", "ratio", [
        (share + (" (paper: 6.25 %)" if share == "12.5 %" else ""), BASE[share], figure)
        for share, figure in zip(BASE, (1.03, 1.09, 1.22, 1.66))]),
    "6 right": Table("the stages after distillation", "preference", "MT-bench", [
        (f"{share}, {name}", BASE[share] + stages, figure)
        for share, figures in (("50 %", (5.55, 5.61, 5.42, 6.69)),
                               ("25 %", (5.01, 4.97, 4.84, 6.10)))
        for (name, stages), figure in zip((("stage 1", ()), ("+ SFT", (SFT,)), ("+ DPO", (DPO,)),
                                           ("+ SFT + DPO", (SFT, DPO))), figures)]),
    "7 left": Table("attention's weights at the start, and MLPs frozen or not", "ratio",
                    "perplexity", [
        (f"{share}, {start}, {rest}", (run_of if start == "attention" else random_start)(
            layers, stage), figure)
        for share, layers, figures in (("0 %", NONE, (3.36, 66.7, 18.2, 20.3)),
                                       ("50 %", HALF, (2.09, 9.1, 7.4, 11.2)))
        for (start, rest, stage), figure in zip((
            ("attention", "frozen", MIXERS_ONLY), ("attention", "not frozen", ALL),
            ("random", "frozen", MIXERS_ONLY), ("random", "not frozen", ALL)), figures)]),
    "7 right": Table("which layers stay, and stepwise or at once", "ratio", "perplexity", [
        ("50 %, interleaved", BASE["50 %"], 2.09),
        ("50 %, the first 4 layers", run_of((0, 1, 2, 3), MIXERS_ONLY), 2.41),
        ("25 %, interleaved, stepwise", stepwise(HALF, QUARTER), 2.20),
        ("25 %, interleaved, at once", BASE["25 %"], 2.29),
        ("25 %, the first 2 layers, stepwise", stepwise((0, 1, 2, 3), (0, 1)), 2.89)]),
    "8": Table("attention's weights at the start, 50 %", "human_ratio", "LAMBADA", [
        ("attention", BASE["50 %"], 6.20), ("random", random_start(HALF, MIXERS_ONLY), 55.01)]),
    "9": Table("Mamba, or the layers simply removed, 50 %", "human_ratio", "LAMBADA", [
        ("Mamba blocks", BASE["50 %"], 6.20),
        ("layers removed, the rest trained", (("remove", HALF, ()), ALL), 151.98)]),
    "ours": Table("one switch at a time, 50 %, alignment and stage 1", "ratio", "", [
        ("near_linear", OURS, None),
        ("no alignment (as long a stage 1)", BASE["50 %"], None),
        ("RoPE dropped", run_of(HALF, *ALIGNED, rope=False), None),
        ("random gate", run_of(HALF, *ALIGNED, gate="default"), None),
        ("random convolution + SiLU", run_of(HALF, *ALIGNED, conv="default"), None),
        ("slow decays", run_of(HALF, *ALIGNED, decay="slow"), None),
        ("gated norm", run_of(HALF, *ALIGNED, norm=True), None),
        ("the authors' start", run_of(HALF, *ALIGNED, **M.RECIPES["paper"]), None)]),
}


RUNS = {run: f"{key}: {label}" for key, table in reversed(TABLES.items())
        for label, run, _ in table.rows}                    # every run once, named by a table
PARENTS = {run: max((p for p in RUNS if p == run[:len(p)] and p != run), key=len, default=())
           for run in RUNS}


def ablation_world(folder, size):
    """The one teacher of all runs and its data, made once and kept in `folder`.

    Answers are sampled at temperature 1, so that no student can beat the teacher's perplexity on
    them but by luck. Of a pair of preferences a person wrote one answer, the teacher the other one
    (at temperature 0.6).

    -> teacher, {"train", "heldout", "sft", "human", "chosen", "rejected", "right", "wrong"}
    """
    file = os.path.join(folder, "world.pt")
    if not os.path.exists(file):
        os.makedirs(folder, exist_ok=True)
        torch.manual_seed(0)
        tokenizer, pairs = M.tiny_world()
        chat, length = M.Chat(tokenizer), size["length"]
        seen, human = [[chat.pair(*p) for i, p in enumerate(pairs) if (i % 10 == 0) == held]
                       for held in (False, True)]
        teacher = M.tiny_teacher(len(tokenizer), torch.tensor([t for p, a in seen for t in p + a]),
                                 size["teacher_steps"], layers=size["layers"], width=size["width"])

        def answers(asked, seed, temperature=1.0):
            return M.sample(teacher, asked, length - 32, chat.end, 512, temperature, 0, seed)

        def preferences(pairs, seed):
            """Both answers cut to the same number of tokens."""
            wrong = answers([p for p, _ in pairs], seed, 0.6)
            cut = [min(len(a), len(b)) - 1 for (_, a), b in zip(pairs, wrong)]
            return [chat.pack([(p, v[:n]) for (p, _), v, n in zip(pairs, side, cut)], length)
                    for side in ([a for _, a in pairs], wrong)]

        asked, held = ([p for p, _ in pairs] for pairs in (seen[:size["answers"]],
                                                           human[:size["rows"]]))
        chosen, rejected = preferences(seen[:size["answers"] // 2], 2)
        right, wrong = preferences(human, 3)
        torch.save(dict(
            train=chat.pack(zip(asked, answers(asked, 0)), length), sft=chat.pack(seen, length),
            heldout=chat.pack(zip(held, answers(held, 1)), length),
            human=chat.pack(human[:size["rows"]], length), chosen=chosen, rejected=rejected,
            right=right, wrong=wrong, config=teacher.config.to_dict(),
            teacher=teacher.state_dict()), file)
    data = torch.load(file)
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(**data.pop("config"))).eval()
    teacher.load_state_dict(data.pop("teacher"))
    return teacher, data


def file_of(run, seed, folder):
    """Where a run's result is kept, and its student if another run starts from it."""
    return os.path.join(folder, hashlib.sha1(repr((run, seed)).encode()).hexdigest()[:16] + ".pt")


def ablation_run(run, seed, folder, size):
    """One run, from its parent's student or from the teacher; evaluated and kept. -> its result

    A seed is a draw of what conversion leaves to chance, and an order of the data.
    """
    torch.set_num_threads(1)
    teacher, data = ablation_world(folder, size)
    start, student, curves = time.monotonic(), None, {}
    shuffled = {}
    for name in ("train", "sft", "chosen", "rejected"):     # a pair keeps its two halves together
        draw = torch.Generator().manual_seed(seed)
        shuffled[name] = [v[torch.randperm(len(v), generator=draw.manual_seed(seed))]
                          for v in data[name]]
    if PARENTS[run]:
        student = torch.load(file_of(PARENTS[run], seed, folder), weights_only=False)["student"]
    for kind, value, *fields in run[len(PARENTS[run]):]:
        torch.manual_seed(seed)
        if kind == "convert":
            older, student = student, M.convert_to_hybrid(teacher, value, **dict(*fields))
            if older is not None:                           # stepwise: keep what is distilled
                ours = student.state_dict()
                student.load_state_dict({k: v for k, v in older.state_dict().items()
                                         if k in ours}, strict=False)
        elif kind == "remove":
            student = copy.deepcopy(S.LayerSubsetDraft(teacher, value))
        else:
            losses = ablation_stage(kind, student, teacher, shuffled, dict(
                steps=round(value * size["steps"]), batch_size=size["batch"], lr=RATES[kind]))
            curves[kind] = [loss for _, loss in losses]
    result = M.evaluate(student, teacher, data["heldout"][0], labels=data["heldout"][1])
    human = M.evaluate(student, teacher, data["human"][0], labels=data["human"][1])
    with torch.no_grad():
        right, wrong = (M.preference_logps(student, *data[side]) for side in ("right", "wrong"))
    result.update(human_ratio=human["ratio"], preference=(right > wrong).float().mean().item(),
                  curves=curves, seconds=time.monotonic() - start)
    kept = student if run in PARENTS.values() or run == OURS else None
    torch.save({"result": result, "student": kept}, file_of(run, seed, folder))
    return result


def ablation_stage(kind, student, teacher, data, options):
    """One stage of a run. -> list of (step, loss)"""
    if kind == "alignment":
        return M.align_mixers(student, teacher, data["train"][0], **options)
    if kind == "DPO":
        return M.dpo(student, teacher, data["chosen"], data["rejected"], **options)
    if kind == "SFT":
        return M.distil(kind, student, teacher, *data["sft"], beta=0.0, **options)
    return M.distil(kind, student, teacher, *data["train"], alpha=0.1, beta=1.0,
                    only_mixers=kind == "stage 1", **options)


def sweep(todo, results, folder, size, after_each):
    """Run (seed, run) jobs on all cores, a parent before its children; fills `results`."""
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    todo, running = list(todo), {}
    bar = M.tqdm(total=len(todo), unit="run")
    with ProcessPoolExecutor(len(cores), multiprocessing.get_context("spawn")) as pool:
        while todo or running:
            for seed, run in list(todo):
                if len(running) < len(cores) and (not PARENTS[run] or
                                                  (seed, PARENTS[run]) in results):
                    running[pool.submit(ablation_run, run, seed, folder, size)] = seed, run
                    todo.remove((seed, run))
            bar.set_description(" | ".join(f"{RUNS[r]}, seed {s}" for s, r in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future)] = future.result()
                bar.update()
                after_each()
    bar.close()


def ablate(only="", seeds=3, folder="ablate_run", size=None, json_file=None):
    """All runs of the tables whose name begins with `only`, then the tables. -> their rows

    What stands in `folder` is taken from there, so an interrupted sweep goes on.
    """
    size, tables = size or SIZE, {k: t for k, t in TABLES.items() if k.startswith(only)}
    M.require(tables, f"--only {only!r}: want the beginning of one of {', '.join(TABLES)}")
    print(f"teacher of {size['layers']} layers, mamba2, {size['steps']} steps of {size['batch']} x "
          f"{size['length']} tokens per run, seeds 0..{seeds - 1}; all is kept in {folder}")
    start, (teacher, data) = time.monotonic(), ablation_world(folder, size)
    human = M.evaluate(teacher, teacher, data["human"][0], labels=data["human"][1])["perplexity"]
    print(f"the teacher's perplexity on text that people wrote: {human:.2f}", flush=True)
    wanted = [row[1] for table in tables.values() for row in table.rows]
    wanted = dict.fromkeys(r for run in wanted for r in (PARENTS[PARENTS[run]] if PARENTS[run]
                                                         else (), PARENTS[run], run) if r)
    jobs, results = list(itertools.product(range(seeds), wanted)), {}
    for seed, run in jobs:
        if os.path.exists(file_of(run, seed, folder)):
            results[seed, run] = torch.load(file_of(run, seed, folder),
                                            weights_only=False)["result"]

    def write():
        rows = ablation_rows(tables, results)
        if json_file:
            with open(json_file, "w") as file:
                json.dump({"size": size, "torch": torch.__version__, "rows": rows}, file, indent=1)
        return rows

    print(f"{len(jobs)} runs, {len(results)} of them done before", flush=True)
    sweep([job for job in jobs if job not in results], results, folder, size, write)
    rows = write()
    print_ablations(tables, rows)
    print(f"\n{sum(r['seconds'] for r in results.values()):.0f} core-seconds of runs; "
          f"{time.monotonic() - start:.0f} s this time, {torch.__version__}")
    return rows


def ablation_rows(tables, results):
    """One row per table row: each metric's values, a list over the seeds that are done."""
    rows = []
    for key, table in tables.items():
        for label, run, figure in table.rows:
            done = [r for (_, other), r in sorted(results.items(), key=lambda kv: kv[0][0])
                    if other == run]
            curves = [{k: [round(v, 4) for v in c] for k, c in r["curves"].items()} for r in done]
            rows.append({"table": key, "row": label, "paper": figure, "curves": curves} | {
                m: [r[m] for r in done] for m in ("ratio", "human_ratio", "kl", "agreement",
                                                  "preference", "seconds")})
    return rows


def verdict(rows, metric, paper_wants_high):
    """Do the rows stand in the paper's order? A pair counts when every seed ranks it the same way.

    -> one line
    """
    agree, differ, open_pairs = 0, [], 0
    for a, b in itertools.combinations(rows, 2):
        better, worse = (a, b) if (a["paper"] > b["paper"]) == paper_wants_high else (b, a)
        sign = 1 if metric == "preference" else -1
        gains = [sign * (x - y) for x, y in zip(better[metric], worse[metric])]
        if all(g > 0 for g in gains):
            agree += 1
        elif all(g < 0 for g in gains):
            differ.append(f"{worse['row']} beats {better['row']}")
        else:
            open_pairs += 1
    return (f"order: {agree} of {agree + len(differ) + open_pairs} pairs as in the paper"
            + f", {open_pairs} undecided between seeds" * bool(open_pairs)
            + (f"; the other way round: {', '.join(differ)}" if differ else ""))


def print_ablations(tables, rows):
    """Each table with the paper's figures beside ours, mean and spread over seeds."""
    def show(values):
        return f"{numpy.mean(values):.3f} +- {numpy.std(values):.3f}"

    for key, table in tables.items():
        mine = [r for r in rows if r["table"] == key]
        names = {"ratio": "ratio", "human_ratio": "on people's text", "kl": "KL, nats",
                 "preference": "preference"}
        print(f"\n{'Table ' * key[0].isdigit()}{key}: {table.title}. Ordered by the "
              f"{METRICS[table.metric]}.\n{'':<38}{table.paper and 'paper: ' + table.paper:>18}"
              + "".join(f"{name + '*' * (m == table.metric):>19}" for m, name in names.items()))
        for r in mine:
            figure = "" if r["paper"] is None else f"{r['paper']:.2f}"
            print(f"{r['row']:<38}{figure:>18}" + "".join(f"{show(r[m]):>19}" for m in names))
        if table.paper:
            print(verdict(mine, table.metric, table.paper == "MT-bench"))


COLOURS = dict(blue="#0072B2", orange="#E69F00", green="#009E73", red="#D55E00", sky="#56B4E9",
               pink="#CC79A7", grey="#CCCCCC")              # Okabe and Ito: colour-blind safe


def picture(path, draw, width=9, height=5, panels=(1, 1)):
    """Let `draw` fill axes whose letters stay legible at half the width, and save. (matplotlib)"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context({"font.size": 16, "axes.spines.top": False, "axes.spines.right": False,
                         "lines.linewidth": 2.5, "lines.markersize": 9}):
        figure, axes = plt.subplots(*panels, figsize=(width, height))
        draw(axes)
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        plt.close(figure)
    print("drew", path)


def draw_weights(axis):
    """Which weight goes where; heights are rows, of 4 query heads to 2 key/value heads."""
    def block(x, y, height, name, colour):
        axis.bar(x, height, 1.6, y, color=COLOURS[colour], edgecolor="white", linewidth=2)
        axis.text(x, y + height / 2, name, ha="center", va="center")
        return y + height / 2

    def arrow(y, z):
        axis.annotate("", (4.1, z), (0.9, y), arrowprops=dict(arrowstyle="-|>", lw=2.5))

    y, z = 1.5, 0.0
    for name, new, height, colour in (("$W_Q$", "C", 4, "sky"), ("$W_K$", "B", 2, "green"),
                                      ("$W_V$", "x", 2, "orange")):
        z = z + (0.9 if new == "C" else 0)
        arrow(block(0, y, height, name, colour), block(5, z, height, new, colour))
        y, z = y + height + 0.7, z + height
    block(5, 0, 0.9, "$\\Delta$", "grey")
    block(5, z, 4, "gate z", "grey")
    arrow(block(0, -4.8, 4, "$W_O$", "pink"), block(5, -5.3, 4, "out", "pink"))
    axis.text(0, y + 0.3, "attention", ha="center", weight="bold")
    axis.text(5, z + 4.4, "mixer: in_proj", ha="center", weight="bold")
    axis.text(5, -1.0, "out_proj", ha="center", weight="bold")
    axis.text(9.2, z + 4.4, "new (grey): how it starts", ha="center", weight="bold")
    for i, (name, how) in enumerate((
            ("gate z", "weights 0, bias so that silu(z) = 1"),
            ("conv1d", "1 for this token, 0 before"),
            ("$\\Delta$", "0.001 .. 0.1, by its bias"), ("A", "in $-$16 .. $-$1"),
            ("skip D", "0"))):
        block(7.2, z + 2.2 - 2.2 * i, 1.6, name, "grey")
        axis.text(8.2, z + 3 - 2.2 * i, how, va="center", size=14)
    axis.set(xlim=(-1.2, 13), ylim=(-5.6, z + 5.4))
    axis.axis("off")


def draw_shares(axis, rows):
    """Table 6 left: perplexity ratio against the share of attention that stays."""
    ours = [r for r in rows if r["table"] == "6 left"]
    x, values = [50, 25, 12.5, 0], [r["ratio"] for r in ours]
    axis.errorbar(x, [numpy.mean(v) for v in values], [numpy.std(v) for v in values], capsize=6,
                  marker="o", color=COLOURS["blue"],
                  label=f"ours: toy teacher, {len(values[0])} seeds")
    axis.plot([50, 25, 6.25, 0], [r["paper"] for r in ours], "s--", color=COLOURS["red"],
              label="paper: Zephyr 7B")
    axis.axhline(1, color="black", lw=1)
    axis.set(xlabel="attention layers that stay, %", ylabel="perplexity, student / teacher",
             xlim=(53, -3))
    axis.legend()


def draw_curves(axes, rows):
    """Losses of the stages over their steps, mean of ten steps and of the seeds."""
    named = {(r["table"], r["row"]): r["curves"] for r in rows}
    aligned, plain = named["ours", "near_linear"], named["6 left", "50 %"]
    later = named["6 right", "50 %, + SFT + DPO"]
    panels = (("alignment", "|mixer - attention|² / |attention|²", [("", aligned)]),
              ("stage 1", "Eq. 2, nats per token", [("aligned first", aligned),
                                                    ("not aligned", plain)]),
              ("SFT", "cross-entropy, nats per token", [("", named["6 right", "50 %, + SFT"])]),
              ("DPO", "Eq. 4", [("", later)]))
    for axis, (stage, unit, lines) in zip(axes, panels):
        for (label, curves), colour, style in zip(lines, ("blue", "red"), ("-", "--")):
            curve = numpy.mean([c[stage] for c in curves], 0)
            n = max(1, len(curve) // 12)
            curve = curve[:len(curve) // n * n].reshape(-1, n).mean(-1)
            axis.plot(n * (0.5 + numpy.arange(len(curve))), curve, style, label=label,
                      color=COLOURS[colour])
        axis.set(title={"SFT": "stage 2: SFT", "DPO": "stage 3: DPO"}.get(stage, stage),
                 xlabel="step", ylabel=unit)
        if len(lines) > 1:
            axis.legend()


def draw_runs(axes, runs):
    """Losses of alignment and stage 2, means of a sixtieth of the stage; runs: {name: its table}"""
    for axis, stage, unit in zip(axes, ("alignment", "stage 2"), (
            "|mixer - attention|² / |attention|²", "Eq. 2, nats per token")):
        for (name, rows), colour in zip(runs.items(), ("blue", "sky", "orange", "red")):
            row = next(r for r in rows if r["stage"].startswith(stage))
            parts = numpy.array_split(row["losses"], 60)
            x = (numpy.arange(60) + 0.5) * row["steps"] / 60
            axis.plot(x, [part.mean() for part in parts], label=name, color=COLOURS[colour])
        axis.set(title=stage, xlabel="step of 64 x 512 tokens", ylabel=unit)
    axes[0].set_yscale("log")
    axes[1].legend()


def draw_trace(axis, folder, size, n_rounds=12, K=4):
    """Algorithm 2 round by round: a 25 % hybrid drafts for an aligned 50 % hybrid."""
    _, data = ablation_world(folder, size)
    tokenizer, rounds = M.tiny_world()[0], []
    target, draft = (torch.load(file_of(run, 0, folder), weights_only=False)["student"].eval()
                     for run in (OURS, BASE["25 %"]))
    length = int((data["human"][1][0] == -100).logical_not().int().argmax())
    S.speculative_decode(target, draft, data["human"][0][:1, :length], n_rounds * (K + 1), K,
                         on_round=lambda rows, proposal, n, token: rounds.append(
                             (proposal.tokens[0].tolist(), int(n[0]), int(token[0]))))
    rounds = rounds[:n_rounds]
    for i, (drafted, n, token) in enumerate(rounds):
        cells = [(v, "sky" if j < n else "grey") for j, v in enumerate(drafted)]
        for j, (word, colour) in enumerate([*cells, (token, "orange")]):
            x = j if j < K else K + 0.3
            axis.bar(x, 0.86, 0.94, i - 0.43, color=COLOURS[colour])
            text = repr(tokenizer.decode([word]))[1:-1].replace("$", "\\$").replace(" ", "␣")
            axis.text(x, i, text, ha="center", va="center", size=13)
        axis.text(K + 1.0, i, f"{n} + 1", va="center", size=14)
    axis.set(xlim=(-0.6, K + 1.8), ylim=(len(rounds) - 0.4, -1.6), ylabel="round",
             yticks=range(0, len(rounds), 2), yticklabels=range(1, len(rounds) + 1, 2),
             xticks=[*range(K), K + 0.3], xticklabels=[*(f"draft {j + 1}" for j in range(K)),
                                                       "target"])
    for x, name, colour in ((-0.4, "stands", "sky"), (1.1, "rejected", "grey"),
                            (2.8, "the target's own", "orange")):
        axis.text(x, -1.0, name, va="center", bbox=dict(fc=COLOURS[colour], ec="none"))


def plot_ablations(rows, folder, size, out):
    """The README's pictures, from a sweep over all tables."""
    os.makedirs(out, exist_ok=True)
    at = functools.partial(os.path.join, out)
    picture(at("weights.png"), draw_weights, 12, 6.5)
    picture(at("attention_share.png"), lambda axis: draw_shares(axis, rows))
    picture(at("curves.png"), lambda axes: draw_curves(axes.flat, rows), 12, 9, (2, 2))
    picture(at("speculation.png"), lambda axis: draw_trace(axis, folder, size), 9, 6.5)


def plot_runs(report, out):
    """smollm2.png from a JSON file {run: what mamba_in_llama.py --json wrote, ...}."""
    tables = {f"{mixer}, {run['args']['attention']:.1%}".replace(".0%", "%"): rows
              for run in report.values() if "args" in run and run["args"]["minutes"]
              for mixer, rows in run["tables"].items()}
    os.makedirs(out, exist_ok=True)
    picture(os.path.join(out, "smollm2.png"), lambda axes: draw_runs(axes, tables), 14, 6, (1, 2))


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Slow checks; the tests: pytest test_all.py")
    parser.add_argument("--bench", action="store_true", help="training forms against a token loop")
    parser.add_argument("--length", type=int, default=2048, help="tokens of --bench (2048)")
    parser.add_argument("--ablate", action="store_true", help="the paper's Tables 6 to 9 at toy "
                        "size, our own switches; resumes from ./ablate_run")
    parser.add_argument("--only", metavar="TABLE", default="", help="of --ablate: 6, '7 left', ...")
    parser.add_argument("--seeds", type=int, default=3, help="of --ablate (3)")
    parser.add_argument("--curves", metavar="FILE", help="draw the losses of the runs in this "
                        "JSON file")
    parser.add_argument("--plot", metavar="DIR", help="of --ablate and --curves: for the pictures")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--compare-teacher", metavar="DIR", help="a teacher and its hybrid, "
                        "--target, decode 20 prompts plainly, with ngram:3, and by transformers")
    parser.add_argument("--target", metavar="DIR", help="of --compare-teacher: the hybrid")
    parser.add_argument("--tokens", type=int, default=128, help="of --compare-teacher (128)")
    args = parser.parse_args(argv)
    if args.bench + args.ablate + bool(args.curves and args.plot) + bool(
            args.compare_teacher and args.target) != 1:
        parser.error("give --bench, --ablate, --curves and --plot, or --compare-teacher and "
                     "--target; the tests: python -m pytest test_all.py")
    if args.plot and not args.curves and (not args.ablate or args.only):
        parser.error("--plot goes with --ablate and needs all of its tables, or with --curves")
    M.require(not args.curves or os.path.isfile(args.curves), f"--curves {args.curves}: no file")
    M.check_outputs(json=args.json, plot=args.plot and os.curdir)       # --plot's DIR is made
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.curves:
        with open(args.curves) as file:
            return plot_runs(json.load(file), args.plot)
    if args.ablate:
        rows = ablate(args.only, args.seeds, json_file=args.json)
    else:
        rows = bench(args.length) if args.bench else compare_teacher(
            args.compare_teacher, args.target, args.tokens)
    if args.plot:
        plot_ablations(rows, "ablate_run", SIZE, args.plot)
    if args.json and not args.ablate:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    M.cli(main)
