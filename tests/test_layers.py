"""The layers of the code: imports point down only. A layer is a list of packages and modules of para_jax/."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import para_jax

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["storage"],
    ["atomic", "yaml_text"],
    ["config"],
    ["untrusted", "hlo_text"],
    ["tensor_file", "sharding", "gguf", "hub", "devices", "hlo", "processes"],
    ["backbone", "adapters", "data"],
    ["model"],
    ["training", "inference"],
    ["serving", "memory"],
    ["roofline"],
    ["evaluation"],
    ["dry_run"],
    ["runs"],
    ["plots", "inspect"],
    ["bench", "quickstart"],
    ["cli"],
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
SIDEWAYS = {("devices", "hub")}
HEAVY = "orbax grain qwix tensorflow_datasets tensorflow transformers tokenizers lm_eval matplotlib torch".split()


def sources():
    files = sorted((ROOT / "para_jax").rglob("*.py"))
    return {file.relative_to(ROOT / "para_jax").as_posix(): file.read_text() for file in files}


def imported(file, text):
    """The dotted names inside para_jax that a file imports, wherever in it: "config.load_config", "devices"."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            yield from (".".join([part for part in base if part] + [name.name]) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "para_jax":
            yield from (".".join([*node.module.split(".")[1:], name.name]) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name[9:] for name in node.names if name.name.startswith("para_jax"))


def wrong_imports(file, text):
    """The imports of one file that do not point down."""
    own = file.split("/")[0].removesuffix(".py")
    for name in imported(file, text):
        other = name.split(".")[0]
        down = other in LAYER and LAYER[other] < LAYER[own]
        if other != own and not down and (own, other) not in SIDEWAYS:
            yield f"{file} imports {name or 'para_jax'}"


def test_imports_point_down_only():
    files = sources()
    assert len(files) > 30
    assert [wrong for file, text in files.items() if file != "__init__.py" for wrong in wrong_imports(file, text)] == []


def test_the_exceptions_within_a_layer_are_all_in_use():
    used = {
        (file.split("/")[0].removesuffix(".py"), name.split(".")[0])
        for file, text in sources().items()
        for name in imported(file, text)
    }
    assert SIDEWAYS <= used


def test_every_import_names_a_file_that_is_there():
    files = sources()
    modules = set(map(module, files))
    for file, text in files.items():
        for name in imported(file, text):
            assert name in modules or name.rpartition(".")[0] in modules, f"{file} imports {name}, which is not there"


def module(file):
    """The dotted name of a file inside para_jax: "config", "config.file"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(files):
    """The groups of modules that import each other, directly or through others, wherever in a file the import is."""
    modules = {module(file): file for file in files if file != "__init__.py"}
    reached = {name: set() for name in modules}
    for name, file in modules.items():
        for other in imported(file, files[file]):
            other = other if other in modules else other.rpartition(".")[0]
            reached[name] |= {other} & modules.keys()
    for _ in modules:
        before = sum(map(len, reached.values()))
        reached = {name: others.union(*(reached[other] for other in others)) for name, others in reached.items()}
        if sum(map(len, reached.values())) == before:
            break
    return {frozenset({other for other in reached[name] if name in reached[other]}) for name in modules} - {frozenset()}


def test_no_module_imports_itself_through_others():
    known = {
        "evaluation.evaluate",
        "evaluation.likelihood",
        "evaluation.shapes",
        "evaluation.harness.tasks",
        "evaluation.many",
    }
    assert [sorted(circle) for circle in circles(sources()) if not circle <= known] == []


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"a/b.py": "from . import c", "a/c.py": "from .b import x"}, [["a.b", "a.c"]]),
        (
            {"a/b.py": "def f():\n    from .c import x", "a/c.py": "from ..d import y", "d.py": "import para_jax.a.b"},
            [["a.b", "a.c", "d"]],
        ),
        ({"a/__init__.py": "from .b import x", "a/b.py": "from . import y"}, [["a", "a.b"]]),
        ({"a/__init__.py": "from .b import x", "a/b.py": "from ..d import y", "d.py": ""}, []),
    ],
)
def test_circles_are_found_through_functions_and_other_modules(texts, found):
    assert [sorted(circle) for circle in circles(texts)] == found


@pytest.mark.parametrize(
    ("file", "text", "wrong"),
    [
        ("data/examples.py", "from ..model import forward", True),
        ("data/examples.py", "def f():\n    from ..model import forward", True),
        ("data/examples.py", "from ..backbone.load import load_backbone", True),
        ("adapters/para.py", "from .. import model", True),
        ("adapters/para.py", "import para_jax.model", True),
        ("adapters/para.py", "from para_jax.model import forward", True),
        ("adapters/para.py", "from para_jax import forward", True),
        ("config/file.py", "from ..hub import fetch", True),
        ("runs/train.py", "from ..quickstart import quickstart", True),
        ("data/examples.py", "from ..unheard_of import x", True),
        ("data/examples.py", "from .tasks import TASKS\nfrom ..hub import fetch\nimport json", False),
        ("quickstart/__init__.py", "from .. import devices\nfrom ..runs.tenants import train_tenants", False),
    ],
)
def test_the_reader_of_imports_tells_up_and_sideways_from_down(file, text, wrong):
    assert bool(list(wrong_imports(file, text))) == wrong


def test_importing_para_jax_brings_layers_0_to_2_and_no_slow_package():
    code = "import sys, para_jax; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "para_jax.model" in loaded
    assert not set(HEAVY) & set(loaded)
    ours = {name.split(".")[1] for name in loaded if name.startswith("para_jax.")}
    assert {unit for unit in ours if LAYER[unit] > LAYER["model"]} == set()


def test_the_public_names_are_all_there_and_no_other_answers():
    names = """Completion Engine Request Adapter AdapterBank AdapterParam Adjustment Ia3Config LoraConfig
    export_ia3 ParaLM load_adapter save_adapter Rows Stack pick stack_adapters load_backbone load_model_config
    Transformer LayerKind ModelConfig ParaConfig RotaryConfig RunConfig load_config load_tokenizer
    AdaptedTransformer DecodeState adapt decode forward hidden_states init_adapter multi_tenant_forward prefill
    right_pad vectors make_mesh generate train TrainResult train_tenants TenantsResult evaluate Report
    curves_plot factors_plot""".split()
    assert set(names) <= set(dir(para_jax))
    assert all(callable(getattr(para_jax, name)) for name in names)
    assert set(para_jax._LATER) <= set(names)
    with pytest.raises(AttributeError, match="para_jax.*'generat'"):
        para_jax.generat  # noqa: B018
    with pytest.raises(ImportError):
        exec("from para_jax import generat")
