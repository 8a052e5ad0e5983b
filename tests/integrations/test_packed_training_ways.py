# SPDX-License-Identifier: BSD-3-Clause
"""What training does around packed batches: checkpointing, autocast and half precision, optimizers, second derivatives,
hooks of autograd, threads, torch.compile."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .families import taken
from .packed_cases import (
    FAMILIES,
    LENGTHS,
    PACKED,
    TOKENS,
    assert_same_step,
    assert_trains_alike,
    batch_of,
    build,
    encoder_model,
    layers_of,
    loss_of,
    pair_of,
    sequence_loss,
    step,
)

close = torch.testing.assert_close


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def bytes_saved(function) -> int:
    """By autograd, while ``function`` runs: each memory once."""
    sizes = {}
    with saved_tensors_hooks(
        lambda tensor: sizes.update({tensor.data_ptr(): tensor.untyped_storage().nbytes()}) or tensor, lambda x: x
    ):
        result = function()
    assert result.requires_grad
    return sum(sizes.values())


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_gradients_are_the_originals(self, family, use_reentrant):
        pair, loss = pair_of(build(family)), sequence_loss()
        kept = bytes_saved(lambda: loss(pair[1]))
        pair[1].gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_trains_alike(pair, loss)
        assert bytes_saved(lambda: loss(pair[1])) < 0.7 * kept

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_frozen_embeddings(self, use_reentrant):
        pair = pair_of(build())
        for each in pair:
            encoder_model(each).embeddings.requires_grad_(False)
            each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_trains_alike(pair, sequence_loss())

    def test_one_layer_alone(self):
        pair = pair_of(build())
        pair[1].gradient_checkpointing_enable({"use_reentrant": False})
        layers_of(pair[1])[0].gradient_checkpointing = False
        assert_trains_alike(pair, sequence_loss())

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_of_the_whole_model(self, family, use_reentrant):
        pair = pair_of(build(family))
        mask, labels = batch_of()["attention_mask"], torch.tensor([0, 1, 0, 1])
        width = encoder_model(pair[0]).embeddings.word_embeddings.embedding_dim
        embeds = torch.randn(4, 9, width).requires_grad_()

        def loss(model):
            def run(embeds):
                return model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss

            return torch.utils.checkpoint.checkpoint(run, embeds, use_reentrant=use_reentrant)

        assert_trains_alike(pair, loss)


def errors(pair, losses) -> torch.Tensor:
    """By how much the loss, and all gradients together, of accelerated and original are off float64's, relatively."""
    exact_loss, exact = step(copy.deepcopy(pair[0]).double(), losses[1])
    scale = torch.cat([gradient.flatten() for gradient in exact.values()]).norm()
    rows = []
    for each in (pair[1], pair[0]):
        loss, gradients = step(each, losses[0])
        off = torch.cat([(gradients[name].double() - exact[name]).flatten() for name in exact])
        rows.append(torch.stack([(loss.double() - exact_loss).abs(), off.norm() / scale]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_accurate(dtype):
    total = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(12):
        pair, loss = pair_of(build().to(dtype)), sequence_loss()
        total += errors(pair, (loss, loss)).square()
        assert taken(pair[1]) == PACKED
    assert (total > 0.0).all() and (total[0].sqrt() <= 1.3 * total[1].sqrt()).all()


def test_autocast_is_as_accurate(family):
    total = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(8):
        pair, loss = pair_of(build(family)), sequence_loss()

        def autocast(model, loss=loss):
            with torch.autocast("cpu", torch.bfloat16):
                return loss(model)

        total += errors(pair, (autocast, loss)).square()
        assert taken(pair[1]) == PACKED
        assert all(parameter.grad.dtype == torch.float32 for parameter in pair[1].parameters())
    assert (total > 0.0).all() and (total[0].sqrt() <= 1.3 * total[1].sqrt()).all()


def test_autocast_to_float16_is_the_originals():
    def autocast(model):
        with torch.autocast("cpu", torch.float16):
            return loss(model)

    pair, loss = pair_of(build()), sequence_loss()
    step(pair[1], autocast)
    assert taken(pair[1]) == {("original", "autocast is to torch.float16")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_penalty_on_gradients(family, dtype):
    """The original's sdpa has no second derivative on a CPU."""
    loss = sequence_loss()

    def penalized(model):
        value = loss(model)
        gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True, allow_unused=True)
        return value + sum(gradient.square().sum() for gradient in gradients if gradient is not None)

    model = build(family, attn_implementation="eager", initializer_range=0.1).to(dtype)
    assert_trains_alike(pair_of(model), penalized)


OPTIMIZERS = {
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
}


class TestOptimizers:
    def batches(self):
        torch.manual_seed(1)
        for index in range(5):
            lengths = [LENGTHS[(index + i) % 4] for i in range(4)]
            yield batch_of(lengths) | {"labels": torch.randint(0, 2, (4,))}

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_loss_curve(self, family, optimizer):
        """With evaluation between steps, for which weights are prepared."""
        curves = []
        for each in pair_of(build(family, initializer_range=0.1)):
            curves.append([])
            optimize = OPTIMIZERS[optimizer](each.parameters())
            for batch in self.batches():
                curves[-1].append(step(each.train(), loss_of(batch))[0])
                nn.utils.clip_grad_norm_(each.parameters(), 1.0)
                optimize.step()
                with torch.no_grad():
                    curves[-1].append(each.eval()(**batch).loss)
        close(curves[1], curves[0], rtol=1e-5, atol=1e-5)
        assert curves[0][0] != curves[0][-1] and taken(each) == PACKED

    def test_accumulated_gradients(self):
        results = []
        for each in pair_of(build()):
            for batch in self.batches():
                each(**batch).loss.backward()
            results.append((torch.zeros(()), {name: parameter.grad for name, parameter in each.named_parameters()}))
        assert_same_step(results[1], results[0])

    def test_moving_average_of_weights(self):
        """It is a copy, whose weights change outside of every optimizer."""
        batch, outputs = batch_of(), []
        for each in pair_of(build(initializer_range=0.1)):
            average = AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.5))
            optimize = torch.optim.SGD(each.parameters(), lr=0.05)
            outputs.append([])
            for training in self.batches():
                step(each, loss_of(training))
                optimize.step()
                average.update_parameters(each)
                with torch.no_grad():
                    outputs[-1].append(average.eval()(**batch).logits)
        assert taken(average.module) == PACKED
        close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
        assert (outputs[0][0] - outputs[0][-1]).abs().max() > 1e-3

    def test_scaled_losses(self):
        """As float16 needs; the third loss overflows, and that step is left out."""
        weights = []
        for each in pair_of(build(initializer_range=0.1)):
            optimize, scaler = torch.optim.SGD(each.parameters(), lr=0.05), torch.amp.GradScaler("cpu", 2.0**12)
            for index, batch in enumerate(self.batches()):
                optimize.zero_grad()
                loss = each(**batch).loss * (torch.inf if index == 2 else 1.0)
                scaler.scale(loss).backward()
                scaler.unscale_(optimize)
                nn.utils.clip_grad_norm_(each.parameters(), 1.0)
                scaler.step(optimize)
                scaler.update()
            assert scaler.get_scale() == 2.0**11
            weights.append(dict(each.named_parameters()))
        assert taken(each) == PACKED
        close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


class TestAutograd:
    def test_parameters_that_are_given_by_name(self, family):
        """Results of a computation, in which their gradients go on."""
        loss = sequence_loss()

        class Called:
            def __init__(self, model, parameters):
                self.model, self.parameters = model, parameters

            def __call__(self, **batch):
                return torch.func.functional_call(self.model, self.parameters, (), batch)

        def scaled(model):
            return loss(Called(model, {name: 1.1 * parameter for name, parameter in model.named_parameters()}))

        assert_trains_alike(pair_of(build(family)), scaled)

    def test_functional_transforms(self):
        model, accelerated = pair_of(build(attn_implementation="eager"))
        batch = batch_of() | {"labels": torch.tensor([0, 1, 0, 1])}

        def gradients(model):
            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
            return torch.func.grad(lambda values: torch.func.functional_call(model, values, (), batch).loss)(parameters)

        close(gradients(accelerated), gradients(model), rtol=1e-4, atol=1e-5)
        assert taken(accelerated) == {("original", "the call is traced or transformed")}

    def test_activations_on_the_cpu(self, family):
        def loss(model):
            with save_on_cpu():
                return of_sequence(model)

        of_sequence = sequence_loss()
        assert_trains_alike(pair_of(build(family)), loss)

    def test_what_hooks_make_of_saved_tensors_is_used(self):
        """Everything is kept as bytes; nothing else is held."""

        def pack(tensor):
            count.append(1)
            return tensor.detach().numpy().tobytes(), tensor.dtype, tensor.shape

        def unpack(kept):
            data, dtype, shape = kept
            return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

        def loss(model):
            with saved_tensors_hooks(pack, unpack):
                return of_sequence(model)

        of_sequence, count = sequence_loss(), []
        assert_trains_alike(pair_of(build()), loss)
        assert len(count) > 50

    def test_deterministic_algorithms(self, family):
        torch.use_deterministic_algorithms(True)
        try:
            assert_trains_alike(pair_of(build(family)), sequence_loss())
        finally:
            torch.use_deterministic_algorithms(False)

    def test_anomalies_are_looked_for(self):
        with torch.autograd.detect_anomaly(check_nan=True):
            assert_trains_alike(pair_of(build()), sequence_loss())

    def test_weights_that_change_before_the_backward_pass(self):
        for each in pair_of(build()):
            value = sequence_loss()(each)
            with torch.no_grad():
                layers_of(each)[0].output.dense.weight.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()

    def test_backward_twice(self):
        pair, loss, results = pair_of(build()), sequence_loss(), []
        for each in pair:
            value = loss(each)
            value.backward(retain_graph=True)
            value.backward()
            results.append((value.detach(), {name: parameter.grad for name, parameter in each.named_parameters()}))
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                value.backward()
        assert_same_step(results[1], results[0])

    def test_hooks_of_parameters(self):
        pair, seen = pair_of(build()), [[], []]
        for each, gradients in zip(pair, seen, strict=True):
            weight = layers_of(each)[0].attention.self.value.weight
            weight.register_hook(lambda gradient: 2 * gradient)
            weight.register_post_accumulate_grad_hook(lambda w, gradients=gradients: gradients.append(w.grad.clone()))
        assert_trains_alike(pair, sequence_loss())
        assert len(seen[0]) == len(seen[1]) == 1

    def test_sparse_gradients(self):
        model = build()
        encoder_model(model).embeddings.word_embeddings.sparse = True
        loss, gradients = sequence_loss(), []
        for each in pair_of(model):
            loss(each).backward()
            gradients.append(encoder_model(each).embeddings.word_embeddings.weight.grad)
        assert taken(each) == PACKED and gradients[1].is_sparse
        assert gradients[1]._nnz() == TOKENS  # the original's has the padding too
        close(gradients[1].to_dense(), gradients[0].to_dense(), rtol=1e-4, atol=1e-5)

    def test_threads(self):
        """Each with its own batch, of its own lengths."""
        model, accelerated = pair_of(build())
        losses = [sequence_loss(lengths=[LENGTHS[(i + j) % 4] for j in range(4)]) for i in range(4)]
        expected, actual = [loss(model).detach() for loss in losses], [[] for _ in losses]

        def run(index):
            actual[index] += [losses[index](accelerated).detach() for _ in range(10)]

        threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for values, wanted in zip(actual, expected, strict=True):
            assert len(values) == 10
            for value in values:
                close(value, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("family", "compiled"), [("BERT", "model"), ("DistilBERT", "loss")])
def test_compiled(family, compiled):
    """The original computation, at present."""
    model, accelerated = pair_of(build(family))
    loss = sequence_loss()
    function = torch.compile(accelerated if compiled == "model" else loss, backend="aot_eager")
    actual = step(accelerated, (lambda _: loss(function)) if compiled == "model" else function)
    assert_same_step(actual, step(model, loss))
