"""Dependencies point downwards: what each module imports, inside functions too."""

import ast
from functools import cache
from itertools import pairwise
from pathlib import Path

import dbdist

ROOT = Path(dbdist.__file__).parent
SOURCES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
LEVELS: list[set[str]] = [
    {"errors", "seeds", "version", "older_names", "whole_files", "log", "tensors"},
    {"config"},
    {"data", "models", "processes"},
    {"tasks", "build"},
    {"parallel", "checkpoint", "monitor"},
    {"sampling", "run"},
    {"training", "inference"},
    {"commands"},
    {"train", "evaluate", "cli", "compat", "options", "bench"},
]
"""Packages and modules of dbdist from the ground up: each imports what stands below it."""
PURE = ("processes", "models", "tasks", "data", "config", "build")


def is_under(name, *packages):
    return any(name == p or name.startswith(f"{p}.") for p in packages)


@cache
def imports_of(name):
    """Every module that this one names in an import statement, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def reached_from(name):
    """All modules of dbdist that importing this one, or running its functions, can load."""
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        if current in SOURCES and current not in seen and current != "dbdist":
            seen.add(current)
            todo += imports_of(current)
    return seen


def modules(*packages):
    return sorted(m for m in SOURCES if is_under(m, *(f"dbdist.{p}" for p in packages)))


def level_of(name):
    top = name.split(".")[1]
    found = [i for i, level in enumerate(LEVELS) if top in level]
    assert len(found) == 1, f"{name} has no level"
    return found[0]


def test_no_import_runs_back_up():
    upward = [
        f"{name} imports {imported}"
        for name in SOURCES
        for imported in imports_of(name)
        if imported in SOURCES and "dbdist" not in (name, imported)
        if level_of(imported) > level_of(name)
    ]
    assert not upward


def test_packages_of_one_level_form_no_circle():
    edges = {
        (name.split(".")[1], imported.split(".")[1])
        for name in SOURCES
        for imported in imports_of(name)
        if imported in SOURCES and "dbdist" not in (name, imported)
    }
    circles = {(a, b) for a, b in edges if a < b and (b, a) in edges}
    assert not circles


def test_no_file_imports_itself_over_others():
    below = {name: reached_from(name) - {name} for name in SOURCES}
    circles = {frozenset((a, b)) for a in below for b in below[a] if a in below.get(b, ())}
    assert not circles


def test_mathematics_knows_nothing_of_ranks():
    found = [
        f"{name} reaches {module}"
        for name in modules(*PURE)
        for module in reached_from(name)
        if is_under(module, "dbdist.parallel")
        or any(is_under(i, "torch.distributed") for i in imports_of(module))
    ]
    assert not found


def test_parallel_knows_nothing_of_tasks_models_and_data():
    above = ("tasks", "models", "data", "sampling", "training", "checkpoint", "build")
    found = [
        f"{name} reaches {module}"
        for name in modules("parallel")
        for module in reached_from(name)
        if is_under(module, *(f"dbdist.{a}" for a in above))
    ]
    assert not found


def test_only_launch_and_topology_touch_the_environment():
    ranks = {"dist.get_rank", "dist.get_world_size", "torch.distributed.get_rank"}
    environment = {"os.environ", "os.getenv", "os.environb"}
    places = ("dbdist.parallel.launch", "dbdist.parallel.topology")
    found = []
    for name, path in SOURCES.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.add(f"{node.value.id}.{node.attr}")
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        banned = ranks if name in places else ranks | environment
        found += [f"{name} uses {used}" for used in names & banned]
    assert not found


MAX_LINES = 400


def test_no_file_is_too_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def lines_of_code(path):
    """(number, text) of lines other than imports, comments and docstrings."""
    text, left_out = path.read_text(), set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    lines = ((i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if i not in left_out)
    return [(i, line) for i, line in lines if line and not line.startswith("#")]


def test_no_ten_lines_stand_twice():
    places, twice = {}, []
    for name, path in SOURCES.items():
        lines = lines_of_code(path)
        for ten in (lines[i : i + 10] for i in range(len(lines) - 9)):
            place = f"{name}:{ten[0][0]}"
            first = places.setdefault(tuple(text for _, text in ten), place)
            if first != place:
                twice.append(f"{first} and {place}")
    assert not twice


def first_paragraphs():
    """(place, first paragraph) of every docstring."""
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                if text := ast.get_docstring(node):
                    place = f"{name}:{getattr(node, 'lineno', 1)}"
                    yield place, text.split("\n\n")[0]


def test_every_docstring_begins_with_one_whole_sentence():
    """Of one line, with a period at its end."""
    wrong = [
        f"{place}: {text}"
        for place, text in first_paragraphs()
        if "\n" in text or len(text) > 90 or not text.endswith(".")
    ]
    assert not wrong


def calls_of(name):
    """(what is called, as it stands there; the call) everywhere in a module."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_that_is_read_can_run():
    forbidden = {
        *("eval", "exec", "compile", "__import__", "importlib.import_module"),
        *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"),
        *("shelve.open", "marshal.load", "marshal.loads", "joblib.load", "dill.load"),
        *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"),
        *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
        *("extract_archive", "shutil.unpack_archive"),
    }
    found = []
    for name in SOURCES:
        for called, node in calls_of(name):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe = given.get("filter") == "'data'" or called == "opened.extractall"
            is_extracted = called.endswith((".extractall", ".extract"))
            if (
                called in forbidden
                or (is_extracted and not (is_safe and name == "dbdist.data.archives"))
                or given.get("shell", "False") != "False"
                or given.get("allow_pickle", "False") != "False"
                or (called == "torch.load" and given.get("weights_only") != "True")
            ):
                found.append(f"{name}:{node.lineno}: {called}")
        imported = imports_of(name) & {"torch.load", "pickle.load", "pickle.loads", "yaml.load"}
        found += [f"{name} imports {function}" for function in imported]
    assert not found


def test_nothing_unpickles_but_torch_and_what_torchvision_has_checked():
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not any("Unpickler" in ast.unparse(base) for base in node.bases), name
    assert any(called == "torch.load" for called, _ in calls_of("dbdist.inference.foreign_weights"))


def test_names_of_test_files_are_unique():
    """pytest imports them by their name."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert not [a for a, b in pairwise(names) if a == b]
