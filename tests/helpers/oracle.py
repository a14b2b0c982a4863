"""An independent reading of an exported Hugging Face folder: float64 numpy, written from `routing.md` alone.

Nothing here comes from the product: no torch, no megadyn, no modelling file. Loops are written to be checked by
eye against the text, one sequence at a time, without batching, caches or padding; speed does not matter.

    oracle_logits(folder, tokens, mode="causal")        # [B, T, V] float64
    oracle_loss(folder, tokens, labels, mode="topk")    # mean next-token cross-entropy

Dims: T tokens, D hidden, H heads, K head size, V vocabulary. A sequence is a [T, D] array throughout.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]


# ---- files ---------------------------------------------------------------------------------------

NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_safetensors(path: Path) -> Weights:
    """Every tensor of a file, as float64. Format: u64 header length | JSON header | bytes."""
    raw = path.read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data_start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        flat = np.frombuffer(raw[data_start + first : data_start + last], dtype=NUMPY_TYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # bfloat16 is the upper half of a float32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = flat.reshape(entry["shape"]).astype(np.float64)
    return tensors


def read_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """`config.json` and all weights, whether in one file or in shards that an index lists."""
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    weights: Weights = {}
    for shard in shards:
        weights.update(read_safetensors(folder / shard))
    return config, weights


# ---- small functions -----------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def swiglu(x: Array, weights: Weights, prefix: str) -> Array:
    """W2( SiLU(W1 x) * (W3 x) ): W1 is `gate_proj`, W3 `up_proj`, W2 `down_proj`."""
    a = x @ weights[f"{prefix}.gate_proj.weight"].T
    b = x @ weights[f"{prefix}.up_proj.weight"].T
    return (silu(a) * b) @ weights[f"{prefix}.down_proj.weight"].T


def rotate(x: Array, position: int, frequencies: list[float], scale: float) -> Array:
    """RoPE on one head's vector [K]: dimension i turns with dimension i + K/2 (the convention of Qwen2's weights)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * frequencies[i]
        out[i] = scale * (x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
        out[i + half] = scale * (x[i + half] * math.cos(angle) + x[i] * math.sin(angle))
    return out


def pair_frequencies(config: dict[str, Any], size: int, length: int) -> list[float]:
    """Radians per position of each pair of a head of `size` dimensions, for a sequence of `length` tokens."""
    rope = config.get("rope_parameters") or config
    kind, theta, factor = rope.get("rope_type", "default"), rope["rope_theta"], rope.get("factor", 1)
    found = []
    for i in range(size // 2):
        frequency = theta ** (-2 * i / size)
        if kind == "linear":
            frequency /= factor
        elif kind == "dynamic":  # NTK: a larger base, only for what is longer than the original context
            original = config["max_position_embeddings"]
            if length > original:
                longer = theta * (factor * length / original - factor + 1) ** (size / (size - 2))
                frequency = longer ** (-2 * i / size)
        elif kind == "llama3":
            turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if turns < low:
                frequency /= factor
            elif turns <= high:
                smooth = (turns - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        elif kind == "yarn":
            original = rope["original_max_position_embeddings"]
            first, last = (  # the pairs that turn beta_fast and beta_slow times in the original context
                size * math.log(original / (2 * math.pi * rope[beta])) / (2 * math.log(theta))
                for beta in ("beta_fast", "beta_slow")
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
            ramp = min(max((i - first) / (last - first if last != first else 0.001), 0), 1)
            frequency = ramp * frequency / factor + (1 - ramp) * frequency
        elif kind != "default":
            raise ValueError(f"the oracle does not read rope_type {kind!r}")
        found.append(frequency)
    return found


# ---- one transformer layer -----------------------------------------------------------------------


class Reader:
    """The model of one folder, run on one sequence at a time."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.config, self.weights = read_folder(Path(folder))
        self.routing = self.config["routing"]
        self.mode = mode
        self.eps = self.config["rms_norm_eps"]
        self.normalization = self.config["normalization"]
        self.num_heads = self.config["num_attention_heads"]
        self.num_kv_heads = self.config["num_key_value_heads"]
        self.head_size = self.config.get("head_dim") or self.config["hidden_size"] // self.num_heads
        self.rope = self.config.get("rope_parameters") or self.config
        self.frequencies: list[float] = []

    def linear(self, x: Array, name: str) -> Array:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def heads(self, x: Array, which: str, prefix: str) -> Array:
        """q, k or v [T, H, K] of the rows of `x`, before RoPE; normalised over the head by hybridnorm, q and k by qk_norm."""
        y = self.linear(x, f"{prefix}.self_attn.{which}_proj")
        y = y.reshape(len(x), y.shape[-1] // self.head_size, self.head_size)
        is_normed = self.normalization == "hybridnorm" or (
            which in "qk" and self.config.get("qk_norm", False)
        )
        return self.norm(y, f"{prefix}.self_attn.{which}_norm") if is_normed else y

    def turned(self, x: Array, position: int, prefix: str) -> Array:
        """One head's vector, turned to its position unless the layer has none."""
        turns = self.config.get("no_rope_layers")
        if turns and not turns[int(prefix.rpartition(".")[2])]:
            return x
        return rotate(x, position, self.frequencies, self.rope.get("attention_factor", 1))

    def window(self, prefix: str) -> float:
        """How many positions a token of the layer sees, its own included."""
        window, layers = self.config.get("sliding_window"), self.config.get("sliding_layers")
        if window is None or (layers and not layers[int(prefix.rpartition(".")[2])]):
            return math.inf
        return window

    def attention(self, x: Array, positions: list[int], prefix: str) -> Array:
        """Causal grouped-query attention among the rows of `x`, which keep their original `positions`."""
        count, size = len(x), self.head_size
        q, k, v = (self.heads(x, which, prefix) for which in "qkv")
        heads_per_kv = self.num_heads // self.num_kv_heads
        out = np.zeros((count, self.num_heads, size))
        for head in range(self.num_heads):
            kv = head // heads_per_kv
            q_head = np.array([self.turned(q[t, head], positions[t], prefix) for t in range(count)])
            k_head = np.array([self.turned(k[t, kv], positions[t], prefix) for t in range(count)])
            for t in range(count):
                seen = [s for s in range(t + 1) if positions[t] - positions[s] < self.window(prefix)]
                scores = k_head[seen] @ q_head[t] / math.sqrt(size)
                share = np.exp(scores - scores.max())
                out[t, head] = share / share.sum() @ v[seen, kv]
        return self.linear(out.reshape(count, self.num_heads * size), f"{prefix}.self_attn.o_proj")

    def first_norm(self, h: Array, layer: int) -> Array:
        """What attention takes in: Norm1(h) in `pre`, Norm1(h) / sqrt(l) with l counted from 1 in `lns`, h in `hybridnorm`."""
        if self.normalization == "hybridnorm":
            return h
        x = self.norm(h, f"model.layers.{layer}.input_layernorm")
        return x / math.sqrt(layer + 1) if self.normalization == "lns" else x

    def second_half(self, u: Array, layer: int) -> Array:
        """u + MLP(Norm2(u)), or in `hybridnorm` Z + MLP(Z) with Z = Norm2(u)."""
        prefix = f"model.layers.{layer}"
        x = self.norm(u, f"{prefix}.post_attention_layernorm")
        if self.normalization == "hybridnorm":
            return x + swiglu(x, self.weights, f"{prefix}.mlp")
        if self.normalization == "lns":
            x = x / math.sqrt(layer + 1)
        return u + swiglu(x, self.weights, f"{prefix}.mlp")

    def block(self, h: Array, positions: list[int], layer: int) -> Array:
        """Block_l(h): what the dense layer adds to h."""
        u = h + self.attention(self.first_norm(h, layer), positions, f"model.layers.{layer}")
        return self.second_half(u, layer) - h

    # ---- choosing tokens -------------------------------------------------------------------------

    def chosen(self, scores: list[float], h: Array, layer: int) -> list[int]:
        """The tokens that routed layer `layer` processes, ascending; `h` [T, D] is its input."""
        if self.routing.get("router_type") == "token_choice":  # in both modes
            return [t for t in range(len(scores)) if scores[t] > 0]
        if self.mode == "topk" and self.routing.get("choose") != "threshold":
            count = max(1, math.floor(self.routing["capacity"] * len(scores)))
            best_first = sorted(range(len(scores)), key=lambda t: (-scores[t], t))
            return sorted(best_first[:count])
        rule, prefix = self.routing["causal"], f"model.layers.{layer}.causal_router"
        tokens = []
        for t in range(len(scores)):
            if rule == "threshold":
                taken = scores[t] >= self.weights[f"{prefix}.threshold"].item()
            elif rule == "predictor":
                inner = silu(self.weights[f"{prefix}.fc1.weight"] @ h[t])
                taken = sigmoid((self.weights[f"{prefix}.fc2.weight"] @ inner).item()) >= 0.5
            elif rule in ("bce", "sign"):
                taken = scores[t] > 0
            else:
                raise ValueError(f"the oracle does not read the causal rule {rule!r}")
            if taken:
                tokens.append(t)
        return tokens

    def skip_or_run(self, h: Array, scores: list[float], gates: list[float], layer: int) -> Array:
        """Layers of DTF and MoD: chosen tokens get `gate * Block(h)`, the rest pass unchanged."""
        tokens = self.chosen(scores, h, layer)
        out = h.copy()
        if tokens:
            delta = self.block(h[tokens], tokens, layer)
            for row, t in enumerate(tokens):
                out[t] = h[t] + gates[t] * delta[row]
        return out

    # ---- DTF -------------------------------------------------------------------------------------

    def decide(self, h: Array, layer: int) -> tuple[Array, list[float]]:
        """Decision layer: (post [T, D], r of every token)."""
        prefix = f"model.layers.{layer}"
        post = h + self.block(h, list(range(len(h))), layer)
        prior = h + swiglu(self.norm(h, f"{prefix}.prior.norm"), self.weights, f"{prefix}.prior")
        return post, self.surprises(h, post, prior, prefix)

    def surprises(self, h: Array, post: Array, prior: Array, prefix: str) -> list[float]:
        """r of every token."""
        beta_ce = self.weights[f"{prefix}.router.beta_ce"].item()
        beta_cu = self.weights[f"{prefix}.router.beta_cu"].item()
        lambda_ce = self.weights[f"{prefix}.router.ce_log_offset"].item()
        m_cu = self.weights[f"{prefix}.router.cu_multiplier"].item()
        window = self.routing["ma_window"]

        d_st = [float(np.mean((post[t] - h[t]) ** 2)) for t in range(len(h))]
        d_ch = [float(np.mean((post[t] - prior[t]) ** 2)) for t in range(len(h))]
        scores = []
        for t in range(len(h)):
            last = [d_st[max(s, 0)] for s in range(t - window + 1, t + 1)]  # before the start: D_st[0]
            moving_average = sum(last) / window
            unit = moving_average if self.routing.get("scale_free") else 1.0
            ce = (d_st[t] - d_ch[t]) / unit + lambda_ce
            cu = (d_st[t] - m_cu * moving_average) / unit
            scores.append(softplus(softplus(beta_ce) * ce) + softplus(softplus(beta_cu) * cu))
        return scores

    def gates(self, scores: list[float]) -> list[float]:
        """What multiplies each token's update in a Dynamic layer."""
        gates, window = [1 - math.exp(-r) for r in scores], self.routing["ma_window"]
        if not self.routing.get("relative_gate"):
            return gates
        return [
            gates[t] / (sum(gates[max(s, 0)] for s in range(t - window + 1, t + 1)) / window)
            for t in range(len(gates))
        ]

    # ---- STT -------------------------------------------------------------------------------------

    def subjective(self, h: Array, layer: int) -> Array:
        """The prediction of a token is made from what the layer made of the token before, among those that it sees."""
        prefix = f"model.layers.{layer}"
        seen = list(range(len(h))) if self.mode == "topk" else self.chosen([0.0] * len(h), h, layer)
        out = h.copy()
        if not seen:
            return out
        post = h[seen] + self.block(h[seen], seen, layer)
        before = np.concatenate([np.zeros_like(post[:1]), post[:-1]])
        predicted = h[seen] + swiglu(
            self.norm(before, f"{prefix}.prior.norm"), self.weights, f"{prefix}.prior"
        )
        scores = self.surprises(h[seen], post, predicted, prefix)
        kept = self.chosen(scores, h, layer) if self.mode == "topk" else range(len(seen))
        for row in kept:
            out[seen[row]] = h[seen[row]] + (1 - math.exp(-scores[row])) * (post[row] - h[seen[row]])
        return out

    # ---- MoD -------------------------------------------------------------------------------------

    def mixture_of_depths(self, h: Array, layer: int) -> Array:
        w = self.weights[f"model.layers.{layer}.router.weight"][0]
        r = [float(w @ h[t]) for t in range(len(h))]
        gates = [sigmoid(x) for x in r] if self.routing["gate"] == "sigmoid" else r
        return self.skip_or_run(h, r, gates, layer)

    # ---- fixed -----------------------------------------------------------------------------------

    def by_position(self, count: int, layer: int) -> list[float]:
        """A score above 0 where a token is taken: by a hash of (seed, layer, position), or evenly spread."""
        capacity, scores = self.routing["capacity"], []
        for t in range(count):
            if self.routing["score"] == "stride":
                taken = math.floor((t + 1) * capacity) > math.floor(t * capacity)
                scores.append(taken - (t + 1) * capacity % 1)
                continue
            state = 0
            for part in (self.routing["seed"], layer, 0, 0, t):
                state = ((state ^ part) + 0x9E3779B9) % 2**32
                for _ in range(2):
                    state = (state ^ state >> 16) * 0x45D9F3B % 2**32
                state ^= state >> 16
            scores.append(capacity - state / 2**32)
        return scores

    # ---- DTRNet ----------------------------------------------------------------------------------

    def attend_or_bypass(self, h: Array, layer: int) -> Array:
        prefix = f"model.layers.{layer}"
        p, leads = [], []  # (attend, bypass), and the difference of their logits
        for t in range(len(h)):
            z = self.linear(silu(self.linear(h[t], f"{prefix}.router.fc1")), f"{prefix}.router.fc2")
            leads.append(float(z[0] - z[1]))
            p.append((sigmoid(leads[-1]), sigmoid(-leads[-1])))
        by_probability = self.mode == "causal" and self.routing.get("score", "probability") == "probability"
        is_expert = self.routing.get("router_type") == "expert_choice"
        attending = self.chosen(
            [attend for attend, _ in p] if is_expert and by_probability else leads, h, layer
        )

        x = self.first_norm(h, layer)
        a = np.zeros_like(h)
        if attending:
            attended = self.attention(x[attending], attending, prefix)
            for row, t in enumerate(attending):
                a[t] = p[t][0] * attended[row]
        for t in range(len(h)):
            if t not in attending:
                v = self.heads(x[t : t + 1], "v", prefix)[0]  # [kv heads, K]
                heads_per_kv = self.num_heads // self.num_kv_heads
                repeated = np.concatenate([v[head // heads_per_kv] for head in range(self.num_heads)])
                a[t] = p[t][1] * self.linear(repeated, f"{prefix}.self_attn.o_proj")
        return self.second_half(h + a, layer)

    # ---- Dynamic Nested Depth --------------------------------------------------------------------

    def nested(self, h: Array, layer: int) -> Array:
        """h' = Layer(h); tokens whose p = sigmoid(w h') reaches tau: h'' = (1 - p) h' + p Layer(h'), among themselves."""
        h = h + self.block(h, list(range(len(h))), layer)
        w = self.weights[f"model.layers.{layer}.router.weight"][0]
        tau = self.weights[f"model.layers.{layer}.causal_router.threshold"].item()
        p = [sigmoid(float(w @ h[t])) for t in range(len(h))]
        tokens = [t for t in range(len(h)) if p[t] >= tau]
        out = h.copy()
        if tokens:
            delta = self.block(h[tokens], tokens, layer)
            for row, t in enumerate(tokens):
                out[t] = (1 - p[t]) * h[t] + p[t] * (h[t] + delta[row])
        return out

    # ---- SkipGPT ---------------------------------------------------------------------------------

    def keeps(self, h: Array, layer: int, half: str) -> list[int]:
        """Tokens whose router prefers to keep this half: logits W2 ReLU(W1 h + b1) + b2 of (keep, skip)."""
        prefix, tokens = f"model.layers.{layer}.router.{half}", []
        for t in range(len(h)):
            keep, skip = self.linear(np.maximum(self.linear(h[t], f"{prefix}.fc1"), 0), f"{prefix}.fc2")
            if keep > skip:
                tokens.append(t)
        return tokens

    def skip_halves(self, h: Array, layer: int) -> Array:
        attending, feeding = self.keeps(h, layer, "attn"), self.keeps(h, layer, "mlp")
        u = h.copy()
        if attending:
            u[attending] += self.attention(
                self.first_norm(h[attending], layer), attending, f"model.layers.{layer}"
            )
        out = u.copy()
        if feeding:
            out[feeding] = self.second_half(u[feeding], layer)
        return out

    # ---- skipping the middle ---------------------------------------------------------------------

    def mirrored(self, h: Array, layer: int, sums: list[list[float]]) -> Array:
        """h + g Block(h) for tokens with m < 1, g = 1 - m; `sums` holds each token's m of the layers so far of the first half,
        which those of the second half use up, last to first."""
        if layer < self.config["num_hidden_layers"] // 2:
            before = sums[-1] if sums else [0.0] * len(h)
            steps = [self.linear(token, f"model.layers.{layer}.router").item() for token in h]
            sums.append([before[t] + max(0.0, steps[t]) for t in range(len(h))])
            m = sums[-1]
        else:
            m = sums.pop()
        tokens = [t for t in range(len(h)) if m[t] < 1]
        out = h.copy()
        if tokens:
            delta = self.block(h[tokens], tokens, layer)
            for row, t in enumerate(tokens):
                out[t] = h[t] + (1 - m[t]) * delta[row]
        return out

    # ---- the whole -------------------------------------------------------------------------------

    def logits(self, tokens: list[int]) -> Array:
        """[T, V]"""
        self.frequencies = pair_frequencies(self.config, self.head_size, len(tokens))
        h = self.weights["model.embed_tokens.weight"][tokens]
        scores: list[float] = []
        sums: list[list[float]] = []
        for layer, kind in enumerate(self.config["routed_layer_types"]):
            if kind == "dense":
                h = h + self.block(h, list(range(len(h))), layer)
            elif kind == "dtf_decision":
                h, scores = self.decide(h, layer)
            elif kind == "dtf_dynamic":
                h = self.skip_or_run(h, scores, self.gates(scores), layer)
            elif kind == "mod":
                h = self.mixture_of_depths(h, layer)
            elif kind == "stt":
                h = self.subjective(h, layer)
            elif kind == "fixed":
                h = self.skip_or_run(h, self.by_position(len(h), layer), [1.0] * len(h), layer)
            elif kind == "dtrnet":
                h = self.attend_or_bypass(h, layer)
            elif kind == "nested":
                h = self.nested(h, layer)
            elif kind == "subskip":
                h = self.skip_halves(h, layer)
            elif kind in ("skip_middle_out", "skip_middle_back"):
                h = self.mirrored(h, layer, sums)
            else:
                raise ValueError(f"layer {layer}: the oracle does not read the kind {kind!r}")
        h = self.norm(h, "model.norm")
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        logits = h @ self.weights[head].T
        cap = self.config.get("final_logit_softcapping")
        return logits if cap is None else cap * np.tanh(logits / cap)


def oracle_logits(folder: str | Path, tokens: NDArray[np.integer], mode: str = "causal") -> Array:
    """Logits [B, T, V] of token ids [B, T]; `mode` is `topk` or `causal`."""
    if mode not in ("topk", "causal"):
        raise ValueError(f"mode = {mode!r}: must be topk or causal")
    reader = Reader(Path(folder), mode)
    return np.stack([reader.logits([int(token) for token in row]) for row in tokens])


def oracle_loss(
    folder: str | Path, tokens: NDArray[np.integer], labels: NDArray[np.integer], mode: str = "causal"
) -> float:
    """Mean cross-entropy of `labels` [B, T], already shifted (labels[t] = tokens[t + 1]); negative labels do not count."""
    logits = oracle_logits(folder, tokens, mode)
    losses = []
    for row in range(len(labels)):
        for t in range(len(labels[row])):
            label = int(labels[row][t])
            if label >= 0:
                top = logits[row, t].max()
                log_sum = top + math.log(np.exp(logits[row, t] - top).sum())
                losses.append(log_sum - logits[row, t, label])
    return sum(losses) / len(losses)
