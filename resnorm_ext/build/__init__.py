# SPDX-License-Identifier: BSD-3-Clause
"""How the C++ extension comes to be: what is built (``config``) and with what (``toolchain``), for setuptools
(``compile``) and at first use (``jit``); and how it is found and loaded (``extension``)."""
