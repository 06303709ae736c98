"""The forward pass of model.py, faster: same parameters, outputs and gradients. Skip it at first.

train.py takes it unless --plain is given. Each trick, what it saves, and the per cent by which a
step takes longer without it (SmolLM2-135M, SST-2 rows, batch 32, bf16, a CPU; results/speed.md):

    FastAttention.attend   products and a softmax where keys are few: PyTorch's fused kernel is slow
                           there on a CPU, above all in the backward pass                  68 %
    FastRMSNorm            a shorter backward pass on a CPU: no gradient of the weight      7 %
    FastLlama.prompted     the prompt's tokens go through the same matrix products as the
                           text's: weights are read once, a GPU launches half the kernels   3 %
    Group                  padding is left out of all products (batches of 8 as train.py draws
                           them: filled up they have 1.5 times the tokens)        26 %
    FastMLP                silu(gate) is computed again in the backward pass and not kept:
                           no time, but a fifth less memory for a step of LLaMA-2-7B

A model that sets a field of Config that KNOWN_FIELDS lacks runs on the forward of model.py.
Letters as in model.py; n tokens are computed together, the prompt's p and those of all rows without
their padding.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Attention, Layer, Llama, rotate

# Up to so many, and for one query, products and a softmax beat PyTorch's fused attention on a CPU.
MAX_KEYS = 256

# Of these fields of Config this file knows what to do with every value.
KNOWN_FIELDS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling max_position_embeddings
    tie_word_embeddings bos_token_id eos_token_id model_type
    qkv_bias o_bias mlp_bias qk_norm norm_after windows uses_rope partial_rotary_factor
    embedding_multiplier attention_multiplier residual_multiplier logits_scaling
    stretched_positions
""".split()


def unknown_fields(config):
    """The fields that differ from their default and are unknown here; [] if this can run it."""
    names = []
    for field in fields(config):
        if field.name not in KNOWN_FIELDS and getattr(config, field.name) != field.default:
            names.append(field.name)
    return names


# ------------------------------------------------------------------------------------------- parts


class FrozenNorm(torch.autograd.Function):
    """RMSNorm whose weight gets no gradient.

    With r = 1 / rms(x) and h = g w, where g = dL/dy:  dL/dx = r (h - x r^2 mean(h x)), in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        d = x.shape[-1]
        x = x.float()
        h = g.float() * weight.float()  # (..., d), a new tensor: others may read g
        mean_xx = torch.linalg.vecdot(x, x)[..., None] / d  # (..., 1)
        mean_hx = torch.linalg.vecdot(h, x)[..., None] / d  # (..., 1)
        r = torch.rsqrt(mean_xx + ctx.eps)  # (..., 1)
        dx = h.addcmul_(x, mean_hx * r * r, value=-1).mul_(r)  # (..., d)
        return dx.to(g.dtype), None, None


class FastRMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.device.type == "cpu" and not self.weight.requires_grad:
            return FrozenNorm.apply(x, self.weight, self.eps)
        return super().forward(x)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(g * up, gate)
        d_up = F.silu(gate) * g
        return d_gate, d_up


class FastMLP(MLP):
    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


@dataclass(frozen=True)
class Group:
    """B rows of T tokens that see the first s of the prompt's tokens, and which of them are kept.

    kept (m,): the places, row by row, of those that are not padding. Padding is on the right.
    """

    B: int
    T: int
    s: int
    kept: torch.Tensor

    def padded(self, t):
        """t (m, ...) -> (B, T, ...), 0 where there is padding."""
        places = self.B * self.T
        if len(t) < places:
            t = t.new_zeros(places, *t.shape[1:]).index_copy(0, self.kept, t)
        return t.unflatten(0, (self.B, self.T))

    def unpadded(self, t):
        """t (B, T, ...) -> (m, ...)."""
        t = t.flatten(0, 1)
        return t.index_select(0, self.kept) if len(self.kept) < len(t) else t


class FastAttention(Attention):
    def __init__(self, config):
        super().__init__(config)
        if config.qk_norm == "head":
            self.q_norm = FastRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = FastRMSNorm(config.head_dim, config.rms_norm_eps)

    def attend(self, q, k, v, mask):
        """As in Attention; mask holds 0 where a query sees a key, else -inf."""
        B, H, T, c = q.shape
        B, G, S, c = k.shape
        group = H // G  # query heads that share keys and values
        if q.device.type == "cpu" and (S <= MAX_KEYS or T == 1):
            # A group's query heads are stacked along the queries, so k and v need no repeat.
            q = q.reshape(B, G, group * T, c)
            scores = q @ k.transpose(2, 3)  # (B, G, group T, S)
            scores = scores.view(B, H, T, S)
            scores = torch.add(mask, scores, alpha=self.scale or c**-0.5)
            weights = F.softmax(scores, dim=-1)  # (B, H, T, S)
            weights = weights.view(B, G, group * T, S)
            return (weights @ v).view(B, H, T, c)
        # No CUDA kernel of PyTorch takes both a mask and fewer key heads.
        k = k.repeat_interleave(group, dim=1)  # (B, H, S, c)
        v = v.repeat_interleave(group, dim=1)  # (B, H, S, c)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)

    def joint(self, x, cos, sin, masks, p, groups):
        """x (n, d), the prompt's p tokens once, then those of each Group -> (n, d).

        masks: of the prompt (1, 1, p, p), and of each group (1, 1, T, s + T).
        """
        c = self.head_dim
        q = self.q_proj(x).unflatten(-1, (-1, c))  # (n, H, c)
        k = self.k_proj(x).unflatten(-1, (-1, c))  # (n, G, c)
        v = self.v_proj(x).unflatten(-1, (-1, c))  # (n, G, c)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        prompt_q, *text_q = self.parts(q, p, groups)
        prompt_k, *text_k = self.parts(k, p, groups)
        prompt_v, *text_v = self.parts(v, p, groups)
        y = self.attend(prompt_q, prompt_k, prompt_v, masks[0])  # (1, H, p, c)
        outputs = [y[0].transpose(0, 1)]  # (p, H, c)
        for i, group in enumerate(groups):
            k = after_prompt(prompt_k, text_k[i], group.s)  # (B, G, s + T, c)
            v = after_prompt(prompt_v, text_v[i], group.s)  # (B, G, s + T, c)
            y = self.attend(text_q[i], k, v, masks[1 + i])  # (B, H, T, c)
            outputs.append(group.unpadded(y.transpose(1, 2)))  # (m, H, c)
        return self.o_proj(torch.cat(outputs).flatten(1))

    def parts(self, t, p, groups):
        """t (n, heads, c) -> the prompt's (1, heads, p, c), and each group's (B, heads, T, c)."""
        prompt, *texts = t.split([p, *(len(group.kept) for group in groups)])
        padded = [prompt[None], *(group.padded(text) for group, text in zip(groups, texts))]
        return [part.transpose(1, 2) for part in padded]


def after_prompt(prompt, text, s):
    """The first s of the prompt's keys or values (1, G, p, c), then each row's (B, G, T, c)."""
    before = prompt[:, :, :s]
    before = before.expand(len(text), -1, -1, -1)  # (B, G, s, c)
    return torch.cat([before, text], dim=2)  # (B, G, s + T, c)


class FastLayer(Layer):
    def __init__(self, config):
        super().__init__(config)
        for name, module in list(self.named_children()):
            if isinstance(module, nn.RMSNorm):
                setattr(self, name, FastRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.self_attn = FastAttention(config)
        self.mlp = FastMLP(config)

    def forward(self, x, cos, sin, mask, past=None, p=0, groups=None):
        """As Layer; with groups as FastAttention.joint, and only the output (n, d)."""
        if groups is None:
            return super().forward(x, cos, sin, mask, past)
        y = self.self_attn.joint(self.input_layernorm(x), cos, sin, mask, p, groups)
        return self.add(x, y)


# ------------------------------------------------------------------------------------------- model


class FastLlama(Llama):
    def __init__(self, config):
        super().__init__(config)
        layers = (FastLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = FastRMSNorm(config.hidden_size, config.rms_norm_eps)

    def mask(self, positions, key_positions, window):
        """As in Llama, but added to the scores: 0 where a query may look, else -inf."""
        is_visible = super().mask(positions, key_positions, window)
        zeros = torch.zeros(is_visible.shape, dtype=self.dtype, device=self.device)
        return zeros.masked_fill_(~is_visible, -math.inf)

    def prompted(self, tokens, phi=None, shared_ids=(), general=None, lengths=None):
        """As in Llama, with the prompt's tokens in the same matrix products as all texts'."""
        prompt = self.prompt_embeddings(phi, shared_ids)  # (1 or B, p, d)
        p = prompt.shape[1]
        if len(prompt) > 1 or p == 0:
            return super().prompted(tokens, phi, shared_ids, general)
        texts = [tokens if tokens.is_floating_point() else self.embed(tokens)]  # (B, T, d)
        seen = [p]
        if general is not None:
            texts.append(self.embed(general))  # (B', T', d)
            seen.append(len(phi))
        lengths = lengths or [None] * len(texts)
        groups = [make_group(text, s, n) for text, s, n in zip(texts, seen, lengths)]
        rows = [group.unpadded(text) for group, text in zip(groups, texts)]
        x = torch.cat([prompt[0], *rows])  # (n, d)
        x = x * self.config.embedding_multiplier
        of_prompt = torch.arange(p, device=self.device)[None]  # (1, p)
        of_groups = [torch.arange(g.s, g.s + g.T, device=self.device)[None] for g in groups]
        cos, sin = self.joint_rotary(of_prompt, of_groups, groups)
        angles = {True: (cos, sin), False: (None, None)}
        masks = {}
        for window in set(self.config.windows):
            masks[window] = [self.mask(of_prompt, of_prompt, window)]  # (1, 1, p, p)
            for positions, group in zip(of_groups, groups):
                keys = torch.cat([of_prompt[:, : group.s], positions], dim=1)  # (1, s + T)
                masks[window].append(self.mask(positions, keys, window))  # (1, 1, T, s + T)
        for i, layer in enumerate(self.layers):
            cos, sin = angles[self.config.uses_rope[i]]
            mask = masks[self.config.windows[i]]
            x = layer(x, cos, sin, mask, p=p, groups=groups)  # (n, d)
        parts = self.norm(x[p:]).split([len(group.kept) for group in groups])
        outputs = [group.padded(part) for group, part in zip(groups, parts)]  # (B, T, d) each
        return outputs[0] if general is None else tuple(outputs)

    def joint_rotary(self, of_prompt, of_groups, groups):
        """cos and sin of the prompt's and all groups' tokens one after the other, (n, 1, r/2)."""
        positions = [of_prompt]
        for of_group, group in zip(of_groups, groups):
            positions.append(of_group.repeat(1, group.B)[:, group.kept])
        cos, sin = self.rotary(torch.cat(positions, dim=1))  # (1, 1, n, r/2) each
        return cos[0].transpose(0, 1), sin[0].transpose(0, 1)


def make_group(text, s, lengths=None):
    """The Group of text (B, T, d), rows of so many tokens each (None: all T)."""
    B, T = text.shape[:2]
    is_kept = torch.arange(T) < torch.tensor(lengths or [T] * B)[:, None]  # (B, T)
    kept = is_kept.flatten().nonzero()[:, 0]
    return Group(B, T, s, kept.to(text.device))
