"""The Mamba in the Llama: a pretrained Transformer becomes a hybrid Mamba model (arXiv 2408.15237).

    attention                          Mamba mixer (Algorithm 1)
    V = W_V u  --------------------->  x       what is written
    K = W_K u  --------------------->  B       where it is written
    Q = W_Q u  --------------------->  C       where it is read
    O = W_O y  --------------------->  out     back to the residual stream
    (new)                              Delta, A: how strongly to write, how fast to forget
                                       conv, gate z, skip D: Mamba's own parts, near identity

Drop the softmax of attention and a linear RNN with exactly these weights remains; Mamba adds a
learned step Delta and decay A. Some attention layers stay (the hybrid), the MLPs stay, and three
stages of distillation repair what the replacement broke.

Glossary, with the paper's letters:
    b, l, T      batch, length, tokens of one decoding call
    D, V         model width (inside a mixer D is the skip weight), vocabulary
    x, B, C      what is written, where it is written, where it is read: attention's V, K, Q
    dt, Delta    the step before and after softplus(dt + dt_bias);  z the gate
    u            in the scan Delta x; elsewhere what a layer, or the convolution, takes in
    H, G         heads of a mixer; groups of heads that share B (Gx: that share x)
    N, P         state size per head; value channels per head (both head_dim unless said otherwise)
    p', n'       1, 1 for "mamba2" (one Delta, one A per head); P, N for "mamba" (per channel)
    W, c         taps and channels of the convolution
    h, state     the recurrent state (b,H,P,N)
    S, T         student, teacher;  p, q target, draft (spec_decode.py)
    checkpoint   when decoding: a state that lags behind; the rings hold the inputs since then
    commit       settle how many of the tokens decoded last are kept; the others are not counted
    flush, fold  committed inputs enter the checkpoint, so that the rings have room again

First reading: sections 2, 5, 6, 7, 9. Sections 3 and 4, kernels and cache, serve decoding; read
them with spec_decode.py.

Contents:  1 configuration   2 the scan   3 multi-step decoding   4 cache, decoding   5 the mixer
           6 the hybrid model, Algorithm 1   7 losses (Eq. 2, Eq. 4)   8 evaluation   9 training
           10 data   11 command line
Not here: drafts, Algorithm 2, timing, the authors' checkpoints (spec_decode.py); ablations
(test_all.py).

    python mamba_in_llama.py --tiny                  # the whole story in a minute on a laptop
    python mamba_in_llama.py --teacher DIR --attention 0.5 --out hybrid --minutes 20
"""

import argparse
import copy
import datetime
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import accumulate, chain, takewhile
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

try:
    import triton
    import triton.language as tl
    from triton.language.target_info import cuda_capability_geq
except ImportError:                       # no Triton on this platform: the PyTorch forms serve
    triton, tl = SimpleNamespace(jit=lambda f: f), SimpleNamespace(constexpr=bool)
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# what layers, models and generate() call their cache: transformers 5.24 renamed it
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"

# ---------------------------------------------------------------------------------------------
# 1. Configuration: the teacher's own fields, plus ours. A recipe is a row of RECIPES.
# ---------------------------------------------------------------------------------------------

RECIPES = {                            # what differs from the defaults of HybridConfig
    # starts close to linearized attention; the default, since it distils best (README, ablations)
    "near_linear": {},
    # the authors' start: Mamba's own defaults for everything that attention does not have
    "paper": dict(rope=False, scale_c=False, conv="default", gate="default", norm=True, skip=1.0),
    # the control of the paper's Table 8: near_linear without the attention weights
    "random": dict(attn_init=False),
    # exactly linearized attention: Delta = 1, decay 1, nothing else; a test compares them
    "linear_attention": dict(conv="none", gate="none", skip=None, decay="none"),
}


def require(condition, message):
    """Raise ValueError(message) unless `condition` holds; the command line prints that line."""
    if not condition:
        raise ValueError(message)


class HybridConfig(PreTrainedConfig):
    """The teacher's configuration (as extra fields) and what the conversion changed: all that
    recipes differ in."""

    model_type = "mamba_in_llama"
    keys_to_ignore_at_inference = [CACHE]

    teacher_type: str = "llama"        # transformers' model_type of the layers that stay
    attn_layers: list | tuple = ()     # indices of the layers that stay attention
    mixer: str = "mamba2"              # "mamba": Delta and A per channel; "mamba2": per head
    recipe: str = "near_linear"        # name only, the fields below decide
    d_state: int | None = None         # N = P of a mixer head; None = head_dim, or a divisor
    group_by_state: bool = False       # authors' Mamba: repeat K/V in runs of d_state, not per head
    attn_init: bool = True             # copy W_V, W_K, W_Q, W_O (Table 8 asks what that is worth)
    rope: bool = True                  # keep the rotary embedding on B and C (authors: dropped)
    scale_c: bool = True               # C / sqrt(head_dim), attention's own scale (authors: 1)
    conv: str = "identity"             # "identity": tap 1 now, 0 before, no SiLU; "default": SiLU
    gate: str = "open"                 # y * silu(z): "open" starts at 1, "default" random, "none"
    norm: bool = False                 # Mamba2's gated RMSNorm per head (fixes the output scale)
    skip: float | None = 0.0           # D at the start; None: no skip at all
    decay: str = "default"             # Mamba's; "slow": 3..1000 tokens; "none": Delta 1, A 0
    d_conv: int = 4                    # taps of the causal depthwise convolution

    def teacher_config(self):
        """The configuration of the Transformer around the mixers."""
        own = set(HybridConfig.__annotations__) | {"model_type", "auto_map", "architectures"}
        fields = {k: v for k, v in self.to_dict().items() if k not in own}
        return AutoConfig.for_model(self.teacher_type, **fields)


# ---------------------------------------------------------------------------------------------
# 2. The scan: h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T,  y_t = h_t C_t.
# ---------------------------------------------------------------------------------------------


def recurrence(x, delta, A, B, C, state=None):
    """The definition of both mixers, token by token; slow, and what every fast form must equal.

    delta (b,l,H,p') > 0 and A (H,p',n') < 0 broadcast over the state: p' = n' = 1 is Mamba2,
    p' = P and n' = N is Mamba. With delta = 1 and A = 0 this is linear attention. The T <= l
    tokens that C brings are the last ones: only they are read.

    x (b,l,H,P)  delta (b,l,H,p')  A (H,p',n')  B (b,l,H,N)  C (b,T,H,N)  state (b,H,P,N)
    -> y (b,T,H,P), state
    """
    b, l, H, P = x.shape
    h = x.new_zeros(b, H, P, B.shape[-1]) if state is None else state
    ys, reads = [], [None] * (l - C.shape[1]) + [*C.unbind(1)]
    for x_t, d_t, B_t, C_t in zip(*(v.unbind(1) for v in (x, delta, B)), reads):
        decay = torch.exp(d_t[..., None] * A)                           # (b,H,p',n')
        h = decay * h + (d_t * x_t)[..., None] * B_t[..., None, :]      # (b,H,P,N)
        if C_t is not None:
            ys.append((h * C_t[..., None, :]).sum(-1))                  # (b,H,P)
    return torch.stack(ys, 1), h


def chunked_scan(x, delta, A, B, C, state=None, chunk=None):
    """The same function as `recurrence`, fast: tokens are taken `chunk` at a time; T = l.

    Nothing is divided by a decay: exp(-3000) is 0. State and decays are at least fp32. 64 tokens
    make products large enough; 16 keep Mamba's (chunk,b,H,P,N) in a CPU's cache.
    Shapes: `recurrence`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if state is None:
        state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=wide)
    scan, most = (mamba2_scan, 64) if A.shape[-1] == 1 else (mamba_scan, 16)
    return scan(x, delta, A, B, C, state, min(chunk or most, x.shape[1]))


def mamba2_scan(x, delta, A, B, C, state, chunk):
    """Mamba2 decays a head as a whole: a chunk is a masked attention plus the carried state.

    Work grows as l (chunk + 2 N) P per head, all but the carry in products of matrices.
    Shapes: `recurrence`; c is the number of chunks.
    """
    # 1. cut into chunks; padded tokens have delta 0: they do nothing
    wide, l = state.dtype, x.shape[1]
    if -l % chunk:
        x, delta, B, C = (F.pad(v, (0, 0, 0, 0, 0, -l % chunk)) for v in (x, delta, B, C))
    x, delta, B, C = (v.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()
                      for v in (x, delta, B, C))                        # (b,c,H,chunk,.)
    cum = (delta.to(wide) * A.to(wide)).cumsum(-2)                      # (b,c,H,chunk,1)
    u = (delta * x).to(x.dtype)                                         # (b,c,H,chunk,P)

    # 2. what each chunk adds to the state, decayed to the chunk's end
    to_end = (cum[..., -1:, :] - cum).exp().to(x.dtype)                 # (b,c,H,chunk,1)
    added = ((u * to_end).mT @ B).to(wide)                              # (b,c,H,P,N)

    # 3. the state carried from chunk to chunk
    total, starts = cum[..., -1:, :].exp(), []                          # (b,c,H,1,1)
    for total_c, added_c in zip(total.unbind(1), added.unbind(1)):
        starts.append(state)
        state = torch.addcmul(added_c, total_c, state)

    # 4. outputs, from the tokens of the same chunk and from its start (b,c,H,P,N)
    y = chunk_outputs(u, cum, B, C, torch.stack(starts, 1).to(x.dtype))
    return y.transpose(2, 3).flatten(1, 2)[:, :l], state


def chunk_outputs(u, cum, B, C, start):
    """Mamba2: y_t = exp(cum_t) C_t h_0 + sum_{s<=t} (C_t . B_s) exp(cum_t - cum_s) u_s.

    Attention without softmax, weighted by the decay from s to t, plus the carried state h_0.
    u = Delta x; cum_t sums the log decays Delta A up to token t. C brings the last T tokens.

    u (.,l,P)  cum (.,l,1)  B (.,l,N)  C (.,T,N)  start (.,P,N) -> y (.,T,P)
    """
    (*heads, T, _), l = C.shape, u.shape[-2]
    # products of 3-D tensors cost half the overhead on a CPU
    u, cum, B, C, start = (v.flatten(0, -3) for v in (u, cum, B, C, start))
    cum_t = cum[:, l - T:]                                              # (.,T,1)
    decay = (cum_t - cum.mT).tril_(l - T).exp_()    # (.,T,l), 1 where s > t: exp may not overflow
    scores = (C.bmm(B.mT) * decay.to(u.dtype)).tril_(l - T)             # nothing from s > t
    y = torch.addcmul(scores.bmm(u), cum_t.exp().to(u.dtype), C.bmm(start.mT))
    return y.view(*heads, T, -1)


class MambaScan(torch.autograd.Function):
    """Mamba decays every state entry by itself, so no matrix product replaces the recurrence.

    Autograd would keep (b,l,H,P,N) values. Here only the state at the start of each chunk is kept;
    the backward pass recomputes a chunk's states from it, then runs the adjoint
    dh_t = C_t dy_t + exp(Delta_{t+1} A) dh_{t+1}. The states of one chunk exist at a time, in
    buffers that stay in cache; operations on whole chunks leave one multiply-add per token and
    sweep. Inside, time comes first: (l,b,H,.).
    """

    @staticmethod
    def buffers(chunk, state):
        """Decays (chunk,b,H,P,N), states (chunk+1,b,H,P,N), and (before, after, decay) by token."""
        decays, hs = (state.new_empty(chunk + i, *state.shape) for i in (0, 1))
        return decays, hs, [*zip(hs[:-1], hs[1:], decays)]

    @staticmethod
    def states(start, A2, u, delta, B, decays, hs, steps):
        """Fill decay (t,b,H,P,N) and h (t+1,b,H,P,N): h[0] the start, h[i + 1] after token i.

        A2 = A / ln 2: torch's exp2 takes 11 ms for 2048 tokens of SmolLM2's layer, its exp 32 (2
        cores of an EPYC).
        """
        decay, h = decays[:len(u)], hs[:len(u) + 1]
        h[0] = start
        torch.mul(delta[..., None], A2, out=decay).exp2_()
        torch.mul(u[..., None], B[..., None, :], out=h[1:])
        for before, after, decay_t in steps[:len(u)]:
            after.addcmul_(decay_t, before)
        return decay, h

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, chunk):
        """Shapes: `recurrence`"""
        ctx.chunk, starts, ys = chunk, [], []
        inputs = [v.transpose(0, 1).to(state.dtype).contiguous() for v in (x, delta, B, C)]
        A2, buffers = A / math.log(2), MambaScan.buffers(chunk, state)
        for x_c, delta_c, B_c, C_c in zip(*(v.split(chunk) for v in inputs)):
            starts.append(state)
            h = MambaScan.states(state, A2, delta_c * x_c, delta_c, B_c, *buffers)[1]
            ys.append(C_c[..., None, :] @ h[1:].mT)                     # (t,b,H,1,P)
            state = h[-1].clone()
        ctx.save_for_backward(A, *inputs, *starts)
        return torch.cat(ys)[..., 0, :].transpose(0, 1).to(x.dtype), state

    @staticmethod
    def backward(ctx, dy, g):
        """dy (b,l,H,P), g (b,H,P,N) the gradient of the final state -> gradients of the inputs"""
        A, *saved = ctx.saved_tensors
        inputs, starts = [*saved[:4], dy.transpose(0, 1).to(A.dtype).contiguous()], saved[4:]
        A2, buffers = A / math.log(2), MambaScan.buffers(ctx.chunk, g)
        dhs = torch.empty_like(buffers[0])
        back = [*zip(dhs[:-1], dhs[1:], buffers[0][1:])]
        dA, grads, chunks = 0, [], [*zip(starts, *(v.split(ctx.chunk) for v in inputs))]
        for start, x, delta, B, C, dy in chunks[::-1]:
            u = delta * x
            decay, h = MambaScan.states(start, A2, u, delta, B, *buffers)
            dh = torch.mul(dy[..., None], C[..., None, :], out=dhs[:len(u)])    # (t,b,H,P,N)
            dh[-1] += g
            for before, after, decay_t in back[:len(u) - 1][::-1]:
                before.addcmul_(decay_t, after)
            # a row times a matrix: six times faster than a matrix times a column (torch 2.13)
            du, dB, dC = (v[..., None, :] @ w for v, w in ((B, dh.mT), (u, dh), (dy, h[1:])))
            dlog = dh.mul_(decay)           # gradient of h_{t-1} through token t ...
            g = dlog[0].clone()
            dlog.mul_(h[:-1])               # ... times h_{t-1}: gradient of the exponent Delta_t A
            du = du[..., 0, :]                                                  # (t,b,H,P)
            ddelta = torch.mul(dlog, A, out=decay).sum(-1).addcmul_(x, du)
            dA += dlog.mul_(delta[..., None]).sum((0, 1))
            grads.append((delta * du, ddelta, dB[..., 0, :], dC[..., 0, :]))
        dx, ddelta, dB, dC = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*grads))
        return dx, ddelta, dA, dB, dC, g, None


@triton.jit
def load_tokens(v, row, t, l, inside, CHUNK: tl.constexpr):
    """CHUNK tokens from t on, `row` values apart, requested at once so that the loads overlap.

    Those past the end repeat the last one; the caller sets their Delta to 0: they do nothing.
    """
    vs = ()
    for i in tl.static_range(CHUNK):
        vs += (tl.load(v + tl.minimum(t + i, l - 1) * row, mask=inside, other=0),)
    return vs


@triton.jit
def mamba_scan_kernel(x, delta, A, B, C, state, y, end, starts, l, H: tl.constexpr, P: tl.constexpr,
                      N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr):
    """`recurrence` for BP channels of one head of one row; their state stays in registers.

    starts (b,chunks,H,P,N), unless None, takes the state before each chunk. Each program reads its
    inputs once and writes y once.
    """
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)   # (BP,)  (BN,)
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)            # offsets pass 2^31
    in_p, in_n, tile = p < P, n < N, p[:, None] * N + n[None, :]        # (BP,BN)
    in_tile, head, token = in_p[:, None] & in_n[None, :], row * H + h, row * l * H + h
    a = tl.load(A + h * (P * N) + tile, mask=in_tile, other=0) * 1.4426950408889634    # for exp2
    h_t = tl.load(state + head * (P * N) + tile, mask=in_tile, other=0)
    x, delta, y = x + token * P + p, delta + token * P + p, y + token * P + p
    B, C = B + token * N + n, C + token * N + n
    for first in range(0, l, CHUNK):
        if starts is not None:
            at = (row * tl.cdiv(l, CHUNK) + first // CHUNK) * H + h
            tl.store(starts + at * (P * N) + tile, h_t, mask=in_tile)
        xs = load_tokens(x, H * P, first, l, in_p, CHUNK)               # (BP,) each
        ds = load_tokens(delta, H * P, first, l, in_p, CHUNK)
        Bs = load_tokens(B, H * N, first, l, in_n, CHUNK)               # (BN,) each
        Cs = load_tokens(C, H * N, first, l, in_n, CHUNK)
        for i in tl.static_range(CHUNK):
            d = tl.where(first + i < l, ds[i], 0).to(tl.float32)
            u = d * xs[i].to(tl.float32)
            h_t = tl.exp2(d[:, None] * a) * h_t + u[:, None] * Bs[i].to(tl.float32)[None, :]
            out = tl.sum(h_t * Cs[i].to(tl.float32)[None, :], 1)        # (BP,)
            tl.store(y + (first + i) * (H * P), out, mask=p < tl.where(first + i < l, P, 0))
    tl.store(end + head * (P * N) + tile, h_t, mask=in_tile)


@triton.jit
def mamba_adjoint_kernel(x, delta, A, B, C, starts, dy, g, dx, ddelta, dA, dB, dC, dstate, l,
                         H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr,
                         BN: tl.constexpr, CHUNK: tl.constexpr):
    """The backward pass of `mamba_scan_kernel`, chunks from last to first; g: of the final state.

    Sums over channels (dB, dC) and over rows (dA) are left to the caller, one term per program:
    atomic additions would come in another order each time. Registers: CHUNK + 1 states (BP,BN).
    """
    p, n = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, BN)   # (BP,)  (BN,)
    h, row = tl.program_id(1), tl.program_id(2).to(tl.int64)            # offsets pass 2^31
    in_p, in_n, tile = p < P, n < N, p[:, None] * N + n[None, :]        # (BP,BN)
    in_tile, head, token = in_p[:, None] & in_n[None, :], row * H + h, row * l * H + h
    a = tl.load(A + h * (P * N) + tile, mask=in_tile, other=0) * 1.4426950408889634    # for exp2
    dh, sum_dA = tl.load(g + head * (P * N) + tile, mask=in_tile, other=0), tl.zeros_like(a)
    x, delta, dy = x + token * P + p, delta + token * P + p, dy + token * P + p
    dx, ddelta = dx + token * P + p, ddelta + token * P + p
    B, C = B + token * N + n, C + token * N + n
    token += tl.program_id(0) * tl.num_programs(2).to(tl.int64) * l * H     # dB, dC (P/BP,b,l,H,N)
    dB, dC = dB + token * N + n, dC + token * N + n
    for done in range(0, tl.cdiv(l, CHUNK)):
        c = tl.cdiv(l, CHUNK) - 1 - done
        first, at = c * CHUNK, (row * tl.cdiv(l, CHUNK) + c) * H + h
        hs = (tl.load(starts + at * (P * N) + tile, mask=in_tile, other=0),)
        xs = load_tokens(x, H * P, first, l, in_p, CHUNK)               # (BP,) each
        ds = load_tokens(delta, H * P, first, l, in_p, CHUNK)
        Bs = load_tokens(B, H * N, first, l, in_n, CHUNK)               # (BN,) each
        Cs = load_tokens(C, H * N, first, l, in_n, CHUNK)
        dys = load_tokens(dy, H * P, first, l, in_p, CHUNK)
        # 1. the states of the chunk again: hs[i + 1] after token i
        for i in tl.static_range(CHUNK):
            d = tl.where(first + i < l, ds[i], 0).to(tl.float32)
            u = d * xs[i].to(tl.float32)
            hs += (tl.exp2(d[:, None] * a) * hs[i] + u[:, None] * Bs[i].to(tl.float32)[None, :],)
        # 2. back through it: dh is the gradient of the state after token i, then of the one before
        for i in tl.static_range(CHUNK - 1, -1, -1):
            t, real = (first + i) * H, first + i < l
            at_p, at_n = p < tl.where(real, P, 0), n < tl.where(real, N, 0)
            d, x_t = tl.where(real, ds[i], 0).to(tl.float32), xs[i].to(tl.float32)
            dy_t = tl.where(real, dys[i], 0).to(tl.float32)
            dh += dy_t[:, None] * Cs[i].to(tl.float32)[None, :]
            du = tl.sum(dh * Bs[i].to(tl.float32)[None, :], 1)          # (BP,)
            tl.store(dC + t * N, tl.sum(dy_t[:, None] * hs[i + 1], 0), mask=at_n)
            tl.store(dB + t * N, tl.sum((d * x_t)[:, None] * dh, 0), mask=at_n)
            tl.store(dx + t * P, d * du, mask=at_p)
            dh *= tl.exp2(d[:, None] * a)
            dlog = dh * hs[i]                                           # of the exponent Delta A
            sum_dA += d[:, None] * dlog
            dd = tl.sum(dlog * a, 1) * 0.6931471805599453 + x_t * du    # a = A / ln 2
            tl.store(ddelta + t * P, dd, mask=at_p)
    tl.store(dstate + head * (P * N) + tile, dh, mask=in_tile)
    tl.store(dA + head * (P * N) + tile, sum_dA, mask=in_tile)


class MambaScanTriton(torch.autograd.Function):
    """`MambaScan` on the GPU: a launch each way, every program loops over all tokens.

    64 x 512 tokens of SmolLM2 take 0.3 ms forward and 0.9 backward at d_state 16 (H,P,N =
    36,16,16), 0.9 and 2.8 at 64 (9,64,64) on an H100. Kept in between: 4 H P N / chunk bytes per
    token, 203 and 812 MB.
    """

    @staticmethod
    def tiles(P, N):
        """BP, BN, chunk, warps. One warp, 8 entries of a state per thread: sums over N or channels
        then cross no shared memory. (64,64) states take 3.7 ms so, 7.9 with 16 channels (H100)."""
        BN = triton.next_power_of_2(N)
        return max(1, min(triton.next_power_of_2(P), 256 // BN)), BN, 6, max(1, BN // 256)

    @staticmethod
    def launch(kernel, x, delta, A, B, *tensors):
        """One program per row, head and BP channels."""
        (b, l, H, P), N = x.shape, B.shape[-1]
        *tile, warps = MambaScanTriton.tiles(P, N)
        with torch.cuda.device_of(x):
            kernel[triton.cdiv(P, tile[0]), H, b](x, delta, A, B, *tensors, l, H, P, N, *tile,
                                                  num_warps=warps)

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, chunk):
        """Shapes: `recurrence`; chunk: see `tiles`"""
        *inputs, state = (v.contiguous() for v in (x, delta, A, B, C, state))
        (b, l, H, P), N, starts = x.shape, B.shape[-1], None
        if any(ctx.needs_input_grad):
            starts = state.new_empty(b, triton.cdiv(l, MambaScanTriton.tiles(P, N)[2]), H, P, N)
        y, end = torch.empty_like(inputs[0]), torch.empty_like(state)
        MambaScanTriton.launch(mamba_scan_kernel, *inputs, state, y, end, starts)
        ctx.save_for_backward(*inputs, starts)
        return y, end

    @staticmethod
    def backward(ctx, dy, g):
        """Shapes: `MambaScan.backward`"""
        x, delta, A, B, C, starts = ctx.saved_tensors
        splits = triton.cdiv(x.shape[3], MambaScanTriton.tiles(*A.shape[1:])[0])
        dy, g = dy.contiguous(), g.contiguous()
        dx, ddelta, dstate = (torch.empty_like(v) for v in (x, delta, g))
        dA, dB, dC = (v.new_empty(n, *v.shape) for n, v in ((len(x), A), (splits, B), (splits, C)))
        MambaScanTriton.launch(mamba_adjoint_kernel, x, delta, A, B, C, starts, dy, g, dx, ddelta,
                               dA, dB, dC, dstate)
        return dx, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), dstate, None


@torch.compiler.disable                             # which would unroll the loops over tokens
def mamba_scan(x, delta, A, B, C, state, chunk):
    """Mamba's scan, a chunk of states at a time. Shapes: `recurrence`"""
    form = MambaScanTriton if use_triton(None, state) else MambaScan
    return form.apply(x, delta, A.to(state.dtype), B, C, state, chunk)


# ---------------------------------------------------------------------------------------------
# 3. Multi-step decoding: replay what was accepted, go on for T tokens, touch the state once.
#
# A rejected token must not have changed the state, and states are too big to keep one per token. So
# the state stays behind: an old one, with a ring of the inputs since. To roll back, count fewer.
# ---------------------------------------------------------------------------------------------


def use_triton(impl, state):
    """The one dispatch: impl "torch" or "triton" forces a form; None takes Triton where it runs.

    The kernels compute in fp32, so float64, the precision of the exactness tests, is PyTorch's.
    """
    if impl is not None:
        return impl == "triton"
    runs = state.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and hasattr(triton, "compile") and state.dtype != torch.float64


def launch(kernel, batch, grid, x, *args, **options):
    """kernel[grid](x, *args) for `batch` rows, on the current GPU; kernels call `wait_previous`."""
    if batch <= 256 and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        options["launch_pdl"] = True        # 4096 rows of SmolLM2 were 1.5 % slower with it
    kernel[grid](x, *args, **options)


def to_heads(v, H, runs):
    """Give each head its group's slice: v (b,l,G,n) -> (b,l,H,n).

    runs = 1: heads 0..H/G-1 read group 0, and so on, as in attention. runs = r: blocks of r groups
    are repeated whole, for attention heads that were cut into r mixer heads.
    """
    b, l, G, n = v.shape
    if G == H:
        return v
    v = v.reshape(b, l, G // runs, 1, runs, n).expand(-1, -1, -1, H // G, -1, -1)
    return v.reshape(b, l, H, n)


def replay_plan(counts, T, ring, slots, W=1):
    """Which tokens a decoding call goes through; on a CPU made once for all layers of the call.

    counts (3,b), ring, slots: see `multi_step`; W: the convolution's width. -> R old tokens, at
    most, that the checkpoint lacks after the flush; row (b,1) and slot (b,.+T) in the rings, of
    old and new tokens; fold (b,.,1,1) old tokens that enter the checkpoint: the flush;
    done (b,R+T,1,1) tokens that it then holds. A mask may be None: no token.
    """
    base, length, pending = counts[..., None].unbind()                  # (b,1) each
    first, device = length + pending, counts.device
    end = torch.where(first - base + T > ring, length, base)            # the flush moves it
    # a host read is free on a CPU
    most, R = [slots // 2] * 2 if counts.is_cuda else [int((first - v).max()) for v in (base, end)]
    s = first + torch.arange(-max(most, W - 1), T, device=device)       # (b,.+T) positions
    fold, done = ((s >= base) & (s < end))[:, :-T], s[:, -(R + T):] < end
    fold, done = (v[..., None, None] if v.is_cuda or v.any() else None for v in (fold, done))
    return R, torch.arange(len(s), device=device)[:, None], s % slots, fold, done


def multi_step(x, dt, B, C, A, dt_bias, D, z, state, ring_x, ring_dt, ring_B, counts,
               ring=16, runs=1, impl=None, plan=None):
    """T tokens per row from a checkpoint `state` and a ring of the inputs since (Algorithm 2).

    Delta = softplus(dt + dt_bias); h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T;
    y_t = (h_t C_t + D x_t) * silu(z_t). p' = n' = 1 is "mamba2", p' = P and n' = N is "mamba".
    counts int32 (3,b): base = tokens inside `state`, length = committed, pending = decoded since
    the last commit. The token of position s lives in slot s % slots of the rings, slots >=
    2 * ring, zeros at first; ring_dt holds Delta. A row with too many tokens since its checkpoint,
    (length - base) + pending + T > ring, folds base..length-1 into its `state` (the flush); other
    rows only read theirs. pending + T <= ring, or "mamba2"'s tile is too short ("mamba" loops: it
    may fold earlier). A row that brings fewer tokens ends in arbitrary ones, whose y and slots
    mean nothing. counts stay as they are: the caller sets base = length in flushed rows and adds
    what each row brought to pending.

    Bytes per row and call, u = input bytes, S = tokens since base, p = H or H P (Delta's size):
    4 H P N for the state, (u (Gx P + Gb N) + 4 p) S for the ring, T (u (2 H P + H N + Gx P
    + Gb N + p) + u (Gx P + Gb N) + 4 p) for the new tokens; a flush adds 4 H P N and no more.
    Mamba2 of an 8B Llama, bf16, T = 5: 2.0 MiB of state + 0.2 MiB; 4.0 + 0.2 with a flush.

    x (b,T,Gx,P)  dt (b,T,H,p')  B (b,T,Gb,N)  C (b,T,H,N)  A (H,p',n')  dt_bias, D (H,p')
    z (b,T,H,P)  state (b,H,P,N)  ring_x (b,slots,Gx,P)  ring_dt (b,slots,H,p')
    ring_B (b,slots,Gb,N) -> y (b,T,H,P)
    """
    if plan is None and use_triton(impl, state):
        return multi_step_triton(x, dt, B, C, A, dt_bias, D, z, state, ring_x, ring_dt, ring_B,
                                 counts, ring, runs)
    (T, H), wide, mamba = C.shape[1:3], state.dtype, A.shape[-1] > 1
    R, row, slot, fold, done = plan or replay_plan(counts, T, ring, ring_x.shape[1])

    # 1. the new inputs enter the rings; old and new ones come out in a row, one copy per head
    delta, C, kept = F.softplus(dt.to(wide) + dt_bias, 1, 40), C.to(wide), []
    for ring_v, v in (ring_x, x), (ring_dt, delta), (ring_B, B):
        ring_v[row, slot[:, -T:]] = v.to(ring_v.dtype)
        kept.append(to_heads(ring_v[row, slot].to(wide), H, runs))      # (b,.+T,H,.)

    # 2. the flush, which is rare: Delta = 0 leaves the state as it is, so one scan serves all rows
    if fold is not None:
        xs, delta, Bs = (v[:, :-T] for v in kept)
        scan, read = (recurrence, Bs[:, -1:]) if mamba else (chunked_scan, Bs)
        state.copy_(scan(xs, delta * fold, A, Bs, read, state)[1])      # what it reads is dropped

    # 3. replay and go on, from the checkpoint; what it holds already gets Delta = 0 as well
    xs, delta, Bs = (v[:, -(R + T):] for v in kept)                     # (b,R+T,H,.)
    if done is not None:
        delta = delta.masked_fill(done, 0)
    if mamba:
        y = recurrence(xs, delta, A, Bs, C, state)[0]                   # (b,T,H,P)
    else:
        cum = (delta * A[:, 0]).cumsum(1)                               # (b,R+T,H,1)
        u, cum, Bs, C = (v.transpose(1, 2) for v in (xs * delta, cum, Bs, C))
        y = chunk_outputs(u, cum, Bs, C, state).transpose(1, 2)
    if D is not None:
        y = torch.addcmul(y, D, xs[:, R:])
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)


@triton.jit
def wait_previous():
    """Wait for the end of the kernels before this one; read what they write only after it.

    Programmatic dependent launch, on Hopper and later: a kernel comes to the GPU while the one
    before it still runs. At batch 1 that saves a microsecond or two of each launch.
    """
    if not INTERPRET and cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()


@triton.jit
def start_next():
    """Let the kernel after this one come, as far as its own `wait_previous`."""
    if not INTERPRET and cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(v, COLUMNS: tl.constexpr):
    """Ask for COLUMNS numbers from pointer v on, or from each of v (n,1): they come to the L2, and
    nothing waits for them.

    Also before `wait_previous`: what other kernels still write, the L2 keeps up to date.
    """
    LINE: tl.constexpr = 1024 // v.dtype.element_ty.primitive_bitwidth          # of 128 bytes
    line = tl.arange(0, triton.next_power_of_2(triton.cdiv(COLUMNS, LINE)))[None, :] * LINE
    if not INTERPRET and cuda_capability_geq(9, 0):
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                                  [v + tl.minimum(line, COLUMNS - 1)], tl.int32, is_pure=False,
                                  pack=1)


@triton.jit
def group(h, H, G, runs):
    """The group that head h reads: runs = 1 repeats each group H // G times in a row."""
    return h // (H // G * runs) * runs + h % runs


@triton.jit
def is_first(h, H, G, runs):
    """Is h the first head of its group? That head's program stores the group's new inputs."""
    return h // runs % (H // G) == 0


@triton.jit
def softplus(v):
    """max(v, 0) + log1p(exp(-|v|)), log1p as a series in e / (2 + e) <= 1/3: GPU logarithms are
    absolute to 2^-22, which a Delta of 0.001 would feel."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(v))
    r = e / (2 + e)
    q = r * r
    s = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0) + 2 * r * s


@triton.jit
def silu(v):
    """v sigmoid(v); exp2 is one instruction, exp takes care of denormal numbers first."""
    return v / (1 + tl.exp2(-1.4426950408889634 * v))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. The interpreter has no bf16 product: it would multiply the raw bits."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def upper(v):
    """fp32 v cut to bf16's bits; rounding it would take a slow conversion."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, TERMS: tl.constexpr):
    """acc + a @ b. An fp32 factor meets a bf16 one as TERMS bf16 parts of 8 bits each: one bf16 or
    TF32 product would leave an error of 1e-3 in the state."""
    if a.dtype == b.dtype:
        return dot(a, b, acc)
    for _ in tl.static_range(TERMS):
        if a.dtype == tl.float32:
            part = upper(a)
            acc, a = dot(part.to(b.dtype), b, acc), a - part
        else:
            part = upper(b)
            acc, b = dot(a, part.to(a.dtype), acc), b - part
    return acc


@triton.jit
def fold(state, x_s, B, delta, a, n, N: tl.constexpr, BN: tl.constexpr, DT: tl.constexpr):
    """The flush: tokens x_s (BR,BP) with B (BR,.) enter the state (BP,.); delta (BR,) = 0: not."""
    decay = delta * a
    weight = delta * tl.exp(tl.minimum(tl.cumsum(decay, reverse=True) - decay, 0))
    keep = tl.exp(tl.sum(decay))                                        # what is left of the state
    u = tl.trans(x_s.to(tl.float32) * weight[:, None])                  # (BP,BR)
    for i in range(0, N, BN):
        in_n = True if N % BN == 0 else n < N - i
        B_i = tl.load(B + i, mask=in_n, other=0).to(DT)
        h_i = tl.load(state + i, mask=in_n, other=0)
        tl.store(state + i, product(u, B_i, h_i * keep, 3), mask=in_n)


@triton.jit
def mamba2_kernel(x, dt, B, C, A, bias, D, z, y, state, ring_x, ring_dt, ring_B, counts,
                  x_row: tl.constexpr, dt_row: tl.constexpr, B_row: tl.constexpr,
                  C_row: tl.constexpr, z_row: tl.constexpr, SLOTS: tl.constexpr, ring,
                  T: tl.constexpr, GX: tl.constexpr, GB: tl.constexpr, H: tl.constexpr,
                  P: tl.constexpr, N: tl.constexpr, RUNS: tl.constexpr, BP: tl.constexpr,
                  BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr):
    """BP channels of one head of one row; the state in chunks of BN columns.

    Token s since the checkpoint is row s of a tile of BR >= ring rows, first those of the ring,
    then the new ones; output t belongs to row n_old + t. Rows too many repeat the last one, with
    Delta = 0, so that no load needs a mask. All loads are issued before the first use, to overlap.
    Products have the BP channels as rows, so a warp's rows of the state stay its own.
    """
    split, h, row, b = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    counts, row = counts + row, row.to(tl.int64)                        # offsets pass 2^31
    p, n = tl.arange(0, BP), tl.arange(0, BN)[None, :]                  # (BP,)  (1,BN)
    s, t = tl.arange(0, BR), tl.arange(0, BT)                           # (BR,)  (BT,)
    gx, gb = group(h, H, GX, RUNS) * P + split * BP, group(h, H, GB, RUNS) * N
    hp = h * P + split * BP

    # from here on the pointers are those of this row, head and split
    x, dt = x + row * T * x_row + gx, dt + row * T * dt_row + h
    B, C = B + row * T * B_row + gb, C + row * T * C_row + h * N
    ring_x, ring_dt = ring_x + row * SLOTS * (GX * P) + gx, ring_dt + row * SLOTS * H + h
    ring_B, state = ring_B + row * SLOTS * (GB * N) + gb, state + (row * H * P + hp) * N
    z = None if z is None else z + row * T * z_row + hp
    if AHEAD:
        prefetch(state + p[:, None] * N, N)
    wait_previous()
    base, length, pending = tl.load(counts), tl.load(counts + b), tl.load(counts + 2 * b)
    DT: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32
    a, shift = tl.load(A + h), tl.load(bias + h)
    skip = 0.0 if D is None else tl.load(D + h)
    x, ring_x, state = x + p[None, :], ring_x + p[None, :], state + p[:, None] * N + n
    last, every = tl.minimum(t, T - 1)[:, None], tl.arange(0, triton.next_power_of_2(N))[None, :]
    C += last * C_row + n                                               # (BT,BN)
    mine = tl.where((split == 0) & is_first(h, H, GB, RUNS), T, 0)      # rows of B for the ring
    mine = (t < mine)[:, None] & (every < N)                            # (BT,N)
    mine_B = tl.load(B + last * B_row + every, mask=mine)
    n_old, n_fold = length + pending - base, length - base

    # 1. the flush: committed tokens enter the state, and the checkpoint moves behind them. After
    # the outputs it would keep none waiting, but its tile needs ring + T rows: 4 % faster at batch
    # 1, 6 to 19 % slower at batch 64
    if n_old + T > ring:
        slot = (base + tl.minimum(s, n_fold - 1)) % SLOTS               # (BR,)
        delta = tl.where(s < n_fold, tl.load(ring_dt + slot * H), 0)
        x_s = tl.load(ring_x + slot[:, None] * (GX * P))                # (BR,BP)
        fold(state, x_s, ring_B + slot[:, None] * (GB * N) + n, delta, a, n, N, BN, DT)
        tl.debug_barrier()                                              # it is read again below
        base, n_old = length, pending
    slot, now = (base + s) % SLOTS, tl.minimum(tl.maximum(s - n_old, 0), T - 1)     # (BR,)
    old, new = (s < n_old)[:, None], (s >= n_old) & (s < n_old + T)
    ring_x += slot[:, None] * (GX * P)                                  # (BR,BP)
    x_s = tl.load(tl.where(old, ring_x, x + now[:, None] * x_row))      # (BR,BP)
    old_delta, dt_s = tl.load(ring_dt + slot * H), tl.load(dt + now * dt_row)
    gate = None if z is None else tl.load(z + last * z_row + p[None, :])            # (BT,BP)
    B = n + tl.where(old, ring_B + slot[:, None] * (GB * N), B + now[:, None] * B_row)  # (BR,BN)

    start_next()            # at the top it cost 2 us more at batch 1, after the products 0.5
    # h C_t and B_s . C_t, summed over chunks of the state
    seen, scores = tl.zeros((BP, BT), tl.float32), tl.zeros((BR, BT), tl.float32)
    for i in range(0, N, BN):
        in_n = True if N % BN == 0 else n < N - i
        h_i = tl.load(state + i, mask=in_n, other=0, eviction_policy="evict_first")
        C_i = tl.load(C + i, mask=in_n, other=0).to(DT)                 # (BT,BN)
        B_i = tl.load(B + i, mask=in_n, other=0).to(DT)                 # (BR,BN)
        seen = product(h_i, tl.trans(C_i), seen, 2)
        scores = dot(B_i, tl.trans(C_i), scores)
    new_slot = (base + n_old + t) % SLOTS                               # (BT,)
    tl.store(ring_B + new_slot[:, None] * (GB * N) + every, mine_B, mask=mine)     # frees registers
    delta = tl.where(s < n_old, old_delta, softplus(dt_s.to(tl.float32) + shift))
    delta = tl.where(s < n_old + T, delta, 0)
    decay = delta * a                               # 1-D: a cumsum over (BR,1) came out wrong on
    causal = s[:, None] <= n_old + t[None, :]       # an H100 (Triton 3.6)                   (BR,BT)
    cum_s = tl.cumsum(decay)[:, None]
    cum_t = tl.sum(tl.where(causal, decay[:, None], 0), 0)[None, :]

    # 2. new tokens among themselves and old ones: sum_s (B_s . C_t) exp(cum_t - cum_s) Delta_s x_s
    scores *= tl.exp(tl.minimum(cum_t - cum_s, 0)) * delta[:, None]
    scores = tl.where(causal, scores, 0)
    if D is not None:
        scores += tl.where(s[:, None] == n_old + t[None, :], skip, 0)
    out = product(tl.trans(x_s.to(DT)), scores, seen * tl.exp(cum_t), 2)
    out = tl.trans(out)                                                 # (BT,BP)
    if z is not None:
        out *= silu(gate.to(tl.float32))
    y += row * T * (H * P) + hp + t[:, None] * (H * P) + p[None, :]
    tl.store(y, out, mask=(t < T)[:, None])

    # 3. the new inputs enter the ring, each from one program; nobody reads these slots now
    if is_first(h, H, GX, RUNS):
        tl.store(ring_x, x_s, mask=new[:, None])
    if split == 0:
        tl.store(ring_dt + slot * H, delta, mask=new)


@triton.jit
def replay(h, a, ring_x, ring_dt, ring_B, in_n, base, first, last, SLOTS: tl.constexpr,
           X: tl.constexpr, W: tl.constexpr, Y: tl.constexpr, BR: tl.constexpr):
    """The state h after old tokens first..last-1, BR of them requested at once. Widths of the
    rings: X, W, Y."""
    while first < last:
        xs, ds, Bs = (), (), ()
        for i in tl.static_range(BR):
            slot = (base + tl.minimum(first + i, last - 1)) % SLOTS
            ds += (tl.load(ring_dt + slot * W),)                        # (BP,)
            xs += (tl.load(ring_x + slot * X),)                         # (BP,)
            Bs += (tl.load(ring_B + slot * Y, mask=in_n, other=0),)     # (BP,NC,BN)
        for i in tl.static_range(BR):
            if first + i < last:
                u = ds[i] * xs[i].to(tl.float32)
                h = tl.exp2(ds[i][:, None, None] * a) * h + u[:, None, None] * Bs[i].to(tl.float32)
        first += BR
    return h


@triton.jit
def mamba_kernel(x, dt, B, C, A, bias, D, z, y, state, ring_x, ring_dt, ring_B, counts,
                 x_row: tl.constexpr, dt_row: tl.constexpr, B_row: tl.constexpr,
                 C_row: tl.constexpr, z_row: tl.constexpr, SLOTS: tl.constexpr, ring,
                 T: tl.constexpr, GX: tl.constexpr, GB: tl.constexpr, H: tl.constexpr,
                 P: tl.constexpr, N: tl.constexpr, RUNS: tl.constexpr, BP: tl.constexpr,
                 BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, AHEAD: tl.constexpr):
    """BP channels, across heads, of one row, the recurrence in registers: per-channel decays leave
    no matrix product. BR old tokens are requested at once, new ones BT tokens ahead.

    The tile is (BP,NC,BN), N cut into NC pieces of BN: at BN = 4 (16 bytes) one thread holds all
    of a channel, so that Delta and the gate are computed once and y needs no other thread.
    """
    row, b, first = tl.program_id(2), tl.num_programs(2), tl.program_id(0) * BP
    counts, row = counts + row, row.to(tl.int64)
    NC: tl.constexpr = triton.next_power_of_2(N) // BN
    j = first + tl.arange(0, BP)
    n = tl.arange(0, NC)[None, :, None] * BN + tl.arange(0, BN)[None, None, :]  # (1,NC,BN)
    h, p = j // P, j % P                                                # (BP,) head and channel
    gx, gb = group(h, H, GX, RUNS) * P + p, group(h, H, GB, RUNS)[:, None, None] * N + n
    in_n = True if N & (N - 1) == 0 else n < N                          # a power of two: no mask
    tile = j[:, None, None] * N + n                                     # (BP,NC,BN)

    # from here on the pointers are those of this row
    x, dt, y = x + row * T * x_row, dt + row * T * dt_row, y + row * T * (H * P) + j
    B, C, state = B + row * T * B_row, C + row * T * C_row, state + row * (H * P * N)
    ring_x, ring_B = ring_x + row * SLOTS * (GX * P), ring_B + row * SLOTS * (GB * N)
    ring_dt += row * SLOTS * (H * P)
    z = None if z is None else z + row * T * z_row
    head = first // P                                                   # of the first channel
    W: tl.constexpr = triton.cdiv(BP, P) * N
    x_0, B_0 = group(head, H, GX, RUNS) * P + first % P, group(head, H, GB, RUNS) * N

    # the registers have room for few tokens, the L2 for all: 15 % faster for 5 at batch 64
    now = tl.minimum(tl.arange(0, triton.next_power_of_2(T)), T - 1)[:, None]       # (.,1)
    prefetch(x + x_0 + now * x_row, BP)
    prefetch(dt + first + now * dt_row, BP)
    prefetch(B + B_0 + now * B_row, W)
    prefetch(C + head * N + now * C_row, W)
    if z is not None:
        prefetch(z + first + now * z_row, BP)
    if AHEAD:
        prefetch(state + first * N, BP * N)
        prefetch(A + first * N, BP * N)
    wait_previous()
    base, length, pending = tl.load(counts), tl.load(counts + b), tl.load(counts + 2 * b)
    n_old = length + pending - base
    old = (base + tl.minimum(tl.arange(0, 8), tl.maximum(n_old - 1, 0))[:, None]) % SLOTS   # (8,1)
    prefetch(ring_x + x_0 + old * (GX * P), BP)
    prefetch(ring_dt + first + old * (H * P), BP)
    prefetch(ring_B + B_0 + old * (GB * N), W)

    # what does not depend on the counts is requested first
    state += tile
    h_t = tl.load(state, mask=in_n, other=0)
    a = tl.load(A + tile, mask=in_n, other=0) * 1.4426950408889634      # for exp2
    x, dt, ring_x, ring_dt, ring_B = x + gx, dt + j, ring_x + gx, ring_dt + j, ring_B + gb
    B, C = B + gb, C + h[:, None, None] * N + n
    zs, xs, ds, Bs, Cs = (), (), (), (), ()                             # one entry per token
    z = None if z is None else z + j
    shift = tl.load(bias + j)
    skip = 0.0 if D is None else tl.load(D + j)
    start_next()

    for t in tl.static_range(-BT, T):
        # 1. before the first token, replay; a flush writes the state after the last committed one
        if t == 0:
            fold = tl.where(n_old + T > ring, length - base, 0)
            if fold > 0:
                h_t = replay(h_t, a, ring_x, ring_dt, ring_B, in_n, base, base - base, fold, SLOTS,
                             GX * P, H * P, GB * N, BR)
                tl.store(state, h_t, mask=in_n)
            h_t = replay(h_t, a, ring_x, ring_dt, ring_B, in_n, base, fold, n_old, SLOTS,
                         GX * P, H * P, GB * N, BR)
        # 2. what a token BT steps ahead brings is requested
        if t + BT < T:
            xs += (tl.load(x + (t + BT) * x_row),)                      # (BP,)
            ds += (tl.load(dt + (t + BT) * dt_row),)                    # (BP,)
            Bs += (tl.load(B + (t + BT) * B_row, mask=in_n, other=0),)  # (BP,NC,BN)
            Cs += (tl.load(C + (t + BT) * C_row, mask=in_n, other=0),)  # (BP,NC,BN)
            zs += (tl.load(z + (t + BT) * z_row) if z is not None else 0,)     # (BP,)
        # 3. token t; its input enters the ring from one program, nobody reads that slot now
        if t >= 0:
            delta, x_t = softplus(ds[t].to(tl.float32) + shift), xs[t].to(tl.float32)
            u = (delta * x_t)[:, None, None]
            h_t = tl.exp2(delta[:, None, None] * a) * h_t + u * Bs[t].to(tl.float32)
            out = tl.sum(tl.sum(h_t * Cs[t].to(tl.float32), 2), 1) + skip * x_t     # (BP,)
            if z is not None:
                out *= silu(zs[t].to(tl.float32))
            tl.store(y + t * (H * P), out)
            slot = (base + n_old + t) % SLOTS
            tl.store(ring_dt + slot * (H * P), delta)
            tl.store(ring_x + slot * (GX * P), xs[t], mask=is_first(h, H, GX, RUNS))
            one = is_first(h, H, GB, RUNS) & (p == 0)
            tl.store(ring_B + slot * (GB * N), Bs[t], mask=one[:, None, None] & in_n)


def tile_sizes(mamba2, b, H, P, N, T, ring):
    """BP, BN, BR, BT, AHEAD, warps, register limit, stages of a launch: fastest on an H100.

    A small batch is cut fine, so that 132 SMs have work; a large one needs many loads in flight.
    5 tokens at batch 64 of 32 heads of 128 x 128 take 76 us with 64 x 64 tiles and two warps, 84 us
    with 32 x 32. Tiles of 64 rows pay only from 1024 heads x rows on. At batch 1 four warps share
    the products of many tokens, for one token two are faster. AHEAD: the state comes to the L2
    before `wait_previous`, which saves 0.5 of 5 us at batch 1 and costs 5 % at batch 64.
    """
    large, BN = b * H * P * N > 2 ** 21, triton.next_power_of_2(N)
    if mamba2:                                     # BP divides P: no mask
        BR, BT = max(16, triton.next_power_of_2(ring)), max(8, triton.next_power_of_2(T))
        most, warps = (64 if b * H >= 1024 and N > 64 else 32), 4 if b * H < 128 and T > 4 else 2
        return (min(P & -P, most), max(16, min(BN, 64 if N > 64 else 32)), BR, BT, not large,
                warps if P % 32 == 0 else 1, None, 3)
    BP = H * P & -(H * P)                          # a power of two that divides all channels
    if large:
        return min(BP, 32), max(4, BN // 4), 4, 1, False, max(1, BN // 16), 128, 1
    return min(BP, max(1, 128 // BN)), BN, min(triton.next_power_of_2(ring), 8), 8, True, 1, None, 1


def multi_step_triton(x, dt, B, C, A, dt_bias, D, z, state, ring_x, ring_dt, ring_B, counts,
                      ring, runs):
    """`multi_step` on the GPU (or in the interpreter): one launch, nothing read by the host."""
    b, T, GX, P = x.shape
    H, N, mamba2 = C.shape[2], C.shape[3], A.shape[-1] == 1
    for v in (A, dt_bias, state, ring_x, ring_dt, ring_B, counts):
        assert v.is_contiguous(), "state, rings, counts and per-head weights must be contiguous"
    *tile, warps, registers, stages = tile_sizes(mamba2, b, H, P, N, T, ring)
    kernel, grid = (mamba2_kernel, P // tile[0]) if mamba2 else (mamba_kernel, H * P // tile[0])
    y, x, B = x.new_empty(b, T, H, P), x.to(ring_x.dtype), B.to(ring_B.dtype)
    # (b T,.): a view also of a projection's columns, whose row stride the kernel is told
    new = [v if v is None else v.reshape(b * T, -1) for v in (x, dt, B, C, z)]
    assert all(v is None or v.stride(1) == 1 for v in new), "inputs must be contiguous by token"
    strides = [0 if v is None else v.stride(0) for v in new]
    with torch.cuda.device_of(x):
        launch(kernel, b, (grid, H if mamba2 else 1, b),
               *new[:4], A, dt_bias, D, new[4], y, state, ring_x, ring_dt, ring_B, counts,
               *strides, ring_x.shape[1], ring, T, GX, B.shape[2], H, P, N, runs, *tile,
               num_warps=warps, maxnreg=registers, num_stages=stages)
    return y


def conv_step(u, weight, bias, ring_u, counts, act=True, impl=None, plan=None):
    """The causal depthwise convolution of T new tokens, whose window reaches back into a ring.

    out_t = silu(bias + sum_w weight_w u_{t-W+1+w}). ring_u holds the raw inputs, slots >= 2 * ring
    + W - 1, zeros at first: positions below 0 count as zero. Memory: one read of u and of W - 1 old
    rows, one write of u and of the output, per row of the batch.

    u (b,T,c)  weight (c,W)  bias (c)  ring_u (b,slots,c)  counts (3,b) -> (b,T,c)
    """
    (b, T, c), W, slots = u.shape, weight.shape[1], ring_u.shape[1]
    if plan is None and use_triton(impl, u):
        assert ring_u.is_contiguous() and weight.is_contiguous() and counts.is_contiguous()
        out, u = u.new_empty(b, T, c), u.reshape(b * T, c)              # a view also of columns
        BC = 64 if b * c < 2 ** 17 else 256
        launch(conv_kernel, b, (triton.cdiv(c, BC), b), u, weight, bias, ring_u, out, counts,
               u.stride(0), T, slots, c, W, act, triton.next_power_of_2(T), BC, num_warps=2)
        return out
    _, row, slot, *_ = plan or replay_plan(counts, T, 1, slots, W)
    ring_u[row, slot[:, -T:]] = u
    window = ring_u[row, slot[:, -(W - 1 + T):]].unfold(1, W, 1)        # (b,T,c,W)
    out = bias + (window * weight.to(torch.promote_types(u.dtype, torch.float32))).sum(-1)
    return (F.silu(out) if act else out).to(u.dtype)


@triton.jit
def conv_kernel(u, weight, bias, ring_u, out, counts, u_row, T, slots, c: tl.constexpr,
                W: tl.constexpr, ACT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """BC channels of one row; a tap before the new tokens comes from the ring.

    W loads of each input hit the L1, so memory sees one. A channel is read and written by one
    program, and the slots of the new tokens are none of those that the window reads.
    """
    start_next()
    wait_previous()
    row, b = tl.program_id(1), tl.num_programs(1)
    first = tl.load(counts + b + row) + tl.load(counts + 2 * b + row)   # position of token 0
    t, j, row = tl.arange(0, BT), tl.program_id(0) * BC + tl.arange(0, BC), row.to(tl.int64)
    u, ring_u = u + row * T * u_row + j[None, :], ring_u + row * slots * c + j[None, :]
    real, in_c = (t < T)[:, None], (j < c)[None, :]
    acc = tl.zeros((BT, BC), tl.float32)
    acc += tl.load(bias + j, mask=j < c, other=0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        at = t + (w - W + 1)                                            # (BT,) relative to first
        now, before = (at >= 0)[:, None] & real, ((at < 0) & (first + at >= 0))[:, None] & real
        tap = tl.load(u + at[:, None] * u_row, mask=now & in_c, other=0).to(tl.float32)
        slot = (first + at + slots) % slots                             # never negative
        tap += tl.load(ring_u + slot[:, None] * c, mask=before & in_c, other=0).to(tl.float32)
        acc += tap * tl.load(weight + j * W + w, mask=j < c, other=0).to(tl.float32)[None, :]
    if ACT:
        acc *= tl.sigmoid(acc)
    tl.store(out + (row * T + t[:, None]) * c + j[None, :], acc, mask=real & in_c)
    new = tl.load(u + t[:, None] * u_row, mask=real & in_c, other=0)    # (BT,BC)
    tl.store(ring_u + ((first + t) % slots)[:, None] * c, new, mask=real & in_c)


# ---------------------------------------------------------------------------------------------
# 4. The cache: a checkpoint state and a ring of inputs per mixer, static K/V per attention; and
# `prefill` and `decode`, which fill it, with the kernels of a decoding step.
# ---------------------------------------------------------------------------------------------


# Mamba replays a token at the price of an exponential per state entry, so more than 8 are folded:
# 37 us against 41 for 5 tokens of 4096 channels at batch 64 (H100); Mamba2 fills its ring
MAMBA_FOLD_AT = 8


class MixerState(NamedTuple):
    """What one recurrent layer keeps: a state that lags behind, and the inputs it still lacks."""

    state: torch.Tensor                # (b,H,P,N) at least fp32, the checkpoint h_i
    ring_x: torch.Tensor               # (b,slots,Gx,P) values
    ring_dt: torch.Tensor              # (b,slots,H,p') Delta, at least fp32
    ring_B: torch.Tensor               # (b,slots,G,N) keys, after convolution and RoPE
    ring_u: torch.Tensor               # (b,slots,c) the convolution's raw inputs


class AttentionState(NamedTuple):
    """Keys and values by absolute position; rows rewind by their count, nothing is erased."""

    k: torch.Tensor                    # (b,G,width,head_dim), slot max_length: thrown away
    v: torch.Tensor                    # (b,G,width,head_dim)


class MixerCache:
    """All a decoder remembers, for `generate()` and for Algorithm 2 alike.

    counts (3,b) int32 on the device: tokens folded into the checkpoint states, tokens committed,
    tokens pending since the last commit. All layers share them; `decode` makes tokens pending,
    `commit` decides how many of them are kept. To roll back, commit fewer than are pending.
    """

    is_compileable = False             # transformers: do not compile generate() around this,
    is_linear = (False,)               # and count columns by get_seq_length (asked since 5.24)

    def __init__(self, layers, counts, ring, max_length, weights=(), kernels_serve=False):
        self.layers, self.counts, self.ring, self.max_length = layers, counts, ring, max_length
        self.weights = weights         # A, dt_bias, D by mixer layer; W, bias of q, k, v together
        self.kernels_serve = kernels_serve      # do kernels stand for whole layers in `decode`?
        mamba = any(isinstance(v, MixerState) and v.ring_dt.shape[-1] > 1 for v in layers)
        self.fold_at = min(ring, MAMBA_FOLD_AT) if mamba else ring      # `ring` of multi_step
        self.has_attention = any(isinstance(layer, AttentionState) for layer in layers)
        self.columns = 0               # columns of input_ids read, padding included; 0: empty
        self.open = 0                  # the host's copy of the largest pending count
        self.visible = max_length      # columns of K, V that a call's attention reads
        self.plan = None               # which tokens the call in progress goes through, on a CPU
        self.rows = torch.arange(counts.shape[1], device=counts.device)[:, None]       # (b,1)
        self.positions = None          # (b,T) of the call in progress, max_length: thrown away

    @classmethod
    @torch.no_grad()
    def allocate(cls, student, batch_size, max_length=None, ring=16):
        """An empty cache for `batch_size` rows of any decoder, hybrid or plain.

        max_length: tokens a row can hold in its attention layers (default: the context).
        ring: most tokens between two commits; the rings hold 2 ring + d_conv - 1 slots. 0: every
        call brings one token, which stands at once; the state is never behind (plain decoding).
        Some weights are read here, so allocate after training; on GPUs those of q, k and v are
        copied, into one matrix per layer (1.6 GB for all 32 of an 8B Llama).
        """
        require(batch_size >= 1, f"batch_size {batch_size} must be at least 1")
        require(ring >= 0, f"ring {ring} must be at least 0")
        weight = student.get_input_embeddings().weight
        like = dict(device=weight.device, dtype=weight.dtype)
        max_length = max_length or student.config.max_position_embeddings
        layers, weights, serve = [], {}, kernels_serve(student)
        for i, mixer in enumerate(layer.self_attn for layer in student.model.layers):
            if isinstance(mixer, Mixer):
                layers.append(mixer.allocate(batch_size, 2 * ring + mixer.d_conv - 1, like))
                weights[i] = mixer.weights()
                continue
            heads = mixer.k_proj.out_features // mixer.head_dim
            # GPU products over a width that is no multiple of 8 take twice the time
            shape = (batch_size, heads, max_length // 8 * 8 + 8, mixer.head_dim)
            layers.append(AttentionState(*(torch.zeros(shape, **like) for _ in "kv")))
            if serve:
                qkv = mixer.q_proj, mixer.k_proj, mixer.v_proj          # all with a bias, or none
                weights[i] = [None if parts[0] is None else torch.cat(parts)
                              for parts in zip(*((part.weight, part.bias) for part in qkv))]
        counts = torch.zeros(3, batch_size, dtype=torch.int32, device=weight.device)
        return cls(layers, counts, ring, max_length, weights, serve)

    @property
    def behind(self):
        """Does a call go through `multi_step`, from states that may lag behind?"""
        return self.ring > 0 and self.columns > 0

    @property
    def length(self):
        """(b,) committed tokens per row."""
        return self.counts[1]

    def commit(self, n_accepted):
        """Keep the first n_accepted (b,) tokens decoded since the last commit, drop the rest.

        A wrong count raises ValueError on the CPU; on CUDA it is clamped, since looking would
        cost a synchronisation.
        """
        n = torch.as_tensor(n_accepted, device=self.counts.device, dtype=torch.int32)
        stands = n.clamp(min=0).minimum(self.counts[2])
        if not n.is_cuda:
            require(bool((stands == n).all()), f"commit of {n.tolist()} tokens, but "
                    f"{self.counts[2].tolist()} are pending")
        self.counts[1] += stands
        self.counts[2].zero_()
        self.open = 0

    def update(self, k, v, layer_idx, *args, **kwargs):
        """Called by an attention layer: write k, v where `positions` says, return what it may see.

        k, v (b,G,T,head_dim) -> k, v (b,G,columns,head_dim); in prefill the new ones alone
        """
        layer = self.layers[layer_idx]
        for kept, new in zip(layer, (k, v)):
            kept[self.rows, :, self.positions] = new.transpose(1, 2)
        if self.columns == 0:
            return k, v
        return layer.k[:, :, : self.visible], layer.v[:, :, : self.visible]

    def reorder_cache(self, beam_idx):
        """Beam search: row i becomes what row beam_idx[i] was."""
        for tensor in chain(*self.layers):
            tensor.copy_(tensor.index_select(0, beam_idx))
        self.counts.copy_(self.counts.index_select(1, beam_idx))

    def get_seq_length(self, layer_idx=0):
        """Asked by transformers, like the next two; decode brings its own positions and mask."""
        return self.columns

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length, layer_idx=0):
        """(key length, key offset) of the masks that transformers makes in prefill."""
        return query_length, 0


def check_vocabulary(model, tokens):
    """Raise ValueError for ids the model does not know (on the CPU, where looking is free)."""
    vocab = model.get_input_embeddings().weight.shape[0]
    if not tokens.is_cuda and tokens.numel():
        bad = [int(v) for v in tokens.aminmax() if not 0 <= v < vocab]
        require(not bad, f"token {bad and bad[-1]} is outside the vocabulary of {vocab}")


def hidden_states(model, tokens, attention_mask=None, **kwargs):
    """The last layer's normed output, of a hybrid or a plain decoder; no logits.

    tokens (b,l)  attention_mask (b,l) or None -> (b,l,D)
    """
    check_vocabulary(model, tokens)
    if attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        kwargs.update(attention_mask=attention_mask, token_mask=attention_mask.bool(),
                      position_ids=position_ids)
    trunk = getattr(model, "trunk", model.model)    # `shard` (section 9) wraps it
    return trunk(input_ids=tokens, use_cache=False, **kwargs).last_hidden_state


@torch.no_grad()
def prefill(model, tokens, cache, attention_mask=None, logits_to_keep=1):
    """Take a whole prompt into an empty cache, all of it committed; left padding by the mask.

    tokens (b,l)  attention_mask (b,l) or None -> logits (b,logits_to_keep,vocab), 0 keeps all
    """
    l, mask = tokens.shape[1], torch.ones_like(tokens) if attention_mask is None else attention_mask
    require(cache.columns == 0, f"prefill wants an empty cache, this one holds {cache.columns} "
            "columns")
    require(l >= 1, "the prompt is empty")
    require(not cache.has_attention or l <= cache.max_length, f"the prompt of {l} tokens is longer "
            f"than the {cache.max_length} that the attention layers' cache holds")
    require(mask.shape == tokens.shape, f"attention_mask {tuple(mask.shape)} does not fit tokens "
            f"{tuple(tokens.shape)}")
    if not tokens.is_cuda:
        require(bool((mask[:, 1:] >= mask[:, :-1]).all() & (mask[:, -1] == 1).all()),
                "prefill takes padding on the left only, and no empty rows")
    positions = mask.long().cumsum(-1) - 1
    cache.positions = positions.masked_fill(mask == 0, cache.max_length)   # padding: away
    hidden = hidden_states(model, tokens, attention_mask, **{CACHE: cache})
    cache.counts[:2] = mask.sum(-1)
    cache.columns = l
    return model.get_output_embeddings()(hidden[:, -logits_to_keep:])


@torch.no_grad()
def decode(model, tokens, cache, n_valid=None):
    """T more tokens per row, provisional until `cache.commit`; rows may bring fewer (n_valid).

    All counts stay on the device: on CUDA one captured graph serves every call of this shape.

    tokens (b,T)  n_valid (b,) int32 or None -> logits (b,T,vocab)
    """
    T, (base, length, pending) = tokens.shape[1], cache.counts
    check_vocabulary(model, tokens)
    require(T >= 1 and cache.open + T <= max(1, cache.ring), f"{cache.open} tokens since the last "
            f"commit and {T} more exceed the ring of {cache.ring}")
    require(cache.ring or n_valid is None, "n_valid wants a cache with a ring")
    steps = torch.arange(T, device=tokens.device)
    positions = (length + pending).long()[:, None] + steps                     # (b,T)
    cache.positions = positions.clamp(max=cache.max_length)
    if n_valid is not None:                                     # the rest is thrown away
        cache.positions.masked_fill_(steps >= n_valid[:, None], cache.max_length)
    if cache.has_attention and not tokens.is_cuda:                             # a free host read
        longest = int((length + pending + (T if n_valid is None else n_valid)).max())
        require(longest <= cache.max_length, f"{longest} tokens do not fit the {cache.max_length} "
                "that the attention layers' cache holds")
        cache.visible = min(cache.max_length, int(positions.max()) + 1)
    mixer = next((layer for layer in cache.layers if isinstance(layer, MixerState)), None)
    if cache.ring and mixer and not use_triton(None, mixer.state):
        cache.plan = replay_plan(cache.counts, T, cache.fold_at,
                                 mixer.ring_u.shape[1], model.config.d_conv)
    cache.columns = max(cache.columns, 1)                                      # no longer empty
    by_kernel = cache.kernels_serve and not torch.is_autocast_enabled(tokens.device.type)
    mask = None if by_kernel or not cache.has_attention else decode_masks(model, positions, cache)
    with torch.cuda.device_of(tokens), few_tokens(model, tokens, by_kernel):    # for Triton
        with torch.inference_mode():              # saves 1.5 of 34 ms a token of SmolLM2 on a CPU
            hidden = layers_by_kernels(model, tokens, positions, cache) if by_kernel else (
                model.model(input_ids=tokens, position_ids=positions, attention_mask=mask,
                            **{CACHE: cache}).last_hidden_state)
        logits = model.get_output_embeddings()(hidden)                         # ordinary tensors
    if cache.ring == 0:
        cache.counts[:2] += 1
        return logits
    flush = positions[:, 0] - base + T > cache.fold_at                         # as multi_step did
    cache.counts[0] = torch.where(flush, length, base)
    cache.counts[2] += T if n_valid is None else n_valid
    cache.open += T
    return logits


def decode_masks(model, positions, cache):
    """Who may look where: key s is visible to position t when s <= t (and inside the window).

    positions (b,T) -> (b,1,T,columns) added to scores: 0 or -inf; a dict of them by layer type
    for models that mix full and sliding attention
    """
    config, t = model.model.config, positions[:, None, :, None]
    keys = torch.arange(cache.visible, device=t.device)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)     # None: all layers slide if there is a window
    masks = {"full_attention": keys <= t}
    if window and "sliding_attention" in (kinds or ["sliding_attention"]):
        masks["sliding_attention"] = (keys <= t) & (keys > t - window)
    zero = torch.zeros((), device=keys.device, dtype=model.get_input_embeddings().weight.dtype)
    masks = {name: torch.where(mask, zero, -math.inf) for name, mask in masks.items()}
    return masks if kinds and len(masks) > 1 else [*masks.values()][-1]


def attend_in_groups(module, q, k, v, mask, scaling, **kwargs):
    """A few queries on a long cache: the queries of a group are rows of one product.

    transformers would repeat K and V for every query head.

    q (b,H,T,d)  k, v (b,G,L,d)  mask (b,1,T,L) added -> (b,T,H,d), None
    """
    (b, H, T, d), G = q.shape, k.shape[1]
    scores = q.reshape(b * G, -1, d).bmm(k.flatten(0, 1).mT)                   # (b G,H/G T,L)
    p = torch.add(mask[:, :, None], scores.view(b, G, -1, T, k.shape[2]), alpha=scaling).softmax(-1)
    return p.view_as(scores).bmm(v.flatten(0, 1)).view(b, H, T, d).transpose(1, 2), None


AttentionInterface.register("attend_in_groups", attend_in_groups)


SMALL = 100_000     # weights; a product with fewer takes less than 30 us as it is


def linear_of_few(linear, x):
    """A linear layer for a few rows; on several CPU cores a batch of products of 32 outputs each.

    A product with 1 to 3 rows keeps one core busy, MKL's with 4 to 15 streams the weights slowly:
    of SmolLM2, one token took 66 ms, 45 this way, five 93 and 64 (2 cores of an EPYC, fp32). In
    bf16 this form is slower. x (...,k) -> (...,n)
    """
    W, bias = linear.weight, linear.bias                                        # (n,k)
    if W.is_cuda:
        return product_by_kernel(x, W, bias)
    if W.numel() < SMALL or W.dtype != torch.float32:
        return F.linear(x, W, bias)
    n = len(W) // 32 * 32
    blocks = x.reshape(-1, W.shape[1]) @ W[:n].unflatten(0, (-1, 32)).mT        # (n/32,rows,32)
    y = blocks.transpose(0, 1).reshape(*x.shape[:-1], n)
    if n < len(W):
        y = torch.cat([y, F.linear(x, W[n:])], -1)
    return y if bias is None else y + bias


@triton.jit
def rotated(x, cos, sin, j, mask, d: tl.constexpr):
    """`apply_rope` while loading. Pointers x, cos, sin (n,1) of rows, j (1,D) -> (n,D)"""
    own = tl.load(x + j, mask=mask, other=0).to(tl.float32)
    other = tl.load(x + (j + d // 2) % d, mask=mask, other=0).to(tl.float32)
    other = tl.where(j < d // 2, -other, other)
    turned = (own * tl.load(cos + j, mask=mask, other=0).to(tl.float32)
              + other * tl.load(sin + j, mask=mask, other=0).to(tl.float32))
    return turned.to(x.dtype.element_ty)


@triton.jit
def absorb(q, k, v, seen, scale, high, total, acc):
    """The softmax goes on over n more keys: high, total (BM,) are the largest score so far (in
    log2) and the sum of exp2(score - high), acc (BM,D) that of values with these weights.

    q (BM,D)  k, v (n,D)  seen (BM,n); hidden scores are finite, so that no difference is NaN
    """
    scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale
    scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(high, tl.max(scores, 1))
    keep, p = tl.exp2(high - higher), tl.exp2(scores - higher[:, None])
    acc = dot(p.to(v.dtype), v, acc * keep[:, None])
    return higher, total * keep + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(qkv, cos, sin, kept_k, kept_v, positions, counts, out, weight, width, longest,
                     scale, WINDOW: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
                     G: tl.constexpr, d: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, BT: tl.constexpr, D: tl.constexpr):
    """BM of the T H / G queries of a row and group, over one of SPLITS runs of the kept columns.

    What a row has kept is read once and no further than written. The last split sees the new
    tokens too, from the inputs, and stores them; no program of the launch reads those columns.
    """
    start_next()
    wait_previous()
    split, g, row, b = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile, split = split // SPLITS, split % SPLITS
    first = tl.load(counts + b + row) + tl.load(counts + 2 * b + row)   # position of token 0
    first = tl.minimum(first, longest)
    m, n = tile * BM + tl.arange(0, BM), tl.arange(0, BN)               # (BM,)  (BN,)
    new, j = tl.arange(0, BT), tl.arange(0, D)[None, :]                 # (BT,)  (1,D)
    t, h, in_d = m // (H // G), g * (H // G) + m % (H // G), j < d      # (BM,)  (BM,)  (1,D)
    row = row.to(tl.int64)                                              # offsets pass 2^31
    kept_k, kept_v = kept_k + (row * G + g) * width * d + j, kept_v + (row * G + g) * width * d + j
    q, of_t = qkv + ((row * T + t) * (H + 2 * G) + h)[:, None] * d, (row * T + t)[:, None] * d
    q = rotated(q, cos + of_t, sin + of_t, j, (t < T)[:, None] & in_d, d)        # (BM,D)
    high, total = tl.full((BM,), -1e30, tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)

    # 1. this split's share of the columns: whole tiles, so that few columns take few splits
    start = tl.maximum(first + 1 - WINDOW, 0)
    share = tl.cdiv(first - start, BN * SPLITS) * BN
    start += split * share
    end = tl.minimum(start + share, first)
    for i in range(start, end, BN):
        s = i + n                                                       # (BN,)
        mask = (s < end)[:, None] & in_d
        k_i = tl.load(kept_k + s[:, None] * d, mask=mask, other=0)      # (BN,D)
        v_i = tl.load(kept_v + s[:, None] * d, mask=mask, other=0)
        seen = (s < end)[None, :] & (s[None, :] > first + t[:, None] - WINDOW)
        high, total, acc = absorb(q, k_i, v_i, seen, scale, high, total, acc)

    # 2. the new tokens among themselves
    if split == SPLITS - 1:
        angle, real = (row * T + new)[:, None] * d, (new < T)[:, None] & in_d
        k = qkv + angle * (H + 2 * G) + (H + g) * d
        k_new = rotated(k, cos + angle, sin + angle, j, real, d)              # (BT,D)
        v_new = tl.load(k + G * d + j, mask=real, other=0)
        if tile == 0:
            slot = tl.load(positions + row * T + new, mask=new < T, other=0)[:, None]
            tl.store(kept_k + slot * d, k_new, mask=real)
            tl.store(kept_v + slot * d, v_new, mask=real)
        seen = (new[None, :] <= t[:, None]) & (new[None, :] > t[:, None] - WINDOW)
        high, total, acc = absorb(q, k_new, v_new, seen, scale, high, total, acc)
    total = tl.maximum(total, 1)                                        # an empty split has 0
    at = ((split * b + row) * T + t) * H + h                            # (BM,)
    tl.store(out + at[:, None] * d + j, acc / total[:, None], mask=(t < T)[:, None] & in_d)
    if weight is not None:
        tl.store(weight + at, high + tl.log2(total), mask=t < T)


@triton.jit
def merge_kernel(parts, weight, out, d: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr):
    """The mean of a query's SPLITS partial outputs, weighted by 2^weight."""
    start_next()
    wait_previous()
    query, n, j = tl.program_id(0), tl.num_programs(0), tl.arange(0, D)
    at = tl.arange(0, SPLITS) * n + query                               # (SPLITS,)
    w = tl.load(weight + at)
    w = tl.exp2(w - tl.max(w, 0))
    part = tl.load(parts + at[:, None] * d + j[None, :], mask=(j < d)[None, :], other=0)
    tl.store(out + query * d + j, tl.sum(part * w[:, None], 0) / tl.sum(w, 0), mask=j < d)


def attention_tiles(b, queries, G, d, max_length, dtype):
    """BM, BN, warps, stages and SPLITS of a launch for that many queries per row and group.

    Few rows are split, so that each of an H100's 132 SMs has two programs; every split has at
    least 128 columns once the cache is full. fp32 products take three passes and more registers.
    2048 rows of SmolLM2, 256 columns: 145 us a layer, 2.8 TB/s (H100), where bmm and softmax took
    259; one row of an 8B Llama, 128 columns: 5 us, where they took 30.
    """
    half = dtype.itemsize == 2
    BM = min(max(16, triton.next_power_of_2(queries)), 64 if half else 16)
    splits = max(1, min(264 // (b * G * triton.cdiv(queries, BM)), max_length // 128))
    warps, stages = (2, 2) if half and d <= 64 else (4, 3) if half else (4 if d <= 64 else 8, 2)
    return BM, 64 if half else 32, warps, stages, 1 << splits.bit_length() - 1


def attention_step(qkv, cos, sin, kept, cache, scale, window=None):
    """RoPE, writing to the cache and attention of T new tokens per row, in one or two launches.

    Its definition is `apply_rope`, `MixerCache.update` and `attend_in_groups`. Memory: each
    row's kept columns once. qkv (b,T,H+2G,d): heads of q, k, v  cos, sin (b,T,d) -> (b,T,H,d)
    """
    (b, T, heads, d), G = qkv.shape, kept.k.shape[1]
    H = heads - 2 * G
    queries = T * H // G                                                # of a row and group
    assert cos.shape == sin.shape == (b, T, d), "RoPE by the row, over whole heads"
    for tensor in (qkv, cos, sin, *kept, cache.positions, cache.counts):
        assert tensor.is_contiguous()
    window = window or 2 ** 30                                          # none: wider than any row
    BM, BN, warps, stages, splits = attention_tiles(b, queries, G, d, cache.max_length, qkv.dtype)
    D, BT = (max(16, triton.next_power_of_2(n)) for n in (d, T))
    out, parts, weight = qkv.new_empty(b, T, H, d), None, None
    if splits > 1:
        weight = qkv.new_empty(splits, b, T, H, dtype=torch.float32)
        parts = qkv.new_empty(splits, b, T, H, d, dtype=torch.float32)
    launch(attention_kernel, b, (splits * triton.cdiv(queries, BM), G, b),
           qkv, cos, sin, *kept, cache.positions, cache.counts, out if splits == 1 else parts,
           weight, kept.k.shape[2], cache.max_length, scale * math.log2(math.e), window, T, H, G,
           d, splits, BM, BN, BT, D, num_warps=warps, num_stages=stages)
    if splits > 1:
        launch(merge_kernel, b, (b * T * H,), parts, weight, out, d, splits, D, num_warps=1)
    return out


@triton.jit
def rope_kernel(v, cos, sin, out, v_row, g, scale, heads, d: tl.constexpr, D: tl.constexpr):
    """RoPE of one head of one token; heads from g on, those of C, also get attention's scale."""
    start_next()
    wait_previous()
    row, h, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    turned = rotated(v + row * v_row + h * d, cos + row * d, sin + row * d, j, j < d, d)
    tl.store(out + (row * heads + h) * d + j, turned * tl.where(h < g, 1.0, scale), mask=j < d)


def rope_by_kernel(v, cos, sin, g, scale):
    """RoPE of B and C, and C's scale, in one launch instead of five. v (b,T,heads,d) -> the same"""
    (b, T, heads, d), out = v.shape, v.new_empty(v.shape)
    launch(rope_kernel, b, (b * T, heads), v, cos, sin, out, v.flatten(0, 1).stride(0), g, scale,
           heads, d, triton.next_power_of_2(d), num_warps=1)
    return out


@triton.jit
def norm_kernel(x, weight, eps, out, n, BN: tl.constexpr):
    """RMSNorm of one row of n."""
    start_next()
    wait_previous()
    row, j = tl.program_id(0).to(tl.int64) * n, tl.arange(0, BN)
    x_j = tl.load(x + row + j, mask=j < n, other=0).to(tl.float32)      # (BN,)
    normed = x_j * tl.rsqrt(tl.sum(x_j * x_j) / n + eps)
    tl.store(out + row + j, normed * tl.load(weight + j, mask=j < n, other=0), mask=j < n)


def norm_by_kernel(norm, x):
    """Stands for the forward of an RMSNorm, in one launch: of 4096 values 2.5 us (H100), where
    F.rms_norm takes 6.2. x (b,T,D)"""
    D, out = x.shape[-1], torch.empty_like(x)
    launch(norm_kernel, len(x), (x.numel() // D,), x, norm.weight, norm.variance_epsilon, out, D,
           triton.next_power_of_2(D), num_warps=4)
    return out


@triton.jit
def silu_times_kernel(gate, y, n, BN: tl.constexpr):
    """y *= silu(gate), element by element."""
    start_next()
    wait_previous()
    j = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    v = silu(tl.load(gate + j, mask=j < n).to(tl.float32))
    tl.store(y + j, v * tl.load(y + j, mask=j < n).to(tl.float32), mask=j < n)


@triton.jit
def product_kernel(x, W, bias, gate, total, y, x_row, rows, n, k, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr):
    """BN outputs of all rows: the weights stream through once, several tiles ahead of the sums.

    The weights are the left factor, so that one row of x needs a tile of no more than 8 columns.
    """
    start_next()
    j, m, i = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BK)
    row = tl.minimum(j, n - 1).to(tl.int64)[:, None] * k                # (BN,1)
    prefetch(W + row, AHEAD)
    wait_previous()
    row += i[None, :]                                                   # (BN,BK)
    x += m[None, :] * x_row + i[:, None]                                # (BK,BM)
    acc, gated = tl.zeros((BN, BM), tl.float32), tl.zeros((BN, BM), tl.float32)
    for first in range(0, k, BK):
        in_k = i < k - first
        mask = (j < n)[:, None] & in_k[None, :]
        x_i = tl.load(x + first, mask=(m < rows)[None, :] & in_k[:, None], other=0)
        acc = dot(tl.load(W + row + first, mask=mask, other=0), x_i, acc)
        if gate is not None:
            gated = dot(tl.load(gate + row + first, mask=mask, other=0), x_i, gated)
    if bias is not None:
        acc += tl.load(bias + j, mask=j < n, other=0).to(tl.float32)[:, None]
    if gate is not None:
        acc *= silu(gated)
    at, mask = m[None, :] * n + j[:, None], (j < n)[:, None] & (m < rows)[None, :]
    if total is not None:
        acc += tl.load(total + at, mask=mask, other=0).to(tl.float32)
    tl.store(y + at, acc, mask=mask)


def product_by_kernel(x, W, bias=None, gate=None, total=None):
    """x W^T + bias, times silu(x gate^T) where there is a `gate`, added to `total` if there is one.

    Up to 16 rows in one launch, which reads the weights of an 8B Llama's layer at 2.1 to 2.8 TB/s
    (H100); cuBLAS needs up to 18 % more time for one row, and SiLU and sum launches of their own.

    x (b,T,k)  W, gate (n,k)  bias (n)  total (b,T,n), changed -> (b,T,n)
    """
    (n, k), rows = W.shape, x.shape[0] * x.shape[1]
    assert all(v is None or v.is_contiguous() for v in (W, bias, gate, total)) and x.stride(-1) == 1
    if rows > 16:
        y = F.linear(x, W, bias)
        if gate is not None:
            launch(silu_times_kernel, len(x), (triton.cdiv(y.numel(), 1024),), F.linear(x, gate), y,
                   y.numel(), 1024)
        return y if total is None else total.add_(y)
    y = x.new_empty(*x.shape[:2], n) if total is None else total
    x, BM, BN, BK = x.reshape(rows, k), 8 if rows <= 8 else 16, 16, 512 // x.element_size()
    tile = 512 * (BM + (BN if gate is None else 2 * BN))                # bytes
    memory = x.is_cuda and getattr(torch.cuda.get_device_properties(x.device),
                                   "shared_memory_per_block_optin", 48 << 10)
    launch(product_kernel, rows, (triton.cdiv(n, BN),), x, W, bias, gate, total, y, x.stride(0),
           rows, n, k, BM, BN, BK, min(4 * BK, k), num_warps=1,
           num_stages=min(6, 1 + memory // tile))
    return y


def layers_by_kernels(model, tokens, positions, cache):
    """Stands for the forward of `model.model`: SiLU, gate and sums are part of the products before
    them, so that a few tokens take seven to ten launches a layer.

    tokens, positions (b,T) -> (b,T,D), normed
    """
    trunk = model.model
    x = trunk.embed_tokens(tokens)                                              # (b,T,D)
    angles = trunk.rotary_emb(x, positions) if cache.has_attention or model.config.rope else None
    for i, layer in enumerate(trunk.layers):
        u, mixer, mlp = norm_by_kernel(layer.input_layernorm, x), layer.self_attn, layer.mlp
        if isinstance(mixer, Mixer):
            proj = product_by_kernel(u, mixer.in_proj.weight, mixer.in_proj.bias)
            y, out = mixer.mix(proj, angles, cache), mixer.out_proj
        else:
            qkv, out = product_by_kernel(u, *cache.weights[i]), mixer.o_proj
            window = getattr(mixer, "sliding_window", getattr(mixer.config, "sliding_window", None))
            y = attention_step(qkv.unflatten(-1, (-1, mixer.head_dim)), *angles, cache.layers[i],
                               cache, mixer.scaling, window).flatten(-2)
        x = product_by_kernel(y, out.weight, out.bias, total=x)
        u = norm_by_kernel(layer.post_attention_layernorm, x)
        y = product_by_kernel(u, mlp.up_proj.weight, gate=mlp.gate_proj.weight)     # (b,T,F)
        x = product_by_kernel(y, mlp.down_proj.weight, total=x)
    return norm_by_kernel(trunk.norm, x)


# where the classes come from that `layers_by_kernels` computes
SERVED = (*(f"transformers.models.{name}." for name in ("llama", "mistral", "qwen2")),
          "transformers.activations.", "torch.nn.modules.", f"{__name__}.")


def kernels_serve(model):
    """Do the kernels compute what the layers do: Llama's, Mistral's or Qwen2's, as transformers
    made them, without adapters, hooks and quantised weights that would be passed by?"""
    trunk, config = model.model, model.model.config

    def changed(part):
        """Is `part` more than its class says? transformers' hooks that record outputs are not."""
        hooks = chain(part._forward_hooks.values(), part._forward_pre_hooks.values())
        return (not f"{type(part).__module__}.".startswith(SERVED) or "forward" in vars(part)
                or any("output_capturing" not in str(hook.__module__) for hook in hooks)
                or any(type(v) is not nn.Parameter or not v.is_contiguous()
                       for v in part.parameters(recurse=False)))

    called = {trunk.embed_tokens, trunk.rotary_emb}                     # as modules, hooks and all
    return (use_triton(None, model.get_input_embeddings().weight)
            and config.hidden_act == "silu" and not getattr(config, "mlp_bias", False)
            and not any(map(changed, {*trunk.modules(), model.get_output_embeddings()} - called)))


@contextmanager
def few_tokens(model, tokens, by_kernel):
    """Within: decoding by faster forms of attention and nn.Linear; undone at the end.

    A call of one to five tokens is bound by the number of operations, not by arithmetic. The
    functions are swapped for the whole process, so no other thread may use these classes
    meanwhile. by_kernel: only the head and Mamba's dt_proj are called as nn.Linear then.
    """
    swaps = [(model.model.config, "_attn_implementation", "attend_in_groups")]
    if by_kernel or not tokens.is_cuda and tokens.numel() < 16 and torch.get_num_threads() > 1:
        swaps.append((nn.Linear, "forward", linear_of_few))
    with ExitStack() as undo:
        for owner, name, new in swaps:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield


# ---------------------------------------------------------------------------------------------
# 5. The mixer: what stands where attention stood. Both kinds, training and decoding.
# ---------------------------------------------------------------------------------------------


def apply_rope(v, cos, sin):
    """Rotary embedding in Llama's half-split layout. v (b,l,heads,d), cos, sin (.,l,d)"""
    first, second = v.chunk(2, -1)
    return torch.addcmul(v * cos[:, :, None], torch.cat((-second, first), -1), sin[:, :, None])


class Mixer(nn.Module):
    """Mamba or Mamba2 with attention's four projections; called by transformers as `self_attn`.

    in_proj's rows are, in this order: z (gate), x (from V), B (from K), C (from Q), dt. Mamba
    convolves x after its heads are repeated and makes Delta per channel through a low rank;
    Mamba2 convolves x, B, C before and has one Delta per head.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.d_conv = layer_idx, config.d_conv
        # a copy of our fields: reading one from a transformers config takes a microsecond
        self.config = SimpleNamespace(
            **{name: getattr(config, name) for name in HybridConfig.__annotations__})
        D, Q = config.hidden_size, config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or D // Q
        self.N = config.d_state or self.head_dim
        # a state smaller than a head (Mamba's 16) cuts each attention head into `cut` mixer heads
        cut = self.head_dim // self.N
        kv_heads = getattr(config, "num_key_value_heads", None) or Q
        self.H, self.G = Q * cut, kv_heads * cut
        self.runs = 1 if config.group_by_state else cut
        self.d_inner, self.d_xb = Q * self.head_dim, kv_heads * self.head_dim
        self.per_channel = config.mixer == "mamba"
        d_delta = self.d_inner if self.per_channel else self.H
        rank = math.ceil(D / 16) if self.per_channel else self.H
        sizes = dict(z=0 if config.gate == "none" else self.d_inner, x=self.d_xb, B=self.d_xb,
                     C=self.d_inner, dt=rank)
        ends = list(accumulate(sizes.values()))
        self.rows = {k: slice(end - n, end) for (k, n), end in zip(sizes.items(), ends)}

        self.in_proj = nn.Linear(D, ends[-1])
        self.out_proj = nn.Linear(self.d_inner, D)
        if self.per_channel:
            self.dt_proj = nn.Linear(rank, d_delta, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_delta))
        self.A_log = nn.Parameter(torch.empty(d_delta, *[self.N] * self.per_channel))
        if config.skip is not None:
            self.D = nn.Parameter(torch.empty(d_delta))
        self.d_convolved = self.d_inner if self.per_channel else 2 * self.d_xb + self.d_inner
        if config.conv != "none":
            self.conv1d = nn.Conv1d(self.d_convolved, self.d_convolved, self.d_conv,
                                    groups=self.d_convolved)
        if config.norm:
            self.norm_weight = nn.Parameter(torch.empty(self.d_inner))

    @torch.no_grad()
    def init_parameters(self):
        """Start all that attention does not have, by the recipe's fields.

        Projections keep nn.Linear's random start until `copy_attention` overwrites their rows.
        """
        config, n_delta = self.config, self.dt_bias.shape[0]
        self.in_proj.bias.zero_()
        self.out_proj.bias.zero_()
        if config.gate == "open":                   # silu(1.2785) = 1: y passes as it is
            self.in_proj.weight[self.rows["z"]] = 0
            self.in_proj.bias[self.rows["z"]] = 1.2784645427610738
        if config.conv == "identity":
            self.conv1d.weight.zero_()
            self.conv1d.weight[:, :, -1] = 1
        if config.conv != "none":
            self.conv1d.bias.zero_()
        if config.skip is not None:
            self.D.fill_(config.skip)
        if config.norm:
            self.norm_weight.fill_(1)
        if config.decay == "none":                  # Delta = 1, A = 0: linear attention
            delta = torch.ones(n_delta, dtype=torch.float64)
            self.A_log.fill_(-math.inf)
        elif config.decay == "slow":                # heads forget over 3 to 1000 tokens
            spread = torch.linspace(math.log(0.3), math.log(0.001), self.H).exp()
            delta = spread.repeat_interleave(n_delta // self.H)
            self.A_log.zero_()
        else:                                       # the defaults of the Mamba and Mamba2 code
            delta = torch.empty(n_delta).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.A_log.copy_(torch.arange(1, self.N + 1.0).log() if self.per_channel
                             else torch.empty(self.H).uniform_(1, 16).log())
        self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))            # softplus inverse
        if config.decay != "default":               # Delta starts the same for every token
            (self.dt_proj.weight if self.per_channel else
             self.in_proj.weight[self.rows["dt"]]).zero_()

    @torch.no_grad()
    def copy_attention(self, attention):
        """Algorithm 1's weight moves: V -> x, K -> B, Q -> C, O -> out. The teacher keeps its own.

        Biases move with their rows (Qwen2); a projection without one gets zeros.
        """
        rows = self.rows
        moves = ((attention.v_proj, self.in_proj, rows["x"]),
                 (attention.k_proj, self.in_proj, rows["B"]),
                 (attention.q_proj, self.in_proj, rows["C"]),
                 (attention.o_proj, self.out_proj, slice(None)))
        for source, target, where in moves:
            assert target.weight[where].shape == source.weight.shape
            target.weight[where] = source.weight
            if source.bias is not None:
                target.bias[where] = source.bias

    def allocate(self, b, slots, like):
        """An empty MixerState for b rows. like: device and dtype of the activations"""
        wide = dict(like, dtype=torch.promote_types(like["dtype"], torch.float32))
        p, gx = (self.N, self.H) if self.per_channel else (1, self.G)
        return MixerState(torch.zeros(b, self.H, self.N, self.N, **wide),
                          torch.zeros(b, slots, gx, self.N, **like),
                          torch.zeros(b, slots, self.H, p, **wide),
                          torch.zeros(b, slots, self.G, self.N, **like),
                          torch.zeros(b, slots, self.d_convolved, **like))

    def convolve(self, raw, cache):
        """The causal depthwise convolution; with a cache its window reaches back into that.

        raw (b,l,c) -> (b,l,c)
        """
        if self.config.conv == "none":
            return raw
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias              # (c,W)  (c)
        l, W, act = raw.shape[1], self.d_conv, self.config.conv == "default"
        if cache is None:
            past = F.pad(raw, (0, 0, W - 1, 0))                                # (b,W-1+l,c)
        else:
            ring_u = cache.layers[self.layer_idx].ring_u
            if cache.behind:
                return conv_step(raw, weight, bias, ring_u, cache.counts, act, plan=cache.plan)
            past = torch.cat([ring_u[:, :W - 1], raw], 1)
            if cache.ring == 0:             # the ring is the window, in order of time
                ring_u.copy_(past[:, l:])
            else:
                slots = cache.positions[:, -1:] + torch.arange(2 - W, 1, device=raw.device)
                ring_u[cache.rows, slots % ring_u.shape[1]] = past[:, l:]
        if l == 1:  # past is the window
            out = (past * weight.T).sum(1, keepdim=True) + bias
        else:       # four shifted sums: a compiler fuses them, cuDNN's depthwise kernels are slower
            out = bias + sum(past[:, w: w + l] * weight[:, w] for w in range(W))
        return (F.silu(out) if act else out).to(raw.dtype)

    def inputs(self, proj, position_embeddings, cache=None):
        """x, B and C of the scan: convolved, cut into heads, with RoPE and attention's scale.

        proj (b,l,rows) -> x (b,l,Gx,P)  B (b,l,G,N)  C (b,l,H,N)
        """
        parts, shape = (self.d_xb, self.d_xb + self.d_inner), (*proj.shape[:2], -1)
        xBC = proj[..., self.rows["x"].start: self.rows["C"].stop]
        if self.per_channel:                        # Mamba convolves x alone, heads repeated
            x, BC = xBC.split(parts, -1)
            x = to_heads(x.unflatten(-1, (-1, self.N)), self.H, self.runs).flatten(-2)
            x = self.convolve(x, cache)
        else:
            x, BC = self.convolve(xBC, cache).split(parts, -1)
        BC, g = BC.view(*shape, self.head_dim), self.d_xb // self.head_dim
        scale = self.head_dim ** -0.5 if self.config.scale_c else 1.0
        if self.config.rope and cache and cache.behind and use_triton(None, proj):
            BC, scale = rope_by_kernel(BC, *position_embeddings, g, scale), 1.0
        elif self.config.rope:
            BC = apply_rope(BC, *position_embeddings)
        B, C = BC[:, :, :g], BC[:, :, g:] if scale == 1.0 else BC[:, :, g:] * scale
        return x.view(*shape, self.N), B.reshape(*shape, self.N), C.reshape(*shape, self.N)

    def weights(self):
        """A (H,p',n'), dt_bias (H,p') and D (H,p') or None, at least fp32."""
        wide = torch.promote_types(self.dt_bias.dtype, torch.float32)
        dt_bias = self.dt_bias.to(wide).view(self.H, -1)
        A = -torch.exp(self.A_log.to(wide)).view(*dt_bias.shape, -1)
        return A, dt_bias, None if self.config.skip is None else self.D.to(wide).view(self.H, -1)

    def forward(self, hidden_states, position_embeddings=None, token_mask=None, **kwargs):
        """u (b,l,D), token_mask (b,l) True at real tokens -> (y (b,l,D), None)."""
        cache, proj = kwargs.get(CACHE), self.in_proj(hidden_states)           # (b,l,rows)
        return self.out_proj(self.mix(proj, position_embeddings, cache, token_mask)), None

    def mix(self, proj, position_embeddings, cache, token_mask=None):
        """All between the projections. proj (b,l,rows) -> y (b,l,d_inner)"""
        config, H = self.config, self.H
        if token_mask is not None:                  # padding: nothing enters the convolution
            proj = proj * token_mask[..., None]
        x, B, C = self.inputs(proj, position_embeddings, cache)
        dt, heads = proj[..., self.rows["dt"]], (*proj.shape[:2], H, -1)
        dt = (self.dt_proj(dt) if self.per_channel else dt).view(heads)
        z = None if config.gate == "none" else proj[..., self.rows["z"]].view(heads)
        A, dt_bias, D = self.weights() if cache is None else cache.weights[self.layer_idx]
        layer = None if cache is None else cache.layers[self.layer_idx]
        if layer and cache.behind:
            y = multi_step(x, dt, B, C, A, dt_bias, D, z, *layer[:4], cache.counts, cache.fold_at,
                           self.runs, plan=cache.plan)
        else:
            y = self.scan(x, dt + dt_bias, B, C, A, D, z, token_mask, layer and layer.state)
        y = y.flatten(-2)                                                      # (b,l,d_inner)
        if config.norm:
            wide = torch.promote_types(y.dtype, torch.float32)
            heads = y.unflatten(-1, (-1, self.head_dim)).to(wide)
            y = F.rms_norm(heads, (self.head_dim,), eps=1e-5).flatten(-2) * self.norm_weight
        return y.to(proj.dtype)

    def scan(self, x, dt, B, C, A, D, z, token_mask, state=None):
        """What `multi_step` computes, where all tokens stand at once; moves `state`, if any, on.

        -> y (b,l,H,P)
        """
        delta = F.softplus(dt)                                                 # (b,l,H,p')
        if token_mask is not None:                  # padding: no write, no decay
            delta = delta * token_mask[..., None, None]
        x, B = (to_heads(v, self.H, self.runs) for v in (x, B))
        if state is None:
            y, _ = chunked_scan(x, delta, A, B, C)
        elif x.shape[1] > 1:
            y, after = chunked_scan(x, delta, A, B, C, state)
            state.copy_(after)
        else:
            y = single_step(x, delta, A, B, C, state)
        if D is not None:
            y = torch.addcmul(y, D, x)
        return y if z is None else y * F.silu(z)


def single_step(x, delta, A, B, C, state):
    """`recurrence` for one token, in place, in few operations: each costs 4 us once the weights of
    a layer have swept the caches. This and the convolution's window in order of time (`convolve`)
    save 2 of the 34 ms that a token of SmolLM2's hybrid took on a CPU.

    Shapes: `recurrence`, with l = 1
    """
    h = state[:, None]                                                         # (b,1,H,P,N)
    h *= (delta[..., None] * A).exp()                                          # (b,1,H,p',n')
    h.addcmul_((delta * x)[..., None], B[..., None, :])
    return (h * C[..., None, :]).sum(-1)


# ---------------------------------------------------------------------------------------------
# 6. The hybrid: the teacher's network with some attention layers replaced (Algorithm 1).
# ---------------------------------------------------------------------------------------------


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of attention and Mamba layers, at home in transformers.

    Names follow the teacher's (model.layers.i.mlp...); a mixer stands at layers.i.self_attn.
    """

    config_class = HybridConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]
    _is_stateful = True                # transformers then refuses to "rewind" us by cropping
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"]

    def __init__(self, config):
        """The teacher's network by its own class, mixers in place of the attention that goes."""
        super().__init__(config)
        self.model = AutoModel.from_config(config.teacher_config(),
                                           attn_implementation=config._attn_implementation)
        for i, layer in enumerate(self.model.layers):
            if i not in config.attn_layers:
                layer.self_attn = Mixer(config, i)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        for mixer in self.mixers().values():    # after transformers' own initialisation
            mixer.init_parameters()

    def mixers(self):
        """{layer index: Mixer} of the converted layers."""
        return {i: layer.self_attn for i, layer in enumerate(self.model.layers)
                if isinstance(layer.self_attn, Mixer)}

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, cache=None,
                use_cache=None, labels=None, logits_to_keep=0, num_items_in_batch=None, **kwargs):
        """Logits, and with labels (b,l; shifted inside, -100 ignored) the mean cross-entropy, or
        its sum over `num_items_in_batch`.

        With a cache, an empty one takes the prompt and one that holds a prompt takes the next
        tokens, committed at once: this is what `generate()` does.

        input_ids (b,l)  attention_mask (b,l) -> .logits (b,l or logits_to_keep,vocab)
        """
        cache = past_key_values if cache is None else cache         # before and since 5.24
        if cache is None and use_cache:
            cache = MixerCache.allocate(self, input_ids.shape[0])
        if cache is None:
            hidden = hidden_states(self, input_ids, attention_mask, **kwargs)           # (b,l,D)
            logits = self.lm_head(hidden[:, -logits_to_keep:])
        elif cache.columns == 0:
            logits = self.prefill(input_ids, cache, attention_mask, logits_to_keep)
        else:
            cache.columns += input_ids.shape[1]
            logits = self.decode(input_ids, cache)[:, -logits_to_keep:]     # (b,T,vocab)
            cache.commit(cache.counts[2].clone())
        loss = None if labels is None else self.loss_function(
            logits, labels, logits.shape[-1], num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    prefill = prefill
    decode = decode

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode,
                                      batch_size, max_cache_length, *args):
        """Called by generate(): a MixerCache of the right size instead of transformers' own."""
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            copies = max(generation_config.num_beams or 1,
                         generation_config.num_return_sequences or 1)
            ring = 1 if self.lm_head.weight.is_cuda else 0      # 0: as in spec_decode.generate
            model_kwargs[CACHE] = MixerCache.allocate(
                self, batch_size * copies, max_cache_length + 1, ring)


AutoConfig.register("mamba_in_llama", HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
HybridConfig.register_for_auto_class()
HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def check_teacher(teacher, d_state):
    """Raise ValueError, in one line, for a teacher whose attention Algorithm 1 does not cover."""
    layers = getattr(getattr(teacher, "model", None), "layers", ())
    require(len(layers) > 0, f"{type(teacher).__name__} has no model.layers")
    for i, layer in enumerate(layers):
        names = sorted(n for n, _ in getattr(layer, "self_attn", nn.Module()).named_children())
        require(names == ["k_proj", "o_proj", "q_proj", "v_proj"], f"layer {i} of "
                f"{type(teacher).__name__}: attention with {names}, but only q_proj, k_proj, "
                "v_proj, o_proj can be converted")
    c, head_dim = teacher.config, layers[0].self_attn.head_dim
    G = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    require(c.num_attention_heads % G == 0,
            f"{c.num_attention_heads} query heads do not divide into {G} key/value heads")
    require(d_state is None or 1 <= d_state <= head_dim and head_dim % d_state == 0,
            f"d_state {d_state} does not divide the head dimension {head_dim}")


@torch.no_grad()
def convert_to_hybrid(teacher, attn_layers=None, mixer="mamba2", recipe="near_linear",
                      d_state=None, **switches):
    """Algorithm 1: a hybrid with the teacher's weights; the teacher is left untouched.

    teacher: a transformers decoder with q/k/v/o projections (Llama, Mistral, Qwen2).
    attn_layers: indices that stay attention (default the odd ones). recipe: see RECIPES, each
    field of which can be overridden as a keyword. d_state: None or a divisor of head_dim.
    Raises ValueError for anything that does not fit.
    """
    require(mixer in ("mamba", "mamba2"), f"mixer {mixer!r} is neither 'mamba' nor 'mamba2'")
    require(recipe in RECIPES, f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    unknown = set(switches) - set(HybridConfig.__annotations__)
    require(not unknown, f"unknown switches {sorted(unknown)}")
    check_teacher(teacher, d_state)
    L = len(teacher.model.layers)
    keep = list(range(1, L, 2)) if attn_layers is None else [int(i) for i in attn_layers]
    require(all(0 <= i < L for i in keep), f"attention layers {keep} are not in 0..{L - 1}")
    require(len(set(keep)) == len(keep), f"attention layers {keep} are repeated")
    fields = {**RECIPES[recipe], **switches}
    fields["norm"] = fields.get("norm", False) and mixer == "mamba2"       # Mamba has no such norm
    # every field of the teacher's config stays one of ours, so that its layers find what they need
    config = HybridConfig(**{k: v for k, v in teacher.config.to_dict().items()
                             if k not in ("model_type", "architectures", "dtype")},
                          teacher_type=teacher.config.model_type, attn_layers=sorted(keep),
                          mixer=mixer, recipe=recipe, d_state=d_state, **fields)
    eager = teacher.config._attn_implementation == "eager"
    config._attn_implementation = "eager" if eager else "sdpa"
    student = HybridForCausalLM(config)
    weight = teacher.get_input_embeddings().weight                          # (V,D)
    for name, p in student.named_parameters():      # not .to(): it would round RoPE's frequencies
        wide = name.rsplit(".", 1)[-1] in student._keep_in_fp32_modules_strict
        p.data = p.data.to(torch.promote_types(weight.dtype, torch.float32) if wide
                           else weight.dtype)
    # embedding, norms, MLPs, head and the layers that stay bear the same names in both
    student.load_state_dict(teacher.state_dict(), strict=False)
    # what remains is Algorithm 1 proper: W_V, W_K, W_Q, W_O into each mixer
    for i, new in student.mixers().items():
        new.init_parameters()                                   # again, now in the final dtype
        if config.attn_init:
            new.copy_attention(teacher.model.layers[i].self_attn)
    student.generation_config = teacher.generation_config
    return student.to(weight.device).train(teacher.training)


# ---------------------------------------------------------------------------------------------
# 7. Losses: Eq. 2 (CE + KL) and Eq. 4 (DPO). Free functions; logits at t predict token t + 1.
# ---------------------------------------------------------------------------------------------


def token_losses(student_logits, teacher_logits, targets):
    """Cross-entropy and KL[teacher || student] of each token, in nats, at least fp32.

    logits (n,V) (teacher's may be None: KL 0)  targets (n,) -> ce (n,), kl (n,)
    """
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = student_logits.to(wide).log_softmax(-1)                                     # (n,V)
    ce = F.nll_loss(log_s, targets, reduction="none")
    if teacher_logits is None:
        return ce, torch.zeros_like(ce)
    log_t = teacher_logits.to(wide).log_softmax(-1)                                     # (n,V)
    return ce, (log_t.exp() * (log_t - log_s)).sum(-1)


def distillation_loss(student_logits, teacher_logits, labels, alpha=1.0, beta=0.1):
    """Eq. 2: alpha * CE on the pseudo-labels + beta * KL[p_T || p_S], mean over labelled tokens.

    The readable form; training never holds all logits (`chunked_token_losses`). labels as
    transformers has them (shifted inside, -100 ignored); 0 if there are none. The defaults are the
    paper's; the command line's are what worked better (README).

    logits (b,l,V)  labels (b,l) -> loss (), {"ce", "kl", "tokens"}
    """
    keep = labels[:, 1:] != -100                            # (b,l-1); n of them are True
    ce, kl = token_losses(student_logits[:, :-1][keep], teacher_logits[:, :-1][keep],
                          labels[:, 1:][keep])
    return equation_2(ce, kl, labels, alpha, beta)


def n_labelled(labels):
    """How many of the labels (b,l) count: those of a first token are predicted by nothing."""
    return int((labels[:, 1:] != -100).sum())


def equation_2(ce, kl, labels, alpha, beta):
    """Eq. 2: the mean over labelled tokens of alpha ce + beta kl, any shape -> loss (), parts"""
    n = n_labelled(labels)
    ce, kl = ce.sum() / max(n, 1), kl.sum() / max(n, 1)
    return alpha * ce + beta * kl, {"ce": ce.detach(), "kl": kl.detach(), "tokens": n}


def send(tensor, device):
    """`tensor` on `device`, without waiting: a copy from ordinary memory to a GPU first waits for
    all that the GPU has been told to do."""
    if device.type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class TokenLosses(torch.autograd.Function):
    """`token_losses` by Triton: one pass over the logits, one for their gradient.

    Of a step of 208 ms these passes took 29 as torch.compile had it, and take 8 (SmolLM2, 64 x 512
    tokens, H100).
    """

    @staticmethod
    def forward(ctx, s, t, y):
        """s, t (n,V) or None, y (n,) -> ce, kl (n,)"""
        s, t = s.contiguous(), None if t is None else t.contiguous()
        sums = torch.zeros(4, len(s), device=s.device)      # ce, kl, logsumexp of s and of t
        with torch.cuda.device_of(s):
            losses_kernel[(len(s),)](s, t, y, sums, s.shape[1], BV=4096, num_warps=8)
        ctx.save_for_backward(s, t, y, sums)
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx, *gradients):
        """gradients of ce and of kl (n,) -> of s (n,V)"""
        s, t, y, sums = ctx.saved_tensors
        (n, V), ds, g = s.shape, torch.empty_like(s), torch.stack(gradients)            # (2,n)
        with torch.cuda.device_of(s):
            losses_gradient_kernel[n, triton.cdiv(V, 4096)](s, t, y, sums, g, ds, V, BV=4096)
        return ds, None, None


@triton.jit
def losses_kernel(s, t, y, sums, V: tl.constexpr, BV: tl.constexpr):
    """Cross-entropy and KL of one token. A lane keeps its own maximum, and sums relative to it."""
    row, n, v = tl.program_id(0), tl.num_programs(0), tl.arange(0, BV)
    low: tl.constexpr = -1e30
    s += row.to(tl.int64) * V
    max_s, max_t = tl.full((BV,), low, tl.float32), tl.full((BV,), low, tl.float32)
    sum_s, sum_t, cross = tl.zeros_like(max_s), tl.zeros_like(max_s), tl.zeros_like(max_s)
    if t is not None:
        t += row.to(tl.int64) * V
    for i in range(0, V, BV):
        # not other=low: it would overflow in fp16
        s_v = tl.load(s + i + v, mask=v < V - i, other=0).to(tl.float32)
        s_v = tl.where(v < V - i, s_v, low)
        top = tl.maximum(max_s, s_v)
        sum_s, max_s = sum_s * tl.exp(max_s - top) + tl.exp(s_v - top), top
        if t is not None:
            t_v = tl.load(t + i + v, mask=v < V - i, other=0).to(tl.float32)
            t_v = tl.where(v < V - i, t_v, low)
            top = tl.maximum(max_t, t_v)
            shrink, p = tl.exp(max_t - top), tl.exp(t_v - top)
            sum_t, cross, max_t = sum_t * shrink + p, cross * shrink + p * (t_v - s_v), top
    top = tl.max(max_s)
    lse_s = top + tl.log(tl.sum(sum_s * tl.exp(max_s - top)))
    tl.store(sums + row, lse_s - tl.load(s + tl.load(y + row)).to(tl.float32))
    tl.store(sums + 2 * n + row, lse_s)
    if t is not None:                       # KL = sum_v p_t (t - s) - lse_t + lse_s
        top = tl.max(max_t)
        weight = tl.exp(max_t - top)
        Z = tl.sum(sum_t * weight)
        lse_t = top + tl.log(Z)
        tl.store(sums + n + row, tl.sum(cross * weight) / Z - lse_t + lse_s)
        tl.store(sums + 3 * n + row, lse_t)


@triton.jit
def losses_gradient_kernel(s, t, y, sums, g, ds, V: tl.constexpr, BV: tl.constexpr):
    """BV words of one token: d ce / d s = p_s - onehot(y), d kl / d s = p_s - p_t."""
    row, n = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    s_v, g_ce = tl.load(s + row * V + v, mask=v < V).to(tl.float32), tl.load(g + row)
    p = tl.exp(s_v - tl.load(sums + 2 * n + row))
    d = g_ce * (p - tl.where(v == tl.load(y + row), 1, 0))
    if t is not None:
        t_v = tl.load(t + row * V + v, mask=v < V).to(tl.float32)
        d += tl.load(g + n + row) * (p - tl.exp(t_v - tl.load(sums + 3 * n + row)))
    tl.store(ds + row * V + v, d, mask=v < V)


def before_logits(model, tokens):
    """What logits are made of: hidden @ head.T. tokens (b,l) -> hidden (b,l,D), head (V,D)"""
    hidden = hidden_states(model, send(tokens, model.device))
    return hidden, model.get_output_embeddings().weight         # whole after the forward (`shard`)


def chunked_token_losses(labels, student, teacher=None, per_token=None, chunk=None):
    """`token_losses` from hidden states: logits exist for `chunk` labelled tokens at a time.

    Logits are made again in the backward pass, so memory is chunk x V, not tokens x V. Labels on
    the CPU spare a CUDA run the wait for how many there are. per_token: as `token_losses` takes
    and returns, if not that; student, teacher: see `before_logits`.

    labels (b,l)  hidden (b,l,D)  head (V,D) -> ce, kl: (b,l), 0 at what predicts no label
    """
    hidden = [side[0] for side in (student, teacher) if side]
    chunk = chunk or (4096 if hidden[0].is_cuda else 1024)
    per_token = per_token or (TokenLosses.apply if use_triton(None, hidden[0]) else token_losses)
    following = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()      # (b*l,) what t predicts
    where = (following != -100).nonzero()[:, 0]                         # (n,) those that count
    where, y = (send(v, hidden[0].device) for v in (where, following[where]))

    def losses(y, s, t=None):
        """One chunk of m tokens: targets y (m,), hidden states s, t (m,D) -> columns (m,)"""
        return per_token(s @ student[1].T, None if t is None else t @ teacher[1].T, y)

    chunks = zip(*(v.split(chunk) for v in (y, *(h.flatten(0, 1)[where] for h in hidden))))
    columns = map(torch.cat, zip(*(checkpoint(losses, *v, use_reentrant=False) for v in chunks)))
    return [v.new_zeros(labels.numel()).index_copy(0, where, v).view(labels.shape) for v in columns]


def chunked_distillation_loss(student_hidden, teacher_hidden, student_head, teacher_head, labels,
                              alpha=1.0, beta=0.1, chunk=None):
    """`distillation_loss` from hidden states (b,l,D) and heads (V,D); no teacher: its KL is 0."""
    teacher = None if teacher_hidden is None else (teacher_hidden, teacher_head)
    losses = chunked_token_losses(labels, (student_hidden, student_head), teacher, chunk=chunk)
    return equation_2(*losses, labels, alpha, beta)


def sequence_logps(logits, labels):
    """Sum of log p over the labelled tokens of each row. logits (b,l,V), labels (b,l) -> (b,)"""
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # (b,l-1,V)
    return -F.cross_entropy(logits.mT, labels[:, 1:], reduction="none").sum(-1)


def preference_logps(model, tokens, labels):
    """`sequence_logps` without ever holding all logits. tokens, labels (b,l) -> (b,)"""
    return -chunked_token_losses(labels, before_logits(model, tokens))[0].sum(1)


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """Eq. 4: -log sigmoid(beta [log p_S(y_w)/p_T(y_w) - log p_S(y_l)/p_T(y_l)]), unreduced.

    The arguments are `sequence_logps`; the reference is the teacher, as the paper has it.

    four times (b,) -> losses (b,), chosen_rewards (b,), rejected_rewards (b,)
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def preference_losses(student, teacher, chosen, rejected, beta=0.1):
    """`dpo_loss` of whole rows, teacher as reference. chosen, rejected: (tokens, labels), (b,l)"""
    with torch.no_grad():
        reference = [preference_logps(teacher, *pair) for pair in (chosen, rejected)]
    policy = [preference_logps(student, *pair) for pair in (chosen, rejected)]
    return dpo_loss(*policy, *reference, beta)


# ---------------------------------------------------------------------------------------------
# 8. Evaluation.
# ---------------------------------------------------------------------------------------------


def autocast(model):
    """bf16 matrix products on CUDA; plain arithmetic elsewhere."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")


@torch.no_grad()
def evaluate(student, teacher, tokens, prefix_len=0, batch_size=8, labels=None):
    """How far the student is from its teacher on held-out text.

    Every position t >= max(prefix_len, 1), predicted from t - 1, counts, unless `labels` (n,l)
    says which. perplexity = exp(mean nats), ratio = student / teacher, kl in nats per token,
    agreement = share of positions where both would say the same word.

    tokens (n,l) -> {"perplexity", "teacher_perplexity", "ratio", "kl", "agreement"}
    """
    if labels is None:
        labels = tokens.clone()
        labels[:, :prefix_len] = -100
    models, sums = (student, teacher), 0
    modes = [m.training for m in models]

    def compare(s, t, y):
        """logits s, t (m,V), targets y (m,) -> ce, kl, the teacher's ce, agreement: each (m,)"""
        return *token_losses(s, t, y), token_losses(t, None, y)[0], s.argmax(-1) == t.argmax(-1)

    for m in models:
        m.eval()
    for batch, part in zip(tokens.split(batch_size), labels.split(batch_size)):
        with autocast(student):
            sides = [before_logits(m, batch) for m in models]
            columns = chunked_token_losses(part, *sides, compare, chunk=1024)
            sums = sums + torch.stack([v.double().sum() for v in columns])              # (4,)
    for m, training in zip(models, modes):
        m.train(training)
    nats, kl, teacher_nats, agreement = (sums / max(1, n_labelled(labels))).tolist()
    return {"perplexity": math.exp(nats), "teacher_perplexity": math.exp(teacher_nats),
            "ratio": math.exp(nats - teacher_nats), "kl": kl, "agreement": agreement}


@torch.no_grad()
def reward_accuracy(student, teacher, chosen, rejected, batch_size=8):
    """Share of pairs whose chosen answer has the higher implicit reward (Eq. 4's margin > 0)."""
    parts = zip(*(v.split(batch_size) for v in (*chosen, *rejected)))                   # (b,l) each
    with autocast(student):
        rewards = [preference_losses(student, teacher, p[:2], p[2:])[1:] for p in parts]    # (b,)
    return sum(float((w > l).sum()) for w, l in rewards) / max(1, len(chosen[0]))


def greedy_agreement(student, teacher, prompts, end=None, n=32):
    """Greedy answers of n tokens, compared: stricter than likelihood, as differences add up.

    prompts: lists of ids -> {"common_prefix": mean number of tokens until the two part,
    "identical": share of answers, "prompts": how many}
    """
    pairs = list(zip(*(sample(m, prompts, n, end, top_k=1) for m in (student, teacher))))
    lengths = [len(os.path.commonprefix(pair)) for pair in pairs]
    return {"common_prefix": sum(lengths) / len(pairs),
            "identical": sum(s == t for s, t in pairs) / len(pairs), "prompts": len(pairs)}


@torch.no_grad()
def choose_layers(student, teacher, n, tokens, labels, rounds=5, batch_size=32):
    """Which n layers should stay attention: those that regain the most, a few in each round.

    student: aligned mixers in every layer. Layer i's score is how much the KL to the teacher falls
    when attention i replaces mixer i (arXiv 2512.20569), given the layers restored in earlier
    rounds. README: KL 0.158 in five rounds, 0.183 in one, 0.292 evenly spaced.

    tokens, labels (m,l) -> the layers in order, the first round's scores in nats per token
    """
    trunk, layers, head = student.model, student.model.layers, student.lm_head.weight
    mixers, attention = ([layer.self_attn for layer in m.model.layers] for m in (student, teacher))
    batches, parts = tokens.split(batch_size), labels.split(batch_size)
    with autocast(student):                         # the teacher runs once, not once per score
        wanted = [before_logits(teacher, batch) for batch in batches]

    def kl(inputs, i=0):
        """Nats per labelled token; inputs (b,l,D) of layer i, by batch: those before it ran."""
        trunk.layers = layers[i:]
        with autocast(student):
            ends = [trunk(inputs_embeds=u, use_cache=False).last_hidden_state for u in inputs]
            sums = [chunked_token_losses(part, (end, head), side)[1].double().sum()
                    for part, end, side in zip(parts, ends, wanted)]
        trunk.layers = layers
        return float(sum(sums)) / max(1, n_labelled(labels))

    keep, first = [], []
    for left in range(min(rounds, n), 0, -1):
        with autocast(student):                     # what every layer takes in, by batch
            inputs = [*zip(*(trunk(input_ids=send(batch, student.device), use_cache=False,
                                   output_hidden_states=True).hidden_states for batch in batches))]
        before, scores = kl(inputs[0]), {}
        for i in progress_bar([i for i in range(len(layers)) if i not in keep], "layers"):
            layers[i].self_attn = attention[i]
            scores[i] = before - kl(inputs[i], i)
            layers[i].self_attn = mixers[i]
        first = first or [*scores.values()]
        for i in sorted(scores, key=scores.get)[-math.ceil((n - len(keep)) / left):]:
            keep.append(i)
            layers[i].self_attn = attention[i]
    for layer, mixer in zip(layers, mixers):
        layer.self_attn = mixer
    return sorted(keep), first


# ---------------------------------------------------------------------------------------------
# 9. Training: one loop for alignment and the three stages, on one device or sharded over many.
# ---------------------------------------------------------------------------------------------


def world():
    """(rank of this process, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(model):
    """Many GPUs: torch's own FSDP2 around `model`, in place; without torchrun nothing happens.

    Each of N processes holds 1/N of every tensor (weights, gradients, AdamW's moments). A layer's
    whole weights exist while it runs, gathered just before. A mixer is a unit of its own, since
    alignment calls it outside of its layer; embedding, norm and head are the root's and stay whole
    from the forward to the end of the backward pass, as the loss reads the head. Every process
    takes every N-th row of a batch and divides by what the *whole* batch labels, and FSDP averages
    the gradients, so that N changes nothing but rounding. Not sharded: sampling pseudo-labels,
    which rank 0 does alone.
    """
    if world()[1] > 1:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        for unit in (*mixers, *model.model.layers, model):      # from the inside out
            fully_shard(unit)
        model.trunk = lambda **inputs: model.model(**inputs)    # what `hidden_states` calls
        register_fsdp_forward_method(model, "trunk")
        with torch.no_grad():                       # FSDP wants the first call to be the root's
            hidden_states(model, torch.zeros(1, 1, dtype=torch.long))
        model.reshard()
    return model


def over_processes(value, op="SUM"):
    """The sum ("MAX": the largest) over the processes of a number or a tensor without gradient."""
    if world()[1] == 1:
        return value
    total = torch.as_tensor(value).clone()
    dist.all_reduce(total, getattr(dist.ReduceOp, op))
    return total if torch.is_tensor(value) else total.item()


def whole_state(student, optimizer=()):
    """State dicts of the unsharded student and optimizer: on rank 0's CPU, elsewhere empty."""
    from torch.distributed.checkpoint import state_dict as dcp  # seconds to import
    if world()[1] > 1:
        student.reshard()                           # evaluation leaves the root's tensors whole
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip(("student", "optimizer"),
                    dcp.get_state_dict(student, optimizer, options=options)))


def load_whole_state(state, student, optimizer=()):
    """Put what `whole_state` gave (rank 0's counts) into this run's shards, whatever its N.

    Only what both have: of a student that kept other layers, what is distilled in the rest.
    """
    from torch.distributed.checkpoint import state_dict as dcp
    dcp.set_state_dict(student, optimizer, model_state_dict=dict(state["student"]),
                       optim_state_dict=state["optimizer"], options=dcp.StateDictOptions(
                           full_state_dict=True, strict=False,
                           broadcast_from_rank0=world()[1] > 1))


def write_whole(thing, path):
    """torch.save that leaves the old file or the new one, whenever it is killed; rank 0 only."""
    if world()[0] == 0:
        torch.save(thing, path + ".tmp")
        os.replace(path + ".tmp", path)


class Progress:
    """Where a run stands, on disk: a kill costs no more than `every` seconds.

    SIGTERM and Ctrl-C finish the step in progress, write, and stop with exit code 3.

    state: "rows" of the table and "keep", the attention layers; "student" and "optimizer" as
    `whole_state` has them; inside a stage its name "stage", its "history", the seconds "spent".
    """

    def __init__(self, folder=None, every=60.0, resume=False):
        """Without a folder nothing is written. resume: from its file, or ValueError."""
        self.path = folder and os.path.join(folder, "progress.pt")
        self.every, self.written, self.stop = every, time.monotonic(), False
        self.state = {"rows": []}
        if resume:
            try:
                self.state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
                require("rows" in self.state, "another format")
            except Exception as error:              # no file, no zip, no dict, a torn pickle
                raise ValueError(f"nothing to resume: {self.path}: {error!r:.80}") from None
        for number in (signal.SIGTERM, signal.SIGINT) if folder else ():
            signal.signal(number, lambda *_: setattr(self, "stop", True))

    def due(self):
        """Is it time to write, in the opinion of any process?"""
        late = time.monotonic() - self.written > self.every
        return bool(self.path) and over_processes(int(self.stop or late), "MAX") > 0

    def write(self, student, optimizer=(), **changes):
        """Put the whole student, optimizer and `changes` to disk; stop if a signal asked for it."""
        if not self.path:
            return
        self.state.update(changes, **whole_state(student, optimizer))
        write_whole(self.state, self.path)
        self.written = time.monotonic()
        if over_processes(int(self.stop), "MAX"):
            print(f"stopped; go on with --resume ({self.path})", file=sys.stderr)
            sys.exit(3)


def progress_bar(things, name, **options):
    """tqdm with the project's settings; silent where stderr is not a terminal."""
    return tqdm(things, desc=f"{name:<10}", leave=False,
                disable=world()[0] > 0 or not sys.stderr.isatty(), **options)


@lru_cache(4)
def epoch_order(n, seed, epoch):
    """A shuffle of 0..n-1 that depends on the arguments alone, so that runs resume. -> (n,)"""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_rows(n, batch_size, step, seed=0):
    """The rows of one step: shuffled epochs. -> (batch_size,) indices into 0..n-1"""
    places = range(step * batch_size, (step + 1) * batch_size)      # from the first epoch's first
    return torch.stack([epoch_order(n, seed, place // n)[place % n] for place in places])


# transformers' own "sdpa" under a name for which it builds no mask: where all rows are whole,
# causal attention needs none, and looking for one waits for the GPU in every forward pass
AttentionInterface.register("causal", AttentionInterface()["sdpa"])


@contextmanager
def fast(models, modules, length, long):
    """For training on whole rows of `length`: attention without a mask and, in a stage that is
    `long` enough to repay it and on one GPU, `modules` compiled: on an H200 a third of a step
    less."""
    with ExitStack() as undo:
        for config in (m.model.config for m in models):
            window = getattr(config, "sliding_window", None) or length
            if config._attn_implementation == "sdpa" and window >= length:
                config._attn_implementation = "causal"
                undo.callback(setattr, config, "_attn_implementation", "sdpa")
        if long and models[0].device.type == "cuda" and world()[1] == 1:
            # alignment and the stages, with and without gradients, make up to 9 kinds of one layer
            torch._dynamo.config.recompile_limit = 16
            for module in modules:
                module.compile(dynamic=False)
                undo.callback(setattr, module, "_compiled_call_impl", None)
        yield


LOOK_EVERY = {"cuda": 10}               # steps; elsewhere every step, since looking costs nothing


def look(name, losses, history):
    """Move the losses since the last look to the history; this alone waits for a GPU.

    A loss that is not finite raises FloatingPointError and leaves the last checkpoint alone.
    """
    values = (over_processes(torch.stack(losses)) / world()[1]).tolist()
    losses.clear()
    history.extend(enumerate(values, len(history)))
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"{name}: the loss is {values[-1]} at step {len(history)}; the "
                                 "last good checkpoint stands")


def train(name, student, teacher, loss_of_rows, tokens, steps, batch_size, lr,
          only_mixers=False, modules=(), seconds=None, progress=None, seed=0):
    """AdamW (0.9, 0.98), a tenth of linear warm-up, cosine to 0, gradients clipped to norm 1.

    loss_of_rows(this process's rows, all rows) of a batch, indices into tokens (n,l) -> loss (),
    of which the mean over the processes is minimised. only_mixers: stage 1 and alignment move
    nothing else. modules: what `fast` compiles. The run ends after `steps`, or after `seconds` if
    given, not counting the first step, which compiles; it goes on where `progress` was written
    inside a stage of this name.

    -> list of (step, loss)
    """
    progress, (rank, N) = progress or Progress(), world()
    if N > 1:
        student.reshard()                           # evaluation leaves the root's tensors whole
    student.requires_grad_(False)                   # what is frozen takes no gradients, no memory
    for part in student.mixers().values() if only_mixers else [student]:
        part.requires_grad_(True)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    history, spent, losses = [], 0.0, []
    if progress.state.get("stage") == name:
        load_whole_state(progress.state, student, optimizer)
        history, spent = progress.state["history"], progress.state["spent"]
    first, start, l = len(history), time.monotonic() - spent, tokens.shape[1]
    bar = progress_bar(range(first, steps), name, initial=first, total=steps, unit="step")
    with fast((student, teacher), modules, l, steps > 500 if seconds is None else seconds > 45):
        for step in bar:
            done = step / steps if seconds is None else over_processes(
                time.monotonic() - start, "MAX") / seconds
            if done >= 1:
                break
            ramp = min(1.0, (done + 1 / steps) / 0.1)
            optimizer.param_groups[0]["lr"] = lr * ramp * 0.5 * (1 + math.cos(math.pi * done))
            with autocast(student):
                rows = batch_rows(len(tokens), batch_size, step, seed)                  # (b,)
                loss = loss_of_rows(rows[rank::N], rows)
            student.zero_grad()                     # to None: memory for gradients only now
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            losses.append(loss.detach())
            due = progress.due()
            if due or len(losses) >= LOOK_EVERY.get(loss.device.type, 1):
                look(name, losses, history)         # before the step: no bad loss is ever taken
                rate = (step + 1 - first) * batch_size * l / (time.monotonic() - start - spent)
                bar.set_postfix_str(f"loss {history[-1][1]:.3f}, {rate:,.0f} tokens/s")
            optimizer.step()
            if step == first:       # compiled by now: that took 30 of alignment's 50 s on an H100,
                start = time.monotonic() - spent    # which then ended at 2.301 instead of 1.528
            if due:
                progress.write(student, optimizer, stage=name, history=history,
                               spent=time.monotonic() - start)
    if losses:
        look(name, losses, history)
    bar.close()
    student.requires_grad_(True)
    return history


class Beside(nn.Module):
    """An attention layer, and beside it the mixer that learns to say what it says.

    The teacher goes on with the attention's output, so that no layer sees another's errors.
    """

    def __init__(self, attention, mixer):
        super().__init__()
        self.attention, self.mixer = attention, mixer
        self.error = self.power = None              # () sums of squares of the call in progress

    def forward(self, hidden_states, position_embeddings, **kwargs):
        """u (b,l,D) -> attention's (b,l,D), None"""
        wanted = self.attention(hidden_states, position_embeddings=position_embeddings, **kwargs)[0]
        y = self.mixer(hidden_states, position_embeddings=position_embeddings)[0]
        self.error = (y.float() - wanted.float()).pow(2).sum()
        self.power = wanted.float().pow(2).sum()
        return wanted, None


def align_mixers(student, teacher, tokens, steps, batch_size=8, lr=1e-3, **options):
    """Stage 0: every mixer learns the teacher's attention output from the teacher's input.

    Why first: nothing stands between a mixer and its target, so every layer has its own error,
    and a step needs no second network: SmolLM2's ratio falls from 22837 to 1.42 in 70 s of an H100.
    All layers at once, the teacher runs once per step and the student's trunk not at all; the
    loss is the mean over layers of |mixer - attention|^2 / |attention|^2. options: see `train`.

    tokens (n,l) -> list of (step, loss)
    """
    pairs = [(teacher.model.layers[i], mixer) for i, mixer in student.mixers().items()]

    def loss_of_rows(mine, _):
        """Mean over the layers of my rows' squared error over the power of all rows."""
        hidden_states(teacher, send(tokens[mine], student.device))
        error, power = (torch.stack([getattr(layer.self_attn, name) for layer, _ in pairs])
                        for name in ("error", "power"))                                 # (layers,)
        # times N: FSDP averages gradients over the processes, and this is my share of a sum
        return (error / over_processes(power)).mean() * world()[1]

    if not pairs or steps == 0:
        return []
    trained = [p for p in teacher.parameters() if p.requires_grad]
    try:                                            # undone at the end
        teacher.requires_grad_(False)
        for layer, mixer in pairs:
            layer.self_attn = Beside(layer.self_attn, mixer)
        return train("alignment", student, teacher, loss_of_rows, tokens, steps, batch_size, lr,
                     only_mixers=True, modules=teacher.model.layers, **options)
    finally:
        for layer, _ in pairs:
            layer.self_attn = getattr(layer.self_attn, "attention", layer.self_attn)
        for p in trained:
            p.requires_grad_(True)


def distil(name, student, teacher, tokens, labels, steps, batch_size=8, lr=1e-3, alpha=1.0,
           beta=0.1, **options):
    """Stages 1 and 2: Eq. 2 on labelled tokens; beta = 0 is plain supervised fine-tuning.

    tokens, labels (n,l); options: see `train` -> list of (step, loss)
    """
    def loss_of_rows(mine, rows):
        """Eq. 2, the sum over my rows over what all rows label."""
        batch = send(tokens[mine], student.device)                                      # (b,l)
        with torch.no_grad():
            wanted = before_logits(teacher, batch) if beta else None
        losses = chunked_token_losses(labels[mine], before_logits(student, batch), wanted)
        return world()[1] * equation_2(*losses, labels[rows], alpha, beta)[0]

    return train(name, student, teacher, loss_of_rows, tokens, steps, batch_size, lr,
                 modules=chain(student.model.layers, teacher.model.layers), **options)


def dpo(student, teacher, chosen, rejected, steps, batch_size=4, lr=5e-5, beta=0.1, **options):
    """Stage 3: Eq. 4, everything trainable. chosen, rejected: (tokens, labels), each (n,l)

    options: see `train` -> list of (step, loss)
    """
    def loss_of_rows(mine, _):
        """The mean over my pairs; every process has as many of them."""
        pairs = [[v[mine] for v in side] for side in (chosen, rejected)]
        return preference_losses(student, teacher, *pairs, beta)[0].mean()

    return train("stage 3", student, teacher, loss_of_rows, chosen[0], steps, batch_size, lr,
                 **options)


# ---------------------------------------------------------------------------------------------
# 10. Data: chat turns to (tokens, labels); the teacher's own answers; the tiny world.
# ---------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Everything a story trains and is judged on. Answers: tokens and labels, each (n,l); pairs:
    the chosen and the rejected answers."""

    train: tuple                       # the teacher's own answers (pseudo-labels)
    heldout: tuple                     # the same, never trained on
    pairs: list = None                 # stage 3's
    judge: list = None                 # held-out pairs
    sft: tuple = None                  # stage 2's answers; None: the pseudo-labels again
    human: tuple = None                # held-out answers that people wrote
    questions: tuple = ()              # held-out prompts (ids) to show


JSONL_ROWS = {"prompts": ["prompt"], "sft": ["prompt", "response"],        # sft: or "messages"
              "preferences": ["prompt", "chosen", "rejected"]}


def read_jsonl(path, kind):
    """Rows of a JSONL file of `kind` (see JSONL_ROWS); ValueError names the file and the line.

    Nothing may be empty, and of messages the last one is the answer.

    -> [(prompt (text, or messages), answers, one or more)]
    """
    require(os.path.isfile(path), f"{path}: no such file")
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if kind == "sft" and "messages" in row:
                    texts = [turn[key] for turn in row["messages"] for key in ("role", "content")]
                    rows.append((row["messages"][:-1], texts[-1]))
                else:
                    texts = [row[key] for key in JSONL_ROWS[kind]]
                    rows.append(texts)
                require(all(rows[-1]) and all(isinstance(text, str) for text in texts), "no text")
            except (ValueError, LookupError, TypeError):
                wanted = ", ".join(JSONL_ROWS[kind]) + " (or messages)" * (kind == "sft")
                raise ValueError(f"{path}:{number}: {line.strip()[:60]!r} is no row of {kind}, "
                                 f"JSON with {wanted}") from None
    require(rows, f"{path}: no rows")
    return rows


class Chat:
    """How a tokenizer writes turns, read off its chat template; everything in token ids."""

    def __init__(self, tokenizer):
        """ValueError for a tokenizer without a chat template."""
        require(tokenizer.chat_template, "the tokenizer has no chat template")
        self.tokenizer, mark = tokenizer, "@@@"
        # conversations as text; text as ids, nothing added: the template wrote the special ones
        self.render = partial(tokenizer.apply_chat_template, tokenize=False)
        self.ids = partial(tokenizer.encode, add_special_tokens=False)
        turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
        user, asked = self.render(turns[:1]), self.render(turns[:1], add_generation_prompt=True)
        self.user_start = self.ids(user.split(mark)[0])         # all before a first user message
        self.answer_start = self.ids(asked[len(user):])         # the header of an answer
        self.end = self.ids(self.render(turns).split(mark)[2])[0]       # ends an answer

    def pair(self, prompt, answer=""):
        """A prompt (text, or messages) and its answer -> prompt ids, answer ids with the end."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return (self.ids(self.render(turns, add_generation_prompt=True)),
                self.ids(answer) + [self.end])

    def label(self, tokens):
        """Labels for the answers in `tokens` (n,l), found by their header; -100 elsewhere."""
        labels, header = torch.full_like(tokens, -100), torch.tensor(self.answer_start)
        found = (tokens.unfold(1, len(header), 1) == header).all(-1)           # (n,l-header+1)
        for row, start in found.nonzero().tolist():
            first = start + len(header)
            last = (tokens[row].tolist() + [self.end]).index(self.end, first) + 1
            labels[row, first:last] = tokens[row, first:last]
        return labels

    def pack(self, pairs, length):
        """(prompt ids, answer ids) -> tokens, labels (n,l): cut at `length`, padded on the right,
        which is never attended to by what counts and carries no label."""
        pairs, pad = list(pairs), partial(nn.utils.rnn.pad_sequence, batch_first=True)
        tokens = [torch.tensor((p + a)[:length]) for p, a in pairs]
        labels = [torch.tensor(([-100] * len(p) + a)[:length]) for p, a in pairs]
        return pad(tokens, padding_value=self.end), pad(labels, padding_value=-100)     # (n,l)


def save(model, chat, folder):
    """An ordinary Hugging Face directory: weights, config, tokenizer, chat template, this file."""
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def sample(model, prompts, n_new, end, batch_size=64, temperature=0.9, top_k=50, seed=0,
           name="sampling"):
    """The model's own continuations of `prompts` (lists of ids), up to and with `end` (or None).

    -> list of lists of ids, without the prompts
    """
    # no import statement: transformers would demand spec_decode of whoever loads a saved model
    generate = __import__("spec_decode").generate
    draw = torch.Generator(model.device).manual_seed(seed)
    bar = progress_bar(None, name, total=len(prompts) * n_new, unit="token", unit_scale=True)
    answers = []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i:i + batch_size]
        made = generate(model, part, n_new, temperature, top_k, eos_token_id=end, generator=draw,
                        on_step=lambda: bar.update(len(part)))
        answers += [tokens.tolist() for tokens in made.tokens]
        bar.n = len(answers) * n_new                                # rows that ended early
    bar.close()
    return answers


def prompts_of(tokens, labels):
    """What stands before every row's first answer. (n,l) -> list of ids"""
    starts = (labels != -100).int().argmax(-1)                                          # (n,)
    return [row[:start].tolist() for row, start in zip(tokens, starts)]


def preference_pairs(chat, tokens, labels, length):
    """Pairs for stage 3 without a file: a row's first answer against the next row's, which is as
    well written but about another topic.

    tokens, labels (n,l) -> chosen (tokens, labels), rejected (tokens, labels)
    """
    prompts = prompts_of(tokens, labels)
    answers = [list(takewhile(lambda y: y != -100, row[len(prompt):]))
               for prompt, row in zip(prompts, labels.tolist())]
    return [chat.pack(zip(prompts, a), length) for a in (answers, answers[1:] + answers[:1])]


def tiny_world():
    """A tokenizer and [(question, answer)] from `pydoc_data.topics`, Python's own help pages.

    A question is the beginning of a paragraph, the answer its rest: honest continuation data, not
    conversation.
    """
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    text = "\n\n".join(topics[k] for k in sorted(topics))
    core = ByteLevelBPETokenizer()
    core.train_from_iterator([text], vocab_size=512, min_frequency=0, show_progress=False,
                             special_tokens=["<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    paragraphs = [p.split() for p in text.split("\n\n")]
    return tokenizer, [(" ".join(w[:8]), " ".join(w[8:48])) for w in paragraphs if len(w) >= 20]


def tiny_teacher(vocab_size, tokens, steps=240, length=128, lr=0.02, layers=4, width=128):
    """A Llama trained for half a minute on tokens (n,), one long text cut at random.

    Muon moves its matrices: plain AdamW stays far behind in equal time.
    """
    teacher = AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2))
    matrices = [p for n, p in teacher.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in teacher.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
                  torch.optim.AdamW(rest, lr=lr / 4, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, 2 * (1 - i / steps)))
                 for o in optimizers]
    draw = torch.Generator().manual_seed(0)
    bar = progress_bar(range(steps), "teacher", unit="step")
    for _ in bar:
        starts = torch.randint(len(tokens) - length, (8,), generator=draw)
        batch = torch.stack([tokens[i:i + length] for i in starts])                     # (8,l)
        loss = F.cross_entropy(teacher(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        teacher.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
    return teacher.eval()


def tiny_data(args):
    """The tiny teacher, which is saved, its Chat and its Data.

    Every tenth paragraph is held out: its question for the teacher to answer, its rest as what
    people wrote.
    """
    tokenizer, pairs = tiny_world()
    chat = Chat(tokenizer)
    pairs = [chat.pair(*p) for p in pairs]
    human, seen = pairs[::10], [p for i, p in enumerate(pairs) if i % 10]
    teacher = tiny_teacher(len(tokenizer), torch.tensor([t for p, a in seen for t in p + a]))
    save(teacher, chat, os.path.join(args.out, "teacher"))
    prompts, asked = 2 * [p for p, _ in seen], [p for p, _ in human]
    # a teacher this small writes readable answers only at a low temperature
    answers = sample(teacher, prompts, 96, chat.end, 512, 0.6, seed=args.seed, name="answers")
    heldout = sample(teacher, asked, 96, chat.end, 512, 0.6, seed=args.seed + 1, name="held-out")
    return teacher, chat, Data(
        train=chat.pack(zip(prompts, answers), args.length), human=chat.pack(human, args.length),
        heldout=chat.pack(zip(asked, heldout), args.length), questions=asked[:2])


def read_tokens(path):
    """The array `tokens` of an npz file, or the rows of another run's data.pt. -> (n,l)"""
    import numpy  # comes with transformers
    try:
        if path.endswith(".pt"):
            data = torch.load(path)
            return torch.cat([data["train"][0], data["heldout"][0]])
        tokens = torch.from_numpy(numpy.load(path)["tokens"].astype("int64"))
        require(tokens.ndim == 2 and tokens.numel(), f"its shape is {tuple(tokens.shape)}")
        return tokens
    except Exception as error:                      # file, zip, pickle, key and type errors alike
        raise ValueError(f"{path}: want an .npz file with an integer array `tokens` (n,l), or a "
                         f"data.pt ({error!r:.80})") from None


def real_data(teacher, chat, args):
    """Pseudo-labels for a real teacher: --tokens-file, answers to --prompts, or all its own.

    Without files the teacher invents the user's turn too: it continues the chat template's
    beginning, and every answer in what it writes is labelled. The last rows are held out.
    """
    labels = None
    if args.tokens_file:
        tokens = read_tokens(args.tokens_file)[:, :args.length]                         # (n,l)
    elif args.prompts:
        prompts = [chat.pair(*row)[0] for row in read_jsonl(args.prompts, "prompts")]
        answers = sample(teacher, prompts, args.length - 1, chat.end, args.sample_batch,
                         seed=args.seed)
        tokens, labels = chat.pack(zip(prompts, answers), args.length)
    else:                                                   # no end stops these rows: (n,l), full
        start, n_new = chat.user_start, args.length - len(chat.user_start)
        tokens = torch.tensor([start + row for row in sample(
            teacher, [start] * args.rows, n_new, None, args.sample_batch, seed=args.seed)])
    check_vocabulary(teacher, tokens)
    labels = chat.label(tokens) if labels is None else labels
    last = len(tokens) - min(256, max(1, len(tokens) // 8))
    useful = (labels != -100).any(-1)                       # (n,) the other rows hold no answer
    data = Data(*([v[part][useful[part]] for v in (tokens, labels)]
                  for part in (slice(last), slice(last, None))))
    require(len(data.train[0]) and len(data.heldout[0]), "no answers among the pseudo-labels")
    data.questions = [chat.pair(q)[0] for q in (
        "What is the capital of France, and what is it known for?",
        "Give me three tips for learning to cook.")]
    if args.sft:
        data.sft = chat.pack([chat.pair(*row) for row in read_jsonl(args.sft, "sft")], args.length)
    if args.preferences:
        rows = read_jsonl(args.preferences, "preferences")
        last = len(rows) - max(1, len(rows) // 8)
        both = [chat.pack([chat.pair(row[0], row[k]) for row in rows], args.length) for k in (1, 2)]
        data.pairs, data.judge = ([[v[part] for v in side] for side in both]
                                  for part in (slice(last), slice(last, None)))
    return data


# ---------------------------------------------------------------------------------------------
# 11. The command line: convert, align, three stages, evaluate after each, save, reload.
# ---------------------------------------------------------------------------------------------

STAGES = ("alignment", "stage 1", "stage 2", "stage 3")


def checked(kind, fits, wanted):
    """An argparse type: kind(text), refused with "... must be `wanted`" unless it `fits`."""
    def read(text):
        """argparse says "invalid int value" where kind(text) itself raises."""
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value
    read.__name__ = kind.__name__
    return read


def numbers(text):
    """"1,0.5" -> [1.0, 0.5]"""
    return [float(v) for v in text.split(",")]


COUNT, AMOUNT = (checked(kind, lambda v: v > 0, "above 0") for kind in (int, float))
SHARE = checked(float, lambda v: 0 <= v <= 1, "in 0..1")
FLAGS = {       # name: (type, choices, or bool for a switch; default; help)
    "tiny": (bool, False, "the whole story at toy size; replaces ./tiny_run and fixes --out, "
             "--tokens, --length, --lr, --rates and --mixer"),
    "teacher": (str, None, "a pretrained Llama-type chat model: directory or hub name"),
    "out": (str, None, "directory for the student; must be empty unless --resume"),
    "attention": (SHARE, 0.5, "share of attention layers that stay, 0..1"),
    "choose-layers": (bool, False, "keep the layers that regain most KL, not evenly spaced ones"),
    "mixer": (("mamba2", "mamba"), "mamba2", "mamba or mamba2; --tiny shows both"),
    "recipe": (tuple(RECIPES), "near_linear", "how mixers start"),
    "d-state": (int, None, "state size N, a divisor of the head dimension (default: that)"),
    "prompts": (str, None, 'JSONL, rows {"prompt"}: the teacher answers these'),
    "sft": (str, None, 'JSONL, rows {"prompt","response"} or {"messages"}: stage 2'),
    "preferences": (str, None, 'JSONL, rows {"prompt","chosen","rejected"}: stage 3'),
    "tokens-file": (str, None, "pseudo-labels: npz with `tokens` (n,l), or an older run's data.pt"),
    "tokens": (AMOUNT, 2e6, "training budget over all stages, tokens"),
    "minutes": (AMOUNT, None, "that budget in minutes, without compilation; beats --tokens"),
    "shares": (checked(numbers, lambda v: len(v) == 4 and min(v) >= 0 and abs(sum(v) - 1) < 0.01,
                       "4 numbers with sum 1"), "0.4,0.15,0.42,0.03",
               "of the budget: alignment, stages 1, 2, 3"),
    "rates": (checked(numbers, lambda v: len(v) == 4 and min(v) >= 0, "4 numbers"),
              "1,0.25,0.03,0.003", "learning rates of the same, as multiples of --lr"),
    "rows": (COUNT, 1024, "rows the teacher writes where no file is given"),
    "length": (COUNT, 512, "tokens per row"),
    "batch": (COUNT, 8, "rows per step, over all GPUs"),
    "sample-batch": (COUNT, 64, "rows sampled at a time"),
    "pairs": (COUNT, 256, "preference pairs made where no file is given"),
    "eval-rows": (COUNT, 32, "held-out rows, and pairs, per evaluation"),
    "lr": (AMOUNT, 2e-3, "learning rate of the alignment; the stages take shares of it"),
    "alpha": (float, 0.1, "weight of the cross-entropy in Eq. 2 (the paper has 1)"),
    "beta": (float, 1.0, "weight of the KL in Eq. 2 (the paper has 0.1)"),
    "dpo-beta": (float, 0.1, "beta of Eq. 4"),
    "stepwise": (bool, False, "halve the attention step by step, distilling at each"),
    "resume": (bool, False, "go on where the run in --out was interrupted"),
    "save-every": (float, 60.0, "seconds between checkpoints"),
    "seed": (int, 0, "seed of every draw"),
    "json": (str, None, "write the table to this file"),
}


def make_parser(doc, flags):
    """A parser of a table like FLAGS; a wrong value is a ValueError of one line.

    A default that is a list takes several values; one that is None is not shown by --help.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    for name, (kind, default, text) in flags.items():
        more = {"action": "store_true"} if kind is bool else {
            "choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if isinstance(default, list):
            more["nargs"] = "+"
        shown = "" if default is None or kind is bool else f" (default: {default})"
        parser.add_argument(f"--{name}", default=default, help=text + shown, **more)
    parser.error = lambda message: require(False, message)
    return parser


def check_outputs(**files):
    """ValueError now, not after an hour, where a flag's file (None: not given) has no directory, or
    the picture of --plot no matplotlib, which is optional."""
    for flag, path in files.items():
        folder = os.path.dirname(path or "") or "."
        require(os.path.isdir(folder), f"--{flag}: there is no directory {folder}")
    require(not files.get("plot") or find_spec("matplotlib"), "--plot needs matplotlib: pip "
            "install matplotlib")


def parse_args(argv):
    """The flags as a namespace; ValueError for values that make no sense."""
    args, N = make_parser(__doc__, FLAGS).parse_args(argv), world()[1]
    require(args.tiny or args.teacher and args.out, "give --tiny, or --teacher and --out")
    check_outputs(json=args.json)
    require(not (args.stepwise and args.choose_layers), "--stepwise or --choose-layers, not both")
    if args.tiny:
        require(not args.resume, "--tiny starts afresh; --resume goes with --teacher")
        require(N == 1, "--tiny runs in one process, without torchrun")
        args.out, args.tokens, args.length, args.lr = "tiny_run", 160_000, 128, 1e-2
        args.rates = [1, 0.25, 0.1, 0.01]           # a teacher this young is not harmed by them
        shutil.rmtree(args.out, ignore_errors=True)
        return args
    require(N == 1 or not args.choose_layers, "--choose-layers runs in one process")
    require(N == 1 or args.batch % (2 * N) == 0, f"--batch {args.batch} is no multiple of twice "
            f"the {N} processes")
    for kind in JSONL_ROWS:
        if getattr(args, kind):
            read_jsonl(getattr(args, kind), kind)   # complain now, not after an hour
    require(not os.path.isfile(args.out), f"--out {args.out} is a file")
    os.makedirs(args.out, exist_ok=True)
    require(args.resume or not os.listdir(args.out),
            f"{args.out} is not empty; name another directory, or --resume")
    return args


def attention_layers(share, L):
    """round(share L) of L layers, evenly spaced: the last of each equal part. -> indices"""
    require(0 <= share <= 1, f"attention share {share} is outside 0..1")
    n = round(share * L)
    return [math.ceil((i + 1) * L / n) - 1 for i in range(n)]


def start_processes():
    """Under torchrun: join the others and let rank 0 alone print. -> this process's device"""
    cuda = torch.cuda.is_available()
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # a day: the others wait while rank 0 samples the data
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=datetime.timedelta(days=1))
        if world()[0] > 0:
            sys.stdout = open(os.devnull, "w")
    return torch.device("cuda" if cuda else "cpu")


def prepare(args, device):
    """The real teacher, its Chat and its Data, which rank 0 makes once and keeps in --out.

    ValueError in one line where there is no such teacher, or one that cannot be converted.
    """
    name, cached = args.teacher, os.path.join(args.out, "data.pt")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        teacher, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the teacher {name}: {str(error).splitlines()[0]}") from None
    missing, context = sorted(found["missing_keys"]), teacher.config.max_position_embeddings
    require(not missing, f"the teacher {name} lacks {len(missing)} tensors, first {missing[:1]}")
    teacher, chat = teacher.to(device).eval(), Chat(tokenizer)
    check_teacher(teacher, args.d_state)            # complain before an hour of sampling
    require(args.length <= context, f"--length {args.length} exceeds the context of {context}")
    over_processes(0)                               # all have looked at --out by now
    if world()[0] == 0 and not os.path.exists(cached):
        write_whole(vars(real_data(teacher, chat, args)), cached)
    over_processes(0)                               # and now the file is there
    return teacher, chat, Data(**torch.load(cached))


def plan(args):
    """What a run does, in order. -> (title of its row, attention share, stage, budget) each

    --stepwise halves the attention, distilling each time (0.5, 0.25, 0.125; before 0: 0.25), with
    equal shares of the budget; --choose-layers first aligns a student without any attention, to
    tell layers apart. A stage without a share of the budget is left out.
    """
    shares = [args.attention]
    while args.stepwise and shares[0] < 0.5:
        shares.insert(0, min(0.5, 2 * shares[0] or 0.25))
    parts = [(share, STAGES[:3]) for share in shares[:-1]] + [(args.attention, STAGES)]
    if args.choose_layers:
        parts = [(0.0, STAGES[:1]), (args.attention, STAGES[1:])]
    budget = {"converted": 1, **{k: v / len(shares) for k, v in zip(STAGES, args.shares)}}
    return [(stage + (f" at {share:.0%}" if len(parts) > 1 else ""), share, stage, budget[stage])
            for share, stages in parts for stage in ("converted", *stages) if budget[stage]]


def train_stage(stage, budget, student, teacher, data, args, progress):
    """One stage, with its share of the run's tokens or minutes. -> list of (step, loss)

    Stage 2 takes people's answers where there are any, else the pseudo-labels again.
    """
    batch = max(1, args.batch // 2) if stage == "stage 3" else args.batch     # pairs: two rows each
    seconds = args.minutes and 60 * args.minutes * budget
    steps = max(1, round(args.tokens * budget / batch / data.train[0].shape[1]))
    options = dict(steps=10 ** 9 if seconds else steps, seconds=seconds, batch_size=batch,
                   lr=args.lr * args.rates[STAGES.index(stage)], progress=progress, seed=args.seed)
    if stage == "alignment":
        return align_mixers(student, teacher, data.train[0], **options)
    if stage == "stage 3":
        return dpo(student, teacher, *data.pairs, beta=args.dpo_beta, **options)
    answers = data.sft if stage == "stage 2" and data.sft else data.train
    return distil(stage, student, teacher, *answers, alpha=args.alpha, beta=args.beta,
                  only_mixers=stage == "stage 1", **options)


def story(original, data, args, progress, mixer):
    """One student from conversion to stage 3, judged after each step of the `plan`.

    A resumed run takes the student up as it was saved and skips the steps that have their rows.

    original: the teacher to convert from (`teacher`, which runs beside the student, may be sharded)

    -> student, rows of the table
    """
    def convert(keep, state=None):
        """Algorithm 1, by the flags; from `state` what is distilled already."""
        student = shard(convert_to_hybrid(original, keep, mixer, args.recipe, args.d_state).float())
        if state:
            load_whole_state(state, student)
        return student

    teacher = shard(copy.deepcopy(original.cpu()) if world()[1] > 1 else original)
    saved, L, cuda = progress.state, len(original.model.layers), original.device.type == "cuda"
    stays = f"{mixer}: attention stays in layers %s of 0..{L - 1}"
    rows, student = saved["rows"], None
    if "keep" in saved:
        print(stays % saved["keep"])
        student = convert(saved["keep"], saved)
    for title, share, stage, budget in plan(args):
        if any(row["stage"] == title for row in rows):
            continue
        start, history = time.monotonic(), []
        if stage == "converted":
            keep = attention_layers(share, L)
            if keep and (args.tiny or args.choose_layers):
                scout = student or convert([])      # six steps are enough to tell layers apart
                align_mixers(scout, teacher, data.train[0], 6 if args.tiny else 0, lr=args.lr,
                             seed=args.seed)
                # on a CPU each of about 120 evaluations of SmolLM2 takes 3 s
                few = args.eval_rows if cuda else min(6, args.eval_rows)
                keep, scores = choose_layers(scout, teacher, len(keep),
                                             *(v[:few] for v in data.train))
                print("KL that attention regains, by layer:", *(f"{s:.3f}" for s in scores))
            print(stays % keep, flush=True)
            student = convert(keep, student and whole_state(student))
        else:
            history = train_stage(stage, budget, student, teacher, data, args, progress)
        row = {"stage": title, "seconds": time.monotonic() - start, "steps": len(history),
               "losses": [loss for _, loss in history[::len(history) // 500 + 1]],
               **evaluate(student, teacher, data.heldout[0], labels=data.heldout[1])}
        if data.human:
            human = evaluate(student, teacher, data.human[0], labels=data.human[1])
            row.update({f"human_{key}": value for key, value in human.items()})
        row["reward_accuracy"] = reward_accuracy(student, teacher, *data.judge)
        print(f"  {title:<16} ratio {row['ratio']:8.3f}   KL {row['kl']:6.3f} nats   agreement "
              f"{row['agreement']:6.1%}   {row['seconds']:6.1f} s", flush=True)
        rows.append(row)
        progress.write(student, stage=None, keep=student.config.attn_layers)    # done, on disk
    if args.shares[3]:
        print("  DPO reward accuracy on held-out pairs: {:.0%} before, {:.0%} after".format(
            *(row["reward_accuracy"] for row in rows[-2:])))
    return student, rows


def show_and_save(student, teacher, chat, data, folder, device):
    """Greedy answers side by side, the saved directory, and the proof that it reloads; by rank 0.

    -> `greedy_agreement` on up to 200 held-out prompts
    """
    if world()[1] > 1:                              # out of its shards again
        state, student = whole_state(student)["student"], HybridForCausalLM(student.config)
        if world()[0] > 0:
            return None
        student.load_state_dict(state)
        student.generation_config = teacher.generation_config
    models = {"teacher": teacher.to(device), "student": student.to(device)}
    answers = [sample(m, data.questions, 48, chat.end, top_k=1) for m in models.values()]
    for question, *both in zip(data.questions, *answers):
        print("\nprompt  :", chat.tokenizer.decode(question))
        for name, ids in zip(models, both):
            print(f"{name:<8}:", chat.tokenizer.decode(ids, skip_special_tokens=True).strip())
    greedy = greedy_agreement(student, teacher, prompts_of(*data.heldout)[:200], chat.end)
    print("\ngreedy answers of 32 tokens to {prompts} held-out prompts: the first "
          "{common_prefix:.1f} tokens agree, {identical:.0%} are identical".format(**greedy))
    save(student, chat, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    require(all(torch.equal(v.cpu(), again[k]) for k, v in student.state_dict().items()),
            f"{folder} does not reload to the same weights")
    print(f"saved to {folder}; AutoModelForCausalLM reloads it bit for bit")
    return greedy


def print_tables(tables, times):
    """The story as one table: a line per stage, the mixers side by side."""
    print("\nperplexity ratio, student / teacher (1 = as good), on held-out answers of the teacher")
    human = any("human_ratio" in row for rows in tables.values() for row in rows)
    print("and, in brackets, on text that people wrote\n" * human, end="")
    print(f"{'stage':<18}" + "".join(f"{mixer:>22}" for mixer in tables))
    for rows in zip(*tables.values()):
        print(f"{rows[0]['stage']:<18}" + "".join(f"{row['ratio']:12.3f}" + (
            f"  ({row['human_ratio']:6.3f})" if human else " " * 10) for row in rows))
    print("time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))


def main(argv=None):
    """Run the command line. -> the report that --json writes"""
    start, device, args = time.monotonic(), start_processes(), parse_args(argv)
    progress = Progress(None if args.tiny else args.out, args.save_every, args.resume)
    torch.manual_seed(args.seed)
    teacher, chat, data = tiny_data(args) if args.tiny else prepare(args, device)
    data.heldout, data.human = (part and tuple(v[:args.eval_rows] for v in part)
                                for part in (data.heldout, data.human))
    if data.pairs is None:
        data.pairs, data.judge = (preference_pairs(chat, *part, args.length) for part in (
            [v[:args.pairs] for v in data.train], data.heldout))
    data.judge = [[v[:args.eval_rows] for v in side] for side in data.judge]
    tables, greedy, times = {}, {}, {"teacher and data": time.monotonic() - start}
    for mixer in ["mamba2", "mamba"] if args.tiny else [args.mixer]:
        start, folder = time.monotonic(), args.out
        if args.tiny:
            progress, folder = Progress(), os.path.join(args.out, mixer)    # nothing to resume
            args.d_state = 16 if mixer == "mamba" else args.d_state     # the authors' choice
        student, tables[mixer] = story(teacher, data, args, progress, mixer)
        greedy[mixer] = show_and_save(student, teacher, chat, data, folder, device)
        times[mixer] = time.monotonic() - start
    print_tables(tables, times)
    result = {"tables": tables, "greedy": greedy, "seconds": times, "args": vars(args),
              "device": str(device), "versions": {
                  "torch": torch.__version__, "transformers": transformers.__version__}}
    if args.json and world()[0] == 0:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    return result


def cli(run=main):
    """Run a command line; a user's mistake ends in one line and exit code 2."""
    try:
        run()
    except (ValueError, FloatingPointError) as error:
        if world()[0] == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    # saved classes must not live in __main__; an import statement here would become a package that
    # transformers demands of whoever loads a saved model
    __import__("mamba_in_llama").cli()
