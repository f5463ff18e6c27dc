"""Models: their YAML files, building, archives of every kind, LoRA, saving, merging."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import utils
from config.build import build
from engine import archives, model_spec
from engine.lora import REFERENCE_ADAPTER, adapter_off
from engine.model_spec import ROOT, ModelSpec
from engine.models import (
    build_policy,
    build_reference,
    check_positions,
    enable_activation_checkpointing,
    load_tokenizer,
    merge_lora,
    restore,
    save_model,
)
from utils import UserError

GEMMA = {
    "model_type": "gemma",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LLAMA = {k: v for k, v in GEMMA.items() if k != "model_type"} | {"model_type": "llama"}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
YAMLS = sorted((ROOT / "config" / "model").glob("*.yaml"))


def make_spec(config=GEMMA, **changes) -> ModelSpec:
    return ModelSpec(
        **(
            {"name": "t", "lr": 1e-3, "config": config, "tokenizer_name_or_path": "assets/tokenizer"}
            | changes
        )
    )


def policy(spec, archive=None, seed=0, **kwargs):
    return build_policy(spec, archive=archive and str(archive), seed=seed, device="cpu", **kwargs)


def logits(model, ids=((1, 2, 3, 4, 5),)):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), use_cache=False).logits


def perturb(model, scale=0.05):
    """Deterministic change of every trained weight (adapters start with B = 0, which tests nothing)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p))
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(make_spec())


# ---------------------------------------------------------------------------------------------- YAML, schema


def test_every_yaml_has_exactly_the_fields_of_the_schema_and_a_comment_for_each():
    assert len(YAMLS) == 15
    for path in YAMLS:
        values = OmegaConf.to_container(OmegaConf.load(path))
        if path.stem == "blank_model":
            assert values["name_or_path"] == "???"
            values["name_or_path"] = "some/model"
        spec = build(ModelSpec, values, "model.")
        assert list(values).sort() == [f.name for f in dataclasses.fields(spec)].sort(), path
        assert set(values) == {f.name for f in dataclasses.fields(spec)}, path
        assert spec.name == path.stem
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            if ":" in line and not line.lstrip().startswith("#"):
                assert "#" in line or lines[i - 1].startswith("#"), f"{path}:{i + 1} has no comment"


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem in ("tiny", "bench")], ids=lambda p: p.stem)
def test_shipped_models_built_from_a_seed_have_the_stated_size(path):
    spec = build(ModelSpec, OmegaConf.to_container(OmegaConf.load(path)), "model.")
    model = policy(spec)
    sizes = {"tiny": (2.2e6, 264), "bench": (15.1e6, 32000)}
    count, rows = sizes[spec.name]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.05)
    assert model.get_input_embeddings().weight.shape[0] == rows
    assert model.config.eos_token_id == load_tokenizer(spec).eos_token_id
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "model.lora_dropout=0.1: must be 0"),
        ({"lora_rank": 0}, "model.lora_rank=0"),
        ({"lora_alpha": -1}, "model.lora_alpha=-1"),
        ({"lora_target_modules": []}, "model.lora_target_modules"),
        ({"lr": 0.0}, "model.lr=0.0"),
        ({"name_or_path": "a/b"}, "model.name_or_path=a/b: give either"),
        ({"config": None}, "model.name_or_path=None: give either"),
        ({"config": {"hidden_size": 8}}, "model_type is missing"),
        ({"tokenizer_name_or_path": None}, "model.tokenizer_name_or_path=null: required"),
        ({"quantization": "nf4", "use_lora": True}, "model.quantization=nf4"),
    ],
)
def test_a_wrong_setting_names_its_key(changes, message):
    with pytest.raises(UserError, match=message):
        make_spec(**changes)


def test_a_wrong_key_in_config_is_an_error():
    with pytest.raises(UserError, match=r"model.config.hiden_size=4: no such key for model_type=gemma"):
        policy(make_spec(GEMMA | {"hiden_size": 4}))
    with pytest.raises(UserError, match=r"model.config"):
        policy(make_spec({"model_type": "gemmma"}))


def test_nf4_without_cuda_says_what_it_needs():
    spec = ModelSpec(
        name="t",
        lr=1e-3,
        name_or_path="a/b",
        tokenizer_name_or_path="assets/tokenizer",
        quantization="nf4",
        use_lora=True,
    )
    with pytest.raises(UserError, match="needs a CUDA device"):
        policy(spec)


# ---------------------------------------------------------------------------------------------- tokenizer


def test_missing_pad_becomes_eos_and_missing_eos_is_an_error(tokenizer, tmp_path, caplog):
    def without(*names):
        folder = tmp_path / "-".join(names)
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))
        return make_spec(tokenizer_name_or_path=str(folder))

    with caplog.at_level("INFO", "robust_pref"):
        loaded = load_tokenizer(without("pad_token"))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id
    assert "no padding token" in caplog.text
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(without("eos_token"))


def test_a_tokenizer_longer_than_the_embedding_is_an_error_with_both_sizes():
    with pytest.raises(UserError, match="has 264 tokens but the model's embedding only 100"):
        policy(make_spec(GEMMA | {"vocab_size": 100}))


def test_chat_template_from_a_file_or_from_text(tmp_path):
    (tmp_path / "t.jinja").write_text("from file")
    assert load_tokenizer(make_spec(chat_template=str(tmp_path / "t.jinja"))).chat_template == "from file"
    assert load_tokenizer(make_spec(chat_template="{{ x }}")).chat_template == "{{ x }}"
    with pytest.raises(UserError, match=r"model\.chat_template=/no/such\.jinja: no such file"):
        load_tokenizer(make_spec(chat_template="/no/such.jinja"))


def test_a_missing_tokenizer_or_model_is_an_error_with_its_key():
    with pytest.raises(UserError, match=r"model.tokenizer_name_or_path=/no/such"):
        load_tokenizer(make_spec(tokenizer_name_or_path="/no/such"))
    with pytest.raises(UserError, match=r"model.name_or_path=/no/such"):
        policy(make_spec(None, name_or_path="/no/such"))


# ---------------------------------------------------------------------------------------------- building


def test_a_row_beyond_a_table_of_positions_is_refused_and_rotary_models_have_none():
    check_positions(policy(make_spec(GPT2)), 64)
    with pytest.raises(UserError, match="has 65 tokens, but the model has 64 positions"):
        check_positions(policy(make_spec(GPT2)), 65)
    check_positions(policy(make_spec(GEMMA)), 65)


def test_building_is_deterministic_and_leaves_the_global_generator_alone():
    spec = make_spec()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = policy(spec, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert same(first, policy(spec, seed=5))  # the run's seed is not the model's
    other = policy(dataclasses.replace(spec, init_seed=1))
    assert not torch.equal(first.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "config", [GEMMA, GPT2, GEMMA | {"attention_dropout": 0.5}], ids=["gemma", "gpt2", "dropout"]
)
def test_dropout_is_zero_so_training_mode_computes_what_evaluation_mode_does(config):
    model = policy(make_spec(config))
    assert model.training
    first = logits(model)
    assert torch.equal(first, logits(model))
    torch.testing.assert_close(first, logits(model.eval()))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtype_is_the_one_asked_for_and_rotary_frequencies_stay_float32(dtype):
    model = policy(make_spec(LLAMA, policy_dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    exact = policy(make_spec(LLAMA))
    assert torch.equal(model.lm_head.weight, exact.lm_head.weight.to(model.dtype))
    assert policy(make_spec(), dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("config", [GEMMA, GPT2, LLAMA], ids=lambda c: c["model_type"])
@pytest.mark.parametrize(("output", "dim"), [("reward", None), ("embedding", 6)])
def test_reward_and_embedding_heads_are_drawn_from_the_runs_seed(config, output, dim, tokenizer):
    spec = make_spec(config)
    model = policy(spec, output=output, dim=dim, seed=1)
    assert model.score.weight.shape == (dim or 1, 16)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert same(model, policy(spec, output=output, dim=dim, seed=1))
    assert not torch.equal(model.score.weight, policy(spec, output=output, dim=dim, seed=2).score.weight)


@pytest.mark.parametrize(("own", "revision"), [(None, "abc"), ("hub/model", "abc"), ("hub/tokens", None)])
def test_a_revision_is_that_of_the_model_s_repository_alone(monkeypatch, tokenizer, own, revision):
    asked = []

    def load(name, **options):
        asked.append((name, options["revision"]))
        return tokenizer

    monkeypatch.setattr(model_spec.AutoTokenizer, "from_pretrained", load)
    load_tokenizer(make_spec(None, name_or_path="hub/model", revision="abc", tokenizer_name_or_path=own))
    assert asked == [(own or "hub/model", revision)]


def test_embedding_and_dim_belong_together():
    with pytest.raises(ValueError, match="need a dimension"):
        policy(make_spec(), output="embedding")


def test_the_reference_is_frozen_and_equal_to_the_policy_at_the_start(tmp_path, tokenizer):
    spec = make_spec()
    save_model(perturb(policy(spec)), tokenizer, tmp_path / "sft")
    model = policy(spec, tmp_path / "sft")
    reference = build_reference(spec, archive=str(tmp_path / "sft"), device="cpu")
    assert same(model, reference)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in model.parameters())
    half = build_reference(dataclasses.replace(spec, reference_dtype="bfloat16"), device="cpu")
    assert half.dtype == torch.bfloat16


def test_activation_checkpointing_gives_the_same_gradients():
    plain, checkpointed = policy(make_spec(LLAMA)), policy(make_spec(LLAMA))
    enable_activation_checkpointing(checkpointed)
    assert checkpointed.is_activation_checkpointing
    for model in (plain, checkpointed):
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.square().sum().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------------------------------------- saving, archives


@pytest.mark.parametrize("config", [GEMMA, GPT2, LLAMA], ids=lambda c: c["model_type"])
def test_a_saved_model_is_an_ordinary_directory_with_the_weights_bit_for_bit(config, tmp_path, tokenizer):
    model = perturb(policy(make_spec(config)))
    save_model(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(model, again)
    assert again.dtype == torch.float32
    assert torch.equal(logits(model.eval()), logits(again.eval()))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert not list(tmp_path.glob("*.bin"))
    # and as a pretrained model of ours
    pretrained = policy(make_spec(None, name_or_path=str(tmp_path), tokenizer_name_or_path=None))
    assert same(model, pretrained)


def test_a_gathered_state_without_tied_twins_saves_the_same_model(tmp_path, tokenizer):
    model = perturb(policy(make_spec()))
    state = {k: v.detach().clone() for k, v in model.named_parameters()}
    assert "lm_head.weight" not in state
    save_model(policy(make_spec()), tokenizer, tmp_path, state=state)
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert same(model, policy(make_spec(), tmp_path))


@pytest.mark.parametrize("kind", ["full", "lora", "reward"])
def test_restore_puts_back_what_was_saved_bit_for_bit(kind, tmp_path, tokenizer):
    def fresh():
        return policy(
            lora() if kind == "lora" else make_spec(), output="reward" if kind == "reward" else "logps"
        )

    model = perturb(fresh())
    gathered = {k: v.detach().clone() for k, v in model.named_parameters()}
    save_model(model, tokenizer, tmp_path / "plain")
    save_model(fresh(), tokenizer, tmp_path / "gathered", state=gathered)
    for name in ("plain", "gathered"):
        again = fresh()
        assert not same(model, again)
        restore(again, tmp_path / name)
        assert same(model, again)


def wrapped(state, prefix="", infix=""):
    """Names as wrappers would have given them."""
    return {prefix + k.replace("layers.0.", f"layers.0.{infix}"): v for k, v in state.items()}


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"prefix": "module."},
        {"prefix": "model."},  # our Scorer
        {"prefix": "_orig_mod.module.model."},
        {"prefix": "_fsdp_wrapped_module.", "infix": "_checkpoint_wrapped_module."},
    ],
    ids=["plain", "ddp", "scorer", "compiled", "fsdp"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_archives_with_the_names_of_wrappers_load(names, suffix, tmp_path):
    model = perturb(policy(make_spec()))
    state = wrapped({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, **names)
    path = tmp_path / f"policy{suffix}"
    if suffix == ".pt":
        torch.save({"step_idx": 64, "state": state, "metrics": {"loss": 0.5, "list": [1.0]}}, path)
    else:
        save_file(state, path)
    assert same(model, policy(make_spec(), path))


def test_the_dpo_repositorys_run_directory_with_buffers_of_old_versions_loads(tmp_path):
    model = perturb(policy(make_spec(GPT2)))
    state = dict(model.state_dict()) | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    (tmp_path / "LATEST").mkdir()
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, tmp_path / "LATEST" / "policy.pt")
    assert same(model, policy(make_spec(GPT2), tmp_path))


def commit(run, examples, write):
    from engine.checkpoint import save

    state = {"step": examples, "examples": examples}
    save(run, examples, write_model=write, optimizer={}, state=state, facts={})


def test_a_run_directory_gives_its_newest_valid_checkpoint(tmp_path, tokenizer):
    models = {n: perturb(policy(make_spec()), 0.01 * n) for n in (1, 2)}
    for n, model in models.items():
        commit(tmp_path, n, lambda folder, m=model: save_model(m, tokenizer, folder))
    assert same(models[2], policy(make_spec(), tmp_path))
    assert same(models[2], policy(make_spec(), tmp_path / "LATEST"))
    assert same(models[1], policy(make_spec(), tmp_path / "step-1"))
    weights = tmp_path / "step-2" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1  # would load without a word
    weights.write_bytes(damaged)
    assert same(models[1], policy(make_spec(), tmp_path))
    with pytest.raises(UserError, match="damaged"):
        policy(make_spec(), tmp_path / "step-2")


def test_sharded_directories_and_bin_files_load(tmp_path, tokenizer):
    model = perturb(policy(make_spec()))
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert same(model, policy(make_spec(), tmp_path / "shards"))
    folder = tmp_path / "bin"
    save_model(model, tokenizer, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(model, policy(make_spec(), folder))
    assert same(
        model, policy(make_spec(None, name_or_path=str(folder), tokenizer_name_or_path="assets/tokenizer"))
    )


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused(kind, tmp_path):
    flag, path = tmp_path / "ran", tmp_path / "policy.pt"
    content = {"state": {"a": torch.zeros(1)}, "metrics": Hostile(flag)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(Hostile(flag), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="safetensors"):
        policy(make_spec(), path)
    assert not flag.exists()


def test_a_hostile_bin_of_a_pretrained_model_is_refused(tmp_path, tokenizer):
    folder, flag = tmp_path / "m", tmp_path / "ran"
    save_model(policy(make_spec()), tokenizer, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile(flag)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        policy(make_spec(None, name_or_path=str(folder), tokenizer_name_or_path=None))
    assert not flag.exists()


def test_code_that_a_model_directory_ships_is_not_run(tmp_path, tokenizer):
    folder = tmp_path / "m"
    save_model(policy(make_spec()), tokenizer, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UserError, match=r"model.name_or_path"):
        policy(make_spec(None, name_or_path=str(folder), tokenizer_name_or_path="assets/tokenizer"))
    assert not (tmp_path / "ran").exists()


def test_archive_errors_name_the_path_and_the_first_few_keys(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"model.archive=/no/such: no such file"):
        policy(make_spec(), "/no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it holds nothing"):
        policy(make_spec(), tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not a weights file"):
        policy(make_spec(), tmp_path / "notes.txt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="a list"):
        policy(make_spec(), tmp_path / "list.pt")
    state = {k: v.clone() for k, v in policy(make_spec()).state_dict().items() if k != "lm_head.weight"}
    lacking = {k: v for k, v in state.items() if "norm" not in k}
    save_file(lacking | {"model.extra": torch.zeros(1)}, tmp_path / "lacking.safetensors")
    with pytest.raises(
        UserError, match=r"(?s)not in the archive: model.*norm.*not in the model: model.extra"
    ):
        policy(make_spec(), tmp_path / "lacking.safetensors")
    wide = policy(make_spec(GEMMA | {"vocab_size": 300}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="vocabulary: 300 tokens in the archive, 264 in the model"):
        policy(make_spec(), tmp_path / "wide")
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="cannot be read"):
        policy(make_spec(), tmp_path / "cut.safetensors")


def test_untied_weights_do_not_load_into_a_tied_model(tmp_path):
    untied = policy(make_spec(GEMMA | {"tie_word_embeddings": False}))
    untied.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ties them"):
        policy(make_spec(), tmp_path)


def test_an_archive_with_another_tokenizer_of_equal_size_is_refused(tmp_path, tokenizer):
    save_model(policy(make_spec()), tokenizer, tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = [k for k, v in vocabulary.items() if v in (65, 66)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer \(264 tokens there, 264 here"):
        policy(make_spec(), tmp_path)


def test_a_reward_model_starts_from_a_language_models_archive_and_reloads_its_own(tmp_path, tokenizer):
    sft = perturb(policy(make_spec(GPT2)))
    save_model(sft, tokenizer, tmp_path / "sft")
    reward = policy(make_spec(GPT2), tmp_path / "sft", output="reward", seed=4)
    assert same(reward.transformer, sft.transformer)
    fresh = policy(make_spec(GPT2), output="reward", seed=4)
    assert torch.equal(reward.score.weight, fresh.score.weight)
    save_model(perturb(reward), tokenizer, tmp_path / "rm")
    assert same(reward, policy(make_spec(GPT2), tmp_path / "rm", output="reward", seed=9))


# ---------------------------------------------------------------------------------------------- LoRA


def lora(config=GEMMA, **changes):
    same = {"reference_dtype": changes["policy_dtype"]} if "policy_dtype" in changes else {}
    return make_spec(config, use_lora=True, lora_rank=2, lora_alpha=4, **same, **changes)


@pytest.mark.parametrize("config", [GEMMA, GPT2, LLAMA], ids=lambda c: c["model_type"])
def test_a_fresh_adapter_changes_nothing_and_only_adapters_are_trained(config):
    model = policy(lora(config), seed=1)
    base = policy(make_spec(config))
    assert torch.equal(logits(model), logits(base))
    assert all(".lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    first = [p for n, p in model.named_parameters() if ".lora_A." in n]
    again = [p for n, p in policy(lora(config), seed=1).named_parameters() if ".lora_A." in n]
    other = [p for n, p in policy(lora(config), seed=2).named_parameters() if ".lora_A." in n]
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert archives.weights_hash(model) == archives.weights_hash(base)


def test_adapters_keep_the_policys_float64():
    assert {p.dtype for p in policy(lora(LLAMA, policy_dtype="float64")).parameters()} == {torch.float64}


def test_only_the_named_modules_get_an_adapter_and_an_unknown_name_is_an_error():
    model = policy(lora(lora_target_modules=["q_proj"]))
    assert all("q_proj" in n for n, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"model.lora_target_modules=\['nope'\]"):
        policy(lora(lora_target_modules=["nope"]))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_saved_adapter_is_an_ordinary_one_and_continues_with_a_frozen_copy_as_reference(
    tmp_path, tokenizer
):
    from peft import PeftModel

    sft = perturb(policy(lora()))
    save_model(sft, tokenizer, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    plain = PeftModel.from_pretrained(policy(make_spec()), tmp_path)
    torch.testing.assert_close(logits(plain.eval()), logits(sft.eval()))
    model = policy(lora(), tmp_path, seed=7)
    assert torch.equal(logits(model), logits(sft))
    assert model.active_adapters == ["default"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(REFERENCE_ADAPTER in n for n in trained)
    perturb(model)
    assert not torch.allclose(logits(model), logits(sft))
    with adapter_off(model):
        assert torch.equal(logits(model), logits(sft))  # not the bare base
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    # what is saved now is the trained adapter alone, and it loads again
    save_model(model, tokenizer, tmp_path / "next")
    again = policy(lora(), tmp_path / "next")
    assert torch.equal(logits(again), logits(model))
    reference = build_reference(lora(), archive=str(tmp_path), device="cpu")
    assert torch.equal(logits(reference), logits(sft))
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_reward_model_starts_from_a_language_models_adapter_with_a_head_of_its_own(tmp_path, tokenizer):
    sft = perturb(policy(lora()))
    save_model(sft, tokenizer, tmp_path)
    model = policy(lora(), tmp_path, output="reward")
    ours = dict(model.named_parameters())
    adapters = {n: p for n, p in sft.named_parameters() if ".lora_" in n}
    assert adapters and all(torch.equal(ours[n], p) for n, p in adapters.items())
    head = [p for n, p in ours.items() if "score" in n and p.requires_grad]
    assert len(head) == 1 and head[0].std() > 0
    with pytest.raises(UserError, match="adapter"):  # of a language model, nothing may be missing
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        policy(lora(), tmp_path)


def test_a_state_dict_of_a_peft_model_loads_like_its_adapter(tmp_path):
    """The group-robust repository's policy.pt: base and adapter tensors under peft's names."""
    sft = perturb(policy(lora()))
    state = {k: v for k, v in sft.state_dict().items() if "lm_head" not in k}
    torch.save({"step_idx": 1, "state": state, "metrics": []}, tmp_path / "policy.pt")
    assert torch.equal(logits(policy(lora(), tmp_path / "policy.pt")), logits(sft))
    old = {k.replace(".base_layer.", "."): v for k, v in state.items()}
    torch.save({"step_idx": 1, "state": old, "metrics": []}, tmp_path / "old.pt")
    assert torch.equal(logits(policy(lora(init_seed=9), tmp_path / "old.pt")), logits(sft))
    quantised = {"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight.absmax": torch.zeros(1)}
    torch.save({"step_idx": 1, "state": state | quantised, "metrics": []}, tmp_path / "nf4.pt")
    with pytest.raises(UserError, match=r"model.quantization=nf4"):
        policy(lora(), tmp_path / "nf4.pt")


def test_an_adapter_trained_on_an_archive_brings_that_archive(tmp_path, tokenizer):
    sft = perturb(policy(make_spec()))
    save_model(sft, tokenizer, tmp_path / "sft")
    model = perturb(policy(lora(), tmp_path / "sft"))
    assert REFERENCE_ADAPTER not in model.peft_config
    with adapter_off(model):
        assert torch.equal(logits(model), logits(sft))
    save_model(model, tokenizer, tmp_path / "dpo")
    again = policy(lora(), tmp_path / "dpo")
    assert torch.equal(logits(again), logits(model))
    # a third stage still knows
    save_model(again, tokenizer, tmp_path / "third")
    assert torch.equal(logits(policy(lora(), tmp_path / "third")), logits(model))


def test_an_adapter_on_other_base_weights_or_settings_is_refused(tmp_path, tokenizer):
    save_model(perturb(policy(lora())), tokenizer, tmp_path)
    with pytest.raises(UserError, match="other base weights"):
        policy(lora(init_seed=1), tmp_path)
    with pytest.raises(UserError, match=r"model.lora_rank=4: .* has 2; set model.lora_rank=2"):
        policy(make_spec(use_lora=True, lora_rank=4, lora_alpha=4), tmp_path)
    with pytest.raises(UserError, match=r"model.lora_alpha=8"):
        policy(make_spec(use_lora=True, lora_rank=2, lora_alpha=8), tmp_path)
    with pytest.raises(UserError, match="not in the model"):
        policy(lora(lora_target_modules=["q_proj"]), tmp_path)
    with pytest.raises(UserError, match=r"model.use_lora=true"):
        policy(make_spec(), tmp_path)


@pytest.mark.parametrize("config", [GEMMA, GPT2], ids=lambda c: c["model_type"])
def test_merging_keeps_the_function_and_leaves_the_model_alone(config, tmp_path, tokenizer):
    model = perturb(policy(lora(config)))
    before = copy.deepcopy(model.state_dict())
    gap = merge_lora(model, tokenizer, tmp_path)
    assert 0 < gap < 1e-4
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(merged), logits(policy(make_spec(config))), atol=1e-3)


def test_merging_a_continued_adapter_leaves_the_reference_adapter_out(tmp_path, tokenizer):
    save_model(perturb(policy(lora())), tokenizer, tmp_path / "sft")
    model = perturb(policy(lora(), tmp_path / "sft"), 0.1)
    merge_lora(model, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)
    assert REFERENCE_ADAPTER in model.peft_config


def test_a_merge_past_the_tolerance_writes_nothing(tmp_path, tokenizer):
    with pytest.raises(UserError, match="changes log-probs"):
        merge_lora(perturb(policy(lora())), tokenizer, tmp_path / "m", tolerance=0.0)
    assert not (tmp_path / "m").exists()


def test_a_lora_reward_model_saves_and_reloads_adapter_and_head(tmp_path, tokenizer):
    model = perturb(policy(lora(), output="reward", seed=3))
    save_model(model, tokenizer, tmp_path)
    again = policy(lora(), tmp_path, output="reward", seed=8)
    ids = ((5, 6, 7),)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert merge_lora(model, tokenizer, tmp_path / "merged") < 1e-4


# ---------------------------------------------------------------------------------------------- identity


def test_the_weights_hash_follows_weights_dtype_and_configuration_only():
    model = policy(make_spec())
    first = archives.weights_hash(model)
    assert first == archives.weights_hash(policy(make_spec(), seed=3).eval())
    assert first != archives.weights_hash(policy(make_spec(), dtype=torch.float64))
    assert first != archives.weights_hash(policy(make_spec(GEMMA | {"rms_norm_eps": 1e-3})))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert first != archives.weights_hash(model)


def test_the_weights_hash_of_an_adapter_follows_its_tensors_and_scale(tmp_path, tokenizer):
    save_model(perturb(policy(lora())), tokenizer, tmp_path)
    model = policy(lora(), tmp_path)
    both = [archives.weights_hash(model, adapter=a) for a in ("default", REFERENCE_ADAPTER)]
    assert both[0] == both[1] != archives.weights_hash(model)
    perturb(model)
    assert archives.weights_hash(model, adapter="default") != both[0]
    assert archives.weights_hash(model, adapter=REFERENCE_ADAPTER) == both[0]


def test_the_stream_of_the_head_is_the_documented_one():
    draws = utils.stream(4, "head").normal(0.0, 0.02, (1, 16))
    weight = policy(make_spec(), output="reward", seed=4).score.weight.detach().numpy()
    assert weight == pytest.approx(draws, rel=1e-6)
