# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can show. The folder is not named cuda because NVIDIA's own Python package is."""
