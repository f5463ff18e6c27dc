"""REINFORCE, PPO, reward-weighted regression and best-of-n with negatives, in plain float64 loops from the formulas."""

from __future__ import annotations

import math


def reinforce(logp, advantage, reference_logp=None, kl_coef=0.0):
    """-(A - kl_coef * log(pi / pi_ref)) * log pi, the bracket a constant."""
    penalty = kl_coef * (logp - reference_logp) if kl_coef else 0.0
    return -(advantage - penalty) * logp


def ppo(token_logps, old_token_logps, advantage, clip):
    """Sum over tokens of -min(A rho, A clip(rho))."""
    total = 0.0
    for new, old in zip(token_logps, old_token_logps, strict=True):
        rho = math.exp(new - old)
        bounded = min(max(rho, 1 - clip), 1 + clip)
        total -= min(advantage * rho, advantage * bounded)
    return total


def reward_weighted(logp, reward, temperature, max_weight=None):
    """-min(exp(r / tau), max_weight) * log pi."""
    weight = math.exp(reward / temperature)
    return -(weight if max_weight is None else min(weight, max_weight)) * logp


def best_of_n_negative(best, others, worse, coef, push, guard=0.0):
    """-log pi(y*) + coef * push over the others that are worse and not already rare."""
    total = 0.0
    for logp, is_worse in zip(others, worse, strict=True):
        if not is_worse or (guard > 0 and math.exp(logp - best) <= guard):
            continue
        total += -math.log(1 - math.exp(logp)) if push == "complement" else logp
    if push == "average":
        total /= len(others)
    return -best + coef * total


def transformer_token_logps(params, ids, layers, heads):
    """Log-prob of each id after the first, given the ids before it: GPT-2 blocks by explicit loops over positions.

    ``params``: name -> numpy array of one replicate; ``ids``: list of T + 1 ids.
    """
    import numpy as np

    def norm(x, gain, bias):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * gain + bias

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    stream = [params["tokens"][token] + params["positions"][t] for t, token in enumerate(ids[:-1])]
    width = len(stream[0])
    size = width // heads
    for layer in range(layers):
        get = lambda name, layer=layer: params[f"{layer}.{name}"]  # noqa: E731
        qkv = []
        for x in stream:
            y = norm(x, get("norm1.gain"), get("norm1.bias")) @ get("qkv.w") + get("qkv.b")
            qkv.append((y[:width], y[width : 2 * width], y[2 * width :]))
        mixed = []
        for t in range(len(stream)):
            out = np.zeros(width)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = [float(qkv[t][0][part] @ qkv[s][1][part]) / math.sqrt(size) for s in range(t + 1)]
                weights = [math.exp(s - max(scores)) for s in scores]
                out[part] = sum(w / sum(weights) * qkv[s][2][part] for s, w in enumerate(weights))
            mixed.append(out)
        for t, out in enumerate(mixed):
            stream[t] = stream[t] + out @ get("proj.w") + get("proj.b")
            hidden = gelu(norm(stream[t], get("norm2.gain"), get("norm2.bias")) @ get("up.w") + get("up.b"))
            stream[t] = stream[t] + hidden @ get("down.w") + get("down.b")
    logps = []
    for t, x in enumerate(stream):
        logits = norm(x, params["norm_gain"], params["norm_bias"]) @ params["head"]
        top = max(logits)
        logps.append(float(logits[ids[t + 1]]) - top - math.log(sum(math.exp(z - top) for z in logits)))
    return logps
