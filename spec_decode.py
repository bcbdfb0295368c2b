"""Speculative decoding for linear RNNs and hybrids: Algorithm 2 of arXiv 2408.15237.

    draft q    d1 d2 d3 d4                      K cheap steps (a small model, or a look-up)
                |  |  |  |
    target p   [y0 d1 d2 d3 d4]                 ONE multi-step call verifies all of them
                ok ok  x                        FirstConflict: d1, d2 stand, d3 does not
    emitted     d1 d2 y                         y: the target's own token at the conflict

An RNN has one big state and cannot rewind it; the cache keeps an old state and the inputs since,
so that a rejected token is one that is not counted (section 3 and 4 of mamba_in_llama.py).

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

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import mamba_in_llama
from mamba_in_llama import MixerCache, require

# ---------------------------------------------------------------------------------------------
# 1. Sampling: one rule for p and q. Temperature 0 is the argmax.
# ---------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a distribution becomes a token; the same for target and draft."""

    temperature: float = 0.0           # 0: greedy
    top_k: int = 0                     # keep the k likeliest tokens; 0: all
    top_p: float = 1.0                 # then the fewest tokens that hold this much probability
    generator: torch.Generator | None = None

    def __post_init__(self):
        require(self.temperature >= 0, f"temperature {self.temperature} must be at least 0")
        require(self.top_k >= 0, f"top_k {self.top_k} must be at least 0 (0 keeps all tokens)")
        require(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")

    def probabilities(self, logits):
        """logits (..., V) -> (..., V)"""
        return warp(logits, self.temperature, self.top_k, self.top_p)

    def choose(self, logits):
        """logits (..., V) -> tokens (...)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        return draw(self.probabilities(logits), self.generator)


def warp(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is sampled from; at temperature 0 all of it on the argmax.

    logits (..., V) -> probabilities (..., V), at least fp32
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(wide)
    logits = logits.to(wide) / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered           # the likeliest token always stays
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(before >= top_p, 0))
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, generator=None):
    """One token from each distribution: the first of V exponential clocks of rates p to ring.

    torch.multinomial would check its input on the host. p (..., V), need not sum to 1 -> (...)
    """
    clocks = torch.empty_like(p).exponential_(generator=generator)
    return (p / clocks.clamp_(min=torch.finfo(p.dtype).tiny)).argmax(-1)


# ---------------------------------------------------------------------------------------------
# 2. The rows of a batch: what each has said, and when it ends. All of it stays on the device.
# ---------------------------------------------------------------------------------------------


@dataclass
class DecodeResult:
    """What decoding returns; times exclude the prompt and the capture of CUDA graphs."""

    tokens: list                       # b 1-D tensors, the new tokens without the prompt
    rounds: int                        # calls of the target after the prompt
    drafted: int                       # tokens drafted, over all rows
    accepted: int                      # of these, accepted (before a cut at an end token)
    tokens_per_round: float            # "# Gen": mean over rows and rounds of accepted + 1
    seconds: float
    tokens_per_second: float           # of all rows together, first tokens (the prompt's) excluded


@dataclass
class Rows:
    """Prompt and output of each row, left-aligned; the last emitted token is in no cache yet."""

    tokens: torch.Tensor               # (b,width+1) token ids, the last column is a bin
    length: torch.Tensor               # (b,) prompt and emitted tokens
    limit: torch.Tensor                # (b,) length at which the budget is spent
    alive: torch.Tensor                # (b,) bool, False once a row has ended
    ends: torch.Tensor                 # (e,) end tokens, may be empty
    tally: torch.Tensor                # (4,) rounds, rounds x live rows, drafted, accepted

    @property
    def last(self):
        """(b,) the token emitted last."""
        return self.tokens.gather(1, self.length[:, None] - 1)[:, 0]

    def append(self, block, n):
        """Emit the first n (b,) tokens of block (b,T), cut after an end token and at the budget."""
        t = torch.arange(block.shape[1], device=block.device)
        n = torch.where(self.alive, n.minimum(self.limit - self.length), 0)
        is_end = (block[..., None] == self.ends).any(-1) & (t < n[:, None])         # (b,T)
        ended = is_end.any(-1)
        n = torch.where(ended, is_end.int().argmax(-1) + 1, n)
        bin_ = self.tokens.shape[1] - 1
        at = (self.length[:, None] + t).masked_fill(t >= n[:, None], bin_)
        self.tokens.scatter_(1, at.clamp(max=bin_), block)
        self.length += n
        self.alive &= ~ended & (self.length < self.limit)

    def result(self, start, seconds):
        """start (b,) lengths of the prompts -> DecodeResult"""
        rounds, row_rounds, drafted, accepted = self.tally.tolist()
        new = [row[i:j] for row, i, j in zip(self.tokens.clone(), start, self.length.tolist())]
        return DecodeResult(new, rounds, drafted, accepted,
                            (row_rounds + accepted) / max(1, row_rounds), seconds,
                            (sum(map(len, new)) - len(new)) / max(seconds, 1e-9))


def read_prompts(target, input_ids, max_new_tokens, lookahead, eos_token_id):
    """Check the request and lay it out twice: left-aligned to write on, left-padded to read in.

    input_ids: (b,l), or b 1-D tensors or lists -> Rows, padded (b,l), mask (b,l) or None if full
    """
    device = target.get_input_embeddings().weight.device
    vocab = target.config.vocab_size
    require(max_new_tokens >= 1, f"max_new_tokens {max_new_tokens} must be at least 1")
    one = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 1
    prompts = [torch.as_tensor(p, dtype=torch.long).cpu() for p in ([input_ids] if one else input_ids)]
    require(len(prompts) > 0, "input_ids holds no prompts")
    for i, prompt in enumerate(prompts):
        require(prompt.ndim == 1 and len(prompt) > 0, f"prompt {i} of shape {tuple(prompt.shape)} "
                "is empty or not a row of token ids")
        require(0 <= int(prompt.min()) and int(prompt.max()) < vocab, f"prompt {i} holds token "
                f"{int(prompt.min() if prompt.min() < 0 else prompt.max())}, outside the target's "
                f"vocabulary of {vocab}")
    ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).reshape(-1).tolist()
    require(all(0 <= e < vocab for e in ends), f"end tokens {ends} are outside the target's "
            f"vocabulary of {vocab}")
    lengths = torch.tensor([len(p) for p in prompts])
    b, l = len(prompts), int(lengths.max())
    # a row may commit K + 1 tokens past its end, and goes on reading K + 1 for the others' sake
    tokens = torch.zeros(b, l + max_new_tokens + 2 * (lookahead + 1), dtype=torch.long)
    padded, mask = torch.zeros(b, l, dtype=torch.long), torch.zeros(b, l, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens[i, :len(prompt)] = prompt
        padded[i, l - len(prompt):], mask[i, l - len(prompt):] = prompt, 1
    rows = Rows(*(v.to(device) for v in (
        tokens, lengths, lengths + max_new_tokens, torch.zeros(b, dtype=torch.bool),
        torch.tensor(ends, dtype=torch.long), torch.zeros(4, dtype=torch.long))))
    return rows, padded.to(device), None if int(lengths.min()) == l else mask.to(device)


# ---------------------------------------------------------------------------------------------
# 3. Plain decoding: the oracle, and the honest denominator of every speed-up.
# ---------------------------------------------------------------------------------------------


class Decoder:
    """A model and its cache: a hybrid's own prefill and decode, or the free functions for others."""

    def __init__(self, model, rows, ring):
        b, width = rows.tokens.shape
        self.model, self.cache = model, MixerCache.allocate(model, b, width, ring)
        context = getattr(model.config, "max_position_embeddings", None)
        longest = int(rows.length.max())
        require(not (self.cache.has_attention and context and longest > context), "the prompt of "
                f"{longest} tokens is longer than the context of {context}")

    def prefill(self, padded, mask):
        """(b,l) -> logits (b,V) after the prompt"""
        self.cache.reset()
        run = getattr(self.model, "prefill", None)
        args = padded, self.cache, mask
        return (run(*args) if run else mamba_in_llama.prefill(self.model, *args))[:, -1]

    def decode(self, tokens, n_valid=None):
        """(b,T) -> logits (b,T,V), provisional until `self.cache.commit`"""
        run = getattr(self.model, "decode", None)
        args = tokens, self.cache, n_valid
        return run(*args) if run else mamba_in_llama.decode(self.model, *args)


class Captured:
    """A function of static tensors as a CUDA graph; a call replays it, the result stays in place."""

    def __init__(self, function, generator=None):
        self.graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self):
        self.graph.replay()
        return self.result


def warm_up(function):
    """Compile kernels and fill the allocator, on a side stream, as a capture needs it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)


def drive(step, rows, most):
    """Call `step` until every row has ended, at most `most` times. -> seconds

    On CUDA the host looks at the rows one call behind, while the next one already runs: it never
    makes the device wait, and costs one idle call at the end.
    """
    cuda = rows.alive.is_cuda
    if cuda:
        flag, event = torch.ones((), dtype=torch.bool).pin_memory(), torch.cuda.Event()
        torch.cuda.synchronize()
    elif not rows.alive.any():
        most = 0
    begin = time.perf_counter()
    for i in range(most):
        step()
        if cuda:
            if i:
                event.synchronize()
                if not flag:
                    break
            flag.copy_(rows.alive.any(), non_blocking=True)
            event.record()
        elif not rows.alive.any():
            break
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def generate(target, input_ids, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
             eos_token_id=None, generator=None):
    """Plain decoding, one token a step. The arguments are those of `speculative_decode`.

    On CUDA the step is one captured graph. A ring of 1 is fastest where the state is written by
    tensor operations anyway; the kernel saves most of those writes with a ring of 16.
    """
    sampling = Sampling(temperature, top_k, top_p, generator)
    rows, padded, mask = read_prompts(target, input_ids, max_new_tokens, 0, eos_token_id)
    start, cuda = rows.length.tolist(), rows.tokens.is_cuda
    decoder = Decoder(target, rows, ring=16 if cuda else 1)
    one = torch.ones_like(rows.length)

    def step():
        logits = decoder.decode(rows.last[:, None])[:, 0]                       # (b,V)
        decoder.cache.commit(rows.alive)
        rows.tally[0] += rows.alive.any()
        rows.tally[1] += rows.alive.sum()
        rows.append(sampling.choose(logits)[:, None], one)

    if cuda:                           # no row is alive yet: captures leave `rows` as they are
        warm_up(step)
        step = Captured(step, generator)
    logits = decoder.prefill(padded, mask)
    rows.alive.fill_(True)
    rows.append(sampling.choose(logits)[:, None], one)
    return rows.result(start, drive(step, rows, max_new_tokens - 1))


# ---------------------------------------------------------------------------------------------
# 4. Drafts. start: a new batch; propose: K tokens per row; settle: how many of them stand.
# ---------------------------------------------------------------------------------------------


@dataclass
class Proposal:
    """K drafted tokens per row, and how likely the draft was to draft each."""

    tokens: torch.Tensor               # (b,K)
    q: torch.Tensor | None = None      # (b,K,V); None: a point mass on each drafted token
    n: torch.Tensor | None = None      # (b,) drafted tokens that count; None: all K


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
        """Make room for these rows. Raises ValueError where the vocabularies differ."""
        ours, theirs = self.model.config.vocab_size, target.config.vocab_size
        require(ours == theirs, f"the draft's vocabulary of {ours} tokens is not the target's of "
                f"{theirs}")
        self.rows, self.K, self.sampling, self.vocab = rows, lookahead, sampling, theirs
        self.decoder = Decoder(self.model, rows, ring)

    def prefill(self, padded, mask):
        """Read the prompts, padded (b,l)."""
        self.decoder.prefill(padded, mask)

    def propose(self):
        """-> Proposal. The first call also brings a token that the cache lacks: the last drafted
        one, in rows where all were accepted; so it is two tokens wide, with one valid elsewhere."""
        rows, cache = self.rows, self.decoder.cache
        self.missing = (rows.length - cache.length).clamp(1, 2)                 # (b,)
        width = 2 if cache.counts.is_cuda else int(self.missing.max())
        first = rows.length - self.missing
        at = first[:, None] + torch.arange(width, device=first.device)
        logits = self.decoder.decode(rows.tokens.gather(1, at), self.missing if width > 1 else None)
        logits = logits[torch.arange(len(first), device=first.device), self.missing - 1]   # (b,V)
        tokens, qs = [], []
        for i in range(self.K):
            token, q = self.choose(logits)
            tokens.append(token)
            qs.append(q)
            if i < self.K - 1:
                logits = self.decoder.decode(token[:, None])[:, 0]
        greedy = self.sampling.temperature == 0
        return Proposal(torch.stack(tokens, 1), None if greedy else torch.stack(qs, 1))

    def choose(self, logits):
        """logits (b,V or v) -> token (b,), q (b,V) or None at temperature 0"""
        q = None
        if self.sampling.temperature == 0:
            token = logits.argmax(-1)
        else:
            q = self.sampling.probabilities(logits)
            token = draw(q, self.sampling.generator)
        if self.subset is not None:
            token = self.subset[token]
            if q is not None:
                q = q.new_zeros(len(q), self.vocab).index_copy(1, self.subset, q)
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
        self.rows, self.K = rows, lookahead

    def prefill(self, padded, mask):
        pass

    def propose(self):
        """-> Proposal; on the CPU without columns when no row has a match."""
        rows, tokens = self.rows, self.rows.tokens
        if not tokens.is_cuda:
            tokens = tokens[:, :int(rows.length.max())]
        start = latest_match(tokens, rows.length, self.n, self.least)           # (b,)
        n = torch.where(rows.alive & (start > 0), self.K, 0)
        K = self.K if tokens.is_cuda or n.any() else 0
        # past the end of the context the continuation repeats itself
        period = (rows.length - start)[:, None]
        at = start[:, None] + torch.arange(K, device=start.device) % period
        return Proposal(tokens.gather(1, at), None, n)

    def settle(self, n_accepted):
        pass


def latest_match(tokens, length, n, least):
    """Where the latest earlier occurrence of a row's last n (or fewer) tokens ends; 0: nowhere.

    tokens (b,width)  length (b,) -> (b,) index of the token that followed
    """
    found = torch.zeros_like(length)
    for size in range(n, least - 1, -1):
        if size >= tokens.shape[1]:
            continue
        k = torch.arange(size, device=tokens.device)
        suffix = tokens.gather(1, (length[:, None] - size + k).clamp(min=0))    # (b,size)
        same = (tokens.unfold(1, size, 1) == suffix[:, None]).all(-1)           # (b,width-size+1)
        end = torch.arange(size, tokens.shape[1] + 1, device=tokens.device)
        end = torch.where(same & (end < length[:, None]), end, 0).amax(-1)
        found = torch.where(found > 0, found, end)
    return found


def LayerSubsetDraft(model, layers, vocab_subset=None):
    """An ordinary model of a few of the target's layers, with its embeddings, norm and head.

    Weights are shared with `model` (deepcopy it before training: "shrink and fine-tune"); layers
    are renumbered, so that caches and save_pretrained see an ordinary model.
    """
    L, layers = len(model.model.layers), [int(i) for i in layers]
    require(layers and all(0 <= i < L for i in layers) and len(set(layers)) == len(layers),
            f"draft layers {layers}: must be different indices in 0..{L - 1}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    if hasattr(config, "attn_layers"):
        config.attn_layers = [j for j, i in enumerate(layers) if i in config.attn_layers]
    with torch.device("meta"):
        draft = type(model)(config)
    for ours, i in zip(draft.model.layers, layers):
        ours.load_state_dict(model.model.layers[i].state_dict(keep_vars=True), assign=True)
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(draft.model, name, getattr(model.model, name))
    draft.lm_head = model.lm_head
    draft.generation_config, draft.vocab_subset = model.generation_config, vocab_subset
    return draft.train(model.training)


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
    max(0, p_i - q_i), normalised; where all stand, from p_K. Both cases are one when q_K = 0.
    simulate: SIMULATED acceptance for timing, each token stands with this probability.

    logits (b,K+1,V) -> n_accepted (b,), next token (b,)
    """
    drafted, (b, K) = proposal.tokens, proposal.tokens.shape
    row, t = torch.arange(b, device=drafted.device), torch.arange(K, device=drafted.device)
    counts = True if proposal.n is None else t < proposal.n[:, None]            # (b,K)
    if simulate is not None:
        n = first_conflict(torch.rand(b, K, device=drafted.device) < simulate)
        return n, logits[row, n].argmax(-1)
    if sampling.temperature == 0:
        chosen = logits.argmax(-1)                                              # (b,K+1)
        n = first_conflict((drafted == chosen[:, :K]) & counts)
        return n, chosen[row, n]
    p, q = sampling.probabilities(logits), proposal.q                           # (b,K+1,V)
    p_d = p[:, :K].gather(2, drafted[..., None])[..., 0]                        # (b,K)
    q_d = 1.0 if q is None else q.gather(2, drafted[..., None])[..., 0]
    u = torch.empty_like(p_d).uniform_(generator=sampling.generator)
    n = first_conflict((u * q_d < p_d) & counts)
    p_n, at = p[row, n], n.clamp(max=max(0, K - 1))                             # (b,V)
    if K == 0:
        return n, draw(p_n, sampling.generator)
    q_n = F.one_hot(drafted[row, at], p.shape[-1]).to(p) if q is None else q[row, at]
    q_n = q_n * (n < (K if proposal.n is None else proposal.n))[:, None]        # all stood: 0
    rest = (p_n - q_n).clamp_(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_n)               # p = q, rounded
    return n, draw(rest, sampling.generator)


def verify(target, rows, proposal, sampling, simulate=None):
    """VERIFY: one multi-step call on [last token, K drafted ones]; commit what stands.

    target: a Decoder -> n_accepted (b,), next token (b,)
    """
    logits = target.decode(torch.cat([rows.last[:, None], proposal.tokens], 1))  # (b,K+1,V)
    n, token = accept(logits, proposal, sampling, simulate)
    target.cache.commit(torch.where(rows.alive, n + 1, 0))
    return n, token


def emit(rows, proposal, n, token):
    """Append the accepted tokens and the target's own one to each row, and count."""
    block = torch.cat([proposal.tokens, token[:, None]], 1)                     # (b,K+1)
    block = block.scatter(1, n[:, None], token[:, None])
    drafted = torch.full_like(n, proposal.tokens.shape[1]) if proposal.n is None else proposal.n
    alive = rows.alive.long()
    rows.tally += torch.stack([alive.amax(), alive.sum(), (drafted * alive).sum(),
                               (n * alive).sum()])
    rows.append(block, n + 1)


@torch.no_grad()
def speculative_decode(target, draft, input_ids, max_new_tokens, lookahead=4, temperature=0.0,
                       top_k=0, top_p=1.0, eos_token_id=None, generator=None, ring=16,
                       simulate=None, on_round=None):
    """SPECULATE: draft K tokens, VERIFY, until every row has ended; rows advance independently.

    target: a hybrid or a plain decoder. draft: the same, or an object with start, prefill,
    propose and settle (section 4). input_ids: (b,l), or b 1-D tensors of different lengths.
    eos_token_id: None, an id or several. ring: most tokens between two commits. simulate: see
    `accept`. on_round: called with (rows, proposal, n_accepted, token) before tokens are emitted.
    Raises ValueError, in one line, for anything that does not fit. -> DecodeResult
    """
    require(lookahead >= 1, f"lookahead {lookahead} must be at least 1")
    require(lookahead + 1 <= ring, f"lookahead {lookahead} + 1 exceeds the ring of {ring}")
    sampling = Sampling(temperature, top_k, top_p, generator)
    rows, padded, mask = read_prompts(target, input_ids, max_new_tokens, lookahead, eos_token_id)
    start = rows.length.tolist()
    if not hasattr(draft, "propose"):
        draft = ModelDraft(draft, getattr(draft, "vocab_subset", None))
    decoder = Decoder(target, rows, ring)
    draft.start(target, rows, lookahead, sampling, ring)

    def check(proposal):
        n, token = verify(decoder, rows, proposal, sampling, simulate)
        draft.settle(n)
        if on_round is not None:
            on_round(rows, proposal, n, token)
        emit(rows, proposal, n, token)

    def step():
        check(draft.propose())

    if rows.tokens.is_cuda and on_round is None and getattr(draft, "static", True):
        warm_up(step)                  # no row is alive yet: captures leave `rows` as they are
        propose = Captured(draft.propose, generator)
        judge = Captured(lambda: check(propose.result), generator)

        def step():
            propose()
            judge()

    logits = decoder.prefill(padded, mask)
    draft.prefill(padded, mask)
    rows.alive.fill_(True)
    rows.append(sampling.choose(logits)[:, None], torch.ones_like(rows.length))
    return rows.result(start, drive(step, rows, max_new_tokens - 1))


# ---------------------------------------------------------------------------------------------
# 6. The authors' released checkpoints (both formats) in our Mixer, tensor by tensor.
# ---------------------------------------------------------------------------------------------

# their name inside `mamba.`: (our name inside `self_attn.`, rows of our in_proj or None)
THEIR_NAMES = {
    "mamba2": {"in_proj.weight": ("in_proj.weight", None), "dt_bias": ("dt_bias", None),
               "norm.weight": ("norm_weight", None)},
    "mamba": {"in_proj_z.weight": ("in_proj.weight", "z"), "in_proj_x.weight": ("in_proj.weight", "x"),
              "B_proj.weight": ("in_proj.weight", "B"), "C_proj.weight": ("in_proj.weight", "C"),
              "dt_proj_down.weight": ("in_proj.weight", "dt"),
              "dt_proj.weight": ("dt_proj.weight", None), "dt_proj.bias": ("dt_bias", None)},
}
for _names in THEIR_NAMES.values():
    _names.update({k: (k, None) for k in ("conv1d.weight", "conv1d.bias", "A_log", "D",
                                          "out_proj.weight")})


def checkpoint_tensors(folder):
    """(name, tensor) of every safetensors or .bin file of a directory, one in memory at a time."""
    from safetensors import safe_open
    names = sorted(os.listdir(folder))
    files = [n for n in names if n.endswith(".safetensors")] or [
        n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")]
    require(files, f"{folder} holds neither safetensors nor pytorch_model.bin")
    for name in files:
        path = os.path.join(folder, name)
        if name.endswith(".bin"):
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
        else:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    yield key, file.get_tensor(key)


def authors_config(folder):
    """config.json (the teacher's) and mamba_config.json as one HybridConfig."""
    with open(os.path.join(folder, "config.json")) as file:
        fields = json.load(file)
    with open(os.path.join(folder, "mamba_config.json")) as file:
        theirs = json.load(file)
    ssm = theirs.get("ssm_cfg") or {}
    mixer = "mamba2" if "ngroups" in ssm or ssm.get("layer") == "Mamba2" else "mamba"
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    for name, ours, unit in (("d_xb", fields.get("num_key_value_heads", heads) * head_dim, "K/V"),
                             ("d_inner", heads * head_dim, "query")):
        require(theirs.get(name) in (None, ours), f"mamba_config.json: {name} {theirs.get(name)}, "
                f"but the {unit} heads of config.json make {ours}")
    mamba = mixer == "mamba"
    drop = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "_name_or_path")
    switches = {**mamba_in_llama.RECIPES["paper"], "norm": not mamba, "group_by_state": mamba,
                "d_state": ssm.get("d_state", 16 if mamba else head_dim),
                "d_conv": ssm.get("d_conv", 4)}
    return mamba_in_llama.HybridConfig(
        **{k: v for k, v in fields.items() if k not in drop}, teacher_type=fields["model_type"],
        attn_layers=sorted(theirs["attn_layers"]), mixer=mixer, recipe="paper", **switches)


@torch.no_grad()
def load_authors_checkpoint(directory_or_hub_name, dtype=None):
    """A checkpoint of jxiw/MambaInLlama, Mamba or Mamba2, as a HybridForCausalLM on the CPU.

    Their Mamba adds dt_proj.bias twice (and was trained so): our dt_bias is twice theirs. dtype
    None: bfloat16. Memory: the model and one tensor. Raises ValueError for another format and
    for missing or unknown tensors.
    """
    folder, dtype = directory_or_hub_name, dtype or torch.bfloat16
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download
        try:
            folder = snapshot_download(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {folder}: {str(error).splitlines()[0]}") from None
    for name in "config.json", "mamba_config.json":
        require(os.path.isfile(os.path.join(folder, name)), f"{folder} has no {name}: not in the "
                "format of the authors' checkpoints")
    config = authors_config(folder)
    with torch.device("meta"):
        model = mamba_in_llama.HybridForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.model.config)   # not in the files
    modules, wanted = dict(model.named_modules()), {}
    for name, p in list(model.named_parameters()):
        wide = name.rsplit(".", 1)[-1] in model._keep_in_fp32_modules_strict
        new = torch.zeros(p.shape, dtype=torch.promote_types(dtype, torch.float32) if wide else dtype)
        wanted[name] = nn.Parameter(new)
        parent, leaf = name.rpartition(".")[::2]
        setattr(modules[parent], leaf, wanted[name])
    model.tie_weights()
    # a mixer's own biases are ours: theirs have none
    missing = {n for n in wanted if not n.endswith(("in_proj.bias", "out_proj.bias"))}
    seen = set()
    for key, tensor in checkpoint_tensors(folder):
        name, rows = key, slice(None)
        if ".mamba." in key:
            prefix, theirs = key.split("mamba.", 1)
            require(theirs in THEIR_NAMES[config.mixer], f"{key}: unknown tensor of a "
                    f"{config.mixer} checkpoint")
            ours, part = THEIR_NAMES[config.mixer][theirs]
            name = f"{prefix}self_attn.{ours}"
            rows = modules[f"{prefix}self_attn"].rows[part] if part else rows
            tensor = 2 * tensor if theirs == "dt_proj.bias" else tensor
        elif key.endswith("rotary_emb.inv_freq") or key == "lm_head.weight" and key not in wanted:
            continue
        require(name in wanted, f"{key}: unknown tensor")
        require(wanted[name][rows].shape == tensor.shape, f"{key}: shape {tuple(tensor.shape)}, "
                f"but {tuple(wanted[name][rows].shape)} is needed")
        wanted[name][rows] = tensor.to(wanted[name].dtype)
        seen.add(key)
        missing.discard(name)
    if config.mixer == "mamba":        # one of our matrices is five of theirs
        missing |= {f"model.layers.{i}.mamba.{n}" for i in model.mixers()
                    for n, (_, part) in THEIR_NAMES["mamba"].items()
                    if part and f"model.layers.{i}.mamba.{n}" not in seen}
    require(not missing, f"{folder} lacks {len(missing)} tensors, e.g. {min(missing, default='')}")
    return model.eval()
