#include "tape/ambient.h"

#include <ATen/autocast_mode.h>
#include <ATen/functorch/DynamicLayer.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>

namespace wengert::tape {

const char* ambient_refusal() {
  if (!at::functorch::getDynamicLayerStack().empty()) return "inside a torch.func transform";
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return "a torch dispatch mode is active";
  if (torch::autograd::AnomalyMode::is_enabled()) return "anomaly mode";
  if (c10::InferenceMode::is_enabled()) return "inference mode";
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0)) return "inside a forward-mode dual level";
  if (std::ranges::any_of(at::autocast::_AUTOCAST_SUPPORTED_DEVICES, at::autocast::is_autocast_enabled)) {
    return "called inside autocast";
  }
  if (torch::jit::tracer::isTracing()) return "torch.jit.trace is recording";
  return nullptr;
}

}  // namespace wengert::tape
