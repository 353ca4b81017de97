// The windows a loop nest reads from and writes to, on any device.
#pragma once
#include <cstdint>

#include "fused/program.h"

namespace wengert::kernels {

struct OperandView {
  const void* data;
  fused::Dtype dtype;
  const std::int64_t* strides;  // one per loop, in elements; 0 = broadcast
  bool in_host_memory = false;  // a single element that the host may read, whatever device the nest runs on
};

struct OutputView {
  void* data;
  fused::Dtype dtype;
  const std::int64_t* strides;  // one per loop, in elements; ignored on reduced axes
  bool accumulate;              // add to what is there instead of storing
};

}  // namespace wengert::kernels
