// Every op's schema, once. Devices register their kernels by dispatch key: csrc/cpu, csrc/cuda.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ueo_fast, m) {
  // summary: conditional entropy, marginal entropy, mean confidence, sum of confidences, sum of
  // marginal weights. row_stats (B, 5): what backward needs of each row (csrc/cpu/ueo_loss.h).
  m.def(
      "ueo_loss_forward(Tensor logits, Tensor? confidence, Tensor? marginal_weights, "
      "float trade_off, float confidence_scale, float eps) "
      "-> (Tensor loss, Tensor summary, Tensor marginal, Tensor row_stats)");
  m.def(
      "ueo_loss_backward(Tensor grad_loss, Tensor logits, Tensor summary, Tensor marginal, "
      "Tensor row_stats, float trade_off, float eps) -> Tensor grad_logits");
  // Both at once, for an upstream gradient of 1.
  m.def(
      "ueo_loss_and_grad(Tensor logits, Tensor? confidence, Tensor? marginal_weights, "
      "float trade_off, float confidence_scale, float eps) "
      "-> (Tensor loss, Tensor summary, Tensor marginal, Tensor grad_logits)");
  m.def("max_softmax(Tensor logits, float scale) -> Tensor");
  m.def("interface_number() -> int");
  m.def("cuda_interface_number() -> int");
  m.def("cpu_capability() -> int");
}
