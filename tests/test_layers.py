"""The layers of the code: imports point down only. A layer is a list of packages and modules of para_jax/."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_reader import circles, imported, module, sources

import para_jax

ROOT = Path(__file__).parents[1]
LAYERS = [
    ["io"],
    ["config"],
    ["runtime"],
    ["backbone"],
    ["adapters", "data"],
    ["model"],
    ["training", "inference"],
    ["serving", "estimate"],
    ["server", "evaluation", "foreign"],
    ["runs"],
    ["reports"],
    ["bench", "quickstart"],
    ["cli"],
    ["ray"],
    ["__main__"],
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
SIDEWAYS: set[tuple[str, str]] = set()
HEAVY = "orbax grain qwix tensorflow_datasets datasets tensorflow transformers tokenizers lm_eval matplotlib".split()
HEAVY += "torch starlette uvicorn httptools prometheus_client pydantic ray".split()


#: What may only go down, except by what an issue names.
MOST = {
    "lines of the package": 34_162,
    "lines of tests": 37_987,
    "loose modules": 0,
    "modules and packages at the top": 20,
    "checks per 1000 lines": 19,
    "words of docs": 26_868,
    "megabytes of results": 2.4,
}


def test_the_house_does_not_grow():
    package, tests = ([file.read_text() for file in (ROOT / name).rglob("*.py")] for name in ("para_jax", "tests"))
    top = [path for path in (ROOT / "para_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    loose = [path for path in top if path.suffix == ".py" and path.stem not in ("__init__", "__main__")]
    checks = [
        re.findall(r"^ *raise\b|(?<!def )\b(?:require|check|refuse)\w*\(", text, re.MULTILINE) for text in package
    ]
    lines = sum(text.count("\n") for text in package)
    found = {
        "lines of the package": lines,
        "lines of tests": sum(text.count("\n") for text in tests),
        "loose modules": len(loose),
        "modules and packages at the top": len(top) - 2,
        "checks per 1000 lines": 1000 * sum(map(len, checks)) / lines,
        "words of docs": sum(len(file.read_text().split()) for file in (ROOT / "docs").glob("*.md")),
        "megabytes of results": sum(file.stat().st_size for file in (ROOT / "results").rglob("*") if file.is_file())
        / 1e6,
    }
    assert {name: value for name, value in found.items() if value > MOST[name]} == {}, found


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


def test_no_module_imports_itself_through_others():
    assert [sorted(circle) for circle in circles(sources())] == []


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
        ("backbone/load.py", "from ..data.tokenizer import load_tokenizer", True),
        ("adapters/para.py", "from .. import model", True),
        ("adapters/para.py", "import para_jax.model.adapted", True),
        ("adapters/para.py", "from para_jax.model.adapted import forward", True),
        ("adapters/para.py", "from para_jax import forward", True),
        ("io/hub.py", "from ..config import expanded", True),
        ("config/file.py", "importlib.import_module('para_jax.adapters.methods')", True),
        ("config/file.py", "def f():\n    import_module('..adapters.methods', __package__)", True),
        ("adapters/methods.py", "import_module('..config.file', __package__)", False),
        ("runs/train.py", "from ..quickstart import quickstart", True),
        ("data/examples.py", "from ..unheard_of import x", True),
        ("data/examples.py", "from .tasks import TASKS\nfrom ..io.hub import fetch\nimport json", False),
        ("quickstart/__init__.py", "from ..runtime import devices\nfrom ..runs.tenants import train_tenants", False),
    ],
)
def test_the_reader_of_imports_tells_up_and_sideways_from_down(file, text, wrong):
    assert bool(list(wrong_imports(file, text))) == wrong


def test_a_module_that_is_loaded_by_a_name_made_at_run_time_is_refused():
    with pytest.raises(AssertionError, match="config/file.py: import_module.name. hides"):
        list(imported("config/file.py", "import_module(name)"))


def test_importing_para_jax_brings_nothing_but_itself():
    """Names are imported when they are used. `forward` then brings layers 0 to 2 and no slow package."""
    code = "import sys, para_jax; print(*sys.modules, sep=',')"
    code += "; para_jax.forward, para_jax.load_backbone, para_jax.AdapterBank; print(*sys.modules, sep=',')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, loaded = (line.split(",") for line in run.stdout.splitlines())
    assert [name for name in first if name.startswith("para_jax")] == ["para_jax"]
    assert not {*HEAVY, "jax", "flax", "numpy"} & set(first)
    assert "para_jax.model.adapted" in loaded
    assert not set(HEAVY) & set(loaded)
    ours = {name.split(".")[1] for name in loaded if name.startswith("para_jax.")}
    assert {unit for unit in ours if LAYER[unit] > LAYER["model"]} == set()


def test_submodules_answer_as_attributes_without_an_import_of_their_own():
    code = "import para_jax; print(para_jax.config.load_config is para_jax.load_config)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


def test_the_public_names_are_all_there_and_no_other_answers():
    names = """log_to_stderr Completion Engine Request Adapter AdapterBank AdapterParam Adjustment Ia3Config LoraConfig
    export_ia3 ParaLM load_adapter save_adapter Rows Stack pick stack_adapters load_backbone load_model_config
    Transformer LayerKind ModelConfig ParaConfig RotaryConfig RunConfig load_config load_tokenizer
    adapt decode forward hidden_states init_adapter multi_tenant_forward prefill
    right_pad vectors make_mesh generate train train_tenants evaluate EvalOptions Results
    compare_methods dry_run run_batch serve curves_plot factors_plot
    attach detach adapter_of set_adapter EndsWith LeftPadded""".split()
    assert set(names) <= set(dir(para_jax))
    assert all(callable(getattr(para_jax, name)) for name in names)
    assert set(para_jax._LATER) <= set(names) and len(names) <= 56
    with pytest.raises(AttributeError, match="para_jax.*'generat'"):
        para_jax.generat  # noqa: B018
    with pytest.raises(ImportError):
        exec("from para_jax import generat")
