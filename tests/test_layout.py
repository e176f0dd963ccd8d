"""The rules of the house: budgets, import directions, names that can be folded into one file."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"kernels", "optim", "export", "eval", "data", "runtime"}  # what the trainer is made of
PACKAGES = (*sorted(SHIPPED), "harness", "packer", "records")
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "runtime": set(),
    "eval": {"data"},
    "export": {"data", "kernels"},
    "optim": {"kernels", "runtime"},
    "records": set(),
    "packer": set(),
    "train_gpt": SHIPPED,
    "harness": {*SHIPPED, "train_gpt", "records", "packer"},
    "build_submission": {"packer"},
}
SECTIONS = [
    "Config", "Layers", "Mixers", "Model", "Optimizers", "Data", "Schedule", "Train", "Export", "Evaluate", "Main",
]  # fmt: skip
ROOT_ENTRIES = {
    ".ci", ".gitignore", "LICENSE", "README.md", "build_submission.py", "constraints.txt", "data", "eval", "export",
    "harness", "kernels", "optim", "packer", "pyproject.toml", "records", "run_scripts", "runtime", "tests",
    "train_gpt.py",
}  # fmt: skip


def tracked(pattern: str = "") -> list[Path]:
    done = subprocess.run(["git", "ls-files", pattern or "."], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = (line for line in done.stdout.splitlines() if not line.startswith("records/track_"))  # those are data
    return [ROOT / line for line in ours if (ROOT / line).exists()]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def first_party_imports(tree: ast.Module):
    """(statement, room) of every import of our own, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from ((node, n.split(".")[0]) for n in names if n.split(".")[0] in MAY_IMPORT)


def direction_faults(path: Path, tree: ast.Module) -> list[str]:
    here, faults = room(path), []
    for node, there in first_party_imports(tree):
        if there != here and there not in MAY_IMPORT[here]:
            faults.append(f"{path.name}:{node.lineno} {here} imports {there}")
        if isinstance(node, ast.Import) or any(a.name == "*" or a.asname for a in node.names):
            faults.append(f"{path.name}:{node.lineno} write `from pkg.mod import name`")
    return faults


SOURCES = [p for p in tracked("*.py") if room(p) in MAY_IMPORT]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_the_allowed_way(path):
    assert direction_faults(path, parse(path)) == []


@pytest.mark.parametrize("source", [
    "from train_gpt import GPT", "import eval.score", "from eval.score import *", "from eval.score import bpb as b",
])  # fmt: skip
def test_a_wrong_import_is_caught(source):
    assert direction_faults(ROOT / "kernels" / "scan.py", ast.parse(source))


def reached(start: Path) -> list[Path]:
    """The modules a submission is folded from."""
    seen, todo = [], [start]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.append(path)
        modules = [n.module for n, _ in first_party_imports(parse(path)) if isinstance(n, ast.ImportFrom)]
        todo += [ROOT / (m.replace(".", "/") + ".py") for m in modules]
    return seen


def top_level_names(tree: ast.Module):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_a_name_is_bound_once_in_all_that_ships():
    bound, twice = {}, []
    for path in reached(ROOT / "train_gpt.py"):
        for name in set(top_level_names(parse(path))):
            if name in bound:
                twice.append(f"{name}: {bound[name].relative_to(ROOT)} and {path.relative_to(ROOT)}")
            bound[name] = path
    assert twice == []


ALLOWED_TOP = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef)


def top_level_faults(tree: ast.Module) -> list[int]:
    """Lines that would do work at import: anything but definitions, constants and the guard of __main__."""
    docstring = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    guard = [n for n in tree.body if isinstance(n, ast.If) and "__name__" in ast.unparse(n.test)]
    return [n.lineno for n in tree.body if not isinstance(n, ALLOWED_TOP) and n not in docstring and n not in guard]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_does_nothing(path):
    assert top_level_faults(parse(path)) == []


def test_work_at_import_is_caught():
    assert top_level_faults(ast.parse("x = 1\nprint(x)\nfor i in range(3):\n    pass")) == [2, 3]


DYNAMIC = {"globals", "locals", "exec", "eval", "vars", "__import__"}


def test_nothing_that_ships_looks_names_up_at_run_time():
    faults = []
    for path in reached(ROOT / "train_gpt.py"):
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            computed = node.func.id in ("getattr", "setattr") and not isinstance(node.args[1], ast.Constant)
            if node.func.id in DYNAMIC or computed:
                faults.append(f"{path.name}:{node.lineno} {ast.unparse(node)[:60]}")
    assert faults == []


def trainer_faults(source: str) -> list[str]:
    """What is wrong with a text as train_gpt.py."""
    tree, lines = ast.parse(source), source.count("\n")
    faults = [f"{lines} lines, at most 1500"] if lines > 1500 else []
    if (sections := re.findall(r"^# ── (\w+) ─+$", source, re.M)) != SECTIONS:
        faults.append(f"sections {sections}")
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    if (fields := sum(isinstance(n, ast.AnnAssign) for n in config.body)) > 90:
        faults.append(f"{fields} fields, at most 90")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = [a for node in functions for a in node.args.args if a.arg == "c"]
    faults += [f"line {a.lineno}: annotate c" for a in arguments if not a.annotation or a.annotation.id != "Config"]
    faults += [f"{node.name}: {size} lines" for node in functions if (size := length_over(node))]
    faults += [f"work at import in line {line}" for line in top_level_faults(tree)]
    return faults + re.findall(r"\bPACKED\b|__debug__", source)


def test_the_trainer_keeps_the_rules_and_leaves_room_for_a_layer():
    source = (ROOT / "train_gpt.py").read_text()
    assert trainer_faults(source) == [] and source.count("\n") <= 1440


@pytest.mark.parametrize("planted", [
    lambda s: s + "x = 1\n" * 200, lambda s: s.replace("# ── Data", "# ── Date"), lambda s: s + "print(1)\n",
    lambda s: s.replace("c: Config", "c"), lambda s: s + "def f():\n" + "    pass\n" * 70, lambda s: s + "PACKED = 1\n",
    lambda s: s.replace("    dim: int", "".join(f"    x{i}: int = 1\n" for i in range(90)) + "    dim: int"),
])  # fmt: skip
def test_a_broken_rule_of_the_trainer_is_caught(planted):
    assert trainer_faults(planted((ROOT / "train_gpt.py").read_text()))


def test_nothing_that_ships_knows_that_it_is_packed():
    for path in reached(ROOT / "train_gpt.py"):
        assert not re.search(r"\bPACKED\b|__debug__", path.read_text()), path


LONG = {"forward", "train"}


def length_over(node: ast.FunctionDef) -> int:
    """The lines of a function that has too many, else 0."""
    lines = node.end_lineno - node.lineno + 1
    long = node.name in LONG or any("jit" in ast.unparse(d) for d in node.decorator_list)
    return lines if lines > (90 if long else 60) else 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
    assert [f"{path.name}:{f.lineno} {f.name}: {length_over(f)} lines" for f in functions if length_over(f)] == []


def test_the_environment_is_read_in_one_place():
    readers = [p for p in SOURCES if re.search(r"os\.environ|os\.getenv", p.read_text())]
    allowed = ("train_gpt.py", "harness/__main__.py", "records/verify.py", "packer/prove.py")
    assert set(readers) <= {ROOT / name for name in allowed}
    assert (ROOT / "train_gpt.py").read_text().count("os.environ") == 1  # in command_line


def test_the_root_holds_nothing_else():
    assert {p.relative_to(ROOT).parts[0] for p in tracked()} <= ROOT_ENTRIES


def test_readme_names_every_root_entry_and_both_commands():
    readme = (ROOT / "README.md").read_text()
    for entry in ("run_scripts/quickstart.sh", "run_scripts/test.sh", "train_gpt.py", "build_submission.py", *PACKAGES):
        assert entry in readme, entry


@pytest.mark.parametrize("path", tracked("*.py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_broad_except(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"), node.lineno


def test_installing_brings_dependencies_and_no_package():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["tool"]["setuptools"] == {"py-modules": [], "packages": []}


def test_scripts_are_strict():
    for script in tracked("run_scripts/*.sh"):
        if script.name not in ("env.sh", "skc_competition.sh"):  # sourced, the latter begins with entry.sh
            assert "set -euo pipefail" in script.read_text(), script.name
