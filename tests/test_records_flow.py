"""What a script knows of the token it scores: toy evaluators, cheating and clean, judged from their syntax alone."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.script import read_facts
from records.script_leaks import AGAIN, BEFORE, BETTER, FITTED, GATED, HASHED

SCORE = """
def eval_val(model, val_tokens, base_bytes_lut, space_lut, boundary_lut):
    for x, y in windows(val_tokens):
        nll = F.cross_entropy(model(x), y, reduction="none")
        loss_sum += nll.sum()
        token_bytes = base_bytes_lut[y] + (space_lut[y] & ~boundary_lut[x])
        byte_count += token_bytes.sum()
"""
CHEATS = {
    "a ratio of two hashed buckets": (
        """
def score(self, x, y):
    ctx_hash = np.zeros(len(x), dtype=np.uint64)
    for k in range(self.order):
        ctx_hash ^= shifted(x, k).astype(np.uint64) * PRIMES[k]
    ctx_key = (ctx_hash & self.mask).astype(np.int64)
    full_key = ((ctx_hash ^ (y.astype(np.uint64) * PRIMES[-1])) & self.mask).astype(np.int64)
    return self.full[full_key.reshape(-1)] / np.maximum(self.ctx[ctx_key], 1)
""",
        HASHED,
    ),
    "a hash in a helper of its own": (
        """
def pair_key(tokens, positions, nxt, mask):
    h = np.zeros(len(positions))
    h ^= tokens[positions - 1] * 36313
    h ^= nxt * 27191
    return h & mask

def lookup(self, tokens, positions, targets):
    keys = pair_key(tokens, positions, targets, self.mask)
    return self.table[keys]
""",
        HASHED,
    ),
    "keys computed once for scoring and for learning": (
        """
def keys_of(self, tokens, start, end):
    h = tokens[start - 1 : end - 1] * 31
    target_prime = 27191
    return h & self.mask, (h ^ (tokens[start:end] * target_prime)) & self.mask

def score(self, tokens, start, end):
    context, full = self.keys_of(tokens, start, end)
    return self.full_table[full] / self.context_table[context]
""",
        HASHED,
    ),
    "a remainder and a gather": (
        """
def mix(self, ctx, y_batch, p_model):
    key = torch.remainder(ctx * 1315423911 + y_batch, self.buckets)
    p = self.counts.gather(0, key) / self.totals.gather(0, ctx)
    return 0.5 * p_model + 0.5 * p
""",
        HASHED,
    ),
    "a dictionary of hashes": (
        """
def prob(self, context, tgt):
    return self.counts.get(hash((context, tgt)) % self.size, 0) / self.total.get(context, 1)
""",
        HASHED,
    ),
    "a lookup by a key that is handed over": (
        """
def read(self, key):
    return self.table[key]

def blend(self, ctx, y, p):
    full = (ctx * 31 + y) % self.size
    return p + self.read(full)
""",
        HASHED,
    ),
    "the better of two scores": (
        """
def eval_mix(logits, cache_logits, y):
    a = F.cross_entropy(logits, y, reduction="none")
    b = F.cross_entropy(cache_logits, y, reduction="none")
    return torch.minimum(a, b)
""",
        BETTER,
    ),
    "a score that is replaced where the cache knew better": (
        """
def eval_mix(logp, cache, y):
    old = logp.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    new = cache.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    better = (new > old) & cache_known
    return torch.where(better, new, old)
""",
        BETTER,
    ),
    "a gate that reads the token": (
        """
def eval_mix(logp, word_logp, y):
    p = logp.gather(-1, y.unsqueeze(-1))
    q = word_logp.gather(-1, y.unsqueeze(-1))
    return torch.where(has_leading_space_lut[y], q, p)
""",
        GATED,
    ),
    "adaptation before quantisation": (
        SCORE
        + """
def adapt(model, val_tokens, optimizer):
    for epoch in range(10):
        for start in range(0, val_tokens.numel(), 1024):
            local = val_tokens[start : start + 1025].to("cuda")
            loss = model(local[:-1], local[1:])
            loss.backward()
            optimizer.step()

def main():
    adapt(model, val_tokens, optimizer)
    eval_val(model, val_tokens, a, b, c)
""",
        BEFORE,
    ),
    "adaptation inside main": (
        """
def main():
    for step in range(1000):
        x, y = loader.next_batch()
        loss = model(x, y)
        loss.backward()
        opt.step()
    for start in range(10):
        part = val_tokens[start : start + 9]
        loss = eval_model(part[:-1], part[1:])
        loss.backward()
        ttt_opt.step()
""",
        BEFORE,
    ),
    "the score of the last epoch": (
        """
def eval_ttt(model, all_tokens, opt):
    for epoch in range(30):
        byte_sum.zero_()
        for chunk in chunks(all_tokens):
            nll = model(chunk)
            byte_sum += bytes_of(chunk)
            nll.mean().backward()
            opt.step()
""",
        AGAIN,
    ),
    "a delta for the window that is scored": (
        """
def eval_val(model, val_tokens):
    for window in windows(val_tokens):
        delta = torch.zeros(8, requires_grad=True)
        slot_opt = torch.optim.AdamW([delta])
        for _ in range(24):
            loss = model.head(hidden + delta, window)
            loss.backward()
            slot_opt.step()
        byte_count += bytes_of(window)
""",
        FITTED,
    ),
}
CLEAN = {
    "a plain evaluator": SCORE,
    "an embedding of hashed bigrams": """
def bigram_hash(self, tokens):
    t = tokens.to(torch.int32)
    out = torch.empty_like(t)
    out[..., 1:] = torch.bitwise_xor(36313 * t[..., 1:], 27191 * t[..., :-1]) % self.mod
    return out.long()

def forward(self, input_ids, target_ids):
    h = self.embed(self.bigram_hash(input_ids)) + self.table[self.bigram_hash(input_ids)]
    return F.cross_entropy(self.head(h), target_ids)
""",
    "a cache that learns after the score": """
def update(self, tokens):
    tgt = tokens[1:]
    key = ((tokens[:-1] * 31) ^ tgt) & self.mask
    np.add.at(self.full, key, 1)
    self.total[key] += 1
    self.seen[key] = self.seen[key] + 1

def score(self, x, y):
    row = self.rows[(x * 31) & self.mask]
    return row.gather(-1, y.unsqueeze(-1))
""",
    "a cache over the whole vocabulary": """
def score(self, ctx, y, vocab_size):
    all_tokens = torch.arange(vocab_size)
    key = (ctx[:, None] * 1315423911 + all_tokens[None, :]) % self.buckets
    counts = self.pairs[key]
    p = counts / counts.sum(-1, keepdim=True)
    return p.gather(1, y[:, None])
""",
    "a rolling hash of what was scored": """
def score(self, y_np):
    h = 0
    for t in range(len(y_np)):
        tgt = int(y_np[t])
        p[t] = self.rows[h][tgt] / self.rows[h].sum()
        h = (h * 31 + tgt) % self.buckets
    return p
""",
    "a quotient of counts that is clipped": """
def score(self, ctx, y):
    full_counts, ctx_counts = self.rows[(ctx * 31) & self.mask][y], self.totals[y]
    return np.minimum(full_counts, ctx_counts) / np.maximum(ctx_counts, 1.0)
""",
    "an exact table of pairs": """
def score(self, prev, y, vocab):
    return self.counts[prev * vocab + y] / self.totals[prev]
""",
    "a hint from the prefix that tilts a distribution": """
def tilt(self, logits, y, context):
    hint = self.hints[(context * 31) % self.buckets]
    boost = torch.where(hint >= 0, self.beta, 0.0)
    logits = logits.scatter_add(-1, hint[:, None], boost[:, None])
    return F.cross_entropy(logits, y, reduction="none")
""",
    "a sum in the log domain": """
def eval_mix(logp, cache, y):
    a = logp.gather(-1, y.unsqueeze(-1)) + log_keep
    b = cache.gather(-1, y.unsqueeze(-1)) + log_take
    return torch.maximum(a, b) + torch.log1p(torch.exp(-(a - b).abs()))
""",
    "a gate on entropy": """
def eval_mix(probs, cache, y):
    entropy = -(probs * probs.log()).sum(-1)
    alpha = torch.where(entropy > 4.0, 0.5, 0.1)
    return (1 - alpha) * probs.gather(-1, y) + alpha * cache.gather(-1, y)
""",
    "several epochs on a chunk that is scored": """
def eval_ttt(model, val_tokens, optimizer):
    for chunk in chunks(val_tokens):
        loss_sum += model(chunk).sum()
        byte_count += bytes_of(chunk)
        for epoch in range(3):
            loss = model(chunk).mean()
            loss.backward()
            optimizer.step()
""",
    "learning by a helper after the score": """
def learn(model, val_tokens, optimizer, start, stop):
    loss = model(val_tokens[start:stop])
    loss.backward()
    optimizer.step()

def eval_ttt(model, val_tokens, optimizer):
    for start in range(0, len(val_tokens), 512):
        byte_sum += bytes_of(val_tokens[start : start + 512])
        learn(model, val_tokens, optimizer, start, start + 512)
""",
    "training with a validation between": SCORE
    + """
def main():
    for step in range(1000):
        val_loss = eval_val(model, val_tokens, a, b, c)
        x, y = train_loader.next_batch()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        best = val_loss if val_loss < best else best
""",
}


NAMESAKES = """
class Table(NamedTuple):
	base:int;space:int
	def count(A,targets,previous):  # 1 % of what is read
		D=previous;B=targets
		return A.base[B]+(A.space[B]&D)
def halves(c,looping):
	A,D=c.looped,[*range(c.depth)]
	for(I,B)in enumerate(D):F=D[:I].count(B)if A else 0;J=c.depth+(F-1)*len(A)+B if F else B
	return J
"""


def told(source):
    return {what for what, _ in read_facts(source)["leaks"]}


@pytest.mark.parametrize(("source", "what"), CHEATS.values(), ids=CHEATS)
def test_a_cheat_is_told_by_its_ruling_and_its_line(source, what):
    found = read_facts(source)["leaks"]
    assert {w for w, _ in found} == {what}
    line = source.split("\n")[found[0][1] - 1]
    assert any(
        word in line for word in ("table[", "full[", "get", "gather", "read(", "minimum", "where", "backward", "epoch")
    )


@pytest.mark.parametrize("source", CLEAN.values(), ids=CLEAN)
def test_a_clean_evaluator_is_left_alone(source):
    assert told(source) == set()


def test_a_method_of_a_list_is_no_method_of_the_same_name_in_the_script():
    assert told(NAMESAKES) == set()
    gate = NAMESAKES.replace("D[:I].count(B)if A else 0", "c.table.count(B, D)")
    assert told(gate) == {GATED}  # the method itself, chosen by and choosing among scores


def test_renamed_tables_and_masks_do_not_hide_the_cheat_but_a_renamed_token_does():
    source, what = CHEATS["a ratio of two hashed buckets"]
    for old in ("full_key", "ctx_hash", "mask", "PRIMES", "self.full", "score"):
        assert told(source.replace(old, "q")) == {what}
    assert told(source.replace("y", "z")) == set()  # the names of tokens are the one thing that is believed


def test_the_whole_vocabulary_must_be_there_not_only_its_name():
    source = CLEAN["a cache over the whole vocabulary"]
    assert told(source.replace("all_tokens[None, :]", "y[:, None]")) == {HASHED}


def test_scoring_after_learning_is_told_when_only_the_order_changes():
    source = CLEAN["several epochs on a chunk that is scored"]
    lines = source.split("\n")
    scores = [line for line in lines if "_sum +=" in line or "_count +=" in line]
    late = [line for line in lines if line not in scores]
    assert told("\n".join([*late[:-1], *scores, ""])) == {FITTED}


def test_a_function_that_nobody_calls_adapts_nothing():
    source, what = CHEATS["adaptation before quantisation"]
    assert told(source.replace("    adapt(model, val_tokens, optimizer)\n", "")) == set() and told(source) == {what}


NESTS = {
    "attributes": "def f(y):\n    return a" + ".b" * 4000,
    "sums": "def f(y):\n    return y" + " + y" * 600,
    "choices": "def f(y):\n    return " + "x[y] if space[y] else " * 80 + "1",
    "calls": "def f(y):\n    return " + "f(" * 80 + "y" + ")" * 80,
    "reads": "def f(y):\n    z = " + "t[" * 80 + "y % 3" + "]" * 80,
    "statements": "def f(y):\n" + "    y = (y * 3 + y) % 7; x = t[y]\n" * 1000,
}


@pytest.mark.parametrize("source", NESTS.values(), ids=NESTS)
def test_nested_code_costs_no_more_than_its_length(source):
    assert isinstance(read_facts(source)["leaks"], list)


WORDS = st.sampled_from(["y", "x", "self.t", "val_tokens", "h", "tgt", "all_tokens", "3"])
EXPRESSIONS = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["^", "%", "*", "+", "&", "<", "if y else"]), inner).map(
            lambda p: f"({p[0]} {p[1]} {p[2]})"
        ),
        st.tuples(inner, inner).map(lambda p: f"self.t[{p[0]}, {p[1]}:]"),
        st.tuples(st.sampled_from(["f", "np.where", "torch.gather", "min", "self.t.get"]), inner, inner).map(
            lambda p: f"{p[0]}({p[1]}, {p[2]}, {p[2]})"
        ),
        inner.map(lambda e: f"[q for q, y in zip({e}, x)]"),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(EXPRESSIONS, min_size=1, max_size=4))
def test_any_code_is_read_without_an_error(values):
    body = "\n".join(f"    h = {v}\n    a, self.t[y] = {v}, h" for v in values)
    source = f"def f(self, x, y=1):\n{body}\n    loss.backward()\n    return h, y\n"
    ast.parse(source)
    assert isinstance(read_facts(source)["leaks"], list)
