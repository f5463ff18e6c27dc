"""Reference log-probs: live, with the adapter off, and cached on disk."""

from __future__ import annotations

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch

from config.compose import compose
from data.schema import Batch, Row
from engine.models import ModelSpec, build_policy, build_reference, load_tokenizer, save_model
from engine.parallel import World, full_tensor, shard
from engine.reference import (
    CHECK_TOLERANCE,
    AdapterOffReference,
    CachedReference,
    LiveReference,
    kernel_id,
    weights_hash,
)
from engine.scoring import Scorer
from losses.types import Scored
from run_models import RunModels
from tests.trainer_tools import make_model
from utils import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
ALONE = World(0, 1, torch.device("cpu"), "none")
PAIR = ("chosen", "rejected")


def make_spec(**changes) -> ModelSpec:
    base = {"name": "t", "lr": 1e-3, "config": LLAMA, "tokenizer_name_or_path": "assets/tokenizer"}
    return ModelSpec(**(base | {"policy_dtype": "float64", "reference_dtype": "float64"} | changes))


def policy(archive=None, **changes):
    return build_policy(make_spec(**changes), archive=archive and str(archive), seed=0, device="cpu")


def perturb(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def make_rows(count=12, seed=0, extra=False):
    """Rows that repeat prompts (two rows each) and sometimes responses; ``extra``: some have auxiliary responses too."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        own = np.random.default_rng(1000 * seed + i // 2)
        prompt = own.integers(0, 256, own.integers(1, 9)).astype(np.int32)
        shared = own.integers(0, 256, 3).astype(np.int32)
        responses = [shared, rng.integers(0, 256, rng.integers(1, 7)).astype(np.int32)]
        roles = list(PAIR)
        for _ in range(i % 3 if extra else 0):
            responses += [rng.integers(0, 256, 4).astype(np.int32) for _ in range(2)]
            roles += ["aux_1", "aux_2"]
        rows.append(Row(f"d/train:{i}", prompt, tuple(responses), tuple(roles), 0, prompt.tobytes().hex()))
    return rows


class Counting:
    """A scorer factory that counts how often it is asked and what it scores."""

    def __init__(self, scorer):
        self.scorer, self.made, self.responses, self.batches = scorer, 0, 0, []

    def __call__(self):
        self.made += 1
        return self.score

    def score(self, batch, roles, tokens=False):
        self.responses += len(batch.positions(roles))
        self.batches.append(batch)
        return self.scorer(batch, roles, tokens)


def test_values_of_slices_in_half_precision_are_kept_apart_and_checked_as_such(tmp_path):
    words = ["model=tiny", "loss=sft", "trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16"]
    run, scorer = compose(words), Scorer(make_model())
    worlds = {mode: World(0, 2, torch.device("cpu"), mode) for mode in ("none", "ddp", "fsdp")}
    kernels = {mode: RunModels(run, world, None, None).kernel(scorer) for mode, world in worlds.items()}
    assert kernels["none"] == kernels["ddp"] != kernels["fsdp"]
    for changes in ({"precision": "bf16"}, {"compile": True}):
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, **changes))
        assert RunModels(other, worlds["none"], None, None).kernel(scorer) not in kernels.values()
    facts = {"weights": "w", "dtype": torch.float32, "device": "cpu", "scorer_factory": lambda: None}
    limits = [CachedReference(tmp_path, kernel=kernels[mode], **facts)._limit for mode in ("ddp", "fsdp")]
    assert limits == [CHECK_TOLERANCE[torch.float32], CHECK_TOLERANCE[torch.bfloat16]]


def cache(folder, factory, **changes):
    arguments = {
        "weights": "w",
        "kernel": "shared_prefix/x",
        "dtype": torch.float64,
        "device": "cpu",
    } | changes
    return CachedReference(folder, scorer_factory=factory, **arguments)


def equal(a: Scored, b: Scored, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(a.logps, b.logps, **tolerance)
    assert a.logps.dtype == b.logps.dtype
    assert torch.equal(a.num_tokens, b.num_tokens)
    assert torch.equal(a.example, b.example)
    assert (a.roles, a.num_examples) == (b.roles, b.num_examples)
    if b.token_logps is not None:
        torch.testing.assert_close(a.token_logps, b.token_logps, **tolerance)


@pytest.fixture(scope="module")
def scorer():
    return Scorer(policy())


# ---------------------------------------------------------------------------------------------- live, adapter off


def test_the_live_reference_gives_the_policys_scores_without_gradient(scorer):
    batch = Batch.collate(make_rows())
    reference = LiveReference(Scorer(build_reference(make_spec(), device="cpu")))
    scored = reference(batch, PAIR)
    assert not scored.logps.requires_grad
    assert not reference.scorer.training
    equal(scored, scorer(batch, PAIR), rtol=0, atol=0)
    assert reference(batch, ("chosen",)).roles == ("chosen",) * 12
    assert reference(batch, PAIR, tokens=True).token_logps.shape == (int(scored.num_tokens.sum()),)


def test_with_the_adapter_off_a_trained_lora_policy_scores_as_it_did_at_the_start(scorer):
    batch = Batch.collate(make_rows())
    model = policy(use_lora=True)
    own = Scorer(model)
    reference = AdapterOffReference(own, model)
    perturb(model)
    assert not torch.allclose(own(batch, PAIR).logps, scorer(batch, PAIR).logps, atol=1e-3)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    scored = reference(batch, PAIR)
    equal(scored, scorer(batch, PAIR))
    assert not scored.logps.requires_grad
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert own(batch, PAIR).logps.requires_grad


def test_a_policy_that_continues_an_archived_adapter_has_that_adapter_as_its_reference(tmp_path, scorer):
    batch = Batch.collate(make_rows())
    save_model(perturb(policy(use_lora=True)), load_tokenizer(make_spec()), tmp_path)
    model = policy(tmp_path, use_lora=True)
    own = Scorer(model)
    start = own(batch, PAIR).logps.detach()
    perturb(model)
    reference = AdapterOffReference(own, model)
    torch.testing.assert_close(reference(batch, PAIR).logps, start, rtol=0, atol=1e-11)
    assert not torch.allclose(start, scorer(batch, PAIR).logps, atol=1e-3)
    assert not torch.allclose(own(batch, PAIR).logps, start, atol=1e-3)
    live = LiveReference(
        Scorer(build_reference(make_spec(use_lora=True), archive=str(tmp_path), device="cpu"))
    )
    torch.testing.assert_close(live(batch, PAIR).logps, start, rtol=0, atol=1e-11)


def test_the_reference_adapter_gets_no_gradient_and_the_policy_adapter_does(tmp_path):
    save_model(perturb(policy(use_lora=True)), load_tokenizer(make_spec()), tmp_path)
    model = policy(tmp_path, use_lora=True)
    own = Scorer(model)
    batch = Batch.collate(make_rows(4))
    reference = AdapterOffReference(own, model)(batch, PAIR)
    (own(batch, PAIR).logps - reference.logps).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all(".default." in n for n in with_gradient)


@pytest.fixture
def process_group():
    """One process that believes in ranks, so that parameters are sharded tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("archived", [False, True], ids=["fresh", "continued"])
def test_a_sharded_lora_policy_still_trains_after_its_reference_ran_first(archived, tmp_path, process_group):
    """Switching adapters flips requires_grad, which FSDP reads when it first gathers a parameter."""
    if archived:
        save_model(perturb(policy(use_lora=True)), load_tokenizer(make_spec()), tmp_path)
    batch, gradients = Batch.collate(make_rows(4)), []
    for sharded in (False, True):
        model = policy(tmp_path if archived else None, use_lora=True)
        own = Scorer(model)
        if sharded:
            shard(own, block_name=None, param_dtype=None)
        reference = AdapterOffReference(own, model)(batch, PAIR)
        (own(batch, PAIR).logps - reference.logps).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({n: full_tensor(g) for n, g in found.items()})
    assert len(gradients[0]) == 28
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-10)


# ---------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_cached_scores_equal_live_ones_for_any_batch_and_roles(layout, batch_tokens, tmp_path):
    own = Scorer(policy(), layout=layout)
    rows = make_rows(extra=True)
    made = Counting(own)
    roles = (*PAIR, "aux_1", "aux_2")
    reference = cache(tmp_path, made, kernel=kernel_id(own), tokens=True, batch_tokens=batch_tokens)
    reference.fill(rows, roles, world=ALONE)
    for chosen, some in (
        ([3, 0, 7], PAIR),
        (range(12), roles),
        ([2], ("aux_2",)),
        ([0], ("aux_1",)),
        ([5, 4], ("rejected",)),
    ):
        batch = Batch.collate([rows[i] for i in chosen])
        with torch.no_grad():
            equal(reference(batch, some, tokens=True), own(batch, some, tokens=True))
            equal(reference(batch, some), own(batch, some))


def test_every_different_response_is_scored_once_and_prompts_are_grouped(tmp_path, scorer):
    rows = make_rows()
    made = Counting(scorer)
    cache(tmp_path, made).fill(rows, PAIR, world=ALONE, check=0)
    distinct = {(r.prompt.tobytes(), a.tobytes()) for r in rows for a in r.responses}
    assert made.responses == len(distinct) == 18
    (batch,) = made.batches
    assert len(batch) == 6  # 12 rows, 6 prompts


def test_a_budget_cuts_batches_by_the_tokens_of_the_layout(tmp_path, scorer):
    rows = make_rows(40)
    for kernel in ("shared_prefix/x", "padded/x"):
        made = Counting(scorer)
        cache(tmp_path / kernel[:6], made, kernel=kernel, batch_tokens=50).fill(
            rows, PAIR, world=ALONE, check=0
        )
        for batch in made.batches:
            lengths = [len(r) for r in batch.responses]
            prompts = (
                [len(batch.prompts[e]) for e in batch.example]
                if "padded" in kernel
                else map(len, batch.prompts)
            )
            assert sum(lengths) + sum(prompts) <= 50
        assert len(made.batches) > 5


def test_a_second_run_loads_nothing_and_computes_nothing(tmp_path, scorer):
    rows = make_rows()
    cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE)
    made = Counting(scorer)
    again = cache(tmp_path, made)
    again.fill(rows[::-1], PAIR, world=ALONE, check=0)
    assert made.made == 0
    batch = Batch.collate(rows)
    with torch.no_grad():
        equal(again(batch, PAIR), scorer(batch, PAIR))
    # the same text under other roles and uids, in another order, is there too
    other = [dataclasses.replace(rows[1], uid="e/test:0", roles=("rejected", "chosen"))]
    assert (
        again(Batch.collate(other), ("chosen",)).logps.item() == again(batch, ("rejected",)).logps[1].item()
    )


def test_a_run_with_more_data_computes_only_what_is_new(tmp_path, scorer):
    rows = make_rows(20)
    cache(tmp_path, Counting(scorer)).fill(rows[:12], PAIR, world=ALONE, check=0)
    made = Counting(scorer)
    reference = cache(tmp_path, made)
    reference.fill(rows, PAIR, world=ALONE, check=0)
    assert made.responses == 12  # 4 more prompts with 3 responses each
    reference(Batch.collate(rows), PAIR)
    assert len(list(reference.folder.glob("*"))) == 2


@pytest.mark.parametrize(
    "change",
    [{"weights": "v"}, {"kernel": "padded/x"}, {"dtype": torch.float32}, {"tokens": True}],
    ids=lambda c: next(iter(c)),
)
def test_other_weights_kernels_dtypes_and_forms_do_not_share(change, tmp_path, scorer):
    rows = make_rows()
    cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE, check=0)
    made = Counting(scorer)
    cache(tmp_path, made, **change).fill(rows, PAIR, world=ALONE, check=0)
    assert made.made == 1


def test_a_row_that_is_not_there_is_an_error_with_its_uid(tmp_path, scorer):
    rows = make_rows(14)
    reference = cache(tmp_path, Counting(scorer))
    reference.fill(rows[:12], PAIR, world=ALONE)
    with pytest.raises(UserError, match=r"2 rows of the batch are not in it \(d/train:12, d/train:13\)"):
        reference(Batch.collate(rows[8:]), PAIR)
    with pytest.raises(ValueError, match="without per-token"):
        reference(Batch.collate(rows[:2]), PAIR, tokens=True)


def test_ids_are_the_key_so_moving_a_token_over_the_boundary_is_another_row(tmp_path, scorer):
    a, b = np.array([1, 2, 3]), np.array([4, 5])
    rows = [
        Row("r", a, (b,), ("target",), 0, "p"),
        Row("s", a[:2], (np.array([3, 4, 5]),), ("target",), 0, "q"),
    ]
    reference = cache(tmp_path, Counting(scorer))
    reference.fill(rows, ("target",), world=ALONE)
    batch = Batch.collate(rows)
    with torch.no_grad():
        equal(reference(batch, ("target",)), scorer(batch, ("target",)))


def test_the_check_finds_values_of_another_model(tmp_path, scorer):
    rows = make_rows()
    other = Scorer(perturb(policy()))
    cache(tmp_path, Counting(other)).fill(rows, PAIR, world=ALONE)
    with pytest.raises(UserError, match=r"d/train:\d+ is -.* when scored again .*delete this folder"):
        cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE, check=2)
    cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE, check=2, tolerance=100.0)
    cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE, check=0)


def test_the_check_allows_for_the_rounding_of_autocast(tmp_path, scorer):
    rows, off = make_rows(), {"value": 0.0}

    def score(batch, roles, tokens=False):
        scored = scorer(batch, roles, tokens)
        return dataclasses.replace(scored, logps=scored.logps + off["value"] * scored.num_tokens)

    for kernel, good, bad in (("padded/x", 1e-10, 1e-8), ("padded/x/bf16", 0.05, 0.2)):
        off["value"] = 0.0
        cache(tmp_path, lambda: score, kernel=kernel).fill(rows, PAIR, world=ALONE)
        off["value"] = good
        cache(tmp_path, lambda: score, kernel=kernel).fill(rows, PAIR, world=ALONE)
        off["value"] = bad
        with pytest.raises(UserError, match="when scored again"):
            cache(tmp_path, lambda: score, kernel=kernel).fill(rows, PAIR, world=ALONE)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_scored(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made a folder"):
        cache(tmp_path / "file", lambda: pytest.fail("scored")).fill(make_rows(), PAIR, world=ALONE)


def test_a_flipped_bit_or_a_cut_file_is_an_error_that_names_the_file(tmp_path, scorer):
    rows = make_rows()
    first = cache(tmp_path, Counting(scorer))
    first.fill(rows, PAIR, world=ALONE)
    (path,) = first.folder.iterdir()
    content = path.read_bytes()
    for damaged in (content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], content[:-3], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name}: damaged"):
            cache(tmp_path, Counting(scorer)).fill(rows, PAIR, world=ALONE)


def test_a_crash_while_writing_leaves_no_file(tmp_path, scorer, monkeypatch):
    rows = make_rows()
    reference = cache(tmp_path, Counting(scorer))

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("os.fsync", full)
        reference.fill(rows, PAIR, world=ALONE)
    assert not list(reference.folder.iterdir())
    again = cache(tmp_path, Counting(scorer))
    again.fill(rows, PAIR, world=ALONE)
    with torch.no_grad():
        equal(again(Batch.collate(rows), PAIR), scorer(Batch.collate(rows), PAIR))


def test_log_probs_that_are_not_finite_are_refused_with_the_uid(tmp_path):
    broken = policy()
    own = Scorer(broken)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite: d/train:"):
        cache(tmp_path, Counting(own)).fill(make_rows(), PAIR, world=ALONE)


def test_filling_leaves_the_global_generator_alone(tmp_path, scorer):
    before = torch.random.get_rng_state()
    cache(tmp_path, Counting(scorer)).fill(make_rows(), PAIR, world=ALONE)
    assert torch.equal(before, torch.random.get_rng_state())


def test_float32_caches_stay_float32_and_start_training_at_zero_margin(tmp_path):
    own = Scorer(policy(policy_dtype="float32"))
    rows = make_rows(40)
    reference = cache(tmp_path, Counting(own), dtype=torch.float32, kernel=kernel_id(own))
    reference.fill(rows, PAIR, world=ALONE)
    batch = Batch.collate(rows[:8])
    with torch.no_grad():
        equal(reference(batch, PAIR), own(batch, PAIR), rtol=0, atol=2e-5)
    assert reference(batch, PAIR).logps.dtype == torch.float32


def test_the_policy_itself_fills_the_cache_before_the_first_step(tmp_path):
    """No second model: a LoRA policy through AdapterOffReference gives what a separate reference gives."""
    model = policy(use_lora=True)
    own = Scorer(model)
    rows = make_rows()
    reference = cache(tmp_path, lambda: AdapterOffReference(own, model), weights=weights_hash(model))
    reference.fill(rows, PAIR, world=ALONE)
    # and the full-weight run of a sweep finds it
    plain = policy()
    made = Counting(Scorer(plain))
    shared = cache(tmp_path, made, weights=weights_hash(plain))
    shared.fill(rows, PAIR, world=ALONE, check=0)
    assert made.made == 0


def test_ranks_share_the_work_and_make_equally_many_calls(tmp_path, scorer):
    """Ranks in threads with a real barrier in each collective."""
    rows = make_rows(30)
    barrier, box = threading.Barrier(2), {}

    class Rank(World):
        def broadcast(self, value):
            if self.rank == 0:
                box["value"] = value
            barrier.wait(20)
            value = box["value"]
            barrier.wait(20)
            return value

        def gather(self, values):
            box[self.rank] = values
            barrier.wait(20)
            both = box[0] + box[1]
            barrier.wait(20)
            return both

    made = [
        Counting(Scorer(copy.deepcopy(scorer.model))) for _ in range(2)
    ]  # a Scorer reuses its buffers: one a thread
    references = [cache(tmp_path, made[r], batch_tokens=60) for r in range(2)]

    def run(rank):
        references[rank].fill(rows, PAIR, world=Rank(rank, 2, torch.device("cpu"), "ddp"), check=2)

    threads = [threading.Thread(target=run, args=(r,)) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made[0].batches) == len(made[1].batches) > 2
    assert made[0].responses + made[1].responses < 2 * 45 + 20  # not everything twice
    assert len(list(references[0].folder.iterdir())) == 1
    batch = Batch.collate(rows)
    with torch.no_grad():
        for reference in references:
            equal(reference(batch, PAIR), scorer(batch, PAIR))


# ---------------------------------------------------------------------------------------------- identity


def test_the_hash_does_not_see_how_the_scorer_computes(tmp_path):
    model = policy()
    before = weights_hash(model)
    own = Scorer(model)
    assert own.layout == "shared_prefix"
    assert weights_hash(model) == before
    assert kernel_id(own) != kernel_id(Scorer(policy(), layout="padded"))
    save_model(model, load_tokenizer(make_spec()), tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
