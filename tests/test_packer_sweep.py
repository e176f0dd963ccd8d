"""The sweep, on small source strings: what the entry point reaches stays; and why, for whoever asks."""

import textwrap

import pytest
from packer_toys import CONFIG, baked, text_of

from packer.fold import fold
from packer.report import explain
from packer.steps import build
from packer.sweep import sweep
from packer.trees import BuildError


def swept(code, profile="plain"):
    """Names left after fold and sweep, and the text."""
    units, b = baked(code, profile)
    units = sweep(fold(units, b), b)
    return {i.label for i in b.items if i.because}, text_of(units)


LIVE = """
import os
import math
class A:
    def used(self): return math.pi
    def unused(self): return os.name
class K(A): pass
class S:
    def used(self): return only_of_s()
def only_of_s(): pass
def dead(): return also_dead()
def also_dead(): return dead()
def main(c: Config): return [MIXERS[m]().used() for m in c.layers]
if __name__ == "__main__":
    main(Config())
"""


def test_the_sweep_keeps_what_the_entry_point_reaches_and_nothing_else():
    live, text = swept(LIVE)
    assert {"A", "A.used", "MIXERS['A']", "main", "math"} <= live
    assert not live & {"K", "S", "S.used", "only_of_s", "dead", "also_dead", "A.unused", "os", "MIXERS['K']"}
    assert "import os" not in text and "unused" not in text and "MIXERS = {'A': A}" in text


def test_a_registry_keeps_what_the_profile_selects_and_what_live_code_names():
    live, _ = swept(LIVE, "other")
    assert "K" in live and "S" not in live
    live, _ = swept(LIVE.replace("main(Config())", "main(Config()); MIXERS[str('S')]"))
    assert {"S", "only_of_s"} <= live


@pytest.mark.parametrize("words, lives", [
    ("seen == 'S'", False), ("{'S': seen}", False), ("seen['S']", False), ("seen.table['S']", False),
    ("MIXERS['S']", True), ("seen('S')", True), ("seen in ('S', 'T')", True), ("{seen: 'S'}", True),
])  # fmt: skip
def test_a_text_that_is_compared_or_a_key_of_something_else_keeps_no_entry(words, lives):
    code = LIVE.replace(
        "def main(c: Config): return", f"def other(seen): return {words}\ndef main(c: Config): return other, "
    )
    assert ("S" in swept(code)[0]) == lives


def test_methods_survive_when_mentioned_special_or_called_by_a_third_party_base():
    live, _ = swept("""
    from torch import nn
    class A(nn.Module):
        def __init__(self): self.table = None
        def forward(self, x): return self.helper(x)
        def helper(self, x): return x
        def stale(self): return 1
        def extra_repr(self): return ""
    if __name__ == "__main__":
        A()
    """)
    assert {"A.__init__", "A.forward", "A.helper", "A.extra_repr"} <= live and "A.stale" not in live


def test_a_registration_lives_with_what_it_registers_on():
    code = """
    import torch
    from functools import partial
    @torch.library.custom_op("toy::a", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor: return x
    @op.register_fake
    def fake(x): return helper(x)
    def helper(x): return x
    def save(ctx, inputs, output): pass
    @partial(op.register_autograd, setup_context=save)
    def grad(ctx, g): return g
    if __name__ == "__main__":
        print(1)
    """
    names = {"op", "fake", "helper", "save", "grad"}
    assert not swept(code)[0] & names
    assert swept(code.replace("print(1)", "op(1)"))[0] >= names


def test_explain_tells_what_needs_a_definition_and_who_no_longer_asks():
    files = {
        "train_gpt": CONFIG.replace('(False, "experts")', '(False, "experts")')
        + textwrap.dedent("""
    def A(): pass
    def K(): pass
    def S(): pass
    def experts(): return 1
    def main(c: Config):
        if c.moe:
            return experts()
        return MIXERS[c.layers[0]]
    if __name__ == "__main__":
        main(Config())
    """)
    }
    b = build(files, "plain")
    assert explain(b, "main").endswith("\n  needed by <main>\n  needed by the entry point")
    assert explain(b, "A").endswith("\n  needed by MIXERS['A']\n  needed by the profile")
    gone = explain(b, "experts")
    assert "went" in gone and "mentioned in main" in gone and "`if c.moe` is False" in gone
    with pytest.raises(BuildError, match="nonsense is no definition"):
        explain(b, "nonsense")


def test_a_free_field_keeps_its_whole_registry():
    code = LIVE.replace("c.layers", "c.kind")
    marked = CONFIG.replace("    lr: float", '    kind: str = free("A", "any mixer", registry="MIXERS")\n    lr: float')
    marked = marked.replace("def free(default, text)", "def free(default, text, registry=None)")
    assert "MIXERS = {'A': A, 'K': K, 'S': S}" in build({"train_gpt": marked + code}, "plain").readable
