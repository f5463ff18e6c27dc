"""The command line: what users type, what they get wrong, and what they are told."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass

import pytest
import yaml

from config import aliases
from config.build import build
from config.compose import CONFIG_DIR, compose, options, prepare
from config.schema import Config, DataConfig
from utils import UserError

ROOT = CONFIG_DIR.parent


def told(*words: str) -> str:
    with pytest.raises(UserError) as error:
        compose(list(words))
    return str(error.value)


def test_the_bare_default_composes():
    run = compose([])
    assert run.plain["loss"]["name"] == "sft" and run.config.datasets == ["opinions"]
    assert run.config.lr == run.model.lr


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("loss.betta=1", "did you mean 'beta'"),
        ("batchsize=4", "did you mean 'batch_size'"),
        ("loss=dppo", "did you mean 'dpo'"),
        ("los=dpo", "did you mean 'loss'"),
        ("loss=null", "known: base, dpo"),
        ("datasets=hh", "datasets=[hh]"),
        ("datasets.hh=1", "datasets=[a,b]"),
        ("model=glob(*)", "add -m"),
        ("hydra=1", "hydra.KEY=VALUE"),
        ("multirun_keys={a:1}", "multirun_keys"),
        ("multirun_keys=true", "multirun_keys"),
        ("exp_name=", "give a name"),
        ("exp_name=../x", "run_dir=PATH"),
        ("exp_name=/x", "run_dir=PATH"),
        ("exp_name=a/..", "run_dir=PATH"),
        ("run_root=", "run_root=: an empty path"),
        ("run_dir=", "run_dir=: an empty path"),
        ("model.archive=", "model.archive=: an empty path"),
        ("device=mps", "cuda:N"),
        ("device=meta", "cuda:N"),
        ("dataset=[hh]", "datasets=[a,b]"),
        ("=1", "data.<name>.KEY"),
        ("lr", "KEY=VALUE"),
        ("datasets=[hh_", "datasets=[hh_: cannot be read"),
        ("wandb=[a,b]", "merge DictConfig with ListConfig"),
        ("optimizer_options={1:2}", "optimizer_options.1"),
        ("data.mix_weights={opinions:-1}", "one positive weight"),
        ("--cfg=job", "key=value"),
        ("seed=glob(*)", "files of a group"),
        ("weighting.class={a:1}", "weighting.class"),
        ("model=gema-2b", "did you mean 'gemma-2b'"),
        ("datasets=[opinion]", "did you mean 'opinions'"),
        ("data.opinions.num_trian=3", "did you mean 'num_train'"),
        ("data.opinons.num_train=3", "did you mean 'opinions'"),
        ("batch_size=abc", "must be an integer"),
        ("batch_size=1.5", "must be an integer"),
        ("lr=fast", "must be a number"),
        ("do_first_eval=1", "must be true or false"),
        ("precision=bf61", "did you mean 'bf16'"),
        ("n_epochs=null", "n_examples=null"),
        ("max_prompt_length=512", "must be below max_length"),
        ("loss=grpo", "group RELATIVE"),
        ("trainer=TensorParallelTrainer", "FSDPTrainer"),
        ("wandb.key=abc", "WANDB_API_KEY"),
        ("local_dirs=[/scr]", "run_root"),
    ],
)
def test_a_mistake_gets_one_message_with_the_fix(word, says):
    extra = ["loss=dpo", "loss.beta=0.1", "assert_sft_step=false"] if word.startswith("loss.") else []
    assert says in told(*extra, word)


@pytest.mark.parametrize("word", ["exp_name=a/b", "exp_name=.hidden", "exp_name='ä b=1'", "device=cuda:1"])
def test_unusual_names_are_taken(word):
    assert compose([word]).words == (word,)


@pytest.mark.parametrize("path", ["/home/josé/a", "~/a", "a b (1)/c=d&e", "2024_11_28", "1e5"])
def test_a_path_needs_no_quotes_and_stays_as_it_was_typed(path):
    assert compose([f"run_root={path}", "exp_name=1_0"]).config.run_dir == f"{path}/1_0"
    assert compose([f"cache_dir=x/{path}"]).config.token_cache == f"x/{path}/tokens"


def test_a_missing_beta_names_the_key():
    assert "loss.beta is required" in told("loss=dpo", "model.archive=x")


def test_a_preference_loss_wants_an_sft_archive():
    assert "model.archive=" in told("loss=dpo", "loss.beta=0.1")
    compose(["loss=dpo", "loss.beta=0.1", "assert_sft_step=false"])


def test_all_problems_are_told_at_once():
    message = told("loss=ipo", "batch_size=0", "lr=x", "nonsense=1")
    assert all(word in message for word in ("loss.beta", "lr=x", "nonsense"))


@pytest.mark.parametrize(
    "word",
    [
        "eval_batch_size=-1",
        "max_prompt_length=0",
        "warmup_steps=-1",
        "max_grad_norm=0",
        "max_grad_norm=nan",
        "weight_decay=nan",
        "spike_factor=1",
        "data.max_bad_fraction=2",
        "scoring.chunk_tokens=0",
        "scoring.tolerance=nan",
        "fresh_pairs.temperature=0",
        "trainer.nproc=0",
        "trainer.timeout_s=0",
        "data.opinions.source=hh",
        "optimizer=AdamX",
        "optimizer_options={betas:[0.9]}",
        "optimizer_options.momentum=0.9",
    ],
)
def test_a_value_out_of_range_is_told_with_its_key_before_anything_is_read(word):
    assert word.partition("=")[0] in told(word)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.nproc=2"], "trainer.nproc=2 with trainer=BasicTrainer"),
        (["trainer=DDPTrainer", "trainer.cpu_offload=true"], "trainer.cpu_offload=true with trainer=DDPTrainer"),
        (["eval_splits=[train]"], "must be one of validation, test"),
        (["fresh_pairs.model=m"], "fresh_pairs.num_pairs=0: nothing is drawn"),
        (["loss=reward", "sample_during_eval=true"], "sample_during_eval=true: loss=reward trains a model that gives rewards"),
        (["model.use_lora=true", "model.reference_dtype=bfloat16"], "model.reference_dtype=bfloat16 model.policy_dtype=float32"),
    ],
)  # fmt: skip
def test_a_setting_that_would_change_nothing_is_refused(words, says):
    assert says in told(*words)


def test_several_values_without_m_are_told_to_be_a_sweep():
    assert "add -m" in told("seed=0,1")
    assert prepare(["-m", "seed=0,1"])[-1] == "++multirun_keys=[seed]"


def test_the_hash_without_seed_knows_archives_apart_but_not_their_seeds():
    def hash_of(archive, seed):
        words = ["loss=dpo", "loss.beta=0.1", f"model.archive={archive}", f"seed={seed}"]
        return compose(words).config_hash_no_seed

    first = hash_of("runs/sft_seed0/LATEST", 0)
    assert first == hash_of("runs/sft_seed12/LATEST", 12)
    assert hash_of("runs/two/seed=0/LATEST", 0) == hash_of("runs/two/seed=1/LATEST", 1)
    assert first != hash_of("runs/other_seed0/LATEST", 0)


def test_an_indivisible_batch_names_the_nearest_sizes():
    with pytest.raises(UserError, match="nearest: 24 or 32"):
        compose(["batch_size=30", "gradient_accumulation_steps=4"]).config.check_world(2)


def test_the_original_repository_s_readme_command_composes(tmp_path):
    run = compose(
        [
            "model=tiny",
            "datasets=[hh]",
            "data.hh.path=FILE",
            "loss=dpo",
            "loss.beta=0.1",
            "exp_name=x",
            "gradient_accumulation_steps=2",
            "batch_size=64",
            "eval_batch_size=32",
            "trainer=BasicTrainer",
            "sample_during_eval=false",
            "model.archive=RUN/LATEST",
        ]
    )
    assert run.loss.beta == 0.1 and run.datasets[0].settings.path == "FILE" and run.config.run_dir == "runs/x"


@pytest.mark.parametrize("name", ["gr_dpo", "gr_ipo", "rdpo", "ripo", "gripo"])
def test_group_robust_names_are_a_base_loss_and_a_weighting(name):
    run = compose([f"loss={name}", "loss.beta=0.2", "loss.step_size=0.3", "assert_sft_step=false"])
    assert type(run.weighting).__name__ == "GroupRobust" and run.weighting.step_size == 0.3
    assert type(run.loss).__name__ == ("DPO" if "dpo" in name else "IPO")


def test_the_group_robust_repository_s_keys_are_understood():
    run = compose(
        [
            "loss=ripo",
            "loss.beta=0.01",
            "loss.step_size=5e-7",
            "loss.divide_by_totalcount=true",
            "loss.adaptive_step_size=true",
            "loss.step_factor=0.5",
            "loss.importance_sampling=false",
            "loss.imp_weights=false",
            "loss.adj=0",
            "loss.dpowts=false",
            "trainer=GroupTrainerEarlyStop",
            "scheduler_metric=loss",
            "patience_factor=2",
            "min_lr=1e-8",
            "eval_every=960",
            "fsdp_port=null",
            "assert_sft_step=false",
        ]
    )
    assert run.weighting.adaptive_step_size and run.weighting.step_factor == 0.5
    assert type(run.stopping).__name__ == "Plateau" and run.stopping.min_lr == 1e-8


def test_older_keys_with_another_neutral_value_or_form():
    plain = ["loss=gr_dpo", "loss.beta=0.1", "assert_sft_step=false"]
    assert compose([*plain, "use_ref=true", "exp_group=mine"]).config.wandb.tags == ["mine"]
    assert "loss=base evaluates without a reference" in told(*plain, "use_ref=false")
    equal = compose([*plain, "loss.importance_sampling=true", "loss.dpowts=true"]).weighting
    assert type(equal).__name__ == "ImportanceWeighted" and equal.imp_weights is None
    assert "loss.importance_sampling=true" in told(*plain, "loss.dpowts=true")


def test_the_documentation_lists_every_older_key():
    text = (ROOT / "docs" / "keys.md").read_text("utf-8")
    words = {
        re.sub(r"^(loss|model|wandb|stopping)?\.", "", word) for word in re.findall(r"`([^`= ]+)[^`]*`", text)
    }
    for theirs, ours in {**aliases.RENAMED, **aliases.RETIRED}.items():
        assert {theirs, theirs.rpartition(".")[2]} & words, theirs
        assert theirs in aliases.RETIRED or {ours, ours.rpartition(".")[2]} & words, ours


def test_a_neutral_value_of_an_older_key_turns_off_what_a_preset_turned_on():
    robust = ["experiment=group_robust_goqa_gr_ipo", "model.archive=X"]
    assert compose(robust).weighting.adaptive_step_size
    run = compose([*robust, "loss.adaptive_step_size=false", "loss.step_size=0", "patience_factor=null"])
    assert not run.weighting.adaptive_step_size and run.weighting.step_size == 0
    assert run.stopping.patience_factor is None
    plain = ["loss=ipo", "loss.beta=0.1", "assert_sft_step=false"]
    for word in (
        "loss.step_size=0",
        "loss.adaptive_step_size=false",
        "patience_factor=0",
        "loss.imp_weights=false",
    ):
        assert type(compose([*plain, word]).weighting).__name__ == "Uniform"
    assert type(compose([*plain, "loss.label_smoothing=0"]).loss).__name__ == "IPO"
    with pytest.raises(UserError, match="label_smoothing"):
        compose([*plain, "loss.label_smoothing=0.1"])
    with pytest.raises(UserError, match="step_size"):
        compose([*plain, "loss.step_size=0.1"])


def test_an_experiment_s_keys_leave_with_their_part_and_typed_ones_are_refused():
    words = ["experiment=group_robust_goqa_gr_ipo", "model.archive=X"]
    assert type(compose([*words, "stopping=none", "weighting=uniform"]).weighting).__name__ == "Uniform"
    with pytest.raises(UserError, match="step_size"):
        compose([*words, "weighting=uniform", "weighting.step_size=0.1"])
    with pytest.raises(UserError, match="min_lr"):
        compose([*words, "stopping=none", "stopping.min_lr=1e-6"])
    swept = [*words, "weighting=uniform", "weighting.step_size=0.1", "multirun_keys=[weighting]"]
    assert type(compose(swept).weighting).__name__ == "Uniform"


def test_an_experiment_s_data_settings_leave_with_its_data():
    words = ["experiment=group_robust_goqa_sft", "datasets=[opinions,goqa_1]"]
    assert {"opinions", "goqa_1"} < set(compose(words).plain["data"]) and "goqa" not in compose(words).plain[
        "data"
    ]
    assert "unknown key data.goqa" in told(*words, "data.goqa.mode=ranked")


def test_gnu_style_flags_become_overrides():
    assert prepare(["--model.archive", "X", "--lr", "1", "--multirun"]) == [
        "--multirun",
        "++model.archive=X",
        "++lr=1",
    ]
    assert prepare(["--model_archive=Y", "--model", "tiny"]) == ["++model.archive=Y", "model=tiny"]


def test_the_last_word_on_a_key_counts():
    assert prepare(["model=gemma-2b", "lr=1", "model=tiny", "lr=2"]) == ["model=tiny", "++lr=2"]


def test_a_multirun_names_its_directories_with_the_seed_last():
    words = prepare(["-m", "seed=0,1", "loss=sft,ipo"])
    assert "++multirun_keys=[seed,loss]" in words
    run = compose(["multirun_keys=[seed,loss]", "seed=1", "exp_name=e"])
    assert run.config.run_dir == "runs/e/loss=sft/seed=1"


def test_code_outside_the_losses_cannot_be_named():
    assert "must be a class of losses" in told("loss.class=os.system")


def test_runs_that_differ_in_seed_alone_share_a_group():
    a, b, c = compose(["seed=1"]), compose(["seed=2"]), compose(["lr=0.5"])
    assert a.config_hash != b.config_hash and a.config_hash_no_seed == b.config_hash_no_seed
    assert a.config_hash_no_seed != c.config_hash_no_seed


def test_where_a_run_is_written_does_not_change_what_it_is():
    assert compose(["exp_name=a"]).config_hash == compose(["exp_name=b", "run_root=elsewhere"]).config_hash


@pytest.mark.parametrize(
    "path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIG_DIR))
)
def test_every_key_of_every_config_file_has_a_comment(path):
    """A comment on the key's line, or on the lines above it (which may serve several keys)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    exempt = ("name:", "defaults:", "hydra:", "class:", "source:", "- ")
    for number, line in enumerate(lines):
        text = line.strip()
        if (
            not text
            or text.startswith(("#", *exempt))
            or (line.startswith("  ") and path.name != "config.yaml")
        ):
            continue
        if path.parent.name in ("trainer", "loss", "experiment") and "@package _global_" in lines[0]:
            continue
        if path.name == "config.yaml" and number > next(
            i for i, t in enumerate(lines) if t.startswith("hydra:")
        ):
            continue
        above = lines[number - 1].strip() if number else ""
        commented = "#" in text or above.startswith("#")
        if line.startswith("  "):  # a key of a commented block
            block = next(t for t in reversed(lines[:number]) if t and not t.startswith(" "))
            commented = commented or "#" in block
        assert commented, f"{path.name}:{number + 1}: {text}"


def _config_attributes() -> set[str]:
    """Names read as attributes anywhere in the program."""
    names = set()
    for path in [
        ROOT / "assembly.py",
        ROOT / "run_data.py",
        ROOT / "run_models.py",
        ROOT / "trainers.py",
        ROOT / "train.py",
        *(ROOT / "config").glob("*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif path.name == "schema.py" and isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def test_every_key_of_the_top_level_is_read():
    read = _config_attributes() | {
        "run_root",
        "multirun_keys",
        "cache_dir",
    }  # these are read while composing: they name run_dir and the caches
    unread = [name for cls in (Config, DataConfig) for name in cls.__dataclass_fields__ if name not in read]
    assert not unread


def test_the_schema_and_the_yaml_have_the_same_keys():
    saved = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text(encoding="utf-8"))
    saved = {k for k in saved if k not in ("defaults", "hydra")} | {"trainer"}
    assert saved == set(Config.__dataclass_fields__)


@pytest.mark.parametrize("name", [p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml")])
def test_every_experiment_composes(name):
    compose([f"experiment={name}", "assert_sft_step=false"])


@pytest.mark.parametrize("name", options("model"))
def test_every_model_composes(name):
    extra = ["model.name_or_path=x"] if name == "blank_model" else []
    compose([f"model={name}", *extra])


@pytest.mark.parametrize("name", options("trainer"))
def test_every_trainer_preset_composes(name):
    assert compose([f"trainer={name}"]).config.trainer.name == name


def test_build_converts_and_refuses():
    @dataclass(frozen=True)
    class Settings:
        rate: float
        names: list[str]
        limit: int | None = None

    assert build(Settings, {"rate": 1, "names": ["a"], "limit": None}, "x.") == Settings(1.0, ["a"])
    with pytest.raises(UserError, match=r"x\.rate=True: must be a number"):
        build(Settings, {"rate": True, "names": []}, "x.")
    with pytest.raises(UserError, match=r"x\.names=a: must be a list"):
        build(Settings, {"rate": 1, "names": "a"}, "x.")


@pytest.mark.skipif(
    importlib.util.find_spec("submitit") is not None, reason="the launcher's package is installed"
)
@pytest.mark.parametrize("name", ["slurm", "submitit_local"])
def test_a_launcher_that_is_not_installed_says_what_to_install(name):
    with pytest.raises(UserError, match=f"hydra/launcher={name}: not installed; pip install hydra-submitit"):
        compose([f"hydra/launcher={name}"])
