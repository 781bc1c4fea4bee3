"""Dependencies point downwards: what each module imports, inside functions too."""

import ast
from functools import cache
from pathlib import Path

import pytest

import dbdist

ROOT = Path(dbdist.__file__).parent
SOURCES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
LOWEST = ("noise", "seeds", "errors", "options", "config", "models", "sampler")
PURE = (*LOWEST, "denoiser", "tasks", "data", "ema", "inference")
ENTRY_POINTS = tuple(
    f"dbdist.{name}"
    for name in ("train", "evaluate", "plan", "export", "merge", "import_published", "cli", "bench")
)


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
            # `dbdist COMMAND` loads the command it is given.
            skipped = ENTRY_POINTS if current == "dbdist.cli" else ()
            todo += [i for i in imports_of(current) if not is_under(i, *skipped)]
    return seen


def modules(*packages):
    return sorted(m for m in SOURCES if is_under(m, *(f"dbdist.{p}" for p in packages)))


@pytest.mark.parametrize("name", modules(*PURE))
def test_mathematics_knows_nothing_of_processes(name):
    for module in reached_from(name):
        assert not is_under(module, "dbdist.parallel"), f"{name} reaches {module}"
        assert not any(is_under(i, "torch.distributed") for i in imports_of(module)), module


@pytest.mark.parametrize("name", modules("parallel"))
def test_parallel_knows_nothing_of_tasks_models_and_data(name):
    above = ("tasks", "trainer", "models", "data", "denoiser", "evaluation", "checkpoint", "build")
    for module in reached_from(name):
        assert not is_under(module, *(f"dbdist.{a}" for a in above)), f"{name} reaches {module}"


@pytest.mark.parametrize("name", sorted(m for m in SOURCES if not is_under(m, *ENTRY_POINTS)))
def test_nothing_below_imports_an_entry_point(name):
    allowed = ("dbdist.cli",) if name == "dbdist.run_dir" else ()
    entries = [e for e in ENTRY_POINTS if e not in allowed]
    assert not [i for i in imports_of(name) if is_under(i, *entries)]


@pytest.mark.parametrize("name", modules(*LOWEST))
def test_the_lowest_layers_do_not_import_what_stands_on_them(name):
    above = ("denoiser", "tasks", "data", "trainer", "evaluation", "checkpoint", "inference")
    assert not [i for i in imports_of(name) if is_under(i, *(f"dbdist.{a}" for a in above))]


def test_only_launch_and_topology_touch_the_environment():
    for name, path in SOURCES.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.add(f"{node.value.id}.{node.attr}")
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        reads = names & {"os.environ", "os.getenv", "os.environb"}
        places = ("dbdist.parallel.launch", "dbdist.parallel.topology")
        assert not reads or name in places, f"{name}: {reads}"
        ranks = {"dist.get_rank", "dist.get_world_size", "torch.distributed.get_rank"}
        assert not names & ranks, f"{name}: {names & ranks}"


def calls_of(name):
    """(what is called, as it stands there; the call) everywhere in a module."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_that_is_read_can_run(name):
    forbidden = {
        *("eval", "exec", "compile", "__import__", "importlib.import_module"),
        *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler"),
        *("shelve.open", "marshal.load", "marshal.loads", "joblib.load", "dill.load"),
        *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"),
        *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
        *("extract_archive", "shutil.unpack_archive"),
    }
    for called, node in calls_of(name):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in forbidden, f"{name}:{node.lineno}: {called}"
        assert given.get("shell", "False") == "False", f"{name}:{node.lineno}: {called}"
        assert given.get("allow_pickle", "False") == "False", f"{name}:{node.lineno}: {called}"
        assert not called.endswith((".extractall", ".extract")), f"{name}:{node.lineno}: {called}"
        if called == "torch.load":
            assert given.get("weights_only") == "True", f"{name}:{node.lineno}: {called}"
    for imported in imports_of(name):
        assert imported not in ("torch.load", "pickle.load", "pickle.loads", "yaml.load"), name


def test_the_only_unpickler_is_the_readers():
    """It is a class, so that what it may make and call is written down."""
    unpicklers = {
        f"{name}.{node.name}"
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        if any("Unpickler" in ast.unparse(base) for base in node.bases)
    }
    assert unpicklers == {"dbdist.data.readers._ArrayUnpickler"}
    assert any(called == "torch.load" for called, _ in calls_of("dbdist.compat"))


def test_no_import_cycles():
    below = {name: reached_from(name) - {name} for name in SOURCES}
    cycles = {frozenset((a, b)) for a in below for b in below[a] if a in below.get(b, ())}
    assert not cycles
