"""What torch.compile makes of a training step at its real size, as CUDA, and what is held for the backward pass.

    python -m tests.fake_cuda.trace [--json] [--hessian] [--outline | --code] [--packed FILE] PROFILE field=value ...

A row for each phase of each model (more models after a +); exit code 1 if a row has a fault. --hessian adds the pass
over training tokens that the export makes, which is not compiled. --packed traces the program in a packed file;
--outline stops at the graph that dynamo reads off the program, --code goes on to what Inductor writes for an H100.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_leaves, tree_map

import kernels.attention
import train_gpt
from eval.score import evaluating
from export.gptq import CurvatureCollector
from tests.fake_cuda.code import code_of

SAVED_LIMIT = 60e9  # of the 80 GB that a device has
COSTLY = {"aten.sin.default", "aten.cos.default", "aten.tan.default", "aten.pow.Scalar", "aten.pow.Tensor_Tensor"}


class Row(NamedTuple):
    """One phase of a model's training, after two steps, or a pass of its export."""

    model: str
    phase: str
    forward: int  # graphs
    backward: int
    breaks: list[str]  # why a graph ended before the function did
    saved: int  # bytes, for the backward pass
    without_gradient: list[str]
    costly: list[str]  # operators in double precision, angles, powers
    launches: int  # of the code, if it was written
    traffic: int  # bytes
    own: dict[str, int]  # operators that are kernels
    outlines: list[str]
    seconds: float

    def faults(self) -> list[str]:
        graphs = self.forward, self.backward
        fine = graphs == (1, 1) or (self.phase == "hessian" and graphs == (0, 0))  # where nothing attends
        checks = [
            (not fine, f"{self.forward} forward and {self.backward} backward graphs"),
            (self.breaks, f"graph breaks: {'; '.join(self.breaks)}"),
            (self.saved >= SAVED_LIMIT, f"{self.saved / 1e9:.1f} GB saved for the backward pass"),
            (self.without_gradient, f"without gradient: {', '.join(self.without_gradient)}"),
            (self.costly, f"costly operators: {', '.join(self.costly)}"),
        ]
        return [f"{self.model}, {self.phase}: {text}" for bad, text in checks if bad]

    def line(self) -> str:
        graphs, gigabytes = f"{self.forward}+{self.backward}", f"{self.saved / 1e9:.2f}"
        counts = f"{len(self.breaks):>6} {gigabytes:>8} {len(self.without_gradient):>11} {len(self.costly):>8}"
        code = f"{self.launches or '-':>8} {f'{self.traffic / 1e9:.1f}' if self.launches else '-':>7}"
        return f"{self.model:58} {self.phase:7} {graphs:>6} {counts} {code} {self.seconds:>7.1f}"


HEAD = f"{'model':58} phase   graphs breaks saved/GB no gradient fp64/pow launches moved/GB seconds"


def running(graph: GraphModule) -> Callable:
    """The graph as it is, in the form that AOTAutograd takes from a compiler."""

    def run(arguments: list):
        values = list(arguments)
        arguments.clear()
        return graph(*values)

    run._boxed_call = True
    return run


class Tracer:
    """A backend of torch.compile that keeps the graphs and runs them as they are. `depth` is where it stops."""

    def __init__(self, depth: str = "graphs"):
        self.outlines, self.forward, self.backward, self.codes = [], [], [], []
        self.finish = {"outline": self.outline, "graphs": self.graphs, "code": self.code}[depth]
        counters.clear()

    def __call__(self, graph: GraphModule, inputs: list) -> Callable:
        self.outlines.append(outline(graph))
        return self.finish(graph, inputs)

    def outline(self, graph: GraphModule, inputs: list) -> Callable:
        return graph.forward

    def graphs(self, graph: GraphModule, inputs: list) -> Callable:
        compilers = {"fw_compiler": self.keep_forward, "bw_compiler": self.keep_backward}
        how = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table}
        return aot_autograd(**compilers, **how)(graph, inputs)

    def code(self, graph: GraphModule, inputs: list) -> Callable:
        with config.patch(joint_graph_constant_folding=False):  # it would compute
            return compile_fx(graph, inputs, inner_compile=self.keep_code)

    def keep_forward(self, graph: GraphModule, inputs: list) -> Callable:
        self.forward.append(graph)
        return running(graph)

    def keep_backward(self, graph: GraphModule, inputs: list) -> Callable:
        self.backward.append(graph)
        return running(graph)

    def keep_code(self, graph: GraphModule, inputs: list, **how) -> Callable:
        self.codes.append(code_of(graph, inputs, **how))
        return (self.keep_backward if how.get("is_backward") else self.keep_forward)(graph, inputs)

    def facts(self) -> dict:
        """Of what came since the last call."""
        graphs, operators = self.forward + self.backward, Counter()
        for graph in self.forward:
            operators.update(str(node.target) for node in graph.graph.nodes)
        facts = {
            "forward": len(self.forward),
            "backward": len(self.backward),
            "breaks": [why.partition("\n")[0] for why in counters["graph_break"]],
            "costly": [name for graph in graphs for name in costly(graph)] + [x for c in self.codes for x in c.slow],
            "launches": sum(code.launches for code in self.codes),
            "traffic": sum(code.traffic for code in self.codes),
            "own": {name: n for name, n in sorted(operators.items()) if name.startswith(("skc", "flex"))},
            "outlines": list(self.outlines),
        }
        for kept in (self.forward, self.backward, self.codes, self.outlines, counters):
            kept.clear()
        return facts


def modules_of(graph: GraphModule) -> list[GraphModule]:
    """It, and the masks inside it."""
    return [module for module in graph.modules() if isinstance(module, GraphModule)]


def outline(graph: GraphModule) -> str:
    """A digest of a graph's operators, their arguments and the shapes they give; names do not matter."""
    digest = hashlib.sha256()
    for module in modules_of(graph):
        order = {node: f"%{i}" for i, node in enumerate(module.graph.nodes)}
        for node in order:
            target = getattr(node.target, "__name__", node.target) if node.op.startswith("call") else ""
            given = tree_map(lambda x: order[x] if isinstance(x, Node) else x, [node.args, node.kwargs])  # noqa: B023
            value = node.meta.get("example_value")
            shape = (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else ""
            digest.update(f"{node.op} {target} {given if target else ''} {shape}\n".encode())
    return digest.hexdigest()[:16]


def costly(graph: GraphModule) -> list[str]:
    """Operators that take a GPU many instructions: double precision, angles, and powers but products and roots."""
    names = []
    for node in (node for module in modules_of(graph) for node in module.graph.nodes if node.op == "call_function"):
        values = tree_leaves(node.meta.get("val"))
        double = any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values)
        power = str(node.target) == "aten.pow.Tensor_Scalar" and abs(node.args[1]) != 0.5 and node.args[1] % 1
        if double or power or str(node.target) in COSTLY:
            names.append(str(node.target))
    return names


def results(graph: GraphModule) -> list[torch.Tensor]:
    """What a graph returns besides its own inputs."""
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    nodes = [node for node in output.args[0] if isinstance(node, Node) and node.op != "placeholder"]
    return [value for node in nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]


class Held:
    """Bytes that autograd holds for a backward pass, each storage once; the most at any time."""

    def __init__(self, spared: set[int]):
        self.spared, self.users, self.now, self.most = spared, Counter(), 0, 0

    def pack(self, tensor: torch.Tensor) -> "Saved":
        return Saved(self, tensor)

    def add(self, key: int, size: int, change: int) -> None:
        self.users[key] += change
        if self.users[key] == (change > 0):  # the first came, or the last went
            self.now += change * size
            self.most = max(self.most, self.now)


class Saved:
    def __init__(self, held: Held, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.held, self.tensor, self.key = held, tensor, storage._cdata
        self.size = 0 if self.key in held.spared else storage.nbytes()
        held.add(self.key, self.size, 1)

    def __del__(self):
        self.held.add(self.key, self.size, -1)


def on_cuda(program: ModuleType, c, mode: FakeTensorMode):
    """A model of fake tensors on the make-believe device."""
    model = program.weightless(c)
    with mode:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda"))
            for name, b in module._buffers.items():
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    model.dtype = torch.bfloat16
    return model


def windows_of(c) -> torch.Tensor:
    return torch.randint(c.vocab, (c.micro_tokens // c.seq_len, c.seq_len + 1), device="cuda")


def without_gradient(model) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is None]


def training_rows(program: ModuleType, c, name: str, tracer: Tracer) -> Iterator[Row]:
    """Forward and backward of every phase, twice. What only later phases use has no gradient in the first ones."""
    mode, last = FakeTensorMode(), len(program.phases(c)) - 1
    model = on_cuda(program, c, mode)
    loss = torch.compile(model.loss, dynamic=False, backend=tracer)
    for model.phase in range(last + 1):
        began = time.perf_counter()
        with mode:
            for _ in range(2):
                windows = windows_of(c)
                loss(windows[:, :-1], windows[:, 1:], None)[0].backward()
        missing = without_gradient(model) if model.phase == last else []
        saved = sum(value.nbytes for graph in tracer.forward[:1] for value in results(graph))
        facts = tracer.facts() | {"saved": saved, "without_gradient": missing}
        yield Row(model=name, phase=str(model.phase), **facts, seconds=time.perf_counter() - began)
        model.zero_grad(set_to_none=True)


def hessian_row(program: ModuleType, c, name: str, tracer: Tracer) -> Row:
    """The export's pass over training tokens, watched as there; only its attention is compiled."""
    began, mode = time.perf_counter(), FakeTensorMode()
    model = on_cuda(program, c, mode)
    fused = torch.compile(flex_attention, backend=tracer)
    kernels.attention.fused_attention = lambda: fused
    held = Held({p.untyped_storage()._cdata for p in model.parameters()})
    hooks = torch.autograd.graph.saved_tensors_hooks(held.pack, lambda saved: saved.tensor)
    with mode, evaluating(model), CurvatureCollector(model.linears()), hooks:
        program.curvature_pass(c, model, windows_of(c))
    facts = tracer.facts() | {"saved": held.most, "without_gradient": without_gradient(model)}
    return Row(model=name, phase="hessian", **facts, seconds=time.perf_counter() - began)


def rows_of(program: ModuleType, words: list[str], hessian: bool = False, depth: str = "graphs") -> Iterator[Row]:
    torch._dynamo.reset()
    tracer, c = Tracer(depth), program.load_config(words[1:], {}, words[0])[0]
    yield from training_rows(program, c, " ".join(words), tracer)
    if hessian:
        yield hessian_row(program, c, " ".join(words), tracer)


def program_in(path: str) -> ModuleType:
    """A packed file as a module."""
    spec = importlib.util.spec_from_file_location("packed", path)
    module = sys.modules["packed"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def models_in(words: list[str]) -> list[list[str]]:
    models = [[]]
    for word in words:
        if word == "+":
            models.append([])
        else:
            models[-1].append(word)
    return models


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_cuda.trace", description=__doc__)
    for flag in ("--json", "--hessian"):
        parser.add_argument(flag, action="store_true")
    for flag in ("outline", "code"):
        parser.add_argument(f"--{flag}", dest="depth", action="store_const", const=flag, default="graphs")
    parser.add_argument("--packed", metavar="FILE")
    parser.add_argument("models", nargs="+")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    program, faults = program_in(options.packed) if options.packed else train_gpt, []
    if not options.json:
        sys.stdout.write(f"{HEAD}\n")
    for model in models_in(options.models):
        for row in rows_of(program, model, options.hessian, options.depth):
            row = row._replace(model=f"{row.model}, packed") if options.packed else row
            faults += row.faults()
            sys.stdout.write(
                (json.dumps(row._asdict() | {"faults": row.faults()}) if options.json else row.line()) + "\n"
            )
            sys.stdout.flush()
    sys.stderr.write("".join(f"fault: {fault}\n" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
