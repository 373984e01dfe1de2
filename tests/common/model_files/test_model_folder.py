"""The contract's hash covers every file that defines a model; what is hashed is loaded."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from silotune.client.training import selftest
from silotune.common.cli.model import model as model_command
from silotune.common.errors import DataError
from silotune.common.model_files import model_folder
from silotune.common.models import backbone
from silotune.common.models.factory import build
from tests import tiny

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
IDS = torch.tensor([[2, 5, 6, 7, 3]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT that a test may change."""
    copy = tmp_path / "model"
    shutil.copytree(tiny.folder_of("bert"), copy)
    return copy


def settings(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_hash_is_that_of_the_sorted_list_of_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert "config.json" in names
    assert "model.safetensors" in names
    lines = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()} "
        f"{(folder / name).stat().st_size} {name}\n"
        for name in names
    )
    expected = hashlib.sha256(f"silotune model 1\n{lines}".encode()).hexdigest()
    assert model_folder.manifest(folder).sha256 == expected
    contents = model_folder.read(folder, expected)
    assert contents == {name: (folder / name).read_bytes() for name in names}
    shown = CliRunner().invoke(model_command, ["check", str(folder)])
    assert shown.exit_code == 0
    assert f'sha256 = "{expected}"' in shown.output
    assert all(name in shown.output for name in names)


def test_a_changed_model_file_of_any_kind_is_refused(folder: Path) -> None:
    sha256 = model_folder.manifest(folder).sha256
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        with pytest.raises(DataError, match=f"{sha256[:12]}…. Compare") as error:
            backbone.read(folder, sha256, CPU)
        assert error.value.code == "E305"
        path.write_bytes(before)
    settings(folder, "config.json", layer_norm_eps=0.1)  # the weights alone have not changed
    with pytest.raises(DataError, match="another model"):
        backbone.read(folder, sha256, CPU)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "modeling_tiny.py",
        "pytorch_model.bin",
        "model.pt",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "tokenizer.4.0.0.json",
        "generate.yaml",
        "additional_chat_templates",
        "onnx",
    ],
)
def test_a_file_that_could_change_the_model_is_refused_by_name(folder: Path, name: str) -> None:
    sha256 = model_folder.manifest(folder).sha256
    if "." in name:
        (folder / name).write_text("{}")
    else:
        (folder / name).mkdir()
    for act in (model_folder.manifest, lambda f: backbone.read(f, sha256, CPU)):
        with pytest.raises(DataError, match="Move that out of the folder") as error:
            act(folder)
        assert error.value.code == "E305"
        assert repr(name) in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a name that transformers drops
def test_an_adapter_beside_the_weights_is_refused_and_not_loaded(folder: Path) -> None:
    """transformers loads it in silence, and the output changes."""
    from peft import LoraConfig, get_peft_model

    base = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    sha256 = model_folder.manifest(folder).sha256
    plain = base(IDS).last_hidden_state
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    silent = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    change = (silent(IDS).last_hidden_state - plain).abs().max()
    assert float(change.detach()) > 0.01
    with pytest.raises(DataError, match="adapter_config"):
        backbone.read(folder, sha256, CPU)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "auto_map", {"AutoModel": "modeling_tiny.Tiny"}),
        ("config.json", "quantization_config", {"quant_method": "gptq"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["tokenization_tiny.Tiny", None]}),
        ("tokenizer_config.json", "init_inputs", ["/etc/hosts"]),
        ("tokenizer_config.json", "vocab_file", "/etc/hosts"),
    ],
)
def test_settings_that_name_code_or_other_files_are_refused(
    folder: Path, file: str, key: str, value: object
) -> None:
    settings(folder, file, **{key: value})
    with pytest.raises(DataError, match=f"{file} has '{key}'") as error:
        model_folder.manifest(folder)
    assert error.value.code == "E305"
    path = folder / file
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    assert backbone.read(folder, model_folder.manifest(folder).sha256, CPU)


def test_links_are_refused_and_the_advice_works(folder: Path, tmp_path: Path) -> None:
    sha256 = model_folder.manifest(folder).sha256
    outside = tmp_path / "blob"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(DataError, match=r"links.*'model\.safetensors'.*cp -rL") as error:
        model_folder.read(folder, sha256)
    assert error.value.code == "E305"
    shutil.copytree(folder, tmp_path / "copy", symlinks=False)
    model_folder.check(tmp_path / "copy", sha256)


def test_documents_change_nothing(folder: Path) -> None:
    before = model_folder.manifest(folder)
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", "modules.json"):
        (folder / name).write_text("a document")
    (folder / ".cache").mkdir()
    (folder / "1_Pooling").mkdir()
    assert model_folder.manifest(folder) == before
    assert "README.md" not in model_folder.read(folder, before.sha256)


def outputs(base: backbone.Backbone) -> torch.Tensor:
    found: torch.Tensor = base.base(IDS).last_hidden_state
    return found


def all_overwritten(folder: Path) -> None:
    """In place, so that a mapped file would change too."""
    for path in folder.iterdir():
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\0" * 64)


def test_what_was_hashed_is_what_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is overwritten between the check of its hash and the loading."""
    sha256 = model_folder.manifest(folder).sha256
    expected = outputs(backbone.read(tiny.folder_of("bert"), sha256, CPU))
    original = model_folder.read

    def then_overwritten(*args: Any) -> dict[str, bytes]:
        contents = original(*args)
        all_overwritten(folder)
        return contents

    monkeypatch.setattr(model_folder, "read", then_overwritten)
    found = backbone.read(folder, sha256, CPU)
    assert torch.equal(outputs(found), expected)
    assert found.tokenizer("pain in the chest")["input_ids"] == [2, 5, 6, 7, 8, 3]


def test_a_folder_that_is_overwritten_later_changes_nothing(folder: Path) -> None:
    sha256 = model_folder.manifest(folder).sha256
    found = backbone.read(folder, sha256, CPU)
    before = outputs(found)
    all_overwritten(folder)
    assert torch.equal(outputs(found), before)


def test_the_output_layer_of_a_language_model_is_of_the_hashed_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder_of("llama", tied=False), folder)
    expected = load_file(folder / "model.safetensors")["lm_head.weight"].clone()
    found = backbone.read(folder, model_folder.manifest(folder).sha256, CPU)
    all_overwritten(folder)
    assert isinstance(found, backbone.Llama)
    assert torch.equal(found.unembedding(), expected)


def test_a_language_model_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder_of("llama", tied=False), folder)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "lm_head.weight"}, folder / "model.safetensors"
    )
    with pytest.raises(DataError, match=r"lack 'lm_head\.weight'") as error:
        build(tiny.contract_of("language", "llama", folder), folder)
    assert error.value.code == "E310"


def split(folder: Path, twice: bool = False) -> None:
    """The weights in two files, as transformers writes them for large models."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    parts = names[:7], names[6 if twice else 7 :]
    files = [f"model-{at}-of-00002.safetensors" for at in ("00001", "00002")]
    for file, part in zip(files, parts, strict=True):
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_weights_in_several_files_are_one_model(folder: Path) -> None:
    whole = backbone.read(folder, model_folder.manifest(folder).sha256, CPU)
    split(folder)
    parts = model_folder.manifest(folder)
    assert len([file for file in parts.files if file.name.endswith(".safetensors")]) == 2
    assert torch.equal(outputs(backbone.read(folder, parts.sha256, CPU)), outputs(whole))


def lacks_a_tensor(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors")
    return "lack 1 tensors of this model, the first is 'encoder.layer.1.output.dense.weight'"


def holds_a_tensor_twice(folder: Path) -> str:
    split(folder, twice=True)
    return "more than one model"


def is_cut_short(folder: Path) -> str:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return "is damaged"


def has_no_tokenizer(folder: Path) -> str:
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return "has no tokenizer"


def has_a_tokenizer_that_is_none(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return "transformers cannot load the model"


def has_no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "has no config.json"


def has_a_config_that_is_no_json(folder: Path) -> str:
    (folder / "config.json").write_text("model_type: bert")
    return "is no JSON object"


@pytest.mark.parametrize(
    "spoil",
    [
        lacks_a_tensor,
        holds_a_tensor_twice,
        is_cut_short,
        has_no_tokenizer,
        has_no_config,
        has_a_tokenizer_that_is_none,
        has_a_config_that_is_no_json,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_damaged_folder_is_refused_in_a_sentence(
    folder: Path, spoil: Callable[[Path], str]
) -> None:
    """Also where its hash is the contract's. transformers would draw missing weights at random."""
    says = spoil(folder)
    with pytest.raises(DataError) as error:
        backbone.read(folder, model_folder.manifest(folder).sha256, CPU)
    assert error.value.code == "E310"
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_contract_is_carried_out_with_the_files_of_its_hash(folder: Path) -> None:
    contract = tiny.contract_of("classification", "bert", folder)
    selftest.check(contract, build(contract, folder))


def test_no_call_of_from_pretrained_may_run_code_of_the_model() -> None:
    calls = [
        (path, node)
        for room in ("common", "client", "server", "simulations")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]
    assert len(calls) >= 8
    for path, call in calls:
        given = {word.arg: word.value for word in call.keywords}
        found = given.get("trust_remote_code")
        assert isinstance(found, ast.Constant), f"{path.name}:{call.lineno}"
        assert found.value is False, f"{path.name}:{call.lineno}"
