"""All tests of the project, on a CPU and without a network: python -m pytest test_all.py

Models are small and mostly compute in float64, where two correct ways to the same number agree to
1e-9 and a wrong one does not. The Triton kernels run in Triton's interpreter (on CUDA, where there
is one); all other tests use the PyTorch form. `mamba_in_llama.py --tiny` runs once; what it leaves
is the teacher of the tests of command lines (TINY_RUN=DIR: the tiny_run of that directory). A
test's name or docstring says what it promises.

Contents:  1 helpers   2 scan, bridge to attention   3 step kernel, MultiStep   4 the cache that
           rolls back   5 conversion   6 losses, evaluation, choice of layers   7 training
           8 saving, forward and generate()   9 chat templates   10 command line, files, kill and
           resume   11 Algorithm 2   12 the authors' checkpoints   13 README, debugger
"""

import argparse
import collections
import copy
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
from tokenizers.processors import TemplateProcessing  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AttentionInterface, LlamaConfig  # noqa: E402

import mamba_in_llama as M  # noqa: E402
import spec_decode as S  # noqa: E402
from mamba_in_llama import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)                    # models decode by the PyTorch form
if __name__ != "__main__":                                  # not for the laboratory
    torch.set_num_threads(1)                                # small models: threads only wait
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

HERE = os.path.dirname(os.path.abspath(__file__))
MIXERS = ["mamba2", "mamba"]
V = 97                                                      # vocabulary of the small models
both = pytest.mark.parametrize("mixer", MIXERS)

# ---- 1. Helpers. ------------------------------------------------------------------------------

def make_teacher(kind="llama", layers=4, kv=2, tied=False, dtype=torch.float64, seed=0, **fields):
    """A random teacher of width 64 with 4 heads of 16, whose attention is far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**dict(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv, max_position_embeddings=256,
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
def make_student(attn_layers=None, mixer="mamba2", recipe="near_linear", d_state=None, **fields):
    """A hybrid whose mixers are random around their start (identity conv, open gate, no bias)."""
    student = M.convert_to_hybrid(make_teacher(**fields), attn_layers, mixer, recipe, d_state)
    torch.manual_seed(0)
    for p in [p for new in student.mixers().values() for p in new.parameters()]:
        p.add_(0.1 * torch.randn_like(p))
    return student

def draw(b, l, seed=0):
    return torch.randint(V, (b, l), generator=torch.Generator().manual_seed(seed))

def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)

def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}

def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)

def left_pad(rows, filler=0):
    """Lists of ids of different lengths -> tokens, attention_mask (b,l), padded on the left."""
    l = max(map(len, rows))
    return (torch.tensor([[filler] * (l - len(r)) + r for r in rows]),
            torch.tensor([[0] * (l - len(r)) + [1] * len(r) for r in rows]))

@torch.no_grad()
def next_logits(model, row, n=1):
    """The last n logits of one unpadded row, by a plain forward. -> (n,V)"""
    logits = model(torch.tensor([row]), use_cache=False).logits[0]
    return logits[len(logits) - n:]

def greedy_loop(model, row, n):
    """n more tokens by argmax of a whole forward each. -> ids"""
    for _ in range(n):
        row = [*row, int(next_logits(model, row).argmax())]
    return row

def refuses(line, act, *args, **kwargs):
    """`act` ends in a ValueError of one line that this pattern is found in."""
    with pytest.raises(ValueError, match=line) as caught:
        act(*args, **kwargs)
    assert "\n" not in str(caught.value)

@contextmanager
def kernels():
    """Where Triton kernels run: on the GPU, or on the CPU in the interpreter."""
    with pytest.MonkeyPatch.context() as patch, torch.device(DEVICE):
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield

def python(*argv, cwd, here=False, **more):
    """Python in a process of its own, which finds this project only if `here`. more: env, input"""
    typed = more.pop("input", None)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
             if path and not os.path.exists(f"{path}/mamba_in_llama.py")] + [HERE] * here
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", **more}
    env["OMP_WAIT_POLICY"] = "PASSIVE"              # or threads spin where other programs run
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, text=True, input=typed,
                          capture_output=True, timeout=600)

# ---- 2. The scan, and the bridge to attention. ------------------------------------------------

def scan_inputs(mixer, b=2, l=13, H=3, P=4, N=4):
    """x, delta, A, B, C, state as the mixers make them, in float64."""
    torch.manual_seed(0)
    p, n = (1, 1) if mixer == "mamba2" else (P, N)
    shapes = (b, l, H, P), (b, l, H, p), (H, p, n), (b, l, H, N), (b, l, H, N), (b, H, P, N)
    x, delta, A, B, C, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, F.softplus(delta), -A.exp(), B, C, state]

@pytest.mark.parametrize("scan", [M.recurrence, M.chunked_scan])
def test_scan_by_hand(scan):
    """One head, P = 1, N = 2, A = -ln 2, so that decay = 2^-Delta; C = (1, 1) sums the state.

    t  Delta  decay  x  B       h = decay h + Delta x B                    y
    1    1     1/2   1  (1,0)   (1, 0)                                     1
    2    1     1/2   2  (0,1)   (1/2, 0) + 2 (0,1)   = (1/2, 2)            2.5
    3    2     1/4   4  (1,1)   (1/8, 1/2) + 8 (1,1) = (8.125, 8.5)       16.625
    """
    x, delta = torch.tensor([[1.0, 2, 4], [1, 1, 2]]).double().view(2, 1, 3, 1, 1)
    B = torch.tensor([1.0, 0, 0, 1, 1, 1]).double().view(1, 3, 1, 2)
    A = torch.full((1, 1, 1), -math.log(2), dtype=torch.float64)
    y, state = scan(x, delta, A, B, torch.ones_like(B))
    close(y.flatten(), torch.tensor([1, 2.5, 16.625]).double())
    close(state.flatten(), torch.tensor([8.125, 8.5]).double())

@both
@pytest.mark.parametrize("l,chunk", [(1, 4), (3, 64), (13, 1), (13, 5), (16, 4), (65, 64)])
def test_chunked_scan_is_the_recurrence(mixer, l, chunk):
    """Values, final state and all gradients, in float64; a token with Delta 0 does nothing."""
    inputs = scan_inputs(mixer, l=l)
    inputs[1][0, :2] = 0
    weights, found = [torch.randn_like(inputs[i]) for i in (0, 5)], []      # as y, as the state
    scans = M.recurrence, M.recurrence_doubling, functools.partial(M.chunked_scan, chunk=chunk)
    for scan in scans:
        given = [v.clone().requires_grad_() for v in inputs]
        y, state = scan(*given)
        loss = (weights[0] * y).sum() + (weights[1] * state).sum()
        found.append((y, state, *torch.autograd.grad(loss, given)))
    close(found[0], found[1])
    close(found[0], found[2])

@both
def test_scan_survives_strong_decay(mixer):
    """exp(-3000) is 0: nothing may be divided by it, in float32 and over many chunks."""
    x, delta, A, B, C, _ = (v.float() for v in scan_inputs(mixer, l=200))
    inputs = [v.requires_grad_() for v in (x, delta * 30, A * 100, B, C)]
    y, _ = M.chunked_scan(*inputs, chunk=16)
    close(y, M.recurrence(*inputs)[0], 1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))

def linearized_attention(module, q, k, v, mask, scaling, **kwargs):
    """Attention without its softmax, (tril(Q K^T / sqrt(head_dim)) V), but in layer 1.
    q (b,H,l,d)  k, v (b,G,l,d) -> (b,l,H,d)"""
    if module.layer_idx == 1:
        return AttentionInterface()["sdpa"](module, q, k, v, mask, scaling=scaling, **kwargs)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return ((q @ k.mT * scaling).tril() @ v).transpose(1, 2), None

@both
@pytest.mark.parametrize("kind,kv", [("llama", 2), ("llama", 4), ("mistral", 1), ("qwen2", 2)])
@torch.no_grad()
def test_bridge_a_mixer_without_decay_is_linearized_attention(mixer, kind, kv):
    """near_linear (identity taps, open gate, D = 0) with Delta = 1, A = 0: only softmax is gone."""
    teacher = make_teacher(kind, layers=3, kv=kv)
    student = M.convert_to_hybrid(teacher, [1], mixer)
    for new in student.mixers().values():
        new.in_proj.weight[-new.rows[-1]:] = 0                              # dt
        new.dt_bias.fill_(math.log(math.e - 1))                             # softplus gives 1
        new.A_log.fill_(-math.inf)
    AttentionInterface.register("linearized_attention", linearized_attention)
    teacher.config._attn_implementation = "linearized_attention"
    close(student(draw(2, 37)).logits, teacher(draw(2, 37)).logits)

# ---- 3. The step kernel and MultiStep, in the interpreter or on a GPU. ------------------------

@both
@pytest.mark.parametrize("l,P,N,dtype", [
    (1, 16, 16, torch.float32), (5, 16, 16, torch.bfloat16), (3, 20, 5, torch.float32),
    (2, 48, 80, torch.float32)])
def test_step_kernel_is_the_recurrence(mixer, l, P, N, dtype):
    """Outputs and the state, in place; padding before a row, sizes that are no powers of two."""
    x, delta, A, B, C, state = scan_inputs(mixer, 2, l, 2, P, N)
    delta[0, 0] = 0
    x, B, C = (v.to(dtype) for v in (x, B, C))
    delta, A, state = (v.float() for v in (delta, A, state))
    want, end = M.recurrence(*(v.double() for v in (x, delta, A, B, C, state)))
    with kernels():
        x, delta, A, B, C, state = (v.to(DEVICE) for v in (x, delta, A, B, C, state))
        y = M.run_step_kernel(x, delta, A, B, C, state)
    close(y.cpu().double(), want, 1e-5 if dtype == torch.float32 else 2e-2)
    close(state.cpu().double(), end, 1e-5)

@both
def test_kernels_change_no_caller_s_state_and_leave_training_alone(mixer):
    """A decoding step works on a copy of the state; what is trained gets its gradients."""
    with kernels():
        inputs = [v.float().to(DEVICE) for v in scan_inputs(mixer, l=1)]
        inputs[5] = inputs[5].mT.contiguous().mT    # strides that a kernel does not know
        state = inputs[5].clone()
        with torch.no_grad():
            close(M.chunked_scan(*inputs), M.recurrence(*inputs), 1e-5)
        assert torch.equal(inputs[5], state)
        y, _ = M.chunked_scan(*(v.requires_grad_() for v in inputs))
        assert all(g.any() for g in torch.autograd.grad(y.sum(), inputs))

def random_round(rng, ring, b):
    """The calls between two commits, of `ring` tokens at most. -> [(T, n_valid (b,))]"""
    calls = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        if ring:
            T = rng.randint(1, ring)
            fewest = rng.choice([0, T])             # all rows bring T, or each its own number
            n_valid = [rng.randint(fewest, T) for _ in range(b)]
            calls.append((T, torch.tensor(n_valid, dtype=torch.int32)))
            ring -= T
    return calls

@kernels()
def schedule(mixer, run, dtype, seed, ring=16, b=3, rounds=8, runs=1, H=4, G=2, P=16, N=16):
    """Random rounds of MultiStep calls and commits, against `recurrence` in float64 over the
    tokens that stand; `run` is `multi_step` or its definition. Rows bring different numbers of
    tokens and accept different numbers; several calls may stand before one commit.
    -> the largest errors of outputs and of the final state, over the largest values"""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    p, n = (1, 1) if mixer == "mamba2" else (P, N)
    G, fold_at = (G, ring) if mixer == "mamba2" else (H, 0)     # Mamba's rings are per head
    A = -torch.rand(H, p, n, dtype=wide) * 4 - 0.01
    state = torch.zeros(b, H, P, N, dtype=wide)
    slots = 2 * ring + rng.randrange(4)
    rings = [torch.full((b, slots, h, k), 7, dtype=kind) for h, k, kind in (
        (G, P, dtype), (H, p, wide), (G, N, dtype))]
    counts = torch.zeros(3, b, dtype=torch.int32)
    stands = torch.zeros(b, H, P, N, dtype=torch.float64)
    pending = [[] for _ in range(b)]                # (x, delta, B, C) of each row's tokens
    errors, sizes = [], []                          # of outputs
    def reference(r, tokens):
        """Row r from what stands, over these tokens. -> y (1,l,H,P), state (1,H,P,N)"""
        x, delta, B, C = (torch.stack(v)[None].double() for v in zip(*tokens))
        x, B = M.to_heads(x, H, runs), M.to_heads(B, H, runs)
        return M.recurrence(x, delta, A.double(), B, C, stands[r:r + 1])
    flush = [(ring, torch.zeros(b, dtype=torch.int32))]         # folds everything into the state
    for calls in [*(random_round(rng, ring, b) for _ in range(rounds)), flush, flush]:
        for T, n_valid in calls:
            x, B, C = (torch.randn(b, T, h, k).to(dtype) for h, k in ((G, P), (G, N), (H, N)))
            delta = F.softplus(torch.randn(b, T, H, p) - 1).to(wide)
            base, committed, waiting = counts
            first = committed + waiting
            for into, v in zip(rings, (x, delta, B)):
                into[torch.arange(b)[:, None], (first[:, None] + torch.arange(T)) % slots] = v
            y = run(C, A, state, *rings, counts, fold_at, runs)
            assert y.dtype == dtype and y.shape == (b, T, H, P)
            for r, k in enumerate(n_valid.tolist()):
                pending[r] += [(x[r, t], delta[r, t], B[r, t], C[r, t]) for t in range(k)]
                if k:
                    want = reference(r, pending[r])[0][0, -k:]
                    errors.append((y[r, :k].double() - want).abs().max().item())
                    sizes.append(want.abs().max().item())
            counts[0] = torch.where(first - base + T > fold_at, committed, base)
            counts[2] += n_valid
        for r, tokens in enumerate(pending):
            accepted = rng.randint(0, len(tokens))
            if accepted:
                stands[r] = reference(r, tokens[:accepted])[1][0]
            counts[1, r] += accepted
            tokens.clear()
        counts[2] = 0
    error = (state.double() - stands).abs().max() / stands.abs().max()
    return max(errors) / max(sizes), error.item()

@both
@pytest.mark.parametrize("ring", [1, 5, 16, 32])
@pytest.mark.parametrize("runs,H,G", [(1, 4, 2), (2, 8, 4), (1, 3, 1)])
def test_multi_step_is_the_recurrence_over_what_stands(mixer, ring, runs, H, G):
    """Any schedule, ring, flush and grouping: the definition in float64, the kernels in float32."""
    definition = S.multi_step_definition
    assert max(schedule(mixer, definition, torch.float64, 0, ring, 3, 30, runs, H, G, 3, 5)) < 1e-10
    if runs == 1 + ring % 2:                        # the interpreter takes its time
        assert max(schedule(mixer, S.multi_step, torch.float32, 1, ring, 2, 3, runs)) < 1e-5

@both
@pytest.mark.parametrize("P,N", [(16, 128), (128, 16), (48, 32), (32, 80), (64, 64)])
def test_multi_step_kernels_in_bf16_at_all_sizes(mixer, P, N):
    """The state stays at fp32's precision, outputs are rounded to bf16 once; on a GPU many programs
    run, where one could overwrite what another still replays."""
    b, H = (64, 8) if DEVICE == "cuda" else (1, 2)
    y, state = schedule(mixer, S.multi_step, torch.bfloat16, 3, 4, b, 3, H=H, G=H // 2, P=P, N=N)
    assert y < 8e-3 and state < 1e-5

# ---- 4. The cache that rolls back: prefill, decode and commit in any pattern = one forward. ---

@kernels()
def follow_schedule(model, seed, ring, rounds=6, prompts=(5, 1, 8), tol=1e-9):
    """Random decode and commit, every logit against a forward of the tokens that stand. Rows bring
    different numbers of tokens, accept different numbers, some of them 0; several decodes may
    stand before a commit. (float64 goes to no kernel.)"""
    rng = random.Random(seed)
    b, cache = len(prompts), S.MixerCache.allocate(model, len(prompts), 64, ring)
    rows = [[rng.randrange(V) for _ in range(n)] for n in prompts]
    if all(prompts):
        tokens, mask = left_pad(rows)
        logits = S.prefill(model, tokens, cache, mask)
        for r, row in enumerate(rows):
            close(logits[r], next_logits(model, row), tol)
    for _ in range(rounds):
        pending = [[] for _ in rows]
        for T, n_valid in random_round(rng, ring, b):
            tokens = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in rows])
            logits = S.decode(model, tokens, cache, None if n_valid.min() == T else n_valid)
            for r, n in enumerate(n_valid.tolist()):
                pending[r] += tokens[r, :n].tolist()
                if n:
                    close(logits[r, :n], next_logits(model, rows[r] + pending[r], n), tol)
        accepted = [rng.randint(0, min(len(p), 40 - len(row))) for p, row in zip(pending, rows)]
        cache.commit(torch.tensor(accepted))
        for row, p, n in zip(rows, pending, accepted):
            row += p[:n]
        assert cache.call.counts[1].tolist() == [len(row) for row in rows]

SLIDING = {"llama": {}, "mistral": dict(kind="mistral", sliding_window=4), "qwen2": dict(
    kind="qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1)}  # layer 1 only

@both
@pytest.mark.parametrize("layers,fields", [
    ([1], {}), ([1], dict(recipe="paper")), ([0, 1], {}), ([], {}), ([1], dict(kv=4)),
    ([0], dict(kind="qwen2", kv=1)), ([0, 1], SLIDING["mistral"]), ([0, 1], SLIDING["qwen2"]),
    ([0, 1], {**SLIDING["qwen2"], "max_window_layers": 2}), ([], dict(d_state=8)),
    ([1], dict(d_state=4)),
    ([1], dict(attn_implementation="eager")), ([1], dict(dtype=torch.float32))])
def test_decode_is_forward(mixer, layers, fields):
    """Half, all, no attention; families, windows, small states, eager; by the kernels in fp32."""
    student = make_student(layers, mixer, layers=2, **fields).to(DEVICE)
    tol = 1e-4 if "attn_implementation" in fields or "dtype" in fields else 1e-9
    for ring in (1, 2, 6, 16) if tol == 1e-9 else (6,):         # the interpreter takes its time
        follow_schedule(student, ring, ring, tol=tol)
    if layers == [0, 1]:                            # plain decoders get the same cache
        follow_schedule(make_teacher(layers=2, **fields).to(DEVICE), 1, ring=6)
    follow_schedule(student, 2, ring=3, prompts=(0, 0), tol=tol)    # an empty cache is fine

@pytest.mark.parametrize("line,act", [
    ("empty", lambda s, c: S.prefill(s, draw(2, 0), c)),
    ("65.*64", lambda s, c: S.prefill(s, draw(2, 65), c)),
    ("empty cache", lambda s, c: [S.prefill(s, draw(2, 3), c) for _ in range(2)]),
    ("left", lambda s, c: S.prefill(s, draw(2, 3), c, torch.tensor([[1, 1, 0], [1, 1, 1]]))),
    (r"2, 4.*2, 3", lambda s, c: S.prefill(s, draw(2, 3), c, torch.ones(2, 4).long())),
    (f"{V}.*vocabulary", lambda s, c: S.prefill(s, torch.full((2, 3), V), c)),
    ("-1.*vocabulary", lambda s, c: S.decode(s, torch.full((2, 3), -1), c)),
    ("9.*ring of 8", lambda s, c: S.decode(s, draw(2, 9), c)),
    (r"5 .* 5 .*ring of 8", lambda s, c: [S.decode(s, draw(2, 5), c) for _ in range(2)]),
    ("68.*64", lambda s, c: (S.prefill(s, draw(2, 60), c), S.decode(s, draw(2, 8), c))),
    ("4, .*0.*3, 3", lambda s, c: (S.decode(s, draw(2, 3), c), c.commit([4, 0]))),
    ("-1,.*0.*3, 3", lambda s, c: (S.decode(s, draw(2, 3), c), c.commit([-1, 0]))),
    ("batch_size 0", lambda s, c: S.MixerCache.allocate(s, 0)),
    ("ring 0", lambda s, c: S.MixerCache.allocate(s, 1, ring=0))])
def test_cache_errors(line, act):
    """Wrong tokens, masks and counts: one line that names them."""
    student = make_student([1], layers=2)
    refuses(line, act, student, S.MixerCache.allocate(student, 2, 64, ring=8))

# ---- 5. Conversion (Algorithm 1). -------------------------------------------------------------

@both
@pytest.mark.parametrize("recipe", ["near_linear", "paper", "random"])
@pytest.mark.parametrize("kind,kv,d_state", [("llama", 2, None), ("mistral", 4, 8),
                                             ("qwen2", 1, 4)])
def test_conversion_copies_exactly_the_right_rows(mixer, recipe, kind, kv, d_state):
    """V, K, Q land in x, B, C; conversions of two teachers by one seed agree in all other rows."""
    students, teachers = [], [make_teacher(kind, layers=2, kv=kv, seed=s) for s in (0, 1)]
    for teacher in teachers:
        before = parameters_of(teacher)
        torch.manual_seed(7)
        students.append(M.convert_to_hybrid(teacher, [1], mixer, recipe, d_state))
        assert same(before, parameters_of(teacher)), "the teacher changed"
    kinds = {type(module).__name__ for module in students[0].modules()}
    assert kinds > set(students[0]._no_split_modules) > set(), "FSDP wants to find them all"
    a, b = (s.model.layers[0].self_attn for s in students)
    attention = teachers[0].model.layers[0].self_attn
    if recipe == "random":
        assert same(parameters_of(a), parameters_of(b)), "it knows nothing of its teacher"
    for kind in ("weight", "bias") if recipe != "random" else ():
        sizes = [64, kv * 16, kv * 16, 64, len(a.in_proj.bias) - 128 - kv * 32]
        z, x, B, C, dt = getattr(a.in_proj, kind).split(sizes)
        for source, rows in ((attention.v_proj, x), (attention.k_proj, B), (attention.q_proj, C),
                             (attention.o_proj, getattr(a.out_proj, kind))):
            want = getattr(source, kind)
            assert torch.equal(rows, torch.zeros_like(rows) if want is None else want)
        other = getattr(b.in_proj, kind).split(sizes)
        assert torch.equal(z, other[0]) and torch.equal(dt, other[4])
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert "in_proj" in name or "out_proj" in name or torch.equal(p, q)
    ours, theirs = ({k: v for k, v in parameters_of(m).items() if "layers.0.self_attn" not in k}
                    for m in (students[0], teachers[0]))
    assert same(ours, theirs), "everything around the mixers is copied"

@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_keeping_every_layer_is_the_teacher_bit_for_bit(kind, tied):
    teacher = make_teacher(kind, layers=2, tied=tied)
    student = M.convert_to_hybrid(teacher, [1, 0])
    assert torch.equal(student(draw(2, 11)).logits, teacher(draw(2, 11)).logits)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied

def test_conversion_shares_nothing_and_keeps_types():
    """Nothing is the teacher's own; odd layers stay; decays and steps are fp32 in a bf16 model."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    teacher = make_teacher(dtype=torch.bfloat16, rope_parameters=rope).train()
    student = M.convert_to_hybrid(teacher)
    mine, theirs = ({v.data_ptr() for v in (*model.parameters(), *model.buffers())}
                    for model in (student, teacher))
    assert not mine & theirs and student.training
    student.generation_config.eos_token_id = 5
    student.config.rope_parameters["factor"] = student.model.config.rope_parameters["factor"] = 9
    assert teacher.generation_config.eos_token_id is None
    assert teacher.config.rope_parameters["factor"] == 2
    assert list(student.config.attn_layers) == [1, 3] and sorted(student.mixers()) == [0, 2]
    mixer = student.mixers()[0]
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32

@both
@torch.no_grad()
def test_bfloat16_weights_and_autocast_stay_close_to_float32(mixer):
    """By a forward, and by a prompt and a step of transformers' cache."""
    student, tokens = make_student([1], mixer, layers=2, dtype=torch.float32), draw(2, 40)
    want, low = student(tokens).logits, copy.deepcopy(student).bfloat16()
    for model, enabled in ((low, False), (student, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got, out = model(tokens).logits, model(tokens[:, :39], use_cache=True)
            step = model(tokens[:, 39:], use_cache=True, **{M.CACHE: getattr(out, M.CACHE)}).logits
            assert model.generate(tokens, max_new_tokens=3).shape == (2, 43)
            assert torch.stack(S.generate(model, tokens, 3).tokens).shape == (2, 3)
        assert got.dtype == torch.bfloat16
        for a, b in ((got, want), (step[:, 0], want[:, -1])):
            assert 0 < (a - b).abs().max() < 0.1 * want.abs().max()

@pytest.mark.parametrize("line,teacher,arguments", [
    ("qwen3.*llama', 'mistral', 'qwen2", lambda: make_teacher("qwen3"), {}),
    ("granite", lambda: make_teacher("granite"), {}), ("mamba_in_llama|hybrid", make_student, {}),
    ("4 query heads.*3", lambda: make_teacher(layers=1, kv=3), {}),
    (r"4\].*0\.\.3", make_teacher, dict(attn_layers=[0, 4])),
    (r"-1.*0\.\.3", make_teacher, dict(attn_layers=[-1])),
    ("distinct", make_teacher, dict(attn_layers=[2, 1, 2])),
    ("'rwkv'.*mamba2", make_teacher, dict(mixer="rwkv")),
    ("'best'.*near_linear", make_teacher, dict(recipe="best")),
    *[(f"{n} does not divide.*16", make_teacher, dict(d_state=n)) for n in (5, 32, 0)],
    ("colour", make_teacher, dict(colour="red"))])
def test_conversion_errors(line, teacher, arguments):
    refuses(line, M.convert_to_hybrid, teacher(), **arguments)

# ---- 6. Losses (Eq. 2 and Eq. 4), evaluation, choice of layers. -------------------------------

def logits64(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def test_distillation_loss_by_hand():
    """Two words, two predicted tokens, the second unlabelled.
    p_T = (1/2, 1/2) (logits 0, 0), p_S = (3/4, 1/4) (logits ln 3, 0), label 0:
    CE = -ln(3/4); KL[p_T || p_S] = 1/2 ln(1/2 / 3/4) + 1/2 ln(1/2 / 1/4) = 1/2 ln(4/3)."""
    student = torch.tensor([[[math.log(3), 0.0], [5.0, -5.0], [1.0, 2.0]]])
    labels = torch.tensor([[1, 0, -100]])           # labels[:, 0] is predicted by nothing
    ce, kl = math.log(4 / 3), 0.5 * math.log(4 / 3)
    for weights, want in ((dict(alpha=2.0, beta=0.5), 2 * ce + 0.5 * kl), ({}, ce + 0.1 * kl)):
        loss, parts = M.distillation_loss(student, torch.zeros(1, 3, 2), labels, **weights)
        assert loss.item() == pytest.approx(want, abs=1e-6) and parts["tokens"] == 1
    assert parts["ce"].item() == pytest.approx(ce, abs=1e-6)
    assert parts["kl"].item() == pytest.approx(kl, abs=1e-6)

@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_chunked_loss_and_gradients_are_the_plain_ones(labelled):
    """From hidden states, by pieces (one row of 600 tokens each); 0 without labels; in fp32."""
    labels = draw(3, 600)
    labels[torch.rand(3, 600, generator=torch.Generator().manual_seed(0)) >= labelled] = -100
    hidden, t_hidden = logits64(3, 600, 6, seed=1).requires_grad_(), logits64(3, 600, 8, seed=3)
    head, t_head = [logits64(V, D, seed=D).requires_grad_() for D in (6, 8)]
    s, t = hidden @ head.T, t_hidden @ t_head.T
    plain, parts = M.distillation_loss(s, t, labels, 0.7, 0.3)
    chunked = M.chunked_distillation_loss(hidden, t_hidden, (head, t_head), labels, 0.7, 0.3)
    n = (labels[:, 1:] != -100).sum().item()
    grads = [torch.autograd.grad(v, (hidden, head), retain_graph=True) for v in (plain, chunked)]
    close((plain, *grads[0]), (chunked, *grads[1]))
    assert parts["tokens"] == n and (plain > 0) == (n > 0) == bool(grads[0][0].any())
    assert torch.autograd.grad(chunked, t_head, allow_unused=True) == (None,)   # no work for it
    assert M.distillation_loss(s.bfloat16(), t.bfloat16(), labels)[0].dtype == torch.float32

def test_sequence_logps_sums_labelled_tokens():
    logp, labels = logits64(2, 5, V).log_softmax(-1), draw(2, 5)
    labels[0, 3:] = labels[1, :] = -100
    want = logp[0, 0, labels[0, 1]] + logp[0, 1, labels[0, 2]]
    close(M.sequence_logps(logp + 5, labels), torch.stack([want, 0 * want]))

def test_dpo_loss_by_hand():
    """Margins 3 and -1, beta 1/2: -log sigmoid(1/2 (3 - -1)) = log(1 + e^-2), rewards 3/2 and -1/2.
    Equal models: -log sigmoid(0) = log 2."""
    logps = torch.tensor([[-2.0, -5], [-8, -9], [-5, -5], [-7, -9]])
    losses, chosen, rejected = M.dpo_loss(*logps, beta=0.5)
    close(losses, torch.tensor([math.log1p(math.exp(-2)), math.log(2)]), 1e-6)
    assert chosen.tolist() == [1.5, 0] and rejected.tolist() == [-0.5, 0]

@pytest.mark.parametrize("prefix_len,by_labels", [(0, False), (1, False), (7, False), (7, True)])
@torch.no_grad()
def test_evaluate_against_a_direct_computation(prefix_len, by_labels):
    """Every position from max(prefix_len, 1) on counts once, in batches of unequal size."""
    teacher = make_teacher(layers=2)
    student, tokens = M.convert_to_hybrid(teacher, [1]).train(), draw(5, 12)
    labels = tokens.masked_fill(torch.arange(12) < prefix_len, -100)
    what = dict(labels=labels) if by_labels else dict(prefix_len=prefix_len)
    got = M.evaluate(student, teacher, tokens, batch_size=2, **what)
    assert student.training, "evaluate leaves the mode as it was"
    counts = labels[:, 1:] != -100
    s, t = (m(tokens).logits[:, :-1][counts].log_softmax(-1) for m in (student, teacher))
    y = tokens[:, 1:][counts]
    nats, teacher_nats = F.nll_loss(s, y).item(), F.nll_loss(t, y).item()
    want = {"perplexity": math.exp(nats), "teacher_perplexity": math.exp(teacher_nats),
            "ratio": math.exp(nats - teacher_nats), "kl": (t.exp() * (t - s)).sum(-1).mean().item(),
            "agreement": (s.argmax(-1) == t.argmax(-1)).double().mean().item()}
    assert got == pytest.approx(want, rel=1e-9) and got["kl"] > 0.01 and got["agreement"] < 1
    student.lm_head.weight *= 1e5                   # beyond 709 nats exp overflows: inf is right
    got = M.evaluate(student, teacher, tokens)
    assert got["perplexity"] == got["ratio"] == math.inf and math.isfinite(got["kl"])

@torch.no_grad()
def test_choose_layers_finds_what_the_mixers_broke_round_by_round():
    """In three rounds: the greedy choice among whole hybrids; scores of one round pick others."""
    teacher, tokens = make_teacher(layers=6), draw(6, 12)
    student = M.convert_to_hybrid(teacher, [])
    mixers = student.mixers()
    for mixer, scale in zip(mixers.values(), (0.01, 0.32, 0.86, 0.08, 1.41, 0.18)):
        mixer.out_proj.weight *= scale
    before = parameters_of(student)
    def kl(kept):
        hybrid = M.convert_to_hybrid(teacher, kept)
        for i, mixer in hybrid.mixers().items():
            mixer.load_state_dict(mixers[i].state_dict())
        return M.evaluate(hybrid, teacher, tokens)["kl"]
    greedy = []
    for _ in range(3):
        greedy.append(min(set(range(6)) - {*greedy}, key=lambda i: kl([*greedy, i])))
    choices = [M.choose_layers(student, teacher, 3, tokens, tokens, rounds, seconds)
               for rounds, seconds in ((3, 99), (1, 99), (3, 0))]       # 0: over in the first round
    assert choices[0] == sorted(greedy) != choices[1] == choices[2]
    assert same(before, parameters_of(student))

# ---- 7. Training: what moves, what stops it. --------------------------------------------------

@both
def test_stage_one_moves_mixers_only(mixer):
    """The rest stays bit for bit and has no gradient; stage 2 moves everything but the teacher."""
    teacher = make_teacher(layers=3, dtype=torch.float32)
    student, tokens = M.convert_to_hybrid(teacher, [1], mixer), draw(8, 24)
    mine = {n for n, _ in student.named_parameters() if re.search(r"layers\.[02]\.self_attn", n)}
    before, theirs = parameters_of(student), parameters_of(teacher)
    M.distil("stage 1", student, teacher, tokens, tokens, steps=3, batch_size=4,
             only=student.mixers().values())
    after = parameters_of(student)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= mine and len(moved) >= len(mine) - 2
    assert {n for n, p in student.named_parameters() if p.grad is not None} <= mine
    M.distil("stage 2", student, teacher, tokens, tokens, steps=2, batch_size=4)
    final = parameters_of(student)
    assert all(not torch.equal(after[n], final[n]) for n in final if "mlp" in n)
    assert same(theirs, parameters_of(teacher)), "the student shares weights with its teacher"

@both
def test_alignment_lowers_its_loss_and_leaves_no_hooks(mixer):
    """Its loss is the mean over layers of |mixer - attention|^2 / |attention|^2 on the teacher's
    inputs; it falls, and the KL."""
    teacher = make_teacher(layers=3, dtype=torch.float32)
    student, tokens = M.convert_to_hybrid(teacher, [1], mixer), draw(1, 24).expand(8, -1)
    given = teacher.model(tokens, output_hidden_states=True).hidden_states
    rope, errors = teacher.model.rotary_emb(given[0], torch.arange(24)[None]), []
    for i, new in student.mixers().items():
        layer = teacher.model.layers[i]
        u = layer.input_layernorm(given[i])
        wanted = layer.self_attn(u, position_embeddings=rope, attention_mask=None)[0]
        errors.append((new(u, rope)[0] - wanted).pow(2).sum() / wanted.pow(2).sum())
    before = M.evaluate(student, teacher, tokens)
    hooks = [len(layer.self_attn._forward_hooks) for layer in teacher.model.layers]
    losses = M.align_mixers(student, teacher, tokens, steps=40, batch_size=4, lr=3e-3)
    assert losses[0] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    assert len(losses) == 40 and losses[-1] < 0.8 * losses[0], losses
    assert M.evaluate(student, teacher, tokens)["kl"] < before["kl"]
    assert [len(layer.self_attn._forward_hooks) for layer in teacher.model.layers] == hooks
    assert M.align_mixers(M.convert_to_hybrid(teacher, [0, 1, 2]), teacher, tokens, 5) == []

def test_dpo_raises_the_margin_over_the_teachers():
    teacher = make_teacher(layers=2, dtype=torch.float32)
    student = M.convert_to_hybrid(teacher, [1])
    sides = [(t, t) for t in (draw(8, 12, 1), draw(8, 12, 2))]
    M.dpo(student, teacher, *sides, steps=15, batch_size=8, lr=1e-3)
    good, bad, teachers_good, teachers_bad = [
        M.sequence_logps(m(t).logits, y) for m in (student, teacher) for t, y in sides]
    assert (good - bad > teachers_good - teachers_bad).all()

def test_train_stops_after_its_seconds():
    """Also where the first step, which compiles, takes longer than all of them may."""
    student, pause, rows = make_student([1], layers=2, dtype=torch.float32), [0.6], []
    def loss_of_rows(drawn):
        time.sleep(pause.pop() if pause else 0)
        rows.extend(drawn)
        return student(draw(2, 8), labels=draw(2, 8)).loss

    start = time.monotonic()
    losses = M.train("timed", student, loss_of_rows, 3, batch_size=2, seconds=0.5)
    assert 0.4 < time.monotonic() - start < 3 and len(losses) >= 2
    assert {int(i) for i in rows} <= {0, 1, 2} and len(rows) == 2 * len(losses)

# ---- 8. Saving, forward and generate(): as transformers' own models. --------------------------

@both
@pytest.mark.parametrize("recipe,kind,tied,dtype,d_state", [
    ("near_linear", "llama", True, torch.float32, None),
    ("paper", "mistral", False, torch.float32, 8), ("random", "qwen2", True, torch.bfloat16, None)])
@torch.no_grad()
def test_save_and_load_is_bit_equal(mixer, recipe, kind, tied, dtype, d_state, tmp_path):
    """Weights in shards, dtypes, ties and logits; what is loaded can be copied and compiled."""
    student = make_student([1], mixer, recipe, d_state, kind=kind, tied=tied, dtype=dtype, layers=2)
    student.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is M.HybridForCausalLM and same(parameters_of(student), parameters_of(again))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    tokens, tol = draw(2, 9), 1e-6 if dtype == torch.float32 else 0         # other alignment
    want = student.eval()(tokens).logits
    close(again(tokens).logits, want, tol)
    copy.deepcopy(again).lm_head.weight += 1
    close(torch.compile(again, backend="eager")(tokens, use_cache=False).logits, want, tol)

ANSWERS = """
def answers(pipe):
    pipe.tokenizer.padding_side, texts = "left", ["The import statement", "A"]
    options = dict(max_new_tokens=12, do_sample=False, batch_size=2)
    chat = pipe([{"role": "user", "content": "What is a list?"}], **options)
    return chat, pipe(texts, **options), pipe(texts, num_beams=3, **options)
"""

def test_trust_remote_code_in_a_process_without_this_project(tiny_run, tmp_path):
    """A saved directory alone answers as here: a chat, a padded batch, beams, by a pipeline."""
    tokenizer, ours = AutoTokenizer.from_pretrained(tiny_run / "teacher"), {}
    model = make_student([1, 3], vocab_size=len(tokenizer), dtype=torch.float32)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    done = python("-c", "import importlib.util, transformers" + ANSWERS + """if True:
        assert not importlib.util.find_spec("mamba_in_llama")
        pipe = transformers.pipeline("text-generation", "saved", trust_remote_code=True)
        print(answers(pipe))""", cwd=tmp_path, HF_HOME=str(tmp_path), HF_MODULES_CACHE="modules")
    assert done.returncode == 0, done.stderr
    exec(ANSWERS, ours)
    pipe = transformers.pipeline("text-generation", model, tokenizer=tokenizer)
    assert done.stdout.splitlines()[-1] == repr(ours["answers"](pipe))

shares = pytest.mark.parametrize("layers", [[], [1], [0, 1]])

@both
@shares
@pytest.mark.parametrize("kind", SLIDING)
def test_greedy_generate_is_the_argmax_loop(mixer, layers, kind):
    """A batch of different lengths, padded on the left, against each row alone and no cache."""
    student = make_student(layers, mixer, layers=2, **SLIDING[kind])
    rows = [draw(1, n, n)[0].tolist() for n in (7, 2, 4)]
    tokens, mask = left_pad(rows)
    out = student.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for r, row in enumerate(rows):
        assert out[r, tokens.shape[1] - len(row):].tolist() == greedy_loop(student, row, 6)

@shares
@pytest.mark.parametrize("settings", [dict(num_beams=4, num_return_sequences=2),
                                      dict(do_sample=True, num_return_sequences=2, top_k=20),
                                      dict(do_sample=True, num_beams=2, num_return_sequences=2)])
def test_beams_and_sampling_with_cache_equal_those_without(layers, settings):
    """Beams reorder the recurrent states as they reorder keys and values."""
    student = make_student(layers, "mamba2", layers=2)
    tokens, mask = left_pad([draw(1, n, n)[0].tolist() for n in (6, 3)])
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(student.generate(tokens, attention_mask=mask, max_new_tokens=8,
                                     use_cache=use_cache, pad_token_id=0, **settings))
    assert torch.equal(*outs) and outs[0].shape == (4, 14)

@both
@shares
@torch.no_grad()
def test_padding_on_the_right_and_holes_are_no_tokens_of_the_state(mixer, layers):
    """Whatever stands in the padding. With identity taps the text with a hole is the text without
    it, by forward, in pieces and in generate(), where transformers makes the hole itself: the
    prompt holds `pad_token_id`. (Other taps see a column of zeros: the authors' checkpoints.)"""
    student, row = make_student(layers, mixer, layers=2), draw(1, 9)[0].clamp(min=1).tolist()
    tokens, mask = torch.tensor([row, row[:4] + [55] * 5]), torch.ones(2, 9).long()
    mask[1, 4:] = 0
    padded = student(tokens, attention_mask=mask).logits
    close(padded[0], next_logits(student, row, 9))
    close(padded[1, :4], padded[0, :4])
    for new in student.mixers().values():
        new.conv1d.weight.copy_(torch.tensor([0, 0, 0, 1]))
    holed = torch.tensor([row[:5] + [0, 0] + row[5:]])
    mask = (holed > 0).long()
    want = next_logits(student, row, 9)
    close(student(holed, attention_mask=mask).logits[0, mask[0] > 0], want)
    for cut in (5, 6, 7):                           # the hole before, across and after the cut
        out = student(holed[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
        cache = {M.CACHE: getattr(out, M.CACHE)}
        rest = student(holed[:, cut:], attention_mask=mask, **cache).logits
        close(torch.cat([out.logits, rest], 1)[0, mask[0] > 0], want)
    out = student.generate(holed, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out[0, 11:].tolist() == greedy_loop(student, row, 4)[9:]

@both
@shares
@torch.no_grad()
def test_prompt_in_pieces_and_the_cache_of_an_earlier_turn(mixer, layers):
    """Any cuts of a prompt, pieces shorter than the taps included, and a second turn of a chat."""
    student, tokens = make_student(layers, mixer, layers=2), draw(2, 12)
    want = student(tokens, use_cache=False).logits
    for cuts in ([12], [1] * 12, [2, 1, 5, 4], [7, 5]):
        cache, logits = {}, []
        for piece in tokens.split(cuts, 1):
            out = student(piece, use_cache=True, **cache)
            cache = {M.CACHE: getattr(out, M.CACHE)}
            logits.append(out.logits)
        close(torch.cat(logits, 1), want)
    settings = dict(max_new_tokens=4, do_sample=False)
    first = student.generate(tokens, return_dict_in_generate=True, **settings)
    second = torch.cat([first.sequences, draw(2, 3, seed=1)], 1)
    again = student.generate(second, **{M.CACHE: getattr(first, M.CACHE)}, **settings)
    assert torch.equal(again, student.generate(second, **settings))

@torch.no_grad()
def test_forward_takes_and_gives_what_transformers_decoders_do():
    """Its arguments; generate() from embeddings, to an end token, beyond the context."""
    student, tokens = make_student([1], layers=2), draw(2, 8)
    out, embeds = student(tokens, output_hidden_states=True), student.get_input_embeddings()(tokens)
    given = student(tokens, return_dict=False)
    assert isinstance(given, tuple) and torch.equal(given[0], out.logits)
    close(student(tokens, logits_to_keep=3).logits, out.logits[:, -3:])
    close(student(tokens, logits_to_keep=torch.tensor([1, 6])).logits, out.logits[:, [1, 6]])
    close(student(inputs_embeds=embeds).logits, out.logits)
    assert len(out.hidden_states) == 3
    close(student.lm_head(out.hidden_states[-1]), out.logits)
    assert getattr(out, M.CACHE) is not None
    assert getattr(student(tokens, use_cache=False), M.CACHE) is None
    spread = torch.arange(8)[None] * 3
    given = student(tokens, position_ids=spread, attention_mask=torch.ones_like(tokens)).logits
    close(given, student(tokens, position_ids=spread).logits)
    assert (given - out.logits).abs().max() > 1e-3, "positions are honoured"
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    close(student(tokens, labels=tokens).loss.double(), want, 1e-6)
    share = student(tokens, labels=tokens, num_items_in_batch=100).loss
    close(share.double(), want * 14 / 100, 1e-6)
    free = student.generate(inputs_embeds=embeds[:1], max_new_tokens=8, do_sample=False)[0].tolist()
    assert tokens[0].tolist() + free == greedy_loop(student, tokens[0].tolist(), 8)
    out = student.generate(tokens[:1], max_new_tokens=8, do_sample=False, eos_token_id=free[3],
                           pad_token_id=0)
    assert out[0, 8:].tolist() == free[:free.index(free[3]) + 1]
    pure, tokens = make_student([], layers=2, max_position_embeddings=64), draw(1, 100)
    cache = S.MixerCache.allocate(pure, 1)
    close(S.prefill(pure, tokens, cache), pure(tokens).logits[:, -1:])
    assert pure.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 103)

def test_what_cannot_be_honoured_is_refused():
    """Packed rows, 4-D masks, masks of another length and assisted generation: never ignored."""
    student, tokens, ones = make_student([1], layers=2), draw(1, 6), torch.ones(1, 6).long()
    refuses("attention_mask", student.generate, tokens, cache_implementation="static", max_length=9)
    refuses("packed", student, tokens, position_ids=torch.arange(6)[None] % 3)
    refuses("packed", student, tokens, position_ids=torch.arange(6)[None] % 3, attention_mask=ones)
    refuses("attention_mask", student, tokens, attention_mask=torch.ones(1, 1, 6, 6))
    refuses("attention_mask", student, tokens, attention_mask=ones[:, :4])
    cache = {M.CACHE: getattr(student(tokens, use_cache=True), M.CACHE)}
    refuses("attention_mask", student, tokens[:, :1], attention_mask=ones[:, :1], **cache)
    for settings in (dict(prompt_lookup_num_tokens=2), dict(assistant_model=student)):
        with pytest.raises(ValueError, match="stateful"):       # cropping rewinds no state
            student.generate(tokens, do_sample=False, **settings)

# ---- 9. Chat templates: what is labelled, what is refused. ------------------------------------

CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system"
          "\nBe kind.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
          "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
          "[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>"
          "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}")
TEMPLATES = {
    "chatml": CHATML, "llama2": LLAMA2,
    "spaced": LLAMA2.replace("{{ m.content }}</s>", "{{ ' ' + m.content + ' ' + eos_token }}"),
    "zephyr": ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
               "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")}
WORDS = ("The capital of France is Paris. What is it known for? The user asks, the assistant says: "
         "one two three [INST] [/INST] <|user|> <|assistant|> <|system|> and so on, 5 + 7 = 12. ")

@functools.cache
def make_chat(template):
    """A small byte-level tokenizer with chatml's marks, or LlamaTokenizer, with a leading space."""
    from tokenizers.implementations import ByteLevelBPETokenizer, SentencePieceBPETokenizer
    marks = ["<|im_start|>", "<|im_end|>"] if template == CHATML else ["<unk>", "<s>", "</s>", "\n"]
    core = ByteLevelBPETokenizer() if template == CHATML else SentencePieceBPETokenizer()
    core.train_from_iterator([WORDS] * 9, 300, 1, show_progress=False, special_tokens=marks)
    if template == CHATML:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core._tokenizer, bos_token=marks[0], eos_token=marks[1])
    else:
        parts = json.loads(core.to_str())["model"]
        tokenizer = transformers.LlamaTokenizer(
            vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]])
    tokenizer.chat_template = template
    return M.Chat(tokenizer)

TURNS = ["What is it known for?", "The capital of France.", "one two", "5 + 7 = 12"]

@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n", [2, 4])
def test_answers_are_labelled_where_they_stand_in_the_whole_text(name, n):
    """By their characters' offsets: between an answer's first character and its end, included."""
    chat = make_chat(TEMPLATES[name])
    tokenizer, turns = chat.tokenizer, M.turns_of(*TURNS[:n])
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    want, place = [-100] * len(encoded.input_ids), 0
    for question, answer in zip(TURNS[:n:2], TURNS[1:n:2]):
        first = text.index(answer, text.index(question, place) + len(question))
        place = text.index(tokenizer.eos_token, first) + len(tokenizer.eos_token)
        for i, (a, b) in enumerate(encoded.offset_mapping):
            if first < b and b <= place and b > a:
                want[i] = encoded.input_ids[i]
    tokens, labels = M.pack([chat.ids(turns)], 1000, chat)
    assert tokens[0].tolist() == encoded.input_ids
    assert labels[0].tolist() == want and want.count(chat.end) == n // 2
    assert chat.end == tokenizer.eos_token_id
    asked = chat.ids(turns[:1], add_generation_prompt=True)
    assert chat.user_start == asked[:len(chat.user_start)] != asked, "where a conversation begins"

def test_templates_that_tell_no_answer_are_refused():
    """No mark before an answer, or no end behind it."""
    refuses("template.*answer", make_chat, "{% for m in messages %}{{ m.content }}{% endfor %}")
    refuses("template.*answer", make_chat, LLAMA2.replace("</s>", ""))
    refuses("before a question", M.sample, None, [], 1, 8)

# ---- 10. The command line as a user types it; kill and resume. --------------------------------

@pytest.fixture(autouse=True)
def commands_run_on_the_cpu(request, monkeypatch):
    """A GPU, if there is one, has settings of its own: other lengths, no stage 1."""
    if {"world", "home"} & {*request.fixturenames}:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """`mamba_in_llama.py --tiny`, once. -> tiny_run; report.json and stdout.txt stand beside it"""
    if "TINY_RUN" in os.environ:
        return pathlib.Path(os.environ["TINY_RUN"]).resolve() / "tiny_run"
    folder = tmp_path_factory.mktemp("tiny")
    done = python(f"{HERE}/mamba_in_llama.py", "--tiny", "--json", "report.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder / "tiny_run"

STORY = ["converted", "alignment", "stage 1", "stage 2", "stage 3"]

def test_tiny_tells_the_whole_story(tiny_run):
    """Both mixers, every stage with its ratios, which fall as promised; saved, and reloaded."""
    report = json.loads((tiny_run.parent / "report.json").read_text())
    printed = (tiny_run.parent / "stdout.txt").read_text()
    assert set(report["tables"]) == set(MIXERS) and "saved to" in printed
    for mixer, rows in report["tables"].items():
        assert [row["stage"] for row in rows] == STORY
        for row in rows:
            assert f"{row['ratio']:.3f}" in printed and f"{row['human_ratio']:.3f}" in printed
        assert rows[0]["ratio"] > 1.5 and rows[-1]["ratio"] <= 1.05
        assert rows[-1]["human_ratio"] <= 1.06 and len(rows[-1]["layers"]) == 2
        student = AutoModelForCausalLM.from_pretrained(tiny_run / mixer)
        assert list(student.config.attn_layers) == rows[-1]["layers"]

@pytest.fixture(scope="session")
def world(tiny_run, tmp_path_factory):
    """Small files as users have them, good and bad ones. -> {name: path}"""
    root = tmp_path_factory.mktemp("world")
    paths = {"teacher": shutil.copytree(tiny_run / "teacher", root / "teacher").as_posix()}
    (root / "teacher" / "generation_config.json").write_text('{"max_new_tokens": 5}')
    chat = M.Chat(AutoTokenizer.from_pretrained(paths["teacher"]))
    text = ["the name is bound", "a list of names", "an error is raised", "it has two arguments"]
    sft = [dict(prompt=p, response=r) for p, r in itertools.permutations(text, 2)]
    pairs = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in itertools.permutations(text, 3)]
    ids = numpy.arange(80).reshape(2, 40)
    rows = [chat.ids(M.turns_of(row["prompt"], row["response"])) for row in sft] * 4
    files = {"sft": sft, "pairs": pairs, "bad": [{"prompt": "a"}],
             "npz": M.pack(rows, 48, chat)[0].numpy().astype("uint16"), "flat": ids[0],
             "high": ids + 5000, "low": ids - 7, "none": ids[:0], "mute": ids * 0 + 9,
             "long": [dict(prompt="a list " * 50, response="a name")]}
    for name, content in files.items():
        paths[name] = str(root / f"{name}.jsonl")
        if isinstance(content, list):
            (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
        else:
            paths[name] = str(root / f"{name}.npz")
            numpy.savez(paths[name], tokens=content)
    for name in ("torn", "lfs", "plain", "strict", "granite"):
        shutil.copytree(paths["teacher"], root / name)
        paths[name] = str(root / name)
    (root / "full").mkdir()
    (root / "full" / "progress.pt").write_text("mine")
    tensors = load_file(root / "torn" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, root / "torn" / "model.safetensors", metadata={"format": "pt"})
    (root / "lfs" / "model.safetensors").write_text(POINTER)
    (root / "plain" / "chat_template.jinja").unlink()
    template = root / "strict" / "chat_template.jinja"
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}"
                        "{% endif %}" + template.read_text())
    make_teacher("granite", layers=1).save_pretrained(root / "granite")
    return {**paths, "full": str(root / "full")}

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"

def command(world, out, more=""):
    """argv of a small run; {name} in `more` stands for a path in `world`."""
    argv = shlex.split("--teacher {teacher} --tokens 2000 --length 48 --batch 4 " + more)
    return ["--out", str(out), *(word.format(**world) for word in argv)]

def untimed(report):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in report["tables"]["mamba2"]]

def steps_and_judgements(patch, stop_at=None, exception=KeyboardInterrupt):
    """Count the optimizer's steps and the evaluations; the one of number `stop_at` raises."""
    seen = []
    def counted(act):
        def counting(*args, **options):
            if len(seen) == stop_at:
                raise exception
            seen.append(act)
            return act(*args, **options)
        return counting
    patch.setattr(M, "evaluate", counted(M.evaluate))
    patch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step))
    return seen

@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory):
    """What runs that are killed and resumed must equal. -> rows, weights, steps, its directory"""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        seen = steps_and_judgements(patch)
        rows = untimed(M.main(command(world, out)))
    return rows, load_file(out / "model.safetensors"), len(seen), out

@pytest.mark.parametrize("where,exception", [*zip(
    (0.02, 0.2, 0.4, 0.6, 0.8, 0.99), [KeyboardInterrupt, SystemExit] * 3)])
def test_a_run_killed_anywhere_and_resumed_equals_an_uninterrupted_one(
        where, exception, world, uninterrupted, tmp_path, monkeypatch):
    """In each phase, the choice of layers, between them, bit for bit; no mapped file (Windows)."""
    rows, weights, total, _ = uninterrupted
    argv = command(world, tmp_path / "out")
    with monkeypatch.context() as patch:
        steps_and_judgements(patch, int(where * total), exception)
        with pytest.raises(exception):
            M.main(argv)
    monkeypatch.setattr(M, "sample", lambda *args, **kwargs: pytest.fail("rows are there already"))
    monkeypatch.setattr(torch, "load", lambda path, map_location, load=torch.load: load(path))
    seen = steps_and_judgements(monkeypatch)
    assert untimed(M.main([*argv, "--resume"])) == rows
    assert same(weights, load_file(tmp_path / "out" / "model.safetensors"))
    assert len(seen) < total or where < 0.1, "finished stages are not run again"

def test_a_resumed_run_keeps_the_layers_of_its_student(world, tmp_path, monkeypatch):
    """--even, killed before alignment is saved; --resume without that flag."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        steps_and_judgements(patch, 2)
        M.main(command(world, tmp_path / "out", "--even"))
    rows = M.main(command(world, tmp_path / "out", "--resume"))["tables"]["mamba2"]
    assert [row["layers"] for row in rows] == [[1, 3]] * 5

def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        M.write_whole(str(tmp_path / "file"), lambda file: file.write(b"half of the n") / 0)
    assert (tmp_path / "file").read_text() == "old"

def test_a_console_that_cannot_print(world, uninterrupted, tmp_path, monkeypatch):
    """Under cp1252 unprintable characters are replaced, and everything is on disk before."""
    shutil.copytree(uninterrupted[3], tmp_path / "out")
    saved, decoded = tmp_path / "out" / "model.safetensors", []
    saved.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
        patch.setattr(transformers.PreTrainedTokenizerFast, "decode", lambda *args, **kwargs:
                      decoded.append(saved.exists()) or "→ ħ é")
        M.cli(lambda: M.main(command(world, tmp_path / "out", "--resume")))
        sys.stdout.seek(0)
        assert "? ? é" in sys.stdout.read() and decoded[-1]

def test_ctrl_c_ends_sampling_at_once_and_leaves_no_handler(world, tmp_path, monkeypatch, capsys):
    """A real SIGINT while the teacher writes: exit code 3, one line, handlers as before."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background has none
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", lambda *args, **kwargs:
                        (os.kill(os.getpid(), signal.SIGINT), time.sleep(20)))
    start = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        M.cli(lambda: M.main(command(world, tmp_path / "out")))
    assert stopped.value.code == 3 and time.monotonic() - start < 10
    assert "--resume" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers

def stages_of(world, out, more, patch):
    """A command whose stages do not train. -> {stage: the arguments that it was given}"""
    given = {}
    def recorded(act):
        def record(*args, **options):
            call = inspect.signature(act).bind(*args, **options).arguments
            given[call.get("name", act.__name__)] = call
            return [0.0]
        return record
    for name in ("align_mixers", "distil", "dpo"):
        patch.setattr(M, name, recorded(getattr(M, name)))
    M.main(command(world, out, "--even --tokens-file {npz} " + more))
    return given

def test_own_answers_preferences_and_even_layers(world, tmp_path, monkeypatch):
    """What stages 2 and 3 see; --even keeps spaced layers; Mamba takes 16 states; --json."""
    given = stages_of(world, tmp_path / "out", "--attention 0.25 --mixer mamba --sft {sft} "
                      f"--preferences {{pairs}} --json {tmp_path}/f.json", monkeypatch)
    rows = json.loads((tmp_path / "f.json").read_text())["tables"]["mamba"]
    assert [row["stage"] for row in rows] == STORY and all(row["ratio"] > 0 for row in rows)
    decode = AutoTokenizer.from_pretrained(world["teacher"]).decode
    answers, pairs = given["stage 2"]["tokens"], given["dpo"]
    for tokens, answer in ((answers, "a list"), (pairs["chosen"][0], "a list"),
                           (pairs["rejected"][0], "an error")):
        assert "the name is bound<|end|><|assistant|>" + answer in decode(tokens[0])
    assert len(given["stage 1"]["tokens"]) > len(answers) == 12
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert list(student.config.attn_layers) == [3] and student.mixers()[0].N == 16

GOOD = ('{"prompt": "What is it known for?", "response": "The capital."}',
        '{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},'
        ' {"role": "user", "content": "5"}, {"role": "assistant", "content": "7"}]}')

def test_jsonl_of_any_editor(world, tmp_path, monkeypatch, capsys):
    """BOM, CRLF, empty lines. Rows with answers beyond --length are left out and counted."""
    path, long = tmp_path / "rows.jsonl", GOOD[0].replace("What", "one two " * 90)
    lines = "\r\n".join((long, GOOD[0], "", GOOD[1], "  ", long, ""))
    path.write_bytes(("\ufeff" + lines).encode())
    given = stages_of(world, tmp_path / "out", f"--length 80 --sft {path}", monkeypatch)
    tokens, labels = given["stage 2"]["tokens"], given["stage 2"]["labels"]
    chat = M.Chat(AutoTokenizer.from_pretrained(world["teacher"]))
    turns = M.turns_of("What is it known for?", "The capital."), M.turns_of("one", "two", "5", "7")
    for row, ids in zip(tokens, map(chat.ids, turns)):
        assert row[:len(ids)].tolist() == ids and (row[len(ids):] == chat.end).all()
    assert (labels == chat.end).sum(1).tolist() == [1, 2], "end tokens that pad count nowhere"
    assert re.search(r"rows.jsonl.* 2 of 4.*80", capsys.readouterr().out)

@pytest.mark.parametrize("share", [0, 1])
def test_minutes_are_what_the_whole_command_takes(share, world, tmp_path):
    """Reading, sampling, all stages, judging and saving; 0 and 100 % of attention."""
    start = time.monotonic()
    rows = untimed(M.main(command(world, tmp_path / "out", f"--attention {share} --minutes 0.1")))
    assert 4 < time.monotonic() - start < 9
    assert len(rows[0]["layers"]) == 4 * share
    assert share == 0 or rows[0]["ratio"] == pytest.approx(1)

def ends_in_one_line(line, capsys, main, argv):
    """An error in one line that this pattern is found in, and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        M.cli(lambda: main(argv))
    said = [s for s in capsys.readouterr().err.splitlines() if s.strip()]
    assert stopped.value.code == 2 and len(said) == 1, said
    assert said[0].startswith("error: ") and re.search(line, said[0]), said

def test_a_full_gpu_is_one_line(capsys):
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    ends_in_one_line("out of memory", capsys, full, [])

@pytest.mark.parametrize("more,line", [
    ("--colour red", "--colour"), ("--attention 1.5", "1.5.*0..1"), ("--attention nan", "nan"),
    ("--attention half", "attention.*half"), ("--mixer rwkv", "rwkv.*mamba2"),
    ("--length 0", "length 0"), ("--batch 0", "batch 0"), ("--tokens -5", "tokens -5"),
    ("--minutes -1", "minutes -1"), ("--length 2000", "2000.*1024"), ("--d-state 5", "5.*32"),
    ("--teacher /no/such", "/no/such"), ("--teacher {full}", "full"),
    ("--teacher {granite}", "granite.*llama"), ("--teacher {lfs}", "lfs"),
    ("--teacher {torn}", "layers.1.mlp.up_proj.weight"), ("--teacher {plain}", "chat template"),
    ("--out {full}", "full"), ("--out {npz}", "npz.npz"), ("--out {lfs} --resume", "lfs.*files"),
    ("--out {full} --resume --tokens-file {npz}", "progress.pt"), ("--sft {bad}", "bad.jsonl:1"),
    ("--preferences {sft}", "sft.jsonl:1"), ("--sft {long}", "long.jsonl.*48"),
    ("--sft /no/such", "/no/such"), ("--tokens-file /no/such.npz", "/no/such.npz"),
    ("--tokens-file {sft}", "sft.jsonl"), ("--tokens-file {flat}", "flat.npz"),
    ("--tokens-file {high}", "high.npz.*50"), ("--tokens-file {low}", "low.npz.*-7"),
    ("--tokens-file {none}", "none.npz"), ("--tokens-file {mute}", "mute.npz.*answer"),
    ("--json {npz}/f.json", "--json.*npz.npz/f.json"), ("--json {full}", "full is a directory")])
def test_command_line_errors_are_one_line(more, line, world, tmp_path, monkeypatch, capsys):
    """Each names the thing and what would be right, before any sampling; exit code 2."""
    monkeypatch.setattr(M, "sample", lambda *args, **kwargs: pytest.fail("sampled"))
    ends_in_one_line(line, capsys, M.main, command(world, tmp_path / "out", more))

@pytest.mark.parametrize("text,line", [
    (GOOD[0] + '\n{"prompt": "b"', 2), ('{"text": "a"}\n', 1), ('["b"]\n', 1),
    ('\n\n{"prompt": "a"}\n', 3), ('{"prompt": "", "response": "b"}\n', 1),
    ('{"prompt": 5, "response": "b"}\n', 1), ('{"prompt":"a","response":["b"]}', 1),
    ('{"messages": "hello"}\n', 1), ('{"messages": [{"role": "user"}]}\n', 1), ("", ""),
    (GOOD[0] + '\n{"messages": [{"role": "system", "content": "a"}]}', 2), (None, "")])
def test_jsonl_errors_name_file_and_line(text, line, world, tmp_path, monkeypatch, capsys):
    """Broken JSON, missing fields, wrong types, roles that the template refuses, UTF-16, none."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD[0].encode("utf-16") if text is None else text.encode())
    monkeypatch.setattr(M, "sample", lambda *args, **kwargs: pytest.fail("sampled"))
    argv = command(world, tmp_path / "out", f"--teacher {{strict}} --sft {path}")
    ends_in_one_line(f"rows.jsonl:{line}", capsys, M.main, argv)

def test_a_diverging_run_can_be_resumed(world, uninterrupted, tmp_path, monkeypatch, capsys):
    """A loss that is not finite ends in one line that says where; the stages before are kept."""
    argv = command(world, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(M.SETTINGS["cpu"], "rates", (0, 2e-3, 5e-4, 1e30, 0))
        ends_in_one_line("stage 2: loss .* step", capsys, M.main, argv)
    assert untimed(M.main([*argv, "--resume"])) == uninterrupted[0]

@pytest.mark.parametrize("program", ["mamba_in_llama.py", "spec_decode.py"])
def test_help_and_exit_codes_in_a_process_of_its_own(program, tmp_path):
    """--help says the flags' defaults; a mistake is one line on stderr, exit code 2."""
    done = python(f"{HERE}/{program}", "--help", cwd=tmp_path)
    flags = dict(re.findall(r"^  (--[a-z-]+)(.*?)(?=^  --|\Z)", done.stdout, re.M | re.S))
    assert done.returncode == 0 and len(flags) <= 20 and {"--tiny", "--json"} <= set(flags)
    for flag in ("--attention", "--tokens", "--mixer", "--lookahead", "--temperature"):
        assert "default" in flags.get(flag, "default"), flag
    done = python(f"{HERE}/{program}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: give --tiny.*\n", done.stderr)

def test_a_text_that_holds_the_templates_mark_is_refused():
    """What follows it would be labelled as an answer; a mark that is a line break is none."""
    chat = make_chat(LLAMA2)
    refuses("marks", chat.ids, M.turns_of("What does [/INST] say?", "one"))
    refuses("template.*answer", make_chat, "{% for m in messages %}{{ m.content }}\n"
            "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}")

@pytest.mark.parametrize("more", ["--out mine", "--teacher mine", "--resume", "--mixer mamba"])
def test_tiny_touches_no_directory_of_the_users(more, tmp_path, monkeypatch, capsys):
    """Its own tiny_run alone is overwritten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "prepare", lambda args: pytest.fail(f"goes on with {args.teacher}"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    ends_in_one_line("--tiny", capsys, M.main, ["--tiny", *more.split()])
    assert (tmp_path / "mine" / "thesis").exists()

def test_preferences_beyond_the_length_are_counted(world, tmp_path, monkeypatch, capsys):
    """A pair whose prompt alone fills the row is left out, and said."""
    path = tmp_path / "rows.jsonl"
    rows = [dict(prompt=p, chosen="name", rejected="error") for p in ("a list " * 50, "a list")]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = stages_of(world, tmp_path / "out", f"--preferences {path}", monkeypatch)
    assert len(given["dpo"]["chosen"][0]) == len(given["dpo"]["rejected"][0]) == 1
    assert "rows.jsonl: 1 of 2 rows" in capsys.readouterr().out

def test_resume_with_another_share_or_other_rows_is_refused(world, uninterrupted, tmp_path, capsys):
    """The layers of the run before would be kept without a word, or rows that it has not seen."""
    shutil.copytree(uninterrupted[3], tmp_path / "out")
    ends_in_one_line("progress.pt", capsys, M.main,
                     command(world, tmp_path / "out", "--resume --attention 0.25"))
    (tmp_path / "out" / "data.npz").unlink()
    ends_in_one_line("--tokens-file", capsys, M.main, command(world, tmp_path / "out", "--resume"))

# ---- 11. Algorithm 2 (spec_decode.py): exactness first. SPEC_GRID=N runs N of the grid. --------

SHARES = {1.0: [0, 1, 2, 3], 0.5: [1, 3], 0.25: [2], 0.0: []}
DRAFTS = ["itself", "plain", "hybrid", "layers", "ngram", "right", "wrong", "random"]

@functools.cache
def toy(mixer, share, dtype=torch.float64, **fields):
    """A target with random gates, convolutions and decays."""
    return make_student(SHARES[share], mixer, "paper", dtype=dtype, **fields).eval()

class Scripted(S.Draft):
    """A draft that knows the answer: always right, always wrong, or random."""

    def __init__(self, kind, answers, prompts):
        self.wrong, self.draw = {"right": 0, "wrong": 1, "random": 0.4}[kind], random.Random(0)
        self.texts = [prompt + answer for prompt, answer in zip(prompts, answers)]

    def propose(self):
        out = []
        for text, length in zip(self.texts, self.rows.length.tolist()):
            rest = (text[length:] + [0] * self.K)[:self.K]
            out.append([(t + (self.draw.random() < self.wrong)) % V for t in rest])
        return torch.tensor(out), None

def draft_of(kind, target, *script):
    """A draft of that kind for this target. script: answers, prompts"""
    if kind in ("right", "wrong", "random"):
        return Scripted(kind, *script)
    return {"itself": target, "plain": make_teacher(layers=2, seed=3), "ngram": S.NGramDraft(2),
            "hybrid": toy("mamba2", 0.5), "layers": S.LayerSubsetDraft(target, [0, 2, 3])}[kind]

GRID = itertools.product(MIXERS, SHARES, DRAFTS, range(1, 9), [1, 4], range(1, 41))
SAMPLE = random.Random(0).sample(list(GRID), int(os.environ.get("SPEC_GRID", 152)))

@pytest.mark.parametrize("part", range(4))
def test_greedy_speculation_is_plain_decoding(part):
    """Every value of every axis often; ends in the middle of the output; budgets met exactly."""
    for i, (mixer, share, kind, K, b, length) in enumerate(SAMPLE[part::4]):
        draw, target = random.Random(1000 * part + i), toy(mixer, share)
        prompts = [[draw.randrange(V) for _ in range(length if j == 0 else draw.randint(1, 40))]
                   for j in range(b)]
        budget, eos = draw.randint(1, 24), None
        plain = S.generate(target, [torch.tensor(p) for p in prompts], budget)
        answers = [t.tolist() for t in plain.tokens]
        assert [len(a) for a in answers] == [budget] * b
        if i % 3:
            eos = [draw.choice(draw.choice(answers)) for _ in range(i % 3)]
            plain = S.generate(target, prompts, budget, eos_token_id=eos)
            for answer, row in zip(answers, plain.tokens):
                cut = next((k + 1 for k, t in enumerate(answer) if t in eos), budget)
                assert row.tolist() == answer[:cut]
        got = S.speculative_decode(target, draft_of(kind, target, answers, prompts),
                                   prompts, budget, lookahead=K, eos_token_id=eos)
        where = (mixer, share, kind, K, b, length, budget, eos)
        assert [t.tolist() for t in got.tokens] == [t.tolist() for t in plain.tokens], where
        assert got.rounds == 0 or 1 <= got.tokens_per_round <= K + 1
        if kind in ("right", "itself") and eos is None and budget > K + 1:
            assert got.rounds <= math.ceil(budget / (K + 1)), where
        assert kind != "wrong" or got.accepted == 0

@both
@pytest.mark.parametrize("share", SHARES)
def test_plain_decoding_is_the_argmax_of_a_forward(mixer, share):
    """The oracle itself; in float32, where small products have another form; sliding windows."""
    prompts = [draw(1, l, l)[0] for l in (1, 5, 23)]
    for target in (toy(mixer, share), toy(mixer, share, torch.float32, hidden_size=320),
                   make_student([1], mixer, layers=2, **SLIDING["mistral"]),
                   make_student([1], mixer, layers=2, **SLIDING["qwen2"])):
        for prompt, new in zip(prompts, S.generate(target, prompts, 8).tokens):
            assert [*prompt.tolist(), *new.tolist()] == greedy_loop(target, prompt.tolist(), 8)

@pytest.mark.parametrize("settings, expected", [
    (dict(temperature=1, top_k=2), [0.625, 0.375, 0, 0]),
    (dict(temperature=1, top_p=0.8), [0.625, 0.375, 0, 0]),
    (dict(temperature=1, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365])], ids=str)
def test_probabilities_by_hand(settings, expected):
    """0.5, 0.3, 0.15, 0.05; temperature 0.5 squares them, and the squares sum to 0.365."""
    p = S.Sampling(**settings).probabilities(torch.tensor([0.5, 0.3, 0.15, 0.05]).log())
    assert torch.allclose(p, torch.tensor(expected, dtype=torch.float32))

def chi_square_test(seen, p):
    """The probability of a chi-square as large, if the draws are from p. Cells that expect fewer
    than 5 draws are one. seen, p (cells,)"""
    assert seen[p == 0].sum() == 0                          # nothing outside the support
    large = p * seen.sum() >= 5
    p, seen = (torch.cat([v[large], v[~large].sum()[None]]).double() for v in (p, seen))
    expected = (p * seen.sum()).clamp(min=1e-9)
    chi = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(len(p) - 1).double() / 2, chi / 2)

@pytest.mark.parametrize("kind, settings", [
    ("none", dict(temperature=0.9)), ("plain", dict(temperature=1.0)),
    ("plain", dict(temperature=0.8, top_k=4, top_p=0.9)), ("hybrid", dict(temperature=1.7)),
    ("hybrid", dict(temperature=1.3, top_p=0.7)), ("ngram", dict(temperature=1.0, top_k=4))])
def test_sampled_tokens_have_exactly_the_targets_distribution(kind, settings):
    """20,000 draws of three tokens against all 6^3; a seed decides; 1e-38 is greedy, not NaN."""
    small = dict(dtype=torch.float32, vocab_size=6, hidden_size=16)
    target, prompt = toy("mamba2", 0.5, **small), torch.tensor([1, 4, 2, 1, 4])
    draft = {"none": None, "ngram": S.NGramDraft(1), "hybrid": toy("mamba", 0.5, **small),
             "plain": make_teacher(layers=1, seed=5, **small)}[kind]

    def decode(b, **settings):
        settings["generator"] = torch.Generator().manual_seed(1)
        if draft is None:
            return S.generate(target, prompt.expand(b, -1), 3, **settings)
        return S.speculative_decode(target, draft, prompt.expand(b, -1), 3, lookahead=2, **settings)
    got = decode(20_000, **settings)
    assert draft is None or 0 < got.accepted < got.drafted
    words = torch.cartesian_prod(*[torch.arange(6)] * 3)                        # (216,3)
    with torch.no_grad():
        logits = target(torch.cat([prompt.expand(216, -1), words], 1)).logits[:, 4:7]
    p = S.Sampling(**settings).probabilities(logits).gather(2, words[..., None])[..., 0].prod(1)
    cell = torch.stack(got.tokens) @ torch.tensor([36, 6, 1])
    assert chi_square_test(cell.bincount(minlength=216), p) > 2e-4
    again, cold, greedy = decode(99, **settings), decode(1, temperature=1e-38), decode(1)
    assert torch.equal(torch.stack(again.tokens), torch.stack(decode(99, **settings).tokens))
    assert torch.equal(cold.tokens[0], greedy.tokens[0])

def test_threads_get_what_each_gets_alone():
    """Decoding and forwards at once on one model, training of another: nothing is swapped."""
    target, other = toy("mamba2", 0.5, torch.float32, hidden_size=320), toy("mamba", 0.25)
    draft, row, tokens = S.NGramDraft(2), list(range(30)), draw(4, 16)
    teacher = make_teacher(layers=2)
    student = M.convert_to_hybrid(teacher, [1])
    jobs = [lambda: S.generate(target, [[1, 2, 3]], 24).tokens[0],
            lambda: S.speculative_decode(target, draft, [[7, 8, 9] * 3], 24).tokens[0],
            lambda: S.speculative_decode(other, draft, [[5, 6] * 4], 24).tokens[0],
            lambda: next_logits(target, row, 30), lambda: next_logits(other, row, 30),
            lambda: torch.tensor(M.distil("stage 2", copy.deepcopy(student), teacher, tokens,
                                          tokens, steps=5, batch_size=4))]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: [job() for _ in range(3)], jobs))
    assert all(torch.equal(v, want) for want, said in zip(alone, found) for v in said)
    assert type(target.lm_head) is torch.nn.Linear, "the user's model is as it was"
    assert target.model.config._attn_implementation == "sdpa"

def test_target_of_another_class(tmp_path, monkeypatch):
    """A hybrid that trust_remote_code loads has the classes of a copied file."""
    from transformers import dynamic_module_utils as remote
    monkeypatch.setattr(remote, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    toy("mamba2", 0.5).save_pretrained(tmp_path / "saved")
    name, folder = "mamba_in_llama.HybridForCausalLM", str(tmp_path / "saved")
    kind = remote.get_class_from_dynamic_module(name, folder)
    theirs = kind.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    assert not isinstance(theirs, M.HybridForCausalLM)
    want = S.generate(toy("mamba2", 0.5), [[1, 2, 3]], 16).tokens[0]
    for draft in (S.NGramDraft(2), theirs, S.LayerSubsetDraft(theirs, [0, 1])):
        assert torch.equal(S.speculative_decode(theirs, draft, [[1, 2, 3]], 16).tokens[0], want)

@both
def test_compiled_and_captured_layers_decode_the_same(mixer):
    """By torch.compile (on a CPU without its compiler); on a GPU a round is a captured graph."""
    prompts = [[1, 2, 3], [4] * 9]
    want = torch.stack(S.generate(toy(mixer, 0.5), prompts, 10).tokens)
    target = copy.deepcopy(toy(mixer, 0.5)).to(DEVICE)
    for compiled in (False, True if DEVICE == "cuda" else "aot_eager"):
        for made in (S.generate(target, prompts, 10, compiled=compiled),
                     S.speculative_decode(target, target, prompts, 10, compiled=compiled)):
            assert torch.equal(torch.stack(made.tokens).cpu(), want)
    torch._dynamo.reset()

def test_n_gram_draft_by_hand():
    """What followed the longest match, of two the later one; nothing matches 9."""
    for prompt, want in (([7, 8, 1, 7, 8], [1, 7, 8, 1]), ([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], [9, 2]),
                         ([2, 3, 5, 2, 3, 6, 2, 3], [6, 2, 3, 6]), ([1, 2, 3, 4, 9], [])):
        draft = S.NGramDraft(3)
        draft.start(None, S.read_request(toy("mamba2", 0.5), [prompt], 9, 4, None), 4, *[None] * 3)
        assert draft.propose()[0][0, :len(want) or None].tolist() == want

@pytest.mark.parametrize("make", [
    make_teacher, lambda: make_student(None, "mamba"), lambda: make_student([0, 3], "mamba2"),
    lambda: make_teacher(**SLIDING["qwen2"])])
def test_layer_subset_shares_saves_and_leaves_its_model(make, tmp_path):
    """Shared weights, layers renumbered, an ordinary directory that generates."""
    model = make()
    draft = S.LayerSubsetDraft(model, [0, 3])
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert {p.data_ptr() for p in draft.parameters()} <= {p.data_ptr() for p in model.parameters()}
    draft.save_pretrained(tmp_path)
    again, tokens = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), draw(1, 9)
    with torch.no_grad():
        close(again(tokens).logits, draft(tokens).logits)
    said = again.generate(tokens, max_new_tokens=4, do_sample=False)[0, 9:]
    assert again.config.num_hidden_layers == 2
    assert torch.equal(said, S.generate(again, tokens, 4).tokens[0])

DYNAMIC = dict(layers=1, rope_parameters={"rope_type": "dynamic", "factor": 2., "rope_theta": 1e4})

@pytest.mark.parametrize("line, change", [
    ("lookahead 0", dict(lookahead=0)), ("ring of 32", dict(lookahead=32)),
    ("max_new_tokens 0", dict(max_new_tokens=0)), ("temperature -1", dict(temperature=-1)),
    ("temperature nan", dict(temperature=math.nan)), ("top_k -2", dict(top_k=-2)),
    ("top_p 0.0", dict(top_p=0.0)), ("prompt", dict(input_ids=[])),
    ("empty", dict(input_ids=torch.zeros(1, 0).long())), ("prompt", dict(input_ids=[[1], []])),
    (rf"token \[?{V}", dict(input_ids=[[1, V]])), (r"token \[?-1", dict(input_ids=[[1, -1]])),
    (rf"token \[?{V}", dict(eos_token_id=V)),
    ("vocabulary of 100", dict(draft=lambda: make_teacher(layers=1, vocab_size=V + 3))),
    ("context of 3", dict(target=lambda: make_teacher(
        layers=1, max_position_embeddings=3), input_ids=[[1] * 4])),
    ("ngram 0", dict(draft=lambda: S.NGramDraft(0))),
    ("indices in 0..3", dict(draft=lambda: S.LayerSubsetDraft(make_teacher(), [4]))),
    ("layers", dict(draft=lambda: S.LayerSubsetDraft(make_teacher(), [1, 1]))),
    ("target.*granite.*llama", dict(target=lambda: make_teacher("granite"))),
    ("draft.*qwen3.*llama", dict(draft=lambda: make_teacher("qwen3"))),
    ("RoPE.*dynamic", dict(target=lambda: make_teacher(**DYNAMIC))),
    ("RoPE.*dynamic", dict(draft=lambda: make_teacher(**DYNAMIC)))])
def test_speculation_errors(line, change):
    """What does not fit is refused in one line, before any decoding."""
    given = dict(target=lambda: toy("mamba2", 0.5), draft=lambda: make_teacher(layers=1),
                 input_ids=[[1, 2]], max_new_tokens=3) | change
    target, draft = given.pop("target"), given.pop("draft")
    refuses(line, lambda: S.speculative_decode(target(), draft(), **given))

@pytest.fixture
def home(tiny_run, tmp_path, monkeypatch):
    """A directory with the tiny run in it, which is the current one."""
    (tmp_path / "tiny_run").symlink_to(tiny_run)
    (tmp_path / "old").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_command_tiny_decodes_with_every_draft(home, capsys):
    """Rounds are shown, each draft's answer is the plain one; --json."""
    S.main(shlex.split("--tiny --max-new-tokens 16 --json t.json"))
    rows, out = json.loads((home / "t.json").read_text()), capsys.readouterr().out
    assert len(rows) >= 5 and all(row["identical"] for row in rows), rows
    assert "round  1:" in out and "speed-up" in out
    assert all(1 <= row["tokens_per_round"] <= 5 for row in rows)

def test_command_decodes_and_makes_drafts(home):
    """Each way to name a draft, one made by --make-draft among them; raw and sampled too."""
    S.main(shlex.split("--make-draft layers:0,2 --target tiny_run/teacher --out new --minutes .1"))
    assert AutoModelForCausalLM.from_pretrained("new").config.num_hidden_layers == 2
    for draft in ("ngram:3", "layers:0,3", "tiny_run/mamba", "new"):
        rows = S.main(["--target", "tiny_run/mamba2", "--draft", draft, "--lookahead", "3",
                       "--prompt", "The import statement", "--max-new-tokens", "12"])
        assert [row["identical"] for row in rows] == [True, True]
    rows = S.main(shlex.split("--target tiny_run/teacher --temperature .9 --top-k 9 --prompt A "
                              "--raw --max-new-tokens 5"))
    assert [len(row["tokens"]) <= 5 for row in rows] == [True, True]

def test_a_prompt_begins_as_the_tokenizer_wants():
    """A raw one as pipelines have it, a chat's turn by the template; all ends that are known."""
    chat, target = make_chat(LLAMA2), make_teacher(layers=1)
    target.generation_config.eos_token_id = [5, 6]
    asked = chat.ids(M.turns_of("one two"), add_generation_prompt=True)
    for raw, want in ((True, chat.tokenizer("one two").input_ids), (False, asked)):
        ids, ends = S.read_prompt("one two", target, chat.tokenizer, raw)
        assert ids.tolist() == want and set(ends) == {5, 6, chat.tokenizer.eos_token_id}
    core = make_chat(CHATML).tokenizer                  # one that adds a BOS
    core._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", core.bos_token_id)])
    raw = S.read_prompt("one", target, core, True)[0].tolist()
    core._tokenizer.post_processor = TemplateProcessing(single="$A")
    assert raw == [core.bos_token_id, *core("one").input_ids]

@pytest.mark.parametrize("text, line", [
    ("", "--target"), ("--target tiny_run/mamba2", "--prompt"), ("--tiny --draft x", "--draft"),
    ("--target nowhere --prompt x", "nowhere"), ("--target x --prompt x --out y", "--out"),
    ("--target tiny_run/mamba2 --prompt x --draft layers:9", "0..3"),
    ("--target tiny_run/mamba2 --prompt x --draft ngram:x", "ngram:x"),
    ("--make-draft layers:0 --target tiny_run/teacher --out tiny_run", "--out tiny_run"),
    ("--make-draft layers:9 --target tiny_run/teacher --out x", r"0\.\.3"),
    ("--make-draft layers:0 --target tiny_run/teacher --out x --minutes 0", "minutes 0"),
    ("--make-draft ngram:3 --target tiny_run/teacher --out x", "want layers:I,J"),
    ("--make-draft layers:0 --target tiny_run/teacher --out x", "0 of 2 rows have an answer"),
    ("--tiny --rows 3", "--rows"), ("--tiny --json old/x.json", "--json old/x.json"),
    ("--tiny --json tiny_run", "a directory"), ("--make-draft layers:0 --target x --raw", "--raw")])
def test_command_errors(home, text, line, capsys, monkeypatch):
    monkeypatch.setattr(M, "sample", lambda *args, **options: torch.zeros(2, 9).long())
    ends_in_one_line(line, capsys, S.main, shlex.split(text))

# ---- 12. The authors' released checkpoints. ---------------------------------------------------

def write_authors(folder, mixer):
    """A checkpoint as the authors write it, one layer of four kept, in two files. -> weights"""
    D, H, G, hd = 32, 4, 2, 8
    xb = G * hd
    model = make_teacher(hidden_size=D, intermediate_size=64, dtype=torch.float32)
    w = {n: p.detach().clone() for n, p in model.named_parameters()}
    if mixer == "mamba2":
        ssm = {"expand": 1, "ngroups": H, "d_state": hd}
        shapes = {"in_proj.weight": (2 * D + 2 * xb + H, D), "conv1d.weight": (D + 2 * xb, 1, 4),
                  "conv1d.bias": (D + 2 * xb,), "dt_bias": (H,), "A_log": (H,), "D": (H,),
                  "norm.weight": (D,)}
    else:
        ssm = {"expand": 1, "d_state": 4}
        shapes = {"in_proj_x.weight": (xb, D), "in_proj_z.weight": (D, D), "B_proj.weight": (xb, D),
                  "C_proj.weight": (D, D), "dt_proj_down.weight": (2, D), "dt_proj.weight": (D, 2),
                  "dt_proj.bias": (D,), "conv1d.weight": (D, 1, 4), "conv1d.bias": (D,),
                  "A_log": (D, 4), "D": (D,)}
    for i in (0, 1, 3):
        w = {n: p for n, p in w.items() if not n.startswith(f"model.layers.{i}.self_attn")}
        for name, shape in {**shapes, "out_proj.weight": (D, D)}.items():
            w[f"model.layers.{i}.mamba.{name}"] = torch.randn(shape) * 0.3
    model.config.save_pretrained(folder)
    config = dict(d_model=D, ssm_cfg=ssm, rms_norm_eps=1e-5, vocab_size=None, d_inner=D, d_xb=xb,
                  intermediate_size=64, hidden_act="silu", n_layer=4, attn_layers=[2])
    (folder / "mamba_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    for k in (0, 1):
        save_file(dict(list(w.items())[k::2]), folder / f"model-{k}.safetensors")
    return w

def authors_mixer(w, u, mixer, hole=None, H=4, G=2, hd=8, N=4):
    """Section 5 of the paper's facts, in float64, by the token loop. u (1,l,D)
    hole: the index of a token that is masked: a zero column, and no step of the state."""
    w, u, (_, l, D) = {n: p.double() for n, p in w.items()}, u.clone(), u.shape
    if hole is not None:
        u[:, hole] = 0                              # none of these projections has a bias
    def conv(v):
        out = F.conv1d(F.pad(v.mT, (3, 0)), w["conv1d.weight"], w["conv1d.bias"], groups=v.shape[2])
        return F.silu(out).mT

    if mixer == "mamba2":                           # K/V heads are repeated after the convolution
        z, xBC, dt = (u @ w["in_proj.weight"].T).split([D, 2 * G * hd + D, H], -1)
        x, B, C = conv(xBC).split([G * hd, G * hd, D], -1)
        x, B = (v.view(1, l, G, hd).repeat_interleave(H // G, 2) for v in (x, B))
        delta = F.softplus(dt + w["dt_bias"])[..., None]                        # (1,l,H,1)
        A, skip = -w["A_log"].exp().view(H, 1, 1), w["D"].view(H, 1)
    else:                                           # before it, and in runs of N channels
        H, hd = D // N, N
        z, C, x, B = (u @ w[n].T for n in ("in_proj_z.weight", "C_proj.weight", "in_proj_x.weight",
                                           "B_proj.weight"))
        x, B = (v.view(1, l, -1, N).repeat_interleave(2, 2) for v in (x, B))
        x = conv(x.flatten(2)).view(1, l, H, N)
        dt = u @ w["dt_proj_down.weight"].T @ w["dt_proj.weight"].T + 2 * w["dt_proj.bias"]
        delta = F.softplus(dt).view(1, l, H, N)
        A, skip = -w["A_log"].exp().view(H, N, N), w["D"].view(H, N)
    if hole is not None:
        delta[:, hole] = 0
    y, _ = M.recurrence(x, delta, A, B, C.view(1, l, H, hd))
    y = (y + skip * x) * F.silu(z.view(1, l, H, hd))
    if mixer == "mamba2":
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm.weight"].view(H, hd)
    return y.flatten(2) @ w["out_proj.weight"].T

@both
@torch.no_grad()
def test_authors_checkpoint_against_their_formulas(mixer, tmp_path):
    """Every mixer, also with a hole in the mask; ends of its generation_config; speculation."""
    w = write_authors(tmp_path, mixer)
    model = S.load_authors_checkpoint(str(tmp_path), torch.float64)
    assert model.config.mixer == mixer and sorted(model.mixers()) == [0, 1, 3]
    u, mask = logits64(1, 7, 32), torch.arange(7)[None] != 3
    for i, ours in model.mixers().items():
        prefix = f"model.layers.{i}.mamba."
        theirs = {n[len(prefix):]: p for n, p in w.items() if n.startswith(prefix)}
        close(ours(u)[0], authors_mixer(theirs, u, mixer), 1e-6)
        close(ours(u, token_mask=mask)[0][mask], authors_mixer(theirs, u, mixer, 3)[mask], 1e-6)
    plain = S.generate(model, [[1, 2, 3]], 12)
    got = S.speculative_decode(model, S.LayerSubsetDraft(model, [0, 2]), [[1, 2, 3]], 12)
    assert plain.tokens[0].tolist() == got.tokens[0].tolist()
    assert model.generation_config.eos_token_id == [7, 9]
    assert S.load_authors_checkpoint(str(tmp_path)).dtype == torch.bfloat16

def test_authors_checkpoint_errors(tmp_path):
    """What is missing, unknown, of another shape or a Git LFS pointer: one line that names it."""
    def refused(line):
        refuses(f"{tmp_path}.*{line}", S.load_authors_checkpoint, str(tmp_path))

    refused("config.json")
    w = write_authors(tmp_path, "mamba")
    (tmp_path / "model-1.safetensors").write_text(POINTER)
    refused("")
    (tmp_path / "model-1.safetensors").unlink()
    refused("lacks")
    (tmp_path / "model-0.safetensors").unlink()
    for name, shape in (("model.layers.3.mamba.new", (1,)), ("model.layers.3.mamba.A_log", (3, 4))):
        torch.save(w | {name: torch.zeros(shape)}, tmp_path / "pytorch_model.bin")
        refused(name.replace("mamba.A_log", ".*A_log.*3, 4"))
    torch.save(w, tmp_path / "pytorch_model.bin")
    ours = S.load_authors_checkpoint(str(tmp_path), torch.float64).lm_head.weight
    assert torch.equal(ours, w["lm_head.weight"].double())

# ---- 13. What README.md promises; a debugger can stop inside. ---------------------------------

with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
    README = file.read()

def readme_block(holds):
    """The one fenced block of README.md that holds this text."""
    found, = [block for block in re.findall(r"```\w*\n(.*?)```", README, re.S) if holds in block]
    return found

def test_trainer_script_of_the_readme_in_two_processes(world, tmp_path):
    """transformers' Trainer around the hybrid and Eq. 2: the script's arguments are a teacher's
    directory, an npz file of tokens and a directory for the student."""
    pytest.importorskip("accelerate")
    (tmp_path / "script.py").write_text(readme_block("class Distiller"))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  "script.py", world["teacher"], world["npz"], "out", cwd=tmp_path, here=True)
    assert done.returncode == 0 and "parallel_mode != " not in done.stderr, done.stderr
    assert M.read_model(tmp_path / "out", "cpu")[0].mixers()

@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is for CPUs")
def test_pdb_tour_of_the_readme(tmp_path):
    """Weight moves, VERIFY, Triton kernel. What pdb shows stands behind its commands, after #."""
    tour = [line.partition("  #") for line in readme_block("tbreak M.Mixer").splitlines()]
    (tmp_path / "session.py").write_text(readme_block("import mamba_in_llama as M, spec_decode"))
    typed = "\n".join(words for words, _, _ in tour) + "\nq\n"
    done = python("-m", "pdb", "session.py", cwd=tmp_path, here=True, input=typed,
                  TRITON_INTERPRET="1")
    for shown in ("copy_attention", "verify", "step_kernel", *(shown for _, _, shown in tour)):
        assert shown.strip() in done.stdout, (shown, done.stdout[-3000:], done.stderr[-1000:])

README_COMMANDS = [                     # comments and continuations resolved
    shlex.split(line, comments=True)[1:] for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")]

@pytest.mark.parametrize("words", README_COMMANDS, ids=" ".join)
def test_readme_commands_parse(words, tmp_path, monkeypatch):
    """Other tests run each kind of command; here every flag is known."""
    monkeypatch.chdir(tmp_path)
    parsers = {"mamba_in_llama.py": M.parse_args, "spec_decode.py": S.parse_args,
               "test_all.py": globals().get("parse_args", bool), "-m": bool}
    assert parsers[words[0]](words[1:])

EXERCISES = re.findall(
    r"In `(\w+\.py)` replace `([^`]+)` by\s+`([^`]+)`(.*?)(?=^\d\. |^#)", README, re.S | re.M)

@pytest.mark.parametrize("number", range(6))
def test_exercises_of_the_readme(number, tmp_path):
    """What is replaced stands once in its file, Python can read the result, and the test that the
    exercise names notices the mistake."""
    name, old, new, more = EXERCISES[number]
    for file in ("mamba_in_llama.py", "spec_decode.py", "test_all.py", "README.md"):
        shutil.copy(os.path.join(HERE, file), tmp_path)
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert text.count(old) == 1 and new != old
    (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    compile(text.replace(old, new), name, "exec")
    for words in re.findall("python -m (pytest [^`]+)", more):
        done = python("-m", *words.split(), "-x", cwd=tmp_path)
        assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-2000:]

# ---- 14. The laboratory: slow runs, see --help. A mode is a function of (report, args); every --
#          table is a Report's, every picture is made by `picture`.

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32       # what models decode in
COLOURS = dict(blue="#0072B2", orange="#E69F00", green="#009E73", red="#D55E00", sky="#56B4E9",
               pink="#CC79A7", grey="#CCCCCC")              # Okabe and Ito: colour-blind safe

class Report:
    """Tables, printed a line at a time; --json is written after each, for runs that are cut off."""
    def __init__(self, path):
        self.path = path
        self.rows = []
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        self.about = dict(device=device, threads=torch.get_num_threads(), dtype=str(DTYPE),
                          torch=torch.__version__, transformers=transformers.__version__)
        print(self.about)

    def table(self, title, **columns):
        """columns: {key of a row: format}; "<30": text of 30 columns, "±": mean and spread."""
        self.columns = columns
        print(f"\n{title}")
        self.print_cells({key: key.replace("_", " ") for key in columns})

    def print_cells(self, texts):
        """One line."""
        for key, form in self.columns.items():
            width = 15 if form == "±" else max(7, len(key) + 1)
            print(f"{texts[key]:{form}}" if "<" in form else " " + texts[key].rjust(width), end="")
        print(flush=True)

    def add(self, **row):
        """Print a row and keep it."""
        texts = {}
        for key, form in self.columns.items():
            if form == "±":
                texts[key] = f"{numpy.mean(row[key]):.3f} ± {numpy.std(row[key]):.3f}"
            else:
                texts[key] = "" if row[key] is None else f"{row[key]:{form}}"
        self.print_cells(texts)
        self.rows.append(row)
        if self.path:                                   # the old file stays until this one is whole
            with open(self.path + ".tmp", "w") as file:
                json.dump({"about": self.about, "rows": self.rows}, file, indent=1)
            os.replace(self.path + ".tmp", self.path)

def picture(path, draw, width=9, height=5, panels=(1, 1), **data):
    """Let draw(axes, **data) fill axes and save them. matplotlib is optional; no display needed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"font.size": 16, "lines.linewidth": 2.5, "lines.markersize": 9}):
        figure = Figure((width, height), layout="constrained")
        draw(figure.subplots(*panels), **data)
        figure.savefig(path, dpi=100)
    print("drew", path)

def seconds_of(function):
    """-> seconds, what the function returned"""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else int
    wait()
    begin = time.perf_counter()
    made = function()
    wait()
    return time.perf_counter() - begin, made

def clock(calls):
    """Median seconds of one of `calls`, functions of no arguments; on CUDA all of them are one
    graph, so that the host is not what is measured."""
    def run():
        for call in calls:
            call()
    once = S.as_graph(run) if DEVICE == "cuda" else run
    return sorted(seconds_of(once)[0] for _ in range(5))[2] / len(calls)

# ---- 15. --bench: Tables 1 and 5, batch 1, random weights, SIMULATED acceptance. --------------

def llama(width, mlp, layers, heads, groups, words, tied=True):
    """The config of a Llama of this shape."""
    return LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=words,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=2)

# pure Mamba models are 0 % hybrids (so with MLPs) of the paper's parameter counts
SHAPES = {
    "2.8b": llama(2560, 6464, 32, 20, 20, 50280), "130m": llama(768, 1984, 12, 12, 12, 50280),
    "7b": llama(4096, 10304, 32, 32, 32, 128256), "1b": llama(2048, 8192, 16, 32, 8, 128256),
    "8b": llama(4096, 14336, 32, 32, 8, 128256, False), "tiny": llama(256, 768, 8, 8, 4, 4096),
    "zephyr": llama(4096, 14336, 32, 32, 8, 32000, False), "nano": llama(64, 192, 2, 4, 2, 4096),
    "smollm2": llama(576, 1536, 30, 9, 3, 49152)}
# attention: share of layers; paper_...: the paper's (7B, 2.8B: H100, others: 3090). Misprints: 4.04
# of 2.8b is above its bound of 4, 3.9 is simulated; 27 of 8b is 2.7 or, by the speed-up, 3.6
Trial = collections.namedtuple("Trial", "size attention draft K paper_gen paper_speed_up")
FOUR = "layers:0,10,20,31"
TRIALS = [Trial(*values) for values in (
    ("2.8b", 0, "130m", 3, 3.9, 1.71), ("2.8b", 0, "130m", 4, 3.9, 1.85),
    ("7b", 0, "1b", 3, 3.28, 1.95), ("7b", 0, "1b", 4, 3.6, 2.0),
    ("8b", 0.5, FOUR, 4, 2.7, 1.6), ("8b", 0.5, FOUR, 4, 3.6, 1.6),
    ("8b", 0.25, FOUR, 4, 3.6, 1.58),
    ("zephyr", 0.5, "layers:0,31", 4, 2.48, 1.8), ("zephyr", 0.5, FOUR, 4, 3.0, 1.81),
    ("zephyr", 0.25, "layers:0,31", 4, 2.64, 1.88), ("zephyr", 0.25, FOUR, 4, 3.0, 1.8),
    ("tiny", 0, "nano", 4, 3.6, None), ("tiny", 0.5, "layers:0,7", 4, 2.48, None))]

class FreeDraft(S.NGramDraft):
    """A draft that costs nothing: with all tokens accepted, a round is what VERIFY costs."""
    def propose(self):
        return self.rows.tokens[:, :self.K], None

def memory_bandwidth():
    """Bytes per second that this memory gives at best, by copies or reads of 1 GiB or 256 MiB."""
    a = torch.ones(2 ** (28 if DEVICE == "cuda" else 26), device=DEVICE)
    b = torch.ones_like(a)
    copying = 2 * a.nbytes / clock([lambda: b.copy_(a)] * 10)
    return max(copying, a.nbytes / clock([a.sum] * 10))

def hollow_hybrid(size, share):
    """A hybrid of one of SHAPES, layers evenly spaced: shapes without memory. Without attention it
    is the paper's Mamba of 16 states."""
    options = {} if share else dict(mixer="mamba", d_state=16, recipe="paper")
    L = SHAPES[size].num_hidden_layers
    n = round(share * L)
    keep = [math.ceil((i + 1) * L / n) - 1 for i in range(n)]
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(SHAPES[size], dtype=DTYPE)
        return M.convert_to_hybrid(teacher, keep, **options).eval()

def random_model(size, share):
    """A hybrid with random weights, for timing only."""
    model = hollow_hybrid(size, share).to_empty(device=DEVICE)
    model.tie_weights()
    for p in model.parameters():
        p.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.model.config).to(DEVICE)
    return model

def weight_bytes(model):
    """Bytes of weights that one decoding step reads: all but the embedding, and the head."""
    head = model.get_output_embeddings().weight
    tables = (id(model.get_input_embeddings().weight), id(head))
    return head.nbytes + sum(p.nbytes for p in model.parameters() if id(p) not in tables)

def acceptance_for(gen, K):
    """The chance P per token for which # Gen = 1 + P + ... + P^K, to four digits."""
    chances = [i / 1e4 for i in range(10 ** 4 + 1)]
    return next((P for P in chances if sum(P ** j for j in range(K + 1)) >= gen), 1.0)

def bench(report, args):
    """--bench: how fast a target decodes, plainly and with a draft. first_s: seconds before the
    first token, with compiling and capture. floor: share of the tokens/s that reading the weights
    once a token would allow. verify: a round of K + 1 tokens with a free draft, over a step."""
    sizes = (args.sizes or ("2.8b,7b,8b,zephyr" if DEVICE == "cuda" else "tiny")).split(",")
    known = dict.fromkeys(trial.size for trial in TRIALS)
    M.require(set(sizes) <= set(known), f"--sizes {args.sizes}: want some of {', '.join(known)}")
    torch.manual_seed(0)
    roof = report.about["memory_bytes_per_s"] = memory_bandwidth()
    report.table(f"random weights, SIMULATED acceptance, batch 1; memory gives {roof / 1e12:.3f} "
                 "TB/s", target="<12", draft="<18", K="", compiled="", first_s=".1f",
                 plain_per_s=".1f", floor=".0%", verify=".2f", tokens_per_s=".1f", gen=".2f",
                 paper_gen=".2f", speed_up=".2f", paper_speed_up=".2f")
    wanted = [trial for trial in TRIALS if trial.size in sizes]
    for (size, share), trials in itertools.groupby(wanted, lambda t: (t.size, t.attention)):
        target = None                                   # one target in memory at a time
        target = random_model(size, share)
        trials = list(trials)
        for compiled in (False, True) if args.compile else (False,):
            torch.compiler.reset()
            bench_target(report, target, trials, compiled, args.tokens)

def bench_target(report, target, trials, compiled, n_new):
    """The rows of one target."""
    n_new = n_new or (512 if DEVICE == "cuda" else 64)
    prompt = torch.arange(1, 33)[None]                                          # (1,l)
    total, plain = seconds_of(lambda: S.generate(target, prompt, n_new, compiled=compiled))
    plain_per_s = plain.tokens_per_second
    floor = report.about["memory_bytes_per_s"] / weight_bytes(target)           # tokens/s
    for trial in trials:
        if trial.draft in SHAPES:                       # 130m is pure Mamba, 1b all attention
            draft = random_model(trial.draft, int(trial.draft == "1b"))
        else:
            draft = S.read_draft(trial.draft, target)
        speculate = functools.partial(S.speculative_decode, target, lookahead=trial.K,
                                      input_ids=prompt, max_new_tokens=n_new, compiled=compiled)
        fast = speculate(draft, simulate=acceptance_for(trial.paper_gen, trial.K))
        free = speculate(FreeDraft(), simulate=1.0)
        report.add(target=f"{trial.size} {trial.attention:.0%}", draft=trial.draft, K=trial.K,
                   compiled="yes" if compiled else "no", first_s=total - plain.seconds,
                   plain_per_s=plain_per_s, floor=plain_per_s / floor,
                   verify=free.seconds / free.rounds * plain_per_s, gen=fast.tokens_per_round,
                   tokens_per_s=fast.tokens_per_second, paper_gen=trial.paper_gen,
                   speed_up=fast.tokens_per_second / plain_per_s,
                   paper_speed_up=trial.paper_speed_up, draft_bytes=weight_bytes(draft))

# ---- 16. --bench-kernel (Figure 3), --bench-scan. ---------------------------------------------

# an 8B's layer and a 7B's: mixer, query heads, key/value heads, head dimension, states
KERNEL_LAYERS = {"mamba2 32x128x128": ("mamba2", 32, 8, 128, 128),
                 "mamba 4096x16": ("mamba", 32, 8, 128, 16)}
# by batch and T, other projects' kernels on an H100, us, in CUDA graphs on rotated buffers: T
# launches of mamba_ssm's step / the authors' / vLLM's, tiles tuned / ReplaySSM's, mean of its ring
PEERS = {
    "mamba2 32x128x128": {
        (1, 1): "3.5 / 4.3 / 3.6 / 10.1", (1, 5): "13.8 / 10.4 / 5.3 / 11.2",
        (1, 16): "44 / 25 / 10.2 / 12.5", (64, 1): "102 / 161 / 99 / 70.6",
        (64, 5): "511 / 568 / 121 / 94.6", (64, 16): "1633 / 1812 / 238 / 155",
        (256, 1): "402 / 633 / 388 / 260", (256, 5): "2006 / 2257 / 461 / 356"},
    "mamba 4096x16": {(1, 1): "2.2 / - / - / -", (1, 5): "9.5 / 6.4 / 4.0 / -",
                      (64, 1): "13.7 / - / - / -", (64, 5): "58 / 71 / 31 / -"}}

def bare_mixer(kind, heads, groups, head_dim, N):
    """A mixer without its projections: its input (b,T,rows) is in_proj's output."""
    config = M.HybridConfig(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=head_dim, mixer=kind, d_state=N)
    mixer = M.Mixer(config, 0)
    mixer.to(DEVICE, DTYPE)
    mixer.A_log.data = mixer.A_log.data.float()
    mixer.dt_bias.data = mixer.dt_bias.data.float()
    mixer.in_proj = mixer.out_proj = torch.nn.Identity()
    return mixer.eval()

def kernel_calls(mixer, b, T, copies, compiled):
    """All calls of a flush cycle, each on every copy of the buffers: they find T, 2 T, ... tokens
    in the ring, the last one folds them (Mamba's kernel: each). -> {name: functions}"""
    like = dict(device=DEVICE, dtype=DTYPE)
    cache = S.MixerCache()
    cache.ring = 16 if T < 9 else 32                    # as `speculative_decode` takes them
    cache.call = S.Call(None, torch.arange(b, device=DEVICE)[:, None])
    parts = [S.MixerState(mixer, cache, torch.empty(0, **like).new_ones) for _ in range(copies)]
    for part in parts:
        part.ring_dt.fill_(0.01)                        # with 1, states end in denormal numbers
    C = torch.randn(b, T, mixer.H, mixer.N, **like)
    proj = torch.randn(b, T, sum(mixer.rows), **like)
    angles = torch.randn(2, b, T, mixer.config.head_dim, **like)                # cos, sin
    A = -torch.exp(mixer.A_log.detach()).view(*parts[0].ring_dt.shape[2:], -1)  # (H,p',n')
    torch.compiler.reset()
    whole = torch.compile(mixer, dynamic=False) if compiled else mixer
    calls = {"kernel": [], "mixer": []}
    for n in range(T, max(parts[0].fold_at, T) + 1, T):
        counts = torch.tensor([[0], [n], [0]], dtype=torch.int32, device=DEVICE).repeat(1, b)
        at = n + torch.arange(1 - parts[0].d_conv, T, device=DEVICE)               # (W-1+T,)
        call = S.Call(counts, cache.call.row, slots=at.repeat(b, 1) % parts[0].ring_u.shape[1])
        for part in parts:
            part = copy.copy(part)                      # the same tensors
            part.call = call
            rings = (part.ring_x, part.ring_dt, part.ring_B)
            calls["kernel"].append(functools.partial(
                S.multi_step, C, A, part.state, *rings, counts, part.fold_at, mixer.runs))
            calls["mixer"].append(functools.partial(whole, proj, angles, **{M.CACHE: part}))
    return calls

@torch.no_grad()
def bench_kernel(report, args):
    """--bench-kernel (Figure 3): T tokens in one call against T calls, and a copy of the state.
    us: S.multi_step alone; mixer_us: all between a mixer's two projections. The mean over a flush
    cycle, all T accepted in each call; on CUDA one graph, on up to 64 buffers. --plot: every T"""
    report.table(f"us, ring 16 (T > 8: 32), mixers{' ' if args.compile else ' not '}compiled; "
                 "others: mamba_ssm / authors / vLLM / ReplaySSM, on an H100", layer="<18",
                 batch="", T="", us=".1f", T_x_one=".1f", copy=".1f", mixer_us=".1f",
                 T_x_one_mixer=".1f", others=">32")
    batches = (1, 8, 64, 256) if DEVICE == "cuda" else (1,)
    for name, b in itertools.product(KERNEL_LAYERS, batches):
        mixer = bare_mixer(*KERNEL_LAYERS[name])
        size = b * mixer.H * mixer.N * mixer.N                                  # (b,H,P,N) fp32
        copies = min(64, math.ceil(150 * 2 ** 20 / (4 * size))) if DEVICE == "cuda" else 1
        pairs = torch.ones(copies, 2, size, device=DEVICE)
        copied = clock([functools.partial(new.copy_, old) for new, old in pairs])
        pairs = one = None
        for T in range(1, 17) if args.plot else (1, 5, 16):
            calls = kernel_calls(mixer, b, T, copies, args.compile)
            us = {what: 1e6 * clock(calls[what]) for what in calls}
            one = one or us
            report.add(layer=name, batch=b, T=T, us=us["kernel"], T_x_one=T * one["kernel"],
                       copy=1e6 * copied, mixer_us=us["mixer"], T_x_one_mixer=T * one["mixer"],
                       compiled=args.compile, others=PEERS[name].get((b, T), ""))
    if args.plot:
        picture(args.plot, draw_kernel, 11, 6.5, (1, 2), rows=report.rows)

def draw_kernel(axes, rows):
    """Time against T, the smallest and the largest batch; a panel for each layer."""
    for axis, name in zip(axes.flat, KERNEL_LAYERS):
        mine = [row for row in rows if row["layer"] == name]
        for b, colour in {mine[-1]["batch"]: "red", mine[0]["batch"]: "blue"}.items():
            part = [row for row in mine if row["batch"] == b]
            for key, style, label in (("us", "o-", "one call of T tokens"),
                                      ("T_x_one", "--", "T calls of one token"),
                                      ("copy", ":", "a copy of the state")):
                axis.plot([row["T"] for row in part], [row[key] for row in part], style,
                          color=COLOURS[colour], label=f"batch {b}: {label}")
        axis.set(title=name, yscale="log", xlabel="tokens T", xticks=(1, 8, 16), ylabel="µs")
    axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)

def peak_bytes(function):
    """The most memory that a call has at a time, beyond what there was before."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))

def bench_scan(report, args):
    """--bench-scan: one layer's scan in training against the definition; the best of four runs."""
    report.table("forward + backward of (1, length) tokens, 9 heads, state 64 x 64, float32",
                 mixer="<8", form="<12", length=",", ms=".1f", speed_up=".1f", peak_MiB=".1f",
                 share_of_loop=".0%")
    for mixer, length in itertools.product(MIXERS, args.lengths):
        inner = (1, 1) if mixer == "mamba2" else (64, 64)                       # p', n'
        torch.manual_seed(0)
        x, B, C = torch.randn(3, 1, length, 9, 64, device=DEVICE)               # (1,l,9,64)
        delta = F.softplus(torch.randn(1, length, 9, inner[0], device=DEVICE) - 4)
        A = -torch.randn(9, *inner, device=DEVICE).exp()
        inputs = [v.requires_grad_() for v in (x, delta, A, B, C)]

        def train(scan):
            y, _ = scan(*inputs)
            torch.autograd.grad(y.square().mean(), inputs)

        loop = functools.partial(train, M.recurrence)
        chunks = functools.partial(train, M.chunked_scan)
        runs = [(seconds_of(loop)[0], seconds_of(chunks)[0]) for _ in range(4)]
        peaks = peak_bytes(loop), peak_bytes(chunks)
        for form, peak, seconds in zip(("token loop", "chunks"), peaks, zip(*runs)):
            report.add(mixer=mixer, form=form, length=length, ms=1e3 * min(seconds),
                       speed_up=min(runs)[0] / min(seconds), peak_MiB=peak / 2 ** 20,
                       share_of_loop=peak / peaks[0])

# ---- 17. --needle (Figure 4) and cache sizes, --compare-teacher. ------------------------------

def needle(report, args):
    """--needle: sizes of caches of two teachers' shapes; for --target `find_needles`."""
    report.table(f"cache of one row, {DTYPE}", model="<10", attention=".0%", tokens=",", MiB=".1f",
                 share_of_teacher=".0%")
    for name in ("smollm2", "8b"):
        teachers = {}                                   # bytes at 100 % attention
        for share, n in itertools.product((1.0, 0.5, 0.25, 0.0), (1024, 8192, 65536)):
            cache = S.MixerCache.allocate(hollow_hybrid(name, share), 1, n, 1)
            size = sum(tensor.nbytes for part in cache.layers for tensor in vars(part).values()
                       if torch.is_tensor(tensor))
            teachers.setdefault(n, size)
            report.add(model=name, attention=share, tokens=n, MiB=size / 2 ** 20,
                       share_of_teacher=size / teachers[n])
    if args.target:
        find_needles(report, args)

def find_needles(report, args):
    """Is a number found again, hidden at some depth of a long text? 8 prompts for each cell."""
    from pydoc_data.topics import topics
    model, tokenizer = S.load(args.target)
    most = model.config.max_position_embeddings - 12
    M.require(40 < min(args.lengths) and max(args.lengths) <= most, f"--lengths: want 41 to {most}")
    read = functools.partial(tokenizer, verbose=False)
    hay = 9 * read("\n".join(topics[k] for k in sorted(topics))).input_ids
    ask = read("\nWhat is the magic number? The magic number is").input_ids
    draw = random.Random(0)
    report.table("needle in a haystack, 8 numbers a cell", length=",", depth=".0%", found=".0%")
    for length, depth in itertools.product(args.lengths, (0.0, 0.25, 0.5, 0.75, 1.0)):
        prompts = {}
        while len(prompts) < 8:
            secret = str(draw.randrange(10000, 99999))
            fact = read(f"\nThe magic number is {secret}.\n").input_ids
            room = length - len(fact) - len(ask)
            begin = draw.randrange(len(hay) - room)
            cut = begin + int(depth * room)
            prompts[secret] = hay[begin:cut] + fact + hay[cut:begin + room] + ask
        said = S.generate(model, list(map(torch.tensor, prompts.values())), 12).tokens
        found = [secret in tokenizer.decode(ids) for secret, ids in zip(prompts, said)]
        report.add(length=length, depth=depth, found=numpy.mean(found).item())

def trial_questions():
    """Ten questions that ask for free text, and ten for text that repeats itself. -> {kind: 10}"""
    things = ("rain", "bread", "stones", "cats", "trains", "tea", "music", "bees", "books", "maps")
    lists = [[f"{i}. There is {thing} in box {i}.\n" for i in range(1, 9)] for thing in things]
    return {"free text": [f"Tell me about {thing}." for thing in things],
            "repeating": ["Go on with this list up to 40:\n" + "".join(rows) for rows in lists]}

def by_transformers(model, prompt, n_new):
    """transformers' own greedy generate, the prompt timed too. prompt (l,) -> DecodeResult"""
    seconds, made = seconds_of(lambda: model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False,
        max_new_tokens=n_new, min_new_tokens=n_new, repetition_penalty=1.0, pad_token_id=0))
    return S.DecodeResult([made[0, len(prompt):]], n_new, 0, 0, 1.0, seconds, 0.0)

@torch.no_grad()
def first_difference(model, prompt, plain, other):
    """Where two answers part, and the gap of their logits. prompt (l,)  plain, other (n,)"""
    i = int((plain != other).int().argmax())
    logits = model(torch.cat((prompt, plain[:i]))[None], logits_to_keep=1).logits[0, 0]     # (V,)
    gap = float((logits[plain[i]] - logits[other[i]]).abs())
    return f"token {i} differs, its two logits are {gap:.2g} apart"

def compare_teacher(report, args):
    """--compare-teacher: greedy answers, plainly, with ngram:3, the teacher's by transformers."""
    n_new = args.tokens or 128
    models = {"hybrid": S.load(args.target), "teacher": S.load(args.compare_teacher)}
    report.table(f"greedy, {n_new} tokens for each of 10 prompts; identical: to plain decoding",
                 model="<9", prompts="<11", decoded="<14", tokens_per_s=".1f", gen=".2f",
                 speed_up=".2f", identical="")
    for (kind, questions), (name, (model, tokenizer)) in itertools.product(
            trial_questions().items(), models.items()):
        prompts = [S.read_prompt(text, model, tokenizer, False)[0] for text in questions]
        plain = [S.generate(model, prompt, n_new) for prompt in prompts]
        fast = [S.speculative_decode(model, S.NGramDraft(3), prompt, n_new) for prompt in prompts]
        ways = {"plainly": plain, "with ngram:3": fast}
        if name == "teacher":
            ways["transformers"] = [by_transformers(model, prompt, n_new) for prompt in prompts]
        for way, answers in ways.items():
            different = [f"{i}: " + first_difference(model, prompts[i], a.tokens[0], b.tokens[0])
                         for i, (a, b) in enumerate(zip(plain, answers))
                         if not torch.equal(a.tokens[0], b.tokens[0])]
            seconds = sum(made.seconds for made in answers)
            tokens = n_new * len(answers)
            report.add(model=name, prompts=kind, decoded=way, tokens_per_s=tokens / seconds,
                       speed_up=sum(made.seconds for made in plain) / seconds,
                       gen=tokens / sum(made.rounds for made in answers),
                       identical=10 - len(different), different=different)
            print("".join(f"    prompt {text}\n" for text in different), end="")

# ---- 18. --quiz: teacher and student answer, greedy; likelihood flatters (arXiv 2603.26556). --

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Peru Lima,
Greece Athens, Austria Vienna, Belgium Brussels, Netherlands Amsterdam, Denmark Copenhagen,
Norway Oslo, Sweden Stockholm, Finland Helsinki, Iceland Reykjavik, Ireland Dublin, Chile Santiago,
United_Kingdom London, Poland Warsaw, Czech_Republic Prague, Slovakia Bratislava, Hungary Budapest,
Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Slovenia Ljubljana, Mali Bamako,
Albania Tirana, Ukraine Kyiv|Kiev, Russia Moscow, Estonia Tallinn, Latvia Riga, Lithuania Vilnius,
Belarus Minsk, Switzerland Bern, Turkey Ankara, Georgia Tbilisi, Armenia Yerevan, Azerbaijan Baku,
Israel Jerusalem, Lebanon Beirut, Syria Damascus, Jordan Amman, Iraq Baghdad, Iran Tehran,
Saudi_Arabia Riyadh, Yemen Sanaa|Sana'a, Oman Muscat, Qatar Doha, Afghanistan Kabul,
Pakistan Islamabad, India New_Delhi|Delhi, Nepal Kathmandu, Bangladesh Dhaka, Thailand Bangkok,
Cambodia Phnom_Penh, Vietnam Hanoi, Ghana Accra, Malaysia Kuala_Lumpur, Indonesia Jakarta,
Philippines Manila, China Beijing, Mongolia Ulaanbaatar, South_Korea Seoul, North_Korea Pyongyang,
Japan Tokyo, Australia Canberra, New_Zealand Wellington, Egypt Cairo, Libya Tripoli, Tunisia Tunis,
Morocco Rabat, Sudan Khartoum, Ethiopia Addis_Ababa, Kenya Nairobi, Uganda Kampala, Rwanda Kigali,
Zimbabwe Harare, Mozambique Maputo, Angola Luanda, Nigeria Abuja, Senegal Dakar, Somalia Mogadishu,
Canada Ottawa, United_States Washington, Cuba Havana, Jamaica Kingston, Nicaragua Managua,
Colombia Bogota, Venezuela Caracas, Ecuador Quito, Argentina Buenos_Aires, Uruguay Montevideo,
Paraguay Asuncion, Brazil Brasilia"""
LISTS = """Monday, Tuesday, Wednesday: Thursday; January, February, March: April; A, B, C, D: E;
one, two, three: four; 2, 4, 6, 8: 10; 5, 10, 15, 20: 25; 10, 20, 30, 40: 50; 1, 3, 5, 7: 9;
9, 8, 7, 6: 5; first, second, third: fourth; Mercury, Venus, Earth: Mars; 1, 2, 4, 8: 16;
spring, summer, autumn: winter; 100, 200, 300: 400; a, e, i, o: u; Friday, Saturday: Sunday;
20, 19, 18, 17: 16; ten, twenty, thirty: forty; w, x, y: z; 50, 60, 70, 80: 90; 7, 14, 21: 28"""
OPPOSITES = """hot cold, big small|little, up down, good bad|evil, left right, black white,
day night, high low, open closed|close|shut, rich poor, old young|new, happy sad|unhappy,
fast slow, win lose, long short, hard soft|easy, light dark|heavy, early late, full empty, wet dry,
strong weak, clean dirty, love hate, true false, begin end|finish, buy sell, first last"""

def quiz_questions(tokenizer):
    """-> list of (kind, question, right answers a|b)"""
    from pydoc_data.topics import topics
    draw = random.Random(0)
    questions = []
    for pair in CAPITALS.split(","):
        country, right = [words.replace("_", " ") for words in pair.split()]
        questions.append(("capital", f"What is the capital of {country}?", right))
    filler = tokenizer(topics["assignment"], verbose=False).input_ids
    for length in numpy.repeat((50, 100, 200, 400), 6).tolist():
        number = str(draw.randrange(1000, 9999))
        begin = draw.randrange(len(filler) - length)
        text = tokenizer.decode(filler[begin:begin + length])
        questions.append((f"number, {length} tokens", f"The secret number is {number}. Remember "
                          f"it. {text}\nWhat is the secret number?", number))
    for line in LISTS.split(";"):
        items, right = line.strip().split(": ")
        questions.append(("list", f"What comes next in this list? {items}, ...", right))
    for _ in range(25):
        a, b = draw.choices(range(1, 10), k=2)
        questions.append(("sum", f"What is {a} + {b}?", str(a + b)))
    for pair in OPPOSITES.split(","):
        word, right = pair.split()
        questions.append(("opposite", f'What is the opposite of the word "{word}"?', right))
    return questions

def is_right(answer, question, right):
    """Is a right answer a word of it? What it repeats of a sum or a list does not count."""
    asked = re.search(r"\d+ \+ \d+|(?<=list\? ).*(?=, \.\.\.)", question)
    answer = answer.replace(asked[0], "") if asked else answer
    answer = unicodedata.normalize("NFKD", answer).encode("ascii", "ignore").decode().casefold()
    return any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", answer)
               for word in right.split("|"))

def greedy_answers(folder, n_new):
    """-> [kind, question, right, answer], ...; neighbours, of about one length, share a batch"""
    model, tokenizer = S.load(folder)
    questions = quiz_questions(tokenizer)
    answers = []
    for k in tqdm(range(0, len(questions), 24), "answers", leave=False, disable=None):
        prompts, ends = zip(*[S.read_prompt(text, model, tokenizer, False)
                              for _, text, _ in questions[k:k + 24]])
        made = S.generate(model, prompts, n_new, eos_token_id=ends[0])
        answers += [tokenizer.decode(ids, skip_special_tokens=True) for ids in made.tokens]
    return [(*question, answer) for question, answer in zip(questions, answers)]

def quiz(report, args):
    """--quiz: share of right answers of both; of_teachers: of the teacher's right answers the share
    that the student has right too; same: share of equal answers."""
    n_new = args.tokens or 32
    results = collections.defaultdict(list)
    answers = report.about["answers"] = []
    for (kind, text, right, theirs), (_, _, _, ours) in zip(
            greedy_answers(args.teacher, n_new), greedy_answers(args.target, n_new)):
        teacher, student = [is_right(answer, text, right) for answer in (theirs, ours)]
        answers.append(dict(question=text, right=right, teacher=theirs, student=ours))
        for name in (kind, "all questions"):
            results[name].append([teacher, student, teacher and student, theirs == ours])
    report.table(f"greedy answers of at most {n_new} tokens", kind="<20", questions="",
                 teacher=".0%", student=".0%", of_teachers=".0%", same=".0%")
    for kind in sorted(results, key=lambda kind: kind == "all questions"):      # that last
        teacher, student, both, same = numpy.mean(results[kind], 0).tolist()
        report.add(kind=kind, questions=len(results[kind]), teacher=teacher, student=student,
                   of_teachers=both / teacher if teacher else None, same=same)

# ---- 19. --ablate: the paper's Tables 6 to 9 at toy size. -------------------------------------

SIZE = dict(teacher_steps=800, rows=1024, heldout=48, length=96, steps=120, batch=8)
SMALL = dict(teacher_steps=4, rows=12, heldout=4, length=64, steps=4, batch=2)     # it runs at all
RATES = {"align": 1e-2, "stage-1": 5e-3, "all": 5e-3, "SFT": 1e-3, "DPO": 1e-4}
SWITCHES = {"random": {"attn_init": False}, "no-rope": {"rope": False}, "paper": M.RECIPES["paper"]}
METRICS = {"ratio": "perplexity ratio on the teacher's held-out text",
           "human_ratio": "perplexity ratio on held-out text that people wrote",
           "preference": "share of held-out pairs where people's answer is the likelier one"}
# A run is a tuple of steps: "keep 3,7 SWITCH" converts, "remove 3,7" leaves the other layers out,
# any other is a stage and its share of the budget.
HALF = ("keep 1,3,5,7", "stage-1 1")
QUARTER = ("keep 3,7", "stage-1 1")
NONE = ("keep -", "stage-1 1")
RANDOM = ("keep 1,3,5,7 random", "stage-1 1")
ALIGNED = ("keep 1,3,5,7", "align 0.4", "stage-1 0.6")
# name: what the rows are ordered by, what the paper's figures are, {row: figure or None, then run}
ABLATIONS = {
    "6 left: how much attention stays (stage 1 alone)": ("ratio", "ratio", {
        "50 %": (1.03, *HALF), "25 %": (1.09, *QUARTER),
        "12.5 % (paper: 6.25 %)": (1.22, "keep 7", "stage-1 1"), "0 %": (1.66, *NONE)}),
    "6 right: the stages after distillation": ("preference", "MT-bench", {
        "50 %, stage 1": (5.55, *HALF), "50 %, + SFT": (5.61, *HALF, "SFT 0.5"),
        "50 %, + DPO": (5.42, *HALF, "DPO 0.25"),
        "50 %, + SFT + DPO": (6.69, *HALF, "SFT 0.5", "DPO 0.25"),
        "25 %, stage 1": (5.01, *QUARTER), "25 %, + SFT": (4.97, *QUARTER, "SFT 0.5"),
        "25 %, + DPO": (4.84, *QUARTER, "DPO 0.25"),
        "25 %, + SFT + DPO": (6.10, *QUARTER, "SFT 0.5", "DPO 0.25")}),
    "7 left: attention's weights at the start, MLPs frozen or not": ("ratio", "perplexity", {
        "0 %, attention, frozen": (3.36, *NONE), "50 %, attention, frozen": (2.09, *HALF),
        "50 %, random, frozen": (7.4, *RANDOM),
        "0 %, random, frozen": (18.2, "keep - random", "stage-1 1"),
        "0 %, attention, not frozen": (66.7, "keep -", "all 1"),
        "50 %, attention, not frozen": (9.1, "keep 1,3,5,7", "all 1"),
        "0 %, random, not frozen": (20.3, "keep - random", "all 1"),
        "50 %, random, not frozen": (11.2, "keep 1,3,5,7 random", "all 1")}),
    "7 right: which layers stay, and stepwise or at once": ("ratio", "perplexity", {
        "50 %, interleaved": (2.09, *HALF),
        "50 %, the first 4 layers": (2.41, "keep 0,1,2,3", "stage-1 1"),
        "25 %, interleaved, stepwise": (
            2.20, "keep 1,3,5,7", "stage-1 0.5", "keep 3,7", "stage-1 0.5"),
        "25 %, interleaved, at once": (2.29, *QUARTER),
        "25 %, the first 2 layers, stepwise": (
            2.89, "keep 0,1,2,3", "stage-1 0.5", "keep 0,1", "stage-1 0.5"),
        # what could decide it: layer 0, the other end of the network, as many steps in each stage
        "50 %, interleaved from layer 0": (None, "keep 0,2,4,6", "stage-1 1"),
        "50 %, the last 4 layers": (None, "keep 4,5,6,7", "stage-1 1"),
        "25 %, stepwise, twice the steps": (None, *HALF, "keep 3,7", "stage-1 1"),
        "25 %, at once, twice the steps": (None, "keep 3,7", "stage-1 2")}),
    "8: attention's weights at the start, 50 %": ("human_ratio", "LAMBADA", {
        "attention": (6.20, *HALF), "random": (55.01, *RANDOM)}),
    "9: Mamba, or the layers simply removed, 50 %": ("human_ratio", "LAMBADA", {
        "Mamba blocks": (6.20, *HALF),
        "layers removed, the rest trained": (151.98, "remove 1,3,5,7", "all 1")}),
    "ours: how a mixer starts, 50 %, alignment and stage 1": ("ratio", None, {
        "near_linear": (None, *ALIGNED), "no alignment (as long a stage 1)": (None, *HALF),
        "RoPE dropped": (None, "keep 1,3,5,7 no-rope", *ALIGNED[1:]),
        "the authors' start": (None, "keep 1,3,5,7 paper", *ALIGNED[1:])})}

class World:
    """The teacher of all runs, its data, and what people wrote. It is sampled at temperature 1, so
    that no student beats its perplexity but by luck."""
    def __init__(self, size):
        from pydoc_data.topics import topics
        self.size = size
        l, n = size["length"], size["heldout"]
        # 1. the beginning of a paragraph and its rest, by people; every tenth is held out
        words = [text.split() for k in sorted(topics) for text in topics[k].split("\n\n")]
        pairs = [(" ".join(w[:8]), " ".join(w[8:48])) for w in words if len(w) > 19]
        seen = [pair for i, pair in enumerate(pairs) if i % 10]
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(M, "train", lambda *args, **options: None)    # --tiny's tokenizer will do
            M.make_toy_teacher(folder)
            self.chat = M.Chat(AutoTokenizer.from_pretrained(folder))
        ids = [self.chat.ids(M.turns_of(*pair)) for pair in seen]
        # 2. the teacher, what it writes, and what it answers where people answered
        stream = torch.tensor(sum(ids, [])).unfold(0, 128, 128)                 # (.,128)
        torch.manual_seed(0)
        teacher = self.teacher = AutoModelForCausalLM.from_config(llama(64, 192, 8, 4, 2, 512))
        M.train("teacher", teacher, lambda i: teacher(stream[i], labels=stream[i]).loss,
                len(stream), steps=size["teacher_steps"], lr=4e-3)
        teacher.eval()
        tokens = M.sample(teacher, self.chat.user_start, size["rows"] + n, l, 512, 1.0) # (rows+n,l)
        labels = self.chat.label(tokens)
        self.rows = {"train": (tokens[n:], labels[n:]), "heldout": (tokens[:n], labels[:n]),
                     "sft": M.pack(ids, l, self.chat)}
        self.add_preferences("chosen", "rejected", seen[:size["rows"] // 2])
        self.add_preferences("human", "wrong", pairs[::10][:4 * n])
        # 3. what a layer's attention is worth: KL to the teacher when it says nothing
        self.worth = []
        for i in range(8):
            mute = copy.deepcopy(teacher)
            mute.model.layers[i].self_attn.o_proj.weight.data.zero_()
            self.worth.append(self.judge(mute, "heldout")["kl"])

    def add_preferences(self, chosen, rejected, pairs):
        """Rows of what people wrote, and of what the teacher says to the same, equally long."""
        asked = [self.chat.ids(M.turns_of(a), add_generation_prompt=True) for a, _ in pairs]
        said = S.generate(self.teacher, asked, self.size["length"] // 2, temperature=0.6,
                          eos_token_id=self.chat.end, generator=torch.Generator().manual_seed(0))
        theirs = [self.chat.ids(M.turns_of(*pair)) for pair in pairs]
        ours = [ids + answer.tolist() for ids, answer in zip(asked, said.tokens)]
        ends = [min(len(a), len(b)) - 1 for a, b in zip(theirs, ours)]
        for name, side in ((chosen, theirs), (rejected, ours)):
            cut = [ids[:end] for ids, end in zip(side, ends)]
            self.rows[name] = M.pack(cut, self.size["length"], self.chat)

    def judge(self, student, name):
        """-> `evaluate` on the first rows of that name"""
        tokens, labels = [v[:self.size["heldout"]] for v in self.rows[name]]
        return M.evaluate(student, self.teacher, tokens, labels=labels)

@functools.cache
def student_of(world, run, seed):
    """A run's student: that without its last step, and that step. seed: what conversion leaves to
    chance, and an order of the rows. -> student, {kind: losses}"""
    if not run:
        return None, {}
    before, curves = student_of(world, run[:-1], seed)
    kind, value, *switch = run[-1].split()
    torch.manual_seed(seed)
    if kind in ("keep", "remove"):
        layers = [int(i) for i in value.split(",") if i != "-"]
        if kind == "remove":
            return copy.deepcopy(S.LayerSubsetDraft(world.teacher, layers)), {}
        switches = SWITCHES[switch[0]] if switch else {}
        student = M.convert_to_hybrid(world.teacher, layers, **switches)
        if before is not None:                          # stepwise: what is distilled stays
            student.load_state_dict(before.state_dict(), strict=False)
        return student, curves
    student = copy.deepcopy(before)
    options = dict(steps=max(2, round(float(value) * world.size["steps"])), lr=RATES[kind],
                   batch_size=world.size["batch"])
    rows = {}
    for name, (tokens, labels) in world.rows.items():
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        rows[name] = tokens[order], labels[order]
    if kind == "align":
        losses = M.align_mixers(student, world.teacher, rows["train"][0], **options)
    elif kind == "DPO":
        losses = M.dpo(student, world.teacher, rows["chosen"], rows["rejected"], **options)
    elif kind == "SFT":
        losses = M.distil(kind, student, world.teacher, *rows["sft"], alpha=1, beta=0, **options)
    else:
        only = student.mixers().values() if kind == "stage-1" else None
        losses = M.distil(kind, student, world.teacher, *rows["train"], alpha=0.1, beta=1.0,
                          only=only, **options)
    return student, {**curves, kind: losses}

@functools.cache
def result_of(world, run, seed):
    """-> metrics and curves of a run's student"""
    student, curves = student_of(world, run, seed)
    with torch.no_grad():
        human, wrong = [M.sequence_logps(student(tokens, use_cache=False).logits, labels)
                        for tokens, labels in (world.rows["human"], world.rows["wrong"])]   # (n,)
    return {**world.judge(student, "heldout"), "curves": curves,
            "human_ratio": world.judge(student, "human")["ratio"],
            "preference": (human > wrong).float().mean().item()}

def ablate(report, args):
    """--ablate: the tables whose name begins with --only, each run and seed trained when a row
    first asks for it."""
    tables = {name: table for name, table in ABLATIONS.items() if name.startswith(args.only)}
    M.require(tables, f"--only {args.only!r}: want the beginning of one of {', '.join(ABLATIONS)}")
    begin = time.monotonic()
    torch.set_flush_denormal(True)                      # gradients so small take 50 times longer
    world = World(SMALL if args.small else SIZE)
    perplexity = world.judge(world.teacher, "human")["perplexity"]
    report.about.update(size=world.size, worth=world.worth, perplexity=perplexity)
    print(f"the teacher and its text: {time.monotonic() - begin:.0f} s; {world.size}\n"
          f"its perplexity on people's text: {perplexity:.1f}; KL, nats, without the attention of "
          "layer 0, 1, ...:", *[f"{kl:.3f}" for kl in world.worth], flush=True)
    for name, (metric, paper, runs) in tables.items():
        report.table(f"{'Table ' * name[0].isdigit()}{name}. Ordered by the "
                     f"{METRICS[metric]}; the paper: {paper}", row="<36",
                     paper=".2f", ratio="±", human_ratio="±", kl="±", preference="±")
        for label, (figure, *run) in runs.items():
            results = [result_of(world, tuple(run), seed)
                       for seed in tqdm(range(args.seeds), leave=False, disable=None)]
            row = {key: [result[key] for result in results] for key in results[0]}
            report.about["seconds"] = time.monotonic() - begin
            report.add(table=name, row=label, paper=figure, run=run, **row)
        rows = [row for row in report.rows if row["table"] == name and row["paper"]]
        if rows:
            print(verdict(rows, metric, paper == "MT-bench"))
    print(f"\n{report.about['seconds']:.0f} s")
    if args.plot:
        plot_ablation(report, world, args.plot)

def verdict(rows, metric, paper_wants_high):
    """Do the rows stand in the paper's order? A pair is decided if all seeds rank it one way."""
    counts = collections.Counter()                      # 1: as in the paper, -1: the other way
    for pair in itertools.combinations(rows, 2):
        better, worse = sorted(pair, key=lambda row: row["paper"], reverse=paper_wants_high)
        signs = set(numpy.sign(numpy.subtract(better[metric], worse[metric])).tolist())
        sign = signs.pop() if len(signs) == 1 else 0
        counts[sign if metric == "preference" else -sign] += 1
    return (f"order of {counts.total()} pairs: {counts[1]} as in the paper, {counts[-1]} the other "
            f"way round, {counts[0]} undecided between seeds")

# ---- 20. Pictures of weights, shares, curves and a speculation; the command line. -------------

def draw_table(axis, words, colours, **labels):
    """words, colours: rows of cells, from the top"""
    table = axis.table(words, colours, "center", loc="center", **labels)
    table.auto_set_font_size(False)
    table.set_fontsize(15)
    table.scale(1, 2.2)
    axis.axis("off")

def draw_weights(axis):
    """Which weight goes where (in colour), and how the new ones start (grey)."""
    moves = {"V": ("x", "orange"), "K": ("B", "green"), "Q": ("C", "sky"), "O": ("out", "pink")}
    starts = {"gate z": "weights 0, bias so that silu(z) = 1", "conv1d": "1 now, 0 before",
              "$\\Delta$": "0.001 .. 0.1, by its bias", "A": "in $-$16 .. $-$1", "skip D": "0"}
    words = [[f"$W_{old}$", new, "copied"] for old, (new, _) in moves.items()]
    words += [["", new, how] for new, how in starts.items()]
    colours = [[COLOURS[colour]] * 2 + ["white"] for _, colour in moves.values()]
    colours += [["white", COLOURS["grey"], "white"] for _ in starts]
    draw_table(axis, words, colours, colWidths=(0.2, 0.2, 0.6),
               colLabels=["attention", "mixer", "how it starts"])

def draw_shares(axis, rows):
    """Table 6 left: perplexity ratio against the share of attention that stays."""
    values = [row["ratio"] for row in rows]
    axis.errorbar([50, 25, 12.5, 0], numpy.mean(values, 1), numpy.std(values, 1), capsize=6,
                  marker="o", color=COLOURS["blue"], label=f"toy teacher, {len(values[0])} seeds")
    axis.plot([50, 25, 6.25, 0], [row["paper"] for row in rows], "s--", color=COLOURS["red"],
              label="paper: Zephyr 7B")
    axis.set(xlabel="attention layers that stay, %", ylabel="perplexity ratio", xlim=(53, -3))
    axis.legend()

def draw_curves(axes, curves):
    """Losses of the stages over their steps; means of ten parts and of the seeds."""
    stages = {"align": "|mixer - attention|² / |attention|²",
              "stage-1": "stage 1: Eq. 2, nats per token",
              "SFT": "stage 2: cross-entropy, nats", "DPO": "stage 3: Eq. 4"}
    for axis, (stage, title) in zip(axes.flat, stages.items()):
        curve = numpy.mean([losses[stage] for losses in curves], 0)
        parts = numpy.array_split(curve, min(10, len(curve)))
        steps = (numpy.arange(len(parts)) + 0.5) * len(curve) / len(parts)
        axis.plot(steps, [part.mean() for part in parts], color=COLOURS["blue"])
        axis.set(title=title, xlabel="step")

def draw_trace(axis, target, draft, prompt, tokenizer, n_rounds=12, K=4):
    """Algorithm 2: what stands (blue), what falls (grey), the target's (orange). prompt (l,)"""
    words = []
    colours = []
    def keep(rows, drafted, n, token):
        ids = [*drafted[0].tolist(), int(token[0])]
        words.append([repr(tokenizer.decode([i]))[1:-1].replace("$", "\\$") for i in ids])
        names = ["sky"] * int(n[0]) + ["grey"] * (K - int(n[0])) + ["orange"]
        colours.append([COLOURS[name] for name in names])

    S.speculative_decode(target, draft, prompt, n_rounds * (K + 1), K, on_round=keep)
    draw_table(axis, words[:n_rounds], colours[:n_rounds],
               rowLabels=[f"round {i + 1}" for i in range(len(words))][:n_rounds],
               colLabels=[*(f"draft {j + 1}" for j in range(K)), "target"])

def plot_ablation(report, world, folder):
    """The README's pictures, from a sweep over all tables."""
    os.makedirs(folder, exist_ok=True)
    curves = {row["row"]: row["curves"] for row in report.rows}                 # of all seeds
    curves = zip(curves["50 %, + SFT + DPO"], curves["near_linear"])
    shares = [row for row in report.rows if row["table"].startswith("6 left")]
    tokens, labels = world.rows["human"]
    prompt = tokens[0, :int((labels[0] != -100).int().argmax())]        # up to the answer
    picture(f"{folder}/weights.png", draw_weights, 9, 5)
    picture(f"{folder}/attention_share.png", draw_shares, rows=shares)
    picture(f"{folder}/curves.png", draw_curves, 12, 9, (2, 2),
            curves=[{**late, **early} for late, early in curves])
    picture(f"{folder}/speculation.png", draw_trace, 10, 7, target=student_of(world, ALIGNED, 0)[0],
            draft=student_of(world, QUARTER, 0)[0], prompt=prompt, tokenizer=world.chat.tokenizer)

MODES = {"bench": bench, "bench_kernel": bench_kernel, "bench_scan": bench_scan, "needle": needle,
         "compare_teacher": compare_teacher, "quiz": quiz, "ablate": ablate}

def parse_args(argv):
    """The flags; ValueError for values that make no sense."""
    parser = argparse.ArgumentParser(description="Laboratory; tests: pytest", allow_abbrev=False)
    parser.error = functools.partial(M.require, False)
    mode = parser.add_mutually_exclusive_group(required=True).add_argument
    mode("--bench", action="store_true", help="Tables 1, 5: random weights, simulated acceptance")
    mode("--bench-kernel", action="store_true", help="Figure 3: MultiStep against T")
    mode("--bench-scan", action="store_true", help="training forms against a loop over tokens")
    mode("--needle", action="store_true", help="sizes of caches; Figure 4 of --target")
    mode("--compare-teacher", metavar="DIR", help="20 answers of --target and of this teacher")
    mode("--quiz", action="store_true", help="right answers of --teacher and --target")
    mode("--ablate", action="store_true", help="Tables 6 to 9 at toy size, 10 minutes on 2 cores")
    add = parser.add_argument
    add("--teacher", metavar="DIR", help="of --quiz")
    add("--target", metavar="DIR", help="the hybrid of --needle, --compare-teacher and --quiz")
    add("--tokens", type=int, help="of --bench (512, CPU 64), --compare-teacher (128), --quiz (32)")
    add("--sizes", help="of --bench: 2.8b,7b,8b,zephyr (default on a GPU), tiny (on a CPU)")
    add("--compile", action="store_true", help="CUDA: --bench with and without, --bench-kernel")
    add("--lengths", default="64,512,2048", help="tokens of --needle, --bench-scan (%(default)s)")
    add("--only", metavar="TABLE", default="", help="of --ablate: 6, '7 left', 8, ours, ...")
    add("--seeds", type=int, default=3, help="of --ablate (default: 3)")
    add("--small", action="store_true", help="--ablate in seconds, to see that it runs")
    add("--json", metavar="FILE", help="all rows, written after each of them")
    add("--plot", help="picture of --bench-kernel (every T); directory for those of --ablate")
    args = parser.parse_args(argv)
    M.require(args.teacher or not args.quiz, "--quiz: give --teacher and --target")
    M.require(args.target or not (args.quiz or args.compare_teacher), "give --target")
    M.require(args.seeds > 0, f"--seeds {args.seeds}: want at least 1")
    M.require(re.fullmatch(r"[1-9]\d*(,\d+)*", args.lengths), f"--lengths {args.lengths}: as 9,99")
    args.lengths = [int(length) for length in args.lengths.split(",")]
    M.require(not args.compile or DEVICE == "cuda", "--compile wants a CUDA device")
    if args.plot:
        M.require(args.bench_kernel or args.ablate and not args.only,
                  "--plot goes with --bench-kernel, and with --ablate of all tables")
        M.require(importlib.util.find_spec("matplotlib"), "--plot wants matplotlib: pip install it")
    folder = os.path.dirname(os.path.abspath(args.json or args.plot or ""))
    M.require(os.path.isdir(folder), f"--json, --plot: there is no directory {folder}")
    return args

def main(argv=None):
    """Run the command line. -> its Report"""
    args = parse_args(argv)
    report = Report(args.json)
    mode, = [mode for name, mode in MODES.items() if getattr(args, name)]
    mode(report, args)
    return report

if __name__ == "__main__":
    M.cli(main)
