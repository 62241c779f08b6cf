// SPDX-License-Identifier: Apache-2.0
// Schemas of the operators. Their kernels are in cpu/ and cuda/, their derivatives and shapes for
// the compiler in d2_decouple/layers/point_gather.py, which says what they compute.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(d2_decouple, library) {
  library.def("point_gather(Tensor input, Tensor points, int groups, bool sum_points) -> Tensor");
  // A gradient that output_mask does not ask for (of input, of points) is an empty tensor.
  library.def(
      "_point_gather_backward(Tensor grad, Tensor input, Tensor points, int groups, "
      "bool sum_points, bool[2] output_mask) -> (Tensor, Tensor)");
}

// Importing the module `_C` loads this library, and that registers the operators.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
