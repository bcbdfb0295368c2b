"""Speculative decoding for linear RNNs and hybrids: Algorithm 2 of arXiv 2408.15237.

    draft q        d1 d2 d3 d4                  K cheap steps (a small model, or a look-up)
                   |  |  |  |
    target p   [y0 d1 d2 d3 d4]                 ONE multi-step call verifies all of them
                   ok ok  x  -                  FirstConflict: d1, d2 stay; d3 and all after fall
    emitted        d1 d2  y                     y: the target's own token at the conflict

y0 is the token emitted last; logits at a token check the next one. A key/value cache rewinds by
moving a pointer, an RNN's one big state cannot. So an old state is kept, and the inputs since: a
rejected token is one that is not counted; the state moves on only over tokens that stand.

Glossary, with the paper's letters (those of the mixers: mamba_in_llama.py):
    b, T, V      batch rows, tokens of one call, vocabulary
    K            lookahead: tokens drafted per round
    p, q         distributions of the target and of the draft, after temperature, top-k, top-p
    base         tokens inside the state, the paper's h_i; committed: tokens that stand, up to its
                 j; pending: tokens decoded since the last commit, up to its k
    ring, slot   the inputs of recent tokens; the token at position s stands in slot s % slots
    # Gen        tokens a round yields: accepted ones plus one, between 1 and K + 1

Contents:  1 MultiStep   2 the cache that rolls back, prefill, decode   3 sampling, rows of a batch
           4 the copy that decodes, CUDA graphs   5 drafts   6 Algorithm 2, plain decoding
           7 the authors' checkpoints   8 command line (--tiny).   Timing, pictures: test_all.py
"""

import argparse
import copy
import json
import math
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import has_file

import mamba_in_llama as M
from mamba_in_llama import require, tl, triton

# ---- 1. MultiStep: replay what was accepted, go on for T tokens, all in one call. -----------
# Committed tokens enter the one state that is kept when the ring is full (the flush); others never.

def multi_step_definition(C, A, state, ring_x, ring_dt, ring_B, counts, ring, runs):
    """The paper's MultiStep, by definition: T new tokens a row, from a state that lags behind.
    counts (3,b): base, committed, pending. The new tokens' inputs stand in the rings already,
    behind those of the pending ones; ring_dt holds Delta. Tokens from base on are replayed. A row
    that would hold more than `ring` tokens since base first folds the committed ones into its
    state, in place; ring = 0 does so in every call, which is the MultiStep that the paper prints.
    The counts stay as they are: the caller moves base in rows that folded (`decode`).
    C (b,T,H,N)  A (H,p',n')  state (b,H,P,N)  ring_x (b,slots,Gx,P)  ring_dt (b,slots,H,p')
    ring_B (b,slots,G,N) -> y (b,T,H,P)"""
    T, H = C.shape[1:3]
    slots = ring_x.shape[1]
    base, committed, pending = counts[..., None].unbind()               # (b,1) each
    first = committed + pending
    # 1. old and new inputs in order of time, one copy per head, in the state's precision
    most = slots // 2 if C.is_cuda else int((first - base).max())       # a free read on a CPU
    s = first + torch.arange(-most, T, device=C.device)                 # (b,most+T) positions
    row = torch.arange(len(C), device=C.device)[:, None]                # (b,1)
    x = M.to_heads(ring_x[row, s % slots].to(state.dtype), H, runs)     # (b,most+T,H,P)
    B = M.to_heads(ring_B[row, s % slots].to(state.dtype), H, runs)     # (b,most+T,H,N)
    C = F.pad(C.to(state.dtype), (0, 0, 0, 0, most, 0))                 # (b,most+T,H,N)
    delta = ring_dt[row, s % slots]                                     # (b,most+T,H,p')
    scan = M.recurrence if A.shape[-1] > 1 or s.shape[1] < 4 else M.mamba2_scan
    # 2. the flush: a token with Delta 0 leaves the state as it is, so one scan serves all rows
    begin = torch.where(first - base + T > ring, committed, base)       # (b,1)
    folds = (s >= base) & (s < begin)                                   # (b,most+T)
    if C.is_cuda or folds.any():
        _, folded = scan(x, delta * folds[..., None, None], A, B, B, state)
        state.copy_(folded)
    # 3. replay, and go on
    missing = s >= begin                                                # (b,most+T)
    y, _ = scan(x, delta * missing[..., None, None], A, B, C, state)
    return y[:, most:].to(ring_x.dtype).contiguous()

if triton is not None:
    INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

    @triton.jit
    def dot(a, b, acc):
        """acc + a @ b in fp32. The interpreter has no bf16 product: it would take the raw bits."""
        if INTERPRET:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        return tl.dot(a, b, acc, input_precision="tf32x3")

    @triton.jit
    def product(a, b, acc, TERMS: tl.constexpr):
        """acc + a @ b, a in fp32. A bf16 b meets a as TERMS parts of bf16's 8 bits each: one bf16
        or TF32 product would leave an error of 1e-3 in the state."""
        if b.dtype == tl.float32:
            return dot(a, b, acc)
        for _ in tl.static_range(TERMS):        # cut, not rounded: that would be a slow conversion
            part = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            acc = dot(part.to(b.dtype), b, acc)
            a -= part
        return acc

    @triton.jit
    def mamba2_kernel(C, A, y, state, ring_x, ring_dt, ring_B, counts, ring, SLOTS, T,
                      H, GX, GB, RUNS, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr,
                      BN: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
        """BP channels of one head of one row; the state in chunks of BN columns.
        One head decays as a whole, so that a call is products for the tensor cores:
        y_t = exp(cum_t) h_0 C_t + sum_{s<=t} (B_s . C_t) exp(cum_t - cum_s) Delta_s x_s.
        Token s since base is row s of a tile of BR >= ring rows; output t is its row n_old + t.
        Rows too many repeat the last one with Delta = 0: no load needs a mask. From memory come the
        state, 4 N P bytes a head (a flush moves it twice more), and n_old + T tokens."""
        head = tl.program_id(1)
        row = tl.program_id(2)
        rows = tl.num_programs(2)
        base = tl.load(counts + row)
        committed = tl.load(counts + rows + row)
        n_old = committed + tl.load(counts + 2 * rows + row) - base
        row = row.to(tl.int64)                                          # offsets pass 2^31
        p = tl.program_id(0) * BP + tl.arange(0, BP)                    # (BP,)
        n = tl.arange(0, BN)[None, :]                                   # (1,BN)
        s = tl.arange(0, BR)                                            # (BR,)
        t = tl.arange(0, BT)                                            # (BT,)
        # from here on the pointers are those of this row, head (its group, as in `to_heads`), p; a
        # number of 64 bits is added before a tile of 32: tiles of 64 would fill the registers
        gx = head // (H // GX * RUNS) * RUNS + head % RUNS
        gb = head // (H // GB * RUNS) * RUNS + head % RUNS
        ring_x += (row * SLOTS * GX + gx) * P + p[None, :]              # (1,BP)
        ring_B += (row * SLOTS * GB + gb) * N + n                       # (1,BN)
        ring_dt += row * SLOTS * H + head
        state += (row * H + head) * P * N
        state += p[:, None] * N + n                                     # (BP,BN)
        C += (row * T * H + head) * N
        C += tl.minimum(t, T - 1)[:, None] * H * N + n                  # (BT,BN)
        a = tl.load(A + head)
        # 1. the flush: committed tokens enter the state, and base moves behind them
        if n_old + T > ring:
            n_fold = committed - base
            slot = (base + tl.minimum(s, tl.maximum(n_fold - 1, 0))) % SLOTS            # (BR,)
            delta = tl.where(s < n_fold, tl.load(ring_dt + slot * H), 0)
            decay = delta * a           # 1-D: a cumsum over (BR,1) came out wrong on an H100
            to_end = tl.exp(tl.minimum(tl.cumsum(decay, reverse=True) - decay, 0))
            x_s = tl.load(ring_x + slot[:, None] * GX * P).to(tl.float32)               # (BR,BP)
            u = tl.trans(x_s * (delta * to_end)[:, None])               # (BP,BR)
            left = tl.exp(tl.sum(decay))                                # of the old state
            for i in range(0, N, BN):
                B_i = tl.load(ring_B + slot[:, None] * GB * N + i)      # (BR,BN)
                h_i = tl.load(state + i)                                # (BP,BN)
                tl.store(state + i, product(u, B_i, h_i * left, 3))
            tl.debug_barrier()                                          # it is read again below
            base = committed
            n_old -= n_fold
        # 2. h_0 C_t and B_s . C_t, summed over chunks of the state
        slot = (base + tl.minimum(s, n_old + T - 1)) % SLOTS            # (BR,)
        x_s = tl.load(ring_x + slot[:, None] * GX * P)                  # (BR,BP), asked for early
        delta = tl.where(s < n_old + T, tl.load(ring_dt + slot * H), 0)     # (BR,)
        seen = tl.zeros((BP, BT), tl.float32)
        scores = tl.zeros((BR, BT), tl.float32)
        for i in range(0, N, BN):
            h_i = tl.load(state + i, eviction_policy="evict_first")     # (BP,BN)
            B_i = tl.load(ring_B + slot[:, None] * GB * N + i)          # (BR,BN)
            C_i = tl.load(C + i).to(B_i.dtype)                          # (BT,BN)
            seen = product(h_i, tl.trans(C_i), seen, 2)
            scores = dot(B_i, tl.trans(C_i), scores)
        # 3. tokens among themselves, weighted by the decay between them
        decay = delta * a                                               # (BR,)
        causal = s[:, None] <= n_old + t[None, :]                       # (BR,BT)
        cum_s = tl.cumsum(decay)[:, None]                               # (BR,1)
        cum_t = tl.sum(tl.where(causal, decay[:, None], 0), 0)[None, :]     # (1,BT)
        scores *= tl.exp(tl.minimum(cum_t - cum_s, 0)) * delta[:, None]
        scores = tl.where(causal, scores, 0)
        out = product(tl.trans(scores), x_s, tl.trans(seen * tl.exp(cum_t)), 2)     # (BT,BP)
        tl.store(y + ((row * T + t[:, None]) * H + head) * P + p[None, :], out, mask=t[:, None] < T)

@torch.library.custom_op("mamba_in_llama::multi_step", mutates_args={"state"})
def multi_step(C: torch.Tensor, A: torch.Tensor, state: torch.Tensor, ring_x: torch.Tensor,
               ring_dt: torch.Tensor, ring_B: torch.Tensor, counts: torch.Tensor, ring: int,
               runs: int) -> torch.Tensor:
    """MultiStep by its fastest form: the one dispatch; for torch.compile, one opaque operation.
    Mamba's kernel is the other file's: it stores the state after the committed tokens. Mamba2's
    takes 16 whole rows a tile for T > 4 of a small batch. Shapes: `multi_step_definition`"""
    mamba2 = A.shape[-1] == 1
    if not M.use_triton(state.dtype, state.device) or mamba2 and C.shape[-1] % 16:  # a tile's side
        return multi_step_definition(C, A, state, ring_x, ring_dt, ring_B, counts, ring, runs)
    if not mamba2:
        return M.run_step_kernel(ring_x, ring_dt, A, ring_B, C, state, counts)
    b, T, H, N = C.shape
    slots, GX, P = ring_x.shape[1:]
    small = b * H < 128 and T > 4
    BP = min(P & -P, 16 if small else 64 if b * H >= 1024 and N > 64 else 32)  # P & -P: the highest
    BN = min(N & -N, 128 if small else 64 if N > 64 else 32)                   # power of 2 in P
    BR = max(16, triton.next_power_of_2(ring))
    BT = max(16, triton.next_power_of_2(T))
    y = ring_x.new_empty(b, T, H, P)
    with torch.cuda.device_of(C):
        mamba2_kernel[P // BP, H, b](
            C.contiguous(), A, y, state, ring_x, ring_dt, ring_B, counts, ring, slots, T, H, GX,
            ring_B.shape[2], runs, P, N, BP, BN, BR, BT, num_warps=2)
    return y

@multi_step.register_fake
def shape_of_multi_step(C, A, state, ring_x, ring_dt, ring_B, counts, ring, runs):
    """What torch.compile knows of it. -> y (b,T,H,P)"""
    return ring_x.new_empty(*C.shape[:3], state.shape[2])

# ---- 2. The cache that rolls back: a state and rings per mixer, static K and V per attention. -

@dataclass
class Call:
    """What all layers of a call share: how far each row is, and where its new tokens go."""
    counts: torch.Tensor                    # (3,b) int32: base, committed, pending
    row: torch.Tensor                       # (b,1) 0, 1, ...
    prompt: bool = False                    # nothing stands before it, and all of it stands
    slots: torch.Tensor | None = None       # (b,W-1+T) of the new tokens and those before them
    columns: torch.Tensor | None = None     # (b,T) of the new tokens in K and V
    visible: int = 0                        # columns of K and V that are looked at

class MixerState:
    """One mixer's part of a `MixerCache`. It is asked what a mixer asks transformers' cache: the
    columns before these (`update_conv_state`), and to scan these inputs (`multi_step`)."""
    def __init__(self, mixer, cache, zeros):
        """Twice as many slots as `ring`, since old and new tokens are in them at once, and those
        that the convolution looks back on. Mamba's kernel wants one x and B per head."""
        b = len(cache.call.row)
        slots = 2 * cache.ring + mixer.config.d_conv - 1
        groups = mixer.H if mixer.per_channel else mixer.d_xb // mixer.N
        channels = mixer.N if mixer.per_channel else 1
        wide = torch.promote_types(zeros(1).dtype, torch.float32)
        self.call = cache.call
        self.d_conv = mixer.config.d_conv
        self.fold_at = 0 if mixer.per_channel else cache.ring               # `ring` of multi_step
        self.state = zeros(b, mixer.H, mixer.N, mixer.N, dtype=wide)        # (b,H,P,N) behind
        self.ring_x = zeros(b, slots, groups, mixer.N)                      # (b,slots,Gx,P)
        self.ring_B = zeros(b, slots, groups, mixer.N)                      # (b,slots,G,N)
        self.ring_dt = zeros(b, slots, mixer.H, channels, dtype=wide)       # (b,slots,H,p') Delta
        self.ring_u = zeros(b, slots, len(mixer.conv1d.weight))             # (b,slots,c) raw inputs

    def write(self, ring, values):
        """Keep values (b,T,...) of the new tokens; of a long prompt, what a ring can hold."""
        slots = self.call.slots[:, self.d_conv - 1:][:, -ring.shape[1]:]    # (b,T)
        ring[self.call.row, slots] = values[:, -slots.shape[1]:].to(ring.dtype)

    def update_conv_state(self, columns, layer_idx, conv_kernel_size):
        """Keep new raw inputs; -> what the convolution sees. columns (b,c,T) -> (b,c,W-1+T)"""
        before = self.ring_u[self.call.row, self.call.slots[:, :conv_kernel_size]]  # (b,W-1,c)
        self.write(self.ring_u, columns.mT)
        return torch.cat((before.to(columns.dtype), columns.mT), 1).mT

    def multi_step(self, layer_idx, x, dt, B, C, A, dt_bias, D, z, runs):
        """`scan_inputs` for tokens that may be taken back; a prompt's all stand. Shapes there."""
        if self.call.prompt:
            y, state = M.scan_inputs(x, dt, B, C, A, dt_bias, D, z, self.state, runs)
            self.state.copy_(state)
            return y
        groups = self.ring_x.shape[2]
        self.write(self.ring_x, M.to_heads(x, groups, runs))
        self.write(self.ring_B, M.to_heads(B, groups, runs))
        self.write(self.ring_dt, F.softplus(dt + dt_bias))
        y = multi_step(C, A, self.state, self.ring_x, self.ring_dt, self.ring_B, self.call.counts,
                       self.fold_at, runs)                                  # (b,T,H,P)
        return torch.addcmul(y, D, M.to_heads(x, C.shape[2], runs)) * F.silu(z)

class AttentionState:
    """One attention layer's part of a `MixerCache`: K and V by position. Rows rewind by their
    count, nothing is erased; the last column takes what is thrown away."""
    def __init__(self, attention, cache, zeros):
        config = attention.config
        width = cache.max_length // 64 * 64 + 64    # calls of about one size are compiled once
        self.call = cache.call
        self.window = math.inf          # positions that a token sees: Llama all, Mistral some,
        if config.model_type != "llama":                                    # Qwen2 by layer
            self.window = getattr(attention, "sliding_window", config.sliding_window) or math.inf
        self.k = zeros(len(cache.call.row), config.num_key_value_heads, width, attention.head_dim)
        self.v = torch.zeros_like(self.k)                                   # (b,G,width,d) both

    def update(self, k, v, layer_idx, *args, **kwargs):
        """Keep new k, v (b,G,T,d). -> (b,G,visible,d) each, what the tokens may look at"""
        call = self.call
        self.k[call.row, :, call.columns] = k.transpose(1, 2).to(self.k.dtype)
        self.v[call.row, :, call.columns] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[:, :, :call.visible], self.v[:, :, :call.visible]

def check_family(model, role):
    """ValueError for what is no Llama, Mistral, Qwen2 or hybrid: what it adds would be lost."""
    kind = getattr(model.config, "teacher_type", model.config.model_type)
    require(kind in M.FAMILIES, f"{role}: model type {kind!r} is none of {', '.join(M.FAMILIES)}")

class MixerCache:
    """All that a decoder remembers, hybrid or plain. `decode` makes tokens pending, `commit`
    decides how many of them stand; to roll back, commit fewer than are pending."""
    @classmethod
    @torch.no_grad()
    def allocate(cls, model, batch_size, max_length=None, ring=16):
        """An empty cache for a Llama, Mistral, Qwen2 or a hybrid of them. max_length: tokens of a
        row in attention layers (default: the context). ring: most tokens between two commits."""
        require(min(batch_size, ring) >= 1, f"batch_size {batch_size}, ring {ring}: want 1 or more")
        check_family(model, "the cache's model")
        rope = (model.model.config.rope_parameters or {}).get("rope_type")
        require(rope not in ("dynamic", "longrope"), f"RoPE {rope!r} changes with a call's length")
        weight = model.get_input_embeddings().weight
        cache = cls()
        cache.ring = ring
        cache.max_length = max_length or model.config.max_position_embeddings
        cache.open = 0                          # the host's copy of the largest pending count
        cache.call = Call(torch.zeros(3, batch_size, dtype=torch.int32, device=weight.device),
                          torch.arange(batch_size, device=weight.device)[:, None])
        cache.run_layer = run_layer             # or what torch.compile made of it
        cache.layers = []
        for layer in model.model.layers:
            # by name: a model loaded by trust_remote_code has classes of its own
            kind = MixerState if hasattr(layer.self_attn, "in_proj") else AttentionState
            cache.layers.append(kind(layer.self_attn, cache, weight.new_zeros))
        cache.mixers = [part for part in cache.layers if isinstance(part, MixerState)]
        cache.attention = [part for part in cache.layers if isinstance(part, AttentionState)]
        return cache

    def commit(self, n_accepted):
        """Keep the first n_accepted (b,) tokens decoded since the last commit, drop the rest.
        A wrong count raises ValueError on the CPU; on CUDA, where looking would wait, it is cut."""
        counts = self.call.counts
        n = torch.as_tensor(n_accepted, device=counts.device, dtype=torch.int32)
        stands = n.clamp(min=0).minimum(counts[2])                          # (b,)
        if not n.is_cuda:
            require((stands == n).all(), f"commit of {n.tolist()}, pending {counts[2].tolist()}")
        counts[1] += stands
        counts[2].zero_()
        self.open = 0

def run_layer(layer, hidden, mask, angles, part, token_mask=None):
    """One decoder layer, attention or mixer, with its part of the cache. It is what --compile
    compiles: once per kind of layer, since nothing in it depends on the layer's number.
    hidden (b,T,D)  mask (b,1,T,.) or None  angles: cos, sin (b,T,d) -> (b,T,D)"""
    return layer(hidden, attention_mask=mask, position_embeddings=angles, use_cache=False,
                 token_mask=token_mask, **{M.CACHE: part})

def run_layers(model, tokens, first, n_valid, cache, prompt=False, token_mask=None):
    """The forward pass of transformers' Llama, Mistral and Qwen2, layer by layer. A row's tokens
    stand at positions first, first + 1, ..., below 0 is padding; the first n_valid of them count.
    tokens, token_mask (b,T)  first, n_valid (b,) -> hidden states (b,T,D)"""
    # 1. where the tokens go
    check_vocabulary(model, tokens)
    call = cache.call
    call.prompt = prompt
    T = tokens.shape[1]
    step = torch.arange(T, device=tokens.device)
    positions = first[:, None].long() + step                                # (b,T)
    kept = (step < n_valid[:, None]) & (positions >= 0) & (positions < cache.max_length)
    call.columns = positions.masked_fill(~kept, -1)                         # (b,T)
    for part in cache.mixers[:1]:               # the same slots in all mixers
        back = torch.arange(1 - part.d_conv, 0, device=tokens.device)
        both = torch.cat((positions[:, :1] + back, positions), 1)           # (b,W-1+T)
        call.slots = both % part.ring_u.shape[1]
    # 2. who may look where: numbers that are added to scores, 0 or -inf, for each kind of window
    t = positions[:, :, None].clamp(min=0)                                  # (b,T,1)
    s = torch.arange(call.visible, device=tokens.device)                    # (visible,)
    windows = {part.window for part in cache.attention}
    if prompt and token_mask is None and model.model.config._attn_implementation == "sdpa":
        windows = {window for window in windows if window < T}      # sdpa itself is causal, faster
    masks = {}
    for window in windows:
        hides = (s > t) | (s <= t - window)                                 # (b,T,visible)
        mask = model.model.norm.weight.new_zeros(hides.shape).masked_fill_(hides, -math.inf)
        masks[window] = mask[:, None]                                       # (b,1,T,visible)
    # 3. the layers
    run = run_layer if prompt else cache.run_layer
    hidden = model.model.embed_tokens(tokens)                               # (b,T,D)
    angles = model.model.rotary_emb(hidden, position_ids=t[..., 0])
    for layer, part in zip(model.model.layers, cache.layers):
        mask = masks.get(getattr(part, "window", None))
        hidden = run(layer, hidden, mask, angles, part, token_mask)
    return model.model.norm(hidden)

def check_vocabulary(model, tokens):
    """ValueError for ids that the model does not know (on the CPU, where looking is free)."""
    vocab = model.get_input_embeddings().weight.shape[0]
    if not tokens.is_cuda:
        bad = tokens[(tokens < 0) | (tokens >= vocab)].tolist()
        require(not bad, f"token {bad[:1]} is outside the vocabulary of {vocab}")

@torch.no_grad()
def prefill(model, tokens, cache, attention_mask=None, logits_to_keep=1):
    """Take a whole prompt into an empty cache, all of it committed; left padding by the mask.
    tokens (b,l)  attention_mask (b,l) or None -> logits (b,logits_to_keep,V), 0 keeps all"""
    l = tokens.shape[1]
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.long()
    require(not cache.call.counts.any(), "prefill wants an empty cache")
    require(l >= 1, "the prompt is empty")
    require(mask.shape == tokens.shape, f"attention_mask {mask.shape}, tokens {tokens.shape}")
    require(bool((mask.diff() >= 0).all()), "prefill takes padding on the left only")
    length = mask.sum(-1)                                                   # (b,)
    longest = int(length.max())
    fits = longest <= cache.max_length or not cache.attention
    require(fits, f"the prompt of {longest} tokens is longer than the {cache.max_length} kept")
    cache.call.visible = longest
    real = mask.bool() if int(length.min()) < l else None                   # (b,l)
    hidden = run_layers(model, tokens, length - l, torch.full_like(length, l), cache, True, real)
    cache.call.counts[:2] = length
    return model.get_output_embeddings()(hidden[:, -logits_to_keep:])

@torch.no_grad()
def decode(model, tokens, cache, n_valid=None):
    """T more tokens a row, provisional until `cache.commit`; rows may bring fewer (n_valid).
    All counts stay on the device: on CUDA one captured graph serves every call of this shape.
    tokens (b,T)  n_valid (b,) int32 or None -> logits (b,T,V)"""
    call = cache.call
    T = tokens.shape[1]
    require(1 <= T <= cache.ring - cache.open, f"{cache.open} + {T} tokens, a ring of {cache.ring}")
    base, committed, pending = call.counts                                  # (b,) each
    first = committed + pending                                             # (b,)
    brought = torch.full_like(first, T) if n_valid is None else n_valid.int().clamp(0, T)
    if cache.attention:
        call.visible = cache.attention[0].k.shape[2]
        longest = 0 if tokens.is_cuda else int((first + brought).max())     # a free read on a CPU
        require(longest <= cache.max_length, f"{longest} tokens, but room for {cache.max_length}")
    hidden = run_layers(model, tokens, first, brought, cache)               # (b,T,D)
    if cache.mixers:                                                        # as `multi_step` did
        folded = first - base + T > cache.mixers[0].fold_at                 # (b,)
        call.counts[0] = torch.where(folded, committed, base)
    call.counts[2] += brought
    cache.open += T
    return model.get_output_embeddings()(hidden)

# ---- 3. Sampling: one rule for p and q. The rows of a batch: what each has said, its end. -----

@dataclass
class Sampling:
    """How logits become a distribution, and that a token; the same for target and draft."""
    temperature: float = 0.0           # 0: greedy, the argmax
    top_k: int = 0                     # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                 # then the fewest tokens that hold this much probability
    generator: torch.Generator | None = None

    def __post_init__(self):
        """ValueError for what is no distribution. Below 1e-5 a division may overflow: greedy."""
        require(0 <= self.temperature < 1e5, f"temperature {self.temperature} is not in 0..100000")
        require(self.top_k >= 0, f"top_k {self.top_k} must be at least 0 (0 keeps all tokens)")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")
        if self.temperature < 1e-5:
            self.temperature = 0.0

    def probabilities(self, logits):
        """What is drawn from at temperatures above 0, at least fp32. logits (...,V) -> p (...,V)"""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k == 0 and self.top_p == 1:
            return scores.softmax(-1)
        k = min(self.top_k or scores.shape[-1], scores.shape[-1])
        ranked, words = scores.topk(k)                                  # (...,k) likeliest first
        p = ranked.softmax(-1)
        cut = (p.cumsum(-1) - p >= self.top_p) & (self.top_p < 1)       # never the likeliest
        p = p.masked_fill(cut, 0)
        return torch.zeros_like(scores).scatter(-1, words, p / p.sum(-1, keepdim=True))

    def draw(self, p):
        """One token from each distribution: argmax of p_i / E_i, E_i ~ Exp(1), independent.
        This draws i with probability p_i / sum(p). torch.multinomial does the same, but checks
        its input on the host, which would wait for the GPU. p (...,V), any sum -> (...)"""
        E = torch.empty_like(p).exponential_(generator=self.generator)
        return (p / E.clamp_(min=torch.finfo(p.dtype).tiny)).argmax(-1)

@dataclass
class DecodeResult:
    """What decoding returns; times exclude the prompt, compiling and the capture of graphs."""
    tokens: list                       # b of (n,), the new tokens without the prompt
    rounds: int                        # calls of the target after the prompt
    drafted: int                       # tokens drafted, over all rows
    accepted: int                      # of these, accepted (before a cut at an end token)
    tokens_per_round: float            # "# Gen": mean over rows and rounds of accepted + 1
    seconds: float
    tokens_per_second: float           # of all rows together

@dataclass
class Rows:
    """Prompt and output of each row, left-aligned, all of it on the device. The last token is in no
    cache yet: it begins the next call, whose first logits verify the first drafted token."""
    tokens: torch.Tensor               # (b,width+1) ids; the last column takes what is thrown away
    length: torch.Tensor               # (b,) tokens of the prompt and emitted ones
    limit: torch.Tensor                # (b,) length at which the budget is spent
    alive: torch.Tensor                # (b,) bool, False before the start and once a row has ended
    ends: torch.Tensor                 # (e,) end tokens, may be empty
    tally: torch.Tensor                # (4,) rounds, rounds x live rows, drafted, accepted

    def append(self, block, n):
        """Emit the first n (b,) of tokens (b,K+1), cut after an end token and at the budget."""
        alive = self.alive.long()                                       # (b,) ended rows are idle
        rows = alive.sum()
        t = torch.arange(block.shape[1], device=block.device)           # (K+1,)
        self.tally += torch.stack([alive.max(), rows, rows * (len(t) - 1), ((n - 1) * alive).sum()])
        n = n.minimum(self.limit - self.length) * alive                 # (b,)
        is_end = (block[..., None] == self.ends).any(-1) & (t < n[:, None])     # (b,K+1)
        ended = is_end.any(-1)                                          # (b,)
        n = torch.where(ended, is_end.int().argmax(-1) + 1, n)
        at = self.length[:, None] + t           # (b,K+1), the rest goes to the last column
        self.tokens.scatter_(1, at.masked_fill(t >= n[:, None], self.tokens.shape[1] - 1), block)
        self.length += n
        self.alive &= ~ended & (self.length < self.limit)

    def result(self, max_new_tokens, seconds):
        """-> DecodeResult"""
        start = (self.limit - max_new_tokens).tolist()
        tokens = [self.tokens[i, start[i]:n].clone() for i, n in enumerate(self.length.tolist())]
        rounds, row_rounds, drafted, accepted = self.tally.tolist()
        return DecodeResult(tokens, rounds, drafted, accepted, 1 + accepted / row_rounds, seconds,
                            sum(len(row) for row in tokens) / seconds)

def read_request(target, input_ids, max_new_tokens, lookahead, eos_token_id):
    """Check the request. input_ids: (b,l), or b 1-D tensors or lists of ids -> Rows"""
    require(max_new_tokens >= 1, f"max_new_tokens {max_new_tokens} must be at least 1")
    many = torch.atleast_2d(input_ids) if torch.is_tensor(input_ids) else input_ids
    prompts = [torch.as_tensor(ids, device="cpu") for ids in many]
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long).view(-1)
    check_vocabulary(target, ends.cpu())
    require(prompts, "input_ids holds no prompts")
    for i, ids in enumerate(prompts):
        require(ids.ndim == 1 and len(ids) > 0, f"prompt {i} is empty or no row of token ids")
        check_vocabulary(target, ids)
    device = target.get_input_embeddings().weight.device
    length = torch.tensor([len(ids) for ids in prompts], device=device)             # (b,)
    # the last round may overshoot by K + 1 tokens, and rows that have ended go on with the others
    spare = max_new_tokens + 2 * lookahead + 2
    tokens = F.pad(torch.nn.utils.rnn.pad_sequence(prompts, True), (0, spare)).long().to(device)
    return Rows(tokens, length, length + max_new_tokens, length < 0, ends.to(device),
                torch.zeros(4, dtype=torch.long, device=device))

# ---- 4. The copy that decodes; a round as one CUDA graph. -------------------------------------

def shared_copy(model):
    """A copy of a model with the same weights: what is set on it leaves the user's model alone."""
    memo = {id(v): v for v in [*model.parameters(), *model.buffers()]}  # "copied already"
    return copy.deepcopy(model, memo)

class FewRowsLinear(torch.nn.Linear):
    """W x^T in place of x W^T, of two rows at least: fp32 products of few rows on a CPU then keep
    all cores busy, and take half the time."""
    def forward(self, x):
        """x (...,k) -> (...,n)"""
        rows = x.reshape(-1, x.shape[-1])                               # (r,k)
        twice = rows.repeat(2, 1) if len(rows) == 1 else rows
        y = (self.weight @ twice.T).T[:len(rows)].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

def start_decoding(model, rows, ring, compiled):
    """A copy that decodes and its cache, which has read the prompts but for their last tokens.
    compiled: False, True or the name of a backend of torch.compile. -> model, cache"""
    # 1. one number for all layers: nothing tells them apart, torch.compile makes one of each kind
    model = shared_copy(model).eval()
    model.model.config._attn_implementation = "sdpa"
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    like = model.model.norm.weight
    for part in model.modules():
        if hasattr(part, "variance_epsilon") and like.dtype != torch.float64:   # theirs rounds it
            part.__class__ = torch.nn.RMSNorm       # one kernel in place of theirs' seven
            part.normalized_shape, part.eps = part.weight.shape, part.variance_epsilon
        elif type(part) is torch.nn.Linear and like.dtype == torch.float32 and not like.is_cuda:
            part.__class__ = FewRowsLinear
    cache = MixerCache.allocate(model, *rows.tokens.shape, ring)
    if compiled:
        tuned = {"options": {"coordinate_descent_tuning": True}}        # 3 % faster, 15 s more
        how = tuned if compiled is True else {"backend": compiled}
        more = torch._dynamo.config.patch(recompile_limit=64)           # 8 shapes are soon used up
        cache.run_layer = more(torch.compile(run_layer, dynamic=False, **how))
    # 2. the prompts, padded on the left
    lengths = rows.length - 1                                           # (b,)
    longest = int(lengths.max())
    context = model.config.max_position_embeddings if cache.attention else math.inf
    require(longest < context, f"the prompt of {longest + 1} tokens exceeds a context of {context}")
    if longest > 0:
        at = lengths[:, None] + torch.arange(-longest, 0, device=lengths.device)    # (b,longest)
        prefill(model, rows.tokens.gather(1, at.clamp(min=0)), cache, (at >= 0).long())
    return model, cache

CAPTURE = threading.Lock()  # while a thread captures, no other may draw from the same generator
def as_graph(step, generator=None, device=None):
    """`step`, a function of static tensors, as a CUDA graph: the same kernels at the same places,
    all at once, without Python. It is called twice while no row is alive. -> replay"""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with CAPTURE:
        step()                          # compiles kernels
        with torch.cuda.graph(graph, None, torch.cuda.Stream(device), "thread_local"):
            step()
    return graph.replay

# ---- 5. Drafts. start: a new batch; propose: K tokens per row; settle: how many stand. --------

class Draft:
    """What Algorithm 2 asks of a draft; this one drafts nothing: K = 0 is plain decoding."""
    def start(self, target, rows, lookahead, sampling, ring, compiled):
        """A new batch."""
        self.rows = rows
        self.K = lookahead
        self.sampling = sampling

    def propose(self):
        """-> tokens (b,at most K), q (b,K,V) of which they were drawn; None: they are certain"""
        return self.rows.tokens[:, :0], None

    def settle(self, n_accepted):
        """How many (b,) of the proposed tokens stand: the others are rolled back."""

class ModelDraft(Draft):
    """A decoder, hybrid or plain, as a draft; its cache rolls back by the same commit."""
    def __init__(self, model):
        check_family(model, "draft")
        self.original = model

    def start(self, target, rows, lookahead, sampling, ring, compiled):
        """Read the prompts. ValueError where the vocabularies differ."""
        super().start(target, rows, lookahead, sampling, ring, compiled)
        V, wanted = self.original.config.vocab_size, target.config.vocab_size
        require(V == wanted, f"the draft's vocabulary of {V} must be the target's, of {wanted}")
        self.model, self.cache = start_decoding(self.original, rows, ring, compiled)

    def propose(self):
        """Draft K tokens, one call each. -> tokens (b,K), q (b,K,V) or None
        The draft has not read its own last token d_K. Where all K were accepted, the first call
        has two tokens, d_K and the emitted one; in other rows the second is padding."""
        rows = self.rows
        self.missing = (rows.length - self.cache.call.counts[1]).clamp(1, 2)    # (b,)
        at = (rows.length - self.missing)[:, None] + torch.arange(2, device=rows.length.device)
        logits = decode(self.model, rows.tokens.gather(1, at), self.cache, self.missing)
        logits = torch.where(self.missing[:, None] == 1, logits[:, 0], logits[:, 1])    # (b,V)
        tokens = []                                                             # K of (b,)
        qs = []                                                                 # K of (b,V)
        for k in range(self.K):
            if k > 0:
                logits = decode(self.model, tokens[-1][:, None], self.cache)[:, 0]      # (b,V)
            if self.sampling.temperature == 0:
                tokens.append(logits.argmax(-1))
            else:
                qs.append(self.sampling.probabilities(logits))
                tokens.append(self.sampling.draw(qs[-1]))
        return torch.stack(tokens, 1), torch.stack(qs, 1) if qs else None

    def settle(self, n_accepted):
        """The last drafted token was never read, so at most K - 1 of the accepted ones are kept."""
        self.cache.commit((self.missing + n_accepted.clamp(max=self.K - 1)) * self.rows.alive)

class NGramDraft(Draft):
    """Continues as the context did after an earlier occurrence of its last n tokens, else of fewer,
    two at least; the latest of the longest. In 7 8 1 7 8 it drafts 1 7 8 1 ..."""
    def __init__(self, n=3):
        require(n >= 1, f"ngram {n} must be at least 1")
        self.n = n

    def propose(self):
        """-> tokens (b,K), None; on the CPU (b,0), a plain step, when no row has a match."""
        length = self.rows.length
        tokens = self.rows.tokens[:, :None if length.is_cuda else int(length.max())]
        # 1. how many of the n tokens before each index are the row's last ones: 0..n
        windows = F.pad(tokens, (self.n, 0), value=-1).unfold(1, self.n, 1)     # (b,width+1,n)
        last = windows[torch.arange(len(length), device=length.device), length]     # (b,n)
        same = (windows == last[:, None]).flip(-1).long().cumprod(-1).sum(-1)   # (b,width+1)
        # 2. the longest match, of those the latest: length and index as the digits of one number
        index = torch.arange(windows.shape[1], device=length.device)
        fits = (same >= min(2, self.n)) & (index < length[:, None])             # (b,width+1)
        start = torch.where(fits, same * len(index) + index, 0).amax(-1) % len(index)   # (b,)
        # 3. its continuation; past the end of the context it repeats itself
        K = self.K if length.is_cuda or start.any() else 0
        step = torch.arange(K, device=length.device) % (length - start)[:, None]    # (b,K)
        return tokens.gather(1, start[:, None] + step), None

def LayerSubsetDraft(model, layers):
    """An ordinary model of a few of a model's layers, renumbered, with its embeddings, norm and
    head. The weights are shared: deepcopy it before training ("shrink and fine-tune")."""
    check_family(model, "draft")
    L = len(model.model.layers)
    require(layers and set(layers) <= set(range(L)) and len(set(layers)) == len(layers),
            f"draft layers {layers} must be different indices in 0..{L - 1}")
    draft = shared_copy(model)
    draft.model.layers = torch.nn.ModuleList([draft.model.layers[i] for i in layers])
    for j, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = j
    for config, old in [(draft.config, model.config), (draft.model.config, model.model.config)]:
        config.num_hidden_layers = len(layers)
        if getattr(old, "layer_types", None):
            config.layer_types = [old.layer_types[i] for i in layers]
    if hasattr(model.config, "attn_layers"):
        kept = [j for j, i in enumerate(layers) if i in model.config.attn_layers]
        draft.config.attn_layers = kept
        draft.config.layer_types[0] = draft.config.layer_types[0] if kept else "hybrid"
    return draft

# ---- 6. Algorithm 2: SPECULATE drafts, VERIFY checks all drafted tokens in one call. ----------

def first_conflict(agrees):
    """FirstConflict: how many tokens stand before the first that does not. agrees (b,K) -> (b,)"""
    return agrees.long().cumprod(-1).sum(-1)

def accept(logits, drafted, q, sampling, simulate=None):
    """Which drafted tokens stand, and the token after them, with exactly the target's distribution.
    Temperature 0: stand while they are the target's argmax. Else (Leviathan et al., 2211.17192)
    d_i stands with probability min(1, p_i(d_i) / q_i(d_i)); at the first that does not, draw from
    max(0, p_i - q_i), normalised; where all stand, from p_{K+1}, as if q were 0 there.
    Why that is p: d is drafted and stands with q min(1, p / q) = min(p, q), which p exceeds by
    max(0, p - q); and sum max(0, p - q) = 1 - sum min(p, q), the chance that nothing stood.
    simulate: SIMULATED acceptance for timing, each token stands with this probability.
    logits (b,K+1,V)  drafted (b,K)  q (b,K,V) or None -> n_accepted (b,), next token (b,)"""
    b, K = drafted.shape
    row = torch.arange(b, device=drafted.device)
    if sampling.temperature == 0 or simulate is not None:
        chosen = logits.argmax(-1)                                              # (b,K+1)
        agrees = drafted == chosen[:, :K]                                       # (b,K)
        if simulate is not None:
            agrees = torch.rand(b, K, device=drafted.device) < simulate
        n = first_conflict(agrees)
        return n, chosen[row, n]
    p = sampling.probabilities(logits)                                          # (b,K+1,V)
    q = F.one_hot(drafted, p.shape[-1]) if q is None else q                     # (b,K,V)
    q = F.pad(q, (0, 0, 0, 1))                                                  # (b,K+1,V)
    p_d = p[:, :K].gather(2, drafted[..., None])[..., 0]                        # (b,K)
    q_d = q[:, :K].gather(2, drafted[..., None])[..., 0]                        # (b,K)
    u = torch.empty_like(p_d).uniform_(generator=sampling.generator)
    n = first_conflict(u * q_d < p_d)
    p_n = p[row, n]                                                             # (b,V)
    rest = (p_n - q[row, n]).clamp(min=0)                                       # (b,V)
    # p <= q everywhere happens by rounding only, when p = q; then any draw is right: take p
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)
    return n, sampling.draw(rest)

def verify(model, cache, rows, drafted, q, sampling, simulate=None):
    """VERIFY: one multi-step call on [last token, K drafted ones], then FirstConflict.
    The paper's MultiStep(h_i, y_{1:k}, i, j, k) is `decode`: the cache holds h_i and the inputs of
    i..j to replay. drafted (b,K)  q (b,K,V) or None -> n_accepted (b,), next token (b,)"""
    last = rows.tokens.gather(1, rows.length[:, None] - 1)                      # (b,1)
    logits = decode(model, torch.cat((last, drafted), 1), cache)                # (b,K+1,V)
    return accept(logits, drafted, q, sampling, simulate)

def one_round(model, cache, draft, rows, sampling, simulate=None, on_round=None):
    """A round of SPECULATE: draft, VERIFY, commit, emit."""
    # 1. the draft goes ahead by K tokens
    drafted, q = draft.propose()                                                # (b,K)
    # 2. the target looks at all of them in one call, and says the token at the first conflict
    n, token = verify(model, cache, rows, drafted, q, sampling, simulate)       # (b,), (b,)
    if on_round is not None:
        on_round(rows, drafted, n, token)
    # 3. the last token and n drafted ones stand, in both caches; the others are not counted. The
    #    paper goes on from h_k, or from h_j after a conflict: here that is this number
    cache.commit((n + 1) * rows.alive)
    draft.settle(n)
    # 4. n drafted tokens and the target's own are emitted
    block = F.pad(drafted, (0, 1)).scatter(1, n[:, None], token[:, None])       # (b,K+1)
    rows.append(block, n + 1)

@torch.no_grad()
def speculative_decode(target, draft, input_ids, max_new_tokens, lookahead=4, temperature=0.0,
                       top_k=0, top_p=1.0, eos_token_id=None, generator=None, ring=None,
                       simulate=None, on_round=None, compiled=False):
    """Algorithm 2, SPECULATE: draft K tokens, VERIFY them, until every row has ended, each in
    its time. On CUDA a round is one captured graph.
    target, draft: hybrids or plain decoders; draft: or a `Draft`. input_ids: (b,l), or b tensors of
    different lengths. eos_token_id: None, an id or several. ring: most tokens that a state lacks.
    simulate: see `accept`. on_round: called with (rows, drafted, n_accepted, token) before tokens
    are emitted. compiled: see `start_decoding`. ValueError if something is wrong -> DecodeResult"""
    require(type(draft) is Draft or lookahead >= 1, f"lookahead {lookahead} must be at least 1")
    ring = ring or (16 if lookahead < 8 else 32)    # room for two rounds: not each one flushes
    require(lookahead + 1 <= ring, f"lookahead {lookahead} + 1 exceeds the ring of {ring}")
    check_family(target, "target")
    sampling = Sampling(temperature, top_k, top_p, generator)
    rows = read_request(target, input_ids, max_new_tokens, lookahead, eos_token_id)
    # a draft of the caller's keeps nothing of this call, so that threads may share it
    draft = copy.copy(draft) if hasattr(draft, "propose") else ModelDraft(draft)
    model, cache = start_decoding(target, rows, ring, compiled)
    draft.start(target, rows, lookahead, sampling, ring, compiled)
    step = partial(one_round, model, cache, draft, rows, sampling, simulate, on_round)
    if rows.alive.is_cuda and on_round is None:
        step = as_graph(step, generator, rows.alive.device)
    rows.alive.fill_(True)
    begin = time.perf_counter()
    while rows.alive.any():                 # the one thing in a round that the host waits for
        step()
    return rows.result(max_new_tokens, time.perf_counter() - begin)

def generate(target, input_ids, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
             eos_token_id=None, generator=None, compiled=False):
    """Plain decoding, the oracle and the denominator of every speed-up: rounds without a draft.
    On a GPU a ring of 16 saves most writes of the state, on a CPU a short one saves operations."""
    ring = 16 if target.get_input_embeddings().weight.is_cuda else 1
    return speculative_decode(target, Draft(), input_ids, max_new_tokens, 0, temperature, top_k,
                              top_p, eos_token_id, generator, ring, compiled=compiled)

# ---- 7. The authors' released checkpoints (both formats) in our Mixer, tensor by tensor. ------
# Our tensors inside `self_attn.` and those inside their `mamba.` that they are made of, where it
# is not one of the same name. Their projections have no biases; what their Mamba2 reads with one
# matrix, their Mamba reads with five: the rows of our in_proj, in this order.
MADE_OF = {
    "mamba2": {"norm_weight": ["norm.weight"], "in_proj.bias": [], "out_proj.bias": []},
    "mamba": {"in_proj.weight": ["in_proj_z.weight", "in_proj_x.weight", "B_proj.weight",
                                 "C_proj.weight", "dt_proj_down.weight"],
              "dt_bias": ["dt_proj.bias"], "in_proj.bias": [], "out_proj.bias": []}}

def authors_tensors(folder, model):
    """{our name: tensor} of a checkpoint."""
    kind = model.config.mixer
    theirs = {}
    for file in [*Path(folder).glob("*.safetensors")] or Path(folder).glob("pytorch_model*.bin"):
        theirs.update(load_state_dict(file))
    require(theirs, "it holds neither safetensors nor pytorch_model.bin")
    ours = {}
    for name, p in model.named_parameters():
        layer, _, inside = name.partition(".self_attn.")
        parts = [name]                              # as in the teacher, also where attention stays
        if inside and int(layer.rpartition(".")[2]) in model.mixers():
            parts = [f"{layer}.mamba.{part}" for part in MADE_OF[kind].get(inside, [inside])]
        require(theirs.keys() >= set(parts), f"it lacks {parts}")
        # of in_proj: z (d_inner,D), x (d_xb,D), B (d_xb,D), C (d_inner,D), dt (rank,D)
        tensor = torch.cat([theirs.pop(i) for i in parts]) if parts else torch.zeros(p.shape)
        require(tensor.shape == p.shape, f"{name} has shape {(*tensor.shape,)}")
        if kind == "mamba" and inside == "dt_bias":
            tensor = 2 * tensor                     # added twice by their code, and trained so
        ours[name] = tensor.to(p.dtype)
    for name in theirs:
        require(name == "lm_head.weight" or "rotary_emb" in name, f"{name} is no tensor of {kind}")
    return ours

@torch.no_grad()
def load_authors_checkpoint(directory_or_hub_name, dtype=None):
    """A checkpoint of jxiw/MambaInLlama, Mamba or Mamba2, as a HybridForCausalLM on the CPU, in
    bfloat16 unless said otherwise. ValueError, in one line, for whatever cannot be read as one."""
    folder = directory_or_hub_name
    with M.reading(folder, "a checkpoint of the authors"):
        # 1. config.json (the teacher's) and mamba_config.json: shapes without memory
        folder = folder if os.path.isdir(folder) else snapshot_download(folder)
        theirs = json.loads(Path(folder, "mamba_config.json").read_text())
        ssm = theirs.get("ssm_cfg") or {}
        mamba2 = "ngroups" in ssm or ssm.get("layer") == "Mamba2"
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = M.convert_to_hybrid(
                AutoModelForCausalLM.from_config(config, dtype=dtype or torch.bfloat16),
                theirs["attn_layers"], "mamba2" if mamba2 else "mamba", "paper",
                ssm.get("d_state", None if mamba2 else 16), d_conv=ssm.get("d_conv", 4),
                group_by_state=not mamba2).eval()
        for mixer in model.mixers().values():
            require(theirs.get("d_xb") in (None, mixer.d_xb), f"d_xb {theirs.get('d_xb')}")
        # 2. the tensors
        model.load_state_dict(authors_tensors(folder, model), strict=False, assign=True)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(model.model.config)   # in no file
        if Path(folder, "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model

# ---- 8. The command line. ---------------------------------------------------------------------

def load(name):
    """A model (ours, the authors' or a plain decoder) and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    authors = False
    with suppress(Exception):                       # M.read_model says what is wrong
        authors = has_file(name, "mamba_config.json")
    if authors:
        model = load_authors_checkpoint(name, torch.float32 if device == "cpu" else None)
        with M.reading(name, "a tokenizer beside the model"):
            return model.to(device), AutoTokenizer.from_pretrained(name)
    return M.read_model(name, device)

def read_draft(spec, target):
    """DIR, layers:0,10,20,29 or ngram:3 -> a draft"""
    kind, _, value = spec.partition(":")
    if kind not in ("layers", "ngram"):
        return load(spec)[0]
    ids = [value] if kind == "ngram" else value.split(",")
    require(all(v.isdecimal() for v in ids), f"draft {spec}: want layers:I,J,... or ngram:N")
    return NGramDraft(int(value)) if kind == "ngram" else LayerSubsetDraft(target, [*map(int, ids)])

def read_prompt(text, target, tokenizer, raw):
    """A user's turn where there is a chat template, unless `raw`. -> ids (l,), its end tokens"""
    both = [target.generation_config.eos_token_id, tokenizer.eos_token_id]      # int, list or None
    ends = [i for ids in both if ids is not None for i in torch.tensor(ids).view(-1).tolist()]
    if tokenizer.chat_template and not raw:
        chat = M.Chat(tokenizer)
        ends.append(chat.end)
        ids = chat.ids(M.turns_of(text), add_generation_prompt=True)
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]           # with its special tokens
    return torch.tensor(ids, device=target.device), ends

def show_round(tokenizer, rows, drafted, n, token):
    """An `on_round` that prints what row 0 makes of its drafted tokens, for 16 rounds: what stands,
    what falls, what the target says instead; in colour on a terminal, else [-fallen-] {+said+}."""
    if not rows.alive[0] or rows.tally[0] > 15:
        return
    marks = ["{}", "[-{}-]", "{{+{}+}}"]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        marks = ["\033[32m{}\033[0m", "\033[31;9m{}\033[0m", "\033[1;36m{}\033[0m"]
    drafted = drafted[0].tolist()
    line = f"  round {rows.tally[0] + 1:>2}: {n[0]} of {len(drafted)} stand  "
    for mark, ids in zip(marks, [drafted[:n[0]], drafted[n[0]:], token[:1].tolist()]):
        line += mark.format(repr(tokenizer.decode(ids))[1:-1]) if ids else ""
    print(line)

def answer(args):
    """Decode a prompt plainly and with a draft, --tiny: with each kind of draft, by the hybrid of
    `mamba_in_llama.py --tiny`; print text, rounds and rates. -> rows that --json writes"""
    specs = [args.draft]
    if args.tiny:
        if not os.path.exists("tiny_run/mamba/tokenizer_config.json"):      # what it writes last
            M.main(["--tiny"])                      # about a minute
        args.target = "tiny_run/mamba2"
        args.prompt = args.prompt or "The standard exception classes that a program can"
        specs = ["layers:0,3", "ngram:3", "tiny_run/teacher", "tiny_run/mamba"]
    target, tokenizer = load(args.target)
    drafts = {spec: read_draft(spec, target) for spec in specs}
    prompt, ends = read_prompt(args.prompt, target, tokenizer, args.raw)        # (l,)
    table = []
    for name, draft in {"no draft": None, **drafts}.items():
        draw = torch.Generator(prompt.device).manual_seed(args.seed)
        settings = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                        top_k=args.top_k, top_p=args.top_p, eos_token_id=ends, generator=draw)
        if draft is None:
            made = plain = generate(target, prompt, compiled=args.compile, **settings)
            print(tokenizer.decode(made.tokens[0], skip_special_tokens=True).strip())
        else:
            print(f"\n{name}: drafted tokens that stand, those that fall, what the target says")
            run = partial(speculative_decode, target, draft, prompt, lookahead=args.lookahead)
            run(on_round=partial(show_round, tokenizer), **settings)
            made = run(compiled=args.compile, **settings)
        table.append({"draft": name, **vars(made), "tokens": made.tokens[0].tolist(),
                      "speed_up": made.tokens_per_second / plain.tokens_per_second,
                      "identical": torch.equal(made.tokens[0], plain.tokens[0])})
        print("{draft}: # Gen {tokens_per_round:.2f}, {accepted} of {drafted} stand, speed-up "
              "{speed_up:.2f}, {tokens_per_second:.1f}/s, same: {identical}".format(**table[-1]))
    return table

def make_draft(args):
    """--make-draft layers:...: shrink and fine-tune on the target's own answers, save. -> rows"""
    require(not os.path.exists(args.out), f"--out {args.out} exists: want a new directory")
    target, tokenizer = load(args.target)
    draft = copy.deepcopy(read_draft(args.make_draft, target)).float()      # bf16 would round
    chat = M.Chat(tokenizer)
    how = M.SETTINGS[target.device.type]
    tokens = M.sample(target, chat.user_start, 10 ** 5, how["length"],
                      how["sampled"], seconds=18 * args.minutes)                # (n,length)
    rows, = M.with_answers(args.target, how["length"], (tokens, chat.label(tokens)))
    losses = M.distil("draft", draft, target, *rows, seconds=36 * args.minutes,
                      batch_size=how["batch"], lr=3e-3, alpha=0)     # KL alone: more stand
    draft.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; saved to {args.out}")
    return losses

def parse_args(argv):
    """The flags; ValueError for values that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = partial(require, False)
    add = parser.add_argument
    add("--tiny", action="store_true", help="every kind of draft on the hybrid in ./tiny_run")
    add("--target", help="directory or hub name: a hybrid, a plain decoder, the authors' format")
    add("--draft", default="ngram:3", help="DIR, layers:0,10,20,29 or ngram:N (default: ngram:3)")
    add("--prompt", help="the text to answer")
    add("--raw", action="store_true", help="no chat template around the prompt")
    add("--lookahead", type=int, default=4, help="tokens drafted a round, K (default: 4)")
    add("--temperature", type=float, default=0.0, help="default: 0, greedy")
    add("--top-k", type=int, default=0, help="likeliest tokens that are kept (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="probability that is kept (default: 1)")
    add("--max-new-tokens", type=int, default=128, help="budget, tokens (default: 128)")
    add("--compile", action="store_true", help="run layers through torch.compile (CUDA)")
    add("--seed", type=int, default=0, help="of every draw (default: 0)")
    add("--json", help="write the rows of the table to this file")
    add("--make-draft", help="layers:0,10,20,29: shrink and fine-tune --target, write it to --out")
    add("--out", help="--make-draft: the directory to write")
    add("--minutes", type=float, default=10, help="--make-draft: minutes for all (default: 10)")
    args = parser.parse_args(argv)
    Sampling(args.temperature, args.top_k, args.top_p)              # raises before models load
    require(args.minutes > 0, f"--minutes {args.minutes} must be above 0")
    task = args.prompt or args.make_draft
    require(args.tiny or args.target and task, "give --tiny, or --target and --prompt")
    used = {"make_draft", "target", "out", "minutes", "json", "tiny"}
    idle = vars(args).keys() - used if args.make_draft else {"out", "minutes"}
    fixed = ["target", "draft", "make_draft"] if args.tiny else []
    for name in [*sorted(idle), *fixed]:
        flag = name.replace("_", "-")
        require(getattr(args, name) == parser.get_default(name), f"--{flag} does nothing here")
    require(not os.path.isdir(args.json or ""), f"--json {args.json} is a directory")
    require(not args.make_draft or args.out and args.make_draft[:7] == "layers:",
            f"--make-draft {args.make_draft}: want layers:I,J, and --out")
    with M.reading(f"--json {args.json}", "a path that can be written"):
        os.makedirs(os.path.dirname(os.path.abspath(args.json or "x")), exist_ok=True)
    require(1 <= args.lookahead <= 31, f"--lookahead {args.lookahead}: 1..31, a ring of 32 less 1")
    require(not args.compile or torch.cuda.is_available(), "--compile wants a CUDA device")
    return args

def main(argv=None):
    """Run the command line. -> the rows that --json writes"""
    args = parse_args(argv)
    rows = make_draft(args) if args.make_draft else answer(args)
    if args.json:
        M.write_whole(args.json, lambda file: file.write(json.dumps(rows, indent=1).encode()))
    return rows

if __name__ == "__main__":
    M.cli(main)
