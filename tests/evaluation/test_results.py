"""The files of an output folder: records, the table, and what is not overwritten."""

import re
from types import SimpleNamespace

import pytest
from tiny_harness import results

from para_jax.adapters.names import named_adapters
from para_jax.evaluation import results as result_files
from para_jax.evaluation.questions import Scored
from para_jax.evaluation.results import cell, check_results, file_names, metric_values


def test_an_output_folder_of_another_backbone_or_program_is_refused(whole, tmp_path):
    names, content = ["base.json", "A.json", "none.json"], results(whole)["base"]["config"]["backbone_content"]
    check_results(whole, names, content)
    with pytest.raises(ValueError, match="base.json holds no results of this backbone; choose another --output"):
        check_results(whole, names, "another")
    for other in (b"[]", b"not JSON", b'{"config": 1}'):
        (tmp_path / "A.json").write_bytes(other)
        with pytest.raises(ValueError, match="A.json holds no results of this"):
            check_results(tmp_path, names, content)


def test_the_error_of_the_loss_is_that_of_the_examples_whatever_choices_are_ranked(monkeypatch):
    score = SimpleNamespace(metric="accuracy", score=1.0, stderr=0.0, also=(), count=2, loss=1.0)
    monkeypatch.setattr(result_files, "score_answers", lambda *_: score)
    examples, ranked = [((1,), (2, 3)), ((1,), (4,))], [((1,), (2, 3)), ((1,), (4,))] * 2
    answers = [Scored(-float(nats), True) for nats in (1, 2, 1, 9, 7, 2)]
    plain = metric_values(SimpleNamespace(examples=examples, ranked=[]), answers[:2])
    assert metric_values(SimpleNamespace(examples=examples, ranked=ranked), answers) == plain


def test_the_table_shows_no_raw_control_character():
    assert cell("a|b\x1b[0m\n\udcff é") == "a\\|b\\x1b[0m\\n\\udcff é"


def test_adapters_are_named_by_their_folders_and_get_distinct_files(folder):
    folders = [str(folder / name / "adapter") for name in "AB"]
    assert named_adapters([*folders, "mine=" + folders[0], "user/name@v1"]) == {
        "A": folders[0], "B": folders[1], "mine": folders[0], "user/name@v1": "user/name@v1"
    }  # fmt: skip
    for wrong in ([folders[0]] * 2, ["base=x"], ["=x"], ["x="]):
        with pytest.raises(ValueError, match="give NAME=DIR"):
            named_adapters(wrong)


def test_tenants_of_a_run_without_an_adapter_yet_are_named(tmp_path, capsys):
    (tmp_path / "tenants.json").write_text("{}")
    for name in ("acme", "globex", "late"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    assert list(named_adapters([str(tmp_path)])) == ["acme", "globex", "late"] and capsys.readouterr().err == ""
    (tmp_path / "late" / "adapter").rmdir()
    assert list(named_adapters([str(tmp_path)])) == ["acme", "globex"]
    said = capsys.readouterr().err
    assert "late (1 of 3)" in said and "acme" not in said


def test_adapters_come_from_patterns_and_lists(folder, tmp_path, bucket):
    folders = {name: str(folder / name / "adapter") for name in "AB"}
    assert named_adapters([f"{folder}/*/adapter"]) == named_adapters([f"{folder}/[AB]/adapter"]) == folders
    listed = tmp_path / "list.txt"
    listed.write_text(f"# tenants\n\n{folders['A']}\n  mine={folders['B']} \nuser/name\ngs://bucket/run/adapter\n")
    found = {"A": folders["A"], "mine": folders["B"], "user/name": "user/name", "run": "gs://bucket/run/adapter"}
    assert named_adapters([], listed) == found
    assert list(named_adapters([folders["B"]], listed)) == ["B", *found]
    for name in ("x", "y"):
        (bucket / "tenants" / name / "adapter" / "adapter_config.json").write_bytes(b"{}")
    there = {name: f"{bucket}/tenants/{name}/adapter" for name in "xy"}
    assert named_adapters([f"{bucket}/tenants/*/adapter"]) == there
    for given, wrong in (
        ([folders["A"]], "list.txt, line 3: the name 'A' is taken"),
        ([f"{folder}/*/none"], "none': no folder matches"),
        ([f"{bucket}/*/none"], "none': no folder matches"),
    ):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            named_adapters(given, listed)
    for text, said in (("# none\n", "no line there"), (None, "list.txt")):
        listed.write_text(text) if text else listed.unlink()
        with pytest.raises((ValueError, OSError), match=said):
            named_adapters([], listed)


def test_a_comparison_of_sweeps_is_not_a_set_of_tenants(tmp_path):
    for file in ("comparison.json", "lora/tenants.json", "para/tenants.json", "para/lr-1/adapter/config"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=re.escape(f"give {tmp_path}/lora")):
        named_adapters([str(tmp_path)])
    assert list(named_adapters([f"{tmp_path}/para"])) == ["lr-1"]


def test_a_run_may_have_an_equals_sign_in_its_name(tmp_path):
    run = tmp_path / "lr=0.003"
    (run / "a" / "adapter").mkdir(parents=True)
    (run / "tenants.json").touch()
    assert named_adapters([str(run)]) == {"a": f"{run}/a/adapter"}


def test_a_path_may_have_the_signs_of_a_pattern(tmp_path):
    folder = tmp_path / "lr[1e-3]"
    folder.mkdir()
    assert named_adapters([str(folder), f"mine={folder}"]) == {"lr[1e-3]": str(folder), "mine": str(folder)}


def test_results_files_are_distinct():
    names = ["a/b", "a_b", "A_B", "..", "x", "x y", "x_y", "x_y-0", "x_y-1"]
    files = file_names(names)
    assert len({file.lower() for file in files.values()}) == len(names) and files["x"] == "x.json"
    assert not any("/" in file or file.startswith(".") for file in files.values())
    long = [letter * 190 + end for letter in "xé" for end in ("1" * 50, "2" * 50)]
    assert len({*file_names(long).values()}) == 4 and max(len(f.encode()) for f in file_names(long).values()) < 150
    assert file_names(["a\udcff", "a_"])["a\udcff"].startswith("a_-")
    assert file_names(["Shard"])["Shard"].startswith("Shard-")  # shard.json is the evaluation's own
