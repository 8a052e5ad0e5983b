# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated ViT against transformers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

from resnorm_ext.build.extension import extension
from resnorm_ext.engine import prepared
from resnorm_ext.integrations import accelerate, report, restore

vit = pytest.importorskip("transformers.models.vit.modeling_vit")
if not hasattr(vit, "ViTMLP"):
    pytest.skip("this release of transformers has a ViT of other modules", allow_module_level=True)


def build(head: str = "Model", **changes) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    image = {"image_size": 24, "patch_size": 8, "encoder_stride": 8}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}
    config = transformers.ViTConfig(**(sizes | image | quiet | changes))
    return getattr(transformers, f"ViT{head}")(config).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24)


def ways_of(caplog) -> set[str]:
    return {r.getMessage().partition(": ")[2] for r in caplog.records if r.getMessage().startswith("ViTLayer: ")}


@pytest.fixture
def debug(caplog):
    caplog.set_level("DEBUG", logger="resnorm_ext")
    return caplog


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}], ids=str
)
@torch.no_grad()
def test_inference(changes, implementation, debug):
    model = build(**changes)
    model.set_attn_implementation(implementation)
    accelerated = accelerate(copy.deepcopy(model))
    pixels = images()
    before = pixels.clone()
    expected, actual = model(pixels), accelerated(pixels)
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-5, atol=2e-5)
    assert ways_of(debug) == {"packed"}
    assert torch.equal(pixels, before)


@torch.no_grad()
def test_long_batches_go_in_chunks(monkeypatch):
    monkeypatch.setattr(extension, "MAX_ROWS", 25)  # two images of ten positions
    model = build()
    accelerated, pixels = accelerate(copy.deepcopy(model)), images(5)
    torch.testing.assert_close(accelerated(pixels)[0], model(pixels)[0], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_bfloat16(debug):
    model = build().bfloat16()
    accelerated = accelerate(copy.deepcopy(model))
    pixels = images().bfloat16()
    exact = copy.deepcopy(model).float()(pixels.float()).last_hidden_state
    errors = [(each(pixels).last_hidden_state.float() - exact).pow(2).mean().sqrt() for each in (model, accelerated)]
    assert errors[1] <= 1.1 * errors[0]
    assert ways_of(debug) == {"packed"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("head", ["ForImageClassification", "ForMaskedImageModeling"])
@torch.no_grad()
def test_heads(head, implementation, debug):
    model = build(head)
    model.set_attn_implementation(implementation)
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    name = "logits" if head == "ForImageClassification" else "reconstruction"
    torch.testing.assert_close(accelerated(pixels)[name], model(pixels)[name], rtol=2e-5, atol=2e-5)
    assert ways_of(debug) == {"packed"}


@pytest.mark.parametrize("head", ["Model", "ForImageClassification"])
@torch.no_grad()
def test_images_of_several_sizes(head, debug):
    model = build(head)
    accelerated = accelerate(copy.deepcopy(model))
    for height, width in ((24, 24), (32, 40), (8, 16), (24, 24)):
        pixels = torch.randn(2, 3, height, width)
        expected, actual = (each(pixels, interpolate_pos_encoding=True)[0] for each in (model, accelerated))
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    assert ways_of(debug) == {"packed"}
    with pytest.raises(ValueError, match="doesn't match model"):
        accelerated(torch.randn(2, 3, 32, 40))


@torch.no_grad()
def test_masked_patches(debug):
    model = build("ForMaskedImageModeling")
    model.vit.embeddings.mask_token.normal_()
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    masked = torch.rand(3, 9) < 0.4
    expected, actual = (each(pixels, bool_masked_pos=masked) for each in (model, accelerated))
    for name in ("loss", "reconstruction"):
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-5, atol=2e-5)
    assert (expected.reconstruction - model(pixels).reconstruction).abs().max() > 0.1
    assert ways_of(debug) == {"packed"}


@pytest.mark.parametrize("by", ["argument", "config"])
@torch.no_grad()
def test_hidden_states_and_attentions_of_a_head(by):
    flags = {"output_hidden_states": True, "output_attentions": True}
    model = build("ForImageClassification", attn_implementation="eager", **(flags if by == "config" else {}))
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    expected, actual = (each(pixels, **(flags if by == "argument" else {})) for each in (model, accelerated))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=2e-5, atol=2e-5)
    assert len(expected.hidden_states) == 4 and len(expected.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


class TwoLayers(vit.ViTModel):
    def forward(self, pixel_values, **kwargs):
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers[:2]:
            hidden_states = layer(hidden_states, None, **kwargs)
        return (hidden_states,)


@torch.no_grad()
def test_a_loop_over_fewer_layers(debug):
    model = TwoLayers(build().config).eval()
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    torch.testing.assert_close(accelerated(pixels)[0], model(pixels)[0], rtol=2e-5, atol=2e-5)
    assert ways_of(debug) == {"packed"}


@torch.no_grad()
def test_asking_for_hidden_states_leaves_no_trace(debug):
    """transformers collects them by hooks, which it leaves on the layers."""
    model = build()
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    accelerated(pixels, output_hidden_states=True)
    debug.clear()
    torch.testing.assert_close(accelerated(pixels)[0], model(pixels)[0], rtol=2e-5, atol=2e-5)
    assert ways_of(debug) == {"packed"}


def mask_patches(model, call) -> None:
    call["attention_mask"] = torch.tensor([[1] * 10, [1] * 9 + [0], [1] * 10])


def ask_for_hidden_states(model, call) -> None:
    call["output_hidden_states"] = True


def turn_grad_on(model, call) -> None:
    torch.set_grad_enabled(True)


def hook_linears(model, call) -> None:
    for layer in model.layers:
        layer.mlp.fc1.register_forward_hook(lambda *_: None)


def train(model, call) -> None:
    model.train()


OBSTACLES = {
    mask_patches: "attention_mask is given",
    ask_for_hidden_states: "hidden states or attention weights are asked for",
    turn_grad_on: "grad mode is on and attention.q_proj.weight requires grad: use torch.no_grad()",
    hook_linears: "the layer.mlp.fc1 has hooks, a forward or tensors of its own",
    train: "the layer is in training: dropout acts",
}


@pytest.mark.parametrize("change", OBSTACLES)
def test_what_asks_for_the_original_computation_gets_it(change, debug):
    model = build(hidden_dropout_prob=0.2)
    accelerated, call = accelerate(copy.deepcopy(model)), {"pixel_values": images()}
    with torch.no_grad():
        for each in (model, accelerated):
            change(each, call)
        torch.manual_seed(1)
        expected = model(**call)
        torch.manual_seed(1)
        actual = accelerated(**call)
    assert ways_of(debug) == {f"original, because {OBSTACLES[change]}"}
    if change is not train:  # whose random numbers are others
        torch.testing.assert_close(actual[0], expected[0], rtol=2e-5, atol=2e-5)
        for ours, theirs in zip(actual.hidden_states or (), expected.hidden_states or (), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_training():
    model = build("ForImageClassification", num_labels=2).train()
    accelerated = accelerate(copy.deepcopy(model))
    pixels, labels = images(), torch.tensor([0, 1, 1])
    for each in (model, accelerated):
        each(pixels, labels=labels).loss.backward()
    for (name, expected), actual in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_dropout_acts_at_its_rate():
    model = build(hidden_dropout_prob=0.25, num_hidden_layers=1).train()
    accelerated = accelerate(copy.deepcopy(model))
    pixels = images(1)
    with torch.no_grad():
        outputs = [torch.stack([each(pixels)[0] for _ in range(1000)]) for each in (model, accelerated)]
    for statistic in (torch.mean, torch.std):
        expected, actual = (statistic(output, 0) for output in outputs)
        assert (actual - expected).abs().mean() < 0.08 * outputs[0].std(0).mean()


def test_compiles_without_a_break():
    model = build()
    with torch.no_grad():
        compiled = torch.compile(accelerate(copy.deepcopy(model)), fullgraph=True)
        pixels = images()
        torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_all_layers_are_exported_as_one_operator():
    model, pixels = build(), images()
    program = torch.export.export(accelerate(copy.deepcopy(model)), (pixels,))
    assert [str(node.target) for node in program.graph.nodes].count("resnorm.encode.default") == 1
    torch.testing.assert_close(program.module()(pixels)[0], model(pixels)[0], rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_all_layers_run_in_one_call_and_one_by_itself(monkeypatch):
    model = build()
    accelerated, pixels = accelerate(copy.deepcopy(model)), images()
    calls, encode = [], prepared.encode

    def spy(tokens, cu_seqlens, layers, **options):
        calls.append(len(layers))
        return encode(tokens, cu_seqlens, layers, **options)

    monkeypatch.setattr(prepared, "encode", spy)
    accelerated(pixels)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(accelerated.layers[1](x), model.layers[1](x), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(accelerated.layers[0](x), model.layers[0](x), rtol=2e-5, atol=2e-5)
    assert calls == [3, 1, 1]


@torch.no_grad()
def test_what_is_replaced_survives_copies_and_pickles_and_is_put_back():
    model = build()
    kinds = [type(module) for module in model.modules()]
    accelerated = accelerate(copy.deepcopy(model))
    assert [item.original for item in report(accelerated).replaced].count(vit.ViTLayer) == 3
    assert report(accelerated).linear_backends.keys() and not report(accelerated).left_alone
    again = pickle.loads(pickle.dumps(accelerated))
    pixels = images()
    assert torch.equal(again(pixels)[0], accelerated(pixels)[0])
    assert again.state_dict().keys() == model.state_dict().keys()
    assert [type(module) for module in restore(again).modules()] == kinds
