// Every op's schema, once. Devices register their kernels by dispatch key: csrc/cpu, csrc/cuda.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ueo_fast, m) {
  // saved: what backward needs, and what the loss is made of: the statistics of the rows (B, 5), the
  // marginal (C,), the summary (5,), one after the other (csrc/ueo_loss.h).
  m.def(
      "ueo_loss_forward(Tensor logits, Tensor? confidence, Tensor? marginal_weights, "
      "float trade_off, float confidence_scale, float eps) "
      "-> (Tensor loss, Tensor saved)");
  m.def(
      "ueo_loss_backward(Tensor grad_loss, Tensor logits, Tensor saved, float trade_off, float eps) "
      "-> Tensor grad_logits");
  // Both at once, for an upstream gradient of 1.
  m.def(
      "ueo_loss_and_grad(Tensor logits, Tensor? confidence, Tensor? marginal_weights, "
      "float trade_off, float confidence_scale, float eps) "
      "-> (Tensor loss, Tensor saved, Tensor grad_logits)");
  m.def("max_softmax(Tensor logits, float scale) -> Tensor");
  // x is dense with its channels in dimension `dim`; weight, bias, mean, var: (channels,) each, in
  // the compute dtype or that of x. scale = weight / sqrt(var + eps), shift = bias - mean scale; of
  // what is null, nothing is multiplied, added or subtracted. out = relu?(x scale + shift (+
  // residual)), in the layout of x. bits: with a residual and relu, one per element in the order of
  // memory, set where out is positive; else (0,).
  m.def(
      "channel_affine_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "float eps, Tensor? residual, int dim, bool relu) -> (Tensor out, Tensor bits)");
  // g = grad_out where out is positive: grad_x = g scale, grad_residual = g; by channel, in the
  // dtypes of weight and bias, grad_bias = sum g, grad_weight = sum g (x - mean) / sqrt(var + eps).
  // What is not needed is (0,). x: null where only grad_x without relu, or with bits, is needed.
  m.def(
      "channel_affine_backward(Tensor grad_out, Tensor? x, Tensor? weight, Tensor? bias, "
      "Tensor? mean, Tensor? var, float eps, Tensor bits, int dim, bool relu, bool needs_x, "
      "bool needs_weight, bool needs_bias, bool needs_residual) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  // x: (rows, columns), the columns adjacent; mean and rstd: (rows,) in the compute dtype.
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor out, Tensor mean, Tensor rstd)");
  // sums (2, columns): of grad_out (x - mean) rstd, and of grad_out. What is not needed is (0,).
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, "
      "bool needs_x, bool needs_sums) -> (Tensor grad_x, Tensor sums)");
  m.def("interface_number() -> int");
  m.def("cuda_interface_number() -> int");
  m.def("cpu_capability() -> int");
}
