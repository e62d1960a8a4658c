"""A user's training script: a small model on tokens with a pattern, a learning rate and ratios from the command line."""

import argparse
import json

import torch
import torch.nn.functional as F

from blockwise_lr import BlockwiseAdamW


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(256, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.mlp = torch.nn.ModuleDict(
            {"up_proj": torch.nn.Linear(16, 32, bias=False), "down_proj": torch.nn.Linear(32, 16, bias=False)}
        )
        self.lm_head = torch.nn.Linear(16, 256, bias=False)

    def forward(self, ids):
        hidden = self.embed_tokens(ids)
        return self.lm_head(self.norm(hidden + self.mlp["down_proj"](F.silu(self.mlp["up_proj"](hidden)))))


parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--ratios", type=json.loads)
parser.add_argument("--seed", type=int)
parser.add_argument("--fail", action="store_true")
args = parser.parse_args()
torch.manual_seed(args.seed)
torch.set_num_threads(1)
model = Model()
optimizer = BlockwiseAdamW(model.named_parameters(), lr=args.lr, block_lr_ratios=args.ratios, kernel="reference")
ids = torch.randint(0, 256, (8, 32))
for step in range(1, 9):
    loss = F.cross_entropy(model(ids).flatten(0, 1), ((3 * ids + 1) % 256).flatten())
    if args.fail:
        raise SystemExit("the disk is full")
    print(f"step {step}  tokens {step * 256}  loss {loss:.4f}", flush=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
