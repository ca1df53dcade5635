// Involution on CPU tensors as PyTorch's dispatcher calls it, without Python between the two: a call of the operator takes
// some 20 microseconds through Python and ctypes, and some 0.2 milliseconds where other work has emptied the caches.
//
// Only what a channels-last network makes is done here: float32 or bfloat16, channels-last x and gradient, pixel-major
// weights, groups of whole vectors. All else goes to coadvise::involution2d_any_layout and ..._backward_any_layout, which
// are Python's. By PyTorch's stable interface for extensions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <tuple>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before PyTorch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using Kernel = int (*)(const int64_t *, const void *, const void *, void *, const void *, void *, void *);

constexpr int64_t LANES = 16;
Kernel kernel = nullptr;  // `involution` of involution_cpu.c for vectors of LANES floats

bool channels_last(const Tensor &t) {
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  return channels > 1 && height * width > 1 && t.stride(1) == 1 && t.stride(3) == channels &&
         t.stride(2) == width * channels && t.stride(0) == height * width * channels;
}

bool pixel_major(const Tensor &weight) {
  const int64_t side = weight.size(3), of_group = side * side, of_pixel = weight.size(1) * of_group;
  return weight.stride(3) == 1 && weight.stride(2) == side && weight.stride(1) == of_group &&
         weight.stride(5) == of_pixel && weight.stride(4) == weight.size(5) * of_pixel &&
         weight.stride(0) == weight.size(4) * weight.size(5) * of_pixel;
}

bool common(const Tensor &x, const Tensor &weight) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  return kernel && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && weight.scalar_type() == dtype &&
         x.dim() == 4 && weight.dim() == 6 && x.size(0) > 0 && weight.size(1) > 0 &&
         x.size(1) % (weight.size(1) * LANES) == 0 && channels_last(x) && pixel_major(weight);
}

std::array<int64_t, 11> sizes_of(const Tensor &x, const Tensor &weight, int64_t stride) {
  return {x.size(0), x.size(2), x.size(3), weight.size(1), x.size(1) / weight.size(1), weight.size(3), stride,
          weight.size(4), weight.size(5), x.element_size() == 2, torch::stable::get_num_threads()};
}

Tensor empty(std::array<int64_t, 4> sizes, const Tensor &like) {  // channels-last
  const auto [batch, channels, height, width] = sizes;
  const std::array<int64_t, 4> strides{channels * height * width, 1, width * channels, channels};
  int32_t dtype;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), -1, &made));
  return Tensor(made);
}

void check(int failed) {
  STD_TORCH_CHECK(!failed, "no memory for the involution kernel's buffers; use a smaller batch or image");
}

Tensor involution2d(const Tensor &x, const Tensor &weight, int64_t stride) {
  if (!common(x, weight)) {
    std::array<StableIValue, 3> stack{from(x), from(weight), from(stride)};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("coadvise::involution2d_any_layout", "", stack.data()));
    return to<Tensor>(stack[0]);
  }
  Tensor out = empty({x.size(0), x.size(1), weight.size(4), weight.size(5)}, x);
  check(kernel(sizes_of(x, weight, stride).data(), x.data_ptr(), weight.data_ptr(), out.data_ptr(), nullptr, nullptr,
               nullptr));
  return out;
}

std::tuple<Tensor, Tensor> involution2d_backward(const Tensor &grad, const Tensor &x, const Tensor &weight,
                                                 int64_t stride) {
  if (!common(x, weight) || !channels_last(grad) || grad.scalar_type() != x.scalar_type()) {
    std::array<StableIValue, 4> stack{from(grad), from(x), from(weight), from(stride)};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("coadvise::involution2d_backward_any_layout", "", stack.data()));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  Tensor grad_x = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x);
  Tensor grad_weight = torch::stable::empty_like(weight);
  check(kernel(sizes_of(x, weight, stride).data(), x.data_ptr(), weight.data_ptr(), nullptr, grad.data_ptr(),
               grad_x.data_ptr(), grad_weight.data_ptr()));
  return {grad_x, grad_weight};
}

}  // namespace

extern "C" int attach(Kernel involution) {
  kernel = involution;
  return 0;
}

STABLE_TORCH_LIBRARY_IMPL(coadvise, CPU, library) {
  library.impl("involution2d", TORCH_BOX(&involution2d));
  library.impl("involution2d_backward", TORCH_BOX(&involution2d_backward));
}
