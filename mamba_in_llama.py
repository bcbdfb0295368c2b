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
    W, c         taps, channels of the convolution;  h, state  the recurrent state (b,H,P,N)

Contents:  1 configuration   2 the scan   3 the step kernel   4 the mixer   5 the hybrid model
           6 losses (Eq. 2, Eq. 4)   7 evaluation   8 training   9 data   10 command line
Not here:  Algorithm 2 and the authors' checkpoints (spec_decode.py); timing and the paper's tables
           (test_all.py); many GPUs (README: transformers' Trainer)

    python mamba_in_llama.py --tiny                  # the whole story in a minute on a laptop
    python mamba_in_llama.py --teacher DIR --attention 0.5 --out hybrid --minutes 20
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
from functools import partial

import numpy
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

try:
    import triton
    import triton.language as tl
except ImportError:                       # no Triton on this platform: the PyTorch forms serve
    triton = None

# what transformers calls a cache, before 5.24 and since
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"

# ---- 1. Configuration: the teacher's own fields, plus ours. A recipe is a row of RECIPES. -----

FAMILIES = ("llama", "mistral", "qwen2")    # model types whose layers are computed as we read them
RECIPES = {     # what differs from the defaults of HybridConfig
    "near_linear": {},      # starts close to linearized attention; distils best
    # the authors' start: Mamba's own defaults for everything that attention does not have
    "paper": dict(rope=False, scale_c=False, conv="default", gate="default", norm=True, skip=1.0),
    "random": dict(attn_init=False)}    # Table 8's control: without the attention weights

def require(condition, message):
    """Raise ValueError(message) unless `condition` holds; the command line prints that line."""
    if not condition:
        raise ValueError(message)

class HybridConfig(PreTrainedConfig):
    """The teacher's configuration (as extra fields) and what the conversion changed."""

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
    gate: str = "open"                 # y * silu(z): "open" starts at 1, "default" random
    norm: bool = False                 # Mamba2's gated RMSNorm per head (fixes the output scale)
    skip: float = 0.0                  # D at the start
    d_conv: int = 4                    # taps of the causal depthwise convolution

    def teacher_config(self):
        """The configuration of the Transformer around the mixers."""
        own = {*HybridConfig.__annotations__, "model_type", "auto_map", "architectures"}
        fields = {k: v for k, v in self.to_dict().items() if k not in own}
        kinds = fields.pop("layer_types", [])       # ours name layers with a state too
        if self.teacher_type == "qwen2":
            fields["layer_types"] = [kind if kind[0] == "s" else "full_attention" for kind in kinds]
        return AutoConfig.for_model(self.teacher_type, **fields)

# ---- 2. The scan: h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T,  y_t = h_t C_t. -----------

def recurrence(x, delta, A, B, C, state=None):
    """The definition of both mixers, token by token: slow, and what every fast form must equal.
    delta (b,l,H,p') > 0 and A (H,p',n') < 0 broadcast over the state: p' = n' = 1 is Mamba2,
    p' = P and n' = N is Mamba. With delta = 1 and A = 0 this is linear attention; a token with
    delta = 0 does nothing. (B is discretized by Euler's rule, Delta B, as in Mamba's own code: the
    exact rule divides by A.)
    x (b,l,H,P)  delta (b,l,H,p')  A (H,p',n')  B, C (b,l,H,N)  state (b,H,P,N)
    -> y (b,l,H,P), state"""
    b, l, H, P = x.shape
    h = x.new_zeros(b, H, P, B.shape[-1]) if state is None else state
    ys = []
    for t in range(l):
        decay = torch.exp(delta[:, t, :, :, None] * A)                  # (b,H,p',n')
        u = delta[:, t] * x[:, t]                                       # (b,H,P)
        h = decay * h + u[..., None] * B[:, t, :, None, :]              # (b,H,P,N)
        y = (h * C[:, t, :, None, :]).sum(-1)                           # (b,H,P)
        ys.append(y)
    return torch.stack(ys, 1), h

def into_chunks(v, chunk):
    """v (b,l,H,.) -> (b,c,H,chunk,.), zeros at the end: with Delta = 0 a token does nothing."""
    v = F.pad(v, (0, 0, 0, 0, 0, -v.shape[1] % chunk))
    return v.unflatten(1, (-1, chunk)).transpose(2, 3).contiguous()

def mamba2_scan(x, delta, A, B, C, state, chunk=64):
    """Mamba2 decays a head as a whole: a chunk is a masked attention plus the carried state.
    y_t = exp(cum_t) C_t h_0 + sum_{s<=t} (C_t . B_s) exp(cum_t - cum_s) u_s, where u = Delta x and
    cum_t sums the log decays Delta A from the chunk's start to t. Nothing is divided by a decay,
    since exp(-3000) is 0. Work grows as l (chunk + 2 N) P per head, nearly all in matrix products.
    Shapes: `recurrence`; c is the number of chunks"""
    # 1. cut into chunks; sums of decays in the state's precision, products in x's
    wide = state.dtype
    l = x.shape[1]
    chunk = min(chunk, l)
    log_decay = into_chunks(delta.to(wide) * A[:, 0].to(wide), chunk)   # (b,c,H,chunk,1)
    u = into_chunks((delta * x).to(x.dtype), chunk)                     # (b,c,H,chunk,P)
    B = into_chunks(B, chunk)                                           # (b,c,H,chunk,N)
    C = into_chunks(C, chunk)                                           # (b,c,H,chunk,N)
    cum = log_decay.cumsum(-2)                                          # (b,c,H,chunk,1)
    total = cum[..., -1:, :]                                            # (b,c,H,1,1)
    # 2. what each chunk adds to the state, decayed to the chunk's end
    to_end = torch.exp(total - cum).to(x.dtype)                         # (b,c,H,chunk,1)
    added = ((u * to_end).mT @ B).to(wide)                              # (b,c,H,P,N)
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
    return y.transpose(2, 3).flatten(1, 2)[:, :l], state

def mamba_chunk(x, delta, A, B, C, state):
    """`recurrence` for a few tokens: all exponentials at once, then one multiply-add a token.
    Time comes first here. x (l,b,H,P)  delta (l,b,H,P)  B, C (l,b,H,N) -> y (l,b,H,P), state"""
    decay = torch.exp(delta[..., None] * A)                             # (l,b,H,P,N)
    write = (delta * x)[..., None] * B[..., None, :]                    # (l,b,H,P,N)
    states = []
    for t in range(len(x)):
        state = torch.addcmul(write[t], decay[t], state)                # (b,H,P,N)
        states.append(state)
    y = C[..., None, :] @ torch.stack(states).mT                        # (l,b,H,1,P)
    return y[..., 0, :], state

@torch.compiler.disable                             # which would unroll the loops over tokens
def mamba_scan(x, delta, A, B, C, state, chunk=32):
    """Mamba decays every state entry by itself, so no matrix product replaces the recurrence.
    Autograd would keep (l,b,H,P,N) values; under `checkpoint` it keeps one state a chunk, and runs
    the chunk again in the backward pass. Shapes: `recurrence`"""
    time_first = [v.to(state.dtype).transpose(0, 1).contiguous() for v in (x, delta, B, C)]
    ys = []
    for t in range(0, x.shape[1], chunk):
        x_t, delta_t, B_t, C_t = [v[t:t + chunk] for v in time_first]   # (chunk,b,H,.)
        y, state = checkpoint(mamba_chunk, x_t, delta_t, A, B_t, C_t, state, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys).transpose(0, 1).to(x.dtype), state

# ---- 3. The step kernel: `recurrence` with the state in registers, for every decoding step, ---
#         Mamba's prompts, and Algorithm 2's MultiStep for Mamba (spec_decode.py).

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
        rows = tl.num_programs(2)
        in_p = p < P
        in_n = n < N
        in_tile = in_p[:, None] & in_n[None, :]                         # (BP,BN)
        base = 0
        n_old = 0
        keep = T
        if counts is not None:
            base = tl.load(counts + row)
            keep = tl.load(counts + rows + row) - base
            n_old = keep + tl.load(counts + 2 * rows + row)
        # from here on the pointers are those of this row, head and channels; DP, DN are A's p', n'
        x += (row * SLOTS * H + head) * P + p                           # (BP,)
        B += (row * SLOTS * H + head) * N + n                           # (BN,)
        delta += (row * SLOTS * H + head) * DP + p % DP                 # (BP,)
        C += (row * T * H + head) * N + n                               # (BN,)
        y += (row * T * H + head) * P + p                               # (BP,)
        state += ((row * H + head) * P + p[:, None]) * N + n[None, :]   # (BP,BN)
        A += (head * DP + p[:, None] % DP) * DN + n[None, :] % DN       # (BP,BN)
        a = tl.load(A, mask=in_tile, other=0)
        h = tl.load(state, mask=in_tile, other=0)
        for i in range(0, n_old + T):
            slot = (base + i) % SLOTS
            t = i - n_old                                               # < 0: replayed
            delta_i = tl.load(delta + slot * H * DP, mask=in_p, other=0)                # (BP,)
            x_i = tl.load(x + slot * H * P, mask=in_p, other=0).to(tl.float32)          # (BP,)
            B_i = tl.load(B + slot * H * N, mask=in_n, other=0).to(tl.float32)          # (BN,)
            C_t = tl.load(C + t * H * N, mask=n < tl.where(t < 0, 0, N), other=0).to(tl.float32)
            h = tl.exp(delta_i[:, None] * a) * h + (delta_i * x_i)[:, None] * B_i[None, :]
            tl.store(state, h, mask=in_tile & (n[None, :] < tl.where(i + 1 == keep, N, 0)))
            tl.store(y + t * H * P, tl.sum(h * C_t[None, :], 1), mask=p < tl.where(t < 0, 0, P))

def use_triton(dtype, device):
    """Do kernels run here? They compute in fp32; float64, the tests' precision, is PyTorch's.
    TRITON_INTERPRET=1 runs them on a CPU, where a debugger can stop inside."""
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
    """`recurrence`, by the fastest form: the one dispatch.
    State and decays are at least fp32. Shapes: `recurrence`"""
    wide = torch.promote_types(x.dtype, torch.float32)
    one = x.shape[1] == 1
    mamba2 = A.shape[-1] == 1
    if state is None:
        state = x.new_zeros(len(x), *x.shape[2:], B.shape[-1], dtype=wide)          # (b,H,P,N)
    trained = torch.is_grad_enabled() and any(v.requires_grad for v in (x, delta, A, B, C, state))
    if (one or not mamba2) and not trained and use_triton(wide, x.device):
        state = state.clone()
        return run_step_kernel(x, delta, A, B, C, state), state
    if one:
        y, state = recurrence(x, delta, A, B, C, state)
        return y.to(x.dtype), state
    if mamba2:
        return mamba2_scan(x, delta, A, B, C, state, chunk or 64)
    return mamba_scan(x, delta, A, B, C, state, chunk or 32)

# ---- 4. The mixer: what stands where attention stood. Both kinds, training and decoding. ------

def to_heads(v, H, runs):
    """Give each head its group's slice: v (b,l,G,n) -> (b,l,H,n).
    runs = 1: heads 0..H/G-1 read group 0, and so on, as in attention. runs = r: blocks of r groups
    are repeated whole, for attention heads that were cut into r mixer heads."""
    b, l, G, n = v.shape
    if G == H:
        return v
    v = v.reshape(b, l, G // runs, 1, runs, n).expand(-1, -1, -1, H // G, -1, -1)
    return v.reshape(b, l, H, n)

def scan_inputs(x, dt, B, C, A, dt_bias, D, z, state, runs):
    """All between convolution and output projection: y_t = (h_t C_t + D x_t) silu(z_t).
    A token whose dt is -inf has Delta 0: it neither writes nor decays. Algorithm 2's `multi_step`
    (spec_decode.py) is this for tokens that may be taken back.
    x (b,l,Gx,P)  dt (b,l,H,p')  B (b,l,G,N)  C (b,l,H,N)  A (H,p',n')  dt_bias, D (H,p')
    z (b,l,H,P)  state (b,H,P,N) or None -> y (b,l,H,P), state"""
    H = C.shape[2]
    x = to_heads(x, H, runs)
    B = to_heads(B, H, runs)
    delta = F.softplus(dt + dt_bias)                                    # (b,l,H,p')
    y, state = chunked_scan(x, delta, A, B, C, state)
    return (y + D * x) * F.silu(z), state

class Mixer(nn.Module):
    """Mamba or Mamba2 with attention's four projections; called by transformers as `self_attn`.
    in_proj's rows are, in this order: z (gate), x (from V), B (from K), C (from Q), dt. Mamba
    convolves x after its heads are repeated and makes Delta per channel through a low rank;
    Mamba2 convolves x, B, C before and has one Delta per head."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.d_conv = config.d_conv
        self.per_channel = config.mixer == "mamba"
        heads = config.num_attention_heads
        groups = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.N = config.d_state or self.head_dim
        cut = self.head_dim // self.N       # mixer heads of an attention head: Mamba's states of 16
        self.H = heads * cut
        self.G = groups * cut
        self.runs = 1 if config.group_by_state else cut
        self.d_inner = heads * self.head_dim
        self.d_xb = groups * self.head_dim
        rank = math.ceil(config.hidden_size / 16) if self.per_channel else self.H
        self.rows = [self.d_inner, self.d_xb, self.d_xb, self.d_inner, rank]    # z, x, B, C, dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows))
        self.out_proj = nn.Linear(self.d_inner, config.hidden_size)
        n = self.d_inner if self.per_channel else self.H                        # Deltas
        if self.per_channel:
            self.dt_proj = nn.Linear(rank, n, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(n))
        self.A_log = nn.Parameter(torch.empty(n, *[self.N] * self.per_channel))
        self.D = nn.Parameter(torch.empty(n))
        c = self.d_inner if self.per_channel else 2 * self.d_xb + self.d_inner
        self.conv1d = nn.Conv1d(c, c, self.d_conv, groups=c)
        if config.norm:
            self.norm_weight = nn.Parameter(torch.empty(self.d_inner))

    @torch.no_grad()
    def init_parameters(self):
        """Start all that attention does not have, by the recipe's fields.
        Projections keep nn.Linear's random start until `copy_attention` overwrites their rows."""
        self.in_proj.bias.zero_()
        self.out_proj.bias.zero_()
        self.conv1d.bias.zero_()
        self.D.fill_(self.config.skip)
        if self.config.gate == "open":              # silu(1.2785) = 1: y passes as it is
            self.in_proj.weight[:self.d_inner] = 0
            self.in_proj.bias[:self.d_inner] = 1.2784645427610738
        if self.config.conv == "identity":
            self.conv1d.weight.zero_()
            self.conv1d.weight[:, :, -1] = 1
        if self.config.norm:
            self.norm_weight.fill_(1)
        # the defaults of Mamba's and Mamba2's code: Delta log-uniform in 0.001..0.1, and A
        delta = torch.empty(len(self.dt_bias)).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))     # softplus inverse
        A = torch.empty(self.H).uniform_(1, 16)
        if self.per_channel:
            A = torch.arange(1, self.N + 1.0)       # (N,) the same for each channel
        self.A_log.copy_(A.log())

    @torch.no_grad()
    def copy_attention(self, attention):
        """Algorithm 1's weight moves: V -> x, K -> B, Q -> C, O -> out. The teacher keeps its own.
        Biases move with their rows (Qwen2); a projection without one keeps zeros."""
        _, x, B, C, _ = self.in_proj.weight.split(self.rows)            # views: writing fills it
        x.copy_(attention.v_proj.weight)                                # (d_xb,D)
        B.copy_(attention.k_proj.weight)                                # (d_xb,D)
        C.copy_(attention.q_proj.weight)                                # (d_inner,D)
        self.out_proj.weight.copy_(attention.o_proj.weight)             # (D,d_inner)
        if attention.q_proj.bias is not None:
            _, x, B, C, _ = self.in_proj.bias.split(self.rows)
            x.copy_(attention.v_proj.bias)
            B.copy_(attention.k_proj.bias)
            C.copy_(attention.q_proj.bias)
        if attention.o_proj.bias is not None:
            self.out_proj.bias.copy_(attention.o_proj.bias)

    def convolve(self, raw, cache):
        """The causal depthwise convolution; a cache gives the W - 1 columns before.
        raw (b,l,c) -> (b,l,c)"""
        W = self.d_conv
        columns = raw.mT                                                # (b,c,l)
        if cache is not None:
            columns = cache.update_conv_state(columns, self.layer_idx, conv_kernel_size=W - 1)
        l = raw.shape[1]
        columns = F.pad(columns, (W - 1, 0))[..., -(W - 1 + l):]        # zeros before a text begins
        out = self.conv1d.bias[:, None]
        for w in range(W):      # shifted sums: a compiler fuses them, cuDNN's kernels are slower
            out = out + columns[..., w: w + l] * self.conv1d.weight[:, 0, w, None]
        if self.config.conv == "default":
            out = F.silu(out)
        return out.mT.to(raw.dtype)

    def forward(self, hidden_states, position_embeddings=None, token_mask=None, **kwargs):
        """u (b,l,D), token_mask (b,l) True at real tokens -> (y (b,l,D), None).
        A cache is asked two things: the columns before these (`convolve`), and to scan these
        inputs from its state on."""
        cache = kwargs.get(CACHE)
        proj = self.in_proj(hidden_states)                              # (b,l,rows)
        if token_mask is not None:                  # padding: nothing enters the convolution ...
            proj = proj * token_mask[..., None]
        z, x, B, C, dt = proj.split(self.rows, -1)
        if self.per_channel:                        # Mamba convolves x alone, heads repeated
            x = to_heads(x.unflatten(-1, (-1, self.N)), self.H, self.runs).flatten(-2)
            x = self.convolve(x, cache)                                 # (b,l,d_inner)
        else:
            xBC = self.convolve(torch.cat((x, B, C), -1), cache)
            x, B, C = xBC.split((self.d_xb, self.d_xb, self.d_inner), -1)
        B = B.unflatten(-1, (-1, self.head_dim))                        # attention's heads
        C = C.unflatten(-1, (-1, self.head_dim))
        if self.config.rope:
            B, C = apply_rotary_pos_emb(B, C, *position_embeddings, unsqueeze_dim=2)
        if self.config.scale_c:
            C = C * self.head_dim ** -0.5
        x = x.unflatten(-1, (-1, self.N))                               # (b,l,Gx,P)
        B = B.flatten(-2).unflatten(-1, (-1, self.N))                   # (b,l,G,N)
        C = C.flatten(-2).unflatten(-1, (-1, self.N))                   # (b,l,H,N)
        z = z.unflatten(-1, (self.H, -1))                               # (b,l,H,P)
        if self.per_channel:
            dt = self.dt_proj(dt)                                       # (b,l,H P), of low rank
        dt = dt.unflatten(-1, (self.H, -1))                             # (b,l,H,p')
        if token_mask is not None:                  # ... nor the state
            dt = dt.masked_fill(~token_mask[..., None, None], -math.inf)
        wide = torch.promote_types(self.dt_bias.dtype, torch.float32)
        dt_bias = self.dt_bias.to(wide).view(self.H, -1)                # (H,p')
        A = -torch.exp(self.A_log.to(wide)).view(*dt_bias.shape, -1)    # (H,p',n')
        D = self.D.to(wide).view(self.H, -1)                            # (H,p')
        inputs = (x, dt, B, C, A, dt_bias, D, z)
        if hasattr(cache, "multi_step"):            # Algorithm 2's: tokens may be taken back
            y = cache.multi_step(self.layer_idx, *inputs, self.runs)
        else:
            state = None if cache is None else cache.layers[self.layer_idx].recurrent_states[0]
            y, state = scan_inputs(*inputs, state, self.runs)
            if cache is not None:
                cache.update_recurrent_state(state, self.layer_idx)
        y = y.flatten(-2)                                               # (b,l,d_inner)
        if self.config.norm:
            by_head = y.unflatten(-1, (-1, self.head_dim)).to(wide)
            y = F.rms_norm(by_head, (self.head_dim,), eps=1e-5).flatten(-2) * self.norm_weight
        return self.out_proj(y.to(proj.dtype)), None

# ---- 5. The hybrid: the teacher's network with some attention layers replaced (Algorithm 1). --

class HybridForCausalLM(LlamaForCausalLM):
    """A causal language model of attention and Mamba layers. Llama's own class serves all three
    families: it is embedding, trunk, norm and head, and the trunk comes from the teacher's class.
    Names follow the teacher's (model.layers.i.mlp...); a mixer stands at layers.i.self_attn."""
    config_class = HybridConfig
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]
    _is_stateful = True                # transformers then refuses to "rewind" us by cropping
    _no_split_modules = ["LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"]

    def __init__(self, config):
        """The teacher's network by its own class, mixers in place of the attention that goes."""
        super(LlamaForCausalLM, self).__init__(config)
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
                if i not in self.config.attn_layers}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                cache=None, inputs_embeds=None, use_cache=None, **kwargs):
        """As Llama's. A 0 of the mask, wherever it stands, keeps a token out of every state;
        ValueError for a mask that is not (b,past+l) and for packed rows. input_ids (b,l)"""
        cache = past_key_values if cache is None else cache         # before and since 5.24
        if use_cache is None:
            use_cache = self.model.config.use_cache and not torch.is_grad_enabled()
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        b, l = tokens.shape[:2]
        mask = None
        if attention_mask is not None:
            past = 0 if cache is None else cache.get_seq_length()
            require(attention_mask.shape == (b, past + l), f"attention_mask "
                    f"{tuple(attention_mask.shape)} must be ({b}, {past + l}): a 0 or 1 a token")
            mask = attention_mask[:, -l:].bool()                                        # (b,l)
        if position_ids is None and mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -l:]
        elif position_ids is not None and position_ids.shape[1] > 1:
            real = position_ids >= 0 if mask is None else mask                          # (.,l)
            highest = position_ids.expand_as(real).masked_fill(~real, -1).cummax(1).values
            again = real[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])
            require(not again.any(), "position_ids start again in a row: a state would mix packed "
                    "documents; give each a row of its own")
        out = super().forward(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, token_mask=mask,
            inputs_embeds=inputs_embeds, use_cache=cache is not None, **{CACHE: cache}, **kwargs)
        if cache is not None and not self.config.attn_layers:       # a pure Mamba's cache counts
            nothing = tokens.new_zeros(b, 1, l, 1)                  # tokens by columns of K and V
            cache.update(nothing, nothing, 0)
        return out

AutoConfig.register("mamba_in_llama", HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
HybridConfig.register_for_auto_class()
HybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")

def check_family(model, role):
    """ValueError for a model that is not computed as Llama, Mistral or Qwen2 (or a hybrid of one):
    what others scale, cap or rotate in part would be lost unsaid."""
    kind = getattr(model.config, "teacher_type", model.config.model_type)
    require(kind in FAMILIES, f"{role}: model type {kind!r} is none of {', '.join(FAMILIES)}")

@torch.no_grad()
def convert_to_hybrid(teacher, attn_layers=None, mixer="mamba2", recipe="near_linear",
                      d_state=None, **switches):
    """Algorithm 1: a hybrid with the teacher's weights; the teacher is left untouched.
    teacher: a transformers Llama, Mistral or Qwen2 decoder. attn_layers: indices that stay
    attention (default the odd ones). recipe: see RECIPES, each field of which can be overridden as
    a keyword. d_state: None or a divisor of head_dim. Raises ValueError for what does not fit."""
    # 1. what is refused
    theirs = teacher.config
    require(mixer in ("mamba", "mamba2"), f"mixer {mixer!r} is neither 'mamba' nor 'mamba2'")
    require(recipe in RECIPES, f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    unknown = sorted(set(switches) - set(HybridConfig.__annotations__))
    require(not unknown, f"unknown switches {unknown}")
    require(theirs.model_type in FAMILIES,
            f"teacher: model type {theirs.model_type!r} is none of {', '.join(FAMILIES)}")
    L = len(teacher.model.layers)
    keep = list(range(1, L, 2)) if attn_layers is None else sorted(int(i) for i in attn_layers)
    require(all(0 <= i < L for i in keep), f"attention layers {keep} are not in 0..{L - 1}")
    require(len(set(keep)) == len(keep), f"attention layers {keep} are repeated")
    heads = theirs.num_attention_heads
    groups = theirs.num_key_value_heads
    head_dim = teacher.model.layers[0].self_attn.head_dim
    require(heads % groups == 0, f"{heads} query heads do not divide into {groups} key/value heads")
    require(d_state is None or 1 <= d_state <= head_dim and head_dim % d_state == 0,
            f"d_state {d_state} does not divide the head dimension {head_dim}")
    # 2. the configuration: every field of the teacher's stays one of ours
    fields = {**theirs.to_dict(), **RECIPES[recipe], **switches}
    fields["norm"] = fields.get("norm", False) and mixer == "mamba2"    # Mamba has no such norm
    every = "full_attention" if fields.get("sliding_window") is None else "sliding_attention"
    kinds = fields.pop("layer_types", None) or [every] * L
    kinds = [kinds[i] if i in keep else "linear_attention" for i in range(L)]
    if not keep:            # transformers' cache counts tokens in layers that have attention
        kinds[0] = "hybrid"
    for name in ("model_type", "architectures", "dtype"):
        fields.pop(name, None)
    config = HybridConfig(**fields, teacher_type=theirs.model_type, attn_layers=keep, mixer=mixer,
                          recipe=recipe, d_state=d_state, layer_types=kinds)
    config._attn_implementation = "eager" if theirs._attn_implementation == "eager" else "sdpa"
    # 3. the network: embedding, norms, MLPs, head and kept layers bear the same names in both
    student = HybridForCausalLM(config)
    weight = teacher.get_input_embeddings().weight                                      # (V,D)
    for name, p in student.named_parameters():      # not .to(): it would round RoPE's frequencies
        p.data = p.data.to(weight.dtype)
        if name.rsplit(".", 1)[-1] in student._keep_in_fp32_modules_strict:
            p.data = p.data.to(torch.promote_types(weight.dtype, torch.float32))
    student.load_state_dict(teacher.state_dict(), strict=False)
    # 4. Algorithm 1 proper: W_V, W_K, W_Q, W_O into each mixer
    for i, new in student.mixers().items():
        new.init_parameters()                                   # again, now in the final dtype
        if config.attn_init:
            new.copy_attention(teacher.model.layers[i].self_attn)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(weight.device).train(teacher.training)

# ---- 6. Losses: Eq. 2 (CE + KL), Eq. 4 (DPO). Logits at t predict token t + 1. ---------------

def distillation_loss(student_logits, teacher_logits, labels, alpha=1.0, beta=0.1):
    """Eq. 2: alpha * CE on the pseudo-labels + beta * KL[p_T || p_S], mean over labelled tokens.
    labels as transformers has them: shifted inside, -100 ignored; 0 if all are. In nats, at least
    fp32; the defaults are the paper's. logits (b,l,V)  labels (b,l) -> loss (), ce, kl, tokens"""
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = student_logits[:, :-1].to(wide).log_softmax(-1)                             # (b,l-1,V)
    log_t = teacher_logits[:, :-1].to(wide).log_softmax(-1)                             # (b,l-1,V)
    targets = labels[:, 1:]                                                             # (b,l-1)
    n = (targets != -100).sum()
    ce = F.nll_loss(log_s.flatten(0, 1), targets.flatten(), reduction="sum") / n.clamp(min=1)
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)                                        # (b,l-1)
    kl = kl.masked_fill(targets == -100, 0).sum() / n.clamp(min=1)
    return alpha * ce + beta * kl, {"ce": ce.detach(), "kl": kl.detach(), "tokens": n}

def chunked_distillation_loss(student_hidden, teacher_hidden, student_head, teacher_head, labels,
                              alpha=1.0, beta=0.1):
    """The same from hidden states (b,l,D) and heads (V,D), for training: a few rows at a time have
    logits, and they are made again in the backward pass."""
    on_gpu = student_hidden.is_cuda
    loss_of_logits = torch.compile(distillation_loss) if on_gpu else distillation_loss
    rows = max(1, (4096 if on_gpu else 1024) // labels.shape[1])

    def sums_of_rows(s, t, y):
        """Hidden states s, t (rows,l,D)  labels y (rows,l) -> sums of the loss, CE and KL (3,)"""
        loss, parts = loss_of_logits(s @ student_head.T, t @ teacher_head.T, y, alpha, beta)
        return torch.stack([loss, parts["ce"], parts["kl"]]) * parts["tokens"]

    sums = 0
    for part in zip(student_hidden.split(rows), teacher_hidden.split(rows), labels.split(rows)):
        sums = sums + checkpoint(sums_of_rows, *part, use_reentrant=False)
    n = (labels[:, 1:] != -100).sum()
    loss, ce, kl = sums / n.clamp(min=1)
    return loss, {"ce": ce.detach(), "kl": kl.detach(), "tokens": n}

def sequence_logps(logits, labels):
    """Sum of log p over the labelled tokens of each row. logits (b,l,V)  labels (b,l) -> (b,)"""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.cross_entropy(logits[:, :-1].mT.to(wide), labels[:, 1:], reduction="none").sum(1)

def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """Eq. 4: -log sigmoid(beta [log p_S(y_w)/p_T(y_w) - log p_S(y_l)/p_T(y_l)]), unreduced, of
    `sequence_logps`; the reference is the teacher, as the paper has it.
    four times (b,) -> losses (b,), chosen_rewards (b,), rejected_rewards (b,)"""
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

# ---- 7. Evaluation, and which layers should stay attention. -----------------------------------

def autocast(model):
    """bf16 matrix products on CUDA; plain arithmetic elsewhere."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")

@torch.no_grad()
def evaluate(student, teacher, tokens, prefix_len=0, batch_size=8, labels=None):
    """How far the student is from its teacher on held-out text.
    Every position t >= max(prefix_len, 1), predicted from t - 1, counts, unless `labels` (n,l)
    says which. ratio = perplexity of student / teacher, kl in nats a token, agreement = share of
    positions where both would say the same word.
    tokens (n,l) -> {"perplexity", "teacher_perplexity", "ratio", "kl", "agreement"}"""
    if labels is None:
        labels = tokens.clone()
        labels[:, :prefix_len] = -100
    sums = torch.zeros(4, dtype=torch.float64, device=student.device)
    for batch, part in zip(tokens.split(batch_size), labels.split(batch_size)):
        batch = batch.to(student.device)                                                # (b,l)
        part = part.to(student.device)                                                  # (b,l)
        with autocast(student), torch.compiler.set_stance("force_eager"):
            s = student(batch, use_cache=False).logits                                  # (b,l,V)
            t = teacher(batch, use_cache=False).logits                                  # (b,l,V)
            _, ours = distillation_loss(s, t, part)
            _, theirs = distillation_loss(t, t, part)
        same = (s.argmax(-1) == t.argmax(-1))[:, :-1] & (part[:, 1:] != -100)           # (b,l-1)
        means = torch.stack([ours["ce"], ours["kl"], theirs["ce"]])
        sums += torch.cat([means * ours["tokens"], same.sum()[None]])
    nats, kl, teacher_nats, same = sums / (labels[:, 1:] != -100).sum().clamp(min=1)
    return {"perplexity": nats.exp().item(), "teacher_perplexity": teacher_nats.exp().item(),
            "ratio": (nats - teacher_nats).exp().item(),    # exp of a tensor: inf past 709 nats
            "kl": kl.item(), "agreement": same.item()}

def choose_layers(student, teacher, n, tokens, labels, rounds=5):
    """Which n layers should stay attention, of a student with aligned mixers everywhere: in a few
    rounds, those whose attention leaves the least KL to the teacher (arXiv 2512.20569). SmolLM2:
    0.158 nats in five rounds, 0.183 in one, 0.292 evenly spaced. tokens, labels (m,l) -> indices"""
    layers = student.model.layers
    attention = [layer.self_attn for layer in teacher.model.layers]
    mixers = [layer.self_attn for layer in layers]
    keep = []
    for left in range(min(rounds, n), 0, -1):
        scores = {}
        for i in progress_bar([i for i in range(len(layers)) if i not in keep], "layers"):
            layers[i].self_attn = attention[i]
            scores[i] = evaluate(student, teacher, tokens, labels=labels, batch_size=4)["kl"]
            layers[i].self_attn = mixers[i]
        best_first = sorted(scores, key=scores.get)
        for i in best_first[:math.ceil((n - len(keep)) / left)]:
            keep.append(i)
            layers[i].self_attn = attention[i]
    for layer, mixer in zip(layers, mixers):
        layer.self_attn = mixer
    return sorted(keep)

# ---- 8. Training: one loop for alignment and the three stages. --------------------------------

def progress_bar(things, name, **options):
    """tqdm with the project's settings; silent where stderr is not a terminal."""
    return tqdm(things, desc=f"{name:<10}", leave=False, disable=not sys.stderr.isatty(), **options)

def train(name, model, loss_of_rows, n_rows, steps=None, seconds=None, batch_size=8, lr=1e-3,
          only=None):
    """AdamW (0.9, 0.98), a tenth of linear warm-up, cosine to 0, gradients clipped to norm 1.
    loss_of_rows(indices (batch_size,) below n_rows) -> loss (). The run ends after `steps` or
    `seconds`. only: the modules that train, all if None. A loss that is not finite raises
    FloatingPointError. -> losses"""
    model.requires_grad_(only is None)              # what is frozen takes no gradients, no memory
    for module in only or ():
        module.requires_grad_(True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return []
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(0)
    losses = []
    start = time.monotonic()
    end = start + (seconds or 0)
    bar = progress_bar(range(steps or 10 ** 9), name, unit="step")
    for step in bar:
        now = time.monotonic()
        done = (step + 0.5) / steps if steps else (now - start) / max(end - start, 1e-9)
        if done >= 1 and step > 1:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, done / 0.1) * cosine
        rows = torch.randint(n_rows, (batch_size,), generator=draw)
        with autocast(model):
            loss = loss_of_rows(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        losses.append(loss.detach())
        if step % 10 == 0 or not loss.is_cuda:      # looking waits for a GPU
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            if not math.isfinite(loss.item()):      # before the step: it is not taken
                raise FloatingPointError(f"{name}: the loss is {loss.item()} at step {step + 1}; "
                                         "the stages before are saved")
        optimizer.step()
        if step == 0:                               # compiled by now
            start = time.monotonic()
    model.requires_grad_(True)
    return torch.stack(losses).tolist()

def align_mixers(student, teacher, tokens, steps=None, **options):
    """Stage 0: every mixer learns the teacher's attention output from the teacher's input.
    Why first: nothing stands between a mixer and its target, so every layer has its own error.
    The teacher runs once a step, the student's trunk not at all; the loss is the mean over layers
    of |mixer - attention|^2 / |attention|^2. options: see `train`. tokens (n,l) -> losses"""
    mixers = student.mixers()
    errors = []                                     # () of each layer in the call in progress

    def listen(mixer, attention, args, kwargs, output):
        """Called after an attention layer, with what it was given and what it said."""
        wanted = output[0].float()                                                      # (b,l,D)
        with torch.enable_grad():
            y, _ = mixer(kwargs["hidden_states"], kwargs["position_embeddings"])
            error = (y.float() - wanted).square().sum() / wanted.square().sum()
        errors.append(error)

    def loss_of_rows(rows):
        """The mean error of the layers."""
        errors.clear()
        with torch.no_grad():
            teacher.model(tokens[rows].to(teacher.device), use_cache=False)
        return torch.stack(errors).mean()

    hooks = [teacher.model.layers[i].self_attn.register_forward_hook(
        partial(listen, mixer), with_kwargs=True) for i, mixer in mixers.items()]
    try:
        return train("alignment", student, loss_of_rows, len(tokens), steps, only=mixers.values(),
                     **options) if mixers else []
    finally:
        for hook in hooks:
            hook.remove()

def distil(name, student, teacher, tokens, labels, steps=None, alpha=1.0, beta=0.1, **options):
    """Stages 1 and 2: Eq. 2. options: see `train`. tokens, labels (n,l) -> losses"""
    def loss_of_rows(rows):
        """Eq. 2 of a batch."""
        batch = tokens[rows].to(student.device)                                         # (b,l)
        with torch.no_grad():
            wanted = teacher.model(batch, use_cache=False).last_hidden_state            # (b,l,D)
        hidden = student.model(batch, use_cache=False).last_hidden_state                # (b,l,D)
        heads = [model.get_output_embeddings().weight for model in (student, teacher)]  # (V,D)
        return chunked_distillation_loss(hidden, wanted, *heads, labels[rows].to(batch.device),
                                         alpha, beta)[0]
    return train(name, student, loss_of_rows, len(tokens), steps, **options)

def dpo(student, teacher, chosen, rejected, steps=None, beta=0.1, **options):
    """Stage 3: Eq. 4, the teacher as reference. options: see `train`
    chosen, rejected: (tokens, labels), each (n,l) -> losses"""
    def logps(model, side, rows):
        """`sequence_logps` of a batch. -> (b,)"""
        tokens, labels = [v[rows].to(model.device) for v in side]                       # (b,l)
        return sequence_logps(model(tokens, use_cache=False).logits, labels)

    def loss_of_rows(rows):
        """The mean of Eq. 4."""
        with torch.no_grad():
            reference = [logps(teacher, side, rows) for side in (chosen, rejected)]
        policy = [logps(student, side, rows) for side in (chosen, rejected)]
        return dpo_loss(*policy, *reference, beta)[0].mean()
    return train("stage 3", student, loss_of_rows, len(chosen[0]), steps, **options)

# ---- 9. Data: conversations to tokens and labels, the teacher's own text, the toy world. ------

def turns_of(*texts):
    """question, answer, ... -> messages, as chat templates take them."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

class Chat:
    """A tokenizer's chat template. Conversations are always rendered and tokenized whole, since
    pieces of a text can have other tokens by themselves; what two of them share tells the rest."""

    def __init__(self, tokenizer):
        """ValueError for a tokenizer or template that does not tell where answers are."""
        require(tokenizer.chat_template, "the tokenizer has no chat template")
        self.tokenizer = tokenizer
        asked = []                                  # two conversations up to their answers
        for question in ("The", "###"):             # one may grow together with a space before it
            one = self.ids(turns_of(question, "The"))
            other = self.ids(turns_of(question, "###"))
            asked.append(os.path.commonprefix([one, other]))
        self.user_start = os.path.commonprefix(asked)       # what stands before a first question
        backwards = [ids[::-1] for ids in asked]
        self.answer_start = os.path.commonprefix(backwards)[::-1]   # between question and answer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ends = [i for i in one[len(asked[1]):] if i in special]
        require(self.answer_start, "the chat template marks no beginning of an answer")
        require(ends, "the chat template ends an answer with no special token")
        self.end = ends[0]

    def ids(self, turns, **options):
        """Messages as the template renders them -> ids; ValueError for roles that it refuses."""
        try:
            return self.tokenizer.apply_chat_template(turns, return_dict=True, **options).input_ids
        except Exception as error:                  # whatever the template raises
            raise ValueError(f"the chat template refuses these turns: {error}") from None

    def label(self, tokens):
        """Labels for the answers and their ends in tokens (n,l), found by what stands before."""
        labels = torch.full_like(tokens, -100)
        header = torch.tensor(self.answer_start)
        found = (tokens.unfold(1, len(header), 1) == header).all(-1)    # (n,l-header+1)
        for row, start in found.nonzero().tolist():
            first = start + len(header)
            last = (tokens[row].tolist() + [self.end]).index(self.end, first) + 1
            labels[row, first:last] = tokens[row, first:last]
        return labels

def pack(rows, length, chat):
    """Lists of ids -> tokens, labels (n,l): cut at `length`; on the right padded with end tokens,
    which carry no label."""
    rows = [torch.tensor(ids[:length]) for ids in rows]
    tokens = pad_sequence(rows, True, chat.end)
    return tokens, chat.label(tokens)

def read_jsonl(path, chat, length, *fields):
    """A JSONL file of a prompt and the answers `fields` a row, or of messages -> `pack` of each.
    Rows whose answer begins beyond `length` are counted and left out: nothing can be learnt from
    them. ValueError names the file and the line."""
    rows = []
    number = 0
    try:
        for number, line in enumerate(open(path, encoding="utf-8-sig"), 1):     # noqa: B007
            if not line.strip():
                continue
            row = json.loads(line)
            conversations = [row["messages"]] if "messages" in row else [
                turns_of(row["prompt"], row[field]) for field in fields]
            for turn in sum(conversations, []):
                require(turn["content"].strip(), "a text is empty")
            rows.append([chat.ids(turns) for turns in conversations])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}:{number}: want JSON with prompt, {', '.join(fields)}: "
                         f"{type(error).__name__}: {error}") from None
    require(rows, f"{path}: no rows")
    packed = [pack(column, length, chat) for column in zip(*rows)]
    useful = torch.stack([(ys[:, 1:] != -100).any(1) for _, ys in packed]).all(0)       # (n,)
    require(useful.any(), f"{path}: no answer begins within --length {length}")
    if not useful.all():
        print(f"{path}: {(~useful).sum()} of {len(useful)} rows left out, without an answer that "
              f"begins within --length {length}")
    return [(tokens[useful], ys[useful]) for tokens, ys in packed]

def sample(model, prompt, n, n_new, batch_size=64, temperature=0.9, seconds=None, seed=0):
    """n rows of the model's own text after `prompt` (ids), from its 50 likeliest tokens, by
    transformers' generate; after `seconds` no further batch begins. -> (n,len(prompt)+n_new)"""
    rows = []
    start = time.monotonic()
    torch.manual_seed(seed)
    for i in progress_bar(range(0, n, batch_size), "sampling", unit="batch"):
        if i and seconds and (time.monotonic() - start) * (1 + batch_size / i) > seconds:
            break
        tokens = torch.tensor([prompt] * min(batch_size, n - i), device=model.device)   # (b,l)
        rows.append(model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=50, top_p=1.0,
            temperature=temperature, repetition_penalty=1.0, max_new_tokens=n_new,
            eos_token_id=model.config.vocab_size, pad_token_id=0).cpu())    # a word that none is
    return torch.cat(rows)

def read_model(name, dtype):
    """A model and its tokenizer, a directory or a hub name; ValueError for whatever goes wrong."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=dtype,
                                                            output_loading_info=True)
        require(not found["missing_keys"], f"tensors are missing: {found['missing_keys']}")
    except Exception as error:          # of files, formats, classes, the network: many kinds
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"cannot load {name}: {line or repr(error)}") from None
    return model.eval(), tokenizer

def save(model, tokenizer, folder):
    """An ordinary Hugging Face directory: weights, config, tokenizer, chat template, this file."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

def write_whole(path, write):
    """write(file): `path` is the old file or the new one, whenever the run is killed."""
    with open(path + ".tmp", "wb") as file:
        write(file)
    os.replace(path + ".tmp", path)

def pseudo_labels(teacher, chat, args):
    """Rows that the teacher wrote: of --tokens-file, or its own, kept in OUT/data.npz. It invents
    the user's turn too, going on from the chat template's beginning. -> tokens, labels (n,l)"""
    source = args.tokens_file or os.path.join(args.out, "data.npz")
    if not args.tokens_file and not os.path.exists(source):
        n = math.ceil(args.tokens / args.length) if args.minutes is None else 10 ** 5
        tokens = sample(teacher, chat.user_start, n, args.length - len(chat.user_start),
                        args.sampled, args.temperature, args.minutes and seconds_for(args, 0))
        write_whole(source, partial(numpy.savez, tokens=tokens.numpy()))
    try:
        tokens = torch.from_numpy(numpy.load(source)["tokens"].astype("int64"))[:, :args.length]
        require(tokens.numel() > 0, "the array is empty")
    except Exception as error:                      # file, zip, pickle, key, shape: many kinds
        raise ValueError(f"{source}: want .npz with integers `tokens` (n,l): {error!r}") from None
    V = teacher.config.vocab_size
    bad = tokens[(tokens < 0) | (tokens >= V)].tolist()
    require(not bad, f"{source}: token {bad[:1]} is outside the vocabulary of {V}")
    labels = chat.label(tokens)
    useful = (labels[:, 1:] != -100).any(1)         # (n,) the other rows hold no answer
    require(useful.sum() > 1, f"{source}: fewer than two rows hold an answer")
    return tokens[useful], labels[useful]

def make_toy_teacher(folder):
    """--tiny's teacher: a small Llama, trained for a moment on Python's own help pages, and saved.
    A question is the beginning of a paragraph, the answer its rest: honest continuation data, no
    conversation. -> every tenth paragraph, held out: text that people wrote, (tokens, labels)"""
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer
    text = "\n\n".join(topics[k] for k in sorted(topics))
    core = ByteLevelBPETokenizer()
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    core.train_from_iterator([text], 512, 0, show_progress=False, special_tokens=marks)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    chat = Chat(tokenizer)
    words = [paragraph.split() for paragraph in text.split("\n\n")]
    rows = [chat.ids(turns_of(" ".join(w[:8]), " ".join(w[8:48]))) for w in words if len(w) > 19]
    stream = torch.tensor([i for t, ids in enumerate(rows) if t % 10 for i in ids])
    stream = stream[:len(stream) // 128 * 128].view(-1, 128)                            # (n,128)
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=2))
    train("teacher", teacher, lambda i: teacher(stream[i], labels=stream[i], use_cache=False).loss,
          len(stream), steps=400, lr=2e-3)
    save(teacher, tokenizer, folder)
    return pack(rows[::10], 128, chat)

# ---- 10. The command line: convert, align, choose layers, three stages; judge and save each. ---

PHASES = ("sampling", "alignment", "stage 1", "stage 2", "stage 3")
# the best known settings (assets/measured.md); rates (peaks) and shares of the time by phase
SETTINGS = {
    "cpu": dict(length=256, batch=4, alpha=0.1, judged=16, chosen_by=4, sampled=64, temperature=0.9,
                rates=(0, 2e-3, 5e-4, 6e-5, 6e-6), shares=(0.2, 0.35, 0.12, 0.3, 0.03)),
    "cuda": dict(length=512, batch=64, alpha=0.1, judged=64, chosen_by=16, sampled=4096,
                 temperature=0.9, rates=(0, 3e-3, 7e-4, 1.2e-4, 9e-6),
                 shares=(0.35, 0.2, 0.0, 0.43, 0.02)),
    "tiny": dict(length=128, batch=8, alpha=0.1, judged=32, chosen_by=16, sampled=512,
                 temperature=0.6, rates=(0, 1e-2, 2.5e-3, 5e-4, 1e-4),
                 shares=(0.0, 0.4, 0.15, 0.42, 0.03), tokens=160e3, teacher="tiny_run/teacher")}

def parse_args(argv=None):
    """The flags and the settings of the device; ValueError for values that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = partial(require, False)
    add = parser.add_argument
    add("--tiny", action="store_true", help="the whole story at toy size, in ./tiny_run")
    add("--teacher", help="a Llama, Mistral or Qwen2 chat model: directory or hub name")
    add("--out", help="directory for the student; must be empty unless --resume")
    add("--attention", type=float, default=0.5, help="share of layers that stay (default: 0.5)")
    add("--mixer", choices=("mamba2", "mamba"), default="mamba2", help="default: mamba2")
    add("--d-state", type=int, help="state size (default: mamba2 the head's, mamba 16)")
    add("--even", action="store_true", help="keep evenly spaced layers, not the best to keep")
    add("--minutes", type=float, help="what the whole command may take, minutes")
    add("--tokens", type=float, default=2e6, help="else: tokens to train on (default: 2e6)")
    add("--sft", help='JSONL, rows {"prompt","response"} or {"messages"}: stage 2')
    add("--preferences", help='JSONL, rows {"prompt","chosen","rejected"}: stage 3')
    add("--tokens-file", help="pseudo-labels: npz with `tokens` (n,l), as another OUT/data.npz")
    add("--length", type=int, help="tokens a row (default: 512 on a GPU, else 256)")
    add("--batch", type=int, help="rows a step (default: 64 on a GPU, else 4)")
    add("--resume", action="store_true", help="go on after the last stage that --out finished")
    add("--json", help="write the table to this file")
    tiny = "--tiny" in (sys.argv if argv is None else argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.set_defaults(**SETTINGS["tiny" if tiny else device])
    args = parser.parse_args(argv)
    args.deadline = time.monotonic() + 60 * (args.minutes or 0)
    if args.tiny:
        args.out = "tiny_run"
        shutil.rmtree(args.out, ignore_errors=True)
    require(args.teacher and args.out, "give --tiny, or --teacher and --out")
    require(0 <= args.attention <= 1, f"--attention {args.attention} is outside 0..1")
    for name in ("minutes", "tokens", "length", "batch"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name} {value} must be above 0")
    folder = os.path.dirname(os.path.abspath(args.json or ""))
    require(os.path.isdir(folder), f"--json: there is no directory {folder}")
    require(args.resume or not os.path.exists(args.out) or os.path.isdir(args.out)
            and not os.listdir(args.out), f"--out {args.out} is no empty directory; --resume?")
    return args

def convert(teacher, keep, args):
    """Algorithm 1 by the flags, the same every time; in fp32, to train."""
    torch.manual_seed(0)
    d_state = args.d_state or (16 if args.mixer == "mamba" else None)
    return convert_to_hybrid(teacher, keep, args.mixer, d_state=d_state).float()

def prepare(args):
    """The teacher, its Chat and its data. What can be refused is refused before any sampling."""
    human = make_toy_teacher(args.teacher) if args.tiny else None
    cuda = torch.cuda.is_available()
    teacher, tokenizer = read_model(args.teacher, torch.bfloat16 if cuda else torch.float32)
    teacher.to("cuda" if cuda else "cpu")
    chat = Chat(tokenizer)
    convert(teacher, [], args)
    context = teacher.config.max_position_embeddings
    require(args.length <= context, f"--length {args.length} exceeds the context of {context}")
    data = argparse.Namespace(sft=None, pairs=None)
    if args.sft:
        data.sft, = read_jsonl(args.sft, chat, args.length, "response")
    if args.preferences:
        data.pairs = read_jsonl(args.preferences, chat, args.length, "chosen", "rejected")
    os.makedirs(args.out, exist_ok=True)
    tokens, labels = pseudo_labels(teacher, chat, args)
    n = len(tokens) - min(256, max(1, len(tokens) // 8))
    data.train = tokens[:n], labels[:n]
    data.heldout = tokens[n:][:args.judged], labels[n:][:args.judged]
    data.judges = {"": data.heldout, "human_": human} if human else {"": data.heldout}
    if data.pairs is None:                          # the rejected answer: the next row's words
        other = torch.where(labels[:n] == -100, tokens[:n], tokens[:n].roll(1, 0))      # (n,l)
        data.pairs = [data.train, (other, torch.where(labels[:n] == -100, -100, other))]
    return teacher, chat, data

def seconds_for(args, phase):
    """A phase's share of the time that is left, a tenth of which judges and saves."""
    left = max(1.0, args.deadline - time.monotonic())
    return 0.9 * left * args.shares[phase] / sum(args.shares[phase:])

def run_phase(phase, student, teacher, data, args):
    """One phase with its part of the time or of --tokens. -> losses"""
    options = dict(batch_size=args.batch, lr=args.rates[phase])
    if args.minutes:
        options["seconds"] = seconds_for(args, phase)
    else:
        part = args.tokens * args.shares[phase] / sum(args.shares[1:])
        options["steps"] = max(1, round(part / args.batch / args.length))
    mixers = student.mixers().values()
    if student.device.type == "cuda" and options.get("seconds", 0) > 60:
        for module in mixers if phase == 1 else [*student.model.layers, *teacher.model.layers]:
            module.compile(dynamic=False)
    if phase == 1:
        return align_mixers(student, teacher, data.train[0], **options)
    if phase == 4:
        options["batch_size"] = max(1, args.batch // 8)
        return dpo(student, teacher, *data.pairs, **options)
    answers = data.sft if phase == 3 and data.sft else data.train
    return distil(PHASES[phase], student, teacher, *answers, alpha=args.alpha, beta=1.0,
                  only=mixers if phase == 2 else None, **options)

def run(teacher, data, args):
    """The story of one student: each phase, judged after it and kept in OUT/progress.pt.
    -> student, rows of the table"""
    L = len(teacher.model.layers)
    n = round(args.attention * L)
    choose = 0 < n < L and not args.even
    keep = [] if choose else [math.ceil((i + 1) * L / n) - 1 for i in range(n)]
    path = os.path.join(args.out, "progress.pt")
    saved = {"rows": [], "keep": keep}
    if args.resume and os.path.exists(path):
        try:
            saved = torch.load(path, map_location="cpu")
            student = convert(teacher, saved["keep"], args)
            student.load_state_dict(saved["student"])
        except Exception as error:                  # of files, pickles, shapes: many kinds
            line = str(error).strip().partition("\n")[0]
            raise ValueError(f"cannot resume from {path}: {line or repr(error)}") from None
    else:
        student = convert(teacher, keep, args)
    rows = saved["rows"]
    for phase, name in enumerate(("converted", *PHASES[1:])):
        if name in [row["stage"] for row in rows] or phase and not args.shares[phase]:
            continue
        start = time.monotonic()
        losses = run_phase(phase, student, teacher, data, args) if phase else []
        if phase == 1 and choose:
            aligned = student.state_dict()
            few = [v[:args.chosen_by] for v in data.train]
            student = convert(teacher, choose_layers(student, teacher, n, *few), args)
            student.load_state_dict(aligned, strict=False)
        row = {"stage": name, "losses": losses[::len(losses) // 500 + 1], "steps": len(losses),
               "layers": student.config.attn_layers, "seconds": time.monotonic() - start}
        for prefix, (tokens, labels) in data.judges.items():
            judged = evaluate(student, teacher, tokens, 0, 2, labels)
            row.update({prefix + key: value for key, value in judged.items()})
        rows.append(row)
        state = {"rows": rows, "keep": row["layers"], "student": student.state_dict()}
        write_whole(path, partial(torch.save, state))
        print(f"  {name:<10}{row['ratio']:9.3f}{row.get('human_ratio', math.nan):9.3f}"
              f"{row['kl']:9.3f}{row['agreement']:10.1%}{row['seconds']:8.1f} s", flush=True)
    return student, rows

def main(argv=None):
    """Run the command line. -> the report that --json writes"""
    start = time.monotonic()
    args = parse_args(argv)
    teacher, chat, data = prepare(args)
    report = {"tables": {}, "seconds": {"teacher and data": time.monotonic() - start}}
    for mixer in ("mamba2", "mamba") if args.tiny else (args.mixer,):
        start = time.monotonic()
        args.mixer = mixer
        if args.tiny:
            args.out = os.path.join("tiny_run", mixer)
            os.makedirs(args.out)
        print(f"{mixer}, perplexity ratio to the teacher:\n  {'':<10}{'own text':>9}{'people':>9}"
              f"{'KL, nats':>9}{'agreement':>10}{'time':>9}")
        student, rows = run(teacher, data, args)
        print("  attention in layers", rows[-1]["layers"])
        save(student, chat.tokenizer, args.out)
        report["tables"][mixer] = rows
        report["seconds"][mixer] = time.monotonic() - start
    report.update(args=vars(args), device=str(student.device), torch=torch.__version__)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    print("time:", *[f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items()])
    again = AutoModelForCausalLM.from_pretrained(args.out).to(student.device)       # as saved
    prompt = chat.ids(turns_of("What is the capital of France?"), add_generation_prompt=True)
    answer = again.generate(torch.tensor([prompt], device=again.device), max_new_tokens=48,
                            do_sample=False, eos_token_id=chat.end, pad_token_id=0)     # (1,l)
    print(f"saved to {args.out}; it says:", chat.tokenizer.decode(answer[0]))
    return report

def cli(run_main=main):
    """Run a command line; a user's mistake ends in one line and exit code 2."""
    sys.stdout.reconfigure(errors="replace")        # a console that cannot print a character
    transformers.utils.logging.disable_progress_bar()
    try:
        run_main()
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; --resume goes on after the last finished stage", file=sys.stderr)
        sys.exit(3)

if __name__ == "__main__":
    # saved classes must not live in __main__; transformers does not read this as a dependency
    importlib.import_module("mamba_in_llama").cli()
