"""Tests of spec_decode.py: exactness first. SPEC_GRID=1 runs the whole grid of the first test."""

import itertools
import json
import math
import os
import random
import shlex
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"      # before transformers is imported: no test asks the network

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import mamba_in_llama as M  # noqa: E402
import spec_decode as S  # noqa: E402

V = 61
SHARES = {1.0: [0, 1, 2, 3], 0.5: [1, 3], 0.25: [2], 0.0: []}
DRAFTS = ["itself", "plain", "hybrid", "layers", "ngram", "right", "wrong", "random"]
_models = {}


def toy_llama(vocab=V, layers=4, width=64, seed=0, sharp=8.0, **fields):
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

    def prefill(self, padded, mask):
        pass

    def propose(self):
        out = []
        for answer, prompt, length in zip(self.answers, self.prompts, self.rows.length.tolist()):
            rest = answer[length - prompt:][:self.K]
            rest = rest + [0] * (self.K - len(rest))
            if self.kind == "wrong":
                rest = [(t + 1) % V for t in rest]
            if self.kind == "random":
                rest = [t if self.draw.random() < 0.6 else self.draw.randrange(V) for t in rest]
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
        prompts = [torch.randint(V, (length if j == 0 else draw.randint(1, 40),))
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
    prompts = [torch.randint(V, (l,)) for l in (1, 5, 23)]
    got = S.generate(target, prompts, 12)
    for prompt, new in zip(prompts, got.tokens):
        text = prompt.tolist()
        for token in new.tolist():
            with torch.no_grad():
                assert int(target(torch.tensor([text])).logits[0, -1].argmax()) == token
            text.append(token)


def test_hand_example():
    """p says 1 2 3 4; the draft says 1 2 9 4: two stand, and the third token is the target's 3."""
    logits = F.one_hot(torch.tensor([[1, 2, 3, 4, 5]]), 10).float()
    n, token = S.accept(logits, S.Proposal(torch.tensor([[1, 2, 9, 4]])), S.Sampling())
    assert (n.item(), token.item()) == (2, 3)
    n, token = S.accept(logits, S.Proposal(torch.tensor([[1, 2, 3, 4]])), S.Sampling())
    assert (n.item(), token.item()) == (4, 5)


def test_warp():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert torch.allclose(S.warp(logits, top_k=2), torch.tensor([0.625, 0.375, 0, 0]))
    assert torch.allclose(S.warp(logits, top_p=0.8), torch.tensor([0.625, 0.375, 0, 0]))
    assert torch.allclose(S.warp(logits, top_p=0.81), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95)
    assert torch.equal(S.warp(logits, 0), torch.tensor([1.0, 0, 0, 0]))
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(S.warp(logits, 0.5), squares / squares.sum())


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
    p = S.warp(logits, **settings).gather(2, words[..., None])[..., 0].prod(1)
    cell = torch.stack(got.tokens) @ torch.tensor([vocab ** 2, vocab, 1])
    assert chi_square_z(cell.bincount(minlength=vocab ** 3), p) < 3.5
    assert got.accepted > 0 and got.accepted < got.drafted


def test_plain_sampling_distribution():
    """generate() draws from the same distribution; end tokens and budgets hold when sampling."""
    target = toy("mamba2", 0.5, torch.float32, vocab=6, layers=4, width=16, sharp=3.0)
    got = S.generate(target, torch.tensor([[1, 2]]).expand(20_000, -1), 2, temperature=0.9,
                     generator=torch.Generator().manual_seed(0))
    words = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        logits = target(torch.cat([torch.tensor([[1, 2]]).expand(36, -1), words], 1)).logits[:, 1:3]
    p = S.warp(logits, 0.9).gather(2, words[..., None])[..., 0].prod(1)
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
    tokens = torch.randint(V, (3, 60))
    cache = M.MixerCache.allocate(target, 3, 80, ring=8)
    target.prefill(tokens[:, :5], cache)
    at = torch.tensor([5, 5, 5])
    for _ in range(9):                                      # rows accept different counts
        n = torch.tensor([draw.randint(0, 5) for _ in range(3)])
        block = torch.randint(V, (3, 5))
        for i in range(3):
            block[i, :n[i]] = tokens[i, at[i]:at[i] + n[i]]
        target.decode(block, cache)
        cache.commit(n)
        at += n
    assert cache.length.tolist() == at.tolist()
    probe = torch.randint(V, (3, 2))
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


def test_latest_match():
    """ab?ab: the last two words occurred at 0..1, and 2 followed; nothing matches 9."""
    tokens = torch.tensor([[7, 8, 1, 7, 8, 0, 0], [1, 2, 3, 4, 9, 0, 0], [5, 5, 5, 0, 0, 0, 0]])
    found = S.latest_match(tokens, torch.tensor([5, 5, 3]), 3, 1)
    assert found.tolist() == [2, 0, 2]


def test_layer_subset_saves_and_shares(tmp_path):
    for model in (toy_llama(), toy("mamba2", 0.5, torch.float32)):
        draft = S.LayerSubsetDraft(model, [0, 3])
        ours = {p.data_ptr() for p in draft.parameters()}
        assert ours <= {p.data_ptr() for p in model.parameters()}
        draft.save_pretrained(tmp_path / type(model).__name__)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__)
        tokens = torch.randint(V, (2, 9))
        with torch.no_grad():
            assert torch.equal(again(tokens).logits, draft(tokens).logits)
            assert again.config.num_hidden_layers == 2


def test_vocab_subset():
    """A draft with a short head says only those words, and the output is still the target's."""
    target = toy("mamba2", 0.5)
    subset = torch.arange(0, V, 2)
    draft = S.ModelDraft(toy_llama(seed=3).double(), subset)
    prompts, said = [torch.randint(V, (l,)) for l in (3, 9)], []
    got = S.speculative_decode(target, draft, prompts, 20, on_round=lambda rows, proposal, n, t:
                               said.extend(proposal.tokens.flatten().tolist()))
    plain = S.generate(target, prompts, 20)
    assert [t.tolist() for t in got.tokens] == [t.tolist() for t in plain.tokens]
    assert set(said) <= set(subset.tolist())


def test_simulated_acceptance():
    """# Gen of a draft that is right with probability P is (1 - P^(K+1)) / (1 - P)."""
    target = toy("mamba2", 0.5, torch.float32)
    got = S.speculative_decode(target, toy_llama(seed=3), torch.randint(V, (16, 4)), 100,
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
    (dict(input_ids=[[1, V]]), f"token {V}"),
    (dict(input_ids=[[1, -1]]), "token -1"),
    (dict(eos_token_id=V), "end tokens"),
    (dict(draft=lambda: toy_llama(vocab=V + 3)), "vocabulary"),
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
    model = toy_llama(width=D, vocab=V)
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


# ---- the command line, as a user types it ----------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with tiny_run/{teacher,mamba,mamba2}: random weights, a real tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer, _ = M.tiny_world()
    for name in ("teacher", "mamba2", "mamba"):
        # a teacher that says any word will also say the mark that begins an answer
        model = toy_llama(vocab=len(tokenizer), width=32, sharp=0.0 if name == "teacher" else 8.0)
        if name != "teacher":
            model = M.convert_to_hybrid(model, [1, 3], name)
        model.generation_config.eos_token_id = 2
        model.save_pretrained(folder / "tiny_run" / name)
        tokenizer.save_pretrained(folder / "tiny_run" / name)
    return folder


def command(home, text):
    """Run `python spec_decode.py <text>`. -> exit code, stdout, stderr"""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "spec_decode.py")
    done = subprocess.run([sys.executable, script, *shlex.split(text)], cwd=home, text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_command_tiny(home):
    code, out, err = command(home, "--tiny --max-new-tokens 16 --json t.json")
    assert code == 0, err
    rows = json.loads((home / "t.json").read_text())
    assert len(rows) == 6 and all(r["identical"] == "yes" for r in rows[1:])
    assert "round  1:" in out and "speed-up" in out and "Traceback" not in err


@pytest.mark.parametrize("draft", ["ngram:3", "layers:0,3", "tiny_run/mamba"])
def test_command_decodes(home, draft):
    code, out, err = command(home, f"--target tiny_run/mamba2 --draft {draft} --lookahead 3 "
                                   "--prompt 'The import statement' --max-new-tokens 16")
    assert code == 0 and out.rstrip().endswith("yes"), err


def test_command_bench(home):
    code, out, err = command(home, "--bench --sizes tiny --max-new-tokens 8 --json b.json")
    assert code == 0 and "SIMULATED" in out, err
    assert {"speed_up", "share_of_floor", "verify_over_step"} <= set(
        json.loads((home / "b.json").read_text())[0])


def test_command_needle(home):
    code, out, err = command(home, "--needle --target tiny_run/mamba2 --lengths 64,96 --depths 0,1 "
                                   "--trials 1")
    assert code == 0 and "cache of one row" in out, err


def test_command_make_draft(home):
    code, out, err = command(home, "--make-draft layers:0,2 --target tiny_run/teacher --out new "
                                   "--rows 256 --length 48 --minutes 0.02")
    assert code == 0 and (home / "new" / "config.json").exists(), err


WRONG = [("", "--target and --prompt"), ("--tiny --bench", "give one of"),
         ("--target nowhere --prompt x", "cannot load nowhere"),
         ("--target tiny_run/mamba2 --prompt x --draft layers:9", "0..3"),
         ("--target tiny_run/mamba2 --prompt x --draft ngram:x", "ngram:x"),
         ("--target tiny_run/mamba2 --prompt x --lookahead 16", "ring of 16"),
         ("--target tiny_run/mamba2 --prompt x --lookahead 0", "lookahead"),
         ("--target tiny_run/mamba2 --prompt x --temperature -1", "temperature"),
         ("--target tiny_run/mamba2 --prompt x --draft tiny_run/mamba --draft-words 0", "words"),
         ("--bench --sizes 9b", "9b"), ("--bench --simulate-acceptance 1.5", "1.5"),
         ("--make-draft layers:0 --target tiny_run/teacher --out tiny_run", "new or empty")]


@pytest.mark.parametrize("text, message", WRONG, ids=[t for t, _ in WRONG])
def test_command_errors(home, text, message, monkeypatch, capsys):
    """One line and exit code 2; in this process, since importing torch takes seconds."""
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as stop:
        M.cli(lambda: S.main(shlex.split(text)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and message in line
