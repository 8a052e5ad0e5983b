# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from resnorm_ext.build.extension import extension
from resnorm_ext.engine import linear as engine
from resnorm_ext.engine.linear import LinearShape, choose_backends, product_dtype

from .linear_cases import BACKENDS, needs_onednn


class TestChoice:
    shape = LinearShape(torch.float32, 48, 56)

    @pytest.fixture(autouse=True)
    def unmeasured(self):
        needs_onednn()
        engine._seconds.pop(self.shape, None)
        yield
        engine._seconds.pop(self.shape, None)
        extension.set_linear_backend(*self.shape, "aten")

    @pytest.mark.parametrize("fastest", BACKENDS)
    def test_the_fastest_one_is_used_and_measured_once(self, monkeypatch, fastest):
        measured = []
        times = {backend: 1.0 + (backend != fastest) for backend in extension.linear_backends(torch.float32)}
        monkeypatch.setattr(engine, "_times", lambda shapes, _: measured.extend(shapes) or times)
        choose_backends([self.shape, self.shape])
        choose_backends([self.shape])
        assert measured == [self.shape]
        assert extension.linear_backend(*self.shape) == fastest

    def test_measurement_gives_a_backend_and_draws_no_random_number(self):
        before = torch.get_rng_state()
        backends = extension.linear_backends(torch.float32)
        assert list(engine._times([self.shape], backends)) == backends == list(BACKENDS)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_least_time_wins(self, monkeypatch):
        monkeypatch.setattr(engine, "_shortest_times", lambda *calls: [3.0, 1.0, 2.0])
        choose_backends([self.shape])
        assert extension.linear_backend(*self.shape) == "onednn"

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("fastest", [torch.float32, "half"])
    def test_halves_are_multiplied_in_float32_where_that_is_faster(self, monkeypatch, half, fastest):
        fastest = half if fastest == "half" else fastest
        shape = LinearShape(half, 48, 56)
        monkeypatch.setattr(engine, "_seconds", {})
        monkeypatch.setattr(
            engine, "_times", lambda shapes, names: dict.fromkeys(names, 1.0 + (next(iter(shapes)).dtype != fastest))
        )
        assert product_dtype([shape]) == half  # not measured yet
        choose_backends([shape])
        assert product_dtype([shape]) == fastest
        assert product_dtype([shape, LinearShape(half, 1, 1)]) == half  # one of them is not measured
        assert product_dtype([self.shape]) == torch.float32

    def test_what_takes_too_long_is_measured_once(self):
        calls = []
        engine._shortest_times(lambda: calls.append(time.sleep(2 * engine._TOO_SLOW)), lambda: None)
        assert len(calls) == 1

    def test_nothing_is_measured_under_deterministic_algorithms(self, monkeypatch):
        monkeypatch.setattr(engine, "_times", lambda *_: pytest.fail("measured"))
        torch.use_deterministic_algorithms(True)
        try:
            choose_backends([self.shape])
        finally:
            torch.use_deterministic_algorithms(False)
        assert extension.linear_backend(*self.shape) == "aten"

    def test_a_dtype_that_only_aten_multiplies_is_not_measured(self, monkeypatch):
        monkeypatch.setattr(engine, "_times", lambda *_: pytest.fail("measured"))
        shape = LinearShape(torch.float64, 48, 56)
        choose_backends([shape])
        for backend in ("onednn", "resnorm"):
            extension.set_linear_backend(*shape, backend)
            assert extension.linear_backend(*shape) == "aten"

    def test_environment_variable(self):
        program = """if True:
            import torch
            from resnorm_ext.build.extension import extension
            from resnorm_ext.engine import linear
            linear._times = lambda *_: 1 / 0
            shape = linear.LinearShape(torch.float32, 48, 56)
            linear.choose_backends([shape])
            print(extension.linear_backend(*shape))
        """
        processes = {
            value: subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | {"RESNORM_LINEAR": value},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for value in (*BACKENDS, "mkl")
        }
        results = {value: process.communicate(timeout=300) for value, process in processes.items()}
        for value in BACKENDS:
            assert results[value][0].strip() == value, results[value][1]
        assert "ValueError: Expected RESNORM_LINEAR to be aten, onednn or resnorm, but got mkl" in results["mkl"][1]
