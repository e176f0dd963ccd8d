"""The rules of the house: budgets, import directions, names that can be folded into one file."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "export", "eval", "data", "records")
MAY_IMPORT = {
    "kernels": set(), "eval": set(), "records": set(), "data": set(), "export": {"kernels"},
    "train_gpt": {"kernels", "export", "eval", "data"}, "build_submission": {"build"}, "build": set(),
}  # fmt: skip
SECTIONS = [
    "Config", "Layers", "Mixers", "Model", "Optimizers", "Data", "Schedule", "Train", "Export", "Evaluate", "Main",
]  # fmt: skip
ROOT_ENTRIES = {
    ".ci", ".gitignore", "LICENSE", "README.md", "build", "build_submission.py", "constraints.txt", "data", "eval",
    "export", "kernels", "pyproject.toml", "records", "run_scripts", "tests", "train_gpt.py",
}  # fmt: skip


def tracked(pattern: str = "") -> list[Path]:
    done = subprocess.run(["git", "ls-files", pattern or "."], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).exists()]


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


def test_the_trainer_is_one_file_of_at_most_1500_lines_in_its_sections():
    source = (ROOT / "train_gpt.py").read_text()
    assert source.count("\n") <= 1500
    assert re.findall(r"^# ── (\w+) ─+$", source, re.M) == SECTIONS


def test_at_most_80_fields():
    tree = parse(ROOT / "train_gpt.py")
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    assert sum(isinstance(n, ast.AnnAssign) for n in config.body) <= 80


def test_the_config_is_a_parameter_and_never_rebound():
    for node in ast.walk(parse(ROOT / "train_gpt.py")):
        if isinstance(node, ast.FunctionDef):
            for a in node.args.args:
                if a.arg == "c":  # annotate it
                    assert ast.unparse(a.annotation or ast.Constant(None)) == "Config", node.lineno


LONG = {"forward", "train"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            long = node.name in LONG or any("jit" in ast.unparse(d) for d in node.decorator_list)
            assert length <= (90 if long else 60), f"{path.name}:{node.lineno} {node.name}: {length} lines"


def test_the_environment_is_read_in_one_place():
    readers = [p for p in SOURCES if re.search(r"os\.environ|os\.getenv", p.read_text())]
    assert set(readers) <= {ROOT / "train_gpt.py", ROOT / "records/verify.py", ROOT / "build/prove.py"}
    assert (ROOT / "train_gpt.py").read_text().count("os.environ") <= 2  # both in command_line


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


def test_scripts_are_strict():
    for script in tracked("run_scripts/*.sh"):
        if script.name != "env.sh":  # sourced
            assert "set -euo pipefail" in script.read_text(), script.name
