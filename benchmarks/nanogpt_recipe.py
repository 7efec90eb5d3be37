"""nanoGPT's recipe, with which bench.py compares the speed of train.py.

This is the model and the update of Karpathy's nanoGPT, without any code of ours: bfloat16 autocast and torch.compile of
the whole model (its defaults on a GPU), or float32 and eager (its train.py on a CPU with --compile=False). AdamW is as
in nanoGPT: fused on a GPU, PyTorch's loop over the parameters on a CPU. It computes whole logits, uses PyTorch's
attention, and has neither bias nor dropout.
"""

import contextlib
import math

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn_proj(y)
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT(nn.Module):
    """GPT-2 with tied embeddings. `forward` maps token ids and targets (B, T) to the mean cross-entropy in nats."""

    def __init__(self, n_layer: int, n_head: int, width: int, block_size: int, vocab_size: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.h = nn.ModuleList(Block(width, n_head) for _ in range(n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class Recipe:
    """A model and its AdamW optimizer."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, fast: bool, learning_rate: float = 6e-4) -> None:
        """`shape`: the arguments of PlainGPT. `fast`: use bfloat16 autocast and torch.compile."""
        self.model = PlainGPT(*shape).to(device)
        self.forward = torch.compile(self.model) if fast else self.model
        self.autocast = torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device.type == "cuda" or None  # as in nanoGPT: on a GPU only
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)

    def step(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Makes one update from micro-batches [(ids, targets)]. Returns the mean loss in nats."""
        total = 0.0
        for x, y in batches:
            with self.autocast:
                loss = self.forward(x, y) / len(batches)
            total += loss.item()
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total
