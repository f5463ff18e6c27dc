"""The names of metrics: which way is better, and what older programs of this family called them. Imports nothing.

A name is ``<split>/<metric>[/group_<name> | /worst_group | /mean_group][/ci_low | /ci_high]`` with split ``train``
(the training step), ``eval`` (the validation split), ``test`` or ``train_eval`` (training examples, evaluated).
"""

from __future__ import annotations

from collections.abc import Sequence

BOUNDS = ("ci_low", "ci_high")
SPLITS = ("train", "eval", "test", "train_eval")

# metric -> older name; {} is the split as those programs call it. Averages over groups get "average_" in front, the
# worst group "worst_case_", and group number i "_<i>" behind.
OLDER_EVALUATION = {
    "loss": "loss/{}",
    "rewards/chosen": "rewards_{}/chosen",
    "rewards/rejected": "rewards_{}/rejected",
    "rewards/margins": "rewards_{}/margins",
    "rewards/accuracies": "rewards_{}/accuracies",
    "logps/chosen": "logps_{}/chosen",
    "logps/rejected": "logps_{}/rejected",
    "policy_accuracies": "logps_pol_{}/accuracies",
    "reference_accuracies": "logps_ref_{}/accuracies",
}
# per group, of the training step; group number i again gets "_<i>" behind
OLDER_TRAINING_GROUP = {
    "rewards/accuracies": "rewards_train/group_acc",
    "loss": "rewards_train/group_loss",
    "group_counts": "rewards_train/group_count",
}
OLDER_WEIGHTS = "rewards_train/weights"
OLDER_COUNTERS = {"step": "counters/updates", "examples": "counters/examples"}
OLDER_SAMPLES = {"policy": "policy_samples", "reference": "reference_samples"}


def parts(name: str) -> tuple[str, str, str, str]:
    """(split, metric, group, bound), empty where there is none: ``eval/rewards/accuracies/group_a/b/ci_low`` ->
    ``("eval", "rewards/accuracies", "group_a/b", "ci_low")``."""
    words = name.split("/")
    split = words.pop(0) if words[0] in SPLITS else ""
    bound = words.pop() if words and words[-1] in BOUNDS else ""
    for i, word in enumerate(words):
        # a group's name may itself hold "/", or the word loss
        if i > 0 and (word.startswith("group_") or word in ("worst_group", "mean_group")):
            return split, "/".join(words[:i]), "/".join(words[i:]), bound
    return split, "/".join(words), "", bound


def base(name: str) -> str:
    """The metric without split, group and bound: ``eval/rewards/accuracies/group_a/b`` -> ``rewards/accuracies``."""
    return parts(name)[1]


def direction(name: str) -> str | None:
    """``"min"`` where less is better (losses), ``"max"`` where more is (accuracies, win rates), else None."""
    metric = base(name).rpartition("/")[2]
    if metric == "loss" or metric.endswith("_loss"):
        return "min"
    if metric in ("accuracy", "accuracies", "win_rate") or metric.endswith(
        ("_accuracy", "_accuracies", "_win_rate")
    ):
        return "max"
    return None


def older_names(groups: Sequence[str], *, validation: bool = True) -> dict[str, str]:
    """``{our name: older name}``, one to one, for a run with these groups (in the order of its data sets).

    ``validation``: the run has a validation split of its own. The older programs call that ``vald`` and the test
    split ``eval``; without one, what we write as ``eval`` is what they evaluate as ``eval``.
    """
    splits = {"eval": "vald", "test": "eval"} if validation else {"eval": "eval"}
    splits["train_eval"] = "train"
    names = dict(OLDER_COUNTERS)
    for ours, theirs in splits.items():
        for metric, pattern in OLDER_EVALUATION.items():
            older = pattern.format(theirs)
            if ours != "train_eval":  # pooled training metrics are those of the training step
                names[f"{ours}/{metric}"] = older
            names[f"{ours}/{metric}/worst_group"] = f"worst_case_{older}"
            names[f"{ours}/{metric}/mean_group"] = f"average_{older}"
            for i, group in enumerate(groups):
                names[f"{ours}/{metric}/group_{group}"] = f"{older}_{i}"
    for metric in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        names[f"train/{metric}"] = OLDER_EVALUATION[metric].format("train")
    for metric in ("logps/chosen", "logps/rejected"):
        names[f"train/{metric}"] = OLDER_EVALUATION[metric].format("train")
    for i, group in enumerate(groups):
        names[f"train/weights/{group}"] = f"{OLDER_WEIGHTS}_{i}"
        for metric, older in OLDER_TRAINING_GROUP.items():
            names[f"train/{metric}/group_{group}"] = f"{older}_{i}"
    return names


def our_names(groups: Sequence[str], *, validation: bool = True) -> dict[str, str]:
    """``{older name: our name}``: the inverse, for reading runs made by the older programs."""
    return {older: ours for ours, older in older_names(groups, validation=validation).items()}
