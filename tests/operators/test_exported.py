# SPDX-License-Identifier: BSD-3-Clause
"""Programs that an earlier version exported run on this one: public operators keep their schemas."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import torch

from resnorm_ext import reference

# The members of a torch.export archive that are text, by name; made of the function that the test computes, by the
# version of this package before the norms were one family.
ARCHIVE = Path(__file__).with_name("exported_by_an_earlier_version.json")
WEIGHT, BIAS = torch.linspace(0.5, 1.5, 8), torch.linspace(-1, 1, 8)


def archive() -> io.BytesIO:
    inputs = io.BytesIO()
    torch.save(((torch.ones(2, 3, 8), torch.ones(2, 3, 8)), {}), inputs)
    members = {
        "p/data/weights/weight_0": WEIGHT.numpy().tobytes(),
        "p/data/weights/weight_1": BIAS.numpy().tobytes(),
        "p/data/sample_inputs/model.pt": inputs.getvalue(),
    }
    for name, content in json.loads(ARCHIVE.read_text()).items():
        members[name] = content if isinstance(content, str) else json.dumps(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def test_it_loads_and_computes_what_it_did():
    program = torch.export.load(archive()).module()
    x, r = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    y = reference.layer_norm(x, (8,), WEIGHT, BIAS)
    y, s = reference.add_layer_norm(y, r, (8,), WEIGHT, BIAS)
    z, _ = reference.add_layer_norm(y, s, (8,), WEIGHT, BIAS, input_bias=BIAS)
    torch.testing.assert_close(program(x, r), reference.residual_add(z, s, BIAS))
