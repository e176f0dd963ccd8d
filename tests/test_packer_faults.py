"""Faults planted in a small project: the builder refuses each, and says where."""

import hashlib
import json
import subprocess
import textwrap

import pytest
from packer_toys import CONFIG

from packer import pack as packing
from packer.check import check_text
from packer.deliver import commit_of, deliver, is_current, requirements
from packer.prove import KERNELS, check_fixed, check_kernels, compare_refusals, compare_runs, finish, start
from packer.steps import build
from packer.trees import BuildError, parse

HEALTHY = (
    CONFIG
    + """
def A(c: Config): return c.dim
def K(c: Config): return -c.dim
def S(c: Config): return 0
def main(c: Config):
    return [MIXERS[m](c) for m in c.layers]
if __name__ == "__main__":
    main(Config())
"""
)


def project(extra="", changed=(), **modules):
    """The healthy project with `extra` code, its `changed` text and more modules (pkg__mod=text)."""
    text = HEALTHY
    for old, new in changed:
        assert old in text
        text = text.replace(old, new)
    text = text.replace('if __name__ == "__main__":', textwrap.dedent(extra) + '\nif __name__ == "__main__":')
    return {"train_gpt": text} | {name.replace("__", "."): code for name, code in modules.items()}


def live(code):
    """Code inside the live `main`."""
    return {"changed": [("return [MIXERS", f"{code}\n    return [MIXERS")]}


FAULTS = {  # name: (message, project's arguments)
    "a rebound config": ("parameter c is rebound", live("c = None")),
    "a changed config": ("Config is changed: c.dim", live("c.dim = 3")),
    "a replaced structural field": ("moe is structural", live("replace(c, moe=True)")),
    "an attribute that is a config only sometimes": (
        "attribute c holds a Config",
        {"extra": "class M:\n    def __init__(self, c: Config): self.c = c\n    def g(self): self.c = 30.0\n"},
    ),
    "two bindings of a name": (
        "kernels/b.py:1: twice is bound here and at kernels/a.py:1",
        {"extra": "from kernels.a import twice\nfrom kernels.b import other",
         "kernels__a": "def twice(): pass\n", "kernels__b": "def twice(): pass\ndef other(): pass\n"}),
    "a binding of an import's name": ("field is bound here and at", {"extra": "field = 3"}),
    "a star import": ("without star", {"extra": "from kernels.a import *", "kernels__a": "x = 1"}),
    "a star import of a library": ("star import from os", {"extra": "from os import *", **live("path")}),
    "an alias": ("without star, alias", {"extra": "from kernels.a import x as y", "kernels__a": "x = 1"}),
    "a module import": ("from pkg.mod import name", {"extra": "import kernels.a", "kernels__a": "x = 1"}),
    "a module as a name": (
        "without star, alias or module", {"extra": "from kernels import a", "kernels": "", "kernels__a": ""}),
    "a relative import": ("from pkg.mod import name", {"extra": "from .kernels import a"}),
    "a first-party import in a function": (
        "stand at the top", {"extra": "def f():\n    from kernels.a import x", "kernels__a": "x = 1"}),
    "a missing module": ("no module kernels.b", {"extra": "from kernels.b import x", "kernels__a": "x = 1"}),
    "a missing name": ("kernels.a has no name y", {"extra": "from kernels.a import y", "kernels__a": "x = 1"}),
    "work at import": ("work at import: `print", {"extra": "print(1)"}),
    "a loop at import": ("work at import: `for", {"extra": "for i in range(3): pass"}),
    "a try at import": ("work at import: `try", {"extra": "try:\n    import a\nexcept ImportError: pass"}),
    "computed getattr": ("computed getattr", live("getattr(c, str(c.dim))")),
    "globals": ("dynamic look-up: globals", live("globals()")),
    "exec": ("dynamic look-up: exec", live("exec('1')")),
    "an undefined name": ("undefined in the packed program: nowhere", live("nowhere(c)")),
    "an unknown registry key": ("'Q' is not in MIXERS, which has", {"changed": [('"AA"', '"AQ"')]}),
    "a registry that is no table": ("registry NONE is not a dict", {"changed": [('"MIXERS")', '"NONE")')]}),
    "a profile that sets no field": (
        "sets wide, which is no Config field", {"changed": [('"plain": ""', '"plain": "wide=1"')]}),
    "a profile of another type": (
        "the profile sets lr=fast: not a float", {"changed": [('"plain": ""', '"plain": "lr=fast"')]}),
    "profiles that are computed": ("PROFILES is not a literal", {"changed": [('"plain": ""', '"plain": text()')]}),
    "a field without a mark": ("a Config field is structural", {"changed": [('free(8, "width")', "8")]}),
    "a field without a literal": ("is not a literal", {"changed": [('free(8, "width")', 'free(len(name), "width")')]}),
    "no FIXED": ("no FIXED in the bundle", {"changed": [("FIXED: dict = {}\n", "")]}),
    "a branch at import": ("work at import: `if", {"extra": "if DEFAULT_PROFILE:\n    x = 1\n"}),
    "more bytes than are set aside": ("code_bytes=700: give the profile more", {"changed": [("8_000", "700")]}),
    "a generator that stops being one": (
        "no longer be a generator",
        {"extra": "def spans(c: Config):\n    if c.moe:\n        yield 1\n", **live("spans(c)")}),
    "the network": ("may not import urllib.request", {"extra": "import urllib.request", **live("urllib")}),
    "another process": ("may not import subprocess", {"extra": "import subprocess", **live("subprocess")}),
    "an absolute path": ("absolute path '/home/data'", live("open('/home/data')")),
    "an undeclared variable": (
        "environment variable 'SECRET'", {"extra": "import os", **live("os.environ.get('SECRET')")}),
    "a variable of a computed name": (
        "environment variable str(c.dim)", {"extra": "import os", **live("os.getenv(str(c.dim))")}),
}  # fmt: skip


def test_the_healthy_project_builds():
    assert build(project(), "plain").sizes["pack"] < 2000


@pytest.mark.parametrize("name", FAULTS)
def test_the_builder_refuses(name):
    message, arguments = FAULTS[name]
    with pytest.raises(BuildError) as error:
        build(project(**arguments), "plain")
    assert message in str(error.value)


def test_dead_code_may_do_what_live_code_may_not():
    dead = "def f(x):\n    import socket\n    return getattr(x, str(1)), nowhere, open('/etc/passwd')\n"
    assert "socket" not in build(project(dead), "plain").readable


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(BuildError, match="'big': not one of plain, tiny, other"):
        build(project(), "big")


def test_a_tree_that_its_text_does_not_give_back_is_refused():
    tree = parse("train_gpt", "x = 1\n", False)
    check_text("x = 1\n", tree)
    with pytest.raises(BuildError, match="does not parse back"):
        check_text("x = 2\n", tree)


# ---- the proof


def write_run(folder, loss=1.0, artifact=b"abc", rows=2, seconds=0.0, dim=8):
    top, folder = folder, folder / "proof"
    folder.mkdir(parents=True)
    lines = [json.dumps({"kind": "step", "step": i, "loss": loss, "seconds": seconds}) for i in range(rows)]
    lines += [json.dumps({"kind": "checkpoint", "step": 1, "sha256": str(seconds)})]
    lines += [json.dumps({"kind": "progress", "done": i}) for i in range(int(seconds))]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "final_model.skc").write_bytes(artifact)
    (folder / "config.json").write_text(json.dumps({"hash": "", "config": {"dim": dim}}))
    return top


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"loss": 1.0000001}, "record 0 differs"),
        ({"artifact": b"abd"}, "artifacts differ"),
        ({"rows": 1}, "record 1 differs"),
        ({"rows": 0}, "record 0 differs"),
        ({"dim": 9}, "config.json differs in config"),
    ],
)
def test_the_proof_fails_on_any_difference(tmp_path, fault, message):
    source = write_run(tmp_path / "source")
    compare_runs(source, write_run(tmp_path / "same", seconds=9.0))
    with pytest.raises(BuildError, match=message):
        compare_runs(source, write_run(tmp_path / "packed", **fault))


def test_the_proof_fails_on_another_refusal(tmp_path):
    compare_refusals(["error: no", "error: no"], "x=1")
    check_fixed("error: layers=Q: fixed in this build, which has A", "layers")
    with pytest.raises(BuildError, match="x=1: the source says 'error: no', the packed file 'error: yes'"):
        compare_refusals(["error: no", "error: yes"], "x=1")
    with pytest.raises(BuildError, match="layers=Q, which this build fixes, was answered with 'error: no field'"):
        check_fixed("error: no field", "layers")


def test_a_child_that_ends_otherwise_than_it_should_is_told(tmp_path):
    with pytest.raises(BuildError, match="the child ended with 3, not -9:\nwords"):
        finish(start("the child", ["-c", "print('words'); raise SystemExit(3)"], tmp_path, code=-9))


KERNEL = "import triton\nimport triton.language as tl\n\n@triton.jit\ndef kernel(x):\n    tl.store(x, 1)\n"
LINES = "s.splitlines(True)"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES, ""),
        ("[]", "the import of the packed file ended with 1"),
        ("['def kernel(x):\\n 2\\n']*9", "holds other code"),
    ],
    ids=["the source", "no source", "another source"],
)
def test_a_kernel_that_holds_other_code_is_refused(tmp_path, monkeypatch, lines, message):
    assert LINES in packing.FILE
    monkeypatch.setattr(packing, "FILE", packing.FILE.replace(LINES, lines.replace("{", "{{")))
    code = packing.pack(KERNEL)
    (tmp_path / "train_gpt.py").write_bytes(code)

    def check():
        child = start("the import of the packed file", ["-c", KERNELS], tmp_path)
        return check_kernels(code, json.loads(finish(child)[0]))

    if message:
        with pytest.raises(BuildError, match=message):
            check()
    else:
        assert check() == 1


def test_a_build_is_current_until_a_source_the_file_or_the_profile_changes(tmp_path):
    b, out = build(project(), "plain"), tmp_path / "out"
    assert not is_current(out, b.files, "plain", False)
    deliver(b, out, None)
    assert is_current(out, b.files, "plain", False)
    assert not is_current(out, b.files, "plain", True)  # no proof
    deliver(b, out, {"steps": []})
    assert is_current(out, b.files, "plain", True)
    assert not is_current(out, b.files, "plain", True, True)  # no trace
    assert not is_current(out, b.files, "other", False)
    assert not is_current(out, b.files | {"train_gpt": b.files["train_gpt"] + "# more\n"}, "plain", False)
    (out / "train_gpt.py").write_bytes(b.code + b"#")
    assert not is_current(out, b.files, "plain", False)


def test_requirements_are_what_the_program_imports():
    assert list(requirements("import json\nimport numpy as np\nfrom torch import nn\n")) == ["numpy", "torch"]


def test_the_manifest_says_what_was_built_from_what(tmp_path):
    b = build(project(), "plain")
    deliver(b, tmp_path / "out", {"steps": []}, "abc-dirty")
    facts, code = (
        json.loads((tmp_path / "out" / "manifest.json").read_text()),
        (tmp_path / "out" / "train_gpt.py").read_bytes(),
    )
    assert facts["profile"] == "plain" and facts["commit"] == "abc-dirty" and facts["proof"] == {"steps": []}
    assert facts["train_gpt.py"] == {"bytes": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    assert facts["sources"] == {"train_gpt": hashlib.sha256(b.files["train_gpt"].encode()).hexdigest()}


def test_the_commit_says_whether_the_checkout_differs_from_it(tmp_path):
    def git(*words):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *author, *words], check=True, capture_output=True)

    assert commit_of(tmp_path) == ""
    git("init")
    (tmp_path / "x").write_text("1")
    git("add", "x")
    git("commit", "-m", "x")
    clean = commit_of(tmp_path)
    assert len(clean) == 40
    (tmp_path / "x").write_text("2")
    assert commit_of(tmp_path) == clean + "-dirty"
