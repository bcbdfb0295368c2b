"""The Mamba in the Llama: a pretrained Transformer becomes a hybrid Mamba model (arXiv 2408.15237).

    attention                          Mamba mixer (Algorithm 1)
    V = W_V u  --------------------->  x       what is written
    K = W_K u  --------------------->  B       where it is written
    Q = W_Q u  --------------------->  C       where it is read
    O = W_O y  --------------------->  out     back to the residual stream
    (new)                              Delta, A: how strongly to write, how fast to forget
                                       conv, gate z, skip D: Mamba's own parts, near identity

Drop the softmax of attention and a linear RNN with these weights remains; Mamba adds a learned
step and decay. Some attention layers stay (the hybrid), the MLPs stay, and distillation repairs.

Glossary, with the paper's letters:
    b, l         batch, length;  D, V  model width (inside a mixer D is the skip), vocabulary
    x, B, C      what is written, where it is written, where it is read: attention's V, K, Q
    dt, Delta    the step before and after softplus(dt + dt_bias);  z  the gate
    H, G         heads of a mixer; groups of heads that share B (Gx: that share x)
    N, P         state size per head; value channels per head (both head_dim unless said otherwise)
    p', n'       1, 1 for "mamba2" (one Delta, one A per head); P, N for "mamba" (per channel)
    W, c         taps, channels of the convolution (in a scan c: chunks);  h, state  (b,H,P,N)

Contents:  1 configuration   2 the scan   3 the step kernel   4 the mixer   5 the hybrid model
           6 losses (Eq. 2, Eq. 4)   7 evaluation   8 training   9 data   10 command line (--tiny)
"""

import argparse
import copy
import importlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pydoc_data.topics import topics

import numpy
import torch
import torch.nn.functional as F
import transformers
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# Triton is optional: where there is none (macOS, Windows) the PyTorch forms of all kernels serve
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# what transformers calls a cache, before 5.24 and since
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"

# ---- 1. Configuration: the teacher's own fields, plus ours. A recipe is a row of RECIPES. -----
FAMILIES = {"llama": transformers.LlamaModel, "mistral": transformers.MistralModel,
            "qwen2": transformers.Qwen2Model}
# what differs from the defaults of HybridConfig; "paper" is the authors' start
RECIPES = {
    "near_linear": {},      # starts close to linearized attention; distils best
    "paper": dict(rope=False, scale_c=False, conv="default", gate="default", norm=True, skip=1.0),
    "random": dict(attn_init=False)}    # Table 8's control: without the attention weights

def require(condition, message):
    """Raise ValueError(message) unless `condition` holds; the command line prints that line."""
    if not condition:
        raise ValueError(message)

def wide(v):
    """v in fp32, or as it is if it is finer: states, decays, losses lose too much in bf16."""
    return v.to(torch.promote_types(v.dtype, torch.float32))

class HybridConfig(transformers.PreTrainedConfig):
    """The teacher's configuration (as extra fields) and what the conversion changed."""
    model_type = "mamba_in_llama"
    keys_to_ignore_at_inference = [CACHE]
    teacher_type: str = "llama"        # transformers' model_type of the layers that stay
    attn_layers: list | tuple = ()     # indices of the layers that stay attention
    mixer: str = "mamba2"              # "mamba": Delta and A per channel; "mamba2": per head
    d_state: int | None = None         # N = P of a mixer head; None = head_dim, or a divisor
    group_by_state: bool = False       # authors' Mamba: repeat slices of d_state, not K/V heads
    attn_init: bool = True             # copy W_V, W_K, W_Q, W_O (Table 8 asks what that is worth)
    rope: bool = True                  # keep the rotary embedding on B and C (authors: dropped)
    scale_c: bool = True               # C / sqrt(head_dim), attention's own scale (authors: 1)
    conv: str = "identity"             # "identity": tap 1 now, 0 before, no SiLU; "default": SiLU
    gate: str = "open"                 # y * silu(z): "open" starts at 1, "default" random
    norm: bool = False                 # Mamba2's gated RMSNorm per head (fixes the output scale)
    skip: float = 0.0                  # D at the start
    d_conv: int = 4                    # taps of the causal depthwise convolution
# ---- 2. The scan: h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T,  y_t = h_t C_t. -----------
def recurrence(x, delta, A, B, C, state=None):
    """The definition of both mixers, token by token: slow, and what every fast form must equal.
    delta > 0 and A < 0 broadcast over the state: p' = n' = 1 is Mamba2, p' = P and n' = N is Mamba.
    With delta = 1 and A = 0 this is linear attention; a token with delta = 0 does nothing. (B is
    discretized by Euler's rule, Delta B, as in Mamba's own code: the exact rule divides by A.)
    x (b,l,H,P)  delta (b,l,H,p')  A (H,p',n')  B, C (b,l,H,N)  state (b,H,P,N)
    -> y (b,l,H,P), state"""
    h = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]) if state is None else state
    decay = torch.exp(delta[..., None] * A)                             # (b,l,H,p',n')
    write = (delta * x)[..., None] * B[..., None, :]                    # (b,l,H,P,N)
    states = []
    for decay_t, write_t in zip(decay.unbind(1), write.unbind(1)):
        h = decay_t * h + write_t                                       # (b,H,P,N)
        states.append(h)
    y = (torch.stack(states, 1) * C[..., None, :]).sum(-1)              # (b,l,H,P)
    return y, h

def into_chunks(v, chunk):
    """v (b,l,H,.) -> (b,c,H,chunk,.), zeros at the end: with Delta = 0 a token does nothing."""
    v = F.pad(v, (0, 0, 0, 0, 0, -v.shape[1] % chunk))
    return v.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()

def mamba2_scan(x, delta, A, B, C, state, chunk=64):
    """Mamba2 decays a head as a whole: a chunk is a masked attention plus the carried state.
    y_t = exp(cum_t) C_t h_0 + sum_{s<=t} (C_t . B_s) exp(cum_t - cum_s) u_s, where u = Delta x and
    cum_t sums the log decays Delta A from the chunk's start to t. Nothing is divided by a decay,
    since exp(-3000) is 0. Shapes: `recurrence`; c is the number of chunks"""
    # 1. cut into chunks; sums of decays in the state's precision, products in x's
    chunk = min(chunk, x.shape[1])
    log_decay = into_chunks(wide(delta) * A[:, 0], chunk)               # (b,c,H,chunk,1)
    u = into_chunks((delta * x).to(x.dtype), chunk)                     # (b,c,H,chunk,P)
    B = into_chunks(B, chunk)                                           # (b,c,H,chunk,N)
    C = into_chunks(C, chunk)                                           # (b,c,H,chunk,N)
    cum = log_decay.cumsum(-2)                                          # (b,c,H,chunk,1)
    total = cum[..., -1:, :]                                            # (b,c,H,1,1)
    # 2. what each chunk adds to the state, decayed to the chunk's end
    to_end = torch.exp(total - cum).to(x.dtype)                         # (b,c,H,chunk,1)
    added = wide((u * to_end).mT @ B)                                   # (b,c,H,P,N)
    # 3. the state carried from chunk to chunk
    starts = []
    for c in range(added.shape[1]):
        starts.append(state)
        state = torch.exp(total[:, c]) * state + added[:, c]            # (b,H,P,N)
    start = torch.stack(starts, 1).to(x.dtype)                          # (b,c,H,P,N)
    # 4. outputs: from the tokens of the same chunk, and from its start
    decay = torch.exp((cum - cum.mT).tril()).to(x.dtype)    # tril first: exp may not overflow
    scores = (C @ B.mT * decay).tril()                                  # (b,c,H,chunk,chunk)
    y = scores @ u + torch.exp(cum).to(x.dtype) * (C @ start.mT)        # (b,c,H,chunk,P)
    return y.transpose(2, 3).flatten(1, 2)[:, :x.shape[1]], state

def recurrence_doubling(x, delta, A, B, C, state):
    """`recurrence` in log2(l) steps of all tokens at once (the scan of Hillis and Steele): work for
    a GPU. h_t is the state after token t if only the `reach` tokens up to t were written; cum sums
    Delta, so that exp(A (cum_t - cum_s)) is the decay between them. Shapes: `recurrence`"""
    cum = delta.cumsum(1)                                               # (b,l,H,P)
    h = (delta * x)[..., None] * B[..., None, :]                        # (b,l,H,P,N)
    reach = 1
    while reach < x.shape[1]:               # token t takes in t - reach; the first ones are done
        decay = torch.exp((cum[:, reach:] - cum[:, :-reach])[..., None] * A)
        h = torch.cat((h[:, :reach], decay * h[:, :-reach] + h[:, reach:]), 1)
        reach *= 2
    h = torch.exp(cum[..., None] * A) * state[:, None] + h
    return (h * C[..., None, :]).sum(-1), h[:, -1]

@torch.compiler.disable                             # which would unroll the loop over chunks
def mamba_scan(x, delta, A, B, C, state, chunk=32):
    """Mamba decays each state entry by itself, so the recurrence stays. Under `checkpoint` autograd
    keeps one state a chunk, not (b,l,H,P,N) values, and reruns the chunk. Shapes: `recurrence`"""
    scan = torch.compile(recurrence_doubling, dynamic=False) if x.is_cuda and triton else recurrence
    ys = []
    parts = [v.to(state.dtype).split(chunk, 1) for v in (x, delta, B, C)]
    for x_t, delta_t, B_t, C_t in zip(*parts):
        y, state = checkpoint(scan, x_t, delta_t, A, B_t, C_t, state, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys, 1).to(x.dtype), state
# ---- 3. The step kernel: `recurrence` with the state in registers, for decoding and prompts. ---
if triton is not None:
    @triton.jit
    def step_kernel(x, delta, A, B, C, state, y, counts, T, SLOTS, H: tl.constexpr,
                    P: tl.constexpr, N: tl.constexpr, DP: tl.constexpr, DN: tl.constexpr,
                    BP: tl.constexpr, BN: tl.constexpr):
        """T tokens for BP channels of one head of one row; memory sees the state once each way.
        Token i stands in slot i % SLOTS of x, delta and B. counts None: tokens 0..T-1, the state
        is stored after the last. counts (3,b), as in spec_decode.py: tokens base.. that the state
        lacks are replayed first, and it is stored after those that are committed."""
        p = tl.program_id(0) * BP + tl.arange(0, BP)                    # (BP,) channels
        n = tl.arange(0, BN)                                            # (BN,) columns
        head = tl.program_id(1)
        row = tl.program_id(2).to(tl.int64)                             # offsets pass 2^31
        in_tile = (p < P)[:, None] & (n < N)[None, :]                   # (BP,BN)
        # without counts every token is new, and the state is stored after the last one
        base = 0
        n_old = 0
        keep = T
        if counts is not None:
            # (3,b) in memory: base of all rows, then committed, then pending; a program per row
            base = tl.load(counts + row)
            keep = tl.load(counts + tl.num_programs(2) + row) - base
            n_old = keep + tl.load(counts + 2 * tl.num_programs(2) + row)
        # from here on the pointers are those of this row, head and channels; DP, DN are A's p', n'
        x += (row * SLOTS * H + head) * P + p                           # (BP,)
        B += (row * SLOTS * H + head) * N + n                           # (BN,)
        delta += (row * SLOTS * H + head) * DP + p % DP                 # (BP,)
        C += (row * T * H + head) * N + n                               # (BN,)
        y += (row * T * H + head) * P + p                               # (BP,)
        state += ((row * H + head) * P + p[:, None]) * N + n[None, :]   # (BP,BN)
        A += (head * DP + p[:, None] % DP) * DN + n[None, :] % DN       # (BP,BN)
        a = tl.load(A, mask=in_tile, other=0) * 1.4426950408889634      # exp(a) = exp2(a / ln 2)
        h = tl.load(state, mask=in_tile, other=0)
        slot = base % SLOTS
        for i in range(0, n_old + T):
            t = i - n_old                                               # < 0: replayed
            delta_i = tl.load(delta + slot * H * DP, mask=p < P, other=0)               # (BP,)
            x_i = tl.load(x + slot * H * P, mask=p < P, other=0).to(tl.float32)         # (BP,)
            B_i = tl.load(B + slot * H * N, mask=n < N, other=0).to(tl.float32)         # (BN,)
            C_t = tl.load(C + t * H * N, mask=n < tl.where(t < 0, 0, N), other=0).to(tl.float32)
            # one step of `recurrence`; the state is stored after one token, y for the new ones
            h = tl.exp2(delta_i[:, None] * a) * h + (delta_i * x_i)[:, None] * B_i[None, :]
            tl.store(state, h, mask=in_tile & (n[None, :] < tl.where(i + 1 == keep, N, 0)))
            tl.store(y + t * H * P, tl.sum(h * C_t[None, :], 1), mask=p < tl.where(t < 0, 0, P))
            slot = tl.where(slot + 1 == SLOTS, 0, slot + 1)             # cheaper than a remainder

def use_triton(dtype, device):
    """Kernels compute in fp32. TRITON_INTERPRET=1 runs them on a CPU, where a debugger can stop."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return triton is not None and runs and dtype != torch.float64

def run_step_kernel(x, delta, A, B, C, state, counts=None):
    """`recurrence` by `step_kernel`; `state` is changed in place, and no gradients are made.
    With counts, x, delta and B are rings of slots (see `step_kernel`), and T is C's.
    x (b,slots,H,P)  delta (b,slots,H,p')  A (H,p',n')  B (b,slots,H,N)  C (b,T,H,N)
    state (b,H,P,N) -> y (b,T,H,P)"""
    b, T, H, N = C.shape
    slots, _, P = x.shape[1:]
    # one warp with 8 entries of the state a thread: sums over N then cross no shared memory
    BN = triton.next_power_of_2(N)
    BP = max(1, min(triton.next_power_of_2(P), 256 // BN))
    y = x.new_empty(b, T, H, P)
    inputs = [v.contiguous() for v in (x, delta, A, B, C)]
    with torch.cuda.device_of(x):
        step_kernel[triton.cdiv(P, BP), H, b](*inputs, state, y, counts, T, slots, H, P, N,
                                              *A.shape[1:], BP, BN, num_warps=max(1, BN // 256))
    return y

def chunked_scan(x, delta, A, B, C, state=None, chunk=None):
    """`recurrence` by its fastest form; state and decays are at least fp32. Shapes: `recurrence`"""
    state = wide(x.new_zeros(len(x), *x.shape[2:], B.shape[-1])) if state is None else state
    if A.shape[-1] == 1 and x.shape[1] > 1:
        return mamba2_scan(x, delta, A, B, C, state, chunk or 64)
    # the kernel makes no gradients and computes in fp32
    if torch.is_grad_enabled() or not use_triton(state.dtype, x.device):
        return mamba_scan(x, delta, A, B, C, state, chunk or 32)
    state = state.clone(memory_format=torch.contiguous_format)
    return run_step_kernel(x, delta, A, B, C, state), state
# ---- 4. The mixer: what stands where attention stood. Both kinds, training and decoding. ------
def to_heads(v, H, runs):
    """Give each head its group's slice, as in attention: v (b,l,G,n) -> (b,l,H,n). Blocks of `runs`
    groups are repeated whole, for attention heads that were cut into as many mixer heads."""
    return v.unflatten(2, (-1, 1, runs)).expand(-1, -1, -1, H // v.shape[2], -1, -1).flatten(2, 4)

def scan_inputs(x, dt, B, C, A, dt_bias, D, z, state, runs):
    """All between convolution and output projection: y_t = (h_t C_t + D x_t) silu(z_t). A token
    with dt = -inf has Delta 0 and does nothing. `multi_step` of spec_decode.py can undo tokens.
    x (b,l,Gx,P)  dt (b,l,H,p')  B (b,l,G,N)  C (b,l,H,N)  A (H,p',n')  dt_bias, D (H,p')
    z (b,l,H,P)  state (b,H,P,N) or None -> y (b,l,H,P), state"""
    x = to_heads(x, C.shape[2], runs)
    B = to_heads(B, C.shape[2], runs)
    delta = F.softplus(dt + dt_bias)                                    # (b,l,H,p')
    y, state = chunked_scan(x, delta, A, B, C, state)
    return torch.addcmul(y, D, x) * F.silu(z), state

class Mixer(nn.Module):
    """Mamba or Mamba2 with attention's four projections; called by transformers as `self_attn`.
    in_proj's rows: z (gate), x (from V), B (from K), C (from Q), dt. Mamba convolves x, its heads
    repeated, and makes Delta by a low rank; Mamba2 convolves x, B, C before they are repeated."""
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.per_channel = config.mixer == "mamba"
        self.N = config.d_state or config.head_dim
        self.d_inner = config.num_attention_heads * config.head_dim
        self.d_xb = config.num_key_value_heads * config.head_dim
        # states of 16 cut an attention head of 64 into 4 mixer heads, see `to_heads`
        self.H = self.d_inner // self.N
        self.runs = 1 if config.group_by_state else config.head_dim // self.N
        rank = math.ceil(config.hidden_size / 16) if self.per_channel else self.H
        self.rows = [self.d_inner, self.d_xb, self.d_xb, self.d_inner, rank]    # z, x, B, C, dt
        # the start: what the recipe leaves open has PyTorch's own random start, as in Mamba's code
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows))
        self.out_proj = nn.Linear(self.d_inner, config.hidden_size)
        n = self.d_inner if self.per_channel else self.H                        # Deltas
        c = self.d_inner if self.per_channel else 2 * self.d_xb + self.d_inner  # convolved
        self.dt_proj = nn.Linear(rank, n, bias=False) if self.per_channel else nn.Identity()
        self.conv1d = nn.Conv1d(c, c, config.d_conv, groups=c)
        self.norm_weight = nn.Parameter(torch.ones(self.d_inner)) if config.norm else None
        self.D = nn.Parameter(torch.full((n,), config.skip))
        # Delta at dt = 0: log-uniform in 0.001..0.1. A: 1..N in every channel, or uniform in 1..16
        delta = wide(torch.empty(n)).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))    # softplus inverse
        A = torch.empty_like(delta).uniform_(1, 16)
        A = torch.arange(1, self.N + 1).to(delta).repeat(n, 1) if self.per_channel else A
        self.A_log = nn.Parameter(A.log())
        with torch.no_grad():
            for layer in (self.in_proj, self.out_proj, self.conv1d):
                layer.bias.zero_()
            if config.gate == "open":               # silu(1.2785) = 1: y passes as it is
                self.in_proj.weight[:self.d_inner] = 0
                self.in_proj.bias[:self.d_inner] = 1.2784645427610738
            if config.conv == "identity":
                self.conv1d.weight.zero_()
                self.conv1d.weight[:, :, -1] = 1

    @torch.no_grad()
    def copy_attention(self, attention):
        """Algorithm 1: V -> x, K -> B, Q -> C, O -> out; biases too, if there are any (Qwen2)."""
        _, x, B, C, _ = self.in_proj.weight.split(self.rows)            # views: writing fills it
        x.copy_(attention.v_proj.weight)                                # (d_xb,D)
        B.copy_(attention.k_proj.weight)                                # (d_xb,D)
        C.copy_(attention.q_proj.weight)                                # (d_inner,D)
        self.out_proj.weight.copy_(attention.o_proj.weight)             # (D,d_inner)
        _, x, B, C, _ = self.in_proj.bias.split(self.rows)
        # Qwen2 has biases at V, K, Q, a Llama with attention_bias at all four; else ours stay 0
        for letter, new in {"v": x, "k": B, "q": C, "o": self.out_proj.bias}.items():
            old = attention.get_submodule(letter + "_proj").bias
            if old is not None:
                new.copy_(old)

    def convolve(self, raw, cache):
        """Causal, depthwise; a cache gives the W - 1 columns before. raw (b,l,c) -> (b,l,c)"""
        W = self.config.d_conv
        columns = raw.mT                                                # (b,c,l)
        if cache is not None:
            columns = cache.update_conv_state(columns, self.layer_idx, conv_kernel_size=W - 1)
        l = raw.shape[1]
        columns = F.pad(columns, (W - 1 + l - columns.shape[-1], 0))    # zeros before a text begins
        out = self.conv1d.bias[:, None]
        for w in range(W):      # shifted sums: a compiler fuses them, cuDNN's kernels are slower
            out = torch.addcmul(out, columns[..., w: w + l], self.conv1d.weight[:, 0, w, None])
        out = F.silu(out) if self.config.conv == "default" else out
        return out.mT.to(raw.dtype)

    def forward(self, hidden_states, position_embeddings=None, token_mask=None, **kwargs):
        """u (b,l,D), token_mask (b,l) True at real tokens -> (y (b,l,D), None).
        A cache gives the columns before these (`convolve`) and the state to scan from."""
        cache = kwargs.get(CACHE)
        # 1. one product for z, x, B, C and dt
        proj = self.in_proj(hidden_states)                              # (b,l,sum(rows))
        # padding: nothing enters the convolution ...
        proj = proj if token_mask is None else proj * token_mask[..., None]
        z, xBC, dt = proj.split((self.d_inner, 2 * self.d_xb + self.d_inner, self.rows[-1]), -1)
        # 2. the convolution: of x, B and C in Mamba2; of x alone, heads repeated, in Mamba
        if not self.per_channel:
            xBC = self.convolve(xBC, cache)
        x, BC = xBC.split((self.d_xb, self.d_xb + self.d_inner), -1)
        if self.per_channel:
            x = to_heads(x.unflatten(-1, (-1, self.N)), self.H, self.runs).flatten(-2)
            x = self.convolve(x, cache)                                 # (b,l,d_inner)
        # 3. B and C are rotated and scaled as attention does it with K and Q, then cut into heads
        BC = BC.unflatten(-1, (-1, self.config.head_dim))               # (b,l,heads of K and Q,d)
        if self.config.rope:                        # one call for both; its second argument: none
            BC, _ = apply_rotary_pos_emb(BC, BC[:, :, :0], *position_embeddings, unsqueeze_dim=2)
        x = x.unflatten(-1, (-1, self.N))                               # (b,l,Gx,P)
        BC = BC.flatten(-2).unflatten(-1, (-1, self.N))                 # (b,l,G+H,N)
        B, C = BC.split((self.d_xb // self.N, self.H), 2)
        C = C * self.config.head_dim ** -0.5 if self.config.scale_c else C
        # 4. what Mamba adds: the gate, the step, decay and skip
        z = z.unflatten(-1, (self.H, -1))                               # (b,l,H,P)
        dt = self.dt_proj(dt).unflatten(-1, (self.H, -1))               # (b,l,H,p')
        # ... nor the state: softplus(-inf) = 0
        dt = dt if token_mask is None else dt.masked_fill(~token_mask[..., None, None], -math.inf)
        dt_bias = wide(self.dt_bias).view(self.H, -1)                   # (H,p')
        A = -torch.exp(wide(self.A_log)).view(*dt_bias.shape, -1)       # (H,p',n')
        D = wide(self.D).view(self.H, -1)                               # (H,p')
        # 5. the scan, from where the cache stands
        inputs = (x, dt, B, C, A, dt_bias, D, z)
        if hasattr(cache, "multi_step"):            # Algorithm 2's: tokens may be taken back
            y = cache.multi_step(self.layer_idx, *inputs, self.runs)
        else:
            state = None if cache is None else cache.layers[self.layer_idx].recurrent_states[0]
            y, state = scan_inputs(*inputs, state, self.runs)
            if cache is not None:
                cache.update_recurrent_state(state, self.layer_idx)
        if self.config.norm:                                            # y (b,l,H,P)
            y = F.rms_norm(wide(y), (self.N,), eps=1e-5) * self.norm_weight.view(self.H, -1)
        return self.out_proj(y.flatten(-2).to(proj.dtype)), None
# ---- 5. The hybrid: the teacher's network with some attention layers replaced (Algorithm 1). --
class HybridForCausalLM(LlamaForCausalLM):
    """A causal language model of attention and Mamba layers. Llama's own class serves all three
    families, the trunk comes from the teacher's; a mixer stands at model.layers.i.self_attn."""
    config_class = HybridConfig
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]
    _is_stateful = True                # transformers then refuses to "rewind" us by cropping
    _no_split_modules = []             # the trunk adds its own; FSDP stops at a name not in it

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        inner = copy.copy(config)                   # layer_types names layers with a state too
        inner.model_type = config.teacher_type
        inner.layer_types = [kind if kind == "sliding_attention" else "full_attention"
                             for kind in config.layer_types]
        self.model = FAMILIES[config.teacher_type](inner)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # the mixers come after it: post_init would start their weights anew
        for i in sorted({*range(config.num_hidden_layers)} - {*config.attn_layers}):
            self.model.layers[i].self_attn = Mixer(config, i)

    def mixers(self):
        """{layer index: Mixer} of the converted layers."""
        return {m.layer_idx: m for m in self.modules() if isinstance(m, Mixer)}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                cache=None, inputs_embeds=None, labels=None, use_cache=None, **kwargs):
        """As Llama's; a cache by default only in no_grad. A 0 of the mask, anywhere, keeps a token
        out of every state; ValueError: a mask not (b,past+l), packed rows. input_ids (b,l)"""
        cache = past_key_values if cache is None else cache         # before and since 5.24
        if cache is None and (use_cache or use_cache is None and not torch.is_grad_enabled()):
            cache = transformers.DynamicCache(config=self.config)
        b, l = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        mask = None
        if attention_mask is not None:
            want = (b, l + (0 if cache is None else cache.get_seq_length()))    # static: a dict
            require(getattr(attention_mask, "shape", 0) == want, f"attention_mask must be {want}")
            mask = attention_mask[:, -l:].bool()                                        # (b,l)
        # positions count real tokens only, as transformers' generate has them
        if position_ids is None and mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -l:]
        elif position_ids is not None:              # packed documents would mix their states
            real = position_ids >= 0 if mask is None else mask                          # (.,l)
            highest = torch.where(real, position_ids, -1).cummax(-1).values             # (.,l)
            again = real[:, 1:] & (highest.diff() == 0)
            require(not again.any(), "position_ids start again: packed documents need own rows")
        out = super().forward(input_ids, attention_mask, position_ids, cache, inputs_embeds, labels,
                              cache is not None, token_mask=mask, **kwargs)
        # a cache counts tokens by the columns of K and V: without attention it gets l empty ones
        if cache is not None and not self.config.attn_layers:
            cache.update(*self.lm_head.weight.new_zeros(2, b, 1, l, 1), 0)
        return out

AutoConfig.register("mamba_in_llama", HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
HybridConfig.register_for_auto_class()
HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")

def convert_to_hybrid(teacher, attn_layers=None, mixer="mamba2", recipe="near_linear",
                      d_state=None, **switches):
    """Algorithm 1: a hybrid with the weights of a Llama, Mistral or Qwen2, which is left untouched.
    attn_layers: those that stay attention (default the odd ones). recipe: see RECIPES; switches:
    fields of HybridConfig. d_state: None or a divisor of head_dim. ValueError for misfits."""
    # 1. what is refused
    theirs = teacher.config
    require(mixer in ("mamba", "mamba2"), f"mixer {mixer!r} is neither 'mamba' nor 'mamba2'")
    require(recipe in RECIPES, f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    require(switches.keys() <= HybridConfig.__annotations__.keys(), f"unknown among {[*switches]}")
    require(theirs.model_type in FAMILIES, f"model type {theirs.model_type!r}: want {[*FAMILIES]}")
    L = len(teacher.model.layers)
    keep = list(range(1, L, 2)) if attn_layers is None else sorted(int(i) for i in attn_layers)
    require(keep == sorted({*keep} & {*range(L)}), f"attn_layers {keep}: want distinct, 0..{L - 1}")
    heads, groups = theirs.num_attention_heads, theirs.num_key_value_heads
    require(heads % groups == 0, f"{heads} query heads are no multiple of {groups} key/value heads")
    head_dim = teacher.model.layers[0].self_attn.head_dim
    require(d_state is None or 1 <= d_state <= head_dim and head_dim % d_state == 0,
            f"d_state {d_state} does not divide the head dimension {head_dim}")
    # 2. the configuration: every field of the teacher's stays one of ours
    fields = {**theirs.to_dict(), "head_dim": head_dim, **RECIPES[recipe], **switches}
    fields["norm"] = fields.get("norm", False) and mixer == "mamba2"    # Mamba has no such norm
    every = "full_attention" if fields.get("sliding_window") is None else "sliding_attention"
    kinds = fields.pop("layer_types", None) or [every] * L
    kinds = [kinds[i] if i in keep else "linear_attention" for i in range(L)]
    if not keep:            # transformers' cache counts tokens in layers that have attention
        kinds[0] = "hybrid"
    config = HybridConfig(teacher_type=fields.pop("model_type"), attn_layers=keep, mixer=mixer,
                          d_state=d_state, layer_types=kinds, **fields)
    # 3. the network: embedding, norms, MLPs, head and kept layers bear the same names in both
    student = AutoModelForCausalLM.from_config(
        config, dtype=teacher.dtype, attn_implementation=theirs._attn_implementation)
    # not strict: the teacher has no mixers, the student no q_proj and so on where they stand
    student.load_state_dict(teacher.state_dict(), strict=False)
    # 4. Algorithm 1 proper: W_V, W_K, W_Q, W_O into each mixer
    if config.attn_init:
        for i, mixer_i in student.mixers().items():
            mixer_i.copy_attention(teacher.model.layers[i].self_attn)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).train(teacher.training)
# ---- 6. Losses: Eq. 2 (CE + KL), Eq. 4 (DPO). Logits at t predict token t + 1. ---------------
def distillation_loss(student_logits, teacher_logits, labels, alpha=1.0, beta=0.1):
    """Eq. 2: alpha * CE on the pseudo-labels + beta * KL[p_T || p_S], mean over labelled tokens.
    labels as transformers has them: shifted inside, -100 ignored; 0 if all are. In nats, at least
    fp32; the defaults are the paper's. logits (b,l,V)  labels (b,l) -> loss (), ce, kl, tokens"""
    log_s = wide(student_logits[:, :-1]).log_softmax(-1)                                # (b,l-1,V)
    log_t = wide(teacher_logits[:, :-1]).log_softmax(-1)                                # (b,l-1,V)
    targets = labels[:, 1:]                                                             # (b,l-1)
    n = (targets != -100).sum()
    ce = F.nll_loss(log_s.flatten(0, 1), targets.flatten(), reduction="sum") / n.clamp(min=1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)                                        # (b,l-1)
    kl = kl.masked_fill(targets == -100, 0).sum() / n.clamp(min=1)
    return alpha * ce + beta * kl, {"ce": ce.detach(), "kl": kl.detach(), "tokens": n}

def chunked_distillation_loss(student_hidden, teacher_hidden, heads, labels, alpha=1.0, beta=0.1):
    """The same from hidden states (b,l,D) and the two heads (V,D), for training: a few rows at
    a time become probabilities in fp32. Nothing flows to the teacher. labels (b,l) -> loss ()"""
    on_gpu = student_hidden.is_cuda
    loss_of_logits = torch.compile(distillation_loss) if on_gpu and triton else distillation_loss
    rows = max(1, (4096 if on_gpu else 1024) // labels.shape[1])
    total = 0
    for s, t, y in zip(student_hidden.split(rows), teacher_hidden.split(rows), labels.split(rows)):
        logits = F.linear(s, heads[0]), F.linear(t, heads[1].detach())                  # (rows,l,V)
        # a piece's loss is the mean over its own labelled tokens: weigh it by their number
        loss, parts = loss_of_logits(*logits, y, alpha, beta)
        total = total + loss * parts["tokens"]
    return total / (labels[:, 1:] != -100).sum().clamp(min=1)

def sequence_logps(logits, labels):
    """Sum of log p over the labelled tokens of each row. logits (b,l,V)  labels (b,l) -> (b,)"""
    return -F.cross_entropy(wide(logits[:, :-1].mT), labels[:, 1:], reduction="none").sum(1)

def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """Eq. 4: -log sigmoid(beta [log p_S(y_w)/p_T(y_w) - log p_S(y_l)/p_T(y_l)]), unreduced, of
    `sequence_logps`; the reference is the teacher, as the paper has it.
    four times (b,) -> losses (b,), chosen_rewards (b,), rejected_rewards (b,)"""
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
# ---- 7. Evaluation, and which layers should stay attention. -----------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")           # what is compiled was compiled for other shapes
@torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available())
def evaluate(student, teacher, tokens, prefix_len=0, batch_size=8, labels=None):
    """How far the student is from its teacher, at every position t >= max(prefix_len, 1), of those
    that `labels` (n,l) name if given. kl in nats a token; agreement: both say the same word.
    tokens (n,l) -> {"perplexity", "teacher_perplexity", "ratio", "kl", "agreement"}"""
    labels = (tokens if labels is None else labels).to(student.device, copy=True)
    labels[:, :prefix_len] = -100
    # of the student's nats, KL, the teacher's nats, and positions where both say the same
    sums = torch.zeros(4, dtype=torch.float64, device=student.device)
    for batch, part in zip(tokens.to(student.device).split(batch_size), labels.split(batch_size)):
        s = student(batch, use_cache=False).logits                                      # (b,l,V)
        t = teacher(batch, use_cache=False).logits                                      # (b,l,V)
        _, ours = distillation_loss(s, t, part)
        _, theirs = distillation_loss(t, t, part)
        same = (s.argmax(-1) == t.argmax(-1))[:, :-1] & (part[:, 1:] != -100)           # (b,l-1)
        means = torch.stack([ours["ce"], ours["kl"], theirs["ce"]])
        sums += torch.cat([means * ours["tokens"], same.sum()[None]])
    nats, kl, teacher_nats, same = sums / (labels[:, 1:] != -100).sum().clamp(min=1)
    # exp of a tensor, since math.exp raises past 709 nats where this gives inf
    return dict(perplexity=nats.exp().item(), teacher_perplexity=teacher_nats.exp().item(),
                ratio=(nats - teacher_nats).exp().item(), kl=kl.item(), agreement=same.item())

@torch.no_grad()
@torch.compiler.set_stance("force_eager")
@torch.autocast("cuda", torch.bfloat16, torch.cuda.is_available())
def choose_layers(student, teacher, n, tokens, labels, rounds=5, seconds=math.inf):
    """Which n layers should stay attention, of a student with aligned mixers everywhere: in a few
    rounds, those that leave the least KL to the teacher; the round in which `seconds` are over is
    the last. tokens, labels (m,l) -> indices"""
    mixers = student.mixers()
    def put_attention(keep):
        """The teacher's attention into the layers `keep`, the student's mixers into all others."""
        for i, layer in enumerate(student.model.layers):
            layer.self_attn = teacher.model.layers[i].self_attn if i in keep else mixers[i]
    keep = []
    wanted = teacher(tokens, use_cache=False).logits                                    # (m,l,V)
    end = time.monotonic() + seconds
    left = min(rounds, n)
    # each round scores all that are left beside those already kept, and keeps the best few
    while len(keep) < n:
        scores = {}
        for i in tqdm(mixers.keys() - keep, "layers", leave=False, disable=None):
            put_attention([*keep, i])
            logits = student(tokens, use_cache=False).logits                            # (m,l,V)
            scores[i] = distillation_loss(logits, wanted, labels)[1]["kl"].item()
        left = left - 1 if time.monotonic() < end else 0        # rounds after this one
        keep += sorted(scores, key=scores.get)[:math.ceil((n - len(keep)) / (left + 1))]
    put_attention([])
    return sorted(keep)
# ---- 8. Training: one loop for alignment and the three stages. --------------------------------
def train(name, model, loss_of_rows, n, steps=None, seconds=None, batch_size=8, lr=1e-3, only=None,
          worth_compiling=()):
    """AdamW (0.9, 0.98), a tenth of linear warm-up, cosine to 0, gradients clipped to norm 1; ends
    after `steps` or `seconds`. loss_of_rows(indices (batch_size,) below n) -> loss (). only:
    the modules that train, all if None. ValueError if a loss is not finite. -> losses
    worth_compiling (if empty, `only`): compiled first on a GPU that has more than a minute"""
    if only is not None and not only:
        return []
    if model.device.type == "cuda" and triton and (seconds or 0) > 60:
        for module in worth_compiling or only or ():
            module.compile(dynamic=False)
    model.requires_grad_(only is None)              # what is frozen takes no gradients, no memory
    nn.ModuleList(only or ()).requires_grad_(True)
    # frozen parameters have no gradient: the optimizer and the clipping pass over them
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    losses = []
    start = time.monotonic()
    end = start + (seconds or 0)
    bar = tqdm(range(steps or 10 ** 9), name, leave=False, disable=None)
    for step in bar:
        done = (step + .5) / steps if steps else (time.monotonic() - start) / max(end - start, 1e-9)
        if done >= 1 and step > 1:                  # late or not, two steps are taken
            break
        # the schedule: a tenth of warm-up, then half a cosine
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, done / 0.1) * cosine
        rows = torch.randint(n, (batch_size,), generator=draw)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss = loss_of_rows(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.detach())
        if step % 10 == 0 or not loss.is_cuda:      # looking waits for a GPU
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            require(math.isfinite(loss.item()), f"{name}: loss {loss.item()} at step {step + 1}")
        optimizer.step()
        if step == 0:                               # compiled: the schedule starts now, `end` stays
            start = time.monotonic()
    model.requires_grad_(True)
    return torch.stack(losses).tolist()

def align_mixers(student, teacher, tokens, steps=None, **options):
    """Stage 0: every mixer learns the teacher's attention output from the teacher's input. The
    teacher runs once a step, the student's trunk not at all; the loss is the mean over layers of
    |mixer - attention|^2 / |attention|^2. options: see `train`. tokens (n,l) -> losses"""
    new = student.mixers()
    seen = {}                                       # layer: what its attention was given and gave
    def remember(attention, args, kwargs, output):
        """Called after an attention layer of the teacher."""
        seen[attention.layer_idx] = kwargs, output[0]
    def error(rows):
        """The mean error of the layers ()"""
        with torch.no_grad():
            teacher.model(tokens[rows].to(teacher.device), use_cache=False)
        errors = []
        for i, mixer in new.items():
            # relative to the layer's own size: all layers weigh the same
            given, wanted = seen[i]
            y, _ = mixer(given["hidden_states"], given["position_embeddings"])          # (b,l,D)
            errors.append((y.float() - wanted).square().sum() / wanted.float().square().sum())
        return torch.stack(errors).mean()
    with ExitStack() as hooks:
        for layer in teacher.model.layers:
            hooks.enter_context(layer.self_attn.register_forward_hook(remember, with_kwargs=True))
        return train("alignment", student, error, len(tokens), steps, only=new.values(), **options)

def distil(name, student, teacher, tokens, labels, steps=None, alpha=0.5, beta=1.0, **options):
    """Stages 1 and 2: Eq. 2, more KL than CE. options: `train`. tokens, labels (n,l) -> losses"""
    def loss_of_rows(rows):
        """Eq. 2 of a batch ()"""
        batch = tokens[rows].to(student.device, torch.long)                             # (b,l)
        with torch.no_grad():
            theirs = teacher.model(batch, use_cache=False).last_hidden_state            # (b,l,D)
        ours = student.model(batch, use_cache=False).last_hidden_state                  # (b,l,D)
        heads = student.lm_head.weight, teacher.lm_head.weight                          # (V,D)
        return chunked_distillation_loss(ours, theirs, heads, labels[rows].to(batch), alpha, beta)
    layers = [*student.model.layers, *teacher.model.layers]
    return train(name, student, loss_of_rows, len(tokens), steps, worth_compiling=layers, **options)

@torch.compiler.set_stance("force_eager")           # too short to compile for its few rows
def dpo(student, teacher, chosen, rejected, steps=None, beta=0.1, **options):
    """Stage 3: Eq. 4. chosen, rejected: (tokens, labels), each (n,l). options: `train` -> losses"""
    def loss_of_rows(rows):
        """The mean of Eq. 4 over a batch ()"""
        logps = []
        for model in (student, teacher):
            for tokens, labels in (chosen, rejected):
                with torch.set_grad_enabled(model is student):
                    logits = model(tokens[rows].to(model.device), use_cache=False).logits
                logps.append(sequence_logps(logits, labels[rows].to(model.device)))
        return dpo_loss(*logps, beta)[0].mean()
    return train("stage 3", student, loss_of_rows, len(chosen[0]), steps, **options)
# ---- 9. Data: conversations to tokens and labels, the teacher's own text, the toy world. ------
@contextmanager
def reading(source, wanted):
    """Whatever goes wrong inside (files, formats, keys, types) becomes one line of ValueError."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{source}: want {wanted}: {type(error).__name__} {line}") from None

def turns_of(*texts):
    """question, answer, ... -> messages, as chat templates take them."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

class Chat:
    """A tokenizer's chat template. Conversations are always rendered and tokenized whole, since
    pieces of a text can have other tokens by themselves; what two of them share tells the rest."""
    mark = "\0"                         # what stands before an answer, once that is known
    def __init__(self, tokenizer):
        """ValueError for a tokenizer or template that does not tell where answers are."""
        require(tokenizer.chat_template, "the tokenizer has no chat template")
        self.tokenizer = tokenizer
        # two questions and two answers without a common token: what is shared is the template's
        asked = []                                  # ids of two conversations up to the answer
        for question in ("The", "###"):             # a word that may merge with a space before it
            answered = [self.ids(turns_of(question, answer)) for answer in ("The", "###")]
            asked.append(os.path.commonprefix(answered))
        self.user_start = os.path.commonprefix(asked)       # what stands before a first question
        self.answer_start = os.path.commonprefix([ids[::-1] for ids in asked])[::-1]    # after it
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        # the first special id after the answer "The" to the question "###"
        self.end = next((i for i in answered[0][len(asked[1]):] if i in special), None)
        self.mark = tokenizer.decode(self.answer_start).strip()
        require(self.mark and self.end is not None, "the chat template marks no answer or no end")

    def ids(self, turns, **options):
        """Messages as the template renders them -> ids; ValueError for what it refuses."""
        with reading("chat template", "turns that it knows"):
            require(all(turn["content"].strip() for turn in turns), "a text is empty")
            require(not any(self.mark in turn["content"] for turn in turns), "a text holds marks")
            return self.tokenizer.apply_chat_template(turns, return_dict=True, **options).input_ids

    def label(self, tokens):
        """Labels for the answers and their ends in tokens (n,l), found by what stands before."""
        labels = torch.full_like(tokens, -100)
        header = torch.tensor(self.answer_start)
        found = (tokens.unfold(1, len(header), 1) == header).all(-1)    # (n,l-header+1)
        for row, start in found.nonzero().tolist():
            # to the first end token; an answer that was cut ends with its row
            first = start + len(header)
            last = (tokens[row].tolist() + [self.end]).index(self.end, first) + 1
            labels[row, first:last] = tokens[row, first:last]
        return labels

def pack(rows, length, chat):
    """Lists of ids -> tokens, labels (n,l), cut at `length`, padded with unlabelled end tokens."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(ids[:length]) for ids in rows], True, chat.end)
    return tokens, chat.label(tokens)

def with_answers(source, length, *sides):
    """Rows where each of `sides` (tokens, labels) has an answer: says how many. ValueError: none"""
    useful = torch.stack([(labels[:, 1:] != -100).any(1) for _, labels in sides]).all(0)    # (n,)
    found = f"{source}: {useful.sum()} of {len(useful)} rows have an answer in --length {length}"
    require(useful.any(), found)
    print(found)
    return [(tokens[useful], labels[useful]) for tokens, labels in sides]

def read_jsonl(path, chat, length, *fields):
    """JSONL rows of a prompt and the answers `fields`, or of messages -> (tokens, labels) of each
    field, as `pack` makes them. ValueError names the file and the line."""
    with reading(path, "a text file in UTF-8"):
        lines = list(open(path, encoding="utf-8-sig"))
    rows = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}:{number}", f"JSON with prompt, {', '.join(fields)}"):
            if line.strip():
                row = json.loads(line)
                turns = row.get("messages") if len(fields) == 1 else None
                rows.append([chat.ids(turns or turns_of(row["prompt"], row[f])) for f in fields])
    require(rows, f"{path}: no rows")
    return with_answers(path, length, *[pack(column, length, chat) for column in zip(*rows)])

@nn.attention.sdpa_kernel([nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.MATH])
def sample(model, prompt, n, length, batch_size=64, temperature=0.9, seconds=None):
    """At most n rows of the model's own text after `prompt` (ids), from its 50 likeliest tokens; no
    batch begins that would end after `seconds`. By transformers' generate, without cuDNN's
    attention, which plans each length of a text anew, 40 ms a token. -> (rows,length)"""
    require(prompt, "the chat template has nothing before a question: no start for own text")
    rows = []
    start = time.monotonic()
    torch.manual_seed(0)
    for i in tqdm(range(0, n, batch_size), "sampling", leave=False, disable=None):
        if i and seconds and (time.monotonic() - start) * (1 + batch_size / i) > seconds:
            break
        tokens = torch.tensor([prompt] * min(batch_size, n - i), device=model.device)   # (b,l)
        rows.append(model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=50, top_p=1.0,
            temperature=temperature, repetition_penalty=1.0, max_new_tokens=length - len(prompt),
            eos_token_id=model.config.vocab_size, pad_token_id=0).cpu())    # no id: none ends
    return torch.cat(rows)

def read_model(name, device):
    """A model (bf16 on a GPU) and its tokenizer, of a directory or a hub name."""
    with reading(name, "a model and its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, dtype="bfloat16" if device == "cuda" else "float32")
        require(not found["missing_keys"], f"tensors are missing: {found['missing_keys']}")
    return model.eval().to(device), tokenizer

def write_whole(path, write):
    """write(file): `path` is the old file or the new one, whenever the run is killed."""
    with open(path + ".tmp", "wb") as file:
        write(file)
    os.replace(path + ".tmp", path)

def make_toy_teacher(folder):
    """--tiny's teacher: a small Llama, trained for a moment on Python's own help pages, and saved.
    A question is the beginning of a paragraph, the answer its rest: honest continuation data, no
    conversation. -> every tenth paragraph, held out: text that people wrote, (tokens, labels)"""
    text = "\n\n".join(topics[k] for k in sorted(topics))
    core = ByteLevelBPETokenizer()
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    core.train_from_iterator([text], 512, 0, show_progress=False, special_tokens=marks)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
                               "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    chat = Chat(tokenizer)
    words = [paragraph.split() for paragraph in text.split("\n\n")]
    rows = [chat.ids(turns_of(" ".join(w[:8]), " ".join(w[8:48]))) for w in words if len(w) > 19]
    ids = torch.cat([torch.tensor(row) for t, row in enumerate(rows) if t % 10]).unfold(0, 128, 128)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=512, num_hidden_layers=4, intermediate_size=384, max_position_embeddings=1024,
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))
    train("teacher", teacher, lambda i: teacher(ids[i], labels=ids[i]).loss, len(ids), 330, lr=2e-3)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pack(rows[::10], 128, chat)
# ---- 10. The command line: convert, align, choose layers, three stages; judge and save each. ---
PHASES = ("converted", "alignment", "stage 1", "stage 2", "stage 3")
# best known: peak rate of each phase; its share of the time (0: left out), sampling's first
SETTINGS = {
    "cpu": dict(length=256, batch=4, scored=2, sampled=64, temperature=0.9, alpha=0.5,
                rates=(0, 2e-3, 5e-4, 6e-5, 6e-6), shares=(0.2, 0.5, 0.05, 0.25, 0.03)),
    "cuda": dict(length=512, batch=64, scored=16, sampled=4096, temperature=0.9, alpha=0.5,
                 rates=(0, 3e-3, 7e-4, 1.2e-4, 2e-6), shares=(0.35, 0.3, 0.0, 0.33, 0.02)),
    "tiny": dict(length=128, batch=8, scored=16, sampled=512, temperature=0.6, alpha=0.1,
                 rates=(0, 1e-2, 2.5e-3, 5e-4, 1e-4), shares=(0.2, 0.4, 0.15, 0.42, 0.03),
                 tokens=120e3, teacher="tiny_run/teacher", out="tiny_run")}

def parse_args(argv=None):
    """The flags and the settings of the device; ValueError for values that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: require(False, message)      # ValueError, not its own exit
    add = parser.add_argument
    add("--tiny", action="store_true", help="the whole story at toy size, in ./tiny_run")
    add("--teacher", help="a Llama, Mistral or Qwen2 chat model: directory or hub name")
    add("--out", help="directory for the student; must be empty unless --resume")
    add("--attention", type=float, default=0.5, help="share of layers that stay (default: 0.5)")
    add("--mixer", choices=("mamba2", "mamba"), default="mamba2", help="default: mamba2")
    add("--d-state", type=int, help="state size (default: mamba2 the head's, mamba 16)")
    add("--even", action="store_true", help="keep evenly spaced layers, not the best to keep")
    add("--minutes", type=float, help="minutes for the whole command; --resume: for what is left")
    add("--tokens", type=float, default=2e6, help="else: tokens to train on (default: 2e6)")
    add("--sft", help='JSONL, rows {"prompt","response"} or {"messages"}: stage 2')
    add("--preferences", help='JSONL, rows {"prompt","chosen","rejected"}: stage 3')
    add("--tokens-file", help="pseudo-labels: npz with `tokens` (n,l), as another OUT/data.npz")
    add("--length", type=int, help="tokens a row (default: 512 on a GPU, else 256)")
    add("--batch", type=int, help="rows a step (default: 64 on a GPU, else 4)")
    add("--resume", action="store_true", help="go on after the last stage that --out finished")
    add("--json", help="write the table to this file")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "tiny" if "--tiny" in (sys.argv if argv is None else argv) else device
    parser.set_defaults(device=device, start=time.monotonic(), judging=0.0, **SETTINGS[kind])
    args = parser.parse_args(argv)
    require(args.teacher and args.out, "give --tiny, or --teacher and --out")
    require(0 <= args.attention <= 1, f"--attention {args.attention} is outside 0..1")
    for name in ("minutes", "tokens", "length", "batch", "d-state"):
        value = getattr(args, name.replace("-", "_"))
        require(value is None or 0 < value < math.inf, f"--{name} {value} must be above 0")
    require(not os.path.isdir(args.json or ""), f"--json {args.json} is a directory")
    if args.tiny:
        for name in ("teacher", "out", "minutes", "resume", "mixer"):
            require(getattr(args, name) == parser.get_default(name), f"--tiny takes no --{name}")
        shutil.rmtree("tiny_run", ignore_errors=True)
    with reading(f"--out {args.out}, --json {args.json}", "an empty --out, or --resume"):
        os.makedirs(os.path.dirname(os.path.abspath(args.json or args.out)), exist_ok=True)
        os.makedirs(args.out, exist_ok=True)
        ours = [f for f in os.listdir(args.out) if f.startswith(("data.npz", "progress.pt"))]
        require(args.resume and ours or not os.listdir(args.out), "it holds files")
        # what has no data.npz was begun with --tokens-file
        require(args.tokens_file or sorted(ours)[:1] != ["progress.pt"], "give --tokens-file again")
    return args

def convert(teacher, keep, args):
    """Algorithm 1 by the flags, the same every time; in fp32, to train."""
    torch.manual_seed(0)
    d_state = args.d_state or (16 if args.mixer == "mamba" else None)
    return convert_to_hybrid(teacher, keep, args.mixer, d_state=d_state).float()

def prepare(args):
    """The teacher, its Chat and its data; what can be refused is refused before any sampling. In
    OUT/data.npz the teacher invents the user's turns too, from the chat template's beginning on."""
    human = make_toy_teacher(args.teacher) if args.tiny else None
    teacher, tokenizer = read_model(args.teacher, args.device)
    chat = Chat(tokenizer)
    convert(teacher, [], args)                      # thrown away: it refuses misfits
    length = args.length
    least, most = len(chat.user_start + chat.answer_start), teacher.config.max_position_embeddings
    require(least < length <= most, f"--length {length} is not in {least + 1}..{most}")
    sft = args.sft and read_jsonl(args.sft, chat, length, "response")[0]
    pairs = args.preferences and read_jsonl(args.preferences, chat, length, "chosen", "rejected")
    path = args.tokens_file or os.path.join(args.out, "data.npz")
    if not args.tokens_file and not os.path.exists(path):
        n = 10 ** 5 if args.minutes else math.ceil(args.tokens / length)
        tokens = sample(teacher, chat.user_start, n, length, min(args.sampled, 64 * args.batch),
                        args.temperature, 54 * (args.minutes or 0) * args.shares[0])
        write_whole(path, lambda file: numpy.savez(file, tokens=tokens.numpy()))
    V = teacher.config.vocab_size
    with reading(path, f"npz with `tokens` (n,l), integers in 0..{V - 1}, two rows or more"):
        tokens = torch.from_numpy(numpy.load(path)["tokens"].astype("int64"))[:, :length]
        require(0 <= tokens.min() <= tokens.max() < V, f"found {tokens.min()}..{tokens.max()}")
        (tokens, labels), = with_answers(path, length, (tokens, chat.label(tokens)))
        require(len(tokens) > 1, "want one to learn from and one to judge")
    n = min(max(16, 4 * args.scored), len(tokens) // 8 + 1)     # rows that nothing is trained on
    judges = [("", (tokens[:n], labels[:n])), ("human_", human)][:1 + args.tiny]
    own = tokens[n:], labels[n:]
    # the answer that is rejected: what the row before has at the same places
    other = own[0].where(own[1] == -100, own[0].roll(1, 0))                             # (n,l)
    pairs = pairs or (own, (other, other.where(own[1] != -100, -100)))
    return teacher, chat, argparse.Namespace(train=own, sft=sft or own, pairs=pairs, judges=judges)

def run_phase(phase, student, teacher, data, args):
    """One phase, for its share of the time or of --tokens (DPO: fewer rows a step). -> losses"""
    how = dict(batch_size=args.batch, lr=args.rates[phase])
    if args.minutes:            # less what judging takes, and a tenth to save
        end = args.start + 60 * args.minutes - (len(PHASES) - phase) * args.judging
        left = max(1.0, end - time.monotonic())
        # its share of what is left, among the phases that are still to come
        how["seconds"] = 0.9 * left * args.shares[phase] / sum(args.shares[phase:])
    else:
        share = args.shares[phase] / sum(args.shares[1:])
        how["steps"] = max(1, round(args.tokens * share / args.batch / args.length))
    if phase == 1:
        return align_mixers(student, teacher, data.train[0], **how)
    if phase < 4:           # stage 1 trains the new mixers only
        rows, only = (data.train, student.mixers().values()) if phase == 2 else (data.sft, None)
        return distil(PHASES[phase], student, teacher, *rows, only=only, alpha=args.alpha, **how)
    how["batch_size"] = max(1, args.batch // 8)
    return dpo(student, teacher, *data.pairs, **how)

def run(teacher, data, args):
    """All phases of one student, each judged and kept in OUT/progress.pt. -> student, its rows"""
    L = len(teacher.model.layers)
    n = round(args.attention * L)
    # evenly spaced, where there is nothing to choose; else [] until alignment is over
    keep = [math.ceil((i + 1) * L / n) - 1 for i in range(n)] if args.even or n == L else []
    student = convert(teacher, keep, args)
    rows = []
    path = os.path.join(args.out, "progress.pt")
    if args.resume and os.path.exists(path):
        with reading(path, "what a run with these flags has written"):
            rows, weights = torch.load(path, map_location="cpu")
            require(len(rows[-1]["layers"]) in (len(keep), n), "it has another --attention")
            student = convert(teacher, rows[-1]["layers"], args)
            student.load_state_dict(weights)
    for phase, name in enumerate(PHASES):
        if name in [row["stage"] for row in rows] or phase and not args.shares[phase]:
            continue
        start = time.monotonic()
        losses = run_phase(phase, student, teacher, data, args) if phase else []
        if phase == 1 and n and not student.config.attn_layers:
            # a new student with these layers; the mixers of the others stay as they were aligned
            aligned = student.state_dict()
            few = [v[:args.scored].to(args.device) for v in data.train]
            seconds = 6 * args.minutes if args.minutes else math.inf        # a tenth of all
            chosen = choose_layers(student, teacher, n, *few, seconds=seconds)
            student = convert(teacher, chosen, args)
            student.load_state_dict(aligned, strict=False)
        row = {"stage": name, "losses": losses[::len(losses) // 500 + 1],
               "layers": student.config.attn_layers, "seconds": time.monotonic() - start}
        for prefix, (tokens, labels) in data.judges:
            judged = evaluate(student, teacher, tokens, 0, 4, labels)
            row.update({prefix + key: value for key, value in judged.items()})
        args.judging = time.monotonic() - start - row["seconds"]
        require(math.isfinite(row["kl"]), f"{name}: KL {row['kl']} after it, nothing saved")
        rows.append(row)
        write_whole(path, lambda file: torch.save((rows, student.state_dict()), file))
        print(f"  {name:<10}{row['ratio']:9.3f}{row.get('human_ratio', math.nan):9.3f}"
              f"{row['kl']:9.3f}{row['agreement']:10.1%}{row['seconds']:8.1f} s", flush=True)
    return student, rows

def main(argv=None):
    """Run the command line. -> the report that --json writes"""
    args = parse_args(argv)
    teacher, chat, data = prepare(args)
    print(f"teacher and data: {time.monotonic() - args.start:.0f} s")
    report = dict(tables={}, args=vars(args), torch=torch.__version__)      # tables by mixer
    for mixer in ("mamba2", "mamba") if args.tiny else (args.mixer,):
        args.mixer = mixer
        out = os.path.join(args.out, mixer) if args.tiny else args.out
        print(f"{mixer}, perplexity ratio to the teacher:\n  {'':<10}{'own text':>9}{'people':>9}"
              f"{'KL, nats':>9}{'agreement':>10}{'time':>9}")
        student, report["tables"][mixer] = run(teacher, data, args)
        student.save_pretrained(out)                # weights, config and this file
        chat.tokenizer.save_pretrained(out)         # and the chat template
        print(f"  {time.monotonic() - args.start:.0f} s, attention in {student.config.attn_layers}")
    if args.json:
        write_whole(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))
    again = transformers.pipeline("text-generation", out, device=args.device)       # as saved
    said = again(turns_of("What is the capital of France?"), max_new_tokens=48, do_sample=False)
    print(f"saved to {out}; it says:", said[0]["generated_text"][-1]["content"])
    return report

def cli(run_main=main):
    """Run a command line; a user's mistake or a full GPU ends in one line and exit code 2."""
    sys.stdout.reconfigure(errors="replace")        # a console that cannot print a character
    transformers.utils.logging.disable_progress_bar()
    try:
        run_main()
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; where there is --resume, it goes on after the last stage", file=sys.stderr)
        sys.exit(3)

if __name__ == "__main__":
    # saved classes must not live in __main__; transformers does not read this as a dependency
    importlib.import_module("mamba_in_llama").cli()
