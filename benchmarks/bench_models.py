# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ViT-base and GPT-2, of random weights, in inference, as they come and accelerated: images, prompts
and tokens that follow.

python benchmarks/bench_models.py --output build/bench/models.jsonl
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import resnorm_ext

ORIGINAL = "Hugging Face"
LARGEST_ERROR = 1e-4
NEW_TOKENS = 32

Call = Callable[[nn.Module], Tensor]


def main() -> None:
    options = start(parser(__doc__).parse_args())
    results = Results(options.output, "models", environment(options))
    timer = CpuTimer(options.samples, seconds=30)
    torch.manual_seed(0)
    for name, model, calls in (
        ("ViT-base", ViTModel(ViTConfig()), _images()),
        ("GPT-2", GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)), _prompts()),
    ):
        models = {ORIGINAL: model.eval(), OURS: resnorm_ext.accelerate(copy.deepcopy(model).eval())}
        for what, call in calls.items():
            _compare(results, timer, {"operation": "encode", "model": name, "input": what}, models, call)


def _images() -> dict[str, Call]:
    return {f"images: {count}": partial(_last_hidden_state, torch.randn(count, 3, 224, 224)) for count in (1, 8)}


def _last_hidden_state(pixels: Tensor, model: nn.Module) -> Tensor:
    return model(pixels).last_hidden_state


def _prompts() -> dict[str, Call]:
    one, eight = (torch.randint(1, 50000, shape) for shape in ((1, 512), (8, 128)))
    return {
        "a prompt of 512": partial(_next_token, one),
        "8 prompts of 128": partial(_next_token, eight),
        f"{NEW_TOKENS} tokens after 32": partial(_generated, one[:, :32]),
    }


def _next_token(ids: Tensor, model: nn.Module) -> Tensor:
    return model(ids, logits_to_keep=1).logits


def _generated(ids: Tensor, model: nn.Module) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    )


@torch.inference_mode()
def _compare(results: Results, timer: CpuTimer, case: dict, models: dict[str, nn.Module], call: Call) -> None:
    output, expected = (call(models[contender]).float() for contender in (OURS, ORIGINAL))
    difference = (output - expected).abs().max().item()
    if not difference <= LARGEST_ERROR:
        raise ValueError(f"{case}: {OURS} differs by {difference:.2g} from {ORIGINAL}")
    measured = timer.measure({contender: partial(call, model) for contender, model in models.items()}, 0)
    for contender, measurement in measured.items():
        results.write(case, contender, **measurement.as_dict())
    ours, theirs = (measured[contender].seconds for contender in (OURS, ORIGINAL))
    print(f"{case['model']}, {case['input']}: {ours * 1e3:.1f} ms; {ORIGINAL} {theirs / ours:.2f}×", flush=True)


if __name__ == "__main__":
    sys.exit(main())
