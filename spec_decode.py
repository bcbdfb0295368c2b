"""Speculative decoding for linear RNNs and hybrids: Algorithm 2 of arXiv 2408.15237.

    draft q    d1 d2 d3 d4                      K cheap steps (a small model, or a look-up)
                |  |  |  |
    target p   [y0 d1 d2 d3 d4]                 ONE multi-step call verifies all of them
                ok ok  x  -                     FirstConflict: d1, d2 stay; d3 and all after fall
    emitted     d1 d2 y                         y: the target's own token at the conflict

y0 is the token emitted last. An RNN has one big state and cannot rewind it; the cache keeps an old
state and the inputs since, so that a rejected token is one that is not counted (sections 3 and 4
of mamba_in_llama.py).

Glossary, with the paper's letters:
    b, T, V      batch rows, tokens of one call, vocabulary
    K            lookahead: tokens drafted per round
    p, q         distributions of the target and of the draft, after temperature, top-k, top-p
    # Gen        tokens a round yields: accepted ones plus one, between 1 and K + 1

Contents:  1 sampling   2 rows of a batch   3 plain decoding   4 drafts   5 Algorithm 2
           6 the authors' checkpoints   7 timing   8 needle in a haystack   9 command line

    python spec_decode.py --tiny
    python spec_decode.py --target DIR --draft ngram:3 --prompt "Once upon a time"
"""

import copy
import json
import math
import os
import random
import sys
import time
import timeit
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.benchmark import timer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import has_file

import mamba_in_llama as M
from mamba_in_llama import MixerCache, require

# ---------------------------------------------------------------------------------------------
# 1. Sampling: one rule for p and q. Temperature 0 is the argmax.
# ---------------------------------------------------------------------------------------------


def argmax_in_blocks(logits, block):
    """The first argmax, of blocks of that many words first. logits (..., V) -> (...)"""
    best, word = logits.unflatten(-1, (-1, block)).max(-1)                      # (..., V/block)
    first = best.argmax(-1, keepdim=True)                                       # (..., 1)
    return (word.gather(-1, first) + first * block)[..., 0]


def greedy(logits):
    """The argmax; over a row of 128k words torch's takes 37 us, since it keeps one of an H100's 132
    processors busy. logits (..., V) -> (...)"""
    block = math.gcd(logits.shape[-1], 480)                                     # divides V
    return argmax_in_blocks(logits, block) if logits.is_cuda and block > 15 else logits.argmax(-1)


@dataclass
class Sampling:
    """How logits become a distribution, and that a token; the same for target and draft."""

    temperature: float = 0.0           # 0: greedy
    top_k: int = 0                     # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                 # then the fewest tokens that hold this much probability
    generator: torch.Generator | None = None

    def __post_init__(self):
        require(self.temperature >= 0, f"temperature {self.temperature} must be at least 0")
        require(self.top_k >= 0, f"top_k {self.top_k} must be at least 0 (0 keeps all tokens)")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")

    def shortlist(self, logits):
        """The tokens that may be drawn, and their probabilities, at least in fp32.

        Top-k is applied first, so that softmax and sampling see k numbers (say 50) instead of V
        (say 49152). words, their ids, is None if no token is cut.

        logits (..., V) -> p (..., k), words (..., k) or None
        """
        V, wide = logits.shape[-1], torch.promote_types(logits.dtype, torch.float32)
        k, words = min(self.top_k or V, V), None
        if self.temperature == 0:
            words = greedy(logits)[..., None]
            return torch.ones_like(words, dtype=wide), words
        if k < V or self.top_p < 1:
            logits, words = logits.topk(k)                  # the likeliest first
        p = (logits.to(wide) / self.temperature).softmax(-1)
        if self.top_p < 1:
            before = p.cumsum(-1) - p                       # the likeliest token always stays
            p = p.masked_fill(before >= self.top_p, 0)
            p = p / p.sum(-1, keepdim=True)
        return p, words

    def probabilities(self, logits):
        """What is sampled from. logits (..., V) -> p (..., V)"""
        p, words = self.shortlist(logits)
        return p if words is None else p.new_zeros(logits.shape).scatter(-1, words, p)

    def draw(self, p):
        """One token from each distribution: argmax of p_i / E_i, E_i ~ Exp(1), independent.

        This draws i with probability p_i / sum(p). torch.multinomial does the same, but checks
        its input on the host, which would wait for the GPU. p (..., V), any sum -> (...)
        """
        E = torch.empty_like(p).exponential_(generator=self.generator)
        return (p / E.clamp_(min=torch.finfo(p.dtype).tiny)).argmax(-1)

    def choose(self, logits):
        """logits (..., V) -> tokens (...)"""
        if self.temperature == 0:
            return greedy(logits)
        p, words = self.shortlist(logits)
        token = self.draw(p)
        return token if words is None else words.gather(-1, token[..., None])[..., 0]


# ---------------------------------------------------------------------------------------------
# 2. The rows of a batch: what each has said, and when it ends. All of it stays on the device.
# ---------------------------------------------------------------------------------------------


@dataclass
class DecodeResult:
    """What decoding returns; times exclude the prompt and the capture of CUDA graphs."""

    tokens: list                       # b of (n,), the new tokens without the prompt
    rounds: int                        # calls of the target after the prompt
    drafted: int                       # tokens drafted, over all rows
    accepted: int                      # of these, accepted (before a cut at an end token)
    tokens_per_round: float            # "# Gen": mean over rows and rounds of accepted + 1
    seconds: float
    tokens_per_second: float           # of all rows together, first tokens (the prompt's) excluded


@dataclass
class Rows:
    """Prompt and output of each row, left-aligned.

    The token emitted last is in no cache yet: it is the first input of the next call, whose logits
    verify the first drafted token. So length is the cache's length + 1 between rounds.
    """

    tokens: torch.Tensor               # (b,width+1) ids; the last column takes what is thrown away
    length: torch.Tensor               # (b,) prompt and emitted tokens
    limit: torch.Tensor                # (b,) length at which the budget is spent
    alive: torch.Tensor                # (b,) bool, False before the start and once a row has ended
    ends: torch.Tensor                 # (e,) end tokens, may be empty
    tally: torch.Tensor                # (4,) rounds, rounds x live rows, drafted, accepted

    @property
    def last(self):
        """(b,) the token emitted last."""
        return self.tokens.gather(1, self.length[:, None] - 1)[:, 0]

    def append(self, block, n):
        """Emit the first n (b,) tokens of block (b,T), cut after an end token and at the budget."""
        t = torch.arange(block.shape[1], device=block.device)                       # (T,)
        n = torch.where(self.alive, n.minimum(self.limit - self.length), 0)         # (b,)
        is_end = (block[..., None] == self.ends).any(-1) & (t < n[:, None])         # (b,T)
        ended = is_end.any(-1)
        n = torch.where(ended, is_end.int().argmax(-1) + 1, n)
        away = self.tokens.shape[1] - 1         # where the rest of a block goes: shapes are static
        at = (self.length[:, None] + t).masked_fill(t >= n[:, None], away)          # (b,T)
        self.tokens.scatter_(1, at, block)
        self.length += n
        self.alive &= ~ended & (self.length < self.limit)

    def count(self, drafted=0, accepted=0):
        """A round is over: add (b,) drafted and accepted tokens; ended rows do not count."""
        alive = self.alive.long()
        self.tally += torch.stack([alive.amax(), alive.sum(), (drafted * alive).sum(),
                                   (accepted * alive).sum()])


def read_prompts(target, input_ids, max_new_tokens, lookahead, eos_token_id):
    """Check the request. input_ids: (b,l), or b 1-D tensors or lists -> Rows"""
    device, vocab = target.get_input_embeddings().weight.device, target.config.vocab_size
    require(max_new_tokens >= 1, f"max_new_tokens {max_new_tokens} must be at least 1")
    if isinstance(input_ids, torch.Tensor):
        input_ids = torch.atleast_2d(input_ids.cpu())
    prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in input_ids]
    require(prompts, "input_ids holds no prompts")
    for i, p in enumerate(prompts):
        require(p.ndim == 1 and len(p) > 0, f"prompt {i} of shape {tuple(p.shape)} is empty or not "
                "a row of token ids")
    ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist()
    require(all(0 <= e < vocab for e in ends), f"end tokens {ends} are outside the target's "
            f"vocabulary of {vocab}")
    length = torch.tensor([len(p) for p in prompts])                            # (b,)
    tokens = pad_sequence(prompts, batch_first=True)                            # (b,l)
    M.check_vocabulary(target, tokens)
    # spare columns: the last round may overshoot by K + 1 tokens, and a row that has ended still
    # takes part in calls of K + 1 tokens until all have
    tokens = F.pad(tokens, (0, max_new_tokens + 2 * lookahead + 2))             # (b,width+1)
    return Rows(*(v.to(device) for v in (
        tokens, length, length + max_new_tokens, torch.zeros_like(length, dtype=torch.bool),
        torch.tensor(ends, dtype=torch.long), torch.zeros(4, dtype=torch.long))))


# ---------------------------------------------------------------------------------------------
# 3. Plain decoding: the oracle, and the honest denominator of every speed-up.
# ---------------------------------------------------------------------------------------------


class Decoder:
    """A model and its cache: its own prefill and decode, or the free functions."""

    def __init__(self, model, rows, ring):
        self.cache = MixerCache.allocate(model, *rows.tokens.shape, ring)
        self._prefill = getattr(model, "prefill", partial(M.prefill, model))
        self._decode = getattr(model, "decode", partial(M.decode, model))
        context, longest = getattr(model.config, "max_position_embeddings", None), rows.length.max()
        require(not (self.cache.has_attention and context and longest > context), "the prompt of "
                f"{longest} tokens is longer than the context of {context}")

    def prefill(self, rows):
        """Read the prompts, shorter ones padded on the left. -> logits (b,V) after them"""
        longest, device = int(rows.length.max()), rows.length.device
        at = rows.length[:, None] + torch.arange(-longest, 0, device=device)    # (b,l)
        mask = None if (at >= 0).all() else (at >= 0).long()
        return self._prefill(rows.tokens.gather(1, at.clamp(min=0)), self.cache, mask)[:, -1]

    def decode(self, tokens, n_valid=None):
        """(b,T) -> logits (b,T,V), provisional until `self.cache.commit`"""
        return self._decode(tokens, self.cache, n_valid)


def as_graph(step, generator=None):
    """`step`, a function of static tensors, as a CUDA graph that serves every length. -> replay

    Replaying launches the same kernels on the same addresses, all at once, without Python. Two
    calls on a side stream first compile kernels and fill the allocator. While no row is alive,
    all of this leaves the rows and caches as they are.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def drive(step, rows, first, on_step=None):
    """Emit `first` (b,), then call `step` until every row has ended. -> DecodeResult

    On CUDA the host looks at the rows one call behind, while the next one already runs: it never
    makes the device wait, and one idle call, not counted in the time, runs on at the end.
    """
    cuda, start = rows.alive.is_cuda, rows.length.tolist()
    rows.alive.fill_(True)
    rows.append(first[:, None], torch.ones_like(rows.length))
    running = bool(rows.alive.any())
    if cuda:
        flag, event = torch.ones((), dtype=torch.bool).pin_memory(), torch.cuda.Event()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    while running:
        if cuda:
            flag.copy_(rows.alive.any(), non_blocking=True)
            event.record()
        step()
        if cuda:
            event.synchronize()
        if on_step is not None:
            on_step()
        running = bool(flag if cuda else rows.alive.any())
    seconds = max(time.perf_counter() - begin, 1e-9)
    rounds, row_rounds, drafted, accepted = rows.tally.tolist()
    new = [row[i:j] for row, i, j in zip(rows.tokens.clone(), start, rows.length.tolist())]
    return DecodeResult(new, rounds, drafted, accepted,
                        (row_rounds + accepted) / max(1, row_rounds), seconds,
                        (sum(map(len, new)) - len(new)) / seconds)


@torch.no_grad()
def generate(target, input_ids, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
             eos_token_id=None, generator=None, on_step=None):
    """Plain decoding, one token a step. The arguments are those of `speculative_decode`.

    On CUDA the step is a captured graph, whose kernel with a ring of 16 saves most writes of the
    state. On a CPU nothing is behind: no ring, and a step is the recurrence itself.
    on_step: called after every step.
    """
    sampling = Sampling(temperature, top_k, top_p, generator)
    rows = read_prompts(target, input_ids, max_new_tokens, 0, eos_token_id)
    cuda, one = rows.tokens.is_cuda, torch.ones_like(rows.length)
    decoder = Decoder(target, rows, ring=16 if cuda else 0)
    first = sampling.choose(decoder.prefill(rows))                               # (b,)

    def step():
        """One token more in every live row."""
        logits = decoder.decode(rows.last[:, None])[:, 0]                       # (b,V)
        if cuda:
            decoder.cache.commit(rows.alive)
        rows.count()
        rows.append(sampling.choose(logits)[:, None], one)

    return drive(as_graph(step, generator) if cuda else step, rows, first, on_step)


# ---------------------------------------------------------------------------------------------
# 4. Drafts. start: a new batch; propose: K tokens per row; settle: how many of them stand.
# ---------------------------------------------------------------------------------------------


@dataclass
class Proposal:
    """K drafted tokens per row, and how likely the draft was to draft each.

    Rows share one shape: where one drafts fewer, the rest is filler that never stands.
    """

    tokens: torch.Tensor               # (b,K)
    q: torch.Tensor | None = None      # (b,K,V); None: a point mass on each drafted token
    real: torch.Tensor | None = None   # (b,K) bool, False where a row drafted fewer than K

    def __post_init__(self):
        if self.real is None:
            self.real = torch.ones_like(self.tokens, dtype=torch.bool)


class ModelDraft:
    """A decoder as a draft, with a cache of its own that rolls back by the same commit.

    vocab_subset: indices (v,) of the words it may say; its head then has v rows only.
    """

    def __init__(self, model, vocab_subset=None):
        self.model, self.subset = model, vocab_subset
        if vocab_subset is not None:
            head = model.get_output_embeddings()
            short = nn.Linear(head.in_features, len(vocab_subset), bias=False, device="meta")
            short.weight = nn.Parameter(head.weight[vocab_subset], requires_grad=False)
            self.model = copy.copy(model)               # shares every module, not this method:
            self.model.get_output_embeddings = lambda: short
            self.subset = vocab_subset.to(head.weight.device)

    def start(self, target, rows, lookahead, sampling, ring):
        """Read the prompts. Raises ValueError where the vocabularies differ."""
        ours, theirs = self.model.config.vocab_size, target.config.vocab_size
        require(ours == theirs, f"the draft's vocabulary of {ours} tokens is not the target's of "
                f"{theirs}")
        self.rows, self.K, self.sampling, self.vocab = rows, lookahead, sampling, theirs
        self.decoder = Decoder(self.model, rows, ring)
        self.decoder.prefill(rows)

    def propose(self):
        """Draft K tokens, one call each. -> Proposal

        The draft has not read its own last token d_K. Where all K were accepted, the first call
        has two tokens, d_K and the emitted one; in other rows the second is padding.
        """
        rows, cache = self.rows, self.decoder.cache
        self.missing = (rows.length - cache.length).clamp(1, 2)                 # (b,)
        width = 2 if cache.counts.is_cuda else int(self.missing.max())
        first = rows.length - self.missing                                      # (b,)
        at = first[:, None] + torch.arange(width, device=first.device)          # (b,width)
        logits = self.decoder.decode(rows.tokens.gather(1, at), self.missing)   # (b,width,V)
        logits = logits[torch.arange(len(first), device=first.device), self.missing - 1]   # (b,V)
        chosen = [self.choose(logits)]
        while len(chosen) < self.K:
            logits = self.decoder.decode(chosen[-1][0][:, None])[:, 0]          # (b,V)
            chosen.append(self.choose(logits))
        tokens, qs = zip(*chosen)
        return Proposal(torch.stack(tokens, 1), None if qs[0] is None else torch.stack(qs, 1))

    def choose(self, logits):
        """logits (b,V or v) -> token (b,), q (b,V) or None at temperature 0"""
        q = self.sampling.probabilities(logits) if self.sampling.temperature else None
        token = greedy(logits) if q is None else self.sampling.draw(q)
        if self.subset is not None:
            token = self.subset[token]
            q = q if q is None else q.new_zeros(len(q), self.vocab).index_copy(1, self.subset, q)
        return token, q

    def settle(self, n_accepted):
        """n_accepted (b,): the last drafted token was never read, so at most K - 1 are kept."""
        n = self.missing + n_accepted.clamp(max=self.K - 1)
        self.decoder.cache.commit(torch.where(self.rows.alive, n, 0))


class NGramDraft:
    """Continues as the context did after the latest earlier occurrence of its last n tokens.

    Falls back to shorter matches, down to `least`; without one the row's round is a plain step.
    """

    def __init__(self, n=3, least=2):
        require(1 <= least <= n, f"ngram {n}: the shortest match {least} must be in 1..{n}")
        self.n, self.least = n, least

    def start(self, target, rows, lookahead, sampling, ring):
        """Nothing to read: the rows hold the prompts."""
        self.rows, self.K = rows, lookahead

    def propose(self):
        """-> Proposal; on the CPU without columns when no row has a match."""
        rows, tokens = self.rows, self.rows.tokens
        if not tokens.is_cuda:
            tokens = tokens[:, :int(rows.length.max())]
        start = latest_match(tokens, rows.length, self.n, self.least)           # (b,)
        found = (rows.alive & (start > 0))[:, None]                             # (b,1)
        K = self.K if tokens.is_cuda or found.any() else 0
        # past the end of the context the continuation repeats itself
        period = (rows.length - start)[:, None]                                 # (b,1)
        at = start[:, None] + torch.arange(K, device=start.device) % period     # (b,K)
        return Proposal(tokens.gather(1, at), real=found.expand(-1, K))

    def settle(self, n_accepted):
        """Nothing to roll back."""


def latest_match(tokens, length, n, least):
    """Where the latest earlier occurrence of a row's last n (or fewer) tokens ends; 0: nowhere.

    In 7 8 1 7 8 the suffix 7 8 also ends before index 2, so the 1 there is drafted first.

    tokens (b,width)  length (b,) -> (b,) index of the token that followed
    """
    windows = F.pad(tokens, (n, 0), value=-1).unfold(1, n, 1)       # (b,width+1,n) the n before
    suffix = windows[torch.arange(len(length), device=length.device), length]       # (b,n)
    same = (windows == suffix[:, None]).flip(-1).long().cumprod(-1).sum(-1)     # (b,width+1) 0..n
    end = torch.arange(windows.shape[1], device=tokens.device)
    fits = (same >= least) & (end < length[:, None])                # (b,width+1)
    # the longest match, of those the latest: length and end as the digits of one number
    return torch.where(fits, same * len(end) + end, 0).amax(-1) % len(end)


def LayerSubsetDraft(model, layers):
    """An ordinary model of a few of the target's layers, with its embeddings, norm and head.

    Weights are shared with `model` (deepcopy it before training: "shrink and fine-tune"); layers
    are renumbered, so that caches and save_pretrained see an ordinary model.
    """
    L, layers = len(model.model.layers), [int(i) for i in layers]
    require(layers and all(0 <= i < L for i in layers) and len(set(layers)) == len(layers),
            f"draft layers {layers}: must be different indices in 0..{L - 1}")
    # modules and configs are copied; what the memo holds, all tensors, is shared instead
    draft = copy.deepcopy(model, {id(v): v for v in chain(model.parameters(), model.buffers())})
    draft.model.layers = nn.ModuleList(draft.model.layers[i] for i in layers)
    for j, layer in enumerate(draft.model.layers):
        layer.self_attn.layer_idx = j
    for config in {id(c): c for c in (draft.config, draft.model.config)}.values():
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in layers]
        if hasattr(config, "attn_layers"):
            config.attn_layers = [j for j, i in enumerate(layers) if i in config.attn_layers]
    return draft


# ---------------------------------------------------------------------------------------------
# 5. Algorithm 2: SPECULATE drafts, VERIFY checks all drafted tokens in one multi-step call.
# ---------------------------------------------------------------------------------------------


def first_conflict(agrees):
    """FirstConflict: how many drafted tokens stand before the first that does not.

    agrees (b,K) bool -> (b,)
    """
    return agrees.long().cumprod(-1).sum(-1)


def accept(logits, proposal, sampling, simulate=None):
    """Which drafted tokens stand, and the token after them, with exactly the target's distribution.

    Temperature 0: stand while they are the target's argmax. Else (Leviathan et al., 2211.17192)
    d_i stands with probability min(1, p_i(d_i) / q_i(d_i)); at the first that does not, draw from
    max(0, p_i - q_i), normalised; where all stand, from p_K. q gets a row of zeros for position K,
    so that one formula serves both cases.
    Why that is p: d is drafted and stands with q min(1, p / q) = min(p, q), which p exceeds by
    max(0, p - q); and sum max(0, p - q) = 1 - sum min(p, q), the chance that nothing stood.
    simulate: SIMULATED acceptance for timing, each token stands with this probability.

    logits (b,K+1,V) -> n_accepted (b,), next token (b,)
    """
    drafted, (b, K) = proposal.tokens, proposal.tokens.shape
    row = torch.arange(b, device=drafted.device)
    if simulate is not None:
        n = first_conflict(torch.rand(b, K, device=drafted.device) < simulate)
        return n, greedy(logits[row, n])
    if sampling.temperature == 0:
        chosen = greedy(logits)                                                 # (b,K+1)
        n = first_conflict((drafted == chosen[:, :K]) & proposal.real)
        return n, chosen[row, n]
    p = sampling.probabilities(logits)                                          # (b,K+1,V)
    q = F.one_hot(drafted, p.shape[-1]) if proposal.q is None else proposal.q
    q = F.pad(q * proposal.real[..., None], (0, 0, 0, 1))                     # (b,K+1,V)
    p_d, q_d = (v[:, :K].gather(2, drafted[..., None])[..., 0] for v in (p, q))     # (b,K)
    u = torch.empty_like(p_d).uniform_(generator=sampling.generator)
    n = first_conflict((u * q_d < p_d) & proposal.real)
    p, rest = p[row, n], (p - q)[row, n].clamp_(min=0)                          # (b,V)
    # p <= q everywhere happens by rounding only, when p = q; then any draw is right: take p
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return n, sampling.draw(rest)


def verify(decoder, rows, proposal, sampling, simulate=None):
    """VERIFY: one multi-step call on [last token, K drafted ones]; commit what stands.

    The paper's MultiStep(h_i, y_{1:k}, i, j, k) is `decode`: the cache holds h_i and the inputs of
    i..j to replay. Going on from h_k, or from h_j after a conflict, is the count in `commit`.

    decoder: the target's -> n_accepted (b,), next token (b,)
    """
    logits = decoder.decode(torch.cat([rows.last[:, None], proposal.tokens], 1))  # (b,K+1,V)
    n, token = accept(logits, proposal, sampling, simulate)
    decoder.cache.commit(torch.where(rows.alive, n + 1, 0))
    return n, token


@torch.no_grad()
def speculative_decode(target, draft, input_ids, max_new_tokens, lookahead=4, temperature=0.0,
                       top_k=0, top_p=1.0, eos_token_id=None, generator=None, ring=16,
                       simulate=None, on_round=None):
    """Algorithm 2, SPECULATE: draft K tokens, VERIFY them, until every row has ended.

    Rows advance independently.

    target: a hybrid or a plain decoder. draft: the same, or an object with start, propose
    and settle (section 4). input_ids: (b,l), or b 1-D tensors of different lengths.
    eos_token_id: None, an id or several. ring: most tokens between two commits. simulate: see
    `accept`. on_round: called with (rows, proposal, n_accepted, token) before tokens are emitted.
    Raises ValueError, in one line, for anything that does not fit. -> DecodeResult
    """
    require(lookahead >= 1, f"lookahead {lookahead} must be at least 1")
    require(lookahead + 1 <= ring, f"lookahead {lookahead} + 1 exceeds the ring of {ring}")
    sampling = Sampling(temperature, top_k, top_p, generator)
    rows = read_prompts(target, input_ids, max_new_tokens, lookahead, eos_token_id)
    draft = draft if hasattr(draft, "propose") else ModelDraft(draft)
    decoder = Decoder(target, rows, ring)
    first = sampling.choose(decoder.prefill(rows))                               # (b,)
    draft.start(target, rows, lookahead, sampling, ring)

    def step():
        """One round: draft, VERIFY, emit what stands and the target's own token."""
        proposal = draft.propose()
        n, token = verify(decoder, rows, proposal, sampling, simulate)
        draft.settle(n)
        if on_round is not None:
            on_round(rows, proposal, n, token)
        block = F.pad(proposal.tokens, (0, 1)).scatter(1, n[:, None], token[:, None])  # (b,K+1)
        rows.count(proposal.real.sum(1), n)
        rows.append(block, n + 1)

    graph = rows.tokens.is_cuda and on_round is None and getattr(draft, "static", True)
    return drive(as_graph(step, generator) if graph else step, rows, first)


# ---------------------------------------------------------------------------------------------
# 6. The authors' released checkpoints (both formats) in our Mixer, tensor by tensor.
# ---------------------------------------------------------------------------------------------

# Our tensors inside `self_attn.` and those inside their `mamba.` that they are made of, where it
# is not one of the same name. Their projections have no biases; what their Mamba2 reads with one
# matrix, their Mamba reads with five: the rows of our in_proj, in this order.
NO_BIASES = {"in_proj.bias": (), "out_proj.bias": ()}
MADE_OF = {"mamba2": {"norm_weight": ("norm.weight",), **NO_BIASES},
           "mamba": {"in_proj.weight": ("in_proj_z.weight", "in_proj_x.weight", "B_proj.weight",
                                        "C_proj.weight", "dt_proj_down.weight"),
                     "dt_bias": ("dt_proj.bias",), **NO_BIASES}}


def hollow_hybrid(config, dtype, *layout, **switches):
    """What `convert_to_hybrid` makes of a teacher of this config: shapes without memory.

    layout, switches: its other arguments.
    """
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return M.convert_to_hybrid(teacher, *layout, **switches).eval()


def fill(model, tensors):
    """Give a hollow model its parameters, {name: tensor}, as they are: nothing is copied."""
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.model.config)   # in no checkpoint
    return model


def authors_hybrid(folder, dtype):
    """config.json (the teacher's) and mamba_config.json, as a hollow hybrid of their layout."""
    for name in "config.json", "mamba_config.json":
        require(Path(folder, name).is_file(), f"{folder} has no {name}: not in the format of the "
                "authors' checkpoints")
    theirs = json.loads(Path(folder, "mamba_config.json").read_text())
    ssm = theirs.get("ssm_cfg") or {}
    mamba2 = "ngroups" in ssm or ssm.get("layer") == "Mamba2"
    model = hollow_hybrid(
        AutoConfig.from_pretrained(folder), dtype, theirs["attn_layers"], recipe="paper",
        mixer="mamba2" if mamba2 else "mamba", d_state=ssm.get("d_state", None if mamba2 else 16),
        d_conv=ssm.get("d_conv", 4), group_by_state=not mamba2)
    for name, mixer in product(("d_xb", "d_inner"), model.mixers().values()):
        said, made = theirs.get(name), getattr(mixer, name)
        require(said in (None, made), f"mamba_config.json: {name} {said}, but the heads of "
                f"config.json make {made}")
    return model


@torch.no_grad()
def load_authors_checkpoint(directory_or_hub_name, dtype=None):
    """A checkpoint of jxiw/MambaInLlama, Mamba or Mamba2, as a HybridForCausalLM on the CPU.

    Their Mamba adds dt_proj.bias twice (and was trained so): our dt_bias is twice theirs. dtype
    None: bfloat16. A tensor that needs no change stays mapped from its file, so that memory
    fills as weights are used. Raises ValueError for another format and for missing or unknown
    tensors.
    """
    folder = directory_or_hub_name
    if not os.path.isdir(folder):
        try:
            folder = snapshot_download(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {folder}: {str(error).splitlines()[0]}") from None
    model, ours = authors_hybrid(folder, dtype or torch.bfloat16), {}
    kind, files = model.config.mixer, [*Path(folder).glob("*.safetensors")]
    files = files or [*Path(folder).glob("pytorch_model*.bin")]
    require(files, f"{folder} holds neither safetensors nor pytorch_model.bin")
    theirs = {name: v for file in files for name, v in load_state_dict(file).items()}   # mapped
    for name, p in model.named_parameters():
        layer, _, inside = name.partition(".self_attn.")
        parts = [name]                              # as in the teacher, also where attention stays
        if inside and int(layer.rpartition(".")[2]) in model.mixers():
            parts = [f"{layer}.mamba.{part}" for part in MADE_OF[kind].get(inside, [inside])]
        lacking = [part for part in parts if part not in theirs]
        require(not lacking, f"{folder} lacks {lacking[:1]}")
        # of in_proj: z (d_inner,D), x (d_xb,D), B (d_xb,D), C (d_inner,D), dt (rank,D)
        tensors = [theirs.pop(part) for part in parts] or [torch.zeros(p.shape)]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        require(tensor.shape == p.shape, f"{folder}: {name} has shape {tuple(tensor.shape)}, "
                f"but {tuple(p.shape)} is needed")
        twice = kind == "mamba" and inside == "dt_bias"                         # (d_inner,)
        ours[name] = (2 * tensor if twice else tensor).to(p.dtype)
    unknown = [name for name in theirs if name != "lm_head.weight" and "rotary_emb" not in name]
    require(not unknown, f"{unknown[:1]}: unknown tensor of a {kind} checkpoint")
    return fill(model, ours)


# ---------------------------------------------------------------------------------------------
# 7. Timing: the counterparts of Table 1, Table 5 and Figure 3.
# ---------------------------------------------------------------------------------------------

# Decoding is timed at batch 1, as in the paper, without the prompt. On CUDA all that is timed runs
# as captured graphs: else it would be the host's launches.
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}      # what models decode in, by device
# width, MLP width, layers, query heads, key/value heads, vocabulary, tied. Pure Mamba models are
# 0 % hybrids (so with MLPs) of the paper's parameter counts.
SHAPES = {"2.8b": (2560, 6464, 32, 20, 20, 50280, True),
          "130m": (768, 1984, 12, 12, 12, 50280, True),
          "7b": (4096, 10304, 32, 32, 32, 128256, True),
          "1b": (2048, 8192, 16, 32, 8, 128256, True),
          "8b": (4096, 14336, 32, 32, 8, 128256, False),              # Llama-3-8B
          "smollm2": (576, 1536, 30, 9, 3, 49152, True),              # SmolLM2-135M
          "tiny": (256, 768, 8, 8, 4, 4096, True), "nano": (64, 192, 2, 4, 2, 4096, True)}
# {(target, its attention share): [(draft: one of SHAPES or the target's layers, its words, K,
# the paper's # Gen and speed-up)]}; two # Gen are misprints: of 2.8B at K = 3 (4.04, its bound is
# 4), where that of K = 4 stands, of 8B at 50 % with four layers (27), where that of 25 % stands
BENCH = {("2.8b", 0): [("130m", None, 3, 3.9, 1.71), ("130m", None, 4, 3.9, 1.85)],
         ("7b", 0): [("1b", None, 3, 3.28, 1.95), ("1b", None, 4, 3.6, 2.0)],
         ("8b", 0.5): [("layers:0,31", None, 4, 2.48, 1.8),
                       ("layers:0,10,20,31", None, 4, 3.6, 1.6),
                       ("layers:0,10,20,31", 32768, 4, 3.6, 1.6)],
         ("8b", 0.25): [("layers:0,31", None, 4, 2.64, 1.88),
                        ("layers:0,10,20,31", None, 4, 3.6, 1.58),
                        ("layers:0,10,20,31", 32768, 4, 3.6, 1.58)],
         ("tiny", 0): [("nano", None, 4, 3.6, None)],
         ("tiny", 0.5): [("layers:0,7", 1024, 4, 2.48, None)]}


def clock(calls, cuda):
    """Median seconds for all of `calls`, functions of no arguments; on CUDA as one graph."""
    def run():
        """Each call once, in a row."""
        for call in calls:
            call()

    once = as_graph(run) if cuda else run
    return sorted(timeit.repeat(once, timer=timer, number=1, repeat=5))[2]      # waits for a GPU


def memory_bandwidth(device):
    """Bytes per second that this memory gives at best: the roof over every decoding step.

    The best of three ways to stream through 1 GiB (CPU: 256 MiB), each ten times in a row and
    repeated: a lone copy finds a GPU's clocks low, and copies are slower than reads.
    """
    cuda = device.type == "cuda"
    a, b = (torch.ones(2 ** (28 if cuda else 26), device=device) for _ in "ab")
    ways = [(2, lambda: b.copy_(a)), (2, lambda: b.mul_(1.0)), (1, a.sum)]      # bytes, of a's
    return max(10 * passes * a.nbytes / clock([way] * 10, cuda)
               for passes, way in ways for _ in range(3 if cuda else 1))


def shape_config(shape):
    """The config of a Llama of one of SHAPES."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "vocab_size", "tie_word_embeddings")
    return LlamaConfig(**dict(zip(names, SHAPES[shape])), max_position_embeddings=8192)


def random_model(shape, share, device):
    """A hybrid with random weights, for timing only; without attention Mamba itself, 16 states."""
    config, mamba = shape_config(shape), dict(mixer="mamba", d_state=16, recipe="paper")
    keep = M.attention_layers(share, config.num_hidden_layers)
    model = hollow_hybrid(config, DTYPE[device.type], keep, **({} if share else mamba))
    return fill(model, {name: torch.empty_like(p, device=device).normal_(std=0.02)
                        for name, p in model.named_parameters()}).to(device)


def weight_bytes(model):
    """Bytes of weights that one decoding step reads: all but the embedding, and the head."""
    tables = {id(model.get_input_embeddings().weight), id(model.lm_head.weight)}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in tables)
    return rest + model.get_output_embeddings().weight.nbytes       # of some drafts a cut one


def round_seconds(target, K, prompt, rounds=48):
    """Mean time of a round whose K drafted tokens cost nothing and all stand: what VERIFY costs.

    prompt (1,l)
    """
    tokens = torch.ones(1, K, dtype=torch.long, device=prompt.device)
    free = NGramDraft()
    free.propose = lambda: Proposal(tokens)
    made = speculative_decode(target, free, prompt, rounds * (K + 1), K, simulate=1.0)
    return made.seconds / made.rounds


def acceptance_for(gen, K):
    """The chance P per token for which # Gen = 1 + P + ... + P^K, to four digits."""
    chances = (i / 1e4 for i in range(10 ** 4))
    return next((P for P in chances if sum(P ** j for j in range(K + 1)) >= gen), 1.0)


def bench(args, device):
    """--bench: Tables 1 and 5 with random weights and SIMULATED acceptance, batch 1. -> rows

    floor: time to read the weights once over that of a plain step (100 % is ideal). verify: a
    round of K + 1 tokens over a plain step. estimate: # Gen / (1.1 + K x draft bytes / target
    bytes), what a round of 1.1 steps and a draft that costs only its bytes would bring.
    """
    cuda, rows, prompt = device.type == "cuda", [], torch.arange(1, 33, device=device)[None]
    sizes = (args.sizes or ("2.8b,7b,8b" if cuda else "tiny")).split(",")
    simulate = args.simulate_acceptance
    require(set(sizes) <= {shape for shape, _ in BENCH}, f"--sizes {args.sizes}: want some of "
            "2.8b,7b,8b,tiny")
    about = {"device": torch.cuda.get_device_name() if cuda else "CPU",
             "dtype": str(DTYPE[device.type]), "torch": torch.__version__,
             "memory_bytes_per_s": memory_bandwidth(device)}
    print(about, "random weights, SIMULATED acceptance", sep="\n", flush=True)
    print(f"{'target':<20}{'draft':<26}{'K':>2}{'# Gen':>7}{'plain/s':>9}{'floor':>7}{'verify':>8}"
          f"{'tokens/s':>9}{'speed-up':>9}{'estimate':>9}{'paper':>7}")
    for (shape, share), trials in BENCH.items():
        if shape not in sizes:
            continue
        target = draft = None                           # one target in memory at a time
        target = random_model(shape, share, device)
        plain = generate(target, prompt, args.max_new_tokens).tokens_per_second
        weight = weight_bytes(target)
        for spec, words, K, gen, paper in trials:
            if spec in SHAPES:                          # 130m is pure Mamba, the others attention
                draft = ModelDraft(random_model(spec, int(spec != "130m"), device))
            else:
                draft = read_draft(spec, target, device, words)
            P = acceptance_for(gen, K) if simulate is None else simulate
            fast = speculative_decode(target, draft, prompt, args.max_new_tokens, K, simulate=P)
            ratio = weight_bytes(draft.model) / weight
            row = {"target": f"{shape} {share:.0%} attention", "K": K,
                   "draft": spec + (f", {words // 1024}k words" if words else ""),
                   "gen": fast.tokens_per_round, "paper_gen": gen, "simulated_acceptance": P,
                   "plain_tokens_per_s": plain, "tokens_per_s": fast.tokens_per_second,
                   "share_of_floor": plain * weight / about["memory_bytes_per_s"],
                   "verify_over_step": round_seconds(target, K, prompt) * plain,
                   "speed_up": fast.tokens_per_second / plain, "paper_speed_up": paper,
                   "bound": fast.tokens_per_round / (1.1 + K * ratio), "draft_bytes_share": ratio}
            rows.append(row | about)
            print("{target:<20}{draft:<26}{K:>2}{gen:7.2f}{plain_tokens_per_s:9.1f}"
                  "{share_of_floor:7.0%}{verify_over_step:7.2f}x{tokens_per_s:9.1f}{speed_up:8.2f}x"
                  "{bound:8.2f}x".format(**row) + (f"{paper:6.2f}x" if paper else ""), flush=True)
    return rows


# mixer, heads, groups, P, N of a layer: a converted 8B Llama, SmolLM2, and Mamba of 7B and 2.8B
KERNEL_LAYERS = {"mamba2 32x128x128": ("mamba2", 32, 8, 128, 128),
                 "mamba2 9x64x64": ("mamba2", 9, 3, 64, 64),
                 "mamba 4096x16": ("mamba", 256, 64, 16, 16),
                 "mamba 5120x16": ("mamba", 320, 80, 16, 16)}


def kernel_inputs(mixer, H, G, P, N, b, T, slots, device):
    """One layer's arguments of `multi_step`, up to the rings; each letter is an axis.

    mamba2: one Delta a head, x in groups (p = n = 1, g = G); mamba: per channel, x in heads.
    """
    p, n, g = (1, 1, G) if mixer == "mamba2" else (P, N, H)
    sizes = dict(b=b, T=T, s=slots, H=H, G=G, P=P, N=N, p=p, n=n, g=g)
    like = dict(device=device, dtype=DTYPE[device.type])
    x, dt, B, C, z, ring_x, ring_B = (torch.randn([sizes[axis] for axis in shape], **like)
                                      for shape in "bTgP bTHp bTGN bTHN bTHP bsgP bsGN".split())
    A, bias, D, state, ring_dt = (torch.randn([sizes[axis] for axis in shape], device=device)
                                  for shape in "Hpn Hp Hp bHPN bsHp".split())
    return [x, dt, B, C, -A.abs(), bias - 3, D, z, state, ring_x, ring_dt.abs() / 10, ring_B]


def bench_kernel(args, device):
    """--bench-kernel (Figure 3): T tokens in one call against T calls, and a copy of the state.

    The mean over a whole cycle, from one flush to the next with all T tokens accepted in each
    call; on CUDA one graph, on rotated buffers that exceed the L2.
    """
    cuda, rows = device.type == "cuda", []
    print(f"{'layer':<20}{'batch':>6}{'T':>4}{'us/call':>10}{'T x one':>10}{'copy':>9}")
    for name, layer in KERNEL_LAYERS.items():
        mixer, H, _, P, N = layer
        for b in (1, 8, 64, 256) if cuda else (1,):
            size = b * H * P * N                                                # (b,H,P,N) fp32
            copies = max(1, min(64, -(-(150 << 20) // (4 * size)))) if cuda else 1
            pairs, one = [torch.empty(2, size, device=device) for _ in range(copies)], 0.0
            copied = clock([partial(to.copy_, old) for to, old in pairs], cuda) / copies
            for T in range(1, 17):
                ring = 16 if T <= 8 else 32
                fold_at = ring if mixer == "mamba2" else M.MAMBA_FOLD_AT
                sets = [kernel_inputs(*layer, b, T, 2 * ring, device) for _ in range(copies)]
                # calls of a cycle find T, 2 T, ... tokens in the ring; the last one folds them
                counts = [torch.tensor([[0] * b, [n] * b, [0] * b], dtype=torch.int32).to(device)
                          for n in range(T, max(fold_at, T) + 1, T)]            # (3,b)
                calls = [partial(M.multi_step, *s, c, ring=fold_at) for c in counts for s in sets]
                spent = clock(calls, cuda) / len(calls)
                one = spent if T == 1 else one
                rows.append({"layer": name, "batch": b, "T": T, "ring": ring, "us": 1e6 * spent,
                             "us_single_steps": 1e6 * T * one, "us_copy": 1e6 * copied})
                print("{layer:<20}{batch:>6}{T:>4}{us:10.1f}{us_single_steps:10.1f}{us_copy:9.1f}"
                      .format(**rows[-1]), flush=True)
    return rows


def plot(rows, path):
    """A picture of the rows of `bench_kernel` (they name a layer) or `bench`, for half a page.

    matplotlib is optional, so it is imported here; a Figure without pyplot needs no display.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams.update({"font.size": 16, "lines.linewidth": 2.5, "lines.markersize": 8})
    layers = list(dict.fromkeys(r.get("layer") for r in rows))
    figure = Figure((11, 2 + (2 if layers[0] else 0.7 * len(rows)) * len(layers)),
                    layout="constrained")
    for i, layer in enumerate(layers, 1):
        axis = figure.add_subplot(-(-len(layers) // 2), min(2, len(layers)), i)
        if layer is None:                               # rows of `bench`: one panel, of bars
            labels = [f"{r['target']}, K = {r['K']}\n{r['draft']}" for r in rows]
            axis.barh(labels, [r["speed_up"] for r in rows], label="measured")
            axis.plot([r["paper_speed_up"] or float("nan") for r in rows], labels, "C1|", ms=24,
                      mew=4, label="paper")
            axis.set(xlabel="speed-up over plain decoding", ylim=(len(rows) - 0.4, -0.6))
            continue
        axis.set(title=layer, yscale="log", xlabel="tokens T", xticks=(1, 4, 8, 12, 16),
                 ylabel="µs per layer")
        for b, colour in {rows[0]["batch"]: "C0", rows[-1]["batch"]: "C1"}.items():
            part = [r for r in rows if (r["layer"], r["batch"]) == (layer, b)]
            for key, style, label in (("us", "o-", "one call of T tokens"),
                                      ("us_single_steps", "--", "T calls of one token"),
                                      ("us_copy", ":", "a copy of the state")):
                axis.plot([r["T"] for r in part], [r[key] for r in part], colour + style,
                          label=f"batch {b}: {label}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------
# 8. Needle in a haystack (Figure 4), and what a cache weighs.
# ---------------------------------------------------------------------------------------------


def needle(args, device):
    """--needle: is a number found again, hidden at some depth of a long text? -> rows

    Then the size of caches; without --target only that, for SmolLM2's and an 8B Llama's shape.
    """
    if not args.target:
        return [row for name, shape in (("SmolLM2-135M", "smollm2"), ("Llama-3-8B", "8b"))
                for row in cache_table(name, shape_config(shape))]
    from pydoc_data.topics import topics
    model, tokenizer = load(args.target, device)
    read, draw = partial(encode, tokenizer=tokenizer, raw=True), random.Random(args.seed)
    hay, rows = read("\n".join(topics[k] for k in sorted(topics))), []          # (l,) Python's help
    ask = read("\nWhat is the magic number? The magic number is")
    print(f"share of {args.trials} numbers found, by length (rows) and depth (columns)\n"
          f"{'length':>8}" + "".join(f"{d:7.0%}" for d in args.depths))
    for length in args.lengths:
        for depth in args.depths:
            found = 0
            for _ in range(args.trials):
                secret = str(draw.randrange(10000, 99999))
                fact = read(f"\nThe magic number is {secret}.\n")
                room = length - len(fact) - len(ask)
                text = hay.roll(-draw.randrange(len(hay))).repeat(1 + room // len(hay))[:room]
                cut = int(depth * room)
                prompt = torch.cat([text[:cut], fact, text[cut:], ask])                 # (length,)
                found += secret in tokenizer.decode(generate(model, prompt, 12).tokens[0])
            rows.append({"length": length, "depth": depth, "found": found / args.trials})
        print(f"{length:>8}" + "".join(f"{r['found']:7.0%}" for r in rows[-len(args.depths):]))
    return rows + cache_table(args.target, LlamaConfig.from_dict(model.model.config.to_dict()))


def cache_table(name, config):
    """Bytes of one row's cache at 1k, 8k, 64k tokens for 100 (the teacher) to 0 % attention."""
    lengths, rows, teachers = (1024, 8192, 65536), [], None
    print(f"\n{name}: cache of one row in bf16, MiB (share of the teacher's)\n attention" + "".join(
        f"{n:>18,}" for n in lengths))
    for share in (1.0, 0.5, 0.25, 0.0):
        model = hollow_hybrid(config, torch.bfloat16, M.attention_layers(
            share, config.num_hidden_layers))
        sizes = [sum(t.nbytes for t in chain(*MixerCache.allocate(model, 1, n, ring=1).layers))
                 for n in lengths]
        teachers = teachers or sizes
        rows += [{"model": name, "attention": share, "tokens": n, "cache_bytes": size,
                  "share_of_teacher": size / whole}
                 for n, size, whole in zip(lengths, sizes, teachers)]
        print(f"{share:>10.0%}" + "".join(f"{size / 2 ** 20:11.1f} ({size / whole:4.0%})"
                                          for size, whole in zip(sizes, teachers)))
    return rows


# ---------------------------------------------------------------------------------------------
# 9. The command line.
# ---------------------------------------------------------------------------------------------


def load(name, device):
    """A model (ours, the authors' or a plain decoder) and its tokenizer."""
    require(name, "give --target DIR_OR_HUB_NAME")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        read = load_authors_checkpoint if has_file(name, "mamba_config.json") else (
            AutoModelForCausalLM.from_pretrained)
        model = read(name, dtype=DTYPE[device.type])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"cannot load {name}: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), tokenizer


def read_draft(spec, target, device, words=None):
    """DIR, layers:0,10,20,29 or ngram:3 -> a draft; words: cut its head to the first so many ids
    (a BPE numbers its words roughly from the most frequent on)."""
    kind, _, value = spec.partition(":")
    try:
        numbers = [int(v) for v in value.split(",")] if kind in ("layers", "ngram") else []
    except ValueError:
        raise ValueError(f"--draft {spec}: want numbers after {kind}:") from None
    if kind == "ngram":
        return NGramDraft(numbers[0], min(2, numbers[0]))
    draft = LayerSubsetDraft(target, numbers) if kind == "layers" else load(spec, device)[0]
    vocab = draft.config.vocab_size
    require(words is None or 1 <= words <= vocab, f"--draft-words {words} is outside 1..{vocab}")
    return ModelDraft(draft, None if words is None else torch.arange(words, device=device))


def encode(text, tokenizer, raw=False):
    """text -> ids (l,), through the chat template where there is one, unless `raw`."""
    ids = M.Chat(tokenizer).pair(text)[0] if tokenizer.chat_template and not raw else tokenizer(
        text, add_special_tokens=False, verbose=False)["input_ids"]
    require(ids, "the prompt is empty")
    return torch.tensor(ids)


def run(target, draft, args, prompt, **more):
    """Decode one prompt (l,) as the flags say, without a draft plainly. -> DecodeResult"""
    settings = {k: vars(args)[k] for k in ("max_new_tokens", "temperature", "top_k", "top_p")}
    settings |= dict(eos_token_id=args.ends,
                     generator=torch.Generator(prompt.device).manual_seed(args.seed))
    if draft is None:
        return generate(target, prompt, **settings)
    return speculative_decode(target, draft, prompt, lookahead=args.lookahead, **settings, **more)


@torch.no_grad()
def first_difference(target, prompt, plain, fast):
    """None where two answers agree, else where they part and the gap of the target's two logits.

    In exact arithmetic they never differ; sums of another order round differently.

    prompt (l,)  plain, fast (n,)
    """
    if torch.equal(plain, fast):
        return None
    n = min(len(plain), len(fast))
    i = int((plain[:n] != fast[:n]).int().argmax())
    logits = target(torch.cat([prompt, plain[:i]])[None], logits_to_keep=1).logits[0, 0]
    a, b = logits[torch.stack([plain[i], fast[i]])].tolist()
    return f"token {i} differs, its two logits are {abs(a - b):.2g} apart"


def compare(target, drafts, prompts, args, **others):
    """Each prompt (l,) plainly, then with each of {name: draft}; one table of sums. -> rows

    Speeds are without the prompts. Where answers part, the prompt, the token and the gap of its
    logits are printed: in bf16, products of other shapes round differently.
    others: more ways to decode, {name: function of a prompt -> DecodeResult}
    """
    ways = {name: partial(run, target, draft, args)
            for name, draft in ({"none": None} | drafts).items()} | others
    # all ways in turn at each prompt: what else the machine does slows them alike
    results = list(zip(*([way(prompt) for way in ways.values()] for prompt in prompts)))
    print(f"{'draft':<24}{'K':>2}{'# Gen':>7}{'accepted':>10}{'tokens/s':>10}{'speed-up':>10}"
          "  identical to plain decoding")
    table = []
    for name, made in zip(ways, results):
        spent, drafted, accepted, rounds = (sum(getattr(r, field) for r in made) for field in (
            "seconds", "drafted", "accepted", "rounds"))
        speed = sum(len(r.tokens[0]) - 1 for r in made) / spent
        parted = [first_difference(target, prompt, plain.tokens[0], r.tokens[0])
                  for prompt, plain, r in zip(prompts, results[0], made)
                  if name in drafts and not args.temperature]
        sampled = "(sampled)" if name in drafts else ""
        row = {"draft": name, "K": args.lookahead if name in drafts else 0,
               "gen": (rounds + accepted) / max(1, rounds), "tokens_per_s": speed,
               "acceptance": accepted / max(1, drafted),
               "identical": f"{parted.count(None)} of {len(parted)}" if parted else sampled,
               "differences": [f"prompt {i}: {d}" for i, d in enumerate(parted) if d]}
        table.append(row)
        row["speed_up"] = speed / table[0]["tokens_per_s"]
        print("{draft:<24}{K:>2}{gen:7.2f}{acceptance:10.0%}{tokens_per_s:10.1f}{speed_up:9.2f}x  "
              "{identical}".format(**row), *row["differences"], sep="\n    ", flush=True)
    return table


def show_rounds(target, drafts, prompt, tokenizer, args):
    """Decode a prompt (l,) with each draft: rounds as in Figure 2, answer and table. -> rows

    Of 16 rounds: what stands, what falls, what the target says instead; in colour on a terminal,
    else [-fallen-] and {+said+}.
    """
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    marks = ("\033[32m{}\033[0m", "\033[31;9m{}\033[0m", "\033[1;36m{}\033[0m") if colour else (
        "{}", "[-{}-]", "{{+{}+}}")

    def show(rows, proposal, n, token):
        """An `on_round`: a line of what row 0 makes of its drafted tokens (K,)."""
        if rows.alive[0] and rows.tally[0] < 16:
            drafted, n = proposal.tokens[0].tolist(), int(n[0])
            words = [repr(tokenizer.decode(part))[1:-1]
                     for part in (drafted[:n], drafted[n:], [int(token[0])])]
            print(f"  round {int(rows.tally[0]) + 1:>2}: {n} of {len(drafted)} stand  " + "".join(
                mark.format(word) for mark, word in zip(marks, words) if word))

    for name, draft in drafts.items():
        print(f"\n{name}: drafted tokens that stand, those that fall, what the target says")
        made = run(target, draft, args, prompt, on_round=show)
    print("\n" + tokenizer.decode(made.tokens[0], skip_special_tokens=True).strip() + "\n")
    return compare(target, drafts, [prompt], args)


def answer(args, device):
    """--target and --prompt: decode one prompt, without and with the draft. -> rows"""
    target, tokenizer = load(args.target, device)
    draft = read_draft(args.draft, target, device, args.draft_words)
    # a base model's files name one end token, a chat model's answers often end with another
    args.ends = torch.tensor(target.generation_config.eos_token_id or []).reshape(-1).tolist()
    args.ends += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if tokenizer.chat_template and not args.raw:
        args.ends.append(M.Chat(tokenizer).end)
    prompt = encode(args.prompt, tokenizer, args.raw).to(device)
    return show_rounds(target, {args.draft: draft}, prompt, tokenizer, args)


def tiny(args, device):
    """--tiny: the hybrid of `mamba_in_llama.py --tiny` with each kind of draft. -> rows"""
    if not os.path.exists("tiny_run/mamba2/config.json"):
        print("no ./tiny_run here: mamba_in_llama.py --tiny makes it first, about a minute")
        M.main(["--tiny"])
    (target, tokenizer), (teacher, _), (mamba, _) = (
        load(f"tiny_run/{name}", device) for name in ("mamba2", "teacher", "mamba"))
    text = "The standard exception classes that a program can"
    # beginnings of one sentence, four times each, as they are sampled: 128 answers to train on
    starts = [encode(text[:i], tokenizer).tolist() for i in range(8, 40)] * 4
    answers = torch.tensor(M.sample(target, starts, 96, None, seed=args.seed))      # (128,96)
    layers = LayerSubsetDraft(target, [0, 3])
    shrunk = copy.deepcopy(layers)
    M.distil("draft", shrunk, target, answers, answers, 150, lr=3e-3, alpha=0.1, beta=1.0,
             seed=args.seed)
    drafts = {"layers 0,3, fine-tuned": shrunk.eval(), "layers 0,3": layers,
              "ngram:3": NGramDraft(3), "the teacher": teacher, "the Mamba hybrid": mamba}
    prompt = encode(args.prompt or text, tokenizer, args.raw).to(device)
    return show_rounds(target, drafts, prompt, tokenizer, args)


def make_draft(args, device):
    """--make-draft layers:...: shrink, fine-tune on the target's own answers, save, try. -> rows

    Tried on the prompts of up to 32 answers that were held out, before and after training. What
    else is given are flags of mamba_in_llama.py: --out, --minutes, --rows, --length, --batch, ...
    """
    require(args.target and "--out" in args.rest and args.make_draft.startswith("layers:"),
            f"--make-draft {args.make_draft}: want layers:I,J, and --target and --out")
    options = M.parse_args(["--teacher", args.target, *args.rest])
    target, tokenizer = load(args.target, device)
    before, chat = read_draft(args.make_draft, target, device).model, M.Chat(tokenizer)
    # bf16 would round away most of AdamW's steps
    draft, data = copy.deepcopy(before).float(), M.real_data(target, chat, options)
    history = M.distil("draft", draft, target, *data.train, 10 ** 9, options.batch, options.lr / 4,
                       alpha=options.alpha, beta=options.beta, seconds=60 * (options.minutes or 10),
                       seed=options.seed)
    M.save(draft, chat, options.out)
    draft = load(options.out, device)[0]
    print(f"{len(history)} steps, loss {history[0][1]:.3f} -> {history[-1][1]:.3f}; saved to "
          f"{options.out}; held-out prompts, at most {args.max_new_tokens} tokens:")
    prompts = [torch.tensor(prompt, device=device)
               for prompt in M.prompts_of(*(v[:32] for v in data.heldout))]
    args.ends = chat.end
    rows = compare(target, {args.make_draft: before, "fine-tuned": draft}, prompts, args)
    return rows + [{"step": step, "loss": loss} for step, loss in history]


MODES = (tiny, bench, bench_kernel, needle, make_draft)
FLAGS = {       # name: (type, or bool for a switch; default; help)
    "tiny": (bool, False, "every kind of draft on the hybrid in ./tiny_run"),
    "bench": (bool, False, "Tables 1 and 5: random weights, simulated acceptance"),
    "bench-kernel": (bool, False, "Figure 3: T tokens per call of the kernel"),
    "needle": (bool, False, "Figure 4: needle in a haystack, and cache sizes"),
    "make-draft": (str, None, "layers:I,J: shrink and fine-tune --target; other flags as in "
                   "mamba_in_llama.py: --out DIR --minutes M --rows N --length N --batch N"),
    "target": (str, None, "directory or hub name: a hybrid, a plain decoder, the authors' format"),
    "draft": (str, "ngram:3", "a directory, layers:0,10,20,29 or ngram:3"),
    "draft-words": (int, None, "cut the draft's head to the first so many words"),
    "prompt": (str, None, "the text to answer"),
    "raw": (bool, False, "no chat template around the prompt"),
    "lookahead": (M.COUNT, 4, "tokens drafted per round, K"),
    "temperature": (float, 0.0, "0 is greedy"),
    "top-k": (int, 0, "0 keeps all words"),
    "top-p": (float, 1.0, "probability that is kept"),
    "max-new-tokens": (M.COUNT, 128, "budget, tokens"),
    "simulate-acceptance": (M.SHARE, None, "--bench: a token's chance to stand (default: paper's)"),
    "sizes": (str, None, "--bench: some of 2.8b,7b,8b,tiny (default: what suits the device)"),
    "lengths": (M.checked(int, lambda v: v >= 64, "at least 64"), [512, 1024, 2048],
                "--needle: tokens"),
    "depths": (M.SHARE, [0, 0.25, 0.5, 0.75, 1], "--needle: 0 is the beginning"),
    "trials": (M.COUNT, 5, "--needle: numbers per length and depth"),
    "seed": (int, 0, "of every draw"),
    "json": (str, None, "write the rows of the table to this file"),
    "plot": (str, None, "a picture of --bench or --bench-kernel (matplotlib)"),
}


def parse_args(argv):
    """The flags, and what to run as .mode; ValueError for values that make no sense."""
    args, args.rest = M.make_parser(__doc__, FLAGS).parse_known_args(argv)
    require(args.make_draft or not args.rest, f"unknown: {' '.join(args.rest)}")
    Sampling(args.temperature, args.top_k, args.top_p)              # raises before models load
    modes = [mode for mode in MODES if getattr(args, mode.__name__)]
    require(len(modes) <= 1, "give one of --tiny, --bench, --bench-kernel, --needle, --make-draft")
    require(modes or args.target and args.prompt, "give --target and --prompt, or --tiny")
    require(args.plot is None or args.bench or args.bench_kernel,
            "--plot goes with --bench or --bench-kernel")
    M.check_outputs(json=args.json, plot=args.plot)
    args.mode, args.ends = (modes or [answer])[0], None     # answers end where a mode says so
    return args


def main(argv=None):
    """Run the command line. -> the rows that --json writes"""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    rows = args.mode(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    M.cli(main)
